"""Reads the layers of an ONNX file: the products of its nodes, and the weights behind them. Imports no torch.

Shapes are inferred by onnx for the batch that is asked for; where it cannot tell, onnxruntime runs the file once.
"""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsify.analysis.layers import LayerInfo, ModelAnalysis, UnknownOperator
from sparsify.analysis.macs import TensorShape, einsum_macs
from sparsify.analysis.onnx_weights import Stored, StoredWeights
from sparsify.errors import ArgumentError, DataError
from sparsify.onnx.file_inputs import file_inputs, input_sizes, samples_by_name
from sparsify.onnx.runtime import open_session, read_model, run_session

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

    from sparsify.model.signature import InputsLike

__all__: list[str] = []

NO_STORED_WEIGHT = "it has no weight of its own"
IN_A_BRANCH = "it is computed in a branch or a loop, in which nothing is quantized"
SCAN_STEPS = "it computes its steps in one operator, in which nothing can be quantized"

_OPERATOR_WORDS = """
Abs Acos Acosh Add AffineGrid And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Bernoulli BitShift
BitCast BitwiseAnd BitwiseNot BitwiseOr BitwiseXor BlackmanWindow Cast CastLike Ceil Celu CenterCropPad Clip Col2Im
Compress Concat ConcatFromSequence Constant ConstantOfShape Cos Cosh CumProd CumSum DepthToSpace DequantizeLinear Div
Dropout DynamicQuantizeLinear Elu Equal Erf Exp Expand EyeLike Flatten Floor Gather GatherElements GatherND Gelu
GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization HammingWindow
HannWindow HardSigmoid HardSwish Hardmax Identity InstanceNormalization IsInf IsNaN LRN LayerNormalization LeakyRelu
Less LessOrEqual Log LogSoftmax LpNormalization LpPool Max MaxPool MaxRoiPool MaxUnpool Mean MeanVarianceNormalization
Min Mish Mod Mul Multinomial Neg NonMaxSuppression NonZero Not OneHot Optional OptionalGetElement OptionalHasElement Or
PRelu Pad Pow QuantizeLinear RMSNormalization RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range
Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
ReduceSumSquare Relu Reshape Resize ReverseSequence RoiAlign RotaryEmbedding Round ScatterElements ScatterND Selu
SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength Shape Shrink Sigmoid Sign Sin
Sinh Size Slice Softmax SoftmaxCrossEntropyLoss Softplus Softsign SpaceToDepth Split SplitToSequence Sqrt Squeeze Sub
Sum Swish Tan Tanh TensorScatter ThresholdedRelu Tile TopK Transpose Trilu Unique Unsqueeze Upsample Where Xor
"""
FREE_OPERATORS = frozenset(_OPERATOR_WORDS.split())
"""Moves, reductions, norms, pools, comparisons, constants: standard operators that multiply nothing to sum it up."""
CONTRACTING = {
    **dict.fromkeys(("Conv", "ConvTranspose", "DeformConv", "ConvInteger"), (0, 1)),
    **dict.fromkeys(("MatMul", "Gemm", "MatMulInteger"), (0, 1)),
    "QLinearConv": (0, 3),
    "QLinearMatMul": (0, 3),
    "Attention": (0, 1, 2),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), (0, 1, 2)),
}
"""{operator: positions of the inputs that are multiplied}. Einsum multiplies all of its."""


def analyze_file(
    path: str | os.PathLike[str], sample_inputs: InputsLike | None, *, batch_size: int = 1
) -> ModelAnalysis:
    """The analysis of an ONNX file, as `analyze_model` returns it.

    Raises:
        DataError: the file is missing (then a DataFileError) or no ONNX model.
        ArgumentError: a size that is free in the file is not known, or inputs do not fit it.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ArgumentError(f"batch_size={batch_size!r}: give a positive int.")
    model = inlined(read_model(path))
    inputs = file_inputs(model)
    samples = {} if sample_inputs is None else samples_by_name(inputs, sample_inputs, path)
    sizes = input_sizes(inputs, {name: value.shape for name, value in samples.items()}, batch_size, path, ask=True)
    shapes = _Shapes(path, model, sizes, samples)
    file = _File(model, shapes, StoredWeights(model, Path(path).parent))
    batch = next((shape[0] for shape in shapes.inputs.values() if shape), 1)
    return ModelAnalysis(
        model=Path(path).name,
        layers=file.layers(),
        unknown=file.unknown(),
        parameters=file.weights.parameters(),
        batch_size=batch,
    )


@dataclass(frozen=True)
class FileLayer:
    """A layer of a file, and the stored tensor of its weight.

    Attributes:
        info: without shapes and MACs.
        stored: None for layers without a weight.
        transposed: True if torch stores this weight, of a linear layer, the other way round.
    """

    info: LayerInfo
    stored: Stored | None
    transposed: bool


def file_layers(path: str | os.PathLike[str], model: ModelProto) -> list[FileLayer]:
    """The layers of a file, for which no sizes of its inputs are needed.

    Args:
        path: of the file.
        model: what `inlined(read_model(path))` gave; values of its branches get names that differ.
    """
    file = _File(model, None, StoredWeights(model, Path(path).resolve().parent))
    return [
        FileLayer(info, file.stored(info.name), file.is_transposed(info.name))
        for info in file.layers()
        if info.weight is not None
    ]


def inlined(model: ModelProto) -> ModelProto:
    """The model with its local functions in the places where they are called."""
    if not model.functions:
        return model
    from onnx import inliner

    return inliner.inline_local_functions(model)


class _Shapes:
    """Shapes of all values for one batch."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        model: ModelProto,
        inputs: Mapping[str, TensorShape],
        samples: Mapping[str, np.ndarray],
    ) -> None:
        from onnx import shape_inference

        self.inputs = inputs
        self._samples = samples
        self._path = path
        self._fixed = type(model)()
        self._fixed.CopyFrom(model)
        for value in self._fixed.graph.input:
            if value.name in inputs:
                del value.type.tensor_type.shape.dim[:]
                for size in inputs[value.name]:
                    value.type.tensor_type.shape.dim.add().dim_value = size
        # infer_shapes keeps shapes that stand in the file, and those that an exporter wrote hold for another batch. So
        # they are cleared, as https://github.com/onnx/onnx/issues/2903 advises; needless once onnx infers them anew.
        del self._fixed.graph.value_info[:]
        for output in self._fixed.graph.output:
            output.type.tensor_type.ClearField("shape")
        self.known: dict[str, TensorShape] = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
        try:
            graph = shape_inference.infer_shapes(self._fixed, data_prop=True).graph
        except Exception:  # A model that onnx cannot infer is run instead; it raises several types.
            graph = self._fixed.graph
        for value in [*graph.value_info, *graph.input, *graph.output]:
            dims = value.type.tensor_type.shape.dim
            whole = value.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims)
            if whole:
                self.known[value.name] = tuple(dim.dim_value for dim in dims)

    def need(self, names: Iterable[str]) -> None:
        """Finds the shapes of these values, by a run where they were not inferred.

        Raises:
            ExportError: onnxruntime cannot run the file, on zeros where there are no samples.
            DataError: an input is no tensor of numbers.
        """
        missing = sorted({name for name in names if name and name not in self.known})
        if not missing:
            return
        arrays = dict(self._samples)
        for name, one in file_inputs(self._fixed).items():
            if name not in arrays and one.dtype is None:
                raise DataError(f"{self._path}: input {name!r} is a {one.kind}; give sample_inputs.")
            # Zeros are ids inside any embedding.
            arrays.setdefault(name, np.zeros(self.inputs[name], one.dtype))
        own = {output.name for output in self._fixed.graph.output}
        session = open_session(
            self._path, optimized=False, extra_outputs=[n for n in missing if n not in own], model=self._fixed
        )
        self.known |= {name: tuple(value.shape) for name, value in run_session(session, arrays, missing).items()}


@dataclass
class _OnnxLayer:
    """A layer of the file while its nodes are read."""

    kind: str
    weight: Stored | None
    inputs: tuple[TensorShape, ...]
    output: TensorShape
    groups: int
    bias: int
    macs: int = 0
    calls: int = 0
    inside: bool = False
    """In a branch or a loop."""
    node: NodeProto | None = None
    """The first that computes it."""


@dataclass
class _File:
    model: ModelProto
    shapes: _Shapes | None
    """None: shapes and MACs are left out."""
    weights: StoredWeights
    _found: dict[str, _OnnxLayer] = field(default_factory=dict)
    _unknown: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        costly: list[NodeProto] = []
        costly_inside: list[NodeProto] = []
        for node in self.model.graph.node:
            kind = _operator_name(node)
            if kind in CONTRACTING or kind == "Einsum" or self.weights.table(node) is not None:
                costly.append(node)
            elif kind in ("If", "Loop", "Scan"):
                inside = list(_inner(node))
                if any(_operator_name(inner) not in FREE_OPERATORS for inner in inside):
                    self._unknown[kind].append(node.name)
                costly_inside += [one for one in inside if self._has_weight(one)]
            elif kind not in FREE_OPERATORS:
                self._unknown[kind].append(node.name)
        if self.shapes is not None:
            self.shapes.need(
                [n for node in costly for n in [*(node.input[i] for i in _factors(node)), _first_tensor(node.output)]]
            )
        names = [self._name(node) for node in costly]
        numbers: Counter[str] = Counter()
        for node, name in zip(costly, names, strict=True):
            self._add(node, name, numbers)
        for node in costly_inside:
            self._add_inside(node)

    def unknown(self) -> tuple[UnknownOperator, ...]:
        return tuple(
            UnknownOperator(kind, len(where), tuple(dict.fromkeys(where))) for kind, where in self._unknown.items()
        )

    def _name(self, node: NodeProto) -> str | None:
        """The name in torch of the layer of this node; None for a function."""
        weight = self._weight(node)
        if weight is None:
            return None
        path, slash, _ = node.name.rpartition("/")
        layer = weight.parameter.removesuffix(".weight").removesuffix("_weight")
        if self.model.producer_name == "sparsify" and slash:
            return layer if not path or layer == path or weight.parameter.startswith(f"{path}.") else path
        return layer if weight.parameter.endswith("weight") and layer else node.name or _first_tensor(node.output)

    def _has_weight(self, node: NodeProto) -> bool:
        kind = _operator_name(node)
        if kind in ("LSTM", "GRU", "RNN"):
            return True
        multiplies = kind in CONTRACTING or kind == "Einsum" or self.weights.table(node) is not None
        return multiplies and self._weight(node) is not None

    def _add_inside(self, node: NodeProto) -> None:
        """A layer in a branch or a loop: how often it runs, and on what, only a run can tell, so its MACs are 0."""
        kind = _operator_name(node)
        held = {self._name(node) or "": self._weight(node)}
        if kind in ("LSTM", "GRU", "RNN"):
            full = node.name or _first_tensor(node.output)
            held = {
                f"{full}.{short}": self.weights.behind(node.input[index])
                for index, short in ((1, "weight_ih"), (2, "weight_hh"))
            }
        for name, weight in held.items():
            taken = self._found.get(name)
            if taken is not None and taken.weight is not None and taken.weight is not weight:
                name = _first_tensor(node.output)
            groups = next((int(one.i) for one in node.attribute if one.name == "group"), 1)
            bias = self.weights.bias(node)
            self._found.setdefault(name, _OnnxLayer(kind, weight, (), (), groups, bias, inside=True, node=node))

    def _shape(self, value: str) -> TensorShape:
        return () if self.shapes is None else self.shapes.known[value]

    def stored(self, layer: str) -> Stored | None:
        """The stored tensor of a layer's weight."""
        return self._found[layer].weight

    def is_transposed(self, layer: str) -> bool:
        """True if the weight of a linear layer is stored as (in, out)."""
        found = self._found[layer]
        if found.node is None or found.weight is None or len(found.weight.shape) != 2 or found.kind == "Gather":
            return False
        return found.kind in ("MatMul", "Gemm") and self.weights.is_input_first(found.node, found.weight)

    def _weight(self, node: NodeProto) -> Stored | None:
        if _operator_name(node) in ("LSTM", "GRU", "RNN"):
            return None
        found = [self.weights.behind(node.input[index]) for index in _factors(node)]
        return next((one for one in reversed(found) if one is not None and len(one.shape) > 1), None)

    def _add(self, node: NodeProto, name: str | None, numbers: Counter[str]) -> None:
        kind, output = _operator_name(node), self._shape(_first_tensor(node.output))
        operands = [self._shape(node.input[index]) for index in _factors(node)]
        path = node.name.rpartition("/")[0]
        if kind in ("LSTM", "GRU", "RNN"):
            steps = math.prod(operands[0][:-1])
            for index, short in ((1, "weight_ih"), (2, "weight_hh")):
                stored = self.weights.behind(node.input[index])
                full = f"{path or node.name}.{short}"
                macs = 0 if self.shapes is None else steps * math.prod(operands[index])
                self._note(full, kind, stored, (operands[0],), output, macs, 1, 0)
            return
        weight = self._weight(node)
        groups = next((int(one.i) for one in node.attribute if one.name == "group"), 1)
        macs = 0 if self.shapes is None else _node_macs(node, operands, output)[0]
        if weight is None or name is None:
            short = kind.lower()
            full = f"{path}.{short}" if path else short
            number = numbers[full]
            numbers[full] += 1
            self._note(f"{full}_{number}" if number else full, kind, None, tuple(operands), output, macs, groups, 0)
            return
        taken = self._found.get(name)
        if taken is not None and (taken.weight is None or taken.weight.parameter != weight.parameter):
            name = node.name or _first_tensor(node.output)
        inputs = tuple(
            self._shape(node.input[index])
            for index in _factors(node)
            if self.weights.behind(node.input[index]) is not weight
        )
        self._note(name, kind, weight, inputs, output, macs, groups, self.weights.bias(node))
        self._found[name].node = self._found[name].node or node

    def _note(
        self,
        name: str,
        kind: str,
        weight: Stored | None,
        inputs: tuple[TensorShape, ...],
        output: TensorShape,
        macs: int,
        groups: int,
        bias: int,
    ) -> None:
        layer = self._found.setdefault(name, _OnnxLayer(kind, weight, inputs, output, groups, bias))
        layer.macs += macs
        layer.calls += 1

    def layers(self) -> tuple[LayerInfo, ...]:
        first: dict[str, str] = {}
        found: list[LayerInfo] = []
        for name, layer in self._found.items():
            weight = layer.weight
            shared = first.setdefault(weight.parameter, name) if weight is not None else name
            own = weight.elements if weight is not None and shared == name else 0
            why = "" if weight is not None else NO_STORED_WEIGHT
            found.append(
                LayerInfo(
                    name=name,
                    type=layer.kind,
                    weight=weight.parameter if weight is not None else None,
                    shared_with=shared if shared != name else None,
                    input_shapes=layer.inputs,
                    output_shape=layer.output,
                    parameters=own + layer.bias,
                    weights=own,
                    macs=layer.macs,
                    calls=layer.calls,
                    groups=layer.groups,
                    sparsity=weight.sparsity if weight is not None else 0.0,
                    bits=weight.bits if weight is not None else 32,
                    why_not_prunable=why,
                    why_not_quantizable=IN_A_BRANCH if layer.inside else SCAN_STEPS if layer.kind == "RNN" else why,
                )
            )
        return tuple(found)


def _operator_name(node: NodeProto) -> str:
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"


def _first_tensor(names: Sequence[str]) -> str:
    return next(name for name in names if name)


def _inner(node: NodeProto) -> Iterable[NodeProto]:
    for attribute in node.attribute:
        for graph in [attribute.g, *attribute.graphs]:
            for inner in graph.node:
                yield inner
                yield from _inner(inner)


def _factors(node: NodeProto) -> tuple[int, ...]:
    kind = _operator_name(node)
    if kind == "Einsum":
        return tuple(range(len(node.input)))
    return (1, 0) if kind == "Gather" else CONTRACTING[kind]


def _node_macs(node: NodeProto, operands: list[TensorShape], output: TensorShape) -> tuple[int, int]:
    """(multiply-accumulates, groups)."""
    kind = _operator_name(node)
    from onnx import helper

    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if kind == "Gather":
        return 0, 1
    a, b = operands[:2] if len(operands) > 1 else (operands[0], ())
    groups = int(attributes.get("group", 1))
    if kind == "ConvTranspose":
        return math.prod(a) * math.prod(b[1:]), groups
    if kind in ("Conv", "DeformConv", "ConvInteger", "QLinearConv"):
        return math.prod(output) * math.prod(b[1:]), groups
    if kind == "Gemm":
        return math.prod(output) * a[0 if attributes.get("transA") else 1], 1
    if kind == "Einsum":
        return einsum_macs(attributes["equation"].decode(), operands), 1
    if kind == "Attention":
        return _attention_macs(attributes, operands), 1
    return math.prod(output) * a[-1], 1


def _attention_macs(attributes: Mapping[str, Any], operands: list[TensorShape]) -> int:
    q, k, v = operands
    if len(q) == 3:
        # (batch, length, heads * size)
        heads, shared = int(attributes["q_num_heads"]), int(attributes["kv_num_heads"])
        q, k, v = (
            (shape[0], count, shape[1], shape[2] // count)
            for shape, count in zip((q, k, v), (heads, shared, shared), strict=True)
        )
    return math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])
