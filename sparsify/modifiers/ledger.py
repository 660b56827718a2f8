"""The one ledger of learning rates: who governs each parameter group, and whether somebody else changed it."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sparsify.errors import ArgumentError, SparsifyWarning
from sparsify.schedule import Clock

__all__: list[str] = []


@dataclass(frozen=True)
class Entry:
    """One learning-rate modifier: from `start` on it governs `groups` (None: all) with `value(epoch)`."""

    name: str
    start: float
    value: Callable[[float], float]
    scheduled: bool
    groups: tuple[int, ...] | None = None


class LearningRateLedger:
    """Which learning rate each parameter group has; one for all learning-rate modifiers of a run.

    Per group the entry with the latest start <= epoch governs; at one start a schedule beats a set value, then the later
    entry wins. Values are functions of the epoch alone, so that a resumed run has those of an uninterrupted one. A group
    that no entry governs is never touched.

    Checkpoint: nothing is saved; everything is recomputed from the epoch.
    """

    def __init__(self, optimizer: Optimizer | None) -> None:
        self._optimizer = optimizer
        self._entries: list[Entry] = []
        # group index -> (value in force, version of the tensor it was filled into, -1 for a plain float)
        self._in_force: dict[int, tuple[float, int]] = {}
        self._warned = False

    def add(self, entry: Entry) -> None:
        """Enters a modifier; later entries win over earlier ones of the same start and sort.

        Raises:
            ArgumentError: it names a parameter group that the optimizer does not have.
        """
        if self._optimizer is not None and entry.groups is not None:
            count = len(self._optimizer.param_groups)
            wrong = [group for group in entry.groups if group >= count]
            if wrong:
                raise ArgumentError(
                    f"{entry.name}.param_groups: the optimizer has {count} parameter groups, 0 to {count - 1}; there is no "
                    f"{wrong[0]}."
                )
        self._entries.append(entry)
        # Sorted is stable: among equals the later entry stays last, and the last that has started governs.
        self._entries.sort(key=lambda e: (e.start, e.scheduled))

    def __len__(self) -> int:
        return len(self._entries)

    def governing(self, group: int, clock: Clock) -> Entry | None:
        """The entry whose value parameter group `group` has at `clock`; None before the first start."""
        found = None
        for entry in self._entries:
            if not clock.reached(entry.start):
                break
            if entry.groups is None or group in entry.groups:
                found = entry
        return found

    def update(self, clock: Clock) -> None:
        """Puts in force what the next step needs."""
        if self._optimizer is None or not self._entries:
            return
        for index, group in enumerate(self._optimizer.param_groups):
            entry = self.governing(index, clock)
            if entry is None:
                self._in_force.pop(index, None)
            else:
                self._put(index, group, entry.value(clock.epoch))

    def hold(self) -> None:
        """Just before a step: what the recipe says is what the step uses, with one warning where somebody disagrees."""
        if not self._in_force or self._optimizer is None:
            return
        for index, group in enumerate(self._optimizer.param_groups):
            known = self._in_force.get(index)
            if known is None:
                continue
            value, version = known
            rate = group["lr"]
            # A tensor is compared by its version counter: reading its value would wait for the device.
            if rate._version != version if isinstance(rate, Tensor) else rate != value:
                found = float(rate)
                self._put(index, group, value)
                # Filled by somebody with the value it had: no quarrel. float32 holds about seven digits.
                if abs(found - value) > 1e-6 * abs(value):
                    self._warn(index, found, value)

    def restore(self) -> None:
        """Puts the values in force back after the optimizer's state was loaded; loading is nobody's quarrel."""
        if self._optimizer is not None:
            for index, group in enumerate(self._optimizer.param_groups):
                if index in self._in_force:
                    self._put(index, group, self._in_force[index][0])

    def rates(self) -> Sequence[float]:
        """The learning rate of every parameter group; waits for the device where they are tensors."""
        return [] if self._optimizer is None else [float(group["lr"]) for group in self._optimizer.param_groups]

    def _put(self, index: int, group: dict[str, object], value: float) -> None:
        rate = group["lr"]
        if isinstance(rate, Tensor):
            known = self._in_force.get(index)
            # Filled in place: a compiled or captured optimizer reads this very tensor.
            if known != (value, rate._version):
                rate.fill_(value)
            self._in_force[index] = (value, rate._version)
        else:
            group["lr"] = value
            self._in_force[index] = (value, -1)

    def _warn(self, index: int, found: float, value: float) -> None:
        if self._warned:
            return
        self._warned = True
        names = schedulers_of(self._optimizer)
        who = " and ".join(names) if names else "something other than the recipe"
        warnings.warn(
            f"{who} set the learning rate of parameter group {index} to {found:g} where the recipe says {value:g}. The recipe's "
            "value is in force in every step that it governs. Remove the scheduler, or the learning-rate modifiers.",
            SparsifyWarning,
            stacklevel=2,
        )


def schedulers_of(optimizer: Optimizer | None) -> list[str]:
    """The class names of the LR schedulers that drive `optimizer`. Looks at every live object: for one message, not a step."""
    found: dict[str, None] = {}
    for thing in gc.get_objects():
        # type(), not isinstance: asking lazy proxies for their __class__ would import what they stand for.
        if issubclass(type(thing), LRScheduler) and getattr(thing, "optimizer", None) is optimizer:
            found[type(thing).__name__] = None
    return list(found)
