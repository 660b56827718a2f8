"""A trained model or an ONNX file in, a smaller and faster ONNX file out: pruned, in integers, packed, proved."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from sparsify.errors import (
    ArgumentError,
    DataError,
    ExportError,
    SparsifyError,
    SparsifyWarning,
    StateError,
    TargetError,
    first_line,
)
from sparsify.experiments.file_runs import (
    FileRunner,
    QualityMetric,
    agreement,
    input_forms,
    measured_value,
    quality_metric,
    times_in_turn,
)
from sparsify.experiments.given_data import DataLike, DataReading, GivenData, first_item, forms_of_module, given_data
from sparsify.experiments.one_shot_report import CompressedFile, FileFigures, MeasuredPart
from sparsify.experiments.sample_files import ImageForm
from sparsify.experiments.slow_parts import slower_parts
from sparsify.model.copies import deep_copied
from sparsify.model.signature import check_module
from sparsify.model.targets import is_prunable_layer
from sparsify.model.wrappers import unwrapped
from sparsify.oneshot.pruning import PrunedWeights, prunable_layers, prune_model_
from sparsify.oneshot.quantize import quantize_model
from sparsify.onnx.benchmark import running_inputs
from sparsify.onnx.export import export_onnx, floating_layers
from sparsify.onnx.importing import import_onnx
from sparsify.onnx.packing import pack_onnx
from sparsify.onnx.runtime import read_model
from sparsify.onnx.verify import verify_onnx
from sparsify.optimize.levels import optim_level as level_named
from sparsify.output.files import replacing
from sparsify.quantization.plan import is_quantized

if TYPE_CHECKING:
    from onnx import ModelProto

    from sparsify.quantization.scheme import Scheme
    from sparsify.recipe.recipe import Recipe

__all__ = ["one_shot"]

ROUNDS = 3
"""Times that parts which lose in integers are looked for."""


def one_shot(
    model: nn.Module | str | os.PathLike[str] | ModelProto,
    data: DataLike = None,
    *,
    path: str | os.PathLike[str],
    optim_level: float = 0.5,
    recipe: Recipe | str | os.PathLike[str] | None = None,
    sample_inputs: Any = None,
    metric: str | QualityMetric | None = None,
    ignore: Sequence[str] | str = (),
    scheme: Scheme | Mapping[str, Any] | str | None = None,
    measure: bool = True,
    packed: bool = True,
    samples: int = 256,
    image_size: tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    preprocessor: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    max_length: int | None = None,
    opset: int | None = None,
    dynamic_batch: bool = True,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    threads: int = 1,
    progress: bool | None = None,
) -> CompressedFile:
    """Compresses a trained model without training it, and writes the result to one ONNX file.

    In this order: weights are pruned to the share of zeros that the level says, where they change the outputs of their
    layers least, and the others make up for it; layers are quantized as by `quantize_model`; parts that onnxruntime
    runs slower in integers than in float go back to float; the file is packed as by `pack_onnx`. It is compared with
    the model before it is put in place, and beside the float file on the data: outputs, metric, size and time.

    Levels: 0 changes nothing; below 0.3 INT8 alone; from 0.3 on 40 % + 40 % x (level - 0.3) / 0.7 of the prunable
    weights become zero too: 51.4286 % at 0.5, 80 % at 1. Embeddings and shared weights stay dense and do not count.

    Args:
        model: a trained module in float, or an ONNX file: a path or a ModelProto. It is not changed.
        data: a file or folder of samples: .npz with the inputs by name (one sample a file, without the batch), .npy,
            images (loose or in one folder for each class), or texts in csv, tsv, json or jsonl; or the reference
            "package.module:function" of a function that gives batches; or batches: tensors, tuples (of which the last
            may be labels), or inputs by name. None: weights go by their size, and ranges come from BatchNorms.
        path: of the ONNX file that is written; replaced at once when everything went well.
        optim_level: 0 to 1, or a whole number from 2 to 100 for percent.
        recipe: is applied instead of the level: its modifiers all at once, at the end of their schedules.
        sample_inputs: inputs to trace and export with; None: the first sample of the data.
        metric: "accuracy", a function of (outputs by name, labels) or its reference; None: accuracy where the labels of
            the data are whole numbers.
        ignore: names or types of layers that stay in float and dense.
        scheme: as in `quantize_model`.
        measure: False takes no times: every part that can be is quantized, and the result is the same in every run.
        packed: whether zeros and palettes are stored as such.
        samples: number of samples to calibrate with, at most; outputs are measured on others where there are any.
        image_size: (height, width) of images, where the model takes several.
        mean: of the channels of images, of values from 0 to 1.
        std: likewise.
        preprocessor: folder with the preprocessor_config.json that says these.
        tokenizer: folder of the tokenizer for texts; None: the folder of the data.
        max_length: tokens of a text.
        opset: as in `export_onnx`.
        dynamic_batch: likewise; where the model allows one size of a batch alone, the file has it.
        input_names: likewise.
        output_names: likewise.
        threads: of onnxruntime, for the times.
        progress: whether a bar is shown; None: on a terminal.

    Raises:
        ArgumentError: an argument that cannot be meant, or a model that cannot be traced.
        DataError: samples that do not fit, with file and line; weights that are not finite.
        ExportError: a file that cannot be read as a module, or a result that does not compute what the model does.
        TargetError: a name in `ignore` matches nothing.
        StateError: the model is quantized already.
    """
    reading = DataReading(
        ImageForm(image_size, _per_channel("mean", mean), _per_channel("std", std), preprocessor),
        tokenizer,
        max_length,
        samples,
    ).checked()
    if recipe is not None and optim_level != 0.5:
        raise ArgumentError("optim_level: a recipe is given, which says how much; leave one of them out.")
    level = level_named(optim_level, "one-shot")
    names = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    with replacing(path) as temporary, tempfile.TemporaryDirectory(prefix="sparsify-") as text:
        job = _Job(
            Path(text),
            export={
                "opset": opset,
                "dynamic_batch": dynamic_batch,
                "input_names": input_names,
                "output_names": output_names,
            },
            threads=threads,
            progress=progress,
        )
        job.take(model, data, sample_inputs, reading)
        chosen = quality_metric(metric, job.data.labels)
        if recipe is not None:
            job.by_recipe(recipe)
        elif level.quantize:
            job.compress(level.sparsity or 0.0, names, scheme, measure)
        written = job.written
        if written is None:
            shutil.copyfile(job.dense, temporary)
        elif packed:
            pack_onnx(written, temporary, inputs=None)
        else:
            shutil.copyfile(written, temporary)
        return job.result(temporary, Path(path), None if recipe is not None else level.level, level.sparsity, chosen)


class _Job:
    """One compression, in a folder of its own.

    Attributes:
        dense: the float file.
        written: the plain file of the result; None: nothing was changed.
    """

    dense: Path
    model: nn.Module
    data: GivenData
    sample: Any

    def __init__(self, folder: Path, *, export: Mapping[str, Any], threads: int, progress: bool | None) -> None:
        self.folder, self.export, self.threads, self.progress = folder, dict(export), threads, progress
        self.written: Path | None = None
        self.notes: list[str] = []
        self.pruned: tuple[PrunedWeights, ...] = ()
        self.kept_dense: Mapping[str, str] = {}
        self.floating: Mapping[str, str] = {}
        self.parts: tuple[MeasuredPart, ...] = ()
        self.quantized = False
        self.foreign = False

    def take(self, model: Any, data: DataLike, sample_inputs: Any, reading: DataReading) -> None:
        """The model as a module and as a float file, and its data."""
        if isinstance(model, str | os.PathLike) or type(model).__name__ == "ModelProto":
            self._take_file(model)
            forms = input_forms(self.dense)
        else:
            self.model = unwrapped(check_module(model, other=", or the path of an ONNX file"))
            if is_quantized(self.model):
                raise StateError(f"{type(self.model).__name__} holds quantized layers already; give the float model.")
            forms = forms_of_module(self.model, sample_inputs)
            if is_prunable_layer(self.model):
                # A model that is one layer has no name under which it could be converted.
                self.model = nn.Sequential(self.model)
        self.data = given_data(self.model, data, forms, reading)
        self.notes += self.data.notes
        if sample_inputs is None and self.data.calibration:
            sample_inputs = self.data.calibration[0]
        if sample_inputs is None and self.foreign:
            sample_inputs = self._made_up()
        if sample_inputs is None:
            raise ArgumentError("neither data nor sample_inputs: give at least inputs to trace the model on.")
        self.sample = sample_inputs
        if not self.foreign:
            self.model = deep_copied(self.model).eval()
            self.dense = self.folder / "dense.onnx"
            self._export(self.model, self.dense)

    def _take_file(self, source: Any) -> None:
        self.foreign = True
        if not isinstance(source, str | os.PathLike):
            place = self.folder / "given.onnx"
            place.write_bytes(source.SerializeToString())
            source = place
        self.dense = Path(source)
        self.model = import_onnx(source)

    def _made_up(self) -> Any:
        import torch

        feed, _ = running_inputs(read_model(self.dense), FileRunner(self.dense).session, 1, None, None, self.dense)
        return {name: torch.from_numpy(value) for name, value in feed.items()}

    def _export(self, model: nn.Module, place: Path) -> None:
        """Writes and proves a file; where the forward fixes the batch, with the batch fixed."""
        try:
            export_onnx(model, self.sample, place, **self.export)
        except ExportError as error:
            if not self.export["dynamic_batch"] or self.foreign:
                raise
            self.export["dynamic_batch"] = False
            self.sample = first_item(self.sample)
            export_onnx(model, self.sample, place, **self.export)
            self.notes.append(f"the file takes one sample at a time: {first_line(error)}")
        proof = verify_onnx(model, place, self.sample)
        if not proof.ok:
            raise ExportError(f"nothing was written: onnxruntime computes something else.\n{proof}")

    # ------------------------------------------------------------------ what is done

    def by_recipe(self, recipe: Any) -> None:
        """Applies a recipe without training."""
        from sparsify.training.manager import ScheduledModifierManager

        source = Path(recipe) if isinstance(recipe, os.PathLike) else recipe
        manager = (
            ScheduledModifierManager.from_yaml(source)
            if isinstance(source, str | Path)
            else ScheduledModifierManager(source)
        )
        self.model = manager.apply(
            self.model, calibration_data=list(self.data.calibration) or None, sample_inputs=self.sample
        )
        self.model.eval()
        manager.finalize(self.model)
        self.quantized = is_quantized(self.model)
        self.written = self.folder / "result.onnx"
        self._export(self.model, self.written)
        if self.quantized:
            self.floating = floating_layers(self.model)

    def compress(self, sparsity: float, ignored: tuple[str, ...], scheme: Any, measure: bool) -> None:
        """Prunes, quantizes, and gives back to float what is slower in integers."""
        from sparsify.model.targets import resolve_layers

        left_out = tuple(resolve_layers(self.model, list(ignored), where="ignore")) if ignored else ()
        if sparsity:
            layers, self.kept_dense = prunable_layers(self.model, left_out)
            if layers:
                self.pruned = prune_model_(
                    self.model,
                    self.data.calibration,
                    sparsity,
                    sample_inputs=self.sample,
                    ignored=left_out,
                    progress=self.progress,
                )
            else:
                self.notes.append("nothing was pruned: no layer has weights that can be.")
        plain = self.folder / "float.onnx"
        if self.pruned:
            self._export(self.model, plain)
        else:
            plain = self.dense
        whole = self._in_integers(self.folder / "int8.onnx", ignored, scheme)
        if whole is None:
            self.written = plain if self.pruned else None
            return
        self.written, self.floating = whole
        self.quantized = True
        if measure:
            self._measured_choice(plain, ignored, scheme)

    def _in_integers(self, place: Path, ignored: tuple[str, ...], scheme: Any) -> tuple[Path, Mapping[str, str]] | None:
        """(the quantized file, what stays in float); None: nothing can be quantized."""
        data = list(self.data.calibration) or None
        try:
            with warnings.catch_warnings():
                if data is None:
                    warnings.simplefilter("ignore", SparsifyWarning)
                found = quantize_model(
                    self.model,
                    data,
                    sample_inputs=self.sample,
                    scheme=scheme,
                    ignore=ignored,
                    least_samples=1,
                    progress=self.progress,
                )
        except TargetError as error:
            self.notes.append(f"nothing was quantized: {first_line(error)}")
            return None
        except DataError:
            if data is not None or scheme is not None:
                raise
            self.notes.append("weights alone are integers: nothing is known of activations without data or BatchNorm.")
            return self._in_integers(place, ignored, "weight_only")
        self._export(found.model, place)
        return place, found.floating

    def _measured_choice(self, plain: Path, ignored: tuple[str, ...], scheme: Any) -> None:
        """Gives parts back to float while the file becomes faster for it; all, if it stays slower than in float."""
        assert self.written is not None
        batch = first_item(self._timed_batch())
        tried: list[MeasuredPart] = []
        best, best_floating = self.written, self.floating
        kept: tuple[str, ...] = ()
        for number in range(ROUNDS):
            slower = slower_parts(plain, best, FileRunner(best).feed(batch), self.model, threads=self.threads)
            slower = [part for part in slower if part.name not in kept]
            if not slower:
                break
            names = (*kept, *(part.name for part in slower))
            place = self.folder / f"int8_{number}.onnx"
            try:
                found = self._in_integers(place, (*ignored, *names), scheme)
            except SparsifyError as error:
                self.notes.append(f"{', '.join(names)} cannot be left in float: {first_line(error)}")
                break
            if found is None:
                self.notes.pop()
                break
            times = times_in_turn([FileRunner(best, self.threads), FileRunner(place, self.threads)], batch)
            faster = times.times_as_fast(1) > 1 + times.noise(1)
            tried += [replace(part, kept_in_float=faster) for part in slower]
            if not faster:
                break
            kept = names
            best, best_floating = found
        times = times_in_turn([FileRunner(plain, self.threads), FileRunner(best, self.threads)], batch)
        ratio = times.times_as_fast(1)
        if ratio < 1 - max(2 * times.noise(1), 0.02):
            self.notes.append(
                f"the weights stay in float: in integers the file runs {ratio:.2f} times as fast as in float, measured."
            )
            best = plain
            best_floating = {"the model": "it is slower in integers, measured"}
            self.quantized = False
        else:
            why = "it is slower in integers, measured"
            below = tuple(f"{name}." for name in kept)
            others = {n: w for n, w in best_floating.items() if n not in kept and not n.startswith(below)}
            best_floating = {**others, **dict.fromkeys(kept, why)}
        self.written = None if best == self.dense else best
        self.floating, self.parts = best_floating, tuple(tried)

    def _timed_batch(self) -> Any:
        if self.data.measured:
            return self.data.measured[0]
        from sparsify.model.signature import SampleInputs

        return SampleInputs.of(self.model, self.sample).inputs

    # ------------------------------------------------------------------ what came out

    def result(
        self,
        temporary: Path,
        path: Path,
        level: float | None,
        sparsity: float | None,
        metric: tuple[str, QualityMetric] | None,
    ) -> CompressedFile:
        """The figures of the file, beside the float one."""
        runners = [FileRunner(self.dense, self.threads), FileRunner(temporary, self.threads)]
        times = times_in_turn(runners, first_item(self._timed_batch()))
        found = near = None
        values: list[float | None] = [None, None]
        if self.data.measured:
            found = [runner.outputs(self.data.measured) for runner in runners]
            near = agreement(*found)
            if metric is not None and self.data.labels is not None:
                values = [measured_value(metric[1], outputs, self.data.labels) for outputs in found]
        figures = [
            FileFigures.of(file, latency, ratio, value)
            for file, latency, ratio, value in zip(
                (self.dense, temporary), times.latencies_ms, map(times.times_as_fast, (0, 1)), values, strict=True
            )
        ]
        return CompressedFile(
            path=path,
            model=str(self.dense.name) if self.foreign else type(self.model).__name__,
            level=level,
            asked_sparsity=sparsity if level is not None else None,
            quantized=self.quantized,
            dense=figures[0],
            compressed=figures[1],
            metric=None if metric is None else metric[0],
            agreement=near,
            pruned=self.pruned,
            kept_dense=dict(self.kept_dense),
            floating=dict(self.floating),
            parts=self.parts,
            calibration_samples=self.data.samples,
            measured_apart=self.data.apart,
            threads=self.threads,
            notes=tuple(self.notes),
        )


def _per_channel(name: str, values: Sequence[float] | None) -> tuple[float, ...] | None:
    if values is None:
        return None
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        raise ArgumentError(f"{name}={values!r}: give a number for each channel.")
    return tuple(float(value) for value in values)
