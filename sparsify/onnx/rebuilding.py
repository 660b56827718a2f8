"""Standard ONNX operators that rebuild a tensor from a smaller form.

onnxruntime runs them once, when it loads the file. It folds a node whose inputs are constants, if the size of its
result is known before it runs and at most 1 GiB (https://github.com/microsoft/onnxruntime/pull/28055, seen in 1.31.1):
so NonZero cannot find the positions of a mask. Of the ways that were timed these are the fastest: GatherElements looks
a value up in 1 ns, Gather takes 9 for each index. All operators are of opset 11.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from sparsify.onnx.storage_forms import (
    PLANES,
    BitPatterns,
    CountedValues,
    StorageForm,
    gap_entries,
    packed_codes,
    padded,
)

__all__: list[str] = []

SHARED_BYTES = 64
"""Bytes of constants that are stored once for all who ask for the same."""
EXACT_WHERE = frozenset({"int8", "uint8"})
"""Types that onnxruntime's Where hands on as they are. It makes 0.0 of -0.0, and lacks some types (seen in 1.31.1)."""


class Rebuilding:
    """Nodes and initializers that rebuild tensors of one graph.

    Args:
        names: gives names that no value of the model has.
    """

    def __init__(self, names: Iterator[str]) -> None:
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self._names = names
        self._small: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def tensor(
        self,
        name: str,
        counted: CountedValues,
        dtype: np.dtype[Any],
        shape: list[int],
        form: StorageForm,
        *,
        cast: int | None = None,
    ) -> None:
        """Adds what rebuilds the tensor `name`, in a form that is not plain.

        Args:
            name: of the value.
            counted: its values.
            dtype: their type, of as many bytes.
            shape: of the tensor.
            form: its new form.
            cast: the ONNX type that it has, where values of less than a byte are rebuilt as bytes.
        """
        total = len(counted.bits)
        if form.positions == "all":
            flat = self._values(counted, counted.bits, dtype, form.value_bits)
        elif form.positions == "mask":
            flat = self._masked(counted, dtype, form)
        else:
            fill = numpy_helper.from_array(np.full(1, counted.background).view(dtype))
            flat = self._node("ConstantOfShape", [self._stored(np.array([total]))], value=fill)
            gaps, values = gap_entries(counted, form.gap_bits)
            if len(gaps):
                at = self._node("CumSum", [self._codes(gaps, form.gap_bits), self._stored(np.array(0))])
                flat = self._node("ScatterElements", [flat, at, self._values(counted, values, dtype, form.value_bits)])
        dims = self._stored(np.array(shape, np.int64))
        if cast is None:
            self.nodes.append(helper.make_node("Reshape", [flat, dims], [name]))
        else:
            self.nodes.append(helper.make_node("Cast", [self._node("Reshape", [flat, dims])], [name], to=cast))

    def _masked(self, counted: CountedValues, dtype: np.dtype[Any], form: StorageForm) -> str:
        """The background is the first value; the k-th that is set has the k-th after it."""
        total = len(counted.bits)
        plane = self._plane(packed_codes(counted.bits != counted.background, 1)[0], 1)
        plane = self._cut(plane, total, padded(total, 1))
        set_ = self._node("Cast", [plane], to=TensorProto.INT32)
        index = self._node("CumSum", [set_, self._stored(np.array(0))])
        stored = np.concatenate([[counted.background], counted.bits[counted.positions]]).astype(counted.bits.dtype)
        values = self._values(counted, stored, dtype, form.value_bits)
        if dtype.name not in EXACT_WHERE:
            return self._node("GatherElements", [values, self._node("Mul", [index, set_])])
        # Faster than Mul, whose result has four bytes a value.
        condition = self._node("Cast", [plane], to=TensorProto.BOOL)
        background = self._stored(np.array(counted.background).view(dtype))
        return self._node("Where", [condition, self._node("GatherElements", [values, index]), background])

    def _values(self, counted: CountedValues, values: BitPatterns, dtype: np.dtype[Any], bits: int) -> str:
        if not bits:
            return self._stored(values.view(dtype))
        assert counted.palette is not None
        palette = np.unique(np.append(counted.palette, counted.background)).astype(values.dtype)
        codes = self._codes(np.searchsorted(palette, values), bits)
        return self._node("GatherElements", [self._stored(palette.view(dtype)), codes])

    def _codes(self, codes: np.ndarray, bits: int) -> str:
        """int32, one-dimensional."""
        total, below = "", 0
        for width, plane in zip(PLANES[bits], packed_codes(codes, bits), strict=True):
            part = self._node("Cast", [self._plane(plane, width)], to=TensorProto.INT32)
            if below:
                part = self._node("Mul", [part, self._stored(np.array(2**below, np.int32))])
                part = self._node("Add", [total, part])
            total, below = part, below + width
        return self._cut(total, len(codes), padded(len(codes), bits))

    def _plane(self, plane: BitPatterns, width: int) -> str:
        """uint8, one-dimensional, from bytes that hold 8 / width numbers each."""
        if width == 8:
            return self._stored(plane)
        lefts = np.arange(8 - width, -1, -width, dtype=np.uint8)[:, None]
        left = self._node("BitShift", [self._stored(plane[None]), self._stored(lefts)], direction="LEFT")
        right = self._node("BitShift", [left, self._stored(np.array(8 - width, np.uint8))], direction="RIGHT")
        return self._node("Reshape", [right, self._stored(np.array([-1]))])

    def _cut(self, value: str, count: int, length: int) -> str:
        if count == length:
            return value
        return self._node("Slice", [value, self._stored(np.array([0])), self._stored(np.array([count]))])

    def _node(self, operator: str, inputs: list[str], **attributes: Any) -> str:
        output = next(self._names)
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def _stored(self, values: np.ndarray) -> str:
        key = values.dtype.str, values.shape, values.tobytes() if values.nbytes <= SHARED_BYTES else b""
        if key[2] and key in self._small:
            return self._small[key]
        name = next(self._names)
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(values).reshape(values.shape), name))
        if key[2]:
            self._small[key] = name
        return name
