"""Pure floats: curves, epoch windows and the grid of updates. No torch, no state.

An epoch is a float; 2.5 is the middle of the third epoch. Where a recipe writes -1 for a start it means "at once", for
an end "never", and `Window.of` turns both into numbers that can be compared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

__all__: list[str] = []

Curve = Literal["linear", "cubic", "inverse_cubic", "cosine", "polynomial"]

EPOCH_TOLERANCE = 1e-6
"""Optimizer steps that an update may come before its moment. Covers the rounding of epochs to floats."""


def curve(kind: Curve, progress: float) -> float:
    """The value, 0..1, of a normalized schedule when a fraction `progress`, 0..1, of its window has passed.

    linear: x. cubic: 1 - (1 - x)^3, fast at first, flat at the end (Zhu & Gupta 2017,
    https://arxiv.org/abs/1710.01878, eq. 1). inverse_cubic: 1 - (1 - x)^(1/3). cosine: (1 - cos(pi x)) / 2.
    polynomial: 1 - (1 - x)^2.

    >>> curve("cubic", 0.0), curve("cubic", 0.5), curve("cubic", 1.0)
    (0.0, 0.875, 1.0)
    >>> curve("linear", -3.0), curve("linear", 7.0)
    (0.0, 1.0)
    """
    if progress <= 0.0:
        return 0.0
    if progress >= 1.0:
        return 1.0
    if kind == "linear":
        return progress
    if kind == "cubic":
        return float(1.0 - (1.0 - progress) ** 3)
    if kind == "inverse_cubic":
        return float(1.0 - (1.0 - progress) ** (1.0 / 3.0))
    if kind == "cosine":
        return (1.0 - math.cos(math.pi * progress)) / 2.0
    return float(1.0 - (1.0 - progress) ** 2)


def between(kind: Curve, first: float, last: float, progress: float) -> float:
    """The value at `progress` of a schedule that goes from `first` to `last`; exactly `last` from 1.0 on."""
    return last if progress >= 1.0 else first + (last - first) * curve(kind, progress)


@dataclass(frozen=True)
class Window:
    """Epochs `start` <= e <= `end`; `end` may be infinite."""

    start: float
    end: float

    @classmethod
    def of(cls, start_epoch: float, end_epoch: float) -> Window:
        """From a recipe's numbers: a start of -1 is epoch 0, an end of -1 never comes.

        >>> Window.of(-1, -1)
        Window(start=0.0, end=inf)
        """
        return cls(max(float(start_epoch), 0.0), math.inf if end_epoch == -1 else float(end_epoch))

    def progress(self, epoch: float) -> float:
        """The fraction of the window that has passed at `epoch`, clamped to 0..1; an empty window has passed."""
        if epoch >= self.end:
            return 1.0
        return max(0.0, (epoch - self.start) / (self.end - self.start))

    def overlaps(self, other: Window) -> bool:
        """True if the two share more than a single moment: windows that touch are a handover."""
        return self.start < other.end and other.start < self.end


@dataclass(frozen=True)
class Clock:
    """A moment of training: `step` optimizer steps done, `epoch` = step / `steps_per_epoch`.

    `steps_per_epoch` is None while it is not known; `epoch` then moves at whole epochs only.
    """

    step: int
    epoch: float
    steps_per_epoch: int | None = None

    def reached(self, epoch: float) -> bool:
        """True if `epoch` has come: from the first step >= epoch * steps_per_epoch - 1e-6 on."""
        return self.epoch * (self.steps_per_epoch or 1) >= epoch * (self.steps_per_epoch or 1) - EPOCH_TOLERANCE


@dataclass(frozen=True)
class UpdateGrid:
    """The moments of a gradual modifier: start, start + f, start + 2 f, ..., end.

    `frequency` is in epochs; -1 means every step. The last point is the end, whatever the frequency.
    """

    window: Window
    frequency: float

    def every_step(self, clock: Clock) -> bool:
        """True if a point is due at every step: it says so, or is far finer, or finer than floats of this size are."""
        finest = max(EPOCH_TOLERANCE / (clock.steps_per_epoch or 1), 4 * math.ulp(clock.epoch))
        return self.frequency == -1 or self.frequency <= finest

    def latest(self, clock: Clock) -> float | None:
        """The last epoch of the grid that is due at `clock`; None before the start.

        The value that is put in force belongs to that point, not to the clock, so that a resumed run and one with
        another number of steps per epoch see the same values.

        >>> grid = UpdateGrid(Window(0.0, 2.0), 0.5)
        >>> [grid.latest(Clock(step, step / 4, 4)) for step in (0, 1, 2, 7, 8, 90)]
        [0.0, 0.0, 0.5, 1.5, 2.0, 2.0]
        """
        if not clock.reached(self.window.start):
            return None
        if clock.reached(self.window.end):
            return self.window.end
        if self.every_step(clock):
            return max(clock.epoch, self.window.start)
        k = math.floor((clock.epoch - self.window.start) / self.frequency)
        # The floor is off by one where the division rounds across a grid point: ask the clock, which has the tolerance.
        while clock.reached(self.window.start + (k + 1) * self.frequency):
            k += 1
        while k > 0 and not clock.reached(self.window.start + k * self.frequency):
            k -= 1
        return min(self.window.start + k * self.frequency, self.window.end)


class OnceAfterLoading:
    """Due once, at the first moment that is not the one at which a state was loaded.

    Weights of the checkpoint may be loaded after the state, so what depends on both waits until then.
    """

    def __init__(self) -> None:
        self._waits = False
        self._at: Clock | None = None

    def loaded(self) -> None:
        """A state was loaded."""
        self._waits, self._at = True, None

    def due(self, clock: Clock) -> bool:
        """True if the first moment after that has come; then no more until a state is loaded again."""
        if not self._waits:
            return False
        if self._at is None:
            self._at = clock
        if clock == self._at:
            return False
        self._waits = False
        return True
