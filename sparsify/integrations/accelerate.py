"""`prepare` of accelerate with a recipe: the loop stays the user's, counting and checkpoints come along."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, SupportsIndex

from torch import nn
from torch.utils.data import DataLoader

from sparsify.errors import ArgumentError, SparsifyWarning, install_line
from sparsify.integrations.refused import refuse_cuts, refuse_foreign_weights
from sparsify.integrations.state_file import read_state, write_state
from sparsify.model.optimizer_hooks import innermost_optimizer
from sparsify.model.wrappers import unwrapped
from sparsify.training.manager import ScheduledModifierManager

try:
    from accelerate import Accelerator, DistributedType
except ImportError as error:  # pragma: no cover
    raise ImportError(
        f"sparsify.integrations.accelerate needs accelerate 1.0 or newer: {install_line('accelerate')} ({error})."
    ) from error

__all__ = ["prepare"]


def prepare(
    accelerator: Accelerator,
    manager: ScheduledModifierManager,
    model: Any,
    optimizer: Any,
    *others: Any,
    steps_per_epoch: SupportsIndex | None = None,
    **options: Any,
) -> tuple[Any, ...]:
    """`accelerator.prepare(model, optimizer, *others)`, and the recipe at work on the model and its optimizer.

    An epoch has as many optimizer steps as the first loader among the objects gives with `accelerator.accumulate`: its
    length on this process divided by the accumulation, rounded up, since accelerate steps at the end of a loader too.

    `accelerator.save_state` writes the manager's state into its folder (`sparsify.pt`), and `accelerator.load_state`
    reads it before the weights, so that they find quantized layers and removed channels. They resume bit for bit;
    `accelerator.skip_first_batches` is yours, as without a recipe.

    Of several models the first is meant, with all optimizers that step its parameters.

    Args:
        accelerator: the Accelerator, with its mixed precision and accumulation.
        manager: the manager of the recipe.
        model, optimizer, others: what `accelerator.prepare` takes, in any order: models, optimizers, loaders,
            schedulers.
        steps_per_epoch: optimizer steps in an epoch; None: as above, and where no loader has a length, train with
            `for epoch in manager.epochs():`.
        options: as for `manager.modify`: `epoch`, `distillation_teacher`, `sample_inputs`, `calibration_data`,
            `grad_sampler`, `writer`.

    Returns:
        The prepared objects, in the order given.

    Raises:
        ArgumentError: there is no model or no optimizer of it among the objects.
        TargetError, DataError, StateError: the recipe does not fit; as for `manager.modify`.
    """
    given = (model, optimizer, *others)
    models = [one for one in given if isinstance(one, nn.Module)]
    if not models:
        raise ArgumentError("prepare: there is no torch.nn.Module among the objects; give the model and its optimizer.")
    mine = {id(parameter) for parameter in models[0].parameters()}
    steps = [index for index, one in enumerate(given) if _steps_on(one, mine)]
    if not steps:
        raise ArgumentError(
            f"prepare: none of the objects is an optimizer of {type(models[0]).__name__}'s parameters. Give them "
            "together, the optimizer made from model.parameters()."
        )
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        refuse_foreign_weights(str(accelerator.distributed_type.value))
    refuse_cuts(manager.modifiers, accelerator.num_processes)
    # Names are looked up before anything is moved or wrapped.
    manager.recipe.check(unwrapped(models[0]))
    prepared = list(accelerator.prepare(*given))
    if steps_per_epoch is None:
        steps_per_epoch = _steps_in_epoch(accelerator, prepared)
    ready = next(one for one in prepared if isinstance(one, nn.Module))
    optimizers: Any = [prepared[index] for index in steps]
    found = manager.modify(ready, optimizers if len(steps) > 1 else optimizers[0], steps_per_epoch, **options)
    for index, one in zip(steps, found if isinstance(found, list) else [found], strict=True):
        prepared[index] = one
    _Checkpoints(accelerator, manager)
    return tuple(prepared)


class _Checkpoints:
    """The manager's part in `save_state` and `load_state` of an Accelerator."""

    def __init__(self, accelerator: Accelerator, manager: ScheduledModifierManager) -> None:
        self._accelerator, self._manager = accelerator, manager
        # Objects of `register_for_checkpointing` are loaded after models and optimizers, seen in accelerate 1.15.0:
        # too late for quantized layers and removed channels, whose weights would not fit.
        accelerator.register_save_state_pre_hook(self._save)
        accelerator.register_load_state_pre_hook(self._load)

    def _save(self, models: Sequence[nn.Module], weights: Any, folder: str) -> None:
        # On all processes, since a sharded state is gathered; written once, or once on each node.
        state = {"manager": self._manager.state_dict()}
        each_node = self._accelerator.project_configuration.save_on_each_node
        if self._accelerator.is_local_main_process if each_node else self._accelerator.is_main_process:
            write_state(folder, state)

    def _load(self, models: Sequence[nn.Module], folder: str) -> None:
        self._manager.load_state_dict(read_state(folder, "sparsify.integrations.accelerate.prepare")["manager"])


def _steps_on(candidate: object, parameters: set[int]) -> bool:
    """True if `candidate` is an optimizer of some of these parameters, given by their ids."""
    if isinstance(candidate, nn.Module) or not callable(getattr(candidate, "step", None)):
        return False
    try:
        groups = innermost_optimizer(candidate).param_groups
    except ArgumentError:
        return False
    return any(id(parameter) in parameters for group in groups for parameter in group["params"])


def _steps_in_epoch(accelerator: Accelerator, prepared: Sequence[Any]) -> int | None:
    """Optimizer steps for one pass over the first loader; None where it has no length, or there is none."""
    loader = next((one for one in prepared if isinstance(one, DataLoader)), None)
    try:
        batches = len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None
    groups = int(accelerator.gradient_accumulation_steps)
    if accelerator.gradient_state.sync_with_dataloader:
        return math.ceil(batches / groups)
    steps = max(1, round(batches / groups))
    if batches % groups:
        warnings.warn(
            f"{batches} batches are no whole number of groups of {groups}, and with sync_with_dataloader=False groups "
            f"go on over the end of an epoch: epochs have {batches / groups:.4g} optimizer steps, and the recipe "
            f"reckons with {steps}. Leave sync_with_dataloader at True, or pass steps_per_epoch.",
            SparsifyWarning,
            stacklevel=3,
        )
    return steps
