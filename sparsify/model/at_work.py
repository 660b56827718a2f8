"""Runs that are at work on models of this process: who masks and converts a model, by the model's identity.

A copy of a model (deepcopy, pickle) is free: nothing of this is stored in the model.
"""

from __future__ import annotations

import weakref
from typing import Protocol

from torch import nn

__all__: list[str] = []


class RunAtWork(Protocol):
    """A run, as others see it."""

    def look(self, where: str) -> None:
        """Warns once of what is wrong with the model's weights now; `where` says who asks."""


_RUNS: dict[int, tuple[weakref.ref[nn.Module], weakref.ref[RunAtWork]]] = {}


def enter(model: nn.Module, run: RunAtWork) -> None:
    """Notes that `run` is at work on `model`; neither is kept alive."""
    _RUNS[id(run)] = (weakref.ref(model), weakref.ref(run))


def leave(run: RunAtWork) -> None:
    """Notes that it is no more."""
    entry = _RUNS.get(id(run))
    if entry is not None and entry[1]() in (run, None):
        del _RUNS[id(run)]


def runs_on(model: nn.Module) -> list[RunAtWork]:
    """The runs at work on `model`, on a part of it, or on a model that it is a part of."""
    found = []
    for key, (of, by) in list(_RUNS.items()):
        other, run = of(), by()
        if other is None or run is None:
            del _RUNS[key]
        elif _holds(model, other) or _holds(other, model):
            found.append(run)
    return found


def _holds(model: nn.Module, part: nn.Module) -> bool:
    return any(module is part for module in model.modules())
