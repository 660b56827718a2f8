"""Runs read back from their folders, side by side: what was asked, what came out, and whether they can be compared."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsify.errors import ArgumentError, DataError, DataFileError
from sparsify.experiments.folder import ASKED, COMPLETE, ExperimentFolder
from sparsify.output.files import read_text
from sparsify.output.json_values import plain
from sparsify.output.tables import Column, Displayed, Table

__all__ = ["ExperimentRecord", "ExperimentReport", "experiment_report"]

_FINE = "ok"


@dataclass(frozen=True)
class ExperimentRecord:
    """One run as its folder tells it.

    Attributes:
        folder: of the run.
        arguments: of `experiment.yaml`, by the names of the flags.
        about: what else stands there: fingerprint and split of the data, labels, versions.
        figures: the content of `metrics.yaml`; None of a run that has not come so far.
        epochs: of `logs/log.jsonl`, in order; an epoch that a resumed run trained again counts once.
        short: in what it falls short of what was asked; None of a run that has not ended.
    """

    folder: Path
    arguments: Mapping[str, Any]
    about: Mapping[str, Any]
    figures: Mapping[str, Any] | None
    epochs: tuple[Mapping[str, Any], ...]
    short: tuple[str, ...] | None

    @property
    def state(self) -> str:
        """State of the run: "complete", "falls short", or how far it came, as in "recipe 3/6"."""
        if self.short is not None:
            return "falls short" if self.short else "complete"
        if not self.epochs:
            return "begun"
        last = self.epochs[-1]
        return f"{last['stage']} {last['epoch']}/{last['epochs']}"

    def row(self) -> dict[str, Any]:
        """The figures by which runs are compared, None where there is none yet: fractions, bytes and ratios."""
        found: dict[str, Any] = {
            "run": self.folder.name,
            "experiment": self.arguments["kind"],
            "use_case": self.arguments["use_case"],
            "model": Path(str(self.arguments["model"])).name,
            "level": self.arguments["optim_level"],
            "structured": self.arguments["structured"],
            "state": self.state,
        }
        figures = self.figures
        metric = self.arguments["eval_metric"] if figures is None else figures["metric"]
        if figures is None:
            return {**found, "metric": metric, **dict.fromkeys(_MEASURED)}
        dense, after = figures["dense"]["onnxruntime"][metric], figures["compressed"]["onnxruntime"][metric]
        sizes = figures["size"]
        values = (
            *(dense, after, after - dense),
            *(figures["sparsity"]["of_the_pruned"], figures["sparsity"]["of_all_weights"]),
            *(sizes["dense"]["bytes"], sizes["compressed"]["bytes"], sizes["compressed"]["gzip"]),
            *(figures["speed"]["times_as_fast"], figures["verification"]["agrees"]),
        )
        return {**found, "metric": metric, **dict(zip(_MEASURED, values, strict=True))}


_MEASURED = (
    *("dense", "compressed", "change", "zeros", "zeros_of_all"),
    *("dense_bytes", "bytes", "gzip_bytes", "times_as_fast", "verified"),
)
_RUN_COLUMNS = (
    Column("run", "run"),
    Column("state", "state", left=True),
    Column("level", "level", "g"),
    Column("metric", "metric", left=True),
    Column("dense", "dense", ".4f"),
    Column("compressed", "compressed", ".4f"),
    Column("change", "change", "+.4f"),
    Column("zeros", "zeros", ".1%"),
    Column("dense_megabytes", "dense MB", ".2f"),
    Column("megabytes", "MB", ".2f"),
    Column("gzip_megabytes", "MB (gzip)", ".2f"),
    Column("times_as_fast", "times as fast", ".2f"),
    Column("verified", "verified", left=True),
)


@dataclass(frozen=True, repr=False)
class ExperimentReport(Displayed):
    """Runs side by side.

    Attributes:
        records: one for each run.
        notes: why runs cannot be compared with each other, each a line.
    """

    records: tuple[ExperimentRecord, ...]
    notes: tuple[str, ...]

    def table(self) -> Table:
        """A row for each run; `rows` of it have every figure unrounded."""
        rows = []
        for record in self.records:
            row = record.row()
            for name in ("dense", "", "gzip"):
                size = row[f"{name}_bytes".lstrip("_")]
                row[f"{name}_megabytes".lstrip("_")] = None if size is None else size / 1e6
            row["verified"] = {None: None, True: "yes", False: "DIFFERS"}[row["verified"]]
            rows.append(row)
        return Table.of("Experiments", rows, _RUN_COLUMNS)

    def _parts(self) -> Sequence[Table | str]:
        short = [f"{each.folder.name}: {line}" for each in self.records for line in each.short or ()]
        return [self.table(), *short, *self.notes]

    def to_json(self) -> str:
        """JSON with a row of figures for each run, and the notes."""
        rows = [{**record.row(), "folder": str(record.folder), "short": record.short} for record in self.records]
        return json.dumps(plain({"runs": rows, "notes": self.notes}), indent=2)


def experiment_report(folders: Sequence[str | os.PathLike[str]]) -> ExperimentReport:
    """Lists runs, and compares what came out of them.

    Args:
        folders: of runs, or folders in which such folders are; in one of the latter others are passed over.

    Raises:
        ArgumentError: none is given, or there is no run in one of them.
        DataError: a file of a run is damaged; it is named.
    """
    if not folders:
        raise ArgumentError("folders: there is none; give folders of runs, or the one that they are in.")
    found = dict[Path, ExperimentRecord]()
    for given in folders:
        place = Path(given)
        if not place.is_dir():
            raise DataFileError(f"{place}: there is no such folder.")
        runs = [place] if (place / ASKED).is_file() else sorted(path.parent for path in place.glob(f"*/{ASKED}"))
        if not runs:
            raise ArgumentError(f"{place}: there is no run in it: neither it nor a folder in it has {ASKED}.")
        for run in runs:
            found.setdefault(run.resolve(), record_of(run.resolve()))
    records = tuple(found.values())
    return ExperimentReport(records, tuple(_differing(records)))


def record_of(path: Path) -> ExperimentRecord:
    """A run read from its folder.

    Raises:
        DataError: a file is damaged.
    """
    folder = ExperimentFolder(path)
    saved = folder.saved()
    missing = {"kind", "use_case", "model", "optim_level", "structured", "eval_metric"} - set(saved["arguments"])
    if missing:
        raise DataError(f"{path / ASKED}: its arguments lack {sorted(missing)[0]}: another version wrote it.")
    figures = folder.read_yaml("metrics.yaml") if (path / "metrics.yaml").is_file() else None
    short = None
    if folder.is_complete:
        lines = read_text(path / COMPLETE).splitlines()
        short = tuple(line for line in lines if line and line != _FINE)
    record = ExperimentRecord(
        path, saved.pop("arguments"), saved, figures, _logged_epochs(path / "logs" / "log.jsonl"), short
    )
    try:
        record.row()
    except (KeyError, TypeError) as error:
        raise DataError(f"{path / 'metrics.yaml'}: {error} is missing: it is damaged, or of another version.") from None
    return record


def _logged_epochs(path: Path) -> tuple[Mapping[str, Any], ...]:
    """Epochs by stage and number, the last of each; a line that a kill has cut off is none."""
    found = dict[tuple[str, int], Mapping[str, Any]]()
    for line in read_text(path).splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
            key = (str(entry["stage"]), int(entry["epoch"]))
            entry["epochs"], entry["loss"], entry["metrics"], entry["phase"]  # what a report reads
        except (ValueError, KeyError, TypeError):
            continue
        found[key] = entry
    return tuple(found[key] for key in sorted(found))  # "dense" stands before "recipe"


def _differing(records: Sequence[ExperimentRecord]) -> list[str]:
    """Why figures of runs mean other things: other data, another split, another metric."""
    if len({record.arguments["use_case"] for record in records}) > 1:
        return ["These are runs of several use cases: their metrics do not compare."]
    notes = []
    for what, value in (
        ("data", lambda record: record.about.get("fingerprint")),
        ("samples to measure with", lambda record: (record.about.get("split"), record.about.get("val"))),
        ("metric", lambda record: record.arguments["eval_metric"]),
    ):
        groups = dict[Any, str]()
        for record in records:
            groups.setdefault(value(record), record.folder.name)
        if len(groups) > 1:
            notes.append(f"{' and '.join(groups.values())} differ in their {what}: their metrics do not compare.")
    return notes
