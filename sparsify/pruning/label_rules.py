"""The effect of each operator on labels: a function for each kind of operator, and the table of the kinds.

A rule gives the labels of a node's result. It unites channels, or says along which dimensions labels may vary at the
end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from sparsify.pruning.label_tensors import along, core, never, reshaped, thin, varying
from sparsify.pruning.labels import (
    LabelledOperand,
    LabelState,
    Rule,
    argument_node,
    name_of,
    operator_of,
    tensor_inputs,
)

__all__: list[str] = []


def rule_of(node: Node) -> Rule | None:
    """The rule for the operator of `node`; None: it is not known."""
    op = name_of(node)
    if op in RULES:
        return RULES[op]
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return _pointwise
    return next((rule for start, rule in _BY_START.items() if op.startswith(start)), None)


def is_pointwise(node: Node) -> bool:
    """True if every element of a node's result depends on the elements at the same position alone."""
    return rule_of(node) in (_pointwise, _identity)


def _identity(state: LabelState, node: Node, given: dict[str, Any]) -> Tensor:
    return state.read(argument_node(node))


# -- pointwise operators -------------------------------------------------------------------------------------------


def _pointwise(state: LabelState, node: Node, given: dict[str, Any]) -> Tensor:
    operands = [state.operand(one) for one in tensor_inputs(node)]
    return _unite_operands(state, operands, node.meta["val"].shape, state.where(node))


def _unite_operands(state: LabelState, operands: Iterable[LabelledOperand], shape: Sequence[int], where: str) -> Tensor:
    """Unites channels at the same position; a tensor without channels must be as broad as one where the others vary."""
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
                state.channel_ids.keep(one.labels, f"{where} spreads them over others")
                narrow.append(one)
                continue
        made = _meet(state, made, padded.expand(tuple(shape)), where)
    if made is None:
        return never(shape)
    for one in narrow:
        first = count - len(one.real)
        free = [dim for dim in range(count) if dim < first or not one.real[dim - first]]
        state.bound(made, free, "meets a tensor of fixed size")
    return made


def _meet(state: LabelState, made: Tensor | None, labels: Tensor, where: str) -> Tensor:
    if made is None:
        return labels
    inner, other = core(made), core(labels)
    shape = [max(n, m) for n, m in zip(inner.shape, other.shape, strict=True)]
    first, second = inner.expand(shape), other.expand(shape)
    return state.channel_ids.unite(first, second, f"{where} joins them with what must stay").expand(made.shape)


# -- data movement --------------------------------------------------------------------------------------------------


def _move(state: LabelState, node: Node, given: dict[str, Any]) -> Tensor:
    """Runs the operator itself on labels."""
    args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), state.read)
    made: Tensor = operator_of(node)(*args, **kwargs)
    return thin(made)


def _reshape(state: LabelState, node: Node, given: dict[str, Any]) -> Tensor:
    return reshaped(state.read(argument_node(node)), node.meta["val"].shape)


def _join(state: LabelState, node: Node, given: dict[str, Any]) -> Tensor:
    """cat and stack; only the dimensions on which some part depends are written out."""
    joined: Any = node.args[0]
    parts = [state.read(one) for one in joined]
    shape = node.meta["val"].shape
    parts = [part for part in parts if part.numel()]
    stacked = name_of(node) == "stack"
    dim = (given.get("dim") or 0) % len(shape)
    used = {d for part in parts for d in varying(part)} | (set() if stacked else {dim})
    small = [part[tuple(slice(None) if d in used else slice(0, 1) for d in range(part.dim()))] for part in parts]
    return thin((torch.stack if stacked else torch.cat)(small, dim)).expand(shape)


def _slice(state: LabelState, node: Node, given: dict[str, Any]) -> Tensor:
    labels = state.read(argument_node(node))
    dim = (given.get("dim") or 0) % labels.dim()
    if node.meta["val"].shape == labels.shape and (given.get("step") or 1) == 1:
        return labels
    state.bound(labels, [d for d in range(labels.dim()) if d != dim], "takes some by number")
    made: Tensor = operator_of(node)(labels, *node.args[1:], **node.kwargs)
    return made


def _unbind(state: LabelState, node: Node, given: dict[str, Any]) -> list[Tensor]:
    labels = state.read(argument_node(node))
    dim = (given.get("dim") or 0) % labels.dim()
    state.bound(labels, [d for d in range(labels.dim()) if d != dim], "takes a fixed number of them")
    return list(labels.unbind(dim))


def _split(state: LabelState, node: Node, given: dict[str, Any]) -> list[Tensor]:
    """Pieces of one size lose the same channels; pieces of several sizes lose none."""
    labels = state.read(argument_node(node))
    dim = (given.get("dim") or 0) % labels.dim()
    sizes = [piece.shape[dim] for piece in node.meta["val"]]
    if len(set(sizes)) == 1 and len(sizes) > 1:
        pieces = reshaped(labels, [*labels.shape[:dim], len(sizes), sizes[0], *labels.shape[dim + 1 :]])
        state.bound(pieces, [d for d in range(pieces.dim()) if d != dim], "cuts them into pieces of one size")
    elif len(sizes) > 1:
        state.bound(labels, [d for d in range(labels.dim()) if d != dim], "cuts them into pieces of fixed sizes")
    return list(torch.split(labels, sizes, dim))


def _glu(state: LabelState, node: Node, given: dict[str, Any]) -> Tensor:
    labels = state.read(argument_node(node))
    dim = given.get("dim", -1) % labels.dim()
    pieces = reshaped(labels, [*labels.shape[:dim], 2, labels.shape[dim] // 2, *labels.shape[dim + 1 :]])
    state.bound(pieces, [d for d in range(pieces.dim()) if d != dim], "cuts them into halves")
    return _meet(state, pieces.select(dim, 0), pieces.select(dim, 1), state.where(node))


def _roll(state: LabelState, node: Node, given: dict[str, Any]) -> Tensor:
    labels = state.read(argument_node(node))
    dims = [d % labels.dim() for d in given.get("dims") or range(labels.dim())]
    state.bound(labels, [d for d in range(labels.dim()) if d not in dims], "rolls them by a fixed number")
    return thin(labels.roll(given["shifts"], given.get("dims") or ())) if set(dims) & set(varying(labels)) else labels


def _unfold(state: LabelState, node: Node, given: dict[str, Any]) -> Tensor:
    labels = state.read(argument_node(node))
    dim = given["dimension"] % labels.dim()
    state.bound(labels, [d for d in range(labels.dim()) if d != dim], "cuts windows out of them")
    return labels.unfold(dim, given["size"], given["step"])


def _windows(state: LabelState, node: Node, given: dict[str, Any]) -> Tensor:
    """Windows of positions become channels, those of one channel side by side."""
    shape = node.meta["val"].shape
    labels = state.read(argument_node(node))
    dim = len(shape) - (2 if name_of(node) == "im2col" else 3)
    channels = state.channels(labels, labels.dim() - 3, state.where(node))
    return along(channels.repeat_interleave(shape[dim] // len(channels)), dim, shape)


def _pixel_shuffle(state: LabelState, node: Node, given: dict[str, Any]) -> Tensor:
    shape = node.meta["val"].shape
    labels = state.read(argument_node(node))
    channels = state.channels(labels, labels.dim() - 3, state.where(node)).reshape(shape[-3], -1)
    mixed = state.channel_ids.mix(channels, [1], f"{state.where(node)} lays them side by side")[:, 0]
    return along(mixed, len(shape) - 3, shape)


def _index(state: LabelState, node: Node, given: dict[str, Any]) -> Tensor | None:
    """Advanced indexing: of a table by rows that are all alike, of activations by number."""
    source = argument_node(node)
    indices: Any = node.args[1]
    labels = state.read(source)
    dims: list[int] = []
    position = 0
    for index in indices:
        width = index.meta["val"].dim() if index is not None and index.meta["val"].dtype == torch.bool else 1
        dims += range(position, position + width) if index is not None else []
        position += width
    labels = _looked_up(state, source, labels, dims)
    found = []
    for index in indices:
        value = None if index is None else index.meta["val"]
        if value is not None and (set(dims) & set(varying(labels)) or value.dtype == torch.bool):
            value = state.value(index)
            if value is None:
                return None
        elif value is not None:
            value = torch.zeros(value.shape, dtype=torch.int64)
        found.append(slice(None) if value is None else value.cpu())
    return thin(labels[tuple(found)])


def _gather(state: LabelState, node: Node, given: dict[str, Any]) -> Tensor | None:
    dim, index = given["dim"], given["index"]
    labels = state.read(argument_node(node))
    dim %= labels.dim()
    labels = _looked_up(state, argument_node(node), labels, [dim])
    value = state.value(index) if dim in varying(labels) else torch.zeros(index.meta["val"].shape, dtype=torch.int64)
    if value is None:
        return None
    taken = labels.gather if name_of(node) == "gather" else labels.index_select
    return thin(taken(dim, value.cpu()))


def _looked_up(state: LabelState, source: Node, labels: Tensor, dims: Sequence[int]) -> Tensor:
    if state.tensor(source) is not None:
        return thin(state.channel_ids.mix(labels, dims, f"{state.where(state.node)} looks them up by number"))
    state.bound(labels, [d for d in range(labels.dim()) if d not in dims], "takes some by number")
    return labels


# -- mixing ---------------------------------------------------------------------------------------------------------


def _reduce(state: LabelState, node: Node, given: dict[str, Any]) -> Any:
    if isinstance(given.get("other"), Node):
        return _pointwise(state, node, given)
    labels = state.read(argument_node(node))
    dims = given.get("dim")
    dims = [dims] if isinstance(dims, int) else dims or list(range(labels.dim()))
    dims = {dim % labels.dim() for dim in dims}
    mixed = state.channel_ids.mix(labels, dims, _mixed_by(state, node, "takes one number from them"))
    inner = mixed[tuple(slice(0, 1) if dim in dims else slice(None) for dim in range(labels.dim()))]
    return _for_each(node, lambda shape: inner.reshape(shape))


def _softmax(state: LabelState, node: Node, given: dict[str, Any]) -> Any:
    mixed = state.channel_ids.mix(
        state.read(argument_node(node)), [given.get("dim", -1)], _mixed_by(state, node, "mixes them")
    )
    return _for_each(node, lambda shape: mixed)


def _mixed_by(state: LabelState, node: Node, what: str) -> str:
    if "Norm" in state.type_of(node):
        return f"its channels are normalised together by {state.layer(node)}"
    return f"{state.where(node)} {what}"


def _for_each(node: Node, make: Callable[[Sequence[int]], Tensor]) -> Any:
    """The result of `make` for the shape of the node's tensor, or of each of several."""
    value = node.meta["val"]
    return [make(one.shape) for one in value] if isinstance(value, (list, tuple)) else make(value.shape)


def _without_last_dims(labels: Tensor, count: int) -> Tensor:
    """`labels` with size 1 along the last `count` dimensions."""
    for dim in range(labels.dim() - count, labels.dim()):
        labels = labels.narrow(dim, 0, 1)
    return labels


def _pool(state: LabelState, node: Node, given: dict[str, Any]) -> Any:
    rank = next((int(letter) for letter in name_of(node) if letter in "123"), 2)
    labels = state.read(argument_node(node))
    dims = range(labels.dim() - rank, labels.dim())
    mixed = state.channel_ids.mix(labels, dims, f"{state.where(node)} takes one number from them")
    inner = _without_last_dims(mixed, rank)
    return _for_each(node, lambda shape: inner.expand(shape))


def _pad(state: LabelState, node: Node, given: dict[str, Any]) -> Tensor:
    """Padding along positions; a padded channel is not removed, nor what meets it."""
    labels = state.read(argument_node(node))
    sizes = list(given.get("pad") or given["padding"])
    made = labels
    for number in range(len(sizes) // 2):
        dim = labels.dim() - 1 - number
        before, after = sizes[2 * number], sizes[2 * number + 1]
        if dim in varying(made):
            state.bound(made, [d for d in range(made.dim()) if d != dim], "pads them by a fixed number")
            inner = core(made)
            shape = list(inner.shape)
            parts = [torch.zeros([*shape[:dim], n, *shape[dim + 1 :]], dtype=torch.int64) for n in (before, after)]
            inner = torch.cat([parts[0], inner, parts[1]], dim)
            made = inner.expand([inner.shape[d] if d == dim else n for d, n in enumerate(made.shape)])
        else:
            shape = list(made.shape)
            made = made.narrow(dim, 0, 1).expand([*shape[:dim], shape[dim] + before + after, *shape[dim + 1 :]])
    return made


def _batch_norm(state: LabelState, node: Node, given: dict[str, Any]) -> Tensor:
    labels = state.read(argument_node(node))
    why = f"{state.layer(node)} has other channels"
    channels = state.channels(labels, 1, why)
    for name in ("weight", "bias", "running_mean", "running_var"):
        channels = state.vector(given.get(name), channels, why)
    return along(channels, 1, labels.shape)


def _layer_norm(state: LabelState, node: Node, given: dict[str, Any]) -> Tensor:
    labels = state.read(argument_node(node))
    size = len(given["normalized_shape"])
    why = f"its channels are normalised together by {state.layer(node)}"
    mixed = state.channel_ids.mix(labels, range(labels.dim() - size, labels.dim()), why)
    affine = [one for name in ("weight", "bias") if isinstance(one := given.get(name), Node)]
    operands = [
        LabelledOperand(mixed, state.operand(argument_node(node)).real),
        *(state.operand(one) for one in affine),
    ]
    return _unite_operands(state, operands, labels.shape, state.layer(node))


def _group_norm(state: LabelState, node: Node, given: dict[str, Any]) -> Tensor:
    labels = state.read(argument_node(node))
    groups = given["num_groups"]
    channels = state.channels(labels, 1, f"{state.layer(node)} reads them along another dimension")
    why = f"its channels are normalised together by {state.layer(node)}"
    channels = state.channel_ids.mix(channels.reshape(groups, -1), [1], why).reshape(-1)
    for name in ("weight", "bias"):
        channels = state.vector(given.get(name), channels, why)
    return along(channels, 1, labels.shape)


def _prelu(state: LabelState, node: Node, given: dict[str, Any]) -> Tensor:
    labels = state.read(argument_node(node))
    weight = given["weight"]
    if weight.meta["val"].numel() == 1:
        return labels
    channels = state.channels(labels, 1, state.where(node))
    return along(state.vector(weight, channels, state.where(node)), 1, labels.shape)


# -- products -------------------------------------------------------------------------------------------------------


def _matmul(state: LabelState, node: Node, given: dict[str, Any]) -> Tensor:
    return _matrix_product(state, node, argument_node(node), argument_node(node, 1))


def _baddbmm(state: LabelState, node: Node, given: dict[str, Any]) -> Tensor:
    made = _matrix_product(state, node, argument_node(node, 1), argument_node(node, 2))
    operand = LabelledOperand(made, tuple(n > 1 for n in made.shape))
    return _unite_operands(state, [operand, state.operand(argument_node(node))], made.shape, state.where(node))


def _matrix_product(state: LabelState, node: Node, first: Node, second: Node) -> Tensor:
    """A product of two activations; one with a tensor of fixed size keeps the channels that are not summed over."""
    left, right = operands = [state.operand(first), state.operand(second)]
    shape = node.meta["val"].shape
    if all(one.labels.dim() > 1 for one in operands):
        for one, other, summed in ((left, right, -1), (right, left, -2)):
            if not core(other.labels).any():
                if one.labels.dim() + summed in varying(one.labels):
                    state.channel_ids.keep(one.labels, f"{state.where(node)} meets a tensor of fixed size")
                    return never(shape)
                moved = LabelledOperand(one.labels.narrow(summed, 0, 1), one.real, one.table)
                fixed = LabelledOperand(other.labels[..., :1, :1], (*other.real[:-2], False, False))
                return _unite_operands(state, [moved, fixed], shape, state.where(node))
    return _heads(state, operands, shape, node)


def _heads(state: LabelState, operands: Sequence[LabelledOperand], shape: Sequence[int], node: Node) -> Tensor:
    """Unites all channels under one batch index: in attention that is a head."""
    why = f"{state.where(node)} takes products along them"
    mixed = []
    for one in operands:
        dims = range(max(one.labels.dim() - 2, 0), one.labels.dim())
        whole = state.channel_ids.mix(one.labels, dims, why, "attended")
        inner = _without_last_dims(whole, len(dims))
        if len(dims) < 2:
            inner = inner.reshape(1, 1)
        state.channel_ids.log("attended", core(inner), why)
        mixed.append(LabelledOperand(inner, (*one.real[: inner.dim() - 2], False, False), one.table))
    made = _unite_operands(state, mixed, [*shape[:-2], 1, 1] if len(shape) > 1 else [1, 1], state.where(node))
    return made.expand(tuple(shape)) if len(shape) > 1 else made.reshape(1).expand(tuple(shape))


def _attention(state: LabelState, node: Node, given: dict[str, Any]) -> Tensor:
    operands = [state.operand(given[name]) for name in ("query", "key", "value")]
    if given.get("enable_gqa"):
        heads = operands[0].labels.shape[-3]
        operands = [
            LabelledOperand(thin(one.labels.repeat_interleave(heads // one.labels.shape[-3], -3)), one.real, one.table)
            for one in operands
        ]
    if isinstance(mask := given.get("attn_mask"), Node):
        operands.append(state.operand(mask))
    return _heads(state, operands, node.meta["val"].shape, node)


def _by_names(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    **_by_names(
        _identity,
        "clone contiguous to _to_copy type_as alias detach lift_fresh_copy positive float double half bfloat16 dropout "
        "alpha_dropout feature_dropout feature_alpha_dropout rrelu identity zeros_like ones_like full_like empty_like "
        "rand_like randn_like",
    ),
    **_by_names(
        _pointwise,
        "relu relu6 hardtanh hardswish hardsigmoid selu celu elu mish silu leaky_relu softplus softsign threshold "
        "log_sigmoid logsigmoid hardshrink softshrink tanhshrink where masked_fill fill copy multiply divide subtract "
        "true_divide square clip maximum minimum rsub nan_to_num bitwise_not logical_not isnan isfinite isinf",
    ),
    **_by_names(_reshape, "view reshape _unsafe_view flatten unflatten view_as reshape_as ravel"),
    **_by_names(
        _move,
        "permute transpose t numpy_T mT adjoint movedim moveaxis swapaxes swapdims squeeze unsqueeze expand expand_as "
        "broadcast_to flip repeat tile repeat_interleave",
    ),
    **_by_names(_join, "cat concat concatenate stack"),
    **_by_names(_slice, "slice select narrow"),
    **_by_names(_split, "split chunk split_with_sizes tensor_split unsafe_split unsafe_chunk"),
    "unbind": _unbind,
    "glu": _glu,
    "roll": _roll,
    "unfold": _unfold,
    **_by_names(_windows, "im2col pixel_unshuffle"),
    "pixel_shuffle": _pixel_shuffle,
    "index": _index,
    **_by_names(_gather, "gather index_select"),
    **_by_names(
        _reduce,
        "mean sum amax amin prod var std norm linalg_vector_norm logsumexp all any max min median var_mean std_mean "
        "nansum count_nonzero aminmax",
    ),
    **_by_names(_softmax, "softmax log_softmax _softmax _log_softmax cumsum cumprod sort"),
    **_by_names(_pad, "pad constant_pad_nd"),
    **_by_names(_batch_norm, "batch_norm instance_norm"),
    **_by_names(_layer_norm, "layer_norm rms_norm"),
    "group_norm": _group_norm,
    "prelu": _prelu,
    **_by_names(_matmul, "matmul bmm mm"),
    "baddbmm": _baddbmm,
    "scaled_dot_product_attention": _attention,
}
_BY_START: dict[str, Rule] = {
    **dict.fromkeys(("avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool", "upsample_", "lp_pool"), _pool),
    **dict.fromkeys(("reflection_pad", "replication_pad"), _pad),
}
