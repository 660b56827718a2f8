"""Weights alone as integers in a file: MatMul on (in, out), in four bits where they fit, as onnxruntime fuses it.

DequantizeLinear on weights of shape (in, out), then MatMul with an input in float, becomes one kernel, MatMulNBits,
that reads the integers. As the exporter writes a Linear, (out, in) with a Transpose or in a Gemm, the weights are
turned to float at every call instead, which takes six times as long as a Linear in float.

Linear 4096 x 4096, batch 1, one thread, onnxruntime 1.31, on a busy machine: float 14.2 ms; MatMulNBits of int4 0.56 ms
in blocks of 32, 0.39 ms of 128, 0.46 ms with a scale per channel; int8 in blocks of 128 0.58 ms; int4 as (out, in) in a
Gemm 81 ms. On a quiet machine float is nearer: int4 was 3.8 (block 32) to 4.5 times (block 128) as fast. onnxruntime
rounds what such a MatMul reads to int8 (0.7 % of the output), unless its option
session.qdq_matmulnbits_accuracy_level is 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from sparsify.onnx.graph import Graph, attribute, integer

__all__: list[str] = []

OPSET = 21
"""The first with integers of four bits, and scales of blocks."""


def fuse(model: ModelProto) -> None:
    """Brings weights that an operator with an input in float reads into that form; of blocks or of four bits."""
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < OPSET:
        return
    graph = Graph(model)
    for node in list(model.graph.node):
        if node.op_type in ("MatMul", "Gemm"):
            _as_matmul(graph, node)
        elif node.op_type in ("Conv", "ConvTranspose") and not _is_quantized(graph, node.input[0]):
            dequantize = graph.producer.get(node.input[1])
            if dequantize is not None and _own_integers(graph, dequantize) is not None:
                _store(graph, dequantize, None)
    graph.finish()


def _as_matmul(graph: Graph, node: NodeProto) -> None:
    if _is_quantized(graph, node.input[0]):
        return
    transposed = node.op_type == "Gemm" and integer(node, "transB", 0) == 1
    if node.op_type == "Gemm" and integer(node, "transA", 0):
        return
    above = graph.producer.get(node.input[1])
    moved = above if above is not None and above.op_type == "Transpose" else None
    dequantize = graph.producer.get(moved.input[0]) if moved is not None else above
    if dequantize is None or (moved is not None and len(graph.readers(dequantize.output[0])) > 1):
        return
    values = _own_integers(graph, dequantize)
    block = integer(dequantize, "block_size", 0)
    if values is None or values.ndim != 2 or len(graph.readers(node.input[1])) > 1:
        return
    if not block and not _fits(values):
        return
    # Alone the default factors: nobody writes others for a Linear.
    if any(attribute(node, name, 1.0) != 1.0 for name in ("alpha", "beta")):
        return
    turned = transposed or moved is not None
    replacement = _store(graph, dequantize, node.input[1] if moved is not None else None, turned=turned)
    if moved is not None:
        graph.replace(moved, [])
        graph.replace(dequantize, [replacement])
    if node.op_type == "Gemm":
        name = node.name.replace("Gemm", "MatMul")
        bias = node.input[2] if len(node.input) > 2 else ""
        product = graph.fresh(f"{node.output[0]}_product") if bias else node.output[0]
        nodes = [helper.make_node("MatMul", [node.input[0], node.input[1]], [product], name=name)]
        values = graph.constant(bias) if bias and _before_relu(graph, node.output[0]) else None
        if values is not None:
            # Of an Add onnxruntime makes a Gemm, then one with the ReLU behind it, which reads weights in float.
            negated = graph.value(graph.fresh(f"{bias}_negated"), -values)
            nodes.append(helper.make_node("Sub", [product, negated], [node.output[0]], name=f"{name}/Sub"))
        elif bias:
            nodes.append(helper.make_node("Add", [product, bias], [node.output[0]], name=f"{name}/Add"))
        graph.replace(node, nodes)


def _before_relu(graph: Graph, name: str) -> bool:
    """True if a ReLU reads the value, moved or not."""
    readers = graph.readers(name)
    return any(
        node.op_type == "Relu" or (node.op_type in ("Reshape", "Transpose") and _before_relu(graph, node.output[0]))
        for node in readers
    )


def _own_integers(graph: Graph, node: NodeProto) -> np.ndarray | None:
    """The weights of a DequantizeLinear that nobody else reads: int8 of zero point 0, or uint8 of any."""
    stored = graph.initializers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
    if stored is None or len(graph.readers(node.input[0])) > 1:
        return None
    zero = _zero_points(graph, node)
    if stored.data_type == TensorProto.UINT8:
        return None if zero is None else numpy_helper.to_array(stored)
    if stored.data_type != TensorProto.INT8 or (zero is not None and zero.any()):
        return None
    return numpy_helper.to_array(stored)


def _zero_points(graph: Graph, dequantize: NodeProto) -> np.ndarray | None:
    given = len(dequantize.input) > 2 and dequantize.input[2]
    return graph.constant(dequantize.input[2]) if given else None


def _store(graph: Graph, dequantize: NodeProto, output: str | None, turned: bool = False) -> NodeProto:
    """Writes the integers anew, transposed if `turned`, and gives the DequantizeLinear that reads them."""
    stored = graph.initializers[dequantize.input[0]]
    values, scale = numpy_helper.to_array(stored), graph.constant(dequantize.input[1])
    assert scale is not None  # The exporter writes scales as initializers.
    block, axis = integer(dequantize, "block_size", 0), integer(dequantize, "axis", 1)
    scales = dequantize.input[1]
    narrow = _fits(values)
    # int8 keeps its zeros: where onnxruntime makes uint8 of it (see `runtime.start_session`) and finds none, it adds
    # one for the whole tensor, which DequantizeLinear refuses beside scales of blocks (seen in 1.31.1).
    zero = _zero_points(graph, dequantize) if values.dtype == np.uint8 or not narrow else None
    if turned:
        values, axis = np.ascontiguousarray(values.T), 1 - axis
        if block:
            scales = graph.value(graph.fresh(f"{scales}_turned"), np.ascontiguousarray(scale.T))
            zero = None if zero is None else zero.T
    stored.CopyFrom(_tensor(stored.name, values, narrow))
    operands = [stored.name, scales]
    if zero is not None:
        # A name of its own: layers whose zero points are equal share one initializer, and not all have four bits.
        operands.append(graph.fresh(f"{stored.name}_zero_point"))
        tensor = graph.model.graph.initializer.add()
        tensor.CopyFrom(_tensor(operands[2], zero, narrow))
        graph.initializers[tensor.name] = tensor
    attributes: dict[str, Any] = {} if scale.ndim == 0 else {"axis": axis}
    if block:
        attributes["block_size"] = block
    new = helper.make_node(
        "DequantizeLinear",
        operands,
        [output or dequantize.output[0]],
        name=dequantize.name,
        **attributes,
    )
    if output is None:
        graph.replace(dequantize, [new])
    return new


def _tensor(name: str, values: np.ndarray, narrow: bool) -> TensorProto:
    """int8 or uint8 values as they are, or `narrow`: two in a byte."""
    if not narrow:
        return numpy_helper.from_array(np.ascontiguousarray(values), name)
    flat = values.reshape(-1).astype(np.int16)
    nibbles = np.append(flat, np.zeros(flat.size % 2, np.int16)) & 15
    packed = (nibbles[::2] | (nibbles[1::2] << 4)).astype(np.uint8)
    kind = TensorProto.UINT4 if values.dtype == np.uint8 else TensorProto.INT4
    return TensorProto(name=name, data_type=kind, dims=values.shape, raw_data=packed.tobytes())


def _fits(values: np.ndarray) -> bool:
    low, high = (0, 15) if values.dtype == np.uint8 else (-8, 7)
    return bool(values.size) and int(values.min()) >= low and int(values.max()) <= high


def _is_quantized(graph: Graph, name: str) -> bool:
    node = graph.producer.get(name)
    return node is not None and node.op_type == "DequantizeLinear"
