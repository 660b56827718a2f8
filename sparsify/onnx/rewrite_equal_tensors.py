"""Stores equal tensors of an exported ONNX graph once, whatever their size."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

from onnx import GraphProto, ModelProto, numpy_helper

from sparsify.onnx.graph import remove_unused

__all__: list[str] = []


def share_equal_tensors(model: ModelProto, apart: Collection[str] = ()) -> None:
    """Keeps the first of initializers with the same values, type and shape.

    The exporter shares those of up to 1024 values. It folds the transposition of one weight for each of its readers,
    and buffers that every layer has (masks, position tables) come once a layer. A zero point stays its weight's own,
    as `rewrites.state_zero_points` makes it.

    Args:
        model: changed in place.
        apart: names that stay: layers that happen to have equal weights, as those of a new nn.TransformerEncoder, are
            two layers for who reads the file.
    """
    graph = model.graph
    kept = {value.name for value in (*graph.input, *graph.output)}
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            kept.update(node.input[2:3])
    first: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    others: dict[str, str] = {}
    for tensor in graph.initializer:
        if tensor.name not in kept:
            values = tensor.raw_data or numpy_helper.to_array(tensor).tobytes()
            key = tensor.data_type, tuple(tensor.dims), hashlib.sha256(values).digest()
            if first.setdefault(key, tensor.name) != tensor.name and tensor.name not in apart:
                others[tensor.name] = first[key]
    if others:
        _read_first(graph, others)
        remove_unused(model)


def _read_first(graph: GraphProto, others: dict[str, str]) -> None:
    """Lets nodes, those of subgraphs too, read other values: {old: new}."""
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = others.get(name, name)
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                _read_first(inner, others)
