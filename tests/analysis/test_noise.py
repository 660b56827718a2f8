"""Times that cannot be right are measured again, and marked where they stay so. Times are given, not measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparsify.analysis import profiling
from sparsify.analysis.analyze import analyze_model
from sparsify.analysis.node_times import NodeTimes
from sparsify.analysis.noise import twins
from sparsify.analysis.profiling import Measured, ProfileSettings
from sparsify.analysis.variants import Form

QUIET = {"0": 1.0, "2": 1.02, "4": 0.5}
BUSY = {"0": 1.0, "2": 3.4, "4": 0.5}


def three_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))


def profile(given: dict[str, list[dict[str, float]]], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, int]]:
    """A profile made of the given times of each kind, one a measurement; how often each kind was measured."""
    series: dict[str, Iterator[dict[str, float]]] = {kind: iter(times) for kind, times in given.items()}
    counts = dict.fromkeys(given, 0)

    def measure(self: Any, path: Path, floating: Any = frozenset(), *, all_totals: bool = False) -> Measured:
        kind = "int8" if "int8" in path.name else "float"
        counts[kind] += 1
        times = next(series[kind])
        return Measured(NodeTimes(times, {}, sum(times.values())), {(1, 1): sum(times.values())}, floating)

    monkeypatch.setattr(profiling.Bench, "measure", measure)
    settings = ProfileSettings((1,), (1,), "int8" in given, (), iterations=1, warmup=0)
    bench = profiling.Bench(analyze_model(three_layers(), torch.randn(1, 6)), {}, settings)
    forms = {(kind, 1.0): Form(Path(f"{kind}.onnx")) for kind in given}
    return profiling._assembled("model", bench, bench.measure_all(forms, False), set(), "", {}, {}), counts


def test_quiet_times_are_measured_twice_and_have_their_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    slower = {name: 1.1 * ms for name, ms in QUIET.items()}
    found, counts = profile({"float": [slower, QUIET]}, monkeypatch)
    assert counts == {"float": 2} and found.doubtful == {}
    assert found.layer("0").ms == 1.0 and found.layer("0").spread_ms == (1.0, 1.1)
    assert found.total_spread_ms == pytest.approx((2.52, 2.772))
    assert "(?)" not in str(found) and "5%" in str(found)


def test_twins_that_differ_are_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    found, counts = profile({"float": [BUSY, BUSY, QUIET, QUIET]}, monkeypatch)
    assert counts == {"float": 4} and found.doubtful == {}
    assert found.layer("2").ms == 1.02 and found.total_ms == pytest.approx(2.52)


def test_times_that_cannot_be_right_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    found, counts = profile({"float": [BUSY] * 5}, monkeypatch)
    assert counts == {"float": 5}
    assert found.doubtful == {"2": "takes 3.4 ms, and 0, which computes the same, 1 ms"}
    text = str(found)
    assert "2 (?)" in text and "the machine was busy" in text and "2 takes 3.4 ms" in text


def test_a_gain_of_int8_beyond_any_kernel_is_measured_again_and_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = {"0": 0.3, "2": 0.3, "4": 0.03}
    found, counts = profile({"float": [QUIET] * 5, "int8": [fast] * 5}, monkeypatch)
    assert counts == {"float": 5, "int8": 5}
    assert found.doubtful == {"4": "takes 0.5 ms in float and 0.03 ms in int8, 17 times less"}


def test_a_layer_that_takes_now_this_and_now_that_is_measured_again_and_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = {**QUIET, "4": 2.0}
    found, counts = profile({"float": [QUIET, slow, slow, slow, slow]}, monkeypatch)
    assert counts == {"float": 5} and found.doubtful == {"4": "took 0.5 to 2 ms"}
    found, counts = profile({"float": [slow, QUIET, QUIET]}, monkeypatch)
    assert counts == {"float": 3} and found.doubtful == {}


def test_differences_below_the_resolution_of_the_profiler_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"0": 0.004, "2": 0.012, "4": 0.001}
    _, counts = profile({"float": [tiny, tiny]}, monkeypatch)
    assert counts == {"float": 2}


def test_twins_compute_the_same_on_the_same_sizes() -> None:
    assert twins(analyze_model(three_layers(), torch.randn(1, 6))) == [["0", "2"]]
    strided = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, 2, padding=1), nn.Conv2d(3, 3, 1))
    assert twins(analyze_model(strided, torch.randn(1, 3, 8, 8))) == []
