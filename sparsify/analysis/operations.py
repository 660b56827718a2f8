"""Lists the operators that a model runs on sample inputs, from its traced program or from one recorded forward."""

from __future__ import annotations

import traceback
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sparsify.analysis.macs import FREE_OPERATIONS, Cost, CountedOperand, TensorShape, operation_cost
from sparsify.errors import ArgumentError, first_line
from sparsify.model.preserved import eval_mode_, preserved
from sparsify.model.trace import ModuleCall, ModuleNames, without_fast_path
from sparsify.model.wrappers import clean_name

__all__: list[str] = []


@dataclass(frozen=True)
class Operation:
    """One call of an operator that multiplies, or of one that is not known.

    Attributes:
        operator: without the namespace "aten", overload and the "_" of in-place ones.
        owner: the call of the innermost module in whose forward it stands.
        cost: None where the operator is not known.
    """

    operator: str
    owner: ModuleCall
    cost: Cost | None
    output: TensorShape


def from_program(model: nn.Module, program: ExportedProgram) -> list[Operation] | None:
    """The operations of an ExportedProgram; None where it holds programs within, whose operators it does not show."""
    names = ModuleNames(model)
    parameters = {
        name: names.parameters.get(target, clean_name(target))
        for name, target in program.graph_signature.inputs_to_parameters.items()
    }
    found: list[Operation] = []
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return None
        if not isinstance(node.target, OpOverload):
            # Arithmetic of Python on sizes, and picking one of several outputs.
            _follow(node, parameters)
            continue
        stack = list(names.calls(node.meta.get("nn_module_stack") or {}))
        args = pytree.tree_map(lambda value: _operand_of_node(value, parameters), list(node.args))
        operation = _operation(node.target, args, stack[-1] if stack else ModuleCall("", 0), node.meta.get("val"))
        if operation is not None:
            found.append(operation)
        elif _moves_values(node.target):
            _follow(node, parameters)
    return found


def _follow(node: torch.fx.Node, parameters: dict[str, str]) -> None:
    """Adds a view or a part of a parameter to `parameters`, under the parameter's name."""
    read = node.all_input_nodes
    if len(read) == 1 and read[0].name in parameters:
        parameters[node.name] = parameters[read[0].name]


def _operand_of_node(value: object, parameters: dict[str, str]) -> object:
    if not isinstance(value, torch.fx.Node):
        return value
    tensor = value.meta.get("val")
    return (
        CountedOperand(tuple(map(int, tensor.shape)), parameters.get(value.name))
        if isinstance(tensor, Tensor)
        else tensor
    )


def recorded_operations(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Operation]:
    """The operations of one forward in eval mode, without gradients.

    Modes, random states, buffers and hooks are afterwards as before.

    Raises:
        ArgumentError: the model fails on these inputs; the message says in which module.
    """
    watch = _OperationRecorder(model)
    handles: list[Any] = []
    try:
        with (
            preserved(model),
            without_fast_path(),
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
        ):
            eval_mode_(model)
            for name, module in model.named_modules():
                path = clean_name(name)
                handles.append(module.register_forward_pre_hook(lambda *_, path=path: watch.enter(path)))
                handles.append(module.register_forward_hook(lambda *_: watch.leave(), always_call=True))
            with watch:
                model(*args, **kwargs)
    except Exception as error:  # whatever the user's forward raises
        path = _failed_in(model, error)
        where = f" in {path}" if path else ""
        raise ArgumentError(
            f"{type(model).__name__} fails on these inputs{where}: {type(error).__name__}: {first_line(error)} "
            "Give sample_inputs that the model accepts as they are."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return watch.found


def _failed_in(model: nn.Module, error: BaseException) -> str:
    """The path of the innermost module that the error went through."""
    paths = {id(module): clean_name(name) for name, module in model.named_modules()}
    frames = traceback.walk_tb(error.__traceback__)
    return next(
        reversed([paths[id(self)] for frame, _ in frames if id(self := frame.f_locals.get("self")) in paths]), ""
    )


class _OperationRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes operators, and the calls of modules that they stand in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Operation] = []
        self.stack: list[ModuleCall] = []
        self.numbers: Counter[str] = Counter()
        # By storage: what is multiplied is mostly a view of the parameter.
        self.parameters: dict[int, str] = {}
        for name, parameter in model.named_parameters():
            self.parameters[parameter.untyped_storage()._cdata] = clean_name(name)

    def enter(self, path: str) -> None:
        self.stack.append(ModuleCall(path, self.numbers[path]))
        self.numbers[path] += 1

    def leave(self) -> None:
        self.stack.pop()

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        plain = pytree.tree_map(self._operand, list(args))
        operation = _operation(func, plain, self.stack[-1] if self.stack else ModuleCall("", 0), result)
        if operation is not None:
            self.found.append(operation)
        return result

    def _operand(self, value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        shape = tuple(map(int, value.shape))
        if not _has_storage(value):
            return CountedOperand(shape)
        name = self.parameters.get(value.untyped_storage()._cdata)
        return CountedOperand(shape, name)


def _has_storage(value: Tensor) -> bool:
    return value.layout is torch.strided and not value.is_nested


def _operation(target: OpOverload, args: list[Any], owner: ModuleCall, result: object) -> Operation | None:
    """The operation of one call; None for an operator that multiplies nothing."""
    namespace, _, name = target._schema.name.partition("::")
    name = name if name.startswith("__") else name.rstrip("_")
    operator = name if namespace in ("aten", "prims") else f"{namespace}::{name}"
    first = next((value for value in pytree.tree_leaves(result) if isinstance(value, Tensor)), None)
    output = tuple(map(int, first.shape)) if first is not None else ()
    cost = operation_cost(operator, args, output)
    if cost is not None:
        return Operation(_plain_name(operator), owner, cost, output)
    return None if _is_free(target, operator) else Operation(operator, owner, None, output)


def _plain_name(operator: str) -> str:
    """One name for attention, whichever kernel computes it."""
    return "scaled_dot_product_attention" if operator.startswith("_scaled_dot_product") else operator


def _is_free(target: OpOverload, operator: str) -> bool:
    tags = {torch.Tag.pointwise, torch.Tag.reduction, torch.Tag.view_copy} & set(target.tags)
    reads = any("Tensor" in str(argument.type) for argument in target._schema.arguments)
    # Our own operators quantize, dequantize and mask.
    return (
        bool(tags)
        or not reads
        or _moves_values(target)
        or operator in FREE_OPERATIONS
        or operator.startswith("sparsify::")
    )


def _moves_values(target: OpOverload) -> bool:
    """True if the operator returns a view of its input, or a copy of such a view."""
    aliases = [argument.alias_info for argument in target._schema.arguments]
    return any(alias is not None and not alias.is_write for alias in aliases)
