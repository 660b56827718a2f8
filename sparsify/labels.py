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

from sparsify.atoms import Atoms, along, core, never, reshaped, thin, varying
from sparsify.graph import Names
from sparsify.targets import named_modules

__all__: list[str] = []

Role = Literal["row", "column", "other"]

_LINEAR = {"linear": 1, "addmm": 2, "mm": 1, "matmul": 1}
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_WEIGHTED = {**_LINEAR, **dict.fromkeys((*_CONVOLUTIONS, "convolution"), 1), "embedding": 0}
_SAME = {
    *("clone", "contiguous", "to", "_to_copy", "type_as", "alias", "detach", "lift_fresh_copy", "positive", "float"),
    *("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "native_dropout", "rrelu", "double"),
    *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "identity", "half", "bfloat16"),
}
_POINTWISE = {
    *("relu6", "hardtanh", "hardswish", "selu", "celu", "softplus", "logsigmoid", "log_sigmoid", "softsign", "copy"),
    *("threshold", "hardshrink", "softshrink", "tanhshrink", "where", "masked_fill", "fill", "relu", "silu", "mish"),
    *("multiply", "divide", "subtract", "true_divide", "square", "clip", "maximum", "minimum", "rsub", "nan_to_num"),
    *("hardsigmoid", "leaky_relu", "elu", "bitwise_not", "logical_not", "isnan", "isfinite", "isinf", "swiglu"),
}
_MOVES = {
    *("view", "reshape", "_unsafe_view", "_reshape_alias", "flatten", "unflatten", "view_as", "reshape_as", "ravel"),
    *("permute", "transpose", "t", "numpy_T", "mT", "T", "adjoint", "movedim", "moveaxis", "swapaxes", "swapdims"),
    *("squeeze", "unsqueeze", "expand", "expand_as", "broadcast_to", "flip", "repeat", "tile", "repeat_interleave"),
    *("cat", "concat", "concatenate", "stack", "hstack", "vstack", "atleast_1d", "atleast_2d"),
}
_RESHAPES = (
    "view",
    "reshape",
    "_unsafe_view",
    "_reshape_alias",
    "flatten",
    "unflatten",
    "view_as",
    "reshape_as",
    "ravel",
)
_REDUCTIONS = {
    *("mean", "sum", "amax", "amin", "prod", "var", "std", "norm", "linalg_vector_norm", "logsumexp", "all", "any"),
    *("max", "min", "median", "var_mean", "std_mean", "nansum", "count_nonzero", "aminmax"),
}
_ALONG = {"softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod", "sort", "flip_mixed", "softmin"}
_POOLS = ("avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool", "upsample_", "_upsample_", "lp_pool")
_PADS = ("pad", "constant_pad_nd", "reflection_pad", "replication_pad", "_pad_circular")
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

    atoms: Atoms = field(default_factory=Atoms)
    places: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    roles: dict[tuple[str, int], Role] = field(default_factory=dict)
    tables: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, Literal["conv", "linear", "embedding"]] = field(default_factory=dict)
    bounds: list[Bound] = field(default_factory=list)
    made: list[tuple[str, Tensor]] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def labelled(model: nn.Module, program: Any) -> Labelled:
    """The labels of all parameters, buffers and activations of `program`, exported from `model`.

    Bounds are enforced: every tensor can lose slices along one dimension only.
    """
    found = _Propagation(model, program)
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
                counts = {d: len(core(labels).amin([o for o in dims if o != d]).unique()) for d in free}
                best = max(free, key=lambda dim: (counts[dim], dim))
                atoms.mix(labels, [dim for dim in dims if dim != best], bound.why)
                changed = True


class _Propagation:
    """One walk through the program."""

    def __init__(self, model: nn.Module, program: Any) -> None:
        names = Names(model)
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
            ): f"the code of nn.MultiheadAttention at {path or 'the model'} fixes its heads"
            for raw, module in model.named_modules()
            if isinstance(module, nn.MultiheadAttention)
            for path in [names.modules[raw]]
            for own in [name for name, _ in module.named_parameters()]
        }
        self._env: dict[Any, Any] = {}
        self._values: dict[Any, Any] = {}
        self._weights: set[str] = set()
        self._on_the_way: set[Any] = set()
        self._prepare(program.graph_module.graph, {})
        self._node: Any = None

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
                        where = self._where(node)
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
            self._node = node
            if node.op == "placeholder":
                if inputs is not None:
                    self._env[node] = next(given)
                elif node.name not in self._tensors:
                    self._env[node] = _nothing(node)
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
                    return [self._read(one) if isinstance(one, torch.fx.Node) else one for one in node.args[0]]
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
        given = _arguments(node)
        if op in _WEIGHTED:
            weighted = self._weighted(node, op, given)
            if weighted is not None:
                return weighted
        read = [one for one in node.all_input_nodes if isinstance(one.meta.get("val"), Tensor)]
        if op not in (
            "batch_norm",
            "_native_batch_norm_legit_no_training",
            "layer_norm",
            "native_layer_norm",
        ) and not any(self._names_tensor(one) for one in read):
            if not any(core(self._read(one)).any() for one in read):
                return _nothing(node)
        rule = getattr(self, f"_{op}_rule", None)
        try:
            if rule is not None:
                return rule(node, given)
            if op in _SAME:
                return self._read(node.args[0])
            if op in _POINTWISE or torch.Tag.pointwise in target.tags:
                return self._pointwise(node, read)
            if op in _MOVES:
                return self._move(node, op)
            if op in _REDUCTIONS:
                return self._reduce(node, given)
            if op in _ALONG:
                return self._along(node, given)
            if op.startswith(_POOLS):
                return self._pool(node, given, op)
            if op in _PADS or op.startswith(_PADS):
                return self._pad(node, given)
        except (RuntimeError, ValueError, IndexError, TypeError):
            # An overload whose arguments no rule expected: it is as good as unknown.
            return None
        return None

    def _inside(self, node: Any) -> Any:
        """A graph inside the graph: torch.autocast and torch.no_grad in the model's code."""
        for position, argument in enumerate(node.args):
            if isinstance(argument, torch.fx.Node) and argument.op == "get_attr":
                module = operator.attrgetter(argument.target)(argument.graph.owning_module)
                given = node.args[position + 1 :]
                holders = [one for one in module.graph.nodes if one.op == "placeholder"]
                if len(holders) == len(given) and all(isinstance(one, torch.fx.Node) for one in given):
                    for holder, one in zip(holders, given, strict=True):
                        if (name := self._names_tensor(one)) is not None:
                            self._tensors[holder.name] = name
                    self._prepare(module.graph, None)
                    outside = self._node
                    made = self.run(module.graph, [self._env.get(one) for one in given])
                    self._node = outside
                    return made
        return None

    def _unknown(self, node: Any) -> Any:
        what = self._where(node)
        for one in node.all_input_nodes:
            if (name := self._names_tensor(one)) is not None:
                self.result.refused.setdefault(name, f"{what} is not known to lose channels")
            self._freeze(one, f"{what} is not known to lose channels")
        return _nothing(node)

    # -- reading ------------------------------------------------------------------------------------------------

    def _names_tensor(self, node: Any) -> str | None:
        return self._tensors.get(node.name) if node.op == "placeholder" else None

    def _read(self, node: Any) -> Tensor:
        """The labels of what `node` gives, brought to their roots."""
        if (name := self._names_tensor(node)) is not None:
            return self._table(name, node)
        if node in self._on_the_way and node not in self._env:
            self._env[node] = self._checked(node, self._move(node, name_of(node)) if name_of(node) in _MOVES
                                            else self._read(node.args[0]))  # fmt: skip
        labels = self._env.get(node)
        if not isinstance(labels, Tensor):
            return never(node.meta["val"].shape)
        labels = self.atoms.roots(labels)
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
            why = f"it is also read by {self._where(self._node)}"
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
            self.atoms.keep(self._read(node), why)

    def _register(self, name: str, dim: int, labels: Tensor, role: Role, why: str) -> Tensor:
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
        order: tuple[Role, ...] = ("row", "column", "other")
        result.roles[key] = min(role, result.roles.get(key, role), key=order.index)
        return labels

    def _vector(self, node: Any, labels: Tensor, why: str) -> Tensor:
        """Unites a vector of channels with a bias, a norm's weight or a running statistic."""
        if node is None:
            return labels
        if (name := self._names_tensor(node)) is not None:
            return self._register(name, 0, labels, "other", why)
        other = self._read(node)
        return (
            self.atoms.unite(labels, other.expand(labels.shape), why) if core(other).any() else self._fixed(labels, why)
        )

    def _fixed(self, labels: Tensor, why: str) -> Tensor:
        self.atoms.keep(labels, why)
        return labels

    def _channels(self, labels: Tensor, dim: int, why: str) -> Tensor:
        """One label for each index of `dim`: those of all other dimensions are united."""
        dim %= labels.dim()
        mixed = core(self.atoms.mix(labels, [d for d in range(labels.dim()) if d != dim], why))
        return mixed.expand([n if d == dim else 1 for d, n in enumerate(labels.shape)]).reshape(-1)

    def _bound(self, labels: Tensor, free: Iterator[int] | Sequence[int], what: str) -> None:
        free = tuple(free)
        if not set(varying(labels)) <= set(free) or len(varying(labels)) > 1:
            self.result.bounds.append(Bound(labels, free, f"{self._where(self._node)} {what}"))

    # -- who and where ------------------------------------------------------------------------------------------

    def _owner(self, node: Any) -> str:
        stack = node.meta.get("nn_module_stack") or {}
        path = list(stack.values())[-1][0] if stack else ""
        return self._names.modules.get(path, path)

    def _where(self, node: Any) -> str:
        path = self._owner(node)
        kind = self._types.get(path)
        return f"{name_of(node)} in {path} ({kind})" if kind else f"{name_of(node)} in the model's own forward"

    def _layer(self, node: Any) -> str:
        path = self._owner(node)
        return (
            f"{self._types[path]} at {path}" if path in self._types else f"{name_of(node)} in the model's own forward"
        )

    # -- the rules ----------------------------------------------------------------------------------------------

    def _weighted(self, node: Any, op: str, given: dict[str, Any]) -> Tensor | None:
        """Convolutions, linear layers, embeddings: columns read what comes in, rows are new atoms."""
        name, order, chain = self._weight(node.args[_WEIGHTED[op]])
        if name is None or name not in self._weights or (op in ("mm", "matmul") and len(order) != 2):
            return None
        shape = node.meta["val"].shape
        where = self._layer(node)
        weight = node.args[_WEIGHTED[op]].meta["val"]
        if op == "embedding":
            self.result.layers[name] = "embedding"
            self._register(name, 0, never(weight.shape[:1]), "other", f"{where} looks them up by number")
            return along(self._rows(name, 1, weight.shape[1]), len(shape) - 1, shape)
        if op in _LINEAR:
            self.result.layers.setdefault(name, "linear")
            source = self._read(node.args[1] if op == "addmm" else node.args[0])
            if source.dim() == 0 or len(shape) == 0:
                return None
            row, column = (order[0], order[1]) if op == "linear" else (order[1], order[0])
            incoming = self._channels(source, -1, f"{where} reads them along another dimension")
            self._register(name, column, incoming, "column", f"{where} reads what it must keep")
            rows = self._rows(name, row, shape[-1])
            bias = node.args[0] if op == "addmm" else given.get("bias")
            rows = self._vector(bias, rows, f"the bias of {where}")
            return along(rows, len(shape) - 1, shape)
        self.result.layers[name] = "conv"
        source = self._read(node.args[0])
        spatial = weight.dim() - 2
        dim = source.dim() - spatial - 1
        transposed = "transpose" in op or bool(given.get("transposed"))
        incoming = self._channels(source, dim, f"{where} reads them along another dimension")
        groups = given.get("groups") or 1
        if groups == 1:
            self._register(name, 0 if transposed else 1, incoming, "column", f"{where} reads what it must keep")
            rows = self._rows(name, 1 if transposed else 0, shape[dim])
        else:
            rows = self._grouped(name, incoming, shape[dim], groups, transposed, where)
        rows = self._vector(given.get("bias"), rows, f"the bias of {where}")
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

    def _pointwise(self, node: Any, read: Sequence[Any], shape: Sequence[int] | None = None) -> Tensor:
        """Unites what meets. What cannot be removed must be as broad as one, or the other cannot be removed either."""
        shape = node.meta["val"].shape if shape is None else shape
        return self._together([(self._read(one), one.meta["val"]) for one in read], shape, self._where(node))

    def _together(self, operands: Sequence[tuple[Tensor, Tensor]], shape: Sequence[int], where: str) -> Tensor:
        count = len(shape)
        made: Tensor | None = None
        narrow: list[tuple[Tensor, Tensor]] = []
        for labels, value in operands:
            if not core(labels).any():
                narrow.append((labels, value))
                continue
            padded = labels[(None,) * (count - labels.dim())]
            if core(padded).numel() == 1 and any(n == 1 < m for n, m in zip(padded.shape, shape, strict=True)):
                lone = any(n == 1 < m for n, m in zip(padded.shape[1:], shape[1:], strict=True))
                if lone and made is None and len(operands) > 1:
                    # One number for many channels, as in a gate over positions: it stays.
                    narrow.append((labels, value))
                    continue
            made = self._meet(made, padded.expand(tuple(shape)), where)
        if made is None:
            rest = [labels for labels, _ in narrow if core(labels).any()]
            for labels in rest:
                self.atoms.keep(labels, f"{where} spreads them over others")
            return never(shape)
        for labels, value in narrow:
            self.atoms.keep(labels, f"{where} spreads them over others")
            first = count - value.dim()
            broad = {first + d for d, n in enumerate(value.shape) if n > 1 and value.stride(d) != 0}
            self._bound(made, [d for d in range(count) if d not in broad], "meets a tensor of fixed size")
        return made

    def _meet(self, made: Tensor | None, labels: Tensor, where: str) -> Tensor:
        if made is None:
            return labels
        first, second = core(made), core(labels)
        first, second = torch.broadcast_tensors(first, second)
        if first.numel() == 0:
            return made
        return self.atoms.unite(first, second, f"{where} joins them with what must stay").expand(made.shape)

    def _move(self, node: Any, op: str) -> Tensor:
        """The real operator, on labels."""
        shape = node.meta["val"].shape
        if op in _RESHAPES:
            return reshaped(self._read(node.args[0]), shape)
        if op in ("cat", "concat", "concatenate", "stack"):
            parts = [self._read(one) for one in node.args[0] if one.meta["val"].dim() > 0]
            dim = _arguments(node).get("dim") or 0
            dim = dim % parts[0].dim() if op != "stack" else dim % (parts[0].dim() + 1)
            parts = [part for part in parts if part.dim() == parts[0].dim()]
            used = {d for part in parts for d in varying(part)} | ({dim} if op != "stack" else set())
            small = [
                part[tuple(slice(None) if d in used else slice(0, 1) for d in range(part.dim()))] for part in parts
            ]
            made = torch.stack(small, dim) if op == "stack" else torch.cat(small, dim)
            return thin(made.expand(shape))
        arguments = torch.fx.map_arg(node.args, self._read)
        keywords = torch.fx.map_arg(node.kwargs, self._read)
        made = node.target(*arguments, **keywords)
        return thin(made) if made.numel() < 1_000_000 else made

    def _slice_rule(self, node: Any, given: dict[str, Any]) -> Tensor:
        labels = self._read(node.args[0])
        dim = (given.get("dim") or 0) % labels.dim()
        if node.meta["val"].shape == labels.shape and (given.get("step") or 1) == 1:
            return labels
        self._bound(labels, [d for d in range(labels.dim()) if d != dim], "takes some by number")
        made: Tensor = node.target(labels, *node.args[1:], **node.kwargs)
        return made

    _select_rule = _narrow_rule = _slice_rule

    def _unbind_rule(self, node: Any, given: dict[str, Any]) -> list[Tensor]:
        labels = self._read(node.args[0])
        dim = (given.get("dim") or 0) % labels.dim()
        self._bound(labels, [d for d in range(labels.dim()) if d != dim], "takes a fixed number of them")
        return list(labels.unbind(dim))

    def _split_rule(self, node: Any, given: dict[str, Any]) -> list[Tensor]:
        """Pieces of one size lose the same channels; those of several sizes are taken by number."""
        labels = self._read(node.args[0])
        dim = (given.get("dim") or 0) % labels.dim()
        sizes = [piece.shape[dim] for piece in node.meta["val"]]
        if len(set(sizes)) == 1 and len(sizes) > 1:
            pieces = reshaped(labels, [*labels.shape[:dim], len(sizes), sizes[0], *labels.shape[dim + 1 :]])
            self._bound(pieces, [d for d in range(pieces.dim()) if d != dim], "cuts them into pieces of one size")
        elif len(sizes) > 1:
            self._bound(labels, [d for d in range(labels.dim()) if d != dim], "cuts them into pieces of fixed sizes")
        return list(labels.split(sizes, dim))

    _chunk_rule = _split_with_sizes_rule = _tensor_split_rule = _split_rule

    def _glu_rule(self, node: Any, given: dict[str, Any]) -> Tensor:
        labels = self._read(node.args[0])
        dim = given.get("dim", -1) % labels.dim()
        pieces = reshaped(labels, [*labels.shape[:dim], 2, labels.shape[dim] // 2, *labels.shape[dim + 1 :]])
        self._bound(pieces, [d for d in range(pieces.dim()) if d != dim], "cuts them into halves")
        return self._meet(pieces.select(dim, 0), pieces.select(dim, 1), self._where(node))

    def _roll_rule(self, node: Any, given: dict[str, Any]) -> Tensor:
        labels = self._read(node.args[0])
        dims = [d % labels.dim() for d in given.get("dims") or range(labels.dim())]
        self._bound(labels, [d for d in range(labels.dim()) if d not in dims], "rolls them by a fixed number")
        return (
            thin(labels.roll(given["shifts"], given.get("dims") or ())) if set(dims) & set(varying(labels)) else labels
        )

    def _unfold_rule(self, node: Any, given: dict[str, Any]) -> Tensor:
        labels = self._read(node.args[0])
        dim = given["dimension"] % labels.dim()
        self._bound(labels, [d for d in range(labels.dim()) if d != dim], "cuts windows out of them")
        return labels.unfold(dim, given["size"], given["step"])

    def _im2col_rule(self, node: Any, given: dict[str, Any]) -> Tensor:
        shape = node.meta["val"].shape
        labels = self._read(node.args[0])
        channels = self._channels(labels, labels.dim() - 3, self._where(node))
        return along(channels.repeat_interleave(shape[-2] // len(channels)), len(shape) - 2, shape)

    def _pixel_unshuffle_rule(self, node: Any, given: dict[str, Any]) -> Tensor:
        shape = node.meta["val"].shape
        labels = self._read(node.args[0])
        channels = self._channels(labels, labels.dim() - 3, self._where(node))
        return along(channels.repeat_interleave(shape[-3] // len(channels)), len(shape) - 3, shape)

    def _pixel_shuffle_rule(self, node: Any, given: dict[str, Any]) -> Tensor:
        shape = node.meta["val"].shape
        labels = self._read(node.args[0])
        channels = self._channels(labels, labels.dim() - 3, self._where(node)).reshape(shape[-3], -1)
        mixed = self.atoms.mix(channels, [1], f"{self._where(node)} lays them side by side")[:, 0]
        return along(mixed, len(shape) - 3, shape)

    def _index_rule(self, node: Any, given: dict[str, Any]) -> Tensor | None:
        """Advanced indexing: of a table by rows that are all alike, of activations by number."""
        source, indices = node.args[0], node.args[1]
        labels = self._read(source)
        dims: list[int] = []
        position = 0
        for index in indices:
            width = index.meta["val"].dim() if index is not None and index.meta["val"].dtype == torch.bool else 1
            dims += range(position, position + width) if index is not None else []
            position += width
        labels = self._taken(source, labels, dims)
        found = []
        for index in indices:
            value = None if index is None else index.meta["val"]
            if value is not None and (set(dims) & set(varying(labels)) or value.dtype == torch.bool):
                value = self._value(index)
                if value is None:
                    return None
            elif value is not None:
                value = torch.zeros(value.shape, dtype=torch.int64)
            found.append(slice(None) if value is None else value.cpu())
        return thin(labels[tuple(found)])

    def _gather_rule(self, node: Any, given: dict[str, Any]) -> Tensor | None:
        dim, index = given["dim"], given["index"]
        labels = self._read(node.args[0])
        labels = self._taken(node.args[0], labels, [dim % labels.dim()])
        value = self._value(index) if dim % labels.dim() in varying(labels) else torch.zeros(
            index.meta["val"].shape, dtype=torch.int64)  # fmt: skip
        return None if value is None else thin(labels.gather(dim, value.cpu()))

    def _index_select_rule(self, node: Any, given: dict[str, Any]) -> Tensor | None:
        dim, index = given["dim"], given["index"]
        labels = self._read(node.args[0])
        labels = self._taken(node.args[0], labels, [dim % labels.dim()])
        value = self._value(index) if dim % labels.dim() in varying(labels) else torch.zeros(
            index.meta["val"].shape, dtype=torch.int64)  # fmt: skip
        return None if value is None else thin(labels.index_select(dim, value.cpu()))

    def _taken(self, source: Any, labels: Tensor, dims: Sequence[int]) -> Tensor:
        if self._names_tensor(source) is not None:
            return thin(self.atoms.mix(labels, dims, f"{self._where(self._node)} looks them up by number"))
        self._bound(labels, [d for d in range(labels.dim()) if d not in dims], "takes some by number")
        return labels

    def _reduce(self, node: Any, given: dict[str, Any]) -> Any:
        labels = self._read(node.args[0])
        dims = given.get("dim")
        dims = list(range(labels.dim())) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
        if isinstance(given.get("other"), torch.fx.Node):
            return self._pointwise(node, [node.args[0], given["other"]])
        mixed = self.atoms.mix(labels, dims, self._norm_or(node, "takes one number from them"))
        inner = mixed[tuple(slice(0, 1) if d in {e % labels.dim() for e in dims} else slice(None)
                            for d in range(labels.dim()))]  # fmt: skip
        values = _flat(node.meta["val"])
        made = [inner.reshape(one.shape) for one in values]
        return made if isinstance(node.meta["val"], (list, tuple)) else made[0]

    def _along(self, node: Any, given: dict[str, Any]) -> Any:
        mixed = self.atoms.mix(self._read(node.args[0]), [given.get("dim", -1)], self._norm_or(node, "mixes them"))
        return [mixed] * len(node.meta["val"]) if isinstance(node.meta["val"], (list, tuple)) else mixed

    def _norm_or(self, node: Any, what: str) -> str:
        kind = self._types.get(self._owner(node), "")
        if "Norm" in kind:
            return f"its channels are normalised together by {self._layer(node)}"
        return f"{self._where(node)} {what}"

    def _pool(self, node: Any, given: dict[str, Any], op: str) -> Any:
        rank = next((int(letter) for letter in op if letter in "123"), 2)
        labels = self._read(node.args[0])
        dims = range(labels.dim() - rank, labels.dim())
        mixed = self.atoms.mix(labels, dims, f"{self._where(node)} takes one number from them")
        inner = mixed[(..., *([slice(0, 1)] * rank))]
        made = [inner.expand(one.shape) for one in _flat(node.meta["val"])]
        return made if isinstance(node.meta["val"], (list, tuple)) else made[0]

    def _pad(self, node: Any, given: dict[str, Any]) -> Tensor:
        """Padding along positions; a padded channel is not removed, nor what meets it."""
        labels = self._read(node.args[0])
        sizes = list(given.get("pad") or given.get("padding"))
        made = labels
        for number in range(len(sizes) // 2):
            dim = labels.dim() - 1 - number
            before, after = sizes[2 * number], sizes[2 * number + 1]
            if dim in varying(made):
                self._bound(made, [d for d in range(made.dim()) if d != dim], "pads them by a fixed number")
                inner = core(made)
                shape = list(inner.shape)
                parts = [torch.zeros([*shape[:dim], n, *shape[dim + 1 :]], dtype=torch.int64) for n in (before, after)]
                inner = torch.cat([parts[0], inner, parts[1]], dim)
                made = inner.expand([inner.shape[d] if d == dim else n for d, n in enumerate(made.shape)])
            else:
                shape = list(made.shape)
                made = made.narrow(dim, 0, 1).expand([*shape[:dim], shape[dim] + before + after, *shape[dim + 1 :]])
        return made

    def _batch_norm_rule(self, node: Any, given: dict[str, Any]) -> Tensor:
        labels = self._read(node.args[0])
        why = f"{self._layer(node)} has other channels"
        channels = self._channels(labels, 1, why)
        for name in ("weight", "bias", "running_mean", "running_var"):
            channels = self._vector(given.get(name), channels, why)
        return along(channels, 1, labels.shape)

    _instance_norm_rule = _batch_norm_rule

    def _layer_norm_rule(self, node: Any, given: dict[str, Any]) -> Tensor:
        labels = self._read(node.args[0])
        size = len(given["normalized_shape"])
        why = f"its channels are normalised together by {self._layer(node)}"
        mixed = self.atoms.mix(labels, range(labels.dim() - size, labels.dim()), why)
        affine = [one for name in ("weight", "bias") if isinstance(one := given.get(name), torch.fx.Node)]
        operands = [(mixed, node.args[0].meta["val"]), *((self._read(one), one.meta["val"]) for one in affine)]
        return self._together(operands, labels.shape, self._layer(node))

    _rms_norm_rule = _layer_norm_rule

    def _group_norm_rule(self, node: Any, given: dict[str, Any]) -> Tensor:
        labels = self._read(node.args[0])
        groups = given["num_groups"]
        channels = self._channels(labels, 1, f"{self._layer(node)} reads them along another dimension")
        why = f"its channels are normalised together by {self._layer(node)}"
        channels = self.atoms.mix(channels.reshape(groups, -1), [1], why).reshape(-1)
        for name in ("weight", "bias"):
            channels = self._vector(given.get(name), channels, why)
        return along(channels, 1, labels.shape)

    def _prelu_rule(self, node: Any, given: dict[str, Any]) -> Tensor:
        labels = self._read(node.args[0])
        weight = given["weight"]
        if weight.meta["val"].numel() == 1:
            return labels
        channels = self._channels(labels, 1, self._where(node))
        return along(self._vector(weight, channels, self._where(node)), 1, labels.shape)

    def _matmul_rule(self, node: Any, given: dict[str, Any]) -> Tensor:
        """Products of two activations: all under one batch index goes together, which makes heads of attention."""
        first, second = [one for one in node.all_input_nodes][-2:] if len(node.all_input_nodes) > 1 else (
            node.args[0], node.args[0])  # fmt: skip
        a, b = self._read(first), self._read(second)
        shape = node.meta["val"].shape
        return self._product([(a, first.meta["val"]), (b, second.meta["val"])], shape, node)

    _bmm_rule = _mm_rule = _matmul_rule

    def _baddbmm_rule(self, node: Any, given: dict[str, Any]) -> Tensor:
        parts = [node.args[1], node.args[2]]
        shape = node.meta["val"].shape
        made = self._product([(self._read(one), one.meta["val"]) for one in parts], shape, node)
        other = node.args[0]
        return self._together(
            [(made, node.meta["val"]), (self._read(other), other.meta["val"])], shape, self._where(node)
        )

    def _product(self, operands: Sequence[tuple[Tensor, Tensor]], shape: Sequence[int], node: Any) -> Tensor:
        (a, _), (b, _) = operands
        # A product with a tensor of fixed size only moves what does not lie along the sum.
        if a.dim() > 1 and b.dim() > 1:
            for one, (other, value), summed in ((a, operands[1], -1), (b, operands[0], -2)):
                if not core(other).any():
                    if one.dim() + summed in varying(one):
                        self.atoms.keep(one, f"{self._where(node)} meets a tensor of fixed size")
                        return never(shape)
                    moved = one.narrow(summed, 0, 1), node.meta["val"]
                    return self._together([moved, (other[..., :1, :1], value[..., :1, :1])], shape, self._where(node))
        return self._heads(operands, shape, node)

    def _heads(self, operands: Sequence[tuple[Tensor, Tensor]], shape: Sequence[int], node: Any) -> Tensor:
        why = f"{self._where(node)} takes products along them"
        mixed = []
        for labels, value in operands:
            dims = range(max(labels.dim() - 2, 0), labels.dim())
            whole = self.atoms.mix(labels, dims, why, "attended")
            self.atoms.mix(whole, dims, why)
            inner = whole[(..., *([slice(0, 1)] * len(dims)))]
            if core(inner).any():
                self.atoms.log("attended", core(inner), why)
            if len(dims) == 1:
                inner = inner[..., None]
            short = value[(..., *([slice(0, 1)] * len(dims)))] if value.dim() else value
            mixed.append((inner, short))
        made = self._together(mixed, [*shape[:-2], 1, 1], self._where(node))
        return made.expand(tuple(shape))

    def _scaled_dot_product_attention_rule(self, node: Any, given: dict[str, Any]) -> Tensor:
        shape = node.meta["val"].shape
        parts = [self._read(given[name]) for name in ("query", "key", "value")]
        values = [given[name].meta["val"] for name in ("query", "key", "value")]
        if given.get("enable_gqa"):
            heads = parts[0].shape[-3]
            parts = [part.repeat_interleave(heads // part.shape[-3], -3) for part in parts]
            values = [part if part.shape == v.shape else v.repeat_interleave(heads // v.shape[-3], -3)
                      for part, v in zip(parts, values, strict=True)]  # fmt: skip
        operands = list(zip(parts, values, strict=True))
        mask = given.get("attn_mask")
        if isinstance(mask, torch.fx.Node):
            operands.append((self._read(mask), mask.meta["val"]))
        return self._heads(operands, shape, node)

    # -- values -------------------------------------------------------------------------------------------------

    def _value(self, node: Any) -> Tensor | None:
        """What a tensor of positions holds, computed for real from constants; None where it depends on the inputs."""
        if node in self._values:
            found = self._values[node]
            return found if isinstance(found, Tensor) else None
        self._values[node] = None
        if node.op == "placeholder":
            self._values[node] = self._constants.get(node.name)
        elif node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            # Operators that write would write into the user's own buffers.
            read = {one: self._value(one) for one in node.all_input_nodes}
            if not node.target._schema.is_mutable and all(value is not None for value in read.values()):
                arguments = torch.fx.map_arg((node.args, dict(node.kwargs)), lambda one: read[one])
                with torch.no_grad():
                    self._values[node] = node.target(*arguments[0], **arguments[1])
        found = self._values[node]
        return found if isinstance(found, Tensor) else None


def name_of(node: Any) -> str:
    """The operator of a node without namespace, overload and the ending of those in place."""
    name = str(getattr(node.target, "_opname", None) or getattr(node.target, "__name__", node.target))
    return name.rstrip("_") if not name.endswith("__") else name


def _arguments(node: Any) -> dict[str, Any]:
    """The arguments of an operator by name, defaults included."""
    schema = node.target._schema.arguments
    given = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    given.update({argument.name: value for argument, value in zip(schema, node.args, strict=False)})
    return {**given, **node.kwargs}


def _flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _nothing(node: Any) -> Any:
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
