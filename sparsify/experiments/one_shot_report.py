"""The report of `one_shot`, what was done and what came of it: as text, JSON and a page."""

from __future__ import annotations

import gzip
import html
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsify.experiments.file_runs import OutputAgreement
from sparsify.oneshot.pruning import PrunedWeights
from sparsify.onnx.exported import bytes_text
from sparsify.output.files import replacing
from sparsify.output.json_values import plain
from sparsify.output.tables import Column, Displayed, Table

__all__: list[str] = []

REPORT_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}caption{text-align:left;color:#666}"
    "td,th{padding:.15rem .7rem;border-bottom:1px solid #ddd;text-align:right}"
    "@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}td,th{border-color:#444}}"
)


@dataclass(frozen=True)
class FileFigures:
    """Figures of a file.

    Attributes:
        bytes: of it.
        gzip_bytes: under gzip, level 6.
        latency_ms: median of a call with one sample.
        times_as_fast: as the float file, the median of paired rounds; 1 for itself.
        metric: on the samples to measure with; None where none is.
    """

    bytes: int
    gzip_bytes: int
    latency_ms: float
    times_as_fast: float
    metric: float | None

    @classmethod
    def of(cls, path: Path, latency_ms: float, times_as_fast: float, metric: float | None) -> FileFigures:
        """With the sizes of the file at `path`."""
        content = path.read_bytes()
        return cls(len(content), len(gzip.compress(content, 6, mtime=0)), latency_ms, times_as_fast, metric)


@dataclass(frozen=True)
class MeasuredPart:
    """A part of the model that was slower in integers.

    Attributes:
        name: of the module.
        float_ms: time of its nodes in float, in a call with one sample, under the profiler.
        int8_ms: the same in integers, with the conversions made for it.
        kept_in_float: whether it stayed in float, since the whole file became faster for it.
    """

    name: str
    float_ms: float
    int8_ms: float
    kept_in_float: bool = False


@dataclass(frozen=True)
class CompressedFile(Displayed, os.PathLike[str]):
    """A file that `one_shot` wrote, and what was done and measured. Usable as a path; str() is a report.

    Attributes:
        path: of the file.
        model: class of the module, or name of the given file.
        level: optim level; None where a recipe was applied.
        asked_sparsity: zeros / prunable weights that the level says; None with a recipe.
        quantized: whether layers compute in integers.
        dense, compressed: figures of the float file and of this one.
        metric: its name; None where nothing was measured.
        agreement: of the outputs with the float file's; None without data.
        pruned: each pruned layer.
        kept_dense: {layer that was not pruned: why}.
        floating: {what stays in float: why}.
        parts: that were slower in integers.
        calibration_samples: number of them.
        measured_apart: outputs were compared on samples that calibration has not seen.
        threads: of onnxruntime, for the times.
        notes: what did not come out as wished or was assumed.
    """

    path: Path
    model: str
    level: float | None
    asked_sparsity: float | None
    quantized: bool
    dense: FileFigures
    compressed: FileFigures
    metric: str | None
    agreement: OutputAgreement | None
    pruned: tuple[PrunedWeights, ...]
    kept_dense: Mapping[str, str]
    floating: Mapping[str, str]
    parts: tuple[MeasuredPart, ...]
    calibration_samples: int
    measured_apart: bool
    threads: int
    notes: tuple[str, ...]

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def sparsity(self) -> float:
        """Zeros / weights of the layers that were pruned; 0.0 where none were."""
        weights = sum(layer.weights for layer in self.pruned)
        return sum(layer.zeros for layer in self.pruned) / weights if weights else 0.0

    def _parts(self) -> list[Table | str]:
        how = "by a recipe" if self.level is None else f"optim level {self.level:g}"
        zeros = f"{self.sparsity:.4%} zeros in {len(self.pruned)} layers" if self.pruned else "not pruned"
        rows: list[dict[str, object]] = [
            {"what": name, "bytes": bytes_text(one.bytes), "gzip": bytes_text(one.gzip_bytes), **vars_of(one)}
            for name, one in (("float", self.dense), ("compressed", self.compressed))
        ]
        columns = [
            Column("what", "File"),
            Column("bytes", "Size"),
            Column("gzip", "gzipped"),
            Column("latency_ms", "ms", ".3f"),
            Column("times_as_fast", "Times as fast", ".2f"),
        ]
        if self.metric is not None:
            columns.append(Column("metric", self.metric, ".4f"))
        title = f"{self.path}: {self.model}, {how}: {zeros}, {'INT8' if self.quantized else 'float'}"
        found: list[Table | str] = [Table.of(title, rows, columns)]
        if self.agreement is not None:
            near = self.agreement
            same = "" if near.same_decisions is None else f", same decisions {near.same_decisions:.2%}"
            seen = "not seen in calibration" if self.measured_apart else "calibrated with too"
            found.append(
                f"outputs beside the float file's on {near.samples} samples ({seen}): error {near.error:.4f}, cosine "
                f"{near.cosine:.5f}{same}"
            )
        if self.pruned:
            layers = [
                {**plain(layer), "sparsity": layer.sparsity, "dense": self.kept_dense.get(layer.layer)}
                for layer in self.pruned
            ]
            found.append(
                Table.of(
                    "Pruned",
                    layers,
                    [
                        Column("layer", "Layer"),
                        Column("weights", "Weights", ","),
                        Column("sparsity", "Zeros", ".1%"),
                        Column("error", "Error", ".2e"),
                        Column("error_magnitude", "By magnitude", ".2e"),
                        Column("method", "How", left=True),
                    ],
                )
            )
        found += [f"dense: {name}: {why}" for name, why in self.kept_dense.items()]
        if self.parts:
            found.append(
                Table.of(
                    "Slower in integers, measured",
                    self.parts,
                    [
                        Column("name", "Part"),
                        Column("float_ms", "float ms", ".3f"),
                        Column("int8_ms", "int8 ms", ".3f"),
                        Column("kept_in_float", "Stays in float", left=True),
                    ],
                )
            )
        found += [f"in float: {name}: {why}" for name, why in self.floating.items()]
        found += [f"note: {note}" for note in self.notes]
        return found

    def to_json(self) -> str:
        """All fields as JSON, and the sparsity reached."""
        return json.dumps({**plain(self), "sparsity": self.sparsity}, indent=2)

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Writes the report as one page of HTML without scripts.

        Args:
            path: of the page.
        """
        head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(self.path.name)}</title>"
        text = f"{head}<style>{REPORT_STYLE}</style><h1>{html.escape(self.path.name)}</h1>{self._repr_html_()}</html>\n"
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return Path(path)


def vars_of(figures: FileFigures) -> dict[str, Any]:
    """Fields that a table shows as they are."""
    return {name: getattr(figures, name) for name in ("latency_ms", "times_as_fast", "metric")}
