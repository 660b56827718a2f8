"""Weights that are computed from other parameters before every forward: by a parametrization, or by an older hook.

Of these parameters one may be the weight's direction: a zero in it is a zero in the weight. weight_norm (w = g v / |v|)
has it in v, spectral_norm (w = v / sigma(v)) in the original. An orthogonal weight has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from sparsify.model.wrappers import by_clean_name

__all__: list[str] = []


@dataclass(frozen=True)
class Recomputed:
    """A weight that is computed before every forward.

    Attributes:
        layer: the clean name of its layer, "" for the model itself.
        own: its attribute there, mostly "weight".
        kind: by what, for messages.
        direction: the parameter whose zeros are zeros of the weight; None: there is none, or not for long.
        others: the parameters beside it, as the norm of weight_norm.
        divided_over: dimensions of the direction over which it is divided by its norm: where all of it is zero there,
            the weight is NaN.
    """

    layer: str
    own: str
    kind: str
    direction: str | None
    others: tuple[str, ...]
    divided_over: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The name of the weight, as if it were a parameter."""
        return _below(self.layer, self.own)

    @property
    def why_not(self) -> str:
        """The reason why it cannot be masked, and the way out."""
        return (
            f"is recomputed before every forward by {self.kind}, so zeros in it would not last. Remove it first "
            "(torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.prune.remove), or leave the layer out"
        )


def recomputed_weights(model: nn.Module) -> dict[str, Recomputed]:
    """The recomputed weights of `model` by name."""
    found = {}
    for path, module in by_clean_name(model.named_modules()).items():
        for weight in (*_by_parametrization(path, module), *_by_hook(path, module)):
            found[weight.name] = weight
    return found


def _by_parametrization(path: str, module: nn.Module) -> Iterator[Recomputed]:
    lists = module._modules.get("parametrizations")
    for own, made in lists.named_children() if isinstance(lists, nn.ModuleDict) else ():
        if not isinstance(made, ParametrizationList):
            continue
        parameters = {name: p for name, p in made._parameters.items() if p is not None}
        names = {name: _below(path, f"parametrizations.{own}.{name}") for name in parameters}
        kinds = [type(one).__name__ for one in made]
        direction = next((name for name in reversed(parameters) if _keeps_zeros(made, name)), None)
        dims: tuple[int, ...] = ()
        if direction is not None:
            value = parameters[direction]
            if "_WeightNorm" in kinds:
                norm = next(p for name, p in parameters.items() if name != direction)
                dims = _all_but_the_norms(value, norm)
            elif "_SpectralNorm" in kinds:
                dims = tuple(range(value.dim()))
        yield Recomputed(
            path,
            own,
            f"a parametrization ({', '.join(kind.lstrip('_') for kind in kinds)})",
            None if direction is None else names[direction],
            tuple(full for name, full in names.items() if name != direction),
            dims,
        )


def _by_hook(path: str, module: nn.Module) -> Iterator[Recomputed]:
    for hook in module._forward_pre_hooks.values():
        kind = type(hook).__name__
        held = module._parameters
        if kind == "WeightNorm" and (own := str(getattr(hook, "name", ""))) and held.get(f"{own}_v") is not None:
            direction, norm = held[f"{own}_v"], held[f"{own}_g"]
            assert direction is not None and norm is not None
            dims = _all_but_the_norms(direction, norm)
            others = (_below(path, f"{own}_g"),)
            yield Recomputed(path, own, "a hook (weight_norm)", _below(path, f"{own}_v"), others, dims)
        elif kind == "SpectralNorm" and (value := held.get(f"{getattr(hook, 'name', '')}_orig")) is not None:
            own = str(getattr(hook, "name", ""))
            dims = tuple(range(value.dim()))
            yield Recomputed(path, own, "a hook (spectral_norm)", _below(path, f"{own}_orig"), (), dims)
        elif (own := str(getattr(hook, "_tensor_name", ""))) and held.get(f"{own}_orig") is not None:
            # Two keepers of zeros in one weight: each would have its own idea of them.
            yield Recomputed(path, own, "a hook (torch's own pruning)", None, (_below(path, f"{own}_orig"),))


def _all_but_the_norms(direction: Tensor, norm: Tensor) -> tuple[int, ...]:
    if norm.dim() != direction.dim():
        return tuple(range(direction.dim()))
    kept = [dim for dim, size in enumerate(norm.shape) if size > 1] or [0]
    return tuple(dim for dim in range(direction.dim()) if dim not in kept or norm.numel() == 1)


def _keeps_zeros(made: ParametrizationList, name: str) -> bool:
    """True if zeros of this original are zeros of the weight, whatever the others are: tried with a pattern of them."""
    original = made._parameters[name]
    if original is None or original.is_meta or hasattr(original, "placements") or not original.is_floating_point():
        return False
    if original.dim() < 2 or (any(type(one).__name__ == "_WeightNorm" for one in made) and name != "original1"):
        return False
    modes = [(module, module.training) for module in made.modules()]
    # A third of the weights, and never a whole row: a norm over rows must stay above zero.
    places = torch.arange(original.numel(), device=original.device).view(original.shape)
    keep = (places % 3 != 1) | (places % max(original.shape[-1], 1) == 0)
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            values = [p.detach() for p in made._parameters.values() if p is not None]
            position = [key for key, p in made._parameters.items() if p is not None].index(name)
            # Not the user's values, which may hold zeros.
            values[position] = torch.linspace(1.0, 2.0, original.numel(), device=original.device).to(original.dtype)
            values[position] = values[position].view(original.shape) * keep
            result = made[0](*values)
            for step in list(made)[1:]:
                result = step(result)
    except Exception:
        return False
    finally:
        for module, training in modes:
            module.training = training
    if not isinstance(result, Tensor) or result.shape != original.shape:
        return False
    return bool((result == 0)[~keep].all()) and bool((result != 0).any())


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
