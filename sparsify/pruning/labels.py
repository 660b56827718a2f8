"""Labels of an exported program: for every part of a tensor the id of the channel that it is removed with.

`ChannelLabels` is the result. `LabelState` is what a rule for an operator works on: it has the labels of the tensors
that the operator reads, and records which channels must be removed together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from sparsify.model.targets import named_modules
from sparsify.model.trace import ModuleNames
from sparsify.pruning.label_tensors import along, core, never, thin, varying
from sparsify.pruning.union_find import UnionFind

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__: list[str] = []

SliceRole = Literal["row", "column", "other"]
Rule = Callable[["LabelState", Node, dict[str, Any]], Any]
"""Gives the labels of the result of a node, or a list of them; None: the operator is not known to lose channels."""

LINEAR_WEIGHT_ARGUMENT = {"linear": 1, "addmm": 2, "mm": 1, "matmul": 1}
"""{operator of a linear layer: which argument is the weight}."""
_CONVOLUTIONS = tuple(f"{kind}{rank}d" for kind in ("conv", "conv_transpose") for rank in (1, 2, 3))
WEIGHT_ARGUMENT = {**LINEAR_WEIGHT_ARGUMENT, **dict.fromkeys((*_CONVOLUTIONS, "convolution"), 1), "embedding": 0}
"""{operator with a weight: which argument it is}."""
# Their results are the same everywhere, and as large as the code asks for.
_UNIFORM = {"zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "scalar_tensor"}
_UNIFORM |= {"zeros_like", "ones_like", "full_like"}
# Tables larger than this stay whole: a channel id for each element costs more than can be gained.
_LARGEST_TABLE = 2_000_000


@dataclass(frozen=True)
class LabelledOperand:
    """One tensor that a pointwise operator reads.

    Attributes:
        real: for each dimension, True if the tensor has a size of its own there; not where it is 1, or was expanded.
        table: it is computed from parameters, or from buffers, alone.
    """

    labels: Tensor
    real: tuple[bool, ...]
    table: Literal["parameter", "buffer"] | None = None


@dataclass(frozen=True)
class Bound:
    """At the end `labels` may vary along one of the `free` dimensions only: code there counts along the others."""

    labels: Tensor
    free: tuple[int, ...]
    why: str


@dataclass
class ChannelLabels:
    """The channel ids of a program, and along which dimension of which tensor they lie.

    Attributes:
        slices: the label of every slice of a dimension, by (clean name, dim).
        tables: labels of every element of parameters and buffers that are no layer's weight.
        layers: the weights that layers were seen to use, and the kind of layer.
        bounds: what must hold at the end.
        made: the module in whose forward a tensor was made, and its labels.
        refused: {tensor: why} for weights that nothing is known about.
    """

    channel_ids: UnionFind = field(default_factory=UnionFind)
    slices: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    roles: dict[tuple[str, int], SliceRole] = field(default_factory=dict)
    tables: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, Literal["conv", "linear", "embedding"]] = field(default_factory=dict)
    bounds: list[Bound] = field(default_factory=list)
    made: list[tuple[str, Tensor]] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def name_of(node: Node) -> str:
    """The operator of a node without namespace, overload and the ending of those in place."""
    name = str(getattr(node.target, "_opname", None) or getattr(node.target, "__name__", node.target))
    return name if name.endswith("__") else name.rstrip("_")


def operator_of(node: Node) -> torch._ops.OpOverload[..., Any]:
    """The operator that a node calls.

    Raises:
        TypeError: it calls something else.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        raise TypeError(f"{node.target} is no operator")
    return node.target


def argument_node(node: Node, position: int = 0) -> Node:
    """The node whose result is the argument at `position`.

    Raises:
        TypeError: the argument is no tensor.
    """
    argument = node.args[position]
    if not isinstance(argument, Node):
        raise TypeError(f"argument {position} of {node} is no tensor")
    return argument


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of an operator by name, defaults included."""
    schema = operator_of(node)._schema.arguments
    given = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    given.update({argument.name: value for argument, value in zip(schema, node.args, strict=False)})
    return {**given, **node.kwargs}


def tensor_inputs(node: Node) -> list[Node]:
    """The nodes that `node` reads a tensor from."""
    return [one for one in node.all_input_nodes if isinstance(one.meta.get("val"), Tensor)]


def no_labels(node: Node) -> Any:
    """Labels of what is never removed, for all results of `node`."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return never(value.shape)
    if isinstance(value, (list, tuple)):
        return [never(one.shape) if isinstance(one, Tensor) else None for one in value]
    return None


class LabelState:
    """The labels of the nodes of a program that are known so far.

    Args:
        model: the module that was exported.
        program: its trace.
        rule_of: the rule for the operator of a node; None for one that is not known.
        is_pointwise: True if every element of a node's result depends on the elements at the same position alone.
    """

    node: Node
    """The node that is being computed."""

    def __init__(
        self,
        model: nn.Module,
        program: ExportedProgram,
        rule_of: Callable[[Node], Rule | None],
        is_pointwise: Callable[[Node], bool],
    ) -> None:
        names = ModuleNames(model)
        signature = program.graph_signature
        self.result = ChannelLabels()
        self.channel_ids = self.result.channel_ids
        self.results: dict[Node, Any] = {}
        """The labels of each node's result, or a list of them."""
        self.weights: set[str] = set()
        """Parameters that layers use as their weights."""
        self.on_the_way: set[Node] = set()
        """Nodes that only transpose or cast such a weight."""
        self._rule_of = rule_of
        self._is_pointwise = is_pointwise
        self._names = names
        self._types = {path: type(module).__name__ for path, module in named_modules(model).items()}
        self._tensors: dict[str, str] = {}
        for node, target in signature.inputs_to_parameters.items():
            self._tensors[node] = names.parameters.get(target, target)
        for node, target in signature.inputs_to_buffers.items():
            self._tensors[node] = names.buffers.get(target, target)
        self._constants: dict[str, Any] = {
            **{node: program.state_dict.get(t) for node, t in signature.inputs_to_buffers.items()},
            **{node: program.constants.get(t) for node, t in signature.inputs_to_lifted_tensor_constants.items()},
        }
        for node, target in signature.inputs_to_buffers.items():
            if self._constants[node] is None:
                self._constants[node] = program.constants.get(target)
        # nn.MultiheadAttention hands the width it was built with to functional.multi_head_attention_forward, which
        # refuses another one (torch 2.13.0); needless once it reads the width from its weights.
        self._rigid: dict[str, str] = {}
        for raw, module in model.named_modules():
            if isinstance(module, nn.MultiheadAttention):
                path = names.modules[raw]
                why = f"the code of nn.MultiheadAttention at {path or 'the model'} fixes its width"
                self._rigid |= {f"{path}.{own}" if path else own: why for own, _ in module.named_parameters()}
        self._values: dict[Node, Tensor | None] = {}
        self._reals: dict[Node, tuple[bool, ...]] = {}
        self._tables: dict[Node, Literal["parameter", "buffer"] | None] = {}

    # -- weights of layers --------------------------------------------------------------------------------------

    def find_weights(self, graph: Graph) -> None:
        """Finds which parameters are weights of layers, and which are only used to compute such weights."""
        for node in graph.nodes:
            if node.op != "call_function" or (op := name_of(node)) not in WEIGHT_ARGUMENT:
                continue
            weight = node.args[WEIGHT_ARGUMENT[op]] if len(node.args) > WEIGHT_ARGUMENT[op] else None
            if not isinstance(weight, Node):
                continue
            name, _order, chain = self.weight_of(weight)
            if name is not None and (op not in ("mm", "matmul") or _dims(weight) == 2):
                self.weights.add(name)
                self.on_the_way.update(chain)
            elif op not in ("mm", "matmul"):
                for source in _sources(weight):
                    if (tensor := self._tensors.get(source.name)) is not None:
                        self.result.refused[tensor] = f"{self.where(node)} has a weight that is computed from it"

    def weight_of(self, node: Node) -> tuple[str | None, tuple[int, ...], list[Node]]:
        """The parameter that `node` is, perhaps transposed: its name, which of its dims each dim is, and the way."""
        chain: list[Node] = []
        order = tuple(range(_dims(node) or 0))
        while node.op == "call_function":
            op = name_of(node)
            chain.append(node)
            if op in ("t", "numpy_T", "mT", "transpose") and len(order) == 2:
                order = order[::-1]
            elif op == "permute":
                inner: Any = node.args[1]
                order = tuple(inner[dim] for dim in order)
            elif op not in ("to", "_to_copy", "detach", "alias", "contiguous", "clone"):
                return None, order, []
            node = argument_node(node)
        name = self._tensors.get(node.name)
        return (name, order, chain) if name is not None and name not in self.result.refused else (None, order, [])

    def alias(self, placeholder: Node, node: Node) -> None:
        """Makes `placeholder` of an inner graph the parameter or buffer that `node` outside is, if it is one."""
        if (name := self.tensor(node)) is not None:
            self._tensors[placeholder.name] = name

    # -- reading ------------------------------------------------------------------------------------------------

    def tensor(self, node: Node) -> str | None:
        """The clean name of the parameter or buffer that `node` is, or None."""
        return self._tensors.get(node.name) if node.op == "placeholder" else None

    def read(self, node: Node) -> Tensor:
        """The labels of the result of `node`, brought to their roots."""
        if (name := self.tensor(node)) is not None:
            return self._table(name, node)
        if node in self.on_the_way and node not in self.results:
            rule = self._rule_of(node)
            self.results[node] = self.checked(node, None if rule is None else rule(self, node, arguments(node)))
        labels = self.results.get(node)
        if not isinstance(labels, Tensor):
            return never(node.meta["val"].shape)
        labels = thin(self.channel_ids.roots(labels))
        self.results[node] = labels
        return labels

    def _table(self, name: str, node: Node) -> Tensor:
        """The labels of all elements of a parameter or buffer that is read as a plain tensor."""
        value = node.meta["val"]
        result = self.result
        if name in result.tables:
            return self.channel_ids.roots(result.tables[name])
        if (name, 0) in result.slices and value.dim() == 1:
            return self.channel_ids.roots(result.slices[name, 0])
        if name in self.weights:
            why = f"it is also read by {self.where(self.node)}"
            result.refused.setdefault(name, why)
            for dim in range(value.dim()):
                self.register(name, dim, never(value.shape[dim : dim + 1]), "other", why)
            return never(value.shape)
        if not value.is_floating_point() or value.numel() > _LARGEST_TABLE or name in result.refused:
            return never(value.shape)
        labels = result.tables[name] = self.channel_ids.fresh(value.shape)
        if name in self._rigid:
            self.channel_ids.keep(labels, self._rigid[name])
        return labels

    def checked(self, node: Node, made: object) -> Any:
        """`made`, if it has the shapes of the results of `node`; otherwise nothing that `node` reads is removed."""
        value = node.meta.get("val")
        if value is None and made is not None:
            return made
        if isinstance(value, Tensor):
            if isinstance(made, Tensor) and made.shape == value.shape:
                return made
        elif isinstance(value, (list, tuple)):
            shapes = [one.shape if isinstance(one, Tensor) else None for one in value]
            if isinstance(made, (list, tuple)) and [getattr(m, "shape", None) for m in made] == shapes:
                return made
        else:
            return None
        return self._unknown(node)

    def _unknown(self, node: Node) -> Any:
        what = self.where(node)
        for one in node.all_input_nodes:
            if (name := self.tensor(one)) is not None:
                self.result.refused.setdefault(name, f"{what} is not known to lose channels")
            self.keep(one, f"{what} is not known to lose channels")
        return no_labels(node)

    # -- what goes together -------------------------------------------------------------------------------------

    def keep(self, node: Node, why: str) -> None:
        """Nothing of the result of `node` may be removed."""
        if isinstance(node.meta.get("val"), Tensor):
            self.channel_ids.keep(self.read(node), why)

    def register(self, name: str, dim: int, labels: Tensor, role: SliceRole, why: str) -> Tensor:
        """Gives the slices of `name` along `dim` these labels, united with the ones they had; returns the union."""
        result, key = self.result, (name, dim)
        if name in self._rigid:
            self.channel_ids.keep(labels, self._rigid[name])
        if name in result.tables:
            table = result.tables[name]
            result.tables[name] = self.channel_ids.unite(table, along(labels, dim, table.shape), why)
            return self.channel_ids.roots(labels)
        if key in result.slices:
            labels = self.channel_ids.unite(result.slices[key], labels, why)
        result.slices[key] = labels
        order: tuple[SliceRole, ...] = ("row", "column", "other")
        result.roles[key] = min(role, result.roles.get(key, role), key=order.index)
        return labels

    def rows(self, name: str, dim: int, size: int) -> Tensor:
        """The labels of the rows of a weight along `dim`: new ones, or those that another call of the layer made."""
        if (name, dim) in self.result.slices:
            self.result.roles[name, dim] = "row"
            return self.channel_ids.roots(self.result.slices[name, dim])
        return self.register(name, dim, self.channel_ids.fresh([size]), "row", "")

    def vector(self, node: Node | None, labels: Tensor, why: str) -> Tensor:
        """Unites a vector of channels with a bias, a norm's weight or a running statistic."""
        if node is None:
            return labels
        if (name := self.tensor(node)) is not None:
            return self.register(name, 0, labels, "other", why)
        other = self.read(node)
        if core(other).any():
            return self.channel_ids.unite(labels, other.expand(labels.shape), why)
        self.channel_ids.keep(labels, why)
        return labels

    def channels(self, labels: Tensor, dim: int, why: str) -> Tensor:
        """One label for each index of `dim`: those of all other dimensions are united."""
        dim %= labels.dim()
        mixed = core(self.channel_ids.mix(labels, [d for d in range(labels.dim()) if d != dim], why))
        return mixed.expand([n if d == dim else 1 for d, n in enumerate(labels.shape)]).reshape(-1)

    def bound(self, labels: Tensor, free: Sequence[int], what: str) -> None:
        """At the end `labels` may vary along one of `free` only."""
        free = tuple(free)
        if not set(varying(labels)) <= set(free) or len(varying(labels)) > 1:
            self.result.bounds.append(Bound(labels, free, f"{self.where(self.node)} {what}"))

    # -- operands of pointwise operators ------------------------------------------------------------------------

    def operand(self, node: Node) -> LabelledOperand:
        """The result of `node`, for an operator in which tensors meet."""
        return LabelledOperand(self.read(node), self._real(node), self._made_of(node))

    def _real(self, node: Node) -> tuple[bool, ...]:
        """For each dimension, True if the tensor has a size of its own there, rather than one to fit others."""
        if node not in self._reals:
            value = node.meta["val"]
            real = [n > 1 and stride != 0 for n, stride in zip(value.shape, value.stride(), strict=True)]
            if node.op == "call_function" and (op := name_of(node)) not in ("slice", "clone"):
                if op in _UNIFORM:
                    real = [False] * len(real)
                elif self._is_pointwise(node):
                    real = [
                        any(
                            self._real(one)[d]
                            for one in tensor_inputs(node)
                            if (d := dim - len(real)) >= -one.meta["val"].dim()
                        )
                        for dim in range(len(real))
                    ]
            elif node.op == "call_function":
                real = [a and b for a, b in zip(real, self._real(argument_node(node)), strict=True)]
            self._reals[node] = tuple(real)
        return self._reals[node]

    def _made_of(self, node: Node) -> Literal["parameter", "buffer"] | None:
        """The tensors that `node` is computed from, if parameters or buffers alone; layers' weights are neither."""
        if node not in self._tables:
            self._tables[node] = None
            if self.tensor(node) is not None:
                self._tables[node] = "buffer" if node.name in self._constants else "parameter"
            elif node.op == "call_function" and name_of(node) not in WEIGHT_ARGUMENT:
                sources = [self._made_of(one) for one in tensor_inputs(node) if core(self.read(one)).any()]
                if sources and None not in sources:
                    self._tables[node] = "parameter" if "parameter" in sources else "buffer"
        return self._tables[node]

    # -- where a node stands ------------------------------------------------------------------------------------

    def owner(self, node: Node) -> str:
        """The path of the innermost module in whose forward `node` stands."""
        stack = node.meta.get("nn_module_stack") or {}
        path = list(stack.values())[-1][0] if stack else ""
        return self._names.modules.get(path, path)

    def where(self, node: Node) -> str:
        """The operator and its place, for a reason: "view in blocks.0.attention (Attention)"."""
        path = self.owner(node)
        kind = self._types.get(path)
        return f"{name_of(node)} in {path} ({kind})" if kind else f"{name_of(node)} in the model's own forward"

    def layer(self, node: Node) -> str:
        """The layer that computes `node`, for a reason: "Conv2d at blocks.0.conv"."""
        path = self.owner(node)
        kind = self._types.get(path)
        return f"{kind} at {path}" if kind else f"{name_of(node)} in the model's own forward"

    def type_of(self, node: Node) -> str:
        """The name of the class of the module in whose forward `node` stands."""
        return self._types.get(self.owner(node), "")

    # -- values -------------------------------------------------------------------------------------------------

    def value(self, node: Node) -> Tensor | None:
        """The values of a tensor of positions, computed from constants; None where they depend on the inputs."""
        if node in self._values:
            return self._values[node]
        self._values[node] = None
        found: Any = None
        if node.op == "placeholder":
            found = self._constants.get(node.name)
        elif node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            # Operators that write would write into the user's own buffers.
            read = {one: self.value(one) for one in node.all_input_nodes}
            if not node.target._schema.is_mutable and all(value is not None for value in read.values()):
                args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), lambda one: read[one])
                with torch.no_grad():
                    found = node.target(*args, **kwargs)
        self._values[node] = found if isinstance(found, Tensor) else None
        return self._values[node]


def _dims(node: Node) -> int | None:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else None


def _sources(node: Node) -> Iterator[Node]:
    """The placeholders that `node` is computed from."""
    seen, waiting = set(), [node]
    while waiting:
        one = waiting.pop()
        if one not in seen:
            seen.add(one)
            waiting += one.all_input_nodes
            if one.op == "placeholder":
                yield one
