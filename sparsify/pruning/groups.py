"""Channel groups: the channels that must be removed together so that a smaller model computes the same. Plain data.

A channel is one index along one dimension of one or more weights. The channels of a group are alike: each has the same
number of slices in the same tensors. They are found in the traced view of a model; `dry_run` tries them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from sparsify.model.targets import is_prunable_layer, named_modules, named_parameters
from sparsify.model.wrappers import clean_name
from sparsify.pruning.label_tensors import core, thin, varying
from sparsify.pruning.union_find import NEVER

if TYPE_CHECKING:
    from sparsify.pruning.labels import ChannelLabels, SliceRole

__all__: list[str] = []

GroupKind = Literal["conv", "linear", "heads", "embedding"]


@dataclass(frozen=True)
class GroupMember:
    """One dimension of one parameter or buffer, and the channel of the group that each slice along it belongs to.

    Attributes:
        tensor: the clean name; of tied parameters the first.
        role: "row", the outputs of a layer's weight; "column", its inputs; "other", biases, norms, tables and buffers.
        channels: a channel, or -1 for none of this group, for every index of the dimension.
    """

    tensor: str
    dim: int
    role: Literal["row", "column", "other"]
    channels: tuple[int, ...]


@dataclass(frozen=True)
class ChannelGroup:
    """`size` channels that are alike, 0 to size - 1; each is removed from all `members` at once or not at all.

    Attributes:
        name: the weight whose rows they are, the first in the model's order; "#2" and so on behind it where several
            channel groups share that weight's rows.
        kind: "heads" where a channel is a whole head of attention; "conv" where they are rows of any convolution;
            otherwise by the layer of the first rows.
    """

    name: str
    kind: GroupKind
    size: int
    members: tuple[GroupMember, ...]

    @property
    def rows(self) -> tuple[str, ...]:
        """The weights whose outputs these channels are."""
        return tuple(dict.fromkeys(member.tensor for member in self.members if member.role == "row"))

    @property
    def columns(self) -> tuple[str, ...]:
        """The weights that read these channels."""
        return tuple(dict.fromkeys(member.tensor for member in self.members if member.role == "column"))

    @property
    def tensors(self) -> tuple[str, ...]:
        """The parameters and buffers that these channels are removed from."""
        return tuple(dict.fromkeys(member.tensor for member in self.members))


@dataclass(frozen=True)
class TracedSize:
    """A size of a tensor in a module's own forward that changes with channel groups; code there may hold its number.

    Attributes:
        module: the path of the module in whose forward the tensor is made.
        channels: (channel group's name, channel) for every index of that dimension; None for what always stays.
    """

    module: str
    channels: tuple[tuple[str, int] | None, ...]


@dataclass(frozen=True)
class ChannelGroups:
    """All channel groups of a model, and the reasons why other weights keep their size.

    Attributes:
        groups: in the model's order, by name.
        whole: {weight: why its rows cannot be cut}, for the weights of layers that have no channel group of rows.
        traced_sizes: the sizes inside modules that change with channel groups.
        constants: attributes of modules that do not follow any size, though they are equal to one; found by trying.
    """

    groups: Mapping[str, ChannelGroup]
    whole: Mapping[str, str] = field(default_factory=dict)
    traced_sizes: tuple[TracedSize, ...] = ()
    constants: frozenset[str] = frozenset()


def find_unchecked_groups(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> ChannelGroups:
    """The channel groups of `model`, traced on these example inputs in eval mode, before any was tried.

    Only `dry_run.find_groups` gives those that are exact. The model stays as it was.

    Raises:
        ArgumentError: the model cannot be traced or fails on these inputs; the message says where in its code.
    """
    # Here and not above: most who import this only read the groups.
    from sparsify.model.trace import exported
    from sparsify.pruning.propagation import propagate_labels

    return _groups_of_labels(model, propagate_labels(model, exported(model, args, kwargs)))


@dataclass(frozen=True)
class _LabelledDim:
    """One dimension of one tensor: the channel id of every slice, 0 for those that cannot be removed."""

    tensor: str
    dim: int
    role: SliceRole
    ids: Tensor


def _groups_of_labels(model: nn.Module, found: ChannelLabels) -> ChannelGroups:
    """Puts channel ids that have the same number of slices in the same dimensions of tensors into one group."""
    channel_ids = found.channel_ids
    roots = channel_ids.roots(torch.arange(len(channel_ids)))
    free = channel_ids.first("kept") == NEVER
    heads = channel_ids.first("attended") != NEVER
    order = {
        name: number
        for number, name in enumerate(
            [*named_parameters(model), *(clean_name(name) for name, _ in model.named_buffers())]
        )
    }
    dims = sorted(_labelled_dims(found, free), key=lambda one: (order.get(one.tensor, len(order)), one.dim))

    slices_of: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for number, one in enumerate(dims):
        for root, count in Counter(one.ids.tolist()).items():
            if root:
                slices_of[root].append((number, count))
    alike: dict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
    for root, counts in slices_of.items():
        alike[tuple(counts)].append(root)

    groups: dict[str, ChannelGroup] = {}
    channel_of: dict[int, tuple[str, int]] = {}
    reasons: dict[int, str] = {}
    named: dict[str, int] = defaultdict(int)
    for signature, channels in alike.items():
        rows = [dims[number].tensor for number, _ in signature if dims[number].role == "row"]
        if not rows:
            continue
        why = None
        if len(channels) == 1:
            why = "its channels cannot be told apart: they go all together or not at all"
        elif not any(dims[number].role == "column" for number, _ in signature):
            why = "no layer reads its channels"
        if why is not None:
            reasons.update(dict.fromkeys(channels, why))
            continue
        # In the order in which they stand in the first rows.
        first = next(number for number, _ in signature if dims[number].role == "row")
        position_of = {root: position for position, root in reversed(list(enumerate(dims[first].ids.tolist())))}
        channels.sort(key=position_of.__getitem__)
        named[rows[0]] += 1
        name = rows[0] if named[rows[0]] == 1 else f"{rows[0]}#{named[rows[0]]}"
        several = any(count > 1 and dims[number].role == "row" for number, count in signature)
        kinds = [found.layers.get(row, "linear") for row in rows]
        kind: GroupKind = "conv" if "conv" in kinds else kinds[0]
        if several and bool(heads[channels[0]]):
            kind = "heads"
        index = torch.full((len(roots),), -1)
        index[torch.tensor(channels)] = torch.arange(len(channels))
        members = tuple(
            GroupMember(dims[n].tensor, dims[n].dim, dims[n].role, tuple(index[dims[n].ids].tolist()))
            for n, _ in signature
        )
        groups[name] = ChannelGroup(name, kind, len(channels), members)
        channel_of.update({root: (name, channel) for channel, root in enumerate(channels)})
    in_order = sorted(groups.values(), key=lambda group: (order[group.rows[0]], group.name))
    cut = {row for group in groups.values() for row in group.rows}
    return ChannelGroups(
        {group.name: group for group in in_order},
        _whole_weights(model, found, reasons, cut),
        _traced_sizes(found, channel_of),
    )


def _labelled_dims(found: ChannelLabels, free: Tensor) -> Iterator[_LabelledDim]:
    for (tensor, dim), labels in found.slices.items():
        ids = found.channel_ids.roots(labels).contiguous()
        ids = torch.where(free[ids], ids, 0)
        if ids.any():
            yield _LabelledDim(tensor, dim, found.roles[tensor, dim], ids)
    for tensor, labels in found.tables.items():
        labels = thin(found.channel_ids.roots(labels))
        dims = varying(labels)
        if len(dims) == 1:
            ids = core(labels).flatten()
            ids = torch.where(free[ids], ids, 0)
            if ids.any():
                yield _LabelledDim(tensor, dims[0], "other", ids)


def _whole_weights(
    model: nn.Module, found: ChannelLabels, no_group: Mapping[int, str], cut: Collection[str]
) -> dict[str, str]:
    """The reason why the rows of each weight that is not in `cut` cannot be removed.

    `no_group` has the reasons of channel ids that no channel group was made of.
    """
    channel_ids = found.channel_ids
    kept, mixed, attended = channel_ids.first("kept"), channel_ids.first("mixed"), channel_ids.first("attended")
    weights = {name: p for name, p in named_parameters(model).items() if p.dim() > 1}
    layers = {f"{name}.weight" for name, module in named_modules(model).items() if is_prunable_layer(module)}
    if is_prunable_layer(model):
        layers.add("weight")
    reasons: dict[str, str] = {}
    for name in weights:
        if name in cut or not (name in layers or name in found.layers or name in found.refused):
            continue
        rows = [found.slices[key] for key in found.slices if key[0] == name and found.roles[key] == "row"]
        if name in found.refused or not rows:
            reasons[name] = found.refused.get(name, "the model does not call it on these inputs")
            continue
        ids = channel_ids.roots(torch.cat([labels.reshape(-1) for labels in rows]))
        first = int(kept[ids].min())
        if first == NEVER or bool((ids == ids[0]).all()):
            first = min(first, int(mixed[ids].min()), int(attended[ids].min()))
        if first != NEVER:
            reasons[name] = channel_ids.events[first].why
        else:
            reasons[name] = no_group.get(int(ids[0]), "its channels cannot be told apart")
    return reasons


def _traced_sizes(found: ChannelLabels, channel_of: Mapping[int, tuple[str, int]]) -> tuple[TracedSize, ...]:
    seen: dict[tuple[str, tuple[int, ...]], TracedSize] = {}
    for module, labels in found.made:
        inner = core(thin(found.channel_ids.roots(labels)))
        if inner.numel() > 1:
            vector = inner.flatten().tolist()
            if any(root in channel_of for root in vector):
                key = (module, tuple(vector))
                if key not in seen:
                    seen[key] = TracedSize(module, tuple(channel_of.get(root) for root in vector))
    return tuple(seen.values())
