"""Value objects as a table in plain text, JSON or Markdown, and progress on the terminal.

rich draws the bar of progress where it is installed (the extra `report`).
"""

from __future__ import annotations

import dataclasses
import html
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from sparsify.errors import ArgumentError
from sparsify.output.files import replacing
from sparsify.output.json_values import plain

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__: list[str] = []

Item = TypeVar("Item")
EVERY = 5.0
"""Seconds between two lines of progress, where there is no terminal."""


@dataclass(frozen=True)
class Column:
    """One column: which field it shows, under which title, in which format (as in `format(value, spec)`)."""

    field: str
    title: str
    spec: str = ""
    left: bool = False
    """Text stands at the left, figures at the right; the first column is at the left in any case."""

    def cell(self, row: Mapping[str, object]) -> str:
        """The field's value as text; "-" where there is none.

        >>> Column("sparsity", "Zeros", ".1%").cell({"sparsity": 0.9})
        '90.0%'
        >>> Column("sparsity", "Zeros", ".1%").cell({"sparsity": None})
        '-'
        """
        value = row[self.field]
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "-"
        return format(value, self.spec)


@dataclass(frozen=True)
class Table:
    """Rows of values and how each is shown. The values themselves stay exact: `json` writes them unrounded."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Mapping[str, object], ...]

    @classmethod
    def of(
        cls, title: str, rows: Iterable[DataclassInstance | Mapping[str, object]], columns: Sequence[Column]
    ) -> Table:
        """From dataclasses or mappings; fields that no column shows are kept for `json`.

        Raises:
            ArgumentError: a column names a field that a row does not have.
        """
        plain = tuple(dataclasses.asdict(row) if dataclasses.is_dataclass(row) else dict(row) for row in rows)
        for column in columns:
            for row in plain:
                if column.field not in row:
                    raise ArgumentError(f"column {column.title!r} shows {column.field!r}, but a row has {list(row)}")
        return cls(title, tuple(columns), plain)

    def cells(self) -> list[list[str]]:
        """Row by row, as text."""
        return [[column.cell(row) for column in self.columns] for row in self.rows]

    def text(self) -> str:
        """Plain text: the title, a line of column titles, one line a row; the first column to the left.

        >>> columns = [Column("name", "Run"), Column("ms", "ms", ".1f")]
        >>> print(Table.of("Runs", [{"name": "a", "ms": 1.25}], columns).text())
        Runs
        Run   ms
        a    1.2
        """
        lines = [[column.title for column in self.columns], *self.cells()]
        widths = [max(len(line[index]) for line in lines) for index in range(len(self.columns))]
        body = [
            "  ".join(
                cell.rjust(width) if index and not column.left else cell.ljust(width)
                for index, (cell, width, column) in enumerate(zip(line, widths, self.columns, strict=True))
            )
            for line in lines
        ]
        return "\n".join([self.title, *(line.rstrip() for line in body)])

    def markdown(self) -> str:
        """A Markdown table under its title.

        >>> columns = [Column("name", "Run"), Column("ms", "ms", ".1f")]
        >>> print(Table.of("Runs", [{"name": "a", "ms": 1.25}], columns).markdown())
        **Runs**
        <BLANKLINE>
        | Run | ms |
        |---|---:|
        | a | 1.2 |
        """
        rule = "|".join("---:" if i and not column.left else "---" for i, column in enumerate(self.columns))
        head = " | ".join(column.title for column in self.columns)
        body = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in self.cells()]
        return "\n".join([f"**{self.title}**", "", f"| {head} |", f"|{rule}|", *body])

    def html(self) -> str:
        """A table of HTML under its title.

        >>> print(Table.of("Runs", [{"name": "<a>"}], [Column("name", "Run")]).html())
        <table><caption>Runs</caption><tr><th>Run</th></tr><tr><td style="text-align: left">&lt;a&gt;</td></tr></table>
        """
        head = "".join(f"<th>{html.escape(column.title)}</th>" for column in self.columns)
        sides = ["left" if column.left or not i else "right" for i, column in enumerate(self.columns)]
        rows = ""
        for row in self.cells():
            cells = (
                f'<td style="text-align: {side}">{html.escape(cell)}</td>'
                for side, cell in zip(sides, row, strict=True)
            )
            rows += f"<tr>{''.join(cells)}</tr>"
        return f"<table><caption>{html.escape(self.title)}</caption><tr>{head}</tr>{rows}</table>"

    def _repr_html_(self) -> str:
        return self.html()

    def json(self) -> str:
        """{"title": ..., "rows": [{field: value}]}; a value that JSON does not know (nan, inf) becomes null."""
        return json.dumps({"title": self.title, "rows": [plain(row) for row in self.rows]}, indent=2)

    def write(self, path: str | os.PathLike[str]) -> None:
        """To a file whose ending says the form: `.md`, `.json` or `.txt`.

        Raises:
            ArgumentError: another ending. DataError: the file cannot be written.
        """
        forms = {".md": self.markdown, ".json": self.json, ".txt": self.text}
        suffix = Path(path).suffix
        if suffix not in forms:
            raise ArgumentError(
                f"{path}: a table is written as {', '.join(forms)}, not as {suffix or 'a file without an ending'}"
            )
        with replacing(path) as temporary:
            temporary.write_text(forms[suffix]() + "\n", encoding="utf-8")


class DisplayedText:
    """Shows an object in a notebook as its text."""

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


class Displayed:
    """Shows an object as text, and in a notebook with its tables as tables of HTML. `_parts` gives tables and lines."""

    _between = "\n"

    def _parts(self) -> Sequence[Table | str]:
        raise NotImplementedError

    def __str__(self) -> str:
        return self._between.join(part if isinstance(part, str) else part.text() for part in self._parts())

    def _repr_html_(self) -> str:
        return "".join(
            f"<p>{html.escape(part)}</p>" if isinstance(part, str) else part.html() for part in self._parts()
        )


def track(work: Iterable[Item], what: str, total: int | None = None, *, progress: bool | None = True) -> Iterator[Item]:
    """The items of `work`, with their progress shown on stderr: a bar on a terminal with rich, otherwise a line every
    few seconds and one at the end.

    Args:
        work: the items.
        what: the description that is shown.
        total: number of items; not needed where `work` has a length.
        progress: whether progress is shown; None: on a terminal.
    """
    if not (sys.stderr.isatty() if progress is None else progress):
        yield from work
        return
    if total is None and isinstance(work, Sized):
        total = len(work)
    if not sys.stderr.isatty():
        yield from _in_lines(work, what, total)
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield from _in_lines(work, what, total)
        return
    with Progress(console=Console(stderr=True)) as bar:
        yield from bar.track(work, total=total, description=what)


def _in_lines(work: Iterable[Item], what: str, total: int | None) -> Iterator[Item]:
    start = said = time.perf_counter()
    for count, item in enumerate(work, 1):
        yield item
        now = time.perf_counter()
        if now - said >= EVERY and count != total:
            said, of = now, "" if total is None else f" of {total}"
            print(f"{what}: {count}{of}, {now - start:.0f} s", file=sys.stderr, flush=True)
    print(f"{what}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
