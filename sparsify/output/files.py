"""Files that are the old one or the new one, never half of either."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sparsify.errors import DataFileError

__all__: list[str] = []


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what is written there takes the place of `path` when the block ends well.

    A temporary file in the same folder, fsync, then `os.replace`: a kill at any moment leaves the old file or the new
    one. On an error inside the block the temporary file is removed and `path` stays as it was.

    Raises:
        DataFileError: the folder does not exist or cannot be written.
    """
    target = Path(path)
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        os.close(handle)
    except OSError as error:
        raise DataFileError(
            f"cannot write {target}: {error.strerror or error}. Give a path in a folder that exists and is writable."
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
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def read_text(path: str | os.PathLike[str]) -> str:
    """The text in a file.

    Raises:
        DataFileError: it is missing, unreadable or no text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataFileError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}.") from error
