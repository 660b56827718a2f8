"""In a notebook objects show what they print, escaped, with their tables as tables."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import sparsify
from sparsify.analysis.analyze import analyze_model
from sparsify.modifiers import SetLearningRateModifier
from sparsify.optimize.allocation import pruning_profile
from sparsify.optimize.planning import plan
from sparsify.optimize.pruning_profiles import PruningSettings
from sparsify.output.tables import Column, Displayed, DisplayedText, Table
from sparsify.training.manager import ScheduledModifierManager
from tests.screens import report


class Text(HTMLParser):
    """The text of a page, and its tags, each closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data.split()


def shown() -> list[object]:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    manager = ScheduledModifierManager([SetLearningRateModifier(start_epoch=2.0, learning_rate=0.1)])
    settings = PruningSettings(sparsity=0.99, overrides={})
    return [
        Table.of("<Runs> & more", [{"name": "<b>a</b>", "ms": None}], [Column("name", "Run"), Column("ms", "ms")]),
        analyze_model(model, torch.zeros(2, 4)),
        plan(manager, model, epochs=1),
        pruning_profile(report().curves, settings),
        manager,
    ]


@pytest.mark.parametrize("number", range(5))
def test_html_says_what_the_text_says(number: int) -> None:
    one = shown()[number]
    page = Text(one._repr_html_())  # type: ignore[attr-defined]
    text = one.text() if isinstance(one, Table) else str(one)
    assert sorted(page.words) == sorted(text.split())
    assert set(page.tags) <= {"table", "caption", "tr", "th", "td", "p", "pre"}
    assert ("table" in page.tags) == isinstance(one, Table | Displayed)


def test_whatever_prints_shows_in_a_notebook() -> None:
    """Every public class with a text of its own."""
    classes = [one for name in sparsify.__all__ if isinstance(one := getattr(sparsify, name), type)]
    printing = [one for one in classes if "__str__" in vars(one) and not issubclass(one, Exception)]
    assert printing and all(hasattr(one, "_repr_html_") for one in printing), printing
    assert issubclass(sparsify.ModelAnalysis, Displayed)
    assert issubclass(sparsify.ScheduledModifierManager, DisplayedText)
