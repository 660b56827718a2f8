"""Packed ONNX files: bytes a weight, the time of a run, and what making a session costs in time and memory.

    python benchmarks/packing.py [--quick] [--only TEXT]

A chain of 3x3 convolutions with 512 channels, 25.9 M weights (2.4 M with --quick), as int8 with quantized activations
or in float, with random values. Plain and packed file run in turn in onnxruntime on one thread. Sessions are timed in
CPU-seconds. Memory is the peak of a process of its own that makes one session. Outputs are compared to the bit by
`pack_onnx` itself. Bars: .205 bytes a weight at 90 % zeros and int8, .105 at 95 %, .505 with a palette of 4 bits, .155
with both; a session in at most 3 times the time of the plain file's; runs in the same time.

The bar of a session is NOT reached by masks and palettes of int8 weights: loading a plain int8 file costs about 1 ns a
weight, and each operator that rebuilds it about as much.
"""

from __future__ import annotations

import argparse
import gzip
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from paired import machine, paired

from sparsify import pack_onnx

CHANNELS = 512
CASES: dict[str, tuple[str, float, int, float | None]] = {
    "int8, dense": ("int8", 0.0, 0, None),
    "int8, 50 % zeros": ("int8", 0.5, 0, None),
    "int8, 80 % zeros": ("int8", 0.8, 0, None),
    "int8, 90 % zeros": ("int8", 0.9, 0, 0.205),
    "int8, 95 % zeros": ("int8", 0.95, 0, 0.105),
    "int8, palette of 4 bits": ("int8", 0.0, 16, 0.505),
    "int8, palette of 4 bits, 90 % zeros": ("int8", 0.9, 15, 0.155),
    "float, 90 % zeros": ("float32", 0.9, 0, None),
    "float, palette of 4 bits": ("float32", 0.0, 16, 0.505),
    "float, palette of 4 bits, 90 % zeros": ("float32", 0.9, 15, 0.155),
}
"""Name -> (type of the weights, share of zeros, number of other values or 0 for any, bar in bytes a weight)."""


def weights(dtype: str, zeros: float, levels: int, draw: np.random.Generator) -> np.ndarray:
    shape = (CHANNELS, CHANNELS, 3, 3)
    if levels:
        values = draw.integers(1, levels + 1, shape).astype(dtype)
    elif dtype == "int8":
        values = draw.integers(1, 128, shape).astype(dtype)
    else:
        values = draw.standard_normal(shape, np.float32)
    values[draw.random(shape) < zeros] = 0
    return values if dtype == "int8" else values * np.float32(0.01)


def chain(dtype: str, zeros: float, levels: int, layers: int, path: Path) -> int:
    """Writes the file; the number of its weights."""
    draw = np.random.default_rng(0)
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in SCALES.items()]
    nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q0"])] if dtype == "int8" else []
    value = "x"
    for i in range(layers):
        stored.append(numpy_helper.from_array(weights(dtype, zeros, levels, draw), f"w{i}"))
        if dtype == "int8":
            nodes += [
                helper.make_node("DequantizeLinear", [f"q{i}", "s", "z"], [f"d{i}"]),
                helper.make_node("DequantizeLinear", [f"w{i}", "t", "o"], [f"v{i}"]),
                helper.make_node("Conv", [f"d{i}", f"v{i}"], [f"c{i}"], pads=[1, 1, 1, 1]),
                helper.make_node("QuantizeLinear", [f"c{i}", "s", "z"], [f"q{i + 1}"]),
            ]
        else:
            nodes += [
                helper.make_node("Conv", [value, f"w{i}"], [f"c{i}"], pads=[1, 1, 1, 1]),
                helper.make_node("Relu", [f"c{i}"], [f"r{i}"]),
            ]
            value = f"r{i}"
    last = (
        helper.make_node("DequantizeLinear", [f"q{layers}", "s", "z"], ["y"])
        if dtype == "int8"
        else helper.make_node("Identity", [value], ["y"])
    )
    shape = ["n", CHANNELS, 8, 8]
    graph = helper.make_graph(
        [*nodes, last],
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        stored if dtype == "int8" else stored[len(SCALES) :],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return layers * CHANNELS * CHANNELS * 9


SCALES: dict[str, Any] = {"s": np.float32(0.05), "z": np.uint8(128), "t": np.float32(0.001), "o": np.int8(0)}


def session(path: Path | str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def peak(path: Path) -> float:
    """MiB that a process holds at most that makes one session, beyond one that makes none."""
    used = [
        int(
            subprocess.run(
                [sys.executable, __file__, "--peak", text], capture_output=True, text=True, check=True
            ).stdout
        )
        for text in (str(path), "")
    ]
    return (used[0] - used[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one layer, few pairs: shows that it runs")
    parser.add_argument("--only", default="", help="only the cases whose name contains this")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak is not None:
        kept = session(arguments.peak) if arguments.peak else None
        # ru_maxrss would begin at that of the process which started this one.
        print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line))
        del kept
        return
    print(machine("onnx", "onnxruntime"))
    layers, pairs = (1, 3) if arguments.quick else (11, 9)
    for name, (dtype, zeros, levels, bar) in CASES.items():
        if arguments.only not in name:
            continue
        with tempfile.TemporaryDirectory() as text:
            plain, packed = Path(text) / "plain.onnx", Path(text) / "packed.onnx"
            count = chain(dtype, zeros, levels, layers, plain)
            found = pack_onnx(plain, packed)
            form = found.tensors[0].form if found.tensors else "plain"
            each = found.size_bytes / count
            said = "" if bar is None else f", bar {bar}: {'reached' if each <= bar else 'NOT reached'}"
            zipped = len(gzip.compress(plain.read_bytes(), 6)) / count
            print(f"{name}: {form}\n  {each:.3f} bytes a weight{said}; plain {found.plain_bytes / count:.3f}", end="")
            print(f", gzipped {zipped:.3f}", flush=True)
            make = paired(
                lambda path=plain: session(path),
                lambda path=packed: session(path),
                pairs=pairs,
                warmup=1,
                clock=time.process_time,
            )
            ratio = 1 / make.median
            reached = "reached" if ratio <= 3 else "NOT reached"
            print(
                f"  session packed / plain {ratio:.2f}, {1e3 * np.median(make.b):.0f} ms against "
                f"{1e3 * np.median(make.a):.0f} ms, bar 3: {reached}; peak {peak(packed):.0f} MiB against "
                f"{peak(plain):.0f} MiB",
                flush=True,
            )
            x = {"x": np.random.default_rng(1).standard_normal((1, CHANNELS, 8, 8), np.float32)}
            first, second = session(plain), session(packed)
            run = paired(lambda: first.run(None, x), lambda: second.run(None, x), pairs=pairs * 3)  # noqa: B023
            print(f"  a run plain / packed {run}", flush=True)


if __name__ == "__main__":
    main()
