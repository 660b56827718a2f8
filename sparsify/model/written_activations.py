"""Activations that a user's module writes out: x * relu6(x + 3) / 6, a hard sigmoid by clamp, x * sigmoid(x).

A module without weights that computes, of one tensor and numbers alone, what an activation of torch computes is that
activation in a trace, however it is written. The two are compared as functions, on a range of numbers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Node

__all__: list[str] = []

WRITTEN: dict[str, Callable[[Tensor], Tensor]] = {
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
"""The activations that are known in other words."""
_OF_EACH_NUMBER = frozenset(
    ("add", "sub", "rsub", "mul", "multiply", "div", "neg", "reciprocal", "exp", "sigmoid", "tanh", "relu", "relu6")
) | {"hardtanh", "hardsigmoid", "clamp", "clamp_min", "clamp_max", "minimum", "maximum"}
"""Operators whose results are of each number alone; written in place they end in "_"."""


def written_activations(
    program: ExportedProgram, path: Callable[[dict[str, Any]], str]
) -> tuple[dict[str, tuple[str, Node, int]], frozenset[str]]:
    """The results of such modules, and the other nodes of theirs.

    Results stand as {node: (activation, what it reads, depth of the module in its stack)}.

    Args:
        program: of the model.
        path: the name of the innermost module that a node stands in, from its stack of modules.
    """
    calls: dict[tuple[str, ...], list[Node]] = defaultdict(list)
    for node in program.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        keys = tuple(stack) if node.op == "call_function" and path(stack) else ()
        for depth in range(1, len(keys) + 1):
            calls[keys[:depth]].append(node)
    merged: dict[str, tuple[str, Node, int]] = {}
    inner: set[str] = set()
    # Outermost first: the hard sigmoid inside of a hard swish is no activation of its own.
    for keys in sorted(calls, key=len):
        nodes = calls[keys]
        if len(nodes) < 2 or nodes[-1].name in merged or any(node.name in inner for node in nodes):
            continue
        found = _activation(nodes)
        if found is not None:
            merged[nodes[-1].name] = (*found, len(keys))
            inner |= {node.name for node in nodes[:-1]}
    return merged, frozenset(inner)


def _activation(nodes: list[Node]) -> tuple[str, Node] | None:
    """(activation, what is read) of the operations of one call; None if they compute anything else."""
    own = set(nodes)
    read = {each for node in nodes for each in node.all_input_nodes if each not in own}
    if len(read) != 1 or len(nodes) > 12 or any(user not in own for node in nodes[:-1] for user in node.users):
        return None
    (given,) = read
    before, after = given.meta.get("val"), nodes[-1].meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor) or before.shape != after.shape:
        return None
    if not before.is_floating_point() or before.dtype != after.dtype:
        return None
    for node in nodes:
        op = str(getattr(node.target, "_opname", ""))
        writes = op.endswith("_") and node.all_input_nodes[:1] == [given]
        numbers = [each for each in (*node.args, *node.kwargs.values()) if not hasattr(each, "op")]
        if op.rstrip("_") not in _OF_EACH_NUMBER or writes or not all(_is_plain_number(each) for each in numbers):
            return None

    def computed(x: Tensor) -> Tensor:
        values: dict[Any, Any] = {given: x}
        for node in nodes:
            args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
            target: Any = node.target
            values[node] = target(*args, **kwargs)
        result: Tensor = values[nodes[-1]]
        return result

    name = activation_of(computed)
    return None if name is None else (name, given)


@torch.no_grad()
def activation_of(function: Callable[[Tensor], Tensor]) -> str | None:
    """The activation of `WRITTEN` that a function of one tensor computes, in float64 on -12 to 12; None: another."""
    x = torch.linspace(-12.0, 12.0, 1537, dtype=torch.float64)
    try:
        result = function(x.clone())
    # A function of a user may want other inputs, and fail in any way.
    except Exception:
        return None
    if not isinstance(result, Tensor) or result.shape != x.shape:
        return None
    near = (name for name, one in WRITTEN.items() if bool(((result - one(x)).abs() < 1e-6).all()))
    return next(near, None)


def _is_plain_number(value: object) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value))
