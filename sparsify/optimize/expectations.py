"""Predicts zeros, parameters, MACs, size and time of the model that a recipe makes, before it is trained."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sparsify.analysis.analyze import analyze_model
from sparsify.model.copies import deep_copied
from sparsify.model.targets import named_parameters
from sparsify.modifiers.schedule import Clock
from sparsify.optimize.piecewise import at
from sparsify.recipe.evidence import Expected
from sparsify.training.manager import ScheduledModifierManager

if TYPE_CHECKING:
    from torch import nn

    from sparsify.analysis.layers import ModelAnalysis
    from sparsify.analysis.performance import PerformanceProfile
    from sparsify.model.signature import InputsLike
    from sparsify.modifiers.base import Modifier
    from sparsify.optimize.latency import LatencyPlan
    from sparsify.optimize.pruning_profiles import PruningProfile

__all__: list[str] = []

LATE = Clock(10**9, 1e9)
"""After every end."""


def expected(
    model: nn.Module,
    modifiers: Sequence[Modifier],
    zeros: Mapping[str, float],
    *,
    inputs: InputsLike | None,
    analysis: ModelAnalysis | None,
    profile: PruningProfile | None,
    performance: PerformanceProfile | None,
    latency: LatencyPlan | None,
) -> Expected:
    """The figures expected of `model` after `modifiers`; the model is not touched.

    Args:
        model: the dense model.
        modifiers: those of the recipe.
        zeros: the sparsity that each parameter gets, where single weights go.
        inputs: of the model, where whole channels go: they are removed from a copy, whose figures are exact.
        analysis: with MACs; None where they are not known.
        profile: the pruning profile that the sparsities come from, for recovery and times.
        performance: measured times of the dense model.
        latency: the latency plan that the recipe follows; its times count then.
    """
    quantized = any(m.kind == "quantization" for m in modifiers)
    before = {name: p.numel() for name, p in named_parameters(model).items()}
    bytes_before = sum(p.numel() * p.element_size() for p in named_parameters(model).values())
    macs = None if analysis is None else analysis.macs
    after_model, after_analysis = model, analysis
    if any(m.cuts() for m in modifiers):
        after_model = without_channels(model, modifiers, inputs)
        after_analysis = None if analysis is None else analyze_model(after_model, inputs)
    parameters = named_parameters(after_model)
    # A bias that starts at zero is trained away from it.
    left = {name: float(p.detach().count_nonzero()) if p.dim() > 1 else p.numel() for name, p in parameters.items()}
    left = {name: min(count, parameters[name].numel() * (1 - zeros.get(name, 0.0))) for name, count in left.items()}
    ms, skipping = _expected_times(modifiers, profile, performance, analysis, after_analysis, quantized=quantized)
    dense_ms = None if performance is None else performance.total_ms
    if latency is not None:
        dense_ms, skipping = latency.dense_ms, None
        ms = latency.predicted_ms if latency.measured_ms is None else latency.measured_ms
    macs_after = None if after_analysis is None else after_analysis.macs
    return Expected(
        what="channels" if after_model is not model else "weights",
        sparsity=_share_of(zeros, before) if profile is None else profile.sparsity,
        recovery=None if profile is None else profile.recovery,
        parameters_before=sum(before.values()),
        parameters=sum(p.numel() for p in parameters.values()),
        nonzero=sum(left.values()),
        macs_before=macs,
        macs=macs_after,
        nonzero_macs=None
        if after_analysis is None
        else sum(info.macs * (1 - zeros.get(info.weight or "", 0.0)) for info in after_analysis.layers),
        size_bytes_before=bytes_before,
        size_bytes=_expected_size(after_model, modifiers, after_analysis),
        ms_before=dense_ms,
        ms=ms,
        ms_skipping=skipping,
    )


def without_channels(
    model: nn.Module, modifiers: Sequence[Modifier], inputs: InputsLike | None, epoch: float = math.inf
) -> nn.Module:
    """A copy of `model` without the channels that `modifiers` remove up to `epoch`, by the weights as they are now.

    Raises:
        SparsifyError: they cannot be chosen before training.
    """
    smaller = deep_copied(model)
    # Other pruning may make the zeros by which a modifier finds the channels to remove.
    shaping = [modifier for modifier in modifiers if modifier.kind in ("pruning", "structure")]
    with warnings.catch_warnings():
        # The run itself will warn.
        warnings.simplefilter("ignore")
        return ScheduledModifierManager(shaping).apply(smaller, epoch, sample_inputs=inputs)


def stored_bits(
    modifiers: Sequence[Modifier], clock: Clock, model: nn.Module, analysis: ModelAnalysis | None
) -> dict[str, int]:
    """The bits of quantized weights in the exported file, by parameter; with an analysis, of what can be quantized."""
    bits: dict[str, int] = {}
    for modifier in modifiers:
        bits.update(modifier.foreseen_bits(clock, model))
    stays = set() if analysis is None else {info.weight for info in analysis.layers if not info.quantizable}
    return {name: count for name, count in bits.items() if name not in stays}


def _expected_size(model: nn.Module, modifiers: Sequence[Modifier], analysis: ModelAnalysis | None) -> float:
    """Bytes of the parameters in the exported file."""
    bits = stored_bits(modifiers, LATE, model, analysis)
    return sum(p.numel() * bits.get(n, 8 * p.element_size()) / 8 for n, p in named_parameters(model).items())


def _expected_times(
    modifiers: Sequence[Modifier],
    profile: PruningProfile | None,
    performance: PerformanceProfile | None,
    analysis: ModelAnalysis | None,
    after: ModelAnalysis | None,
    *,
    quantized: bool,
) -> tuple[float | None, float | None]:
    """Milliseconds in onnxruntime, and in a runtime that skips zeros, in float; None where nothing was measured."""
    if performance is None:
        return None, None
    ms = performance.total_int8_ms if quantized else performance.total_ms
    if any(modifier.cuts() for modifier in modifiers):
        totals = performance.width_total_int8_ms if quantized else performance.width_total_ms
        if analysis is None or after is None or not totals or not analysis.macs:
            return None, None
        # MACs go with the product of both widths, so the root of what is left of them is the width in and out.
        width = math.sqrt(after.macs / analysis.macs)
        widths, times = zip(*sorted(zip(performance.widths, totals, strict=True)), strict=True)
        return at(widths, times, width), None
    if profile is None or not profile.ms_before:
        return ms, None
    # The profiler costs time itself, so it is the share that counts.
    return ms, performance.total_ms * profile.ms_after / profile.ms_before


def _share_of(zeros: Mapping[str, float], sizes: Mapping[str, int]) -> float:
    weights = sum(sizes[name] for name in zeros)
    return sum(share * sizes[name] for name, share in zeros.items()) / weights if weights else 0.0
