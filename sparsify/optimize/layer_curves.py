"""Loss and time of each layer over its sparsity, from the profiles of a model."""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsify.analysis.performance import SPARSITIES
from sparsify.errors import ArgumentError
from sparsify.optimize.piecewise import at

if TYPE_CHECKING:
    from sparsify.analysis.layers import ModelAnalysis
    from sparsify.analysis.loss import LossProfile
    from sparsify.analysis.performance import PerformanceProfile

__all__ = ["LayerCurve", "curves"]


TABLES = frozenset({"Embedding", "EmbeddingBag", "embedding", "embedding_bag"})
"""Types of layers that look rows up."""
REST = "(all else)"
"""The name of the curve of what belongs to no layer."""


@dataclass(frozen=True)
class LayerCurve:
    """Loss and time of one layer over its sparsity: plain figures, so that a profile can be computed anywhere.

    Attributes:
        weights: elements that pruning acts on.
        parameters: with bias.
        macs, ms: dense.
        first, grouped: what the settings leave dense by default.
        why_not: why it cannot be pruned at all; empty where it can.
        levels: sparsities, 0 first, growing.
        losses: at each level; comparable between layers.
        times: milliseconds at each level, of a runtime that skips zeros (or at this share of channels removed).
    """

    name: str
    weights: int
    parameters: int
    macs: int
    ms: float
    first: bool
    grouped: bool
    why_not: str
    levels: tuple[float, ...]
    losses: tuple[float, ...]
    times: tuple[float, ...]


def curves(
    analysis: ModelAnalysis,
    performance: PerformanceProfile | None,
    loss: LossProfile,
    *,
    tables: Container[str] = (),
) -> tuple[LayerCurve, ...]:
    """The curves of a model's layers for `pruning_profile`, from the model's profiles.

    Profiles of weights give what one more weight costs at a level; its integral over the pruned weights is the
    loss here. Without a performance profile a layer takes one millisecond for a million MACs: times then order layers
    and mean no more. Times at a sparsity are those of a runtime that skips zeros; onnxruntime does not.

    Args:
        analysis: the layers, in the order of the model.
        performance: measured times of the same model; None: by MACs.
        loss: a profile of pruning single weights of the same model.
        tables: names of embedding tables that may be pruned. Others stay dense: zeros in a table of words, positions
            or token types save no time, and cost more than those of any other layer.

    Raises:
        ArgumentError: the loss profile is one of quantization, or of channels.
    """
    if loss.of != "pruning" or loss.families:
        kind = "quantization" if loss.of != "pruning" else "channels"
        raise ArgumentError(f"loss: this is a profile of {kind}; give one of pruning single weights.")
    found = []
    first = True
    known = {} if performance is None else {layer.name: layer for layer in performance.layers}
    for layer in analysis.layers:
        why = layer.why_not_prunable
        if not why and layer.name not in loss.losses:
            why = "the loss profile does not know it"
        table = not why and layer.type in TABLES and layer.name not in tables
        why = "an embedding table" if table else why
        levels = tuple(loss.levels) if not why else (0.0,)
        timed = known.get(layer.name)
        if timed is None:
            ms = layer.macs / 1e6 if performance is None else 0.0
            times = tuple(ms * (1 - level) for level in levels)
        else:
            ms = timed.ms
            times = tuple(at(SPARSITIES, timed.sparse_ms, level) for level in levels)
        found.append(
            LayerCurve(
                name=layer.name,
                weights=layer.weights,
                parameters=layer.parameters,
                macs=layer.macs,
                ms=ms,
                first=first and not why,
                grouped=layer.groups > 1,
                why_not=why,
                levels=levels,
                losses=_losses_at(loss, layer.name, layer.weights) if not why else (0.0,),
                times=times,
            )
        )
        # A table before it is what reads the input: then no other layer is the first.
        first = first and bool(why) and not table
    parameters = analysis.parameters - sum(layer.parameters for layer in analysis.layers)
    rest = 0.0 if performance is None else math.fsum(performance.others.values())
    if parameters > 0 or rest > 0:
        found.append(
            LayerCurve(REST, 0, max(parameters, 0), 0, rest, False, False, "no layer", (0.0,), (0.0,), (rest,))
        )
    return tuple(found)


def _losses_at(loss: LossProfile, name: str, weights: int) -> tuple[float, ...]:
    """The loss that is added at each level, 0 at the first."""
    values = loss.increase(name)
    if loss.method in ("data", "fisher"):
        return tuple(value - values[0] for value in values)
    total, found = 0.0, [0.0]
    for number in range(1, len(values)):
        # A value stands for the slice that ends at its level.
        total += values[number] * (loss.levels[number] - loss.levels[number - 1]) * weights
        found.append(total)
    return tuple(found)
