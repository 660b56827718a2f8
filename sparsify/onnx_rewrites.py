"""Rewrites of an exported ONNX graph that let onnxruntime's integer kernels take hold.

Each is a function on the model proto alone, changes it in place, leaves the values it computes as they were, and can be
run twice. `rewrite` runs them in the order in which they build on each other.

Where quantization stands in the file decides what onnxruntime fuses: an operator runs in integers when *all* its inputs
come straight from DequantizeLinear and its output goes straight into QuantizeLinear.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

__all__: list[str] = []

BATCH = "batch"
"""The name of the dynamic batch axis in a file."""


def rewrite(model: ModelProto) -> None:
    """All of them, and the metadata of tracing (stack traces with the paths of the exporting machine) removed."""
    clear_traces(model)
    reduce_mean_to_global_average_pool(model)
    quantize_before_flatten(model)
    linear_as_gemm(model)
    dequantize_after_movement(model)
    drop_requantization(model)
    state_zero_points(model)
    remove_unused(model)


def clear_traces(model: ModelProto) -> None:
    """Node names become "<layer>/<operator>"; stack traces, value_info and documentation go.

    Value_info: the exporter's can be stale, and onnxruntime fuses SkipLayerNorm worse where there is any.
    """
    seen: dict[str, int] = defaultdict(int)
    for node in model.graph.node:
        scopes = next((entry.value for entry in node.metadata_props if entry.key.endswith("name_scopes")), None)
        if scopes is not None:
            # "['', 'layer1', 'layer1.conv', 'conv2d']": modules from the outermost inwards, then the operation.
            modules = re.findall(r"'([^']*)'", scopes)[:-1]
            layer = modules[-1] if modules else ""
            if node.op_type in _LAYERS and len(node.input) > 1 and node.input[1].endswith(".weight"):
                # A convolution that took its BatchNorm in bears the scope of the latter; its weight knows better.
                layer = node.input[1].removesuffix(".weight")
            name = f"{layer}/{node.op_type}" if layer else node.op_type
            seen[name] += 1
            node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"
        node.ClearField("doc_string")
        del node.metadata_props[:]
    graph = model.graph
    for values in (graph.input, graph.output, graph.initializer):
        for value in values:
            del value.metadata_props[:]
            value.ClearField("doc_string")
    del graph.value_info[:]
    del graph.metadata_props[:]
    del model.metadata_props[:]


def rename(model: ModelProto, names: dict[str, str]) -> None:
    """Values get other names wherever they stand: {old: new}; the caller sees to it that the new ones are free."""
    graph = model.graph
    for node in graph.node:
        for values in (node.input, node.output):
            for i, name in enumerate(values):
                if name in names:
                    values[i] = names[name]
    for infos in (graph.input, graph.output, graph.initializer, graph.value_info):
        for info in infos:
            info.name = names.get(info.name, info.name)


def name_dimensions(model: ModelProto, batched: Iterable[str]) -> None:
    """The symbols of axis 0 of the inputs `batched` are called "batch", also within outputs such as "4*batch"."""
    inputs = {value.name: value for value in model.graph.input}
    symbols = {inputs[name].type.tensor_type.shape.dim[0].dim_param for name in batched if name in inputs} - {""}
    if not symbols:
        return
    pattern = re.compile(r"\b(" + "|".join(re.escape(symbol) for symbol in sorted(symbols)) + r")\b")
    for value in [*model.graph.input, *model.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = pattern.sub(BATCH, dim.dim_param)


def reduce_mean_to_global_average_pool(model: ModelProto) -> None:
    """ReduceMean over all spatial axes, which AdaptiveAvgPool(1) exports as, becomes GlobalAveragePool.

    onnxruntime has an integer kernel for the latter only.
    """
    graph = _Graph(model)
    for node in list(model.graph.node):
        if node.op_type != "ReduceMean" or len(node.input) < 2:
            continue
        axes = graph.constant(node.input[1])
        shape = graph.shape(node.input[0])
        if axes is None or shape is None or len(shape) not in (3, 4, 5):
            continue
        if sorted(int(axis) % len(shape) for axis in axes.reshape(-1)) != list(range(2, len(shape))):
            continue
        source, target = node.input[0], node.output[0]
        name = node.name.replace("ReduceMean", "GlobalAveragePool")
        if _integer(node, "keepdims", 1):
            graph.replace(node, [helper.make_node("GlobalAveragePool", [source], [target], name=name)])
        else:
            pooled = graph.fresh(f"{target}_pooled")
            graph.replace(
                node,
                [
                    helper.make_node("GlobalAveragePool", [source], [pooled], name=name),
                    helper.make_node("Flatten", [pooled], [target], name=f"{name}/Flatten", axis=1),
                ],
            )
    graph.finish()


def quantize_before_flatten(model: ModelProto) -> None:
    """A Flatten that only a QuantizeLinear reads moves integers instead: they are quantized before it.

    What makes the tensor, as the GlobalAveragePool of a mean over the image, can then run in integers. Of Reshape and
    Transpose onnxruntime sees to it by itself.
    """
    graph = _Graph(model)
    for node in list(model.graph.node):
        readers = graph.readers(node.output[0]) if node.op_type == "Flatten" else []
        if len(readers) != 1 or readers[0].op_type != "QuantizeLinear" or graph.is_output(node.output[0]):
            continue
        quantize = readers[0]
        if not graph.per_tensor(quantize):
            continue
        integers = graph.fresh(f"{node.input[0]}_int")
        graph.replace(node, [_like(quantize, [node.input[0], *quantize.input[1:]], [integers])])
        graph.replace(quantize, [_like(node, [integers], [quantize.output[0]])])
    graph.finish()


def linear_as_gemm(model: ModelProto) -> None:
    """MatMul + Add of a quantized input of any rank with quantized weights becomes Reshape, Gemm, Reshape.

    Gemm takes the int32 bias into its kernel, MatMul leaves an Add in float: 2.52 against 2.26 times the float speed in
    an encoder of 4 layers and width 256. The Reshape stands before DequantizeLinear, on integers, once for all readers
    of one quantized tensor (query, key and value share it).
    """
    graph = _Graph(model)
    rows_of: dict[str, str] = {}
    for node in list(model.graph.node):
        if node.op_type != "MatMul":
            continue
        activation = graph.producer.get(node.input[0])
        weight = _quantized_weight(graph, node.input[1])
        shape = graph.shape(node.input[0])
        if weight is None or shape is None or activation is None or activation.op_type != "DequantizeLinear":
            continue
        if graph.is_initializer(activation.input[0]) or not graph.per_tensor(activation):
            continue
        values, transposed, inner, outer = weight
        last, bias = node, None
        readers = graph.readers(node.output[0])
        if len(readers) == 1 and readers[0].op_type == "Add" and not graph.is_output(node.output[0]):
            other = next((name for name in readers[0].input if name != node.output[0]), None)
            dequantized = graph.producer.get(other) if other else None
            if dequantized is not None and dequantized.op_type == "DequantizeLinear":
                stored = graph.initializers.get(dequantized.input[0])
                if stored is not None and stored.data_type == TensorProto.INT32 and list(stored.dims) == [outer]:
                    last, bias = readers[0], other
        target, source = last.output[0], node.input[0]
        rank2 = len(shape) == 2
        nodes: list[NodeProto] = []
        if not rank2 and source not in rows_of:
            integers, rows = graph.fresh(f"{source}_int_rows"), graph.fresh(f"{source}_rows")
            reshape = [activation.input[0], graph.int64([-1, inner])]
            nodes += [
                helper.make_node("Reshape", reshape, [integers], name=f"{activation.name}/Reshape"),
                helper.make_node(
                    "DequantizeLinear", [integers, *activation.input[1:]], [rows], name=f"{node.name}/rows"
                ),
            ]
            rows_of[source] = rows
        result = target if rank2 else graph.fresh(f"{target}_rows")
        operands = [source if rank2 else rows_of[source], values, *([bias] if bias else [])]
        name = re.sub(r"MatMul(_\d+)?$", r"Gemm\1", node.name)
        nodes.append(helper.make_node("Gemm", operands, [result], name=name, transB=int(transposed)))
        if not rank2:
            nodes += _reshape_like(graph, source, shape[:-1], outer, result, target, name)
        graph.replace(last, nodes)
        if last is not node:
            graph.replace(node, [])
    graph.finish()


def dequantize_after_movement(model: ModelProto) -> None:
    """MaxPool, Flatten, Reshape, Transpose and the like move the integers; DequantizeLinear follows them.

    The same as a pair of QuantizeLinear and DequantizeLinear with the scale repeated after each, with less to fuse.
    Exact: they only move values, and the maximum does not care about a positive scale.
    """
    graph = _Graph(model)
    pending = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    while pending:
        dequantize = pending.pop()
        if graph.is_initializer(dequantize.input[0]) or not graph.per_tensor(dequantize):
            continue
        for reader in graph.readers(dequantize.output[0]):
            if reader.op_type not in _MOVEMENT or reader.input[0] != dequantize.output[0] or len(reader.output) != 1:
                continue
            moved = graph.fresh(f"{reader.output[0]}_int")
            mover = _like(reader, [dequantize.input[0], *reader.input[1:]], [moved])
            after = _like(dequantize, [moved, *dequantize.input[1:]], [reader.output[0]])
            after.name = f"{reader.name}/DequantizeLinear"
            graph.replace(reader, [mover, after])
            pending.append(after)
    graph.finish()


def drop_requantization(model: ModelProto) -> None:
    """DequantizeLinear followed by QuantizeLinear with the same scale and zero point is nothing."""
    graph = _Graph(model)
    for node in list(model.graph.node):
        above = graph.producer.get(node.input[0]) if node.op_type == "QuantizeLinear" else None
        if above is None or above.op_type != "DequantizeLinear" or graph.is_output(node.output[0]):
            continue
        if not (graph.per_tensor(above) and graph.per_tensor(node)) or len(above.input) != len(node.input):
            continue
        if any(not graph.same_constant(a, b) for a, b in zip(above.input[1:], node.input[1:], strict=True)):
            continue
        for reader in graph.readers(node.output[0]):
            for i, name in enumerate(reader.input):
                if name == node.output[0]:
                    reader.input[i] = above.input[0]
        graph.replace(node, [])
    graph.finish()


def state_zero_points(model: ModelProto) -> None:
    """Weights get the zero points, all 0, that their DequantizeLinear left out: onnxruntime makes no QGemm without."""
    graph = _Graph(model)
    zeros: dict[tuple[int, ...], str] = {}
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or len(node.input) != 2:
            continue
        stored = graph.initializers.get(node.input[0])
        scale = graph.initializers.get(node.input[1])
        if stored is None or scale is None or stored.data_type not in (TensorProto.INT8, TensorProto.UINT8):
            continue
        key = (stored.data_type, *scale.dims)
        if key not in zeros:
            kind = helper.tensor_dtype_to_np_dtype(stored.data_type)
            name = graph.fresh("_".join(["zero_point", str(kind), *(str(dim) for dim in scale.dims)]))
            model.graph.initializer.append(numpy_helper.from_array(np.zeros(tuple(scale.dims), kind), name))
            zeros[key] = name
        node.input.append(zeros[key])


def remove_unused(model: ModelProto) -> None:
    """Nodes and initializers that no output needs go; the order becomes one in which values precede their readers."""
    graph = model.graph
    producer = {name: node for node in graph.node for name in node.output}
    order: list[NodeProto] = []
    placed: set[int] = set()
    stack = [(producer[value.name], False) for value in reversed(graph.output) if value.name in producer]
    while stack:
        node, ready = stack.pop()
        if id(node) in placed:
            continue
        if ready:
            placed.add(id(node))
            order.append(node)
            continue
        stack.append((node, True))
        # Reversed, so that the inputs come in their own order: as near to the original order as depth first can be.
        stack.extend((producer[name], False) for name in reversed(_all_inputs(node)) if name in producer)
    used = {name for node in order for name in _all_inputs(node)} | {value.name for value in graph.output}
    for i in reversed(range(len(graph.initializer))):
        if graph.initializer[i].name not in used:
            del graph.initializer[i]
    nodes = [_copy(node) for node in order]
    del graph.node[:]
    graph.node.extend(nodes)


_LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_MOVEMENT = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "MaxPool", "Slice", "Gather"})
_MOVEMENT |= {"DepthToSpace", "SpaceToDepth", "Expand", "Tile", "Identity"}


class _Graph:
    """Who makes and who reads each value of a model while it is being rewritten. `finish` writes the nodes back."""

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.initializers: dict[str, TensorProto] = {tensor.name: tensor for tensor in model.graph.initializer}
        self.outputs = {value.name for value in model.graph.output}
        self.producer: dict[str, NodeProto] = {}
        # The replaced node is kept with its replacement: a node that nobody holds loses its id.
        self.changes: dict[int, tuple[NodeProto, list[NodeProto]]] = {}
        self.readers_of: dict[str, list[NodeProto]] = defaultdict(list)
        self.names = set(self.initializers) | {value.name for value in model.graph.input}
        self.shapes: dict[str, list[int | None]] | None = None
        for node in model.graph.node:
            self._add(node)

    def _add(self, node: NodeProto) -> None:
        for name in node.output:
            self.producer[name] = node
            self.names.add(name)
        for name in dict.fromkeys(_all_inputs(node)):
            self.readers_of[name].append(node)

    def replace(self, node: NodeProto, nodes: list[NodeProto]) -> None:
        """`nodes` stand where `node` stood."""
        self.changes[id(node)] = (node, nodes)
        for name in node.output:
            if self.producer.get(name) is node:
                del self.producer[name]
        for name in dict.fromkeys(_all_inputs(node)):
            self.readers_of[name] = [reader for reader in self.readers_of[name] if reader is not node]
        for new in nodes:
            self._add(new)

    def finish(self) -> None:
        """Puts the changes into the model, in an order that can be computed."""
        if not self.changes:
            return
        nodes: list[NodeProto] = []
        stack = list(reversed(self.model.graph.node))
        while stack:
            node = stack.pop()
            if id(node) in self.changes:
                stack.extend(reversed(self.changes[id(node)][1]))
            else:
                nodes.append(node)
        copies = [_copy(node) for node in nodes]
        del self.model.graph.node[:]
        self.model.graph.node.extend(copies)
        remove_unused(self.model)

    def readers(self, name: str) -> list[NodeProto]:
        return list(self.readers_of.get(name, []))

    def is_initializer(self, name: str) -> bool:
        return name in self.initializers

    def is_output(self, name: str) -> bool:
        return name in self.outputs

    def per_tensor(self, node: NodeProto) -> bool:
        """Whether a Q or DQ node has one scale that is a constant."""
        scale = self.initializers.get(node.input[1])
        return scale is not None and len(scale.dims) == 0

    def constant(self, name: str) -> np.ndarray | None:
        """The value of an initializer or Constant node; None where it is computed."""
        if name in self.initializers:
            return numpy_helper.to_array(self.initializers[name])
        node = self.producer.get(name)
        if node is not None and node.op_type == "Constant":
            attribute = node.attribute[0]
            if attribute.name == "value":
                return numpy_helper.to_array(attribute.t)
            if attribute.name in ("value_ints", "value_int"):
                return np.asarray(helper.get_attribute_value(attribute))
        return None

    def same_constant(self, one: str, other: str) -> bool:
        if one == other:
            return True
        a, b = self.constant(one), self.constant(other)
        return a is not None and b is not None and a.dtype == b.dtype and np.array_equal(a, b)

    def shape(self, name: str) -> list[int | None] | None:
        """Inferred by onnx, not read from the exporter's value_info, which can be stale; None where it is not known."""
        if self.shapes is None:
            inferred = onnx.shape_inference.infer_shapes(_skeleton(self.model), data_prop=True).graph
            values = [*inferred.value_info, *inferred.input, *inferred.output]
            self.shapes = {
                value.name: [dim.dim_value if dim.HasField("dim_value") else None for dim in shape.dim]
                for value in values
                if value.type.tensor_type.HasField("shape")
                for shape in [value.type.tensor_type.shape]
            }
        if name in self.initializers:
            return list(self.initializers[name].dims)
        return self.shapes.get(name)

    def fresh(self, name: str) -> str:
        candidate, count = name, 1
        while candidate in self.names:
            count += 1
            candidate = f"{name}_{count}"
        self.names.add(candidate)
        return candidate

    def int64(self, values: list[int]) -> str:
        """The name of an initializer with these values; one for all that ask for the same."""
        name = "shape_" + "_".join(str(value).replace("-", "m") for value in values)
        if name not in self.initializers:
            tensor = numpy_helper.from_array(np.asarray(values, dtype=np.int64), name)
            self.model.graph.initializer.append(tensor)
            self.initializers[name] = tensor
            self.names.add(name)
        return name


def _quantized_weight(graph: _Graph, name: str) -> tuple[str, bool, int, int] | None:
    """(name of the dequantized weight, whether it is stored (out, in), in, out) of a MatMul's second input."""
    node = graph.producer.get(name)
    transposed = node is not None and node.op_type == "Transpose"
    if node is not None and transposed:
        name = node.input[0]
        node = graph.producer.get(name)
    if node is None or node.op_type != "DequantizeLinear":
        return None
    stored = graph.initializers.get(node.input[0])
    if stored is None or len(stored.dims) != 2 or stored.data_type not in (TensorProto.INT8, TensorProto.UINT8):
        return None
    first, second = stored.dims
    return (name, True, second, first) if transposed else (name, False, first, second)


def _reshape_like(
    graph: _Graph, source: str, leading: list[int | None], outer: int, rows: str, target: str, name: str
) -> list[NodeProto]:
    """Nodes that give `rows`, of shape (product of leading, outer), the shape (*leading, outer)."""
    if leading.count(None) <= 1:
        shape = graph.int64([-1 if dim is None else dim for dim in leading] + [outer])
        return [helper.make_node("Reshape", [rows, shape], [target], name=f"{name}/Reshape")]
    dims, full = graph.fresh(f"{target}_dims"), graph.fresh(f"{target}_shape")
    return [
        helper.make_node("Shape", [source], [dims], name=f"{name}/Shape", start=0, end=-1),
        helper.make_node("Concat", [dims, graph.int64([outer])], [full], name=f"{name}/Concat", axis=0),
        helper.make_node("Reshape", [rows, full], [target], name=f"{name}/Reshape"),
    ]


def _skeleton(model: ModelProto) -> ModelProto:
    """The model with the values of large initializers left out: shapes can be inferred without copying weights."""
    copy = ModelProto()
    copy.ir_version = model.ir_version
    copy.opset_import.extend(model.opset_import)
    copy.functions.extend(model.functions)
    graph = copy.graph
    graph.name = model.graph.name
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    known = {value.name for value in model.graph.input}
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.INT64 or tensor.name in known:
            graph.initializer.append(tensor)
        else:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return copy


def _all_inputs(node: NodeProto) -> list[str]:
    """What a node reads, what its subgraphs (If, Loop) read of the values around them included."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        for graph in [attribute.g, *attribute.graphs]:
            for inner in graph.node:
                names += _all_inputs(inner)
    return names


def _like(node: NodeProto, inputs: list[str], outputs: list[str]) -> NodeProto:
    copy = _copy(node)
    del copy.input[:], copy.output[:]
    copy.input.extend(inputs)
    copy.output.extend(outputs)
    return copy


def _copy(node: NodeProto) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    return copy


def _integer(node: NodeProto, name: str, default: int) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), default)
