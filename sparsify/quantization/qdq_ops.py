"""The two operators in which a deployment copy says "this is quantized", so that the ONNX file says it too.

They are torch.library operators: eager computes the same numbers as the runtime, `torch.export` keeps them whole, and
the ONNX exporter translates each to the standard operators through `translations`. `torch.onnx.ops.symbolic` exports as
cleanly, but returns empty tensors in eager, so that every layer would need a second branch.

Not used in training: there is no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from sparsify.quantization.weight_grid import widened

__all__: list[str] = []

QUANTIZE_DEQUANTIZE = "sparsify::quantize_dequantize"
"""The name of the operator in torch, to recognize its calls."""


def quantize_dequantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """`x` rounded to the grid of an activation: (clip(rint(x / scale) + zero_point) - zero_point) * scale, in float32.

    Exports as QuantizeLinear followed by DequantizeLinear.

    Args:
        x: float32, any shape.
        scale: float32 of rank 0, > 0. Rank 0, not shape (1,): onnxruntime 1.31.1 refuses fused operators with the
            latter.
        zero_point: uint8 or int8 of rank 0; its type is the type of the activation and gives the range of the clip.
    """
    result: Tensor = _operators().quantize_dequantize.default(x, scale, zero_point)
    return result


def dequantize(q: Tensor, scale: Tensor, axis: int | None, block: int = 0, zero_point: Tensor | None = None) -> Tensor:
    """(q - zero_point) * scale in float32: weights and biases that are stored as integers.

    Exports as DequantizeLinear on the initializer `q`; no optimizer folds it to float.

    Args:
        q: int8, uint8 or int32; a buffer of the module, so that it becomes an initializer under its own name.
        scale: float32; rank 0, or (C,) with `axis` the dimension of `q` that has C entries.
        axis: None with a scale of rank 0.
        block: the scale has an entry for each `block` indices of `axis` instead; 0: it has not.
        zero_point: of the type of `q` and the shape of `scale`; None: 0.
    """
    result: Tensor = _operators().dequantize.default(q, scale, axis, block, zero_point)
    return result


def translations(opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """The `custom_translation_table` of `torch.onnx.export` for the two operators, at ONNX opset `opset` >= 18."""
    from onnxscript import onnx_opset

    operators = _operators()
    # At the file's own opset: QuantizeLinear of 19 and later writes attributes that 18 does not know.
    op: Any = onnx_opset.all_opsets["", opset]

    def translate_quantize_dequantize(x: Any, scale: Any, zero_point: Any) -> Any:
        return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero_point), scale, zero_point)

    def translate_dequantize(
        q: Any, scale: Any, axis: int | None = None, block: int = 0, zero_point: Any = None
    ) -> Any:
        where: dict[str, int] = {} if axis is None else {"axis": axis}
        if block:
            where["block_size"] = block
        operands = (q, scale) if zero_point is None else (q, scale, zero_point)
        return op.DequantizeLinear(*operands, **where)

    return {
        operators.quantize_dequantize.default: translate_quantize_dequantize,
        operators.dequantize.default: translate_dequantize,
    }


def _quantize_dequantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    limits = torch.iinfo(zero_point.dtype)
    offset = zero_point.to(x.dtype)
    # A division, not a product with the reciprocal: that is what QuantizeLinear does, and the two differ on ties.
    return ((x / scale).round_().add_(offset).clamp_(limits.min, limits.max).sub_(offset)).mul_(scale)


def _dequantize(q: Tensor, scale: Tensor, axis: int | None, block: int, zero_point: Tensor | None) -> Tensor:
    values = q.to(scale.dtype)
    if zero_point is not None:
        values -= widened(zero_point, q, axis, block).to(scale.dtype)
    return values * widened(scale, q, axis, block)


@cache
def _operators() -> Any:
    """Registers both on the first use, once a process: importing sparsify registers nothing."""
    library: Any = cast(Any, torch.library.Library)("sparsify", "DEF")
    library.define("quantize_dequantize(Tensor x, Tensor scale, Tensor zero_point) -> Tensor")
    library.define("dequantize(Tensor q, Tensor scale, int? axis, int block, Tensor? zero_point) -> Tensor")
    library.impl("quantize_dequantize", _quantize_dequantize, "CompositeExplicitAutograd")
    library.impl("dequantize", _dequantize, "CompositeExplicitAutograd")
    torch.library.register_fake(QUANTIZE_DEQUANTIZE, lambda x, scale, zero_point: torch.empty_like(x), lib=library)
    torch.library.register_fake(
        "sparsify::dequantize",
        lambda q, scale, axis, block, zero_point: torch.empty_like(q, dtype=scale.dtype),
        lib=library,
    )
    _kept_by_export.append(library)
    return torch.ops.sparsify


_kept_by_export: list[Any] = []
"""A library unregisters its operators when it is collected."""
