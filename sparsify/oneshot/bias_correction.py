"""The mean of a layer's output as it was before its weights and what it reads were rounded.

Nagel 2019, https://arxiv.org/abs/1906.04721: a rounded weight errs by d, and d times the mean of what the layer reads
is an error of every output, which the bias can take back. Here the mean is measured, not taken from BatchNorm.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparsify.quantization.weight_grid import bias_of

__all__: list[str] = []


def mean_shift(weight: Tensor, mean: Tensor, rounded: Tensor, mean_rounded: Tensor) -> Tensor:
    """The mean by which outputs are too large: (G R,), for weights (G, R, K) and means of inputs (G, K)."""
    before = (weight * mean[:, None, :]).sum(-1)
    return ((rounded * mean_rounded[:, None, :]).sum(-1) - before).reshape(-1)


def can_correct(layer: nn.Module, norm: nn.Module | None) -> bool:
    """True if there is a number to be changed: a bias, or a mean in the BatchNorm that is folded into the layer."""
    return _mean(norm) is not None or layer._parameters.get("bias") is not None


@torch.no_grad()
def correct(layer: nn.Module, norm: _BatchNorm | None, shift: Tensor) -> None:
    """Takes `shift` (C,) from what `layer` gives, in place: in its bias, or in the running mean of its BatchNorm."""
    mean = _mean(norm)
    if mean is not None:
        mean.add_(shift.to(mean.dtype))
    else:
        bias = bias_of(layer)
        assert bias is not None  # See `can_correct`.
        bias.sub_(shift.to(bias.dtype))


def _mean(norm: nn.Module | None) -> Tensor | None:
    """The running mean of a BatchNorm; None of a learned scale and bias, which has none."""
    return None if norm is None else getattr(norm, "running_mean", None)
