"""Equal tensors are one in an exported file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from sparsify.onnx.export import export_onnx
from sparsify.onnx.rewrite_equal_tensors import share_equal_tensors
from sparsify.onnx.runtime import SessionSettings, run_session, start_session


class Tables(nn.Module):
    """A table that each of three layers has, as masks and positions are."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(3):
            self.register_buffer(f"table{i}", torch.arange(2500.0).reshape(50, 50).sin())

    def forward(self, x: Tensor) -> Tensor:
        for table in self.buffers():
            x = (x @ table).relu()
        return x


def test_a_buffer_that_every_layer_has_is_written_once(tmp_path: Path) -> None:
    exported = export_onnx(Tables(), torch.randn(2, 50), tmp_path / "model.onnx")
    sizes = Counter(tuple(tensor.dims) for tensor in onnx.load(exported).graph.initializer)
    assert sizes[50, 50] == 1 and exported.size_bytes < 12_000


def test_equal_tensors_are_stored_once_whatever_their_size() -> None:
    # A subgraph reads the second one; a zero point stays its weight's own, an output and another shape are others.
    large = np.arange(5000, dtype=np.float32).reshape(50, 100)
    integers, scale = np.ones((50, 100), np.int8), np.array(0.5, np.float32)
    result = helper.make_tensor_value_info("inner", TensorProto.FLOAT, [50, 100])
    inner = helper.make_graph([helper.make_node("Add", ["b", "x"], ["inner"])], "inner", [], [result])
    nodes = [
        helper.make_node("Add", ["x", "a"], ["s"]),
        helper.make_node("If", ["c"], ["t"], then_branch=inner, else_branch=inner),
        helper.make_node("DequantizeLinear", ["q", "scale", "z1"], ["u"], axis=1),
        helper.make_node("DequantizeLinear", ["r", "scale", "z2"], ["v"], axis=1),
        helper.make_node("Reshape", ["flat", "shape"], ["w"]),
        helper.make_node("Sum", ["s", "t", "u", "v", "w"], ["y"]),
    ]
    values = {"a": large, "b": large, "out": large, "flat": large.ravel(), "q": integers, "r": integers, "scale": scale}
    values |= {
        "z1": np.array(0, np.int8),
        "z2": np.array(0, np.int8),
        "c": np.array(True),
        "shape": np.array([50, 100]),
    }
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "test",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [50, 100])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, [50, 100]) for name in ("y", "out")],
            [numpy_helper.from_array(value, name) for name, value in values.items()],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=9,
    )

    def outputs() -> list[bytes]:
        session = start_session(model, SessionSettings(), path=None, changed=True)
        return [value.tobytes() for value in run_session(session, {"x": large}).values()]

    before = outputs()
    share_equal_tensors(model, {"a", "b", "r"})
    assert {tensor.name for tensor in model.graph.initializer} == set(values)
    share_equal_tensors(model, {"a"})
    assert {tensor.name for tensor in model.graph.initializer} == set(values) - {"b", "r"}
    assert outputs() == before
