"""ONNX operators as torch calls, so that a trace of an imported graph shows what one of a module shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from onnx import NodeProto, TensorProto, helper
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify.onnx.one_node import EdgeValue, OneNode, array_of, run_in_torch

__all__: list[str] = []

Attributes = Mapping[str, Any]
_TORCH_TYPES = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.INT8: torch.int8,
    TensorProto.UINT8: torch.uint8,
    TensorProto.BOOL: torch.bool,
}


class NoCall(Exception):
    """Torch has no call for a node as it stands: onnxruntime computes it."""


def attributes_of(node: NodeProto) -> dict[str, Any]:
    """The attributes of a node as Python values, text as str."""
    found = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}


class NodeFunction(nn.Module):
    """One node without weights: a torch call where there is one, else the node in onnxruntime.

    Called with the values that the node reads and that are not stored, in its order; arrays among them are known before
    a run. Of arrays alone it gives arrays.

    Args:
        runner: the node in onnxruntime.
    """

    def __init__(self, runner: OneNode) -> None:
        super().__init__()
        self.runner = runner
        self.op = runner.node.op_type
        self.attributes = attributes_of(runner.node)
        self.names = list(runner.node.input)
        self.in_onnxruntime = runner.node.domain not in ("", "ai.onnx") or self.op not in TORCH_CALLS
        """Whether torch has no call for it; noted where one turns out to be missing, too."""
        if len(runner.outputs) > 1 and self.op != "Split":
            self.in_onnxruntime = True
        for name, tensor in runner.constants.items():
            # A mask may hold -inf, of which no parameter is made.
            whole = tensor.data_type == TensorProto.FLOAT and bool(np.isfinite(runner.arrays[name]).all())
            if whole and tensor.dims and name in self.names:
                self.register_parameter(
                    f"constant_{self.names.index(name)}",
                    nn.Parameter(torch.from_numpy(np.array(array_of(tensor))), requires_grad=False),
                )

    def forward(self, *read: EdgeValue) -> Any:
        first = read[0] if read else None
        if self.op == "Shape" and isinstance(first, Tensor):
            shape = np.asarray([int(size) for size in first.shape], np.int64)
            return shape[self.attributes.get("start", 0) : self.attributes.get("end", len(shape))]
        if self.op == "Size" and isinstance(first, Tensor):
            return np.asarray(first.numel(), np.int64)
        if not any(isinstance(value, Tensor) for value in read):
            results: list[Any] = list(self.runner([np.asarray(value) for value in read]))
            return self._given(results)
        if not self.in_onnxruntime:
            given = dict(zip(self.runner.reads, read, strict=True))
            values = [self._value(i, given.get(name)) for i, name in enumerate(self.names)]
            try:
                return TORCH_CALLS[self.op](self.attributes, values)
            except NoCall:
                self.in_onnxruntime = True
        return self._given(run_in_torch(self.runner, list(read)))

    def _value(self, index: int, value: EdgeValue) -> Any:
        """A value as torch computes with it: stored floats as the parameter, a single one as a number."""
        name = self.names[index]
        if name in self.runner.constants:
            if f"constant_{index}" in self._parameters:
                return self._parameters[f"constant_{index}"]
            value = self.runner.arrays[name]
        if isinstance(value, np.ndarray) and value.dtype == np.float32 and value.ndim == 0:
            return float(value)
        return value

    def _given(self, results: list[Any]) -> Any:
        """One for each output of the node, None where it leaves one out; a single one by itself."""
        named = dict(zip(self.runner.outputs, results, strict=True))
        found = tuple(named.get(name) for name in self.runner.node.output)
        return found[0] if len(found) == 1 else found


def _tensor_of(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))


def _known_ints(value: Any) -> list[int]:
    """Numbers that are known before a run."""
    if value is None or isinstance(value, Tensor):
        raise NoCall
    return [int(one) for one in np.asarray(value).reshape(-1)]


def _only_floats(*values: Any) -> None:
    """Only tensors of floats, and numbers, are computed with here: those of integers have rules of their own."""
    if any(isinstance(value, Tensor) and not value.is_floating_point() for value in values):
        raise NoCall
    if any(isinstance(value, np.ndarray) and value.dtype.kind != "f" for value in values):
        raise NoCall


def _operand(value: Any) -> Any:
    return value if isinstance(value, float) else _tensor_of(value)


def _of_two(function: Callable[[Any, Any], Any]) -> Callable[[Attributes, list[Any]], Any]:
    def call(_: Attributes, values: list[Any]) -> Any:
        _only_floats(*values)
        return function(_operand(values[0]), _operand(values[1]))

    return call


def _of_one(function: Callable[[Any], Any]) -> Callable[[Attributes, list[Any]], Any]:
    def call(_: Attributes, values: list[Any]) -> Any:
        _only_floats(*values)
        return function(_tensor_of(values[0]))

    return call


def _call_clip(attributes: Attributes, values: list[Any]) -> Any:
    low, high = (values[i] if len(values) > i else None for i in (1, 2))
    low, high = attributes.get("min", low), attributes.get("max", high)
    if any(isinstance(edge, Tensor) for edge in (low, high)):
        raise NoCall
    _only_floats(values[0])
    low, high = (None if edge is None else float(np.asarray(edge).reshape(())) for edge in (low, high))
    if (low, high) == (0.0, 6.0):
        return F.relu6(values[0])
    return F.relu(values[0]) if low == 0.0 and high is None else torch.clamp(values[0], low, high)


def _call_hard_sigmoid(attributes: Attributes, values: list[Any]) -> Any:
    x = values[0]
    # One operation: a product and a sum would look like those that are quantized.
    line = torch.addcdiv(
        x.new_tensor(attributes.get("beta", 0.5)), x, x.new_ones(()), value=attributes.get("alpha", 0.2)
    )
    return torch.clamp(line, 0.0, 1.0)


def _call_softmax(attributes: Attributes, values: list[Any]) -> Any:
    return F.softmax(values[0], attributes.get("axis", -1))


def _call_reshape(attributes: Attributes, values: list[Any]) -> Any:
    shape = _known_ints(values[1])
    x = _tensor_of(values[0])
    if attributes.get("allowzero", 0) and 0 in shape:
        raise NoCall
    return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(shape)])


def _axes(attributes: Attributes, values: list[Any], at: int = 1) -> list[int]:
    if "axes" in attributes:
        return list(attributes["axes"])
    return _known_ints(values[at]) if len(values) > at and values[at] is not None else []


def _call_squeeze(attributes: Attributes, values: list[Any]) -> Any:
    x = _tensor_of(values[0])
    axes = _axes(attributes, values) or [i for i, size in enumerate(x.shape) if size == 1]
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.squeeze(axis)
    return x


def _call_unsqueeze(attributes: Attributes, values: list[Any]) -> Any:
    x = _tensor_of(values[0])
    axes = _axes(attributes, values)
    for axis in sorted(axis % (x.dim() + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _call_flatten(attributes: Attributes, values: list[Any]) -> Any:
    x, axis = values[0], attributes.get("axis", 1)
    if axis != 1 or x.dim() < 2:
        raise NoCall
    return torch.flatten(x, 1)


def _call_transpose(attributes: Attributes, values: list[Any]) -> Any:
    x = values[0]
    return x.permute(attributes.get("perm", list(range(x.dim()))[::-1]))


def _call_cast(attributes: Attributes, values: list[Any]) -> Any:
    wanted = _TORCH_TYPES.get(attributes["to"])
    x = _tensor_of(values[0])
    if wanted is None or not (wanted.is_floating_point or x.dtype in (torch.bool, torch.int32, torch.int64)):
        raise NoCall
    return x if x.dtype == wanted else x.to(wanted)


def _call_slice(attributes: Attributes, values: list[Any]) -> Any:
    x = _tensor_of(values[0])
    if "starts" in attributes:
        starts, ends = list(attributes["starts"]), list(attributes["ends"])
        axes, steps = list(attributes.get("axes", range(len(starts)))), [1] * len(starts)
    else:
        starts, ends = _known_ints(values[1]), _known_ints(values[2])
        axes = _known_ints(values[3]) if len(values) > 3 and values[3] is not None else list(range(len(starts)))
        steps = _known_ints(values[4]) if len(values) > 4 and values[4] is not None else [1] * len(starts)
    if any(step < 1 for step in steps):
        raise NoCall
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = x.shape[axis]
        start, end = (max(0, edge + size) if edge < 0 else min(edge, size) for edge in (start, end))
        x = x[(slice(None),) * (axis % x.dim()) + (slice(start, max(start, end), step),)]
    return x


def _call_split(attributes: Attributes, values: list[Any]) -> Any:
    x, axis = _tensor_of(values[0]), attributes.get("axis", 0)
    sizes = attributes.get("split")
    if sizes is None and len(values) > 1 and values[1] is not None:
        sizes = _known_ints(values[1])
    if sizes is None:
        raise NoCall
    return torch.split(x, list(sizes), axis)


def _call_gather(attributes: Attributes, values: list[Any]) -> Any:
    x, axis = _tensor_of(values[0]), attributes.get("axis", 0)
    if isinstance(values[1], Tensor):
        raise NoCall
    index = np.asarray(values[1])
    index = np.where(index < 0, index + x.shape[axis], index)
    if index.ndim == 0:
        return x.select(axis, int(index))
    if index.ndim != 1:
        raise NoCall
    return x.index_select(axis, torch.from_numpy(index.astype(np.int64)))


def _call_concat(attributes: Attributes, values: list[Any]) -> Any:
    return torch.cat([_tensor_of(value) for value in values], attributes["axis"])


def _call_expand(_: Attributes, values: list[Any]) -> Any:
    x, shape = _tensor_of(values[0]), _known_ints(values[1])
    return x.expand(np.broadcast_shapes(tuple(x.shape), tuple(shape)))


def _call_pad(attributes: Attributes, values: list[Any]) -> Any:
    x, mode = _tensor_of(values[0]), attributes.get("mode", "constant")
    pads = list(attributes["pads"]) if "pads" in attributes else _known_ints(values[1])
    number = values[2] if len(values) > 2 and values[2] is not None else attributes.get("value", 0.0)
    if isinstance(number, Tensor) or (len(values) > 3 and values[3] is not None):
        raise NoCall
    if any(pad < 0 for pad in pads) or not x.is_floating_point():
        raise NoCall
    half = len(pads) // 2
    flat = [each for i in reversed(range(half)) for each in (pads[i], pads[i + half])]
    if mode == "constant":
        while flat and flat[-2:] == [0, 0] and len(flat) > 2:
            flat = flat[:-2]
        return F.pad(x, flat, value=float(np.asarray(number).reshape(())))
    if mode not in ("reflect", "edge") or any(flat[2 * (half - 2) :]) or half < 3:
        raise NoCall
    return F.pad(x, flat[: 2 * (half - 2)], mode="reflect" if mode == "reflect" else "replicate")


def pool_geometry(attributes: Attributes) -> tuple[list[int], list[int], list[int]]:
    """(kernel, stride, padding) of a pool or convolution with the same padding on both sides."""
    kernel = list(attributes["kernel_shape"])
    rank = len(kernel)
    pads = list(attributes.get("pads", [0] * 2 * rank))
    if attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or pads[:rank] != pads[rank:]:
        raise NoCall
    return kernel, list(attributes.get("strides", [1] * rank)), pads[:rank]


def _call_max_pool(attributes: Attributes, values: list[Any]) -> Any:
    kernel, stride, padding = pool_geometry(attributes)
    if (
        len(kernel) > 3
        or attributes.get("storage_order", 0)
        or any(2 * p > k for p, k in zip(padding, kernel, strict=True))
    ):
        raise NoCall
    dilation, ceil = list(attributes.get("dilations", [1] * len(kernel))), bool(attributes.get("ceil_mode", 0))
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel) - 1]
    return pool(values[0], kernel, stride, padding, dilation, ceil)


def _call_average_pool(attributes: Attributes, values: list[Any]) -> Any:
    kernel, stride, padding = pool_geometry(attributes)
    if len(kernel) > 2 or any(one != 1 for one in attributes.get("dilations", [1])) or attributes.get("ceil_mode", 0):
        raise NoCall
    pool: Any = (F.avg_pool1d, F.avg_pool2d)[len(kernel) - 1]
    inside = not any(padding) or bool(attributes.get("count_include_pad", 0))
    return pool(values[0], kernel, stride, padding, False, inside)


def _global_average(_: Attributes, values: list[Any]) -> Any:
    x = values[0]
    if x.dim() not in (3, 4):
        return x.mean(tuple(range(2, x.dim())), keepdim=True)
    return F.adaptive_avg_pool1d(x, 1) if x.dim() == 3 else F.adaptive_avg_pool2d(x, 1)


def _global_maximum(_: Attributes, values: list[Any]) -> Any:
    return torch.amax(values[0], tuple(range(2, values[0].dim())), keepdim=True)


def _over_axes(function: Callable[..., Any]) -> Callable[[Attributes, list[Any]], Any]:
    def call(attributes: Attributes, values: list[Any]) -> Any:
        _only_floats(values[0])
        axes = _axes(attributes, values)
        if not axes and attributes.get("noop_with_empty_axes", 0):
            raise NoCall
        return function(values[0], axes or list(range(values[0].dim())), bool(attributes.get("keepdims", 1)))

    return call


def _call_layer_norm(attributes: Attributes, values: list[Any]) -> Any:
    x, axis = values[0], attributes.get("axis", -1)
    bias = values[2] if len(values) > 2 else None
    if any(isinstance(each, np.ndarray) for each in values):
        raise NoCall
    return F.layer_norm(x, tuple(x.shape[axis:]), values[1], bias, attributes.get("epsilon", 1e-5))


def _call_instance_norm(attributes: Attributes, values: list[Any]) -> Any:
    return F.instance_norm(values[0], weight=values[1], bias=values[2], eps=attributes.get("epsilon", 1e-5))


def _call_resize(attributes: Attributes, values: list[Any]) -> Any:
    x, mode = values[0], attributes.get("mode", "nearest")
    where = attributes.get("coordinate_transformation_mode", "half_pixel")
    scales = values[2] if len(values) > 2 else None
    sizes = values[3] if len(values) > 3 else None
    if x.dim() != 4 or attributes.get("axes") is not None or attributes.get("antialias", 0):
        raise NoCall
    if sizes is not None and not isinstance(sizes, Tensor):
        size = _known_ints(sizes)
    elif scales is not None and not isinstance(scales, Tensor) and np.asarray(scales).size:
        size = [int(np.floor(n * f)) for n, f in zip(x.shape, np.asarray(scales).reshape(-1).tolist(), strict=True)]
    else:
        raise NoCall
    if size[:2] != list(x.shape[:2]):
        raise NoCall
    whole = all(new % old == 0 for new, old in zip(size[2:], x.shape[2:], strict=True))
    if mode == "nearest" and whole:
        rounding = attributes.get("nearest_mode", "round_prefer_floor")
        if (where, rounding) in (("asymmetric", "floor"), ("half_pixel", "round_prefer_floor")) or (
            where == "half_pixel" and rounding == "round_prefer_ceil"
        ):
            return F.interpolate(x, size=size[2:], mode="nearest")
    if mode == "linear" and where in ("half_pixel", "pytorch_half_pixel") and whole and 1 not in size[2:]:
        return F.interpolate(x, size=size[2:], mode="bilinear", align_corners=False)
    if mode == "linear" and where == "align_corners":
        return F.interpolate(x, size=size[2:], mode="bilinear", align_corners=True)
    raise NoCall


def _call_depth_to_space(attributes: Attributes, values: list[Any]) -> Any:
    if attributes.get("mode", "DCR") != "CRD":
        raise NoCall
    return F.pixel_shuffle(values[0], attributes["blocksize"])


def _call_prelu(_: Attributes, values: list[Any]) -> Any:
    x, slope = values[0], _tensor_of(values[1])
    return torch.where(x >= 0, x, x * slope)


def _call_power(_: Attributes, values: list[Any]) -> Any:
    _only_floats(values[0])
    power = values[1]
    if isinstance(power, np.ndarray) and power.ndim == 0:
        power = float(power)
    return torch.pow(values[0] if isinstance(values[0], Tensor) else _tensor_of(values[0]), _operand(power))


def _idle(_: Attributes, values: list[Any]) -> Any:
    return values[0]


TORCH_CALLS: dict[str, Callable[[Attributes, list[Any]], Any]] = {
    "Add": _of_two(lambda a, b: torch.add(a, b) if isinstance(a, Tensor) else torch.add(b, a)),
    "Sub": _of_two(lambda a, b: a - b),
    "Mul": _of_two(lambda a, b: torch.mul(a, b) if isinstance(a, Tensor) else torch.mul(b, a)),
    "Div": _of_two(lambda a, b: a / b),
    "MatMul": _of_two(torch.matmul),
    "Pow": _call_power,
    "Abs": _of_one(torch.abs),
    "Neg": _of_one(torch.neg),
    "Exp": _of_one(torch.exp),
    "Log": _of_one(torch.log),
    "Sqrt": _of_one(torch.sqrt),
    "Erf": _of_one(torch.erf),
    "Sin": _of_one(torch.sin),
    "Cos": _of_one(torch.cos),
    "Reciprocal": _of_one(torch.reciprocal),
    "Softplus": _of_one(F.softplus),
    "Mish": _of_one(F.mish),
    "LeakyRelu": lambda a, v: F.leaky_relu(v[0], a.get("alpha", 0.01)),
    "Elu": lambda a, v: F.elu(v[0], a.get("alpha", 1.0)),
    "Gelu": lambda a, v: F.gelu(v[0], approximate=a.get("approximate", "none")),
    "HardSigmoid": _call_hard_sigmoid,
    "PRelu": _call_prelu,
    "Clip": _call_clip,
    "Softmax": _call_softmax,
    "Concat": _call_concat,
    "Reshape": _call_reshape,
    "Squeeze": _call_squeeze,
    "Unsqueeze": _call_unsqueeze,
    "Flatten": _call_flatten,
    "Transpose": _call_transpose,
    "Identity": _idle,
    "Cast": _call_cast,
    "Slice": _call_slice,
    "Split": _call_split,
    "Gather": _call_gather,
    "Expand": _call_expand,
    "Pad": _call_pad,
    "MaxPool": _call_max_pool,
    "AveragePool": _call_average_pool,
    "GlobalAveragePool": _global_average,
    "GlobalMaxPool": _global_maximum,
    "ReduceMean": _over_axes(torch.mean),
    "ReduceSum": _over_axes(torch.sum),
    "ReduceMax": _over_axes(torch.amax),
    "ReduceMin": _over_axes(torch.amin),
    "LayerNormalization": _call_layer_norm,
    "InstanceNormalization": _call_instance_norm,
    "Resize": _call_resize,
    "DepthToSpace": _call_depth_to_space,
}
"""{operator: its torch call, of attributes and values; `NoCall` where it has none for these}."""
