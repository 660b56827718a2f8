"""An ONNX file as a torch module: what quantizes, prunes and measures a module works on a file of anybody's."""

from __future__ import annotations

import inspect
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn

from sparsify.errors import ArgumentError, ExportError, first_line
from sparsify.onnx.runtime import SessionSettings, optimized_model, read_model

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

    from sparsify.onnx.node_layers import StoredWeight
    from sparsify.onnx.one_node import EdgeValue

__all__: list[str] = []


StepRun = tuple["Step", nn.Module, list[Any], list[Any]]


@dataclass(frozen=True)
class Step:
    """One module of an imported graph, and the nodes that it stands for.

    Attributes:
        path: of the module.
        nodes: their numbers in the graph.
        inputs: the values that the module is called with; "": one that is left out.
        outputs: the values that it gives.
        weight: where its weight lies in the file; None: it has none.
    """

    path: str
    nodes: tuple[int, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weight: StoredWeight | None = None


class Given:
    """The graph that was imported, in the form that its steps count. A copy of the module shares it."""

    def __init__(self, proto: ModelProto, steps: tuple[Step, ...], constants: Mapping[str, np.ndarray]) -> None:
        self.proto = proto
        self.steps = steps
        self.constants = constants
        stored = {tensor.name for tensor in proto.graph.initializer}
        self.inputs = [value.name for value in proto.graph.input if value.name not in stored]
        self.outputs = [value.name for value in proto.graph.output]

    def __deepcopy__(self, memo: object) -> Given:
        return self


class ImportedModel(nn.Module):
    """A module that computes what an ONNX graph does; every node is a module under the name of the node.

    Called with the graph's inputs by name (`model(**{"input": x})`) or by position; gives its output, or {name: output}
    where there are several. `export_onnx` of it writes the given graph again, with the module's weights and, after
    `quantize_model`, its integers: names, dynamic shapes, subgraphs and operators of other domains come through as they
    were.
    """

    given: Given

    def run(self, inputs: Mapping[str, EdgeValue]) -> Iterator[StepRun]:
        """Runs node by node: (step, its module, what it was called with, what it gave). All values go into `inputs`."""
        values = cast("dict[str, Any]", inputs)
        values.update(self.given.constants)
        for step in self.given.steps:
            module = self.get_submodule(step.path)
            operands = [values[name] if name else None for name in step.inputs]
            if step.weight is not None or not hasattr(module, "runner"):
                operands = [
                    torch.from_numpy(np.array(each)) if isinstance(each, np.ndarray) else each for each in operands
                ]
            result = module(*operands)
            results = list(result) if isinstance(result, tuple) else [result]
            values.update((name, each) for name, each in zip(step.outputs, results, strict=False) if name)
            yield step, module, operands, results

    def inputs_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """{input of the graph: tensor} of a call.

        Raises:
            ArgumentError: one is missing, or there is no input of a name.
        """
        names = self.given.inputs
        found: dict[str, Any] = dict(zip(names, args, strict=False))
        by_word = {_word(name): name for name in names}
        for name, value in kwargs.items():
            if value is None:
                continue
            if name not in names and name not in by_word:
                raise ArgumentError(f"{name!r} is no input of the file, which takes {', '.join(names)}.")
            found[name if name in names else by_word[name]] = value
        missing = [name for name in names if name not in found]
        if missing or len(args) > len(names):
            raise ArgumentError(f"the file takes {', '.join(names)}; {len(args) + len(kwargs)} were given.")
        return {
            name: torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value
            for name, value in found.items()
        }

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        values = self.inputs_of(args, kwargs)
        for _ in self.run(values):
            pass
        outputs = {name: _as_tensor(values[name]) for name in self.given.outputs}
        return next(iter(outputs.values())) if len(outputs) == 1 else outputs


def import_onnx(source: str | os.PathLike[str] | ModelProto) -> ImportedModel:
    """The torch module of an ONNX file.

    Layers with weights are torch layers (Conv1d to 3d, ConvTranspose, Linear, BatchNorm, Embedding) in eval mode,
    common operators torch calls. Every other node (other domains, control flow, recurrent layers) runs in
    onnxruntime in a session of its own, without gradient.

    Args:
        source: a path, or the model itself.

    Raises:
        DataFileError, DataError: the file is missing or broken.
        ExportError: a graph that cannot be imported; the message says which node stands in the way.
    """
    from onnx import ModelProto

    path = None if isinstance(source, ModelProto) else Path(source)
    proto = _normalized(source if isinstance(source, ModelProto) else read_model(source), path)
    given, modules = _Importer(proto).import_all()
    names = given.inputs
    model = _class_with_inputs(names)()
    model.given = given
    for name, module in modules.items():
        _put_module(model, name, module)
    return model.eval()


LEAST_IMPORTED_OPSET = 18
"""As that of `export_onnx`: the rewrites say things that older ones cannot."""


def _normalized(model: ModelProto, path: Path | None) -> ModelProto:
    """The graph with all that is constant stored, BatchNorms folded, functions inlined, every node named, at an opset
    that can say what is quantized: by onnxruntime's own basic optimizations, which keep to standard operators."""
    import onnx

    proto = onnx.ModelProto()
    proto.CopyFrom(model)
    graph = proto.graph
    if any(tensor.external_data for tensor in graph.initializer) and path is not None:
        onnx.external_data_helper.load_external_data_for_model(proto, str(path.resolve().parent))
    # An input that has a value already would be no constant.
    stored = {tensor.name for tensor in graph.initializer}
    kept = [value for value in graph.input if value.name not in stored]
    del graph.input[:]
    graph.input.extend(kept)
    proto.ir_version = max(proto.ir_version, 4)
    opset = next((each.version for each in proto.opset_import if each.domain in ("", "ai.onnx")), 1)
    if opset < LEAST_IMPORTED_OPSET:
        try:
            proto = onnx.version_converter.convert_version(proto, LEAST_IMPORTED_OPSET)
        except Exception as error:
            raise ExportError(
                f"the file is of opset {opset}, and onnx's converter cannot raise it to {LEAST_IMPORTED_OPSET}, which "
                f"is needed for integers: {first_line(error)}"
            ) from error
    names: Counter[str] = Counter()
    for node in proto.graph.node:
        node.name = node.name or next((name for name in node.output if name), node.op_type)
        names[node.name] += 1
        if names[node.name] > 1:
            node.name = f"{node.name}_{names[node.name]}"
    wanted = {each.domain: each.version for each in proto.opset_import}
    settings = SessionSettings(basic=True)
    result = optimized_model(proto, settings, path=None, changed=True)
    used = {node.domain for node in result.graph.node if node.domain != "ai.onnx"} | {"", *wanted}
    versions = {each.domain: each.version for each in result.opset_import}
    del result.opset_import[:]
    result.opset_import.extend(
        onnx.helper.make_opsetid(domain, wanted.get(domain, version))
        for domain, version in versions.items()
        if domain in used
    )
    for field in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        setattr(result, field, getattr(model, field))
    del result.metadata_props[:]
    result.metadata_props.extend(model.metadata_props)
    return result


class _Importer:
    """Makes modules of the nodes of a graph."""

    def __init__(self, proto: ModelProto) -> None:
        import onnx

        from sparsify.onnx.graph import GraphView

        self.proto = proto
        self.view = GraphView(proto.graph)
        self.stored: dict[str, TensorProto] = dict(self.view.constants())
        self.opsets = list(proto.opset_import)
        inferred = onnx.shape_inference.infer_shapes(proto).graph
        self.ranks = {
            value.name: len(value.type.tensor_type.shape.dim)
            for value in [*inferred.value_info, *inferred.input, *inferred.output]
            if value.type.tensor_type.HasField("shape")
        }
        self.steps: list[Step] = []
        self.modules: dict[str, nn.Module] = {}
        self.done: set[int] = set()
        self.numbers = {id(node): i for i, node in enumerate(proto.graph.node)}

    def import_all(self) -> tuple[Given, dict[str, nn.Module]]:
        from sparsify.onnx.one_node import array_of

        taken: set[int] = set()
        groups: dict[int, tuple[list[NodeProto], nn.Module, StoredWeight | None]] = {}
        for node in self.proto.graph.node:
            group = self._group(node)
            if group is not None and not taken & {self.numbers[id(each)] for each in group[0]}:
                taken |= {self.numbers[id(each)] for each in group[0]}
                # It is computed where its last node stands.
                groups[max(self.numbers[id(each)] for each in group[0])] = group
        read: set[str] = set()
        for i, node in enumerate(self.proto.graph.node):
            if i in groups:
                self._add(*groups[i])
            elif i not in taken and node.op_type != "Constant":
                self._add([node], self._function(node), None)
        for step in self.steps:
            read.update(step.inputs)
        read.update(value.name for value in self.proto.graph.output)
        constants = {name: array_of(tensor) for name, tensor in self.stored.items() if name in read}
        return Given(self.proto, tuple(self.steps), constants), self.modules

    def _group(self, node: NodeProto) -> tuple[list[NodeProto], nn.Module, StoredWeight | None] | None:
        """(nodes, first to last, the module that they are together, its weight); None: it is a function by itself."""
        from sparsify.onnx.node_layers import bias_vector, function_of, layer_of

        layer = layer_of(node, self.stored, self.ranks.get(node.input[0]) if node.input else None)
        if layer is not None:
            module, weight = layer
            behind = self._only_reader(node.output[0])
            if node.op_type == "MatMul" and behind is not None and behind.op_type == "Add":
                other = [name for name in behind.input if name != node.output[0]]
                bias = bias_vector(self.stored, other[0], cast(int, module.out_features)) if len(other) == 1 else None
                if bias is not None:
                    module.bias = nn.Parameter(bias)
                    return [node, behind], module, weight
            return [node], module, weight
        behind = self._only_reader(node.output[0]) if node.output and node.output[0] else None
        gate = {"Sigmoid": nn.SiLU, "HardSigmoid": nn.Hardswish}.get(node.op_type)
        function = function_of(node)
        if function is None:
            return None
        both = sorted([node.input[0], node.output[0]])
        if gate is not None and behind is not None and behind.op_type == "Mul" and sorted(behind.input) == both:
            return [node, behind], gate(), None
        return [node], function, None

    def _only_reader(self, name: str) -> NodeProto | None:
        readers = self.view.consumers(name)
        alone = len(readers) == 1 and name not in self.view.outputs and list(readers[0].input).count(name) == 1
        return readers[0] if alone else None

    def _function(self, node: NodeProto) -> nn.Module:
        from sparsify.onnx.node_functions import NodeFunction
        from sparsify.onnx.one_node import OneNode

        return NodeFunction(OneNode(_node_copy(node), self.stored, self.opsets, self.proto.ir_version))

    def _add(self, nodes: list[NodeProto], module: nn.Module, weight: StoredWeight | None) -> None:
        from sparsify.onnx.node_functions import NodeFunction

        first, last = nodes[0], nodes[-1]
        inputs = [first.input[0]]
        if isinstance(module, NodeFunction):
            inputs = module.runner.reads
        elif isinstance(module, nn.Embedding):
            inputs = [first.input[1]]
        name = _path_of(first.name, self.modules)
        self.modules[name] = module
        numbers = tuple(self.numbers[id(node)] for node in nodes)
        self.steps.append(Step(name, numbers, tuple(inputs), tuple(last.output), weight))


def _node_copy(node: NodeProto) -> NodeProto:
    from onnx import NodeProto as Node

    copy = Node()
    copy.CopyFrom(node)
    return copy


def _path_of(name: str, taken: Mapping[str, Any]) -> str:
    """The path of a node's module: its name, where dots part the modules around it."""
    path = ".".join(part for part in name.split(".") if part) or "node"
    number, found = 1, path
    while found in taken:
        number += 1
        found = f"{path}_{number}"
    return found


def _put_module(model: nn.Module, path: str, module: nn.Module) -> None:
    *around, last = path.split(".")
    for name in around:
        if name not in model._modules:
            model._modules[name] = nn.Module()
        model = cast(nn.Module, model._modules[name])
    there = model._modules.get(last)
    if there is not None:
        for name, child in there._modules.items():
            module._modules[name] = child
    model._modules[last] = module


def _word(name: str) -> str:
    return re.sub(r"\W", "_", name) or "input"


def _as_tensor(value: Any) -> Any:
    return torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value


def _class_with_inputs(names: list[str]) -> type[ImportedModel]:
    """A class whose forward takes the inputs by their names."""

    def forward(self: ImportedModel, *args: Any, **kwargs: Any) -> Any:
        return ImportedModel.forward(self, *args, **kwargs)

    kinds = inspect.Parameter
    parameters = [kinds(word, kinds.POSITIONAL_OR_KEYWORD) for word in dict.fromkeys(map(_word, names))]
    signature: Any = forward
    signature.__signature__ = inspect.Signature([kinds("self", kinds.POSITIONAL_ONLY), *parameters])
    made: Any = type("ImportedModel", (ImportedModel,), {"forward": forward, "__module__": __name__})
    return cast("type[ImportedModel]", made)
