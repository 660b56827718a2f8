"""Operators between quantized tensors, as the integer kernels of onnxruntime compute them.

The formulas are those of `sparsify.onnx.integer_kernels`, where their rounding is explained; which operators run in
integers, and what vanishes or is written otherwise in the file, is that of `sparsify.onnx.fusion` and `rewrites`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsify.quantization.integer_mode import Awaiting, IntegerGrid, IntegerMode, OperatorHandler
from sparsify.quantization.integer_sums import SumForm, products
from sparsify.quantization.qdq_ops import QUANTIZE_DEQUANTIZE

__all__: list[str] = []


def _onto_grid(mode: IntegerMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    x, scale, zero_point = args
    grid = mode.grid_of(scale, zero_point)
    if grid is None:
        return None
    awaiting = mode.awaiting(x)
    whole = None if awaiting is None else awaiting.integers(x, grid)
    if whole is None:
        whole = grid.rounded(x / grid.scale)
    return mode.know(whole * grid.scale, grid)


def _convolution(mode: IntegerMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    x, weight, bias, *geometry, transposed, added, groups = args
    return _integer_product(mode, x, weight, bias, SumForm(groups, transposed, tuple(geometry), added))


def _addmm(mode: IntegerMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    bias, x, weight = args
    plain = all(factor == 1 for factor in kwargs.values()) and bias.dim() == 1
    return _integer_product(mode, x, weight, bias, SumForm()) if plain else None


def _mm(mode: IntegerMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    x, y = args
    by_weight = _integer_product(mode, x, y, None, SumForm())
    if by_weight is not None:
        return by_weight
    first, second = mode.grid(x), mode.grid(y)
    if first is None or second is None:
        return None
    return _await_sums(mode, products(first.whole(x), second.whole(y)), first.scale * second.scale, None)


def _integer_product(mode: IntegerMode, x: Tensor, weight: Tensor, bias: Tensor | None, form: SumForm) -> Tensor | None:
    """The operation `form` on integers with the integers of a weight."""
    grid, known = mode.grid(x), mode.weight(weight)
    fits, added = mode.bias(bias)
    if grid is None or known is None or not fits:
        return None
    sums = known.sums(grid.whole(x), added, form)
    scale = grid.scale * known.scale
    if known.axis is not None and form.geometry is not None:
        scale = scale.view(-1, *[1] * (x.dim() - 2))
    return _await_sums(mode, sums, scale, bias)


def _await_sums(mode: IntegerMode, sums: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The float result f32(sums) * scale; its quantizer gets clip(rint(f32(sums) * f32(scale / s)))."""
    floats = sums.float()

    def kernel(grid: IntegerGrid) -> Tensor:
        return grid.rounded(floats * (scale / grid.scale))

    result = floats * scale
    open_to_bias = (sums, scale) if bias is None else None
    return mode.know(result, Awaiting(kernel, result.shape, result.stride(), sums=open_to_bias))


def _add(mode: IntegerMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    a, b = args
    if kwargs.get("alpha", 1) != 1:
        return None
    if isinstance(b, Tensor) and (product := mode.awaiting(a)) is not None:
        return _product_and_bias(mode, a, product, b)
    operands = _integer_operands(mode, a, b)
    if operands is None:
        return None
    (whole_a, zero_a, scale_a), (whole_b, zero_b, scale_b) = operands

    def kernel(grid: IntegerGrid) -> Tensor:
        # A product and a sum with one rounding, as the kernel computes: in float64.
        ratio_a, ratio_b = ((scale / grid.scale).double() for scale in (scale_a, scale_b))
        inner = (ratio_b * zero_b).float().double()
        constant = (grid.zero - (ratio_a * zero_a + inner).float().double()).float().double()
        second = ((whole_b().double() + zero_b) * ratio_b + constant).float().double()
        total = ((whole_a().double() + zero_a) * ratio_a + second).float()
        return total.round_().clamp_(0, 255).sub_(grid.zero)

    result = torch.add(a, b)
    return mode.know(result, Awaiting(kernel, result.shape, result.stride()))


def _product_and_bias(mode: IntegerMode, y: Tensor, product: Awaiting, bias: Tensor) -> Tensor | None:
    """The sum of a product and its bias, which the kernel of the product takes in."""
    fits, added = mode.bias(bias)
    if not fits or added is None or product.sums is None or product.size[-1] != added.shape[0]:
        return None
    sums, scale = product.sums
    sums = sums.to(torch.int32).as_strided(y.shape, y.stride(), y.storage_offset()) + added
    return _await_sums(mode, sums, scale, bias)


def _mul(mode: IntegerMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    a, b = args
    operands = _integer_operands(mode, a, b)
    if operands is None:
        return None
    (whole_a, _, scale_a), (whole_b, _, scale_b) = operands

    def kernel(grid: IntegerGrid) -> Tensor:
        scaled = whole_a() * whole_b() * (scale_a * scale_b / grid.scale)
        return scaled.add_(grid.zero).round_().clamp_(0, 255).sub_(grid.zero)

    result = torch.mul(a, b)
    return mode.know(result, Awaiting(kernel, result.shape, result.stride()))


_Operand = tuple[Callable[[], Tensor], int, Tensor]
"""(its integers, counted from the zero point on; the zero point; the scale)."""


def _integer_operands(mode: IntegerMode, a: object, b: object) -> tuple[_Operand, _Operand] | None:
    """Both operands of a sum or product, if both are integers, or one of them and the other a number."""
    grids = mode.grid(a), mode.grid(b)
    if grids == (None, None):
        return None
    like = a if grids[0] is not None else b
    assert isinstance(like, Tensor)
    found: list[_Operand] = []
    for operand, grid in zip((a, b), grids, strict=True):
        if grid is not None and isinstance(operand, Tensor):
            found.append((partial(grid.whole, operand), grid.zero, grid.scale))
            continue
        number = mode.number(operand, like.dim())
        if number is None or not math.isfinite(number):
            return None
        # 1 or -1 with its size as the scale, and 0 as 0: -1 is the integer 0 with the zero point 1.
        sign = torch.full((), float((number > 0) - (number < 0)), device=like.device)
        scale = torch.full((), abs(number) or 1.0, device=like.device)
        found.append((partial(Tensor.clone, sign), int(number < 0), scale))
    return found[0], found[1]


def _cut_off(mode: IntegerMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """A ReLU or a clip of what awaits its quantizer, which vanishes where it cuts nothing off of the grid."""
    x = args[0]
    awaiting = mode.awaiting(x)
    if awaiting is None:
        return None
    bounds = [*args[1:], *kwargs.values()] if func.name().startswith(("aten::clamp", "aten::hardtanh")) else [0.0]
    low, high = (*bounds, None, None)[:2]
    if any(isinstance(bound, Tensor) for bound in bounds):
        return None
    result: Tensor = func(*args, **kwargs)
    least = max(awaiting.least, -math.inf if low is None else float(low))
    most = min(awaiting.most, math.inf if high is None else float(high))
    if not awaiting.is_whole(result):
        return result
    return mode.know(result, replace(awaiting, least=least, most=most, sums=None))


def _average_over_image(mode: IntegerMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """A mean over all pixels: the sums of the integers, and one rounding."""
    x, axes, *_ = (*args, None)
    grid = mode.grid(x)
    if grid is None or axes is None or x.dim() not in (3, 4, 5) or kwargs.get("dtype") is not None:
        return None
    if sorted(axis % x.dim() for axis in axes) != list(range(2, x.dim())):
        return None
    count = math.prod(x.shape[2:])

    def kernel(target: IntegerGrid) -> Tensor:
        whole = grid.whole(x)
        sums = (whole if count * 255 < 1 << 24 else whole.double()).sum(axes, keepdim=result.dim() == x.dim())
        return target.rounded(sums.float() * (grid.scale / (target.scale * float(count))))

    result: Tensor = func(*args, **kwargs)
    return mode.know(result, Awaiting(kernel, result.shape, result.stride()))


def _window_average(mode: IntegerMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """An average pool: sums in float32, and the zero point added before the one rounding."""
    if mode.grid(args[0]) is None:
        return None
    # torch adds up in the order of the kernel, as onnxruntime does.
    result: Tensor = func(*args, **kwargs)

    def kernel(target: IntegerGrid) -> Tensor:
        return (result / target.scale).add_(target.zero).round_().clamp_(0, 255).sub_(target.zero)

    return mode.know(result, Awaiting(kernel, result.shape, result.stride()))


def _hard_sigmoid(mode: IntegerMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """In the file an Add that saturates: x / 6, by the scale, and 1/2."""
    x = args[0]
    grid = mode.grid(x)
    if grid is None:
        return None
    sixth = grid.scale * torch.tensor(1 / 6, dtype=torch.float32, device=x.device)
    half = torch.full((), 0.5, device=x.device)

    def kernel(target: IntegerGrid) -> Tensor | None:
        if target.zero or target.step * 255 > 1 + 1e-6:
            return None
        ratio_x, ratio_half = ((scale / target.scale).double() for scale in (sixth, half))
        constant = (0.0 - (ratio_x * grid.zero).float().double()).float().double()
        second = (ratio_half + constant).float().double()
        total = ((grid.whole(x).double() + grid.zero) * ratio_x + second).float()
        return total.round_().clamp_(0, 255)

    result: Tensor = func(*args, **kwargs)
    return mode.know(result, Awaiting(kernel, result.shape, result.stride()))


def _tanh(mode: IntegerMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """In the file the sigmoid of 2 x, on the grid of which its integers are the same."""
    x = args[0]
    if mode.grid(x) is None:
        return None

    def kernel(target: IntegerGrid) -> Tensor | None:
        if target.zero != 128 or target.step != 1 / 128:
            return None
        return torch.sigmoid(x * 2.0).mul_(256.0).round_().clamp_(0, 255).sub_(128)

    result: Tensor = func(*args, **kwargs)
    return mode.know(result, Awaiting(kernel, result.shape, result.stride()))


def _moved_along(mode: IntegerMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Values in another place: on the grid that they were on. Views need no word, they share their memory."""
    known = mode.known(args[0])
    if known is None or kwargs.get("dtype") not in (None, args[0].dtype):
        return None
    result = func(*args, **kwargs)
    moved = result[0] if isinstance(result, tuple) else result
    if isinstance(known, IntegerGrid):
        mode.know(moved, known)
    elif func.name() in _COPIES:
        source = args[0]

        def kernel(grid: IntegerGrid) -> Tensor | None:
            whole = known.integers(source, grid)
            return None if whole is None else func(whole, *args[1:], **kwargs)

        mode.know(moved, Awaiting(kernel, moved.shape, moved.stride()))
    return result


def _copied_into(mode: IntegerMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """`target.copy_(source)`: all of a tensor lies on the grid of what it is overwritten with."""
    target, source = args[:2]
    grid = mode.grid(source) if target.dtype == source.dtype and target.shape == source.shape else None
    mode.unknow(target)
    result: Tensor = func(*args, **kwargs)
    return result if grid is None else mode.know(result, grid)


def _in_place(handler: OperatorHandler) -> OperatorHandler:
    """The same operator where it writes to its first operand, as in `out += x`: on a copy of that, and copied back."""

    def handle(mode: IntegerMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target = args[0]
        known = mode.known(target)
        if known is None or (isinstance(known, Awaiting) and not known.is_whole(target)):
            return None
        # Kernels look at their operands later, when the quantizer is known.
        before = mode.know(target.clone(), known)
        others = (before if each is target else each for each in args[1:])
        result = handler(mode, func, (before, *others), kwargs)
        if result is None:
            return None
        found = mode.known(result)
        mode.unknow(target)
        target.copy_(result)
        whole = isinstance(found, IntegerGrid) or (found is not None and found.is_whole(target))
        return mode.know(target, found) if found is not None and whole else target

    return handle


_COPIES = frozenset(("aten::clone", "aten::_to_copy"))
HANDLERS: dict[str, OperatorHandler] = {
    QUANTIZE_DEQUANTIZE: _onto_grid,
    "aten::convolution": _convolution,
    "aten::addmm": _addmm,
    **dict.fromkeys(("aten::mm", "aten::bmm"), _mm),
    "aten::add.Tensor": _add,
    "aten::mul.Tensor": _mul,
    **dict.fromkeys(("aten::relu", "aten::clamp", "aten::clamp_min", "aten::hardtanh"), _cut_off),
    **dict.fromkeys(("aten::relu_", "aten::clamp_", "aten::clamp_min_", "aten::hardtanh_"), _in_place(_cut_off)),
    "aten::add_.Tensor": _in_place(_add),
    "aten::mul_.Tensor": _in_place(_mul),
    "aten::mean.dim": _average_over_image,
    **dict.fromkeys(("aten::avg_pool2d", "aten::avg_pool3d"), _window_average),
    "aten::hardsigmoid": _hard_sigmoid,
    "aten::tanh": _tanh,
    **dict.fromkeys(
        (
            *_COPIES,
            *("aten::max_pool2d_with_indices", "aten::max_pool3d_with_indices", "aten::index_select"),
            *("aten::upsample_nearest1d", "aten::upsample_nearest2d", "aten::upsample_nearest3d", "aten::repeat"),
            *("aten::pixel_shuffle", "aten::pixel_unshuffle", "aten::flip"),
        ),
        _moved_along,
    ),
    "aten::copy_": _copied_into,
}
"""Operator -> what computes it here; it gives None where it leaves that to torch."""
