"""Modules that scale and shift channels as a BatchNorm does in eval mode: frozen BatchNorms, learned scales and biases.

x * scale + bias, in any order and number of steps, with numbers of each channel that come from the module's own
parameters and buffers. A trace has one operation for them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Node

__all__: list[str] = []

AFFINE = "channel_affine"
"""The name in a trace of what such a module computes."""
_STEPS = frozenset({"mul", "multiply", "add", "sub", "div"})


def channel_affine(
    program: ExportedProgram, path: Callable[[dict[str, Any]], str], stored: Container[str]
) -> tuple[dict[str, Node], frozenset[str]]:
    """({node that gives the result of such a module: node that it reads}, the other nodes of these modules).

    Args:
        program: of the model.
        path: the name of the innermost module that a node stands in, from its stack of modules.
        stored: the placeholders of parameters, buffers and constants.
    """
    calls: dict[tuple[str, ...], list[Node]] = defaultdict(list)
    for node in program.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        if node.op == "call_function" and path(stack):
            calls[tuple(stack)].append(node)
    merged: dict[str, Node] = {}
    inner: set[str] = set()
    for nodes in calls.values():
        chain = _chain(nodes, stored)
        if chain is not None:
            read, last = chain
            merged[last.name] = read
            inner |= {node.name for node in nodes if node is not last}
    return merged, frozenset(inner)


def _chain(nodes: list[Node], stored: Container[str]) -> tuple[Node, Node] | None:
    """(what is read, the result) of the operations of one call; None if they do more than scale and shift channels."""
    own = set(nodes)
    constant = {each for node in nodes for each in node.all_input_nodes if each.name in stored}
    scaled = bool(constant)
    read: Node | None = None
    last: Node | None = None
    for node in nodes:
        values = [each for each in node.all_input_nodes if each not in constant]
        if not values:
            # Of stored numbers alone, and for this module alone.
            constant.add(node)
            if any(user not in own for user in node.users):
                return None
            continue
        first = read is None
        if len(values) != 1 or (values[0] in own) == first or (last is not None and values[0] is not last):
            return None
        if not _is_step(node, values[0]) or (last is not None and set(last.users) != {node}):
            return None
        read, last = read or values[0], node
    return None if read is None or last is None or not scaled else (read, last)


def _is_step(node: Node, value: Node) -> bool:
    """True if `node` scales or shifts the channels of `value` by stored numbers."""
    op = str(getattr(node.target, "_opname", ""))
    before, after = value.meta.get("val"), node.meta.get("val")
    if op not in _STEPS or not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    if not before.is_floating_point() or not 3 <= before.dim() <= 5 or before.shape != after.shape:
        return False
    operands: list[Any] = list(node.args[:2])
    if operands.count(value) != 1 or (op == "div" and operands[0] is not value):
        return False
    other = operands[1 - operands.index(value)]
    shape = getattr(getattr(other, "meta", {}).get("val"), "shape", ())
    whole = (1,) * (before.dim() - len(shape)) + tuple(shape)
    return all(size == 1 for axis, size in enumerate(whole) if axis != 1)
