"""Several files or models beside the first: accuracy, size and time, as a table, JSON and a plot."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sparsify.errors import ArgumentError, install_line
from sparsify.experiments.compressing import one_shot
from sparsify.experiments.file_runs import (
    FileRunner,
    OutputAgreement,
    QualityMetric,
    agreement,
    input_forms,
    measured_value,
    quality_metric,
    times_in_turn,
)
from sparsify.experiments.given_data import DataLike, DataReading, first_item, forms_of_module, given_data
from sparsify.experiments.one_shot_report import FileFigures
from sparsify.experiments.sample_files import ImageForm
from sparsify.model.signature import check_module
from sparsify.onnx.benchmark import running_inputs
from sparsify.onnx.export import export_onnx
from sparsify.onnx.exported import bytes_text
from sparsify.onnx.importing import import_onnx
from sparsify.onnx.runtime import read_model
from sparsify.output.files import replacing
from sparsify.output.json_values import plain
from sparsify.output.tables import Column, Displayed, Table, track

__all__ = ["compare"]

Variant = nn.Module | str | os.PathLike[str]
PLOTS = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class VariantFigures:
    """One file of a comparison.

    Attributes:
        name: of the variant.
        figures: its size, time and metric.
        slowest, fastest: the lowest and the highest of the paired rounds of `figures.times_as_fast`.
        agreement: of its outputs with the first's; None without data, and where the outputs cannot be compared.
    """

    name: str
    figures: FileFigures
    slowest: float
    fastest: float
    agreement: OutputAgreement | None


@dataclass(frozen=True)
class VariantComparison(Displayed):
    """Variants beside the first one, which is the measure. str() is a table.

    Attributes:
        variants: in the order in which they were given.
        metric: its name; None where nothing was measured.
        samples: number of them.
        threads: of onnxruntime.
    """

    variants: tuple[VariantFigures, ...]
    metric: str | None
    samples: int
    threads: int

    def _parts(self) -> list[Table | str]:
        rows: list[dict[str, object]] = []
        for one in self.variants:
            near, own = one.agreement, one.figures
            rows.append(
                {
                    "name": one.name,
                    "size": bytes_text(own.bytes),
                    "gzip": bytes_text(own.gzip_bytes),
                    "ms": own.latency_ms,
                    "x": own.times_as_fast,
                    "range": f"{one.slowest:.2f} - {one.fastest:.2f}",
                    "metric": own.metric,
                    "same": None if near is None else near.same_decisions,
                    "error": None if near is None else near.error,
                }
            )
        columns = [
            Column("name", "Variant"),
            Column("size", "Size"),
            Column("gzip", "gzipped"),
            Column("ms", "ms", ".3f"),
            Column("x", "Times as fast", ".2f"),
            Column("range", "Rounds"),
            Column("metric", self.metric or "", ".4f"),
            Column("same", "Same decisions", ".2%"),
            Column("error", "Error", ".4f"),
        ]
        shown = [column for column in columns if any(row[column.field] is not None for row in rows)]
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
        return [Table.of(f"Beside {self.variants[0].name}: {self.samples} samples, {threads}", rows, shown)]

    def to_json(self) -> str:
        """All fields as JSON."""
        return json.dumps(plain(self), indent=2)

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draws the trade-off: the metric, or the share of same decisions, over size and over speed.

        Args:
            path: a .png, .pdf or .svg file.

        Raises:
            ArgumentError: another ending, nothing to draw, or matplotlib is not installed.
        """
        place = Path(path)
        if place.suffix not in PLOTS:
            raise ArgumentError(f"{place}: a plot is written as .png, .pdf or .svg.")
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ArgumentError(f"a plot needs matplotlib: {install_line('report')}") from error
        heights, label = self._heights()
        figure = Figure(figsize=(9, 4), layout="constrained")
        FigureCanvasAgg(figure)
        sides = figure.subplots(1, 2, sharey=True)
        widths = (
            [one.figures.bytes / 2**20 for one in self.variants],
            [o.figures.times_as_fast for o in self.variants],
        )
        for axes, values, title in zip(
            sides, widths, ("MiB", f"times as fast as {self.variants[0].name}"), strict=True
        ):
            axes.plot(values, heights, "o-", linewidth=0.8)
            axes.set_xlabel(title)
            axes.grid(alpha=0.3)
            for one, at, height in zip(self.variants, values, heights, strict=True):
                axes.annotate(one.name, (at, height), xytext=(4, 4), textcoords="offset points", fontsize=8)
        sides[0].set_ylabel(label)
        with replacing(place) as temporary:
            figure.savefig(temporary, format=place.suffix[1:])
        return place

    def _heights(self) -> tuple[list[float], str]:
        metrics = [one.figures.metric for one in self.variants]
        if all(value is not None for value in metrics):
            return [float(value) for value in metrics if value is not None], self.metric or "metric"
        same = [None if one.agreement is None else one.agreement.same_decisions for one in self.variants]
        if all(value is not None for value in same):
            return [float(value) for value in same if value is not None], "same decisions"
        errors = [None if one.agreement is None else one.agreement.error for one in self.variants]
        if all(value is not None for value in errors):
            return [float(value) for value in errors if value is not None], "error of outputs"
        raise ArgumentError("there is nothing to draw: give data, on which outputs are compared.")


def compare(
    variants: Mapping[str, Variant] | Sequence[Variant] | Variant,
    data: DataLike = None,
    metric: str | QualityMetric | None = None,
    *,
    levels: Sequence[float] = (),
    samples: int = 256,
    sample_inputs: Any = None,
    image_size: tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    preprocessor: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    max_length: int | None = None,
    threads: int = 1,
    rounds: int = 21,
    progress: bool | None = None,
) -> VariantComparison:
    """Measures several files or models beside the first: metric and outputs on the same samples, size, and time.

    Times are of one sample, in rounds that run every file in turn, so that noise hits all alike.

    Args:
        variants: ONNX files and modules, the dense one first; a mapping gives them names. One alone with `levels`.
        data: as in `one_shot`: files of samples, a reference, or batches; at most 1,000 samples are measured. None:
            sizes and times alone.
        metric: "accuracy", a function of (outputs by name, labels) or its reference; None: accuracy where the labels of
            the data are whole numbers.
        levels: optim levels, 0 to 1, at which the first variant is compressed by `one_shot` and compared too, on
            samples that it was not calibrated with where there are enough.
        samples: number of samples to calibrate with at `levels`, at most.
        sample_inputs: inputs to export modules with; None: the first sample of the data.
        image_size, mean, std, preprocessor, tokenizer, max_length: as in `one_shot`.
        threads: of onnxruntime.
        rounds: of all files in turn.
        progress: whether a bar is shown; None: on a terminal.

    Raises:
        ArgumentError: an argument that cannot be meant. DataError: samples or files that cannot be read or do not fit.
        ExportError: a module that cannot be exported, or a file that cannot be run.
    """
    named = _named(variants)
    if not levels and len(named) < 2:
        raise ArgumentError("variants: give two or more to compare, or levels to compress the one at.")
    for name, value in (("threads", threads), ("rounds", rounds), ("samples", samples)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArgumentError(f"{name}={value!r}: give a whole number, 1 or more.")
    mean, std = (None if each is None else tuple(each) for each in (mean, std))
    images = ImageForm(image_size, mean, std, preprocessor)
    reading = DataReading(images, tokenizer, max_length, samples if levels else 0)
    first = next(iter(named.values()))
    module = import_onnx(first) if not isinstance(first, nn.Module) and _needs_module(data) else first
    forms = forms_of_module(first, sample_inputs) if isinstance(first, nn.Module) else input_forms(first)
    given = given_data(module if isinstance(module, nn.Module) else nn.Identity(), data, forms, reading)
    chosen = quality_metric(metric, given.labels)
    if sample_inputs is None and given.measured:
        sample_inputs = dict(given.measured[0])
    with tempfile.TemporaryDirectory(prefix="sparsify-") as folder:
        files = dict(_files(named, Path(folder), sample_inputs))
        for level in track(levels, "levels", progress=progress):
            place = Path(folder) / f"level {level:g}.onnx"
            one_shot(
                first,
                data,
                path=place,
                optim_level=level,
                samples=samples,
                sample_inputs=sample_inputs,
                image_size=image_size,
                mean=mean,
                std=std,
                preprocessor=preprocessor,
                tokenizer=tokenizer,
                max_length=max_length,
                threads=threads,
                progress=progress,
            )
            files[f"level {level:g}"] = place
        return _measured_variants(files, given.measured, given.labels, chosen, threads, rounds)


def _named(variants: Any) -> dict[str, Variant]:
    if isinstance(variants, nn.Module | str | os.PathLike):
        variants = [variants]
    if not isinstance(variants, Mapping):
        if not isinstance(variants, Sequence):
            raise ArgumentError(f"variants is a {type(variants).__name__}: give files and modules, or them by name.")
        names = [Path(one).name if isinstance(one, str | os.PathLike) else type(one).__name__ for one in variants]
        names = [name if names.count(name) == 1 else f"{name} ({at})" for at, name in enumerate(names, 1)]
        variants = dict(zip(names, variants, strict=True))
    for name, one in variants.items():
        if not isinstance(one, str | os.PathLike):
            check_module(one, other=f", or the path of an ONNX file, as {name!r}")
    if not variants:
        raise ArgumentError("variants is empty: give the dense file or model first, and others after it.")
    return {str(name): one for name, one in variants.items()}


def _needs_module(data: DataLike) -> bool:
    """Batches are bound to inputs by the module that takes them; files name theirs themselves."""
    reference = isinstance(data, str) and ":" in data and not Path(data).exists()
    return data is not None and (reference or not isinstance(data, str | os.PathLike))


def _files(named: Mapping[str, Variant], folder: Path, sample_inputs: Any) -> Iterator[tuple[str, Path]]:
    for number, (name, one) in enumerate(named.items()):
        if not isinstance(one, nn.Module):
            yield name, Path(one)
            continue
        if sample_inputs is None:
            raise ArgumentError(f"{name}: a module is exported with inputs: give data or sample_inputs.")
        place = folder / f"{number}.onnx"
        export_onnx(one, sample_inputs, place)
        yield name, place


def _measured_variants(
    files: Mapping[str, Path],
    batches: Sequence[Mapping[str, Any]],
    labels: Sequence[Any] | None,
    metric: tuple[str, QualityMetric] | None,
    threads: int,
    rounds: int,
) -> VariantComparison:
    runners = [FileRunner(path, threads) for path in files.values()]
    if batches:
        batch: Mapping[str, Any] = first_item(batches[0])
    else:
        batch, _ = running_inputs(read_model(runners[0].path), runners[0].session, 1, None, None, runners[0].path)
    outputs = [runner.outputs(batches) for runner in runners] if batches else []
    times = times_in_turn(runners, batch, rounds)
    found = []
    for at, (name, path) in enumerate(files.items()):
        value = measured_value(metric[1], outputs[at], labels) if metric is not None and labels is not None else None
        figures = FileFigures.of(path, times.latencies_ms[at], times.times_as_fast(at), value)
        near = agreement(outputs[0], outputs[at]) if outputs else None
        found.append(VariantFigures(name, figures, min(times.ratios[at]), max(times.ratios[at]), near))
    samples = len(labels) if labels is not None else sum(len(next(iter(batch.values()))) for batch in batches)
    return VariantComparison(tuple(found), None if metric is None else metric[0], samples, threads)
