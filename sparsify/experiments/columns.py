"""Columns of rows: which one holds what, and the values in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sparsify.errors import ArgumentError, DataError, did_you_mean
from sparsify.experiments.rows import Row, shortened

__all__: list[str] = []


class Columns:
    """Which column of the rows holds what: said by the user, or found by its name.

    Args:
        rows: all rows of a part.
        said: column by role, from the user; a role that the use case does not know is an error.
        roles: that the use case knows.
    """

    def __init__(self, rows: Sequence[Row], said: Mapping[str, str] | None, roles: Iterable[str]) -> None:
        self.there = list(rows[0].values)
        self.first = rows[0]
        self.said = dict(said or {})
        known = list(roles)
        for role, column in self.said.items():
            if role not in known:
                raise ArgumentError(
                    f"columns: {role!r} is none of {', '.join(map(repr, known))}.{did_you_mean(role, known)}"
                )
            if column not in self.there:
                raise self.missing(f"the column {column!r}", [column])

    def find(self, role: str, names: Sequence[str]) -> str | None:
        """The column of a role: what the user said, else the first of the names that is there."""
        return self.said.get(role) or next((name for name in names if name in self.there), None)

    def need(self, role: str, names: Sequence[str]) -> str:
        """The same; that there is none is an error which says what there is."""
        found = self.find(role, names)
        if found is None:
            raise self.missing(f"a column for the {role}: {' or '.join(map(repr, names))}", names)
        return found

    def missing(self, wanted: str, names: Sequence[str]) -> DataError:
        """The error that says which columns there are and which one was wanted."""
        near = next(filter(None, (did_you_mean(name, self.there, 1) for name in names)), "")
        separated = self.first.file.suffix.lower() in (".csv", ".tsv")
        where = f"{self.first.file}:1" if separated else self.first.where
        return DataError(f"{where}: the columns are {', '.join(map(repr, self.there))}, expected {wanted}.{near}")

    def unused(self, used: Iterable[str | None]) -> tuple[str, ...]:
        """A note that names the columns that nothing is read from."""
        left = [name for name in self.there if name not in set(used)]
        return (f"columns that are not used: {', '.join(left)}.",) if left else ()


def value_of(row: Row, column: str) -> Any:
    """The value of a row in a column; that it has none is an error."""
    if column not in row.values:
        raise DataError(
            f"{row.where}: no {column!r}, expected it in every row; this one has "
            f"{', '.join(map(repr, row.values)) or 'nothing'}.{did_you_mean(column, row.values, 1)}"
        )
    return row.values[column]


def string_of(row: Row, column: str) -> str:
    """A text that says something."""
    value = value_of(row, column)
    if not isinstance(value, str):
        raise DataError(f"{row.where}: {column!r} is {shortened(value)}, expected a text.")
    if not value.strip():
        raise DataError(f"{row.where}: {column!r} is empty, expected a text.")
    return unicode_text(row, column, value)


def unicode_text(row: Row, column: str, value: str) -> str:
    """A text that can be written in UTF-8: half of a surrogate pair, which JSON can say, is none."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{row.where}: {column!r} has the half character {value[error.start]!r}, expected text in Unicode."
        ) from error
    return value


def class_of(row: Row, column: str) -> str | int:
    """A label as it stands in the file: a word, or a whole number."""
    return class_in(row, column, value_of(row, column))


def class_in(row: Row, column: str, value: Any) -> str | int:
    """A value of a column as a label: a word, or a whole number."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{row.where}: the label in {column!r} is missing, expected a word or a whole number.")
    if not isinstance(value, str):
        wanted = "one class: a word or a whole number"
        raise DataError(f"{row.where}: the label in {column!r} is {shortened(value)}, expected {wanted}.")
    if value != value.strip():
        raise DataError(f"{row.where}: the label {value!r} has a blank at its beginning or end, expected none.")
    if re.fullmatch(r"-?(0|[1-9]\d{0,8})(\.0+)?", value):
        return int(float(value))
    if re.fullmatch(r"-?\d*\.\d+", value):
        raise DataError(f"{row.where}: the label in {column!r} is {value}, expected a class: a word or a whole number.")
    return value
