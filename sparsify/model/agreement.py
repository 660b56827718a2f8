"""Processes that train together tell each other where they are, before they do anything in common.

A collective call hangs where one process is elsewhere. So this goes through the key-value store that torch.distributed
keeps to set itself up: each says its place and looks for those of the others.
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
_run_numbers = itertools.count()
_live: weakref.WeakSet[Agreement] = weakref.WeakSet()


class Agreement:
    """Meetings of all processes: the first before the first step, another one after each process has loaded a state.

    Every process meets when it trains on; one that loaded nothing learns of the meeting at its next update of masks.

    Args:
        place: gives where this process is, the same text on all that agree.

    Attributes:
        due: True from the start, and after a state was loaded, until the next meeting.
    """

    def __init__(self, place: Callable[[], str]) -> None:
        self.due = False
        self._place = place
        self._count = 0
        self._number: int | None = None

    def begin(self) -> None:
        """To be called when the run starts: the first meeting is due."""
        if _others():
            self._number = next(_run_numbers)
            self.due = True
            _live.add(self)

    def end(self) -> None:
        """To be called when the run ends."""
        self.due = False
        _live.discard(self)

    def call(self) -> None:
        """To be called when a state was loaded: a meeting is due, here and on every other process."""
        if self._number is None or not _others():
            return
        if not self.due:
            self.due = True
            _key_value_store().add(self._key("called"), 1)

    def attend(self) -> None:
        """Goes to a meeting that is due, or that another process has called."""
        if self._number is not None and _others() and (self.due or _key_value_store().add(self._key("called"), 0)):
            self.meet()

    def meet(self) -> None:
        """Compares the places of all processes.

        Raises:
            StateError: on every process, where one is elsewhere; on those that came, where one does not come.
        """
        store, rank, size = _key_value_store(), dist.get_rank(), dist.get_world_size()
        place, key = self._place(), self._key
        deadline = time.monotonic() + PATIENCE_S if self._count else None
        if rank == 0:
            store.set(key("first"), place)
        _wait(lambda: bool(store.check([key("first")])), deadline, place)
        first = bytes(store.get(key("first"))).decode()
        if first != place:
            store.set(key("other"), f"rank {rank} is at {place}, rank 0 at {first}")
            store.add(key("differing"), 1)
        store.add(key("came"), 1)
        _wait(lambda: int(store.add(key("came"), 0)) >= size, deadline, place)
        differing = int(store.add(key("differing"), 0))
        other = bytes(store.get(key("other"))).decode() if differing else ""
        self.due, self._count = False, self._count + 1
        if differing:
            raise StateError(
                f"the processes of this training are not at the same place: {other}. The state was loaded on some "
                "ranks and not on others, or a different one: load the same on every rank, before any of them trains."
            )

    def _key(self, what: str) -> str:
        return f"sparsify/{self._number}/{self._count}/{what}"


def attend_all() -> None:
    """Goes to the meetings that are called, before something is compared between all processes."""
    for agreement in list(_live):
        agreement.attend()


def _wait(reached: Callable[[], bool], deadline: float | None, place: str) -> None:
    pause = 0.001
    while not reached():
        if deadline is not None and time.monotonic() > deadline:
            raise StateError(
                f"this process is at {place} after it has loaded a state, and in {PATIENCE_S:g} s not every other one "
                "came to compare: the state was loaded on some ranks only. Load it on every rank."
            )
        time.sleep(pause)
        pause = min(2.0 * pause, 0.1)


def _others() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _key_value_store() -> Any:
    # There is no public way to it; torchrun's own tools take this one, seen in torch 2.13.0.
    return dist.distributed_c10d._get_default_store()
