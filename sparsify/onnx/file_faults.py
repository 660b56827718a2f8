"""Faults that onnx's checker lets pass: values that do not fit their shape or lie elsewhere, names that are no text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sparsify.errors import DataError

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

__all__: list[str] = []

MOST_ELEMENTS = 2**40
"""Elements of one tensor: more are not in any file, and their count may not fit into 64 bits."""
_NIBBLES = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}


def check_stored(model: ModelProto, file: Path) -> bool:
    """Looks through the names and stored tensors of a model; True if values lie in another file.

    Args:
        model: as it was parsed.
        file: where it was read from.

    Raises:
        DataError: the fault, without the file's name.
    """
    from sparsify.onnx.rebuilt_weights import tensors_of

    for text in _texts(model):
        # protobuf gives bytes where a name is no UTF-8.
        if not isinstance(text, str):
            raise DataError(f"a name in it is no UTF-8: {text[:60]!r}")
    external = False
    for tensor in tensors_of(model):
        external |= _check_tensor(tensor, file)
    return external


def _texts(model: ModelProto) -> Iterator[str | bytes]:
    """Every text that is read as a name."""
    from sparsify.onnx.rebuilt_weights import graphs_of, tensors_of

    yield from (model.producer_name, model.producer_version, model.domain, model.doc_string)
    for opset in model.opset_import:
        yield opset.domain
    for entry in model.metadata_props:
        yield from (entry.key, entry.value)
    for function in model.functions:
        yield from (function.name, function.domain, *function.input, *function.output, *function.attribute)
        yield from _node_texts(function.node)
    for graph in graphs_of(model.graph):
        yield from _graph_texts(graph)
    for tensor in tensors_of(model):
        yield tensor.name
        for entry in tensor.external_data:
            yield from (entry.key, entry.value)


def _graph_texts(graph: GraphProto) -> Iterator[str]:
    yield from (graph.name, graph.doc_string)
    yield from _node_texts(graph.node)
    for value in [*graph.input, *graph.output, *graph.value_info]:
        yield from _value_texts(value)
    for note in graph.quantization_annotation:
        yield note.tensor_name


def _node_texts(nodes: Iterable[NodeProto]) -> Iterator[str]:
    for node in nodes:
        yield from (node.name, node.op_type, node.domain, node.doc_string, *node.input, *node.output)
        for attribute in node.attribute:
            yield from (attribute.name, attribute.ref_attr_name)


def _value_texts(value: ValueInfoProto) -> Iterator[str]:
    yield value.name
    if value.type.HasField("tensor_type"):
        for dim in value.type.tensor_type.shape.dim:
            yield dim.dim_param


def _check_tensor(tensor: TensorProto, file: Path) -> bool:
    """True if its values lie in another file."""
    from onnx import TensorProto

    name, dims = tensor.name, list(tensor.dims)
    if tensor.data_type not in TensorProto.DataType.values() or not tensor.data_type:
        raise DataError(f"{name!r} is of type {tensor.data_type}, which does not exist")
    if any(size < 0 for size in dims) or (0 not in dims and math.prod(dims) > MOST_ELEMENTS):
        raise DataError(f"{name!r} has the absurd shape {dims[:8]}")
    kind, count = TensorProto.DataType.Name(tensor.data_type), math.prod(dims)
    if tensor.data_location == TensorProto.EXTERNAL:
        _check_place(name, _needed_bytes(kind, count), {e.key: e.value for e in tensor.external_data}, file)
        return True
    stored, needed = _stored_and_needed(tensor, kind, count)
    if stored != needed:
        raise DataError(
            f"{name!r} of type {kind.lower()} and shape {dims} needs {needed[0]} {needed[1]}, and has {stored[0]}"
        )
    return False


def _needed_bytes(kind: str, count: int) -> int:
    from onnx import TensorProto, helper

    if kind in _NIBBLES:
        return -(-count * _NIBBLES[kind] // 8)
    return count * int(helper.tensor_dtype_to_np_dtype(TensorProto.DataType.Value(kind)).itemsize)


def _stored_and_needed(tensor: TensorProto, kind: str, count: int) -> tuple[tuple[int, str], tuple[int, str]]:
    if tensor.HasField("raw_data") and (tensor.raw_data or not _typed(tensor)):
        return (len(tensor.raw_data), "bytes"), (_needed_bytes(kind, count) if kind != "STRING" else -1, "bytes")
    needed = count
    if kind in _NIBBLES:
        needed = _needed_bytes(kind, count)
    elif kind.startswith("COMPLEX"):
        needed = 2 * count
    return (_typed(tensor), "values"), (needed, "values")


def _typed(tensor: TensorProto) -> int:
    """Number of values in the one field that is filled; the checker has seen to it that it is one."""
    fields = (tensor.float_data, tensor.int32_data, tensor.string_data, tensor.int64_data, tensor.double_data)
    return sum(map(len, fields)) + len(tensor.uint64_data)


def _check_place(name: str, needed: int, place: Mapping[str, str], file: Path) -> None:
    """Refuses values outside the folder, and a place that is not in its file."""
    location = place.get("location", "")
    folder = file.resolve().parent
    if not location or Path(location).is_absolute() or ".." in Path(location).parts:
        raise DataError(f"{name!r} has its values in {location!r}, outside the file's folder")
    data = folder / location
    if not data.resolve().is_relative_to(folder):
        raise DataError(f"{name!r} has its values in {location!r}, a link that leads outside the file's folder")
    if not data.is_file():
        raise DataError(f"{name!r} has its values in {location!r}, which is no file beside it")
    numbers = {}
    for key in ("offset", "length"):
        text = place.get(key)
        if text is not None and not (text.isascii() and text.isdecimal() and len(text) < 20):
            raise DataError(
                f"{name!r} has its values in {location!r} at {key} {text[:30]!r}, which is no number of bytes"
            )
        numbers[key] = None if text is None else int(text)
    size, offset = data.stat().st_size, numbers["offset"] or 0
    length = numbers["length"]
    if length is not None and length != needed:
        raise DataError(f"{name!r} needs {needed} bytes, and {length} of {location!r} are said to be its own")
    if offset + needed > size:
        raise DataError(f"{name!r} needs {needed} bytes at {offset} of {location!r}, which has {size}")
