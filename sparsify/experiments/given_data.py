"""The data of a call, files, a function or batches: some to calibrate with, and others to measure with."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.analysis.trials import collected_batches
from sparsify.errors import ArgumentError
from sparsify.experiments.sample_files import FileSamples, ImageForm, InputForm, as_batches, evenly, samples_from_files
from sparsify.model.signature import SampleInputs
from sparsify.optimize.references import called
from sparsify.quantization.calibration import samples_in

__all__: list[str] = []

MEASURED = 1000
"""Samples that are measured with, at most, beside those that are calibrated with."""
AT_ONCE = 16
"""Samples that are computed at once."""
FEWEST = 16
"""Where fewer are left to measure with, all are measured with."""

DataLike = str | os.PathLike[str] | Iterable[Any] | None


@dataclass(frozen=True)
class GivenData:
    """Data of a model.

    Attributes:
        calibration: batches of inputs, as the model takes them.
        measured: batches of inputs by name, to compare outputs on.
        labels: of the samples of `measured`, in order; None where there are none.
        samples: number of those in `calibration`.
        apart: none of `measured` is in `calibration`.
        notes: what was assumed.
    """

    calibration: tuple[Any, ...]
    measured: tuple[Mapping[str, Tensor], ...]
    labels: tuple[Any, ...] | None
    samples: int
    apart: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataReading:
    """The way in which data are read.

    Attributes:
        images: of image files.
        tokenizer: folder of the tokenizer for texts.
        max_length: tokens of a text.
        samples: to calibrate with, at most.
    """

    images: ImageForm | None = None
    tokenizer: str | os.PathLike[str] | None = None
    max_length: int | None = None
    samples: int = 256

    def checked(self) -> DataReading:
        """The same.

        Raises:
            ArgumentError: a value that cannot be meant.
        """
        for name in ("samples", "max_length"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ArgumentError(f"{name}={value!r}: give a whole number, 1 or more.")
        return self


def given_data(model: nn.Module, data: DataLike, forms: Sequence[InputForm], reading: DataReading) -> GivenData:
    """The data as batches of a model.

    Args:
        model: a module that takes its inputs by name.
        data: path, "package.module:function", batches, or None.
        forms: inputs of the model.
        reading: how files are read.

    Raises:
        DataError: data that do not fit, with file and line where they are files.
    """
    if data is None:
        return GivenData((), (), None, 0, False)
    if isinstance(data, str) and ":" in data and not Path(data).exists():
        found: Any = called(data, "data")
        if found is None or isinstance(found, str | os.PathLike):
            raise ArgumentError(f"data: {data}() gave {found!r}, not batches.")
        data = found
    if isinstance(data, str | os.PathLike):
        most = reading.samples + MEASURED
        read = samples_from_files(
            data, forms, most=most, images=reading.images, tokenizer=reading.tokenizer, max_length=reading.max_length
        )
        return _of_files(read, forms, reading.samples)
    return _of_batches(model, data, reading.samples)


def forms_of_module(model: nn.Module, sample_inputs: Any) -> list[InputForm]:
    """The inputs of a module: with shapes where sample inputs are given, else the parameters that a call must have."""
    if sample_inputs is not None:
        call = SampleInputs.of(model, sample_inputs)
        return [
            InputForm(name, str(value.dtype).removeprefix("torch."), (None, *value.shape[1:]) if value.dim() else ())
            for name, value in call.inputs.items()
        ]
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = [one for one in inspect.signature(model.forward).parameters.values() if one.kind in named]
    needed = [one.name for one in parameters if one.default is inspect.Parameter.empty]
    return [InputForm(name) for name in needed or [one.name for one in parameters[:1]]]


def _of_files(read: FileSamples, forms: Sequence[InputForm], samples: int) -> GivenData:
    count = len(read.rows)
    chosen = set(evenly(count, samples))
    rest = [number for number in range(count) if number not in chosen]
    apart = len(rest) >= FEWEST
    measured = rest if apart else list(range(count))
    sizes = [form.shape[0] for form in forms if form.shape]
    size = next((one for one in sizes if one is not None), AT_ONCE)
    return GivenData(
        tuple(as_batches([read.rows[number] for number in sorted(chosen)], size)),
        tuple(as_batches([read.rows[number] for number in measured], size)),
        None if read.labels is None else tuple(read.labels[number] for number in measured),
        len(chosen),
        apart,
        read.notes,
    )


def _of_batches(model: nn.Module, data: Iterable[Any], samples: int) -> GivenData:
    batches = collected_batches(model, _enough(data, samples), with_target=False, most=None, where="data")
    for number, batch in enumerate(batches):
        samples_in(batch.kwargs or batch.args, number)
    at, chosen = 0, []
    for number, batch in enumerate(batches):
        if at >= samples:
            break
        chosen.append(number)
        at += batch.samples
    rest = [batch for number, batch in enumerate(batches) if number not in chosen]
    apart = sum(batch.samples for batch in rest) >= FEWEST
    measured = rest if apart else batches
    inputs = tuple(SampleInputs.of(model, batch.kwargs or batch.args).inputs for batch in measured)
    targets = [batch.target for batch in measured]
    labels: list[Any] = []
    known = all(
        isinstance(one, Tensor) and one.dim() and len(one) == b.samples
        for one, b in zip(targets, measured, strict=True)
    )
    for target in targets if known else ():
        labels += list(target.cpu().numpy()) if target.dim() > 1 else target.tolist()
    calibration = tuple(batches[number].kwargs or batches[number].args for number in chosen)
    return GivenData(calibration, inputs, tuple(labels) if known else None, at, apart)


def _enough(data: Any, samples: int) -> Any:
    """Not all of an endless or a large loader: as many batches as are calibrated and measured with."""
    if isinstance(data, Tensor | Mapping) or not isinstance(data, Iterable):
        return data

    def batches() -> Iterable[Any]:
        from sparsify.model.batches import sample_count

        seen = 0
        for batch in data:
            yield batch
            seen += sample_count(batch[0] if isinstance(batch, tuple | list) and batch else batch)
            if seen >= samples + MEASURED:
                return

    return batches()


def first_item(batch: Any) -> Any:
    """The first sample of a batch, as a batch of one."""
    return torch.utils._pytree.tree_map(lambda one: one[:1] if isinstance(one, Tensor) and one.dim() else one, batch)
