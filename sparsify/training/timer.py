"""The clock of training: counts real optimizer steps, and gives the epoch."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sized
from typing import Any, SupportsIndex

from torch import Tensor

from sparsify.errors import ArgumentError
from sparsify.modifiers.schedule import EPOCH_TOLERANCE, Clock

__all__: list[str] = []


class Timer:
    """epoch = step / steps_per_epoch, in integers as far as they go; or the epochs that are marked from outside.

    Marks (`begin`, `end`) put the clock on the whole epoch. Between them it moves by `steps_per_epoch`, or by the count
    of the marked epoch before, and never beyond the epoch that is marked. It never goes back.

    Checkpoint: the step, the last mark and the count are saved; `steps_per_epoch` is the one given to the new run.

    Args:
        steps_per_epoch: optimizer steps in an epoch; None: to be counted between marks.
        epoch: where it starts.
    """

    def __init__(self, steps_per_epoch: int | None, epoch: float = 0.0) -> None:
        self.given = steps_per_epoch
        self.counted: int | None = None
        self.step = 0
        self.marked = False
        self._mark_epoch = float(epoch)
        self._mark_step = 0
        self._limit = math.inf
        if steps_per_epoch is not None and math.isfinite(epoch):
            self.step = round(epoch * steps_per_epoch)
            self._mark_step = self.step

    @property
    def steps_per_epoch(self) -> int | None:
        """The number of steps in an epoch that is reckoned with; None: not known yet."""
        return self.given if self.given is not None else self.counted

    @property
    def runs(self) -> bool:
        """True if a step can be placed in an epoch: its length is given, or epochs are marked."""
        return self.given is not None or self.marked

    def tick(self) -> None:
        """One real optimizer step was done."""
        self.step += 1

    def clock(self) -> Clock:
        """The step and the epoch now."""
        per_epoch = self.steps_per_epoch
        epoch = self._mark_epoch
        done = self.step - self._mark_step
        if per_epoch is not None and done:
            start = self._mark_epoch * per_epoch
            # In integers where the mark lies on a step: sum([1/7] * 70) is not 10.
            whole = round(start) if math.isfinite(start) and abs(start - round(start)) < EPOCH_TOLERANCE else start
            epoch = min((whole + done) / per_epoch, self._limit)
        return Clock(self.step, epoch, per_epoch)

    def begin(self, epoch: int) -> None:
        """Epoch `epoch` begins now; in the middle of it (a resumed run) the clock goes on from where it is."""
        self.marked = True
        if self.clock().epoch <= epoch and self._mark_epoch != epoch:
            self._mark_epoch, self._mark_step = float(epoch), self.step
        self._limit = float(epoch + 1)

    def end(self, epoch: int) -> int:
        """Epoch `epoch` is over; gives the number of its steps since the mark."""
        done = self.step - self._mark_step
        if done:
            self.counted = done
        self._mark_epoch, self._mark_step, self._limit = float(epoch + 1), self.step, math.inf
        return done

    def pace(self, steps_per_epoch: int) -> None:
        """From now on an epoch has so many steps; the epoch that it is now stays what it is."""
        if steps_per_epoch != self.steps_per_epoch:
            self._mark_epoch, self._mark_step = self.clock().epoch, self.step
        self.given = steps_per_epoch

    def jump(self, epoch: float) -> None:
        """It is `epoch` now, without a step."""
        self._mark_epoch, self._mark_step = epoch, self.step

    def state_dict(self) -> dict[str, Any]:
        """Plain ints and floats."""
        return {
            "step": self.step,
            "epoch": self.clock().epoch,
            "mark_epoch": self._mark_epoch,
            "mark_step": self._mark_step,
            "steps_per_epoch": self.steps_per_epoch,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`; with another number of steps in an epoch it goes on from the epoch that was saved."""
        self.step = int(state["step"])
        self.counted = None if self.given is not None else state["steps_per_epoch"]
        self._limit = math.inf
        if state["steps_per_epoch"] == self.steps_per_epoch:
            self._mark_epoch, self._mark_step = float(state["mark_epoch"]), int(state["mark_step"])
        else:
            self._mark_epoch, self._mark_step = float(state["epoch"]), self.step


def steps_in_epoch(value: SupportsIndex | Sized | None) -> int | None:
    """`steps_per_epoch` as a user gives it: a positive int, a sized container such as a loader, or None.

    >>> steps_in_epoch(10), steps_in_epoch(range(7)), steps_in_epoch(None)
    (10, 7, None)

    Raises:
        ArgumentError: anything else; a string has a length and True is an int, but neither is meant.
    """
    if value is None:
        return None
    hint = "Give the number of optimizer steps in an epoch (batches divided by accumulation), or the loader."
    if isinstance(value, bool | str | bytes | Tensor | Mapping | float):
        raise ArgumentError(f"steps_per_epoch: {value!r} is not a positive int. {hint}")
    try:
        count = len(value) if isinstance(value, Sized) else operator.index(value)
    except TypeError as error:
        raise ArgumentError(
            f"steps_per_epoch: the length of {type(value).__name__} is not known ({error}). {hint} Or leave it out and "
            "train with `for epoch in manager.epochs():`."
        ) from None
    if count < 1:
        raise ArgumentError(f"steps_per_epoch: {count} is not a positive int. {hint}")
    return count


def starting_epoch(value: object, *, finite: bool = False) -> float:
    """An epoch as a user gives it.

    Args:
        value: as the user gave it.
        finite: True where training goes on from there, so that infinity, "after everything", is refused.

    Raises:
        ArgumentError: not a number, negative, or nan; with `finite` also infinity.
    """
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not number >= 0.0 or (finite and math.isinf(number)):
        raise ArgumentError(f"epoch: {value!r} is not an epoch; give 0 or more.")
    return number
