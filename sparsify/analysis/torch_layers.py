"""Reads the layers of a torch model: its operators, grouped by the weights that they read."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from sparsify.analysis.layers import LayerInfo, ModelAnalysis, UnknownOperator
from sparsify.analysis.macs import CountedOperand, TensorShape
from sparsify.analysis.operations import Operation, from_program, recorded_operations
from sparsify.errors import ArgumentError, DataError, SparsifyError, TargetError, first_line
from sparsify.model.signature import InputsLike
from sparsify.model.signature import SampleInputs as Arguments
from sparsify.model.targets import is_prunable_layer, named_modules, named_parameters, refuse_unusable
from sparsify.model.trace import ModuleCall, ModuleNames, exported, plain_trace
from sparsify.model.wrappers import unwrapped
from sparsify.quantization.attention import Projection
from sparsify.quantization.conversion import original_type, weight_bits
from sparsify.quantization.layers import QuantizedEmbedding, QuantizedLayer
from sparsify.quantization.placement import make_plan
from sparsify.quantization.plan import is_quantized
from sparsify.quantization.recurrent import QuantizedRecurrent
from sparsify.quantization.scheme import QuantizationSettings
from sparsify.quantization.wiring import Converted

__all__: list[str] = []

IDLE = "it is not computed on the sample inputs"
NO_WEIGHT = "it has no weight of its own"
RECOMPUTED = "its weight is recomputed before every forward (weight_norm, a parametrization or torch's own pruning)"


def analyze_module(
    model: nn.Module, sample_inputs: InputsLike | None, sample_kwargs: Mapping[str, Any] | None
) -> ModelAnalysis:
    """The analysis of a torch module, as `analyze_model` returns it."""
    model = unwrapped(model)
    call = Arguments.of(model, () if sample_inputs is None and sample_kwargs else sample_inputs, sample_kwargs)
    args, kwargs = call.arguments(list(call.inputs.values()))
    operations: list[Operation] | None = None
    reasons = _Reasons(model)
    try:
        program = exported(model, args, kwargs)
    except ArgumentError as error:
        cause = error.__cause__ or error
        operations = recorded_operations(model, args, kwargs)
        reasons.untraceable = f"the model cannot be traced: {type(cause).__name__}: {first_line(cause)}"
    else:
        operations = from_program(model, program)
        if operations is None:
            operations = recorded_operations(model, args, kwargs)
        reasons.plan(model, program)
    layers = _Layers(model, operations, reasons)
    batch = next((tensor.shape[0] for tensor in call.inputs.values() if tensor.dim()), 1)
    return ModelAnalysis(
        model=type(model).__name__,
        layers=tuple(layers.all()),
        unknown=_unknown(operations),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        batch_size=int(batch),
    )


def _unknown(operations: list[Operation]) -> tuple[UnknownOperator, ...]:
    found: dict[str, list[str]] = defaultdict(list)
    for operation in operations:
        if operation.cost is None:
            found[operation.operator].append(operation.owner.path)
    return tuple(
        UnknownOperator(operator, len(where), tuple(dict.fromkeys(where))) for operator, where in found.items()
    )


@dataclass
class _TorchLayer:
    """A layer of the model while its operations are read."""

    weight: str | None
    operator: str
    path: str
    input_shapes: tuple[TensorShape, ...] = ()
    output: TensorShape = ()
    macs: int = 0
    groups: int = 1
    calls: set[ModuleCall] = field(default_factory=set)


class _Layers:
    """The operations of a model, grouped by layer.

    A layer is a weight in the hands of one module. The module that an operator stands in is the layer's, if it holds
    the weight; else the one that does hold it (attention reads the weight of `out_proj` without calling it), unless
    that one computes with it as well: then the operation is a function.
    """

    def __init__(self, model: nn.Module, operations: list[Operation], reasons: _Reasons) -> None:
        self.model = model
        self.reasons = reasons
        self.modules: dict[str, nn.Module] = {"": model, **named_modules(model)}
        self.parameters = named_parameters(model)
        self.holders: dict[str, list[tuple[str, str]]] = defaultdict(list)
        first = {id(parameter): name for name, parameter in self.parameters.items()}
        for path, module in self.modules.items():
            for own, parameter in module._parameters.items():
                if parameter is not None:
                    self.holders[first[id(parameter)]].append((path, own))
        costly = [operation for operation in operations if operation.cost is not None]
        # The modules that compute with their own weight, and the number of weights of each module.
        self.computing = {
            (operation.owner.path, weight) for operation in costly for weight, _ in self._weights(operation)
        }
        self.weights_of: dict[str, set[str]] = defaultdict(set)
        for operation in costly:
            for weight, _ in self._weights(operation):
                self.weights_of[self._holder(operation, weight)[0]].add(weight)
        self.found: dict[str, _TorchLayer] = {}
        numbers: Counter[tuple[ModuleCall, str]] = Counter()
        for operation in costly:
            self._add(operation, numbers)

    def _weights(self, operation: Operation) -> list[tuple[str, CountedOperand]]:
        """The parameters among what it multiplies, vectors left out."""
        assert operation.cost is not None
        factors = operation.cost.factors
        named = [(f.parameter, f) for f in factors if f.parameter is not None and len(f.shape) > 1]
        return named if operation.cost.recurrent else named[-1:]

    def _holder(self, operation: Operation, weight: str) -> tuple[str, str]:
        """(path, own name) of the module whose layer this is."""
        holders = self.holders[weight]
        return next((holder for holder in holders if holder[0] == operation.owner.path), holders[0])

    def _add(self, operation: Operation, numbers: Counter[tuple[ModuleCall, str]]) -> None:
        cost = operation.cost
        assert cost is not None
        owner = operation.owner
        weights = self._weights(operation)
        total = sum(operand.size for _, operand in weights)
        if weights:
            for weight, operand in weights:
                path, own = self._holder(operation, weight)
                if path != owner.path and (path, weight) in self.computing:
                    name = self._function(operation, numbers)
                else:
                    alone = own == "weight" and len(self.weights_of[path]) == 1
                    name = path if alone else _joined(path, own.removesuffix("_weight"))
                share = cost.macs * operand.size // total if cost.recurrent else cost.macs
                others = tuple(f.shape for f in cost.factors if f is not operand and f.parameter is None)
                self._note(name, weight, path, operation, share, others)
            return
        # A weight that is computed before it is used: quantized, normalized, under a parametrization.
        module: Any = self.modules.get(owner.path)
        made = module is not None and is_prunable_layer(module) and isinstance(getattr(module, "weight", None), Tensor)
        size = module.weight.numel() if made else 0
        made_weight = next((factor for factor in cost.factors[1:] if factor.size == size), None)
        if made and made_weight is not None:
            own = _joined(owner.path, "weight")
            others = tuple(factor.shape for factor in cost.factors if factor is not made_weight)
            weight_name = own if own in self.parameters else None
            held = module.parameter if isinstance(module, Projection) else module._parameters.get("weight")
            if weight_name is None and held is not None:
                weight_name = next((n for n, p in self.parameters.items() if p is held), None)
            self._note(owner.path, weight_name, owner.path, operation, cost.macs, others)
        elif cost.macs:
            shapes = tuple(factor.shape for factor in cost.factors)
            self._note(self._function(operation, numbers), None, owner.path, operation, cost.macs, shapes)

    def _function(self, operation: Operation, numbers: Counter[tuple[ModuleCall, str]]) -> str:
        """The name of an operation that belongs to no layer; the second of a forward is "matmul_1"."""
        key = (operation.owner, operation.operator)
        number = numbers[key]
        numbers[key] += 1
        short = operation.operator.rpartition(":")[2]
        return _joined(operation.owner.path, f"{short}_{number}" if number else short)

    def _note(
        self, name: str, weight: str | None, path: str, operation: Operation, macs: int, inputs: tuple[TensorShape, ...]
    ) -> None:
        assert operation.cost is not None
        layer = self.found.get(name)
        if layer is None:
            layer = _TorchLayer(
                weight, operation.operator, path, inputs, operation.output, groups=operation.cost.groups
            )
            self.found[name] = layer
        layer.macs += macs
        layer.calls.add(operation.owner)

    def all(self) -> Iterator[LayerInfo]:
        """The layers in the order of computation; those that are not computed come last."""
        counted: set[int] = set()
        first: dict[str, str] = {}
        for name, layer in self.found.items():
            yield self._info(name, layer, first, counted)
        seen = {layer.path for layer in self.found.values()}
        for path, module in self.modules.items():
            weight = module._parameters.get("weight") if is_prunable_layer(module) else None
            if weight is not None and path not in seen:
                named = next(name for name, parameter in self.parameters.items() if parameter is weight)
                yield self._info(path, _TorchLayer(named, "", path), first, counted)

    def _info(self, name: str, layer: _TorchLayer, first: dict[str, str], counted: set[int]) -> LayerInfo:
        """The layer as a value.

        Args:
            name: its name in the analysis.
            layer: what was read of it.
            first: {weight: the layer that holds it and came first}; a weight that is new is added.
            counted: ids of the parameters that belong to earlier layers; its own are added.
        """
        module = self.modules.get(layer.path)
        parameter = self.parameters.get(layer.weight) if layer.weight is not None else None
        is_function = module is None or self._is_function(name, layer)
        # Rows of a packed weight are a layer's own.
        rows = module if isinstance(module, Projection) else None
        shared = first.setdefault(layer.weight, name) if layer.weight is not None and rows is None else name
        values = rows.weight if rows is not None and parameter is not None else parameter
        weights, zeros = 0, 0.0
        if values is not None:
            weights, zeros = values.numel() if shared == name else 0, sparsity_of(values)
        elif not is_function and module is not None and isinstance(module.weight, Tensor):
            weights = module.weight.numel()
        prunable, quantizable = self._why_not(name, layer, module, parameter, is_function)
        return LayerInfo(
            name=name,
            type=layer.operator.rpartition(":")[2] if is_function or module is None else _class(module),
            weight=layer.weight,
            shared_with=shared if shared != name else None,
            input_shapes=layer.input_shapes,
            output_shape=layer.output,
            parameters=_projection_size(rows) + (0 if is_function else self._count(name, layer, counted)),
            weights=weights,
            macs=layer.macs,
            calls=len(layer.calls),
            groups=layer.groups,
            sparsity=zeros,
            bits=_value_bits(module, parameter),
            why_not_prunable=prunable,
            why_not_quantizable=quantizable,
        )

    def _is_function(self, name: str, layer: _TorchLayer) -> bool:
        """True if the layer is an operation without a weight of its own."""
        return name != layer.path and name not in {
            _joined(path, own.removesuffix("_weight")) for path, own in self.holders.get(layer.weight or "", [])
        }

    def _count(self, name: str, layer: _TorchLayer, counted: set[int]) -> int:
        """Number of elements of the layer's own parameters that are not in `counted` yet; they are added to it."""
        total = 0
        for parameter in self._own(layer, self.modules[layer.path], name):
            if id(parameter) not in counted:
                counted.add(id(parameter))
                total += parameter.numel()
        return total

    def _why_not(
        self,
        name: str,
        layer: _TorchLayer,
        module: nn.Module | None,
        parameter: nn.Parameter | None,
        is_function: bool,
    ) -> tuple[str, str]:
        """The reasons why the layer cannot be pruned and cannot be quantized; empty where it can be."""
        if parameter is None or layer.weight is None:
            prunable = quantizable = NO_WEIGHT if is_function else RECOMPUTED
        else:
            prunable = _why_not_prunable(layer.weight, parameter)
            quantizable = self.reasons.why_not(name, layer.path, module)
        return (prunable, quantizable) if layer.calls else (prunable or IDLE, IDLE)

    def _own(self, layer: _TorchLayer, module: nn.Module, name: str) -> Iterator[nn.Parameter]:
        """The parameters that are the layer's: its weight and bias, or all that a module with one weight holds."""
        if name == layer.path and len(self.weights_of[layer.path]) <= 1:
            yield from (p for p in module._parameters.values() if p is not None)
            made = module._modules.get("parametrizations")
            if made is not None:
                yield from made.parameters()
            return
        for path, own in self.holders.get(layer.weight or "", []):
            if path == layer.path and _joined(path, own.removesuffix("_weight")) == name:
                yield self.parameters[layer.weight or ""]
                bias = module._parameters.get(own.replace("weight", "bias")) if "weight" in own else None
                if bias is not None:
                    yield bias


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _projection_size(rows: Projection | None) -> int:
    if rows is None:
        return 0
    return rows.weight.numel() + (0 if rows.bias is None else rows.bias.numel())


def _value_bits(module: nn.Module | None, parameter: nn.Parameter | None) -> int:
    """Bits of a value of the weight: those of its quantizer, else those of its storage."""
    if parameter is None:
        return 32
    if isinstance(module, QuantizedLayer | QuantizedEmbedding | QuantizedRecurrent) and weight_bits(module):
        return weight_bits(module)
    return parameter.dtype.itemsize * 8


def _class(module: nn.Module) -> str:
    """The name of the module's class; of a quantized module, that of the class it had before."""
    return original_type(module).__name__


def sparsity_of(weight: Tensor) -> float:
    """The fraction of zeros, counted one by one: a row that sums to 0 is not a pruned row."""
    if not weight.numel() or weight.is_meta:
        return 0.0
    return (weight.numel() - int(torch.count_nonzero(weight.detach()))) / weight.numel()


def _why_not_prunable(name: str, parameter: nn.Parameter) -> str:
    if not parameter.is_floating_point():
        return f"its weight is {str(parameter.dtype).removeprefix('torch.')}"
    try:
        refuse_unusable({name: parameter}, where="pruning")
    except (TargetError, DataError) as error:
        return str(error).removeprefix("pruning: ")
    return ""


class _Reasons:
    """The reasons for which layers stay in float, from the planner of quantization."""

    def __init__(self, model: nn.Module) -> None:
        self.quantized = is_quantized(model)
        self.untraceable = ""
        self.layers: set[str] = set()
        self.left: dict[str, str] = {}

    def plan(self, model: nn.Module, program: ExportedProgram) -> None:
        if self.quantized:
            return
        try:
            plan = make_plan(model, plain_trace(program, ModuleNames(model)), QuantizationSettings())
        except SparsifyError as error:
            self.untraceable = str(error)
            return
        # A packed weight is one layer here, however many layers it is quantized in.
        self.layers = {layer.name for layer in plan.layers} | {f"{name}.in_proj" for name in plan.attentions}
        self.left = {left.what: left.why for left in plan.left}

    def why_not(self, name: str, path: str, module: nn.Module | None) -> str:
        if self.quantized:
            return "" if isinstance(module, Converted) else "it was left in float when the model was quantized"
        if self.untraceable:
            return self.untraceable
        # Of a recurrent layer each weight is listed, and all are quantized together.
        if name in self.layers or (path in self.layers and isinstance(module, nn.RNNBase)):
            return ""
        above = path.rpartition(".")[0]
        kind = type(module).__name__
        why = self.left.get(name) or self.left.get(path) or self.left.get(above)
        return why or f"{kind} is not a layer that is quantized"
