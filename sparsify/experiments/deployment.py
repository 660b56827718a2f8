"""The folder that is handed on: the ONNX file, what its inputs and labels mean, and a script that runs it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.errors import ExportError, SparsifyWarning, first_line
from sparsify.experiments.loop import batched, joined_outputs
from sparsify.onnx.benchmark import Comparison, compare_onnx
from sparsify.onnx.export import export_onnx
from sparsify.onnx.runtime import open_session, read_model, run_session
from sparsify.onnx.verify import Verification, verify_onnx

if TYPE_CHECKING:
    from torch import Tensor

    from sparsify.experiments.tasks import RunTask
    from sparsify.onnx.exported import ExportedModel

__all__: list[str] = []

MODEL = "model.onnx"
SAMPLE_COUNT = 2
"""Samples of the batch that a model is exported and verified on."""


@dataclass(frozen=True)
class WrittenModel:
    """An exported file.

    Attributes:
        path: of the file.
        batch: samples that it takes at once; None: any number.
        axes: names of the other axes that may have any size.
        notes: what did not come out as wished, each a line.
        floating: layers and operations that stay in float, with the reason.
    """

    path: Path
    batch: int | None
    axes: tuple[str, ...]
    notes: tuple[str, ...]
    floating: Mapping[str, str]


def write_model(task: RunTask, path: Path) -> WrittenModel:
    """Exports the model of a task, with any number of samples at once where it allows that, else one by one.

    Args:
        task: with the trained model.
        path: of the file; its folder is made.

    Raises:
        ExportError: the model cannot be exported.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    inputs = dict(task.batch(task.val[:SAMPLE_COUNT]).inputs)
    one = {name: value[:1] for name, value in inputs.items()}
    free = task.free_axes
    several = len(one[next(iter(one))]) < len(inputs[next(iter(inputs))])
    # What a user would miss most comes first: any number of samples, then samples of any size.
    tries = [
        (batch, axes) for batch in ((True, False) if several else (False,)) for axes in ((free, {}) if free else ({},))
    ]
    notes: list[str] = []
    for batch, axes in tries:
        try:
            found = export_onnx(task.model, inputs if batch else one, path, dynamic_batch=batch, dynamic_axes=axes)
        except ExportError as error:
            if (batch, axes) == tries[-1]:
                raise
            notes.append(first_line(error))
            continue
        names = tuple(_names_of(axes))
        fixed = [] if batch else ["one sample at a time"]
        fixed += [] if names or not free else [f"samples of one {name}" for name in _names_of(free)]
        why = f": {notes[-1]}" if notes else ", since there is one to measure with."
        said = (f"the file takes {' and '.join(fixed)}{why}",) if fixed else ()
        for note in said:
            warnings.warn(note, SparsifyWarning, stacklevel=2)
        return WrittenModel(path, None if batch else 1, names, said, _floating(found))
    raise AssertionError("the last try raises its error")


def _names_of(axes: Mapping[str, Mapping[int, str]]) -> list[str]:
    return sorted({name for entry in axes.values() for name in entry.values()})


def _floating(found: ExportedModel) -> dict[str, str]:
    return {name: found.reasons.get(name, "") for name in found.floating} if found.quantized else {}


def verified(task: RunTask, written: WrittenModel) -> Verification:
    """The file beside the torch model on samples to measure with; where their size is free, also on the front half of
    them. The first verification that fails is the one that counts."""
    inputs = dict(task.batch(task.val[: written.batch or SAMPLE_COUNT]).inputs)
    found = verify_onnx(task.model, written.path, inputs)
    if found.ok and written.axes:
        short = dict(inputs)
        for name, axes in task.free_axes.items():
            for axis in axes:
                short[name] = short[name].narrow(axis, 0, max(2, short[name].shape[axis] // 2))
        half = verify_onnx(task.model, written.path, short)
        return half if not half.ok or not half.exact else found
    return found


def measured_file(task: RunTask, written: WrittenModel, threads: int | None = None) -> dict[str, float]:
    """The metrics of a file in onnxruntime, on all samples to measure with."""
    model = read_model(written.path)
    session = open_session(written.path, threads=threads, model=model)
    wanted = {value.name for value in session.get_inputs()}
    found = []
    for samples in batched(task.val, written.batch or task.eval_batch):
        feed = {name: as_array(value) for name, value in task.batch(samples).inputs.items() if name in wanted}
        found.append(run_session(session, feed))
    return dict(task.metrics(joined_outputs(found), task.val))


def as_array(value: Tensor) -> Any:
    """A tensor as the array that onnxruntime takes."""
    return value.detach().cpu().numpy()


def speed(task: RunTask, dense: WrittenModel, compressed: WrittenModel, threads: int) -> Comparison:
    """Ratio of times, dense by compressed, one sample of full size at a time, in paired rounds."""
    wanted = {value.name for value in read_model(dense.path).graph.input}
    inputs = {name: as_array(value) for name, value in task.batch(task.val[:1]).inputs.items() if name in wanted}
    return compare_onnx(dense.path, compressed.path, threads=threads, rounds=10, inputs=inputs)
