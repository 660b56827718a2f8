"""The part to measure with that a seed chooses: the same everywhere, of every class, nothing of it trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsify.errors import ArgumentError, DataError
from sparsify.experiments.samples import DataSet, LabelledText
from sparsify.experiments.splits import Found, SeededSplit, completed, split_record

FILE = Path("d.csv")


def samples(count: int, classes: int = 2, repeat: int = 1) -> list[LabelledText]:
    return [LabelledText(FILE, n + 2, f"text {n // repeat}", None, n // repeat % classes) for n in range(count)]


def split(
    train: list[LabelledText], how: SeededSplit | None = None, val: list[LabelledText] | None = None
) -> DataSet[LabelledText]:
    found = Found(train, None if val is None else (val, "val.csv"), ("a", "b"), "f", (FILE,), ())
    return completed(found, how or SeededSplit(), lambda one: one.text, lambda one: one.label)


def texts(data: DataSet[LabelledText]) -> set[str]:
    return {one.text for one in data.val}


def test_the_split_is_that_of_the_seed_whatever_the_order() -> None:
    data = split(samples(200))
    assert len(data.val) == 20 and len(data.train) == 180 and not texts(data) & {one.text for one in data.train}
    assert texts(split(samples(200)[::-1])) == texts(data)
    assert texts(split(samples(200), SeededSplit(seed=1))) != texts(data)
    # On every machine and in every version: these are the first lines of val.
    assert [one.line for one in data.val][:5] == KNOWN


KNOWN = [8, 10, 11, 22, 28]


def test_every_class_is_in_both_parts_and_one_sample_of_a_class_is_trained_with() -> None:
    rare = [
        *samples(40),
        LabelledText(FILE, 99, "rare", None, 5),
        *(LabelledText(FILE, 100 + n, f"few {n}", None, 6) for n in range(2)),
    ]
    data = split(rare)
    assert {one.label for one in data.train} == {0, 1, 5, 6} and {one.label for one in data.val} == {0, 1, 6}
    assert len(split(samples(100), SeededSplit(0.5)).val) == 50


def test_equal_samples_are_not_parted() -> None:
    data = split(samples(400, repeat=5))
    assert not texts(data) & {one.text for one in data.train} and len(data.val) == 40


def test_a_given_part_is_taken_and_what_is_in_both_is_said() -> None:
    data = split(samples(10), val=samples(3))
    assert data.split == "given: val.csv" and (len(data.train), len(data.val)) == (10, 3)
    assert data.notes == ("3 of the 3 samples of val.csv are in the training data too.",)


def test_the_record_names_every_sample_that_is_measured() -> None:
    data = split(samples(20))
    assert split_record(data) == {
        "split": "seeded: 2 of 20 samples, fraction 0.1, seed 0",
        "train": 18,
        "val": 2,
        "measured": [f"d.csv:{one.line}" for one in data.val],
    }


def test_too_few_samples_and_wrong_fractions_are_errors() -> None:
    for few in (samples(1), samples(2), samples(4, 1, repeat=4)):
        with pytest.raises(DataError, match=f"d.csv: {len(few)} samples, . different, are too few"):
            split(few)
    assert len(split(samples(2, 1)).val) == 1
    for fraction in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ArgumentError, match="a part to measure with is over 0 and under 1"):
            SeededSplit(fraction)


def test_a_limit_takes_evenly_and_keeps_the_order() -> None:
    data = split(samples(100)).limited(9, 3)
    assert len(data.train) == 9 and len(data.val) == 3
    positions = [one.line for one in data.train]
    assert positions == sorted(positions) and positions[-1] > 80
    assert data.limited(None, 50).train == data.train and data.limited(50, None).val == data.val
    with pytest.raises(DataError, match="0 samples were asked for"):
        data.limited(0, None)
