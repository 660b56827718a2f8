"""`compare`: files and models beside the first, on the same samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify import ArgumentError, DataError, compare, export_onnx
from sparsify.cli.main import BAD, main


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3)).eval()


@pytest.fixture(scope="module")
def data() -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = network()(x).argmax(1)
    return list(zip(x.split(16), y.split(16), strict=True))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    export_onnx(network(), torch.zeros(2, 6), folder / "dense.onnx")
    export_onnx(network(1), torch.zeros(2, 6), folder / "other.onnx")
    return folder


def test_files_and_a_module_are_measured_on_the_same_samples(files: Path, data: Any, tmp_path: Path) -> None:
    found = compare(
        {"dense": files / "dense.onnx", "other": str(files / "other.onnx"), "again": network()}, data, rounds=3
    )
    dense, other, again = found.variants
    assert found.metric == "accuracy" and found.samples == 48
    assert dense.figures.metric == again.figures.metric == 1.0 and other.figures.metric is not None
    assert other.figures.metric < 1.0
    assert dense.agreement is not None and dense.agreement.error == 0.0 and dense.agreement.same_decisions == 1.0
    assert other.agreement is not None and other.agreement.same_decisions == pytest.approx(other.figures.metric)
    assert dense.figures.times_as_fast == 1.0 and other.slowest <= other.figures.times_as_fast <= other.fastest
    assert dense.figures.bytes == (files / "dense.onnx").stat().st_size
    assert [one["name"] for one in json.loads(found.to_json())["variants"]] == ["dense", "other", "again"]
    assert all(
        word in str(found) for word in ("Beside dense: 48 samples", "Times as fast", "accuracy", "Same decisions")
    )
    pytest.importorskip("matplotlib")
    assert found.plot(tmp_path / "trade.svg").stat().st_size > 1000
    with pytest.raises(ArgumentError, match=r"\.png, \.pdf or \.svg"):
        found.plot(tmp_path / "trade.txt")


def test_sizes_and_times_need_no_data(files: Path, tmp_path: Path) -> None:
    found = compare([files / "dense.onnx", files / "other.onnx"], rounds=2)
    assert [one.name for one in found.variants] == ["dense.onnx", "other.onnx"] and found.metric is None
    assert all(one.agreement is None for one in found.variants) and "accuracy" not in str(found)
    with pytest.raises(ArgumentError, match="nothing to draw"):
        found.plot(tmp_path / "trade.svg")


def test_a_metric_of_ones_own(files: Path, data: Any) -> None:
    def wrong(outputs: Any, labels: Any) -> float:
        return float((outputs["output"].argmax(1) != labels).sum())

    found = compare([files / "dense.onnx", files / "other.onnx"], data, wrong, rounds=1)
    assert found.metric == "wrong" and found.variants[0].figures.metric == 0


@pytest.mark.slow
def test_levels_are_compressed_and_compared(data: Any) -> None:
    wide = nn.Sequential(nn.Linear(6, 256), nn.ReLU(), nn.Linear(256, 3)).eval()
    found = compare(wide, data * 8, levels=(0.2, 0.5), rounds=2)
    assert [one.name for one in found.variants] == ["Sequential", "level 0.2", "level 0.5"]
    assert found.samples == 8 * 48 - 256, "those that were not calibrated with"
    last = found.variants[2].agreement
    assert last is not None and 0 < last.error < 0.5


def test_what_cannot_be_meant_is_refused(files: Path, data: Any, tmp_path: Path) -> None:
    dense = files / "dense.onnx"
    for variants, given, match in (
        ([dense], {}, "two or more"),
        ([], {}, "variants is empty"),
        (3, {}, "variants is a int"),
        ([dense, 3], {}, "path of an ONNX file"),
        ([dense, dense], {"rounds": 0}, "rounds=0"),
        ([dense, dense], {"threads": True}, "threads=True"),
        ([network(), network(1)], {}, "give data or sample_inputs"),
        ([dense, dense], {"metric": "accuracy"}, "no labels"),
    ):
        with pytest.raises(ArgumentError, match=match):
            compare(variants, **given)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no such file"):
        compare([dense, tmp_path / "none.onnx"])


def test_the_command(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, other = str(files / "dense.onnx"), str(files / "other.onnx")
    assert main(["compare", dense, other, "--rounds", "2", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["variants"]) == 2
    assert main(["compare", dense]) == BAD
    assert "two or more" in capsys.readouterr().err
    assert main(["compare", dense, other, "--plot", str(tmp_path / "a.txt")]) == BAD
