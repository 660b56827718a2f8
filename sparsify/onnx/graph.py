"""An ONNX graph: who makes and who reads each value, its constants, operators that only move values, and rewriting."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

__all__: list[str] = []


@dataclass(frozen=True)
class Movement:
    """An operator whose results hold values of its first input and no others, so that integers can go through it."""

    kind: Literal["rearranges", "selects", "repeats"]
    """rearranges: each value once; selects: each at most once; repeats: any number of times."""
    propagated: bool = False
    """onnxruntime itself moves a QuantizeLinear from behind it to before it: QDQPropagationTransformer,
    https://github.com/microsoft/onnxruntime/pull/10487; each seen in 1.31.1. An Identity is dropped."""


MOVEMENT = {
    "Reshape": Movement("rearranges", propagated=True),
    "Squeeze": Movement("rearranges", propagated=True),
    "Unsqueeze": Movement("rearranges", propagated=True),
    "Transpose": Movement("rearranges", propagated=True),
    "Identity": Movement("rearranges", propagated=True),
    "Flatten": Movement("rearranges"),
    "DepthToSpace": Movement("rearranges"),
    "SpaceToDepth": Movement("rearranges"),
    # The largest value is the largest integer, since scales are positive.
    "MaxPool": Movement("selects", propagated=True),
    "Slice": Movement("selects", propagated=True),
    "Split": Movement("selects"),
    "Gather": Movement("repeats"),
    "Expand": Movement("repeats"),
    "Tile": Movement("repeats"),
    # Only of the nearest pixel: `only_moves`.
    "Resize": Movement("repeats"),
    # Only of what is inside: `only_moves`.
    "Pad": Movement("repeats"),
}
"""{operator: what it does to the values}. Every list of such operators is derived from this one."""
PROPAGATED = frozenset(name for name, movement in MOVEMENT.items() if movement.propagated)
"""Operators that onnxruntime moves a QuantizeLinear over by itself."""
STORAGE = frozenset(name for name, movement in MOVEMENT.items() if movement.kind == "rearranges")
STORAGE |= {"DequantizeLinear", "QuantizeLinear", "Cast"}
"""Operators that may stand between a stored weight and its layer: they change its form and type. What selects or
repeats gives something else than the weight."""


RECURRENT_OPERATORS = frozenset({"LSTM", "GRU", "RNN"})


def only_moves(node: NodeProto) -> bool:
    """True if its results hold values of its first input and no others: a Resize may blend, a Pad put in a number."""
    if node.op_type == "Resize":
        text = {entry.name: entry.s for entry in node.attribute}
        # tf_crop_and_resize fills what lies outside with a number of its own.
        return text.get("mode", b"nearest") == b"nearest" and b"tf_crop" not in text.get(
            "coordinate_transformation_mode", b""
        )
    if node.op_type == "Pad":
        return any(entry.name == "mode" and entry.s != b"constant" for entry in node.attribute)
    return node.op_type in MOVEMENT


_NARROW = frozenset({TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4})


class GraphView:
    """Producers and consumers of the values of a graph, and its constants.

    Args:
        graph: one, or several in which names differ: the first, and those in its branches and loops.

    Attributes:
        nodes: all nodes, in order.
        initializers: {name: stored tensor}.
        inputs: {name: input}, without those that only give an initializer its type.
        outputs: names of the graph's outputs.
        producer: {value: node that makes it}.
    """

    def __init__(self, graph: GraphProto | list[GraphProto]) -> None:
        graphs = graph if isinstance(graph, list) else [graph]
        self.initializers: dict[str, TensorProto] = {one.name: one for each in graphs for one in each.initializer}
        self.inputs: dict[str, ValueInfoProto] = {
            value.name: value for value in graphs[0].input if value.name not in self.initializers
        }
        self.outputs: set[str] = {value.name for value in graphs[0].output}
        self.nodes = [node for each in graphs for node in each.node]
        self.producer: dict[str, NodeProto] = {}
        self._consumers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.nodes:
            self.add(node)

    def add(self, node: NodeProto) -> None:
        """Takes in one more node."""
        for name in node.output:
            if name:
                self.producer[name] = node
        for name in dict.fromkeys(all_inputs(node)):
            self._consumers[name].append(node)

    def remove(self, node: NodeProto) -> None:
        """Forgets a node."""
        for name in node.output:
            if self.producer.get(name) is node:
                del self.producer[name]
        for name in dict.fromkeys(all_inputs(node)):
            self._consumers[name] = [each for each in self._consumers[name] if each is not node]

    def consumers(self, name: str) -> list[NodeProto]:
        """The nodes that read a value, each once; those whose subgraphs read it too."""
        return list(self._consumers.get(name, ()))

    def constants(self) -> dict[str, TensorProto]:
        """{name: tensor} of initializers and of Constant nodes that hold a tensor."""
        nodes = {
            name: node.attribute[0].t
            for name, node in self.producer.items()
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value"
        }
        return {**self.initializers, **nodes}

    def constant(self, name: str) -> np.ndarray | None:
        """The value of an initializer or Constant node; None where it is computed."""
        if name in self.initializers:
            return numpy_helper.to_array(self.initializers[name])
        node = self.producer.get(name)
        if node is None or node.op_type != "Constant" or not node.attribute:
            return None
        attribute = node.attribute[0]
        if attribute.name == "value":
            return numpy_helper.to_array(attribute.t)
        kind = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}
        if attribute.name not in kind:
            return None
        return np.asarray(helper.get_attribute_value(attribute), kind[attribute.name])

    def scaled_integers(self, name: str) -> tuple[str, tuple[str, ...]] | None:
        """(stored integers, names of the constants beside them) of a value that is made of them, as recurrent weights
        are: (Cast(integers) - zero point) * scale; None for any other value."""
        beside: list[str] = []
        node = self.producer.get(name)
        for operator in ("Mul", "Sub"):
            if node is not None and node.op_type == operator and node.input[1] in self.initializers:
                beside.append(node.input[1])
                node = self.producer.get(node.input[0])
        if node is None or node.op_type != "Cast" or not beside or node.input[0] not in self.initializers:
            return None
        kind = self.initializers[node.input[0]].data_type
        return (node.input[0], tuple(beside)) if kind in _NARROW else None

    def origin(self, name: str, through: Callable[[NodeProto], bool]) -> str:
        """The value that `name` stems from by first inputs of nodes of which `through` is true."""
        # Bounded by the number of values: a broken file may hold a circle.
        for _ in range(len(self.producer)):
            node = self.producer.get(name)
            if node is None or not node.input or not through(node):
                break
            name = node.input[0]
        return name


class Graph:
    """A graph while it is being rewritten. `finish` writes the nodes back."""

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.view = GraphView(model.graph)
        self.initializers = self.view.initializers
        self.producer = self.view.producer
        # The replaced node is kept with its replacement: a node that nobody holds loses its id.
        self.changes: dict[int, tuple[NodeProto, list[NodeProto]]] = {}
        self.names = {*self.initializers, *(value.name for value in model.graph.input), *self.producer}
        self.shapes: dict[str, list[int | None]] | None = None

    def replace(self, node: NodeProto, nodes: list[NodeProto]) -> None:
        """`nodes` stand where `node` stood."""
        self.changes[id(node)] = (node, nodes)
        self.view.remove(node)
        for new in nodes:
            self.view.add(new)
            self.names.update(new.output)

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
        copies = [copied(node) for node in nodes]
        del self.model.graph.node[:]
        self.model.graph.node.extend(copies)
        remove_unused(self.model)

    def readers(self, name: str) -> list[NodeProto]:
        """As `GraphView.consumers`."""
        return self.view.consumers(name)

    def is_initializer(self, name: str) -> bool:
        """True if a value is stored."""
        return name in self.initializers

    def is_output(self, name: str) -> bool:
        """True if a value is an output of the graph."""
        return name in self.view.outputs

    def per_tensor(self, node: NodeProto) -> bool:
        """True if a Q or DQ node has one scale that is a constant."""
        scale = self.initializers.get(node.input[1])
        return scale is not None and len(scale.dims) == 0

    def constant(self, name: str) -> np.ndarray | None:
        """As `GraphView.constant`."""
        return self.view.constant(name)

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
        return fresh_name(name, self.names)

    def renamed(self, node: NodeProto, old: str, new: str) -> str:
        """The name of `node` with its operator, `old`, called `new`; of no node before."""
        stem = re.sub(rf"{old}(_\d+)?$", new, node.name)
        names = {each.name for each in self.model.graph.node}
        names |= {each.name for _, nodes in self.changes.values() for each in nodes}
        candidate, count = stem, 1
        while candidate in names:
            count += 1
            candidate = f"{stem}_{count}"
        return candidate

    def int64(self, values: list[int]) -> str:
        """The name of an initializer with these values; one for all that ask for the same."""
        name = "shape_" + "_".join(str(value).replace("-", "m") for value in values)
        return self.value(name, np.asarray(values, dtype=np.int64))

    def value(self, name: str, value: np.ndarray) -> str:
        """The name of an initializer, which always has this value."""
        if name not in self.initializers:
            tensor = numpy_helper.from_array(value, name)
            self.model.graph.initializer.append(tensor)
            self.initializers[name] = tensor
            self.names.add(name)
        return name


def with_inner_graphs(model: ModelProto) -> list[GraphProto]:
    """The graph of a model and those in it (branches, loops), with names that differ.

    Two branches may call different values alike. Those of the later one are renamed, in the model itself.
    """
    taken: set[str] = set()
    found: list[GraphProto] = []

    def take(graph: GraphProto, outside: dict[str, str]) -> None:
        names = dict(outside)
        made = [value.name for value in [*graph.input, *graph.initializer]]
        made += [name for node in graph.node for name in node.output if name]
        for name in dict.fromkeys(made):
            new, number = name, 2
            while new in taken:
                new, number = f"{name}_{number}", number + 1
            taken.add(new)
            names.pop(name, None)
            if new != name:
                names[name] = new
        if names:
            for infos in (graph.input, graph.output, graph.initializer, graph.value_info):
                for info in infos:
                    info.name = names.get(info.name, info.name)
        found.append(graph)
        for node in graph.node:
            if names:
                for values in (node.input, node.output):
                    for i, name in enumerate(values):
                        values[i] = names.get(name, name)
            for attribute in node.attribute:
                for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                    take(inner, names)

    take(model.graph, {})
    return found


def remove_unused(model: ModelProto) -> None:
    """Nodes and initializers that no output needs go; the order becomes one in which values precede their readers."""
    graph = model.graph
    producer = GraphView(graph).producer
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
        stack.extend((producer[name], False) for name in reversed(all_inputs(node)) if name in producer)
    used = {name for node in order for name in all_inputs(node)} | {value.name for value in graph.output}
    for i in reversed(range(len(graph.initializer))):
        if graph.initializer[i].name not in used:
            del graph.initializer[i]
    nodes = [copied(node) for node in order]
    del graph.node[:]
    graph.node.extend(nodes)


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


def all_inputs(node: NodeProto) -> list[str]:
    """Values that a node reads; those that its subgraphs (If, Loop) read from around them, too."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        for graph in [attribute.g, *attribute.graphs]:
            if not graph.node and not graph.output:
                continue
            inside = {value.name for value in [*graph.input, *graph.initializer]}
            inside |= {name for inner in graph.node for name in inner.output}
            read = [name for inner in graph.node for name in all_inputs(inner)]
            read += [value.name for value in graph.output]
            names += [name for name in read if name not in inside]
    return names


def has_graphs(node: NodeProto) -> bool:
    """True for If, Loop and Scan, which hold graphs of their own."""
    return any(attribute.HasField("g") or bool(attribute.graphs) for attribute in node.attribute)


def like(node: NodeProto, inputs: Iterable[str], outputs: Iterable[str]) -> NodeProto:
    copy = copied(node)
    del copy.input[:], copy.output[:]
    copy.input.extend(inputs)
    copy.output.extend(outputs)
    return copy


def copied(node: NodeProto) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    return copy


def integer(node: NodeProto, name: str, default: int) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), default)


def attribute(node: NodeProto, name: str, default: float) -> float:
    """An attribute that is a float."""
    return next((float(entry.f) for entry in node.attribute if entry.name == name), default)


def fresh_name(name: str, taken: set[str]) -> str:
    """`name`, numbered where it is taken; it is taken from then on."""
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate
