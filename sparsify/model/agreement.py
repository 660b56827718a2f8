"""Processes that train together tell each other where they are, before they do anything in common.

A collective call hangs where one process is elsewhere. So this goes through the key-value store that torch.distributed
keeps to set itself up: each says its place and looks for those of the others, and nobody begins to compare masks before
all are there.
"""

from __future__ import annotations

import itertools
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from sparsify.errors import StateError

__all__: list[str] = []

PATIENCE_S = 60.0
"""Seconds in which all processes must come to a meeting that a process calls in the midst of training."""
FORWARD_PATIENCE_S = 5.0
"""Seconds for which a forward waits: another process may be in the backward, where gradients are averaged, and come to
its step only when this one has been through its backward too."""
LOOK_S = 1.0
"""Seconds between two looks if another process has called a meeting."""
_run_numbers = itertools.count()
_live: weakref.WeakSet[Agreement] = weakref.WeakSet()


class Agreement:
    """Meetings of all processes: the first before the first step, another one after each process has loaded a state.

    Every process meets when it trains on; one that loaded nothing learns of the meeting within a second, or at its next
    comparison of masks.

    Args:
        place: gives where this process is, the same text on all that agree.
        structure: gives what the model's structure is: collective calls of a forward depend on it.

    Attributes:
        due: True from the start, and after a state was loaded, until the next meeting.
    """

    def __init__(self, place: Callable[[], str], structure: Callable[[], str]) -> None:
        self.due = False
        self._place, self._structure = place, structure
        self._count = self._comparisons = 0
        self._number: int | None = None
        self._came = False
        self._structure_before = ""
        self._next_look = 0.0

    @property
    def number(self) -> int:
        """The same on all processes; -1 where there is only one."""
        return -1 if self._number is None else self._number

    def begin(self) -> None:
        """To be called when the run starts: the first meeting is due."""
        if _others():
            self._number = next(_run_numbers)
            self.due = True
            _live.add(self)

    def end(self) -> None:
        """To be called when the run ends."""
        self.due, self._number = False, None
        _live.discard(self)

    def call(self) -> None:
        """To be called before a state is loaded: a meeting is due, here and on every other process."""
        if self._number is None or not _others() or self.due:
            return
        self.due, self._structure_before = True, self._structure()
        store = _key_value_store()
        store.add(self._key("called"), 1)
        # Whoever waits there for this process is called away.
        store.set(self._comparison("go"), "called")
        self._comparisons += 1

    def attend(self, in_forward: bool = False) -> None:
        """Goes to a meeting that is due, or that another process has called; looks for those once a second.

        Args:
            in_forward: a forward begins, and a step comes after it.
        """
        if self._number is None:
            return
        if not self.due:
            now = time.monotonic()
            if now < self._next_look:
                return
            self._next_look = now + LOOK_S
        self._go(patient=not (in_forward and self._structure() == self._structure_before))

    def compare(self) -> None:
        """Waits until all processes are at the same comparison of masks; goes to the meetings that are called before
        they are."""
        everyone = False
        while self._number is not None and not everyone:
            self._go()
            store = _key_value_store()
            if store.add(self._comparison("came"), 1) == dist.get_world_size():
                store.set(self._comparison("go"), "all")
            everyone = bytes(store.get(self._comparison("go"))) == b"all"
            if everyone and dist.get_rank() == 0 and self._comparisons:
                # All have read these, or they would not be here.
                store.delete_key(self._comparison("came", -1))
                store.delete_key(self._comparison("go", -1))
            self._comparisons += 1

    def _go(self, patient: bool = True) -> None:
        if _others() and (self.due or _key_value_store().add(self._key("called"), 0)):
            self._meet(patient)

    def _meet(self, patient: bool) -> None:
        """Compares the places of all processes; where not `patient`, it may be left for later and stays due.

        Raises:
            StateError: on every process, where one is elsewhere; on those that came, where one does not come.
        """
        store, rank, size = _key_value_store(), dist.get_rank(), dist.get_world_size()
        place, key = self._place(), self._key
        limit = PATIENCE_S if patient else FORWARD_PATIENCE_S
        # Before the first step there is no hurry: one process may read its data for long.
        deadline = time.monotonic() + limit if self._count else None
        self.due = True
        if rank == 0 and not self._came:
            store.set(key("first"), place)
        there = _wait(lambda: bool(store.check([key("first")])), deadline)
        if there and not self._came:
            self._came = True
            first = bytes(store.get(key("first"))).decode()
            if first != place:
                store.set(key("other"), f"rank {rank} is at {place}, rank 0 at {first}")
                store.add(key("differing"), 1)
            store.add(key("came"), 1)
        if not there or not _wait(lambda: int(store.add(key("came"), 0)) >= size, deadline):
            if not patient:
                return
            raise StateError(
                f"this process is at {place} after it has loaded a state, and in {limit:g} s not every other one came "
                "to compare: the state was loaded on some ranks only. Load it on every rank."
            )
        differing = int(store.add(key("differing"), 0))
        other = bytes(store.get(key("other"))).decode() if differing else ""
        self.due, self._came, self._count = False, False, self._count + 1
        if differing:
            raise StateError(
                f"the processes of this training are not at the same place: {other}. The state was loaded on some "
                "ranks and not on others, or a different one: load the same on every rank, before any of them trains."
            )

    def _key(self, what: str) -> str:
        return f"sparsify/{self._number}/{self._count}/{what}"

    def _comparison(self, what: str, offset: int = 0) -> str:
        return f"sparsify/{self._number}/compared/{self._comparisons + offset}/{what}"


def wait_for_all() -> None:
    """Waits until all processes are about to compare the same thing, and goes to the meetings that are called."""
    for agreement in sorted(_live, key=lambda one: one.number):
        agreement.compare()


def _wait(reached: Callable[[], bool], deadline: float | None) -> bool:
    """True when it is reached, False at the deadline."""
    pause = 0.001
    while not reached():
        if deadline is not None and time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2.0 * pause, 0.1)
    return True


def _others() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _key_value_store() -> Any:
    # There is no public way to it; torchrun's own tools take this one, seen in torch 2.13.0.
    return dist.distributed_c10d._get_default_store()
