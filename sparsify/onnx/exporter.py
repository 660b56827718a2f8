"""Speed, exact constants, and two more operators for torch's exporter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from onnx_ir import Value

__all__: list[str] = []

FROM_TORCHLIB = "from_torchlib"
REWRITE_RULES = "_DEFAULT_REWRITE_RULES"
_kept: dict[tuple[int, int], Any] = {}


@contextmanager
def kept_registry() -> Iterator[None]:
    """Lets `torch.onnx.export` find its registry of translations ready, where it was built before.

    For every export torch parses the sources of some 500 functions of onnxscript again: .6 of the 1.0 CPU-seconds that
    a small network takes (`ONNXRegistry.from_torchlib`, seen in torch 2.13.0 with onnxscript 0.7.2). Needless once
    torch keeps them. Where torch is built otherwise, nothing is changed.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        original = _original(ONNXRegistry)
    except (ImportError, AttributeError, KeyError):
        yield
        return

    def from_torchlib(cls: type, *args: Any, **kwargs: Any) -> Any:
        opset = kwargs.get("opset_version", args[0] if args else 0)
        # Operators that a library registered since then have translations too: torchvision's, for one.
        key = opset, len(torch._C._dispatch_get_all_op_names())
        if key not in _kept:
            _kept[key] = original.__func__(cls, *args, **kwargs)
        registry = copy.copy(_kept[key])
        # What an export adds is for itself.
        registry.functions = {target: list(decompositions) for target, decompositions in registry.functions.items()}
        return registry

    setattr(ONNXRegistry, FROM_TORCHLIB, classmethod(from_torchlib))
    try:
        yield
    finally:
        setattr(ONNXRegistry, FROM_TORCHLIB, original)


@contextmanager
def exact_constants() -> Iterator[None]:
    """Lets the exporter's optimizer drop x + c, x - c, x * c and x / c only where c is exactly 0, or exactly 1.

    It takes a constant within 1e-8 of 0, or 1e-5 of 1, for it: log(x + 1e-10) became log(x), which is -inf at 0
    (`rewriter/rules/common/_no_op.py`, seen in onnxscript 0.5.0 to 0.7.2). Needless once its patterns match exactly.
    """
    from onnxscript import rewriter

    default = getattr(rewriter, REWRITE_RULES, None)
    if default is None:  # built otherwise: the values of the file are compared all the same
        yield
        return
    setattr(rewriter, REWRITE_RULES, _exact(_default_rules()))
    try:
        yield
    finally:
        setattr(rewriter, REWRITE_RULES, _default_rules())


def missing_translations(opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Translations of operators for which torch's exporter has none, for `custom_translation_table`.

    `torch._check` of tensors, in 129 of the modelling files of transformers 5, calls the first; seen in torch 2.13.0.
    """
    from onnx import TensorProto
    from onnxscript import onnx_opset

    op: Any = onnx_opset.all_opsets["", opset]

    def all_true(x: Any) -> Any:
        return op.Cast(op.ReduceMin(op.Cast(x, to=TensorProto.INT32), keepdims=0), to=TensorProto.BOOL)

    def any_true(x: Any) -> Any:
        return op.Cast(op.ReduceMax(op.Cast(x, to=TensorProto.INT32), keepdims=0), to=TensorProto.BOOL)

    return {torch.ops.aten._is_all_true.default: all_true, torch.ops.aten._is_any_true.default: any_true}


@cache
def _original(registry: type) -> Any:
    """The class's own method; asked once, since another export may have put a kept one in its place."""
    return vars(registry)[FROM_TORCHLIB]


@cache
def _default_rules() -> tuple[Any, ...]:
    """The optimizer's own rules; asked once, likewise."""
    from onnxscript import rewriter

    return tuple(getattr(rewriter, REWRITE_RULES))


@cache
def _exact(default: tuple[Any, ...]) -> tuple[Any, ...]:
    """The rules of `default`; in place of those that match a constant roughly, some that match it exactly."""
    from onnxscript.rewriter import pattern
    from onnxscript.rewriter.rules.common import _no_op

    rough = {id(rule) for rule in _no_op.rules}
    rules: list[Any] = []
    for operator, neutral, commutes in (("Add", 0, True), ("Sub", 0, False), ("Mul", 1, True), ("Div", 1, False)):
        rule = pattern.RewriteRule(_applied(operator), _first, _equals(neutral))
        rules += rule.commute() if commutes else [rule]
    return (*rules, *(rule for rule in default if id(rule) not in rough))


def _applied(operator: str) -> Callable[..., Any]:
    return lambda op, x, constant: getattr(op, operator)(x, constant)


def _first(op: Any, x: Value, **_: Value) -> Any:
    return op.Identity(x)


def _equals(number: int) -> Callable[..., bool]:
    def condition(_context: object, constant: Value, **_: Value) -> bool:
        value = constant.const_value
        # Of rank 0 alone: a longer one may broadcast.
        return value is not None and value.shape.rank() == 0 and value.numpy().item() == number

    return condition
