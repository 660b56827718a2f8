"""The goal of a recipe, from whichever argument states it, checked before anything is done."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_args

from sparsify.errors import ArgumentError, did_you_mean
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


def goal_of(
    *,
    level: Any,
    experiment: Any,
    preset: Any,
    sparsity: Any,
    settings: Any,
    profile: PruningProfile | None,
    latency: Any,
    quantize: Any,
    structured: Any,
) -> Goal:
    """The goal that the arguments of `create_recipe` say.

    Raises:
        ArgumentError: one of them cannot be meant, or two contradict one another.
    """
    said = {
        "optim_level": level,
        "sparsity": sparsity,
        "settings": settings,
        "pruning_profile": profile,
        "latency_plan": latency,
    }
    given = [name for name, value in said.items() if value is not None]
    if len(given) > 1:
        raise ArgumentError(f"{' and '.join(given)}: each says how much; give one of them.")
    known = get_args(Experiment)
    if experiment not in known:
        raise ArgumentError(
            f"experiment: {experiment!r} is none of {', '.join(known)}.{did_you_mean(str(experiment), known)}"
        )
    if preset is not None and given and given[0] not in ("optim_level", "sparsity"):
        raise ArgumentError(f"preset and {given[0]}: the latter says all that a preset says; leave one out.")
    named = None if preset is None else preset_of(preset)
    if structured is not None and not isinstance(structured, bool):
        raise ArgumentError(f"structured: {structured!r} is neither True nor False.")
    whole = structured if structured is not None else named is not None and named.structured
    asked: dict[str, Any] = {"experiment": experiment} | ({} if preset is None else {"preset": preset})
    if experiment == "sparse-transfer" and given and given[0] != "optim_level":
        raise ArgumentError(f"{given[0]}: sparse transfer keeps the zeros that a model has; give an optim_level.")
    if latency is not None:
        return _timed_goal(latency, experiment, structured, quantize, asked)
    wanted: PruningSettings | None
    balance = None if named is None else named.balance
    if profile is not None:
        if not isinstance(profile, PruningProfile):
            raise ArgumentError(f"pruning_profile: a {type(profile).__name__} is none; give what pruning_profile gave.")
        wanted, text, int8 = profile.settings, "a pruning profile", False
    elif settings is not None:
        if not isinstance(settings, PruningSettings):
            raise ArgumentError(f"settings: a {type(settings).__name__} is none; give PruningSettings(...).")
        wanted, text, int8 = settings, "the settings given", False
    elif sparsity is not None:
        wanted, text, int8 = (
            _settings(_sparsity(sparsity), balance),
            f"sparsity {float(sparsity):.4g}",
            False,
        )
    else:
        value = level if level is not None else named.level if named is not None else 0.5
        meant = optim_level(value, experiment)
        asked["optim_level"] = meant.level
        if experiment == "sparse-transfer":
            return _transfer(meant, _wants_int8(quantize, meant.quantize), asked)
        wanted = _settings(meant.sparsity, balance) if meant.sparsity else None
        int8 = meant.quantize and (named is None or named.quantize)
        text = f"optim level {meant.level:g} of {experiment}"
    fields = _wants_int8(quantize, int8)
    if preset is not None:
        text += f', preset "{preset}"'
    return Goal(
        experiment,
        wanted,
        whole and wanted is not None,
        fields,
        False,
        f"{text}: {_does(wanted, whole, fields)}",
        asked | ({} if wanted is None else {"structured": whole, "settings": _plain_goal(wanted)}),
    )


def _timed_goal(
    latency: Any, experiment: Experiment, structured: bool | None, quantize: Any, asked: dict[str, Any]
) -> Goal:
    from sparsify.optimize.latency import LatencyPlan

    if not isinstance(latency, LatencyPlan):
        raise ArgumentError(f"latency_plan: a {type(latency).__name__} is none; give what latency_plan gave.")
    if structured is False:
        raise ArgumentError("structured: False, but a latency plan is about whole channels; leave it out.")
    fields = _wants_int8(quantize, latency.quantized)
    text = f"at most {latency.goal_ms:.4g} ms at batch {latency.batch_size}: whole channels go"
    text += ", then INT8" if fields is not None else ""
    asked |= {"goal_ms": latency.goal_ms, "batch_size": latency.batch_size, "threads": latency.threads}
    return Goal(experiment, None, True, fields, False, text, asked)


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


def _sparsity(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ArgumentError(f"sparsity: {value!r} is no fraction in [0, 1].")
    if not 0 <= value <= 1:
        hint = f" Did you mean {value / 100:g}?" if 1 < value <= 100 else ""
        raise ArgumentError(f"sparsity: {value!r} is no fraction in [0, 1].{hint}")
    return float(value)


def _wants_int8(given: Any, by_level: bool) -> Mapping[str, Any] | None:
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
