"""The weights of an ONNX file for compression without training: found, and written as integers or palettes.

A compressed weight is computed by standard operators from what is stored: Cast, Sub and Mul of integers, or Gather from
palettes. onnxruntime computes it once, when it makes a session, and has the graph of the file with float weights, the
same outputs to the bit and the same speed. (DequantizeLinear it computes in every run, seen in onnxruntime 1.31.1.)
The note `FILE_FORMS` in the file's metadata says which initializers are whose.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsify.errors import DataError, first_line
from sparsify.oneshot.module_weights import CandidateWeight, check_finite
from sparsify.oneshot.weight_forms import IntegerWeight, LaidOutWeight, WeightForm
from sparsify.onnx.rebuilt_weights import graphs_of, loaded
from sparsify.onnx.runtime import FILE_WEIGHTS
from sparsify.palettization.palette import Palette

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

__all__: list[str] = []

FILE_FORMS = "sparsify.compressed"
"""The key in a file's metadata under which stand, in JSON, {weight: its form and the names of what is stored}."""
_SUFFIX = "_as_"
_FLOAT_TYPES = {1: "float32", 10: "float16", 11: "float64"}


class FileWeights:
    """The weights of an ONNX model; `put` changes the model."""

    def __init__(self, model: ModelProto, folder: Path) -> None:
        self.model = model
        self._folder = folder
        self._noted = _read_note(model, FILE_FORMS)
        names = _read_note(model, FILE_WEIGHTS)
        self._parameters = {name: each for name, each in names.items() if isinstance(each, str)}
        self._graph: dict[str, GraphProto] = {}
        self._forms: dict[str, WeightForm] = {}
        self._readers: dict[str, list[tuple[NodeProto, int]]] = {}
        for graph in graphs_of(model.graph):
            for node in graph.node:
                for index, name in enumerate(node.input):
                    self._readers.setdefault(name, []).append((node, index))

    def candidates(self) -> Iterator[CandidateWeight]:
        """Every stored float tensor of two dimensions or more that a node reads, and every compressed one."""
        for graph in graphs_of(self.model.graph):
            fixed = {value.name for value in (*graph.input, *graph.output)}
            made = {output for node in graph.node for output in node.output}
            for name, note in self._noted.items():
                if name in made:
                    form = self._noted_form(graph, name, note)
                    self._graph[name], self._forms[name] = graph, form
                    shape = form.values().shape
                    dtype = str(note.get("dtype_stored", "float32"))
                    yield self._candidate(name, shape, dtype, None)
            helpers = self.helpers
            for tensor in [*graph.initializer, *_tensors_of_nodes(graph)]:
                if tensor.name in helpers or len(tensor.dims) < 2 or not self._readers.get(tensor.name):
                    continue
                kind = _FLOAT_TYPES.get(tensor.data_type)
                readers = {node.op_type for node, _ in self._readers[tensor.name]}
                if kind is None:
                    if "DequantizeLinear" in readers:
                        yield self._candidate(tensor.name, tuple(tensor.dims), "integers", "it is stored in integers")
                    continue
                reason = "it is an input or an output of the graph" if tensor.name in fixed else None
                if kind == "float64":
                    reason = reason or "it is in double precision"
                if not reason and tensor.name in self._graph:
                    reason = "another branch has a weight of this name"
                self._graph.setdefault(tensor.name, graph)
                yield self._candidate(tensor.name, tuple(tensor.dims), kind, reason)

    @property
    def helpers(self) -> set[str]:
        """Initializers that are parts of compressed weights."""
        return {each for note in self._noted.values() for each in note["stored"]}

    def compressed(self) -> Iterator[tuple[CandidateWeight, IntegerWeight | Palette]]:
        """The compressed weights with their forms."""
        for weight in self.candidates():
            form = self._forms.get(weight.stored)
            if form is not None:
                yield weight, form

    def readers(self, name: str) -> list[tuple[NodeProto, int]]:
        """(node, index of its input) of what reads a weight, behind Transpose and the like."""
        return [(node, index) for node, index, _ in self._behind(name)]

    def laid_out(self, weight: CandidateWeight) -> LaidOutWeight:
        """The values of a weight with its channels, and the form that they have.

        Raises:
            DataError: NaN or infinite values, or such that cannot be read.
        """
        form = self._forms.get(weight.stored)
        values = form.values() if form is not None else self._values(weight.stored)
        check_finite(weight.name, values)
        axis, inputs = self._axes(weight.stored, values.ndim)
        return LaidOutWeight(values, axis, inputs, form)

    def put(self, weight: CandidateWeight, new: LaidOutWeight) -> None:
        """Puts a weight into the model in its new form."""
        import onnx
        from onnx import numpy_helper

        name, graph = weight.stored, self._graph[weight.stored]
        note = self._noted.pop(name, None)
        gone = {name, *(note["made"] if note else ())}
        before = next((i for i, node in enumerate(graph.node) if set(node.output) & gone), None)
        own = next((node.name for node in graph.node if name in node.output and node.op_type == "Constant"), "")
        kept = []
        for node in graph.node:
            if not set(node.output) & gone:
                kept.append(onnx.NodeProto())
                kept[-1].CopyFrom(node)
        used = {each for node in kept for each in node.input}
        stale = {name, *(each for each in (note["stored"] if note else ()) if each not in used)}
        at = next((i for i, tensor in enumerate(graph.initializer) if tensor.name == name), len(graph.initializer))
        tensors = []
        for tensor in graph.initializer:
            if tensor.name not in stale:
                tensors.append(onnx.TensorProto())
                tensors[-1].CopyFrom(tensor)
        dtype = np.dtype(weight.dtype)
        nodes: list[NodeProto] = []
        if new.form is None:
            tensors.insert(min(at, len(tensors)), numpy_helper.from_array(new.values.astype(dtype), name))
        else:
            chain = _Chain(name, {*self._readers, *(each.name for each in tensors), *self._made()})
            chain.write(new.form, tuple(new.values.shape), dtype)
            if own:
                chain.nodes[-1].name = own
            nodes = chain.nodes
            tensors += chain.tensors
            self._noted[name] = {
                **_form_note(new.form),
                "dtype_stored": weight.dtype,
                "made": [output for node in nodes[:-1] for output in node.output],
                "stored": [tensor.name for tensor in chain.tensors],
                "parts": chain.parts,
            }
        place = 0 if before is None else before
        del graph.node[:], graph.initializer[:]
        graph.node.extend([*kept[:place], *nodes, *kept[place:]])
        graph.initializer.extend(tensors)
        self._forms[name] = new.form
        self._readers = {}
        for each in graphs_of(self.model.graph):
            for node in each.node:
                for index, read in enumerate(node.input):
                    self._readers.setdefault(read, []).append((node, index))

    def decompress(self) -> None:
        """Puts all weights into the model as floats."""
        for weight in list(self.candidates()):
            if self._forms.get(weight.stored) is not None:
                before = self.laid_out(weight)
                self.put(weight, LaidOutWeight(before.values, before.axis, before.inputs))
        self.write_note()

    def write_note(self) -> None:
        """Puts the note of all forms into the model's metadata."""
        for i in reversed(range(len(self.model.metadata_props))):
            if self.model.metadata_props[i].key == FILE_FORMS:
                del self.model.metadata_props[i]
        if self._noted:
            text = json.dumps(self._noted, separators=(",", ":"))
            self.model.metadata_props.add(key=FILE_FORMS, value=text)

    def _made(self) -> set[str]:
        return {output for graph in graphs_of(self.model.graph) for node in graph.node for output in node.output}

    def _candidate(self, name: str, shape: tuple[int, ...], dtype: str, reason: str | None) -> CandidateWeight:
        readers = self._behind(name)
        parameter = self._parameters.get(name, name)
        layer = parameter.rpartition(".")[0]
        names = [parameter, name, *([layer] if layer else []), *(node.name for node, _, _ in readers if node.name)]
        size = int(np.prod(shape, dtype=np.int64)) * (1 if dtype == "integers" else np.dtype(dtype).itemsize)
        kinds = [node.op_type for node, _, _ in readers]
        return CandidateWeight(parameter, names, kinds, shape, dtype, size, reason, stored=name)

    def _behind(self, name: str) -> list[tuple[NodeProto, int, list[int] | None]]:
        """(reader, index of its input, order of the dimensions that it sees), behind Transpose and Identity."""
        found: list[tuple[NodeProto, int, list[int] | None]] = []
        stack: list[tuple[str, list[int] | None, int]] = [(name, None, 0)]
        while stack:
            value, order, depth = stack.pop()
            for node, index in self._readers.get(value, ()):
                if node.op_type in ("Identity", "Cast", "Transpose") and depth < 8 and node.output:
                    perm = order
                    if node.op_type == "Transpose":
                        given = next((list(entry.ints) for entry in node.attribute if entry.name == "perm"), None)
                        perm = [order[i] for i in given] if given and order else given
                    stack.append((node.output[0], perm, depth + 1))
                else:
                    found.append((node, index, order))
        return found

    def _axes(self, name: str, rank: int) -> tuple[int, int | None]:
        """(dimension of the output channels, dimension of the inputs) as its first reader has them."""
        for node, index, order in self._behind(name):
            options = {entry.name: entry.i for entry in node.attribute}
            if node.op_type == "Conv" or (node.op_type == "Gemm" and index == 1 and options.get("transB")):
                axes = (0, 1)
            elif node.op_type in ("ConvTranspose", "Gemm"):
                axes = (1, 0)
            elif node.op_type in ("LSTM", "GRU", "RNN"):
                axes = (1, 2) if rank > 2 else (0, 1)
            elif node.op_type == "MatMul" or node.domain not in ("", "ai.onnx"):
                axes = (rank - 1, rank - 2) if index else (rank - 2, rank - 1)
            else:
                axes = (0, 1)
            if order and len(order) == rank:
                axes = (order[axes[0]], order[axes[1]])
            return axes
        return 0, 1

    def _values(self, name: str) -> np.ndarray:
        from onnx import numpy_helper

        graph = self._graph[name]
        tensor = next(each for each in [*graph.initializer, *_tensors_of_nodes(graph)] if each.name == name)
        try:
            return np.asarray(numpy_helper.to_array(loaded(tensor, self._folder)), np.float32)
        except (ValueError, TypeError) as error:
            raise DataError(f"the values of {name!r} cannot be read: {first_line(error)}.") from error

    def _noted_form(self, graph: GraphProto, name: str, note: dict[str, Any]) -> IntegerWeight | Palette:
        from onnx import numpy_helper

        stored = {tensor.name: tensor for tensor in graph.initializer}
        try:
            parts = {
                part: numpy_helper.to_array(loaded(stored[each], self._folder)) for part, each in note["parts"].items()
            }
            if note["form"] == "integers":
                axis = int(note["inputs"])
                zero = parts.get("zero", np.zeros(parts["scale"].shape, np.int32))
                return IntegerWeight(
                    parts["q"], parts["scale"], zero.astype(np.int32), str(note["dtype"]), axis, int(note["block"])
                )
            flat = parts["table"]
            groups, size = int(note["palettes"]), int(note["cluster_dim"])
            scale, channels = parts.get("table_scale"), parts.get("channel_scale")
            return Palette(
                parts["codes"],
                flat.reshape(groups, -1, size),
                int(note["axis"]),
                int(note["nbits"]),
                None if scale is None else scale.reshape(-1),
                None if channels is None else channels.reshape(-1),
            )
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise DataError(
                f"the file's note of how {name!r} is compressed is damaged ({first_line(error)}): compress the float "
                "file again."
            ) from error


class _Chain:
    """Nodes that compute a weight from what is stored."""

    def __init__(self, name: str, taken: set[str]) -> None:
        self.nodes: list[NodeProto] = []
        self.tensors: list[TensorProto] = []
        self.parts: dict[str, str] = {}
        self._name, self._taken = name, taken

    def write(self, form: IntegerWeight | Palette, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """The last node gives the weight."""
        value = self._integers(form) if isinstance(form, IntegerWeight) else self._palette(form, shape)
        if dtype != np.float32:
            # Without its optimizations onnxruntime 1.31.1 drops a Cast to float16 before its own one to float32, and
            # with it the rounding; an Identity between them it keeps.
            self._node("Identity", [self._node("Cast", [value], to=10)])
        self.nodes[-1].output[0] = self._name

    def _integers(self, form: IntegerWeight) -> str:
        value = self._node("Cast", [self._part("q", form.q)], to=1)
        scale, zero = self._part("scale", form.scale), None
        if form.zero.any():
            zero = self._part("zero", form.zero.astype(np.float32))
        if form.block:
            which = np.arange(form.q.shape[form.inputs], dtype=np.int32) // form.block
            index = self._stored("block", which)
            scale = self._node("Gather", [scale, index], axis=form.inputs)
            zero = None if zero is None else self._node("Gather", [zero, index], axis=form.inputs)
        if zero is not None:
            value = self._node("Sub", [value, zero])
        return self._node("Mul", [value, scale])

    def _palette(self, form: Palette, shape: tuple[int, ...]) -> str:
        groups, entries, size = form.table.shape
        table = self._part("table", form.table)
        if form.table_scale is not None:
            table = self._node("Cast", [table], to=1)
            if form.table_zero:
                table = self._node("Sub", [table, self._stored("table_zero", np.array(form.table_zero, np.float32))])
            table = self._node("Mul", [table, self._part("table_scale", form.table_scale.reshape(-1, 1, 1))])
        flat = np.array([-1] if size == 1 else [-1, size], np.int64)
        table = self._node("Reshape", [table, self._stored("rows", flat)])
        codes = self._node("Cast", [self._part("codes", form.codes)], to=6)
        if groups > 1:
            count = form.codes.shape[form.axis]
            first = (np.arange(count) // (count // groups) * entries).astype(np.int32)
            wide = first.reshape([-1 if d == form.axis else 1 for d in range(form.codes.ndim)])
            codes = self._node("Add", [codes, self._stored("first", wide)])
        value = self._node("Gather", [table, codes])
        if size > 1:
            rank = form.codes.ndim
            perm = [*range(form.axis + 1), rank, *range(form.axis + 1, rank)]
            value = self._node("Transpose", [value], perm=perm)
            value = self._node("Reshape", [value, self._stored("shape", np.array(shape, np.int64))])
        if form.channel_scale is not None:
            wide = form.channel_scale.reshape([-1 if d == form.axis else 1 for d in range(len(shape))])
            value = self._node("Mul", [value, self._part("channel_scale", wide)])
        return value

    def _part(self, part: str, values: np.ndarray) -> str:
        self.parts[part] = self._stored(part, values)
        return self.parts[part]

    def _stored(self, what: str, values: np.ndarray) -> str:
        from onnx import numpy_helper

        name = self._fresh(what)
        # ascontiguousarray makes a number an array of one element.
        self.tensors.append(numpy_helper.from_array(np.asarray(values, order="C"), name))
        return name

    def _node(self, operator: str, inputs: list[str], **attributes: Any) -> str:
        from onnx import helper

        output = self._fresh(operator)
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def _fresh(self, what: str) -> str:
        name, count = f"{self._name}{_SUFFIX}{what}", 1
        while name in self._taken:
            count += 1
            name = f"{self._name}{_SUFFIX}{what}_{count}"
        self._taken.add(name)
        return name


def _form_note(form: IntegerWeight | Palette) -> dict[str, Any]:
    if isinstance(form, IntegerWeight):
        return {"form": "integers", "dtype": form.dtype, "inputs": form.inputs, "block": form.block}
    return {
        "form": "palette",
        "axis": form.axis,
        "nbits": form.nbits,
        "palettes": len(form.table),
        "cluster_dim": form.cluster_dim,
    }


def _tensors_of_nodes(graph: GraphProto) -> Iterator[TensorProto]:
    """Tensors in Constant nodes, under the names of what they give."""
    import onnx

    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            copy = onnx.TensorProto()
            copy.CopyFrom(node.attribute[0].t)
            copy.name = node.output[0]
            yield copy


def _read_note(model: ModelProto, key: str) -> dict[str, Any]:
    text = next((entry.value for entry in model.metadata_props if entry.key == key), "{}")
    try:
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError("it is no object")
        if key == FILE_FORMS:
            for note in found.values():
                if not all(isinstance(each, str) for part in ("made", "stored") for each in note[part]):
                    raise ValueError("names are no text")
        return found
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"the file's metadata {key!r} is damaged ({first_line(error)}): export it again.") from error
