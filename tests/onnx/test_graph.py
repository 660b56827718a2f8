"""One view of an ONNX graph, and one table of operators that only move values, held to what onnxruntime does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from sparsify.onnx.benchmark import benchmark_onnx
from sparsify.onnx.fusion import Fusion
from sparsify.onnx.graph import MOVEMENT, PROPAGATED, STORAGE, GraphView, only_moves
from sparsify.onnx.reference import Reference
from sparsify.onnx.rewrites import quantize_behind_products
from sparsify.onnx.runtime import SessionSettings, open_session, run_session, start_session
from sparsify.onnx.verify_kernels import prove

ROWS = (6, 4)
IMAGE = (2, 4, 6, 6)
MOVERS: dict[str, tuple[tuple[int, ...], list[Any], dict[str, Any]]] = {
    "Reshape": (ROWS, [[3, 2, 4]], {}),
    "Squeeze": ((1, 6, 4), [[0]], {}),
    "Unsqueeze": (ROWS, [[1]], {}),
    "Transpose": (ROWS, [], {}),
    "Identity": (ROWS, [], {}),
    "Flatten": (IMAGE, [], {}),
    "DepthToSpace": (IMAGE, [], {"blocksize": 2}),
    "SpaceToDepth": (IMAGE, [], {"blocksize": 2}),
    "MaxPool": (IMAGE, [], {"kernel_shape": [2, 2]}),
    "Slice": (ROWS, [[1], [3], [1]], {}),
    "Split": (ROWS, [[1, 3]], {"axis": 1}),
    "Gather": (ROWS, [[0, 0, 3]], {}),
    "Expand": (ROWS, [[3, 6, 4]], {}),
    "Tile": (ROWS, [[2, 1]], {}),
    "Resize": (IMAGE, [None, np.asarray([1, 1, 2, 2], np.float32)], {"mode": "nearest"}),
    "Pad": (IMAGE, [[0, 0, 1, 2, 0, 0, 2, 1]], {"mode": "reflect"}),
}
"""{operator: shape that it reads, its other inputs, its attributes}."""


def moving(op: str, first: str = "Elu") -> ModelProto:
    """x is quantized, goes through `first` in float, is moved, and is quantized again."""
    shape, others, attributes = MOVERS[op]
    names = ["" if value is None else f"c{i}" for i, value in enumerate(others)]
    stored = [
        numpy_helper.from_array(value if isinstance(value, np.ndarray) else np.asarray(value, np.int64), name)
        for name, value in zip(names, others, strict=True)
        if name
    ]
    stored += [numpy_helper.from_array(np.asarray(0.05, np.float32), "scale")]
    stored += [numpy_helper.from_array(np.asarray(90, np.uint8), "zero")]
    grid = ["scale", "zero"]
    results = ["moved", "rest"] if op == "Split" else ["moved"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", *grid], ["x_int"], name="x/QuantizeLinear"),
        helper.make_node("DequantizeLinear", ["x_int", *grid], ["x_read"], name="x/DequantizeLinear"),
        helper.make_node(first, ["x_read"], ["made"], name=first),
        helper.make_node(op, ["made", *names], results, name=op, **attributes),
        helper.make_node("QuantizeLinear", ["moved", *grid], ["y_int"], name="y/QuantizeLinear"),
        helper.make_node("DequantizeLinear", ["y_int", *grid], ["y"], name="y/DequantizeLinear"),
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ["y", *results[1:]]]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))]
    return shaped(helper.make_graph(nodes, "moving", inputs, outputs, stored))


def shaped(graph: onnx.GraphProto) -> ModelProto:
    """A model whose outputs have shapes."""
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    del model.graph.value_info[:]
    return model


def values(op: str) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 3, MOVERS[op][0]).astype(np.float32)


def test_every_operator_of_the_table_is_tried() -> None:
    assert MOVERS.keys() == MOVEMENT.keys()
    kinds = {kind: {op for op, each in MOVEMENT.items() if each.kind == kind} for kind in ("rearranges", "selects")}
    for op in MOVEMENT:
        shape, _, _ = MOVERS[op]
        x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) / 20
        model = moving(op, "Identity")
        moved = [*Reference(model).run({"x": x}, keep=["moved"])["moved"].reshape(-1)]
        assert set(moved) <= set(Reference(model).run({"x": x}, keep=["made"])["made"].reshape(-1)), op
        distinct = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        found = _alone(op, distinct).reshape(-1)
        once = len(set(found)) == len(found)
        assert once == (op in kinds["rearranges"] | kinds["selects"]), op
        assert (once and len(found) == distinct.size) == (op in kinds["rearranges"]), op
        assert (op in STORAGE) == (op in kinds["rearranges"])


def _alone(op: str, x: np.ndarray) -> np.ndarray:
    """What the operator alone makes of values, in onnxruntime."""
    model = moving(op)
    node = next(node for node in model.graph.node if node.name == op)
    node.input[0] = "x"
    del model.graph.output[:]
    model.graph.output.add().CopyFrom(helper.make_tensor_value_info("moved", TensorProto.FLOAT, None))
    session = start_session(model, SessionSettings(optimized=False), path=None, changed=True)
    return run_session(session, {"x": x})["moved"]


@pytest.mark.parametrize("op", MOVERS)
def test_onnxruntime_quantizes_before_those_that_the_table_says(op: str, tmp_path: Path) -> None:
    target = tmp_path / "optimized.onnx"
    start_session(moving(op), SessionSettings(optimized_path=target), path=None, changed=True)
    graph = onnx.load(target).graph
    view = GraphView(graph)
    quantize = next(node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] != "x")
    before = view.producer[quantize.input[0]].op_type
    assert (before == "Elu") == (op in PROPAGATED), [node.op_type for node in graph.node]


@pytest.mark.parametrize("op", MOVERS)
def test_a_quantizer_behind_float_that_onnxruntime_moves_is_no_integer_kernel(op: str, tmp_path: Path) -> None:
    """A float operator may put a value one step aside: the verdict on an integer kernel, nothing aside, is wrong."""
    path, model, feed = tmp_path / "model.onnx", moving(op), {"x": values(op)}
    onnx.save(model, path)
    proof = prove(model, path, feed, {}, run_session(open_session(path), feed))
    found = {tensor.name: tensor for tensor in proof.tensors}["y/QuantizeLinear"]
    assert found.kernel == "QuantizeLinear" and not found.exact
    assert found.diverges is False
    assert [each.operator for each in proof.unfused] == ["Elu"]


@pytest.mark.parametrize("op", ["Reshape", "Slice", "Transpose", "Identity", "Unsqueeze", "Flatten"])
def test_the_result_of_a_product_is_quantized_before_it_is_moved(op: str, tmp_path: Path) -> None:
    model = moving(op if op != "Flatten" else "Reshape")
    mover = next(node for node in model.graph.node if node.name in MOVERS)
    if op == "Flatten":
        mover.op_type = op
        del mover.input[1:]
    product = next(node for node in model.graph.node if node.name == "Elu")
    product.op_type = "MatMul"
    product.input.append("weight_read")
    weight = np.random.default_rng(1).integers(-127, 128, (4, 4)).astype(np.int8)
    for name, value in (("weight", weight), ("step", np.asarray(0.01, np.float32)), ("none", np.asarray(0, np.int8))):
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    read = helper.make_node("DequantizeLinear", ["weight", "step", "none"], ["weight_read"], name="weight/DQ")
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in [read, *model.graph.node]]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.output[:]
    model.graph.output.add().CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, None))
    model = shaped(model.graph)
    feed = {"x": values("Reshape")}
    before = run_session(start_session(model, SessionSettings(optimized=False), path=None, changed=True), feed)
    quantize_behind_products(model)
    view = GraphView(model.graph)
    assert view.producer["y_int"].op_type == op
    assert view.producer[view.producer[view.producer["y_int"].input[0]].input[0]].op_type == "MatMul"
    after = run_session(start_session(model, SessionSettings(optimized=False), path=None, changed=True), feed)
    np.testing.assert_array_equal(before["y"], after["y"])
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    proof = prove(model, path, feed, {}, run_session(open_session(path), feed))
    found = {tensor.name: tensor for tensor in proof.tensors}
    assert found["y/QuantizeLinear"].kernel == "QLinearMatMul" and found["y/QuantizeLinear"].exact
    assert found["y/QuantizeLinear"].total is not None and found["y/QuantizeLinear"].total.count == 0


def test_a_resize_that_blends_or_fills_moves_nothing() -> None:
    node = helper.make_node("Resize", ["x"], ["y"], mode="linear")
    assert not only_moves(node)
    node = helper.make_node("Resize", ["x"], ["y"], mode="nearest", coordinate_transformation_mode="tf_crop_and_resize")
    assert not only_moves(node)
    assert only_moves(helper.make_node("Resize", ["x"], ["y"], mode="nearest"))


def test_a_view_knows_producers_consumers_and_constants() -> None:
    constants = [
        helper.make_node("Constant", [], ["tensor"], value=numpy_helper.from_array(np.asarray([1.5], np.float32))),
        helper.make_node("Constant", [], ["int"], value_int=3),
        helper.make_node("Constant", [], ["floats"], value_floats=[0.1, 0.2]),
        helper.make_node("Constant", [], ["text"], value_string="no number"),
    ]
    inner = helper.make_graph(
        [helper.make_node("Mul", ["x", "stored"], ["then"])], "then", [], [helper.make_empty_tensor_value_info("then")]
    )
    nodes = [*constants, helper.make_node("If", ["condition"], ["y"], then_branch=inner, else_branch=inner)]
    floats = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    typed = helper.make_tensor_value_info("stored", TensorProto.FLOAT, [1])
    stored = numpy_helper.from_array(np.asarray([2.0], np.float32), "stored")
    graph = helper.make_graph(nodes, "g", [floats, typed], [helper.make_empty_tensor_value_info("y")], [stored])
    view = GraphView(graph)
    assert list(view.inputs) == ["x"] and view.outputs == {"y"}
    # Also what a subgraph reads.
    assert [node.op_type for node in view.consumers("stored")] == ["If"] and view.consumers("none") == []
    assert view.producer["int"].op_type == "Constant"
    assert list(view.constants()) == ["stored", "tensor"]
    found = {name: view.constant(name) for name in ("stored", "tensor", "int", "floats", "text", "x")}
    assert found["stored"] is not None and found["stored"].tolist() == [2.0]
    assert found["tensor"] is not None and found["tensor"].tolist() == [1.5]
    assert found["int"] is not None and found["int"] == 3 and found["int"].dtype == np.int64
    assert found["floats"] is not None and found["floats"].dtype == np.float32
    assert found["text"] is None and found["x"] is None


def test_token_ids_are_found_behind_everything_that_moves_them(tmp_path: Path) -> None:
    """Ones are no rows of a table of one row: such an input has to be zeros."""
    nodes = [
        helper.make_node("Cast", ["ids"], ["wide"], to=TensorProto.INT64),
        helper.make_node("Tile", ["wide", "twice"], ["tiled"]),
        helper.make_node("Gather", ["table", "tiled"], ["y"]),
    ]
    stored = [
        numpy_helper.from_array(np.ones((1, 3), np.float32), "table"),
        numpy_helper.from_array(np.asarray([2], np.int64), "twice"),
    ]
    graph = helper.make_graph(
        nodes,
        "ids",
        [helper.make_tensor_value_info("ids", TensorProto.INT32, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        stored,
    )
    path = tmp_path / "ids.onnx"
    onnx.save(shaped(graph), path)
    assert benchmark_onnx(path, iterations=1, warmup=0).iterations == 1


def test_a_linear_resize_between_integers_runs_in_float() -> None:
    model = moving("Resize", "Identity")
    node = next(node for node in model.graph.node if node.op_type == "Resize")
    node.attribute[0].s = b"linear"
    node.input[0] = "x_read"
    assert [each.operator for each in Fusion(model).unfused] == ["Resize"]
    node.attribute[0].s = b"nearest"
    assert Fusion(model).unfused == []
