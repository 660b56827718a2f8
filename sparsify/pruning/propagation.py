"""Which slices of which tensors die together: an exported program, computed on labels in place of numbers.

Data movement is done by the real operator on label tensors, so concatenation, channel shuffles, windows, fused
projections and repeated heads need no rule. Pointwise operators unite what they meet, mixing ones all that they mix.
Weighted ones begin new atoms with their rows. An operator that is not known keeps all that it reads.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparsify.model.targets import named_modules
from sparsify.model.trace import ModuleNames
from sparsify.pruning.label_rules import LabelledOperand, arguments, is_pointwise, name_of, rule_of
from sparsify.pruning.union_find import UnionFind, along, core, never, thin, varying

__all__: list[str] = []

SliceRole = Literal["row", "column", "other"]

# Which argument is the weight.
_LINEAR = {"linear": 1, "addmm": 2, "mm": 1, "matmul": 1}
_CONVOLUTIONS = tuple(f"{kind}{rank}d" for kind in ("conv", "conv_transpose") for rank in (1, 2, 3))
_WEIGHTED = {**_LINEAR, **dict.fromkeys((*_CONVOLUTIONS, "convolution"), 1), "embedding": 0}
# What they give is alike everywhere, and as large as the code asks for.
_UNIFORM = {"zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "scalar_tensor", *(
    "zeros_like", "ones_like", "full_like")}  # fmt: skip
# Tables larger than this stay whole: one atom for each element costs more than they are worth.
_LARGEST_TABLE = 2_000_000


@dataclass(frozen=True)
class Bound:
    """At the end `labels` may vary along one of the `free` dimensions only: code there counts along the others."""

    labels: Tensor
    free: tuple[int, ...]
    why: str


@dataclass
class Labelled:
    """What labels say: atoms, and along which dimension of which tensor they lie.

    Attributes:
        places: the label of every slice of a dimension, by (clean name, dim).
        tables: labels of every element of parameters and buffers that are no layer's weight.
        layers: the weights that were seen at work, and of which kind.
        bounds: what must hold at the end.
        made: the module in whose forward a tensor was made, and its labels.
        refused: {tensor: why} for weights that nothing is known about.
    """

    atoms: UnionFind = field(default_factory=UnionFind)
    places: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    roles: dict[tuple[str, int], SliceRole] = field(default_factory=dict)
    tables: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, Literal["conv", "linear", "embedding"]] = field(default_factory=dict)
    bounds: list[Bound] = field(default_factory=list)
    made: list[tuple[str, Tensor]] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def labelled(model: nn.Module, program: Any) -> Labelled:
    """The labels of all parameters, buffers and activations of `program`, exported from `model`.

    Bounds are enforced: every tensor can lose slices along one dimension only.
    """
    found = LabelPropagation(model, program)
    found.run(program.graph_module.graph, None)
    _enforce(found.result)
    return found.result


def _enforce(found: Labelled) -> None:
    """Unites atoms until all bounds hold and every tensor varies along one dimension at most."""
    atoms = found.atoms
    waiting: dict[tuple[Any, ...], Bound] = {}
    grids = [Bound(labels, tuple(range(labels.dim())), "parameter") for labels in found.tables.values()]
    grids += [Bound(labels, tuple(range(labels.dim())), f"a view in {owner or 'the model'} splits its channels")
              for owner, labels in found.made]  # fmt: skip
    for bound in [*found.bounds, *grids]:
        inner = core(bound.labels)
        dims = [dim for dim, size in enumerate(inner.shape) if size > 1]
        if dims and not (len(dims) == 1 and dims[0] in bound.free):
            waiting.setdefault((inner.data_ptr(), inner.shape, inner.stride(), bound.free), bound)
    changed = True
    while changed:
        changed = False
        for key, bound in list(waiting.items()):
            labels = thin(atoms.roots(bound.labels))
            dims = varying(labels)
            free = [dim for dim in dims if dim in bound.free]
            if not dims:
                del waiting[key]
            elif not free:
                atoms.keep(labels, bound.why)
                del waiting[key]
            elif len(dims) > 1:
                # The one along which most can be told apart; of equals the last.
                counts = {d: len(set(core(labels).amin([o for o in dims if o != d]).flatten().tolist())) for d in free}
                best = max(free, key=lambda dim: (counts[dim], dim))
                atoms.mix(labels, [dim for dim in dims if dim != best], bound.why)
                changed = True


class LabelPropagation:
    """One walk through the program."""

    def __init__(self, model: nn.Module, program: Any) -> None:
        names = ModuleNames(model)
        signature = program.graph_signature
        self.result = Labelled()
        self.atoms = self.result.atoms
        self._names = names
        self._types = {path: type(module).__name__ for path, module in named_modules(model).items()}
        self._tensors: dict[str, str] = {}
        for node, target in signature.inputs_to_parameters.items():
            self._tensors[node] = names.parameters.get(target, target)
        for node, target in signature.inputs_to_buffers.items():
            self._tensors[node] = names.buffers.get(target, target)
        self._constants = {
            **{node: program.state_dict.get(t) for node, t in signature.inputs_to_buffers.items()},
            **{node: program.constants.get(t) for node, t in signature.inputs_to_lifted_tensor_constants.items()},
        }
        for node, target in signature.inputs_to_buffers.items():
            if self._constants[node] is None:
                self._constants[node] = program.constants.get(target)
        # Parameters of nn.MultiheadAttention: its code checks that head size x heads is the width it was built with.
        self._rigid = {
            f"{path}.{own}".removeprefix(
                "."
            ): f"the code of nn.MultiheadAttention at {path or 'the model'} fixes its width"
            for raw, module in model.named_modules()
            if isinstance(module, nn.MultiheadAttention)
            for path in [names.modules[raw]]
            for own in [name for name, _ in module.named_parameters()]
        }
        self._env: dict[Any, Any] = {}
        self._values: dict[Any, Any] = {}
        self._reals: dict[Any, tuple[bool, ...]] = {}
        self._tables: dict[Any, Literal["parameter", "buffer"] | None] = {}
        self._weights: set[str] = set()
        self._on_the_way: set[Any] = set()
        self._prepare(program.graph_module.graph, {})
        self.node: Any = None

    # -- before the walk ----------------------------------------------------------------------------------------

    def _prepare(self, graph: Any, _: Any) -> None:
        """Finds which parameters are weights of layers, and which are only used to compute such weights."""
        for node in graph.nodes:
            if node.op != "call_function" or (op := name_of(node)) not in _WEIGHTED:
                continue
            weight = node.args[_WEIGHTED[op]] if len(node.args) > _WEIGHTED[op] else None
            if not isinstance(weight, torch.fx.Node):
                continue
            name, _order, chain = self._weight(weight)
            if name is not None and (op not in ("mm", "matmul") or _dims(weight) == 2):
                self._weights.add(name)
                self._on_the_way.update(chain)
            elif op not in ("mm", "matmul"):
                for source in _sources(weight):
                    if (tensor := self._tensors.get(source.name)) is not None:
                        where = self.where(node)
                        self.result.refused[tensor] = f"{where} has a weight that is computed from it"

    def _weight(self, node: Any) -> tuple[str | None, tuple[int, ...], list[Any]]:
        """The parameter that `node` is, perhaps transposed: its name, which of its dims each dim is, and the way."""
        chain: list[Any] = []
        order = tuple(range(_dims(node) or 0))
        while node.op == "call_function":
            op = name_of(node)
            chain.append(node)
            if op in ("t", "numpy_T", "mT", "transpose") and len(order) == 2:
                order = order[::-1]
            elif op == "permute":
                inner = node.args[1]
                order = tuple(inner[dim] for dim in order)
            elif op not in ("to", "_to_copy", "detach", "alias", "contiguous", "clone"):
                return None, order, []
            node = node.args[0]
        name = self._tensors.get(node.name)
        return (name, order, chain) if name is not None and name not in self.result.refused else (None, order, [])

    # -- the walk -----------------------------------------------------------------------------------------------

    def run(self, graph: Any, inputs: Sequence[Any] | None) -> Any:
        """Walks one graph; `inputs`: the labels of its placeholders where it stands inside another one."""
        given = iter(inputs or ())
        for node in graph.nodes:
            self.node = node
            if node.op == "placeholder":
                if inputs is not None:
                    self._env[node] = next(given)
                elif node.name not in self._tensors:
                    self._env[node] = _no_labels(node)
            elif node.op == "call_function":
                if node in self._on_the_way:
                    continue
                self._env[node] = made = self._checked(node, self._call(node))
                path = self._owner(node)
                for labels in made if isinstance(made, (list, tuple)) else [made]:
                    if isinstance(labels, Tensor) and varying(labels):
                        self.result.made.append((path, labels))
            elif node.op == "output":
                if inputs is not None:
                    return [self.read(one) if isinstance(one, torch.fx.Node) else one for one in node.args[0]]
                for one in node.all_input_nodes:
                    self._freeze(one, "the model returns them")
        return None

    def _checked(self, node: Any, made: Any) -> Any:
        """`made`, if it has the shapes of what `node` gives; a rule that does not fit keeps what it reads."""
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

    def _call(self, node: Any) -> Any:
        target = node.target
        if target is operator.getitem:
            whole = self._env.get(node.args[0])
            return whole[node.args[1]] if isinstance(whole, (list, tuple)) else None
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self._inside(node)
        if not isinstance(target, torch._ops.OpOverload) or not any(
            isinstance(one, Tensor) for one in _flat(node.meta.get("val"))
        ):
            return None
        op = name_of(node)
        given = arguments(node)
        if op in _WEIGHTED:
            weighted = self._weighted(node, op, given)
            if weighted is not None:
                return weighted
        read = [one for one in node.all_input_nodes if isinstance(one.meta.get("val"), Tensor)]
        if not any(self.tensor(one) for one in read) and not any(core(self.read(one)).any() for one in read):
            return _no_labels(node)
        rule = rule_of(node)
        try:
            return None if rule is None else rule(self, node, given)
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError):
            # An overload whose arguments the rule does not expect: it is as good as unknown.
            return None

    def _inside(self, node: Any) -> Any:
        """A graph inside the graph: torch.autocast and torch.no_grad in the model's code."""
        for position, argument in enumerate(node.args):
            if isinstance(argument, torch.fx.Node) and argument.op == "get_attr":
                module = operator.attrgetter(str(argument.target))(argument.graph.owning_module)
                given = node.args[position + 1 :]
                holders = [one for one in module.graph.nodes if one.op == "placeholder"]
                if len(holders) == len(given) and all(isinstance(one, torch.fx.Node) for one in given):
                    for holder, one in zip(holders, given, strict=True):
                        if (name := self.tensor(one)) is not None:
                            self._tensors[holder.name] = name
                    self._prepare(module.graph, None)
                    outside = self.node
                    made = self.run(module.graph, [self._env.get(one) for one in given])
                    self.node = outside
                    return made
        return None

    def _unknown(self, node: Any) -> Any:
        what = self.where(node)
        for one in node.all_input_nodes:
            if (name := self.tensor(one)) is not None:
                self.result.refused.setdefault(name, f"{what} is not known to lose channels")
            self._freeze(one, f"{what} is not known to lose channels")
        return _no_labels(node)

    # -- reading ------------------------------------------------------------------------------------------------

    def tensor(self, node: Any) -> str | None:
        return self._tensors.get(node.name) if node.op == "placeholder" else None

    def read(self, node: Any) -> Tensor:
        """The labels of what `node` gives, brought to their roots."""
        if (name := self.tensor(node)) is not None:
            return self._table(name, node)
        if node in self._on_the_way and node not in self._env:
            rule = rule_of(node)
            self._env[node] = self._checked(node, None if rule is None else rule(self, node, arguments(node)))
        labels = self._env.get(node)
        if not isinstance(labels, Tensor):
            return never(node.meta["val"].shape)
        labels = thin(self.atoms.roots(labels))
        self._env[node] = labels
        return labels

    def _table(self, name: str, node: Any) -> Tensor:
        """Labels of all elements of a parameter or buffer that is read as a plain tensor."""
        value = node.meta["val"]
        result = self.result
        if name in result.tables:
            return self.atoms.roots(result.tables[name])
        if (name, 0) in result.places and value.dim() == 1:
            return self.atoms.roots(result.places[name, 0])
        if name in self._weights:
            why = f"it is also read by {self.where(self.node)}"
            result.refused.setdefault(name, why)
            for dim in range(value.dim()):
                self._register(name, dim, never(value.shape[dim : dim + 1]), "other", why)
            return never(value.shape)
        if not value.is_floating_point() or value.numel() > _LARGEST_TABLE or name in result.refused:
            return never(value.shape)
        labels = result.tables[name] = self.atoms.fresh(value.shape)
        if name in self._rigid:
            self.atoms.keep(labels, self._rigid[name])
        return labels

    def _freeze(self, node: Any, why: str) -> None:
        if isinstance(node.meta.get("val"), Tensor):
            self.atoms.keep(self.read(node), why)

    def _register(self, name: str, dim: int, labels: Tensor, role: SliceRole, why: str) -> Tensor:
        """Says that the slices of `name` along `dim` have these labels; what was said before is united with it."""
        result, key = self.result, (name, dim)
        if name in self._rigid:
            self.atoms.keep(labels, self._rigid[name])
        if name in result.tables:
            table = result.tables[name]
            result.tables[name] = self.atoms.unite(table, along(labels, dim, table.shape), why)
            return self.atoms.roots(labels)
        if key in result.places:
            labels = self.atoms.unite(result.places[key], labels, why)
        result.places[key] = labels
        order: tuple[SliceRole, ...] = ("row", "column", "other")
        result.roles[key] = min(role, result.roles.get(key, role), key=order.index)
        return labels

    def vector(self, node: Any, labels: Tensor, why: str) -> Tensor:
        """Unites a vector of channels with a bias, a norm's weight or a running statistic."""
        if node is None:
            return labels
        if (name := self.tensor(node)) is not None:
            return self._register(name, 0, labels, "other", why)
        other = self.read(node)
        return (
            self.atoms.unite(labels, other.expand(labels.shape), why) if core(other).any() else self._fixed(labels, why)
        )

    def _fixed(self, labels: Tensor, why: str) -> Tensor:
        self.atoms.keep(labels, why)
        return labels

    def channels(self, labels: Tensor, dim: int, why: str) -> Tensor:
        """One label for each index of `dim`: those of all other dimensions are united."""
        dim %= labels.dim()
        mixed = core(self.atoms.mix(labels, [d for d in range(labels.dim()) if d != dim], why))
        return mixed.expand([n if d == dim else 1 for d, n in enumerate(labels.shape)]).reshape(-1)

    def bound(self, labels: Tensor, free: Sequence[int], what: str) -> None:
        """At the end `labels` may vary along one of `free` only."""
        free = tuple(free)
        if not set(varying(labels)) <= set(free) or len(varying(labels)) > 1:
            self.result.bounds.append(Bound(labels, free, f"{self.where(self.node)} {what}"))

    def operand(self, node: Any) -> LabelledOperand:
        """What `node` gives, for an operator in which tensors meet."""
        return LabelledOperand(self.read(node), self._real(node), self._made_of(node))

    def _real(self, node: Any) -> tuple[bool, ...]:
        """For each dimension whether the tensor has a size of its own there, rather than one to fit others."""
        if node not in self._reals:
            value = node.meta["val"]
            real = [n > 1 and stride != 0 for n, stride in zip(value.shape, value.stride(), strict=True)]
            if node.op == "call_function" and (op := name_of(node)) not in ("slice", "clone"):
                read = [one for one in node.all_input_nodes if isinstance(one.meta.get("val"), Tensor)]
                if op in _UNIFORM:
                    real = [False] * len(real)
                elif is_pointwise(node):
                    real = [
                        any(self._real(one)[d] for one in read if (d := dim - len(real)) >= -one.meta["val"].dim())
                        for dim in range(len(real))
                    ]
            elif node.op == "call_function":
                real = [a and b for a, b in zip(real, self._real(node.args[0]), strict=True)]
            self._reals[node] = tuple(real)
        return self._reals[node]

    def _made_of(self, node: Any) -> Literal["parameter", "buffer"] | None:
        """Whether `node` is computed from parameters or buffers alone, layers' weights excepted."""
        if node not in self._tables:
            self._tables[node] = None
            if self.tensor(node) is not None:
                self._tables[node] = "buffer" if node.name in self._constants else "parameter"
            elif node.op == "call_function" and name_of(node) not in _WEIGHTED:
                read = [one for one in node.all_input_nodes if isinstance(one.meta.get("val"), Tensor)]
                sources = [self._made_of(one) for one in read if core(self.read(one)).any()]
                if sources and None not in sources:
                    self._tables[node] = "parameter" if "parameter" in sources else "buffer"
        return self._tables[node]

    # -- who and where ------------------------------------------------------------------------------------------

    def _owner(self, node: Any) -> str:
        stack = node.meta.get("nn_module_stack") or {}
        path = list(stack.values())[-1][0] if stack else ""
        return self._names.modules.get(path, path)

    def where(self, node: Any) -> str:
        path = self._owner(node)
        kind = self._types.get(path)
        return f"{name_of(node)} in {path} ({kind})" if kind else f"{name_of(node)} in the model's own forward"

    def layer(self, node: Any) -> str:
        path = self._owner(node)
        return (
            f"{self._types[path]} at {path}" if path in self._types else f"{name_of(node)} in the model's own forward"
        )

    def type_of(self, node: Any) -> str:
        """The name of the class of the module in whose forward `node` stands."""
        return self._types.get(self._owner(node), "")

    # -- weights ----------------------------------------------------------------------------------------------

    def _weighted(self, node: Any, op: str, given: dict[str, Any]) -> Tensor | None:
        """Convolutions, linear layers, embeddings: columns read what comes in, rows are new atoms."""
        name, order, _ = self._weight(node.args[_WEIGHTED[op]])
        if name is None or name not in self._weights or (op in ("mm", "matmul") and len(order) != 2):
            return None
        shape = node.meta["val"].shape
        where = self.layer(node)
        weight = node.args[_WEIGHTED[op]].meta["val"]
        if op == "embedding":
            self.result.layers[name] = "embedding"
            self._register(name, 0, never(weight.shape[:1]), "other", f"{where} looks them up by number")
            return along(self._rows(name, 1, weight.shape[1]), len(shape) - 1, shape)
        if op in _LINEAR:
            self.result.layers.setdefault(name, "linear")
            source = self.read(node.args[1] if op == "addmm" else node.args[0])
            if source.dim() == 0 or len(shape) == 0:
                return None
            row, column = (order[0], order[1]) if op == "linear" else (order[1], order[0])
            incoming = self.channels(source, -1, f"{where} reads them along another dimension")
            self._register(name, column, incoming, "column", f"{where} reads what it must keep")
            rows = self._rows(name, row, shape[-1])
            bias = node.args[0] if op == "addmm" else given.get("bias")
            rows = self.vector(bias, rows, f"the bias of {where}")
            return along(rows, len(shape) - 1, shape)
        self.result.layers[name] = "conv"
        source = self.read(node.args[0])
        spatial = weight.dim() - 2
        dim = source.dim() - spatial - 1
        transposed = "transpose" in op or bool(given.get("transposed"))
        incoming = self.channels(source, dim, f"{where} reads them along another dimension")
        groups = given.get("groups") or 1
        if groups == 1:
            self._register(name, 0 if transposed else 1, incoming, "column", f"{where} reads what it must keep")
            rows = self._rows(name, 1 if transposed else 0, shape[dim])
        else:
            rows = self._grouped(name, incoming, shape[dim], groups, transposed, where)
        rows = self.vector(given.get("bias"), rows, f"the bias of {where}")
        return along(rows, dim, shape)

    def _grouped(self, name: str, incoming: Tensor, out: int, groups: int, transposed: bool, where: str) -> Tensor:
        """In a group all inputs and outputs go together; along dim 0 lie the groups of rows, transposed of columns."""
        why = f"{where} ties the channels of each of its {groups} groups"
        length = len(incoming) if transposed else out
        first = self._rows(name, 0, length)
        united = self.atoms.mix(first.reshape(groups, -1), [1], why)[:, :1]
        columns = self.atoms.mix(incoming.reshape(groups, -1), [1], why)[:, :1]
        united = self.atoms.unite(united, columns, why)
        labels = united.expand(groups, length // groups).reshape(-1)
        self._register(name, 0, labels, "row", why)
        return united.expand(groups, out // groups).reshape(-1)

    def _rows(self, name: str, dim: int, size: int) -> Tensor:
        if (name, dim) in self.result.places:
            self.result.roles[name, dim] = "row"
            return self.atoms.roots(self.result.places[name, dim])
        labels = self.atoms.fresh([size])
        return self._register(name, dim, labels, "row", "")

    # -- values -------------------------------------------------------------------------------------------------

    def value(self, node: Any) -> Tensor | None:
        """What a tensor of positions holds, computed for real from constants; None where it depends on the inputs."""
        if node in self._values:
            found = self._values[node]
            return found if isinstance(found, Tensor) else None
        self._values[node] = None
        if node.op == "placeholder":
            self._values[node] = self._constants.get(node.name)
        elif node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            # Operators that write would write into the user's own buffers.
            read = {one: self.value(one) for one in node.all_input_nodes}
            if not node.target._schema.is_mutable and all(value is not None for value in read.values()):
                arguments = torch.fx.map_arg((node.args, dict(node.kwargs)), lambda one: read[one])
                with torch.no_grad():
                    self._values[node] = node.target(*arguments[0], **arguments[1])
        found = self._values[node]
        return found if isinstance(found, Tensor) else None


def _flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _no_labels(node: Any) -> Any:
    """Labels of what never dies, for all that `node` gives."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return never(value.shape)
    if isinstance(value, (list, tuple)):
        return [never(one.shape) if isinstance(one, Tensor) else None for one in value]
    return None


def _dims(node: Any) -> int | None:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else None


def _sources(node: Any) -> Iterator[Any]:
    """The placeholders that `node` is computed from."""
    seen, waiting = set(), [node]
    while waiting:
        one = waiting.pop()
        if one not in seen:
            seen.add(one)
            waiting += one.all_input_nodes
            if one.op == "placeholder":
                yield one
