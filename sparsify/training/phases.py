"""Phases of a model in training: dense, pruned, quantized, told from the windows of the modifiers alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from sparsify.modifiers.base import Modifier
from sparsify.modifiers.schedule import EPOCH_TOLERANCE, Clock

__all__ = ["Phase"]

Phase = Literal["dense", "pruned", "pruned_quantized", "quantized_pruned", "dense_quantized"]


def phase_at(modifiers: Sequence[Modifier], epoch: float) -> Phase | None:
    """The phase at `epoch`; None while it changes.

    A pruning window changes it from its start to its end, both included; quantization at its very start. A modifier
    that only holds zeros changes nothing after its start.
    """
    pruning = [m for m in modifiers if m.kind == "pruning"]
    starts = [m.window.start for m in modifiers if m.kind == "quantization"]
    for modifier in pruning:
        window = modifier.window
        # A modifier that holds zeros from "at once" on changes nothing at any moment.
        if modifier.holds:
            if epoch == window.start and modifier.start_epoch != -1:
                return None
        elif window.start <= epoch <= window.end:
            return None
    if epoch in starts:
        return None
    done = [m.window.start if m.holds else m.window.end for m in pruning]
    pruned = [e for e in done if e <= epoch]
    quantized = [start for start in starts if start < epoch]
    if not pruned:
        return "dense_quantized" if quantized else "dense"
    if not quantized:
        return "pruned"
    return "quantized_pruned" if min(quantized) < max(pruned) else "pruned_quantized"


def is_quantizing(modifiers: Sequence[Modifier], epoch: float, steps_per_epoch: int | None) -> bool:
    """True if quantization has started by the end of the first step of `epoch`."""
    clock = Clock(0, epoch if steps_per_epoch is None else epoch + 1 / steps_per_epoch, steps_per_epoch)
    return any(m.kind == "quantization" and clock.reached(m.window.start) for m in modifiers)


def settled_epoch(modifiers: Sequence[Modifier]) -> float:
    """The epoch from which the recipe has done its work: final sparsity reached, channels and layers gone, quantized.

    What only holds or trains on (masks that stay, learning rates, distillation) asks for nothing after it; 0 where
    nothing changes the model.
    """
    last = 0.0
    for modifier in modifiers:
        window = modifier.window
        if modifier.kind == "pruning" and not modifier.holds:
            last = max(last, window.end if window.end < float("inf") else window.start)
        elif modifier.kind in ("pruning", "quantization", "palettization", "structure"):
            last = max(last, window.start)
        last = max(last, *modifier.cuts(), 0.0)
    return last


def is_settled(modifiers: Sequence[Modifier], epoch: float, steps_per_epoch: int) -> bool:
    """True if the recipe has done its work at `epoch`, and quantized layers, if there are any, have seen a step."""
    tolerance = EPOCH_TOLERANCE / max(1, steps_per_epoch)
    starts = [m.window.start for m in modifiers if m.kind == "quantization"]
    return epoch + tolerance >= settled_epoch(modifiers) and all(epoch > start + tolerance for start in starts)
