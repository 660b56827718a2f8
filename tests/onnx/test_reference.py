"""The integer reference gives, bit for bit, what onnxruntime's integer kernels give."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from sparsify.errors import ArgumentError, ExportError
from sparsify.onnx import integer_kernels
from sparsify.onnx.float_kernels import compute
from sparsify.onnx.fusion import Fusion
from sparsify.onnx.integer_kernels import QuantizationGrid, Quantized, quantize
from sparsify.onnx.reference import Reference
from sparsify.onnx.runtime import SessionSettings, start_session

Array = NDArray[Any]


@dataclass
class Case:
    """One operator between Q and DQ, with the scales and zero points of its operands given or drawn."""

    operator: str
    inputs: tuple[tuple[int, ...], ...]
    """Shapes of the activations."""
    attributes: dict[str, Any] = field(default_factory=dict)
    weight: tuple[int, ...] = ()
    axis: int = 0
    bias: int = 0
    quantized: bool = True
    scale: float = 1.0
    """Of the output, as a multiple of one that fits."""
    kernel: str = ""


def drawn(generator: np.random.Generator, shape: tuple[int, ...], kind: type = np.uint8) -> Array:
    info = np.iinfo(kind)
    values = generator.integers(info.min, info.max + 1, shape)
    # Both ends more often than chance has them.
    edge = generator.random(shape)
    return np.where(edge < 0.05, info.min, np.where(edge > 0.95, info.max, values)).astype(kind)


def built(case: Case, seed: int, ties: bool) -> tuple[ModelProto, dict[str, Array]]:
    """With `ties` all scales are powers of two, so that many results lie half-way between two integers."""
    generator = np.random.default_rng(seed)

    def scale(low: float = -6.0, high: float = -3.0) -> float:
        drawn = float(generator.uniform(low, high))
        return 2.0 ** round(drawn * 1.44) if ties else float(np.exp(drawn))

    nodes, stored, taken, feed, names = [], [], [], {}, []
    scales = []
    for i, shape in enumerate(case.inputs):
        scales.append(scale())
        zero = int(generator.integers(0, 256))
        stored += [
            numpy_helper.from_array(np.asarray(scales[-1], np.float32), f"s{i}"),
            numpy_helper.from_array(np.asarray(zero, np.uint8), f"z{i}"),
        ]
        feed[f"q{i}"] = drawn(generator, shape)
        taken.append(helper.make_tensor_value_info(f"q{i}", TensorProto.UINT8, shape))
        nodes.append(helper.make_node("DequantizeLinear", [f"q{i}", f"s{i}", f"z{i}"], [f"x{i}"]))
        names.append(f"x{i}")
    spread = 100 * scales[0]
    if case.weight:
        channels = case.weight[case.axis]
        steps = np.asarray([scale(-7, -4) for _ in range(channels)], np.float32)
        stored += [
            numpy_helper.from_array(drawn(generator, case.weight, np.int8), "w"),
            numpy_helper.from_array(steps, "ws"),
            numpy_helper.from_array(np.zeros(channels, np.int8), "wz"),
        ]
        nodes.append(helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["weight"], axis=case.axis))
        names.append("weight")
        summed = np.prod(case.weight) / channels
        spread = 73 * 73 * float(np.median(steps)) * scales[0] * summed**0.5
        if case.bias:
            stored += [
                numpy_helper.from_array(generator.integers(-9000, 9000, channels).astype(np.int32), "b"),
                numpy_helper.from_array(steps * np.float32(scales[0]), "bs"),
            ]
            nodes.append(helper.make_node("DequantizeLinear", ["b", "bs"], ["bias"], axis=0))
            names.append("bias")
    elif len(scales) == 2:
        spread = 100 * max(scales) if case.operator in ("Add", "Concat") else 73 * 73 * scales[0] * scales[1]
        if case.operator == "MatMul":
            spread *= case.inputs[0][-1] ** 0.5
    nodes.append(helper.make_node(case.operator, names, ["y"], name="layer", **case.attributes))
    if case.quantized:
        step = case.scale * spread / 50
        if case.operator in ("Sigmoid", "Softmax"):
            step = case.scale / 256
        step = 2.0 ** round(np.log2(step)) if ties else step
        zero = 0 if case.operator in ("Sigmoid", "Softmax") else int(generator.integers(60, 200))
        stored += [
            numpy_helper.from_array(np.asarray(step, np.float32), "sy"),
            numpy_helper.from_array(np.asarray(zero, np.uint8), "zy"),
        ]
        nodes.append(helper.make_node("QuantizeLinear", ["y", "sy", "zy"], ["out"]))
    last = "out" if case.quantized else "y"
    kind = TensorProto.UINT8 if case.quantized else TensorProto.FLOAT
    graph = helper.make_graph(nodes, "g", taken, [helper.make_tensor_value_info(last, kind, None)], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return model, feed


def optimized(model: ModelProto, feed: dict[str, Array], path: Any) -> tuple[Array, Counter[str]]:
    session = start_session(model, SessionSettings(optimized_path=path), path=None, changed=True)
    return session.run(None, feed)[0], Counter(node.op_type for node in onnx.load(path).graph.node)


IMAGE = (2, 16, 19, 21)
CASES = {
    "conv": Case("Conv", (IMAGE,), {"pads": [1] * 4}, (24, 16, 3, 3), bias=1, kernel="QLinearConv"),
    "conv 1x1 without bias": Case("Conv", (IMAGE,), {}, (24, 16, 1, 1), kernel="QLinearConv"),
    "conv that saturates": Case("Conv", (IMAGE,), {}, (24, 16, 3, 3), bias=1, scale=0.1, kernel="QLinearConv"),
    "depthwise": Case("Conv", (IMAGE,), {"group": 16, "pads": [1] * 4}, (16, 1, 3, 3), bias=1, kernel="QLinearConv"),
    "depthwise, two for one": Case("Conv", (IMAGE,), {"group": 16}, (32, 1, 3, 3), bias=1, kernel="QLinearConv"),
    "grouped, strided, uneven padding": Case(
        "Conv", (IMAGE,), {"group": 4, "strides": [2, 3], "pads": [0, 1, 1, 0]}, (24, 4, 3, 3), kernel="QLinearConv"
    ),
    "dilated": Case("Conv", (IMAGE,), {"dilations": [2, 3]}, (8, 16, 3, 3), bias=1, kernel="QLinearConv"),
    "padded as SAME": Case(
        "Conv", (IMAGE,), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, (8, 16, 4, 3), kernel="QLinearConv"
    ),
    "7x7 of images": Case(
        "Conv", ((1, 3, 40, 40),), {"strides": [2, 2], "pads": [3] * 4}, (8, 3, 7, 7), bias=1, kernel="QLinearConv"
    ),
    "conv in one dimension": Case("Conv", ((2, 6, 50),), {"strides": [2]}, (8, 6, 5), bias=1, kernel="QLinearConv"),
    "conv in three dimensions": Case(
        "Conv", ((1, 4, 5, 6, 7),), {"pads": [1] * 6}, (8, 4, 3, 3, 3), kernel="QLinearConv"
    ),
    "gemm": Case("Gemm", ((37, 129),), {"transB": 1}, (65, 129), bias=1, kernel="QGemm"),
    "gemm into float": Case("Gemm", ((37, 129),), {"transB": 1}, (65, 129), bias=1, quantized=False, kernel="QGemm"),
    "gemm, columns": Case("Gemm", ((5, 12),), {}, (12, 7), 1, bias=1, kernel="QGemm"),
    "matmul with weights": Case("MatMul", ((3, 17, 33),), {}, (33, 20), 1, kernel="QLinearMatMul"),
    "matmul into float": Case(
        "MatMul", ((3, 17, 33),), {}, (33, 20), 1, quantized=False, kernel="MatMulIntegerToFloat"
    ),
    "matmul of activations": Case("MatMul", ((2, 3, 17, 29), (2, 3, 29, 11)), kernel="QLinearMatMul"),
    "matmul of activations into float": Case(
        "MatMul", ((2, 3, 17, 29), (2, 3, 29, 11)), quantized=False, kernel="MatMulIntegerToFloat"
    ),
    "add": Case("Add", (IMAGE, IMAGE), kernel="QLinearAdd"),
    "add of a channel": Case("Add", (IMAGE, (2, 16, 1, 1)), kernel="QLinearAdd"),
    "add to a channel": Case("Add", ((2, 16, 1, 1), IMAGE), kernel="QLinearAdd"),
    "add of a number": Case("Add", (IMAGE, (1,)), kernel="QLinearAdd"),
    "add that saturates": Case("Add", (IMAGE, IMAGE), scale=0.1, kernel="QLinearAdd"),
    "mul": Case("Mul", (IMAGE, IMAGE), kernel="QLinearMul"),
    "mul of a channel": Case("Mul", (IMAGE, (2, 16, 1, 1)), kernel="QLinearMul"),
    "mul that saturates": Case("Mul", (IMAGE, IMAGE), scale=0.1, kernel="QLinearMul"),
    "concat": Case("Concat", (IMAGE, IMAGE), {"axis": 1}, kernel="QLinearConcat"),
    "global average": Case("GlobalAveragePool", ((4, 32, 7, 7),), scale=0.2, kernel="QLinearGlobalAveragePool"),
    "global average of a line": Case("GlobalAveragePool", ((4, 32, 13),), scale=0.2, kernel="QLinearGlobalAveragePool"),
    "average": Case("AveragePool", (IMAGE,), {"kernel_shape": [3, 2], "strides": [2, 2]}, kernel="QLinearAveragePool"),
    "average, padded": Case(
        "AveragePool", (IMAGE,), {"kernel_shape": [3, 3], "pads": [1] * 4}, kernel="QLinearAveragePool"
    ),
    "average, padding counted": Case(
        "AveragePool",
        (IMAGE,),
        {"kernel_shape": [3, 3], "pads": [1] * 4, "count_include_pad": 1},
        kernel="QLinearAveragePool",
    ),
    "average, ceil": Case(
        "AveragePool",
        (IMAGE,),
        {"kernel_shape": [5, 3], "strides": [3, 2], "pads": [1, 0, 1, 1], "ceil_mode": 1},
        kernel="QLinearAveragePool",
    ),
    "sigmoid": Case("Sigmoid", (IMAGE,), kernel="QLinearSigmoid"),
    "leaky relu": Case("LeakyRelu", (IMAGE,), {"alpha": 0.1}, kernel="QLinearLeakyRelu"),
    "softmax": Case("Softmax", ((3, 4, 50, 50),), {"axis": -1}, kernel="QLinearSoftmax"),
    "softmax of channels": Case("Softmax", (IMAGE,), {"axis": 1}, kernel="QLinearSoftmax"),
    "softmax, uneven scale": Case("Softmax", ((3, 4, 50, 50),), {"axis": -1}, scale=256 / 255, kernel="QLinearSoftmax"),
}


@pytest.mark.parametrize("ties", [False, True], ids=["random", "ties"])
@pytest.mark.parametrize("name", CASES)
def test_every_integer_is_that_of_onnxruntime(name: str, ties: bool, tmp_path: Any) -> None:
    case, seen = CASES[name], set[int]()
    for seed in range(3):
        model, feed = built(case, seed, ties)
        found, operators = optimized(model, feed, tmp_path / "optimized.onnx")
        assert operators[case.kernel] == 1, operators
        reference = Reference(model)
        assert [fused.node.op_type for fused in reference.fusion.fused.values()] == [case.operator]
        expected = next(iter(reference.run(feed).values()))
        assert expected.dtype == found.dtype and expected.shape == found.shape
        assert np.count_nonzero(expected != found) == 0
        seen |= set(np.unique(found).tolist())
    # The test sees a good part of the range, and both ends of it where it is meant to.
    assert len(seen) > 8
    if case.scale == 0.1:
        assert {0, 255} <= seen


def test_softmax_rounds_right_where_it_shows_in_one_of_a_million(tmp_path: Any) -> None:
    case = Case("Softmax", ((3, 4, 197, 197),), {"axis": -1}, kernel="QLinearSoftmax")
    for seed in range(10):
        model, feed = built(case, seed, ties=False)
        found, operators = optimized(model, feed, tmp_path / "optimized.onnx")
        assert operators[case.kernel] == 1
        assert np.count_nonzero(Reference(model).run(feed)["out"] != found) == 0


def half_away(x: Array) -> Array:
    rounded: Array = np.trunc(x + np.copysign(0.5, x)).astype(x.dtype)
    return rounded


@pytest.mark.parametrize("name", ["conv", "gemm", "add", "mul", "average"])
def test_another_rounding_of_ties_would_be_seen(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    model, feed = built(CASES[name], 0, ties=True)
    found, _ = optimized(model, feed, tmp_path / "optimized.onnx")
    monkeypatch.setattr(np, "rint", half_away)
    assert np.count_nonzero(Reference(model).run(feed)["out"] != found) > 0


def swapped(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda a, b, grid: function(b, a, grid)


def test_the_order_within_an_add_would_be_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(integer_kernels, "add", swapped(integer_kernels.add))
    differ = 0
    for seed in range(20):
        model, feed = built(Case("Add", ((8, 64, 40, 40),) * 2), seed, ties=False)
        found, _ = optimized(model, feed, tmp_path / "optimized.onnx")
        differ += int(np.count_nonzero(Reference(model).run(feed)["out"] != found))
    assert differ > 0


def test_quantize_rounds_ties_to_even_and_clips_and_takes_what_is_not_finite() -> None:
    grid = QuantizationGrid(np.asarray(0.5, np.float32), np.asarray(10, np.uint8))
    x = np.asarray([0.25, 0.75, -0.25, -0.75, 1e9, -1e9, np.inf, -np.inf], np.float32)
    assert quantize(x, grid).tolist() == [10, 12, 10, 8, 255, 0, 255, 0]
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])],
            [helper.make_tensor_value_info("q", TensorProto.UINT8, [None])],
            [numpy_helper.from_array(grid.scale, "s"), numpy_helper.from_array(grid.zero_point, "z")],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=9,
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    many = np.concatenate([x, np.random.default_rng(0).normal(0, 60, 100_000).astype(np.float32)])
    assert np.array_equal(session.run(None, {"x": many})[0], quantize(many, grid))
    assert np.array_equal(Reference(model).run({"x": many})["q"], quantize(many, grid))


@pytest.mark.parametrize(
    ("shape", "picked", "axis"), [((1, 6), (1, 4), 1), ((5, 6), (2, 4), 1), ((4, 3, 2), (7, 2, 2), 0)]
)
def test_elements_are_gathered_as_onnxruntime_does(shape: tuple[int, ...], picked: tuple[int, ...], axis: int) -> None:
    generator = np.random.default_rng(0)
    data = generator.standard_normal(shape).astype(np.float32)
    indices = generator.integers(-shape[axis], shape[axis], picked)
    node = helper.make_node("GatherElements", ["x", "i"], ["y"], axis=axis)
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, shape),
        helper.make_tensor_value_info("i", TensorProto.INT64, picked),
    ]
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, picked)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(None, {"x": data, "i": indices})[0]
    assert np.array_equal(compute(node, [data, indices], 20)[0], expected)


def test_accumulators_wrap_at_32_bits() -> None:
    grid = QuantizationGrid(np.asarray(1.0, np.float32), np.asarray(0, np.uint8))
    x = Quantized(np.full((1, 70_000), 255, np.uint8), grid)
    weight = Quantized(
        np.full((70_000, 1), 127, np.int8), QuantizationGrid(np.asarray(1.0, np.float32), np.asarray(0, np.int8))
    )
    assert float(integer_kernels.matmul(x, weight, None, None)[0, 0]) == np.float32(70_000 * 255 * 127 - 2**32)


def test_values_of_another_run_take_the_place_of_computed_ones() -> None:
    model, feed = built(CASES["add"], 0, ties=False)
    other = feed["q0"][::-1].copy()
    reference = Reference(model)
    plain = reference.run({**feed, "q0": other})["out"]
    quantizers = [node.name for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantizers) == 1
    given = reference.run({**feed, "q0": other}, given={"out": np.zeros_like(plain)})["out"]
    assert np.array_equal(plain, given)


def test_what_cannot_be_computed_is_said() -> None:
    model, feed = built(CASES["add"], 0, ties=False)
    with pytest.raises(ArgumentError, match="no value for the inputs q1"):
        Reference(model).run({"q0": feed["q0"]})
    graph = helper.make_graph(
        [helper.make_node("Unheard", ["x"], ["y"], name="layer", domain="org.example")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    with pytest.raises(ExportError, match=r"layer: Unheard of 'org.example' is not known"):
        Reference(helper.make_model(graph)).run({"x": np.zeros(1, np.float32)})


def changed(case: Case, edit: Callable[[ModelProto], None]) -> list[str]:
    model, _ = built(case, 0, ties=False)
    edit(model)
    return [str(each) for each in Fusion(model).unfused]


def add_relu(model: ModelProto) -> None:
    quantize = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    quantize.input[0] = "cut"
    model.graph.node.insert(len(model.graph.node) - 1, helper.make_node("Relu", ["y"], ["cut"], name="relu"))


def float_bias(model: ModelProto) -> None:
    layer = next(node for node in model.graph.node if node.name == "layer")
    layer.input[2] = "floating"
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(24, np.float32), "floating"))


def signed(model: ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.name.startswith("z"):
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(0, np.int8), tensor.name))


def wide_scale(model: ModelProto) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "s0")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).reshape(1), "s0"))


def float_output(model: ModelProto) -> None:
    model.graph.output[0].name = "y"
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT


def float_input(model: ModelProto) -> None:
    layer = next(node for node in model.graph.node if node.name == "layer")
    layer.input[1] = "plain"
    model.graph.input.append(helper.make_tensor_value_info("plain", TensorProto.FLOAT, IMAGE))


@pytest.mark.parametrize(
    ("case", "edit", "why"),
    [
        ("conv", add_relu, "relu between it and its quantizer cuts values off"),
        ("conv", float_bias, "its bias 'floating' is in float; it has to be int32"),
        ("conv", signed, "activations of int8: on x86 onnxruntime fuses those of uint8"),
        ("conv", wide_scale, r"the scale 's0' has the shape \[1\]; activations need rank 0"),
        ("conv", float_output, "its result is an output of the file in float"),
        ("add", float_input, "it reads 'plain' in float; quantize that as well"),
    ],
)
def test_why_an_operator_stays_in_float_is_said(case: str, edit: Callable[[ModelProto], None], why: str) -> None:
    said = changed(CASES[case], edit)
    assert len(said) == 1 and said[0].startswith("layer (") and re.search(why, said[0]), said


def loop(operator: str) -> ModelProto:
    """x, and three times `operator` of it and the square of x, which lies outside of the loop."""
    body = helper.make_graph(
        [
            helper.make_node(operator, ["sum_in", "outer"], ["sum_out"]),
            helper.make_node("Identity", ["go_in"], ["go_out"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_in", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum_in", TensorProto.FLOAT, [2]),
        ],
        [
            helper.make_tensor_value_info("go_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum_out", TensorProto.FLOAT, [2]),
        ],
    )
    graph = helper.make_graph(
        [
            helper.make_node("Mul", ["x", "x"], ["outer"]),
            helper.make_node("Loop", ["count", "", "x"], ["y"], name="beams", body=body),
        ],
        "loop",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
        [numpy_helper.from_array(np.asarray(3, np.int64), "count")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_a_loop_reads_values_from_outside_and_what_fails_in_it_is_one_line() -> None:
    feed = {"x": np.asarray([1.0, 2.0], np.float32)}
    assert Reference(loop("Add")).run(feed)["y"].tolist() == [4.0, 14.0]
    with pytest.raises(ExportError) as caught:
        Reference(loop("MatMulInteger")).run(feed)
    assert str(caught.value).startswith("beams: the reference evaluator does not run the graphs inside of Loop: ")
    assert "\n" not in str(caught.value)


def test_a_sigmoid_is_the_one_of_onnxruntime_to_the_bit() -> None:
    """By exp in double precision two entries of these tables lie on the other side of an edge."""
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Sigmoid", ["f"], ["g"]),
        helper.make_node("QLinearSigmoid", ["x", "xs", "xz", "ys", ""], ["y"], domain="com.microsoft"),
    ]
    draw = np.random.default_rng(0)
    floats = (draw.standard_normal(4096) * 10 ** draw.uniform(-3, 1.5, 4096)).astype(np.float32)
    every = np.arange(256, dtype=np.uint8)
    for scale, zero, step in (
        (0.023062005639076233, 211, 0.00390625),
        (0.0011687675723806024, 233, 0.0033651140984147787),
    ):
        stored = [
            numpy_helper.from_array(np.float32(scale), "xs"),
            numpy_helper.from_array(np.uint8(zero), "xz"),
            numpy_helper.from_array(np.float32(step), "ys"),
        ]
        graph = helper.make_graph(
            nodes,
            "sigmoids",
            [value("f", TensorProto.FLOAT, [4096]), value("x", TensorProto.UINT8, [256])],
            [value("g", TensorProto.FLOAT, [4096]), value("y", TensorProto.UINT8, [256])],
            stored,
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        found, table = session.run(None, {"f": floats, "x": every})
        np.testing.assert_array_equal(integer_kernels.sigmoid(floats), found)
        grid = QuantizationGrid(np.float32(step), np.uint8(0))
        x = Quantized(every, QuantizationGrid(np.float32(scale), np.uint8(zero)))
        np.testing.assert_array_equal(integer_kernels.by_table(x, grid, integer_kernels.sigmoid), table)
        by_exp = integer_kernels.by_table(
            x, grid, lambda t: (1 / (1 + np.exp(-t.astype(np.float64)))).astype(np.float32)
        )
        assert (by_exp != table).sum() == 1
