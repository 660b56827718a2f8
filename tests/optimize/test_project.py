"""A project on disk: what goes in comes out equal, names and files are its own, and nothing is half written."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparsify.analysis.loss import loss_profile
from sparsify.analysis.performance import PerformanceProfile
from sparsify.errors import ArgumentError, DataError, DataFileError, ExportError, StateError
from sparsify.onnx.benchmark import benchmark_onnx
from sparsify.onnx.export import export_onnx
from sparsify.optimize.project import Project, ProjectSettings
from sparsify.optimize.pruning_profiles import PruningSettings
from sparsify.optimize.recipe_creation import create_recipe
from sparsify.optimize.stages import OriginalTraining
from sparsify.output.files import replacing
from sparsify.recipe import Recipe

SAMPLE = (torch.zeros(2, 3, 8, 8),)
TRAINING = OriginalTraining(30, 0.1, 0.001)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("projects") / "digits"
    Project.create(folder, network(), ProjectSettings(description="a test", training=TRAINING), sample_inputs=SAMPLE)
    return folder


@pytest.fixture
def project(saved: Path, tmp_path: Path) -> Project:
    import shutil

    return Project.open(shutil.copytree(saved, tmp_path / "digits"))


def performance() -> PerformanceProfile:
    return PerformanceProfile((), 1.5, None, {"batch 8, 1 thread, float": 2.0}, 1, 1, "abc", {"onnxruntime": "1"})


def test_everything_comes_back_equal(project: Project) -> None:
    loss = loss_profile(network(), progress=False)
    settings = PruningSettings(sparsity=0.8, overrides={"2": 0.5})
    recipe = create_recipe(network(), SAMPLE, settings=settings, training=TRAINING)
    measured = benchmark_onnx(project.model_path, iterations=2)
    project.add_profile("weights", loss)
    project.add_profile("this machine", performance())
    project.add_optimization("80 percent", recipe, settings)
    project.add_optimization("by hand", Recipe.from_yaml("modifiers: [!EpochRangeModifier {end_epoch: 3.0}]"))
    project.add_benchmark("dense", measured)

    again = Project.open(project.folder)
    assert again.settings == ProjectSettings("digits", "a test", TRAINING)
    assert again.loss_profiles == {"weights": loss} and again.performance_profiles == {"this machine": performance()}
    assert again.benchmarks == {"dense": measured}
    made = again.optimizations
    assert made["80 percent"].recipe == recipe and made["80 percent"].settings == settings
    assert made["80 percent"].text.startswith(recipe.to_yaml().splitlines()[0])
    assert made["by hand"].settings is None and made["by hand"].recipe.max_epochs == 3
    assert {layer.name for layer in again.analysis.layers} == {"0", "2", "5"}
    assert len(again.table().rows) == 5 and "80 percent" in str(again)
    suffixes = {path.suffix for path in project.folder.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".yaml", ".onnx"}


def test_later_settings_leave_recipes_alone(project: Project) -> None:
    path = project.add_optimization("one", create_recipe(network(), SAMPLE, sparsity=0.8, training=TRAINING))
    before = path.read_bytes()
    project.change(training=OriginalTraining(90, 0.2, 0.01), name="other")
    assert path.read_bytes() == before
    again = Project.open(project.folder).settings
    assert again.name == "other" and again.training == OriginalTraining(90, 0.2, 0.01)


def test_a_file_is_a_model_too(tmp_path: Path) -> None:
    export_onnx(network(), SAMPLE, tmp_path / "net.onnx")
    project = Project.create(tmp_path / "project", tmp_path / "net.onnx")
    assert project.model_path.read_bytes() == (tmp_path / "net.onnx").read_bytes()
    assert {layer.name for layer in project.analysis.layers} == {"0", "2", "5"}
    assert project.settings.name == "project"


def test_an_empty_folder_will_do_and_a_full_one_will_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    Project.create(tmp_path / "empty", network(), sample_inputs=SAMPLE)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ArgumentError, match="there is something already"):
        Project.create(tmp_path / "full", network(), sample_inputs=SAMPLE)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


class Broken(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if float(x.sum()) > 0:
            return x
        return torch.linalg.eigvals(x).real if x.sum() < -1 else -x


def test_what_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises((ExportError, ArgumentError)):
        Project.create(tmp_path / "project", Broken(), sample_inputs=(torch.zeros(2, 2),))
    (tmp_path / "not.onnx").write_text("not a model")
    with pytest.raises(DataError):
        Project.create(tmp_path / "project", tmp_path / "not.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["not.onnx"]


def test_a_folder_that_is_filled_meanwhile_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, save = tmp_path / "project", Project.save

    def filling(project: Project) -> None:
        save(project)
        target.mkdir()
        (target / "mine.txt").write_text("mine")

    monkeypatch.setattr(Project, "save", filling)
    with pytest.raises(DataFileError, match="cannot write"):
        Project.create(target, network(), sample_inputs=SAMPLE)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["project", "project/mine.txt"]


def test_names_are_taken_once(project: Project) -> None:
    project.add_profile("one", performance())
    with pytest.raises(StateError, match="there is one of that name"):
        project.add_profile("one", performance())
    project.add_profile("one", dataclasses.replace(performance(), total_ms=9.0), replace=True)
    assert project.performance_profiles["one"].total_ms == 9.0


def test_replacing_without_settings_forgets_the_old_ones(project: Project) -> None:
    recipe = Recipe.from_yaml("modifiers: [!EpochRangeModifier {end_epoch: 3.0}]")
    project.add_optimization("one", recipe, PruningSettings())
    project.add_optimization("one", recipe, replace=True)
    assert project.optimizations["one"].settings is None


def test_remove_takes_out_what_was_added(project: Project) -> None:
    recipe = Recipe.from_yaml("modifiers: [!EpochRangeModifier {end_epoch: 3.0}]")
    path = project.add_optimization("one", recipe, PruningSettings())
    project.remove(path)
    assert not project.optimizations and not list((project.folder / "optimizations").iterdir())
    with pytest.raises(ArgumentError, match="is no profile, optimization or benchmark"):
        project.remove(project.model_path)
    assert project.model_path.exists()


@pytest.mark.parametrize("name", ["../out", "a/b", "", ".hidden", "a\n", "x" * 101, "ends.", 3])
def test_names_that_are_no_files_are_refused(project: Project, name: Any) -> None:
    with pytest.raises(ArgumentError, match="cannot be the name of a file"):
        project.add_profile(name, performance())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.add_profile("a", 3), "a int is no profile"),
        (lambda p: p.add_optimization("a", "text"), "a str is no Recipe"),
        (lambda p: p.add_benchmark("a", 3), "a int is none"),
        (lambda p: p.change(nam="x"), "there is no 'nam'. Did you mean 'name'"),
        (lambda p: p.change(batch_size=0), "batch_size: 0 is no whole number"),
        (lambda p: p.change(name=3), "name: 3 is no text"),
    ],
)
def test_wrong_arguments_are_refused(project: Project, call: Any, message: str) -> None:
    before = (project.folder / "project.json").read_bytes()
    with pytest.raises(ArgumentError, match=message):
        call(project)
    assert (project.folder / "project.json").read_bytes() == before and project.settings.name == "digits"


def test_a_torch_model_needs_inputs(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="sample_inputs"):
        Project.create(tmp_path / "project", network())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "training": {"epochs": 0}}'])
def test_a_broken_file_is_refused(project: Project, text: str) -> None:
    (project.folder / "project.json").write_text(text)
    with pytest.raises(DataError, match=r"project\.json"):
        Project.open(project.folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latency_p50_ms": "fast"}, "latency_p50_ms is 'fast'"),
        ({"providers": [1]}, r"providers\.0 is 1"),
        ({"more": 1}, "more is unknown"),
        ({"batch_size": None}, "batch_size is None"),
    ],
)
def test_a_benchmark_with_a_wrong_field_is_refused(project: Project, change: dict[str, Any], message: str) -> None:
    path = project.add_benchmark("one", benchmark_onnx(project.model_path, iterations=2))
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataError, match=message):
        _ = project.benchmarks


@pytest.mark.parametrize("text", ['{"sparsity": "half"}', '{"sparse": 0.5}', "[]", "{"])
def test_settings_of_an_optimization_are_checked(project: Project, text: str) -> None:
    path = project.add_optimization("one", create_recipe(network(), sparsity=0.5), PruningSettings(0.5))
    assert project.optimizations["one"].settings == PruningSettings(0.5)
    path.with_suffix(".json").write_text(text)
    with pytest.raises(DataError, match="these are no settings"):
        _ = project.optimizations


def test_no_project_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match="Is this the folder of a project"):
        Project.open(tmp_path)


def test_half_written_files_are_passed_over(project: Project) -> None:
    project.add_profile("one", performance())
    (project.folder / "profiles" / "performance" / ".two.json.x.tmp").write_text("{")
    (project.folder / "profiles" / "performance" / ".two.json").write_text("{")
    assert list(project.performance_profiles) == ["one"]


def test_profiles_of_another_kind_are_refused(project: Project) -> None:
    path = project.add_profile("one", loss_profile(network(), progress=False))
    path.write_text(json.dumps({"format": 1, "rows": []}))
    with pytest.raises(DataError, match=r"one\.json"):
        _ = project.loss_profiles


def test_a_kill_while_an_optimization_is_replaced_leaves_both_or_neither(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Recipe.from_yaml("modifiers: [!EpochRangeModifier {end_epoch: 3.0}]")
    second = Recipe.from_yaml("modifiers: [!EpochRangeModifier {end_epoch: 5.0}]")
    pairs = [
        (first, PruningSettings(0.5)),
        (second, PruningSettings(0.7)),
        (first, None),
        (second, PruningSettings(0.9)),
    ]
    project.add_optimization("one", *pairs[0])
    for before, after in itertools.pairwise(pairs):
        for writes in range(3):
            count = itertools.count()

            def dying(path: Path, limit: int = writes, count: Any = count) -> Any:
                if next(count) >= limit:
                    raise KeyboardInterrupt
                return replacing(path)

            monkeypatch.setattr("sparsify.optimize.project.replacing", dying)
            with contextlib.suppress(KeyboardInterrupt):
                project.add_optimization("one", *after, replace=True)
            found = project.optimizations["one"]
            assert (found.recipe, found.settings) in (before, after)
        assert (found.recipe, found.settings) == after


@pytest.mark.parametrize(
    "text", ["[" * 100000, "{}", '{"a": 1}', "nul", '{"settings by the recipe\'s digest": 3}', "[]"]
)
def test_files_that_were_edited_are_data_errors(project: Project, text: str) -> None:
    recipe = Recipe.from_yaml("modifiers: [!EpochRangeModifier {end_epoch: 3.0}]")
    settings = project.add_optimization("one", recipe, PruningSettings()).with_suffix(".json")
    profile = project.add_profile("one", performance())
    for path, read in (
        (settings, lambda: project.optimizations),
        (profile, lambda: project.performance_profiles),
        (project.folder / "analysis.json", lambda: project.analysis),
        (project.folder / "project.json", lambda: Project.open(project.folder)),
    ):
        if path == settings and text == "{}":
            continue  # All have defaults.
        path.write_text(text)
        with pytest.raises(DataError):
            read()
