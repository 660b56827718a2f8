"""Differentiable k-means: weights that lie softly on a few values, with gradients to both.

DKM (Cho et al. 2022, https://arxiv.org/abs/2108.12659). With weights w_i, values c_j and the temperature tau

    a_ij = softmax_j(-|w_i - c_j|^2 / tau),   c_j' = sum_i a_ij w_i / sum_i a_ij,   w_i' = sum_j a'_ij c_j',

where a' are the shares by the new values. What differs from the paper: distances are squared; the iterations that bring
values to rest run between steps and have no gradient, and the one in the forward has, so that a forward changes
nothing (the gradient through the last iteration alone is that of IDKM-JFB, https://arxiv.org/abs/2312.07759).

Memory: shares are computed in chunks of at most `SHARES_AT_ONCE` numbers, and once more in backward, instead of being
kept. A forward and a backward need the weight twice and about six chunks of one MiB, whatever the number of values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__: list[str] = []

SHARES_AT_ONCE = 2**18
"""Numbers that are held at once for the shares of weights in values: few enough to stay in a core's cache."""
LEAST_SHARE = 1e-6
"""A value that has less of all weights together stays where it is."""


def soft_means(weights: Tensor, values: Tensor, tau: Tensor, pinned: Tensor | None = None) -> Tensor:
    """One iteration: each value moves to the mean of the weights that it has a share in.

    Args:
        weights: (palettes, n, d) float32.
        values: (palettes, k, d) float32; no gradient goes to them.
        tau: (palettes,), above 0.
        pinned: (palettes, k) bool: values that stay where they are, at 0; weights of exactly 0 in their palette belong
            to them, and pull at no others.
    """
    means: Tensor = _SoftMeans.apply(weights, values, tau, pinned)  # type: ignore[no-untyped-call]
    return means


def soft_values(weights: Tensor, values: Tensor, tau: Tensor, pinned: Tensor | None = None) -> Tensor:
    """Each weight as the sum of the values by its shares: (palettes, n, d). Exactly 0 where it is 0 and one is pinned.

    Arguments as of `soft_means`; the gradient goes to weights and values.
    """
    found: Tensor = _SoftValues.apply(weights, values, tau, pinned)  # type: ignore[no-untyped-call]
    return found


def nearest_codes(weights: Tensor, values: Tensor) -> Tensor:
    """The index of the nearest of `values` for each of `weights`: (palettes, n), of int64."""
    if weights.shape[2] == 1:
        ascending, order = values.squeeze(2).sort(1)
        between = (ascending[:, 1:] + ascending[:, :-1]) / 2
        return order.gather(1, torch.searchsorted(between, weights.squeeze(2).contiguous()))
    found = torch.empty(weights.shape[:2], dtype=torch.int64, device=weights.device)
    for rows in _rows_at_once(weights, values):
        found[:, rows] = _distances(weights[:, rows], values).argmin(1)
    return found


def looked_up(values: Tensor, codes: Tensor) -> Tensor:
    """`values`, (palettes, k, d), at `codes`, (palettes, n): (palettes, n, d)."""
    return values.gather(1, codes.unsqueeze(2).expand(-1, -1, values.shape[2]))


def means_of(weights: Tensor, codes: Tensor, values: Tensor, pinned: Tensor) -> Tensor:
    """The mean of the weights of each code, (palettes, k, d), with its gradient; of none or of a pinned one `values`.

    Weights of 0 are not counted where a value of their palette is pinned.
    """
    ones = _counting(weights, pinned).unsqueeze(2).to(weights.dtype)
    index = codes.unsqueeze(2)
    sums = torch.zeros_like(values).scatter_add(1, index.expand_as(weights), weights * ones)
    counts = torch.zeros_like(values[:, :, :1]).scatter_add(1, index, ones)
    return torch.where((counts == 0) | pinned.unsqueeze(2), values, sums / counts.clamp(min=1))


def _rows_at_once(weights: Tensor, values: Tensor) -> Iterator[slice]:
    rows = max(1, SHARES_AT_ONCE // max(1, values.shape[0] * values.shape[1] * values.shape[2]))
    for start in range(0, weights.shape[1], rows):
        yield slice(start, start + rows)


def _components(each: Tensor) -> list[Tensor]:
    """The d components of (palettes, m, d), each (palettes, m, 1)."""
    return [each[:, :, at : at + 1] for at in range(each.shape[2])]


def _component_rows(each: Tensor) -> list[Tensor]:
    """The d components of (palettes, m, d), each (palettes, 1, m)."""
    return [column.transpose(1, 2) for column in _components(each)]


# Shares are (palettes, k, n): the long dimension last, where kernels run over neighbors, is ten times as fast as the
# short one. No products of matrices: autocast would compute them in half precision, and differences of squares lose
# digits.


def _distances(weights: Tensor, values: Tensor) -> Tensor:
    """(palettes, k, n)."""
    first, *others = ((v - w).square_() for v, w in zip(_components(values), _component_rows(weights), strict=True))
    for other in others:
        first += other
    return first


def _shares(weights: Tensor, values: Tensor, tau: Tensor) -> Tensor:
    """a of the formula above: (palettes, k, n)."""
    found = _distances(weights, values)
    found.sub_(found.amin(1, keepdim=True)).mul_(-1 / tau.reshape(-1, 1, 1))
    # A share of 1e-26 is none; below 1e-38 numbers are subnormal, and arithmetic with these takes ten times as long.
    found.clamp_(min=-60.0).exp_()
    return found.div_(found.sum(1, keepdim=True))


def _counting(weights: Tensor, pinned: Tensor) -> Tensor:
    """Which weights pull at values: all but zeros of palettes with a value that is pinned at 0; (palettes, n)."""
    return (weights != 0).any(2) | ~pinned.any(1, keepdim=True)


def _counted(shares: Tensor, weights: Tensor, pinned: Tensor | None) -> Tensor:
    return shares if pinned is None else shares * _counting(weights, pinned).unsqueeze(1)


def _products(each: Tensor, values: Tensor) -> Tensor:
    """each_i . values_j: (palettes, k, n)."""
    first, *others = (v * w for v, w in zip(_components(values), _component_rows(each), strict=True))
    for other in others:
        first += other
    return first


def _by_weight(shares: Tensor, each: Tensor) -> Tensor:
    """sum_j shares_ij each_j: (palettes, n, d)."""
    return torch.stack([(shares * column).sum(1) for column in _components(each)], 2)


def _by_value(shares: Tensor, each: Tensor) -> Tensor:
    """sum_i shares_ij each_i: (palettes, k, d)."""
    return torch.stack([(shares * row).sum(2) for row in _component_rows(each)], 2)


def _slopes(shares: Tensor, by_share: Tensor) -> Tensor:
    """The gradient by the logits of a softmax, from the one by its result."""
    return shares * (by_share - (shares * by_share).sum(1, keepdim=True))


class _SoftMeans(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, values: Tensor, tau: Tensor, pinned: Tensor | None) -> Tensor:
        sums, total = torch.zeros_like(values), torch.zeros_like(values[:, :, :1])
        for rows in _rows_at_once(weights, values):
            part = weights[:, rows]
            shares = _counted(_shares(part, values, tau), part, pinned)
            sums += _by_value(shares, part)
            total += shares.sum(2, keepdim=True)
        stays = total < LEAST_SHARE if pinned is None else (total < LEAST_SHARE) | pinned.unsqueeze(2)
        total = total.clamp(min=LEAST_SHARE)
        means = torch.where(stays, values, sums / total)
        ctx.save_for_backward(weights, values, tau, means, total, stays, *([] if pinned is None else [pinned]))
        return means

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        weights, values, tau, means, total, stays, *rest = ctx.saved_tensors
        pinned = rest[0] if rest else None
        grad = torch.where(stays, 0.0, grad) / total
        found = torch.empty_like(weights)
        moved = (grad * means).sum(2, keepdim=True)
        for rows in _rows_at_once(weights, values):
            part = weights[:, rows]
            plain = _shares(part, values, tau)
            counted = _counted(plain, part, pinned)
            free = _counted(torch.ones_like(plain[:, :1]), part, pinned)
            # By a share: g_j (w_i - c_j') / S_j, nothing for weights that are not counted.
            slopes = _slopes(plain, (_products(part, grad) - moved) * free)
            found[:, rows] = _by_weight(counted, grad) + _by_weight(slopes, values) * (2 / tau.reshape(-1, 1, 1))
        return found, None, None, None


class _SoftValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, values: Tensor, tau: Tensor, pinned: Tensor | None) -> Tensor:
        found = torch.empty_like(weights)
        for rows in _rows_at_once(weights, values):
            found[:, rows] = _by_weight(_shares(weights[:, rows], values, tau), values)
        ctx.save_for_backward(weights, values, tau)
        return found if pinned is None else zeros_kept(found, weights, pinned)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        weights, values, tau = ctx.saved_tensors
        found, by_value = torch.empty_like(weights), torch.zeros_like(values)
        sharpness = 2 / tau.reshape(-1, 1, 1)
        for rows in _rows_at_once(weights, values):
            part, given = weights[:, rows], grad[:, rows]
            shares = _shares(part, values, tau)
            slopes = _slopes(shares, _products(given, values)) * sharpness
            found[:, rows] = _by_weight(slopes, values)
            by_value += _by_value(shares, given) + _by_value(slopes, part) - slopes.sum(2, keepdim=True) * values
        return found, by_value, None, None


def zeros_kept(found: Tensor, weights: Tensor, pinned: Tensor) -> Tensor:
    """`found`, exactly 0 where `weights` are and a value of their palette is pinned."""
    return found.masked_fill((weights == 0) & pinned.any(1).reshape(-1, 1, 1), 0.0)
