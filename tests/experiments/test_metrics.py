"""Figures of quality against references: scikit-learn, the rules of conlleval, SQuAD's by hand, COCO's definition."""

from __future__ import annotations

import random

import numpy as np
import pytest

from sparsify.experiments.metrics import (
    Detections,
    accuracy_of,
    answer_scores,
    confusion,
    detection_scores,
    entities_in,
    entity_scores,
    macro_f1,
    mean_iou,
    plain_answer,
)


@pytest.mark.parametrize("seed", range(12))
def test_accuracy_macro_f1_and_miou_are_those_of_scikit_learn(seed: int) -> None:
    reference = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    target, predicted = (rng.integers(0, rng.integers(1, 7), 40) for _ in range(2))
    cells = confusion(target, predicted, 9)  # with classes that neither has
    assert cells.sum() == 40 and cells[target[0], predicted[0]] > 0
    assert accuracy_of(cells) == pytest.approx(reference.accuracy_score(target, predicted))
    options = {"average": "macro", "zero_division": 0}
    assert macro_f1(cells) == pytest.approx(reference.f1_score(target, predicted, **options))
    assert mean_iou(cells) == pytest.approx(reference.jaccard_score(target, predicted, **options))


def test_nothing_measured_is_no_quality() -> None:
    nothing = np.zeros((3, 3), np.int64)
    assert accuracy_of(nothing) == macro_f1(nothing) == mean_iou(nothing) == 0.0
    assert entity_scores([["O"]], [["O"]]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


# Pairs of prefixes between which an entity ends or begins, as conlleval of CoNLL-2000 has them, with those of BIOES.
ENDS = {"BB", "BS", "BO", "IB", "IS", "IO", "EE", "EI", "EO", "EB", "ES", "SE", "SI", "SO", "SB", "SS"}
BEGINS = {"EE", "EI", "SE", "SI", "OE", "OI"}


def conlleval(tags: list[str]) -> set[tuple[str, int, int]]:
    found, begin = set(), 0
    for place in range(len(tags) + 1):
        before = tags[place - 1] if place else "O"
        after = tags[place] if place < len(tags) else "O"
        pair, changed = before[0] + after[0], before[2:] != after[2:]
        if before != "O" and (pair in ENDS or changed):
            found.add((before[2:], begin, place - 1))
        if after != "O" and (after[0] in "BS" or pair in BEGINS or changed):
            begin = place
    return found


@pytest.mark.parametrize("prefixes", ["BI", "I", "BIES"])
def test_entities_are_those_of_conlleval(prefixes: str) -> None:
    draw = random.Random(0)
    tags = ["O", *(f"{prefix}-{kind}" for prefix in prefixes for kind in ("PER", "ORG"))]
    for _ in range(500):
        sentence = draw.choices(tags, k=draw.randint(1, 9))
        assert entities_in(sentence) == conlleval(sentence), sentence
    if prefixes == "BIES":
        assert entities_in(["B-X", "I-X", "L-X", "U-X"]) == {("X", 0, 2), ("X", 3, 3)}


def test_entity_f1_counts_whole_entities_over_all_sentences() -> None:
    # The example of seqeval's page: one of two entities is right, in one the border is wrong.
    target = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    predicted = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    assert entity_scores(target, predicted) == {"precision": 0.5, "recall": 0.5, "f1": 0.5}
    none = [["O"] * 7, ["O"] * 3]
    assert entity_scores(target, none) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    seqeval = pytest.importorskip("seqeval.metrics")
    assert seqeval.f1_score(target, predicted) == 0.5


@pytest.mark.parametrize(
    ("right", "said", "exact", "f1"),
    [
        (["Denver Broncos"], "the Denver Broncos!", 1.0, 1.0),
        (["Denver Broncos", "Broncos"], "Broncos", 1.0, 1.0),
        (["Denver Broncos"], "Broncos", 0.0, 2 / 3),
        (["a cat a dog"], "dog cat bird", 0.0, 0.8),
        (["a b b"], "b b b", 0.0, 0.8),
        (["Denver"], "Carolina", 0.0, 0.0),
        (["Denver"], "", 0.0, 0.0),
        ([], "", 1.0, 1.0),
        ([], "Denver", 0.0, 0.0),
        (["the"], "a", 1.0, 1.0),
    ],
)
def test_answers_are_compared_as_squad_compares_them(right: list[str], said: str, exact: float, f1: float) -> None:
    assert answer_scores([right], [said]) == {"exact_match": exact, "f1": pytest.approx(f1)}
    both = answer_scores([right, ["x"]], [said, "x"])
    assert both == {"exact_match": (exact + 1) / 2, "f1": pytest.approx((f1 + 1) / 2)}


def test_an_answer_is_plain_without_articles_punctuation_and_case() -> None:
    assert plain_answer(" An  APPLE, a-day; The end. ") == "apple aday end"
    assert plain_answer("theatre") == "theatre"


def found(boxes: list[list[float]], labels: list[int], scores: list[float] | None = None) -> Detections:
    return Detections(
        np.array(boxes, float).reshape(-1, 4), np.array(labels, int), np.array(scores or [1.0] * len(labels), float)
    )


def intersection(one: np.ndarray, other: np.ndarray) -> float:
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[:2] + one[2:], other[:2] + other[2:])
    both = float(np.prod(np.maximum(high - low, 0)))
    return both / (float(one[2] * one[3] + other[2] * other[3]) - both)


def average_precision(target: list[Detections], predicted: list[Detections], label: int, threshold: float) -> float:
    """COCO's: the surest box takes the free true box that it covers best; precision at 101 recalls, from behind."""
    order = sorted(
        ((number, i) for number, one in enumerate(predicted) for i in np.flatnonzero(one.labels == label)),
        key=lambda pair: -predicted[pair[0]].scores[pair[1]],
    )
    total = sum(int((one.labels == label).sum()) for one in target)
    taken: set[tuple[int, int]] = set()
    hits = []
    for number, i in order:
        free = [j for j in np.flatnonzero(target[number].labels == label) if (number, j) not in taken]
        overlaps = [(intersection(predicted[number].boxes[i], target[number].boxes[j]), j) for j in free]
        best, j = max(overlaps, default=(0.0, -1))
        hits.append(best >= threshold)
        taken |= {(number, j)} if best >= threshold else set()
    right = np.cumsum(hits)
    recall, precision = right / total, right / np.arange(1, len(hits) + 1)
    return float(
        np.mean(
            [
                max([p for r, p in zip(recall, precision, strict=True) if r >= x], default=0)
                for x in np.linspace(0, 1, 101)
            ]
        )
    )


@pytest.mark.parametrize("seed", range(5))
def test_mean_average_precision_is_cocos(seed: int) -> None:
    pytest.importorskip("faster_coco_eval")
    rng = np.random.default_rng(seed)
    target, predicted = [], []
    for _ in range(8):
        count = int(rng.integers(0, 5))
        boxes = np.concatenate([rng.uniform(0, 60, (count, 2)), rng.uniform(10, 40, (count, 2))], 1)
        labels = rng.integers(0, 2, count)
        target.append(Detections(boxes, labels, np.ones(count)))
        moved = np.concatenate([boxes + rng.normal(0, 2, boxes.shape), rng.uniform(5, 50, (2, 4))])
        predicted.append(
            Detections(moved, np.concatenate([labels, rng.integers(0, 3, 2)]), rng.uniform(0, 1, count + 2))
        )
    scores = detection_scores(target, predicted, 3)
    there = sorted({int(label) for one in target for label in one.labels})
    at = {
        t: np.mean([average_precision(target, predicted, label, t) for label in there])
        for t in np.arange(50, 100, 5) / 100
    }
    assert scores["mAP50"] == pytest.approx(at[0.5]) and scores["mAP75"] == pytest.approx(at[0.75])
    assert scores["mAP"] == pytest.approx(np.mean(list(at.values())))


def test_mean_average_precision_at_its_ends() -> None:
    pytest.importorskip("faster_coco_eval")
    target = [found([[0, 0, 10, 10], [20, 20, 10, 10]], [0, 1]), found([], [])]
    perfect, nothing = {"mAP": 1.0, "mAP50": 1.0, "mAP75": 1.0}, {"mAP": 0.0, "mAP50": 0.0, "mAP75": 0.0}
    assert detection_scores(target, target, 2) == pytest.approx(perfect)
    assert detection_scores(target, [found([], [])] * 2, 2) == nothing
    assert detection_scores([found([], [])] * 2, target, 2) == nothing
    # A surer box where nothing is halves the precision of its class.
    other = [target[0], found([[0, 0, 5, 5]], [0], [2.0])]
    assert detection_scores(target, other, 2)["mAP50"] == pytest.approx(0.75)
