"""Rewrites for attention blocks: the float operators between integer layers become as few as they can be.

There the integer layers are so fast that what stands between them counts: reshapes, transpositions, and the guard
against rows that a mask leaves empty. Each rewrite leaves the values as they were.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, helper

from sparsify.onnx.graph import Graph, integer, like

__all__: list[str] = []

_POINTWISE = frozenset({"Gelu", "Relu", "Tanh", "Sigmoid", "HardSwish", "HardSigmoid", "Erf", "QuantizeLinear"})
_PAIRWISE = frozenset({"Add", "Mul", "Sub"})


def transpose_keys(model: ModelProto) -> None:
    """Reshape to three dimensions, Transpose of the last two, Reshape back: one Transpose.

    So the exporter writes the transposed keys of scaled_dot_product_attention.
    """
    graph = Graph(model)
    for node in list(model.graph.node):
        if node.op_type != "Transpose" or _ints(node, "perm") != [0, 2, 1]:
            continue
        before = graph.producer.get(node.input[0])
        readers = graph.readers(node.output[0])
        if before is None or before.op_type != "Reshape" or len(readers) != 1 or readers[0].op_type != "Reshape":
            continue
        after = readers[0]
        source, middle = graph.shape(before.input[0]), graph.shape(before.output[0])
        target = graph.shape(after.output[0])
        if source is None or middle is None or target is None or len(source) < 3 or len(target) != len(source):
            continue
        # All dimensions but the first are known and the same, so the first, of as many values, is the same as well.
        if None in source[1:] or middle[-2:] != source[-2:] or target[1:] != [*source[1:-2], source[-1], source[-2]]:
            continue
        order = [*range(len(source) - 2), len(source) - 1, len(source) - 2]
        made = helper.make_node("Transpose", [before.input[0]], [after.output[0]], name=node.name, perm=order)
        graph.replace(after, [made])
    graph.finish()


def drop_guards(model: ModelProto) -> None:
    """Where(IsNaN(p), 0, p) behind p = softmax(x + mask) goes where the mask holds finite values alone.

    The exporter writes it behind every softmax with a mask, for rows that a mask of -inf leaves empty, but fills masks
    with the least float: no row is NaN. The guard goes twice through batch x heads x length x length values a layer.
    It came with https://github.com/microsoft/onnxscript/pull/2479 (seen in torch 2.13.0); the rewrite is needless where
    the exporter leaves it out for masks of finite values.
    """
    graph = Graph(model)
    for node in list(model.graph.node):
        if node.op_type != "Where" or not _is_guard(graph, node) or graph.is_output(node.output[0]):
            continue
        for reader in graph.readers(node.output[0]):
            inputs = [node.input[2] if name == node.output[0] else name for name in reader.input]
            graph.replace(reader, [like(reader, inputs, reader.output)])
    graph.finish()


def rows(model: ModelProto) -> None:
    """Computes what follows a layer over a sequence on its rows; the Reshape to (batch, length, width) comes later.

    `linear_as_gemm` puts a Reshape behind every layer and before the next. Behind activations, residual adds, LayerNorm
    and QuantizeLinear the two meet, and are nothing. Reshapes in a row become one.
    """
    while _row_count(model):
        pass
    graph = Graph(model)
    for node in list(model.graph.node):
        first = graph.producer.get(node.input[0]) if node.op_type == "Reshape" else None
        if first is not None and first.op_type == "Reshape" and _target(graph, node) is not None:
            graph.replace(node, [like(node, [first.input[0], node.input[1]], node.output)])
    graph.finish()
    graph = Graph(model)
    for node in list(model.graph.node):
        if node.op_type != "Reshape" or graph.is_output(node.output[0]):
            continue
        before, after = graph.shape(node.input[0]), graph.shape(node.output[0])
        if before is not None and before == after and before.count(None) <= 1:
            for reader in graph.readers(node.output[0]):
                inputs = [node.input[0] if name == node.output[0] else name for name in reader.input]
                graph.replace(reader, [like(reader, inputs, reader.output)])
    graph.finish()


def _row_count(model: ModelProto) -> bool:
    """Moves every Reshape of rows behind one operator; True if there was one to move."""
    graph = Graph(model)
    for node in list(model.graph.node):
        moved = [_split_heads(graph, name) for name in node.input]
        where = next((i for i, one in enumerate(moved) if one is not None), None)
        if where is None or len(node.output) != 1:
            continue
        source, shape, target = moved[where] or ("", [], "")
        inputs = list(node.input)
        made: list[NodeProto] = []
        if node.op_type in _PAIRWISE:
            other = node.input[1 - where]
            if graph.shape(other) != shape or (moved[1 - where] is None and not _one_symbol(model)):
                continue
            flat = moved[1 - where]
            inputs[where], inputs[1 - where] = source, flat[0] if flat else graph.fresh(f"{other}_rows")
            if flat is None:
                made.append(
                    helper.make_node(
                        "Reshape",
                        [other, graph.int64([-1, shape[-1] or 0])],
                        [inputs[1 - where]],
                        name=f"{node.name}/rows",
                    )
                )
        elif node.op_type == "LayerNormalization" and where == 0 and integer(node, "axis", -1) in (-1, len(shape) - 1):
            inputs[0] = source
        elif node.op_type in _POINTWISE and where == 0:
            if node.op_type == "QuantizeLinear" and not graph.per_tensor(node):
                continue
            inputs[0] = source
        else:
            continue
        inner = graph.fresh(f"{node.output[0]}_rows")
        operation = like(node, inputs, [inner])
        if node.op_type == "LayerNormalization":
            for attribute in operation.attribute:
                if attribute.name == "axis":
                    attribute.i = -1
        back = helper.make_node("Reshape", [inner, target], node.output, name=f"{node.name}/Reshape")
        graph.replace(node, [*made, operation, back])
    changed = bool(graph.changes)
    graph.finish()
    return changed


def _split_heads(graph: Graph, name: str) -> tuple[str, list[int | None], str] | None:
    """(rows, the shape, its constant) of a value that is a Reshape of rows (n, width) to (..., width)."""
    node = graph.producer.get(name)
    if node is None or node.op_type != "Reshape" or _target(graph, node) is None:
        return None
    before, after = graph.shape(node.input[0]), graph.shape(name)
    if before is None or after is None or len(before) != 2 or len(after) < 3 or None in after[1:]:
        return None
    return (node.input[0], after, node.input[1]) if before[1] == after[-1] else None


def _target(graph: Graph, node: NodeProto) -> np.ndarray | None:
    """The constant shape that a Reshape asks for, where it does not depend on the shape of what it reads."""
    shape = graph.constant(node.input[1])
    return shape if shape is not None and (shape > -2).all() and (shape != 0).all() else None


def _one_symbol(model: ModelProto) -> bool:
    """True if only the batch is of unknown length: two unknown first dimensions are the same then."""
    dims = [dim for value in model.graph.input for dim in value.type.tensor_type.shape.dim[1:]]
    return not any(dim.dim_param for dim in dims)


def _is_guard(graph: Graph, node: NodeProto) -> bool:
    """True if a Where is the guard of a softmax over values with a mask that is finite."""
    test, softmax = graph.producer.get(node.input[0]), graph.producer.get(node.input[2])
    if test is None or test.op_type != "IsNaN" or test.input[0] != node.input[2] or softmax is None:
        return False
    add = graph.producer.get(softmax.input[0]) if softmax.op_type == "Softmax" else None
    zero = graph.constant(node.input[1])
    if add is None or add.op_type != "Add" or zero is None or np.any(zero != 0):
        return False
    return any(_is_finite(graph, name) for name in add.input)


def _is_finite(graph: Graph, mask: str) -> bool:
    """True if it is a constant of finite values, or a choice between such."""
    node = graph.producer.get(mask)
    names = [mask] if node is None or node.op_type != "Where" else list(node.input[1:])
    values = [graph.constant(name) for name in names]
    return all(value is not None and bool(np.isfinite(value).all()) for value in values)


def _ints(node: NodeProto, name: str) -> list[int]:
    return next((list(attribute.ints) for attribute in node.attribute if attribute.name == name), [])
