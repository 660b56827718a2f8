"""Weights that another module's forward reads: rounded where they go into a product, in float for all other uses.

A tied autoencoder written by hand (`F.linear(h, self.enc.weight.t())`), logits by an embedding (`h @ emb.weight.T`),
attention that calls F.linear with the weights of its projections (torchvision's Swin). A product that is the one of
the layer itself (`F.linear` of its weight, or a matmul with the weight transposed) is quantized like a call of it; any
other has the rounded weight, on the layer's own scales. A norm or a penalty of the weight sees the parameter. Torch and
the exported file go by the same rules: weights are known by being the parameter of the layer, or a view of it that was
made in a watched forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify.quantization.wiring import Converted, wiring_of

__all__: list[str] = []

_TURNED, _TURNED_LAST, _DATA = (cast(Any, getattr(Tensor, name)).__get__ for name in ("T", "mT", "data"))
MOVED = "_moved_weight"
"""The attribute of a view of a weight: a `MovedWeight`."""
TRANSPOSES: tuple[Any, ...] = (
    *(torch.t, Tensor.t, _TURNED, _TURNED_LAST, torch.transpose, Tensor.transpose, torch.permute),
    *(Tensor.permute, torch.swapaxes, Tensor.swapaxes, torch.swapdims, Tensor.swapdims, torch.movedim, Tensor.movedim),
)
MOVES: frozenset[Any] = frozenset(
    (
        *(*TRANSPOSES, Tensor.__getitem__, torch.chunk, Tensor.chunk, torch.split, Tensor.split, Tensor.unbind),
        *(torch.unbind, torch.narrow, Tensor.narrow, torch.reshape, Tensor.reshape, Tensor.view, torch.flatten),
        *(Tensor.flatten, torch.squeeze, Tensor.squeeze, torch.unsqueeze, Tensor.unsqueeze, Tensor.expand),
        *(Tensor.contiguous, torch.clone, Tensor.clone, torch.detach, Tensor.detach, _DATA),
    )
)
"""Functions that give values of a weight in another shape or order."""
_FORWARD_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_LAYERS: tuple[Any, ...] = (F.linear, *_FORWARD_CONVOLUTIONS, *_TRANSPOSED)
"""Functions of an input, a weight and a bias: those of layers."""
_MATMULS: tuple[Any, ...] = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
PRODUCTS: frozenset[Any] = frozenset(
    (
        *(*_LAYERS, *_MATMULS, Tensor.__rmatmul__, torch.bmm, Tensor.bmm, torch.addmm, Tensor.addmm, torch.baddbmm),
        *(Tensor.baddbmm, torch.einsum, F.embedding),
    )
)
"""Functions that see a rounded weight."""


@dataclass(frozen=True)
class MovedWeight:
    """A view of a weight: whose it is, and how it comes from it."""

    layer: Converted
    of_weight: Callable[[Tensor], Tensor]
    transposed: bool
    """True if rows and columns of a matrix are exchanged, and that is all."""


def operated(
    layers: Sequence[Converted], function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any] | None:
    """(the result of `function`,) if it moves or multiplies the weight of one of `layers`; None: it does not.

    Args:
        layers: those whose weights are read here.
        function: as a `TorchFunctionMode` sees it.
        args: of the call.
        kwargs: likewise.
    """
    if function in MOVES:
        source = source_of(layers, args[0]) if args else None
        return None if source is None else (_moved_weight(source, function, args, kwargs),)
    if function not in PRODUCTS:
        return None
    like = _like_the_layer(layers, function, args, kwargs)
    if like is not None:
        return (like,)
    found = False

    def rounded(value: Any) -> Any:
        nonlocal found
        if isinstance(value, (list, tuple)):
            return type(value)(map(rounded, value))
        source = source_of(layers, value)
        if source is None:
            return value
        found = True
        return source.of_weight(source.layer.rounded_weight().to(value.dtype))

    changed = [rounded(value) for value in args], {name: rounded(value) for name, value in kwargs.items()}
    return (function(*changed[0], **changed[1]),) if found else None


def source_of(layers: Sequence[Converted], value: object) -> MovedWeight | None:
    """The layer among `layers` whose weight `value` is, perhaps moved; None: it is another tensor."""
    if not isinstance(value, Tensor):
        return None
    moved = cast("MovedWeight | None", value.__dict__.get(MOVED))
    if moved is not None:
        return moved
    for layer in layers:
        if value is layer._parameters.get("weight"):
            return MovedWeight(layer, lambda weight: weight, False)
    return None


def _moved_weight(
    source: MovedWeight, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """The result of a function that moves, which knows where it comes from."""
    before, rest = args[0], args[1:]
    result = function(*args, **kwargs)
    direct = before is source.layer._parameters.get("weight")

    def note(part: object, of_weight: Callable[[Tensor], Tensor], transposed: bool = False) -> None:
        if isinstance(part, Tensor):
            part.__dict__[MOVED] = MovedWeight(source.layer, of_weight, transposed)

    if isinstance(result, (list, tuple)):
        for number, part in enumerate(result):
            note(part, partial(lambda at, weight: function(source.of_weight(weight), *rest, **kwargs)[at], number))
    else:
        turned = direct and function in TRANSPOSES and before.dim() == 2 and result.stride() == before.stride()[::-1]
        note(result, lambda weight: function(source.of_weight(weight), *rest, **kwargs), turned)
    return result


def _like_the_layer(
    layers: Sequence[Converted], function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Tensor | None:
    """The result of a product that is the layer's own, as a call of it; None: it is another."""
    bias = None
    if function in _LAYERS:
        given = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
        x, weight, bias = given.pop("input", None), given.pop("weight", None), given.pop("bias", None)
        source = source_of(layers, weight)
        if source is None or weight is not source.layer._parameters.get("weight"):
            return None
        further = args[3:]
    elif function in _MATMULS and len(args) == 2 and not kwargs:
        x, (source, further, given) = args[0], (source_of(layers, args[1]), (), {})
        if source is None or not source.transposed:
            return None
        function = F.linear
    else:
        return None
    layer = source.layer
    if not computes(layer, function) or wiring_of(layer).norm is not None or source_of(layers, x) is not None:
        return None
    own = bias is not None and bias is layer._parameters.get("bias")
    apart = None if own else bias

    def compute(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        result = cast(Tensor, function(x, weight, bias if own else None, *further, **given))
        if apart is None:
            return result
        # A bias of somebody else's has no integers.
        rank = 0 if function is F.linear else weight.dim() - 2
        return result + cast(Tensor, apart).to(result.dtype).reshape(-1, *[1] * rank)

    for seen in _SEEN:
        seen.add(id(layer))
    result: Tensor = layer.called(x, compute)
    return result


_SEEN: list[set[int]] = []


@contextmanager
def seen_calls() -> Iterator[set[int]]:
    """The ids of layers that are computed by others, in their place, while the block runs."""
    found: set[int] = set()
    _SEEN.append(found)
    try:
        yield found
    finally:
        _SEEN.remove(found)


def computes(layer: nn.Module, function: Callable[..., Any]) -> bool:
    """True if `function` is what a layer of this type computes of its weight."""
    kinds: tuple[tuple[tuple[Any, ...], tuple[type[nn.Module], ...]], ...] = (
        ((F.linear,), (nn.Linear, nn.Embedding)),
        (_FORWARD_CONVOLUTIONS, (nn.Conv1d, nn.Conv2d, nn.Conv3d)),
        (_TRANSPOSED, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)),
    )
    return any(function in functions and isinstance(layer, types) for functions, types in kinds)
