"""Masks of exactly the given number of lowest scores where the scores are sharded over ranks; no score is sent.

The threshold is found digit by digit, as in a radix sort: each rank counts how many of its scores have which digit, the
counts are added up, and only scores with the digit of the threshold are looked at for the next. Ties are cut at a
position, which is found the same way. So the masks are those that `mask_lowest` gives for the whole scores, on any
number of ranks.

Sent in a round: 2,048 counts of 8 bytes a ranking, whatever its size, all rankings in one message. Float32 takes 3
rounds, 16-bit floats 2; ties take 1 for every 11 bits of the number of elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.errors import DataError
from sparsify.model.sharding import Region, Split, add_up

__all__: list[str] = []

_DIGIT = 11
_SIGNED = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Part:
    """The part of a tensor of scores on this rank.

    Attributes:
        values: the scores, finite floats of any shape.
        kept: the mask so far, of the same shape; None: everything is kept.
        region: where in the whole tensor they lie.
        split: how the tensor is split over ranks; None: every rank has all of it.
    """

    values: Tensor
    kept: Tensor | None
    region: Region
    split: Split | None


@dataclass
class Ranking:
    """Parts that are ranked together, by name, and how many elements of all of them are masked."""

    parts: Mapping[str, Part]
    count: int
    absolute: bool


def mask_lowest_of_all(rankings: Sequence[Ranking]) -> dict[str, Tensor]:
    """Masks for the parts on this rank, True where an element stays: what `mask_lowest` gives for the whole tensors.

    Collective. Those that are masked already go first, then the lowest scores, of equal ones the first in the order of
    the parts and then of the elements.

    Raises:
        DataError: on every rank, where a score is NaN on any; the message names it.
    """
    searches = [_Search(ranking) for ranking in rankings if ranking.parts]
    _round(searches, first=True)
    _finish(searches)
    for search in searches:
        search.go_on_with_positions()
    _finish(searches)
    return {name: mask for search in searches for name, mask in search.masks()}


class _Search:
    """The search for the `left`-th lowest key of one ranking, then for the last position among those equal to it.

    Attributes:
        unknown: the number of bits of the key that are not known yet.
        prefix: the others.
        left: how many of the keys that begin with them are masked.
        equal: how many there are.
        threshold: the key, once all of it is known; None where nothing more is masked.
        cut: the position up to which those equal to it are masked; None: all of them are.
    """

    def __init__(self, ranking: Ranking) -> None:
        self.parts = ranking.parts
        self.absolute = ranking.absolute
        dtypes = {part.values.dtype for part in self.parts.values()}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        if dtypes:  # bits of different formats have no common order
            self.dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        self.bits = self.unknown = 8 * self.dtype.itemsize
        self.left, self.equal, self.prefix = ranking.count, 0, 0
        self.threshold: int | None = None
        self.cut: int | None = None
        self._pools: dict[str, Tensor] = {}

    @property
    def width(self) -> int:
        """Bits of the next digit."""
        return min(_DIGIT, self.unknown)

    def _keys(self, name: str) -> Tensor:
        """Signed integers in the order of the scores, one for each element here."""
        values = self.parts[name].values.detach().to(self.dtype)
        bits = values.contiguous().view(-1).view(_SIGNED[values.element_size()])
        top = torch.iinfo(bits.dtype).max
        if self.absolute:
            return bits & top
        keys = torch.where(bits < 0, bits ^ top, bits)
        # -0.0 has the key just below that of 0.0; they are equal.
        return keys.masked_fill_(keys == -1, 0)

    def pool(self, name: str) -> Tensor:
        """The keys here that begin with `prefix`, of elements that are still kept."""
        if name in self._pools:
            return self._pools[name]
        kept = self.parts[name].kept
        return self._keys(name) if kept is None else self._keys(name)[kept.reshape(-1)]

    def _digits_are_signed(self) -> bool:
        return self.threshold is None and self.unknown == self.bits

    def counts(self, pool: Tensor) -> Tensor:
        """Number of keys with each next digit, from the lowest on: int64, (2 ** width,)."""
        digits = (pool >> (self.unknown - self.width)) & ((1 << self.width) - 1)
        if self._digits_are_signed():
            # Two's complement: those with the first bit set are the lowest.
            digits = digits ^ (1 << (self.width - 1))
        return torch.bincount(digits, minlength=1 << self.width)

    def not_numbers(self, pool: Tensor) -> Tensor:
        """Number of keys that are those of NaN."""
        infinity = int(torch.tensor(math.inf, dtype=self.dtype).view(pool.dtype).item())
        strange = pool > infinity
        return (strange if self.absolute else strange | (pool < ~infinity)).sum()

    def take(self, counts: Tensor) -> None:
        """Goes on with the digit of the `left`-th lowest key; `counts` are those of all ranks."""
        if self.left <= 0:
            self.unknown = 0
            return
        running = counts.cumsum(0)
        digit = int(torch.searchsorted(running, self.left))
        self.equal = int(counts[digit])
        self.left -= int(running[digit]) - self.equal
        signed = self._digits_are_signed()
        self.prefix = digit - (1 << (self.width - 1)) if signed else self.prefix << self.width | digit
        self.unknown -= self.width
        if self.unknown:
            for name in self.parts:
                pool = self.pool(name)
                self._pools[name] = pool[pool >> self.unknown == self.prefix]
        elif self.threshold is None:
            self.threshold = self.prefix
        else:
            self.cut = self.prefix

    def go_on_with_positions(self) -> None:
        """Goes on with positions as keys, where not all of those equal to the threshold are masked."""
        if self.threshold is None or self.left == self.equal:
            return
        for name, first in self._firsts():
            tied = self._tied(name, self._keys(name))
            self._pools[name] = self.parts[name].region.positions(tied) + first
        elements = sum(math.prod(part.region.shape) for part in self.parts.values())
        self.unknown, self.prefix = max((elements - 1).bit_length(), 1), 0

    def _firsts(self) -> Iterator[tuple[str, int]]:
        """The position of the first element of each part's tensor."""
        first = 0
        for name, part in self.parts.items():
            yield name, first
            first += math.prod(part.region.shape)

    def _tied(self, name: str, keys: Tensor) -> Tensor:
        """Indices in the part of those that are equal to the threshold and still kept."""
        assert self.threshold is not None
        tied, kept = keys.eq(self.threshold), self.parts[name].kept
        return (tied if kept is None else tied & kept.reshape(-1)).nonzero().flatten()

    def masks(self) -> Iterator[tuple[str, Tensor]]:
        """The masks of the parts here."""
        for name, first in self._firsts():
            part = self.parts[name]
            if self.threshold is None:
                mask = torch.ones(part.values.numel(), dtype=torch.bool, device=part.values.device)
            else:
                keys = self._keys(name)
                mask = keys > self.threshold
                if self.cut is not None:
                    tied = self._tied(name, keys)
                    mask[tied[part.region.positions(tied) + first > self.cut]] = True
            mask = mask.view(part.values.shape)
            yield name, mask if part.kept is None else mask & part.kept


def _finish(searches: Sequence[_Search]) -> None:
    while searching := [search for search in searches if search.unknown]:
        _round(searching)


def _round(searches: Sequence[_Search], first: bool = False) -> None:
    """One more digit of every search, with one message for each way in which tensors are split.

    In the first round what is masked already and NaN are counted too.
    """
    sizes = [1 << search.width for search in searches]
    digits: dict[Split | None, Tensor] = {}
    others: dict[Split | None, list[tuple[int, str, Tensor]]] = {}
    for number, search in enumerate(searches):
        for name, part in search.parts.items():
            pool = search.pool(name)
            if part.split not in digits:
                digits[part.split] = torch.zeros(sum(sizes), dtype=torch.int64, device=pool.device)
            own = torch.split(digits[part.split], sizes)[number]
            own += search.counts(pool).to(own.device)
            if first:
                masked = torch.tensor(part.values.numel() - pool.numel(), device=own.device)
                both = torch.stack([masked, search.not_numbers(pool).to(own.device)])
                others.setdefault(part.split, []).append((number, name, both))
    together = torch.zeros(sum(sizes), dtype=torch.int64)
    strange: list[str] = []
    # The same rankings in the same order on every rank, so that each sends the same messages.
    for split, own in digits.items():
        more = others.get(split, [])
        sums = add_up(torch.cat([own, *(both for _, _, both in more)]), split)
        together += sums[: own.numel()]
        for (number, name, _), (masked, wrong) in zip(more, sums[own.numel() :].view(-1, 2).tolist(), strict=True):
            searches[number].left -= masked
            strange += [name] if wrong else []
    if strange:
        raise DataError(
            f"{strange[0]!r} holds NaN, which cannot be ranked. Load weights that are finite, or find where they "
            "diverged."
        )
    for search, own in zip(searches, torch.split(together, sizes), strict=True):
        search.take(own)
