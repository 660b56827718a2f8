"""A step of quantization-aware training / the bare step, side by side with other frameworks, and peak memory.

    python benchmarks/qat_step.py [--quick] [--only NETWORK] [--methods NAME ...]

Each method runs in a process of its own, in an environment of its own that is made on first use (benchmarks/peers, the
versions are in its text files); torch.ao in that of sparsify. All quantize weights and activations and observe (NNCF:
learn) ranges at every step, on one thread. Rounds go around all methods; a ratio is the median over all pairs of steps,
each pair in one process. NNCF needs a C++ compiler and ninja, for kernels that it builds at its first step.

All processes keep the memory that they have freed, unless --system-malloc: else the C library hands it back and takes
it again at nearly every step, bare or quantized, and what is measured is how the machine clears pages.

Memory is the most that tensors hold at one moment of a step (see peers/qat.py), in a process that does nothing else.
Bars: 1.15 on ResNet-20, 1.12 on the encoder, 1.40 on the MLP, and less than every other method on each.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

from paired import machine

PEERS = Path(__file__).parent / "peers"
METHODS = ("sparsify", "torch.ao", "coremltools", "nncf", "brevitas")
OWN = ("sparsify", "torch.ao")
"""Methods that run in the environment of sparsify."""
LIMIT = 400
"""Seconds for one process; NNCF compiles in its first."""
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_TOP_PAD_": "100000000"}
"""glibc: no maps of their own for large blocks, and nothing handed back."""
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


def environment(method: str, *, keep_memory: bool) -> dict[str, str]:
    root = str(Path(__file__).parents[1])
    result = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root if method in OWN else ""}
    if keep_memory:
        result.update(KEEP_MEMORY)
    if method not in OWN:
        home = PEERS / ".venvs" / method
        # Its own kernels are compiled once, next to it; by default NNCF gives up after a minute, and then for good.
        result.update(TORCH_EXTENSIONS_DIR=str(home / "extensions"), NNCF_EXTENSION_LOAD_TIMEOUT="0")
        result["PATH"] = f"{home / 'bin'}{os.pathsep}{result.get('PATH', '')}"
    return result


def measured(method: str, network: str, *options: str, keep_memory: bool) -> dict[str, Any] | str:
    """The figures of peers/qat.py; or the reason why it has none."""
    command = [interpreter(method), "-W", "ignore", PEERS / "qat.py", method, network, *options]
    surroundings = environment(method, keep_memory=keep_memory)
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=surroundings, check=False, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return f"no result within {LIMIT} s"
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
        return (raised or lines)[-1][:200]
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few pairs: shows that it runs, not how fast")
    parser.add_argument("--only", default="", help="only the networks whose name contains this")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--system-malloc", action="store_true", help="leave the C library's settings as they are")
    arguments = parser.parse_args()
    print(machine())
    pairs, rounds = ("3", 1) if arguments.quick else ("15", arguments.rounds)
    keep = not arguments.system_malloc
    for network, bar in BARS.items():
        if arguments.only.lower() not in network.lower():
            continue
        found: dict[str, list[float]] = {method: [] for method in arguments.methods}
        failed: dict[str, str] = {}
        for _ in range(rounds):
            for method in arguments.methods:
                one = measured(method, network, "--pairs", pairs, keep_memory=keep)
                if isinstance(one, str):
                    failed[method] = one
                else:
                    found[method] += one["ratios"]
        plain = measured("sparsify", network, "--memory", "bare", keep_memory=keep)
        medians = {name: statistics.median(ratios) for name, ratios in found.items() if ratios}
        for method in arguments.methods:
            if method not in medians:
                print(f"{network:10} {method:12} failed: {failed[method]}", flush=True)
                continue
            memory = measured(method, network, "--memory", "quantized", keep_memory=keep)
            note = ""
            if not isinstance(memory, str) and not isinstance(plain, str):
                note = f"  peak {memory['peak_mib']:.0f} MiB, bare {plain['peak_mib']:.0f} MiB"
            if method == "sparsify":
                first = all(medians[method] < other for name, other in medians.items() if name != method)
                reached = medians[method] <= bar
                note += f"  bar {bar}: {'reached' if reached else 'NOT reached'}; {'' if first else 'NOT '}the fastest"
            ratios = found[method]
            print(
                f"{network:10} {method:12} {medians[method]:.3f} (min {min(ratios):.3f}, max {max(ratios):.3f}, "
                f"{len(ratios)} pairs){note}",
                flush=True,
            )


if __name__ == "__main__":
    main()
