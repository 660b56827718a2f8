"""Boxes and polygons in the layout of YOLO: images in images/, and for each a .txt file of the same name in labels/.

A line of a label file is `class x y width height` (a box) or `class x1 y1 x2 y2 x3 y3 ...` (a polygon), all but the
class in fractions of the image. The class is a number, or its name. An image without an object has an empty file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from sparsify.errors import ArgumentError, DataError, did_you_mean, first_line
from sparsify.experiments.images import content_of, descended, is_image, look_over
from sparsify.experiments.samples import Box, BoxedImage, DataSet, Outline, OutlinedImage
from sparsify.experiments.sources import SPLITS, entries, existing, files_below, summed_up, text_in
from sparsify.experiments.splits import USUAL_SPLIT, Found, SeededSplit, completed

__all__: list[str] = []

MissingLabels = Literal["error", "background"]
NAME_FILES = ("classes.txt", "obj.names")
A_BOX = "a box has 5: class x y width height"
A_POLYGON = "a polygon has 7 or more, an odd number: class x1 y1 x2 y2 x3 y3"


@dataclass(frozen=True)
class LabelLine:
    """A line of a label file: a class, as it stands there, and 4 or at least 6 numbers.

    Args:
        where: "file:line" of it.
        label: class, a number or a name.
        numbers: x, y, width, height, or corners of a polygon.
    """

    where: str
    label: str
    numbers: tuple[float, ...]


@dataclass(frozen=True)
class Layout:
    """Where the images of each part stand, and what the classes are called.

    Args:
        root: folder of the data.
        train: images to train with, or all.
        val: images to measure with, and the name of where they stand; None where nothing names them.
        names: of the classes; None where nothing names them.
        said: files that say the above.
        notes: what its user should know.
    """

    root: Path
    train: list[Path]
    val: tuple[list[Path], str] | None
    names: tuple[str, ...] | None
    said: tuple[Path, ...]
    notes: list[str]


@dataclass(frozen=True)
class ImageLines:
    """An image with the lines of its label file."""

    image: Path
    file: Path
    shapes: tuple[LabelLine, ...]


def read_boxes(
    path: str | Path, missing_labels: MissingLabels = "error", split: SeededSplit = USUAL_SPLIT
) -> DataSet[BoxedImage]:
    """Images with the boxes of their objects. Of a polygon the box around it is taken.

    Args:
        path: folder with images/ and labels/, parts in them or around them (train, val or valid), or a .yaml file with
            `train`, `val`, `names` and `path`, relative to that file.
        missing_labels: an image without a label file is an "error", or "background": an image without an object.
        split: how a part to measure with is taken where none is named.

    Raises:
        DataError: with file and line: a label file is missing, has no image, or says something that is no box.
    """
    layout, train, val, names, notes = _parts_read(path, missing_labels)
    polygons = sum(len(shape.numbers) > 4 for one in [*train, *(val or [])] for shape in one.shapes)
    if polygons:
        notes.append(f"of {polygons} polygons the boxes around them are taken.")
    numbers = {name: number for number, name in enumerate(names)}

    def sample(one: ImageLines, size: tuple[int, int]) -> BoxedImage:
        boxes = tuple(Box(_number(shape, numbers), *_box_of(shape)) for shape in one.shapes)
        return BoxedImage(one.file, 0, one.image, *size, boxes)

    found = _found(layout, train, val, names, notes, sample)
    return completed(found, split, lambda one: content_of(one.image))


def read_outlines(
    path: str | Path, missing_labels: MissingLabels = "error", split: SeededSplit = USUAL_SPLIT
) -> DataSet[OutlinedImage]:
    """Images with the polygons of their regions. Label 0 is "background": every pixel that is in none.

    Where the first name of the classes is "background", that is it; else it is put before them.

    Args:
        path: as for `read_boxes`.
        missing_labels: an image without a label file is an "error", or "background".
        split: how a part to measure with is taken where none is named.

    Raises:
        DataError: with file and line: a label file is missing, has no image, or says something that is no polygon.
    """
    layout, train, val, names, notes = _parts_read(path, missing_labels)
    for one in [*train, *(val or [])]:
        for shape in one.shapes:
            if len(shape.numbers) == 4:
                raise DataError(f"{shape.where}: 5 fields are a box, {A_POLYGON}. Boxes are of use case cv-detection.")
    own = names[:1] == ("background",)
    labels = names if own else ("background", *names)
    numbers = {name: number + (not own) for number, name in enumerate(names)}

    def sample(one: ImageLines, size: tuple[int, int]) -> OutlinedImage:
        outlines = tuple(
            Outline(_number(shape, numbers), tuple(zip(shape.numbers[::2], shape.numbers[1::2], strict=True)))
            for shape in one.shapes
        )
        return OutlinedImage(one.file, 0, one.image, *size, outlines)

    found = _found(layout, train, val, labels, notes, sample)
    return completed(found, split, lambda one: content_of(one.image))


def _found(
    layout: Layout,
    train: Sequence[ImageLines],
    val: Sequence[ImageLines] | None,
    labels: tuple[str, ...],
    notes: list[str],
    sample: Any,
) -> Found[Any]:
    every = [*train, *(val or [])]
    images = [one.image for one in every]
    sizes = dict(zip(images, look_over(images), strict=True))
    files = {one.file for one in every if one.file != one.image}.union(layout.said)
    measured = None
    if val is not None and layout.val is not None:
        measured = ([sample(one, sizes[one.image]) for one in val], layout.val[1])
    trained = [sample(one, sizes[one.image]) for one in train]
    fingerprint = summed_up(layout.root, files, images)
    return Found(trained, measured, labels, fingerprint, tuple(sorted({*files, *images})), tuple(notes))


def _parts_read(
    path: str | Path, missing_labels: MissingLabels
) -> tuple[Layout, list[ImageLines], list[ImageLines] | None, tuple[str, ...], list[str]]:
    if missing_labels not in ("error", "background"):
        raise ArgumentError(f"missing_labels is {missing_labels!r}, expected 'error' or 'background'.")
    layout = layout_of(existing(path))
    notes = list(layout.notes)
    train = _with_labels(layout.train, missing_labels, notes)
    val = _with_labels(layout.val[0], missing_labels, notes) if layout.val else None
    shapes = [shape for one in [*train, *(val or [])] for shape in one.shapes]
    if not any(one.shapes for one in train):
        raise DataError(f"{layout.root}: no object in any of {len(train)} label files, expected some to learn from.")
    if val is not None and not any(one.shapes for one in val):
        raise DataError(f"{layout.root}: no object in any of {len(val)} label files of val, expected some to measure.")
    names = layout.names or _names_from(shapes)
    trained = {_class_index(shape, names) for one in train for shape in one.shapes}
    for one in val or []:
        for shape in one.shapes:
            if (index := _class_index(shape, names)) not in trained and layout.names is None:
                raise DataError(
                    f"{shape.where}: the class {names[index]!r} is not in the training data, expected one of "
                    f"{', '.join(names[i] for i in sorted(trained))}."
                )
    if unseen := [name for index, name in enumerate(names) if index not in trained]:
        notes.append(f"no object to train with of {', '.join(unseen[:5])}{' ...' if len(unseen) > 5 else ''}.")
    named = [ImageLines(o.image, o.file, tuple(_renamed(shape, names) for shape in o.shapes)) for o in train]
    measured = [ImageLines(o.image, o.file, tuple(_renamed(s, names) for s in o.shapes)) for o in val] if val else None
    return layout, named, measured, names, notes


def _renamed(shape: LabelLine, names: tuple[str, ...]) -> LabelLine:
    return LabelLine(shape.where, names[_class_index(shape, names)], shape.numbers)


def _number(shape: LabelLine, numbers: Mapping[str, int]) -> int:
    return numbers[shape.label]


def _class_index(shape: LabelLine, names: tuple[str, ...]) -> int:
    """The place of a shape's class in the names, whether a number or a name stands in the file."""
    if shape.label in names and not shape.label.isdigit():
        return names.index(shape.label)
    try:
        value = float(shape.label)
    except ValueError:
        known = f"one of {', '.join(names[:10])}{' ...' if len(names) > 10 else ''}"
        raise DataError(
            f"{shape.where}: the class {shape.label!r} is not known, expected {known}, or its number."
            f"{did_you_mean(shape.label, names)}"
        ) from None
    if not value.is_integer() or not 0 <= value < len(names):
        raise DataError(
            f"{shape.where}: the class {shape.label} is none of the {len(names)}, expected 0 to {len(names) - 1}."
        )
    return int(value)


def _names_from(shapes: Sequence[LabelLine]) -> tuple[str, ...]:
    """Names of the classes where no file says them: the numbers up to the largest, or the words in their order."""
    words = sorted({shape.label for shape in shapes if not _is_finite_number(shape.label)})
    if words:
        if number := next((shape for shape in shapes if _is_finite_number(shape.label)), None):
            raise DataError(
                f"{number.where}: the class {number.label} is a number, expected a name as {words[0]!r} elsewhere; or "
                f"name the classes in {NAME_FILES[0]}."
            )
        return tuple(words)
    for shape in shapes:
        if not (value := float(shape.label)).is_integer() or not 0 <= value < 10_000:
            raise DataError(f"{shape.where}: the class {shape.label} is no class, expected 0, 1, 2 ... or a name.")
    return tuple(map(str, range(max(int(float(shape.label)) for shape in shapes) + 1)))


def _is_finite_number(label: str) -> bool:
    try:
        return math.isfinite(float(label))
    except ValueError:
        return False


def _box_of(shape: LabelLine) -> tuple[float, float, float, float]:
    if len(shape.numbers) == 4:
        x, y, width, height = shape.numbers
        return x, y, width, height
    across, down = shape.numbers[::2], shape.numbers[1::2]
    left, right, top, bottom = min(across), max(across), min(down), max(down)
    return (left + right) / 2, (top + bottom) / 2, right - left, bottom - top


def _with_labels(images: Sequence[Path], missing: MissingLabels, notes: list[str]) -> list[ImageLines]:
    found, background, by_file = [], 0, dict[Path, Path]()
    for image in images:
        file = label_file(image)
        if (other := by_file.setdefault(file, image)) != image:
            raise DataError(
                f"{image}: {other.name} has the same label file, {file}, expected a name of its own for each."
            )
        if file.is_file():
            found.append(ImageLines(image, file, shapes_of(file)))
        elif missing == "background":
            background += 1
            found.append(ImageLines(image, image, ()))
        else:
            raise DataError(
                f"{image}: its label file {file} is missing, expected one for each image, empty where there is no "
                "object (--missing-labels background takes such images as they are)."
            )
    if background:
        notes.append(f"{background} images have no label file and are taken as background.")
    for folder in sorted({file.parent for file in by_file if file.parent.is_dir()}):
        for file in entries(folder):
            if file.suffix == ".txt" and file not in by_file and file.name not in NAME_FILES:
                _refuse_stray(file, images)
    return found


def _refuse_stray(file: Path, images: Sequence[Path]) -> None:
    folder = _swapped(file.parent, "labels", "images")
    there = folder.is_dir() and any(one.stem == file.stem and is_image(one) for one in entries(folder))
    if not there:  # an image of another part may stand beside it, under a list of images
        raise DataError(f"{file}: no image {folder / file.stem}.*, expected one for each label file.")


def label_file(image: Path) -> Path:
    """The label file of an image: the last folder called images becomes labels, the ending .txt."""
    return _swapped(image.parent, "images", "labels") / f"{image.stem}.txt"


def _swapped(folder: Path, name: str, other: str) -> Path:
    parts = list(folder.parts)
    for place in range(len(parts) - 1, -1, -1):
        if parts[place] == name:
            parts[place] = other
            return Path(*parts)
    return folder


def shapes_of(file: Path) -> tuple[LabelLine, ...]:
    """The lines of a label file.

    Raises:
        DataError: with file and line: a line is neither a box nor a polygon within its image.
    """
    if not file.stat().st_size:
        return ()
    try:
        text = text_in(file)
    except DataError as error:
        if "is empty" in str(error):  # blank lines alone
            return ()
        raise
    return tuple(
        _shape(f"{file}:{line}", content.split())
        for line, content in enumerate(text.replace("\r\n", "\n").split("\n"), 1)
        if content.strip()
    )


def _shape(where: str, fields: list[str]) -> LabelLine:
    count = len(fields)
    if count != 5 and (count < 7 or count % 2 == 0):
        raise DataError(f"{where}: {count} {'field' if count == 1 else 'fields'}, {A_BOX}; {A_POLYGON}.")
    numbers = []
    names = ("x", "y", "width", "height") if count == 5 else tuple("xy" * ((count - 1) // 2))
    for name, field in zip(names, fields[1:], strict=True):
        try:
            value = float(field)
        except ValueError:
            raise DataError(f"{where}: {name} is {field!r}, expected a number from 0 to 1.") from None
        if not 0 <= value <= 1:
            raise DataError(f"{where}: {name} is {field}, expected a fraction of the image, from 0 to 1.")
        if name in ("width", "height") and value == 0:
            raise DataError(f"{where}: {name} is {field}, expected a box that is wider and higher than 0.")
        numbers.append(value)
    if count > 5 and (len(set(numbers[::2])) < 2 or len(set(numbers[1::2])) < 2):
        raise DataError(f"{where}: the polygon has no area, expected at least three corners that are no line.")
    return LabelLine(where, fields[0], tuple(numbers))


def layout_of(path: Path) -> Layout:
    """Where the images are: in a folder, as it is laid out or as the .yaml file in it says, or as a .yaml file says."""
    if path.is_file():
        if path.suffix.lower() not in (".yaml", ".yml"):
            raise DataError(f"{path}: expected a folder with images/ and labels/, or a .yaml file that names them.")
        return _from_yaml(path)
    notes: list[str] = []
    here = any(one.suffix.lower() in (".yaml", ".yml") for one in entries(path))
    base = path if here else descended(path, notes, ("images",))
    said = [one for one in entries(base) if one.suffix.lower() in (".yaml", ".yml") and _names_data(one)]
    if len(said) > 1:
        raise DataError(f"{base}: {said[0].name} and {said[1].name} both name data, expected one; give its path.")
    if said:
        found = _from_yaml(said[0])
        return Layout(found.root, found.train, found.val, found.names, found.said, [*notes, *found.notes])
    return _from_folders(base, notes)


def _names_data(file: Path) -> bool:
    return "train" in _mapping(file)


def _mapping(file: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(text_in(file))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise DataError(
            f"{file}{line}: no YAML ({getattr(error, 'problem', None) or first_line(error)}), expected train:, val:, "
            "names:."
        ) from error
    if not isinstance(value, dict):
        raise DataError(f"{file}: no mapping, expected train:, val: and names:.")
    return value


def _from_yaml(file: Path) -> Layout:
    value, notes = _mapping(file), list[str]()
    base = file.parent
    if value.get("path"):
        base = file.parent / str(value["path"])
        if not base.is_dir():
            raise DataError(
                f"{file}: path: there is no folder {base}, expected one, relative to the folder of the file."
            )
    if not value.get("train"):
        raise DataError(f"{file}: no train:, expected a folder of images (or a list, or a .txt file of paths).")
    if value.get("val") is None and (wrong := [key for key in ("valid", "validation") if key in value]):
        raise DataError(f"{file}: {wrong[0]}: is not known, expected val:.")
    train = _images_of(file, base, "train", value["train"], notes)
    val = None
    if value.get("val"):
        val = (_images_of(file, base, "val", value["val"], notes), f"val: {value['val']}")
        if {*train} == {*val[0]}:
            notes.append("train: and val: name the same images: what is measured is what was trained.")
        elif both := {*train} & {*val[0]}:
            raise DataError(f"{file}: {sorted(both)[0]} is in train: and in val:, expected it in one of them.")
    if value.get("test"):
        notes.append("not used: test:.")
    return Layout(base, train, val, _yaml_names(file, value), (file,), notes)


def _yaml_names(file: Path, value: dict[str, Any]) -> tuple[str, ...] | None:
    names, count = value.get("names"), value.get("nc")
    if isinstance(names, dict):
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise DataError(f"{file}: names: has the keys {list(names)[:5]}, expected 0 to {len(names) - 1}.")
        names = [names[number] for number in range(len(names))]
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise DataError(f"{file}: nc: is {count!r}, expected the number of classes.")
    if names is None:
        return None if count is None else tuple(map(str, range(count)))
    if not isinstance(names, list) or not names or not all(isinstance(name, str | int) for name in names):
        raise DataError(f"{file}: names: is {names!r}, expected a list of names.")
    if count is not None and count != len(names):
        raise DataError(f"{file}: nc: is {count}, but names: has {len(names)}, expected the same number.")
    return _each_once(file, [str(name) for name in names])


def _each_once(file: Path, names: Sequence[str]) -> tuple[str, ...]:
    if twice := [name for name in names if list(names).count(name) > 1]:
        raise DataError(f"{file}: two classes are called {twice[0]!r}, expected a name of its own for each.")
    return tuple(names)


def _images_of(file: Path, base: Path, key: str, value: Any, notes: list[str]) -> list[Path]:
    found: list[Path] = []
    for one in value if isinstance(value, list) else [value]:
        place = base / str(one)
        if not place.exists() and str(one).startswith("../") and (base / str(one)[3:]).exists():
            # Exports of Roboflow say so with train/ beside the file.
            place = base / str(one)[3:]
            notes.append(f"{key}: {one} is read as {str(one)[3:]}, since that is what is there.")
        if place.is_dir():
            below = place / "images" if (place / "images").is_dir() else place
            found += _images_in(below)
        elif place.is_file() and place.suffix == ".txt":
            for line, content in enumerate(text_in(place).splitlines(), 1):
                if content.strip():
                    image = place.parent / content.strip()
                    image = image if image.is_file() else base / content.strip()
                    if not image.is_file():
                        raise DataError(f"{place}:{line}: there is no image {content.strip()}, expected one.")
                    found.append(image)
        else:
            raise DataError(f"{file}: {key}: there is no {place}, expected a folder of images, relative to {base}.")
    if not found:
        raise DataError(f"{file}: {key}: no image in {value}, expected at least one.")
    return found


def _images_in(folder: Path) -> list[Path]:
    found = [file for file in files_below(folder) if is_image(file)]
    if not found:
        raise DataError(f"{folder}: no image in the folder, expected at least one (.png, .jpg ...).")
    return found


def _from_folders(base: Path, notes: list[str]) -> Layout:
    names_file = next(
        (file for name in NAME_FILES for file in (base / name, base / "labels" / name) if file.is_file()), None
    )
    names = None
    if names_file is not None:
        names = _each_once(names_file, [line.strip() for line in text_in(names_file).splitlines() if line.strip()])
    said = (names_file,) if names_file else ()
    inside = base / "images"
    folders = {one.name.lower(): one for one in entries(inside if inside.is_dir() else base) if one.is_dir()}
    parts: dict[str, Path] = {}
    for split, words in SPLITS.items():
        there = [folders[word] for word in words if word in folders]
        if len(there) > 1:
            raise DataError(f"{there[0].parent}: both {there[0].name}/ and {there[1].name}/, expected one of them.")
        if there:
            parts[split] = there[0]
    if not parts and not inside.is_dir():
        raise DataError(
            f"{base}: neither images/ nor train/ in the folder, expected images/ and labels/; it has "
            f"{', '.join(one.name for one in entries(base)[:5]) or 'nothing'}."
        )
    if not parts:
        return Layout(base, _images_in(inside), None, names, said, notes)
    if "train" not in parts:
        raise DataError(f"{next(iter(parts.values()))}: no folder called train beside it, expected one.")
    if loose := [one for one in entries(parts["train"].parent) if is_image(one)]:
        raise DataError(f"{loose[0]}: an image beside the folders of the parts, expected it in one of them.")

    def images(part: str) -> list[Path]:
        folder = parts[part]
        return _images_in(folder / "images" if (folder / "images").is_dir() else folder)

    key = next((key for key in ("val", "test") if key in parts), None)
    if key == "test":
        notes.append("there is no folder called val, so the test data are measured with.")
    elif "test" in parts:
        notes.append("not used: test/.")
    return Layout(base, images("train"), (images(key), f"{parts[key].name}/") if key else None, names, said, notes)
