"""Rows of csv, tsv, json, jsonl and CoNLL files: each a mapping of columns to values that knows its file and line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsify.errors import DataError, first_line
from sparsify.experiments.sources import text_in

__all__: list[str] = []


@dataclass(frozen=True)
class Row:
    """One sample of a file, as it stands there.

    Args:
        file: the file.
        line: the line on which it begins, from 1.
        values: by column.
    """

    file: Path
    line: int
    values: Mapping[str, Any]

    @property
    def where(self) -> str:
        """Place of an error: "file:line"."""
        return f"{self.file}:{self.line}"


def rows_of(path: Path) -> list[Row]:
    """All rows of a file; its ending says the format.

    Raises:
        DataError: with file and line: something is wrong with it, or its ending names no format of rows.
    """
    ending = path.suffix.lower()
    if ending not in ROW_ENDINGS:
        raise DataError(f"{path}: files of texts end in {', '.join(ROW_ENDINGS)}, this one in {path.suffix!r}.")
    rows = parquet(path) if ending == ".parquet" else list(READERS[ending](path, text_in(path)))
    if not rows:
        raise DataError(f"{path}: the file has no sample, expected at least one.")
    return rows


def separated(separator: str) -> Callable[[Path, str], Iterator[Row]]:
    """Reader of rows that are separated by a sign, under a line of column names."""

    def read(path: Path, text: str) -> Iterator[Row]:
        # A context of question answering may be longer than the 131,072 characters that Python's reader takes.
        before = csv.field_size_limit(max(len(text), 131072))
        try:
            yield from _separated(path, text, separator)
        finally:
            csv.field_size_limit(before)

    return read


def _separated(path: Path, text: str, separator: str) -> Iterator[Row]:
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    header: list[str] | None = None
    begins = 1
    try:
        for fields in lines:
            line, begins = begins, lines.line_num + 1
            if not fields:  # a line with nothing on it
                continue
            if header is None:
                header = _header(path, line, fields, separator)
            elif len(fields) != len(header):
                raise DataError(
                    f"{path}:{line}: {len(fields)} {'field' if len(fields) == 1 else 'fields'}, expected "
                    f"{len(header)}: {', '.join(header)}. Put a field with a {_sign(separator)} in it in double quotes."
                )
            else:
                yield Row(path, line, dict(zip(header, fields, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path}:{begins}: {error}; expected fields in matching double quotes.") from error


def _sign(separator: str) -> str:
    return "tab" if separator == "\t" else "comma"


def _header(path: Path, line: int, fields: list[str], separator: str) -> list[str]:
    expected = "expected a first line with the names of the columns"
    for position, name in enumerate(fields, 1):
        if not name.strip():
            raise DataError(
                f"{path}:{line}: column {position} of {len(fields)} has no name, {expected}. (pandas writes its index "
                "so: use to_csv(index=False).)"
            )
        if name != name.strip():
            raise DataError(f"{path}:{line}: column {name!r} has a blank at its end or beginning, {expected} alone.")
    if twice := sorted({name for name in fields if fields.count(name) > 1}):
        raise DataError(f"{path}:{line}: two columns are called {twice[0]!r}, {expected}, each once.")
    if len(fields) == 1:
        other = next((one for one in (",", ";", "\t", "|") if one != separator and one in fields[0]), None)
        if other is not None:
            raise DataError(
                f"{path}:{line}: one column, {fields[0]!r}, expected columns with a {_sign(separator)} between them, "
                f"not {other!r}."
            )
    return fields


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return found


def _object(path: Path, line: int, value: Any) -> Row:
    if not isinstance(value, dict):
        raise DataError(f'{path}:{line}: {shortened(value)}, expected an object: {{"text": ..., "label": ...}}.')
    return Row(path, line, value)


def shortened(value: object) -> str:
    """A value in a message: as JSON, cut to 40 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."


def json_lines(path: Path, text: str) -> Iterator[Row]:
    """Reader of one object a line."""
    for line, content in enumerate(text.split("\n"), 1):
        if content.strip():
            try:
                value = json.loads(content, object_pairs_hook=_once)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{line}: no JSON at column {error.colno} ({error.msg}), {_WANTED}.") from error
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{line}: {error}, {_WANTED}.") from error
            yield _object(path, line, value)


_WANTED = "expected one JSON object on each line"


def json_file(path: Path, text: str) -> Iterator[Row]:
    """Reader of a .json file: an object a line, an array of objects, or the nested form of SQuAD."""
    if text.lstrip()[0] == "[":
        yield from _array_rows(path, text)
        return
    try:
        whole = json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # the first object ends before the file does
            yield from json_lines(path, text)
            return
        raise DataError(f"{path}:{error.lineno}: no JSON at column {error.colno} ({error.msg}), {_WANTED}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {error}, {_WANTED}.") from error
    if isinstance(whole, dict) and isinstance(whole.get("data"), list):
        yield from _nested(path, text, whole["data"])
    else:
        yield _object(path, 1, whole)


def _array_rows(path: Path, text: str) -> Iterator[Row]:
    decoder, place = json.JSONDecoder(object_pairs_hook=_once), text.index("[") + 1
    line, counted = 1, 0
    wanted = "expected an array of objects: [{...}, {...}]"
    while True:
        place = _past_blanks(text, place)
        line, counted = line + text.count("\n", counted, place), place
        try:
            value, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{error.lineno}: no JSON at column {error.colno} ({error.msg}), {wanted}."
            ) from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{line}: {error}, {wanted}.") from error
        yield _object(path, line, value)
        place = _past_blanks(text, place)
        sign = text[place : place + 1]
        if sign == "]":
            if text[place + 1 :].strip():
                raise DataError(f"{path}:{text.count(chr(10), 0, place) + 1}: more behind the array, {wanted}.")
            return
        if sign != ",":
            where = text.count("\n", 0, place) + 1
            raise DataError(f"{path}:{where}: {sign or 'the end of the file'!r} behind an object, {wanted}.")
        place += 1


def _past_blanks(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    return place


def _nested(path: Path, text: str, data: Sequence[Any]) -> Iterator[Row]:
    """Rows of {"data": [...]}: plain ones, or articles with paragraphs with questions, as SQuAD has them."""
    place, line = 0, 1
    for number, article in enumerate(data):
        if not isinstance(article, dict) or "paragraphs" not in article:
            # Rows in an object carry no place; the file and the number say it.
            yield _object(path, 1, article)
            continue
        for paragraph in _lists(path, article, "paragraphs", f"data[{number}]"):
            for question in _lists(path, paragraph, "qas", f"data[{number}].paragraphs"):
                # The ids come in the order of the file: each is looked for behind the one before.
                found = text.find(json.dumps(question.get("id"), ensure_ascii=False), place)
                if found >= 0:
                    place, line = found, line + text.count("\n", place, found)
                values = {"context": paragraph.get("context"), **question}
                yield Row(path, line, values)


def _lists(path: Path, value: dict[str, Any], name: str, place: str) -> list[dict[str, Any]]:
    found = value.get(name)
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise DataError(f"{path}: {place}: {name!r} is {shortened(found)}, expected a list of objects as in SQuAD.")
    return found


def conll(path: Path, text: str) -> Iterator[Row]:
    """Reader of a word and its tags on each line, a blank line between sentences; `tags` is the last column."""
    words: list[str] = []
    tags: list[str] = []
    begins = columns = 0
    for line, content in enumerate([*text.split("\n"), ""], 1):
        fields = content.rstrip("\r").split("\t") if "\t" in content else content.split()
        if not any(fields):
            if words:
                yield Row(path, begins, {"tokens": words, "tags": tags})
            words, tags = [], []
        elif fields[0] != "-DOCSTART-":
            columns = columns or len(fields)
            if len(fields) < 2 or len(fields) != columns:
                raise DataError(
                    f"{path}:{line}: {len(fields)} {'field' if len(fields) == 1 else 'fields'}, expected "
                    f"{max(columns, 2)}: a word, and its tag as the last."
                )
            begins = begins if words else line
            words.append(fields[0])
            tags.append(fields[-1])


def parquet(path: Path) -> list[Row]:
    """Rows of a parquet file, as data sets of the hub have them; the number of the row stands for the line."""
    try:
        from pyarrow import parquet as reader
    except ImportError as error:
        raise DataError(f"{path}: reading it needs pyarrow, which is not installed; or csv or jsonl.") from error
    try:
        table: list[dict[str, Any]] = reader.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise DataError(f"{path}: no parquet file ({first_line(error)}), expected one.") from error
    return [Row(path, number, values) for number, values in enumerate(table, 1)]


READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".csv": separated(","),
    ".tsv": separated("\t"),
    ".json": json_file,
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".conll": conll,
    ".bio": conll,
    ".iob": conll,
    ".txt": conll,
}
ROW_ENDINGS = (*READERS, ".parquet")
