"""Products of two activations with quantized operands, as attention has them: where a recipe asks for it.

In front of a matmul stand two quantizers, in front of the products of scaled_dot_product_attention four. That function
is computed in its parts then: the probabilities, which it keeps to itself, are operands too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__: list[str] = []

MATMUL = "matmul"
"""The kind of these operations in a trace."""
_TWO = ("left", "right")
ATTENTION = ("query", "key", "probabilities", "value")
OPERANDS: dict[str, tuple[str, ...]] = {"matmul": _TWO, "bmm": _TWO, "scaled_dot_product_attention": ATTENTION}
"""Operator in a trace -> its operands in the order in which they have quantizers."""
FUNCTIONS: tuple[Callable[..., Tensor], ...] = (
    *(torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.bmm, Tensor.bmm),
    F.scaled_dot_product_attention,
)
"""What a forward calls for them."""

Quantize = Callable[[str, Tensor], Tensor]
"""(operand, values) -> the values on the grid of that operand."""


def operand(name: str, index: int) -> str:
    """The child of a module that quantizes an operand of its `index`-th product."""
    return f"{MATMUL}_{name}_{index}_quantizer"


def operands(index: int) -> list[str]:
    """The children of a module that may quantize operands of its `index`-th product."""
    return [operand(name, index) for name in (*_TWO, *ATTENTION)]


def quantize_of(module: nn.Module, index: int) -> Quantize | None:
    """The quantizers of the `index`-th product of `module`; None where there are none."""
    found = {name: module._modules.get(operand(name, index)) for name in (*_TWO, *ATTENTION)}
    quantizers = {name: quantizer for name, quantizer in found.items() if quantizer is not None}
    return (lambda name, x: cast(Tensor, quantizers[name](x))) if quantizers else None


def product(
    quantize: Quantize, function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """The product that `function` of `FUNCTIONS` computes, of quantized operands."""
    if function is F.scaled_dot_product_attention:
        return attention(quantize, *args, **kwargs)
    names = ("input", "mat2" if function in (torch.bmm, Tensor.bmm) else "other")
    given = {**dict(zip(names, args, strict=False)), **{k: v for k, v in kwargs.items() if k != "out"}}
    left, right = (cast(Tensor, given[name]) for name in names)
    if function is Tensor.__rmatmul__:
        left, right = right, left
    result = torch.matmul(quantize("left", left), quantize("right", right))
    target = kwargs.get("out")
    return result if target is None else cast(Tensor, target.copy_(result))


def attention(
    quantize: Quantize,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """F.scaled_dot_product_attention of quantized query, key, probabilities and value."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    weights = probabilities(quantize, query, key, attn_mask, scale)
    return F.dropout(weights, dropout_p) @ quantize("value", value)


def probabilities(
    quantize: Quantize, query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None = None
) -> Tensor:
    """softmax(query key^T scale + mask) of quantized operands, quantized. A boolean mask is True where one looks.

    The scale comes after the product: an integer kernel reads what the quantizers give, and nothing in between.
    """
    scores = quantize("query", query) @ quantize("key", key).transpose(-2, -1)
    scores = scores * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if mask is not None:
        # The lowest number, not -inf: a row that looks at nothing would hold NaN, which no range can hold.
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else (scores + mask).clamp(min=lowest)
    return quantize("probabilities", scores.softmax(-1))
