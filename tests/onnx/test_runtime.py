"""Sessions of onnxruntime add products of int8 exactly on every CPU, also in files that its own option cannot open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsify.errors import ExportError
from sparsify.onnx.runtime import EXACT_PRODUCTS, open_session, optimized_operators, run_session, unshared

generator = np.random.default_rng(0)
# The largest products there are in pairs, 2 * 255 * 127 = 64770 beyond 16 bits, and others at random.
WEIGHT = generator.integers(-127, 128, (64, 16)).astype(np.int8)
WEIGHT[:, :4] = 127
INTEGERS = generator.integers(128, 256, (8, 64)).astype(np.uint8)
INTEGERS[:3] = 255


def products(path: Path, readers: int = 1, opset: int = 20) -> Path:
    """A file of `readers` Gemms that read one quantized input and one stored weight."""
    grid = [("one", np.float32(1)), ("zero", np.uint8(0)), ("coarse", np.float32(2**14)), ("middle", np.uint8(128))]
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in grid]
    stored.append(numpy_helper.from_array(WEIGHT, "weight"))
    stored.append(numpy_helper.from_array(np.asarray(0, np.int8), "weight_zero"))
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["x_int"], name="x/QuantizeLinear"),
        helper.make_node("DequantizeLinear", ["x_int", "one", "zero"], ["x_read"], name="x/DequantizeLinear"),
        helper.make_node("DequantizeLinear", ["weight", "one", "weight_zero"], ["w"], name="w/DequantizeLinear"),
    ]
    for k in range(readers):
        nodes += [
            helper.make_node("Gemm", ["x_read", "w"], [f"sums_{k}"], name=f"{k}/Gemm"),
            helper.make_node("QuantizeLinear", [f"sums_{k}", "coarse", "middle"], [f"y_int_{k}"], name=f"{k}/Q"),
            helper.make_node("DequantizeLinear", [f"y_int_{k}", "coarse", "middle"], [f"y_{k}"], name=f"{k}/DQ"),
        ]
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info(f"y_{k}", TensorProto.FLOAT, ["batch", 16]) for k in range(readers)],
        stored,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), path)
    return path


def expected() -> np.ndarray:
    sums = INTEGERS.astype(np.int64) @ WEIGHT.astype(np.int64)
    # numpy rounds halves to even, as QuantizeLinear does; the division by a power of two is exact.
    integers = np.clip(np.round(sums / 2**14) + 128, 0, 255)
    return ((integers - 128) * 2**14).astype(np.float32)


@pytest.mark.parametrize("readers", [1, 2])
@pytest.mark.parametrize("optimized", [False, True])
def test_sums_of_int8_products_are_exact_on_every_cpu(readers: int, optimized: bool, tmp_path: Path) -> None:
    path = products(tmp_path / "products.onnx", readers)
    sums = INTEGERS.astype(np.int64) @ WEIGHT.astype(np.int64)
    assert (np.abs(sums) > 2**15).any() and len(np.unique(expected())) > 20
    found = run_session(open_session(path, optimized=optimized), {"x": INTEGERS.astype(np.float32)})
    assert list(found) == [f"y_{k}" for k in range(readers)]
    for value in found.values():
        np.testing.assert_array_equal(value, expected())
    assert optimized_operators(path)["QGemm"] == readers


def test_every_reader_of_a_weight_gets_a_copy_of_its_own(tmp_path: Path) -> None:
    model = onnx.load(products(tmp_path / "products.onnx", 3))
    before = model.SerializeToString()
    copy = unshared(model)
    assert model.SerializeToString() == before
    onnx.checker.check_model(copy, full_check=True)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in copy.graph.initializer}
    weights = [node for node in copy.graph.node if node.op_type == "DequantizeLinear" and "weight" in node.input[0]]
    assert [node.input[0] for node in weights] == ["weight", "weight_2", "weight_3"]
    assert len({node.name for node in weights}) == 3
    assert [node.input[2] for node in weights] == ["weight_zero", "weight_zero_2", "weight_zero_3"]
    assert all(np.array_equal(stored[node.input[0]], WEIGHT) for node in weights)
    assert [node.input[1] for node in copy.graph.node if node.op_type == "Gemm"] == [n.output[0] for n in weights]


def test_two_dequantizers_of_one_weight_are_told_apart(tmp_path: Path) -> None:
    path = products(tmp_path / "products.onnx", 2)
    model = onnx.load(path)
    first = next(node for node in model.graph.node if node.name == "w/DequantizeLinear")
    second = model.graph.node.add()
    second.CopyFrom(first)
    second.name, second.output[0] = "other/DequantizeLinear", "other"
    nodes = [second, *(node for node in model.graph.node if node.name != second.name)]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    next(node for node in copies if node.name == "1/Gemm").input[1] = "other"
    del model.graph.node[:]
    model.graph.node.extend(copies)
    onnx.save(model, path)
    for value in run_session(open_session(path), {"x": INTEGERS.astype(np.float32)}).values():
        np.testing.assert_array_equal(value, expected())


class Refusing:
    """In the place of InferenceSession: fails with `EXACT_PRODUCTS`, and notes what it was started with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: str = "Attempt to replace the existing tensor") -> None:
        self.seen: list[str] = []
        real = onnxruntime.InferenceSession

        def start(content: Any, options: Any, **others: Any) -> Any:
            try:
                entry = options.get_session_config_entry(EXACT_PRODUCTS)
            except RuntimeError:
                entry = "none"
            self.seen.append(entry)
            if entry == "1":
                raise RuntimeError(error)
            return real(content, options, **others)

        monkeypatch.setattr(onnxruntime, "InferenceSession", start)


def test_a_file_that_the_exact_kernels_cannot_open_runs_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = products(tmp_path / "products.onnx")
    refusing = Refusing(monkeypatch)
    session = open_session(path)
    # As it is, with every weight on its own, and at last without.
    assert refusing.seen == ["1", "1", "none"]
    assert run_session(session, {"x": INTEGERS.astype(np.float32)})["y_0"].shape == (8, 16)
    refusing.seen.clear()
    assert optimized_operators(path)["QGemm"] == 1 and refusing.seen == ["1", "1", "none"]
    refusing.seen.clear()
    open_session(path, exact=False)
    assert refusing.seen == ["none"]
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_a_file_without_integers_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "float.onnx"
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "float", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    refusing = Refusing(monkeypatch, "of no use")
    with pytest.raises(ExportError, match="cannot run this file: of no use"):
        open_session(path)
    assert refusing.seen == ["1"]
