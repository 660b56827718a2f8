"""Every call that takes a file gives a result or one typed error, and writes nothing, whatever the file holds."""

from __future__ import annotations

import random
import time
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper

from sparsify import benchmark_onnx, create_recipe, get_weights_metadata, loss_profile, pack_onnx, performance_profile
from sparsify.analysis import analyze_model
from sparsify.errors import SparsifyError
from sparsify.optimize import Project

SIZES = [0, 1, -1, 7, 2**31, 2**62]
OPERATORS = [
    "Loop",
    "Scan",
    "LSTM",
    "Einsum",
    "Gather",
    "Attention",
    "Constant",
    "Foo",
    "Cast",
    "MatMul",
    "DequantizeLinear",
    "If",
    "ConvTranspose",
]
NOTES = ["[]", "null", "{", '{"c.weight": {}}', '{"c.weight": "a..b"}', '{"l.weight": "conv.weight"}', "9" * 5000]
NOTES += ['{"c.weight": "."}', '{"c.weight": -1}', '{"c.weight": ["mask", 0]}', '{"m": ["mask", 0]}', '{"c.weight": 7}']
NOTES += ["[" * 50_000]


def whole() -> ModelProto:
    """A convolution, a linear layer and a product in each of two branches, as `export_onnx` notes names."""
    draw = np.random.default_rng(0).standard_normal

    def stored(name: str, *shape: int) -> TensorProto:
        return numpy_helper.from_array(draw(shape).astype(np.float32), name)

    def branch(name: str) -> GraphProto:
        nodes = [
            helper.make_node("Constant", [], ["w"], value=stored("", 6, 6)),
            helper.make_node("MatMul", ["h", "w"], ["b"], name="product"),
        ]
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)])

    nodes = [
        helper.make_node("Conv", ["x", "c.weight"], ["m"], name="c"),
        helper.make_node("GlobalAveragePool", ["m"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "l.weight"], ["h"], transB=1, name="l"),
        helper.make_node("If", ["fast"], ["y"], name="choice", then_branch=branch("t"), else_branch=branch("e")),
    ]
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 6, 6])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 6])
    constants = [
        stored("c.weight", 4, 3, 3, 3),
        stored("l.weight", 6, 4),
        numpy_helper.from_array(np.array(True), "fast"),
    ]
    graph = helper.make_graph(nodes, "g", [image], [result], constants)
    opsets = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9, producer_name="sparsify")
    model.metadata_props.add(key="sparsify.weights", value='{"c.weight": "conv.weight"}')
    return model


def other_fields(draw: random.Random) -> bytes:
    """The file with one or two of its fields changed: it can be parsed."""
    model = whole()
    graph = model.graph
    for _ in range(draw.choice([1, 1, 2])):
        tensor, node, kind = draw.choice(list(graph.initializer)), draw.choice(list(graph.node)), draw.randrange(12)
        if kind == 0:
            tensor.dims[:] = [draw.choice(SIZES) for _ in range(draw.randrange(5))]
        elif kind == 1:
            tensor.data_type = draw.randrange(30)
        elif kind == 2:
            node.op_type = draw.choice(OPERATORS)
        elif kind == 3 and node.input:
            node.input[draw.randrange(len(node.input))] = draw.choice(["", "x", "y", "m", "f", "c.weight", "none"])
        elif kind == 4:
            graph.input[0].type.tensor_type.shape.dim[draw.randrange(4)].dim_value = draw.choice(SIZES)
        elif kind == 5:
            name = draw.choice(["group", "axis", "transA", "kernel_shape", "pads", "strides", "equation", "value"])
            numbers = [draw.choice([0, -1, 2**31])] * draw.randrange(3)
            node.attribute.add(name=name, type=draw.choice([1, 2, 3, 7]), i=draw.choice([0, -5, 2**40]), ints=numbers)
        elif kind == 6:
            note = model.metadata_props[0]
            note.key = draw.choice(["sparsify.elements", "sparsify.packed", "sparsify.weights"])
            note.value = draw.choice(NOTES)
        elif kind == 7:
            tensor.raw_data = tensor.raw_data[: draw.randrange(40)]
        elif kind == 8:
            tensor.name = draw.choice(["x", "", "a.b.c", "..", "module.weight", "y"])
        elif kind == 9:
            model.opset_import[0].version = draw.choice([1, 7, 11, 21, 99, -1])
        elif kind == 10:
            node.output[0] = draw.choice(["x", "h", "y", "", "p"])
        elif tensor.data_type == TensorProto.FLOAT:
            tensor.raw_data = np.full(len(tensor.raw_data) // 4, np.nan, np.float32).tobytes()
    return model.SerializeToString()


def other_bytes(draw: random.Random) -> bytes:
    """The file cut off, or with bytes changed."""
    data = bytearray(whole().SerializeToString())
    if draw.randrange(4) == 0:
        return bytes(data[: draw.randrange(len(data))])
    for _ in range(draw.choice([1, 3, 30])):
        at = draw.randrange(len(data))
        data[at : at + draw.randrange(1, 3)] = draw.choice(
            [bytes([data[at] ^ 1 << draw.randrange(8)]), draw.randbytes(2)]
        )
    return bytes(data)


CALLS = {
    "analyze_model": analyze_model,
    "get_weights_metadata": get_weights_metadata,
    "benchmark_onnx": lambda path: benchmark_onnx(path, threads=1, warmup=0, iterations=1),
    "performance_profile": lambda path: performance_profile(path, warmup=0, iterations=1),
    "loss_profile": loss_profile,
    "create_recipe": create_recipe,
    "pack_onnx": lambda path: pack_onnx(path, path.with_suffix(".packed")),
    "Project.create": lambda path: Project.create(path.with_suffix(""), path),
}


@pytest.mark.parametrize(
    "seeds", [range(12), pytest.param(range(12, 1512), marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_a_mutated_file_gives_a_result_or_a_typed_error(seeds: range, tmp_path: Path) -> None:
    for seed in seeds:
        draw = random.Random(seed)
        path = tmp_path / f"{seed}.onnx"
        path.write_bytes((other_fields if seed % 2 else other_bytes)(draw))
        for name, call in CALLS.items():
            before, start = set(tmp_path.iterdir()), time.monotonic()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    call(path)
            except SparsifyError as error:
                assert set(tmp_path.iterdir()) == before, f"{name} of seed {seed} left something"
                assert len(str(error)) < 2000
            except BaseException as error:
                raise AssertionError(f"{name} of seed {seed}: {type(error).__name__}: {error}") from error
            assert time.monotonic() - start < 60, f"{name} of seed {seed}"


def test_the_file_that_is_mutated_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "whole.onnx"
    onnx.save(whole(), path)
    for call in CALLS.values():
        call(path)
