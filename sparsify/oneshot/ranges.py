"""Choosing the way in which ranges of activations follow from their values, by the error at the model's outputs.

No way is the best for all networks: least squared error cuts off the rare large values by which a classifier of files
tells its classes apart, and the whole range wastes steps on outliers of audio models. All ways read one histogram, so
that trying one costs a run through some of the samples and no new calibration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.model.batches import sample_count
from sparsify.model.signature import batch_arguments, named_outputs
from sparsify.quantization import observers
from sparsify.quantization.conversion import quantizers

__all__: list[str] = []

WAYS: Mapping[str, tuple[str, float]] = {
    "mse": ("mse", 99.99),
    "percentile": ("percentile", 99.99),
    "min_max": ("percentile", 100.0),
    "entropy": ("entropy", 99.99),
}
"""Name of a way -> (observer, percentile)."""
CHANGED_FOR = 0.64
"""Another way than least squared error is taken where the mean square error of the outputs falls below this share."""
JUDGED_ON = 256
"""Samples that the outputs are compared on."""


@torch.no_grad()
def best_way(reference: nn.Module, work: nn.Module, chosen: frozenset[str], data: Sequence[Any]) -> str:
    """The way of `WAYS` whose ranges leave the least error at the outputs; its ranges are in force in `work`.

    Args:
        reference: the model in float and eval mode.
        work: the same, quantized and in eval mode, with ranges of least squared error; its weights are not rounded.
        chosen: the names of the quantizers whose way is free.
        data: batches of inputs.
    """
    free = [one for one in quantizers(work) if one.name in chosen and one.enabled and one.batches]
    # A grid that is a function's own has no histogram.
    free = [one for one in free if one.observer in observers.HISTOGRAMS]
    if not free:
        return "mse"
    kept = [{name: buffer.clone() for name, buffer in one.named_buffers()} for one in free]
    batches, count = [], 0
    for batch in data:
        batches.append(batch)
        count += sample_count(batch)
        if count >= JUDGED_ON:
            break
    wanted = [_float_outputs(reference, batch) for batch in batches]
    errors = {}
    for way, (observer, percentile) in WAYS.items():
        for quantizer in free if way != "mse" else ():
            quantizer.choose_range(observer, percentile)
        errors[way] = sum(_error(_float_outputs(work, batch), w) for batch, w in zip(batches, wanted, strict=True))
    best = min(errors, key=lambda way: errors[way])
    if not errors[best] < CHANGED_FOR * errors["mse"]:
        best = "mse"
    for quantizer, buffers in zip(free, kept, strict=True):
        quantizer.choose_range(*WAYS[best])
        if best == "mse":
            quantizer.load_state_dict(buffers)
    return best


def _float_outputs(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    args, kwargs = batch_arguments(model, batch)
    tensors = named_outputs(model(*args, **kwargs))[0]
    return {name: tensor.float() for name, tensor in tensors.items() if tensor.is_floating_point()}


def _error(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The mean over outputs of the square of the error, as a share of how far samples differ from one another."""
    shares = []
    for name, exact in wanted.items():
        spread = exact - exact.mean(0, keepdim=True) if exact.dim() and len(exact) > 1 else exact
        power = spread.square().mean()
        error = (found[name] - exact).square().mean()
        # Masked values are infinite on both sides.
        if bool(power > 0) and bool(power.isfinite()) and bool(error.isfinite()):
            shares.append(float(error / power))
    return sum(shares) / max(len(shares), 1)
