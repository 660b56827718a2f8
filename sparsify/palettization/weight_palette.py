"""One weight on palettes while it trains: softly in training mode, each weight on its nearest value in eval mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsify.palettization.config import PalettizerConfig
from sparsify.palettization.kmeans import kmeans, kmeans_vectors
from sparsify.palettization.soft_kmeans import looked_up, means_of, nearest_codes, soft_means, soft_values, zeros_kept

__all__: list[str] = []

LEAST_SCALE = 1e-20
LEAST_TEMPERATURE = 1e-6
"""Of the mean squared weight: a palette that fits exactly has no error to measure the temperature by."""
LARGEST_ENTRY = 127


@dataclass(frozen=True)
class PaletteLayout:
    """Which weights share a palette.

    Attributes:
        shape: of the weight.
        axis: the dimension along which channels lie.
        palettes: number of palettes, each of as many channels.
        cluster_dim: numbers that an entry stands for, neighbors along `axis`.
    """

    shape: tuple[int, ...]
    axis: int
    palettes: int
    cluster_dim: int

    def parts(self, weight: Tensor) -> Tensor:
        """(palettes, elements, cluster_dim), in float32."""
        channels = weight.float().movedim(self.axis, 0)
        size = channels.shape[0] // self.palettes // self.cluster_dim
        vectors = channels.reshape(self.palettes, size, self.cluster_dim, -1).transpose(2, 3)
        return vectors.reshape(self.palettes, -1, self.cluster_dim).contiguous()

    def whole(self, parts: Tensor) -> Tensor:
        """The inverse of `parts`."""
        channels = self.shape[self.axis]
        others = [size for d, size in enumerate(self.shape) if d != self.axis]
        size = channels // self.palettes // self.cluster_dim
        vectors = parts.reshape(self.palettes, size, -1, self.cluster_dim).transpose(2, 3)
        return vectors.reshape(channels, *others).movedim(0, self.axis)


class WeightPalette(nn.Module):
    """Palettes of one weight: `forward(weight)` is what it becomes, in its shape and dtype.

    In training each weight is a sum of the values by its shares in them (`soft_kmeans`), with gradients to the weight
    directly and through the values. In eval mode it is the nearest value. Zeros of the weight stay exactly 0 where a
    value of their palette is pinned. After `freeze` each weight keeps its value's index, and values are the means of
    their weights, so that they learn by what all of them do; training and eval mode are the same then.

    Checkpoint: the values, which are pinned, the temperatures and, once frozen, the indices are buffers.

    Args:
        layout: which weights share a palette.
        nbits: 2^nbits values a palette.
        integers: the values are integers, -127 to 127, times one scale a palette.
    """

    values: Tensor
    pinned: Tensor
    tau: Tensor
    codes: Tensor | None

    def __init__(self, layout: PaletteLayout, nbits: int, *, integers: bool = False) -> None:
        super().__init__()
        self.layout, self.nbits, self.integers = layout, nbits, integers
        self.register_buffer("values", torch.zeros(layout.palettes, 2**nbits, layout.cluster_dim))
        self.register_buffer("pinned", torch.zeros(layout.palettes, 2**nbits, dtype=torch.bool))
        self.register_buffer("tau", torch.ones(layout.palettes))
        self.register_buffer("codes", None)

    @property
    def frozen(self) -> bool:
        """True if each weight keeps its index."""
        return self.codes is not None

    @torch.no_grad()
    def start(self, weight: Tensor, *, importance: Tensor | None = None, tau: float | None = None) -> None:
        """Puts the values where the squared error is least, by `sparsify.palettization.kmeans`.

        Args:
            weight: finite.
            importance: of each weight, 0 or more, in its shape (SqueezeLLM, https://arxiv.org/abs/2306.07629); None:
                all alike.
            tau: the temperature; None: the mean squared distance to the nearest value.
        """
        parts = self.layout.parts(weight.detach())
        important = None if importance is None else self.layout.parts(importance)
        for each, part in enumerate(parts):
            found = _start_values(part, 2**self.nbits, None if important is None else important[each])
            self.values[each].copy_(found)
        self.pin(weight)
        codes = nearest_codes(parts, self.values)
        error = (parts - looked_up(self.values, codes)).square().sum(2).mean(1)
        least = parts.square().sum(2).mean(1) * LEAST_TEMPERATURE
        self.tau.copy_(
            torch.maximum(error, least).clamp(min=LEAST_SCALE) if tau is None else torch.full_like(self.tau, tau)
        )

    @torch.no_grad()
    def pin(self, weight: Tensor) -> None:
        """Puts one value of each palette that has zeros to exactly 0, and keeps it there; others are free again."""
        zeros = (self.layout.parts(weight.detach()) == 0).all(2).any(1, keepdim=True)
        nearest = nn.functional.one_hot(self.values.square().sum(2).argmin(1), self.values.shape[1])
        self.pinned.copy_(zeros & nearest.bool())
        self.values.masked_fill_(self.pinned.unsqueeze(2), 0.0)

    @torch.no_grad()
    def advance(self, weight: Tensor, iterations: int) -> None:
        """Brings the values to rest on the weight as it is now."""
        parts = self.layout.parts(weight.detach())
        if self.codes is not None:
            self.values.copy_(means_of(parts, self.codes.long(), self.values, self.pinned))
            return
        for _ in range(iterations):
            self.values.copy_(soft_means(parts, self.values, self.tau, self.pinned))

    @torch.no_grad()
    def freeze(self, weight: Tensor) -> None:
        """From now on each weight keeps the index of the value that is nearest to it."""
        if self.codes is None:
            self.codes = nearest_codes(self.layout.parts(weight.detach()), self.values).to(torch.uint8)
            self.advance(weight, 1)

    def make_room(self) -> None:
        """Makes room for the indices of a state that is loaded next."""
        if self.codes is None:
            elements = int(np.prod(self.layout.shape)) // (self.layout.palettes * self.layout.cluster_dim)
            shape = (self.layout.palettes, elements)
            self.codes = torch.zeros(shape, dtype=torch.uint8, device=self.values.device)

    def forward(self, weight: Tensor) -> Tensor:
        # Whoever watches the functions of the forward that reads this weight asks about none of these.
        with torch._C.DisableTorchFunction():
            return self._made(weight)

    def _made(self, weight: Tensor) -> Tensor:
        parts = self.layout.parts(weight)
        if self.codes is not None:
            codes = self.codes.long()
            values = means_of(parts, codes, self.values, self.pinned)
            found = _keeping_zeros(looked_up(self._stored(values), codes), parts.detach(), self.pinned)
        elif self.training:
            values = soft_means(parts, self.values, self.tau, self.pinned)
            found = soft_values(parts, self._stored(values), self.tau, self.pinned)
        else:
            values = self._stored(self.values)
            near = looked_up(values, nearest_codes(parts.detach(), values))
            found = _in_place_of(parts, zeros_kept(near, parts.detach(), self.pinned))
        made = self.layout.whole(found).to(weight.dtype)
        # In the memory format of the parameter, by which kernels are chosen: the weight that is kept gives the same.
        return made.contiguous() if weight.is_contiguous() else torch.empty_like(weight).copy_(made)

    def _stored(self, values: Tensor) -> Tensor:
        """`values` as they are stored: themselves, or rounded to integers with the gradient of themselves."""
        if not self.integers:
            return values
        exact = values.detach()
        scale = exact.abs().amax((1, 2), keepdim=True).clamp(min=LEAST_SCALE) / LARGEST_ENTRY
        return _in_place_of(values, (exact / scale).round_() * scale)

    def extra_repr(self) -> str:
        layout = self.layout
        vectors = f" of {layout.cluster_dim}" if layout.cluster_dim > 1 else ""
        kept = ", indices kept" if self.frozen else ""
        return f"{layout.palettes} of {2**self.nbits} values{vectors}{', integers' if self.integers else ''}{kept}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WeightPalette:
        # Values keep their type whatever the model is cast to: means of half-precision numbers do not move.
        kept = {name: getattr(self, name) for name in ("values", "tau")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in kept.items():
            moved = getattr(self, name)
            if moved.dtype != value.dtype:
                setattr(self, name, moved.to(value.dtype) if moved.is_meta else value.to(moved.device))
        return self


def _start_values(part: Tensor, count: int, importance: Tensor | None) -> Tensor:
    """(count, cluster_dim): of fewer, the last is repeated."""
    given = part.cpu().numpy()
    weights = None if importance is None else importance.cpu().numpy()
    zero = bool((given == 0).all(1).any())
    if given.shape[1] == 1:
        found = kmeans(given.reshape(-1), count, None if weights is None else weights.reshape(-1), zero=zero)[:, None]
    else:
        found = kmeans_vectors(given, count, None if weights is None else weights.mean(1), zero=zero)
    padded = np.concatenate([found, np.repeat(found[-1:], count - len(found), 0)]).astype(np.float32)
    return torch.from_numpy(padded)


class _InPlaceOf(torch.autograd.Function):
    """`value`, with the gradient of `weight`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _ZerosKept(torch.autograd.Function):
    """`zeros_kept`; the gradient passes, so that a zero that no mask holds can leave."""

    @staticmethod
    def forward(ctx: Any, found: Tensor, weights: Tensor, pinned: Tensor) -> Tensor:
        return zeros_kept(found, weights, pinned)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


def _in_place_of(weight: Tensor, value: Tensor) -> Tensor:
    made: Tensor = _InPlaceOf.apply(weight, value)  # type: ignore[no-untyped-call]
    return made


def _keeping_zeros(found: Tensor, weights: Tensor, pinned: Tensor) -> Tensor:
    kept: Tensor = _ZerosKept.apply(found, weights, pinned)  # type: ignore[no-untyped-call]
    return kept


def palette_layout(shape: tuple[int, ...], axis: int, config: PalettizerConfig) -> PaletteLayout:
    """The layout of a weight of this shape, to which `palette.why_not` has nothing to say."""
    size = config.group_size if config.granularity == "per_grouped_channel" else shape[axis]
    return PaletteLayout(tuple(shape), axis, shape[axis] // size, config.cluster_dim)
