"""Weights of LSTM and GRU as integers in a file, in a form that onnxruntime turns to float once, when it loads it.

(Cast(integers) - zero point) * scale, of integers in the order and shape in which the operator takes them: one
direction after the other, the gates in ONNX's order. A DequantizeLinear in their place onnxruntime computes at every
call, and does not pack what it gives: an LSTM of 256 units over 50 steps, batch 1, one thread, took 1.95 ms behind
DequantizeLinear and 1.63 ms so, in float 1.51 (1.31.1, on a busy machine; benchmarks/recurrent.py). Its own
DynamicQuantizeLSTM took .5 ms, but that rounds input and state at every step, too, which nobody trained for (an error
of .018, instead of .009 so); there is none for GRU, and nothing else runs such files.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from sparsify.onnx.float_kernels import compute
from sparsify.onnx.graph import RECURRENT_OPERATORS, Graph, integer, like

__all__: list[str] = []

MOVING = frozenset({"Slice", "Concat", "Unsqueeze", "Identity"})
"""Operators with which the exporter orders the gates of dequantized weights, and puts directions together."""
WEIGHTS = (1, 2)
"""The positions of the two weights among the inputs of the operators."""


def store_recurrent_weights(model: ModelProto) -> None:
    """Writes the quantized weights of every recurrent operator in that form."""
    graph = Graph(model)
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)
    for node in list(model.graph.node):
        if node.op_type not in RECURRENT_OPERATORS:
            continue
        operands, nodes = list(node.input), list[NodeProto]()
        for position in WEIGHTS:
            leaves = _leaves(graph, node.input[position])
            if leaves:
                made = _rebuilt(graph, node, position, leaves, opset)
                operands[position] = made[-1].output[0]
                nodes += made
        if nodes:
            graph.replace(node, [*nodes, like(node, operands, node.output)])
    graph.finish()


def _leaves(graph: Graph, name: str) -> list[NodeProto]:
    """The DequantizeLinear nodes on stored weights that a value is put together of; none where it is something else."""
    node = graph.producer.get(name)
    if node is None:
        return []
    if node.op_type == "DequantizeLinear":
        rows = integer(node, "axis", 1) == 0 or graph.per_tensor(node)
        return [node] if graph.is_initializer(node.input[0]) and rows else []
    if node.op_type not in MOVING:
        return []
    read = [_leaves(graph, each) for each in (node.input if node.op_type == "Concat" else node.input[:1])]
    return [leaf for found in read for leaf in found] if all(read) else []


def _rebuilt(graph: Graph, node: NodeProto, position: int, leaves: list[NodeProto], opset: int) -> list[NodeProto]:
    """The nodes that make one weight of the operator of its integers."""

    def moved(name: str, values: Callable[[NodeProto], np.ndarray]) -> np.ndarray:
        """The values of the leaves as they reach the operator."""
        constant = graph.constant(name)
        if constant is not None:
            return constant
        made = graph.producer[name]
        if made.op_type == "DequantizeLinear":
            return values(made)
        return compute(made, [moved(each, values) for each in made.input], opset)[0]

    def stored(leaf: NodeProto, index: int) -> np.ndarray:
        return numpy_helper.to_array(graph.initializers[leaf.input[index]])

    def of_rows(leaf: NodeProto, index: int) -> np.ndarray:
        """Scales or zero points, one for each row."""
        rows = stored(leaf, 0).shape[0]
        return np.ascontiguousarray(np.broadcast_to(stored(leaf, index).reshape(-1, 1), (rows, 1)))

    target = node.input[position]
    integers = np.ascontiguousarray(moved(target, lambda leaf: stored(leaf, 0)))
    scale = moved(target, lambda leaf: of_rows(leaf, 1))
    stem = re.sub(r"_u?int8$", "", leaves[0].input[0])
    path = f"{node.name}/{stem.rpartition('.')[2]}"

    def constant(kind: str, values: np.ndarray) -> str:
        return graph.value(graph.fresh(f"{stem}_gates_{kind}"), values)

    name, value = constant(str(integers.dtype), integers), graph.fresh(f"{stem}_gates_whole")
    nodes = [helper.make_node("Cast", [name], [value], name=f"{path}/Cast", to=TensorProto.FLOAT)]
    if integers.dtype == np.uint8:
        zero = moved(target, lambda leaf: of_rows(leaf, 2)).astype(np.float32)
        centered = graph.fresh(f"{stem}_gates_centered")
        nodes.append(helper.make_node("Sub", [value, constant("zero_point", zero)], [centered], name=f"{path}/Sub"))
        value = centered
    weight = graph.fresh(f"{stem}_gates")
    nodes.append(helper.make_node("Mul", [value, constant("scale", scale)], [weight], name=f"{path}/Mul"))
    return nodes
