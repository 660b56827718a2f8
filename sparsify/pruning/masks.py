"""Scores -> masks, as pure functions. A mask is a bool tensor of its parameter's shape: True where a weight is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparsify.errors import DataError
from sparsify.pruning.selection import mask_lowest

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
    sparsity: float,
    mask_type: MaskType = MaskType("unstructured"),
    *,
    previous: Mapping[str, Tensor] | None = None,
    input_dims: Mapping[str, int] | None = None,
    together: bool = False,
    absolute: bool = True,
) -> dict[str, Tensor]:
    """Masks with exactly round(units * sparsity) masked units; a unit is a weight, a block, or a channel of one weight.

    Units that are masked in `previous` are masked first, so that a mask only grows; then those of lowest score, of
    equal ones the first in logical order. N:M: exactly round(n * sparsity) weights are masked and at most M - N in any
    group, also below 1 - N/M; the groups lie along the input channels.

    Args:
        scores: the importance of each weight, by name; the weights themselves for magnitude.
        sparsity: the fraction of zeros, 0 to 1.
        mask_type: the units.
        previous: the masks so far, for some or all names.
        input_dims: the dimension of the input channels, 1 where nothing is given; negative for a stack of matrices,
            whose first dimension tells them apart: units then lie within one of them.
        together: one ranking over all of them, and the count over all; otherwise each by itself.
        absolute: rank by absolute value. The score of a block is the mean of its weights' scores either way; that of a
            channel is their root mean square, and where `absolute` is off their mean.

    Raises:
        DataError: a score is NaN; the message names it.

    >>> compute_masks({"w": torch.tensor([[1.0, -4.0, 3.0, 2.0]])}, 0.5, MaskType.parse("2:4"))
    {'w': tensor([[False,  True,  True, False]])}
    """
    previous = previous or {}
    dims = input_dims or {}
    units: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    back: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, score in scores.items():
        mask = previous.get(name)
        if mask_type.kind == "unstructured":
            units[name] = score
            if mask is not None:
                kept[name] = mask
        elif mask_type.kind == "block":
            units[name], back[name] = _block_units(score.detach(), dims.get(name, 1), mask_type.block, absolute)
            if mask is not None:
                kept[name] = _block_units(mask, dims.get(name, 1), mask_type.block, False)[0] > 0
        elif mask_type.kind == "n_of_m":
            units[name] = _only_lowest_of_each_group(name, score.detach(), mask, mask_type, dims.get(name, 1), absolute)
            if mask is not None:
                kept[name] = mask
        else:
            inputs = dims.get(name, 1)
            dim = inputs if mask_type.kind == "channel" else _output_dim(inputs)
            units[name], back[name] = _channel_units(score.detach(), dim, absolute)
            if mask is not None:
                kept[name] = _channel_units(mask, dim, False)[0] > 0
    absolute = absolute and mask_type.kind == "unstructured"
    if together:
        total = sum(unit.numel() for unit in units.values())
        masks = mask_lowest(units, round(total * sparsity), kept=kept, absolute=absolute) if units else {}
    else:
        masks = {}
        for name, unit in units.items():
            own = {name: kept[name]} if name in kept else {}
            masks |= mask_lowest({name: unit}, round(unit.numel() * sparsity), kept=own, absolute=absolute)
    return {name: back[name](mask) if name in back else mask for name, mask in masks.items()}


def sparing_one(score: Tensor, dims: tuple[int, ...], previous: Tensor | None, absolute: bool) -> Tensor:
    """`score` with infinity at the highest that `previous` keeps in each slice over `dims`: no slice is masked whole.

    For weights that are divided by the norm of each slice, which is not to be zero.
    """
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
    means = values.reshape(outputs // a, a, inputs // b, b, -1).mean(dim=(1, 3))

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
    name: str, score: Tensor, previous: Tensor | None, mask_type: MaskType, input_dim: int, absolute: bool
) -> Tensor:
    """The scores, with infinity at the N highest of every M along the input channels: those stay."""
    values = score.abs() if absolute else score + 0.0
    if values.isnan().any():
        raise DataError(f"{name!r} holds NaN, which cannot be ranked. Load weights that are finite.")
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
    return torch.where(stays, math.inf, values)
