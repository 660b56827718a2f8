"""Models to transfer from: a folder with an index. What training-aware made is filed here, float and with its zeros."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sparsify.errors import ArgumentError, DataError, DataFileError
from sparsify.experiments.folder import check_experiment_id
from sparsify.output.files import read_text, replacing
from sparsify.output.tensor_files import file_digest

if TYPE_CHECKING:
    from sparsify.experiments.settings import ExperimentSettings
    from sparsify.experiments.tasks import RunTask
    from sparsify.optimize.levels import OptimLevel

__all__: list[str] = []

INDEX = "index.yaml"
BASE_SIZES = ("largest", "medium", "smallest")
BASE_FORMS = ("dense", "sparse")
VARIABLE = "SPARSIFY_REGISTRY"


@dataclass(frozen=True)
class RegistryEntry:
    """One model to transfer from.

    Attributes:
        name: unique in the registry.
        use_case: that it was trained for.
        size: "largest", "medium" or "smallest", as optim levels choose.
        form: "dense", or "sparse" where its zeros are to be kept. INT8 is no form: it is quantized in the transfer.
        source: a folder, relative to the registry, or a hub id.
        sha256: of its weights; "" for a hub id.
        sparsity: of the weights that were pruned.
        metric: {name: value} on the data that it was trained on.
        licence: as its user says; "" where nothing is said.
    """

    name: str
    use_case: str
    size: str
    form: str
    source: str
    sha256: str = ""
    sparsity: float = 0.0
    metric: Mapping[str, float] | None = None
    licence: str = ""
    place: str = ""

    def located(self, folder: Path) -> RegistryEntry:
        """With `place`, where the model is."""
        inside = folder / self.source
        return RegistryEntry(**{**asdict(self), "place": str(inside) if inside.is_dir() else self.source})


class Registry:
    """A folder with `index.yaml`.

    Args:
        folder: of the registry; it need not be there yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def at(cls, folder: str | os.PathLike[str] | None) -> Registry:
        """The one that was named, else that of the environment, else the one in the user's home."""
        return cls(
            Path(folder or os.environ.get(VARIABLE) or Path.home() / ".local" / "share" / "sparsify" / "registry")
        )

    def entries(self) -> list[RegistryEntry]:
        """All entries.

        Raises:
            DataError: the index is damaged.
        """
        path = self.folder / INDEX
        if not path.is_file():
            return []
        try:
            found = yaml.safe_load(read_text(path)) or []
        except yaml.YAMLError as error:
            raise DataError(f"{path} is no YAML: {str(error).splitlines()[0]}") from error
        names = {field.name for field in fields(RegistryEntry)} - {"place"}
        needed = {"name", "use_case", "size", "form", "source"}
        if not isinstance(found, list):
            raise DataError(f"{path}: expected a list of entries, found a {type(found).__name__}.")
        for number, entry in enumerate(found, 1):
            if not isinstance(entry, dict) or needed - set(entry) or set(entry) - names:
                raise DataError(f"{path}: entry {number}: expected {', '.join(sorted(needed))}; it has {entry!r}.")
            for field, known in (("size", BASE_SIZES), ("form", BASE_FORMS)):
                if entry[field] not in known:
                    raise DataError(f"{path}: entry {number}: {field} {entry[field]!r} is none of {', '.join(known)}.")
        return [RegistryEntry(**entry) for entry in found]

    def choose(self, use_case: str, level: OptimLevel) -> RegistryEntry:
        """The model that a level transfers from: of its size and form.

        Raises:
            DataFileError: there is none; the message names the folder and the entry that is missing.
            DataError: its weights are not those that were filed.
        """
        form = "sparse" if level.sparse else "dense"
        entries = self.entries()
        fitting = [e for e in entries if (e.use_case, e.size, e.form) == (use_case, level.size, form)]
        if not fitting:
            there = ", ".join(f"{e.name} ({e.use_case}, {e.size}, {e.form})" for e in entries) or "nothing"
            raise DataFileError(
                f"model: the registry {self.folder} has no {level.size} {form} model for {use_case}; it has {there}. "
                "Give --model, or file one: sparsify.run training-aware ... --register NAME."
            )
        chosen = fitting[-1].located(self.folder)
        if chosen.sha256 and _digest(Path(chosen.place)) != chosen.sha256:
            raise DataError(f"{chosen.place}: its weights are not those that were filed: {chosen.name} was changed.")
        return chosen

    def check_new(self, name: str) -> None:
        """Refuses a name that is taken, or a folder that cannot be written.

        Raises:
            ArgumentError, DataFileError: so it is.
        """
        check_experiment_id(name)
        if any(entry.name == name for entry in self.entries()):
            raise ArgumentError(f"register: {self.folder} has a {name!r} already; give another name.")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataFileError(f"register: cannot make {self.folder}: {error.strerror or error}.") from error
        if not os.access(self.folder, os.W_OK):
            raise DataFileError(f"register: {self.folder} is not writable; give another --registry.")

    def add(self, name: str, task: RunTask, settings: ExperimentSettings, run: Path, found: Mapping[str, Any]) -> None:
        """Files the float model of a finished run."""
        target = self.folder / name
        source = run / "training_artifacts" / "float"
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            task.save(target)
        zeros = found["sparsity"]["of_the_pruned"] or 0.0
        parameters = sum(p.numel() for p in task.model.parameters())
        entry = RegistryEntry(
            name=name,
            use_case=task.name,
            size=size_of(parameters),
            form="sparse" if zeros > 0.2 else "dense",
            source=name,
            sha256=_digest(target),
            sparsity=round(zeros, 4),
            metric={str(key): float(value) for key, value in found["compressed"]["onnxruntime"].items()},
        )
        saved = [_filed(each) for each in (*self.entries(), entry)]
        with replacing(self.folder / INDEX) as temporary:
            temporary.write_text(yaml.safe_dump(saved, sort_keys=False, allow_unicode=True), encoding="utf-8")


def size_of(parameters: int) -> str:
    """The size under which a model is filed: "largest" from 60 million parameters on, "smallest" below 15 million.

    >>> size_of(110_000_000), size_of(22_700_000), size_of(5_000_000)
    ('largest', 'medium', 'smallest')
    """
    return "largest" if parameters >= 60_000_000 else "medium" if parameters >= 15_000_000 else "smallest"


def _filed(entry: RegistryEntry) -> dict[str, Any]:
    return {name: value for name, value in asdict(entry).items() if name != "place"}


def _digest(folder: Path) -> str:
    for name in ("model.safetensors", "weights.pt"):
        if (folder / name).is_file():
            return file_digest(folder / name)
    return ""
