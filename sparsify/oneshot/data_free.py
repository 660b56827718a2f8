"""Ranges of activations without a single sample: what BatchNorm remembers of training stands in for it.

A BatchNorm gives channels of mean beta and standard deviation |gamma|. While this is in force every BatchNorm gives
normal values of just these, whatever it reads; what follows it (activations, adds, pools, gates) is computed from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparsify.errors import DataError
from sparsify.quantization.folding import AffineNorm
from sparsify.quantization.layers import QuantizedNorm
from sparsify.quantization.plan import is_quantized
from sparsify.quantization.wiring import wiring_of

__all__: list[str] = []

TOGETHER = 0.5
"""The share of the variance that all positions of one channel of one sample have in common: pools keep it."""


@contextmanager
def simulated_norms(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Inside, the BatchNorms of a `model` in eval mode, quantized or not, give normal values by their statistics.

    Raises:
        DataError: there is no BatchNorm, or one without statistics.
    """
    norms: list[Any] = [m for m in model.modules() if isinstance(m, QuantizedNorm) and not isinstance(m, AffineNorm)]
    if not is_quantized(model):
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    if not norms:
        raise DataError(
            f"{type(model).__name__} has no BatchNorm, so nothing is known of its activations. Give calibration_data."
        )
    for norm in norms:
        if norm.running_mean is None:
            raise DataError(f"a {type(norm).__name__} keeps no running statistics. Give calibration_data.")
    generator = torch.Generator().manual_seed(seed)

    def drawn(norm: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        # Not the user's operations: hidden from a `TorchFunctionMode` that counts those.
        with torch._C.DisableTorchFunction():
            assert isinstance(norm, _BatchNorm)
            return (_values(norm, inputs[0], generator),)

    with ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.register_forward_pre_hook(drawn).remove)
        yield


def _values(norm: _BatchNorm, x: Tensor, generator: torch.Generator) -> Tensor:
    """Inputs of which `norm` makes normal values of its own mean and deviation, in the shape of `x`."""
    assert norm.running_mean is not None and norm.running_var is not None
    weight, bias = norm._parameters.get("weight"), norm._parameters.get("bias")
    z = torch.randn(x.shape, generator=generator) * (1 - TOGETHER) ** 0.5
    z += torch.randn((*x.shape[:2], *[1] * (x.dim() - 2)), generator=generator) * TOGETHER**0.5
    shape = [1, -1, *[1] * (x.dim() - 2)]
    if not isinstance(norm, QuantizedNorm) or wiring_of(norm).layer is None:
        mean, deviation = norm.running_mean, (norm.running_var + norm.eps).sqrt()
    else:
        # Folded: it hands its input through.
        mean = torch.zeros_like(norm.running_mean) if bias is None else bias
        deviation = torch.ones_like(norm.running_var) if weight is None else weight.abs()
    seen: Tensor = z.to(x) * deviation.view(shape) + mean.view(shape)
    return seen
