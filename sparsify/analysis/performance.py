"""What each layer costs in onnxruntime: in float, in int8, and with fewer channels. Measured, and kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["LayerPerformance", "PerformanceProfile"]

SPARSITIES = (0.0, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.975, 0.99)
WIDTHS = (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25)


@dataclass(frozen=True)
class LayerPerformance:
    """Of one layer, by the name that it has in `ModelAnalysis`.

    Attributes:
        ms: one call of the model with the profile's batch, in float; measured, the layer's fused followers included.
        int8_ms: likewise in int8; None where it was not measured or stays in float.
        sparse_ms: at each of `SPARSITIES`, of a runtime that skips zeros: the stated cost model. onnxruntime skips
            none: its time is `ms` at each.
        width_ms: measured, at each of `WIDTHS`: this fraction of the channels in and out; None where nothing of it can
            be removed.
        width_int8_ms: likewise in int8.
    """

    name: str
    ms: float
    int8_ms: float | None
    sparse_ms: tuple[float, ...]
    width_ms: tuple[float, ...] | None
    width_int8_ms: tuple[float, ...] | None


@dataclass(frozen=True)
class PerformanceProfile:
    """Times of a whole model and of its layers.

    Attributes:
        total_ms, total_int8_ms: the whole model, without the profiler, median.
        totals: the whole model in float and int8 at further batch sizes and threads: {"batch 8, 2 threads, int8": ms}.
        content: the hash of what was measured; a profile of the same content is not measured again.
        versions: of onnxruntime and so on, and the processor.
    """

    layers: tuple[LayerPerformance, ...]
    total_ms: float
    total_int8_ms: float | None
    totals: Mapping[str, float]
    batch_size: int
    threads: int
    content: str
    versions: Mapping[str, str]
