"""Files that are the old one or the new one, never half of either."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sparsify.errors import DataFileError

__all__: list[str] = []

WRITE_FAULTS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS})
"""The system cannot take what is written: a full disk, a quota, a limit on sizes, a broken or read-only disk."""


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what is written there takes the place of `path` when the block ends well.

    A temporary file in the same folder, fsync, then `os.replace`: a kill at any moment leaves the old file or the new
    one. On an error inside the block the temporary file is removed and `path` stays as it was.

    Raises:
        DataFileError: the folder does not exist or cannot be written, or the disk is full.
    """
    target = Path(path)
    try:
        sweep(target)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        lock(handle)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataFileError(
            f"cannot write {target}: {why}. Give a path in a folder that exists and is writable."
        ) from error
    temporary = Path(name)
    try:
        if target.is_dir():
            raise DataFileError(f"cannot write {target}: it is a folder. Give the path of a file.")
        yield temporary
        # mkstemp makes files that only their owner can read; a file saved for others gets the usual mode.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        if error.errno not in WRITE_FAULTS or isinstance(error, DataFileError):
            raise
        raise DataFileError(
            f"cannot write {target}: {error.strerror or error}. What was there is unchanged."
        ) from error
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
        os.close(handle)


def lock(handle: int) -> bool:
    """Locks an open file or folder for as long as it is open; False: another process holds it."""
    try:
        import fcntl
    except ImportError:  # Windows: there nothing is swept either.
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def sweep(target: Path) -> None:
    """Removes what killed processes left half written beside `target`: what living ones write is locked."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        with suppress(OSError):
            handle = os.open(left, os.O_RDONLY)
            try:
                if lock(handle):
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            finally:
                os.close(handle)


def read_text(path: str | os.PathLike[str]) -> str:
    """The text in a file.

    Raises:
        DataFileError: it is missing, unreadable or no text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataFileError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}.") from error
