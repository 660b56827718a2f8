"""Rewrites of activations and of numbers beside integers, so that onnxruntime has an integer kernel for them."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, helper

from sparsify.onnx.graph import Graph, attribute, like

__all__: list[str] = []


def hard_sigmoid_as_add(model: ModelProto) -> None:
    """Replaces HardSigmoid between integers by an Add that saturates: clip(x a + b, 0, 1) = clip(x a + b) to [0, 1].

    onnxruntime has an integer kernel for Add only. x a is what is read of the same integers with the scale s a, and the
    clipping is that of QuantizeLinear, where its integers reach from 0 to 1 at most.
    """
    graph = Graph(model)
    for node in list(model.graph.node):
        above = graph.producer.get(node.input[0]) if node.op_type == "HardSigmoid" else None
        readers = graph.readers(node.output[0])
        if above is None or above.op_type != "DequantizeLinear" or not graph.per_tensor(above) or len(above.input) < 3:
            continue
        if len(readers) != 1 or readers[0].op_type != "QuantizeLinear" or not graph.per_tensor(readers[0]):
            continue
        zero, scale = graph.constant(readers[0].input[2]), graph.constant(readers[0].input[1])
        kind, read = graph.constant(above.input[2]), graph.constant(above.input[1])
        if zero is None or scale is None or kind is None or read is None or zero != 0 or zero.dtype != np.uint8:
            continue
        if kind.dtype != np.uint8 or scale * 255 > 1 + 1e-6:
            continue
        alpha, beta = (attribute(node, name, default) for name, default in (("alpha", 0.2), ("beta", 0.5)))
        narrow, offset, one = (graph.fresh(f"{node.output[0]}_{name}") for name in ("scaled", "offset", "scale"))
        graph.value(one, np.asarray(read * np.float32(alpha), np.float32))
        constant = [graph.value("one_uint8", np.asarray(1, np.uint8)), graph.fresh(f"{node.output[0]}_beta")]
        graph.value(constant[1], np.asarray(beta, np.float32))
        constant.append(graph.value("zero_uint8", np.asarray(0, np.uint8)))
        graph.replace(
            node,
            [
                helper.make_node(
                    "DequantizeLinear", [above.input[0], one, above.input[2]], [narrow], name=f"{node.name}/x"
                ),
                helper.make_node("DequantizeLinear", constant, [offset], name=f"{node.name}/beta"),
                helper.make_node("Add", [narrow, offset], node.output, name=graph.renamed(node, "HardSigmoid", "Add")),
            ],
        )
    graph.finish()


def tanh_as_sigmoid(model: ModelProto) -> None:
    """Replaces Tanh between integers by a Sigmoid, for which onnxruntime has a table: tanh(x) = 2 sigmoid(2 x) - 1.

    2 x is what is read of the same integers with twice the scale. The integers of tanh with the scale 1/128 and the
    zero point 128 are those of the sigmoid with 1/256 and 0; who reads them reads them as before.
    """
    graph = Graph(model)
    for node in list(model.graph.node):
        above = graph.producer.get(node.input[0]) if node.op_type == "Tanh" else None
        readers = graph.readers(node.output[0])
        if above is None or above.op_type != "DequantizeLinear" or not graph.per_tensor(above) or len(above.input) < 3:
            continue
        if len(readers) != 1 or readers[0].op_type != "QuantizeLinear" or len(readers[0].input) < 3:
            continue
        quantize = readers[0]
        scale, zero, kind = (graph.constant(name) for name in (*quantize.input[1:3], above.input[2]))
        read = graph.constant(above.input[1])
        if scale is None or zero is None or kind is None or read is None or kind.dtype != np.uint8:
            continue
        if zero.dtype != np.uint8 or zero.ndim or scale != np.float32(1 / 128) or zero != 128:
            continue
        twice = graph.value(graph.fresh(f"{node.output[0]}_scale"), np.asarray(read * np.float32(2.0), np.float32))
        wide = graph.fresh(f"{node.output[0]}_doubled")
        grid = [graph.value("scale_of_sigmoid", np.asarray(1 / 256, np.float32))]
        grid.append(graph.value("zero_uint8", np.asarray(0, np.uint8)))
        doubled = [above.input[0], twice, above.input[2]]
        graph.replace(
            node,
            [
                helper.make_node("DequantizeLinear", doubled, [wide], name=f"{node.name}/x"),
                helper.make_node("Sigmoid", [wide], node.output, name=graph.renamed(node, "Tanh", "Sigmoid")),
            ],
        )
        graph.replace(quantize, [like(quantize, [node.output[0], *grid], quantize.output)])
    graph.finish()


def numbers_as_integers(model: ModelProto) -> None:
    """Stores a scalar operand of Add or Mul beside integers as q = 1 or -1 with scale = |value|.

    That is exact, and the operator then has an integer kernel.
    """
    graph = Graph(model)
    for node in list(model.graph.node):
        if node.op_type not in ("Add", "Mul") or graph.is_output(node.output[0]):
            continue
        sources = [graph.producer.get(name) for name in node.input]
        numbers = [graph.constant(name) for name in node.input]
        read = [source is not None and source.op_type == "DequantizeLinear" for source in sources]
        readers = graph.readers(node.output[0])
        if sum(read) != 1 or len(readers) != 1 or readers[0].op_type not in ("QuantizeLinear", "Relu", "Clip"):
            continue
        at = read.index(False)
        source, number = sources[1 - at], numbers[at]
        if source is None or number is None or number.size != 1 or number.dtype != np.float32:
            continue
        shape = graph.shape(node.input[1 - at])
        zero = graph.constant(source.input[2]) if len(source.input) > 2 else None
        value = float(number.reshape(()))
        if not graph.per_tensor(source) or zero is None or zero.dtype != np.uint8 or not np.isfinite(value):
            continue
        if shape is None or number.ndim > len(shape):
            continue
        scale = graph.fresh(f"{node.output[0]}_number")
        graph.value(scale, np.asarray(abs(value) or 1.0, np.float32))
        digits = [graph.value(f"{name}_uint8", np.asarray(one, np.uint8)) for one, name in enumerate(("zero", "one"))]
        one, less = digits[int(value > 0)], digits[int(value < 0)]
        result = graph.fresh(f"{node.output[0]}_number_read")
        operands = list(node.input)
        operands[at] = result
        name = f"{node.name or node.output[0]}/number"
        graph.replace(
            node,
            [
                helper.make_node("DequantizeLinear", [one, scale, less], [result], name=name),
                like(node, operands, node.output),
            ],
        )
    graph.finish()
