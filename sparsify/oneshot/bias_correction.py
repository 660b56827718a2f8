"""The mean of a layer's output as it was before its weights and what it reads were rounded.

Nagel 2019, https://arxiv.org/abs/1906.04721: a rounded weight errs by d, and d times the mean of what the layer reads
is an error of every output, which the bias can take back. Here the mean is measured, not taken from BatchNorm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__: list[str] = []


def mean_shift(weight: Tensor, mean: Tensor, rounded: Tensor, mean_rounded: Tensor) -> Tensor:
    """By how much outputs are too large in the mean: (G R,), for weights (G, R, K) and means of inputs (G, K)."""
    before = (weight * mean[:, None, :]).sum(-1)
    return ((rounded * mean_rounded[:, None, :]).sum(-1) - before).reshape(-1)


def can_correct(layer: Any, norm: Any) -> bool:
    """Whether there is a number to be changed: a bias, or a mean in the BatchNorm that is folded into the layer."""
    return norm is not None or layer._parameters.get("bias") is not None


@torch.no_grad()
def correct(layer: Any, norm: nn.Module | None, shift: Tensor) -> None:
    """Takes `shift` (C,) from what `layer` gives, in place: in its bias, or in the running mean of its BatchNorm."""
    if norm is not None:
        running: Any = norm.running_mean
        running.add_(shift.to(running.dtype))
    else:
        layer.bias.sub_(shift.to(layer.bias.dtype))
