"""The large weights of a model or an ONNX file: their values, how many are zero or differ, and who reads them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsify.analysis.onnx_weights import StoredWeights
from sparsify.errors import ArgumentError
from sparsify.model.signature import check_module
from sparsify.model.targets import named_modules, named_parameters
from sparsify.model.wrappers import unwrapped
from sparsify.oneshot.file_weights import FileWeights
from sparsify.oneshot.module_weights import noted_form
from sparsify.oneshot.weight_forms import form_bits
from sparsify.onnx.runtime import read_model
from sparsify.output.tables import Column, Table
from sparsify.quantization.attention import QuantizedProjection
from sparsify.quantization.conversion import original_type, weight_bits
from sparsify.quantization.layers import QuantizedEmbedding, QuantizedLayer
from sparsify.quantization.recurrent import QuantizedRecurrent, weight_names

if TYPE_CHECKING:
    from onnx import NodeProto
    from torch import Tensor, nn

    from sparsify.analysis.onnx_weights import StoredWeights
    from sparsify.oneshot.module_weights import CandidateWeight
    from sparsify.oneshot.weight_forms import IntegerWeight
    from sparsify.palettization.palette import Palette

__all__ = ["ChildOp", "WeightMetadata", "get_weights_metadata", "weights_table"]


@dataclass(frozen=True)
class ChildOp:
    """An operation that reads a weight.

    Attributes:
        op_type: a module's class ("Conv2d"); in a file, the operator ("Conv").
        name: the module's path; in a file, the node's name.
        params_name_mapping: {what the weight is called there ("weight"; in a file, "W"): the weight's name}.
    """

    op_type: str
    name: str
    params_name_mapping: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class WeightMetadata:
    """One stored weight. Compared by identity: it holds a tensor.

    Attributes:
        val: a numpy array: of a parameter on the CPU its own memory (bfloat16: a copy in float32); of a file as it is
            stored, or of a weight that `linear_quantize_weights` or `palettize_weights` compressed its values.
        sparsity: the fraction of values that are 0, counted one by one, 0 to 1. A quantized value is 0 where it is
            equal to its zero point.
        unique_values: how many values differ.
        child_ops: who reads it, in the order of the model.
        bits: of a value; of layers that were quantized here, what their quantizers have; of a palette, of an index.
        zero_rows: the fraction of rows (slices along the first axis) of which every value is 0; a row that only sums
            to 0 is none.
    """

    val: Any
    sparsity: float
    unique_values: int
    child_ops: tuple[ChildOp, ...]
    bits: int
    zero_rows: float

    @property
    def size_bytes(self) -> int:
        """Size of its values at `bits` each, packed."""
        return -(-int(np.prod(self.val.shape, dtype=np.int64)) * self.bits // 8)


def get_weights_metadata(
    model: nn.Module | str | os.PathLike[str], weight_threshold: int = 2048
) -> dict[str, WeightMetadata]:
    """Every weight with strictly more than `weight_threshold` elements, by its name in torch.

    A weight that several layers share stands there once, with all of them as its children. Nothing is changed or
    copied.

    Args:
        model: a module, or the path of an ONNX file; of files that `export_onnx` wrote the names are torch's, too.
        weight_threshold: number of elements; weights with as many or fewer are left out.

    Raises:
        ArgumentError: a threshold that is no count, a model that is none.
        DataError: a file that is no ONNX model.
    """
    if isinstance(weight_threshold, bool) or not isinstance(weight_threshold, int) or weight_threshold < 0:
        raise ArgumentError(f"weight_threshold={weight_threshold!r}: give a number of elements, 0 or more.")
    if isinstance(model, (str, os.PathLike)):
        return _of_file(model, weight_threshold)
    return _of_module(check_module(model, other=", or the path of an ONNX file"), weight_threshold)


def weights_table(weights: Mapping[str, WeightMetadata]) -> Table:
    """One line for each of `weights`: shape, zeros, distinct values, bits and bytes."""
    rows = [
        {
            "name": name,
            "shape": "x".join(map(str, one.val.shape)),
            "sparsity": one.sparsity,
            "zero_rows": one.zero_rows,
            "unique_values": one.unique_values,
            "bits": one.bits,
            "size_bytes": one.size_bytes,
            "children": len(one.child_ops),
        }
        for name, one in weights.items()
    ]
    columns = [
        Column("name", "Weight"),
        Column("shape", "Shape"),
        Column("sparsity", "Zeros", ".1%"),
        Column("zero_rows", "Zero rows", ".1%"),
        Column("unique_values", "Distinct", ","),
        Column("bits", "Bits"),
        Column("size_bytes", "Bytes", ","),
        Column("children", "Readers"),
    ]
    total = sum(one.size_bytes for one in weights.values())
    return Table.of(f"{len(rows)} weights, {total:,} bytes", rows, columns)


def _of_module(model: nn.Module, threshold: int) -> dict[str, WeightMetadata]:
    model = unwrapped(model)
    parameters = named_parameters(model)
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    children: dict[str, list[ChildOp]] = {name: [] for name in parameters}
    bits: dict[str, int] = {}
    modules: dict[str, Any] = {"": model, **named_modules(model)}
    for path, module in modules.items():
        if isinstance(module, QuantizedProjection) and weight_bits(module):
            bits[name_of[id(module.parameter)]] = weight_bits(module)
        kind = original_type(module).__name__
        for own, parameter in module._parameters.items():
            if parameter is None or id(parameter) not in name_of:
                continue
            name = name_of[id(parameter)]
            weight = own in weight_names(module) if isinstance(module, QuantizedRecurrent) else own == "weight"
            layer = isinstance(module, (QuantizedLayer, QuantizedEmbedding, QuantizedRecurrent))
            if layer and weight and weight_bits(module):
                bits[name] = weight_bits(module)
            form = noted_form(module, own)
            if form is not None:
                bits[name] = form_bits(form)
            children[name].append(ChildOp(kind, path, {own: name}))
    return {
        name: WeightMetadata(
            val=_as_array(parameter.detach()),
            child_ops=tuple(children[name]),
            bits=bits.get(name, parameter.dtype.itemsize * 8),
            **_figures(parameter.detach()),
        )
        for name, parameter in parameters.items()
        if parameter.numel() > threshold and not parameter.is_meta
    }


def _as_array(values: Tensor) -> np.ndarray:
    import torch

    return (values.float() if values.dtype == torch.bfloat16 else values).cpu().numpy()


def _figures(values: Tensor) -> dict[str, Any]:
    import torch

    nonzero = values != 0
    rows = nonzero.reshape(values.shape[0], -1).any(1) if values.dim() else nonzero.reshape(1)
    return {
        "sparsity": int((~nonzero).sum()) / values.numel(),
        "unique_values": int(torch.unique(values).numel()),
        "zero_rows": int((~rows).sum()) / rows.numel(),
    }


def _of_file(path: str | os.PathLike[str], threshold: int) -> dict[str, WeightMetadata]:
    from pathlib import Path

    model = read_model(path)
    stored = StoredWeights(model, Path(path).parent)
    children = _readers(stored)
    compressed = FileWeights(model, Path(path).resolve().parent)
    found: dict[str, WeightMetadata] = {}
    for candidate, form in compressed.compressed():
        if candidate.elements > threshold:
            found[candidate.name] = _of_form(candidate, form, compressed.readers(candidate.stored))
    for name, tensor in stored.tensors.items():
        weight = stored.behind(name)
        if weight is None or weight.elements <= threshold or name in compressed.helpers:
            continue
        ops = tuple(
            ChildOp(op.op_type, op.name, {own: weight.parameter for own in op.params_name_mapping})
            for op in children.get(name, ())
        )
        twin = found.get(weight.parameter)
        if twin is not None and sorted(twin.val.shape) == sorted(tensor.dims):
            # A tied weight, of which the file holds a transposed copy.
            found[weight.parameter] = WeightMetadata(
                twin.val, twin.sparsity, twin.unique_values, (*twin.child_ops, *ops), twin.bits, twin.zero_rows
            )
            continue
        nonzero = ~weight.zeros
        rows = nonzero.reshape(nonzero.shape[0], -1).any(1) if nonzero.ndim else nonzero.reshape(1)
        found[weight.parameter if twin is None else name] = WeightMetadata(
            val=weight.values,
            sparsity=weight.sparsity,
            unique_values=int(np.unique(weight.values).size),
            child_ops=ops,
            bits=weight.bits,
            zero_rows=int(np.count_nonzero(~rows)) / rows.size,
        )
    return found


def _of_form(
    candidate: CandidateWeight, form: IntegerWeight | Palette, readers: list[tuple[NodeProto, int]]
) -> WeightMetadata:
    values = form.values()
    nonzero = values != 0
    return WeightMetadata(
        val=values,
        sparsity=float(np.mean(~nonzero)),
        unique_values=int(np.unique(values).size),
        child_ops=tuple(
            ChildOp(node.op_type, node.name, {_formal_name(node, index): candidate.name}) for node, index in readers
        ),
        bits=form_bits(form),
        zero_rows=float(np.mean(~nonzero.reshape(len(values), -1).any(1))),
    )


def _formal_name(node: NodeProto, index: int) -> str:
    from onnx import defs

    try:
        formal = defs.get_schema(node.op_type, domain=node.domain).inputs
        return str(formal[min(index, len(formal) - 1)].name)
    except defs.SchemaError:
        return str(index)


def _readers(stored: StoredWeights) -> dict[str, list[ChildOp]]:
    """{initializer: the nodes that compute with it}, where it is dequantized and moved in between, behind that."""
    from sparsify.onnx.graph import STORAGE

    found: dict[str, list[ChildOp]] = {}
    for node in stored.nodes:
        if node.op_type in STORAGE:
            continue
        for index, value in enumerate(node.input):
            weight = stored.behind(value) if value else None
            if weight is None:
                continue
            own = _formal_name(node, index)
            found.setdefault(weight.name, []).append(ChildOp(node.op_type, node.name, {own: weight.parameter}))
    return found
