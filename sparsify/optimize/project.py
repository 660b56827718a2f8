"""A project on disk: a model, its profiles, and the optimizations and benchmarks made of it, side by side.

Plain files: JSON for settings, profiles and benchmarks, YAML for recipes, ONNX for the model. Each is written whole or
not at all; nothing is pickled, and nothing is run when a project is opened.

    project.json                      what it is called, and how the model was trained
    model.onnx, analysis.json
    profiles/loss/NAME.json           profiles/performance/NAME.json
    optimizations/NAME.yaml           the recipe, with NAME.json beside it: the settings it was made with
    benchmarks/NAME.json
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.analysis.analyze import analyze_model
from sparsify.analysis.layers import ModelAnalysis
from sparsify.analysis.loss import LossProfile
from sparsify.analysis.performance import PerformanceProfile
from sparsify.errors import ArgumentError, DataError, DataFileError, StateError, did_you_mean
from sparsify.onnx.benchmark import Benchmark
from sparsify.onnx.export import export_onnx
from sparsify.onnx.model_files import files_beside
from sparsify.onnx.runtime import read_model
from sparsify.optimize.pruning_profiles import PruningSettings
from sparsify.optimize.stages import OriginalTraining
from sparsify.output.files import read_text, replacing
from sparsify.output.json_values import EXACT, from_json_object, json_object, json_text, plain
from sparsify.output.tables import Column, Displayed, Table
from sparsify.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn

    from sparsify.model.signature import InputsLike

__all__ = ["Optimization", "Project", "ProjectSettings"]

PROJECT_FORMAT = 1
"""The format of project.json; raised when it changes, so that an old one is not misread."""
MADE_WITH = "settings by the recipe's digest"
"""The key in the file beside a recipe: a recipe is replaced in one step, and its settings with it."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,99}")


@dataclass(frozen=True)
class ProjectSettings:
    """Settings of a project; they may be changed later, which leaves optimizations as they are.

    Attributes:
        name: what it is called.
        description: in the user's own words.
        training: how the dense model was trained, where that is known.
        batch_size, threads: what benchmarks and profiles of it are made with by default.
    """

    __pydantic_config__ = EXACT

    name: str = ""
    description: str = ""
    training: OriginalTraining | None = None
    batch_size: int = 1
    threads: int = 1

    def __post_init__(self) -> None:
        for what in ("batch_size", "threads"):
            value = getattr(self, what)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"{what}: {value!r} is no whole number of 1 or more.")
        for what in ("name", "description"):
            if not isinstance(getattr(self, what), str):
                raise ArgumentError(f"{what}: {getattr(self, what)!r} is no text.")


@dataclass(frozen=True)
class Optimization:
    """A recipe, and the settings of the pruning profile that it was made with, where there are any."""

    recipe: Recipe
    settings: PruningSettings | None = None
    text: str = field(default="", compare=False)
    """The recipe as it is written, comments and all."""


class Project(Displayed):
    """A folder that holds everything about compressing one model. Made by `create` and `open`.

    Everything is read from the disk when it is asked for, and everything added is on the disk when the call returns.

    Args:
        folder: the folder, which exists.
        settings: those that its project.json holds.
    """

    def __init__(self, folder: Path, settings: ProjectSettings) -> None:
        self._folder = folder
        self._settings = settings

    # ------------------------------------------------------------------ begin

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        model: nn.Module | str | os.PathLike[str],
        settings: ProjectSettings | None = None,
        *,
        sample_inputs: InputsLike | None = None,
    ) -> Project:
        """Makes the folder, with the model as an ONNX file and its analysis.

        Args:
            folder: must not exist yet, or be empty.
            model: a torch model, which is exported, or an ONNX file, which is copied, with the files of its values.
            settings: None: the folder's name, and defaults.
            sample_inputs: of a torch model; of a file, arrays, where it leaves sizes free.

        Raises:
            ArgumentError: the folder holds something, or a torch model comes without inputs.
            ExportError: the model cannot be exported. DataError: the file is none. Nothing is left behind then.
        """
        from torch import nn

        target = Path(folder)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ArgumentError(f"{target}: there is something already; give a new folder, or open the project in it.")
        if isinstance(model, nn.Module) and sample_inputs is None:
            raise ArgumentError("sample_inputs: a torch model is exported and analyzed on inputs; give some.")
        settings = settings or ProjectSettings()
        if not settings.name:
            settings = dataclasses.replace(settings, name=target.name)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        except OSError as error:
            raise DataFileError(f"cannot write {target}: {error.strerror or error}.") from error
        try:
            made.chmod(0o755)
            if isinstance(model, nn.Module):
                assert sample_inputs is not None  # refused above
                analysis = analyze_model(model, sample_inputs)
                export_onnx(model, sample_inputs, made / "model.onnx")
            else:
                analysis = analyze_model(Path(model), sample_inputs)
                shutil.copyfile(model, made / "model.onnx")
                folder = Path(model).resolve().parent
                for values in files_beside(read_model(model), model):
                    place = made / values.relative_to(folder)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(values, place)
            project = cls(made, settings)
            project._write("analysis.json", analysis.to_json())
            project.save()
            # An empty folder is replaced, one that was filled meanwhile is not.
            made.replace(target)
        except OSError as error:
            if isinstance(error, DataFileError):
                raise
            raise DataFileError(f"cannot write {target}: {error.strerror or error}.") from error
        finally:
            shutil.rmtree(made, ignore_errors=True)
        return cls(target, settings)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Project:
        """The project in `folder`.

        Raises:
            DataFileError: there is none. DataError: its file is broken, or of another version.
        """
        path = Path(folder) / "project.json"
        try:
            text = read_text(path)
        except DataFileError as error:
            raise DataFileError(f"{error} Is this the folder of a project?") from error
        try:
            state = json_object(text)
            if state.pop("format") != PROJECT_FORMAT:
                raise DataError(f"{path}: of another version of sparsify; this one reads format {PROJECT_FORMAT}.")
            return cls(Path(folder), from_json_object(ProjectSettings, state))
        except DataError:
            raise
        except (ValueError, KeyError) as error:
            raise DataError(f"{path}: this is no project: {error}") from error

    def save(self) -> None:
        """Writes the settings. All else is written when it is added."""
        self._write("project.json", json_text(self._settings, {"format": PROJECT_FORMAT}, indent=2))

    # ------------------------------------------------------------------ what it is

    @property
    def folder(self) -> Path:
        return self._folder

    @property
    def model_path(self) -> Path:
        """The dense model, as an ONNX file."""
        return self._folder / "model.onnx"

    @property
    def settings(self) -> ProjectSettings:
        return self._settings

    def change(self, **settings: Any) -> ProjectSettings:
        """Changes settings and saves them. Optimizations that were made with the old ones stay as they are.

        Raises:
            ArgumentError: no such setting, or a value that cannot be.
        """
        known = [one.name for one in dataclasses.fields(ProjectSettings)]
        for name in settings:
            if name not in known:
                raise ArgumentError(f"settings: there is no {name!r}.{did_you_mean(name, known)}")
        self._settings = dataclasses.replace(self._settings, **settings)
        self.save()
        return self._settings

    @property
    def analysis(self) -> ModelAnalysis:
        """The layers of the dense model."""
        return ModelAnalysis.from_json(read_text(self._folder / "analysis.json"))

    # ------------------------------------------------------------------ what is in it

    @property
    def loss_profiles(self) -> Mapping[str, LossProfile]:
        return {name: LossProfile.load(path) for name, path in self._files("profiles/loss", ".json").items()}

    @property
    def performance_profiles(self) -> Mapping[str, PerformanceProfile]:
        found = self._files("profiles/performance", ".json")
        return {name: PerformanceProfile.load(path) for name, path in found.items()}

    @property
    def optimizations(self) -> Mapping[str, Optimization]:
        found = {}
        for name, path in self._files("optimizations", ".yaml").items():
            text = read_text(path)
            found[name] = Optimization(Recipe.load(path), _settings_of(path.with_suffix(".json"), text), text)
        return found

    @property
    def benchmarks(self) -> Mapping[str, Benchmark]:
        found = {}
        for name, path in self._files("benchmarks", ".json").items():
            try:
                found[name] = from_json_object(Benchmark, json_object(read_text(path)))
            except ValueError as error:
                raise DataError(f"{path}: this is no benchmark: {error}") from error
        return found

    def add_profile(self, name: str, profile: LossProfile | PerformanceProfile, *, replace: bool = False) -> Path:
        """Keeps a profile under a name of its own. Returns the path of its file.

        Args:
            name: of the file, without an ending.
            profile: of loss or of performance.
            replace: whether one of the same name is replaced.

        Raises:
            ArgumentError: it is none, or the name cannot be a file's. StateError: there is one of that name.
        """
        if isinstance(profile, LossProfile):
            kind = "loss"
        elif isinstance(profile, PerformanceProfile):
            kind = "performance"
        else:
            raise ArgumentError(f"profile: a {type(profile).__name__} is no profile of loss or performance.")
        path = self._free(f"profiles/{kind}", name, ".json", replace)
        profile.save(path)
        return path

    def add_optimization(
        self, name: str, recipe: Recipe, settings: PruningSettings | None = None, *, replace: bool = False
    ) -> Path:
        """Keeps a recipe, with the settings that it was made with. Returns the path of its file.

        Args:
            name: of the file, without an ending.
            recipe: the recipe.
            settings: those of the pruning profile that it was made with.
            replace: whether one of the same name is replaced.

        Raises:
            ArgumentError: it is none, or the name cannot be a file's. StateError: there is one of that name.
        """
        if not isinstance(recipe, Recipe):
            raise ArgumentError(f"recipe: a {type(recipe).__name__} is no Recipe; read it with Recipe.load.")
        path = self._free("optimizations", name, ".yaml", replace)
        beside = path.with_suffix(".json")
        text = recipe.to_yaml()
        if settings is not None or beside.exists():
            # Until the recipe is written, the settings of the old one stand beside the new ones.
            known = {_recipe_digest(text): settings}
            if path.exists():
                old = read_text(path)
                known = {_recipe_digest(old): _settings_of(beside, old), **known}
            state = {MADE_WITH: {key: plain(one, finite=False) for key, one in known.items()}}
            with replacing(beside) as temporary:
                temporary.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        with replacing(path) as temporary:
            temporary.write_bytes(text.encode())
        if settings is None:
            beside.unlink(missing_ok=True)
        return path

    def add_benchmark(self, name: str, benchmark: Benchmark, *, replace: bool = False) -> Path:
        """Keeps the result of `benchmark_onnx`. Returns the path of its file.

        Args:
            name: of the file, without an ending.
            benchmark: the result.
            replace: whether one of the same name is replaced.

        Raises:
            ArgumentError: it is none, or the name cannot be a file's. StateError: there is one of that name.
        """
        if not isinstance(benchmark, Benchmark):
            raise ArgumentError(f"benchmark: a {type(benchmark).__name__} is none; give what benchmark_onnx gave.")
        path = self._free("benchmarks", name, ".json", replace)
        with replacing(path) as temporary:
            temporary.write_text(json_text(benchmark, {}, indent=2) + "\n", encoding="utf-8")
        return path

    def remove(self, path: str | os.PathLike[str]) -> None:
        """Deletes the file at `path`, which an `add_...` returned.

        Raises:
            ArgumentError: it is not one of this project's.
        """
        target = Path(path)
        known = {
            file
            for room, suffix in (
                ("profiles/loss", ".json"),
                ("profiles/performance", ".json"),
                ("optimizations", ".yaml"),
                ("benchmarks", ".json"),
            )
            for file in self._files(room, suffix).values()
        }
        if target not in known:
            raise ArgumentError(f"{target}: this is no profile, optimization or benchmark of {self._folder}.")
        target.unlink()
        if target.suffix == ".yaml":
            target.with_suffix(".json").unlink(missing_ok=True)

    def table(self) -> Table:
        """Its profiles, optimizations and benchmarks, a row each."""
        rows: list[dict[str, object]] = []
        for name, loss in self.loss_profiles.items():
            rows.append({"what": "loss profile", "name": name, "said": f"{loss.method}, {loss.of}"})
        for name, performance in self.performance_profiles.items():
            rows.append({"what": "performance profile", "name": name, "said": f"{performance.total_ms:.3f} ms"})
        for name, made in self.optimizations.items():
            asked = "" if made.settings is None else f", sparsity {made.settings.sparsity:g}"
            rows.append({"what": "optimization", "name": name, "said": f"{made.recipe.max_epochs:g} epochs{asked}"})
        for name, measured in self.benchmarks.items():
            text = f"{measured.latency_p50_ms:.3f} ms, batch {measured.batch_size}"
            rows.append({"what": "benchmark", "name": name, "said": text})
        columns = (Column("what", "What"), Column("name", "Name", left=True), Column("said", "It says", left=True))
        return Table.of(f"{self._settings.name} in {self._folder}", rows, columns)

    def _parts(self) -> list[Table | str]:
        return [self.table()]

    # ------------------------------------------------------------------ files

    def _files(self, room: str, suffix: str) -> dict[str, Path]:
        folder = self._folder / room
        if not folder.is_dir():
            return {}
        # What begins with a dot is half written, and was left by a process that was killed.
        return {p.stem: p for p in sorted(folder.glob(f"*{suffix}")) if not p.name.startswith(".")}

    def _free(self, room: str, name: str, suffix: str, replace: bool) -> Path:
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name.endswith((".", " ")):
            raise ArgumentError(
                f"name: {name!r} cannot be the name of a file; use letters, digits, spaces, '.', '_' and '-'."
            )
        path = self._folder / room / f"{name}{suffix}"
        if path.exists() and not replace:
            raise StateError(f"{path}: there is one of that name; give another, or replace=True.")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataFileError(f"cannot write {path}: {error.strerror or error}.") from error
        return path

    def _write(self, name: str, text: str) -> None:
        with replacing(self._folder / name) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")


def _recipe_digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def _settings_of(path: Path, recipe: str) -> PruningSettings | None:
    """The settings that a recipe was made with, in the file beside it; those of the newest where it was edited.

    Raises:
        DataError: the file holds something else.
    """
    if not path.exists():
        return None
    try:
        state = json_object(read_text(path))
        if MADE_WITH in state:
            known = state[MADE_WITH]
            if not isinstance(known, dict) or not known or len(state) > 1:
                raise ValueError(f"{MADE_WITH} is {str(known)[:60]}")
            state = known.get(_recipe_digest(recipe), list(known.values())[-1])
        return None if state is None else from_json_object(PruningSettings, state)
    except ValueError as error:
        if isinstance(error, DataFileError):
            raise
        raise DataError(f"{path}: these are no settings: {error}") from error
