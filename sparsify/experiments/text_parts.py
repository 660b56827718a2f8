"""Files of rows by the part of the data that they are, found by their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsify.errors import DataError
from sparsify.experiments.hub_data import names_in_card
from sparsify.experiments.rows import ROW_ENDINGS, Row, rows_of
from sparsify.experiments.sources import existing, files_below, split_named, summed_up, text_in

__all__: list[str] = []

NAMES_FILE = "labels.txt"


@dataclass(frozen=True)
class Parts:
    """Rows of a path by the part of the data that they are.

    Args:
        train: rows to train with, or all.
        val: rows to measure with, and the name of where they stand; None where no name says which.
        names: of the classes by number, from labels.txt; None where there is no such file.
        card: the same by column, from the card of a data set of the hub.
        fingerprint: of the files.
        files: that were read.
        notes: what was left aside.
    """

    train: list[Row]
    val: tuple[list[Row], str] | None
    names: tuple[str, ...] | None
    card: dict[str, tuple[str, ...]]
    fingerprint: str
    files: tuple[Path, ...]
    notes: tuple[str, ...]

    def names_of(self, column: str) -> tuple[str, ...] | None:
        """Names of the classes whose numbers stand in a column; None where nothing says them."""
        return self.names or self.card.get(column)


def parts_of(path: str | Path) -> Parts:
    """The rows of a file or a folder, by the names of the files.

    Raises:
        DataError: with file and line: something is wrong in a file, there is none, or their names say too much or too
            little.
    """
    root = existing(path)
    if root.is_file():
        return Parts(rows_of(root), None, None, {}, summed_up(root.parent, [root]), (root,), ())
    below = files_below(root)
    named = [file for file in below if file == root / NAMES_FILE]
    texts = [file for file in below if file.suffix.lower() in ROW_ENDINGS and file not in named and not _is_prose(file)]
    if not texts:
        raise DataError(
            f"{root}: no file of texts in the folder, expected {', '.join(ROW_ENDINGS)}; it has {file_names(below)}."
        )
    parts: dict[str | None, list[Path]] = {}
    for file in texts:
        words = file.relative_to(root).with_suffix("").parts
        parts.setdefault(next(filter(None, map(split_named, words)), None), []).append(file)
    notes = []
    if "train" in parts:
        train = parts.pop("train")
        key = "val" if "val" in parts else "test"
        val = parts.pop(key, None)
        if key == "test" and val:
            notes.append(f"no file is called val, so the test data are measured with: {file_names(val)}.")
    elif None in parts:
        if others := [key for key in parts if key]:
            raise DataError(
                f"{root}: {file_names(parts[others[0]])} but no file called train, expected one beside it; "
                f"{file_names(parts[None])} does not say what it is."
            )
        train, val = parts.pop(None), None
    else:
        raise DataError(f"{root}: {file_names(texts)} but no file called train, expected one.")
    _one_form(train)
    if val:
        _one_form(val)
    used = [*train, *(val or []), *named]
    if aside := [file for file in below if file not in used and not _is_prose(file)]:
        notes.append(f"not used: {file_names(aside)}.")
    names = None
    if named:
        names = tuple(line.strip() for line in text_in(named[0]).splitlines() if line.strip())
    rows = [row for file in train for row in rows_of(file)]
    measured = None if not val else ([row for file in val for row in rows_of(file)], file_names(val))
    return Parts(rows, measured, names, names_in_card(root), summed_up(root, used), tuple(sorted(used)), tuple(notes))


def _is_prose(file: Path) -> bool:
    return file.stem.lower().split(".")[0] in ("readme", "license", "licence", "requirements", "changelog", "notice")


def file_names(files: Sequence[Path]) -> str:
    """Names of files, for a message."""
    if not files:
        return "nothing"
    shown = ", ".join(file.name for file in files[:3])
    return shown if len(files) <= 3 else f"{shown} and {len(files) - 3} more"


def _one_form(files: list[Path]) -> None:
    """One part of the data in two formats is most likely the same data twice."""
    if len({file.suffix.lower() for file in files}) > 1:
        raise DataError(
            f"{files[0].parent}: {file_names(files)} are one part of the data in several formats, expected one format; "
            "give the path of a file, or take the others away."
        )
