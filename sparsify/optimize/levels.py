"""Optim levels and presets: the strength of compression in one number, its kind in one word."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from sparsify.errors import ArgumentError, did_you_mean

__all__ = ["PRESETS", "Experiment", "OptimLevel", "Preset", "optim_level"]

Experiment = Literal["training-aware", "one-shot", "sparse-transfer"]

PRUNES_FROM = 0.3
"""From this level on weights are pruned too."""
RANGES: Mapping[str, tuple[float, float]] = MappingProxyType({"training-aware": (0.60, 0.95), "one-shot": (0.40, 0.80)})
"""The sparsity at `PRUNES_FROM` and at 1.0, with a straight line between."""


@dataclass(frozen=True)
class OptimLevel:
    """The meaning of a level in an experiment.

    Attributes:
        level: 0 to 1.
        sparsity: zeros / elements of the weights that are pruned; 0.0 where none are. None for sparse transfer, where
            the model that is transferred from has it.
        quantize: weights and activations to INT8.
        size: of the model to transfer from, "largest", "medium" or "smallest"; "" in other experiments.
        sparse: whether the model to transfer from is to be a sparse one, or the recipe prunes.
    """

    level: float
    experiment: Experiment
    sparsity: float | None
    quantize: bool
    size: Literal["", "largest", "medium", "smallest"]
    sparse: bool


@dataclass(frozen=True)
class Preset:
    """A named kind of goal: an optim level, and a balance between recovery and performance.

    Attributes:
        level: the optim level, where none is given.
        balance: of `PruningSettings`: 1.0 looks at recovery alone, 0.0 at performance alone.
        structured: whole channels go, so that every runtime gets faster.
        quantize: False overrules the level.
    """

    what: str
    level: float
    balance: float
    structured: bool
    quantize: bool


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "balanced": Preset("half of the way, recovery and performance weighed alike", 0.5, 0.5, False, True),
        "speed": Preset("more zeros, where they save most time", 0.75, 0.15, False, True),
        "recovery": Preset("fewer zeros, where they cost least", 0.4, 1.0, False, True),
        "int8": Preset("quantization alone", 0.2, 1.0, False, True),
        "structured": Preset("whole channels go: smaller and faster in every runtime", 0.4, 0.5, True, True),
    }
)


def optim_level(level: float = 0.5, experiment: Experiment = "training-aware") -> OptimLevel:
    """The meaning of a level.

    training-aware and one-shot: 0 changes nothing; below 0.3 INT8 alone; from 0.3 to 1.0 pruning too, of 60 % to 95 %
    and of 40 % to 80 % of the weights. sparse-transfer: 0 the largest dense model; below 0.25 the largest in INT8;
    below 0.5 the largest sparse one in INT8; below 0.75 a medium one; else the smallest.

    Args:
        level: 0 to 1; whole numbers from 2 to 100 are percent.
        experiment: "training-aware", "one-shot" or "sparse-transfer".

    Raises:
        ArgumentError: no such level or experiment.

    >>> optim_level(0.5).sparsity, optim_level(50).sparsity, round(optim_level(0.5, "one-shot").sparsity, 6)
    (0.7, 0.7, 0.514286)
    >>> optim_level(0.2)
    OptimLevel(level=0.2, experiment='training-aware', sparsity=0.0, quantize=True, size='', sparse=False)
    """
    known = get_args(Experiment)
    if experiment not in known:
        raise ArgumentError(
            f"experiment: {experiment!r} is none of {', '.join(known)}.{did_you_mean(str(experiment), known)}"
        )
    value = _level_fraction(level)
    if experiment == "sparse-transfer":
        size: Literal["largest", "medium", "smallest"]
        size = "largest" if value < 0.5 else "medium" if value < 0.75 else "smallest"
        return OptimLevel(value, experiment, None, value > 0.0, size, value >= 0.25)
    low, high = RANGES[experiment]
    # Rounded: 0.6 + 0.35 * 0.2 / 0.7 is 0.7 to the last bit but one.
    sparsity = round(low + (high - low) * (value - PRUNES_FROM) / (1.0 - PRUNES_FROM), 12)
    pruned = value >= PRUNES_FROM
    return OptimLevel(value, experiment, sparsity if pruned else 0.0, value > 0.0, "", pruned)


def preset_of(name: object) -> Preset:
    """The preset of that name.

    Raises:
        ArgumentError: there is none.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ArgumentError(f"preset: {name!r} is none of {', '.join(PRESETS)}.{did_you_mean(str(name), PRESETS)}")
    return PRESETS[name]


def _level_fraction(level: object) -> float:
    if isinstance(level, bool) or not isinstance(level, int | float) or not math.isfinite(level):
        raise ArgumentError(f"optim_level: {level!r} is no level; give a number from 0 to 1, like 0.5.")
    if 0 <= level <= 1:
        return float(level)
    if 2 <= level <= 100 and level == int(level):
        return level / 100
    raise ArgumentError(
        f"optim_level: {level!r} is no level; give a number from 0 to 1, or a whole number from 2 to 100 for percent."
    )
