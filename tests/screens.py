"""A report to show in tests: figures as they come, without a model."""

from __future__ import annotations

import random
from pathlib import Path

from sparsify.analysis.layers import LayerInfo, ModelAnalysis
from sparsify.onnx.benchmark import Benchmark
from sparsify.optimize.layer_curves import LayerCurve
from sparsify.optimize.pruning_profiles import PruningSettings
from sparsify.optimize.screen import Report
from sparsify.optimize.stages import OriginalTraining

LEVELS = (0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99)


def curve(number: int, chance: random.Random) -> LayerCurve:
    weights = chance.randint(10, 10**6)
    losses = [0.0]
    for _ in LEVELS[1:]:
        losses.append(losses[-1] + chance.random() ** 3)
    ms = chance.uniform(0.01, 2.0)
    return LayerCurve(
        name=f"layer{number}",
        weights=weights,
        parameters=weights + 16,
        macs=weights * 100,
        ms=ms,
        first=number == 0,
        grouped=number % 5 == 4,
        why_not="it is a norm" if number == 3 else "",
        levels=LEVELS,
        losses=tuple(losses),
        times=tuple(ms * max(1 - level, 0.1) for level in LEVELS),
    )


def info(one: LayerCurve) -> LayerInfo:
    name, why = one.name, one.why_not
    sizes = (one.parameters, one.weights, one.macs)
    return LayerInfo(
        name, "Conv2d", f"{name}.weight", None, ((1, 3, 8, 8),), (1, 8, 6, 6), *sizes, 1, 1, 0.0, 32, why, ""
    )


def benchmark(ms: float) -> Benchmark:
    return Benchmark(
        path=Path("model.onnx"),
        batch_size=1,
        threads=1,
        iterations=50,
        latency_p50_ms=ms,
        latency_p95_ms=ms * 1.2,
        latency_mean_ms=ms,
        throughput=1e3 / ms,
        size_bytes=int(1e6 * ms),
        gzip_bytes=int(8e5 * ms),
        inputs={"x": "float32[1, 3, 8, 8]"},
        versions={"onnxruntime": "1"},
        providers=("CPUExecutionProvider",),
    )


def report(layers: int = 24, seed: int = 0) -> Report:
    chance = random.Random(seed)
    found = tuple(curve(number, chance) for number in range(layers))
    analysis = ModelAnalysis("Net", tuple(map(info, found)), (), sum(one.parameters for one in found), 1)
    return Report(
        analysis=analysis,
        curves=found,
        settings=PruningSettings(balance=0.8),
        training=OriginalTraining(90, 0.1, 0.001),
        benchmarks={"dense": benchmark(4.0), "pruned, int8": benchmark(1.5)},
        loss_method="data",
        loss_base=0.25,
    )
