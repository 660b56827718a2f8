"""The ledger of learning rates: the modifier that governs each parameter group, and changes from elsewhere."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sparsify.errors import ArgumentError, SparsifyWarning
from sparsify.modifiers.run_log import RunLog
from sparsify.modifiers.schedule import Clock

__all__: list[str] = []


@dataclass(frozen=True)
class Entry:
    """One learning-rate modifier: from `start` on it governs `groups` (None: all) with `value(clock)`."""

    name: str
    start: float
    value: Callable[[Clock], float]
    scheduled: bool
    groups: tuple[int, ...] | None = None
    logs_always: bool = False


@dataclass
class InForce:
    """The learning rate of one parameter group: its entry, the number, and the tensor it was filled into."""

    entry: Entry
    value: float
    tensor: Tensor | None = None
    version: int = 0


class LearningRateLedger:
    """The learning rate of each parameter group; one ledger for all learning-rate modifiers of a run.

    Per group the entry with the latest start <= epoch governs; at one start a schedule beats a set value, then the
    later entry wins. Values are functions of the epoch alone, so that a resumed run has those of an uninterrupted one.
    A group that no entry governs is never touched. Groups of several optimizers are counted through.

    Checkpoint: nothing is saved; everything is recomputed from the epoch.

    Args:
        optimizers: one, several, or None.
        log: where the rates are logged.
    """

    def __init__(self, optimizers: Optimizer | Sequence[Optimizer] | None, log: RunLog | None = None) -> None:
        self._optimizers = _listed(optimizers)
        # The numbers of the groups that are there now stay theirs, also where a modifier adds one to the first of them.
        self._group_counts = [len(optimizer.param_groups) for optimizer in self._optimizers]
        self._log = log or RunLog()
        self._entries: list[Entry] = []
        self._in_force: dict[int, InForce] = {}
        self._warned = False
        self._expected = False

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entry: Entry) -> None:
        """Enters a modifier; of equals, the one that was entered later governs.

        Raises:
            ArgumentError: it names a parameter group that the optimizer does not have.
        """
        if self._optimizers:
            check_groups(self._optimizers, entry.groups, f"{entry.name}.param_groups")
        self._entries.append(entry)
        # Sorting is stable: among equals the later entry stays last, and the last that has started governs.
        self._entries.sort(key=lambda e: (e.start, e.scheduled))

    def governing(self, group: int, clock: Clock) -> Entry | None:
        """The entry whose value parameter group `group` has at `clock`; None before the first start."""
        for entry in reversed(self._entries):
            if (entry.groups is None or group in entry.groups) and clock.reached(entry.start):
                return entry
        return None

    def update(self, clock: Clock) -> None:
        """Puts in force what the next step needs."""
        if not self._entries:
            return
        for index, group in self._groups():
            entry = self.governing(index, clock)
            known = self._in_force.get(index)
            if entry is None:
                self._in_force.pop(index, None)
                continue
            value = entry.value(clock)
            if known is None or known.value != value or entry.logs_always:
                self._log.scalar(f"learning_rate/group_{index}", value, clock.step)
            self._put(index, group, InForce(entry, value))

    def hold(self) -> None:
        """Sets the recipe's learning rates just before a step; warns once where another value was set."""
        groups = self._groups() if self._in_force else ()
        for index, group in groups:
            known = self._in_force.get(index)
            if known is None:
                continue
            rate = group["lr"]
            if known.tensor is not None and rate is known.tensor:
                # A tensor is compared by its version counter: reading its value would wait for the device.
                changed = known.version != known.tensor._version
            else:
                changed = isinstance(rate, Tensor) or rate != known.value
            if changed:
                found = float(rate)
                self._put(index, group, known)
                # Filled from elsewhere with the value it had: no conflict. float32 holds about seven digits.
                if abs(found - known.value) > 1e-6 * abs(known.value) and not self._expected:
                    self._warn(index, found, known)
        self._expected = False

    def loaded(self) -> None:
        """To be called when the optimizer's state was loaded: the next step sets the recipe's values without a warning.

        Not at once: the manager's state may be loaded next, and may say that no entry governs now.
        """
        self._expected = True

    def _groups(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Every parameter group by its number: those that are no longer there leave a gap, new ones come last."""
        if len(self._optimizers) == 1:
            yield from enumerate(self._optimizers[0].param_groups)
            return
        first, new = 0, sum(self._group_counts)
        for optimizer, count in zip(self._optimizers, self._group_counts, strict=True):
            for index, group in enumerate(optimizer.param_groups):
                yield (first + index, group) if index < count else (new, group)
                new += index >= count
            first += count

    def _put(self, index: int, group: dict[str, Any], wanted: InForce) -> None:
        known, rate = self._in_force.get(index), group["lr"]
        if isinstance(rate, Tensor):
            # Filled in place: a compiled or captured optimizer reads this very tensor.
            if (
                known is None
                or known.tensor is not rate
                or (known.value, known.version) != (wanted.value, rate._version)
            ):
                rate.fill_(wanted.value)
            self._in_force[index] = InForce(wanted.entry, wanted.value, rate, rate._version)
        else:
            group["lr"] = wanted.value
            self._in_force[index] = wanted if wanted.tensor is None else InForce(wanted.entry, wanted.value)

    def _warn(self, index: int, found: float, known: InForce) -> None:
        if self._warned:
            return
        self._warned = True
        who = (
            " and ".join(name for one in self._optimizers for name in schedulers_of(one))
            or "something other than the recipe"
        )
        warnings.warn(
            f"{who} set the learning rate of parameter group {index} to {found:g}, where {known.entry.name} of the "
            f"recipe says {known.value:g}. The recipe's value is in force in every step that it governs: remove one of "
            "the two.",
            SparsifyWarning,
            stacklevel=2,
        )


def check_groups(optimizers: Optimizer | Sequence[Optimizer], groups: Iterable[int] | None, where: str) -> None:
    """Refuses indices of parameter groups that the optimizer does not have, or several together.

    Raises:
        ArgumentError: names the first wrong one.
    """
    several = _listed(optimizers)
    count = sum(len(optimizer.param_groups) for optimizer in several)
    for group in groups or ():
        if group >= count:
            has = "one parameter group, 0" if count == 1 else f"{count} parameter groups, 0 to {count - 1}"
            who = "the optimizer has" if len(several) == 1 else f"the {len(several)} optimizers have"
            raise ArgumentError(f"{where}: there is no parameter group {group}; {who} {has}.")


def _listed(optimizers: Optimizer | Sequence[Optimizer] | None) -> tuple[Optimizer, ...]:
    if isinstance(optimizers, list | tuple):
        return tuple(optimizers)
    return () if optimizers is None else (optimizers,)  # type: ignore[return-value]


def schedulers_of(optimizer: Optimizer | None) -> list[str]:
    """The class names of the LR schedulers that drive `optimizer`; looks at every live object, for one message."""
    found: dict[str, None] = {}
    for thing in gc.get_objects():
        # type(), not isinstance: asking lazy proxies for their __class__ would import what they stand for.
        if issubclass(type(thing), LRScheduler) and getattr(thing, "optimizer", None) is optimizer:
            found[type(thing).__name__] = None
    return list(found)
