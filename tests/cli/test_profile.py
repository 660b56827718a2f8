"""`sparsify profile`: what it measures, where it keeps it, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from sparsify import LossProfile, PerformanceProfile
from sparsify.cli.main import BAD, main

MODELS = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))

def batches():
    torch.manual_seed(1)
    return [(torch.randn(8, 6), torch.randint(0, 3, (8,))) for _ in range(2)]
"""
LAYERS = ["0", "2", "4"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delitem(sys.modules, "kiosk", raising=False)
    Path("kiosk.py").write_text(MODELS)
    return tmp_path


def answer(words: str, capsys: pytest.CaptureFixture[str]) -> Any:
    assert main(f"profile kiosk:build {words} --json".split()) == 0
    return json.loads(capsys.readouterr().out)


def test_both_profiles_are_printed_and_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "kiosk:build", "--input", "1x6", "--iterations", "2", "--output", "made"]) == 0
    said = capsys.readouterr()
    assert all(word in said.out for word in ("ms per batch", "Spread", "By layer", "Loss by layer"))
    assert "measuring: " in said.err, "progress is told without a terminal too"
    times, losses = PerformanceProfile.load("made/performance.json"), LossProfile.load("made/loss.json")
    assert [layer.name for layer in times.layers] == list(losses.losses) == LAYERS
    assert all(layer.spread_ms is not None and layer.spread_ms[0] <= layer.ms for layer in times.layers)


def test_losses_on_data_alone(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer("--loss --data kiosk:batches --criterion torch.nn.functional:cross_entropy", capsys)
    assert list(found) == ["loss"] and found["loss"]["method"] == "data" and found["loss"]["samples"] == 16


def test_times_alone_are_kept_by_content(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--performance --input 1x6 --iterations 2"
    first = answer(words, capsys)
    assert list(first) == ["performance"] and answer(words, capsys) == first
    assert len(list(Path("cache/sparsify/performance").iterdir())) == 1
    assert answer(f"{words} --no-cache", capsys)["performance"]["content"] == first["performance"]["content"]


def test_what_was_measured_is_kept_where_the_rest_fails(capsys: pytest.CaptureFixture[str]) -> None:
    words = "profile kiosk:build --input 1x6 --iterations 2 --output made --data kiosk:batches --criterion kiosk:build"
    with pytest.raises(TypeError):
        main(words.split())
    assert PerformanceProfile.load("made/performance.json").layers and not Path("made/loss.json").exists()


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ("kiosk:build", "give --input, or --loss alone"),
        ("kiosk:other --input 1x6", "there is no 'other'"),
        ("kiosk:build --input 1x6 --batch-size 0", "batch_sizes"),
        ("kiosk:build --input 1x6 --data kiosk:nothing", "there is no 'nothing'"),
        ("none.onnx", "no such file"),
        ("kiosk:build --input 1x6 --output kiosk.py/inside", "cannot be made"),
    ],
)
def test_bad_input_is_a_line(words: str, match: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", *words.split()]) == BAD
    assert match in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_file_is_measured_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "kiosk:build", "--input", "1x6", "--output", "model.onnx"]) == 0
    assert main(["profile", "model.onnx", "--iterations", "2"]) == 0
    text = capsys.readouterr().out
    assert "model.onnx: batch 1" in text and "Loss by layer" in text
    for wrong in ("--int8", "--widths"):
        assert main(["profile", "model.onnx", wrong]) == BAD
