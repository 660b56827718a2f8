"""Channel groups of channels: what must be removed together so that a smaller model computes the same. Plain data.

A channel is one index along one dimension of one or more weights; the channels of a channel group are alike: each takes
the same share of the same tensors. Found by `find` on the traced view of a model; `shrinking` masks and removes them.
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
from sparsify.pruning.union_find import NEVER, core, thin, varying

if TYPE_CHECKING:
    from sparsify.pruning.propagation import Labelled, SliceRole

__all__: list[str] = []

GroupKind = Literal["conv", "linear", "heads", "embedding"]


@dataclass(frozen=True)
class GroupMember:
    """One dimension of one parameter or buffer, and which channel of the channel group each slice along it belongs to.

    Attributes:
        tensor: the clean name; of tied parameters the first.
        role: "row", what a layer's weight gives; "column", what it reads; "other", biases, norms, tables and buffers.
        channels: a channel, or -1 for none of this channel group, for every index of the dimension.
    """

    tensor: str
    dim: int
    role: Literal["row", "column", "other"]
    channels: tuple[int, ...]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are alike, `size` of them, 0 to size - 1; each dies in all `places` at once or not at all.

    Attributes:
        name: the weight whose rows they are, the first in the model's order; "#2" and so on behind it where several
            channel groups share that weight's rows.
        kind: "heads" where a channel is a whole head of attention; "conv" where they are rows of any convolution;
            otherwise by the layer of the first rows.
    """

    name: str
    kind: GroupKind
    size: int
    places: tuple[GroupMember, ...]

    @property
    def rows(self) -> tuple[str, ...]:
        """The weights that give these channels."""
        return tuple(dict.fromkeys(place.tensor for place in self.places if place.role == "row"))

    @property
    def columns(self) -> tuple[str, ...]:
        """The weights that read these channels."""
        return tuple(dict.fromkeys(place.tensor for place in self.places if place.role == "column"))


@dataclass(frozen=True)
class TracedSize:
    """A size that is seen inside a module's own forward and changes with channel groups: code there may have it as a
    number.

    Attributes:
        module: the path of the module in whose forward the tensor is made.
        channels: (channel group's name, channel) for every index of that dimension; None for what always stays.
    """

    module: str
    channels: tuple[tuple[str, int] | None, ...]


@dataclass(frozen=True)
class ChannelGroups:
    """All channel groups of a model, and why other weights keep their size.

    Attributes:
        channel groups: in the model's order, by name.
        whole: {weight: why its rows cannot be cut}, for the weights of layers that have no channel group of rows.
        constants: attributes of modules that do not follow any extent, though they are equal to one; found by trying.
    """

    groups: Mapping[str, ChannelGroup]
    whole: Mapping[str, str] = field(default_factory=dict)
    extents: tuple[TracedSize, ...] = ()
    constants: frozenset[str] = frozenset()


def find(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> ChannelGroups:
    """The channel groups of `model`, traced on these example inputs in eval mode; the model stays as it was.

    Raises:
        ArgumentError: the model cannot be traced or fails on these inputs; the message says where in its code.
    """
    # Here and not above: most who import this only read what was found.
    from sparsify.model.trace import exported
    from sparsify.pruning.propagation import labelled

    return _grouped_labels(model, labelled(model, exported(model, args, kwargs)))


@dataclass(frozen=True)
class _Share:
    """One dimension of one tensor: the atom of every slice, 0 for none that can die."""

    tensor: str
    dim: int
    role: SliceRole
    atoms: Tensor


def _grouped_labels(model: nn.Module, found: Labelled) -> ChannelGroups:
    """Puts atoms that take the same share of the same tensors into families."""
    atoms = found.atoms
    roots = atoms.roots(torch.arange(len(atoms)))
    free = atoms.first("kept") == NEVER
    heads = atoms.first("attended") != NEVER
    order = {
        name: number
        for number, name in enumerate(
            [*named_parameters(model), *(clean_name(name) for name, _ in model.named_buffers())]
        )
    }
    shares = sorted(_shares(found, free), key=lambda share: (order.get(share.tensor, len(order)), share.dim))

    taken: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for number, share in enumerate(shares):
        for root, count in Counter(share.atoms.tolist()).items():
            if root:
                taken[root].append((number, count))
    alike: dict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
    for root, share_counts in taken.items():
        alike[tuple(share_counts)].append(root)

    channel_groups: dict[str, ChannelGroup] = {}
    members: dict[int, tuple[str, int]] = {}
    alone: dict[int, str] = {}
    counted: dict[str, int] = defaultdict(int)
    for signature, channels in alike.items():
        rows = [shares[number].tensor for number, _ in signature if shares[number].role == "row"]
        if not rows:
            continue
        why = None
        if len(channels) == 1:
            why = "its channels cannot be told apart: they go all together or not at all"
        elif not any(shares[number].role == "column" for number, _ in signature):
            why = "no layer reads its channels"
        if why is not None:
            alone.update(dict.fromkeys(channels, why))
            continue
        # In the order in which they stand in the first rows.
        first = next(number for number, _ in signature if shares[number].role == "row")
        where = {root: position for position, root in reversed(list(enumerate(shares[first].atoms.tolist())))}
        channels.sort(key=where.__getitem__)
        counted[rows[0]] += 1
        name = rows[0] if counted[rows[0]] == 1 else f"{rows[0]}#{counted[rows[0]]}"
        several = any(count > 1 and shares[number].role == "row" for number, count in signature)
        kinds = [found.layers.get(row, "linear") for row in rows]
        kind: GroupKind = "conv" if "conv" in kinds else kinds[0]
        if several and bool(heads[channels[0]]):
            kind = "heads"
        index = torch.full((len(roots),), -1)
        index[torch.tensor(channels)] = torch.arange(len(channels))
        places = tuple(
            GroupMember(shares[n].tensor, shares[n].dim, shares[n].role, tuple(index[shares[n].atoms].tolist()))
            for n, _ in signature
        )
        channel_groups[name] = ChannelGroup(name, kind, len(channels), places)
        members.update({root: (name, channel) for channel, root in enumerate(channels)})
    by_order = sorted(
        channel_groups.values(), key=lambda channel_group: (order[channel_group.rows[0]], channel_group.name)
    )
    return ChannelGroups(
        {channel_group.name: channel_group for channel_group in by_order},
        _whole_weights(
            model, found, alone, {row for channel_group in channel_groups.values() for row in channel_group.rows}
        ),
        _extents(found, members),
    )


def _shares(found: Labelled, free: Tensor) -> Iterator[_Share]:
    for (tensor, dim), labels in found.places.items():
        atoms = found.atoms.roots(labels).contiguous()
        atoms = torch.where(free[atoms], atoms, 0)
        if atoms.any():
            yield _Share(tensor, dim, found.roles[tensor, dim], atoms)
    for tensor, labels in found.tables.items():
        labels = thin(found.atoms.roots(labels))
        dims = varying(labels)
        if len(dims) == 1:
            atoms = core(labels).flatten()
            atoms = torch.where(free[atoms], atoms, 0)
            if atoms.any():
                yield _Share(tensor, dims[0], "other", atoms)


def _whole_weights(model: nn.Module, found: Labelled, alone: Mapping[int, str], cut: Collection[str]) -> dict[str, str]:
    """Why the rows of each weight that is not in `cut` cannot be cut."""
    atoms = found.atoms
    kept, mixed, attended = atoms.first("kept"), atoms.first("mixed"), atoms.first("attended")
    weights = {name: p for name, p in named_parameters(model).items() if p.dim() > 1}
    layers = {f"{name}.weight" for name, module in named_modules(model).items() if is_prunable_layer(module)}
    if is_prunable_layer(model):
        layers.add("weight")
    reasons: dict[str, str] = {}
    for name in weights:
        if name in cut or not (name in layers or name in found.layers or name in found.refused):
            continue
        rows = [found.places[key] for key in found.places if key[0] == name and found.roles[key] == "row"]
        if name in found.refused or not rows:
            reasons[name] = found.refused.get(name, "the model does not call it on these inputs")
            continue
        members = atoms.roots(torch.cat([labels.reshape(-1) for labels in rows]))
        first = int(kept[members].min())
        if first == NEVER or bool((members == members[0]).all()):
            first = min(first, int(mixed[members].min()), int(attended[members].min()))
        if first != NEVER:
            reasons[name] = atoms.events[first].why
        else:
            reasons[name] = alone.get(int(members[0]), "its channels cannot be told apart")
    return reasons


def _extents(found: Labelled, members: Mapping[int, tuple[str, int]]) -> tuple[TracedSize, ...]:
    seen: dict[tuple[str, tuple[int, ...]], TracedSize] = {}
    for module, labels in found.made:
        inner = core(thin(found.atoms.roots(labels)))
        if inner.numel() > 1:
            vector = inner.flatten().tolist()
            if any(root in members for root in vector):
                key = (module, tuple(vector))
                if key not in seen:
                    seen[key] = TracedSize(module, tuple(members.get(root) for root in vector))
    return tuple(seen.values())
