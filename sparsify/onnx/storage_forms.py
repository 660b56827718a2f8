"""The smallest form in which the values of a tensor can be stored: by their positions, and by a palette.

Forms are chosen by counting bytes. Values are bit patterns here, whole numbers without sign: -0.0 is no zero, and a NaN
is itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

__all__: list[str] = []

BitPatterns = np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]]
"""One-dimensional, without sign."""

Positions = Literal["all", "mask", "gaps", "sparse"]

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 6: (4, 2), 8: (8,)}
"""{bits of a code: widths of the parts in which it is stored, the lowest first}: each divides a byte."""
GAP_BITS = (3, 4, 6, 8)
LARGEST_PALETTE = 256
SAMPLE = 4096
"""Values of a large tensor that are looked at before all are counted."""
SIZE_MARGIN = 1.03
"""Of forms no larger than the smallest times this, the one is taken that loads fastest."""

# Bytes of the nodes that rebuild a tensor, and nanoseconds a value that onnxruntime takes for them when it loads a file
# (1.31.1, one core of an AMD EPYC; benchmarks/packing.py).
NODES = {"all": 90, "mask": 340, "gaps": 170, "sparse": 60}
CODE_NODES = {1: 200, 2: 200, 3: 500, 4: 200, 6: 440, 8: 40}
DECODED = {1: 2.0, 2: 2.0, 3: 5.0, 4: 2.0, 6: 5.0, 8: 0.5}
LOOKED_UP, MASKED, SCATTERED = 1.3, 5.8, 12.0


@dataclass(frozen=True)
class StorageForm:
    """The form in which a tensor is stored. Its background is its most frequent value, which need not be stored.

    Attributes:
        positions: all: every value is stored; mask: a bit for each says if it is stored or the background; gaps: the
            stored ones have their distance to the one before; sparse: they have their position in 64 bits, as ONNX's
            own sparse initializers, which onnxruntime takes for stored ones without any node.
        gap_bits: bits of a distance; 0 where there are none.
        value_bits: bits of an index into a palette; 0 where the values themselves are stored.
        size: bytes, with those of the nodes that rebuild the tensor.
        cost: nanoseconds that rebuilding takes, estimated.
    """

    positions: Positions
    gap_bits: int
    value_bits: int
    size: int
    cost: float

    @property
    def plain(self) -> bool:
        """True if the tensor is stored as it was."""
        return self.positions == "all" and not self.value_bits

    def __str__(self) -> str:
        words = {"all": "", "gaps": f"gaps of {self.gap_bits} bits"}.get(self.positions, self.positions)
        palette = f"palette of {self.value_bits} bit{'s' * (self.value_bits > 1)}" if self.value_bits else ""
        return " and ".join(word for word in (words, palette) if word) or "plain"


class CountedValues:
    """The values of a tensor, with what has to be counted of them to choose a form."""

    def __init__(self, bits: BitPatterns) -> None:
        self.bits = bits
        self.background = _most_frequent(bits)

    @cached_property
    def positions(self) -> np.ndarray:
        """Where the values stand that are not the background."""
        return np.flatnonzero(self.bits != self.background)

    @cached_property
    def distances(self) -> np.ndarray:
        """Distances of these, each to the one before; of the first to position 0."""
        return np.diff(self.positions, prepend=0)

    @cached_property
    def palette(self) -> BitPatterns | None:
        """The values that are not the background, each once; None where they are too many."""
        rest = self.bits[self.positions]
        if len(np.unique(_sample(rest))) > LARGEST_PALETTE:
            return None
        found = np.unique(rest)
        return found if len(found) <= LARGEST_PALETTE else None

    def far(self, gap_bits: int) -> np.ndarray:
        """Entries that each distance needs besides one: the largest that an entry holds is 2^gap_bits - 1."""
        found: np.ndarray = np.maximum(self.distances - 1, 0) // (2**gap_bits - 1)
        return found


def storage_form(counted: CountedValues, *, plain_bytes: int | None = None, without_nodes: bool = False) -> StorageForm:
    """The form that takes the fewest bytes; of forms that are about as small the one that loads fastest.

    Args:
        counted: the values.
        plain_bytes: what they take as they are; None: the size of `counted.bits`. Values of four bits take less.
        without_nodes: True leaves out all forms that nodes rebuild.
    """
    item, total, few = counted.bits.itemsize, len(counted.bits), len(counted.positions)
    forms = [StorageForm("all", 0, 0, counted.bits.nbytes if plain_bytes is None else plain_bytes, 0.0)]

    def add(positions: Positions, gap_bits: int, size: int, cost: float, count: int) -> None:
        """With `count` values stored as they are, and with a palette. The background is one of them but in `all`."""
        base, palette = size + NODES[positions], counted.palette
        if positions != "all":
            forms.append(StorageForm(positions, gap_bits, 0, base + count * item, cost))
        if palette is None or len(palette) + 1 > LARGEST_PALETTE:
            return
        bits = code_bits(len(palette) + 1)
        if bits < 8 * item:
            stored = code_bytes(count, bits) + (len(palette) + 1) * item + CODE_NODES[bits]
            spent = cost + count * (DECODED[bits] + LOOKED_UP)
            forms.append(StorageForm(positions, gap_bits, bits, base + stored, spent))

    if without_nodes:
        if not counted.background:
            forms.append(StorageForm("sparse", 0, 0, few * (8 + item) + NODES["sparse"], 0.0))
        return min(forms, key=lambda form: form.size)
    add("all", 0, 0, 0.0, total)
    add("mask", 0, code_bytes(total, 1), MASKED * total, few + 1)
    for bits in GAP_BITS:
        # Below half, a bit for each value is always less.
        if few * 2 <= total:
            entries = few + int(counted.far(bits).sum())
            stored = code_bytes(entries, bits) + CODE_NODES[bits]
            add("gaps", bits, stored, (DECODED[bits] + SCATTERED) * entries + 0.1 * total, entries)
    least = min(form.size for form in forms)
    return min((form for form in forms if form.size <= SIZE_MARGIN * least), key=lambda form: (form.cost, form.size))


def code_bits(count: int) -> int:
    """BitPatterns of codes for so many values.

    >>> [code_bits(count) for count in (1, 2, 3, 16, 17, 256)]
    [1, 1, 2, 4, 6, 8]
    """
    return next(bits for bits in PLANES if 2**bits >= count)


def code_bytes(count: int, bits: int) -> int:
    """Bytes of so many codes.

    >>> code_bytes(10, 1), code_bytes(10, 3), code_bytes(10, 8)
    (2, 6, 10)
    """
    return padded(count, bits) * bits // 8


def padded(count: int, bits: int) -> int:
    """The count up to which codes are filled, so that each of their parts fills whole bytes."""
    whole = 8 // min(PLANES[bits])
    return -(-count // whole) * whole


def packed_codes(codes: np.ndarray, bits: int) -> list[BitPatterns]:
    """The bytes of codes, one array for each of `PLANES[bits]`.

    Of m bytes the lowest bits of all hold the first m codes, the next lowest the m codes after them, and so on: whole
    stretches are unpacked at once then.

    >>> packed_codes(np.array([1, 2, 3, 4]), 4)
    [array([49, 66], dtype=uint8)]
    """
    codes = np.pad(codes.astype(np.uint8), (0, padded(len(codes), bits) - len(codes)))
    planes, below = [], 0
    for width in PLANES[bits]:
        part = (codes >> below) & (2**width - 1)
        shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
        planes.append(np.bitwise_or.reduce(part.reshape(len(shifts), -1) << shifts, axis=0).astype(np.uint8))
        below += width
    return planes


def gap_entries(counted: CountedValues, gap_bits: int) -> tuple[np.ndarray, BitPatterns]:
    """(distances, values) of the entries: what is too far has entries of the background on the way."""
    far, largest = counted.far(gap_bits), 2**gap_bits - 1
    last = np.cumsum(far + 1) - 1
    count = int(last[-1]) + 1 if len(last) else 0
    gaps = np.full(count, largest, np.int64)
    gaps[last] = counted.distances - far * largest
    values = np.full(count, counted.background, counted.bits.dtype)
    values[last] = counted.bits[counted.positions]
    return gaps, values


def _most_frequent(bits: BitPatterns) -> Any:
    if bits.itemsize <= 2:
        return bits.dtype.type(np.bincount(bits, minlength=1).argmax())
    values, counts = np.unique(_sample(bits), return_counts=True)
    return values[counts.argmax()] if len(values) else bits.dtype.type(0)


def _sample(bits: BitPatterns) -> BitPatterns:
    return bits[:: max(1, len(bits) // SAMPLE)]
