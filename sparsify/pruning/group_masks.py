"""Masks of the channels of a channel group, and the channels that its zero weights leave without effect."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from sparsify.pruning.groups import ChannelGroup, ChannelGroups, GroupMember
from sparsify.pruning.removal import PrunedChannels, tensors

__all__: list[str] = []


def deletion_masks(model: nn.Module, channel_groups: ChannelGroups, pruned: PrunedChannels) -> dict[str, Tensor]:
    """Masks, True where kept, of all parameters that the channel groups in `pruned` have members in.

    All of a channel is masked: its rows, biases, norms and tables, and the columns of all layers that read it. A tensor
    that belongs to two channel groups has the zeros of both.
    """
    here = {name: t for name, t in tensors(model).items() if isinstance(t, nn.Parameter)}
    masks: dict[str, Tensor] = {}
    for name, channels in pruned.items():
        lost = set(channels)
        for member in channel_groups.groups[name].members:
            parameter = here.get(member.tensor)
            if parameter is None:
                continue
            if member.tensor not in masks:
                masks[member.tensor] = torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device)
            index = [i for i, channel in enumerate(member.channels) if channel in lost]
            if index:
                masks[member.tensor].index_fill_(member.dim, torch.tensor(index, device=parameter.device), False)
    return masks


def dead_channels(
    model: nn.Module, channel_groups: ChannelGroups, *, by_rows: bool = False
) -> dict[str, tuple[int, ...]]:
    """The channels of each channel group that can go by their zeros; at least one of each channel group is left out.

    A channel is dead where all columns that read it are zero, or, where no layer reads it, all the rest of it.

    Args:
        model: the module whose weights are looked at.
        channel_groups: those of `model`.
        by_rows: also where its rows, biases and norms are zero, though the columns that read it are not. What follows
            may make something of a zero, so the result has to be checked.
    """
    here = {name: t.detach() for name, t in tensors(model).items() if isinstance(t, nn.Parameter)}
    found = {}
    for name, group in channel_groups.groups.items():
        columns = _all_zero(group, here, lambda member: member.role == "column")
        made = _all_zero(group, here, lambda member: member.role != "column")
        rows = _all_zero(group, here, lambda member: member.role == "row")
        channels = [
            c
            for c in range(group.size)
            if (columns is not None and columns[c])
            or (by_rows and made is not None and rows is not None and made[c])
            or (columns is None and made is not None and made[c])
        ]
        found[name] = tuple(channels[: group.size - 1])
    return found


def _all_zero(
    group: ChannelGroup, here: Mapping[str, Tensor], which: Callable[[GroupMember], bool]
) -> list[bool] | None:
    """For each channel, True if all its slices in these members are zero; None where there is no such member."""
    zero: Tensor | None = None
    for member in group.members:
        tensor = here.get(member.tensor)
        if tensor is None or not which(member):
            continue
        nonzero = tensor.movedim(member.dim, 0).reshape(tensor.shape[member.dim], -1).ne(0).any(dim=1).cpu()
        channel_of = torch.tensor(member.channels)
        mine = channel_of >= 0
        used = torch.zeros(group.size, dtype=torch.int64).index_add_(0, channel_of[mine], nonzero[mine].long())
        zero = used == 0 if zero is None else zero & (used == 0)
    return None if zero is None else list(zero.tolist())
