"""The examples run, from the shell, as their readers run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparsify import Recipe

ROOT = Path(__file__).parents[1]
# What each is called with to be quick, and what it must leave behind.
EXAMPLES = {
    "digits_composed.py": ["--quick", "--outputs", "outputs"],
    "digits_resnet.py": ["--quick", "--outputs", "outputs"],
    "plain_loop.py": [],
    "transformer_rows.py": ["--quick"],
}


def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *EXAMPLES[script]],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_every_example_is_run_here() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)


@pytest.mark.parametrize("script", [name for name in EXAMPLES if not name.startswith("digits")])
def test_example_runs(script: str, tmp_path: Path) -> None:
    done = run(script, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]


def test_digits_resnet_leaves_models_recipe_table_and_plot(tmp_path: Path) -> None:
    done = run("digits_resnet.py", tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    outputs = tmp_path / "outputs"
    names = {path.name for path in outputs.iterdir()}
    assert names == {
        "digits_dense.onnx",
        "digits_pruned.onnx",
        "digits_int8.onnx",
        "digits.pt",
        "recipe.yaml",
        "table.md",
        "table.json",
        "plot.png",
    }
    dense, pruned, int8 = json.loads((outputs / "table.json").read_text())["rows"]
    assert dense["sparsity"] < 0.01
    assert pruned["sparsity"] == pytest.approx(0.9, abs=1e-5)
    assert int8["sparsity"] >= pruned["sparsity"]
    assert int8["kilobytes"] < 0.3 * dense["kilobytes"]
    assert int8["gzipped_kilobytes"] < 0.1 * dense["gzipped_kilobytes"]
    assert dense["accuracy"] > 0.5 and int8["accuracy"] > 0.5
    assert Recipe.load(outputs / "recipe.yaml").max_epochs == 4
    for row in (dense, pruned, int8):
        assert row["model"] in done.stdout


def test_digits_composed_is_small_in_every_way(tmp_path: Path) -> None:
    done = run("digits_composed.py", tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    dense, composed = json.loads((tmp_path / "outputs" / "composed.json").read_text())["rows"]
    # Half of the channels are a quarter of the weights, and int8 is a quarter of float.
    assert composed["kilobytes"] < 0.08 * dense["kilobytes"]
    assert composed["sparsity"] == pytest.approx(0.75, abs=0.01)
    assert dense["accuracy"] > 0.5 and composed["accuracy"] > 0.5
