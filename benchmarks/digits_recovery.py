"""Accuracy lost by int8 and 90 % zeros on the demo's digits. Bar: at most 1.0 point on average.

    python benchmarks/digits_recovery.py [--seeds 0 1 2]

Each seed has its own split, initial weights and order of batches. Accuracies are those of the ONNX files in
onnxruntime.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from paired import machine

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from digits_resnet import run

BAR = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    print(machine("onnxruntime", "scikit-learn"))
    lost = []
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            dense, pruned, int8 = run(seed, Path(folder))
        lost.append(100 * (dense.accuracy - int8.accuracy))
        print(
            f"seed {seed}: dense {dense.accuracy:.2%}, pruned {pruned.accuracy:.2%}, int8 + pruned {int8.accuracy:.2%} "
            f"({int8.sparsity:.1%} zeros), lost {lost[-1]:+.2f} points",
            flush=True,
        )
    mean = statistics.mean(lost)
    spread = statistics.stdev(lost) if len(lost) > 1 else 0.0
    print(
        f"lost on average over {len(lost)} seeds: {mean:+.2f} points, standard deviation {spread:.2f}  "
        f"bar {BAR}: {'reached' if mean <= BAR else 'NOT reached'}"
    )


if __name__ == "__main__":
    main()
