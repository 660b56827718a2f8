"""Files of others: an imported graph computes what onnxruntime does, and is quantized as its module is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper

from sparsify import export_onnx, quantize_model, verify_onnx
from sparsify.onnx.importing import import_onnx
from sparsify.onnx.runtime import open_session, optimized_operators
from tests.zoo.quantizable import ZOO

torch.manual_seed(0)


@pytest.mark.parametrize("name", ["residual", "mlp"])
def test_a_file_gives_the_integers_of_its_module(name: str, tmp_path: Path) -> None:
    files_agree(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inverted", "gated", "attention", "up"])
def test_other_files_give_the_integers_of_their_modules(name: str, tmp_path: Path) -> None:
    files_agree(name, tmp_path)


def test_names_dynamic_shapes_and_other_operators_come_through(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(4, 3, 3, 3)) / 5, "m": rng.normal(size=(4, 6)), "b": rng.normal(size=6)}
    nodes = [
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(weights["w"].astype("f4"))),
        helper.make_node("Conv", ["x:0", "c"], ["y"], auto_pad="SAME_UPPER", strides=[2, 2]),
        helper.make_node("Relu", ["y"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Shape", ["p"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"]),
        helper.make_node("Unsqueeze", ["n"], ["n1"], axes=[0]),
        helper.make_node("Concat", ["n1", "rest"], ["shape"], axis=0),
        helper.make_node("Reshape", ["p", "shape"], ["flat"]),
        helper.make_node("MatMul", ["flat", "m"], ["f"]),
        helper.make_node("Add", ["f", "b"], ["scores"]),
        helper.make_node("TopK", ["scores", "k"], ["best", "which"]),
    ]
    stored = [numpy_helper.from_array(weights[name].astype("f4"), name) for name in ("m", "b")]
    numbers = {"zero": np.array(0), "rest": np.array([-1]), "k": np.array([2])}
    stored += [numpy_helper.from_array(value, name) for name, value in numbers.items()]
    ends = [
        helper.make_tensor_value_info(name, kind, shape)
        for name, kind, shape in (
            ("x:0", 1, ["N", 3, "H", "W"]),
            ("scores", 1, ["N", 6]),
            ("which", 7, ["N", 2]),
        )
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=6)
    helper.set_model_props(model, {"character": "abc"})
    imported = import_onnx(model)
    data = [torch.randn(4, 3, 9, 8) for _ in range(2)]
    quantized = quantize_model(imported, data, least_samples=1).model
    export_onnx(quantized, data[0], tmp_path / "int8.onnx")
    assert verify_onnx(quantized, tmp_path / "int8.onnx", data[0]).ok
    written = onnx.load(tmp_path / "int8.onnx")
    assert [value.name for value in written.graph.input] == ["x:0"]
    assert [value.name for value in written.graph.output] == ["scores", "which"]
    assert written.metadata_props[0].value == "abc"
    assert optimized_operators(tmp_path / "int8.onnx")["QLinearConv"] == 1
    other = torch.randn(2, 3, 12, 7)
    scores = onnxruntime.InferenceSession(model.SerializeToString()).run(["scores"], {"x:0": other.numpy()})[0]
    np.testing.assert_allclose(run(tmp_path / "int8.onnx", other), scores, atol=0.03 * np.abs(scores).max())


def files_agree(name: str, folder: Path) -> None:
    """The module and its file, both quantized on the same data, give the same outputs from the same kernels."""
    torch.manual_seed(1)
    make, batch = ZOO[name]
    model, data = make().eval(), [batch() for _ in range(3)]
    export_onnx(model, data[0], folder / "float.onnx")
    imported = import_onnx(folder / "float.onnx")
    with torch.no_grad():
        torch.testing.assert_close(imported(data[0]), model(data[0]), rtol=1e-5, atol=1e-6)
    outputs, kernels = [], []
    for each in (model, imported):
        quantized = quantize_model(each, data, least_samples=1).model
        export_onnx(quantized, data[0], folder / "int8.onnx")
        assert verify_onnx(quantized, folder / "int8.onnx", data[0]).ok
        outputs.append(run(folder / "int8.onnx", data[0]))
        kernels.append(optimized_operators(folder / "int8.onnx"))
    assert kernels[0] == kernels[1]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)


def run(path: Path, x: torch.Tensor) -> Any:
    session = open_session(path)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
