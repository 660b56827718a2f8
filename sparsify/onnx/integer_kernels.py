"""The integer kernels of onnxruntime in exact arithmetic: what QLinearConv, QGemm, QLinearAdd and the like compute.

Every formula rounds where onnxruntime rounds. f32(x) is one rounding to float32, rint rounds ties to even, and fma is a
product and a sum with one rounding, here taken in float64. Sums of products are exact: they stay below 2^53 in float64,
so that BLAS does them, and wrap at 32 bits as the kernel's accumulator does. Knows numpy alone.

The formulas were found by experiment on x86 with AVX2 and later; `tests/onnx/test_reference.py` holds each against
onnxruntime. Two kernels have a bound instead, both on CPUs without VNNI: products of uint8 and int8 saturate there in
pairs at 16 bits, which the sessions of `runtime` avoid, and `reduce_range`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__: list[str] = []

IntegerArray = NDArray[Any]
Floats = NDArray[Any]


@dataclass(frozen=True)
class QuantizationGrid:
    """The numbers (q - zero_point) * scale for whole q from `first` to `last`."""

    scale: Floats
    """float32, > 0: rank 0, or (C,) along `axis`."""
    zero_point: IntegerArray
    """The integer that means 0, of the type that holds the integers; shaped as `scale`."""
    axis: int = 1

    @property
    def per_tensor(self) -> bool:
        return self.scale.size == 1

    @property
    def limits(self) -> tuple[int, int]:
        info = np.iinfo(self.zero_point.dtype)
        return int(info.min), int(info.max)

    def along(self, values: Floats | IntegerArray, rank: int) -> NDArray[Any]:
        """A scale or zero point as it broadcasts against a tensor of `rank` dimensions."""
        if values.size == 1:
            return values.reshape(())
        shape = [1] * rank
        shape[self.axis] = -1
        return values.reshape(shape)


@dataclass(frozen=True)
class Quantized:
    """Integers and what they stand for; what a DequantizeLinear gives."""

    values: IntegerArray
    grid: QuantizationGrid

    def centered(self) -> Floats:
        """values - zero_point, exact, in float64."""
        zero = self.grid.along(self.grid.zero_point, self.values.ndim)
        return self.values.astype(np.float64) - zero.astype(np.float64)

    def floats(self) -> Floats:
        """DequantizeLinear: f32((q - z) * s)."""
        scale = self.grid.along(self.grid.scale, self.values.ndim)
        result: Floats = self.centered().astype(np.float32) * scale
        return result


def quantize(x: Floats, grid: QuantizationGrid) -> IntegerArray:
    """QuantizeLinear: clip(rint(f32(x / s)) + z), NaN becoming the lowest."""
    scaled = (x.astype(np.float32) / grid.along(grid.scale, x.ndim)).astype(np.float32)
    low, high = grid.limits
    zero = grid.along(grid.zero_point, x.ndim).astype(np.float64)
    # As the kernel does: the bounds first, of which infinity and what would overflow take one.
    result: IntegerArray = np.rint(np.nan_to_num(np.clip(scaled, low - zero, high - zero), nan=low)) + zero
    return np.clip(result, low, high).astype(grid.zero_point.dtype)


def requantize(sums: IntegerArray, multiplier: Floats, grid: QuantizationGrid) -> IntegerArray:
    """clip(rint(f32(f32(sums) * multiplier)) + z): of int32 sums, `multiplier` float32 that broadcasts against them."""
    return _on(grid, np.rint(sums.astype(np.float32) * multiplier))


def conv(
    x: Quantized,
    weight: Quantized,
    bias: IntegerArray | None,
    grid: QuantizationGrid,
    *,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    group: int,
) -> IntegerArray:
    """QLinearConv over any number of spatial axes: requantize(sums, f32(f32(s_x s_w) / s_y)).

    Args:
        x: (N, C, *spatial), per tensor.
        weight: (O, C / group, *kernel), per tensor or per output channel.
        bias: int32 (O,), on the grid s_x s_w.
        grid: the grid of the result.
        strides: one for each spatial axis.
        pads: before each axis, then after each; padded with the zero point, which counts nothing.
        dilations: one for each spatial axis.
        group: number of groups of channels.
    """
    sums = wrapped(convolution(x.centered(), weight.centered(), strides, pads, dilations, group))
    trailing = (-1, *[1] * (x.values.ndim - 2))
    if bias is not None:
        sums = wrapped(sums.astype(np.int64) + bias.astype(np.int64).reshape(trailing))
    multiplier = (x.grid.scale.reshape(()) * weight.grid.scale) / grid.scale.reshape(())
    return requantize(sums, multiplier.reshape(trailing) if multiplier.size > 1 else multiplier.reshape(()), grid)


def matmul(
    x: Quantized, weight: Quantized, bias: IntegerArray | None, grid: QuantizationGrid | None
) -> IntegerArray | Floats:
    """QLinearMatMul, QGemm (with a bias) and MatMulIntegerToFloat (without a grid for the output).

    Args:
        x: (..., M, K), per tensor.
        weight: (..., K, N), a constant or not; per tensor, or per column.
        bias: int32, broadcast against (..., M, N); on the grid s_x s_w.
        grid: of the output; None gives f32(sums) * f32(s_x s_w) in float32.
    """
    sums = wrapped(np.matmul(x.centered(), weight.centered()))
    if bias is not None:
        sums = wrapped(sums.astype(np.int64) + bias.astype(np.int64))
    scale = x.grid.scale.reshape(()) * weight.grid.scale.reshape(() if weight.grid.per_tensor else (-1,))
    if grid is None:
        result: Floats = sums.astype(np.float32) * scale
        return result
    return requantize(sums, scale / grid.scale.reshape(()), grid)


def add(a: Quantized, b: Quantized, grid: QuantizationGrid) -> IntegerArray:
    """QLinearAdd: clip(rint(fma(r_a, q_a, fma(r_b, q_b, k)))), with the second operand first.

    r_a = f32(s_a / s_y), r_b = f32(s_b / s_y), k = f32(z_y - fma(r_a, z_a, f32(r_b z_b))).
    """
    ratio_a, ratio_b = (_double(x.grid.scale.reshape(()) / grid.scale.reshape(())) for x in (a, b))
    zero_a, zero_b, zero = (_double(each.zero_point.reshape(())) for each in (a.grid, b.grid, grid))
    constant = _f32(zero - _f32(ratio_a * zero_a + _f32(ratio_b * zero_b)))
    inner = _f32(ratio_b * _double(b.values) + constant)
    low, high = grid.limits
    return np.clip(np.rint(_f32(ratio_a * _double(a.values) + inner)), low, high).astype(grid.zero_point.dtype)


def mul(a: Quantized, b: Quantized, grid: QuantizationGrid) -> IntegerArray:
    """QLinearMul: clip(rint(f32(f32(f32(q_a - z_a)(q_b - z_b) r) + z_y))), r = f32(f32(s_a s_b) / s_y)."""
    ratio = (a.grid.scale.reshape(()) * b.grid.scale.reshape(())) / grid.scale.reshape(())
    product = (a.centered() * b.centered()).astype(np.float32) * ratio
    low, high = grid.limits
    total = product.astype(np.float32) + grid.zero_point.reshape(()).astype(np.float32)
    return np.clip(np.rint(total), low, high).astype(grid.zero_point.dtype)


def global_average_pool(x: Quantized, grid: QuantizationGrid) -> IntegerArray:
    """QLinearGlobalAveragePool of (N, C, *spatial): requantize(sums of q - z, f32(s_x / f32(s_y n)))."""
    axes = tuple(range(2, x.values.ndim))
    count = math.prod(x.values.shape[2:])
    sums = wrapped(x.centered().sum(axes, keepdims=True))
    return requantize(sums, x.grid.scale.reshape(()) / (grid.scale.reshape(()) * np.float32(count)), grid)


def average_pool(
    x: Quantized,
    grid: QuantizationGrid,
    *,
    kernel: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
    ceil: bool = False,
    include_pad: bool = False,
) -> IntegerArray:
    """QLinearAveragePool: float32 sums of s (q - z) in the order of the kernel, / n, then rint(f32(f32(y / s) + z))."""
    sums, count = np.zeros((), np.float32), np.zeros((), np.int64)
    for taken, inside in taps(x.floats(), kernel, strides, pads, ceil):
        sums = np.where(inside, sums + taken, sums)
        count = count + inside
    divisor = np.float32(math.prod(kernel)) if include_pad else count.astype(np.float32)
    low, high = grid.limits
    scaled = (sums / divisor).astype(np.float32) / grid.scale.reshape(())
    total = scaled.astype(np.float32) + grid.zero_point.reshape(()).astype(np.float32)
    return np.clip(np.rint(total), low, high).astype(grid.zero_point.dtype)


def taps(
    x: NDArray[Any], kernel: Sequence[int], strides: Sequence[int], pads: Sequence[int], ceil: bool
) -> Iterator[tuple[NDArray[Any], NDArray[np.bool_]]]:
    """For each place in the kernel of a pool: what lies under it in every window, and whether that is in the tensor."""
    rank, spatial = len(kernel), x.shape[2:]
    starts = []
    for i in range(rank):
        room = spatial[i] + pads[i] + pads[rank + i] - kernel[i]
        count = (-(-room // strides[i]) if ceil else room // strides[i]) + 1
        if ceil and (count - 1) * strides[i] >= spatial[i] + pads[i]:
            count -= 1  # a window that would begin in the padding behind
        starts.append(np.arange(count) * strides[i] - pads[i])
    for offsets in np.ndindex(*kernel):
        at = [start + offset for start, offset in zip(starts, offsets, strict=True)]
        inside = [(each >= 0) & (each < size) for each, size in zip(at, spatial, strict=True)]
        clipped = [each.clip(0, size - 1) for each, size in zip(at, spatial, strict=True)]
        yield x[(slice(None), slice(None), *np.ix_(*clipped))], reduce(np.logical_and.outer, inside)


def by_table(x: Quantized, grid: QuantizationGrid, function: Callable[[Floats], Floats]) -> IntegerArray:
    """QLinearSigmoid, QLinearLeakyRelu: one of 256 results is looked up, each Q(f(DQ(q)))."""
    kind = x.values.dtype
    every = np.arange(np.iinfo(kind).min, np.iinfo(kind).max + 1)
    table = quantize(function(Quantized(every.astype(kind), x.grid).floats()), grid)
    return table[x.values.astype(np.int64) - np.iinfo(kind).min]


SIGMOID_ABOVE: tuple[float, ...] = (
    *(4.37031012579801e-11, 1.15627324459942e-07, 6.08574864600143e-05),
    *(8.51377133304701e-03, 2.48287947061529e-01),
)
"""Coefficients of x^9, x^7, ... x above the line of onnxruntime's sigmoid - 1/2, a ratio of two polynomials."""
SIGMOID_BELOW: tuple[float, ...] = (
    *(6.10247389755681e-13, 5.76102136993427e-09, 6.29106785017040e-06),
    *(1.70198817374094e-03, 1.16817656904453e-01, 9.93151921023180e-01),
)
"""Those of x^10, x^8, ... 1 below it."""


def sigmoid(x: Floats) -> Floats:
    """Sigmoid of float32 as onnxruntime computes it, to the bit, also for QLinearSigmoid's table (seen in 1.31.1).

    The last bits are not those of exp: of 768,000 entries of tables 2 lie on the other side of an edge by exp. Formula:
    https://github.com/microsoft/onnxruntime/blob/main/onnxruntime/core/mlas/lib/logistic.cpp
    """
    x = np.clip(x, np.float32(-18), np.float32(18)).astype(np.float32)
    square = x * x
    above, below = (_polynomial(square, coefficients) for coefficients in (SIGMOID_ABOVE, SIGMOID_BELOW))
    return np.clip(above * x / below + np.float32(0.5), np.float32(0), np.float32(1))


def _polynomial(x: Floats, coefficients: Sequence[float]) -> Floats:
    """By Horner's rule in float32, product and sum rounded once."""
    first, *others = (np.float32(each) for each in coefficients)
    found = np.full_like(x, first)
    for each in others:
        found = (found.astype(np.float64) * x + np.float64(each)).astype(np.float32)
    return found


def softmax(x: Quantized, grid: QuantizationGrid, axis: int) -> IntegerArray:
    """QLinearSoftmax along `axis`: rint(f32(f32(e m) / sum)) + z in float32, with m = floor(1 / s_y), summed in order.

    e = f32(exp((q - max) s_x + b)) comes from a table, where b = log(largest float32 / n) - 5 keeps the sum in range.
    A scale of 1/256 makes m exact.
    """
    values = np.moveaxis(x.values, axis, -1).astype(np.int64)
    distance = values.max(-1, keepdims=True) - values
    scale = float(x.grid.scale.reshape(()))
    shift = max(0.0, float(np.log(np.finfo(np.float32).max / np.float32(values.shape[-1]))) - 5) / scale
    exponents = np.exp((shift - np.arange(256, dtype=np.float64)) * scale).astype(np.float32)[distance]
    total = np.add.accumulate(exponents, -1)[..., -1:]
    multiplier = np.floor(np.float32(1.0) / grid.scale.reshape(()))
    return np.moveaxis(_on(grid, np.rint(exponents * multiplier / total)), -1, axis)


def convolution(
    x: Floats,
    weight: Floats,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    group: int,
) -> Floats:
    """A grouped convolution of (N, C, *spatial) with (O, C / group, *kernel), in the type of its operands."""
    rank = x.ndim - 2
    kernel = weight.shape[2:]
    x = np.pad(x, [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)])
    sizes = [
        (size - (k - 1) * dilation - 1) // stride + 1
        for size, k, dilation, stride in zip(x.shape[2:], kernel, dilations, strides, strict=True)
    ]
    batch, channels, outer = x.shape[0], x.shape[1], weight.shape[0]
    taps = [
        x[
            (
                slice(None),
                slice(None),
                *[
                    slice(k * dilation, k * dilation + (size - 1) * stride + 1, stride)
                    for k, dilation, size, stride in zip(offsets, dilations, sizes, strides, strict=True)
                ],
            )
        ]
        for offsets in np.ndindex(*kernel)
    ]
    if group == channels == outer:
        # Depthwise: matrices of one row would be all overhead.
        flat = weight.reshape(outer, -1)
        result = np.zeros((batch, outer, *sizes), x.dtype)
        for i, tap in enumerate(taps):
            result += tap * flat[:, i].reshape(-1, *[1] * rank)
        return result
    inner, count = channels // group, math.prod(sizes)
    rows = weight.reshape(group, outer // group, -1)
    result = np.empty((batch, group, outer // group, count), x.dtype)
    # One image at a time: all columns of a large batch at once would take its memory times the kernel's size.
    for i in range(batch):
        columns = np.stack([tap[i].reshape(group, inner, count) for tap in taps], 2)
        result[i] = rows @ columns.reshape(group, inner * len(taps), count)
    return result.reshape(batch, outer, *sizes)


def wrapped(sums: Floats | IntegerArray) -> IntegerArray:
    """Exact sums as the 32-bit accumulator holds them."""
    result: IntegerArray = sums.astype(np.int64).astype(np.int32)
    return result


def _on(grid: QuantizationGrid, rounded: Floats) -> IntegerArray:
    """clip(rounded + z), of whole numbers in float32."""
    low, high = grid.limits
    zero = float(grid.zero_point.reshape(()))
    return (np.clip(rounded, low - zero, high - zero) + np.float32(zero)).astype(grid.zero_point.dtype)


def _double(x: NDArray[Any]) -> Floats:
    return x.astype(np.float64)


def _f32(x: Floats) -> Floats:
    """One rounding to float32; the value stays in float64 for the next product."""
    return x.astype(np.float32).astype(np.float64)
