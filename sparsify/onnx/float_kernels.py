"""Float operators of a Q/DQ file: onnx's own reference, and those in numpy that are too slow there.

They agree with onnxruntime's to float32's precision, not to the bit: a quantizer behind one may fall one step aside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, helper

from sparsify.onnx.graph import like
from sparsify.onnx.integer_kernels import convolution, taps

__all__: list[str] = []

FloatArray = NDArray[Any]
ALWAYS = "sparsify/always"
"""The name of a condition that is true."""


def compute(node: NodeProto, inputs: list[FloatArray | None], opset: int) -> list[FloatArray]:
    """The outputs of one node of the standard domain."""
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    kernel = _OWN.get(node.op_type)
    if kernel is not None:
        result = kernel(inputs, attributes)
        if result is not None and node.op_type == "MaxPool" and len(node.output) > 1:
            return [result, _pooled_places(inputs[0], attributes, result)]
        if result is not None:
            return [result]
    given = zip(node.input, inputs, strict=False)
    return _by_onnx(node, {name: value for name, value in given if name and value is not None}, opset)


def compute_with_graphs(node: NodeProto, values: Mapping[str, FloatArray], opset: int) -> list[FloatArray]:
    """The outputs of a node that holds graphs (If, Loop, Scan); `values`: those that it and its graphs read."""
    if node.op_type == "Loop" and not node.input[1]:
        # onnx 1.23.2 takes a condition that is left out for one that is false.
        node = like(node, [node.input[0], ALWAYS, *node.input[2:]], node.output)
        values = {**values, ALWAYS: np.asarray(True)}
    return _by_onnx(node, values, opset)


def spatial_attributes(attributes: dict[str, Any], spatial: tuple[int, ...], kernel: tuple[int, ...]) -> dict[str, Any]:
    """strides, pads and dilations of a convolution or pool, with their defaults and `auto_pad` worked out."""
    rank = len(kernel)
    strides = list(attributes.get("strides") or [1] * rank)
    dilations = list(attributes.get("dilations") or [1] * rank)
    pads = list(attributes.get("pads") or [0] * 2 * rank)
    how = attributes.get("auto_pad", b"NOTSET")
    if how in (b"SAME_UPPER", b"SAME_LOWER"):
        total = [
            max(0, (-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size)
            for size, stride, k, dilation in zip(spatial, strides, kernel, dilations, strict=True)
        ]
        less, more = [each // 2 for each in total], [each - each // 2 for each in total]
        pads = [*less, *more] if how == b"SAME_UPPER" else [*more, *less]
    return {"strides": strides, "pads": pads, "dilations": dilations}


def _conv(inputs: list[FloatArray | None], attributes: dict[str, Any]) -> FloatArray | None:
    x, weight = inputs[0], inputs[1]
    assert x is not None and weight is not None
    geometry = spatial_attributes(attributes, x.shape[2:], weight.shape[2:])
    result = convolution(x, weight, **geometry, group=int(attributes.get("group", 1)))
    bias = inputs[2] if len(inputs) > 2 else None
    return result if bias is None else result + bias.reshape(-1, *[1] * (x.ndim - 2))


def _max_pool(inputs: list[FloatArray | None], attributes: dict[str, Any]) -> FloatArray | None:
    x = inputs[0]
    assert x is not None
    kernel = tuple(attributes["kernel_shape"])
    geometry = spatial_attributes(attributes, x.shape[2:], kernel)
    if any(dilation != 1 for dilation in geometry["dilations"]) or attributes.get("storage_order", 0):
        return None
    lowest = -np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min
    result: FloatArray | None = None
    for taken, inside in taps(x, kernel, geometry["strides"], geometry["pads"], bool(attributes.get("ceil_mode", 0))):
        masked = np.where(inside, taken, np.asarray(lowest, x.dtype))
        result = masked if result is None else np.maximum(result, masked)
    return result


def _pooled_places(x: FloatArray | None, attributes: dict[str, Any], largest: FloatArray) -> FloatArray:
    """The second result of MaxPool: where in all of `x`, flat, the largest value of a window stands first."""
    assert x is not None
    kernel = tuple(attributes["kernel_shape"])
    geometry = spatial_attributes(attributes, x.shape[2:], kernel)
    window = (kernel, geometry["strides"], geometry["pads"], bool(attributes.get("ceil_mode", 0)))
    found = np.full(largest.shape, -1, np.int64)
    numbers = np.arange(x.size, dtype=np.int64).reshape(x.shape)
    for (taken, inside), (number, _) in zip(taps(x, *window), taps(numbers, *window), strict=True):
        found = np.where((found < 0) & inside & (taken == largest), number, found)
    return found


def _average_pool(inputs: list[FloatArray | None], attributes: dict[str, Any]) -> FloatArray | None:
    x = inputs[0]
    assert x is not None
    kernel = tuple(attributes["kernel_shape"])
    geometry = spatial_attributes(attributes, x.shape[2:], kernel)
    if any(dilation != 1 for dilation in geometry["dilations"]) or attributes.get("ceil_mode", 0):
        return None
    total, count = np.zeros((), x.dtype), np.zeros((), x.dtype)
    for taken, inside in taps(x, kernel, geometry["strides"], geometry["pads"], False):
        total = total + np.where(inside, taken, np.zeros((), x.dtype))
        count = count + inside
    whole = bool(attributes.get("count_include_pad", 0))
    return (total / (np.prod(kernel) if whole else count)).astype(x.dtype)


def _resize(inputs: list[FloatArray | None], attributes: dict[str, Any]) -> FloatArray | None:
    """Nearest and linear, axis by axis."""
    x = inputs[0]
    assert x is not None
    mode = attributes.get("mode", b"nearest")
    how = attributes.get("coordinate_transformation_mode", b"half_pixel")
    nearest = attributes.get("nearest_mode", b"round_prefer_floor")
    known = how in (b"half_pixel", b"asymmetric", b"align_corners", b"pytorch_half_pixel")
    if mode not in (b"nearest", b"linear") or not known or attributes.get("axes") or attributes.get("antialias"):
        return None
    scales = inputs[2] if len(inputs) > 2 and inputs[2] is not None and inputs[2].size else None
    sizes = inputs[3] if len(inputs) > 3 and inputs[3] is not None and inputs[3].size else None
    for axis, size in enumerate(x.shape):
        scale = float(scales[axis]) if scales is not None else float(sizes[axis]) / size  # type: ignore[index]
        target = int(np.floor(size * scale)) if sizes is None else int(sizes[axis])
        if target == size and scale == 1.0:
            continue
        out = np.arange(target, dtype=np.float64)
        if how == b"asymmetric":
            at = out / scale
        elif how == b"align_corners":
            at = out * (size - 1) / (target - 1) if target > 1 else np.zeros(1)
        elif how == b"pytorch_half_pixel" and target == 1:
            at = np.zeros(1)
        else:
            at = (out + 0.5) / scale - 0.5
        if mode == b"nearest":
            chosen = _NEAREST[nearest](at)
            x = np.take(x, chosen.astype(np.int64).clip(0, size - 1), axis)
        else:
            at = at.clip(0, size - 1)
            low = np.floor(at).astype(np.int64)
            weight = (at - low).astype(x.dtype).reshape(-1, *[1] * (x.ndim - axis - 1))
            x = np.take(x, low, axis) * (1 - weight) + np.take(x, (low + 1).clip(0, size - 1), axis) * weight
    return x


_NEAREST: dict[bytes, Callable[[FloatArray], FloatArray]] = {
    b"floor": np.floor,
    b"ceil": np.ceil,
    b"round_prefer_floor": lambda at: np.ceil(at - 0.5),
    b"round_prefer_ceil": lambda at: np.floor(at + 0.5),
}


def _layer_normalization(inputs: list[FloatArray | None], attributes: dict[str, Any]) -> FloatArray | None:
    x, scale = inputs[0], inputs[1]
    assert x is not None and scale is not None
    axes = tuple(range(int(attributes.get("axis", -1)) % x.ndim, x.ndim))
    wide = x.astype(np.float64)
    centered = wide - wide.mean(axes, keepdims=True)
    spread = np.sqrt((centered**2).mean(axes, keepdims=True) + float(attributes.get("epsilon", 1e-5)))
    result = centered / spread * scale
    bias = inputs[2] if len(inputs) > 2 else None
    rounded: FloatArray = (result if bias is None else result + bias).astype(x.dtype)
    return rounded


def _gather_elements(inputs: list[FloatArray | None], attributes: dict[str, Any]) -> FloatArray | None:
    data, indices = inputs[0], inputs[1]
    assert data is not None and indices is not None
    axis = int(attributes.get("axis", 0)) % data.ndim
    # Along the other dimensions the indices may be fewer: those at the beginning are meant.
    begin = tuple(slice(None) if d == axis else slice(size) for d, size in enumerate(indices.shape))
    return np.take_along_axis(data[begin], np.where(indices < 0, indices + data.shape[axis], indices), axis)


_OWN: dict[str, Callable[[list[FloatArray | None], dict[str, Any]], FloatArray | None]] = {
    "Conv": _conv,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "Resize": _resize,
    "LayerNormalization": _layer_normalization,
    # onnx's own wants as many indices as values along all other axes (seen in onnx 1.23.2); needless from the version
    # with https://github.com/onnx/onnx/pull/8444 on.
    "GatherElements": _gather_elements,
}


def _by_onnx(node: NodeProto, values: Mapping[str, FloatArray], opset: int) -> list[FloatArray]:
    """One node in onnx's reference evaluator."""
    from onnx.reference import ReferenceEvaluator

    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in values.items()
    ]
    named = [name for name in node.output if name]
    graph = helper.make_graph([node], "node", infos, [helper.make_empty_tensor_value_info(name) for name in named])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    results = dict(zip(named, ReferenceEvaluator(model).run(None, dict(values)), strict=True))
    return [np.asarray(results[name]) if name else np.empty(0) for name in node.output]
