"""Fake quantization: float tensors that hold only values which the integers of deployment can have.

A quantizer observes the range of a tensor and rounds it by the functions of `straight_through`.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify.errors import DataError, StateError
from sparsify.model import distributed
from sparsify.quantization import observers
from sparsify.quantization.straight_through import (
    TINY,
    Clipped,
    ClippedOnDevice,
    Gated,
    Rectified,
    RectifiedInPlace,
    Unclipped,
    apply_function,
    in_backward,
    on_grid,
    readable,
    replaced,
)

__all__: list[str] = []

SETTLING = 16
"""Batches between two searches for a range out of a histogram; the first four have one each."""


class FakeQuantize(nn.Module):
    """Puts the values of one tensor onto the grid of its integers, and observes their range while it trains.

    q = clip(rint(x / scale) + zero_point, first, last); what comes out is (q - zero_point) * scale. The range
    [low, high] is a moving average of the least and largest value of each batch, widened to hold zero:
    low += c (min(batch) - low), c = `averaging_constant`; the first batch gives it whole. Then affine: scale =
    (high - low) / (2^bits - 1), zero_point = rint(-low / scale); symmetric: scale = max(-low, high) / (2^(bits-1) - 1),
    zero_point 0. The gradient passes where x is inside the range and is zero outside.

    Other observers: see `observers`. min_max is the least and largest value of all batches. Those with a histogram keep
    the moving average of each batch's, in calibration the average, and look for the best range at every 16th batch.

    Checkpoint: low, high, scale, zero_point, the number of batches seen and the histogram are buffers, and that is the
    whole state.

    Args:
        name: what the tensor is, for messages.
        bits: 2 to 8.
        symmetric: signed integers with zero point 0 instead of unsigned affine ones.
        averaging_constant: the share of a batch in the moving range or histogram.
        relu: the tensor goes through a ReLU first: low is 0, and in training the two are one function.
        ceiling: the ReLU is cut off there (ReLU6).
        in_place: whether the quantizer may overwrite its input, since it is the only reader.
        gate: the tensor goes through this activation of `GATES` first.
        observer: how the range follows from the values.
        percentile: of the observer of that name.
        producer: the module that gives the tensor: nothing is overwritten while one of its hooks may have kept it.

    Attributes:
        observing: whether the range moves in training mode.
        enabled: whether anything is rounded; off, it only observes.
        calibrating: whether it observes in eval mode too, and rounds nothing.
    """

    low: Tensor
    high: Tensor
    scale: Tensor
    zero_point: Tensor
    batches: Tensor
    histogram: Tensor
    extent: Tensor

    def __init__(
        self,
        name: str,
        *,
        bits: int = 8,
        symmetric: bool = False,
        averaging_constant: float = 0.01,
        relu: bool = False,
        ceiling: float = math.inf,
        in_place: bool = False,
        gate: str | None = None,
        observer: str = "moving_average",
        percentile: float = 99.99,
        producer: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.bits = bits
        self.symmetric = symmetric
        self.averaging_constant = averaging_constant
        self.relu = relu
        self.ceiling = ceiling
        self.in_place = in_place
        self.gate = gate
        self.observer = observer
        self.percentile = percentile
        self.observing = True
        self.enabled = True
        self.calibrating = False
        self.readers = 1
        """Number of layers that read one tensor through it: its quantized value is kept for them."""
        self._held: Any = None
        # In a tuple so that it is no child.
        self._producer: tuple[nn.Module] | None = None if producer is None else (producer,)
        self.first: int
        self.last: int
        self.first, self.last = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
        self.register_buffer("low", torch.zeros((), dtype=torch.float32))
        self.register_buffer("high", torch.zeros((), dtype=torch.float32))
        self.register_buffer("scale", torch.ones((), dtype=torch.float32))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int8 if symmetric else torch.uint8))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        if observer in observers.HISTOGRAMS:
            self.register_buffer("histogram", torch.zeros(observers.BINS, dtype=torch.float64))
            self.register_buffer("extent", torch.zeros((), dtype=torch.float32))

    def __getstate__(self) -> dict[str, Any]:
        # A tensor that layers share for a moment is nothing to copy or to save.
        return {**self.__dict__, "_held": None}

    def drop_held(self) -> None:
        """Forgets the tensor that layers share for a moment."""
        self._held = None

    @property
    def producer(self) -> nn.Module | None:
        """The module that gives the tensor."""
        return None if self._producer is None else self._producer[0]

    def extra_repr(self) -> str:
        kind = f"{'int' if self.symmetric else 'uint'}{self.bits}"
        return f"{kind}{', after ReLU' if self.relu else ''}{'' if self.observing else ', frozen'}"

    def forward(self, x: Tensor) -> Tensor:
        """`x` on the grid (after the ReLU, where there is one).

        Raises:
            DataError: the values to observe hold NaN or infinity.
        """
        # A tensor of inference mode does not say whether it was overwritten since.
        if self.readers > 1 and not torch.compiler.is_compiling() and not x.is_inference():
            held = self._held
            if held is not None and held[0]() is x and held[1] == x._version and held[2] == torch.is_grad_enabled():
                self._held = (*held[:4], held[4] - 1) if held[4] > 1 else None
                return held[3]  # type: ignore[no-any-return]
            y = self._compute(x)
            self._held = (weakref.ref(x), x._version, torch.is_grad_enabled(), y, self.readers - 1)
            return y
        return self._compute(x)

    def _compute(self, x: Tensor) -> Tensor:
        # Not the user's operations: hidden from a `TorchFunctionMode` that watches those.
        with torch._C.DisableTorchFunction():
            if self.gate is not None:
                x = self._gated(x, self.gate)
            if not self.training and not self.calibrating:
                return self.evaluate(x)
            if x.dtype != torch.float32:
                return self._train(x.float()).to(x.dtype)
            return self._train(x)

    def evaluate(self, x: Tensor) -> Tensor:
        """`x` as eval mode gives it, whatever the mode: on the grid as it stands."""
        x = self.rectified(x)
        if not self.enabled:
            return x
        y = on_grid(x, self.scale, self.zero_point, self.first, self.last)
        if torch.is_grad_enabled() and x.requires_grad:
            y = replaced(x, y)
        # Nothing was observed yet: there is no grid. Chosen by the device, where reading the count would wait.
        if readable(x):
            return y if self.batches else x
        return torch.where(self.batches > 0, y, x)

    def _train(self, x: Tensor) -> Tensor:
        # A forward inside backward is activation checkpointing computing again: it must see what the first one saw.
        watching = (self.observing or self.calibrating) and not in_backward()
        if not readable(x):
            return self._train_on_device(x, watching)
        low, high = self._limits_of(x, watching)
        if watching and x.numel():
            self._observe(low, high, x)
        buffers: Any = self._buffers
        if self.calibrating or not self.enabled or not buffers["batches"].item():
            return self.rectified(x)
        scale = buffers["scale"].item()
        alone = self._producer is None or not self._producer[0]._forward_hooks
        in_place = self.in_place and alone and not (x.requires_grad and x.is_leaf) and not x._is_view()
        if self.relu and self.first == 0:
            return apply_function(RectifiedInPlace if in_place else Rectified, x, scale, self.last)
        zero_point = buffers["zero_point"].item()
        lowest, highest = self.first - zero_point, self.last - zero_point
        if not self.relu and lowest - 0.5 < low / scale and high / scale < highest + 0.5:
            if in_place:
                # Behind autograd's back: the gradient is what it would be without it.
                x.detach().mul_(1.0 / scale).round_().mul_(scale)
                return x
            return apply_function(Unclipped, x, scale)
        return apply_function(Clipped, self.rectified(x), scale, lowest, highest)

    def _gated(self, x: Tensor, gate: str) -> Tensor:
        """`x` through the activation; its gate on the grid wherever anything is rounded."""
        plain = F.silu if gate == "silu" else F.hardswish
        known = self.training or not readable(x) or bool(self.batches)
        if self.calibrating or not self.enabled or not known:
            return plain(x)
        y = apply_function(Gated, x.float(), gate).to(x.dtype)
        return y if self.training or readable(x) else torch.where(self.batches > 0, y, plain(x))

    def rectified(self, x: Tensor) -> Tensor:
        """`x` through the ReLU before the quantizer, where there is one."""
        if not self.relu:
            return x
        return torch.clamp(x, 0.0, self.ceiling) if math.isfinite(self.ceiling) else torch.relu(x)

    def _limits_of(self, x: Tensor, watching: bool) -> tuple[float, float]:
        """The least and the largest value, as far as somebody asks: behind a ReLU the least is 0."""
        if not x.numel() or (self.relu and not watching):
            return 0.0, 0.0
        values = x.detach()
        if self.relu:
            return 0.0, values.amax().item()
        # On the CPU amax takes a third of the time of max, and the two less than aminmax (torch 2.13.0); likewise
        # https://github.com/facebookresearch/detectron2/pull/5224.
        return values.amin().item(), values.amax().item()

    def _require_finite(self, batch_low: float, batch_high: float) -> None:
        if not (math.isfinite(batch_low) and math.isfinite(batch_high)):
            raise DataError(
                f"{self.name}: its values reach from {batch_low} to {batch_high}, of which no scale can be made. The "
                "batch holds NaN or infinity, and can be left out: no range has moved here. Or the model makes them of "
                "it: lower the learning rate, or find the layer at which training diverged."
            )

    def _observe(self, batch_low: float, batch_high: float, x: Tensor) -> None:
        self._require_finite(batch_low, batch_high)
        low, high = min(batch_low, 0.0), min(max(batch_high, 0.0), self.ceiling)
        if self.observer in observers.HISTOGRAMS:
            found = self._observe_histogram(self.rectified(x))
            if found is None:
                return
            low, high = found[0].item(), found[1].item()
        elif distributed.world_size() > 1:
            seen_low, seen_high = (torch.tensor(edge, dtype=torch.float32) for edge in (low, high))
            distributed.reduce_range(seen_low, seen_high)
            low, high = seen_low.item(), seen_high.item()
        # By way of the dictionary: an attribute of a module takes as long as reading the value.
        buffers: Any = self._buffers
        seen = buffers["batches"].item()
        if seen and self.observer == "min_max":
            low, high = min(low, buffers["low"].item()), max(high, buffers["high"].item())
        elif seen and self.observer == "moving_average":
            share, low_before, high_before = self.averaging_constant, buffers["low"].item(), buffers["high"].item()
            low = low_before + share * (low - low_before)
            high = high_before + share * (high - high_before)
        buffers["low"].fill_(low)
        buffers["high"].fill_(high)
        buffers["batches"].fill_(seen + 1)
        if self.symmetric:
            buffers["scale"].fill_(max(-low, high, TINY) / self.last)
            return
        scale = max(high - low, TINY) / self.last
        buffers["scale"].fill_(scale)
        if low != 0.0 or not self.relu:
            buffers["zero_point"].fill_(min(round(-low / scale), self.last))

    @torch.no_grad()
    def _observe_histogram(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """The range after one more batch; None where it is not looked for now."""
        seen = int(self.batches)
        share = 1.0 / (seen + 1) if self.calibrating or not seen else self.averaging_constant
        observers.observe(self.histogram, self.extent, x, share)
        if seen >= 4 and seen % SETTLING and not self.calibrating:
            self.batches.add_(1)
            return None
        return observers.range_of(
            self.observer,
            self.histogram,
            self.extent,
            bits=self.bits,
            symmetric=self.symmetric,
            percentile=self.percentile,
        )

    @torch.no_grad()
    def choose_range(self, observer: str, percentile: float) -> None:
        """Takes the range that an observer of `observers.HISTOGRAMS` chooses out of the histogram that is there."""
        self.observer, self.percentile = observer, percentile
        low, high = observers.range_of(
            observer,
            self.histogram,
            self.extent,
            bits=self.bits,
            symmetric=self.symmetric,
            percentile=percentile,
        )
        self.low.copy_(low)
        self.high.copy_(high.clamp(max=self.ceiling))
        self._set_scale()

    def _train_on_device(self, x: Tensor, watching: bool) -> Tensor:
        x = self.rectified(x)
        if watching:
            with torch.no_grad():
                if self.observer in observers.HISTOGRAMS:
                    found = self._observe_histogram(x)
                    if found is not None:
                        self._observe_on_device(*found)
                else:
                    low, high = torch.aminmax(x.detach())
                    self._observe_on_device(low.clamp(max=0.0), high.clamp(min=0.0))
        if self.calibrating or not self.enabled:
            return x
        zero_point = self.zero_point.to(x.dtype)
        limits = (self.first - zero_point, self.last - zero_point)
        y = apply_function(ClippedOnDevice, x, self.scale, *limits, self.relu and not self.symmetric)
        return y if watching else torch.where(self.batches > 0, y, x)

    def _observe_on_device(self, low: Tensor, high: Tensor) -> None:
        # A range that is not finite makes everything NaN; `check` says why, without waiting for the device now.
        if self.observer in observers.HISTOGRAMS:
            self.low.copy_(low)
            self.high.copy_(high)
        else:
            if not torch.compiler.is_compiling():
                distributed.reduce_range(low, high)
            if self.observer == "min_max":
                # Both begin at 0, which every range holds.
                self.low.copy_(torch.minimum(self.low, low))
                self.high.copy_(torch.maximum(self.high, high))
            else:
                share = torch.where(self.batches > 0, self.averaging_constant, 1.0)
                self.low.copy_(torch.lerp(self.low, low, share))
                self.high.copy_(torch.lerp(self.high, high, share))
        self.batches.add_(1)
        self._set_scale()

    def _set_scale(self) -> None:
        if self.symmetric:
            self.scale.copy_(torch.maximum(-self.low, self.high).clamp(min=TINY) / self.last)
        else:
            self.scale.copy_((self.high - self.low).clamp(min=TINY) / self.last)
            self.zero_point.copy_((-self.low / self.scale).round().clamp(max=self.last))

    def check(self) -> None:
        """Looks at the range; waits for the device.

        Raises:
            DataError: it holds NaN or infinity.
        """
        if not (math.isfinite(self.low.item()) and math.isfinite(self.high.item())):
            raise DataError(
                f"{self.name}: its range is [{self.low.item()}, {self.high.item()}]. The model gave NaN or infinity: "
                "lower the learning rate, or find the layer at which training diverged."
            )

    def require_range(self) -> None:
        """Checks that a grid is known.

        Raises:
            StateError: no batch was ever observed.
            DataError: as `check`.
        """
        self.check()
        if not self.batches.item():
            raise StateError(
                f"{self.name}: no values were ever observed, so there is no scale. Train at least one step, or "
                "calibrate, before the model is exported; where training never comes there, name the layer in `ignore`."
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FakeQuantize:
        # Ranges keep their types whatever the model is cast to: a scale in bfloat16 has two digits.
        names = ("low", "high", "scale", *(("histogram", "extent") if self.observer in observers.HISTOGRAMS else ()))
        kept = {name: getattr(self, name) for name in names}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in kept.items():
            moved = getattr(self, name)
            if moved.dtype != value.dtype:
                setattr(self, name, value.to(moved.device) if not moved.is_meta else moved.to(value.dtype))
        return self
