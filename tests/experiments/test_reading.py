"""The data of every use case by its name, with what the flags say of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sparsify.errors import ArgumentError, DataError
from sparsify.experiments.reading import read_data
from sparsify.experiments.samples import (
    AskedQuestion,
    BoxedImage,
    LabelledImage,
    LabelledText,
    OutlinedImage,
    TaggedWords,
)
from sparsify.experiments.settings import ExperimentSettings
from sparsify.experiments.use_cases import use_case_named
from tests.data_folders import Content, class_folders, lines, written, yolo

pytest.importorskip("PIL")
TEXTS: dict[str, Content] = {"d.csv": "text,label\n" + "".join(f"t{n},{'ab'[n % 2]}\n" for n in range(20))}
TAGS: dict[str, Content] = {"d.jsonl": lines({"tokens": [f"N{n}", "is"], "tags": ["B-X", "O"]} for n in range(20))}
ASKED: dict[str, Content] = {"d.csv": "question,context,answer\n" + "".join(f"?,it is {n},{n}\n" for n in range(20))}


def settings(name: str, root: Path, **options: Any) -> ExperimentSettings:
    return ExperimentSettings("training-aware", name, "model", str(root), **options).checked()


@pytest.mark.parametrize(
    ("name", "files", "sample"),
    [
        ("image_classification", class_folders(), LabelledImage),
        ("Object Detection", yolo("0 .5 .5 .2 .2"), BoxedImage),
        ("segmentation", yolo("0 .1 .1 .5 .1 .5 .5"), OutlinedImage),
        ("qa", ASKED, AskedQuestion),
        ("text_classification", TEXTS, LabelledText),
        ("sentiment-analysis", TEXTS, LabelledText),
        ("token_classification", TAGS, TaggedWords),
        ("NER", TAGS, TaggedWords),
    ],
)
def test_every_use_case_reads_its_data_and_splits_them_by_the_seed(
    tmp_path: Path, name: str, files: dict[str, Content], sample: type
) -> None:
    root = written(tmp_path, files)
    case = use_case_named(name)
    data = read_data(case, settings(name, root))
    assert all(type(one) is sample for one in [*data.train, *data.val])
    others = [read_data(case, settings(name, root, seed=seed)) for seed in (0, *range(1, 6))]
    assert [one.where for one in others[0].val] == [one.where for one in data.val]
    assert len({tuple(one.where for one in other.val) for other in others}) > 1


def test_columns_and_missing_labels_are_said_by_flags(tmp_path: Path) -> None:
    root = written(tmp_path / "t", {"d.csv": str(TEXTS["d.csv"]).replace("text,label", "body,stars")})
    case = use_case_named("sentiment")
    assert read_data(case, settings("sentiment", root, columns={"text": "body", "label": "stars"})).labels == ("a", "b")
    with pytest.raises(ArgumentError, match="columns: 'body'"):
        settings("sentiment", root, columns="body")
    images = written(tmp_path / "i", {k: v for k, v in yolo("0 .5 .5 .2 .2").items() if k != "labels/1.txt"})
    boxes = use_case_named("detection")
    with pytest.raises(DataError, match="--missing-labels background"):
        read_data(boxes, settings("detection", images))
    assert len(read_data(boxes, settings("detection", images, missing_labels="background")).train) == 4
    with pytest.raises(ArgumentError, match="columns: the data of cv-detection have none"):
        read_data(boxes, settings("detection", images, columns={"text": "body"}))
    with pytest.raises(ArgumentError, match="missing_labels: 'no'"):
        settings("detection", images, missing_labels="no")
