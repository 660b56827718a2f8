"""Learned step size: scales that the user's optimizer trains along with the weights.

LSQ (Esser 2020, "Learned step size quantization", https://arxiv.org/abs/1902.08153), and for affine activations the
offset of LSQ+ (Bhalgat 2020, https://arxiv.org/abs/2004.09576). With t = x / s, the integers lo..hi and round(t) of
them, what comes out is clip(round(t), lo, hi) * s, and its gradient by s, in each element,

    round(t) - t  where lo < t < hi,   lo  where t <= lo,   hi  where t >= hi,

summed and multiplied by 1 / sqrt(N hi), N the elements that share s. x has its gradient where lo < t < hi.

What differs from the paper: weights have the integers -hi..hi, not one more below, so that a BatchNorm of either sign
folds into them; the first step 2 mean|x| / sqrt(hi) is never coarser than max|x| / hi, the one of the whole range: with
8 bits it would be four times as coarse; no step falls below 1/32 of its first value: an optimizer that moves
everything by its learning rate (Adam) would carry small steps past zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsify.errors import DataError
from sparsify.model import distributed
from sparsify.model.sharding import gathered
from sparsify.quantization.fake_quantize import FakeQuantize
from sparsify.quantization.straight_through import TINY, Context, apply_function, in_backward, readable

__all__: list[str] = []

LEAST = 1 / 32
"""Lower bound of a step, as a fraction of its first value."""


def first_step(x: Tensor, q_max: int) -> Tensor:
    """2 mean|x| / sqrt(`q_max`), at most max|x| / `q_max`, of each row of `x` (rows, elements): (rows,), > 0."""
    size = x.detach().float().abs()
    return torch.minimum(size.mean(1) * (2 / math.sqrt(q_max)), size.amax(1) / q_max).clamp_(min=TINY)


class IntegerRange(NamedTuple):
    """The integers of a call: of zero point 0 where `offset` did not make one."""

    scale: Tensor
    lowest: Tensor
    highest: Tensor
    zero_point: Tensor


class LearnedContext(Context):
    """Attributes that the forward of `LearnedRounding` leaves for its backward."""

    shape: torch.Size
    factor: float
    has_offset: bool


class LearnedRounding(torch.autograd.Function):
    """clip(round(x / s), lowest, highest) * s with the gradients above; `step` and `offset` are where they go."""

    @staticmethod
    def forward(
        ctx: LearnedContext, x: Tensor, step: Tensor, offset: Tensor | None, grid: IntegerRange, factor: float
    ) -> Tensor:
        ctx.save_for_backward(x, *grid)
        ctx.shape, ctx.factor, ctx.has_offset = step.shape, factor, offset is not None
        t = x * grid.scale.reciprocal()
        return torch.minimum(torch.maximum(t.round_(), grid.lowest), grid.highest).mul_(grid.scale).to(x.dtype)

    @staticmethod
    def backward(ctx: LearnedContext, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, scale, lowest, highest, zero_point = ctx.saved_tensors
        t = x * scale.reciprocal()
        below, above = t <= lowest, t >= highest
        inside = ~(below | above)
        by_step = by_offset = None
        if ctx.needs_input_grad[1]:
            # A clipped value is integer * s + offset: the offset has the rest of its gradient.
            slope = torch.where(below, lowest + zero_point, torch.where(above, highest + zero_point, t.round() - t))
            by_step = _summed(slope.mul_(grad), ctx.shape) * ctx.factor
        if ctx.has_offset and ctx.needs_input_grad[2]:
            by_offset = (grad * ~inside).sum() * ctx.factor
        return grad * inside if ctx.needs_input_grad[0] else None, by_step, by_offset, None, None


def _summed(values: Tensor, shape: torch.Size) -> Tensor:
    """Over all that shares an entry of a tensor of `shape`, which broadcasts against `values`."""
    return values.sum() if not shape else values.sum_to_size(shape)


def learned_rounding(x: Tensor, step: Tensor, offset: Tensor | None, grid: IntegerRange, factor: float) -> Tensor:
    """The result of `LearnedRounding`."""
    return apply_function(LearnedRounding, x, step, offset, grid, factor)


class LearnedStep(nn.Module):
    """The step of a layer's weights, one for each index of `axis` or (None) for all of them.

    Checkpoint: `step`, a parameter, and `least`, below which it does not count, a buffer.

    Attributes:
        observing: whether the step learns; false: it stands still and has no gradient.
    """

    step: nn.Parameter
    least: Tensor

    def __init__(self, weight: Tensor, *, axis: int | None, q_max: int) -> None:
        super().__init__()
        weight = gathered(weight)
        self.axis, self.q_max, self.observing = axis, q_max, True
        rows = weight.detach().reshape(1, -1) if axis is None else weight.detach().movedim(axis, 0).flatten(1)
        step = first_step(rows, q_max).to(weight.device)
        shape = [1] * weight.dim() if axis is not None else []
        if axis is not None:
            shape[axis] = -1
        self.step = nn.Parameter(step.reshape(shape))
        self.register_buffer("least", step.reshape(shape) * LEAST)

    def scale(self) -> Tensor:
        """float32, > 0, in a shape that broadcasts against the weight."""
        return torch.maximum(self.step.detach(), self.least)

    def forward(self, weight: Tensor) -> Tensor:
        """`weight` on the grid."""
        scale = self.scale()
        last = torch.tensor(float(self.q_max), device=scale.device)
        step = self.step if self.observing else self.step.detach()
        factor = 1.0 / math.sqrt(weight.numel() / scale.numel() * self.q_max)
        return learned_rounding(weight, step, None, IntegerRange(scale, -last, last, torch.zeros_like(last)), factor)

    def extra_repr(self) -> str:
        return f"{tuple(self.step.shape)} steps, largest integer {self.q_max}{'' if self.observing else ', frozen'}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LearnedStep:
        keep_float32(self, ("step", "least"), lambda: super(LearnedStep, self)._apply(fn, recurse))  # type: ignore[no-untyped-call]
        return self


class LearnedQuantize(FakeQuantize):
    """A quantizer of activations whose step learns, and behind no ReLU, where the grid is affine, its offset.

    scale = max(step, least), zero_point = rint(-offset / scale). Both start from the first batch, in calibration from
    the mean of all: the step as `first_step`; with an offset the range of the values, offset = min.

    Checkpoint: as FakeQuantize, with the parameters `step` and `offset` and the buffer `least`. `scale` and
    `zero_point` follow from them whenever something is computed.
    """

    step: nn.Parameter
    offset: nn.Parameter | None
    least: Tensor

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(name, **{**options, "observer": "lsq", "in_place": False})
        self.step = nn.Parameter(torch.ones((), dtype=torch.float32))
        fixed = self.symmetric or self.relu or self.gate is not None
        self.register_parameter("offset", None if fixed else nn.Parameter(torch.zeros((), dtype=torch.float32)))
        self.register_buffer("least", torch.zeros((), dtype=torch.float32))
        self._started = False

    def _compute(self, x: Tensor) -> Tensor:
        self.follow()
        return super()._compute(x)

    def follow(self) -> None:
        """Brings scale, zero point, low and high in line with what was learned; does nothing before a first batch."""
        if not self._has_started():
            return
        with torch.no_grad():
            grid = self._grid()
            self.scale.copy_(grid.scale)
            self.zero_point.copy_(grid.zero_point)
            self.low.copy_(grid.lowest * grid.scale)
            self.high.copy_(grid.highest * grid.scale)

    def check(self) -> None:
        """As `FakeQuantize.check`, of what was learned."""
        self.follow()
        super().check()

    def _grid(self) -> IntegerRange:
        scale = torch.maximum(self.step.detach(), self.least)
        zero = torch.zeros_like(scale)
        if self.offset is not None:
            zero = (-self.offset.detach() / scale).round_().clamp_(0, self.last)
        return IntegerRange(scale, self.first - zero, self.last - zero, zero)

    def _has_started(self) -> bool:
        # Asked of the device until it is true, and never again.
        if not self._started:
            self._started = bool(self.batches.item())
        return self._started

    def _train(self, x: Tensor) -> Tensor:
        watching = (self.observing or self.calibrating) and not in_backward()
        if watching and x.numel():
            self._start(x)
        if self.calibrating or not self.enabled or not self._has_started():
            return self.rectified(x)
        if self.relu:
            x = self.rectified(x)
        grid = self._grid()
        learns = self.observing and x.numel() > 0
        step = self.step if learns else self.step.detach()
        offset = self.offset if learns or self.offset is None else self.offset.detach()
        features = x.numel() / max(x.shape[0] if x.dim() else 1, 1)
        return learned_rounding(x, step, offset, grid, 1.0 / math.sqrt(max(features, 1.0) * self.last))

    @torch.no_grad()
    def _start(self, x: Tensor) -> None:
        """Refuses what is not finite; the first step and offset, out of the first batch or in calibration of all."""
        x = x.detach()
        # One reduction: a sum of finite values that overflows is looked at again.
        if readable(x) and not math.isfinite(x.sum().item()) and not x.isfinite().all():
            raise DataError(
                f"{self.name}: its values hold NaN or infinity, of which no scale can be made. The model gives them: "
                "lower the learning rate, or find the layer at which training diverged."
            )
        if self._has_started() and not self.calibrating:
            return
        x = self.rectified(x)
        low = x.amin().clamp(max=0.0)
        if self.offset is None:
            step = first_step(x.reshape(1, -1), self.last)[0]
        else:
            step = ((x.amax().clamp(min=0.0) - low) / self.last).clamp(min=TINY)
        found = {"step": step, "offset": low.clone()}
        if distributed.world_size() > 1:
            distributed.average(found)
        share = 1.0 / (int(self.batches) + 1)
        self.step.copy_(torch.lerp(self.step, found["step"], share))
        if self.offset is not None:
            self.offset.copy_(torch.lerp(self.offset, found["offset"], share))
        self.least.copy_(self.step * LEAST)
        self.batches.add_(1)
        self.follow()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LearnedQuantize:
        names = ("step", "offset", "least")
        keep_float32(self, names, lambda: super(LearnedQuantize, self)._apply(fn, recurse))
        return self


def keep_float32(module: nn.Module, names: tuple[str, ...], apply: Callable[[], object]) -> None:
    """Runs `apply`, which casts tensors of `module`; those called `names` keep their digits."""
    kept = {name: value.detach().clone() for name in names if (value := getattr(module, name)) is not None}
    apply()
    for name, value in kept.items():
        moved = getattr(module, name)
        if moved.dtype != value.dtype:
            moved.data = value.to(moved.device) if not moved.is_meta else moved.data.to(value.dtype)


def learned_parameters(model: nn.Module) -> Mapping[str, nn.Parameter]:
    """Steps and offsets below `model`, by their names."""
    return {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        if isinstance(module, (LearnedStep, LearnedQuantize))
        for name, parameter in module.named_parameters(recurse=False)
    }


def freeze_steps(model: nn.Module, frozen: bool) -> None:
    """Has the steps of weights stand still, or no longer; gradients are dropped, so that no momentum moves them."""
    for module in model.modules():
        if isinstance(module, LearnedStep):
            module.observing = not frozen
    for parameter in learned_parameters(model).values() if frozen else ():
        parameter.grad = None
