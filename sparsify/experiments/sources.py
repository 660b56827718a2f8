"""Files of data on disk: found, decoded, split by their names, and summed up in a fingerprint."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from sparsify.errors import DataError, DataFileError, did_you_mean, first_line

__all__: list[str] = []

SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
_BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_PART = 4096


def existing(path: str | Path) -> Path:
    """The path, which is there.

    Raises:
        DataFileError: it is not, or is an archive.
    """
    found = Path(path).expanduser()
    try:
        there = found.exists()
    except OSError as error:
        raise DataFileError(f"{found}: cannot be read: {error.strerror}.") from error
    if not there:
        beside = [one.name for one in entries(found.parent)] if found.parent.is_dir() else []
        raise DataFileError(f"{found}: there is no such file or folder.{did_you_mean(found.name, beside)}")
    if found.is_file() and found.suffix.lower() in (".zip", ".gz", ".tgz", ".tar", ".bz2", ".xz", ".7z", ".rar"):
        raise DataFileError(f"{found}: an archive; unpack it and give the folder.")
    return found


def entries(folder: Path) -> list[Path]:
    """Names in a folder, sorted, without those that begin with a dot and those that file managers leave behind."""
    try:
        found = sorted(folder.iterdir(), key=lambda one: one.name)
    except OSError as error:
        raise DataFileError(f"{folder}: cannot be read: {error.strerror or error}.") from error
    return [one for one in found if one.name[0] != "." and one.name not in ("Thumbs.db", "desktop.ini", "__MACOSX")]


def files_below(folder: Path, above: tuple[Path, ...] = ()) -> list[Path]:
    """Every file in a folder and the folders in it, in the order of their paths.

    Args:
        folder: where it begins.
        above: real paths of the folders on the way to it.

    Raises:
        DataError: a link leads to a folder that it is in, or nowhere.
    """
    real = folder.resolve()
    if real in above:
        raise DataError(f"{folder}: a link to a folder that it is in, expected one to another place.")
    found: list[Path] = []
    for one in entries(folder):
        if one.is_dir():
            found += files_below(one, (*above, real))
        elif one.exists():
            found.append(one)
        else:
            raise DataError(f"{one}: a link that leads nowhere, expected a file.")
    return found


def split_named(name: str) -> str | None:
    """The part of the data that a file or folder of this name is: "train", "val", "test", or None.

    The word stands alone or apart from others by a sign that is no letter.

    >>> split_named("validation"), split_named("sst2_train-00000-of-00002.jsonl"), split_named("trains")
    ('val', 'train', None)
    """
    words = re.split(r"[^a-z]+", name.lower())
    return next((split for split, names in SPLITS.items() for word in names if word in words), None)


def text_in(path: Path) -> str:
    """The text in a file, decoded from UTF-8, without a byte order mark; line ends as they are.

    Raises:
        DataFileError: it cannot be read.
        DataError: it is empty, or no UTF-8: with file and line.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataFileError(f"{path}: cannot be read: {error.strerror or error}.") from error
    if (other := _BOMS.get(content[:2])) is not None:
        raise DataError(f"{path}:1: the file is {other}, expected UTF-8; save it as UTF-8.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: byte 0x{content[error.start]:02x} is not UTF-8, expected UTF-8 text; "
            "save the file as UTF-8 (it may be Latin-1 or Windows-1252)."
        ) from error
    if "\0" in text:
        raise DataError(f"{path}:{text.count(chr(10), 0, text.index(chr(0))) + 1}: a zero byte, expected UTF-8 text.")
    if not text.strip():
        raise DataError(f"{path}: the file is empty, expected at least one sample.")
    return text


def ends_of(path: Path) -> tuple[int, bytes, bytes]:
    """Size of a file in bytes, and its first and last 4096 bytes.

    Raises:
        DataFileError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            first = file.read(_PART)
            size = file.seek(0, 2)
            file.seek(max(size - _PART, 0))
            return size, first, file.read(_PART)
    except OSError as error:
        raise DataFileError(f"{path}: cannot be read: {error.strerror or first_line(error)}.") from error


def summed_up(root: Path, files: Iterable[Path], images: Iterable[Path] = ()) -> str:
    """SHA-256 over the names below `root` and the contents of files, in hexadecimal, whatever their order.

    Of images, which may be many gigabytes, it takes the size and both ends.
    """
    total = hashlib.sha256()
    for path in sorted({*files, *images}):
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
        total.update(name.encode("utf-8", "surrogateescape") + b"\0")
    for path in sorted(files):
        total.update(hashlib.sha256(path.read_bytes()).digest())
    for path in sorted(images):
        size, first, last = ends_of(path)
        total.update(hashlib.sha256(b"%d " % size + first + last).digest())
    return total.hexdigest()
