"""Rounding each weight to one of its two neighbours on the grid: the nearest, or the better one for the layer's output.

Pure functions on matrices. A weight is (G, R, K): groups, outputs of a group, inputs that each sums over. A moment is
(G, K, K), the mean of x x^T over what the layer reads, so that the mean squared error of an output is d H d^T for an
error d (K,) of its row. Results lie on the grid of `straight_through.weight_scale`: the largest weight of every row is
the largest integer, so a layer that quantizes it once more leaves it as it is, and no scale has to be kept anywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__: list[str] = []

DAMPING = 0.01
"""Added to the diagonal of a moment, as a share of its mean: what few samples do not tell."""
BLOCK = 128
STRETCH = (-0.1, 1.1)
"""A rectified sigmoid reaches 0 and 1 at finite arguments (Louizos 2018, https://arxiv.org/abs/1712.01312)."""


def clipped_scale(weight: Tensor, importance: Tensor, *, q_max: int, shared: bool = False) -> Tensor:
    """The scale whose grid has the least squared error of `weight`, each column counted by its `importance`.

    Args:
        weight: (G, R, K).
        importance: (G, K), the mean square of what the column is multiplied with.
        q_max: the largest integer.
        shared: whether all rows have one scale.

    Returns:
        (G, R, 1), > 0: a share of max |w| / `q_max` in steps of 1/40, from 1 down to 0.4.
    """
    whole = weight.abs().amax(-1, keepdim=True)
    if shared:
        whole = whole.amax().expand_as(whole)
    whole = whole.clamp(min=1e-12) / q_max
    best, least = whole, torch.full_like(whole, torch.inf)
    for step in range(40, 15, -1):
        scale = whole * (step / 40)
        error = ((nearest(weight, scale, q_max) - weight).square_() * importance[:, None, :]).sum(-1, keepdim=True)
        if shared:
            error = error.sum().expand_as(error)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def nearest(weight: Tensor, scale: Tensor, q_max: int) -> Tensor:
    """`weight` on the grid of `scale`, each value by itself."""
    return (weight / scale).round_().clamp_(-q_max, q_max).mul_(scale)


def gptq(weight: Tensor, moment: Tensor, scale: Tensor, q_max: int) -> Tensor:
    """Columns one after the other; each error is made good by the columns still to come.

    Frantar 2022, https://arxiv.org/abs/2210.17323: the order is that of falling importance, and the inverse of the
    moment is its Cholesky factor. Different here: groups are rounded together, and a weight at or beyond the end of the
    grid stays there, so that the grid is still known by its largest weight.
    """
    damped = damp(moment)
    order = damped.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)
    groups, rows, columns = weight.shape
    damped = damped.gather(1, order[:, :, None].expand_as(damped))
    damped = damped.gather(2, order[:, None, :].expand_as(damped))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse).mT.to(weight.dtype)
    left = weight.gather(2, order[:, None, :].expand_as(weight)).clone()
    pinned = _at_the_end(left, scale, q_max)
    ends = left.sign() * q_max
    result = torch.empty_like(left)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = torch.empty(groups, rows, stop - start, dtype=left.dtype, device=left.device)
        for i in range(start, stop):
            column = left[:, :, i]
            q = (column / scale[..., 0]).round_().clamp_(-q_max, q_max)
            q = torch.where(pinned[:, :, i], ends[:, :, i], q) * scale[..., 0]
            result[:, :, i] = q
            error = (column - q) / factor[:, i, i, None]
            left[:, :, i + 1 : stop] -= error[:, :, None] * factor[:, i, None, i + 1 : stop]
            errors[:, :, i - start] = error
        left[:, :, stop:] -= errors @ factor[:, start:stop, stop:]
    return result.scatter(2, order[:, None, :].expand_as(result), result.clone())


def adaround(weight: Tensor, moment: Tensor, scale: Tensor, q_max: int, *, iterations: int = 500) -> Tensor:
    """Learns for each weight whether it goes up or down (Nagel 2020, https://arxiv.org/abs/2004.10568).

    Minimized by Adam: the error of the output plus a penalty sum(1 - |2 h - 1|^b) on undecided weights, where h is a
    rectified sigmoid; b falls from 20 to 2, and the first fifth of the iterations is without penalty. Different there:
    minibatches of layer inputs, and the activation behind the layer. Here the error is that of all samples at once,
    from their moment, which costs K^2 per output whatever their number and leaves no noise.
    A row that does not come out better than its nearest neighbours on these samples keeps those.
    """
    low, high = STRETCH
    damped = damp(moment).to(weight.dtype)
    floor = torch.floor(weight / scale)
    pinned = _at_the_end(weight, scale, q_max)
    ends = weight.sign() * q_max
    plain = nearest(weight, scale, q_max)
    start = output_error(plain - weight, damped)
    # Each row counts alike: what one learning rate can serve.
    per_row = (1.0 / start.clamp(min=1e-20))[..., None]
    rest = (weight / scale - floor).clamp_(1e-3, 1 - 1e-3)
    logits = torch.logit((rest - low) / (high - low))
    first, second = torch.zeros_like(logits), torch.zeros_like(logits)
    warm = iterations // 5
    rate = 0.1
    for i in range(iterations):
        sigmoid = torch.sigmoid(logits)
        stretched = sigmoid * (high - low) + low
        h = stretched.clamp(0.0, 1.0)
        q = torch.where(pinned, ends, (floor + h).clamp_(-q_max, q_max))
        slope = 2.0 * ((q * scale - weight) @ damped) * scale * per_row
        if i >= warm:
            progress = (i - warm) / max(iterations - 1 - warm, 1)
            power = 2.0 + 18.0 * (1.0 - progress)
            centered = 2.0 * h - 1.0
            # The weight of the penalty grows as it becomes flat-bottomed: in the end every weight is decided.
            force = 0.5 + 5.0 * progress
            slope = slope - force / weight.shape[-1] * 2 * power * centered.abs().pow(power - 1) * centered.sign()
        moving = (stretched > 0.0) & (stretched < 1.0) & ~pinned
        slope = slope * moving * sigmoid * (1.0 - sigmoid) * (high - low)
        first.mul_(0.9).add_(slope, alpha=0.1)
        second.mul_(0.999).addcmul_(slope, slope, value=0.001)
        step = rate / (1.0 - 0.9 ** (i + 1))
        logits -= step * first / ((second / (1.0 - 0.999 ** (i + 1))).sqrt_() + 1e-8)
    up = (torch.sigmoid(logits) * (high - low) + low) >= 0.5
    learned = torch.where(pinned, ends, (floor + up).clamp_(-q_max, q_max)) * scale
    better = output_error(learned - weight, damped) < start
    return torch.where(better[..., None], learned, plain)


def made_good(weight: Tensor, second: Tensor, cross: Tensor) -> Tensor:
    """The weights that give on quantized inputs what `weight` gives on float ones, by least squares."""
    damped = damp(second)
    change: Tensor = torch.linalg.solve(damped, (cross - second).double() @ weight.double().mT)
    return weight + change.mT.to(weight.dtype)


def output_error(difference: Tensor, moment: Tensor) -> Tensor:
    """d H d^T for each row d of (G, R, K): the mean square of what an error of the weights does to each output."""
    return ((difference @ moment.to(difference.dtype)) * difference).sum(-1).clamp_(min=0.0)


def damp(moment: Tensor) -> Tensor:
    """`moment` in float64 with a raised diagonal: positive definite whatever the samples were."""
    whole = moment.double()
    mean = whole.diagonal(dim1=1, dim2=2).mean(-1).clamp(min=1e-12)
    return whole + torch.eye(whole.shape[-1], dtype=whole.dtype, device=whole.device) * (DAMPING * mean)[:, None, None]


def _at_the_end(weight: Tensor, scale: Tensor, q_max: int) -> Tensor:
    """True where a weight lies at or beyond the end of the grid, up to rounding: at least one of every row does."""
    return weight.abs() >= scale * (q_max * (1 - 1e-6))
