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
        notes: what did not come out as wished, each a line.
        floating: layers and operations that stay in float, with the reason.
    """

    path: Path
    batch: int | None
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
    inputs = task.batch(task.val[:SAMPLE_COUNT]).inputs
    try:
        if len(inputs[next(iter(inputs))]) < SAMPLE_COUNT:
            raise ExportError("there is one sample to measure with, and a batch is found on two.")
        found = export_onnx(task.model, dict(inputs), path)
        return WrittenModel(path, None, (), _floating(found))
    except ExportError as error:
        one = {name: value[:1] for name, value in inputs.items()}
        note = f"the file takes one sample at a time: {first_line(error)}"
        found = export_onnx(task.model, one, path, dynamic_batch=False)
        warnings.warn(note, SparsifyWarning, stacklevel=2)
        return WrittenModel(path, 1, (note,), _floating(found))


def _floating(found: ExportedModel) -> dict[str, str]:
    return {name: found.reasons.get(name, "") for name in found.floating} if found.quantized else {}


def verified(task: RunTask, written: WrittenModel) -> Verification:
    """The file beside the torch model on samples to measure with."""
    count = written.batch or SAMPLE_COUNT
    return verify_onnx(task.model, written.path, dict(task.batch(task.val[:count]).inputs))


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


def speed(dense: WrittenModel, compressed: WrittenModel, threads: int) -> Comparison:
    """Ratio of times, dense by compressed, one sample at a time, in paired rounds."""
    return compare_onnx(dense.path, compressed.path, batch_size=1, threads=threads, rounds=10)
