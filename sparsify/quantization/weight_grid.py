"""The grid of a layer's weights: one scale, one a channel, or one for every block of inputs of each output channel.

Integers are symmetric, -q_max..q_max, or affine, 0..2 q_max + 1 with a zero point beside each scale. In memory both are
counted from zero on: of affine ones that is q - z, so that zeros are 0 and a factor of -1 changes signs alone. Zero is
exact in both, so masks hold. A symmetric grid spends half of its steps on the side where a row has nothing; an affine
one follows the range as it lies, which shows with few bits and few weights to a scale.

A block is `block` weights of one output channel that lie side by side along the inputs of a Linear; the last one of a
row may be shorter. In blocks a weight is a matrix with a block in each row, the last filled up with zeros, and its
scales are those of an axis.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from sparsify.model.made_weights import weight_in_use
from sparsify.quantization.learned_step import LearnedStep
from sparsify.quantization.straight_through import (
    TINY,
    apply_function,
    fake_weight,
    weight_integers,
    weight_scale,
)
from sparsify.quantization.wiring import Converted, Wiring, wiring_of

__all__: list[str] = []

WEIGHT_STEP = "weight_quantizer"
"""The child of a layer that holds the learned step of its weights."""
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Layers whose weight has its output channels along the second dimension."""


def in_blocks(weight: Tensor, block: int, axis: int) -> Tensor:
    """`weight` (two dimensions, inputs along `axis`) with a block in each row."""
    rows = weight if axis == 1 else weight.t()
    missing = -rows.shape[1] % block
    return (F.pad(rows, (0, missing)) if missing else rows).reshape(-1, block)


def out_of_blocks(values: Tensor, like: Tensor, axis: int) -> Tensor:
    """The inverse of `in_blocks`: `values`, a block in each row, in the shape of `like`."""
    rows = values.reshape(like.shape[1 - axis], -1)[:, : like.shape[axis]]
    return rows if axis == 1 else rows.t()


def learned_step(weight: Tensor, wiring: Wiring) -> LearnedStep:
    """The learned scales of this grid, started from the weight as it stands."""
    if wiring.block:
        return LearnedStep(in_blocks(weight, wiring.block, _inputs(wiring)), axis=0, q_max=wiring.q_max)
    return LearnedStep(weight, axis=wiring.axis, q_max=wiring.q_max)


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a layer: its parameter, what is made of it, or where there is none, the tensor in its place."""
    return weight_in_use(layer, "weight")


def bias_of(layer: nn.Module) -> Tensor | None:
    """The bias of a layer; None: it has none."""
    return cast("Tensor | None", layer.bias)


def fake_layer_weight(layer: Converted) -> Tensor:
    """The weight of `layer` on its grid, with the gradients of training."""
    wiring, weight, step = wiring_of(layer), weight_of(layer), layer._modules.get(WEIGHT_STEP)
    values = in_blocks(weight, wiring.block, _inputs(wiring)) if wiring.block else weight
    values = step(values) if step is not None else rounded(values, 0 if wiring.block else wiring.axis, wiring)
    return out_of_blocks(values, weight, _inputs(wiring)) if wiring.block else values


def rounded(values: Tensor, axis: int | None, wiring: Wiring) -> Tensor:
    """`values` on the grid of their own range, with the gradients of training."""
    if wiring.affine:
        return fake_affine(values, axis=axis, levels=2 * wiring.q_max + 1)
    return fake_weight(values, axis=axis, q_max=wiring.q_max)


def on_own_grid(layer: Converted) -> tuple[Tensor, Tensor, Tensor | None]:
    """(integers counted from zero on, in float; scales; zero points or None) of a layer's weight as it stands.

    The scales broadcast against the integers, or where there are blocks have the shape of the weight with as many
    entries along the inputs as there are blocks; zero points likewise.
    """
    wiring = wiring_of(layer)
    weight, step = weight_of(layer).detach().float(), cast("LearnedStep | None", layer._modules.get(WEIGHT_STEP))
    values = in_blocks(weight, wiring.block, _inputs(wiring)) if wiring.block else weight
    q, scale, zero = grid_integers(values, 0 if wiring.block else wiring.axis, wiring, step)
    if not wiring.block:
        return q, scale, zero

    def laid_out(each: Tensor) -> Tensor:
        blocks = each.reshape(weight.shape[1 - _inputs(wiring)], -1)
        return blocks if _inputs(wiring) == 1 else blocks.t()

    return out_of_blocks(q, weight, _inputs(wiring)), laid_out(scale), None if zero is None else laid_out(zero)


def grid_integers(
    values: Tensor, axis: int | None, wiring: Wiring, step: LearnedStep | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(integers counted from zero on, in float; scales; zero points or None) of `values`, in float32 or wider.

    Scales and zero points broadcast against `values`: per index of `axis`, or (None) one for all.
    """
    if wiring.affine:
        levels = 2 * wiring.q_max + 1
        scale, zero = affine_grid(values, axis=axis, levels=levels)
        return affine_integers(values, scale, zero, levels), scale, zero
    scale = weight_scale(values, axis=axis, q_max=wiring.q_max) if step is None else step.scale()
    # Clips only where the step was learned: otherwise the largest weight is the largest integer.
    return weight_integers(values, scale).clamp_(-wiring.q_max, wiring.q_max), scale, None


def widened(scale: Tensor, like: Tensor, axis: int | None, block: int) -> Tensor:
    """`scale`, of rank 0, (C,) along `axis` or one for each block along it, shaped to broadcast against `like`."""
    if axis is None:
        return scale
    if block:
        return scale.repeat_interleave(block, axis).narrow(axis, 0, like.shape[axis])
    shape = [1] * like.dim()
    shape[axis] = -1
    return scale.reshape(shape)


def _inputs(wiring: Wiring) -> int:
    """The dimension along which blocks lie: that of the inputs."""
    return 1 if wiring.axis is None else 1 - wiring.axis


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
    def forward(ctx: FunctionCtx, weight: Tensor, axis: int | None, levels: int) -> Tensor:
        scale, zero_point = affine_grid(weight, axis=axis, levels=levels)
        return affine_integers(weight, scale, zero_point, levels).mul_(scale).to(weight.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


def fake_affine(weight: Tensor, *, axis: int | None, levels: int) -> Tensor:
    """`weight` rounded to its `affine_grid`; zeros stay exactly zero. Its gradient is the output's."""
    return apply_function(_FakeAffine, weight, axis, levels)


def channel_axis(layer: nn.Module) -> int:
    """The dimension of the weight along which the output channels lie."""
    return 1 if isinstance(layer, TRANSPOSED) or stores_transposed(layer) else 0


def stores_transposed(module: nn.Module) -> bool:
    """True if it is transformers' Conv1D (GPT-2), a Linear whose weight is (in, out). Known by its name alone."""
    weight = module._parameters.get("weight")
    return any(cls.__name__ == "Conv1D" for cls in type(module).__mro__) and (weight is None or weight.dim() == 2)
