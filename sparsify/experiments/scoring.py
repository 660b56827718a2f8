"""From what a network gives to figures of quality, the same for torch and onnxruntime: arrays by name of the output.

Samples are along the first axis of every array, in the order of the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsify.errors import DataError
from sparsify.experiments.metrics import (
    Detections,
    accuracy_of,
    answer_scores,
    confusion,
    detection_scores,
    entity_scores,
    macro_f1,
    mean_iou,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparsify.experiments.samples import (
        AskedQuestion,
        BoxedImage,
        LabelledImage,
        LabelledText,
        OutlinedImage,
        TaggedWords,
    )

__all__: list[str] = []

Outputs = Mapping[str, Any]
DETECTIONS = 100
"""Boxes of an image that COCO's metric counts."""
ANSWER_TOKENS = 30
"""Tokens of an answer at most, as in the scripts for SQuAD."""


def logits_of(outputs: Outputs, name: str = "logits") -> NDArray[Any]:
    """The output of a name, or the first where there is none."""
    return outputs[name] if name in outputs else next(iter(outputs.values()))


def class_scores(
    outputs: Outputs, samples: Sequence[LabelledImage] | Sequence[LabelledText], count: int
) -> dict[str, float]:
    """Accuracy and macro F1 of images or texts of one class each.

    Args:
        outputs: logits (n, classes).
        samples: n of them.
        count: classes.
    """
    logits = logits_of(outputs)
    if logits.ndim != 2 or logits.shape[1] < count:
        raise DataError(f"the model gives {logits.shape[1:]} for a sample, expected {count} logits, one a class.")
    target = np.array([sample.label for sample in samples])
    cells = confusion(target, logits[:, :count].argmax(-1), count)
    return {"accuracy": accuracy_of(cells), "macro_f1": macro_f1(cells)}


def region_scores(
    outputs: Outputs,
    samples: Sequence[OutlinedImage],
    regions: Callable[[OutlinedImage], NDArray[Any]],
    count: int,
) -> dict[str, float]:
    """Mean intersection over union, and accuracy, of the pixels at the size that the model reads.

    Args:
        outputs: logits (n, classes, height, width); smaller ones are enlarged bilinearly, as the losses of transformers
            do.
        samples: n of them.
        regions: (height, width) classes of the pixels of a sample.
        count: classes, the background among them.
    """
    import torch
    from torch.nn import functional

    cells = np.zeros((count, count), np.int64)
    for logits, sample in zip(logits_of(outputs), samples, strict=True):
        target = regions(sample)
        small = torch.from_numpy(np.ascontiguousarray(logits[None, :count], dtype=np.float32))
        large = functional.interpolate(small, target.shape, mode="bilinear", align_corners=False)
        cells += confusion(target, large[0].argmax(0).numpy(), count)
    return {"mIoU": mean_iou(cells), "accuracy": accuracy_of(cells)}


def tag_scores(
    outputs: Outputs,
    samples: Sequence[TaggedWords],
    word_ids: Callable[[TaggedWords], Sequence[int | None]],
    labels: Sequence[str],
    entities: bool,
) -> dict[str, float]:
    """Accuracy and macro F1 of the tags, or precision, recall and f1 of the entities, and the accuracy of the tags.

    A word counts once, by its first token. One whose tokens were cut off has no tag: it is wrong, and in no entity.

    Args:
        outputs: logits (n, tokens, tags).
        samples: n of them.
        word_ids: word of each token of a sample; None of a token that is of no word.
        labels: names of the tags.
        entities: the tags are entities.
    """
    target, given = [], []
    for logits, sample in zip(logits_of(outputs), samples, strict=True):
        said: list[int] = [-1] * len(sample.tags)
        best = logits[:, : len(labels)].argmax(-1)
        for token, word in enumerate(word_ids(sample)):
            if word is not None and said[word] < 0:
                said[word] = int(best[token])
        target.append(list(sample.tags))
        given.append(said)
    true, found = np.concatenate(target), np.concatenate(given)
    right = float((true == found).mean())
    if entities:

        def names(tags: list[int]) -> list[str]:
            return ["O" if tag < 0 else labels[tag] for tag in tags]

        scores = entity_scores([names(one) for one in target], [names(one) for one in given])
        return {"f1": scores["f1"], "precision": scores["precision"], "recall": scores["recall"], "accuracy": right}
    count = len(labels) + 1  # a word that was cut off is of a class of its own, which no word is of
    cells = confusion(true, np.where(found < 0, count - 1, found), count)
    hits, both = np.diag(cells)[:-1], (cells.sum(0) + cells.sum(1))[:-1]
    return {"accuracy": right, "macro_f1": float((2 * hits[both > 0] / both[both > 0]).mean())}


def question_scores(
    outputs: Outputs,
    samples: Sequence[AskedQuestion],
    spans: Callable[[AskedQuestion], Sequence[tuple[int, int] | None]],
) -> dict[str, float]:
    """SQuAD's f1 and exact match.

    The answer is the span with the largest sum of its start and end logits. Where a question of the data has no answer,
    the first token, which stands for none, is compared with it.

    Args:
        outputs: `start_logits` and `end_logits` (n, tokens), or the first two outputs.
        samples: n of them.
        spans: first character of each token in the context, and the one behind its last; None of a token that is no
            part of the context.
    """
    first, second = _two(outputs, "start_logits", "end_logits")
    may_be_none = any(not sample.answers for sample in samples)
    said = []
    for start, end, sample in zip(first, second, samples, strict=True):
        places = spans(sample)
        inside = np.array([place is not None for place in places])
        said.append(_best_answer(start, end, places, inside, sample.context, may_be_none))
    scores = answer_scores([[answer.text for answer in sample.answers] for sample in samples], said)
    return {"f1": scores["f1"], "exact_match": scores["exact_match"]}


def _two(outputs: Outputs, *names: str) -> tuple[NDArray[Any], NDArray[Any]]:
    if not all(name in outputs for name in names):
        names = tuple(outputs)
        if len(names) < 2:
            raise DataError(f"the model gives {list(names)}, expected start_logits and end_logits, or two outputs.")
    return outputs[names[0]], outputs[names[1]]


def _best_answer(
    start: NDArray[Any],
    end: NDArray[Any],
    places: Sequence[tuple[int, int] | None],
    inside: NDArray[Any],
    context: str,
    may_be_none: bool,
) -> str:
    count = len(places)
    sums = start[:count, None].astype(np.float64) + end[None, :count]
    length = np.arange(count)[None, :] - np.arange(count)[:, None]
    allowed = inside[:, None] & inside[None, :] & (length >= 0) & (length < ANSWER_TOKENS)
    if not allowed.any():
        return ""
    best = np.where(allowed, sums, -np.inf)
    one, other = np.unravel_index(int(best.argmax()), best.shape)
    if may_be_none and sums[0, 0] > best[one, other]:
        return ""
    left, right = places[int(one)], places[int(other)]
    assert left is not None and right is not None
    return context[left[0] : right[1]]


def box_scores(outputs: Outputs, samples: Sequence[BoxedImage], count: int) -> dict[str, float]:
    """COCO's mAP, mAP50 and mAP75 of detectors in the manner of DETR.

    Args:
        outputs: `logits` (n, queries, classes), or one more, which stands for no object, and `pred_boxes`
            (n, queries, 4) as centre, width and height in fractions of the image.
        samples: n of them.
        count: classes.
    """
    logits, boxes = _two(outputs, "logits", "pred_boxes")
    if logits.shape[-1] not in (count, count + 1):
        raise DataError(f"the model gives {logits.shape[-1]} logits for a box, expected {count} or {count + 1}.")
    found = [detections_of(*one, count) for one in zip(logits, boxes, samples, strict=True)]
    return detection_scores([true_boxes(sample) for sample in samples], found, count)


def detections_of(logits: NDArray[Any], boxes: NDArray[Any], sample: BoxedImage, count: int) -> Detections:
    """The boxes of one image, at most 100, the surest first.

    With one logit more than there are classes they are a softmax over the classes and no object, and a query is one box
    (DETR, YOLOS); else each is a sigmoid of its own, and a query may be a box of several classes (Deformable DETR,
    RT-DETR).

    Args:
        logits: (queries, classes) or one more.
        boxes: (queries, 4) centre, width and height in fractions of the image.
        sample: the image.
        count: classes.
    """
    values = logits.astype(np.float64)
    if logits.shape[-1] == count + 1:
        shifted = np.exp(values - values.max(-1, keepdims=True))
        chances = (shifted / shifted.sum(-1, keepdims=True))[:, :count]
        queries, labels = np.arange(len(values)), chances.argmax(-1)
    else:
        chances = 1 / (1 + np.exp(-values))
        queries, labels = (part.ravel() for part in np.indices(chances.shape))
    scores = chances[queries, labels]
    best = np.argsort(-scores, kind="stable")[:DETECTIONS]
    return Detections(_in_pixels(boxes[queries[best]], sample), labels[best], scores[best])


def true_boxes(sample: BoxedImage) -> Detections:
    """The boxes of a sample, in pixels."""
    boxes = np.array([[box.x, box.y, box.width, box.height] for box in sample.boxes]).reshape(-1, 4)
    labels = np.array([box.label for box in sample.boxes], np.int64)
    return Detections(_in_pixels(boxes, sample), labels, np.ones(len(labels)))


def _in_pixels(boxes: NDArray[Any], sample: BoxedImage) -> NDArray[np.float64]:
    """(n, 4) left, top, width, height, cut at the border of the image."""
    centre, half = boxes[:, :2].astype(np.float64), boxes[:, 2:].astype(np.float64) / 2
    low, high = np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)
    size = np.array([sample.width, sample.height])
    return np.concatenate([low * size, (high - low) * size], 1)
