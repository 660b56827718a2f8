"""Atoms: what dies together, as integers in tensors. A vectorised union-find, and a log of why atoms were tied or kept.

A label tensor has one atom for every element of a tensor, the one with which that element is removed; 0 is never. It
has stride 0 along the dimensions on which the label does not depend, so one for (N, C, H, W) may cost C numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__: list[str] = []

Effect = Literal["mixed", "kept", "attended"]

_NONE = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Event:
    """Something that befell `atoms`: they were "mixed" into one, or must be "kept", or are "attended": a head."""

    atoms: Tensor
    effect: Effect
    why: str


class UnionFind:
    """Integers from 1 on that can be united, and what happened to them in order of time."""

    def __init__(self) -> None:
        self._parent = torch.arange(1024)
        self._size = 1
        self.events: list[Event] = []

    def __len__(self) -> int:
        return self._size

    def fresh(self, shape: Sequence[int]) -> Tensor:
        """A label tensor of new atoms, each of its own."""
        count = torch.Size(shape).numel()
        if self._size + count > len(self._parent):
            more = torch.arange(len(self._parent), 2 * (self._size + count))
            self._parent = torch.cat([self._parent, more])
        start, self._size = self._size, self._size + count
        return torch.arange(start, self._size).view(tuple(shape))

    def roots(self, labels: Tensor) -> Tensor:
        """`labels` with one number for all united atoms, the lowest of them; stride 0 where it was."""
        inner = core(labels)
        found = self._find(inner)
        return found.expand(labels.shape) if found.shape != labels.shape else found

    def unite(self, first: Tensor, second: Tensor, why: str) -> Tensor:
        """The union of two label tensors of one shape, element by element; an atom that meets 0 is kept."""
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
        """Unites all atoms along `dims`, which then die together or not at all; gives the labels that are left."""
        inner = core(labels)
        chosen = [dim for dim in sorted({d % labels.dim() for d in dims}) if inner.shape[dim] > 1]
        if not chosen:
            return self.roots(labels)
        inner = self._find(inner)
        kept = [dim for dim in range(inner.dim()) if dim not in chosen]
        rows = inner.permute(*kept, *chosen).reshape(*(inner.shape[dim] for dim in kept), -1)
        alive = rows > 0
        low = rows.masked_fill(~alive, _NONE).amin(-1, keepdim=True)
        low = low.masked_fill(low == _NONE, 0)
        several = alive & (rows != low)
        if several.any():
            self.log(effect, low[several.any(-1, keepdim=True)], why)
            self._link(rows[several], low.expand_as(rows)[several])
        half = alive.any(-1, keepdim=True) & ~alive.all(-1, keepdim=True)
        if half.any():
            self.log("kept", low[half], why)
        mixed = self._find(low).squeeze(-1)
        for dim in chosen:
            mixed = mixed.unsqueeze(dim)
        return mixed.expand(labels.shape)

    def keep(self, labels: Tensor, why: str) -> None:
        """What has these labels never dies."""
        inner = core(labels)
        if inner.any():
            self.log("kept", inner, why)

    def log(self, effect: Effect, labels: Tensor, why: str) -> None:
        """Adds to the log what befell the atoms in `labels`."""
        atoms = torch.unique(self._find(labels))
        self.events.append(Event(atoms[atoms > 0], effect, why))

    def first(self, effect: Effect) -> Tensor:
        """For every atom the number of the first event of that kind that befell what it is united with; large: none."""
        found = torch.full((self._size,), _NONE)
        for number in reversed(range(len(self.events))):
            if self.events[number].effect == effect:
                found[self._find(self.events[number].atoms)] = number
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


NEVER = _NONE
"""Stands in `Atoms.first` for what did not happen."""


def core(labels: Tensor) -> Tensor:
    """`labels` with size 1 along the dimensions on which they do not depend.

    >>> core(torch.tensor([[1], [2]]).expand(2, 500)).shape
    torch.Size([2, 1])
    """
    for dim, (size, stride) in enumerate(zip(labels.shape, labels.stride(), strict=True)):
        if size > 1 and stride == 0:
            labels = labels.narrow(dim, 0, 1)
    return labels


def thin(labels: Tensor) -> Tensor:
    """The same labels, with stride 0 along every dimension on which they do not depend."""
    inner = core(labels)
    for dim, size in enumerate(inner.shape):
        if size > 1:
            first = inner.narrow(dim, 0, 1)
            if (inner == first).all():
                inner = first
    return inner.expand(labels.shape)


def varying(labels: Tensor) -> list[int]:
    """The dimensions on which the labels depend."""
    return [dim for dim, size in enumerate(core(labels).shape) if size > 1]


def never(shape: Sequence[int]) -> Tensor:
    """Labels of what is never removed."""
    return torch.zeros((1,) * len(shape), dtype=torch.int64).expand(tuple(shape))


def along(vector: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """Labels of a tensor of `shape` that depend on `dim` alone, as `vector` says."""
    view = [1] * len(shape)
    view[dim] = -1
    return vector.reshape(view).expand(tuple(shape))


def reshaped(labels: Tensor, shape: Sequence[int]) -> Tensor:
    """`labels` in another shape; only the dimensions that change together and vary are written out.

    >>> reshaped(torch.tensor([1, 2]).view(1, 2, 1).expand(9, 2, 9), (9, 18)).stride()
    (0, 1)
    """
    inner = core(labels)
    sizes_in, sizes_out = [], []
    for before, after in _matching_dims(labels.shape, shape):
        constant = all(inner.shape[dim] == 1 for dim in before)
        sizes_in += [inner.shape[dim] if constant else labels.shape[dim] for dim in before]
        sizes_out += [1 if constant else shape[dim] for dim in after]
    return thin(inner.expand(sizes_in).reshape(sizes_out)).expand(tuple(shape))


def _matching_dims(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Which dimensions of two shapes of one size belong together: the shortest runs with equal products."""
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = ([i], []) if i < len(before) else ([], [j])
        a, b = (before[i], 1) if left else (1, after[j])
        i, j = i + len(left), j + len(right)
        while a != b:
            if a < b:
                a, left, i = a * before[i], [*left, i], i + 1
            else:
                b, right, j = b * after[j], [*right, j], j + 1
        found.append((left, right))
    return found
