"""Keeps in float what the model has in float: weights beside integers, which onnxruntime would round by itself.

It rounds the weights of a Conv, ConvTranspose or Gemm to int8, one scale for all, where the operator reads a
DequantizeLinear and a QuantizeLinear follows it, and a bias likewise (WeightBiasQuantization,
https://github.com/microsoft/onnxruntime/pull/22969, seen in 1.31.1): outputs were up to 22 steps off. A Max of one
operand before the operator gives what it reads and ends the pattern, for the cost of a copy; Identity, Cast and a sum
with 0 would be removed before. Needless once onnxruntime does not round what is stored in float.
"""

from __future__ import annotations

from onnx import ModelProto, NodeProto, helper

from sparsify.onnx.graph import Graph, GraphView, only_moves

__all__: list[str] = []

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators with weights. A MatMul with an Add behind it is a Gemm to onnxruntime."""


def keep_float_layers(model: ModelProto) -> None:
    """Puts a Max of one operand before every operator whose float weights or bias onnxruntime would round.

    The values stay as they were. Run last: other rewrites look for DequantizeLinear right before an operator.
    """
    graph = Graph(model)
    for node in list(model.graph.node):
        if (
            node.op_type not in LAYERS
            or not _reads_integers(graph.view, node)
            or not _has_float_operand(graph.view, node)
        ):
            continue
        if not _is_quantized_behind(graph.view, node):
            continue
        kept = graph.fresh(f"{node.input[0]}_kept")
        name = f"{node.name or node.output[0]}/float"
        changed = NodeProto()
        changed.CopyFrom(node)
        changed.input[0] = kept
        graph.replace(node, [helper.make_node("Max", [node.input[0]], [kept], name=name), changed])
    graph.finish()


def is_barrier(node: NodeProto | None) -> bool:
    """True for a Max of one operand, which gives that."""
    return node is not None and node.op_type == "Max" and len(node.input) == 1


def is_kept_float(view: GraphView, node: NodeProto) -> bool:
    """True for an operator before which `keep_float_layers` put its Max."""
    return node.op_type in LAYERS and is_barrier(view.producer.get(node.input[0]))


def has_float_weight(view: GraphView, node: NodeProto) -> bool:
    """True if the weight of an operator is stored in float, or computed from such values alone."""
    return len(node.input) > 1 and _is_constant(view, node.input[1]) and not _is_rounded(view, node.input[1])


def _reads_integers(view: GraphView, node: NodeProto) -> bool:
    """True if an operator reads what a DequantizeLinear gives, moved or not."""
    source = view.producer.get(view.origin(node.input[0], only_moves))
    return source is not None and source.op_type == "DequantizeLinear" and source.input[0] not in view.initializers


def _has_float_operand(view: GraphView, node: NodeProto) -> bool:
    """True if its weight is a constant in float; or its bias is, beside a weight of integers."""
    if has_float_weight(view, node):
        # A MatMul alone is left as it is.
        return node.op_type != "MatMul" or _added(view, node) is not None
    if not _is_rounded(view, node.input[1]):
        return False
    bias = node.input[2] if node.op_type != "MatMul" and len(node.input) > 2 else _added(view, node)
    return bool(bias) and not _is_rounded(view, str(bias))


def _added(view: GraphView, node: NodeProto) -> str | None:
    """The constant that an Add right behind a MatMul adds."""
    if node.op_type != "MatMul":
        return None
    readers = view.consumers(node.output[0])
    if len(readers) != 1 or readers[0].op_type != "Add":
        return None
    other = next((name for name in readers[0].input if name != node.output[0]), None)
    return other if other is not None and _is_constant(view, other) else None


def _is_rounded(view: GraphView, name: str) -> bool:
    """True if a value is a DequantizeLinear of stored integers, moved or not."""
    source = view.producer.get(view.origin(name, only_moves))
    return source is not None and source.op_type == "DequantizeLinear" and source.input[0] in view.initializers


def _is_constant(view: GraphView, name: str) -> bool:
    """True if no input of the graph goes into a value: onnxruntime computes it beforehand."""
    waiting, seen = [name], {name}
    while waiting:
        one = waiting.pop()
        if one in view.inputs:
            return False
        node = view.producer.get(one)
        for read in node.input if node is not None else ():
            if read and read not in seen:
                seen.add(read)
                waiting.append(read)
    return True


def _is_quantized_behind(view: GraphView, node: NodeProto) -> bool:
    """True if a QuantizeLinear follows, behind operators that read nothing else but constants."""
    waiting, seen = [node.output[0]], {node.output[0]}
    while waiting:
        for reader in view.consumers(waiting.pop()):
            if reader.op_type == "QuantizeLinear":
                return True
            others = [name for name in reader.input if name and name not in seen]
            if all(_is_constant(view, name) for name in others):
                found = [name for name in reader.output if name and name not in seen]
                seen.update(found)
                waiting += found
    return False
