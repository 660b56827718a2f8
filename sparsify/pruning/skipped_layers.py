"""Layers replaced by the identity: the class of a user's layer is changed in place, the state_dict stays as it was."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, SupportsIndex, cast

import torch
from torch import Tensor, nn

from sparsify.errors import TargetError
from sparsify.model.preserved import eval_mode_, preserved

__all__: list[str] = []


@dataclass
class Skip:
    """The state of a skipped layer.

    Attributes:
        original: the class that it had.
        name: its name in the model.
        entries: the form of its output: 0 a tensor, n a tuple of n whose first is that tensor and the others None. None
            before it is known.
        forward: the forward that was set on the object itself, as wrappers do.
    """

    original: type[nn.Module]
    name: str
    entries: int | None = None
    forward: Any = None


class Skipped(nn.Module):
    """Mixed into the class of a layer: its forward returns a copy of its first tensor argument.

    At the first call, unless that is in compiled code, the layer's own output is computed once, without a trace in
    gradients, buffers or random numbers, and its shape is compared.

    Raises:
        TargetError: at that call, where the shape is another one; it is then an ordinary layer again.
    """

    _skip: Skip

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        read = _first_tensor_of(args, kwargs)
        if read is None:
            raise TargetError(
                f"{self._skip.name!r} was called without a tensor: it cannot be replaced by the identity."
            )
        if self._skip.entries is None and not torch.compiler.is_compiling():
            try:
                self._skip.entries = _given_by(self, self._skip, args, kwargs)
            except BaseException:
                restore_forward(self)
                raise
        # A copy, as a layer's output is: what works in place on it must not change its input, which others may read.
        # No copy is left of it in an exported file.
        given = read.clone()
        return (given, *itertools.repeat(None, self._skip.entries - 1)) if self._skip.entries else given

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        # The class was made here: pickle and deepcopy find it by the one it was made of.
        own: Any = getattr(self, "__getstate__", None)  # every object has one from Python 3.11 on
        state = self.__dict__ if own is None else own()
        return _blank, (self._skip.original,), state


_CLASSES: dict[type[nn.Module], type[Skipped]] = {}


def _skipped(original: type[nn.Module]) -> type[Skipped]:
    """The class of skipped layers of a class: still one of its own, for code that asks what it is."""
    if original not in _CLASSES:
        _CLASSES[original] = type(f"Skipped{original.__name__}", (Skipped, original), {"__module__": __name__})
    return _CLASSES[original]


def _blank(original: type[nn.Module]) -> Skipped:
    made = _skipped(original)
    return made.__new__(made)


def skip(module: nn.Module, name: str, entries: int | None = None) -> None:
    """Replaces `module` by the identity in place; one that is replaced already stays as it is.

    Args:
        module: a layer whose output has the shape of its first tensor argument.
        name: its name in the model, for messages.
        entries: as in `Skip`, where it is known.
    """
    if isinstance(module, Skipped):
        return
    original = type(module)
    made = Skip(original, name, entries, module.__dict__.get("forward"))
    module.__dict__["_skip"] = made
    cast(Any, module).__class__ = _skipped(original)
    module.__dict__.pop("forward", None)
    # A gradient that is left would move the weights of a layer that is not called any more.
    for parameter in module.parameters():
        parameter.grad = None


def known_entries(module: nn.Module) -> int | None:
    """The form of the output of a layer that is skipped, as `entries` of `Skip`; None where it is not known yet."""
    return module._skip.entries if isinstance(module, Skipped) else None


def restore_forward(module: nn.Module) -> None:
    """Undoes `skip`."""
    if isinstance(module, Skipped):
        known = module._skip
        cast(Any, module).__class__ = known.original
        del module.__dict__["_skip"]
        if known.forward is not None:
            module.__dict__["forward"] = known.forward


def refuse_unskippable(model: nn.Module, layers: Mapping[str, nn.Module], *, where: str) -> None:
    """Refuses layers that cannot be replaced by the identity, as far as can be seen without calling them.

    Raises:
        TargetError: one that is never called, or gives another number of channels than it reads.
    """
    parents = {id(child): module for module in model.modules() for child in module.children()}
    for name, module in layers.items():
        original = module._skip.original if isinstance(module, Skipped) else type(module)
        parent = parents.get(id(module))
        read = getattr(module, "in_features", getattr(module, "in_channels", None))
        gives = getattr(module, "out_features", getattr(module, "out_channels", None))
        why = None
        if getattr(original, "forward", None) is nn.Module.forward or isinstance(module, nn.ModuleList | nn.ModuleDict):
            why = f"is a {original.__name__}, which is not called itself; name the layers in it"
        elif isinstance(module, torch.jit.ScriptModule):
            why = "is a scripted module, which cannot be changed"
        elif isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
            why = f"is read by its {type(parent).__name__} and not always called; name that one as a whole"
        elif isinstance(module, nn.Embedding):
            why = "is an Embedding, which gives vectors for numbers"
        elif isinstance(read, int) and isinstance(gives, int) and read != gives:
            why = f"reads {read} and gives {gives} channels"
        if why is not None:
            raise TargetError(f"{where}: {name!r} {why}. It cannot be replaced by the identity.")


def entries_of(
    model: nn.Module, layers: Mapping[str, nn.Module], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, int]:
    """The form of each layer's output (as in `Skip`) in a forward of `model`; layers that are not called are missing.

    The model stays as it was.

    Raises:
        TargetError: one gives another shape than it reads.
    """
    found: dict[str, int] = {}
    handles = []
    for name, module in layers.items():

        def see(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object, name: str = name
        ) -> None:
            found[name] = _compared(name, _first_tensor_of(args, kwargs), output)

        handles.append(module.register_forward_hook(see, with_kwargs=True))
    try:
        with _evaluated(model):
            model.forward(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _given_by(module: nn.Module, known: Skip, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    forward = known.forward or functools.partial(known.original.forward, module)
    with _evaluated(module):
        return _compared(known.name, _first_tensor_of(args, kwargs), forward(*args, **kwargs))


def _compared(name: str, read: Tensor | None, gives: object) -> int:
    first, rest = (gives[0], list(gives[1:])) if isinstance(gives, tuple) and gives else (gives, [])
    if read is None or not isinstance(first, Tensor) or any(other is not None for other in rest):
        what = f"a {type(gives).__name__}"
        if isinstance(gives, tuple):
            what = f"a tuple of {', '.join(type(item).__name__ for item in gives)}"
        raise TargetError(
            f"LayerPruningModifier.layers: {name!r} gives {what}, which is more than what it reads. It cannot be "
            "replaced by the identity; name a layer that reads and gives one tensor."
        )
    if first.shape != read.shape or first.is_floating_point() != read.is_floating_point():
        raise TargetError(
            f"LayerPruningModifier.layers: {name!r} reads a tensor of shape {tuple(read.shape)} and gives one of shape "
            f"{tuple(first.shape)}. It cannot be replaced by the identity; name a layer that keeps the shape, or the "
            "block that it belongs to."
        )
    return 1 + len(rest) if isinstance(gives, tuple) else 0


@contextlib.contextmanager
def _evaluated(module: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients; afterwards the module is what it was."""
    with preserved(module), torch.no_grad():
        eval_mode_(module)
        yield


def _first_tensor_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    return next((value for value in itertools.chain(args, kwargs.values()) if isinstance(value, Tensor)), None)
