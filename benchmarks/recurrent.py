"""What an LSTM or a GRU of int8 weights costs in onnxruntime: bytes, time of a run and of loading, error against float.

    PYTHONPATH=. python benchmarks/recurrent.py

One thread, random weights. "dequantized" is DequantizeLinear in the place of what `export_onnx` writes, "dynamic" what
onnxruntime's `quantize_dynamic` makes of the float file (it knows LSTM alone). Sessions run in turn.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
from onnxruntime.quantization import quantize_dynamic
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from sparsify import export_onnx, quantize_model  # noqa: E402

ROUNDS, STEPS, UNITS = 21, 50, 256


class Cells(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cells = kind(UNITS, UNITS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.cells(x)[0]
        return y


def dequantized(path: Path, out: Path) -> Path:
    """The file with a DequantizeLinear and a Reshape where weights are cast and multiplied."""
    model = onnx.load(path)
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    casts = {node.output[0]: node for node in graph.node if node.op_type == "Cast" and node.input[0] in stored}
    nodes = []
    for node in graph.node:
        if node.output[0] in casts:
            continue
        if node.op_type == "Mul" and node.input[0] in casts:
            integers, scale = stored[casts[node.input[0]].input[0]], stored[node.input[1]]
            shape = list(integers.dims)
            integers.dims[:] = [shape[0] * shape[1], shape[2]]
            scale.dims[:] = [shape[0] * shape[1]]
            rows, target = f"{node.output[0]}_rows", f"{node.output[0]}_shape"
            graph.initializer.append(numpy_helper.from_array(np.asarray(shape, np.int64), target))
            nodes.append(helper.make_node("DequantizeLinear", [integers.name, scale.name], [rows], axis=0))
            node = helper.make_node("Reshape", [rows, target], list(node.output))
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, out)
    return out


def measure(paths: dict[str, Path], batch: int) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions, loading = {}, {}
    for name, path in paths.items():
        start = time.perf_counter()
        sessions[name] = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        loading[name] = time.perf_counter() - start
    x = np.random.default_rng(0).standard_normal((batch, STEPS, UNITS)).astype(np.float32)
    outputs: dict[str, Any] = {name: session.run(None, {"x": x})[0] for name, session in sessions.items()}
    taken: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(ROUNDS):
        # In another order each time: on a busy machine the scheduler may always stop the same one.
        for name in random.sample(list(sessions), len(sessions)):
            session = sessions[name]
            start = time.perf_counter()
            session.run(None, {"x": x})
            taken[name].append(time.perf_counter() - start)
    for name, path in paths.items():
        ratio = statistics.median(mine / own for mine, own in zip(taken[name], taken["float"], strict=True))
        error = float(np.linalg.norm(outputs[name] - outputs["float"]) / np.linalg.norm(outputs["float"]))
        print(
            f"| {name} | {batch} | {path.stat().st_size / 1024:.0f} | {statistics.median(taken[name]) * 1e3:.2f} | "
            f"{ratio:.2f} | {loading[name] * 1e3:.0f} | {error:.4f} |"
        )


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, STEPS, UNITS)
    for kind in (nn.LSTM, nn.GRU):
        with tempfile.TemporaryDirectory() as folder:
            at = Path(folder)
            model = Cells(kind).eval()
            export_onnx(model, x, at / "float.onnx")
            holder = quantize_model(model, [x], progress=False).model
            export_onnx(holder, x, at / "int8.onnx")
            paths = {"float": at / "float.onnx", "int8": at / "int8.onnx"}
            paths["dequantized"] = dequantized(at / "int8.onnx", at / "dequantized.onnx")
            if kind is nn.LSTM:
                options = onnxruntime.SessionOptions()
                options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
                options.optimized_model_filepath = str(at / "whole.onnx")
                # quantize_dynamic takes weights that are stored in the order of the operator alone.
                onnxruntime.InferenceSession(str(at / "float.onnx"), options, providers=["CPUExecutionProvider"])
                quantize_dynamic(at / "whole.onnx", at / "dynamic.onnx")
                paths["dynamic"] = at / "dynamic.onnx"
            print(f"\n{kind.__name__}, {UNITS} units, {STEPS} steps\n")
            print("| file | batch | KB | ms | / float | ms to load | error |\n|---|---|---|---|---|---|---|")
            for batch in (1, 8):
                measure(paths, batch)


if __name__ == "__main__":
    main()
