"""Rewrites of an exported ONNX graph that let onnxruntime's integer kernels take hold.

Each is a function on the model proto alone, changes it in place, leaves the values it computes as they were, and can be
run twice. `rewrite` runs them in the order in which they build on each other.

Where quantization stands in the file decides what onnxruntime fuses: an operator runs in integers when *all* its inputs
come straight from DequantizeLinear and its output goes straight into QuantizeLinear.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import cast

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from sparsify.onnx import rewrite_attention, rewrite_transposed_convs
from sparsify.onnx.fusion import Fusion
from sparsify.onnx.graph import PROPAGATED, Graph, copied, integer, like, only_moves, remove_unused
from sparsify.onnx.rewrite_activations import hard_sigmoid_as_add, numbers_as_integers, tanh_as_sigmoid

__all__: list[str] = []


def rewrite(model: ModelProto) -> None:
    """Runs all of them; removes the metadata of tracing (stack traces with the paths of the exporting machine)."""
    clear_traces(model)
    rewrite_graph(model)


def rewrite_graph(model: ModelProto) -> None:
    """Runs all that change the graph alone."""
    rewrite_attention.transpose_keys(model)
    rewrite_attention.drop_guards(model)
    reduce_mean_to_global_average_pool(model)
    quantize_before_flatten(model)
    dequantize_after_movement(model)
    linear_as_gemm(model)
    rewrite_attention.rows(model)
    dequantize_after_movement(model)
    quantize_behind_products(model)
    drop_requantization(model)
    hard_sigmoid_as_add(model)
    tanh_as_sigmoid(model)
    numbers_as_integers(model)
    rewrite_transposed_convs.transposed_convolutions(model)
    state_zero_points(model)
    part_float_results(model)
    part_transposes(model)
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
            if node.op_type in _WEIGHTED_OPERATORS and len(node.input) > 1 and node.input[1].endswith(".weight"):
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


def unique_names(model: ModelProto) -> None:
    """No two nodes have one name, which onnxruntime refuses: a layer that is called on two ranks gives two kinds of
    nodes, which the rewrites make one."""
    taken = {node.name for node in model.graph.node}
    seen: set[str] = set()
    for node in model.graph.node:
        if node.name and node.name in seen:
            number = 2
            while f"{node.name}_{number}" in taken:
                number += 1
            node.name = f"{node.name}_{number}"
            taken.add(node.name)
        seen.add(node.name)


def name_dimensions(model: ModelProto, free: Mapping[str, Mapping[int, str]]) -> None:
    """Free axes get their names in `free`, by input and axis; also within axes of outputs, such as "4*batch"."""
    names: dict[str, str] = {}
    for value in model.graph.input:
        for axis, name in free.get(value.name, {}).items():
            if symbol := value.type.tensor_type.shape.dim[axis].dim_param:
                names.setdefault(symbol, name)
    if not names:
        return
    pattern = re.compile(r"\b(" + "|".join(re.escape(symbol) for symbol in sorted(names)) + r")\b")
    for value in [*model.graph.input, *model.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = pattern.sub(lambda hit: names[hit[0]], dim.dim_param)


def reduce_mean_to_global_average_pool(model: ModelProto) -> None:
    """ReduceMean over all spatial axes, which AdaptiveAvgPool(1) exports as, becomes GlobalAveragePool.

    onnxruntime has an integer kernel for the latter only.
    """
    graph = Graph(model)
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
        if integer(node, "keepdims", 1):
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
    graph = Graph(model)
    for node in list(model.graph.node):
        readers = graph.readers(node.output[0]) if node.op_type == "Flatten" else []
        if len(readers) != 1 or readers[0].op_type != "QuantizeLinear" or graph.is_output(node.output[0]):
            continue
        quantize = readers[0]
        if not graph.per_tensor(quantize):
            continue
        integers = graph.fresh(f"{node.input[0]}_int")
        graph.replace(node, [like(quantize, [node.input[0], *quantize.input[1:]], [integers])])
        graph.replace(quantize, [like(node, [integers], [quantize.output[0]])])
    graph.finish()


def linear_as_gemm(model: ModelProto) -> None:
    """MatMul + Add of a quantized input of any rank with quantized weights becomes Reshape, Gemm, Reshape.

    Gemm takes the int32 bias into its kernel, MatMul leaves an Add in float: 2.52 against 2.26 times the float speed in
    an encoder of 4 layers and width 256. The Reshape stands before DequantizeLinear, on integers, once for all readers
    of one quantized tensor (query, key and value share it).
    """
    graph = Graph(model)
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
    Exact: they only move values, and the maximum and its place do not care about a positive scale. A Pad with 0 pads
    integers with the zero point.
    """
    graph = Graph(model)
    pending = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    while pending:
        dequantize = pending.pop()
        if graph.is_initializer(dequantize.input[0]) or not graph.per_tensor(dequantize):
            continue
        for reader in graph.readers(dequantize.output[0]):
            padded = _pads_with_zero(graph, reader)
            if not (padded or only_moves(reader)) or reader.input[0] != dequantize.output[0] or not all(reader.output):
                continue
            # The second result of MaxPool is no value but its place, an integer of its own.
            values = reader.output[:1] if reader.op_type == "MaxPool" else reader.output
            moved = [graph.fresh(f"{name}_int") for name in values]
            others = list(reader.input[1:])
            if reader.op_type == "Pad":
                # The number that it puts in; other modes have none, and the type must be that of the integers.
                others[1:2] = [dequantize.input[2] if len(dequantize.input) > 2 else ""]
            mover = like(reader, [dequantize.input[0], *others], [*moved, *reader.output[len(moved) :]])
            behind = []
            for number, (integers, name) in enumerate(zip(moved, values, strict=True)):
                after = like(dequantize, [integers, *dequantize.input[1:]], [name])
                after.name = f"{reader.name}/DequantizeLinear{f'_{number}' if number else ''}"
                behind.append(after)
            graph.replace(reader, [mover, *behind])
            pending += behind
    graph.finish()


def _pads_with_zero(graph: Graph, node: NodeProto) -> bool:
    if node.op_type != "Pad" or only_moves(node):
        return False
    number = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(())
    return number is not None and not np.any(number)


def quantize_behind_products(model: ModelProto) -> None:
    """Quantizes the result of a product of integers before what moves it, where only a QuantizeLinear reads it then.

    onnxruntime does so by itself, but for Flatten. It rounds once then instead of twice, and the file is to say what is
    computed.
    """
    graph = Graph(model)
    for node in list(model.graph.node):
        if node.op_type not in ("Gemm", "MatMul"):
            continue
        sources = [graph.producer.get(name) for name in node.input[:2]]
        if any(source is None or source.op_type != "DequantizeLinear" for source in sources):
            continue
        movers: list[NodeProto] = []
        name, reader = node.output[0], None
        while not graph.is_output(name) and len(graph.readers(name)) == 1:
            reader = graph.readers(name)[0]
            if reader.op_type not in PROPAGATED | {"Flatten"} or reader.input[0] != name or len(reader.output) != 1:
                break
            movers.append(reader)
            name = reader.output[0]
        if not movers or reader is None or reader.op_type != "QuantizeLinear" or not graph.per_tensor(reader):
            continue
        names = [graph.fresh(f"{value}_int") for value in [node.output[0], *(mover.output[0] for mover in movers[:-1])]]
        names.append(reader.output[0])
        moved = [like(mover, [names[i], *mover.input[1:]], [names[i + 1]]) for i, mover in enumerate(movers)]
        graph.replace(reader, [])
        graph.replace(movers[0], [like(reader, [node.output[0], *reader.input[1:]], [names[0]]), moved[0]])
        for mover, new in zip(movers[1:], moved[1:], strict=True):
            graph.replace(mover, [new])
    graph.finish()


def drop_requantization(model: ModelProto) -> None:
    """Drops a QuantizeLinear behind a DequantizeLinear with the same scale and zero point."""
    graph = Graph(model)
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
    """Gives weights the zero points, all 0, that their DequantizeLinear left out: onnxruntime makes no QGemm without.

    Each weight has one of its own: where the CPU has no VNNI, onnxruntime cannot convert one that several weights share
    (`start_session`).
    """
    graph = Graph(model)
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or len(node.input) != 2:
            continue
        stored = graph.initializers.get(node.input[0])
        scale = graph.initializers.get(node.input[1])
        if stored is None or scale is None or stored.data_type not in (TensorProto.INT8, TensorProto.UINT8):
            continue
        zeros = np.zeros(tuple(scale.dims), helper.tensor_dtype_to_np_dtype(stored.data_type))
        name = graph.fresh(f"{stored.name}_zero_point")
        model.graph.initializer.append(numpy_helper.from_array(zeros, name))
        node.input.append(name)


def part_float_results(model: ModelProto) -> None:
    """A Flatten parts a product of integers that gives floats from the quantizers and ReLUs that read it.

    A residual stream that is also quantized for the next layer, or a ReLU before a LayerNorm, left the product in float
    behind DequantizeLinears: onnxruntime 1.31.1 runs a Gemm or MatMul in integers where a QuantizeLinear reads its
    result alone, or none does; a Relu or Clip counts as what stands behind it. Over a Flatten, which copies nothing, it
    does not look. Needless once its CheckQDQNodes (qdq_selectors.cc) takes other readers beside a QuantizeLinear.
    """
    products = [each.node.output[0] for each in Fusion(model).fused.values() if each.quantize is None]
    graph = Graph(model)
    for name in products:
        product = graph.producer[name]
        parted = [each for each in graph.readers(name) if each.op_type in ("QuantizeLinear", "Relu", "Clip")]
        shape = graph.shape(name)
        if not parted or shape is None or len(shape) < 2:
            continue
        rank2, outer = len(shape) == 2, shape[-1]
        if not rank2 and outer is None:
            continue
        flat = graph.fresh(f"{name}_flat")
        flatten = helper.make_node("Flatten", [name], [flat], name=f"{product.name}/Flatten", axis=len(shape) - 1)
        graph.replace(product, [copied(product), flatten])
        for reader in parted:
            target = reader.output[0]
            result = target if rank2 else graph.fresh(f"{target}_flat")
            nodes = [like(reader, [flat, *reader.input[1:]], [result])]
            if not rank2:
                nodes += _reshape_like(graph, name, shape[:-1], cast(int, outer), result, target, reader.name)
            graph.replace(reader, nodes)
    graph.finish()


def part_transposes(model: ModelProto) -> None:
    """A Reshape to the same shape parts a Transpose that moves the first dimension inwards from the MatMul behind it.

    With a Cast between the two, of the file or for float16, which x86 computes in float32, onnxruntime 1.31.1 ends the
    process when it opens the file: its MatmulTransposeFusion looks at a shape that the Cast's result does not have. So
    is every attention in float16 whose first dimension is the sequence. Needless once it looks whether there is one.
    """
    half = any(tensor.data_type == TensorProto.FLOAT16 for tensor in model.graph.initializer)
    half |= any(value.type.tensor_type.elem_type == TensorProto.FLOAT16 for value in model.graph.input)
    graph = Graph(model)
    for node in list(model.graph.node):
        order = next((list(entry.ints) for entry in node.attribute if entry.name == "perm"), [])
        rank, readers = len(order), graph.readers(node.output[0])
        if node.op_type != "Transpose" or rank < 3 or order != [*range(1, rank - 1), 0, rank - 1]:
            continue
        if any(reader.op_type == "Cast" or (half and reader.op_type != "Reshape") for reader in readers):
            moved = graph.fresh(f"{node.output[0]}_moved")
            same = [moved, graph.int64([0] * rank)]
            graph.replace(
                node,
                [
                    like(node, node.input, [moved]),
                    helper.make_node("Reshape", same, node.output, name=f"{node.name}/Reshape"),
                ],
            )
    graph.finish()


_WEIGHTED_OPERATORS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


def _quantized_weight(graph: Graph, name: str) -> tuple[str, bool, int, int] | None:
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
    graph: Graph, source: str, leading: list[int | None], outer: int, rows: str, target: str, name: str
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
