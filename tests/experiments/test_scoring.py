"""From outputs of networks to figures: what is right by construction is measured as right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sparsify.errors import DataError
from sparsify.experiments.samples import (
    Answer,
    AskedQuestion,
    Box,
    BoxedImage,
    LabelledText,
    OutlinedImage,
    TaggedWords,
)
from sparsify.experiments.scoring import (
    box_scores,
    class_scores,
    detections_of,
    question_scores,
    region_scores,
    tag_scores,
)

FILE = Path("data.txt")


def one_hot(classes: list[int], count: int) -> np.ndarray:
    return np.eye(count, dtype=np.float32)[classes]


def test_classes() -> None:
    samples = [LabelledText(FILE, n, "x", None, label) for n, label in enumerate([0, 1, 2, 1])]
    scores = class_scores({"logits": one_hot([0, 1, 1, 1], 3)}, samples, 3)
    assert scores == {"accuracy": 0.75, "macro_f1": pytest.approx((1 + 0.8 + 0) / 3)}
    assert class_scores({"output": one_hot([0, 1, 2, 1], 5)}, samples, 3)["accuracy"] == 1.0
    with pytest.raises(DataError, match="expected 3 logits"):
        class_scores({"logits": one_hot([0, 1, 1, 1], 2)}, samples, 3)


def test_regions_are_enlarged_to_the_size_of_the_target() -> None:
    pixels = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 2, 2], [2, 2, 2, 2]])
    small = one_hot([0, 1, 2, 2], 3).reshape(2, 2, 3).transpose(2, 0, 1)[None]
    sample = OutlinedImage(FILE, 0, FILE, 4, 4, ())
    assert region_scores({"logits": small}, [sample], lambda _: pixels, 3) == {"mIoU": 1.0, "accuracy": 1.0}
    wrong = region_scores({"logits": small}, [sample], lambda _: np.zeros((4, 4), int), 3)
    assert wrong == {"mIoU": pytest.approx(0.25 / 3), "accuracy": 0.25}


def test_a_word_is_tagged_by_its_first_token_and_one_that_was_cut_off_is_wrong() -> None:
    sample = TaggedWords(FILE, 1, ("a", "b", "c", "d"), (1, 2, 0, 1))
    logits = one_hot([0, 1, 2, 0, 0, 0], 3)[None]  # [CLS] a b ##b c [SEP]
    words = [None, 0, 1, 1, 2, None]
    plain = tag_scores({"logits": logits}, [sample], lambda _: words, ["X", "Y", "Z"], False)
    assert plain == {"accuracy": 0.75, "macro_f1": pytest.approx((1 + 2 / 3 + 1) / 3)}
    entities = tag_scores({"logits": logits}, [sample], lambda _: words, ["O", "B-P", "I-P"], True)
    assert entities == {"f1": pytest.approx(2 / 3), "precision": 1.0, "recall": 0.5, "accuracy": 0.75}


def question(answers: tuple[Answer, ...]) -> AskedQuestion:
    return AskedQuestion(FILE, 1, "k", "who?", "it was Ada Lovelace", answers)


SPANS: list[tuple[int, int] | None] = [None, None, (0, 2), (3, 6), (7, 10), (11, 19), None]
ADA = (Answer("Ada Lovelace", 7),)


def logits(start: int, end: int) -> dict[str, np.ndarray]:
    return {"start_logits": one_hot([start], 7) * 3, "end_logits": one_hot([end], 7) * 3}


@pytest.mark.parametrize(
    ("start", "end", "f1", "exact"),
    [(4, 5, 1.0, 1.0), (4, 4, 2 / 3, 0.0), (2, 3, 0.0, 0.0), (0, 0, 0.0, 0.0), (1, 5, 2 / 3, 0.0)],
)
def test_an_answer_is_the_best_span_of_the_context(start: int, end: int, f1: float, exact: float) -> None:
    scores = question_scores(logits(start, end), [question(ADA)], lambda _: SPANS)
    if start != 1:  # the question itself is no answer: then the end alone counts, and it lies at the best start
        assert scores == {"f1": pytest.approx(f1), "exact_match": exact}
    assert question_scores(logits(start, end), [question(ADA)], lambda _: [None] * 7)["f1"] == 0.0


def test_no_answer_is_one_where_the_data_have_such_questions() -> None:
    samples = [question(()), question(ADA)]
    both = {name: np.concatenate([logits(0, 0)[name], logits(4, 5)[name]]) for name in ("start_logits", "end_logits")}
    assert question_scores(both, samples, lambda _: SPANS) == {"f1": 1.0, "exact_match": 1.0}
    unnamed = {"a": both["start_logits"], "b": both["end_logits"]}
    assert question_scores(unnamed, samples, lambda _: SPANS)["f1"] == 1.0
    with pytest.raises(DataError, match="expected start_logits and end_logits"):
        question_scores({"a": both["start_logits"]}, samples, lambda _: SPANS)


SAMPLE = BoxedImage(FILE, 0, FILE, 200, 100, (Box(0, 0.5, 0.5, 0.2, 0.4), Box(1, 0.9, 0.5, 0.2, 0.4)))
QUERIES = np.array([[0.5, 0.5, 0.2, 0.4], [0.9, 0.5, 0.3, 0.4], [0.1, 0.1, 0.1, 0.1]], np.float32)


def test_boxes_of_a_softmax_and_of_sigmoids() -> None:
    pytest.importorskip("faster_coco_eval")
    softmax = np.array([[9, 0, 0], [0, 9, 0], [0, 0, 9]], np.float32)
    sigmoid = np.array([[9, -9], [-9, 9], [-9, -9]], np.float32)
    for given in (softmax, sigmoid):
        outputs = {"logits": given[None], "pred_boxes": QUERIES[None]}
        scores = box_scores(outputs, [SAMPLE], 2)
        # The second box reaches over the border by .05 and to .75: cut off there it has 200 of 250 of the true one.
        assert scores["mAP50"] == pytest.approx(1.0) and 0.5 < scores["mAP"] < 1
    with pytest.raises(DataError, match="the model gives 3 logits for a box, expected 5 or 6"):
        box_scores({"logits": softmax[None], "pred_boxes": QUERIES[None]}, [SAMPLE], 5)


def test_boxes_are_in_pixels_cut_at_the_border_and_the_surest_first() -> None:
    found = detections_of(np.array([[1, -9], [-9, 5], [-9, -9]], np.float32), QUERIES, SAMPLE, 2)
    assert found.labels[:2].tolist() == [1, 0] and np.all(np.diff(found.scores) <= 0) and len(found.labels) == 6
    assert np.allclose(found.boxes[:2], [[150, 30, 50, 40], [80, 30, 40, 40]], atol=1e-4)
    many = detections_of(np.zeros((300, 4)), np.tile(QUERIES, (100, 1)), SAMPLE, 4)
    assert len(many.labels) == 100
