"""Tables keep exact values and show rounded ones, with rich and without."""

from __future__ import annotations

import builtins
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sparsify.errors import ArgumentError, DataError
from sparsify.output.tables import Column, Table, track


@dataclass(frozen=True)
class Row:
    name: str
    milliseconds: float | None
    hidden: int = 3


COLUMNS = [Column("name", "Run"), Column("milliseconds", "ms", ".2f")]
TABLE = Table.of("Runs", [Row("dense", 1.23456), Row("a|b", None), Row("odd", math.nan)], COLUMNS)


@pytest.fixture
def without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "rich":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_text_is_aligned() -> None:
    assert TABLE.text() == "Runs\nRun      ms\ndense  1.23\na|b       -\nodd       -"


def test_markdown_escapes_what_would_end_a_cell() -> None:
    assert TABLE.markdown() == "**Runs**\n\n| Run | ms |\n|---|---:|\n| dense | 1.23 |\n| a\\|b | - |\n| odd | - |"


def test_json_keeps_exact_values_and_fields_without_a_column() -> None:
    assert json.loads(TABLE.json()) == {
        "title": "Runs",
        "rows": [
            {"name": "dense", "milliseconds": 1.23456, "hidden": 3},
            {"name": "a|b", "milliseconds": None, "hidden": 3},
            {"name": "odd", "milliseconds": None, "hidden": 3},
        ],
    }


def test_a_column_without_a_field_is_an_error() -> None:
    with pytest.raises(ArgumentError, match="column 'Size' shows 'size', but a row has"):
        Table.of("Runs", [Row("dense", 1.0)], [Column("size", "Size")])


def test_written_form_follows_the_ending(tmp_path: Path) -> None:
    for suffix, text in {".md": TABLE.markdown(), ".json": TABLE.json(), ".txt": TABLE.text()}.items():
        TABLE.write(tmp_path / f"table{suffix}")
        assert (tmp_path / f"table{suffix}").read_text() == text + "\n"
    with pytest.raises(ArgumentError, match=r"table\.html: a table is written as \.md, \.json, \.txt"):
        TABLE.write(tmp_path / "table.html")
    with pytest.raises(DataError, match="cannot write"):
        TABLE.write(tmp_path / "nowhere" / "table.md")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_track_yields_everything_and_draws_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track([1, 2, 3], "counting")) == [1, 2, 3]
    assert list(track(iter([1, 2, 3]), "counting", total=3)) == [1, 2, 3]
    captured = capsys.readouterr()
    assert captured.out == "" and "counting" in captured.err


@pytest.mark.usefixtures("without_rich")
def test_track_without_rich_says_how_long_it_took(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(range(3), "counting")) == [0, 1, 2]
    assert capsys.readouterr().err.startswith("counting: 0.0 s")


@pytest.mark.parametrize(
    ("terminal", "progress", "seen"),
    [(True, None, True), (False, None, False), (False, True, True), (True, False, False)],
)
def test_track_shows_itself_on_a_terminal_or_as_it_is_told(
    terminal: bool, progress: bool | None, seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", out)
    assert list(track([1, 2], "counting", progress=progress)) == [1, 2]
    assert ("counting" in out.getvalue()) == seen
