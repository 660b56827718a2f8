"""Transposed convolutions between integers as convolutions: onnxruntime has an integer kernel for the latter only.

Seen in 1.31.1; needless once it has one for ConvTranspose: https://github.com/microsoft/onnxruntime/issues/8988.

With stride s each pixel of the input makes a block of s pixels of the output along every axis. A convolution with
s times the channels on every axis gives each pixel of a block as a channel of its own, by the weights that meet there;
what follows moves integers alone. Every sum is of the same products, so nothing changes but the kernel that runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from sparsify.onnx.graph import Graph, integer, like, rename
from sparsify.onnx.runtime import FILE_ELEMENTS

__all__: list[str] = []


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a transposed convolution, and of the convolution that takes its place.

    The output is what all pixels reach, (n - 1) stride + (kernel - 1) dilation + 1 wide, with `ahead` cut off in front,
    `behind` cut off at the end and `added` there before.
    """

    kernel: int
    stride: int = 1
    dilation: int = 1
    ahead: int = 0
    behind: int = 0
    added: int = 0

    @property
    def extent(self) -> int:
        """Number of pixels of the output that one of the input reaches."""
        return (self.kernel - 1) * self.dilation + 1

    @property
    def taps(self) -> int:
        """The convolution's kernel. Where blocks are wider than 1, the gaps of a dilated kernel become zeros."""
        return self.kernel if self.stride == 1 else -(-self.extent // self.stride)

    @property
    def spacing(self) -> int:
        """The convolution's dilation."""
        return self.dilation if self.stride == 1 else 1

    @property
    def reach(self) -> int:
        return (self.taps - 1) * self.spacing

    @property
    def pads(self) -> tuple[int, int]:
        """The convolution's, so that as few blocks as possible are computed to be cut off."""
        last = -(-(self.extent + self.added - self.behind) // self.stride)
        return max(0, self.reach - self.ahead // self.stride), max(0, last - 1)

    @property
    def crop(self) -> tuple[int, int]:
        """Pixels of the first and last blocks that are not wanted."""
        before, after = self.pads
        first = self.ahead - self.stride * (self.reach - before)
        return first, self.stride * (after + 1) - self.extent - self.added + self.behind

    def blocks(self, size: int) -> int:
        """Number of blocks that the convolution gives for an input of `size` pixels."""
        return size + sum(self.pads) - self.reach


@dataclass(frozen=True)
class _Found:
    """A transposed convolution that can be a convolution, and what stands around it."""

    source: NodeProto
    weight: NodeProto
    bias: NodeProto | None
    quantize: NodeProto
    axes: tuple[Axis, ...]
    group: int
    spatial: tuple[int, ...]


def transposed_convolutions(model: ModelProto) -> None:
    """ConvTranspose of uint8 with int8 weights whose result is quantized becomes Conv, Reshape, Transpose and Slice.

    The file notes how many numbers the layer has in torch: biases stand there once for every pixel of a block, and
    weights with zeros between them where the stride does not divide the kernel. Left as it is: where the result goes on
    in float, int8 activations (which nothing on x86 runs in integers), and sizes that are not known but the batch's.

    Moving one axis at a time, onnxruntime copies rows: 1.0 ms for 64 channels of 112 x 112, in which one Transpose of
    six dimensions takes 4, DepthToSpace 1.4 (not before version 1.21) and the ConvTranspose in float 4.
    """
    graph = Graph(model)
    names: dict[str, str] = {}
    elements: dict[str, int] = {}
    made: dict[tuple[str, str, tuple[Axis, ...], int], list[str]] = {}
    for node in list(model.graph.node):
        found = _found_convs(graph, node)
        if found is None:
            continue
        key = (found.weight.output[0], found.bias.output[0] if found.bias else "", found.axes, found.group)
        nodes: list[NodeProto] = []
        if key not in made:
            made[key] = _operands(graph, found, nodes, names, elements)
        pads = [axis.pads for axis in found.axes]
        conv = helper.make_node(
            "Conv",
            [node.input[0], *made[key]],
            node.output,
            name=graph.renamed(node, "ConvTranspose", "Conv"),
            kernel_shape=[axis.taps for axis in found.axes],
            pads=[before for before, _ in pads] + [after for _, after in pads],
            dilations=[axis.spacing for axis in found.axes],
            group=found.group,
        )
        graph.replace(node, [*nodes, conv])
        target = found.quantize.output[0]
        moves = _moves_pixels(graph, conv, found, target)
        if moves:
            blocks = graph.fresh(f"{target}_blocks")
            moves[0].input[0] = blocks
            graph.replace(found.quantize, [like(found.quantize, found.quantize.input, [blocks]), *moves])
    graph.finish()
    # What was rewritten is gone, so that its name is free again.
    taken = {tensor.name for tensor in model.graph.initializer}
    short: dict[str, str] = {}
    for new, old in names.items():
        if new in taken and old not in taken:
            short[new] = old
            taken.add(old)
    rename(model, short)
    if elements:
        noted = {short.get(name, name): count for name, count in elements.items()}
        model.metadata_props.add(key=FILE_ELEMENTS, value=json.dumps(noted))


def _found_convs(graph: Graph, node: NodeProto) -> _Found | None:
    if (
        node.op_type != "ConvTranspose"
        or _has_attribute(node, "output_shape")
        or _text_attribute(node, "auto_pad") not in ("", "NOTSET")
    ):
        return None
    source, weight = (graph.producer.get(name) for name in node.input[:2])
    bias = graph.producer.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    if source is None or source.op_type != "DequantizeLinear" or len(source.input) < 3 or not graph.per_tensor(source):
        return None
    zero = graph.constant(source.input[2])
    stored = _integers(graph, weight, TensorProto.INT8)
    if zero is None or zero.dtype != np.uint8 or graph.is_initializer(source.input[0]) or stored is None:
        return None
    assert weight is not None
    if not graph.per_tensor(weight) and integer(weight, "axis", 1) % stored.ndim != 1:
        return None
    if len(node.input) > 2 and node.input[2] and _integers(graph, bias, TensorProto.INT32) is None:
        return None
    quantize = _quantizer(graph, node.output[0])
    shape = graph.shape(node.input[0])
    if quantize is None or shape is None or None in shape[2:]:
        return None
    rank = stored.ndim - 2
    strides, dilations, added = (
        _list(node, name, [default] * rank)
        for name, default in (("strides", 1), ("dilations", 1), ("output_padding", 0))
    )
    pads = _list(node, "pads", [0] * 2 * rank)
    axes = tuple(map(Axis, stored.shape[2:], strides, dilations, pads[:rank], pads[rank:], added))
    group = integer(node, "group", 1)
    return _Found(source, weight, bias, quantize, axes, group, tuple(int(size or 0) for size in shape[2:]))


def _integers(graph: Graph, dequantize: NodeProto | None, kind: int) -> NDArray[np.generic] | None:
    """Stored integers of one type that a DequantizeLinear reads; None where it is another, or 0 is not their 0."""
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or integer(dequantize, "block_size", 0):
        return None
    stored = graph.initializers.get(dequantize.input[0])
    if stored is None or stored.data_type != kind or graph.constant(dequantize.input[1]) is None:
        return None
    if len(dequantize.input) > 2:
        zero = graph.constant(dequantize.input[2])
        if zero is None or zero.any():
            return None
    return numpy_helper.to_array(stored)


def _quantizer(graph: Graph, name: str) -> NodeProto | None:
    """The QuantizeLinear that alone reads a value, or its Relu or Clip."""
    while not graph.is_output(name):
        readers = graph.readers(name)
        if len(readers) != 1 or readers[0].input[0] != name:
            return None
        if readers[0].op_type == "QuantizeLinear":
            return readers[0] if graph.per_tensor(readers[0]) else None
        if readers[0].op_type not in ("Relu", "Clip"):
            return None
        name = readers[0].output[0]
    return None


def in_pixel_blocks(weight: NDArray[np.generic], axes: Sequence[Axis], group: int) -> NDArray[np.generic]:
    """The weight (in, out / group, *kernel) of a transposed convolution as that of a convolution.

    Its shape is (out * strides, in / group, *taps): a channel's pixels of a block follow one another.
    """
    inner, outer = weight.shape[0] // group, weight.shape[1]
    wide = np.zeros((*weight.shape[:2], *(axis.taps * axis.stride for axis in axes)), weight.dtype)
    spots = [slice(None, axis.extent, axis.dilation // axis.spacing) for axis in axes]
    wide[(slice(None), slice(None), *spots)] = weight
    rank = len(axes)
    apart = wide.reshape(group, inner, outer, *(size for axis in axes for size in (axis.taps, axis.stride)))
    taps, places = [3 + 2 * i for i in range(rank)], [4 + 2 * i for i in range(rank)]
    ordered = apart.transpose(0, 2, *places, 1, *taps)
    # A convolution runs through its kernel forwards.
    turned = np.flip(ordered, tuple(range(3 + rank, 3 + 2 * rank)))
    return np.ascontiguousarray(turned).reshape(-1, inner, *(axis.taps for axis in axes))


def _operands(
    graph: Graph, found: _Found, nodes: list[NodeProto], names: dict[str, str], elements: dict[str, int]
) -> list[str]:
    """The convolution's weight and bias, dequantized by what is added to `nodes`.

    Adds to `names` what each new initializer stands for, and to `elements` how many numbers that is.
    """
    pixels = math.prod(axis.stride for axis in found.axes)
    results = []
    for dequantize in (found.weight, found.bias):
        if dequantize is None:
            continue
        stored = graph.constant(dequantize.input[0])
        assert stored is not None
        weighty = dequantize is found.weight
        values = in_pixel_blocks(stored, found.axes, found.group) if weighty else np.repeat(stored, pixels)
        inputs = [_stored_weight(graph, names, dequantize.input[0], values)]
        if values.size != stored.size:
            elements[inputs[0]] = stored.size
        for name in dequantize.input[1:]:
            along = graph.constant(name)
            assert along is not None
            if along.ndim:
                # Of a weight each group has the same channels, and each channel its pixels.
                along = np.repeat(np.tile(along, found.group if weighty else 1), pixels)
            inputs.append(_stored_weight(graph, names, name, along))
        result = graph.fresh(f"{dequantize.output[0]}_blocks")
        node = like(dequantize, inputs, [result])
        for entry in list(node.attribute):
            if entry.name == "axis":
                node.attribute.remove(entry)
        # With a scale of rank 0 it says nothing.
        node.attribute.append(helper.make_attribute("axis", 0))
        nodes.append(node)
        results.append(result)
    return results


def _stored_weight(graph: Graph, names: dict[str, str], old: str, value: NDArray[np.generic]) -> str:
    before = graph.constant(old)
    if before is not None and before.shape == value.shape and np.array_equal(before, value):
        return old
    new = graph.value(graph.fresh(f"{old}_blocks"), value)
    names[new] = old
    return new


def _moves_pixels(graph: Graph, conv: NodeProto, found: _Found, target: str) -> list[NodeProto]:
    """Nodes that put the pixels of blocks side by side and cut off the edges; the first node's input is to be named."""
    axes = found.axes
    blocks = [axis.blocks(size) for axis, size in zip(axes, found.spatial, strict=True)]
    weight = graph.initializers[found.weight.input[0]]
    channels = weight.dims[1] * found.group
    nodes: list[NodeProto] = []

    def move(operator: str, *operands: str, **attributes: Any) -> None:
        result = graph.fresh(f"{target}_{operator.lower()}")
        source = nodes[-1].output[0] if nodes else ""
        name = f"{conv.name}/{operator}{f'_{len(nodes)}' if nodes else ''}"
        nodes.append(helper.make_node(operator, [source, *operands], [result], name=name, **attributes))

    done = 1
    for at in reversed(range(len(axes))):
        stride, size = axes[at].stride, math.prod(blocks[: at + 1])
        if stride > 1:
            outer = channels * math.prod(axis.stride for axis in axes[:at])
            shape, order = [0, outer, stride, size], [0, 1, 3, 2]
            move("Reshape", graph.int64([*shape, done] if done > 1 else shape))
            move("Transpose", perm=[*order, 4] if done > 1 else order)
        done *= blocks[at] * stride
    if nodes:
        whole = [count * axis.stride for count, axis in zip(blocks, axes, strict=True)]
        move("Reshape", graph.int64([0, channels, *whole]))
    cut = [(at, *axis.crop) for at, axis in enumerate(axes) if any(axis.crop)]
    if cut:
        end = np.iinfo(np.int64).max
        ends = [-last if last else end for _, _, last in cut]
        move(
            "Slice",
            graph.int64([first for _, first, _ in cut]),
            graph.int64(ends),
            graph.int64([2 + at for at, _, _ in cut]),
        )
    if nodes:
        nodes[-1].output[0] = target
    return nodes


def _has_attribute(node: NodeProto, name: str) -> bool:
    return any(entry.name == name for entry in node.attribute)


def _text_attribute(node: NodeProto, name: str) -> str:
    return next((entry.s.decode() for entry in node.attribute if entry.name == name), "")


def _list(node: NodeProto, name: str, default: list[int]) -> list[int]:
    return next((list(entry.ints) for entry in node.attribute if entry.name == name), default)
