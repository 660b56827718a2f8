"""Straight-through functions: rounding to a grid of integers, with the gradient of what is rounded.

Written by hand: on the CPU they take a third of the time of the built-in operators of torch 2.13.0. Why each keeps what
it keeps, and what may be overwritten, is said where it happens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

__all__: list[str] = []

SMALL = 1 << 16
"""Weights up to which one operator less counts more than one copy less."""
TINY = 1e-12
"""The least width of a range: a tensor of zeros has a scale > 0."""


class Context(FunctionCtx):
    """Attributes that a forward leaves for its backward; for the type checker only."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    high: float
    limits: tuple[float, float]
    gate: str


def weight_scale(weight: Tensor, *, axis: int | None, q_max: int) -> Tensor:
    """The scale of symmetric integers -`q_max`..`q_max`: max |w| / `q_max`, per index of `axis` or (None) of all.

    Comes back float32 or wider, in a shape that broadcasts against `weight`; > 0 everywhere.
    """
    values = weight.detach()
    if axis is None:
        widest = torch.maximum(values.amax(), values.amin().neg_())
    elif axis == 0:
        rows = values.reshape(values.shape[0], -1)
        # Few weights: two operators less. Many: two reductions and no copy; aminmax(dim=1) takes 5-30 times as long in
        # torch 2.13.0 on the CPU (its kernel: https://github.com/pytorch/pytorch/pull/42894).
        widest = rows.abs().amax(1) if rows.numel() <= SMALL else torch.maximum(rows.amax(1), rows.amin(1).neg_())
        widest = widest.view(-1, *[1] * (values.dim() - 1))
    else:
        others = [d for d in range(values.dim()) if d != axis]
        widest = torch.maximum(values.amax(others, keepdim=True), values.amin(others, keepdim=True).neg_())
    if widest.dtype in (torch.float16, torch.bfloat16):
        widest = widest.float()
    return widest.clamp_(min=TINY).div_(q_max)


def weight_integers(weight: Tensor, scale: Tensor) -> Tensor:
    """`weight` / `scale`, rounded: integers in float. Multiplies by the reciprocal; a broadcast division is slow."""
    values = weight.detach()
    # Beside a scale of rank 0 the product would be in half precision, in which not every integer is.
    values = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    return values.mul(scale.reciprocal()).round_()


class _FakeWeight(torch.autograd.Function):
    """Weights on the grid; the gradient passes, since a range of the largest absolute value clips nothing."""

    @staticmethod
    def forward(ctx: Context, weight: Tensor, axis: int | None, q_max: int) -> Tensor:
        scale = weight_scale(weight, axis=axis, q_max=q_max)
        return weight_integers(weight, scale).mul_(scale).to(weight.dtype)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


def fake_weight(weight: Tensor, *, axis: int | None, q_max: int) -> Tensor:
    """`weight` rounded to its grid (see `weight_scale`); zeros stay exactly zero. Its gradient is the output's."""
    if weight.numel() <= SMALL and weight.dtype == torch.float32 and readable(weight):
        # A copy, overwritten behind autograd's back: the two calls of a function take longer than copying few weights.
        fake = weight.clone()
        values = fake.detach()
        scale = weight_scale(values, axis=axis, q_max=q_max)
        values.mul_(scale.reciprocal()).round_().mul_(scale)
        return fake
    return apply_function(_FakeWeight, weight, axis, q_max)


class RectifiedInPlace(torch.autograd.Function):
    """ReLU and fake-quant in one: x is overwritten by its output, which is all that backward needs.

    Not hardtanh_, which has the same gradient and keeps a copy of x for it.
    """

    @staticmethod
    def forward(ctx: Context, x: Tensor, scale: float, levels: int) -> Tensor:
        ctx.mark_dirty(x)
        x.mul_(1.0 / scale).round_().clamp_(0, levels).mul_(scale)
        # Backward looks at the output. The highest level counts as clipped, as does all that was rounded to zero.
        ctx.high = (levels - 0.5) * scale
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None]:
        (y,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grad, y, 0.0, ctx.high), None, None


class Rectified(torch.autograd.Function):
    """As `RectifiedInPlace`, for an x that others still read."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, scale: float, levels: int) -> Tensor:
        y = x.mul(1.0 / scale).round_().clamp_(0, levels).mul_(scale)
        ctx.high = (levels - 0.5) * scale
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None]:
        (y,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grad, y, 0.0, ctx.high), None, None


class Unclipped(torch.autograd.Function):
    """Fake-quant where nothing lies outside the range: the gradient passes, and nothing needs to be kept."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, scale: float) -> Tensor:
        return x.mul(1.0 / scale).round_().mul_(scale)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Clipped(torch.autograd.Function):
    """Fake-quant with clipping: keeps its *input*, since the user's `out += identity` may overwrite the output."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, scale: float, lowest: int, highest: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limits = ((lowest - 0.5) * scale, (highest + 0.5) * scale)
        return x.mul(1.0 / scale).round_().clamp_(lowest, highest).mul_(scale)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grad, x, *ctx.limits), None, None, None


class ClippedOnDevice(torch.autograd.Function):
    """Fake-quant whose scale stays in a tensor: on an accelerator, where reading it would wait, or in compiled code."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, scale: Tensor, lowest: Tensor, highest: Tensor, relu: bool) -> Tensor:
        q = (x / scale).round()
        # Behind a ReLU as `Rectified` does it: nothing for what became zero or the highest level.
        ctx.save_for_backward((q > lowest) & (q < highest) if relu else (q >= lowest) & (q <= highest))
        return torch.minimum(torch.maximum(q, lowest), highest) * scale

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None, None, None


class Gated(torch.autograd.Function):
    """x * gate(x) with the gate on its own grid of integers, `GATES`; the gradient is that of the activation."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, gate: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.gate = gate
        return gate_of(x, gate).div_(GATES[gate]).round_().clamp_(0, 255).mul_(GATES[gate]).mul_(x)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        silu = ctx.gate == "silu"
        return (torch.ops.aten.silu_backward if silu else torch.ops.aten.hardswish_backward)(grad, x), None


GATES: dict[str, float] = {"silu": 1 / 256, "hardswish": 1 / 256}
"""Activations x * gate(x) -> the scale of the gate, uint8 with zero point 0. So both their operators run in integers,
which takes a third of the time: onnxruntime has a table for sigmoid, and a hard sigmoid is an addition that saturates,
at 255/256. With 1/255 it would saturate at 1, but 1/2, the gate of 0, would lie half-way between two integers."""


def gate_of(x: Tensor, gate: str) -> Tensor:
    """The factor of x in the activation `gate`, in float."""
    return torch.sigmoid(x) if gate == "silu" else F.hardsigmoid(x)


def apply_function(function: type[torch.autograd.Function], *args: object) -> Tensor:
    """The result of `function.apply`, which torch leaves untyped."""
    result: Tensor = function.apply(*args)  # type: ignore[no-untyped-call]
    return result


def in_backward() -> bool:
    """True inside of a backward, as where activation checkpointing computes a forward again."""
    # Compiled code has no such question, and computes nothing again but what it decided to.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def readable(x: Tensor) -> bool:
    """True if a value can be read into Python without waiting for a device or breaking a compiled or traced graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and type(x) in (Tensor, nn.Parameter)


class _Replaced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, y: Tensor) -> Tensor:
        return y.detach()

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def replaced(x: Tensor, y: Tensor) -> Tensor:
    """The values of `y` with the gradient going to `x`, of the same shape: where a gradient is wanted in eval mode."""
    return apply_function(_Replaced, x, y)


def on_grid(x: Tensor, scale: Tensor, zero_point: Tensor, first: int, last: int) -> Tensor:
    """(clip(rint(x / scale) + zero_point, first, last) - zero_point) * scale: what the exported model computes.

    Divides where training multiplies by the reciprocal, as QuantizeLinear does; the two differ on ties.
    """
    offset = zero_point.float()
    return ((x.float() / scale).round_().add_(offset).clamp_(first, last).sub_(offset)).mul_(scale).to(x.dtype)
