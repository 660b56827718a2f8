"""Scores -> masks, as pure functions. A mask is a bool tensor of its parameter's shape: True where a weight is kept."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparsify.errors import DataError
from sparsify.model.sharding import (
    Region,
    gathered,
    is_sharded,
    laid_out,
    local,
    part_sizes,
    region,
    split_of,
    with_part,
)
from sparsify.pruning.selection import mask_lowest
from sparsify.pruning.sharded_selection import Part, Ranking, mask_lowest_of_all

__all__: list[str] = []


@dataclass(frozen=True)
class MaskType:
    """The units that are masked as a whole.

    Attributes:
        kind: "unstructured", single weights; "block", rectangles of weights; "n_of_m", single weights, a fixed number
            in every group along the input channels; "filter" and "channel", whole output and input channels.
        block: the weights of a block along the output and the input channels, -1 for all of them.
        keep: N of N:M, the number of weights that stay in every group.
        of: M of N:M, the size of a group.
    """

    kind: Literal["unstructured", "block", "n_of_m", "filter", "channel"]
    block: tuple[int, int] = (1, 1)
    keep: int = 0
    of: int = 1

    @classmethod
    def parse(cls, text: str | list[int]) -> MaskType:
        """The mask type that a recipe writes as `text`.

        >>> MaskType.parse("block4").block, MaskType.parse([2, -1]).block, MaskType.parse("tensorrt").of
        ((1, 4), (2, -1), 4)
        """
        if isinstance(text, list):
            return cls("block", block=(text[0], text[1]))
        if text.startswith("block"):
            return cls("block", block=(1, int(text.removeprefix("block") or 4)))
        if text == "tensorrt":
            return cls("n_of_m", keep=2, of=4)
        if ":" in text:
            keep, of = text.split(":")
            return cls("n_of_m", keep=int(keep), of=int(of))
        if text in ("unstructured", "filter", "channel"):
            return cls(text)  # type: ignore[arg-type]
        raise ValueError(f"{text!r} is no mask type")

    @property
    def text(self) -> str:
        """The mask type as a recipe writes it."""
        if self.kind == "block":
            return str(list(self.block))
        return f"{self.keep}:{self.of}" if self.kind == "n_of_m" else self.kind

    def units(self, shape: torch.Size, input_dim: int) -> int:
        """The number of units in a weight of this shape that is fit to be masked so; in a stack those of all matrices.

        >>> shape = torch.Size((8, 16))
        >>> MaskType.parse("block4").units(shape, 1), MaskType.parse("filter").units(shape, 1)
        (32, 8)
        """
        dim = _output_dim(input_dim)
        if self.kind in ("filter", "channel"):
            return shape[input_dim if self.kind == "channel" else dim] * (shape[0] if input_dim < 0 else 1)
        if self.kind != "block":
            return shape.numel()
        a, b = self.block
        return shape.numel() // ((shape[dim] if a == -1 else a) * (shape[input_dim] if b == -1 else b))

    def why_unfit(self, shape: torch.Size, input_dim: int | None) -> str | None:
        """The reason why a weight of this shape cannot be masked so, or None. Of a stack `input_dim` is negative."""
        if self.kind == "unstructured":
            return None
        if input_dim is None:
            return (
                f"is a raw parameter of shape {tuple(shape)}, and its module does not say along which dimension its "
                "input channels lie. Give input_dims: {name: 2} for (experts, outputs, inputs) or {name: 1} for "
                "(experts, inputs, outputs), or set is_transposed on the module, False or True"
            )
        if len(shape) < 2:
            return f"has {len(shape)} dimension{'' if len(shape) == 1 else 's'}, but {self.text} needs 2 or more"
        if self.kind in ("filter", "channel"):
            return None
        if self.kind == "n_of_m":
            if shape[input_dim] % self.of:
                return f"has {shape[input_dim]} input channels, which {self.of} does not divide"
            return None
        for kind, size, channels in zip(
            ("output", "input"), self.block, (shape[_output_dim(input_dim)], shape[input_dim]), strict=True
        ):
            if size != -1 and channels % size:
                return f"has {channels} {kind} channels, which {size} does not divide"
        return None


def compute_masks(
    scores: Mapping[str, Tensor],
    sparsity: float | Mapping[str, float],
    mask_type: MaskType = MaskType("unstructured"),
    *,
    previous: Mapping[str, Tensor] | None = None,
    input_dims: Mapping[str, int] | None = None,
    together: bool = False,
    absolute: bool = True,
    releases: Collection[str] = (),
) -> dict[str, Tensor]:
    """Masks with exactly round(units * sparsity) masked units; a unit is a weight, a block, or a channel of one weight.

    Units that are masked in `previous` are masked first; where those are more, they all stay masked, so that a mask
    only grows, unless it is in `releases`. Then come those of lowest score, of equal ones the first in logical order.
    N:M: exactly round(n * sparsity) weights are masked and at most M - N in any group, also below 1 - N/M; the groups
    lie along the input channels.

    Scores that are sharded over ranks (DTensors) give masks that are sharded like them, the same as without sharding.
    Only counts are sent, unless units lie across parts: then the scores of that parameter are gathered.

    Args:
        scores: the importance of each weight, by name; the weights themselves for magnitude.
        sparsity: the fraction of zeros, 0 to 1; by name, where not all are ranked `together`.
        mask_type: the units.
        previous: the masks so far, for some or all names.
        input_dims: the dimension of the input channels, 1 where nothing is given; negative for a stack of matrices,
            whose first dimension tells them apart: units then lie within one of them.
        together: one ranking over all of them, and the count over all; otherwise each by itself.
        absolute: rank by absolute value. The score of a block is the mean of its weights' scores either way; that of a
            channel is their root mean square, and where `absolute` is off their mean.
        releases: names, all of them where they are ranked `together`. Where more is masked in their `previous`, so many
            are let go that the count is exact: those that come last in an order that is random over the tensor, and the
            same in every run. All are zero, so no score tells them apart; by position, one row of a layer would come
            back after the other. Masks that are sharded are gathered for it.

    Raises:
        DataError: a score is NaN; the message names it.

    >>> compute_masks({"w": torch.tensor([[1.0, -4.0, 3.0, 2.0]])}, 0.5, MaskType.parse("2:4"))
    {'w': tensor([[False,  True,  True, False]])}
    """
    previous = previous or {}
    dims = input_dims or {}
    released: dict[str, Tensor] = {}
    for group in [list(scores)] if together else [[name] for name in scores]:
        if releases and group[0] in releases:
            own = {name: previous[name] for name in group if name in previous}
            released |= _with_released(own, _one(sparsity, group[0]), mask_type, dims) if len(own) == len(group) else {}
    if released:
        found = {name: laid_out(mask, scores[name]) for name, mask in released.items()}
        rest = {name: score for name, score in scores.items() if name not in found}
        more = compute_masks(
            rest, sparsity, mask_type, previous=previous, input_dims=dims, together=together, absolute=absolute
        )
        return {name: found[name] if name in found else more[name] for name in scores}
    if any(is_sharded(score) for score in scores.values()):
        return _compute_sharded(scores, sparsity, mask_type, previous, dims, together, absolute)
    units: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    back: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, score in scores.items():
        if mask_type.kind == "n_of_m" and score.isnan().any():
            raise DataError(f"{name!r} holds NaN, which cannot be ranked. Load weights that are finite.")
        dim, mask = dims.get(name, 1), previous.get(name)
        units[name], back[name] = _units(score.detach(), mask, mask_type, dim, absolute)
        if mask is not None:
            kept[name] = _units_kept(mask, mask_type, dim)
    absolute = absolute and mask_type.kind == "unstructured"
    if together:
        total = sum(unit.numel() for unit in units.values())
        masks = mask_lowest(units, round(total * _one(sparsity)), kept=kept, absolute=absolute) if units else {}
    else:
        masks = {}
        for name, unit in units.items():
            own = {name: kept[name]} if name in kept else {}
            count = round(unit.numel() * _one(sparsity, name))
            masks |= mask_lowest({name: unit}, count, kept=own, absolute=absolute)
    return {name: back[name](mask) if name in back else mask for name, mask in masks.items()}


def _with_released(
    masks: Mapping[str, Tensor], sparsity: float, mask_type: MaskType, dims: Mapping[str, int]
) -> dict[str, Tensor]:
    """Masks with exactly round(units * sparsity) of the units that are masked in `masks`; empty if they are no more."""
    order, back, masked = {}, {}, 0
    for name, mask in masks.items():
        whole, dim = gathered(mask), dims.get(name, 1)
        kept = _units_kept(whole, mask_type, dim)
        back[name] = _units(torch.zeros_like(whole, dtype=torch.float32), None, mask_type, dim, False)[1]
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        order[name] = torch.where(kept, 2.0, torch.rand(kept.shape, generator=generator).to(kept.device))
        masked += kept.numel() - int(kept.count_nonzero())
    count = round(sum(each.numel() for each in order.values()) * sparsity)
    return {name: back[name](mask) for name, mask in mask_lowest(order, count).items()} if masked > count else {}


def sparing_one(score: Tensor, dims: tuple[int, ...], previous: Tensor | None, absolute: bool) -> Tensor:
    """`score` with infinity at the highest that `previous` keeps in each slice over `dims`: no slice is masked whole.

    For weights that are divided by the norm of each slice, which is not to be zero.
    """
    if is_sharded(score):
        spared = sparing_one(gathered(score), dims, None if previous is None else gathered(previous), absolute)
        return laid_out(spared, score)
    values = (score.detach().abs() if absolute else score.detach()).clone()
    rank_by = values if previous is None else torch.where(previous, values, -math.inf)
    rest = [dim for dim in range(score.dim()) if dim not in dims]
    slices = rank_by.permute(*rest, *dims).flatten(len(rest))
    highest = torch.zeros_like(slices, dtype=torch.bool).scatter_(-1, slices.argmax(-1, keepdim=True), True)
    ordered = [score.shape[dim] for dim in (*rest, *dims)]
    back = sorted(range(score.dim()), key=lambda i: (*rest, *dims)[i])
    return values.masked_fill_(highest.view(ordered).permute(back), math.inf)


def _output_dim(input_dim: int) -> int:
    """The dimension of the output channels beside it; of a stack the other one from the end."""
    return 1 - input_dim if input_dim >= 0 else -3 - input_dim


def _one(sparsity: float | Mapping[str, float], name: str | None = None) -> float:
    """The sparsity of the parameter `name`; without a name that of all of them."""
    if not isinstance(sparsity, Mapping):
        return sparsity
    return next(iter(sparsity.values())) if name is None else sparsity[name]


def _compute_sharded(
    scores: Mapping[str, Tensor],
    sparsity: float | Mapping[str, float],
    mask_type: MaskType,
    previous: Mapping[str, Tensor],
    dims: Mapping[str, int],
    together: bool,
    absolute: bool,
) -> dict[str, Tensor]:
    """As `compute_masks`, of units that lie on this rank and on others."""
    parts: dict[str, Part] = {}
    back: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, score in scores.items():
        dim, mask = dims.get(name, 1), previous.get(name)
        where = _region_of_units(score, mask_type, dim)
        if where is None:
            # Gathered one parameter at a time: what stays of it here is the units' scores.
            score, mask = gathered(score), None if mask is None else gathered(mask)
            where = _region_of_units(score, mask_type, dim)
            assert where is not None, "units of a whole tensor are whole"
        here = None if mask is None else local(laid_out(mask, score))
        values, back[name] = _units(local(score), here, mask_type, dim, absolute)
        kept = None if here is None else _units_kept(here, mask_type, dim)
        parts[name] = Part(values, kept, where, split_of(score))
    absolute = absolute and mask_type.kind == "unstructured"
    sizes = {name: math.prod(part.region.shape) for name, part in parts.items()}
    if together:
        rankings = [Ranking(parts, round(sum(sizes.values()) * _one(sparsity)), absolute)]
    else:
        rankings = [Ranking({n: p}, round(sizes[n] * _one(sparsity, n)), absolute) for n, p in parts.items()]
    masks = {name: back[name](mask) for name, mask in mask_lowest_of_all(rankings).items()}
    return {
        name: with_part(masks[name], score) if parts[name].split == split_of(score) else laid_out(masks[name], score)
        for name, score in scores.items()
    }


def _region_of_units(score: Tensor, mask_type: MaskType, input_dim: int) -> Region | None:
    """The place of the units whose weights are on this rank; None where a unit has some here and some on another."""
    of_weights = region(score)
    shape = of_weights.shape
    inputs, outputs = (dim % max(len(shape), 1) for dim in (input_dim, _output_dim(input_dim)))
    stack = [0] if input_dim < 0 else []
    extents = [1] * len(shape)
    order = list(range(len(shape)))
    if mask_type.kind == "n_of_m":
        extents[inputs] = mask_type.of
    elif mask_type.kind == "block":
        extents[outputs], extents[inputs] = mask_type.block
        order = [0, outputs, inputs] if stack else [outputs, inputs, *range(2, len(shape))]
    elif mask_type.kind in ("filter", "channel"):
        order = [*stack, outputs if mask_type.kind == "filter" else inputs]
        extents = [1 if dim in order else -1 for dim in range(len(shape))]
    for dim, sizes in part_sizes(score).items():
        if extents[dim] == -1 or any(size % extents[dim] for size in sizes):
            return None
    extents = [max(length, 1) if extent == -1 else extent for extent, length in zip(extents, shape, strict=True)]
    if mask_type.kind in ("unstructured", "n_of_m"):
        return of_weights
    start = [first // extents[dim] for dim, first in enumerate(of_weights.start)]
    here = [length // extents[dim] for dim, length in enumerate(of_weights.size)]
    units = [length // extents[dim] for dim, length in enumerate(shape)]
    return Region(*(tuple(values[dim] for dim in order) for values in (units, start, here)))


def _units(
    score: Tensor, mask: Tensor | None, mask_type: MaskType, input_dim: int, absolute: bool
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The scores of units, and the function that makes a mask of weights from a mask of units."""
    if mask_type.kind == "unstructured":
        return score, _same
    if mask_type.kind == "block":
        return _block_units(score, input_dim, mask_type.block, absolute)
    if mask_type.kind == "n_of_m":
        return _only_lowest_of_each_group(score, mask, mask_type, input_dim, absolute), _same
    return _channel_units(score, input_dim if mask_type.kind == "channel" else _output_dim(input_dim), absolute)


def _units_kept(mask: Tensor, mask_type: MaskType, input_dim: int) -> Tensor:
    """Which units hold a weight that `mask` keeps."""
    if mask_type.kind in ("unstructured", "n_of_m"):
        return mask
    return _units(mask, None, mask_type, input_dim, False)[0] > 0


def _same(mask: Tensor) -> Tensor:
    return mask


def _block_units(
    score: Tensor, input_dim: int, block: tuple[int, int], absolute: bool
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The mean of each block, and the function that makes a mask of weights from a mask of blocks."""
    # Output channels first, then input channels; the matrices of a stack come last, as positions of a kernel do.
    front = (_output_dim(input_dim), input_dim)
    ordered = score.movedim(front, (0, 1))
    outputs, inputs = ordered.shape[:2]
    a, b = (outputs if block[0] == -1 else block[0]), (inputs if block[1] == -1 else block[1])
    values = (ordered.abs() if absolute else ordered).contiguous()
    values = values if values.dtype == torch.float64 else values.float()
    means = values.reshape(outputs // a, a, inputs // b, b, math.prod(ordered.shape[2:])).mean(dim=(1, 3))

    def back(mask: Tensor) -> Tensor:
        wide = mask[:, None, :, None, :].expand(outputs // a, a, inputs // b, b, mask.shape[-1]).reshape(ordered.shape)
        return wide.movedim((0, 1), front).contiguous()

    if input_dim < 0:
        # In logical order, of which the first of equal ones is masked first: matrix by matrix.
        return means.movedim(-1, 0), lambda mask: back(mask.movedim(0, -1))
    return means, back


def _channel_units(score: Tensor, dim: int, absolute: bool) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The score of each slice along `dim`, of a stack within each matrix, and the function that makes a mask of weights
    from a mask of slices."""
    kept = (dim,) if dim >= 0 else (0, score.dim() + dim)
    values = score.movedim(kept, tuple(range(len(kept)))).flatten(len(kept))
    values = values if values.dtype == torch.float64 else values.float()
    # Not the norm: in one ranking over layers of many sizes it would spare whatever is wide.
    importance = values.square().mean(-1).sqrt() if absolute else values.mean(-1)

    def back(mask: Tensor) -> Tensor:
        view = [size if i in kept else 1 for i, size in enumerate(score.shape)]
        return mask.view(view).expand(score.shape).contiguous()

    return importance, back


def _only_lowest_of_each_group(
    score: Tensor, previous: Tensor | None, mask_type: MaskType, input_dim: int, absolute: bool
) -> Tensor:
    """The scores, with infinity at the N highest of every M along the input channels: those stay. NaN is left."""
    values = score.abs() if absolute else score + 0.0
    rank_by = values if previous is None else torch.where(previous, values, -math.inf)
    last = rank_by.movedim(input_dim, -1)
    of = mask_type.of
    columns = last.reshape(-1, of).T.contiguous()  # one row per position in a group
    if of <= 16:
        # The rank in a group by comparing every pair: 3 times faster than sorting rows of 4.
        rank = torch.zeros(columns.shape, dtype=torch.int8, device=columns.device)
        for i in range(of):
            for j in range(i + 1, of):
                first_is_lower = columns[i] <= columns[j]  # of equal ones the first goes first
                rank[j] += first_is_lower
                rank[i] += ~first_is_lower
    else:
        order = columns.sort(dim=0, stable=True).indices
        places = torch.arange(of, device=order.device)[:, None].expand_as(order)
        rank = torch.empty_like(order).scatter_(0, order, places)
    stays = (rank >= of - mask_type.keep).T.reshape(last.shape).movedim(-1, input_dim)
    return torch.where(stays & ~values.isnan(), math.inf, values)
