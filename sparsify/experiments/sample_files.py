"""Samples of any model, from files: arrays in .npz and .npy, images, texts, or what a function gives.

A model says the names, types and shapes of its inputs; what does not fit them is an error with file and line, before
any work begins.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsify.errors import ArgumentError, DataError, DataFileError, did_you_mean, first_line
from sparsify.experiments.batches import ImagePreprocessing
from sparsify.experiments.columns import class_of, string_of
from sparsify.experiments.images import decoded, is_image
from sparsify.experiments.rows import ROW_ENDINGS
from sparsify.experiments.sources import entries, existing, files_below, split_named
from sparsify.experiments.text import CLASSES, PAIRS, TEXTS
from sparsify.experiments.text_parts import parts_of

if TYPE_CHECKING:
    from torch import Tensor

__all__: list[str] = []

LABELS = ("labels", "label", "targets", "target", "y")
"""Names of arrays that are labels where the model has no input of that name."""
PREPROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True)
class InputForm:
    """One input of a model.

    Attributes:
        name: of the input, or of the parameter of a forward.
        dtype: as numpy names it; None where it is not known.
        shape: with the batch; None stands for a size that is free, and for all of it where nothing is known.
    """

    name: str
    dtype: str | None = None
    shape: tuple[int | None, ...] | None = None

    def checked(self, value: np.ndarray, where: str) -> np.ndarray:
        """One sample, with an axis for the batch and in the type of the input.

        Raises:
            DataError: it does not fit.
        """
        if self.shape is None or value.ndim == len(self.shape) - 1:
            whole = value[None]
        elif value.ndim == len(self.shape) and value.shape[0] == 1:
            whole = value
        else:
            raise DataError(
                f"{where}: {self.name!r} has the shape {list(value.shape)}, expected one sample without the batch: "
                f"{_shape_text(self.shape[1:])}."
            )
        if self.shape is not None:
            for size, wanted in zip(whole.shape[1:], self.shape[1:], strict=True):
                if wanted is not None and size != wanted:
                    raise DataError(
                        f"{where}: {self.name!r} has the shape {list(whole.shape[1:])}, expected "
                        f"{_shape_text(self.shape[1:])}."
                    )
        return self.typed(whole, where)

    def typed(self, value: np.ndarray, where: str) -> np.ndarray:
        """`value` in the type of the input, where that loses nothing but precision.

        Raises:
            DataError: it is of another kind, or holds NaN or infinity.
        """
        if value.dtype.kind not in "biuf":
            raise DataError(f"{where}: {self.name!r} holds {value.dtype}, expected numbers.")
        if value.dtype.kind == "f" and not bool((value < math.inf).all()):
            raise DataError(f"{where}: {self.name!r} holds NaN or infinity; take that sample out.")
        if self.dtype is None:
            return value.astype(np.float32) if value.dtype == np.float64 else value
        wanted = np.dtype(self.dtype)
        if value.dtype == wanted:
            return value
        if (value.dtype.kind == "f") != (wanted.kind == "f"):
            raise DataError(f"{where}: {self.name!r} holds {value.dtype}, expected {wanted}.")
        if wanted.kind in "iu" and value.size:
            least, most = int(value.min()), int(value.max())
            if least < np.iinfo(wanted).min or most > np.iinfo(wanted).max:
                raise DataError(f"{where}: {self.name!r} holds {least} to {most}, which {wanted} cannot say.")
        return value.astype(wanted)


@dataclass(frozen=True)
class ImageForm:
    """The way from an image to an input, where neither the model nor a preprocessor_config.json says it.

    Attributes:
        size: (height, width) in pixels; None: that of the input.
        mean, std: of each channel, of values from 0 to 1; None: as a preprocessor_config.json says, else 0 and 1.
        preprocessor: folder with a preprocessor_config.json; None: that of the images is looked for.
    """

    size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    preprocessor: str | os.PathLike[str] | None = None


@dataclass(frozen=True)
class FileSamples:
    """Samples by the inputs of a model, each with a batch of one, in the order of their files.

    Attributes:
        rows: arrays by input.
        labels: of each sample; None where there are none.
        names: of the classes; () where they have none.
        notes: what was assumed.
    """

    rows: tuple[Mapping[str, np.ndarray], ...]
    labels: tuple[Any, ...] | None
    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def samples_from_files(
    source: str | os.PathLike[str],
    inputs: Sequence[InputForm],
    *,
    most: int,
    images: ImageForm | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    max_length: int | None = None,
) -> FileSamples:
    """Samples from a file or a folder, at most `most`, evenly over the whole.

    Args:
        source: folder of .npz files (one sample each: keys are the inputs, arrays are without the batch), of .npy files
            (one sample each, for a model of one input), of images, or of one folder of images for each class; or one
            .npz or .npy file with samples along its first axis; or a file or folder of csv, tsv, json or jsonl with
            texts.
        inputs: of the model.
        most: number of samples.
        images: as there.
        tokenizer: folder of the tokenizer of transformers for texts; None: `source` itself.
        max_length: tokens of a text; None: that of the input, else 128.

    Raises:
        DataError: something is wrong with a file, or with a line of it.
        ArgumentError: texts without a tokenizer.
    """
    root = existing(Path(source))
    if root.is_file():
        ending = root.suffix.lower()
        if ending in (".npz", ".npy"):
            return _stacked(root, inputs, most)
        if ending in ROW_ENDINGS:
            return _text_samples(root, inputs, most, tokenizer, max_length)
        if is_image(root):
            return _images([root], None, (), inputs, most, images or ImageForm(), root.parent)
        raise DataError(
            f"{root}: a file of samples ends in .npz, .npy or {', '.join(ROW_ENDINGS)}, or is an image; this one "
            f"ends in {root.suffix!r}."
        )
    files = files_below(root)
    by_ending: dict[str, list[Path]] = {}
    for file in files:
        by_ending.setdefault(file.suffix.lower(), []).append(file)
    for ending in (".npz", ".npy"):
        if ending in by_ending:
            return _arrays(root, by_ending[ending], inputs, most)
    pictures = [file for file in files if is_image(file)]
    if pictures:
        return _image_folder(root, pictures, inputs, most, images or ImageForm())
    if any(ending in by_ending for ending in ROW_ENDINGS):
        return _text_samples(root, inputs, most, tokenizer, max_length)
    raise DataError(
        f"{root}: no samples in it, expected input0.npz, input1.npz, ..., .npy files, images, or texts in csv, json or "
        "jsonl."
    )


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, evenly over the whole.

    >>> evenly(10, 4), evenly(3, 4)
    ([0, 2, 5, 7], [0, 1, 2])
    """
    return list(range(count)) if count <= most else [at * count // most for at in range(most)]


# ------------------------------------------------------------------ arrays


def _arrays(root: Path, files: list[Path], inputs: Sequence[InputForm], most: int) -> FileSamples:
    """A file for each sample."""
    files = sorted(files, key=lambda file: _natural(file.relative_to(root).as_posix()))
    rows: list[dict[str, np.ndarray]] = []
    labels: list[Any] = []
    notes = () if len(files) <= most else (f"{most} of {len(files)} files, evenly over the whole.",)
    for number in evenly(len(files), most):
        file = files[number]
        content = _loaded(file)
        if isinstance(content, np.ndarray):
            content = {_only(inputs, file).name: content}
        row, label = _row(file, content, inputs)
        if rows and (label is None) != (not labels):
            raise DataError(f"{file}: {'no label' if label is None else 'a label'}, unlike the files before it.")
        rows.append(row)
        if label is not None:
            labels.append(label)
    return FileSamples(tuple(rows), tuple(labels) or None, (), notes)


def _row(
    file: Path, content: Mapping[str, np.ndarray], inputs: Sequence[InputForm]
) -> tuple[dict[str, np.ndarray], Any]:
    names = [form.name for form in inputs]
    for form in inputs:
        if form.name not in content:
            raise DataError(
                f"{file}: no array {form.name!r}, expected one for each input; there are "
                f"{', '.join(map(repr, content)) or 'none'}.{did_you_mean(form.name, content, 1)}"
            )
    other = [key for key in content if key not in names]
    label = next((key for key in LABELS if key in other), None)
    if strange := [key for key in other if key != label]:
        raise DataError(
            f"{file}: the array {strange[0]!r} is no input, expected {', '.join(map(repr, names))}, and a label."
            f"{did_you_mean(strange[0], names, 1)}"
        )
    row = {form.name: form.checked(content[form.name], str(file)) for form in inputs}
    return row, None if label is None else _one_label(content[label])


def _stacked(file: Path, inputs: Sequence[InputForm], most: int) -> FileSamples:
    """All samples in one file, along the first axis."""
    content = _loaded(file)
    if isinstance(content, np.ndarray):
        content = {_only(inputs, file).name: content}
        beside = next((file.parent / f"{name}.npy" for name in LABELS if (file.parent / f"{name}.npy").is_file()), None)
        if beside is not None:
            labels = _loaded(beside)
            assert isinstance(labels, np.ndarray)
            content = {**content, "labels": labels}
    names = [form.name for form in inputs]
    lengths = {key: len(value) if value.ndim else 0 for key, value in content.items()}
    count = lengths[next(iter(lengths))]
    if any(length != count for length in lengths.values()):
        text = ", ".join(f"{key} {length}" for key, length in lengths.items())
        raise DataError(f"{file}: arrays of different lengths, expected one entry for each sample: {text}.")
    if not count:
        raise DataError(f"{file}: no sample in it.")
    label = next((key for key in LABELS if key in content and key not in names), None)
    rows = []
    for number in evenly(count, most):
        one = {key: value[number] for key, value in content.items()}
        rows.append(_row(Path(f"{file}[{number}]"), one, inputs)[0])
    found = None if label is None else tuple(_one_label(content[label][number]) for number in evenly(count, most))
    notes = () if count <= most else (f"{most} of {count} samples, evenly over the whole.",)
    return FileSamples(tuple(rows), found, (), notes)


def _loaded(file: Path) -> np.ndarray | dict[str, np.ndarray]:
    try:
        with file.open("rb") as opened:
            content: Any = np.load(opened, allow_pickle=False)
            if isinstance(content, np.ndarray):
                return content
            found = {key: content[key] for key in content.files}
    except DataFileError:
        raise
    except Exception as error:  # numpy, zipfile and zlib raise many types for a broken file.
        raise DataError(f"{file}: cannot be read as arrays: {first_line(error)}.") from error
    if not found:
        raise DataError(f"{file}: no array in it.")
    return found


def _one_label(value: np.ndarray) -> Any:
    return value.item() if np.size(value) == 1 and np.ndim(value) <= 1 else value


def _only(inputs: Sequence[InputForm], where: Path) -> InputForm:
    if len(inputs) != 1:
        names = ", ".join(repr(form.name) for form in inputs)
        raise DataError(f"{where}: one array, but the model has the inputs {names}; give .npz files with one for each.")
    return inputs[0]


def _natural(text: str) -> list[Any]:
    """input2 before input10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


def _shape_text(shape: Iterable[int | None]) -> str:
    return f"[{', '.join('any' if size is None else str(size) for size in shape)}]"


# ------------------------------------------------------------------ images


def _image_folder(
    root: Path, pictures: list[Path], inputs: Sequence[InputForm], most: int, form: ImageForm
) -> FileSamples:
    if any(is_image(one) for one in entries(root) if one.is_file()):
        return _images(pictures, None, (), inputs, most, form, root)
    folders = [one for one in entries(root) if one.is_dir()]
    if len(folders) == 1 and not any(one.is_dir() for one in entries(folders[0])):
        return _images(pictures, None, (), inputs, most, form, root)
    if all(split_named(one.name) for one in folders):
        # train/ and val/ with the classes in them.
        folders = [one for part in folders for one in entries(part) if one.is_dir()]
    names = sorted({one.name for one in folders})
    labelled = [(file, names.index(one.name)) for one in folders for file in files_below(one) if is_image(file)]
    return _images([file for file, _ in labelled], [label for _, label in labelled], names, inputs, most, form, root)


def _images(
    files: list[Path],
    labels: list[int] | None,
    names: Sequence[str],
    inputs: Sequence[InputForm],
    most: int,
    form: ImageForm,
    root: Path,
) -> FileSamples:
    target = next((each for each in inputs if each.shape is None or len(each.shape) == 4), None)
    if target is None or len(inputs) != 1:
        shapes = ", ".join(f"{each.name} {each.shape}" for each in inputs)
        raise DataError(f"{root}: images, but the inputs of the model are {shapes}: images need one input of rank 4.")
    notes = []
    shape = target.shape or (None, 3, None, None)
    last = shape[1] not in (1, 3) and shape[3] in (1, 3)
    channels = (shape[3] if last else shape[1]) or 3
    if channels not in (1, 3):
        raise DataError(f"{root}: images have 1 or 3 channels, input {target.name!r} has {channels}.")
    sides = shape[1:3] if last else shape[2:4]
    folder = form.preprocessor or (root if (root / PREPROCESSOR).is_file() else None)
    if form.preprocessor is not None and not (Path(form.preprocessor) / PREPROCESSOR).is_file():
        raise DataFileError(f"{Path(form.preprocessor) / PREPROCESSOR}: there is no such file.")
    size = form.size
    fixed = None if sides[0] is None or sides[1] is None else (sides[0], sides[1])
    if size is not None and fixed is not None and size != fixed:
        raise ArgumentError(f"image size {size[0]}x{size[1]}: input {target.name!r} is fixed to {fixed[0]}x{fixed[1]}.")
    known = ImagePreprocessing.of(None if folder is None else str(folder), None, size or fixed)
    if size is None and fixed is None and folder is None:
        notes.append(f"images are resized to {known.height}x{known.width}: input {target.name!r} has no fixed size.")
    mean, std = form.mean, form.std
    if mean is None:
        mean = known.mean if folder is not None else (0.0,) * channels
    if std is None:
        std = known.std if folder is not None else (1.0,) * channels
    if form.mean is None and form.std is None and folder is None and target.dtype != "uint8":
        notes.append("images are divided by 255 and not normalized: there are no mean and std, and no preprocessor.")
    for what, said in (("mean", mean), ("std", std)):
        if len(said) not in (1, channels) or not all(math.isfinite(value) for value in said):
            raise ArgumentError(f"{what}: {said!r}: give one number for each of {channels} channels.")
    if any(value <= 0 for value in std):
        raise ArgumentError(f"std: {std!r}: give numbers above 0.")
    rows = []
    chosen = evenly(len(files), most)
    for number in chosen:
        image = decoded(files[number], channels).resize((known.width, known.height), known.resample)
        values: np.ndarray = np.asarray(image)
        values = values[:, :, None] if values.ndim == 2 else values
        if target.dtype != "uint8":
            values = (values.astype(np.float32) / 255.0 - np.array(mean, np.float32)) / np.array(std, np.float32)
        values = values if last else values.transpose(2, 0, 1)
        rows.append({target.name: target.typed(np.ascontiguousarray(values)[None], str(files[number]))})
    if len(chosen) < len(files):
        notes.append(f"{len(chosen)} of {len(files)} images, evenly over the whole.")
    found = None if labels is None else tuple(labels[number] for number in chosen)
    return FileSamples(tuple(rows), found, tuple(names), tuple(notes))


# ------------------------------------------------------------------ texts


def _text_samples(
    root: Path,
    inputs: Sequence[InputForm],
    most: int,
    tokenizer: str | os.PathLike[str] | None,
    max_length: int | None,
) -> FileSamples:
    parts = parts_of(root)
    rows = [*parts.train, *(parts.val[0] if parts.val else [])]
    there = list(rows[0].values)
    first, second = next((pair for pair in PAIRS if set(pair) <= set(there)), (None, None))
    if first is None:
        first = next((name for name in TEXTS if name in there), None)
    if first is None and len(there) == 1:
        first = there[0]
    if first is None:
        raise DataError(
            f"{rows[0].where}: the columns are {', '.join(map(repr, there))}, expected a text: "
            f"{' or '.join(map(repr, TEXTS))}."
        )
    label = next((name for name in CLASSES if name in there and name not in (first, second)), None)
    reader = _tokenizer(tokenizer, root)
    fixed = next((form.shape[1] for form in inputs if form.shape is not None and len(form.shape) == 2), None)
    length = max_length or fixed or 128
    if fixed is not None and max_length not in (None, fixed):
        raise ArgumentError(f"max_length={max_length}: the input is fixed to {fixed} tokens.")
    chosen = evenly(len(rows), most)
    found, labels = [], []
    for number in chosen:
        row = rows[number]
        other = string_of(row, second) if second else None
        encoded = reader(string_of(row, first), other, truncation=True, padding="max_length", max_length=length)
        arrays = {}
        for form in inputs:
            if form.name not in encoded:
                raise DataError(
                    f"{root}: the tokenizer gives {', '.join(map(repr, encoded))}, not the input {form.name!r}."
                )
            arrays[form.name] = form.checked(np.asarray(encoded[form.name], form.dtype or np.int64), row.where)
        found.append(arrays)
        if label is not None:
            labels.append(class_of(row, label))
    names: tuple[str, ...] = ()
    if labels and not all(isinstance(value, int) for value in labels):
        names = parts.names_of(label or "") or tuple(sorted({str(value) for value in labels}))
        number_of = {name: number for number, name in enumerate(names)}
        if unknown := [value for value in labels if str(value) not in number_of]:
            raise DataError(f"{root}: the label {unknown[0]!r} is none of {', '.join(names[:10])}.")
        labels = [number_of[str(value)] for value in labels]
    notes = () if len(chosen) == len(rows) else (f"{len(chosen)} of {len(rows)} texts, evenly over the whole.",)
    return FileSamples(tuple(found), tuple(labels) or None, names, notes)


def _tokenizer(folder: str | os.PathLike[str] | None, root: Path) -> Any:
    place = Path(folder) if folder is not None else root if root.is_dir() else root.parent
    there = place.is_dir() and any((place / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    if not there:
        said = f"{place}: no tokenizer in it" if folder is not None else f"{root}: texts, and no tokenizer"
        raise ArgumentError(f"{said}; give tokenizer=, the folder with tokenizer.json or tokenizer_config.json.")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        from sparsify.errors import install_line

        raise ArgumentError(f"texts need transformers: {install_line('experiments')}.") from error
    try:
        return AutoTokenizer.from_pretrained(str(place), local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise many types.
        raise DataError(f"{place}: the tokenizer cannot be read: {first_line(error)}") from error


# ------------------------------------------------------------------ batches


def as_batches(rows: Sequence[Mapping[str, np.ndarray]], size: int) -> Iterator[dict[str, Tensor]]:
    """Samples as batches of `size`, those of one shape together in their order; a last one may be smaller.

    Args:
        rows: with a batch of one.
        size: samples of a batch.
    """
    import torch

    part: list[Mapping[str, np.ndarray]] = []

    def whole() -> dict[str, Tensor]:
        return {name: torch.from_numpy(np.concatenate([row[name] for row in part])) for name in part[0]}

    for row in rows:
        if part and (len(part) == size or any(row[name].shape != part[0][name].shape for name in row)):
            yield whole()
            part = []
        part.append(row)
    if part:
        yield whole()
