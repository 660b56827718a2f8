"""Ranges of activations from data, before or without training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.errors import ArgumentError, DataError, SparsifyError
from sparsify.model.batches import named_fields, sample_count, tensors_in
from sparsify.model.preserved import eval_mode_, preserved
from sparsify.model.sharding import call_within
from sparsify.model.signature import batch_arguments
from sparsify.quantization.conversion import quantizers

__all__: list[str] = []

SAMPLES = 16
"""Fewer say too little about ranges."""
EMPTY = "calibration_data holds no batch. Give an iterable of inputs that can be gone through once more."


def calibrate(model: nn.Module, data: Iterable[Any], steps: int | None = None) -> tuple[int, int]:
    """Runs batches through a quantized model, activations in float, and takes their ranges. Gives (batches, samples).

    In eval mode and without gradients: statistics of batches, random states of dropout and weights stay as they are.

    Args:
        model: quantized.
        data: batches of inputs of the model: a tensor, a dict of arguments by name, or a tuple, of which as many are
            used as the model takes: a loader of (inputs, labels) will do.
        steps: number of batches at most; None: all.

    Raises:
        DataError: there was no batch, one that the model cannot take, or values were not finite.
    """
    found = list(quantizers(model))
    count = samples = 0
    try:
        for quantizer in found:
            quantizer.calibrating = True
        # Ranges are buffers; and the data may be drawn from the random state that training goes on with.
        with preserved(model, buffers=False, rng=False), torch.no_grad():
            eval_mode_(model)
            for at, batch in enumerate(data):
                # A last batch of a sampler or a filter may be empty: forwards need not be written for that.
                if inside := samples_in(batch, at):
                    run_batch(model, batch, at)
                    samples, count = samples + inside, count + 1
                # Here and not in front: a generator may have other readers, and is asked for no more than is used.
                if count == steps:
                    break
    finally:
        for quantizer in found:
            quantizer.calibrating = False
    if not count:
        raise DataError(EMPTY)
    return count, samples


def run_batch(model: nn.Module, batch: Any, at: int) -> None:
    """Runs a batch of calibration data through a model, in the mode that it is in.

    Args:
        model: quantized or in float.
        batch: inputs of the model.
        at: the number of the batch, for messages.

    Raises:
        DataError: it does not run, or a value to observe was not finite.
    """
    args, kwargs = batch_arguments(model, batch)
    try:
        # Not through __call__: this may run inside a hook of that very call.
        call_within(model)(*args, **kwargs)
        for quantizer in quantizers(model):
            quantizer.check()
    except SparsifyError as error:
        raise DataError(f"calibration_data: batch {at}: {error}") from error
    except Exception as error:
        # Whatever the user's forward raises on inputs that it was not written for.
        raise DataError(
            f"calibration_data: batch {at} does not run through {type(model).__name__}: {type(error).__name__}: "
            f"{error}. Give batches as the model is called with them: a tensor, a tuple, or a dict by argument."
        ) from error


def materialized(data: Iterable[Any], most: int | None = None) -> Iterable[Any]:
    """`data`, looked through as far as that costs nothing: lists, and generators, which come back as lists.

    A generator can be gone through only once, and by the time quantization starts somebody else may have. What else
    there is, a loader, is not loaded: `calibrate` looks at its batches.

    Args:
        data: batches of inputs; those without a sample are left out.
        most: number of batches that are wanted; None: all.

    Raises:
        ArgumentError: it is no iterable of batches.
        DataError: it holds no batch, or one without tensors, or with NaN or infinity.
    """
    if isinstance(data, Tensor):
        raise ArgumentError("calibration_data is one tensor: give an iterable of batches; [x] for a single one.")
    if isinstance(data, (str, bytes)) or named_fields(data) is not None or not isinstance(data, Iterable):
        raise ArgumentError(f"calibration_data is a {type(data).__name__}: give an iterable of batches, as a loader.")
    if not isinstance(data, (list, tuple, Iterator)):
        if isinstance(data, Sized) and not len(data):
            raise DataError(EMPTY)
        return data
    found: list[Any] = []
    for at, batch in enumerate(data):
        if samples_in(batch, at):
            found.append(batch)
        if len(found) == most:
            break
    if not found:
        raise DataError(EMPTY)
    return found


def samples_in(batch: Any, at: int) -> int:
    """Number of samples in a batch.

    Args:
        batch: inputs of the model.
        at: the number of the batch, for messages.

    Raises:
        DataError: it holds no tensor, or NaN or infinity. The infinity below zero may pass: masks are made of it.
    """
    tensors = list(tensors_in(batch))
    if not tensors:
        raise DataError(f"calibration_data: batch {at} is a {type(batch).__name__} without a tensor.")
    for tensor in tensors:
        if tensor.is_floating_point() and not (tensor < math.inf).all():
            raise DataError(f"calibration_data: batch {at} holds NaN or infinity; take that sample out.")
    return sample_count(tensors)
