"""The weights in an ONNX file: where they are stored, their names in torch, their bits, and how many are zero."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sparsify.errors import DataError

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

__all__: list[str] = []

FILE_WEIGHTS = "sparsify.weights"
"""The key in a file's metadata under which stand, in JSON, {initializer: torch parameter} where the two differ."""
_BITS = {
    "INT4": 4,
    "UINT4": 4,
    "INT2": 2,
    "UINT2": 2,
    "INT8": 8,
    "UINT8": 8,
    "FLOAT16": 16,
    "BFLOAT16": 16,
    "DOUBLE": 64,
}
_THROUGH = ("DequantizeLinear", "Transpose", "Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "QuantizeLinear")
"""What leads from an initializer to where it is used as a weight."""
_SUFFIXES = ("_int8", "_quantized", "_uint8")


@dataclass(frozen=True)
class Stored:
    """One stored weight.

    Attributes:
        name: of the initializer. parameter: what it is in torch; the same where the file does not say.
        values: as stored. zero: the integer that means 0, broadcastable to `values`.
    """

    name: str
    parameter: str
    shape: tuple[int, ...]
    bits: int
    tensor: TensorProto
    folder: Path
    zero: np.ndarray | None

    @cached_property
    def values(self) -> np.ndarray:
        from onnx import numpy_helper

        try:
            return numpy_helper.to_array(self.tensor, str(self.folder))
        except OSError as error:
            raise DataError(f"the values of {self.name!r} cannot be read: {error}.") from error

    @cached_property
    def sparsity(self) -> float:
        """The fraction of values that mean 0, counted one by one."""
        if not math.prod(self.shape):
            return 0.0
        values = self.values
        zeros = values == 0 if self.zero is None else values.astype(np.int64) == self.zero
        return int(np.count_nonzero(zeros)) / values.size


class StoredWeights:
    """All weights of a file, found by the values that nodes read."""

    def __init__(self, model: ModelProto, folder: Path) -> None:
        self._folder = folder
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self._producer = {name: node for node in model.graph.node for name in node.output}
        self._readers: dict[str, list[NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        noted = next((entry.value for entry in model.metadata_props if entry.key == FILE_WEIGHTS), "{}")
        try:
            self._parameters: dict[str, str] = dict(json.loads(noted))
        except ValueError:
            self._parameters = {}
        self._found: dict[str, Stored] = {}

    def behind(self, value: str) -> Stored | None:
        """The weight that a value comes from, dequantized and transposed on the way; None for an activation."""
        zero: np.ndarray | None = None
        while value not in self._stored:
            node = self._producer.get(value)
            if node is None or not node.input:
                return None
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                return self._as_stored(node.output[0], node.attribute[0].t, zero)
            if node.op_type not in _THROUGH:
                return None
            if node.op_type == "DequantizeLinear":
                zero = self._zero_point(node)
            value = node.input[0]
        return self._as_stored(value, self._stored[value], zero)

    def _as_stored(self, name: str, tensor: TensorProto, zero: np.ndarray | None) -> Stored:
        from onnx import TensorProto

        if name not in self._found:
            kind = TensorProto.DataType.Name(tensor.data_type)
            bits = next(
                (size for start, size in (("FLOAT8", 8), ("FLOAT4", 4)) if kind.startswith(start)), _BITS.get(kind, 32)
            )
            self._found[name] = Stored(
                name, self._parameter(name), tuple(tensor.dims), bits, tensor, self._folder, zero
            )
        return self._found[name]

    def _parameter(self, name: str) -> str:
        if name in self._parameters:
            return self._parameters[name]
        for suffix in _SUFFIXES:
            name = name.removesuffix(suffix)
        return name

    def _zero_point(self, node: NodeProto) -> np.ndarray | None:
        """Shaped so that it is compared with the values: along the axis, per block, or one for all."""
        from onnx import numpy_helper

        if len(node.input) < 3 or node.input[2] not in self._stored or node.input[0] not in self._stored:
            return None
        point = numpy_helper.to_array(self._stored[node.input[2]]).astype(np.int64)
        if not point.any():
            return None
        shape = tuple(self._stored[node.input[0]].dims)
        options = {attribute.name: attribute.i for attribute in node.attribute}
        axis = options.get("axis", 1) % max(1, len(shape))
        block = options.get("block_size", 0)
        if block:
            return np.repeat(point, block, axis)[tuple(slice(size) for size in shape)]
        if point.size == 1:
            return point.reshape(())
        return point.reshape([-1 if i == axis else 1 for i in range(len(shape))])

    def table(self, node: NodeProto) -> Stored | None:
        """The weight whose rows a Gather looks up by what is computed: no positions, scales, or relative biases."""
        if node.op_type != "Gather" or any(a.name == "axis" and a.i for a in node.attribute):
            return None
        if self.behind(node.input[1]) is not None:
            return None
        stored = self.behind(node.input[0])
        if stored is None or sum(size > 1 for size in stored.shape) < 2 or stored.bits > 32:
            return None
        kind = stored.tensor.data_type
        from onnx import TensorProto

        return None if kind in (TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL) else stored

    def bias(self, node: NodeProto) -> int:
        """The elements of what is added to the product."""
        position = {"Conv": 2, "ConvTranspose": 2, "Gemm": 2, "QLinearConv": 8, "DeformConv": 3}.get(node.op_type)
        if position is not None and position < len(node.input) and node.input[position]:
            stored = self.behind(node.input[position])
            return math.prod(stored.shape) if stored is not None else 0
        readers = self._readers.get(node.output[0], [])
        if node.op_type == "MatMul" and len(readers) == 1 and readers[0].op_type == "Add":
            for name in readers[0].input:
                stored = self.behind(name)
                if stored is not None and len(stored.shape) == 1:
                    return stored.shape[0]
        return 0

    def parameters(self) -> int:
        """Elements of all stored numbers but scales, zero points, shapes and positions."""
        from onnx import TensorProto

        aside = {
            name
            for readers in self._readers.values()
            for node in readers
            if node.op_type in ("DequantizeLinear", "QuantizeLinear")
            for name in node.input[1:]
        }
        skipped = (TensorProto.INT64, TensorProto.BOOL, TensorProto.STRING)
        return sum(
            math.prod(tensor.dims)
            for name, tensor in self._stored.items()
            if name not in aside and tensor.data_type not in skipped and tensor.dims
        )
