"""Maps the nodes of an ONNX file to the layers of the model that they compute."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING

from sparsify.analysis.layers import LayerInfo, ModelAnalysis

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

__all__: list[str] = []


def layers_of_nodes(graph: GraphProto, analysis: ModelAnalysis) -> list[tuple[str, ...]]:
    """The layers that each node of a file computes: mostly one; none for many; all weights of a recurrent layer.

    Our files name a node "<module>/<operator>" and a weight by its parameter; in files of others a node has the name
    that `analyze_model` gives it.
    """
    names = {layer.name for layer in analysis.layers}
    from sparsify.onnx.graph import GraphView

    view = GraphView(graph)
    producer, stored = view.producer, view.constants()
    owners = [_owner(node, names, producer, set(stored)) for node in graph.node]
    # Products without a module of their own, in the order of their module's forward.
    products: dict[str, list[str]] = defaultdict(list)
    weights: dict[str, list[LayerInfo]] = defaultdict(list)
    calls: dict[str, int] = defaultdict(lambda: 1)
    for layer in analysis.layers:
        module = layer.name.rpartition(".")[0]
        if layer.weight is None:
            products[module] += [layer.name] * (2 if "attention" in layer.type else 1)
            calls[module] = max(calls[module], layer.calls)
        else:
            weights[module].append(layer)
    waiting: dict[str, list[int]] = defaultdict(list)
    recurrent: Counter[str] = Counter()
    for i, node in enumerate(graph.node):
        module = _module(node)
        if owners[i]:
            continue
        if node.op_type in ("LSTM", "GRU", "RNN"):
            level = re.compile(rf"_l{recurrent[module]}(_reverse)?$")
            recurrent[module] += 1
            mine = [layer.name for layer in weights[module or node.name]]
            # In a file the weights of a recurrent layer are packed, without a level in their names.
            found = [name for name in mine if level.search(name)] or [n for n in mine if n.endswith(("_ih", "_hh"))]
            owners[i] = tuple(found)
        elif node.op_type in ("MatMul", "Einsum", "Gemm"):
            # A weight that was transposed for the product has lost its name; its size tells.
            sizes = [
                math.prod(stored[name].dims) for name in node.input if name in stored and len(stored[name].dims) > 1
            ]
            of_size = [layer.name for layer in weights[module] if layer.weights in sizes]
            if len(of_size) == 1:
                owners[i] = tuple(of_size)
            elif not sizes:
                waiting[module].append(i)
    for module, nodes in waiting.items():
        own = products.get(module, []) * calls[module]
        if len(set(own)) == 1:
            own = own[:1] * len(nodes)
        if len(own) == len(nodes):
            for i, name in zip(nodes, own, strict=True):
                owners[i] = (name,)
    return owners


def _owner(node: NodeProto, names: set[str], producer: Mapping[str, NodeProto], stored: set[str]) -> tuple[str, ...]:
    module, own = _module(node), str(node.name)
    parent, _, last = module.rpartition(".")
    if module in names:
        return (module,)
    if last.endswith("_quantizer") and parent in names:
        return (parent,)
    for value in node.input:
        for _ in range(8):
            made = producer.get(value)
            if made is None or made.op_type not in ("DequantizeLinear", "Transpose", "Reshape", "Cast"):
                break
            value = made.input[0]
        if value in stored:
            stem = str(value).removesuffix("_int8")
            for suffix in (".weight", "_weight"):
                if stem.endswith(suffix) and stem.removesuffix(suffix) in names:
                    return (stem.removesuffix(suffix),)
    # A layer without a name of its own in a file has the name of its output.
    return next(((name,) for name in (own, *node.output) if name and name in names), ())


def _module(node: NodeProto) -> str:
    # Ours are "block.0/Conv", those of others may be "/block/0/Conv".
    name = str(node.name)
    return name.rpartition("/")[0] if name.startswith("/") else name.split("/", 1)[0] if "/" in name else ""
