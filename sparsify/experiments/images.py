"""Image files: looked over when the data are read, decoded when a batch needs them; and a folder for each class."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sparsify.errors import DataError, did_you_mean, first_line
from sparsify.experiments.samples import DataSet, LabelledImage
from sparsify.experiments.sources import SPLITS, ends_of, entries, existing, files_below, summed_up
from sparsify.experiments.splits import USUAL_SPLIT, Found, SeededSplit, completed

if TYPE_CHECKING:
    from PIL.Image import Image

__all__: list[str] = []

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
DECODED_WHOLE = 64 * 2**20
"""Bytes of image files up to which every image is decoded when the data are read; of more, both ends are looked at."""


def is_image(path: Path) -> bool:
    """The ending of a file is that of an image, in whichever case."""
    return path.suffix.lower() in ENDINGS


@contextmanager
def _image_in(path: Path) -> Iterator[Image]:
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            # pillow warns of odd metadata that is not read here; of images that are too large it must not warn alone.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{path}: {first_line(error)} Expected an image of at most 89 million pixels.") from error
    except UnidentifiedImageError as error:
        size = path.stat().st_size
        state = "an empty file" if not size else "not an image that can be read"
        raise DataError(f"{path}: {state}, expected an image file ({', '.join(ENDINGS[:3])} ...).") from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError) as error:
        # Pillow raises what its decoders run into: OSError "image file is truncated", SyntaxError "broken PNG file".
        raise DataError(f"{path}: {first_line(error)}, expected a whole image file.") from error


def shown_size(path: Path, decode: bool) -> tuple[int, int]:
    """Width and height of an image in pixels, as it is shown: after the rotation that its EXIF data ask for.

    Args:
        path: image file.
        decode: every pixel is decoded; else only a file that does not end as its format ends is.

    Raises:
        DataError: the file is no image, or not a whole one.
    """
    with _image_in(path) as image:
        width, height = image.size
        turned = _turned(image)
        if decode or not _ends_well(path, image.format):
            image.load()
    return (height, width) if turned else (width, height)


def _turned(image: Image) -> bool:
    return image.getexif().get(0x0112) in (5, 6, 7, 8)


def _ends_well(path: Path, form: str | None) -> bool:
    size, first, last = ends_of(path)
    if form == "JPEG":
        return last.rstrip(b"\0").endswith(b"\xff\xd9")
    if form == "PNG":
        return last.endswith(b"IEND\xaeB`\x82")
    if form == "GIF":
        return last.endswith(b"\x3b")
    return form == "WEBP" and int.from_bytes(first[4:8], "little") + 8 <= size


def decoded(path: Path, channels: int = 3) -> Image:
    """An image as it is shown, in 8 bits: RGB, or grey with 1 channel.

    Raises:
        DataError: the file is no image, or not a whole one, or its values have no range of which 8 bits could be made.
    """
    import numpy as np
    from PIL import Image, ImageOps

    with _image_in(path) as image:
        shown = ImageOps.exif_transpose(image)
        if shown.mode.startswith("I;16"):
            # Pillow cuts 16 bits off at 255; the upper byte is the picture.
            # https://github.com/python-pillow/Pillow/issues/5991
            shown = Image.fromarray((np.asarray(shown) >> 8).astype("uint8"))
        elif shown.mode in ("I", "F"):
            raise DataError(f"{path}: values of 32 bits have no fixed range, expected an image of 8 or 16 bits.")
        return shown.convert("L" if channels == 1 else "RGB")


def look_over(images: Sequence[Path]) -> list[tuple[int, int]]:
    """Width and height of every image; the first that is none, or not a whole one, is an error."""
    decode = sum(ends_of(path)[0] for path in images) <= DECODED_WHOLE
    return [shown_size(path, decode) for path in images]


def read_image_folder(path: str | Path, split: SeededSplit = USUAL_SPLIT) -> DataSet[LabelledImage]:
    """Images in one folder for each class; the classes are in lexicographic order, as in torchvision's ImageFolder.

    Args:
        path: folder of the class folders, or of train/ and val/ (valid/, validation/, dev/; test/ where there is no
            other) with the same class folders in each.
        split: how a part to measure with is taken where there is no folder for it.

    Raises:
        DataError: an image that is none, an empty folder of a class, one class alone, images of no class, or a class to
            measure with that is not in the training data.
    """
    root = existing(path)
    if not root.is_dir():
        raise DataError(f"{root}: a file, expected a folder with one folder of images for each class.")
    notes: list[str] = []
    base = descended(root, notes)
    train_folder, val_folder = _split_folders(base, notes)
    train, names = _classes(train_folder, None, notes)
    if len(names) < 2:
        raise DataError(
            f"{train_folder}: one class only, {names[0]!r}, expected folders of two classes or more."
            f"{_deeper(train_folder / names[0])}"
        )
    val = None
    if val_folder is not None:
        val = (_classes(val_folder, names, notes)[0], f"{val_folder.name}/")
    images = [sample.image for sample in [*train, *(val[0] if val else [])]]
    look_over(images)
    found = Found(train, val, names, summed_up(root, [], images), tuple(sorted(images)), tuple(notes))
    return completed(found, split, lambda one: content_of(one.image), lambda one: one.label)


def content_of(path: Path) -> str:
    """The same for two image files of one size with the same bytes at both ends."""
    size, first, last = ends_of(path)
    return hashlib.sha256(b"%d " % size + first + last).hexdigest()


def descended(root: Path, notes: list[str], known: Sequence[str] = ()) -> Path:
    """The folder itself, or the only one in it if that has train/ or a `known` folder (archives often unpack so)."""
    inside = [one for one in entries(root) if one.is_dir()]
    if len(inside) == 1 and not any(is_image(one) for one in entries(root)) and inside[0].name not in known:
        wanted = (*SPLITS["train"], *known)
        deeper = [one for one in entries(inside[0]) if one.is_dir() and one.name.lower() in wanted]
        if deeper:
            notes.append(f"the data are read from {inside[0].name}/, the only folder, which has {deeper[0].name}/.")
            return inside[0]
    return root


def _split_folders(base: Path, notes: list[str]) -> tuple[Path, Path | None]:
    folders = [one for one in entries(base) if one.is_dir()]
    parts = {one: split for one in folders for split, names in SPLITS.items() if one.name.lower() in names}
    if not parts or (len(parts) < len(folders) and any(_has_images(one) for one in parts)):
        return base, None  # no part, or classes one of which is called "train"
    trained = [one for one, split in parts.items() if split == "train"]
    if len(trained) != 1:
        said = "two folders to train with" if trained else "no folder called train"
        raise DataError(f"{base}: {said} among {', '.join(one.name for one in folders)}, expected one, beside val.")
    if strangers := [one for one in folders if one not in parts]:
        raise DataError(
            f"{strangers[0]}: a folder beside {trained[0].name}/, expected train and val there and the classes in them."
        )
    for wanted in ("val", "test"):
        measured = [one for one, split in parts.items() if split == wanted]
        if len(measured) > 1:
            raise DataError(f"{base}: both {measured[0].name}/ and {measured[1].name}/, expected one of them.")
        if measured:
            if wanted == "test":
                notes.append("there is no folder called val, so the test data are measured with.")
            elif any(split == "test" for split in parts.values()):
                notes.append("not used: test/.")
            return trained[0], measured[0]
    return trained[0], None


def _has_images(folder: Path) -> bool:
    return any(is_image(one) for one in entries(folder))


def _deeper(folder: Path) -> str:
    inside = [one for one in entries(folder) if one.is_dir()]
    return (
        f" Its folders {', '.join(one.name for one in inside[:4])} may be the classes: give {folder}." if inside else ""
    )


def _classes(
    folder: Path, known: tuple[str, ...] | None, notes: list[str]
) -> tuple[list[LabelledImage], tuple[str, ...]]:
    """Every image of a part with its class; the names of the classes: those `known` where they are not the first."""
    if loose := [one for one in entries(folder) if one.is_file() and is_image(one)]:
        raise DataError(
            f"{loose[0]}: {'an image' if len(loose) == 1 else f'one of {len(loose)} images'} in no folder of a class, "
            f"expected {folder.name}/CLASS/{loose[0].name}."
        )
    folders = [one for one in entries(folder) if one.is_dir()]
    if not folders:
        raise DataError(f"{folder}: no folder of a class in it, expected {folder.name}/CLASS/IMAGE for each image.")
    names = known or tuple(one.name for one in folders)
    samples, aside = [], []
    for one in folders:
        if one.name not in names:
            raise DataError(
                f"{one}: the class {one.name!r} is not in the training data, expected one of {', '.join(names[:10])}."
                f"{did_you_mean(one.name, names)}"
            )
        below = files_below(one)
        images = [file for file in below if is_image(file)]
        aside += [file for file in below if not is_image(file)]
        if not images:
            raise DataError(f"{one}: no image of the class {one.name!r}, expected at least one ({', '.join(ENDINGS)}).")
        samples += [LabelledImage(image, 0, image, names.index(one.name)) for image in images]
    aside += [one for one in entries(folder) if one.is_file()]
    if aside:
        notes.append(f"no images by their endings, left out: {', '.join(map(str, aside[:3]))}{_more(aside)}.")
    if known is not None and (missing := set(known) - {one.name for one in folders}):
        notes.append(f"{folder.name}/ has no image of {', '.join(sorted(missing))}.")
    return samples, names


def _more(files: Sequence[Path]) -> str:
    return f" and {len(files) - 3} more" if len(files) > 3 else ""
