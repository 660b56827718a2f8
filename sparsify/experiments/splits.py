"""A part of the samples to measure with, where the data name none: chosen by a seed, the same on every machine.

The order comes from a hash of the seed and of what a sample says, not of its place: neither another order of the files
nor another Python changes it. Samples that say the same (equal texts, equal images, questions about one context) stay
together, so that nothing is measured on what was trained.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

from sparsify.errors import ArgumentError, DataError
from sparsify.experiments.samples import DataSet, S

__all__: list[str] = []


@dataclass(frozen=True)
class SeededSplit:
    """Choice of a part to measure with, for data that name none.

    Args:
        fraction: of all samples, over 0 and under 1; of each class at least one where it has two.
        seed: another one gives another part.
    """

    fraction: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ArgumentError(f"fraction is {self.fraction}: a part to measure with is over 0 and under 1.")


USUAL_SPLIT = SeededSplit()


@dataclass(frozen=True)
class Found(Generic[S]):
    """The findings of a reader, before a part to measure with is there in any case.

    Args:
        train: samples to train with, or all where there are no others.
        val: samples to measure with, and the name of where they come from; None where the data name none.
        labels: names of the classes.
        fingerprint: of the data.
        files: that were read.
        notes: what its user should know.
    """

    train: Sequence[S]
    val: tuple[Sequence[S], str] | None
    labels: tuple[str, ...]
    fingerprint: str
    files: tuple[Path, ...]
    notes: tuple[str, ...]


def completed(
    found: Found[S],
    split: SeededSplit,
    content: Callable[[S], str],
    kind: Callable[[S], Hashable] = lambda sample: None,
) -> DataSet[S]:
    """The data set with a part to measure with: the one that the data name, or a seeded one.

    Args:
        found: what the reader found.
        split: how a part is taken where the data name none.
        content: of a sample; equal ones are not parted.
        kind: class of a sample; each has its share in both parts. One kind for all where it is left out.

    Raises:
        DataError: there are too few samples for two parts.
    """
    notes = list(found.notes)
    if found.val is not None:
        val, name = found.val
        seen = {content(sample) for sample in found.train}
        if twice := sum(content(sample) in seen for sample in val):
            notes.append(f"{twice} of the {len(val)} samples of {name} are in the training data too.")
        train: Sequence[S] = found.train
        said = f"given: {name}"
    else:
        chosen = _chosen(found.train, split, content, kind)
        train = [sample for sample, taken in zip(found.train, chosen, strict=True) if not taken]
        val = [sample for sample, taken in zip(found.train, chosen, strict=True) if taken]
        if not val or not train:
            different = len({content(sample) for sample in found.train})
            raise DataError(
                f"{found.train[0].file}: {len(found.train)} samples, {different} different, are too few to keep "
                "some back to measure with; expected at least 2 different ones of a class, or a part called val."
            )
        said = f"seeded: {len(val)} of {len(found.train)} samples, fraction {split.fraction:g}, seed {split.seed}"
    return DataSet(train, val, found.labels, found.fingerprint, found.files, said, tuple(notes))


def _chosen(
    samples: Sequence[S], split: SeededSplit, content: Callable[[S], str], kind: Callable[[S], Hashable]
) -> list[bool]:
    groups: dict[str, list[int]] = defaultdict(list)
    for position, sample in enumerate(samples):
        groups[content(sample)].append(position)
    kinds: dict[Hashable, list[tuple[bytes, list[int]]]] = defaultdict(list)
    for text, positions in groups.items():
        rank = hashlib.sha256(f"{split.seed}\0{text}".encode("utf-8", "surrogatepass")).digest()
        kinds[kind(samples[positions[0]])].append((rank, positions))
    taken = [False] * len(samples)
    for members in kinds.values():
        wanted = max(round(sum(len(positions) for _, positions in members) * split.fraction), 1)
        count = 0
        for _, positions in sorted(members)[: len(members) - 1]:  # one at least is left to train with
            if count >= wanted:
                break
            for position in positions:
                taken[position] = True
            count += len(positions)
    return taken


def split_record(data: DataSet[S]) -> dict[str, object]:
    """The split for a file that is kept: where it comes from, the sizes, the place of each sample to measure with."""
    return {
        "split": data.split,
        "train": len(data.train),
        "val": len(data.val),
        "measured": [sample.where for sample in data.val],
    }
