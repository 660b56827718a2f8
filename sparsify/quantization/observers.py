"""Ranges of activations out of a histogram: percentile, mean squared error, entropy. Pure functions on tensors.

A histogram has `BINS` bins of equal width over [-extent, extent], extent a power of two; where a batch reaches further,
the extent doubles and bins join pairwise, so that nothing is lost and no batch has to be kept.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sparsify.model import distributed

__all__: list[str] = []

Observer = Literal["moving_average", "min_max", "percentile", "mse", "entropy", "lsq"]
BINS = 8192
"""Twice as many as 8 bits ask for at the worst: the values on one side, reaching just over half the extent."""
HISTOGRAMS: frozenset[str] = frozenset({"percentile", "mse", "entropy"})
"""The observers that need a histogram."""
CANDIDATES = 64


def counted(x: Tensor, extent: Tensor) -> Tensor:
    """The share of the values of `x` in each bin: float64 (BINS,), of sum 1."""
    # In double: the bins of one value are then the same under every extent.
    index = _bin(x.detach().reshape(-1).double() / extent)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        counts = torch.bincount(index, minlength=BINS).double()
    else:
        ones = torch.ones_like(index, dtype=torch.float64)
        counts = torch.zeros(BINS, dtype=torch.float64, device=x.device).index_add_(0, index, ones)
    return counts / max(x.numel(), 1)


def observe(histogram: Tensor, extent: Tensor, x: Tensor, share: Tensor | float) -> None:
    """Moves `histogram` (BINS,) and `extent` (), in place, towards those of the batch `x` by `share`; 1: takes its own.

    Under DDP the batches of all ranks count alike.
    """
    reach = x.detach().abs().amax().to(torch.float32).clamp(min=2.0**-100)
    wanted = torch.maximum(torch.exp2(torch.ceil(torch.log2(reach))), extent)
    if distributed.world_size() > 1:
        distributed.reduce_range(torch.zeros_like(wanted), wanted)
    batch = counted(x, wanted)
    if distributed.world_size() > 1:
        distributed.average({"histogram": batch})
    old = torch.zeros_like(histogram).index_add_(0, _bin(_centers(histogram) * (extent / wanted)), histogram)
    histogram.copy_(torch.lerp(old, batch, torch.as_tensor(share, dtype=old.dtype, device=old.device)))
    extent.copy_(wanted)


def range_of(
    observer: str, histogram: Tensor, extent: Tensor, *, bits: int, symmetric: bool, percentile: float = 99.99
) -> tuple[Tensor, Tensor]:
    """(low, high), float32 of rank 0, low <= 0 <= high: the range that `observer` of `HISTOGRAMS` chooses.

    percentile: that share of the values lies below high, and as many above low. mse: the range whose grid of 2^bits
    values has the least squared error. entropy: the range whose grid keeps most of the distribution, in the sense of
    the least Kullback-Leibler divergence (Migacz 2017, "8-bit inference with TensorRT"); unlike there both ends move,
    and what is clipped counts as lost.
    """
    centers = _centers(histogram) * extent
    low, high = _quantiles(histogram, centers, extent, 100.0 if observer != "percentile" else percentile)
    if observer == "percentile":
        return low, high

    # Float32 is enough to compare with, and where it costs nothing to look, empty bins are left out.
    h, centers = histogram.float(), centers.float()
    if h.device.type == "cpu" and not torch.compiler.is_compiling():
        h, centers = h[histogram > 0], centers[histogram > 0]

    def errors(lows: Tensor, highs: Tensor) -> Tensor:
        cost = _squared if observer == "mse" else _divergence
        return cost(h, centers, lows, highs, bits, symmetric)

    shares = torch.arange(1, CANDIDATES + 1, device=centers.device) / CANDIDATES
    one = torch.ones_like(shares)
    for of_low, of_high in ((shares, shares), (one, shares), (shares, one)):
        lows, highs = low * of_low, high * of_high
        # Ties go to the widest range, for values beyond the calibration data.
        best = CANDIDATES - 1 - errors(lows, highs).flip(0).argmin()
        low, high = lows[best], highs[best]
    return low.float(), high.float()


def _squared(h: Tensor, x: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Tensor:
    scale, integers, zero = _grid(x, low, high, bits, symmetric)
    return ((integers - zero) * scale - x).square_() @ h


def _divergence(h: Tensor, x: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Divergence of the distribution from one that is even among the occupied bins of each level; (candidates,)."""
    _, integers, _ = _grid(x, low, high, bits, symmetric)
    level = (integers - integers.amin(1, keepdim=True)).long()
    present = (h > 0).to(h.dtype)
    sums = torch.zeros(len(low), 2**bits, dtype=h.dtype, device=h.device)
    inside = ((x >= low[:, None]) & (x <= high[:, None])).to(h.dtype)
    # What is clipped is not represented where it was: the levels at the ends gain its mass, its bins have next to none.
    mass = sums.scatter_add(1, level, h.expand_as(level))
    occupied = sums.scatter_add(1, level, present * inside)
    even = (mass / occupied.clamp(min=1.0)).gather(1, level) * present * inside
    ratio = h / even.clamp(min=1e-12)
    return torch.where(h > 0, h * ratio.clamp(min=1e-30).log(), 0.0).sum(1)


def _grid(x: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(scale, integers of x, zero point), one row a candidate."""
    if symmetric:
        last = 2 ** (bits - 1) - 1
        scale = (torch.maximum(-low, high).clamp(min=1e-12) / last)[:, None]
        return scale, (x / scale).round_().clamp_(-last - 1, last), torch.zeros_like(scale)
    last = 2**bits - 1
    scale = ((high - low).clamp(min=1e-12) / last)[:, None]
    zero = (-low[:, None] / scale).round()
    return scale, (x / scale).round_().add_(zero).clamp_(0, last), zero


def _quantiles(h: Tensor, centers: Tensor, extent: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    """The edges of the bins between which the share lies, widened to hold zero."""
    outside = (1.0 - percentile / 100.0) * h.sum()
    half = extent / BINS
    # A hair above: sums of shares that should be 0 or all are so up to rounding.
    below, above = h.cumsum(0) > outside + 1e-12, h.flip(0).cumsum(0) > outside + 1e-12
    low = centers[below.to(torch.uint8).argmax()] - half
    high = centers[BINS - 1 - above.to(torch.uint8).argmax()] + half
    return low.clamp(max=0.0).float(), high.clamp(min=0.0).float()


def _centers(like: Tensor) -> Tensor:
    return (torch.arange(BINS, device=like.device, dtype=torch.float64) * 2 + 1) / BINS - 1


def _bin(share: Tensor) -> Tensor:
    """The bins of values that are given as shares of the extent."""
    return ((share + 1) * (BINS / 2)).floor_().clamp_(0, BINS - 1).long()
