"""Finds coupled channels by running the exported program on integer channel labels.

Data movement is done by the real operator on label tensors, so concatenation, channel shuffles, windows, fused
projections and repeated heads need no rule. Pointwise operators unite the channels of their operands, mixing ones all
that they mix. Layers with weights begin new channels with their rows. An operator that is not known keeps all that it
reads.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from sparsify.pruning.label_rules import is_pointwise, rule_of
from sparsify.pruning.label_tensors import along, core, never, thin, varying
from sparsify.pruning.labels import (
    LINEAR_WEIGHT_ARGUMENT,
    WEIGHT_ARGUMENT,
    Bound,
    ChannelLabels,
    LabelState,
    argument_node,
    arguments,
    name_of,
    no_labels,
    tensor_inputs,
)

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__: list[str] = []


def propagate_labels(model: nn.Module, program: ExportedProgram) -> ChannelLabels:
    """The labels of all parameters, buffers and activations of `program`, exported from `model`.

    Bounds are enforced: every tensor can lose slices along one dimension only.
    """
    propagation = _LabelPropagation(model, program)
    propagation.run(program.graph_module.graph, None)
    _enforce_bounds(propagation.state.result)
    return propagation.state.result


def _enforce_bounds(found: ChannelLabels) -> None:
    """Unites channel ids until all bounds hold and every tensor varies along one dimension at most."""
    channel_ids = found.channel_ids
    waiting: dict[tuple[Any, ...], Bound] = {}
    grids = [Bound(labels, tuple(range(labels.dim())), "parameter") for labels in found.tables.values()]
    for owner, labels in found.made:
        why = f"a view in {owner or 'the model'} splits its channels"
        grids.append(Bound(labels, tuple(range(labels.dim())), why))
    for bound in [*found.bounds, *grids]:
        inner = core(bound.labels)
        dims = [dim for dim, size in enumerate(inner.shape) if size > 1]
        if dims and not (len(dims) == 1 and dims[0] in bound.free):
            waiting.setdefault((inner.data_ptr(), inner.shape, inner.stride(), bound.free), bound)
    changed = True
    while changed:
        changed = False
        for key, bound in list(waiting.items()):
            labels = thin(channel_ids.roots(bound.labels))
            dims = varying(labels)
            free = [dim for dim in dims if dim in bound.free]
            if not dims:
                del waiting[key]
            elif not free:
                channel_ids.keep(labels, bound.why)
                del waiting[key]
            elif len(dims) > 1:
                # The one along which most can be told apart; of equals the last.
                counts = {d: len(set(core(labels).amin([o for o in dims if o != d]).flatten().tolist())) for d in free}
                best = max(free, key=lambda dim: (counts[dim], dim))
                channel_ids.mix(labels, [dim for dim in dims if dim != best], bound.why)
                changed = True


class _LabelPropagation:
    """One run through the nodes of a program, in the order in which they are computed."""

    def __init__(self, model: nn.Module, program: ExportedProgram) -> None:
        self.state = LabelState(model, program, rule_of, is_pointwise)
        self.state.find_weights(program.graph_module.graph)

    def run(self, graph: Graph, inputs: Sequence[Any] | None) -> list[Any] | None:
        """Computes the labels of a graph; `inputs`: those of its placeholders where it stands inside another one."""
        state = self.state
        given = iter(inputs or ())
        for node in graph.nodes:
            state.node = node
            if node.op == "placeholder":
                if inputs is not None:
                    state.results[node] = next(given)
                elif state.tensor(node) is None:
                    state.results[node] = no_labels(node)
            elif node.op == "call_function":
                if node in state.on_the_way:
                    continue
                state.results[node] = made = state.checked(node, self._call(node))
                path = state.owner(node)
                for labels in made if isinstance(made, (list, tuple)) else [made]:
                    if isinstance(labels, Tensor) and varying(labels):
                        state.result.made.append((path, labels))
            elif node.op == "output":
                if inputs is not None:
                    outputs: Any = node.args[0]
                    return [state.read(one) if isinstance(one, Node) else one for one in outputs]
                for one in node.all_input_nodes:
                    state.keep(one, "the model returns them")
        return None

    def _call(self, node: Node) -> Any:
        state = self.state
        target = node.target
        if target is operator.getitem:
            whole = state.results.get(argument_node(node))
            index: Any = node.args[1]
            return whole[index] if isinstance(whole, (list, tuple)) else None
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self._inner_graph(node)
        value = node.meta.get("val")
        values = value if isinstance(value, (list, tuple)) else [value]
        if not isinstance(target, torch._ops.OpOverload) or not any(isinstance(one, Tensor) for one in values):
            return None
        given = arguments(node)
        if name_of(node) in WEIGHT_ARGUMENT:
            labels = self._weighted(node, given)
            if labels is not None:
                return labels
        read = tensor_inputs(node)
        if not any(state.tensor(one) for one in read) and not any(core(state.read(one)).any() for one in read):
            return no_labels(node)
        rule = rule_of(node)
        try:
            return None if rule is None else rule(state, node, given)
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError):
            # An overload whose arguments the rule does not expect: it is as good as unknown.
            return None

    def _inner_graph(self, node: Node) -> Any:
        """The labels of a graph inside the graph, which torch.autocast and torch.no_grad in the model's code make."""
        for position, argument in enumerate(node.args):
            if isinstance(argument, Node) and argument.op == "get_attr":
                module = operator.attrgetter(str(argument.target))(argument.graph.owning_module)
                inputs = [one for one in node.args[position + 1 :] if isinstance(one, Node)]
                placeholders = [one for one in module.graph.nodes if one.op == "placeholder"]
                if len(placeholders) == len(inputs) == len(node.args) - position - 1:
                    for placeholder, one in zip(placeholders, inputs, strict=True):
                        self.state.alias(placeholder, one)
                    self.state.find_weights(module.graph)
                    outer = self.state.node
                    made = self.run(module.graph, [self.state.results.get(one) for one in inputs])
                    self.state.node = outer
                    return made
        return None

    # -- weights ------------------------------------------------------------------------------------------------

    def _weighted(self, node: Node, given: dict[str, Any]) -> Tensor | None:
        """Convolutions, linear layers, embeddings: columns have the labels of the input, rows new ones."""
        state, op = self.state, name_of(node)
        weight_node = argument_node(node, WEIGHT_ARGUMENT[op])
        name, order, _ = state.weight_of(weight_node)
        if name is None or name not in state.weights or (op in ("mm", "matmul") and len(order) != 2):
            return None
        shape = node.meta["val"].shape
        where = state.layer(node)
        weight = weight_node.meta["val"]
        if op == "embedding":
            state.result.layers[name] = "embedding"
            state.register(name, 0, never(weight.shape[:1]), "other", f"{where} looks them up by number")
            return along(state.rows(name, 1, weight.shape[1]), len(shape) - 1, shape)
        if op in LINEAR_WEIGHT_ARGUMENT:
            state.result.layers.setdefault(name, "linear")
            source = state.read(argument_node(node, 1 if op == "addmm" else 0))
            if source.dim() == 0 or len(shape) == 0:
                return None
            row, column = (order[0], order[1]) if op == "linear" else (order[1], order[0])
            incoming = state.channels(source, -1, f"{where} reads them along another dimension")
            state.register(name, column, incoming, "column", f"{where} reads what it must keep")
            rows = state.rows(name, row, shape[-1])
            bias = argument_node(node) if op == "addmm" else given.get("bias")
            rows = state.vector(bias, rows, f"the bias of {where}")
            return along(rows, len(shape) - 1, shape)
        state.result.layers[name] = "conv"
        source = state.read(argument_node(node))
        spatial = weight.dim() - 2
        dim = source.dim() - spatial - 1
        transposed = "transpose" in op or bool(given.get("transposed"))
        incoming = state.channels(source, dim, f"{where} reads them along another dimension")
        groups = given.get("groups") or 1
        if groups == 1:
            state.register(name, 0 if transposed else 1, incoming, "column", f"{where} reads what it must keep")
            rows = state.rows(name, 1 if transposed else 0, shape[dim])
        else:
            rows = self._group_conv(name, incoming, shape[dim], groups, transposed, where)
        rows = state.vector(given.get("bias"), rows, f"the bias of {where}")
        return along(rows, dim, shape)

    def _group_conv(self, name: str, incoming: Tensor, out: int, groups: int, transposed: bool, where: str) -> Tensor:
        """Unites all inputs and outputs of a group; along dim 0 lie the groups of rows, transposed of columns."""
        state, channel_ids = self.state, self.state.channel_ids
        why = f"{where} ties the channels of each of its {groups} groups"
        length = len(incoming) if transposed else out
        first = state.rows(name, 0, length)
        united = channel_ids.mix(first.reshape(groups, -1), [1], why)[:, :1]
        columns = channel_ids.mix(incoming.reshape(groups, -1), [1], why)[:, :1]
        united = channel_ids.unite(united, columns, why)
        labels = united.expand(groups, length // groups).reshape(-1)
        state.register(name, 0, labels, "row", why)
        return united.expand(groups, out // groups).reshape(-1)
