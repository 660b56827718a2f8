"""The use cases at work: a model with its data, batches, loss and metrics."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from sparsify.errors import ArgumentError, DataError, first_line
from sparsify.experiments.batches import BatchMaker, ImageBatches, ImagePreprocessing, TextBatches, text_length
from sparsify.experiments.models import LoadedModel, load_experiment_model, quiet_transformers
from sparsify.experiments.reading import metrics_of, read_data
from sparsify.experiments.tasks import RunTask, TaskBatch, UseCase
from sparsify.model.signature import named_outputs

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from sparsify.experiments.samples import DataSet
    from sparsify.experiments.settings import ExperimentSettings
    from sparsify.experiments.use_cases import KnownUseCase

__all__: list[str] = []

LENGTHS = {"texts": 128, "tokens": 128, "questions": 384}
"""Tokens of one text at most, where nothing is said."""


@dataclass(frozen=True)
class BuiltTask:
    """A task that is ready, and what was found on the way.

    Attributes:
        task: ready to run.
        data: what was read.
        settings: with what the model and the data say about sizes filled in.
        labels: names of the classes.
        fresh: parameters with random values.
        notes: what the user should know.
    """

    task: RunTask
    data: DataSet[Any]
    settings: ExperimentSettings
    labels: tuple[str, ...]
    fresh: tuple[str, ...]
    notes: tuple[str, ...]


def built_task(case: KnownUseCase, settings: ExperimentSettings) -> BuiltTask:
    """Reads the data, loads the model, and puts them together.

    Raises:
        ArgumentError, DataError: what cannot be used.
    """
    assert settings.data is not None and settings.model is not None
    data = read_data(case, settings).limited(settings.train_samples, settings.val_samples)
    if case.reads in ("images", "texts") and len(data.labels) < 2:
        raise DataError(f"{settings.data}: there is one class, {data.labels[0]!r}: at least two are needed.")
    loaded = load_experiment_model(
        settings.model, case, data.labels, factory=settings.factory, offline=settings.offline, seed=settings.seed
    )
    if case.is_text:
        maker, settings = _text_batches(case, loaded, data, settings)
    else:
        config = getattr(loaded.model, "config", None)
        preprocessing = ImagePreprocessing.of(loaded.folder, config, settings.image_size)
        settings = replace(settings, image_size=(preprocessing.height, preprocessing.width))
        names = list(inspect.signature(loaded.model.forward).parameters)
        maker = ImageBatches(preprocessing, "pixel_values" if loaded.is_of_transformers else names[0])
    task = KnownTask(case, data, loaded, maker)
    notes = loaded.notes + (_cut_note(maker, data) if isinstance(maker, TextBatches) else ())
    return BuiltTask(task, data, settings, data.labels, loaded.fresh, notes)


def _cut_note(maker: TextBatches, data: DataSet[Any]) -> tuple[str, ...]:
    """A note on texts of which the model does not see the end, of the first 1,000 of both parts."""
    looked = [*data.train[:1000], *data.val[:1000]]
    cut, lost = sum(map(maker.is_cut, looked)), sum(map(maker.loses_answer, looked))
    notes = []
    if cut:
        notes.append(f"{cut} of {len(looked)} texts are longer than {maker.max_length} tokens and are cut there.")
    if lost:
        notes.append(
            f"{lost} of {len(looked)} answers are cut off with them: these questions are trained as if they had none. "
            "Give a larger --max-length."
        )
    return tuple(notes)


def _text_batches(
    case: KnownUseCase, loaded: LoadedModel, data: DataSet[Any], settings: ExperimentSettings
) -> tuple[BatchMaker, ExperimentSettings]:
    from transformers import AutoTokenizer

    if loaded.folder is None:
        raise ArgumentError(f"model: {settings.model} has no tokenizer: give a folder or a hub id that has one.")
    local = settings.offline or Path(loaded.folder).is_dir()
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(loaded.folder, local_files_only=local, trust_remote_code=False)
    except Exception as error:  # Files and versions fail in many ways.
        raise ArgumentError(f"model: {loaded.folder}: its tokenizer cannot be loaded: {first_line(error)}") from error
    if not tokenizer.is_fast:
        raise ArgumentError(f"model: {loaded.folder}: its tokenizer has no tokenizer.json, which is needed.")
    if tokenizer.pad_token is None:
        raise ArgumentError(f"model: {loaded.folder}: its tokenizer has no token to pad with.")
    positions = getattr(loaded.model.config, "max_position_embeddings", None)
    # RoBERTa's table begins at the row behind the padding: https://github.com/huggingface/transformers/issues/1363
    room = positions - 2 if isinstance(positions, int) and positions > 8 else 1 << 16
    most = min(LENGTHS[case.reads], room, tokenizer.model_max_length)
    length = settings.max_length
    if length is None:
        length = text_length(tokenizer, data.train, most)
    elif isinstance(positions, int) and length > positions:
        raise ArgumentError(f"max_length: {length}: the model has {positions} positions.")
    names = [name for name in tokenizer.model_input_names if name in inspect.signature(loaded.model.forward).parameters]
    model: Any = loaded.model
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ArgumentError(
            f"model: {loaded.folder}: the tokenizer knows {len(tokenizer)} tokens, the model {rows}: they do not fit."
        )
    if (
        any(getattr(sample, "second", None) is not None for sample in data.train[:1])
        and tokenizer.num_special_tokens_to_add(pair=True) == 0
    ):
        raise ArgumentError(f"model: {loaded.folder}: its tokenizer puts nothing between two texts.")
    return TextBatches(tokenizer, length, names), replace(settings, max_length=length)


class KnownTask(RunTask):
    """A use case of the table.

    Args:
        case: of the table.
        data: its samples.
        loaded: its model.
        maker: of batches.
    """

    eval_batch = 32

    def __init__(self, case: KnownUseCase, data: DataSet[Any], loaded: LoadedModel, maker: BatchMaker) -> None:
        self.case, self.maker = case, maker
        self.name, self.short, self.metric = case.name, case.short, case.metric
        self.labels, self.model = data.labels, loaded.model
        self.train, self.val = data.train, data.val
        self._with_labels = loaded.is_of_transformers
        self.teaches = case.teaches if self._with_labels else ("output",)

    @property
    def free_axes(self) -> Mapping[str, Mapping[int, str]]:
        if not isinstance(self.maker, TextBatches):
            return {}
        return {name: {1: "length"} for name in self.maker(self.val[:1]).inputs}

    def batch(self, samples: Sequence[Any]) -> TaskBatch:
        return self.maker(samples)

    def training_batch(self, samples: Sequence[Any]) -> TaskBatch:
        return self.maker.short(samples)

    def length(self, sample: Any) -> int:
        return self.maker.length(sample)

    def loss(self, batch: TaskBatch) -> Tensor:
        if self._with_labels:
            found: Tensor = self.model(**batch.inputs, **batch.targets).loss
            return found
        return functional.cross_entropy(_logits_of(self.model(**batch.inputs)), batch.targets["labels"])

    def outputs(self, batch: TaskBatch) -> dict[str, Tensor]:
        return named_outputs(self.model(**batch.inputs))[0]

    def metrics(self, outputs: Mapping[str, np.ndarray], samples: Sequence[Any]) -> Mapping[str, float]:
        return metrics_of(self.case, self.maker, outputs, samples, self.labels)

    def save(self, folder: Path) -> None:
        names = set(self._float_names())
        state = {name: value.detach().cpu() for name, value in self.model.state_dict().items() if name in names}
        if self._with_labels:
            with quiet_transformers():
                model: Any = self.model
                model.save_pretrained(folder, state_dict=state)
            self.save_preprocessing(folder)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(state, folder / "weights.pt")

    def save_preprocessing(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.maker, TextBatches):
            self.maker.tokenizer.save_pretrained(folder)
        elif isinstance(self.maker, ImageBatches):
            (folder / "preprocessor_config.json").write_text(
                _preprocessor_json(self.maker.preprocessing), encoding="utf-8"
            )

    def _float_names(self) -> list[str]:
        """Names of the state_dict, without those of quantizers."""
        return self._names

    def remember_names(self) -> None:
        """Notes the names of the float model's state, before anything is quantized."""
        self._names = list(self.model.state_dict())


class CustomTask(RunTask):
    """A use case of the user's own.

    Args:
        use_case: of the user.
        settings: say what model and data it is given.

    Raises:
        ArgumentError: it fails, or gives something else than it should.
    """

    eval_batch = 32

    def __init__(self, use_case: UseCase, settings: ExperimentSettings) -> None:
        self._use_case = use_case
        self.name, self.metric = use_case.name, use_case.metric
        self.short, self.labels, self.teaches = use_case.name, (), ()
        torch.manual_seed(settings.seed)
        self.model = self._asked("model", settings.model)
        if not isinstance(self.model, nn.Module):
            raise ArgumentError(
                f"use_case: model() gave a {type(self.model).__name__}; it must give a torch.nn.Module."
            )
        found = self._asked("data", settings.data)
        try:
            train, val = found
            len(train), len(val)
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"use_case: data() must give two sequences of samples: {first_line(error)}") from error
        if len(train) < 2 or not len(val):
            raise DataError(f"use_case: data() gave {len(train)} and {len(val)} samples; at least 2 and 1 are needed.")
        self.train, self.val = _limited(train, settings.train_samples), _limited(val, settings.val_samples)

    def _asked(self, name: str, *given: Any) -> Any:
        try:
            return getattr(self._use_case, name)(*given)
        except Exception as error:  # A user's method may raise anything.
            raise ArgumentError(f"use_case: {name}() failed: {type(error).__name__}: {first_line(error)}") from error

    def batch(self, samples: Sequence[Any]) -> TaskBatch:
        found = self._asked("batch", samples)
        try:
            inputs, targets = found
            return TaskBatch(dict(inputs), {"targets": targets}, samples)
        except (TypeError, ValueError) as error:
            raise ArgumentError(
                f"use_case: batch() must give ({{parameter: tensor}}, targets): {first_line(error)}"
            ) from error

    def loss(self, batch: TaskBatch) -> Tensor:
        return self._use_case.loss(self.model(**batch.inputs), batch.targets["targets"])

    def outputs(self, batch: TaskBatch) -> dict[str, Tensor]:
        return named_outputs(self.model(**batch.inputs))[0]

    def metrics(self, outputs: Mapping[str, np.ndarray], samples: Sequence[Any]) -> Mapping[str, float]:
        return {name: float(value) for name, value in self._use_case.metrics(outputs, samples).items()}

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        names = set(self._names)
        state = {name: value.cpu() for name, value in self.model.state_dict().items() if name in names}
        torch.save(state, folder / "weights.pt")

    def save_preprocessing(self, folder: Path) -> None:
        """Nothing: its preprocessing is code."""

    def remember_names(self) -> None:
        self._names = list(self.model.state_dict())


def _limited(samples: Sequence[Any], most: int | None) -> Sequence[Any]:
    if most is None or most >= len(samples):
        return samples
    return [samples[number * len(samples) // most] for number in range(most)]


def _logits_of(output: Any) -> Tensor:
    tensors = list(named_outputs(output)[0].values())
    if not tensors:
        raise ArgumentError(f"model: its forward gives a {type(output).__name__}, and no logits.")
    return tensors[0]


def _preprocessor_json(given: ImagePreprocessing) -> str:
    import json

    found = {
        "do_resize": True,
        "size": {"height": given.height, "width": given.width},
        "resample": given.resample,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(given.mean),
        "image_std": list(given.std),
    }
    return json.dumps(found, indent=2) + "\n"
