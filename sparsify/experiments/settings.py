"""The arguments of an experiment: checked once, saved with the run, and compared when a run goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

from sparsify.errors import ArgumentError, DataError, DataFileError, did_you_mean
from sparsify.experiments.use_cases import use_case_named
from sparsify.optimize.levels import Experiment, optim_level

__all__: list[str] = []

OPTIMIZERS = ("AdamW", "Adam", "SGD")
LEAST_EPOCHS = 4
"""A run that prunes and quantizes has four stages of an epoch at least."""


@dataclass(frozen=True)
class ExperimentSettings:
    """Arguments of an experiment. What is None is filled in by the use case, and is a number when it is saved.

    Attributes:
        kind: "training-aware", "one-shot" or "sparse-transfer".
        use_case: a name, an alias, or "package.module:UseCase".
        model: a folder, a hub id, "timm:NAME", "package.module:function", or a .pt file beside `factory`; None where
            sparse transfer chooses one.
        data: a folder, a file, a YOLO yaml, or a data set of the hub; None: the use case has its own.
        columns: of texts by what they hold ({"text": "body"}), where their names do not say it.
        missing_labels: an image without a label file is an "error", or "background".
        optim_level: 0 to 1, or a whole number from 2 to 100 for percent.
        recipe: a recipe file instead of the level; `recipe_args` are its variables.
        factory: "package.module:function" that builds the model of a .pt file.
        teacher: "self", "none", or a model like `model`; None: "self" where the use case has outputs to compare.
        eval_metric: the metric that runs are compared by, of those that the use case has.
        at_least: of that metric, in onnxruntime; less is exit code 1.
        train_samples, val_samples: at most so many, evenly over the whole.
        epochs: of the training by the recipe.
        dense_epochs: of the training before it, 0 or more.
        batch_size: samples of one optimizer step.
        learning_rate: the highest.
        optimizer: "AdamW", "Adam" or "SGD" (momentum 0.9).
        seed: of the split, the order of samples, new weights and dropout.
        image_size: (height, width) in pixels.
        max_length: tokens of one text.
        device: as torch writes it; None: a GPU where there is one.
        threads: of torch and of the benchmark; None: torch's own, and 1.
        structured: whole channels go, and the model gets smaller in every runtime.
        distill: the teacher's share of the loss, 0 to 1.
        offline: nothing is asked from a hub.
    """

    kind: Experiment
    use_case: str
    model: str | None = None
    data: str | None = None
    columns: Mapping[str, str] | None = None
    missing_labels: str = "error"
    optim_level: float = 0.5
    recipe: str | None = None
    recipe_args: Mapping[str, Any] | None = None
    factory: str | None = None
    teacher: str | None = None
    eval_metric: str | None = None
    at_least: float | None = None
    train_samples: int | None = None
    val_samples: int | None = None
    epochs: int | None = None
    dense_epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    optimizer: str = "AdamW"
    seed: int = 0
    image_size: tuple[int, int] | None = None
    max_length: int | None = None
    device: str | None = None
    threads: int | None = None
    structured: bool = False
    distill: float = 0.5
    offline: bool = False

    def checked(self) -> ExperimentSettings:
        """The same, with the level as a fraction and paths made absolute.

        Raises:
            ArgumentError: a value that cannot be meant.
            DataFileError: the recipe is not there.
        """
        known = get_args(Experiment)
        if self.kind not in known:
            raise ArgumentError(f"{self.kind!r} is none of {', '.join(known)}.{did_you_mean(str(self.kind), known)}")
        if ":" not in self.use_case:
            use_case_named(self.use_case)
        level = optim_level(self.optim_level, self.kind).level
        for name, least in _WHOLE.items():
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ArgumentError(f"{name}: {value!r}: give a whole number, {least} or more.")
        for name, most in (("learning_rate", 1.0), ("distill", 1.0), ("at_least", math.inf)):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
                raise ArgumentError(f"{name}: {value!r} lies not between 0 and {most:g}.")
        if self.kind == "sparse-transfer" and self.dense_epochs:
            raise ArgumentError(
                "dense_epochs: training without a recipe fills the zeros that sparse-transfer keeps; 0."
            )
        if self.learning_rate == 0:
            raise ArgumentError("learning_rate: 0 trains nothing; give a rate above 0.")
        if self.optimizer not in OPTIMIZERS:
            raise ArgumentError(
                f"optimizer: {self.optimizer!r} is none of {', '.join(OPTIMIZERS)}."
                f"{did_you_mean(self.optimizer, OPTIMIZERS)}"
            )
        if self.missing_labels not in ("error", "background"):
            raise ArgumentError(f"missing_labels: {self.missing_labels!r} is neither 'error' nor 'background'.")
        if self.columns is not None and not (
            isinstance(self.columns, Mapping) and all(isinstance(name, str) for name in self.columns.values())
        ):
            raise ArgumentError(f"columns: {self.columns!r}: give columns by what they hold, {{'text': 'body'}}.")
        if self.image_size is not None and not (
            len(self.image_size) == 2 and all(8 <= n <= 8192 for n in self.image_size)
        ):
            raise ArgumentError(f"image_size: {self.image_size!r}: give height and width, 8 to 8192 pixels.")
        if self.recipe is not None and not Path(self.recipe).is_file():
            raise DataFileError(f"recipe: {self.recipe}: there is no such file.")
        if self.recipe is None and self.recipe_args:
            raise ArgumentError("recipe_args: they are the variables of a recipe file; give --recipe too.")
        if self.model is None and self.kind != "sparse-transfer" and ":" not in self.use_case:
            raise ArgumentError("model: there is none; give a folder, a hub id or package.module:function.")
        if self.data is None and ":" not in self.use_case:
            raise ArgumentError("data: there is none; give a folder or a file.")
        _check_device(self.device)
        paths: dict[str, Any] = {name: _absolute(getattr(self, name)) for name in _PATHS}
        return replace(self, optim_level=level, **paths)

    def plain(self) -> dict[str, Any]:
        """The fields as they are saved."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        found["image_size"] = None if self.image_size is None else list(self.image_size)
        found["columns"] = None if self.columns is None else dict(self.columns)
        found["recipe_args"] = None if self.recipe_args is None else dict(self.recipe_args)
        return found

    @classmethod
    def from_plain(cls, saved: Mapping[str, Any]) -> ExperimentSettings:
        """Settings that `plain` gave.

        Raises:
            DataError: a field is missing or unknown.
        """
        names = {field.name for field in fields(cls)}
        strange = sorted(set(saved) ^ names)
        if strange:
            raise DataError(f"arguments: {strange[0]!r} is missing or unknown: another version of sparsify wrote them.")
        size = saved["image_size"]
        return cls(**{**saved, "image_size": None if size is None else tuple(size)})

    def differences(self, other: ExperimentSettings) -> list[str]:
        """The fields that `other` says otherwise; what it leaves open does not count."""
        found = []
        for name, value in self.plain().items():
            theirs = other.plain()[name]
            if theirs is not None and theirs != value and name not in _FREE:
                found.append(f"{name} {value!r} there, {theirs!r} here")
        return found


_WHOLE = {
    "train_samples": 2,
    "val_samples": 1,
    "epochs": LEAST_EPOCHS,
    "dense_epochs": 0,
    "batch_size": 1,
    "seed": 0,
    "max_length": 4,
    "threads": 1,
}
_PATHS = ("model", "data", "recipe")
_FREE = frozenset({"offline", "device", "threads"})
"""A run may go on elsewhere."""


def _absolute(value: str | None) -> str | None:
    """A path that is there as an absolute one, so that a run goes on from any folder; another word as it is."""
    return str(Path(value).resolve()) if value is not None and Path(value).exists() else value


def _check_device(device: str | None) -> None:
    if device is None:
        return
    import torch

    try:
        torch.empty(0, device=device)
    except Exception as error:  # torch raises several types for a device that is not there.
        raise ArgumentError(f"device: {device!r} cannot be used here: {str(error).splitlines()[0]}") from error


def image_size_of(text: str) -> tuple[int, int]:
    """(height, width) of "224" or "480x640".

    Raises:
        ArgumentError: neither.
    """
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise ArgumentError(f"image_size: {text!r} is no size; write 224, or 480x640 for height and width.")
    return int(parts[0]), int(parts[-1])


def train_kwargs_of(text: str) -> dict[str, Any]:
    """The fields in the JSON of `--train-kwargs`.

    Raises:
        ArgumentError: it is no JSON object, or has a key that is no field.
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ArgumentError(f"train_kwargs: {text!r} is no JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ArgumentError(f'train_kwargs: {text!r} is no JSON object; write {{"epochs": 8}}.')
    names = [field.name for field in fields(ExperimentSettings)]
    for key in found:
        if key not in names:
            raise ArgumentError(f"train_kwargs: {key!r} is unknown.{did_you_mean(key, names)}")
    if isinstance(found.get("image_size"), int | str):
        found["image_size"] = image_size_of(str(found["image_size"]))
    elif isinstance(found.get("image_size"), list):
        found["image_size"] = tuple(found["image_size"])
    return found
