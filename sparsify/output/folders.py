"""Folders that are the old one or the new one, never half of either."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sparsify.errors import DataFileError
from sparsify.output.files import WRITE_FAULTS, lock, sweep

__all__: list[str] = []


@contextmanager
def replacing_folder(folder: str | os.PathLike[str], ours: Collection[str] | None = None) -> Iterator[Path]:
    """Yields a temporary folder beside `folder`, which takes the place of `folder` when the block ends well.

    A kill at any moment leaves the old folder or the new one: both change places in one step where the system has such
    a step (Linux, macOS). Elsewhere there is a moment in which the old one stands beside its place, and `whole_folder`
    finds it there. On an error inside the block `folder` stays as it was.

    Args:
        folder: what is written. Missing folders above it are made.
        ours: names in the old folder that the new one takes the place of; others are carried over. None: nothing is.

    Raises:
        DataFileError: it is a file, or cannot be written.
    """
    # A link stays a link: the folder that it leads to is replaced.
    target = Path(os.path.realpath(folder))
    if target.exists() and not target.is_dir():
        raise DataFileError(f"cannot write {folder}: it is a file. Give the path of a folder.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target)
        made = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))
        handle = _opened_folder(made)
    except OSError as error:
        raise DataFileError(
            f"cannot write {folder}: {error.strerror or error}. Give a path in a folder that is writable."
        ) from error
    try:
        yield made
        # mkdtemp makes folders that only their owner can read.
        umask = os.umask(0)
        os.umask(umask)
        made.chmod(0o777 & ~umask)
        if target.is_dir():
            for other in sorted(set(os.listdir(target)) - set(ours or os.listdir(target))):
                if not (made / other).exists():
                    _carry_over(target / other, made / other)
        for written in (*made.rglob("*"), made):
            _to_disk(written)
        try:
            _put_in_place(made, target)
        except OSError as error:
            raise DataFileError(
                f"cannot write {folder}: {error.strerror or error}. Give another path, in a folder that is writable."
            ) from error
        _to_disk(target.parent)
    except OSError as error:
        if error.errno not in WRITE_FAULTS or isinstance(error, DataFileError):
            raise
        raise DataFileError(
            f"cannot write {folder}: {error.strerror or error}. What was there is unchanged."
        ) from error
    finally:
        # The old folder by now, or what an error left.
        shutil.rmtree(made, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _opened_folder(folder: Path) -> int | None:
    """A handle that locks a folder which is being written; None on Windows, which opens no folders."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return None
    lock(handle)
    return handle


@contextmanager
def adding_to_folder(folder: str | os.PathLike[str], last: str) -> Iterator[Path]:
    """Yields a temporary folder in `folder`; when the block ends well its files are moved up, one by one, `last` at the
    end. Other files there stay, those of the same names are replaced.

    Raises:
        DataFileError: it cannot be written.
    """
    target = Path(folder)
    try:
        made = Path(tempfile.mkdtemp(dir=target, prefix=".saving.", suffix=".tmp"))
    except OSError as error:
        raise DataFileError(f"cannot write {folder}: {error.strerror or error}. Give another path.") from error
    try:
        yield made
        written = sorted((path for path in made.rglob("*") if not path.is_dir()), key=lambda path: path.name == last)
        try:
            for path in written:
                _to_disk(path)
                place = target / path.relative_to(made)
                place.parent.mkdir(parents=True, exist_ok=True)
                path.replace(place)
        except OSError as error:
            raise DataFileError(f"cannot write {folder}: {error.strerror or error}. Give another path.") from error
        _to_disk(target)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def whole_folder(folder: str | os.PathLike[str]) -> Path:
    """`folder`, or where a kill left it beside its place, the old one there."""
    target = Path(folder)
    aside = _set_aside(Path(os.path.realpath(target)))
    return aside if aside.is_dir() and not target.exists() else target


def _set_aside(folder: Path) -> Path:
    """Where the old folder stands for a moment, on systems that cannot exchange two folders in one step."""
    return folder.with_name(f".{folder.name}.replaced")


def _put_in_place(made: Path, target: Path) -> None:
    """Moves `made` to `target`; an old folder there is at `made` afterwards, or gone."""
    aside = _set_aside(target)
    try:
        # Takes the place of nothing, or of an empty folder.
        os.rename(made, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES, errno.EPERM) or not target.is_dir():
            raise
        if _exchange(made, target):
            return
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(target, aside)
        try:
            os.rename(made, target)
        except BaseException:
            os.rename(aside, target)
            raise
    # Also one that a kill left.
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Has two folders change places in one step; false where the system or its file system cannot."""
    # Python 3.13 has no call for it. Some file systems refuse: https://github.com/google/gvisor/issues/7895.
    paths = os.fsencode(one), os.fsencode(other)
    call: Callable[[], int]
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            call = lambda: int(library.renamex_np(*paths, 2))  # noqa: E731  RENAME_SWAP
        else:
            at_here = -100
            call = lambda: int(library.renameat2(at_here, paths[0], at_here, paths[1], 2))  # noqa: E731  RENAME_EXCHANGE
        return call() == 0
    except (AttributeError, OSError, TypeError):
        return False


def _carry_over(source: Path, target: Path) -> None:
    """The same file or folder under a second name: by links, or where there are none, copied."""
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=_link)
    else:
        _link(source, target)


def _link(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _to_disk(path: Path) -> None:
    """Waits until a file or a folder is on the disk."""
    if path.is_symlink():
        return
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        # Windows opens no folders.
        return
    try:
        # Some file systems know no fsync of folders.
        with suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)
