"""An executor of an exported Q/DQ file in exact integer arithmetic: what the file means, to the bit.

Operators that onnxruntime runs in integers (`fusion`) are computed by `integer_kernels`, with its rounding, and every
integer of them is what onnxruntime gives. All others run in float (`float_kernels`). Knows no torch and no runtime.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from sparsify.errors import ArgumentError, ExportError, first_line
from sparsify.onnx import integer_kernels as kernels
from sparsify.onnx.float_kernels import compute, compute_with_graphs, spatial_attributes
from sparsify.onnx.fusion import Fused, Fusion
from sparsify.onnx.graph import all_inputs, has_graphs
from sparsify.onnx.integer_kernels import QuantizationGrid, Quantized

__all__: list[str] = []

Array = NDArray[Any]


class Reference:
    """A file that can be run; `fusion` says which of its operators run in integers."""

    def __init__(self, model: ModelProto) -> None:
        self.fusion = Fusion(model)
        self.outputs = [value.name for value in model.graph.output]
        self.inputs = list(self.fusion.view.inputs)
        self.opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)
        self._stored = {tensor.name: _stored_arrays(tensor) for tensor in model.graph.initializer}
        inside = {id(each.node) for each in self.fusion.fused.values() if each.quantize is not None}
        inside |= {id(node) for each in self.fusion.fused.values() for node in each.between}
        # What an integer kernel takes in is computed where its QuantizeLinear stands.
        self._nodes = [node for node in model.graph.node if id(node) not in inside]
        self._last: dict[str, int] = {}
        for i, node in enumerate(self._nodes):
            for name in self._read(node):
                self._last[name] = i

    def run(
        self,
        feed: Mapping[str, Array],
        *,
        given: Mapping[str, Array] | None = None,
        keep: Collection[str] = (),
    ) -> dict[str, Array]:
        """The outputs, and the inner values named in `keep`.

        Args:
            feed: the inputs by name.
            given: values that whatever reads them finds in the place of the computed ones, which come back all the
                same: what every kernel makes of another run's inputs.
            keep: names of inner values to return as well.

        Raises:
            ArgumentError: an input is missing.
            ExportError: an operator that cannot be computed.
        """
        missing = [name for name in self.inputs if name not in feed]
        if missing:
            raise ArgumentError(f"no value for the inputs {', '.join(missing)}.")
        given = given or {}
        wanted = {*self.outputs, *keep}
        values: dict[str, Array | Quantized] = {**self._stored, **feed}
        found: dict[str, Array] = {}
        for i, node in enumerate(self._nodes):
            results = self._compute(node, values)
            for name, result in zip(node.output, results, strict=False):
                if name in wanted:
                    found[name] = _as_floats(result)
                values[name] = given.get(name, result) if name in given else result
            for name in self._read(node):
                if self._last[name] == i and name not in self._stored:
                    values.pop(name, None)
        for name in self.outputs:
            if name not in found:
                found[name] = _as_floats(values[name])
        return found

    def _read(self, node: NodeProto) -> list[str]:
        fused = self.fusion.fused.get(node.output[0])
        if fused is None or fused.quantize is None:
            return all_inputs(node)
        return [*all_inputs(fused.node), *node.input[1:]]

    def _compute(self, node: NodeProto, values: dict[str, Array | Quantized]) -> list[Array | Quantized]:
        fused = self.fusion.fused.get(node.output[0])
        try:
            if fused is not None:
                return [self._integer(fused, values)]
            if node.op_type == "QuantizeLinear":
                return [kernels.quantize(_as_floats(values[node.input[0]]), self._grid(node, values))]
            if node.op_type == "DequantizeLinear":
                return [self._dequantize(node, values)]
            if node.domain not in ("", "ai.onnx"):
                raise ExportError(f"{node.name or node.op_type}: {node.op_type} of {node.domain!r} is not known.")
            if has_graphs(node):
                read = {name: _as_floats(values[name]) for name in all_inputs(node) if name in values}
                return list(compute_with_graphs(node, read, self.opset))
            inputs = [_as_floats(values[name]) if name else None for name in node.input]
            return list(compute(node, inputs, self.opset))
        except ExportError:
            raise
        # onnx's evaluator raises whatever its operators raise.
        except Exception as error:
            name = node.name or node.op_type
            if has_graphs(node):
                raise ExportError(
                    f"{name}: the reference evaluator does not run the graphs inside of {node.op_type}: "
                    f"{type(error).__name__}: {first_line(error)}"
                ) from error
            raise ExportError(f"{name} cannot be computed: {type(error).__name__}: {first_line(error)}") from error

    def _grid(self, node: NodeProto, values: dict[str, Array | Quantized]) -> QuantizationGrid:
        scale = _as_floats(values[node.input[1]])
        zero = _as_floats(values[node.input[2]]) if len(node.input) > 2 and node.input[2] else None
        if zero is None:
            # Of a DequantizeLinear the type of the zero point is that of its integers.
            kind = _as_floats(values[node.input[0]]).dtype if node.op_type == "DequantizeLinear" else np.dtype(np.uint8)
            zero = np.zeros(scale.shape, kind)
        axis = next((int(attribute.i) for attribute in node.attribute if attribute.name == "axis"), 1)
        return QuantizationGrid(scale, zero, axis)

    def _dequantize(self, node: NodeProto, values: dict[str, Array | Quantized]) -> Array | Quantized:
        integers, grid = _as_floats(values[node.input[0]]), self._grid(node, values)
        block = next((int(attribute.i) for attribute in node.attribute if attribute.name == "block_size"), 0)
        if block:
            size = integers.shape[grid.axis]
            scale, zero = (
                np.take(np.repeat(each, block, grid.axis), np.arange(size), grid.axis)
                for each in (grid.scale, grid.zero_point)
            )
            result: Array = (integers.astype(np.float32) - zero.astype(np.float32)) * scale
            return result
        axis = grid.axis % integers.ndim if integers.ndim else 0
        return Quantized(integers, QuantizationGrid(grid.scale, grid.zero_point, axis))

    def _integer(self, fused: Fused, values: dict[str, Array | Quantized]) -> Array:
        node, kind = fused.node, fused.node.op_type
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        operands = [values[name] for name in node.input if name]
        read = [each for each in operands if isinstance(each, Quantized)]
        grid = None if fused.quantize is None else self._grid(fused.quantize, values)
        if kind == "MatMul" or kind == "Gemm":
            weight = read[1]
            if attributes.get("transB", 0):
                across = QuantizationGrid(weight.grid.scale, weight.grid.zero_point, 1 - weight.grid.axis)
                weight = Quantized(weight.values.T, across)
            if not weight.grid.per_tensor and weight.grid.axis != weight.values.ndim - 1:
                raise ExportError(f"{node.name}: the weight has a scale for each row of what is summed up.")
            return kernels.matmul(read[0], weight, read[2].values if len(read) > 2 else None, grid)
        assert grid is not None
        x = read[0]
        if kind == "Conv":
            geometry = spatial_attributes(attributes, x.values.shape[2:], read[1].values.shape[2:])
            bias = read[2].values if len(read) > 2 else None
            return kernels.conv(x, read[1], bias, grid, **geometry, group=int(attributes.get("group", 1)))
        if kind == "Add":
            return kernels.add(x, read[1], grid)
        if kind == "Mul":
            return kernels.mul(x, read[1], grid)
        if kind == "GlobalAveragePool":
            return kernels.global_average_pool(x, grid)
        if kind == "AveragePool":
            kernel = tuple(attributes["kernel_shape"])
            geometry = spatial_attributes(attributes, x.values.shape[2:], kernel)
            return kernels.average_pool(
                x,
                grid,
                kernel=kernel,
                strides=geometry["strides"],
                pads=geometry["pads"],
                ceil=bool(attributes.get("ceil_mode", 0)),
                include_pad=bool(attributes.get("count_include_pad", 0)),
            )
        if kind == "Softmax":
            return kernels.softmax(x, grid, int(attributes.get("axis", -1)))
        if kind == "Concat":
            return np.concatenate([kernels.quantize(each.floats(), grid) for each in read], int(attributes["axis"]))
        if kind == "Sigmoid":
            return kernels.by_table(x, grid, kernels.sigmoid)
        # Of the rest every result is one of 256.
        return kernels.by_table(x, grid, lambda table: compute(node, [table], self.opset)[0])


def _as_floats(value: Array | Quantized) -> Array:
    return value.floats() if isinstance(value, Quantized) else value


def _stored_arrays(tensor: TensorProto) -> Array:
    value = numpy_helper.to_array(tensor)
    # Four bits have types of their own, which numpy's functions do not know.
    if tensor.data_type == TensorProto.INT4:
        return value.astype(np.int8)
    return value.astype(np.uint8) if tensor.data_type == TensorProto.UINT4 else value
