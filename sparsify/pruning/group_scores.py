"""Scores of the channels of a group, how many may stay, and the choice of the lowest. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsify.errors import DataError
from sparsify.model.targets import is_finite, named_parameters
from sparsify.pruning.groups import ChannelGroup
from sparsify.pruning.selection import mask_lowest

__all__: list[str] = []

PrunedSoFar = dict[str, tuple[int, ...]]
"""{channel group: its channels that go}."""


def norms(model: nn.Module, channel_groups: Mapping[str, ChannelGroup]) -> dict[str, Tensor]:
    """The L2 norm of every channel over its rows and columns in all weights of its group, by channel group.

    Raises:
        DataError: a weight holds NaN or infinity.
    """
    # A small ResNet on digits, a quarter of the channels left, mean accuracy of 4 seeds after one epoch more: rows and
    # columns .968, with the weights of norms .948, each member in units of its mean .966, rows alone .941, random .934.
    parameters = named_parameters(model)
    found: dict[str, Tensor] = {}
    for name, group in channel_groups.items():
        squares: Tensor | None = None
        for member in group.members:
            weight = parameters.get(member.tensor)
            if member.role == "other" or weight is None:
                continue
            values = weight.detach()
            wide = torch.promote_types(values.dtype, torch.float32)
            others = [dim for dim in range(values.dim()) if dim != member.dim]
            # norm() reads the weight once; its square is exact enough to be added to others.
            each = torch.linalg.vector_norm(values, dim=others, dtype=wide).square() if others else values.to(wide) ** 2
            if not is_finite(each):
                raise DataError(
                    f"{member.tensor!r} holds NaN or infinity, which cannot be ranked. Load finite weights."
                )
            channels = torch.tensor(member.channels, device=each.device)
            own = channels >= 0
            sums = torch.zeros(group.size, dtype=torch.float64, device=each.device)
            sums.index_add_(0, channels[own], each[own].double())
            squares = sums if squares is None else squares + sums.to(squares.device)
        found[name] = torch.zeros(group.size, dtype=torch.float64) if squares is None else squares.sqrt().cpu()
    return found


def slices(group: ChannelGroup) -> int:
    """Number of slices of a layer's rows that belong to one channel; more than 1 for heads and group convolutions."""
    widths = [sum(channel == 0 for channel in member.channels) for member in group.members if member.role == "row"]
    return max(1, *widths) if widths else 1


def fast_multiple(group: ChannelGroup) -> int:
    """The number that should divide the number of channels that stay, for kernels of runtimes to be fast.

    Convolutions lose half of what they could gain, or all of it, at widths that vector units do not divide: 16 where
    there are 32 or more, else 8, or 4 where there are fewer than 16. Products of matrices do not care.
    """
    return 1 if group.kind != "conv" else _in_channels(fast_width(group.size * slices(group)), group)


def fast_width(width: int) -> int:
    """The number that should divide how many of the `width` outputs of a convolution stay."""
    return 16 if width >= 32 else 8 if width >= 16 else 4


def multiple_of(group: ChannelGroup, multiple: int | None) -> int:
    """The multiple for `group`: `multiple` counted in channels, or `fast_multiple` where it is None."""
    return fast_multiple(group) if multiple is None else _in_channels(multiple, group)


def _in_channels(multiple: int, group: ChannelGroup) -> int:
    return multiple // math.gcd(multiple, slices(group))


@dataclass(frozen=True)
class Bounds:
    """The numbers of channels of a group that may stay: of `size`, a multiple of `multiple`, no fewer than `least`."""

    size: int
    multiple: int
    least: int

    @classmethod
    def of(cls, size: int, multiple: int, limit: float = 1.0) -> Bounds:
        """Bounds where at most the fraction `limit` may go; at least one channel stays, one multiple if there is one.

        >>> Bounds.of(64, 16, 0.6)
        Bounds(size=64, multiple=16, least=32)
        """
        multiple = multiple if multiple <= size else 1
        # A product like 10 * 0.7 lies a hair below the whole number that is meant.
        least = max(1, size - math.floor(size * limit + 1e-9))
        return cls(size, multiple, min(size, math.ceil(least / multiple) * multiple))

    def nearest(self, kept: int) -> int:
        """The number that may stay nearest to `kept`, of two the larger; all of them where `kept` is all.

        >>> bounds = Bounds.of(64, 16)
        >>> [bounds.nearest(kept) for kept in (64, 63, 26, 24, 23, 0)]
        [64, 64, 32, 32, 16, 16]
        """
        if kept >= self.size:
            return self.size
        rounded = math.floor(kept / self.multiple + 0.5) * self.multiple
        return min(max(rounded, self.least), self.size)


def lowest(
    scores: Mapping[str, Tensor], counts: Mapping[str, int], pruned: Mapping[str, Collection[int]]
) -> PrunedSoFar:
    """The `counts` channels of every group that go: those in `pruned` first, then those of lowest score.

    Of equal ones the first go.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, score in scores.items():
        kept = {name: _at_least_kept(score, pruned.get(name, ()))}
        mask = mask_lowest({name: score}, counts[name], kept=kept)[name]
        found[name] = tuple((~mask).nonzero().flatten().tolist())
    return found


def shares(
    scores: Mapping[str, Tensor], count: int, bounds: Mapping[str, Bounds], pruned: Mapping[str, Collection[int]]
) -> dict[str, int]:
    """Number of channels of each group that go, where the `count` lowest of all groups go.

    Scores are compared in units of their group's mean. Channels that `bounds` protects stay, and every group is rounded
    to a number that may stay; channels in `pruned` are among those that go.
    """
    ranked: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    most = 0
    for name, score in scores.items():
        kept[name] = _at_least_kept(score, pruned.get(name, ()))
        units = torch.where(kept[name], score / score.mean().clamp(min=1e-300), -1.0)
        protected = units.sort(stable=True).indices[score.numel() - bounds[name].least :]
        ranked[name] = units.index_fill(0, protected, math.inf)
        most += score.numel() - bounds[name].least
    masks = mask_lowest(ranked, min(count, most), kept=kept)
    return {name: mask.numel() - bounds[name].nearest(int(mask.sum())) for name, mask in masks.items()}


def _at_least_kept(score: Tensor, pruned: Collection[int]) -> Tensor:
    mask = torch.ones(score.shape, dtype=torch.bool)
    mask[list(pruned)] = False
    return mask
