"""Boxes and polygons in YOLO's layouts: what is read, and what every wrong one says."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsify.errors import ArgumentError, DataError
from sparsify.experiments.samples import Box, Outline
from sparsify.experiments.yolo import read_boxes, read_outlines
from tests.data_folders import Content, picture, written, yolo

pytest.importorskip("PIL")
BOX = "0 0.5 0.25 0.2 0.1\n"
TRIANGLE = "0 .1 .2 .5 .2 .5 .6\n"
NAMES = "bus\ncar\n"


def parts(train: str, val: str, label: str = BOX, other: str = BOX) -> dict[str, Content]:
    """Two parts, named by the folders of images with {} where labels is for the label files."""
    return yolo(label, 3, train.format("images"), train.format("labels")) | yolo(
        other, 3, val.format("images"), val.format("labels"), 20
    )


def test_a_box_is_read_as_it_stands_there(tmp_path: Path) -> None:
    data = read_boxes(written(tmp_path, yolo(BOX) | {"labels/1.txt": "", "labels/2.txt": "1 .5 .5 1 1\n" + BOX}))
    every = {one.image.name: one for one in [*data.train, *data.val]}
    assert data.labels == ("0", "1") and len(every) == 5
    assert every["0.png"].boxes == (Box(0, 0.5, 0.25, 0.2, 0.1),)
    assert (every["0.png"].width, every["0.png"].height) == (8, 6)
    assert every["0.png"].file == tmp_path / "labels" / "0.txt"
    assert every["1.png"].boxes == () and [box.label for box in every["2.png"].boxes] == [1, 0]


@pytest.mark.parametrize("text", [BOX.replace("\n", "\r\n"), "\ufeff" + BOX, BOX + "\n\n", "0.0 0.5 0.25 0.2 0.1"])
def test_ways_of_writing_a_line(tmp_path: Path, text: str) -> None:
    assert read_boxes(written(tmp_path, yolo(text))).train[0].boxes == (Box(0, 0.5, 0.25, 0.2, 0.1),)


def test_classes_are_numbers_or_names(tmp_path: Path) -> None:
    words = read_boxes(written(tmp_path / "a", yolo("car .5 .5 .2 .2\n") | {"labels/0.txt": "bus .5 .5 .1 .1"}))
    assert words.labels == ("bus", "car")
    named = read_boxes(written(tmp_path / "b", yolo("1 .5 .5 .2 .2\ncar .5 .5 .1 .1") | {"labels/classes.txt": NAMES}))
    assert named.labels == ("bus", "car") and [box.label for box in named.train[0].boxes] == [1, 1]
    assert named.notes == ("no object to train with of bus.",)


@pytest.mark.parametrize(
    ("files", "split"),
    [
        (parts("{}/train", "{}/val"), "given: val/"),
        (parts("train/{}", "valid/{}"), "given: valid/"),
        (parts("data/{}/train", "data/{}/val"), "given: val/"),
        (
            parts("train/{}", "valid/{}") | {"data.yaml": "train: train/images\nval: valid\nnames: [a]\n"},
            "given: val: valid",
        ),
        (
            parts("train/{}", "valid/{}")
            | {"data.yaml": "train: ../train/images\nval: ../valid/images\nnc: 1\nnames: {0: a}\n"},
            "given: val: ../valid/images",
        ),
        (parts("x/{}/t", "x/{}/v") | {"c.yaml": "path: x\ntrain: images/t\nval: [images/v]\nnames: [a]\n"}, "given"),
        (
            yolo(BOX)
            | {"d.yml": "train: t.txt\nval: v.txt\nnames: [a]\n"}
            | {"t.txt": "images/0.png\n", "v.txt": "images/1.png"},
            "given: val: v.txt",
        ),
        (yolo(BOX), "seeded: 1 of 5"),
    ],
)
def test_layouts(tmp_path: Path, files: dict[str, Content], split: str) -> None:
    data = read_boxes(written(tmp_path, files))
    assert data.split.startswith(split) and data.train and data.val
    assert {one.boxes[0].label for one in [*data.train, *data.val]} == {0}
    if said := next(iter(tmp_path.glob("*.y*ml")), None):
        assert read_boxes(said).fingerprint == data.fingerprint and data.labels == ("a",)


def test_a_path_of_a_yaml_file_is_relative_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = parts("sets/{}/train", "sets/{}/val") | {
        "conf/d.yaml": "path: ../sets\ntrain: images/train\nval: images/val\n"
    }
    root = written(tmp_path, files)
    monkeypatch.chdir(root)
    assert read_boxes("conf/d.yaml").labels == ("0",)


FAULTS: list[tuple[dict[str, Content], str]] = [
    ({}, "neither images/ nor train/ in the folder, .*it has nothing"),
    ({"images": None, "labels": None}, "images: no image in the folder"),
    (
        yolo(BOX) | {"labels/3.txt": BOX + "0 .5 .5 .2 .2 .9\n"},
        "labels/3.txt:2: 6 fields, a box has 5: class x y",
    ),
    (yolo(BOX) | {"labels/3.txt": "0 .5 .5 .2"}, "labels/3.txt:1: 4 fields, a box has 5"),
    (yolo(BOX) | {"labels/3.txt": "0"}, "labels/3.txt:1: 1 field, a box has 5"),
    (yolo(BOX) | {"labels/3.txt": BOX + "0 1.2 .5 .2 .2"}, "labels/3.txt:2: x is 1.2, expected a fraction"),
    (yolo(BOX) | {"labels/3.txt": "0 .5 .5 -.2 .2"}, "labels/3.txt:1: width is -.2, expected a fraction"),
    (yolo(BOX) | {"labels/3.txt": "0 .5 .5 .2 0"}, "labels/3.txt:1: height is 0, expected a box"),
    (yolo(BOX) | {"labels/3.txt": "0 nan .5 .2 .2"}, "labels/3.txt:1: x is nan, expected a fraction"),
    (yolo(BOX) | {"labels/3.txt": "0 a .5 .2 .2"}, "labels/3.txt:1: x is 'a', expected a number"),
    (yolo(BOX) | {"labels/3.txt": "-1 .5 .5 .2 .2"}, "labels/3.txt:1: the class -1 is no class"),
    (yolo(BOX) | {"labels/3.txt": "1.5 .5 .5 .2 .2"}, "labels/3.txt:1: the class 1.5 is no class"),
    (yolo(BOX) | {"labels/3.txt": "car .5 .5 .2 .2"}, "the class 0 is a number, expected a name as 'car'"),
    (yolo(BOX) | {"labels/3.txt": b"0 .5 .5 .2 \xb5"}, "labels/3.txt:1: byte 0xb5 is not UTF-8"),
    (yolo("2 .5 .5 .2 .2") | {"classes.txt": NAMES}, "labels/0.txt:1: the class 2 is none of the 2, expected 0 to 1"),
    (yolo("cra .5 .5 .2 .2") | {"classes.txt": NAMES}, "the class 'cra' is not known, .*Did you mean 'car'"),
    (yolo(BOX) | {"classes.txt": "a\na\n"}, "classes.txt: two classes are called 'a'"),
    (yolo("0 .1 .1 .5 .1 .5 .1 .3"), "labels/0.txt:1: 8 fields, a box has 5"),
    (yolo("0 .1 .1 .5 .1 .9 .1"), "labels/0.txt:1: the polygon has no area"),
    ({k: v for k, v in yolo(BOX).items() if k != "labels/2.txt"}, "images/2.png: its label file .*2.txt is missing"),
    (yolo(BOX) | {"labels/x.txt": ""}, "labels/x.txt: no image .*images/x"),
    (yolo(BOX) | {"images/3.gif": picture(3, "GIF")}, "3.png: 3.gif has the same label file"),
    (yolo(BOX) | {"images/3.png": "hello"}, "images/3.png: not an image that can be read"),
    (yolo(BOX) | {"images/3.png": picture(3)[:-30]}, "images/3.png: .*expected a whole image file"),
    (yolo(""), "no object in any of 5 label files"),
    (parts("{}/train", "{}/val", other="1 .5 .5 .2 .2"), "val/0.txt:1: the class '1' is not in the training data"),
    (parts("{}/train", "{}/val", other=""), "no object in any of 3 label files of val"),
    (parts("{}/train", "{}/val") | {"images/a.png": picture()}, "a.png: an image beside the folders of the parts"),
    (parts("{}/train", "{}/val") | {"images/valid/a.png": picture()}, "both val/ and valid/"),
    (yolo(BOX, 3, "images/val", "labels/val"), "no folder called train beside it"),
    (yolo(BOX) | {"d.yaml": "train: images\nnames: [a\n"}, "d.yaml:3: no YAML"),
    (yolo(BOX) | {"d.yaml": "train: images\nnc: 2\nnames: [a]\n"}, "d.yaml: nc: is 2, but names: has 1"),
    (yolo(BOX) | {"d.yaml": "train: images\nnames: {1: a}\n"}, "d.yaml: names: has the keys"),
    (yolo(BOX) | {"d.yaml": "train: images\nnc: many\n"}, "d.yaml: nc: is 'many', expected the number"),
    (yolo(BOX) | {"d.yaml": "train: images\nnames: 7\n"}, "d.yaml: names: is 7"),
    (yolo(BOX) | {"d.yaml": "train: imgs\nnames: [a]\n"}, "d.yaml: train: there is no .*imgs, expected a folder"),
    (yolo(BOX) | {"d.yaml": "path: nowhere\ntrain: images\n"}, "d.yaml: path: there is no folder"),
    (yolo(BOX) | {"d.yaml": "train: images\nvalid: images\n"}, "d.yaml: valid: is not known, expected val:"),
    (yolo(BOX) | {"d.yaml": "train: images\n", "e.yaml": "train: images\n"}, "d.yaml and e.yaml both name data"),
    (
        yolo(BOX) | {"d.yaml": "train: images\nval: v.txt\n", "v.txt": "images/0.png\n"},
        "0.png is in train: and in val",
    ),
    (yolo(BOX) | {"d.yaml": "train: t.txt\n", "t.txt": "images/0.png\nimages/9.png\n"}, "t.txt:2: there is no image"),
]


@pytest.mark.parametrize(("files", "message"), FAULTS, ids=[message[:40] for _, message in FAULTS])
def test_wrong_data_are_an_error_with_their_place(tmp_path: Path, files: dict[str, Content], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_boxes(written(tmp_path, files))
    assert "\n" not in str(caught.value)


def test_images_without_a_label_file_are_background_where_that_is_said(tmp_path: Path) -> None:
    root = written(tmp_path, {k: v for k, v in yolo(BOX).items() if k != "labels/2.txt"})
    data = read_boxes(root, missing_labels="background")
    assert sum(not one.boxes for one in [*data.train, *data.val]) == 1
    assert data.notes == ("1 images have no label file and are taken as background.",)
    with pytest.raises(ArgumentError, match="missing_labels is 'no'"):
        read_boxes(root, missing_labels="no")  # type: ignore[arg-type]


def test_a_polygon_is_a_region_and_the_box_around_it(tmp_path: Path) -> None:
    root = written(tmp_path, yolo(TRIANGLE) | {"classes.txt": "car\n"})
    regions = read_outlines(root)
    assert regions.labels == ("background", "car")
    assert regions.train[0].outlines == (Outline(1, ((0.1, 0.2), (0.5, 0.2), (0.5, 0.6))),)
    boxes = read_boxes(root)
    box = boxes.train[0].boxes[0]
    assert boxes.labels == ("car",) and box.label == 0
    assert (box.x, box.y, box.width, box.height) == pytest.approx((0.3, 0.4, 0.4, 0.4))
    assert boxes.notes == ("of 5 polygons the boxes around them are taken.",)


def test_a_background_among_the_names_is_the_background(tmp_path: Path) -> None:
    root = written(tmp_path, yolo(TRIANGLE.replace("0", "1", 1)) | {"classes.txt": "background\ncar\n"})
    regions = read_outlines(root)
    assert regions.labels == ("background", "car") and regions.train[0].outlines[0].label == 1


def test_a_box_is_no_region(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"labels/0.txt:1: 5 fields are a box, a polygon has 7 or more.*cv-detection"):
        read_outlines(written(tmp_path, yolo(BOX)))
