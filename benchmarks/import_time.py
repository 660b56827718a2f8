"""Time of `import sparsify` beyond that of `import torch`. Bar: 0.3 s.

    python benchmarks/import_time.py [--processes 15]

Fresh processes, each of which imports torch and then sparsify: the two are a pair. Whole processes one against the
other differ by more than what is measured, since `import torch` itself varies by half a second on a busy machine.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from paired import machine

BAR = 0.3
ROOT = str(Path(__file__).parents[1])
PROCESS = f"""
import sys, time
sys.path.insert(0, {ROOT!r})
start = time.perf_counter()
import torch
middle = time.perf_counter()
import sparsify
print(middle - start, time.perf_counter() - middle)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=15)
    arguments = parser.parse_args()
    print(machine("pydantic", "pyyaml"))
    pairs = []
    # The first one fills the caches of the disk and is not counted.
    for _ in range(arguments.processes + 1):
        done = subprocess.run([sys.executable, "-c", PROCESS], check=True, capture_output=True, text=True)
        pairs.append(tuple(map(float, done.stdout.split())))
    torch, beyond = zip(*pairs[1:], strict=True)
    median = statistics.median(beyond)
    ratio = statistics.median(b / t for t, b in zip(torch, beyond, strict=True))
    print(
        f"import sparsify beyond import torch: {median:.3f} s (min {min(beyond):.3f}, max {max(beyond):.3f}, "
        f"{len(beyond)} processes; {ratio:.2f} of import torch)  bar {BAR}: "
        f"{'reached' if median <= BAR else 'NOT reached'}"
    )


if __name__ == "__main__":
    main()
