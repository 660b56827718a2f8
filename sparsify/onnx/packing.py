"""ONNX files in fewer bytes: zeros and palettes are stored as such, and the outputs stay the same to the bit."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sparsify.errors import ExportError
from sparsify.onnx.exported import bytes_text
from sparsify.onnx.model_files import external_bytes, model_bytes, replacing_model
from sparsify.onnx.packed_proof import prove_packed
from sparsify.onnx.rebuilt_weights import FILE_PACKED, graphs_of, loaded
from sparsify.onnx.runtime import read_model
from sparsify.onnx.storage_forms import CountedValues, StorageForm, storage_form

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

    from sparsify.onnx.rebuilding import Rebuilding

__all__ = ["pack_onnx", "unpack_onnx"]

FEWEST_VALUES = 1024
"""Smaller tensors stay as they are: shapes and the like, which an operator may need as constants."""
LEAST_OPSET = 11
MOST_FOLDED = 2**30
"""Bytes of a result up to which onnxruntime folds a node; a larger tensor would be rebuilt in every run."""
PACKED_TYPES = {"FLOAT", "FLOAT16", "DOUBLE", "BOOL", *(f"{u}INT{n}" for u in ("", "U") for n in (4, 8, 16, 32, 64))}
INDEX_BYTES = 4
"""Of the index that rebuilding makes for each value."""
MULTIPLYING = frozenset({"MatMul", "Gemm", "LSTM", "GRU", "RNN", "Einsum"})
"""Operators that onnxruntime gives float weights in another order where they are stored."""


@dataclass(frozen=True)
class PackedTensor:
    """A tensor that is stored in another form."""

    name: str
    form: str
    plain_bytes: int
    packed_bytes: int


@dataclass(frozen=True)
class PackedFile(os.PathLike[str]):
    """A packed file. Usable wherever a path is: `onnxruntime.InferenceSession(packed)`."""

    path: Path
    plain_bytes: int
    """Size of the plain file, with its external data."""
    size_bytes: int
    tensors: tuple[PackedTensor, ...]
    """Those that are stored in another form; all others are as they were."""
    unproven: str | None
    """Why the outputs of both files were not compared; None where they were. The tensors always are."""
    held_back: int = 0
    """Bytes that `exact_unoptimized=False` would save besides."""

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        share = self.size_bytes / self.plain_bytes if self.plain_bytes else 1.0
        lines = [
            f"{self.path}: {bytes_text(self.size_bytes)}, {share:.1%} of {bytes_text(self.plain_bytes)}; "
            f"{len(self.tensors)} tensor{'s' * (len(self.tensors) != 1)} stored in another form, same values to the bit"
        ]
        for form, number in Counter(tensor.form for tensor in self.tensors).most_common():
            those = [tensor for tensor in self.tensors if tensor.form == form]
            sizes = [sum(getattr(each, kind) for each in those) for kind in ("plain_bytes", "packed_bytes")]
            lines.append(f"  {form}: {number}, {bytes_text(sizes[0])} in {bytes_text(sizes[1])}")
        if self.held_back:
            lines.append(
                f"  {bytes_text(self.held_back)} less with exact_unoptimized=False: float weights of products, which "
                "onnxruntime multiplies in another order where it does not optimize"
            )
        if self.unproven:
            lines.append(f"  outputs were not compared: {self.unproven}")
        return "\n".join(lines)


def pack_onnx(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    inputs: Mapping[str, np.ndarray] | None = None,
    exact_unoptimized: bool = True,
) -> PackedFile:
    """Writes an ONNX file in fewer bytes, whose outputs in onnxruntime are the same to the bit.

    Each tensor is stored in the form that takes the fewest bytes: as it is; as a mask of one bit a value, or the
    distances between values, of what differs from the most frequent value (0 in a pruned weight), with those values;
    with values replaced by indices of 1 to 8 bits into a palette of up to 256; or with both. Standard operators of
    opset 11 rebuild it. onnxruntime runs them once, when it makes a session, and then has the graph that the plain file
    gives: runs take the same time, making the session takes longer. With its optimizations off it rebuilds in every
    run.

    Before the file is put in place, every tensor is rebuilt and compared to the bit, and both files are run with
    optimizations on and off: outputs have to be equal to the bit, and the operators of the optimized graphs the same.

    Without its optimizations onnxruntime multiplies by float weights that are rebuilt in another order than by stored
    ones, which it packs for the CPU; the last bits differ. Float weights that a MatMul, Gemm, LSTM, GRU or RNN reads
    itself, not dequantized from integers, are therefore only stored as sparse initializers, in 12 bytes for each that
    is not zero. `exact_unoptimized=False` stores them like all others.

    Initializers that are inputs or outputs of the graph stay as they are, as do tensors of fewer than 1024 values or
    of more than 1 GiB. Files over 2 GB are read with their external data, and written so where they need it.

    Args:
        path: an ONNX file of opset 11 or more, also one that sparsify did not write, or a packed one.
        out: replaced at once when everything went well; on an error what was there stays. May be `path`.
        inputs: {input: array} for the comparison; None: random ones.
        exact_unoptimized: False allows for that difference: the files without optimizations are compared with
            session.disable_prepacking = 1, with which it is none.

    Raises:
        DataFileError: `path` is missing or unreadable, or `out` cannot be written.
        DataError: it is not an ONNX model, or a broken one.
        ExportError: onnxruntime cannot run it, its opset is lower, or the packed file would not be the same.
        ArgumentError: wrong `inputs`.
    """
    plain = read_model(path)
    folder = Path(path).resolve().parent
    plain_bytes = model_bytes(plain)
    packed, tensors, held_back = packed_model(plain, folder, exact_unoptimized=exact_unoptimized)
    with replacing_model(packed, folder, out) as (temporary, size):
        unproven = prove_packed(
            plain, Path(path), packed, temporary, {tensor.name for tensor in tensors}, inputs, exact_unoptimized
        )
    return PackedFile(Path(out), plain_bytes, size, tuple(tensors), unproven, held_back)


def unpack_onnx(path: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Writes the plain file that `pack_onnx` made a packed one of, and returns its path.

    Args:
        path: a packed file; a plain one is copied.
        out: replaced at once when everything went well. May be `path`.

    Raises:
        DataFileError: `path` is missing or unreadable, or `out` cannot be written.
        DataError: it is not an ONNX model, a broken one, or was edited so that its weights cannot be rebuilt.
    """
    model = read_model(path)
    with replacing_model(model, Path(path).resolve().parent, out):
        pass
    return Path(out)


def packed_model(
    plain: ModelProto, folder: Path, *, exact_unoptimized: bool
) -> tuple[ModelProto, list[PackedTensor], int]:
    """(packed copy of a model, what is stored in another form, bytes that `exact_unoptimized` costs).

    Raises:
        DataError: external data cannot be read.
        ExportError: the opset is too low for what would have to be written.
    """
    import onnx

    packed = onnx.ModelProto()
    packed.CopyFrom(plain)
    names = _fresh_names(packed)
    tensors: list[PackedTensor] = []
    noted: dict[str, tuple[str, int]] = {}
    held_back: list[int] = []
    stored = _prepacked(plain) if exact_unoptimized else set()
    for graph in graphs_of(packed.graph):
        for tensor, index in _pack_graph(graph, folder, names, noted, stored, held_back):
            tensors.append(tensor)
            noted[tensor.name] = (tensor.form, index)
    if not tensors:
        return packed, [], sum(held_back)
    opset = max((entry.version for entry in plain.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if opset < LEAST_OPSET:
        raise ExportError(
            f"the file is of opset {opset}; a packed one needs {LEAST_OPSET}. Convert it first: "
            f"onnx.version_converter.convert_version(onnx.load(path), {LEAST_OPSET})."
        )
    packed.metadata_props.add(key=FILE_PACKED, value=json.dumps(noted, separators=(",", ":")))
    return packed, tensors, sum(held_back)


def _prepacked(model: ModelProto) -> set[str]:
    """Values that a product reads itself: onnxruntime packs them for the CPU where they are stored."""
    return {
        name
        for graph in graphs_of(model.graph)
        for node in graph.node
        if node.op_type in MULTIPLYING or node.domain not in ("", "ai.onnx")
        for name in node.input
    }


def _pack_graph(
    graph: GraphProto,
    folder: Path,
    names: Iterator[str],
    noted: Mapping[str, object],
    stored: set[str],
    held_back: list[int],
) -> Iterator[tuple[PackedTensor, int]]:
    """Packs initializers and Constant nodes of one graph in place; yields each with its index, -1 for a node.

    Floats among `stored` are not rebuilt by nodes; what that costs is added to `held_back`.
    """
    from sparsify.onnx.graph import copied
    from sparsify.onnx.rebuilding import Rebuilding

    fixed = {value.name for value in (*graph.input, *graph.output)}
    before, gone = Rebuilding(names), []
    for index, tensor in enumerate(graph.initializer):
        # A name may stand in two branches: then the second keeps its plain form.
        found = None
        if tensor.name not in fixed and tensor.name not in noted:
            found = _smaller(tensor, folder, tensor.name in stored, held_back)
        if found is not None:
            counted, form, values = found
            if form.positions == "sparse":
                yield _made_sparse(graph, tensor, counted, values), index
            else:
                yield _rebuilt_by_nodes(before, tensor.name, tensor, counted, form, values), index
            gone.append(index)
    nodes: list[NodeProto] = []
    for node in graph.node:
        held = node.attribute[0].t if node.op_type == "Constant" and node.attribute else None
        name = node.output[0] if node.output else ""
        found = None
        if held is not None and name not in fixed and name not in noted:
            found = _smaller(held, folder, name in stored, held_back)
        if found is None or held is None or found[1].positions == "sparse":
            nodes.append(copied(node))
            continue
        counted, form, values = found
        place = Rebuilding(names)
        yield _rebuilt_by_nodes(place, name, held, counted, form, values), -1
        place.nodes[-1].name = node.name
        nodes += place.nodes
        before.initializers += place.initializers
    if not gone and not before.initializers:
        return
    for index in reversed(gone):
        del graph.initializer[index]
    graph.initializer.extend(before.initializers)
    del graph.node[:]
    graph.node.extend([*before.nodes, *nodes])


def _smaller(
    tensor: TensorProto, folder: Path, stored: bool, held_back: list[int]
) -> tuple[CountedValues, StorageForm, np.ndarray] | None:
    """(values counted, form, values as an array of whole bytes); None where the tensor stays as it is."""
    from onnx import TensorProto, helper, numpy_helper

    total = math.prod(tensor.dims)
    if total < FEWEST_VALUES or TensorProto.DataType.Name(tensor.data_type) not in PACKED_TYPES:
        return None
    small = tensor.data_type in (TensorProto.INT4, TensorProto.UINT4)
    itemsize = 1 if small else int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    if total * max(itemsize, INDEX_BYTES) > MOST_FOLDED:
        return None
    values = numpy_helper.to_array(loaded(tensor, folder))
    if small:
        values = values.astype(np.int8 if tensor.data_type == TensorProto.INT4 else np.uint8)
    counted = CountedValues(np.ascontiguousarray(values).reshape(-1).view(f"u{itemsize}"))
    form = storage_form(counted, plain_bytes=(total + 1) // 2 if small else None)
    if stored and values.dtype.kind == "f":
        smallest, form = form, storage_form(counted, without_nodes=True)
        held_back.append(form.size - smallest.size)
    return None if form.plain else (counted, form, values)


def _rebuilt_by_nodes(
    rebuilding: Rebuilding,
    name: str,
    tensor: TensorProto,
    counted: CountedValues,
    form: StorageForm,
    values: np.ndarray,
) -> PackedTensor:
    nodes, stored = len(rebuilding.nodes), len(rebuilding.initializers)
    cast = tensor.data_type if tensor.data_type in (tensor.INT4, tensor.UINT4) else None
    rebuilding.tensor(name, counted, values.dtype, list(tensor.dims), form, cast=cast)
    size = sum(int(node.ByteSize()) for node in rebuilding.nodes[nodes:])
    size += sum(int(each.ByteSize()) for each in rebuilding.initializers[stored:])
    before = int(tensor.ByteSize()) + external_bytes(tensor)
    return PackedTensor(name, str(form), before, size)


def _made_sparse(graph: GraphProto, tensor: TensorProto, counted: CountedValues, values: np.ndarray) -> PackedTensor:
    from onnx import helper, numpy_helper

    kept = numpy_helper.from_array(values.reshape(-1)[counted.positions], tensor.name)
    indices = numpy_helper.from_array(counted.positions.astype(np.int64), f"{tensor.name}_indices")
    sparse = helper.make_sparse_tensor(kept, indices, list(tensor.dims))
    graph.sparse_initializer.append(sparse)
    before = int(tensor.ByteSize()) + external_bytes(tensor)
    return PackedTensor(tensor.name, "sparse", before, int(sparse.ByteSize()))


def _fresh_names(model: ModelProto) -> Iterator[str]:
    """Short names that nothing in the model has: each stands in the file twice or more."""
    taken: set[str] = set()
    for graph in graphs_of(model.graph):
        taken.update(value.name for value in (*graph.input, *graph.output, *graph.initializer, *graph.value_info))
        taken.update(name for node in graph.node for name in (*node.input, *node.output))
    return (name for number in count() if (name := f"p{number}") not in taken)
