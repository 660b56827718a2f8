"""The state of an optimizer for a parameter (momentum, second moments, ...), set back to what it began with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS

from sparsify.model.masked_memory import zero_masked_
from sparsify.model.sharding import is_sharded, local

__all__: list[str] = []

_STATE_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Counts, and products over steps: of the parameter as a whole, also where it has one weight.
_OF_ALL_WEIGHTS = frozenset({"step", "mu_product", "mu", "eta"})
# Copies of the weights: of Lookahead's slow ones (timm, pytorch_optimizer, torch_optimizer), and of those that SAM
# comes back to. Schedule-free optimizers, which have eval(), keep "z", from which the weights are interpolated.
_WEIGHTS = frozenset({"lookahead_slow_buff", "slow_params", "slow_buffer", "backup_params", "cached_params", "old_p"})


def reset_where(optimizer: object, parameter: Tensor, mask: Tensor | None = None) -> None:
    """Sets what `optimizer` remembers of the weights that `mask` does not keep to what it would begin with.

    Zero for nearly everything, both moments of Adam among it; the step size of Rprop begins with the learning rate, the
    sum of Adagrad with its initial value, the average of ASGD with the weights.

    Of a sharded parameter (DTensor) the part on this rank is reset. Moments that are packed (integers with scales, as
    bitsandbytes has them; tensor subclasses, as torchao's are; float8) are never written to as numbers: of single
    weights nothing is reset in them, and of all weights the whole state is dropped, to be set up by the optimizer's
    next step.

    Args:
        optimizer: one that keeps state by parameter as torch's do, or several in a list or tuple; None, or one without
            any, has nothing to be reset.
        parameter: the one whose state it is.
        mask: bools of the parameter's shape, or of its part on this rank, False where state is reset: there only, and
            only in what has that shape.
            None: everywhere, the count of steps included. It belongs to all weights of the parameter: with moments of
            zero and a late count, Adam would take steps of several times the learning rate. LBFGS keeps curvature in
            the space of all weights of all parameters: it is forgotten whatever the mask.
    """
    if isinstance(optimizer, list | tuple):
        for one in optimizer:
            reset_where(one, parameter, mask)
        return
    states = getattr(optimizer, "state", None)
    if not isinstance(states, Mapping):
        return
    if isinstance(optimizer, LBFGS):
        # Kept under the first parameter: it holds for all or for none.
        if any(one is parameter for group in optimizer.param_groups for one in group["params"]):
            for state in states.values():
                state.clear()
        return
    # Not `states[parameter]`: it is a defaultdict, and an optimizer takes an empty entry for one that was set up.
    state = states.get(parameter)
    if not state:
        return
    if mask is not None:
        here, mask = local(parameter), local(mask)
        for key, whole in _tensors(state):
            value = _part(whole)
            if value.shape == here.shape and key not in _OF_ALL_WEIGHTS and _is_plain(value):
                _reset_masked(value, mask, _initial(key, value, optimizer, parameter))
    elif any(is_packed(value) for _, value in _tensors(state)):
        # Both libraries set up the state of a parameter that has none, in `step`:
        # https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/optim/optimizer.py
        # https://github.com/pytorch/ao/blob/main/torchao/optim/adam.py
        state.clear()
    else:
        _reset_all(state, optimizer, parameter)


def steps_taken(optimizer: object | None) -> int | None:
    """The number of steps that `optimizer` says it has taken, the highest of its parameters and groups; None: it keeps
    no count, as SGD, or has taken none. Waits for the device where counts lie there."""
    states = getattr(optimizer, "state", None)
    groups = getattr(optimizer, "param_groups", ())
    kept = [state for state in states.values() if isinstance(state, Mapping)] if isinstance(states, Mapping) else []
    # schedulefree calls it k, in each group.
    counts = [one.get("step") for one in kept] + [group.get(key) for group in groups for key in ("step", "k")]
    found = [int(n) for n in counts if isinstance(n, int | float) and not isinstance(n, bool)]
    tensors = [n for n in counts if isinstance(n, Tensor) and n.numel() == 1 and not n.is_meta]
    if tensors:
        # One message for all: there may be thousands, on a device.
        found.append(int(torch.stack([n.detach().reshape(()).to(tensors[0].device).float() for n in tensors]).max()))
    return max(found, default=0) or None


def _reset_masked(value: Tensor, mask: Tensor, first: Tensor | float) -> None:
    if isinstance(first, Tensor):
        with torch.no_grad():
            value.copy_(torch.where(mask.to(value.device), value, first.to(value)))
    elif first == 0.0:
        zero_masked_(value, mask)
    else:
        with torch.no_grad():
            value.masked_fill_(~mask.to(value.device), first)


def _reset_all(state: MutableMapping[str, Any], optimizer: object, parameter: Tensor) -> None:
    with torch.no_grad():
        for key, whole in _tensors(state):
            value = _part(whole)
            if not value.is_meta:
                value.copy_(torch.as_tensor(_initial(key, value, optimizer, parameter), device=value.device))
    for key, number in state.items():
        if isinstance(number, int | float) and not isinstance(number, bool):
            state[key] = type(number)(_initial(key, None, optimizer, parameter))


def _initial(key: str, value: Tensor | None, optimizer: object, parameter: Tensor) -> Tensor | float:
    """The first value of the state `key`: those of torch's optimizers by their names, zero for any other."""
    if key in ("mu_product", "mu"):
        return 1.0
    if key == "ax" and value is not None and value.shape == local(parameter).shape:
        # torch begins with zeros and copies the weights at the first step, while mu is 1; later on it is not.
        return local(parameter)
    if key in _WEIGHTS or (key == "z" and callable(getattr(optimizer, "eval", None))):
        return local(parameter)
    if key not in ("step_size", "eta", "sum"):
        return 0.0
    groups = getattr(optimizer, "param_groups", [])
    group: dict[str, Any] = next((g for g in groups if any(p is parameter for p in g["params"])), {})
    return float(group.get("initial_accumulator_value", 0.0) if key == "sum" else group.get("lr", 0.0))


def _part(value: Tensor) -> Tensor:
    """The part on this rank of a sharded tensor; others are not touched: a subclass may take no operator at all."""
    return local(value) if is_sharded(value) else value


def _tensors(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for key, value in state.items():
        for one in value if isinstance(value, list | tuple) else (value,):
            if isinstance(one, Tensor):
                yield key, one


def _is_plain(value: Tensor) -> bool:
    """True if `value`, or the part of it on this rank, is numbers in memory of its own."""
    value = _part(value)
    return (
        type(value) in (Tensor, nn.Parameter)
        and value.dtype in _STATE_TYPES
        and value.layout == torch.strided
        and not value.is_meta
    )


def is_packed(value: Tensor) -> bool:
    """True if `value` stands for other numbers than it holds; a single number, a count of steps, does not."""
    return not _is_plain(value) and not value.is_meta and (value.numel() > 1 or type(value) is not Tensor)
