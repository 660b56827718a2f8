"""The task of a run: samples, batches, the loss, the metric. The use cases fill it in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

__all__ = ["UseCase"]


@dataclass(frozen=True)
class TaskBatch:
    """Samples as tensors.

    Attributes:
        inputs: {parameter of the model's forward: tensor}, the samples along axis 0; the exported file has these.
        targets: what the loss compares with, by name; whatever the use case's `loss` understands.
        samples: the samples themselves, in order.
    """

    inputs: Mapping[str, Tensor]
    targets: Mapping[str, Any]
    samples: Sequence[Any]


class UseCase(ABC):
    """A task of your own for experiments: what is trained, on what, and how good it is.

    Give it as `--use-case package.module:ClassName`, or an instance to `run_experiment`. The attributes are defaults of
    the flags of the same names.

    Attributes:
        name: stands in the name of the run's folder.
        metric: the key of `metrics` by which runs are compared; larger is better.
        epochs: of the training by the recipe, at least 4.
        dense_epochs: of training before that, for a model that is not trained yet.
        learning_rate: the highest, for AdamW.
        batch_size: samples of one optimizer step.
    """

    name: str = "custom"
    metric: str = "accuracy"
    epochs: int = 10
    dense_epochs: int = 0
    learning_rate: float = 1e-3
    batch_size: int = 32

    @abstractmethod
    def model(self, source: str | None) -> nn.Module:
        """The model to compress.

        Args:
            source: what `--model` says; None where it was left out.
        """

    @abstractmethod
    def data(self, source: str | None) -> tuple[Sequence[Any], Sequence[Any]]:
        """Samples to train with, and samples to measure with; both with a length, in an order that never changes.

        Args:
            source: what `--data` says; None where it was left out.
        """

    @abstractmethod
    def batch(self, samples: Sequence[Any]) -> tuple[Mapping[str, Tensor], Any]:
        """({parameter of the model's forward: tensor}, the targets of the loss), samples along axis 0.

        Args:
            samples: of `data`, one or more.
        """

    @abstractmethod
    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """The loss, a scalar.

        Args:
            outputs: what the model returned.
            targets: of `batch`.
        """

    @abstractmethod
    def metrics(self, outputs: Mapping[str, np.ndarray], samples: Sequence[Any]) -> Mapping[str, float]:
        """Figures of quality over all samples; larger is better.

        Args:
            outputs: every output of the exported file by its name, all samples along axis 0.
            samples: in the same order.
        """


class RunTask(ABC):
    """A use case with its model and its data: what the loop and the export ask.

    Attributes:
        name, short: of the use case; the short one stands in names of folders.
        metric: the key of `metrics` that runs are compared by.
        labels: names of the classes; empty where there are none.
        model: on its device.
        train, val: samples.
        teaches: outputs that a teacher is compared by; empty where it is not used unasked.
        eval_batch: samples that are computed at once without gradients.
    """

    name: str
    short: str
    metric: str
    labels: tuple[str, ...]
    model: nn.Module
    train: Sequence[Any]
    val: Sequence[Any]
    teaches: tuple[str, ...]
    eval_batch: int

    @property
    def free_axes(self) -> Mapping[str, Mapping[int, str]]:
        """Axes of inputs that shall have any size in the file, beside the batch, by input and axis."""
        return {}

    @abstractmethod
    def batch(self, samples: Sequence[Any]) -> TaskBatch:
        """The samples as tensors on the CPU."""

    def training_batch(self, samples: Sequence[Any]) -> TaskBatch:
        """The same for one step of training, which may be shorter than what the exported file is measured with."""
        return self.batch(samples)

    def length(self, sample: Any) -> int:
        """The size of a sample; samples of like sizes are put together for training."""
        return 1

    @abstractmethod
    def loss(self, batch: TaskBatch) -> Tensor:
        """The loss of the model on a batch, in the mode that the model is in."""

    @abstractmethod
    def outputs(self, batch: TaskBatch) -> dict[str, Tensor]:
        """Outputs of the model, with the names that an exported file has."""

    @abstractmethod
    def metrics(self, outputs: Mapping[str, np.ndarray], samples: Sequence[Any]) -> Mapping[str, float]:
        """Figures of quality; `outputs` of all samples, along axis 0."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes the float model: the state whose names `remember_names` noted."""

    @abstractmethod
    def save_preprocessing(self, folder: Path) -> None:
        """Writes the tokenizer, or how images are prepared."""

    @abstractmethod
    def remember_names(self) -> None:
        """Notes the names of the float model's state, before anything is quantized."""
