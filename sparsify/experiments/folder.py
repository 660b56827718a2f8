"""The folder of one run: what it was asked, where it stands, what came out. Never overwritten; COMPLETE comes last."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from contextlib import contextmanager
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sparsify.errors import ArgumentError, DataError, DataFileError, StateError
from sparsify.experiments.settings import ExperimentSettings
from sparsify.output.files import read_text, replacing
from sparsify.output.json_values import plain

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__: list[str] = []

ASKED = "experiment.yaml"
COMPLETE = "COMPLETE"
RUN_PAGE = "report.html"
_VERSIONS = ("sparsify", "torch", "transformers", "onnx", "onnxruntime")


class ExperimentFolder:
    """One run on disk.

    ::

        experiment.yaml      arguments, versions, the data's fingerprint, the split
        recipe.yaml
        checkpoint/          what a stopped run goes on from
        baseline/            the dense model as an ONNX file
        training_artifacts/  the compressed torch model, its tokenizer or preprocessing
        deployment/          model.onnx, labels, run.py, README.md
        logs/log.jsonl       a line for each epoch
        metrics.yaml
        report.html          figures, curves and layers on a page
        COMPLETE             written last

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, settings: ExperimentSettings, about: Mapping[str, Any]) -> ExperimentFolder:
        """Makes the folder and writes `experiment.yaml` in it.

        Args:
            path: of a folder that is not there, or empty.
            settings: with everything filled in.
            about: what else is saved: fingerprint, split, labels.

        Raises:
            DataFileError: it cannot be made.
            ArgumentError: there is something in it.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            full = any(path.iterdir())
        except OSError as error:
            raise DataFileError(
                f"cannot make {path}: {error.strerror or error}. Give a --working-dir that is writable."
            ) from error
        if full:
            raise ArgumentError(f"{path} is there already and is not overwritten: give another --experiment-id.")
        made = cls(path)
        for name in ("checkpoint", "logs"):
            (path / name).mkdir()
        made.write_yaml(ASKED, {"arguments": settings.plain(), **about, "versions": _versions()})
        return made

    def saved(self) -> dict[str, Any]:
        """The content of `experiment.yaml`.

        Raises:
            DataError: it is missing or no such file.
        """
        path = self.path / ASKED
        if not path.is_file():
            raise DataFileError(f"{self.path} is no folder of an experiment: it has no {ASKED}.")
        found = self.read_yaml(ASKED)
        if not isinstance(found.get("arguments"), dict):
            raise DataError(f"{path}: there are no arguments in it: it is damaged, or of something else.")
        return found

    @property
    def is_complete(self) -> bool:
        """True if the run ended."""
        return (self.path / COMPLETE).is_file()

    def check_same(self, settings: ExperimentSettings, fingerprint: str) -> None:
        """Refuses to go on with other arguments or other data.

        Raises:
            StateError: which differ.
        """
        saved = self.saved()
        differing = ExperimentSettings.from_plain(saved["arguments"]).differences(settings)
        if saved.get("fingerprint") != fingerprint:
            differing.append("the data: files were changed, added or removed since it began")
        if differing:
            raise StateError(
                f"{self.path} was begun otherwise: {'; '.join(differing)}. Give the same, or begin a new run with "
                "another --experiment-id."
            )

    def write_yaml(self, name: str, value: Mapping[str, Any]) -> None:
        """Writes a file of the folder whole."""
        with replacing(self.path / name) as temporary:
            temporary.write_text(yaml.safe_dump(plain(value), sort_keys=False, allow_unicode=True), encoding="utf-8")

    def read_yaml(self, name: str) -> dict[str, Any]:
        """A file that `write_yaml` wrote.

        Raises:
            DataError: it is missing or damaged.
        """
        path = self.path / name
        try:
            found = yaml.safe_load(read_text(path))
        except yaml.YAMLError as error:
            raise DataError(f"{path} is no YAML: {str(error).splitlines()[0]}") from error
        if not isinstance(found, dict):
            raise DataError(f"{path} is damaged: it holds a {type(found).__name__}.")
        return found

    def write_page(self, text: str) -> None:
        """Writes `report.html`."""
        with replacing(self.path / RUN_PAGE) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def log(self, entry: Mapping[str, Any]) -> None:
        """Adds a line to the log; one that a kill cut off is ended first."""
        path = self.path / "logs" / "log.jsonl"
        cut = path.is_file() and not path.read_bytes().endswith(b"\n")
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" * cut + json.dumps({"time": round(time.time(), 3), **plain(entry)}) + "\n")

    def finish(self, summary: str) -> None:
        """Writes COMPLETE, the last file."""
        with replacing(self.path / COMPLETE) as temporary:
            temporary.write_text(summary + "\n", encoding="utf-8")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, no other process may work on this folder.

        Raises:
            StateError: another one does.
        """
        handle = os.open(self.path / "checkpoint" / "lock", os.O_RDWR | os.O_CREAT)
        try:
            try:
                import fcntl
            except ImportError:  # Windows: two runs on one folder are not noticed.
                yield
                return
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise StateError(f"{self.path}: another process is at work on it.") from None
            yield
        finally:
            os.close(handle)


def folder_name(kind: str, use_case: str, now: datetime) -> str:
    """The name of a run's folder.

    >>> folder_name("training-aware", "image_classification", datetime(2026, 11, 30, 14, 5, 33))
    'training_aware_image_classification_2026_11_30_14_05_33'
    """
    return f"{kind.replace('-', '_')}_{use_case}_{now:%Y_%m_%d_%H_%M_%S}"


def check_experiment_id(name: str) -> str:
    """`name`, if it can be the name of a folder.

    Raises:
        ArgumentError: it cannot.
    """
    if not re.fullmatch(r"\w[\w.-]{0,199}", name):
        raise ArgumentError(f"experiment_id: {name!r}: write letters, digits, '_', '-' and '.', no folder in front.")
    return name


def _versions() -> dict[str, str]:
    found = {}
    for package in _VERSIONS:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
