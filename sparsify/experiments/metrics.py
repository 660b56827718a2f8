"""Figures of quality in numpy, each as its reference computes it, without a download.

Larger is better, and 1 is the best. What torch and onnxruntime gave is measured by the same function.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__: list[str] = []


def confusion(target: NDArray[Any], predicted: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Numbers of elements by class, (count, count): rows are the target, columns the prediction."""
    cells = target.astype(np.int64).ravel() * count + predicted.astype(np.int64).ravel()
    return np.bincount(cells, minlength=count * count).reshape(count, count)


def accuracy_of(cells: NDArray[np.int64]) -> float:
    """Fraction of elements whose prediction is right.

    Args:
        cells: a confusion matrix.
    """
    return float(np.trace(cells) / max(cells.sum(), 1))


def macro_f1(cells: NDArray[np.int64]) -> float:
    """Mean over the classes of 2 tp / (2 tp + fp + fn), as scikit-learn's f1_score(average="macro").

    A class that is neither in the target nor in the prediction does not count.

    Args:
        cells: a confusion matrix.
    """
    hits, both = np.diag(cells), cells.sum(0) + cells.sum(1)
    there = both > 0
    return float((2 * hits[there] / both[there]).mean()) if there.any() else 0.0


def mean_iou(cells: NDArray[np.int64]) -> float:
    """Mean over the classes of tp / (tp + fp + fn), the intersection over the union of their pixels.

    A class that is neither in the target nor in the prediction does not count, as in scikit-learn's
    jaccard_score(average="macro").

    Args:
        cells: a confusion matrix of pixels.
    """
    hits = np.diag(cells)
    union = cells.sum(0) + cells.sum(1) - hits
    there = union > 0
    return float((hits[there] / union[there]).mean()) if there.any() else 0.0


def entities_in(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Entities of a sentence: kind, first and last word; as conlleval and seqeval read them.

    An entity begins at B or S (U in BILOU), behind the end of another, and where the kind changes; an I without a
    beginning begins one.

    >>> sorted(entities_in(["B-PER", "I-PER", "O", "I-ORG", "B-ORG"]))
    [('ORG', 3, 3), ('ORG', 4, 4), ('PER', 0, 1)]
    """
    found: set[tuple[str, int, int]] = set()
    begin, before, kind_before = 0, "O", ""
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, kind = tag.partition("-")
        prefix = {"U": "S", "L": "E"}.get(prefix, prefix)
        new = prefix in ("B", "S", "O") or before in ("E", "S", "O") or kind != kind_before
        if new and before != "O":
            found.add((kind_before, begin, place - 1))
        if new:
            begin = place
        before, kind_before = prefix, kind
    return found


def entity_scores(target: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and f1 over the entities of all sentences; one is right if kind, first and last word are.

    Args:
        target: tags of each sentence.
        predicted: as many, each as long.
    """
    right = wanted = given = 0
    for tags, others in zip(target, predicted, strict=True):
        true, said = entities_in(tags), entities_in(others)
        right, wanted, given = right + len(true & said), wanted + len(true), given + len(said)
    return {
        "precision": right / given if given else 0.0,
        "recall": right / wanted if wanted else 0.0,
        "f1": 2 * right / (given + wanted) if given + wanted else 0.0,
    }


def plain_answer(text: str) -> str:
    """An answer as SQuAD compares it: lower case, without punctuation, articles and needless blanks.

    >>> plain_answer("The  U.S. Army!")
    'us army'
    """
    kept = "".join(sign for sign in text.lower() if sign not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def answer_scores(target: Sequence[Sequence[str]], predicted: Sequence[str]) -> dict[str, float]:
    """SQuAD's exact match and f1: the best over the right answers of a question, the mean over the questions.

    f1 is that of the words which an answer has in common with a right one. Where there is no right answer the empty one
    is right, as in SQuAD 2.

    Args:
        target: right answers of each question.
        predicted: an answer for each; empty where it is that there is none.
    """
    exact = overlap = 0.0
    for answers, said in zip(target, predicted, strict=True):
        given = plain_answer(said)
        right = [plain for answer in answers if (plain := plain_answer(answer))] or [""]
        exact += max(float(given == one) for one in right)
        overlap += max(_word_f1(one.split(), given.split()) for one in right)
    return {"exact_match": exact / max(len(predicted), 1), "f1": overlap / max(len(predicted), 1)}


def _word_f1(right: list[str], given: list[str]) -> float:
    if not right or not given:
        return float(right == given)
    common = sum((Counter(right) & Counter(given)).values())
    return 2 * common / (len(right) + len(given))


@dataclass(frozen=True)
class Detections:
    """Boxes that a detector found in one image.

    Args:
        boxes: (n, 4) left, top, width, height in pixels.
        labels: (n) classes.
        scores: (n) the surer the larger.
    """

    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    scores: NDArray[np.float64]


def detection_scores(target: Sequence[Detections], predicted: Sequence[Detections], count: int) -> dict[str, float]:
    """COCO's mean average precision: over intersections of .5 to .95 with the true box (mAP), of .5, and of .75.

    At most 100 boxes of an image count. A class without a true box does not count.

    Args:
        target: true boxes of each image; their scores are not read.
        predicted: as many.
        count: classes.

    Raises:
        ImportError: faster-coco-eval is not installed; the extra `experiments` has it.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    def rows(number: int, found: Detections) -> list[dict[str, Any]]:
        return [
            {
                "image_id": number,
                "category_id": int(label) + 1,
                "bbox": [float(value) for value in box],
                "area": float(box[2] * box[3]),
                "iscrowd": 0,
                "score": float(score),
            }
            for box, label, score in zip(found.boxes, found.labels, found.scores, strict=True)
        ]

    true = [row for number, found in enumerate(target, 1) for row in rows(number, found)]
    said = [row for number, found in enumerate(predicted, 1) for row in rows(number, found)]
    if not true:
        return {"mAP": 0.0, "mAP50": 0.0, "mAP75": 0.0}
    truth = COCO(
        {
            "images": [{"id": number} for number in range(1, len(target) + 1)],
            "annotations": [{**row, "id": number} for number, row in enumerate(true, 1)],
            "categories": [{"id": number} for number in range(1, count + 1)],
        }
    )
    found = COCOeval_faster(truth, truth.loadRes(said), "bbox", print_function=lambda *_: None)
    found.run()
    stats: Mapping[str, float] = found.stats_as_dict
    return {name: max(float(stats[key]), 0.0) for name, key in _COCO_KEYS.items()}


_COCO_KEYS = {"mAP": "AP_all", "mAP50": "AP_50", "mAP75": "AP_75"}
