"""Affine weights: the integers 0..levels with a zero point, (q - zero_point) * scale. Zero is exact, so masks hold.

A symmetric grid of so many bits spends half of its steps on the side where a row has nothing; an affine one follows the
range as it lies, which shows with few bits and few weights to a scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsify.quantization.straight_through import TINY

__all__: list[str] = []


def affine_grid(weight: Tensor, *, axis: int | None, levels: int) -> tuple[Tensor, Tensor]:
    """(scale, zero point) of the integers 0..`levels`, per index of `axis` or (None) of all.

    scale = (high - low) / levels and zero_point = rint(-low / scale), of the range from low to high that holds all
    weights and zero. No weight is further than half a step from the grid. Both in float32 or wider, in a shape that
    broadcasts against `weight`; scale > 0.
    """
    values = weight.detach()
    others = [d for d in range(values.dim()) if d != axis]
    low, high = values.amin(others, keepdim=axis is not None), values.amax(others, keepdim=axis is not None)
    if low.dtype in (torch.float16, torch.bfloat16):
        low, high = low.float(), high.float()
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    # Two divisions: the difference of the largest floats is infinite.
    scale = (high / levels - low / levels).clamp(min=TINY)
    return scale, (-low / scale).round_().clamp_(0, levels)


def affine_integers(weight: Tensor, scale: Tensor, zero_point: Tensor, levels: int) -> Tensor:
    """q - `zero_point` in float, for the integers q of 0..`levels`: `weight` / `scale`, rounded."""
    q = weight.detach().mul(scale.reciprocal()).round_()
    # One too many where the zero point and the largest weight both lie halfway between two integers.
    return torch.minimum(torch.maximum(q, -zero_point), levels - zero_point)


class _FakeAffine(torch.autograd.Function):
    """Weights on an affine grid; the gradient passes, since the range holds every weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, axis: int | None, levels: int) -> Tensor:
        scale, zero_point = affine_grid(weight, axis=axis, levels=levels)
        return affine_integers(weight, scale, zero_point, levels).mul_(scale).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


def fake_affine(weight: Tensor, *, axis: int | None, levels: int) -> Tensor:
    """`weight` rounded to its `affine_grid`; zeros stay exactly zero. Its gradient is the output's."""
    fake: Tensor = _FakeAffine.apply(weight, axis, levels)  # type: ignore[no-untyped-call]
    return fake
