"""Masks of exactly the given number of lowest scores of a model, whatever the values.

On the CPU by *sample-select* on the raw bits: for floats of one sign, the order of the bits as unsigned integers is
the order of the values, and integer passes over chunks that stay in the cache cost 0.1-0.3 ns per weight. On other
devices by torch's own stable sort, without a device-to-host copy except for the check for NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsify.errors import DataError

__all__: list[str] = []

SortableBits = NDArray[Any]

_CHUNK = 1 << 16
"""Elements per pass: the chunk and its buffers stay in the second-level cache (8 k: 1.6 times slower, 256 k: the
same)."""
_SMALL = 50_000
"""Below this, sorting everything is faster than sampling."""
_SAMPLE = 1 << 14

_UNSIGNED: dict[int, Any] = {2: np.uint16, 4: np.uint32, 8: np.uint64}
_INFINITY = {
    torch.float16: 0x7C00,
    torch.bfloat16: 0x7F80,
    torch.float32: 0x7F80_0000,
    torch.float64: 0x7FF0_0000_0000_0000,
}


def mask_lowest(
    scores: Mapping[str, Tensor], count: int, *, kept: Mapping[str, Tensor] | None = None, absolute: bool = False
) -> dict[str, Tensor]:
    """Masks, True where a score stays, with exactly `count` False in all of them together.

    Those that are False in `kept` are masked first, then the lowest scores; among equals those that come first, in the
    order of the mapping and then of the elements (logical order: the memory format changes nothing).

    Args:
        scores: finite floats of any shapes, ranked together.
        count: the number that is masked, 0 <= count <= the number of scores. Those that `kept` masks stay masked even
            where they are more.
        kept: for some or all names, the mask so far, of the scores' shape.
        absolute: rank by absolute value; faster than passing absolute values.

    Raises:
        DataError: a score is NaN; the message names it.

    >>> mask_lowest({"a": torch.tensor([3.0, 1.0, 1.0, 2.0])}, 2)
    {'a': tensor([ True, False, False,  True])}
    """
    kept = kept or {}
    scores = {name: score.detach() for name, score in scores.items()}
    dtypes = {score.dtype for score in scores.values()}
    if len(dtypes) > 1:  # bits of different formats have no common order
        common = torch.float64 if torch.float64 in dtypes else torch.float32
        scores = {name: score.to(common) for name, score in scores.items()}
    if all(score.device.type == "cpu" for score in scores.values()):
        return _on_cpu(scores, count, kept, absolute)
    return _on_device(scores, count, kept, absolute)


def _on_device(
    scores: Mapping[str, Tensor], count: int, kept: Mapping[str, Tensor], absolute: bool
) -> dict[str, Tensor]:
    device = next(iter(scores.values())).device
    keys = []
    for name, score in scores.items():
        flat = (score.abs() if absolute else score + 0.0).reshape(-1).to(device)
        keys.append(torch.where(kept[name].reshape(-1).to(device), flat, -math.inf) if name in kept else flat)
    together = torch.cat(keys)
    if together.isnan().any():
        raise _not_a_number(next(name for name, key in zip(scores, keys, strict=True) if key.isnan().any()))
    mask = torch.ones_like(together, dtype=torch.bool)
    mask[torch.sort(together, stable=True).indices[:count]] = False
    parts = torch.split(mask, [score.numel() for score in scores.values()])
    return {
        name: (part.view(score.shape) & kept[name].to(device) if name in kept else part.view(score.shape).clone()).to(
            score.device
        )
        for (name, score), part in zip(scores.items(), parts, strict=True)
    }


@dataclass
class _Part:
    """One tensor's bits, flat; which of them are still kept; and where its mask goes."""

    name: str
    bits: SortableBits
    kept: SortableBits | None
    mask: SortableBits


class _Keys:
    """Unsigned integers in the order of the scores, a chunk at a time, in one buffer that is used again and again.

    A key is the score's bits, made monotone. Where anything is masked already, all keys are one higher and those
    masked are 0.
    """

    def __init__(self, parts: list[_Part], dtype: torch.dtype, absolute: bool) -> None:
        self.parts = parts
        self.absolute = absolute
        self.shifted = any(part.kept is not None for part in parts)
        self.type = parts[0].bits.dtype.type
        width = 8 * parts[0].bits.itemsize
        self.sign = self.type(1 << (width - 1))
        self.value = self.type((1 << (width - 1)) - 1)
        self.top = self.type((1 << width) - 1)
        infinity = _INFINITY[dtype]
        # In signed order a positive number's key is its bits with the sign bit set, a negative one's all bits flipped.
        self.lowest = self.type(0 if absolute else infinity ^ ((1 << (width - 1)) - 1))
        self.highest = self.type(infinity if absolute else infinity | (1 << (width - 1)))
        size = min(_CHUNK, max(part.bits.size for part in parts))
        self._key = np.empty(size, self.type)
        self._spare = np.empty(size, self.type)
        self._flag = np.empty(size, np.bool_)

    def of(
        self, bits: SortableBits, kept: SortableBits | None, name: str, out: SortableBits, spare: SortableBits
    ) -> SortableBits:
        if self.absolute:
            np.bitwise_and(bits, self.value, out=out)
        else:
            # All ones for a negative number, only the sign bit for a positive one.
            signed = bits.view(f"i{bits.itemsize}")
            np.right_shift(signed, 8 * bits.itemsize - 1, out=spare.view(signed.dtype))
            np.bitwise_or(spare, self.sign, out=spare)
            np.bitwise_xor(bits, spare, out=out)
            # -0.0 has the key just below that of 0.0; they are equal.
            out[out == self.value] = self.sign
        if out.size and (out.max() > self.highest or (not self.absolute and out.min() < self.lowest)):
            if kept is None:
                raise _not_a_number(name)
            outside = (out > self.highest) | (out < self.lowest)
            if (outside & kept).any():
                raise _not_a_number(name)
            out[outside] = 0
        if self.shifted:
            np.add(out, self.type(1), out=out)
        if kept is not None:
            np.multiply(out, kept, out=out)
        return out

    def chunks(self) -> Iterator[tuple[SortableBits, _Part, slice]]:
        for part in self.parts:
            for start in range(0, part.bits.size, _CHUNK):
                where = slice(start, min(start + _CHUNK, part.bits.size))
                size = where.stop - start
                kept = None if part.kept is None else part.kept[where]
                yield self.of(part.bits[where], kept, part.name, self._key[:size], self._spare[:size]), part, where

    def sample(self, total: int) -> SortableBits:
        """Keys of about `_SAMPLE` random elements, sorted. The seed is fixed; the outcome does not depend on it."""
        draw = np.random.default_rng(0)
        found = []
        for part in self.parts:
            size = math.ceil(min(_SAMPLE, total // 16) * part.bits.size / total)
            at = draw.integers(0, part.bits.size, size)
            bits, kept = part.bits[at], None if part.kept is None else part.kept[at]
            found.append(self.of(bits, kept, part.name, np.empty_like(bits), np.empty_like(bits)))
        keys: SortableBits = np.sort(np.concatenate(found))
        return keys

    def within(
        self, low: np.unsignedinteger[Any], high: np.unsignedinteger[Any], heavy: tuple[bool, bool]
    ) -> tuple[int, int, SortableBits, int]:
        """Number of keys below `low`, number of `low`, the keys between, and number of `high`.

        An end that is not heavy is not counted apart but given back with those between.
        """
        below = at_low = at_high = 0
        between = []
        first, last = int(low) + heavy[0], int(high) - heavy[1]
        width = self.type(max(last - first, 0))
        for key, _, _ in self.chunks():
            flag = self._flag[: key.size]
            below += int(np.count_nonzero(np.less(key, low, out=flag)))
            if heavy[0]:
                at_low += int(np.count_nonzero(np.equal(key, low, out=flag)))
            if heavy[1] and high != low:
                at_high += int(np.count_nonzero(np.equal(key, high, out=flag)))
            if first <= last:
                # Unsigned, what lies below `first` wraps to the far end: one comparison instead of two.
                spare = np.subtract(key, self.type(first), out=self._spare[: key.size])
                between.append(key[np.less_equal(spare, width, out=flag)])
        return below, at_low, np.concatenate(between) if between else np.empty(0, self.type), at_high

    def threshold(self, count: int, total: int) -> tuple[Any, int, int]:
        """The `count`-th lowest key, how many keys lie below it, and how many are equal to it."""
        if total <= _SMALL:
            return _pick(np.concatenate([key.copy() for key, _, _ in self.chunks()]), count, 0)
        sample = self.sample(total)
        size = sample.size
        share = count / total
        # Four standard deviations of a quantile of the sample: missed once in 16,000 times, and then the other side is
        # read.
        margin = 4.0 * math.sqrt(size * share * (1.0 - share)) + 4.0
        left, right = math.floor(share * size - margin), math.ceil(share * size + margin)
        low = sample[left] if left >= 0 else self.type(0)
        high = sample[right] if right < size else self.top
        while True:
            heavy = (self._is_heavy(sample, low), self._is_heavy(sample, high))
            below, at_low, between, at_high = self.within(low, high, heavy)
            if count <= below:
                low, high = self.type(0), low
            elif count <= below + at_low:
                return low, below, at_low
            elif count <= below + at_low + between.size:
                return _pick(between, count - below - at_low, below + at_low)
            elif count <= below + at_low + between.size + at_high:
                return high, below + at_low + between.size, at_high
            else:
                low, high = high, self.top

    @staticmethod
    def _is_heavy(sample: SortableBits, key: np.unsignedinteger[Any]) -> bool:
        """True if so many are equal to `key` that counting them is cheaper than collecting them."""
        return int(np.searchsorted(sample, key, "right") - np.searchsorted(sample, key, "left")) > sample.size // 256


def _pick(keys: SortableBits, count: int, below: int) -> tuple[Any, int, int]:
    key = np.partition(keys, count - 1)[count - 1]
    return key, below + int(np.count_nonzero(keys < key)), int(np.count_nonzero(keys == key))


def _on_cpu(scores: Mapping[str, Tensor], count: int, kept: Mapping[str, Tensor], absolute: bool) -> dict[str, Tensor]:
    masks = {name: torch.ones(score.shape, dtype=torch.bool) for name, score in scores.items()}
    parts = []
    for name, score in scores.items():
        if not score.numel():
            continue
        unsigned = _UNSIGNED[score.element_size()]
        bits = score.contiguous().view(-1).view(torch.uint8).numpy().view(unsigned)
        pruned = kept[name].contiguous().view(-1).numpy() if name in kept else None
        parts.append(_Part(name, bits, pruned, masks[name].view(-1).numpy()))
    if not parts:
        return masks
    total = sum(part.bits.size for part in parts)
    keys = _Keys(parts, next(iter(scores.values())).dtype, absolute)
    if count <= 0:
        for _ in keys.chunks():  # only for the check
            pass
        for part in parts:
            if part.kept is not None:
                part.mask[:] = part.kept
        return masks
    threshold, below, equal = keys.threshold(count, total)
    left = count - below  # so many of those equal to the threshold are masked
    every = left == equal
    for key, part, where in keys.chunks():
        mask = part.mask[where]
        if every:
            np.greater(key, threshold, out=mask)
            continue
        ties = int(np.count_nonzero(np.equal(key, threshold, out=mask))) if left else 0
        if ties <= left:
            np.greater_equal(key, threshold, out=mask) if not left else np.greater(key, threshold, out=mask)
            left -= ties
        else:
            go = np.flatnonzero(mask)[:left]
            np.greater_equal(key, threshold, out=mask)
            mask[go] = False
            left = 0
    if keys.shifted and threshold == 0:  # fewer were asked for than are masked already: those stay masked
        for part in parts:
            if part.kept is not None:
                np.logical_and(part.mask, part.kept, out=part.mask)
    return masks


def _not_a_number(name: str) -> DataError:
    return DataError(
        f"{name!r} holds NaN, which cannot be ranked. Load weights that are finite, or find where they diverged."
    )
