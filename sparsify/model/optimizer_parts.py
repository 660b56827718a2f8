"""The optimizers inside of an optimizer: those around the one that steps (Lookahead, accelerate's) and those that it
steps with (SAM's base optimizer)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch.optim import Optimizer

__all__: list[str] = []

_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
_PASS_ON = ("accelerate.", "lightning.", "pytorch_lightning.", "lightning_fabric.", "sparsify.")


def is_hookable(optimizer: object) -> bool:
    """True if torch calls hooks at the steps of `optimizer`, and where it saves and loads its state.

    A subclass that does not call `Optimizer.__init__` lacks hooks, or has them and nobody calls them (Lookahead of timm
    1.0.31: https://github.com/huggingface/pytorch-image-models/blob/main/timm/optim/lookahead.py).
    """
    return (
        isinstance(optimizer, Optimizer)
        and all(name in vars(optimizer) for name in _HOOKS)
        and bool(getattr(type(optimizer).step, "hooked", False))
    )


def held_optimizers(optimizer: object) -> list[Optimizer]:
    """The torch optimizers that `optimizer` holds in attributes, also in lists and dicts, and those that they hold."""
    found: dict[int, Optimizer] = {}
    waiting: list[object] = [optimizer]
    while waiting:
        for one in _attributes(waiting.pop()):
            if id(one) not in found and one is not optimizer:
                found[id(one)] = one
                waiting.append(one)
    return list(found.values())


def wrapped_optimizer(wrapper: object) -> Any:
    """The optimizer that `wrapper` passes its steps on to; None where there is none, or several."""
    deeper = getattr(wrapper, "optimizer", None)
    if isinstance(wrapper, Optimizer):
        held = [] if isinstance(deeper, Optimizer) else list(_attributes(wrapper))
        return held[0] if len(held) == 1 else deeper if isinstance(deeper, Optimizer) else None
    shares = isinstance(deeper, Optimizer) and getattr(wrapper, "param_groups", None) is deeper.param_groups
    return deeper if shares else None


def wrappers_around(optimizer: object) -> list[Any]:
    """The wrappers from `optimizer` inward to the one that steps, outermost first: those that may move weights after it
    has stepped. Wrappers of training frameworks move none."""
    found: list[Any] = []
    while not is_hookable(optimizer):
        inner = wrapped_optimizer(optimizer)
        if inner is None or inner is optimizer or len(found) > 20:
            break
        if not any(f"{cls.__module__}.".startswith(_PASS_ON) for cls in type(optimizer).__mro__):
            found.append(optimizer)
        optimizer = inner
    return found


def parts_with_state(optimizer: object) -> list[Any]:
    """`optimizer`, the wrappers inside of it and all that they hold, each that keeps state by parameter, once."""
    every: list[Any] = [optimizer]
    inner: Any = optimizer
    while not is_hookable(inner) and len(every) < 20:
        inner = wrapped_optimizer(inner)
        if inner is None or any(inner is one for one in every):
            break
        every.append(inner)
    every += [held for one in list(every) for held in held_optimizers(one)]
    # The innermost first: what it is (LBFGS) says how its state is to be treated.
    states = {id(one.state): one for one in every if isinstance(getattr(one, "state", None), Mapping)}
    return list(states.values())


def _attributes(optimizer: object) -> Iterator[Optimizer]:
    for value in list(getattr(optimizer, "__dict__", {}).values()):
        items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else (value,)
        for item in items:
            # type(), not isinstance: wrappers of Lightning and Fabric imitate the class of what they wrap.
            if issubclass(type(item), Optimizer):
                yield item
