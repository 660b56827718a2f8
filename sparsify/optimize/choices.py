"""The sparsity of each parameter with the figures it comes from: a pruning profile in the terms of a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sparsify.analysis.analyze import analyze_model
from sparsify.analysis.loss import COSTS, HOW
from sparsify.analysis.units import layer_name
from sparsify.errors import ArgumentError
from sparsify.model.targets import named_parameters, owners
from sparsify.optimize.allocation import pruning_profile
from sparsify.optimize.group_curves import (
    channel_group_curves,
    channel_groups_of,
    of_channels,
    weights_by_layer,
    without_inputs,
)
from sparsify.optimize.layer_curves import curves
from sparsify.optimize.piecewise import at
from sparsify.recipe.evidence import LayerEvidence

if TYPE_CHECKING:
    from torch import nn

    from sparsify.analysis.layers import ModelAnalysis
    from sparsify.analysis.loss import LossProfile
    from sparsify.analysis.performance import PerformanceProfile
    from sparsify.model.signature import InputsLike
    from sparsify.optimize.latency import LatencyPlan
    from sparsify.optimize.layer_curves import LayerCurve
    from sparsify.optimize.pruning_profiles import PruningProfile, PruningSettings

__all__: list[str] = []


@dataclass(frozen=True)
class Sources:
    """The analysis and the profiles that the numbers of a recipe come from."""

    analysis: ModelAnalysis
    performance: PerformanceProfile | None
    loss: LossProfile | None
    texts: Mapping[str, str]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        inputs: InputsLike | None,
        analysis: ModelAnalysis | None,
        performance: PerformanceProfile | None,
        loss: LossProfile | None,
        latency: LatencyPlan | None,
    ) -> Sources:
        """The analysis and the profiles that were given, completed as far as no data are needed.

        Raises:
            ArgumentError: a profile is of another model.
        """
        if analysis is None:
            analysis = without_inputs(model) if inputs is None else analyze_model(model, inputs)
        # Layers that are not computed on these inputs are in no analysis, but in a profile of all weights.
        names = {info.name for info in analysis.layers} | {layer_name(name, own) for name, _, own in owners(model)}
        for what, others in (
            ("performance", [] if performance is None else [layer.name for layer in performance.layers]),
            ("loss", [] if loss is None or loss.families else list(loss.losses)),
        ):
            strange = [name for name in others if name not in names]
            if strange:
                raise ArgumentError(f"{what}: it is of another model: {strange[0]!r} is no layer of this one.")
        texts: dict[str, str] = {}
        if loss is not None:
            ways = {
                "data": f"measured on {loss.samples} samples, one layer at a time; {loss.base:.4g} as it is",
                "fisher": f"estimated from gradients of {loss.samples} samples",
            }
            texts[COSTS.get(loss.method, "loss")] = ways.get(loss.method, HOW[loss.method])
        if performance is not None:
            runtime = performance.versions.get("onnxruntime", "")
            texts["time"] = (
                f"measured in onnxruntime {runtime}, batch {performance.batch_size}, {performance.threads} threads; "
                "where zeros are skipped, by the cost model"
            )
        elif analysis.macs:
            texts["time"] = "not measured; by MACs"
        if latency is not None:
            goal = f"at most {latency.goal_ms:.4g} ms, batch {latency.batch_size}, {latency.threads} threads"
            seen = "not measured" if latency.measured_ms is None else f"measured {latency.measured_ms:.4g} ms"
            texts["time"] = f"by a latency plan: {goal}; predicted {latency.predicted_ms:.4g} ms, {seen}"
            texts = {"cost": f"by a latency plan: +{latency.loss:.4g} ({latency.loss_method})", "time": texts["time"]}
        return cls(analysis, performance, loss, texts)


@dataclass
class WeightShares:
    """The share of its weights, or of its channels, that each parameter loses."""

    shares: dict[str, float] = field(default_factory=dict)
    evidence: dict[str, LayerEvidence] = field(default_factory=dict)
    dense: dict[str, str] = field(default_factory=dict)
    profile: PruningProfile | None = None
    notes: list[str] = field(default_factory=list)
    floating: list[str] = field(default_factory=list)
    """Layers that stay in float where others are quantized."""


def by_layers(settings: PruningSettings, given: PruningProfile | None, found: Sources) -> WeightShares:
    """Prunes single weights, layer by layer."""
    assert found.loss is not None
    layers = curves(found.analysis, found.performance, found.loss, tables=settings.overrides)
    profile = given or pruning_profile(layers, settings)
    weights = weights_by_layer(found.analysis)
    _check_names(profile, weights)
    return _shares_taken(profile, {name: (weight,) for name, weight in weights.items()}, layers, found)


def by_channel_groups(
    model: nn.Module,
    inputs: InputsLike | None,
    settings: PruningSettings,
    given: PruningProfile | None,
    found: Sources,
) -> WeightShares:
    """Prunes whole channels, channel group by channel group."""
    layers, rows = channel_group_curves(
        model, channel_groups_of(model, inputs), found.analysis, found.performance, found.loss
    )
    profile = given or pruning_profile(layers, of_channels(settings))
    _check_names(profile, rows)
    return _shares_taken(profile, rows, layers, found)


def _check_names(profile: PruningProfile, known: Iterable[str]) -> None:
    names = set(known)
    missing = [choice.name for choice in profile.layers if choice.sparsity > 0 and choice.name not in names]
    if missing:
        raise ArgumentError(
            f"pruning_profile: {missing[0]!r} is no layer of this model that can be pruned; make the profile from the "
            "analysis of this model, and for structured pruning from its channel groups."
        )


def _shares_taken(
    profile: PruningProfile, weights: Mapping[str, Sequence[str]], layers: Sequence[LayerCurve], found: Sources
) -> WeightShares:
    chosen = WeightShares(profile=profile, notes=list(profile.notes))
    by_name = {layer.name: layer for layer in layers}
    for choice in profile.layers:
        # Written with as many digits as mean something: 0.8371 of a million weights is exact to 50 of them.
        share = round(choice.sparsity, 4)
        if share <= 0 and choice.name in weights:
            chosen.dense[choice.name] = choice.why
        if share <= 0:
            continue
        curve = by_name.get(choice.name)
        cost = saved = None
        if curve is not None:
            cost = at(curve.levels, curve.losses, share) - curve.losses[0]
            saved = None if found.performance is None else curve.ms - at(curve.levels, curve.times, share)
        for weight in weights[choice.name]:
            chosen.shares[weight] = share
            size = next((i.weights for i in found.analysis.layers if i.weight == weight), 0)
            chosen.evidence[weight] = LayerEvidence(share, size, _digits(cost), _digits(saved))
    return chosen


def by_latency_plan(plan: LatencyPlan, model: nn.Module, found: Sources) -> WeightShares:
    """Prunes whole channels, as many as the plan says."""
    parameters = named_parameters(model)
    missing = [name for name in plan.sparsity if plan.weights.get(name) not in parameters]
    if missing:
        raise ArgumentError(f"latency_plan: {missing[0]!r} is no layer of this model; make the plan for this model.")
    modules = dict(model.named_modules())
    chosen = WeightShares(notes=list(plan.notes), floating=[name for name in plan.floating if name in modules])
    for name, share in plan.sparsity.items():
        weight = plan.weights[name]
        chosen.shares[weight] = round(share, 6)
        chosen.evidence[weight] = LayerEvidence(round(share, 6), parameters[weight].numel(), None, None)
    whole = [info.name for info in found.analysis.layers if info.weight is not None and info.name not in plan.sparsity]
    chosen.dense = dict.fromkeys(whole, "least loss within the time")
    return chosen


def _digits(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
