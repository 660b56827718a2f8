"""Summary of an exported file: its inputs and outputs, its sizes, which layers have integer weights, and why not."""

from __future__ import annotations

import gzip
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from sparsify.output.tables import DisplayedText

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto

__all__: list[str] = []


@dataclass(frozen=True)
class ExportedModel(DisplayedText, os.PathLike[str]):
    """A written file and what is in it. Usable wherever a path is: `onnxruntime.InferenceSession(exported)`."""

    path: Path
    opset: int
    inputs: Mapping[str, tuple[int | str, ...]]
    """Shapes by name; "batch" is the dynamic axis."""
    outputs: Mapping[str, tuple[int | str, ...]]
    size_bytes: int
    quantized: tuple[str, ...]
    """Names of the nodes whose weights are stored as integers."""
    floating: tuple[str, ...]
    """Names of the nodes (convolutions, matrix products, embeddings, recurrent ones) whose weights stayed in float."""
    initializers: Mapping[str, int] = field(default_factory=dict)
    """Bytes of stored values by their type."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Why in float, by name of the node, where the model was quantized and it is known."""
    plain_bytes: int | None = None
    """The size before packing, of a packed file; None for a plain one."""

    @cached_property
    def gzip_bytes(self) -> int:
        """Size of the file under gzip (level 6), where zeros cost next to nothing; reads the file on first use."""
        counter = _ByteCounter()
        with (
            self.path.open("rb") as file,
            gzip.GzipFile(fileobj=counter, mode="wb", compresslevel=6, mtime=0) as packed,
        ):
            while block := file.read(1 << 20):
                packed.write(block)
        return counter.count

    @property
    def unaccelerated(self) -> tuple[str, ...]:
        """Nodes of `quantized` for which onnxruntime has no integer kernel on the CPU: transposed convolutions."""
        return tuple(name for name in self.quantized if re.search(r"ConvTranspose(_\d+)?$", name))

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {bytes_text(size)}" for kind, size in sorted(self.initializers.items()))
        integer, floating = len(self.quantized), len(self.floating)
        size = bytes_text(self.size_bytes)
        if self.plain_bytes is not None:
            size += f" (packed from {bytes_text(self.plain_bytes)})"
        lines = [
            f"{self.path}: opset {self.opset}, {size}, gzipped {bytes_text(self.gzip_bytes)}",
            f"  inputs: {_signature_text(self.inputs)}; outputs: {_signature_text(self.outputs)}",
            f"  layers with integer weights: {integer}, in float: {floating}; stored values: {kinds}",
        ]
        if self.unaccelerated:
            lines.append(f"  integer weights, computed in float by onnxruntime: {', '.join(self.unaccelerated)}")
        if not {"int4", "uint4"}.isdisjoint(self.initializers):
            lines.append(
                "  Linear layers with weights of four bits: onnxruntime rounds what they read to int8, unless the "
                "session's session.qdq_matmulnbits_accuracy_level is 1, as verify_onnx sets it"
            )
        if self.quantized and self.floating:
            for why in dict.fromkeys(self.reasons.get(name, "") for name in self.floating):
                names = ", ".join(name for name in self.floating if self.reasons.get(name, "") == why)
                lines.append(f"  in float: {names}{': ' if why else ''}{why}")
        return "\n".join(lines)


def _reason_in_float(node: str, left: Mapping[str, str]) -> str | None:
    """Why the layer that a node stems from ("layer.path/Gemm") is in float: itself, what is above it, or its operation.

    >>> _reason_in_float("head.out/Gemm", {"head": "why"}), _reason_in_float("MatMul", {"the model: matmul": "why"})
    ('why', 'why')
    """
    path = node.rpartition("/")[0].partition("/")[0] or "the model"
    found = [what for what in left if f"{path}.".startswith(f"{what}.") or what.startswith(f"{path}: ")]
    return left[max(found, key=len)] if found else None


def exported_model(
    path: Path, proto: ModelProto, opset: int, size: int, left: Mapping[str, str], plain_bytes: int | None = None
) -> ExportedModel:
    """Summary of a model that was written to `path`, `size` bytes long, packed where `plain_bytes` is given.

    `left`: reasons by what stayed in float.
    """
    from onnx import TensorProto, numpy_helper

    from sparsify.onnx.graph import RECURRENT_OPERATORS, STORAGE, GraphView

    graph = proto.graph
    view = GraphView(graph)
    stored = view.initializers
    quantized: list[str] = []
    floating: list[str] = []
    for node in graph.node:
        if node.op_type in RECURRENT_OPERATORS:
            (quantized if view.scaled_integers(node.input[1]) else floating).append(node.name)
        position = {"Gather": 0, "Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1}.get(node.op_type)
        if position is None:
            continue
        name = view.origin(node.input[position], lambda each: each.op_type in STORAGE)
        # Vectors (positions, shapes, the scale of each row of an embedding) are no layer's weights.
        if name not in stored or (node.op_type == "Gather" and sum(dim != 1 for dim in stored[name].dims) < 2):
            continue
        kind = stored[name].data_type
        if kind in (TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4):
            quantized.append(node.name)
        elif kind in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE):
            floating.append(node.name)
    sizes: Counter[str] = Counter()
    for tensor in graph.initializer:
        kind_name = TensorProto.DataType.Name(tensor.data_type).lower()
        sizes[kind_name] += len(tensor.raw_data) or numpy_helper.to_array(tensor).nbytes
    return ExportedModel(
        path=path,
        opset=opset,
        inputs={value.name: _axis_sizes(value) for value in graph.input},
        outputs={value.name: _axis_sizes(value) for value in graph.output},
        size_bytes=size,
        quantized=tuple(quantized),
        floating=tuple(floating),
        initializers=dict(sizes),
        reasons={name: why for name in floating if (why := _reason_in_float(name, left)) is not None},
        plain_bytes=plain_bytes,
    )


def _axis_sizes(value: ValueInfoProto) -> tuple[int | str, ...]:
    return tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)


def _signature_text(values: Mapping[str, tuple[int | str, ...]]) -> str:
    return ", ".join(f"{name} ({', '.join(str(dim) for dim in shape)})" for name, shape in values.items())


def bytes_text(count: int) -> str:
    """Bytes for people.

    >>> bytes_text(999), bytes_text(1536), bytes_text(5 * 2**20)
    ('999 B', '1.5 KiB', '5.0 MiB')
    """
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


class _ByteCounter:
    """A file that only counts what is written to it."""

    def __init__(self) -> None:
        self.count = 0

    def write(self, data: bytes) -> int:
        self.count += len(data)
        return len(data)

    def flush(self) -> None:
        pass
