"""Reads a packed file as the plain one: its packed weights are rebuilt, and stored as they were.

onnxruntime itself computes them, so there is no second description of the forms.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sparsify.errors import DataError, first_line

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto

__all__: list[str] = []

FILE_PACKED = "sparsify.packed"
"""The key in a file's metadata under which stand, in JSON, {value: [its form, index among the initializers]} of those
that are rebuilt; the index is -1 where a Constant node held it."""
OPERATORS = frozenset(
    {"Add", "BitShift", "Cast", "ConstantOfShape", "CumSum", "GatherElements", "Mul", "Reshape", "ScatterElements"}
    | {"Slice", "Where"}
)
MOST_VALUES = 2**30
"""Values of one tensor: onnxruntime folds no node with a larger result than this many bytes."""


def noted_forms(model: ModelProto) -> dict[str, tuple[str, int]]:
    """{value: (form, index)} of the packed values of a file; empty for a plain one.

    Raises:
        DataError: the note is not as `pack_onnx` writes it.
    """
    text = next((entry.value for entry in model.metadata_props if entry.key == FILE_PACKED), None)
    if text is None:
        return {}
    try:
        noted = json.loads(text)
        return {str(name): (str(form), int(index)) for name, (form, index) in noted.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable(f"it is not the note of pack_onnx ({first_line(error)})") from error


def rebuild_weights(model: ModelProto, folder: Path) -> None:
    """Puts initializers, and Constant nodes, in place of what rebuilds them; a plain model stays as it is.

    Args:
        model: changed in place.
        folder: where its external data lies.

    Raises:
        DataError: the file was edited, so that something cannot be rebuilt.
    """
    forms = noted_forms(model)
    if not forms:
        return
    left = set(forms)
    for graph in graphs_of(model.graph):
        left -= _rebuild(model, graph, forms, folder)
    if left:
        raise _unreadable(f"{sorted(left)[0]!r} is not computed in it")
    for i in reversed(range(len(model.metadata_props))):
        if model.metadata_props[i].key == FILE_PACKED:
            del model.metadata_props[i]


def graphs_of(graph: GraphProto) -> Iterator[GraphProto]:
    """A graph and those inside of it (branches, loops)."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from graphs_of(inner)


def tensors_of(model: ModelProto) -> Iterator[TensorProto]:
    """Every stored tensor of a model: initializers and constants, at any depth, and those of its local functions."""
    for graph in graphs_of(model.graph):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        yield from _constants_in(graph.node)
    for function in model.functions:
        yield from _constants_in(function.node)
        for node in function.node:
            for attribute in node.attribute:
                for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                    for graph in graphs_of(inner):
                        yield from graph.initializer
                        yield from _constants_in(graph.node)


def _constants_in(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            if attribute.HasField("sparse_tensor"):
                yield from (attribute.sparse_tensor.values, attribute.sparse_tensor.indices)
            yield from attribute.tensors


def rebuilding_nodes(graph: GraphProto, name: str) -> tuple[list[int], set[str]]:
    """(indices of the nodes that rebuild a value, in order; initializers that they read).

    Raises:
        DataError: they read what is no constant, or use other operators.
    """
    producer = {output: i for i, node in enumerate(graph.node) for output in node.output}
    stored = {tensor.name for tensor in graph.initializer}
    nodes: set[int] = set()
    constants: set[str] = set()
    stack = [name]
    while stack:
        value = stack.pop()
        if value in stored:
            constants.add(value)
        elif value not in producer:
            raise _unreadable(f"{name!r} depends on {value!r}, which is not stored in it")
        elif producer[value] not in nodes:
            node = graph.node[producer[value]]
            if node.op_type not in OPERATORS or node.domain:
                raise _unreadable(f"{name!r} is computed by {node.op_type}, which pack_onnx does not use")
            nodes.add(producer[value])
            stack.extend(node.input)
    return sorted(nodes), constants


def rebuilt_value(model: ModelProto, graph: GraphProto, name: str, folder: Path) -> TensorProto:
    """The tensor that a packed value is: onnxruntime computes it, node by node.

    Raises:
        DataError: it cannot be computed.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    sparse = next((each for each in graph.sparse_initializer if each.values.name == name), None)
    if sparse is not None:
        return _dense(sparse)
    indices, constants = rebuilding_nodes(graph, name)
    small = onnx.ModelProto()
    small.ir_version = model.ir_version
    small.opset_import.extend(model.opset_import)
    small.graph.name = "rebuild"
    small.graph.node.extend(graph.node[i] for i in indices)
    for tensor in graph.initializer:
        if tensor.name in constants:
            small.graph.initializer.append(loaded(tensor, folder))
    last = small.graph.node[-1]
    kind = next((entry.i for entry in last.attribute if entry.name == "to"), None)
    if kind is not None:  # no array of onnxruntime holds values of four bits
        small.graph.node.pop()
        small.graph.output.add().name = last.input[0]
    else:
        small.graph.output.add().name = name
    for node in small.graph.node:
        if node.op_type == "ConstantOfShape":
            shape = next((each for each in small.graph.initializer if each.name == node.input[0]), None)
            if shape is None or not 0 <= numpy_helper.to_array(shape).prod() <= MOST_VALUES:
                raise _unreadable(f"{name!r} has an absurd shape")
    try:
        values = _run_alone(small)
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise _unreadable(f"{name!r} cannot be rebuilt: {first_line(error)}") from error
    if kind is None:
        return numpy_helper.from_array(values, name)
    if kind not in (TensorProto.INT4, TensorProto.UINT4):
        raise _unreadable(f"{name!r} is of a type that pack_onnx does not pack")
    nibbles = np.pad(values.reshape(-1).astype(np.uint8) & 15, (0, values.size % 2))
    raw = (nibbles[::2] | (nibbles[1::2] << 4)).astype(np.uint8).tobytes()
    return helper.make_tensor(name, kind, values.shape, raw, raw=True)


def loaded(tensor: TensorProto, folder: Path) -> TensorProto:
    """A tensor with its values inside; read from the file beside the model where they lie there.

    Raises:
        DataError: they cannot be read.
    """
    from onnx import TensorProto
    from onnx.external_data_helper import load_external_data_for_tensor

    if tensor.data_location != TensorProto.EXTERNAL:
        return tensor
    copy = TensorProto()
    copy.CopyFrom(tensor)
    try:
        load_external_data_for_tensor(copy, str(folder))
    except Exception as error:  # onnx raises its own errors and those of the system
        raise DataError(f"the values of {tensor.name!r} cannot be read: {first_line(error)}") from error
    copy.ClearField("data_location")
    copy.ClearField("external_data")
    return copy


def _dense(sparse: SparseTensorProto) -> TensorProto:
    from onnx import numpy_helper

    name, total = sparse.values.name, math.prod(sparse.dims)
    try:
        values, indices = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    except Exception as error:  # onnx raises many types for values that do not fit their shape
        raise _unreadable(f"{name!r} cannot be read: {first_line(error)}") from error
    inside = not len(indices) or (indices.min() >= 0 and indices.max() < total)
    if not 0 <= total <= MOST_VALUES or indices.shape != values.shape or values.ndim != 1 or not inside:
        raise _unreadable(f"{name!r} has values outside its shape")
    dense = np.zeros(total, values.dtype)
    dense[indices] = values
    return numpy_helper.from_array(dense.reshape(tuple(sparse.dims)), name)


def _run_alone(model: ModelProto) -> np.ndarray:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {})[0])


def _rebuild(model: ModelProto, graph: GraphProto, forms: dict[str, tuple[str, int]], folder: Path) -> set[str]:
    """Rebuilds the values of one graph, and returns their names."""
    import onnx

    from sparsify.onnx.graph import all_inputs

    made = [node.output[0] for node in graph.node if node.output and node.output[0] in forms]
    sparse = [each.values.name for each in graph.sparse_initializer if each.values.name in forms]
    if not made and not sparse:
        return set()
    values = {name: rebuilt_value(model, graph, name, folder) for name in (*made, *sparse)}
    gone: set[int] = set()
    for name in made:
        gone.update(rebuilding_nodes(graph, name)[0])
    nodes: list[NodeProto] = []
    for i, node in enumerate(graph.node):
        copy = onnx.NodeProto()
        if i not in gone:
            copy.CopyFrom(node)
        elif node.output[0] in values and forms[node.output[0]][1] < 0:
            copy.CopyFrom(
                onnx.helper.make_node("Constant", [], [node.output[0]], node.name, value=values[node.output[0]])
            )
            copy.attribute[0].t.ClearField("name")
        else:
            continue
        nodes.append(copy)
    used = {name for node in nodes for name in all_inputs(node)} | {value.name for value in graph.output}
    inputs = {value.name for value in graph.input}
    helpers = {name for made_name in made for name in rebuilding_nodes(graph, made_name)[1]} - used - inputs
    tensors = []
    for tensor in graph.initializer:
        if tensor.name not in helpers:
            tensors.append(onnx.TensorProto())
            tensors[-1].CopyFrom(tensor)
    for name in sorted(values, key=lambda each: forms[each][1]):
        if forms[name][1] >= 0:
            tensors.insert(forms[name][1], values[name])
    for i in reversed(range(len(graph.sparse_initializer))):
        if graph.sparse_initializer[i].values.name in values:
            del graph.sparse_initializer[i]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(tensors)
    return set(values)


def _unreadable(why: str) -> DataError:
    return DataError(f"the file says that it is packed, but {why}: pack the plain file again.")
