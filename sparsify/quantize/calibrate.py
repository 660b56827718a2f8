"""Ranges of activations from data, before or without training."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.errors import DataError
from sparsify.quantize.layers import quantizers

__all__: list[str] = []


def calibrate(model: nn.Module, data: Iterable[Any], steps: int | None = None) -> int:
    """Runs batches through a quantized model, activations in float, and takes their ranges. Gives how many batches ran.

    In eval mode and without gradients: statistics of batches, random states of dropout and weights stay as they are.

    Args:
        data: inputs of the model: a tensor, a dict of arguments by name, or a tuple, of which as many are used as the
            model takes: a loader of (inputs, labels) will do.
        steps: how many batches at most; None: all.

    Raises:
        DataError: there was no batch, or values were not finite.
    """
    modes = {module: module.training for module in model.modules()}
    found = list(quantizers(model))
    count = 0
    try:
        for quantizer in found:
            quantizer.calibrating = True
        for module in modes:
            module.training = False
        with torch.no_grad():
            for batch in islice(data, steps):
                args, kwargs = called_with(model, batch)
                # Not through __call__: this may run inside a hook of that very call.
                model.forward(*args, **kwargs)
                count += 1
    finally:
        for quantizer in found:
            quantizer.calibrating = False
        for module, mode in modes.items():
            module.training = mode
    if not count:
        raise DataError(
            "calibration_data holds no batch. Give an iterable of inputs that can be gone through once more."
        )
    for quantizer in found:
        quantizer.check()
    return count


def called_with(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the model in one batch of a loader, on the model's device."""
    device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    if isinstance(batch, Mapping):
        taken = inspect.signature(model.forward).parameters
        free = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values())
        return (), {name: _to(value, device) for name, value in batch.items() if free or name in taken}
    if not isinstance(batch, (tuple, list)):
        return (_to(batch, device),), {}
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return tuple(_to(value, device) for value in batch), {}
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    most = sum(kind in positional for kind in kinds)
    return tuple(_to(value, device) for value in batch[:most]), {}


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
