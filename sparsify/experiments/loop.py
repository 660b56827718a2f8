"""A plain training loop: the same steps to the bit, whether it was stopped in between or not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparsify.errors import DataError
from sparsify.experiments.checkpoints import CheckpointFile, Position, put_back
from sparsify.experiments.tasks import RunTask, TaskBatch

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from sparsify.experiments.settings import ExperimentSettings
    from sparsify.training.manager import ScheduledModifierManager

__all__: list[str] = []

SAVE_SECONDS = 600.0
"""Between two checkpoints within an epoch."""
CLIP = 1.0
"""The norm of all gradients together is at most this."""
GROUPED = 16
"""Batches among which samples of like sizes are put together."""
WARM_UP = 0.1
"""The share of a dense stage in which the learning rate rises."""


@dataclass(frozen=True)
class EpochReport:
    """One epoch that is over.

    Attributes:
        stage: "dense" or "recipe".
        phase: of the recipe: "pruning", ...; "dense" without one.
        epoch: from 1.
        epochs: of the stage.
        loss: the mean over its steps.
        metrics: on the samples to measure with.
        sparsity: zeros / elements of the weights that are pruned; None without a recipe.
        seconds_left: of the stage, by the time that this epoch took.
    """

    stage: str
    phase: str
    epoch: int
    epochs: int
    loss: float
    metrics: Mapping[str, float]
    sparsity: float | None
    seconds_left: float


class OutOfMemory(Exception):
    """A step did not fit into memory.

    Args:
        parts: into which the samples of a step were divided.
    """

    def __init__(self, parts: int) -> None:
        super().__init__(f"out of memory with a step in {parts} parts")
        self.parts = parts


def settings_value(value: int | None) -> int:
    """A number that the use case has filled in by now."""
    assert value is not None
    return value


def train(
    task: RunTask,
    settings: ExperimentSettings,
    stage: str,
    epochs: int,
    checkpoint: CheckpointFile,
    *,
    manager: ScheduledModifierManager | None = None,
    teacher: Any = None,
    parts: int | None = None,
    report: Callable[[EpochReport], None],
    at_end: Callable[[int], None] | None = None,
) -> None:
    """Trains `task.model` for a stage, from where its checkpoint stands.

    Args:
        task: the model and its data.
        settings: with everything filled in.
        stage: "dense" or "recipe".
        epochs: of the stage.
        checkpoint: where it stands; it is written after each epoch, and every ten minutes.
        manager: of the recipe; None in the dense stage.
        teacher: of distillation, as `modify` takes it.
        parts: into which the samples of a step are divided, so that they fit into memory; their gradients are added
            up, so steps and epochs stay what they were. None: as the checkpoint says, else one.
        report: called after each epoch.
        at_end: called with the number of the epoch that comes next, before the checkpoint of each epoch is written.

    Raises:
        DataError: the loss is no number.
        OutOfMemory: a step does not fit; model and optimizer are then of no use.
    """
    model, device = task.model, device_of(task.model)
    optimizer = _optimizer(model, settings)
    steps = steps_per_epoch(task, settings)
    torch.manual_seed(settings.seed)
    if manager is not None:
        inputs = {name: value.to(device) for name, value in task.batch(task.train[:2]).inputs.items()}
        manager.modify(model, optimizer, steps_per_epoch=steps, distillation_teacher=teacher, sample_inputs=inputs)
    at = Position(stage)
    state = checkpoint.load()
    if state is not None and state["position"].stage == stage:
        put_back(state, model, optimizer, manager)
        at = state["position"]
    if parts is not None:
        at = replace(at, parts=parts)
    saved = time.monotonic()
    for epoch in range(at.epoch, epochs):
        began = time.monotonic()
        first = at.step if epoch == at.epoch else 0
        total = at.loss_sum if epoch == at.epoch else 0.0
        batches = _batches_of_epoch(task, steps, settings.seed, stage, epoch)
        model.train()
        for step in range(first, steps):
            if manager is None:
                for group in optimizer.param_groups:
                    group["lr"] = _dense_rate(settings, epoch * steps + step, epochs * steps)
            chosen = [task.train[i] for i in batches[step]]
            total += _optimizer_step(
                task, chosen, optimizer, manager, device, at.parts, f"epoch {epoch + 1}, step {step + 1}"
            )
            if time.monotonic() - saved > SAVE_SECONDS and step + 1 < steps:
                checkpoint.save(Position(stage, epoch, step + 1, at.parts, total), model, optimizer, manager)
                saved = time.monotonic()
        metrics = measured(task)
        if at_end is not None:
            at_end(epoch + 1)
        checkpoint.save(Position(stage, epoch + 1, 0, at.parts), model, optimizer, manager)
        saved = time.monotonic()
        phase = None if manager is None else manager.phase(epoch + 0.5)
        zeros = None if manager is None else _share_of_zeros(model, manager)
        spent = (time.monotonic() - began) * steps / max(1, steps - first)
        report(
            EpochReport(
                stage,
                stage if manager is None else str(phase or "changing"),
                epoch + 1,
                epochs,
                total / steps,
                metrics,
                zeros,
                spent * (epochs - epoch - 1),
            )
        )


def _optimizer_step(
    task: RunTask,
    samples: Sequence[Any],
    optimizer: Optimizer,
    manager: ScheduledModifierManager | None,
    device: torch.device,
    parts: int,
    when: str,
) -> float:
    """One optimizer step; gives the mean loss of its samples, without what the manager adds to it."""
    optimizer.zero_grad()
    total = 0.0
    try:
        for part in _divided(samples, parts):
            share = len(part) / len(samples)
            with _precision(device):
                loss = task.loss(on_device(task.training_batch(part), device))
            if not bool(torch.isfinite(loss)):
                raise DataError(
                    f"{when}: the loss is {float(loss.detach())}: the learning rate is too high, or values of the data "
                    "cannot be used. Give a smaller --learning-rate."
                )
            total += float(loss.detach()) * share
            (manager.update_loss(loss) if manager is not None else loss).mul(share).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_((p for p in task.model.parameters() if p.grad is not None), CLIP)
        optimizer.step()
    except torch.OutOfMemoryError:
        optimizer.zero_grad()
        raise OutOfMemory(parts) from None
    return total


@torch.no_grad()
def measured(task: RunTask) -> dict[str, float]:
    """The metrics of the model in torch, in eval mode, on the samples to measure with; its mode stays."""
    model, device = task.model, device_of(task.model)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        found = []
        for samples in batched(task.val, task.eval_batch):
            batch = on_device(task.batch(samples), device)
            found.append({name: value.float().cpu().numpy() for name, value in task.outputs(batch).items()})
        return dict(task.metrics(joined_outputs(found), task.val))
    finally:
        for module, mode in modes:
            module.training = mode


def joined_outputs(outputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Outputs of several batches, by name, along axis 0."""
    import numpy as np

    return {name: np.concatenate([one[name] for one in outputs]) for name in outputs[0]}


def batched(samples: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """`samples` in order, `size` at a time."""
    for first in range(0, len(samples), size):
        yield samples[first : first + size]


def steps_per_epoch(task: RunTask, settings: ExperimentSettings) -> int:
    """Optimizer steps of an epoch: samples are spread evenly over them, so that none is left with one sample alone."""
    return -(-len(task.train) // settings_value(settings.batch_size))


def on_device(batch: TaskBatch, device: torch.device) -> TaskBatch:
    """The batch with its tensors on `device`."""
    from torch.utils import _pytree as pytree

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    return TaskBatch(pytree.tree_map(move, dict(batch.inputs)), pytree.tree_map(move, batch.targets), batch.samples)


def device_of(model: nn.Module) -> torch.device:
    """Where its parameters are."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _optimizer(model: nn.Module, settings: ExperimentSettings) -> Optimizer:
    rate, name = settings.learning_rate, settings.optimizer
    assert rate is not None
    weights = [p for p in model.parameters() if p.requires_grad]
    # Weight decay of what only shifts and scales does harm.
    groups: list[dict[str, Any]] = [
        {"params": [p for p in weights if p.dim() > 1]},
        {"params": [p for p in weights if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if name == "SGD":
        return torch.optim.SGD(groups, lr=rate, momentum=0.9, weight_decay=1e-4)
    kind = torch.optim.AdamW if name == "AdamW" else torch.optim.Adam
    return kind(groups, lr=rate, weight_decay=0.01 if name == "AdamW" else 0.0)


def _dense_rate(settings: ExperimentSettings, step: int, steps: int) -> float:
    """A rise over the first tenth, then a line to 0."""
    assert settings.learning_rate is not None
    rise = max(1.0, WARM_UP * steps)
    return settings.learning_rate * min((step + 1) / rise, (steps - step) / max(1.0, steps - rise), 1.0)


def _batches_of_epoch(task: RunTask, steps: int, seed: int, stage: str, epoch: int) -> list[list[int]]:
    """Places of the samples of each step of an epoch: by the data, the seed and the epoch alone, so that a run that
    goes on has the same.

    Samples are shuffled. Where their sizes differ, those of a few batches that follow one another are ordered by size,
    and all batches shuffled again: what stands together then needs little padding.
    """
    number = (seed * 2 + (stage == "recipe")) * 1_000_003 + epoch
    generator = torch.Generator().manual_seed(number)
    order: list[int] = torch.randperm(len(task.train), generator=generator).tolist()
    batches = [order[step * len(order) // steps : (step + 1) * len(order) // steps] for step in range(steps)]
    lengths = [task.length(sample) for sample in task.train]
    if len(set(lengths)) < 2:
        return batches
    found: list[list[int]] = []
    for first in range(0, steps, GROUPED):
        together = batches[first : first + GROUPED]
        ordered = iter(sorted((i for batch in together for i in batch), key=lengths.__getitem__))
        found += [[next(ordered) for _ in batch] for batch in together]
    return [found[i] for i in torch.randperm(steps, generator=generator).tolist()]


def _divided(samples: Sequence[Any], parts: int) -> Iterator[Sequence[Any]]:
    count = len(samples)
    for number in range(parts):
        part = samples[number * count // parts : (number + 1) * count // parts]
        if part:
            yield part


@contextmanager
def _precision(device: torch.device) -> Iterator[None]:
    """bfloat16 where a GPU computes it; float32 elsewhere."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        with torch.autocast("cuda", torch.bfloat16):
            yield
    else:
        yield


def _share_of_zeros(model: nn.Module, manager: ScheduledModifierManager) -> float | None:
    """The fraction of zeros over the weights that the recipe prunes; None where it prunes none."""
    shares = manager.sparsity()
    sizes = {name: p.numel() for name, p in model.named_parameters() if name in shares}
    total = sum(sizes.values())
    return None if not total else sum(shares[name] * size for name, size in sizes.items()) / total
