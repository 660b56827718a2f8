"""What `import sparsify` costs beyond `import torch`. Bar: 0.3 s.

    python benchmarks/import_time.py [--pairs 11]

Fresh processes in turn, one that imports torch and one that imports both; the median of the differences.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from paired import machine, paired

BAR = 0.3
ROOT = str(Path(__file__).parents[1])


def importer(name: str) -> None:
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {ROOT!r}); import torch; import {name}"], check=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=11)
    arguments = parser.parse_args()
    print(machine("pydantic", "pyyaml"))
    times = paired(lambda: importer("sparsify"), lambda: importer("torch"), pairs=arguments.pairs)
    differences = sorted(both - torch for both, torch in zip(times.a, times.b, strict=True))
    median = differences[len(differences) // 2]
    print(
        f"import sparsify beyond import torch: {median:.3f} s (min {differences[0]:.3f}, max {differences[-1]:.3f}, "
        f"{len(differences)} pairs)  bar {BAR}: {'reached' if median <= BAR else 'NOT reached'}"
    )


if __name__ == "__main__":
    main()
