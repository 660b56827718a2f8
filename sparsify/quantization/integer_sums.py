"""Exact sums of products of integers on the device of their tensors: what the accumulators of integer kernels hold.

Integers are whole numbers in float32, counted from the zero point on. A sum of products in float32 is exact in whatever
order as long as it cannot reach 2^24, so torch's kernels compute it. Where it may reach further it is computed in parts
that cannot, along what is summed up, and these are added in int32, which wraps as the accumulators do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__: list[str] = []

FLOAT32_WHOLE = 1 << 24
"""Up to here float32 holds every whole number."""
MOST = 255
"""The largest distance of an integer of 8 bits from its zero point."""

SumParts = Sequence[tuple[int, int]]
"""Ranges along what is summed up, in each of which float32 is exact; none: not even in a single one."""


@dataclass(frozen=True)
class SumForm:
    """Arguments of aten.convolution behind the bias; of a matrix product, none of them.

    Attributes:
        groups: groups of channels.
        transposed: a transposed convolution, whose weight has the inputs along dimension 0.
        geometry: stride, padding and dilation; None: a matrix product.
        output_padding: of a transposed convolution.
    """

    groups: int = 1
    transposed: bool = False
    geometry: tuple[Sequence[int], Sequence[int], Sequence[int]] | None = None
    output_padding: Sequence[int] = ()

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The operation in the type of its operands."""
        if self.geometry is None:
            return x @ weight if bias is None else torch.addmm(bias, x, weight)
        return torch.convolution(x, weight, bias, *self.geometry, self.transposed, self.output_padding, self.groups)

    def taken(self, x: Tensor, weight: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
        """The operands of the part from `first` to `last` of what is summed up."""
        if self.geometry is None:
            return x[..., first:last], weight[..., first:last, :]
        x = x.reshape(x.shape[0], self.groups, -1, *x.shape[2:])[:, :, first:last].flatten(1, 2)
        if self.transposed:
            return x, self._in_groups(weight)[:, first:last].flatten(0, 1)
        return x, weight[:, first:last]

    def moves(self, weight: Tensor) -> Tensor:
        """(inputs that are summed up, outputs): how far one step of an input can move a sum, by a constant weight."""
        size = weight.abs().double()
        if self.geometry is None:
            return size
        if self.transposed:
            return self._in_groups(size).flatten(3).sum(3).transpose(0, 1).flatten(1)
        return size.flatten(2).sum(2).transpose(0, 1)

    def _in_groups(self, weight: Tensor) -> Tensor:
        """A transposed weight as (groups, inputs of a group, ...)."""
        return weight.reshape(self.groups, -1, *weight.shape[1:])


@dataclass(frozen=True)
class WholeWeight:
    """The integers of a layer's weight and what they stand for.

    Attributes:
        values: whole numbers in float32.
        scale: float32, rank 0 or (C,) along `axis`.
        axis: None with a scale of rank 0.
    """

    values: Tensor
    scale: Tensor
    axis: int | None
    _parts: dict[int, SumParts] = field(default_factory=dict, init=False, repr=False, compare=False)

    def turned(self) -> WholeWeight:
        """A matrix transposed."""
        return WholeWeight(self.values.t(), self.scale, None if self.axis is None else 1 - self.axis)

    def sums(self, x: Tensor, bias: Tensor | None, form: SumForm) -> Tensor:
        """The sums of the operation `form` on `x`, whole numbers, and an int32 bias: float32 below 2^24, or int32."""
        key = 0 if bias is None else id(bias)
        if key not in self._parts:
            self._parts[key] = _parts_of(form.moves(self.values), bias)
        return sums_in_parts(form, x, self.values, bias, self._parts[key])


def products(x: Tensor, y: Tensor) -> Tensor:
    """The sums of the product of two matrices of activations, whole numbers: float32 below 2^24, or int32."""
    size, most = x.shape[-1], (FLOAT32_WHOLE - 1) // MOST**2
    return sums_in_parts(SumForm(), x, y, None, [(first, min(first + most, size)) for first in range(0, size, most)])


def sums_in_parts(form: SumForm, x: Tensor, weight: Tensor, bias: Tensor | None, parts: SumParts) -> Tensor:
    """The sums of `form` over `parts`: float32 if there is one, else int32."""
    if x.device.type != "cpu" or not parts:
        # Accelerators have kernels that transform what they multiply: in float64 the error stays far below 1/2.
        sums = form.compute(x.double(), weight.double(), None if bias is None else bias.double())
        return sums.round_().to(torch.int64).to(torch.int32)
    if len(parts) == 1:
        return form.compute(x, weight, None if bias is None else bias.float())
    result: Tensor | None = None
    for first, last in parts:
        part = form.compute(*form.taken(x, weight, first, last), None).to(torch.int32)
        result = part if result is None else result.add_(part)
    assert result is not None
    if bias is None:
        return result
    return result.add_(bias if form.geometry is None else bias.view(-1, *[1] * (result.dim() - 2)))


def _parts_of(moves: Tensor, bias: Tensor | None) -> SumParts:
    """Ranges of the inputs in which no sum can reach 2^24; a single one only if the bias fits in, too."""
    room = (FLOAT32_WHOLE - 1) / MOST
    size, reached = moves.shape[0], moves.sum(0)
    if bias is not None:
        reached = reached + bias.abs().double() / MOST
    if not size or float(reached.max()) <= room:
        return [(0, size)]
    if float(moves.max()) > room:
        return []
    # As few equal parts as will do; of single inputs any will.
    count = max(2, math.ceil(float(moves.sum(0).max()) / room))
    while True:
        width = -(-size // count)
        if width == 1 or all(float(part.sum(0).max()) <= room for part in torch.split(moves, width)):
            return [(first, min(first + width, size)) for first in range(0, size, width)] if size > 1 else []
        count += 1
