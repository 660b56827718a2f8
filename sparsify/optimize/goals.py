"""The goal of a recipe, from whichever argument states it, checked before anything is done."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_args

from sparsify.errors import ArgumentError, did_you_mean
from sparsify.optimize.latency import LatencyPlan
from sparsify.optimize.levels import Experiment, OptimLevel, optim_level, preset_of
from sparsify.optimize.pruning_profiles import PruningProfile, PruningSettings

__all__: list[str] = []


@dataclass(frozen=True)
class Goal:
    """The goal of a recipe.

    Attributes:
        settings: of the pruning; None where nothing is pruned.
        structured: whether whole channels go. `settings.sparsity` is of weights all the same.
        quantize: fields of the QuantizationModifier; None where nothing is quantized.
        holds: whether the zeros that are there are kept.
        text: the goal in words.
        asked: the same as data.
    """

    experiment: Experiment
    settings: PruningSettings | None
    structured: bool
    quantize: Mapping[str, Any] | None
    holds: bool
    text: str
    asked: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prunes(self) -> bool:
        return self.settings is not None


@dataclass(frozen=True)
class GoalArguments:
    """The arguments of `create_recipe` that state a goal, as the user gave them: nothing of them is checked yet."""

    level: float | None
    experiment: Experiment
    preset: str | None
    sparsity: object
    settings: object
    profile: object
    latency: object
    quantize: object
    structured: object

    @property
    def strength(self) -> str:
        """The argument that says how much; empty where none does.

        Raises:
            ArgumentError: several do.
        """
        said = {
            "optim_level": self.level,
            "sparsity": self.sparsity,
            "settings": self.settings,
            "pruning_profile": self.profile,
            "latency_plan": self.latency,
        }
        given = [name for name, value in said.items() if value is not None]
        if len(given) > 1:
            raise ArgumentError(f"{' and '.join(given)}: each says how much; give one of them.")
        return given[0] if given else ""


def goal_of(said: GoalArguments) -> Goal:
    """The goal that the arguments state.

    Raises:
        ArgumentError: one of them cannot be meant, or two contradict one another.
    """
    _check_goal(said)
    preset = None if said.preset is None else preset_of(said.preset)
    asked: dict[str, Any] = {"experiment": said.experiment} | ({} if preset is None else {"preset": said.preset})
    if said.latency is not None:
        return _timed_goal(said, said.latency, asked)
    level: OptimLevel | None = None
    int8 = False
    stated = _stated_settings(said, None if preset is None else preset.balance)
    if stated is not None:
        wanted: PruningSettings | None = stated[0]
        text = stated[1]
    else:
        value = said.level if said.level is not None else preset.level if preset is not None else 0.5
        level = optim_level(value, said.experiment)
        asked["optim_level"] = level.level
        if said.experiment == "sparse-transfer":
            return _transfer(level, _wants_int8(said.quantize, level.quantize), asked)
        wanted = _settings(level.sparsity, None if preset is None else preset.balance) if level.sparsity else None
        int8 = level.quantize and (preset is None or preset.quantize)
        text = f"optim level {level.level:g} of {said.experiment}"
    fields = _wants_int8(said.quantize, int8)
    if preset is not None:
        text += f', preset "{said.preset}"'
    whole = said.structured if isinstance(said.structured, bool) else preset is not None and preset.structured
    return Goal(
        said.experiment,
        wanted,
        whole and wanted is not None,
        fields,
        False,
        f"{text}: {_does(wanted, whole, fields)}",
        asked | ({} if wanted is None else {"structured": whole, "settings": _plain_goal(wanted)}),
    )


def _check_goal(said: GoalArguments) -> None:
    """Refuses arguments that contradict one another, and an experiment that is none."""
    strength = said.strength
    known = get_args(Experiment)
    if said.experiment not in known:
        raise ArgumentError(
            f"experiment: {said.experiment!r} is none of {', '.join(known)}.{did_you_mean(str(said.experiment), known)}"
        )
    if said.preset is not None and strength not in ("", "optim_level", "sparsity"):
        raise ArgumentError(f"preset and {strength}: the latter says all that a preset says; leave one out.")
    if said.preset is not None:
        preset_of(said.preset)
    if said.structured is not None and not isinstance(said.structured, bool):
        raise ArgumentError(f"structured: {said.structured!r} is neither True nor False.")
    if said.experiment == "sparse-transfer" and strength not in ("", "optim_level"):
        raise ArgumentError(f"{strength}: sparse transfer keeps the zeros that a model has; give an optim_level.")


def _stated_settings(said: GoalArguments, balance: float | None) -> tuple[PruningSettings, str] | None:
    """(the settings of the pruning, their origin in words); None where an optim level decides."""
    if said.profile is not None:
        if not isinstance(said.profile, PruningProfile):
            kind = type(said.profile).__name__
            raise ArgumentError(f"pruning_profile: a {kind} is none; give what pruning_profile gave.")
        return said.profile.settings, "a pruning profile"
    if said.settings is not None:
        if not isinstance(said.settings, PruningSettings):
            raise ArgumentError(f"settings: a {type(said.settings).__name__} is none; give PruningSettings(...).")
        return said.settings, "the settings given"
    if said.sparsity is not None:
        sparsity = _sparsity(said.sparsity)
        return _settings(sparsity, balance), f"sparsity {sparsity:.4g}"
    return None


def _timed_goal(said: GoalArguments, latency: object, asked: dict[str, Any]) -> Goal:
    if not isinstance(latency, LatencyPlan):
        raise ArgumentError(f"latency_plan: a {type(latency).__name__} is none; give what latency_plan gave.")
    if said.structured is False:
        raise ArgumentError("structured: False, but a latency plan is about whole channels; leave it out.")
    fields = _wants_int8(said.quantize, latency.quantized)
    text = f"at most {latency.goal_ms:.4g} ms at batch {latency.batch_size}: whole channels go"
    text += ", then INT8" if fields is not None else ""
    asked |= {"goal_ms": latency.goal_ms, "batch_size": latency.batch_size, "threads": latency.threads}
    return Goal(said.experiment, None, True, fields, False, text, asked)


def _does(wanted: PruningSettings | None, whole: bool, fields: Mapping[str, Any] | None) -> str:
    does = []
    if wanted is not None:
        does.append(
            f"{100 * wanted.sparsity:.4g} % of the weights {'go with their channels' if whole else 'become zero'}"
        )
    if fields is not None:
        does.append("INT8")
    return ", then ".join(does) or "nothing is changed"


def _transfer(level: OptimLevel, quantize: Mapping[str, Any] | None, asked: dict[str, Any]) -> Goal:
    """The goal of sparse transfer: the zeros of the model that is transferred from are kept, and it is quantized."""
    does = ["its zeros are kept"] * level.sparse + ["INT8"] * (quantize is not None)
    source = f"the {level.size} {'sparse' if level.sparse else 'dense'} model"
    text = f"optim level {level.level:g} of sparse-transfer, from {source}: {', then '.join(does) or 'as it is'}"
    return Goal("sparse-transfer", None, False, quantize, level.sparse, text, asked)


def _settings(sparsity: float, balance: float | None) -> PruningSettings:
    settings = PruningSettings(sparsity=sparsity)
    return settings if balance is None else replace(settings, balance=balance)


def _sparsity(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ArgumentError(f"sparsity: {value!r} is no fraction in [0, 1].")
    if not 0 <= value <= 1:
        hint = f" Did you mean {value / 100:g}?" if 1 < value <= 100 else ""
        raise ArgumentError(f"sparsity: {value!r} is no fraction in [0, 1].{hint}")
    return float(value)


def _wants_int8(given: object, by_level: bool) -> Mapping[str, Any] | None:
    """Fields of the QuantizationModifier that were given; None where nothing is quantized."""
    if given is None:
        return {} if by_level else None
    if isinstance(given, bool):
        return {} if given else None
    if isinstance(given, Mapping):
        return dict(given)
    raise ArgumentError(f"quantize: {given!r} is neither True, False nor a mapping of QuantizationModifier's fields.")


def _plain_goal(settings: PruningSettings) -> dict[str, Any]:
    found = asdict(replace(settings, overrides={}))
    return {**found, "overrides": {str(name): float(value) for name, value in settings.overrides.items()}}
