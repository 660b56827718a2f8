"""Vectorised union-find over channel ids; logs why ids were merged or pinned.

Channels with one root are removed together. Id 0 stands for what is never removed. See `label_tensors` for the tensors
that hold ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparsify.pruning.label_tensors import core

__all__: list[str] = []

Effect = Literal["mixed", "kept", "attended"]

NEVER = torch.iinfo(torch.int64).max
"""Stands in `UnionFind.first` for events that did not happen."""


@dataclass(frozen=True)
class Event:
    """Something that befell `ids`: they were "mixed" into one, must be "kept", or are "attended": a head."""

    ids: Tensor
    effect: Effect
    why: str


class UnionFind:
    """Ids from 1 on that can be united, and the events that befell them, in order of time."""

    def __init__(self) -> None:
        self._parent = torch.arange(1024)
        self._size = 1
        self.events: list[Event] = []

    def __len__(self) -> int:
        return self._size

    def fresh(self, shape: Sequence[int]) -> Tensor:
        """A label tensor of new ids, one for each element."""
        count = torch.Size(shape).numel()
        if self._size + count > len(self._parent):
            more = torch.arange(len(self._parent), 2 * (self._size + count))
            self._parent = torch.cat([self._parent, more])
        start, self._size = self._size, self._size + count
        return torch.arange(start, self._size).view(tuple(shape))

    def roots(self, labels: Tensor) -> Tensor:
        """`labels` with one number for all united ids, the lowest of them; stride 0 where it was."""
        inner = core(labels)
        found = self._find(inner)
        return found.expand(labels.shape) if found.shape != labels.shape else found

    def unite(self, first: Tensor, second: Tensor, why: str) -> Tensor:
        """The union of two label tensors of one shape, element by element; an id that meets 0 is kept."""
        first, second = self._find(first), self._find(second)
        lone = (first == 0) != (second == 0)
        together = torch.where(first == 0, second, first)
        if lone.any():
            self.log("kept", together[lone], why)
        both = (first != second) & ~lone
        if both.any():
            self._link(first[both], second[both])
        return self._find(together)

    def mix(self, labels: Tensor, dims: Iterable[int], why: str, effect: Effect = "mixed") -> Tensor:
        """Unites all ids along `dims`: they are removed together or not at all. Returns the labels that are left."""
        inner = core(labels)
        chosen = [dim for dim in sorted({d % labels.dim() for d in dims}) if inner.shape[dim] > 1]
        if not chosen:
            return self.roots(labels)
        inner = self._find(inner)
        kept = [dim for dim in range(inner.dim()) if dim not in chosen]
        rows = inner.permute(*kept, *chosen).reshape(*(inner.shape[dim] for dim in kept), -1)
        present = rows > 0
        low = rows.masked_fill(~present, NEVER).amin(-1, keepdim=True)
        low = low.masked_fill(low == NEVER, 0)
        several = present & (rows != low)
        if several.any():
            self.log(effect, low[several.any(-1, keepdim=True)], why)
            self._link(rows[several], low.expand_as(rows)[several])
        half = present.any(-1, keepdim=True) & ~present.all(-1, keepdim=True)
        if half.any():
            self.log("kept", low[half], why)
        mixed = self._find(low).squeeze(-1)
        for dim in chosen:
            mixed = mixed.unsqueeze(dim)
        return mixed.expand(labels.shape)

    def keep(self, labels: Tensor, why: str) -> None:
        """Channels with these labels are never removed."""
        inner = core(labels)
        if inner.any():
            self.log("kept", inner, why)

    def log(self, effect: Effect, labels: Tensor, why: str) -> None:
        """Adds an event of the ids in `labels`."""
        ids = torch.unique(self._find(labels))
        self.events.append(Event(ids[ids > 0], effect, why))

    def first(self, effect: Effect) -> Tensor:
        """For every id the number of the first event of that kind among the ids it is united with; `NEVER`: none."""
        found = torch.full((self._size,), NEVER)
        for number in reversed(range(len(self.events))):
            if self.events[number].effect == effect:
                found[self._find(self.events[number].ids)] = number
        return found[self._find(torch.arange(self._size))]

    def _find(self, labels: Tensor) -> Tensor:
        parent = self._parent
        found = parent[labels]
        while True:
            above = parent[found]
            if torch.equal(above, found):
                return found
            parent[labels] = above
            found = above

    def _link(self, first: Tensor, second: Tensor) -> None:
        while True:
            first, second = self._find(first), self._find(second)
            differ = first != second
            if not differ.any():
                return
            first, second = first[differ], second[differ]
            high, low = torch.maximum(first, second), torch.minimum(first, second)
            # Only roots are hung up, each under the lowest that it meets here; the rest in the next round.
            self._parent.scatter_reduce_(0, high, low, "amin")
