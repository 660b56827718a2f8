"""ONNX nodes with weights as torch layers, and nodes that are one function together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from onnx import NodeProto, TensorProto
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify.onnx.node_functions import NoCall, attributes_of, pool_geometry
from sparsify.onnx.one_node import array_of

__all__: list[str] = []

CONVS: dict[str, tuple[type[nn.Module], ...]] = {
    "Conv": (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    "ConvTranspose": (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
}
NORM_LAYERS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_SIXTH = 1e-6


@dataclass(frozen=True)
class StoredWeight:
    """Place and layout in the file of the weight of a torch layer.

    Attributes:
        name: of the initializer.
        transposed: whether the file has (in, out) where torch has (out, in).
    """

    name: str
    transposed: bool = False

    def of_torch(self, weight: Any) -> np.ndarray:
        """A weight of torch, or the integers of one, as the file stores it."""
        array: np.ndarray = weight.detach().cpu().numpy()
        return np.array(array.T, order="C") if self.transposed else array


class PaddedConv1d(nn.Conv1d):
    """A convolution that pads its two sides differently, as `before` and `after` say for each axis."""

    sides: Sides

    def forward(self, input: Tensor) -> Tensor:
        return F.conv1d(self.sides.padded(input), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class PaddedConv2d(nn.Conv2d):
    """Likewise in two dimensions."""

    sides: Sides

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(self.sides.padded(input), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


@dataclass(frozen=True)
class Sides:
    """Padding that differs between the sides: fixed, or such that the size of the result is that of the input divided
    by the stride, rounded up (SAME_UPPER, SAME_LOWER)."""

    pads: tuple[int, ...] | None
    lower: bool
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]

    def padded(self, x: Tensor) -> Tensor:
        rank, flat = len(self.kernel), list[int]()
        for i in reversed(range(rank)):
            if self.pads is not None:
                flat += [self.pads[i], self.pads[i + rank]]
                continue
            size = x.shape[2 + i]
            reach = self.dilation[i] * (self.kernel[i] - 1) + 1
            total = max((-(-size // self.stride[i]) - 1) * self.stride[i] + reach - size, 0)
            less, more = total // 2, total - total // 2
            flat += [more, less] if self.lower else [less, more]
        return F.pad(x, flat) if any(flat) else x


def layer_of(
    node: NodeProto, constants: Mapping[str, TensorProto], rank: int | None
) -> tuple[nn.Module, StoredWeight] | None:
    """(the torch layer of a node with weights, where its weight lies); None: it has none, or torch has no such layer.

    Args:
        node: of any operator.
        constants: stored tensors by name.
        rank: number of dimensions of what it reads; None: not known.
    """
    if node.domain not in ("", "ai.onnx") or len(node.input) < 2:
        return None
    try:
        if node.op_type in CONVS:
            return _conv_layer(node, constants)
        if node.op_type in ("Gemm", "MatMul"):
            return _linear_layer(node, constants)
        if node.op_type == "Gather":
            return _embedding_layer(node, constants)
        if node.op_type == "BatchNormalization":
            return _norm_layer(node, constants, rank)
    except NoCall:
        pass
    return None


def _stored_floats(constants: Mapping[str, TensorProto], name: str) -> Tensor:
    """A stored tensor of float32."""
    tensor = constants.get(name)
    if tensor is None or tensor.data_type != TensorProto.FLOAT:
        raise NoCall
    return torch.from_numpy(np.array(array_of(tensor)))


def _unfilled(cls: Any, *sizes: Any, **options: Any) -> Any:
    """A layer whose weights are about to be filled."""
    return cast(Any, nn.utils.skip_init)(cls, *sizes, **options)


def _with_values(layer: nn.Module, **values: Tensor | None) -> nn.Module:
    for name, value in values.items():
        if value is not None and getattr(layer, name).shape != value.shape:
            raise NoCall
        if value is not None:
            kept = getattr(layer, name)
            if isinstance(kept, nn.Parameter):
                kept.data = value
            else:
                setattr(layer, name, value)
    return layer.eval()


def _conv_layer(node: NodeProto, constants: Mapping[str, TensorProto]) -> tuple[nn.Module, StoredWeight]:
    weight = _stored_floats(constants, node.input[1])
    bias = _stored_floats(constants, node.input[2]) if len(node.input) > 2 and node.input[2] else None
    attributes = attributes_of(node)
    rank = weight.dim() - 2
    # Without one there would be no place for what rounding shifts; a kernel of integers adds it for nothing.
    outputs = weight.shape[0] if node.op_type == "Conv" else weight.shape[1] * attributes.get("group", 1)
    bias = torch.zeros(outputs) if bias is None else bias
    if not 1 <= rank <= 3:
        raise NoCall
    stride = tuple(attributes.get("strides", [1] * rank))
    dilation = tuple(attributes.get("dilations", [1] * rank))
    groups = attributes.get("group", 1)
    kernel = tuple(weight.shape[2:])
    cls: Any = CONVS[node.op_type][rank - 1]
    options: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups}
    if node.op_type == "ConvTranspose":
        _, _, padding = pool_geometry({"kernel_shape": kernel, **attributes})
        if attributes.get("output_shape"):
            raise NoCall
        layer = _unfilled(
            cls,
            weight.shape[0],
            weight.shape[1] * groups,
            kernel,
            padding=tuple(padding),
            output_padding=tuple(attributes.get("output_padding", [0] * rank)),
            **options,
        )
        return _with_values(layer, weight=weight, bias=bias), StoredWeight(node.input[1])
    channels = (weight.shape[1] * groups, weight.shape[0])
    try:
        _, _, padding = pool_geometry({"kernel_shape": kernel, **attributes})
        layer = _unfilled(cls, *channels, kernel, padding=tuple(padding), **options)
    except NoCall:
        if rank > 2:
            raise
        layer = _unfilled((PaddedConv1d, PaddedConv2d)[rank - 1], *channels, kernel, **options)
        auto = attributes.get("auto_pad", "NOTSET")
        pads = tuple(attributes.get("pads", [0] * 2 * rank)) if auto == "NOTSET" else None
        layer.sides = Sides(pads, auto == "SAME_LOWER", kernel, stride, dilation)
    return _with_values(layer, weight=weight, bias=bias), StoredWeight(node.input[1])


def _linear_layer(node: NodeProto, constants: Mapping[str, TensorProto]) -> tuple[nn.Module, StoredWeight]:
    weight = _stored_floats(constants, node.input[1])
    attributes = attributes_of(node)
    stored_out_first = bool(attributes.get("transB", 0)) and node.op_type == "Gemm"
    if weight.dim() != 2 or node.input[0] in constants or attributes.get("transA", 0):
        raise NoCall
    if node.op_type == "Gemm" and (attributes.get("alpha", 1.0), attributes.get("beta", 1.0)) != (1.0, 1.0):
        raise NoCall
    if not stored_out_first:
        weight = weight.t().contiguous()
    bias = None
    if node.op_type == "Gemm" and len(node.input) > 2 and node.input[2]:
        bias = bias_vector(constants, node.input[2], weight.shape[0])
        if bias is None:
            raise NoCall
    layer = _unfilled(nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None)
    return _with_values(layer, weight=weight, bias=bias), StoredWeight(node.input[1], not stored_out_first)


def bias_vector(constants: Mapping[str, TensorProto], name: str, size: int) -> Tensor | None:
    """A stored tensor that is a bias of `size` outputs; None: it is none."""
    tensor = constants.get(name)
    if tensor is None or tensor.data_type != TensorProto.FLOAT or not tensor.dims:
        return None
    if list(tensor.dims)[-1] != size or any(dim != 1 for dim in list(tensor.dims)[:-1]):
        return None
    return torch.from_numpy(np.array(array_of(tensor))).reshape(size)


def _embedding_layer(node: NodeProto, constants: Mapping[str, TensorProto]) -> tuple[nn.Module, StoredWeight]:
    weight = _stored_floats(constants, node.input[0])
    if weight.dim() != 2 or attributes_of(node).get("axis", 0) or node.input[1] in constants:
        raise NoCall
    layer = _unfilled(nn.Embedding, *weight.shape)
    return _with_values(layer, weight=weight), StoredWeight(node.input[0])


def _norm_layer(
    node: NodeProto, constants: Mapping[str, TensorProto], rank: int | None
) -> tuple[nn.Module, StoredWeight]:
    scale, bias, mean, var = (_stored_floats(constants, name) for name in node.input[1:5])
    attributes = attributes_of(node)
    if rank not in NORM_LAYERS or attributes.get("training_mode", 0) or sum(map(bool, node.output)) > 1:
        raise NoCall
    layer = NORM_LAYERS[rank](scale.shape[0], eps=attributes.get("epsilon", 1e-5))
    filled = _with_values(layer, weight=scale, bias=bias, running_mean=mean, running_var=var)
    return filled, StoredWeight(node.input[1])


def function_of(node: NodeProto) -> nn.Module | None:
    """The torch module of a node that is an activation or a pool and nothing else; None: it is none."""
    attributes = attributes_of(node)
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "HardSigmoid":
        sixth = abs(attributes.get("alpha", 0.2) - 1 / 6) < _SIXTH and attributes.get("beta", 0.5) == 0.5
        return nn.Hardsigmoid() if sixth else None
    if node.op_type == "AveragePool":
        try:
            kernel, stride, padding = pool_geometry(attributes)
        except NoCall:
            return None
        plain = not any(one != 1 for one in attributes.get("dilations", [1])) and not attributes.get("ceil_mode", 0)
        inside = not any(padding) or bool(attributes.get("count_include_pad", 0))
        if plain and len(kernel) in (1, 2):
            pool: Any = (nn.AvgPool1d, nn.AvgPool2d)[len(kernel) - 1]
            made: nn.Module = pool(tuple(kernel), tuple(stride), tuple(padding), False, inside)
            return made
        return None
    made_by = {"Relu": nn.ReLU, "Sigmoid": nn.Sigmoid, "Tanh": nn.Tanh, "HardSwish": nn.Hardswish}
    return made_by[node.op_type]() if node.op_type in made_by else None
