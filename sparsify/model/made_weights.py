"""Weights that are made of their parameters in every forward: where a module reads `weight`, it finds what was made.

The parameter stays what the optimizer moves, under its name. In the forward of each module that reads it an attribute
of the same name stands before it, with the graph that leads back to the parameter. Nothing is made while the model is
traced for its structure: a plan is about the parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.model.wrappers import by_clean_name

__all__: list[str] = []

_MADE = "_made_weights"
_plain = 0


@dataclass(eq=False)
class Made:
    """A weight that stands before the parameter `key` of `target`: `maker(parameter)`, in the shape of it."""

    target: nn.Module
    key: str
    maker: nn.Module


def make_weight(model: nn.Module, parameter: nn.Parameter, maker: nn.Module) -> None:
    """Has all modules below `model` that hold `parameter` compute with `maker(parameter)` from now on.

    The first of them gets `maker` as its child `<name>_maker`, so that its buffers are among those of the model.
    """
    first = True
    for module in model.modules():
        for key, own in list(module._parameters.items()):
            if own is parameter:
                if first:
                    module.add_module(palette_name(key), maker)
                    maker.train(module.training)
                first = False
                _read_by(module, Made(module, key, maker))
        # Its forward computes with the weight of this child, which it never calls.
        projection = getattr(module, "out_proj", None) if isinstance(module, nn.MultiheadAttention) else None
        if projection is not None and projection._parameters.get("weight") is parameter:
            _read_by(module, Made(projection, "weight", maker))


def _read_by(reader: nn.Module, made: Made) -> None:
    if _MADE not in reader.__dict__:
        reader.__dict__[_MADE] = []
        reader.register_forward_pre_hook(_put_made)
        reader.register_forward_hook(_take_made_away, always_call=True)
    reader.__dict__[_MADE].append(made)


def _put_made(reader: nn.Module, _args: Any) -> None:
    if _plain:
        return
    for made in reader.__dict__[_MADE]:
        parameter = made.target._parameters.get(made.key)
        if parameter is not None:
            object.__setattr__(made.target, made.key, made.maker(parameter))


def _take_made_away(reader: nn.Module, _args: Any, _output: Any) -> None:
    for made in reader.__dict__[_MADE]:
        if made.key in made.target.__dict__:
            object.__delattr__(made.target, made.key)


def palette_name(key: str) -> str:
    """The name of the child that makes the parameter `key` of a module."""
    return f"{key}_palette"


def weight_in_use(module: nn.Module, key: str) -> Tensor:
    """The weight that `module` computes with as its `key`, outside of its forward too."""
    found = module.__dict__.get(key)
    if isinstance(found, Tensor):
        return found
    for made in module.__dict__.get(_MADE, ()):
        if made.target is module and made.key == key:
            value: Tensor = made.maker(module._parameters[key])
            return value
    own: Tensor = getattr(module, key)
    return own


def is_in_use(module: nn.Module, key: str, tensor: object) -> bool:
    """True if `tensor` is the parameter `key` of a module, or what stands before it in the forward at hand."""
    return tensor is not None and (tensor is module._parameters.get(key) or tensor is module.__dict__.get(key))


def makers(model: nn.Module) -> dict[str, nn.Module]:
    """{name of a parameter: what makes its weight}, by clean name, each once."""
    parameters = {id(p): name for name, p in reversed(by_clean_name(model.named_parameters()).items())}
    found: dict[str, nn.Module] = {}
    for module in model.modules():
        for made in module.__dict__.get(_MADE, ()):
            parameter = made.target._parameters.get(made.key)
            if parameter is not None and id(parameter) in parameters:
                found.setdefault(parameters[id(parameter)], made.maker)
    return found


@torch.no_grad()
def keep_made_weights(model: nn.Module, only: Iterable[nn.Module] | None = None) -> None:
    """Gives each parameter the values that are made of it in eval mode, which it holds from now on by itself.

    Args:
        model: below which they are.
        only: what makes them; None: whatever does.
    """
    chosen = None if only is None else set(only)
    values: dict[int, tuple[nn.Parameter, Tensor]] = {}
    for module in model.modules():
        for made in module.__dict__.get(_MADE, ()):
            parameter = made.target._parameters.get(made.key)
            if parameter is None or id(parameter) in values or not (chosen is None or made.maker in chosen):
                continue
            training = made.maker.training
            made.maker.eval()
            values[id(parameter)] = (parameter, made.maker(parameter))
            made.maker.train(training)
    for parameter, value in values.values():
        parameter.copy_(value)
    drop_made_weights(model, chosen)


def drop_made_weights(model: nn.Module, only: Iterable[nn.Module] | None = None) -> None:
    """Has modules below `model` compute with their parameters again, as they are. Arguments as before."""
    chosen = None if only is None else set(only)
    for module in list(model.modules()):
        ended = [made for made in module.__dict__.get(_MADE, ()) if chosen is None or made.maker in chosen]
        for made in ended:
            module.__dict__[_MADE].remove(made)
            made.target.__dict__.pop(made.key, None)
            if made.target._modules.get(palette_name(made.key)) is made.maker:
                del made.target._modules[palette_name(made.key)]
        if module.__dict__.get(_MADE) == []:
            del module.__dict__[_MADE]
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for number in [number for number, hook in hooks.items() if hook in (_put_made, _take_made_away)]:
                    del hooks[number]
                    module._forward_hooks_always_called.pop(number, None)


@contextmanager
def plain_weights() -> Iterator[None]:
    """In the block nothing is made: modules compute with their parameters."""
    global _plain
    _plain += 1
    try:
        yield
    finally:
        _plain -= 1
