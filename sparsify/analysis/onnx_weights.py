"""The weights in an ONNX file: where they are stored, their names in torch, their bits, and how many are zero."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsify.errors import DataError, first_line
from sparsify.onnx.runtime import FILE_ELEMENTS, FILE_WEIGHTS

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

__all__: list[str] = []

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
_ZERO_POINTS = {"DequantizeLinear": (0, 2), "QLinearConv": (3, 5), "ConvInteger": (1, 3)}
_ZERO_POINTS |= {"QLinearMatMul": (3, 5), "MatMulInteger": (1, 3)}
"""Operator -> which of its inputs is the weight, and which its zero point."""
_SUFFIXES = ("_gates_int8", "_gates_uint8", "_int8", "_quantized", "_uint8")


@dataclass(frozen=True)
class Stored:
    """One stored weight.

    Attributes:
        name: of the initializer. parameter: what it is in torch; the same where the file does not say.
        elements: how many numbers it is in torch; fewer than are stored where zeros stand in between.
        values: as stored. zero: the integer that means 0, broadcastable to `values`.
    """

    name: str
    parameter: str
    shape: tuple[int, ...]
    elements: int
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
    def zeros(self) -> np.ndarray:
        """Mask of the values that stand for 0."""
        found: np.ndarray = self.values == 0 if self.zero is None else self.values.astype(np.int64) == self.zero
        return found

    @cached_property
    def sparsity(self) -> float:
        """The fraction of its numbers that mean 0, counted one by one."""
        others = int(np.count_nonzero(~self.zeros))
        return (self.elements - others) / self.elements if self.elements else 0.0


class StoredWeights:
    """All weights of a file, found by the values that nodes read; those in branches and loops too.

    Args:
        model: as it was read; values of branches get other names where two branches use the same.
        folder: where external data lies.
    """

    def __init__(self, model: ModelProto, folder: Path) -> None:
        from sparsify.onnx.graph import GraphView, with_inner_graphs

        self._folder = folder
        self._view = GraphView(with_inner_graphs(model))
        self.nodes = list(self._view.nodes)
        self.tensors = self._view.constants()
        self._parameters: dict[str, str] = _noted(model, FILE_WEIGHTS, str)
        self._elements: dict[str, int] = _noted(model, FILE_ELEMENTS, int)
        self._found: dict[str, Stored] = {}

    def behind(self, value: str) -> Stored | None:
        """The weight that a value comes from, dequantized and transposed on the way; None for an activation."""
        from onnx import TensorProto

        from sparsify.onnx.graph import STORAGE

        made = self._view.scaled_integers(value)
        value = made[0] if made is not None else self._view.origin(value, lambda node: node.op_type in STORAGE)
        if value not in self.tensors:
            return None
        if value not in self._found:
            tensor = self.tensors[value]
            kind = TensorProto.DataType.Name(tensor.data_type)
            small = next((size for start, size in (("FLOAT8", 8), ("FLOAT4", 4)) if kind.startswith(start)), None)
            self._found[value] = Stored(
                value,
                self._parameter(value),
                tuple(tensor.dims),
                self.elements(value),
                small or _BITS.get(kind, 32),
                tensor,
                self._folder,
                self._zero_point(value),
            )
        return self._found[value]

    def is_input_first(self, node: NodeProto, weight: Stored) -> bool:
        """True if a product with a stored matrix has its inputs along the first axis, as it is stored."""
        at = next(i for i, name in enumerate(node.input) if self.behind(name) is weight)
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        turned = bool(attributes.get(("transA", "transB")[at] if at < 2 else "", 0)) != (at == 0)
        value = node.input[at]
        while value != weight.name:
            made = self._view.producer[value]
            turned ^= made.op_type == "Transpose"
            value = made.input[0]
        return not turned

    def elements(self, name: str) -> int:
        """Number of the model's values that a stored tensor holds."""
        return int(self._elements.get(name, math.prod(self.tensors[name].dims)))

    def _parameter(self, name: str) -> str:
        if name in self._parameters:
            return self._parameters[name]
        for suffix in _SUFFIXES:
            name = name.removesuffix(suffix)
        return name

    def _zero_point(self, name: str) -> np.ndarray | None:
        """The integer that means 0, shaped so that it is compared with the values; None where that is 0."""
        from onnx import numpy_helper

        shape = tuple(self.tensors[name].dims)
        readers = self._view.consumers(name)
        # Rows of an embedding are dequantized after they were looked up.
        looked_up = [reader for node in readers if node.op_type == "Gather" for reader in self._reading(node)]
        for node in [*readers, *looked_up]:
            index, position = _ZERO_POINTS.get(node.op_type, (0, 0))
            if node.op_type == "Cast":
                centered = [each for each in self._reading(node) if each.op_type == "Sub" and node in readers]
                if centered and centered[0].input[1] in self.tensors:
                    return numpy_helper.to_array(self.tensors[centered[0].input[1]]).astype(np.int64)
            if not position or position >= len(node.input) or node.input[position] not in self.tensors:
                continue
            if node in readers and node.input[index] != name:
                continue
            point = numpy_helper.to_array(self.tensors[node.input[position]]).astype(np.int64)
            if not point.any():
                continue
            if point.size == 1:
                return point.reshape(())
            if node not in readers:
                continue
            options = {attribute.name: attribute.i for attribute in node.attribute}
            axis = options.get("axis", 1 if node.op_type == "DequantizeLinear" else 0) % len(shape)
            if options.get("block_size"):
                return np.repeat(point, options["block_size"], axis)[tuple(slice(size) for size in shape)]
            if node.op_type in ("MatMulInteger", "QLinearMatMul"):
                axis = len(shape) - 1
            return point.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        return None

    def _reading(self, node: NodeProto) -> list[NodeProto]:
        return self._view.consumers(node.output[0])

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
            return stored.elements if stored is not None else 0
        readers = self._view.consumers(node.output[0])
        if node.op_type == "MatMul" and len(readers) == 1 and readers[0].op_type == "Add":
            for name in readers[0].input:
                stored = self.behind(name)
                if stored is not None and len(stored.shape) == 1:
                    return stored.shape[0]
        return 0

    def parameters(self) -> int:
        """Elements of all stored numbers but scales, zero points, shapes and positions."""
        from onnx import TensorProto

        from sparsify.onnx.graph import RECURRENT_OPERATORS

        aside = {
            name
            for node in self.nodes
            if node.op_type in ("DequantizeLinear", "QuantizeLinear")
            for name in node.input[1:]
        }
        recurrent = [node for node in self.nodes if node.op_type in RECURRENT_OPERATORS]
        made = [self._view.scaled_integers(name) for node in recurrent for name in node.input[1:3]]
        aside |= {name for each in made if each is not None for name in each[1]}
        skipped = (TensorProto.INT64, TensorProto.BOOL, TensorProto.STRING)
        return sum(
            self.elements(name)
            for name, tensor in self.tensors.items()
            if name not in aside and tensor.data_type not in skipped and tensor.dims
        )


def _noted(model: ModelProto, key: str, kind: type[str] | type[int]) -> dict[str, Any]:
    """The notes of `export_onnx` about initializers; empty for a file of another exporter.

    Raises:
        DataError: they are not as `export_onnx` writes them.
    """
    text = next((entry.value for entry in model.metadata_props if entry.key == key), "{}")
    try:
        noted = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _foreign_note(key, first_line(error)) from error
    if not isinstance(noted, dict):
        raise _foreign_note(key, f"it is a {type(noted).__name__}")
    for name, value in noted.items():
        if type(value) is not kind or value == "" or (isinstance(value, int) and not 0 <= value < 2**40):
            raise _foreign_note(key, f"{name[:60]!r} is {str(value)[:60]!r}")
    return noted


def _foreign_note(key: str, why: str) -> DataError:
    return DataError(
        f"the file's note {key!r} was edited: {why}. Remove it from its metadata, or export the model again."
    )
