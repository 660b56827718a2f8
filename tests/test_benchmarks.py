"""Benchmarks of training run from the shell, in their quick modes: that they still run, not what they find."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What each is called with to be quick, and what it must print.
BENCHMARKS = {
    "autorecipe.py": (
        ["--seeds", "0", "--levels", "0.9", "--only", "magnitude", "--folder", "out"],
        "resnet20  0.9   magnitude",
    ),
    "headline.py": (["--quick", "--threads", "1"], "verify_onnx: agrees"),
    "integer_exact.py": (["--pairs", "1", "--only", "MLP"], "0.0e+00 |"),
    "loss_profile.py": (["--seeds", "0", "--images", "64"], "data, divergence"),
    "mixed_precision.py": (["--seeds", "0", "--averages", "3", "--roundings", "nearest"], "bar, less than uniform"),
    "qat_stability.py": (["--quick", "--only", "Mobile", "--rates", "0.03"], "MobileNetV2-like  from scratch"),
    "qat_step.py": (["--quick", "--only", "MLP", "--methods", "sparsify"], "bare 25 MiB"),
}


@pytest.mark.slow
@pytest.mark.parametrize("script", BENCHMARKS)
def test_benchmark_runs(script: str, tmp_path: Path) -> None:
    options, expected = BENCHMARKS[script]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert expected in done.stdout
