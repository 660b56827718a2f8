"""Runs are listed and compared from their folders; each has a page of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from sparsify import DataError, SparsifyError, experiment_report
from sparsify.cli.main import main
from sparsify.experiments.folder import ExperimentFolder
from sparsify.experiments.run_page import report_page, run_page
from sparsify.experiments.run_report import record_of
from sparsify.experiments.settings import ExperimentSettings

FIGURES: dict[str, Any] = {
    "metric": "accuracy",
    "dense": {"torch": {"accuracy": 0.9}, "onnxruntime": {"accuracy": 0.9}},
    "compressed": {"torch": {"accuracy": 0.88}, "onnxruntime": {"accuracy": 0.88}},
    "sparsity": {
        "asked": 0.7,
        "of_the_pruned": 0.7,
        "of_all_weights": 0.5,
        "kept_dense": {"head": "it gives the labels"},
        "layers": {"<a>.weight": 0.7},
    },
    "size": {"dense": {"bytes": 4_000_000, "gzip": 3_500_000}, "compressed": {"bytes": 1_000_000, "gzip": 400_000}},
    "speed": {"times_as_fast": 0.9, "lowest": 0.8, "highest": 1.0},
    "verification": {"agrees": True, "exact": True, "why": ""},
    "floating": {},
}


def entry(stage: str, epoch: int, **more: Any) -> dict[str, Any]:
    return {
        **{"stage": stage, "phase": "dense" if stage == "dense" else "pruning" if epoch < 2 else "int8"},
        **{"epoch": epoch, "epochs": 3, "loss": 1.0 / epoch, "metrics": {"accuracy": 0.5 + 0.1 * epoch}},
        **{"sparsity": None if stage == "dense" else 0.35 * epoch, **more},
    }


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., ExperimentFolder]:
    """Makes the folder of a run that ended, or of one that did not."""

    def made(name: str, *, complete: str | None = "ok", figures: Any = FIGURES, **about: Any) -> ExperimentFolder:
        settings = ExperimentSettings("training-aware", "cv-classification", "m", "d", eval_metric="accuracy")
        said = {"fingerprint": "f", "split": "given: val", "train": 8, "val": 4, **about}
        folder = ExperimentFolder.create(tmp_path / name, settings, said)
        for epoch in (entry("dense", 1), entry("recipe", 1), entry("recipe", 2)):
            folder.log(epoch)
        if figures is not None:
            folder.write_yaml("metrics.yaml", figures)
        if complete is not None:
            folder.finish(complete)
        return folder

    return made


def test_runs_stand_side_by_side(run: Callable[..., ExperimentFolder], tmp_path: Path) -> None:
    run("a"), run("b", complete="falls short: 60 %."), run("c", complete=None, figures=None)
    (tmp_path / "other").mkdir()
    found = experiment_report([tmp_path, tmp_path / "a"])
    rows = {row["run"]: row for row in json.loads(found.to_json())["runs"]}
    assert {name: row["state"] for name, row in rows.items()} == {
        "a": "complete",
        "b": "falls short",
        "c": "recipe 2/3",
    }
    assert rows["a"]["change"] == pytest.approx(-0.02) and rows["a"]["gzip_bytes"] == 400_000
    assert rows["c"]["dense"] is None and rows["c"]["metric"] == "accuracy"
    text = str(found)
    assert "b: falls short: 60 %." in text and "-0.0200" in text and "0.40" in text and not found.notes


def test_runs_that_do_not_compare_are_named(run: Callable[..., ExperimentFolder], tmp_path: Path) -> None:
    run("a"), run("b", fingerprint="g", split="seeded: 4 of 12 samples, fraction 0.3, seed 1"), run("c")
    notes = experiment_report([tmp_path]).notes
    assert notes[0] == "a and b differ in their data: their metrics do not compare."
    assert notes[1].startswith("a and b differ in their samples to measure with")


def test_an_epoch_that_was_trained_twice_counts_once(run: Callable[..., ExperimentFolder]) -> None:
    folder = run("a", complete=None)
    log = folder.path / "logs" / "log.jsonl"
    log.write_bytes(log.read_bytes() + b'{"stage": "recipe", "ep')
    folder.log(entry("recipe", 2, loss=0.25))
    folder.log(entry("recipe", 3))
    found = record_of(folder.path).epochs
    assert [(e["stage"], e["epoch"]) for e in found] == [("dense", 1), ("recipe", 1), ("recipe", 2), ("recipe", 3)]
    assert found[2]["loss"] == 0.25


def test_the_page_of_a_run_has_its_figures_curves_and_layers(run: Callable[..., ExperimentFolder]) -> None:
    page = run_page(record_of(run("a").path))
    parsed = ElementTree.fromstring(page.removeprefix("<!doctype html>\n").replace('<meta charset="utf-8">', ""))
    assert [title.text for title in parsed.iter("h2")] == ["loss", "accuracy", "sparsity of the pruned weights"]
    assert len(list(parsed.iter("circle"))) == 3 + 3 + 2
    text = "".join(parsed.itertext())
    assert "0.90 times (slower than)" in text and "<a>.weight" in text and "it gives the labels" in text
    assert "http" not in page and "<script" not in page
    page = run_page(record_of(run("b", complete=None, figures=None).path))
    assert "recipe 2/3" in page


def test_the_command_writes_a_table_json_and_a_page(
    run: Callable[..., ExperimentFolder], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("a").write_page("page")
    assert main(["report", str(tmp_path), "--html", str(tmp_path / "all.html")]) == 0
    assert "times as fast" in capsys.readouterr().out
    assert "a/report.html" in (tmp_path / "all.html").read_text()
    assert main(["report", str(tmp_path / "a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["bytes"] == 1_000_000
    assert report_page(experiment_report([tmp_path / "a"])).count("<tr>") == 2


def test_folders_without_runs_and_damaged_ones_are_refused(
    run: Callable[..., ExperimentFolder], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path / "gone")]) == 2 and "no such folder" in capsys.readouterr().err
    with pytest.raises(SparsifyError, match="no run in it"):
        experiment_report([tmp_path])
    with pytest.raises(SparsifyError, match="there is none"):
        experiment_report([])
    folder = run("a", figures={**FIGURES, "size": {"dense": {}}})
    with pytest.raises(DataError, match=r"metrics.yaml: 'bytes' is missing"):
        experiment_report([tmp_path])
    saved = yaml.safe_load((folder.path / "experiment.yaml").read_text())
    del saved["arguments"]["eval_metric"]
    (folder.path / "experiment.yaml").write_text(yaml.safe_dump(saved))
    with pytest.raises(DataError, match="lack eval_metric"):
        experiment_report([tmp_path])
