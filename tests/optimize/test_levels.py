"""Optim levels mean what their documents say, and nothing else is a level."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from sparsify.errors import ArgumentError
from sparsify.optimize import PRESETS, optim_level
from sparsify.optimize.levels import preset_of


@pytest.mark.parametrize(
    ("level", "aware", "one_shot"),
    [
        (0.0, 0.0, 0.0),
        (0, 0.0, 0.0),
        (0.01, 0.0, 0.0),
        (0.2999, 0.0, 0.0),
        (0.3, 0.60, 0.40),
        (30, 0.60, 0.40),
        (0.5, 0.70, 0.4 + 0.4 * 2 / 7),
        (0.65, 0.775, 0.60),
        (1.0, 0.95, 0.80),
        (1, 0.95, 0.80),
        (100, 0.95, 0.80),
        (2, 0.0, 0.0),
    ],
)
def test_sparsity_rises_in_a_straight_line(level: float, aware: float, one_shot: float) -> None:
    for experiment, wanted in (("training-aware", aware), ("one-shot", one_shot)):
        found = optim_level(level, experiment)  # type: ignore[arg-type]
        assert found.sparsity == pytest.approx(wanted, abs=1e-12)
        assert found.quantize == (level != 0)
        assert found.sparse == (wanted > 0)


def test_percents_as_in_the_documents() -> None:
    assert optim_level(0.5).sparsity == 0.7
    assert round(100 * (optim_level(0.5, "one-shot").sparsity or 0), 4) == 51.4286


@pytest.mark.parametrize(
    ("level", "size", "sparse", "int8"),
    [
        (0.0, "largest", False, False),
        (0.1, "largest", False, True),
        (0.2499, "largest", False, True),
        (0.25, "largest", True, True),
        (0.4999, "largest", True, True),
        (0.5, "medium", True, True),
        (0.7499, "medium", True, True),
        (0.75, "smallest", True, True),
        (1.0, "smallest", True, True),
    ],
)
def test_sparse_transfer_chooses_a_model(level: float, size: str, sparse: bool, int8: bool) -> None:
    found = optim_level(level, "sparse-transfer")
    assert (found.size, found.sparse, found.quantize, found.sparsity) == (size, sparse, int8, None)


@pytest.mark.parametrize(
    "level", [-0.1, 1.5, 1.0001, 2.5, 101, 1e9, math.nan, math.inf, True, "0.5", None, [0.5], 99.9]
)
def test_anything_else_is_no_level(level: Any) -> None:
    with pytest.raises(ArgumentError, match=re.escape(f"optim_level: {level!r} is no level")):
        optim_level(level)


def test_an_unknown_experiment_is_named() -> None:
    with pytest.raises(ArgumentError, match=r"experiment: 'one_shot' is none of .* Did you mean 'one-shot'"):
        optim_level(0.5, "one_shot")  # type: ignore[arg-type]


def test_presets_are_levels_and_balances() -> None:
    assert set(PRESETS) == {"balanced", "speed", "recovery", "int8", "structured"}
    for preset in PRESETS.values():
        assert optim_level(preset.level).level == preset.level
        assert 0.0 <= preset.balance <= 1.0
    assert optim_level(PRESETS["int8"].level).sparsity == 0.0
    with pytest.raises(ArgumentError, match=r"preset: 'sped' is none of .* Did you mean 'speed'"):
        preset_of("sped")
    with pytest.raises(ArgumentError, match=r"preset: 3 is none of"):
        preset_of(3)
