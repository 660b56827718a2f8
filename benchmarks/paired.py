"""Two things timed in turn, A B B A ..., and the ratio of each pair: what drifts on a shared machine cancels out."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Ratio", "machine", "paired"]


@dataclass(frozen=True)
class Ratio:
    """Times in seconds and their ratios pair by pair."""

    a: list[float]
    b: list[float]

    @property
    def ratios(self) -> list[float]:
        return [x / y for x, y in zip(self.a, self.b, strict=True)]

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    def __str__(self) -> str:
        ratios = self.ratios
        return (
            f"{statistics.median(ratios):.3f} (min {min(ratios):.3f}, max {max(ratios):.3f}, {len(ratios)} pairs; "
            f"{1e3 * statistics.median(self.a):.2f} ms against {1e3 * statistics.median(self.b):.2f} ms)"
        )


def paired(
    a: Callable[[], object],
    b: Callable[[], object],
    *,
    pairs: int,
    repeats: int = 1,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> Ratio:
    """Runs `a` and `b` in turn, `repeats` calls a measurement, the order swapped every pair.

    Args:
        pairs: how many ratios are taken.
        repeats: calls in one measurement; choose it so that a measurement lasts 20 ms or more.
        warmup: measurements of each that are thrown away first.
        clock: seconds; `time.process_time` where other programs compete for the cores, and nothing waits.
    """

    def measure(work: Callable[[], object]) -> float:
        start = clock()
        for _ in range(repeats):
            work()
        return (clock() - start) / repeats

    for _ in range(warmup):
        measure(a)
        measure(b)
    times_a: list[float] = []
    times_b: list[float] = []
    for index in range(pairs):
        if index % 2:
            times_b.append(measure(b))
            times_a.append(measure(a))
        else:
            times_a.append(measure(a))
            times_b.append(measure(b))
    return Ratio(times_a, times_b)


def machine(*packages: str) -> str:
    """One line: the processor, threads and the versions of `packages`."""
    from importlib.metadata import version

    import torch

    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", *packages))
    processor = platform.processor() or platform.machine()
    return f"{processor}, {torch.get_num_threads()} thread(s), Python {platform.python_version()}, {versions}"
