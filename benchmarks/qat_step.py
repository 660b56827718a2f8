"""A step of quantization-aware training / the bare step, side by side with other frameworks, and peak memory.

    python benchmarks/qat_step.py [--quick] [--only NETWORK] [--methods NAME ...]

Each method runs in a process of its own, in an environment of its own that is made on first use (benchmarks/peers, the
versions are in its text files); torch.ao in that of sparsify. All quantize weights and activations and observe ranges
at every step, on one thread. Rounds go around all methods; each ratio is a median over pairs of steps in one process.
Bars: 1.15 on ResNet-20, 1.12 on the encoder, 1.40 on the MLP, and less than every other method on each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import venv
from pathlib import Path

from paired import machine

PEERS = Path(__file__).parent / "peers"
METHODS = ("sparsify", "torch.ao", "coremltools", "nncf", "brevitas")
OWN = ("sparsify", "torch.ao")
"""Methods that run in the environment of sparsify."""
LIMIT = 120
"""Seconds for one process."""
BARS = {"ResNet-20": 1.15, "encoder": 1.12, "MLP": 1.40}


def interpreter(method: str) -> Path:
    """The Python of the method's environment; made, with what its text file lists, where it is not there."""
    if method in OWN:
        return Path(sys.executable)
    folder = PEERS / ".venvs" / method
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"  making the environment of {method}", flush=True)
        venv.create(folder, with_pip=True)
        requirements = PEERS / f"{method}.txt"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", requirements], check=True)
    return python


def measured(method: str, network: str, *options: str) -> dict[str, float] | str:
    """What peers/qat.py found; or why it found nothing."""
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root if method in OWN else ""}
    command = [interpreter(method), "-W", "ignore", PEERS / "qat.py", method, network, *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return f"no result within {LIMIT} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1][:160]
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few pairs: shows that it runs, not how fast")
    parser.add_argument("--only", default="", help="only the networks whose name contains this")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(machine())
    pairs, rounds = ("3", 1) if arguments.quick else ("15", arguments.rounds)
    for network, bar in BARS.items():
        if arguments.only.lower() not in network.lower():
            continue
        found: dict[str, list[dict[str, float]]] = {method: [] for method in arguments.methods}
        failed: dict[str, str] = {}
        for _ in range(rounds):
            for method in arguments.methods:
                one = measured(method, network, "--pairs", pairs)
                if isinstance(one, str):
                    failed[method] = one
                else:
                    found[method].append(one)
        plain = measured("sparsify", network, "--memory", "bare")
        medians = {name: statistics.median(one["median"] for one in runs) for name, runs in found.items() if runs}
        for method in arguments.methods:
            if method not in medians:
                print(f"{network:10} {method:12} failed: {failed[method]}", flush=True)
                continue
            memory = measured(method, network, "--memory", "quantized")
            note = ""
            if not isinstance(memory, str) and not isinstance(plain, str):
                note = f"  peak {memory['peak_mib']:.0f} MiB, bare {plain['peak_mib']:.0f} MiB"
            if method == "sparsify":
                first = all(medians[method] < other for name, other in medians.items() if name != method)
                reached = medians[method] <= bar
                note += f"  bar {bar}: {'reached' if reached else 'NOT reached'}; {'' if first else 'NOT '}the fastest"
            runs = found[method]
            low, high = min(one["min"] for one in runs), max(one["max"] for one in runs)
            print(f"{network:10} {method:12} {medians[method]:.3f} (min {low:.3f}, max {high:.3f}){note}", flush=True)


if __name__ == "__main__":
    main()
