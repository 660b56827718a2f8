"""What each operator does to labels: a function for each kind of them, and the table of who is of which kind.

A rule says what labels a node gives. It unites atoms, or says along which dimensions labels may vary at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from sparsify.pruning.union_find import along, core, never, reshaped, thin, varying

if TYPE_CHECKING:
    from sparsify.pruning.propagation import LabelPropagation

__all__: list[str] = []

Rule = Callable[["LabelPropagation", Any, dict[str, Any]], Any]


@dataclass(frozen=True)
class LabelledOperand:
    """One tensor that a pointwise operator reads.

    Attributes:
        real: for each dimension, whether the tensor has a size of its own there; not where it is 1, or was expanded.
        table: it is computed from parameters, or from buffers, alone.
    """

    labels: Tensor
    real: tuple[bool, ...]
    table: Literal["parameter", "buffer"] | None = None


def rule_of(node: Any) -> Rule | None:
    """The rule for the operator of `node`; None: it is not known."""
    op = name_of(node)
    if op in RULES:
        return RULES[op]
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return _pointwise
    return next((rule for start, rule in _BY_START.items() if op.startswith(start)), None)


def is_pointwise(node: Any) -> bool:
    """Whether every element that `node` gives depends on those alone that lie where it lies."""
    return rule_of(node) in (_pointwise, _same_rule)


def name_of(node: Any) -> str:
    """The operator of a node without namespace, overload and the ending of those in place."""
    name = str(getattr(node.target, "_opname", None) or getattr(node.target, "__name__", node.target))
    return name if name.endswith("__") else name.rstrip("_")


def arguments(node: Any) -> dict[str, Any]:
    """The arguments of an operator by name, defaults included."""
    schema = node.target._schema.arguments
    given = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    given.update({argument.name: value for argument, value in zip(schema, node.args, strict=False)})
    return {**given, **node.kwargs}


def _same_rule(walk: LabelPropagation, node: Any, given: dict[str, Any]) -> Tensor:
    return walk.read(node.args[0])


# -- what meets -----------------------------------------------------------------------------------------------------


def _pointwise(walk: LabelPropagation, node: Any, given: dict[str, Any]) -> Tensor:
    read = [one for one in node.all_input_nodes if isinstance(one.meta.get("val"), Tensor)]
    return _together_rule(walk, [walk.operand(one) for one in read], node.meta["val"].shape, walk.where(node))


def _together_rule(
    walk: LabelPropagation, operands: Iterable[LabelledOperand], shape: Sequence[int], where: str
) -> Tensor:
    """Unites what meets. What cannot be removed must be as broad as one, or be expanded, where the others vary."""
    count = len(shape)
    alive = [one for one in operands if core(one.labels).any()]
    narrow = [one for one in operands if not core(one.labels).any()]
    # Activations before tables, and what is the broadest first.
    alive.sort(key=lambda one: (one.table is not None, -core(one.labels).numel()))
    made: Tensor | None = None
    for one in alive:
        padded = one.labels[(None,) * (count - one.labels.dim())]
        if made is not None:
            spread = {dim for dim, (n, m) in enumerate(zip(padded.shape, shape, strict=True)) if n == 1 < m}
            varies = set(varying(made))
            # A gate for all channels, one frequency for all heads: it says nothing about them, and stays.
            lone = core(padded).numel() == 1
            table = one.table is not None and (one.table == "buffer" or varies <= spread)
            if varies & spread and (lone or table):
                walk.atoms.keep(one.labels, f"{where} spreads them over others")
                narrow.append(one)
                continue
        made = _meet(walk, made, padded.expand(tuple(shape)), where)
    if made is None:
        return never(shape)
    for one in narrow:
        first = count - len(one.real)
        free = [dim for dim in range(count) if dim < first or not one.real[dim - first]]
        walk.bound(made, free, "meets a tensor of fixed size")
    return made


def _meet(walk: LabelPropagation, made: Tensor | None, labels: Tensor, where: str) -> Tensor:
    if made is None:
        return labels
    inner, other = core(made), core(labels)
    shape = [max(n, m) for n, m in zip(inner.shape, other.shape, strict=True)]
    first, second = inner.expand(shape), other.expand(shape)
    return walk.atoms.unite(first, second, f"{where} joins them with what must stay").expand(made.shape)


# -- data movement --------------------------------------------------------------------------------------------------


def _move(walk: LabelPropagation, node: Any, given: dict[str, Any]) -> Tensor:
    """The real operator, on labels."""
    read = torch.fx.map_arg((node.args, dict(node.kwargs)), walk.read)
    made: Tensor = node.target(*read[0], **read[1])
    return thin(made)


def _reshape(walk: LabelPropagation, node: Any, given: dict[str, Any]) -> Tensor:
    return reshaped(walk.read(node.args[0]), node.meta["val"].shape)


def _join(walk: LabelPropagation, node: Any, given: dict[str, Any]) -> Tensor:
    """cat and stack; only the dimensions on which some part depends are written out."""
    parts = [walk.read(one) for one in node.args[0]]
    shape = node.meta["val"].shape
    parts = [part for part in parts if part.numel()]
    stacked = name_of(node) == "stack"
    dim = (given.get("dim") or 0) % len(shape)
    used = {d for part in parts for d in varying(part)} | (set() if stacked else {dim})
    small = [part[tuple(slice(None) if d in used else slice(0, 1) for d in range(part.dim()))] for part in parts]
    return thin((torch.stack if stacked else torch.cat)(small, dim)).expand(shape)


def _slice(walk: LabelPropagation, node: Any, given: dict[str, Any]) -> Tensor:
    labels = walk.read(node.args[0])
    dim = (given.get("dim") or 0) % labels.dim()
    if node.meta["val"].shape == labels.shape and (given.get("step") or 1) == 1:
        return labels
    walk.bound(labels, [d for d in range(labels.dim()) if d != dim], "takes some by number")
    made: Tensor = node.target(labels, *node.args[1:], **node.kwargs)
    return made


def _unbind(walk: LabelPropagation, node: Any, given: dict[str, Any]) -> list[Tensor]:
    labels = walk.read(node.args[0])
    dim = (given.get("dim") or 0) % labels.dim()
    walk.bound(labels, [d for d in range(labels.dim()) if d != dim], "takes a fixed number of them")
    return list(labels.unbind(dim))


def _split_rule(walk: LabelPropagation, node: Any, given: dict[str, Any]) -> list[Tensor]:
    """Pieces of one size lose the same channels; those of several sizes are taken by number."""
    labels = walk.read(node.args[0])
    dim = (given.get("dim") or 0) % labels.dim()
    sizes = [piece.shape[dim] for piece in node.meta["val"]]
    if len(set(sizes)) == 1 and len(sizes) > 1:
        pieces = reshaped(labels, [*labels.shape[:dim], len(sizes), sizes[0], *labels.shape[dim + 1 :]])
        walk.bound(pieces, [d for d in range(pieces.dim()) if d != dim], "cuts them into pieces of one size")
    elif len(sizes) > 1:
        walk.bound(labels, [d for d in range(labels.dim()) if d != dim], "cuts them into pieces of fixed sizes")
    return list(torch.split(labels, sizes, dim))


def _glu(walk: LabelPropagation, node: Any, given: dict[str, Any]) -> Tensor:
    labels = walk.read(node.args[0])
    dim = given.get("dim", -1) % labels.dim()
    pieces = reshaped(labels, [*labels.shape[:dim], 2, labels.shape[dim] // 2, *labels.shape[dim + 1 :]])
    walk.bound(pieces, [d for d in range(pieces.dim()) if d != dim], "cuts them into halves")
    return _meet(walk, pieces.select(dim, 0), pieces.select(dim, 1), walk.where(node))


def _roll(walk: LabelPropagation, node: Any, given: dict[str, Any]) -> Tensor:
    labels = walk.read(node.args[0])
    dims = [d % labels.dim() for d in given.get("dims") or range(labels.dim())]
    walk.bound(labels, [d for d in range(labels.dim()) if d not in dims], "rolls them by a fixed number")
    return thin(labels.roll(given["shifts"], given.get("dims") or ())) if set(dims) & set(varying(labels)) else labels


def _unfold(walk: LabelPropagation, node: Any, given: dict[str, Any]) -> Tensor:
    labels = walk.read(node.args[0])
    dim = given["dimension"] % labels.dim()
    walk.bound(labels, [d for d in range(labels.dim()) if d != dim], "cuts windows out of them")
    return labels.unfold(dim, given["size"], given["step"])


def _windows(walk: LabelPropagation, node: Any, given: dict[str, Any]) -> Tensor:
    """Windows of positions become channels, those of one channel side by side."""
    shape = node.meta["val"].shape
    labels = walk.read(node.args[0])
    dim = len(shape) - (2 if name_of(node) == "im2col" else 3)
    channels = walk.channels(labels, labels.dim() - 3, walk.where(node))
    return along(channels.repeat_interleave(shape[dim] // len(channels)), dim, shape)


def _pixel_shuffle(walk: LabelPropagation, node: Any, given: dict[str, Any]) -> Tensor:
    shape = node.meta["val"].shape
    labels = walk.read(node.args[0])
    channels = walk.channels(labels, labels.dim() - 3, walk.where(node)).reshape(shape[-3], -1)
    mixed = walk.atoms.mix(channels, [1], f"{walk.where(node)} lays them side by side")[:, 0]
    return along(mixed, len(shape) - 3, shape)


def _index(walk: LabelPropagation, node: Any, given: dict[str, Any]) -> Tensor | None:
    """Advanced indexing: of a table by rows that are all alike, of activations by number."""
    source, indices = node.args[0], node.args[1]
    labels = walk.read(source)
    dims: list[int] = []
    position = 0
    for index in indices:
        width = index.meta["val"].dim() if index is not None and index.meta["val"].dtype == torch.bool else 1
        dims += range(position, position + width) if index is not None else []
        position += width
    labels = _taken_rule(walk, source, labels, dims)
    found = []
    for index in indices:
        value = None if index is None else index.meta["val"]
        if value is not None and (set(dims) & set(varying(labels)) or value.dtype == torch.bool):
            value = walk.value(index)
            if value is None:
                return None
        elif value is not None:
            value = torch.zeros(value.shape, dtype=torch.int64)
        found.append(slice(None) if value is None else value.cpu())
    return thin(labels[tuple(found)])


def _gather(walk: LabelPropagation, node: Any, given: dict[str, Any]) -> Tensor | None:
    dim, index = given["dim"], given["index"]
    labels = walk.read(node.args[0])
    dim %= labels.dim()
    labels = _taken_rule(walk, node.args[0], labels, [dim])
    value = walk.value(index) if dim in varying(labels) else torch.zeros(index.meta["val"].shape, dtype=torch.int64)
    if value is None:
        return None
    taken = labels.gather if name_of(node) == "gather" else labels.index_select
    return thin(taken(dim, value.cpu()))


def _taken_rule(walk: LabelPropagation, source: Any, labels: Tensor, dims: Sequence[int]) -> Tensor:
    if walk.tensor(source) is not None:
        return thin(walk.atoms.mix(labels, dims, f"{walk.where(walk.node)} looks them up by number"))
    walk.bound(labels, [d for d in range(labels.dim()) if d not in dims], "takes some by number")
    return labels


# -- mixing ---------------------------------------------------------------------------------------------------------


def _reduce(walk: LabelPropagation, node: Any, given: dict[str, Any]) -> Any:
    if isinstance(given.get("other"), torch.fx.Node):
        return _pointwise(walk, node, given)
    labels = walk.read(node.args[0])
    dims = given.get("dim")
    dims = [dims] if isinstance(dims, int) else dims or list(range(labels.dim()))
    dims = {dim % labels.dim() for dim in dims}
    mixed = walk.atoms.mix(labels, dims, _mixed_by(walk, node, "takes one number from them"))
    inner = mixed[tuple(slice(0, 1) if dim in dims else slice(None) for dim in range(labels.dim()))]
    return _for_each(node, lambda shape: inner.reshape(shape))


def _along(walk: LabelPropagation, node: Any, given: dict[str, Any]) -> Any:
    mixed = walk.atoms.mix(walk.read(node.args[0]), [given.get("dim", -1)], _mixed_by(walk, node, "mixes them"))
    return _for_each(node, lambda shape: mixed)


def _mixed_by(walk: LabelPropagation, node: Any, what: str) -> str:
    if "Norm" in walk.type_of(node):
        return f"its channels are normalised together by {walk.layer(node)}"
    return f"{walk.where(node)} {what}"


def _for_each(node: Any, make: Callable[[Sequence[int]], Tensor]) -> Any:
    """What `make` gives for the shape of the node's tensor, or of each of several."""
    value = node.meta["val"]
    return [make(one.shape) for one in value] if isinstance(value, (list, tuple)) else make(value.shape)


def _first_rule(labels: Tensor, count: int) -> Tensor:
    """`labels` with size 1 along the last `count` dimensions."""
    for dim in range(labels.dim() - count, labels.dim()):
        labels = labels.narrow(dim, 0, 1)
    return labels


def _pool(walk: LabelPropagation, node: Any, given: dict[str, Any]) -> Any:
    rank = next((int(letter) for letter in name_of(node) if letter in "123"), 2)
    labels = walk.read(node.args[0])
    dims = range(labels.dim() - rank, labels.dim())
    mixed = walk.atoms.mix(labels, dims, f"{walk.where(node)} takes one number from them")
    inner = _first_rule(mixed, rank)
    return _for_each(node, lambda shape: inner.expand(shape))


def _pad(walk: LabelPropagation, node: Any, given: dict[str, Any]) -> Tensor:
    """Padding along positions; a padded channel is not removed, nor what meets it."""
    labels = walk.read(node.args[0])
    sizes = list(given.get("pad") or given["padding"])
    made = labels
    for number in range(len(sizes) // 2):
        dim = labels.dim() - 1 - number
        before, after = sizes[2 * number], sizes[2 * number + 1]
        if dim in varying(made):
            walk.bound(made, [d for d in range(made.dim()) if d != dim], "pads them by a fixed number")
            inner = core(made)
            shape = list(inner.shape)
            parts = [torch.zeros([*shape[:dim], n, *shape[dim + 1 :]], dtype=torch.int64) for n in (before, after)]
            inner = torch.cat([parts[0], inner, parts[1]], dim)
            made = inner.expand([inner.shape[d] if d == dim else n for d, n in enumerate(made.shape)])
        else:
            shape = list(made.shape)
            made = made.narrow(dim, 0, 1).expand([*shape[:dim], shape[dim] + before + after, *shape[dim + 1 :]])
    return made


def _batch_norm(walk: LabelPropagation, node: Any, given: dict[str, Any]) -> Tensor:
    labels = walk.read(node.args[0])
    why = f"{walk.layer(node)} has other channels"
    channels = walk.channels(labels, 1, why)
    for name in ("weight", "bias", "running_mean", "running_var"):
        channels = walk.vector(given.get(name), channels, why)
    return along(channels, 1, labels.shape)


def _layer_norm(walk: LabelPropagation, node: Any, given: dict[str, Any]) -> Tensor:
    labels = walk.read(node.args[0])
    size = len(given["normalized_shape"])
    why = f"its channels are normalised together by {walk.layer(node)}"
    mixed = walk.atoms.mix(labels, range(labels.dim() - size, labels.dim()), why)
    affine = [one for name in ("weight", "bias") if isinstance(one := given.get(name), torch.fx.Node)]
    operands = [LabelledOperand(mixed, walk.operand(node.args[0]).real), *(walk.operand(one) for one in affine)]
    return _together_rule(walk, operands, labels.shape, walk.layer(node))


def _group_norm(walk: LabelPropagation, node: Any, given: dict[str, Any]) -> Tensor:
    labels = walk.read(node.args[0])
    groups = given["num_groups"]
    channels = walk.channels(labels, 1, f"{walk.layer(node)} reads them along another dimension")
    why = f"its channels are normalised together by {walk.layer(node)}"
    channels = walk.atoms.mix(channels.reshape(groups, -1), [1], why).reshape(-1)
    for name in ("weight", "bias"):
        channels = walk.vector(given.get(name), channels, why)
    return along(channels, 1, labels.shape)


def _prelu(walk: LabelPropagation, node: Any, given: dict[str, Any]) -> Tensor:
    labels = walk.read(node.args[0])
    weight = given["weight"]
    if weight.meta["val"].numel() == 1:
        return labels
    channels = walk.channels(labels, 1, walk.where(node))
    return along(walk.vector(weight, channels, walk.where(node)), 1, labels.shape)


# -- products -------------------------------------------------------------------------------------------------------


def _matmul(walk: LabelPropagation, node: Any, given: dict[str, Any]) -> Tensor:
    return _product_rule(walk, node, node.args[0], node.args[1])


def _baddbmm(walk: LabelPropagation, node: Any, given: dict[str, Any]) -> Tensor:
    made = _product_rule(walk, node, node.args[1], node.args[2])
    operand = LabelledOperand(made, tuple(n > 1 for n in made.shape))
    return _together_rule(walk, [operand, walk.operand(node.args[0])], made.shape, walk.where(node))


def _product_rule(walk: LabelPropagation, node: Any, first: Any, second: Any) -> Tensor:
    """Of two activations; with a tensor of fixed size it only moves what does not lie along the sum."""
    left, right = operands = [walk.operand(first), walk.operand(second)]
    shape = node.meta["val"].shape
    if all(one.labels.dim() > 1 for one in operands):
        for one, other, summed in ((left, right, -1), (right, left, -2)):
            if not core(other.labels).any():
                if one.labels.dim() + summed in varying(one.labels):
                    walk.atoms.keep(one.labels, f"{walk.where(node)} meets a tensor of fixed size")
                    return never(shape)
                moved = LabelledOperand(one.labels.narrow(summed, 0, 1), one.real, one.table)
                fixed = LabelledOperand(other.labels[..., :1, :1], (*other.real[:-2], False, False))
                return _together_rule(walk, [moved, fixed], shape, walk.where(node))
    return _heads(walk, operands, shape, node)


def _heads(walk: LabelPropagation, operands: Sequence[LabelledOperand], shape: Sequence[int], node: Any) -> Tensor:
    """All under one batch index goes together: in attention that is a head."""
    why = f"{walk.where(node)} takes products along them"
    mixed = []
    for one in operands:
        dims = range(max(one.labels.dim() - 2, 0), one.labels.dim())
        whole = walk.atoms.mix(one.labels, dims, why, "attended")
        inner = _first_rule(whole, len(dims))
        if len(dims) < 2:
            inner = inner.reshape(1, 1)
        walk.atoms.log("attended", core(inner), why)
        mixed.append(LabelledOperand(inner, (*one.real[: inner.dim() - 2], False, False), one.table))
    made = _together_rule(walk, mixed, [*shape[:-2], 1, 1] if len(shape) > 1 else [1, 1], walk.where(node))
    return made.expand(tuple(shape)) if len(shape) > 1 else made.reshape(1).expand(tuple(shape))


def _attention_rule(walk: LabelPropagation, node: Any, given: dict[str, Any]) -> Tensor:
    operands = [walk.operand(given[name]) for name in ("query", "key", "value")]
    if given.get("enable_gqa"):
        heads = operands[0].labels.shape[-3]
        operands = [
            LabelledOperand(thin(one.labels.repeat_interleave(heads // one.labels.shape[-3], -3)), one.real, one.table)
            for one in operands
        ]
    if isinstance(mask := given.get("attn_mask"), torch.fx.Node):
        operands.append(walk.operand(mask))
    return _heads(walk, operands, node.meta["val"].shape, node)


def _table(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    **_table(
        _same_rule,
        "clone contiguous to _to_copy type_as alias detach lift_fresh_copy positive float double half bfloat16 dropout "
        "alpha_dropout feature_dropout feature_alpha_dropout rrelu identity zeros_like ones_like full_like empty_like "
        "rand_like randn_like",
    ),
    **_table(
        _pointwise,
        "relu relu6 hardtanh hardswish hardsigmoid selu celu elu mish silu leaky_relu softplus softsign threshold "
        "log_sigmoid logsigmoid hardshrink softshrink tanhshrink where masked_fill fill copy multiply divide subtract "
        "true_divide square clip maximum minimum rsub nan_to_num bitwise_not logical_not isnan isfinite isinf",
    ),
    **_table(_reshape, "view reshape _unsafe_view flatten unflatten view_as reshape_as ravel"),
    **_table(
        _move,
        "permute transpose t numpy_T mT adjoint movedim moveaxis swapaxes swapdims squeeze unsqueeze expand expand_as "
        "broadcast_to flip repeat tile repeat_interleave",
    ),
    **_table(_join, "cat concat concatenate stack"),
    **_table(_slice, "slice select narrow"),
    **_table(_split_rule, "split chunk split_with_sizes tensor_split unsafe_split unsafe_chunk"),
    "unbind": _unbind,
    "glu": _glu,
    "roll": _roll,
    "unfold": _unfold,
    **_table(_windows, "im2col pixel_unshuffle"),
    "pixel_shuffle": _pixel_shuffle,
    "index": _index,
    **_table(_gather, "gather index_select"),
    **_table(
        _reduce,
        "mean sum amax amin prod var std norm linalg_vector_norm logsumexp all any max min median var_mean std_mean "
        "nansum count_nonzero aminmax",
    ),
    **_table(_along, "softmax log_softmax _softmax _log_softmax cumsum cumprod sort"),
    **_table(_pad, "pad constant_pad_nd"),
    **_table(_batch_norm, "batch_norm instance_norm"),
    **_table(_layer_norm, "layer_norm rms_norm"),
    "group_norm": _group_norm,
    "prelu": _prelu,
    **_table(_matmul, "matmul bmm mm"),
    "baddbmm": _baddbmm,
    "scaled_dot_product_attention": _attention_rule,
}
_BY_START: dict[str, Rule] = {
    **dict.fromkeys(("avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool", "upsample_", "lp_pool"), _pool),
    **dict.fromkeys(("reflection_pad", "replication_pad"), _pad),
}
