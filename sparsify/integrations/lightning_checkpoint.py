"""The part of Lightning's checkpoints that is the callback's: structure for a module, and what is said of them."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sparsify.errors import SparsifyWarning, StateError
from sparsify.integrations.lightning_module import submodule
from sparsify.integrations.recipe_progress import RecipeProgress
from sparsify.training.manager import ScheduledModifierManager

__all__ = ["apply_checkpoint_structure"]

RECORDS = "sparsify"
"""Under this key a checkpoint of Lightning holds what the callbacks saved, by the name of the submodule."""

STRUCTURED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Modules on which a recipe has been at work, or that were given the structure of a checkpoint."""


@dataclass(frozen=True)
class ResumedRun:
    """A run that is gone on with: its record, and the weights that go with it; None: those of the module."""

    record: Mapping[str, Any]
    weights: Mapping[str, Tensor] | None
    strict: bool = True


def apply_checkpoint_structure(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Gives a fresh module the structure of a checkpoint (quantized layers, removed channels): its weights then load.

    For `load_from_checkpoint`, which knows no callbacks::

        class LitModel(LightningModule):
            def on_load_checkpoint(self, checkpoint):
                apply_checkpoint_structure(self, checkpoint)

    Nothing is done where the checkpoint holds no recipe's state, or the module has its structure already.

    Args:
        module: the LightningModule.
        checkpoint: what Lightning saved, as `torch.load` gives it.

    Raises:
        StateError: the state does not fit the module.
    """
    if module in STRUCTURED or getattr(module, "_trainer", None) is not None:
        return
    for name, record in (checkpoint.get(RECORDS) or {}).items():
        progress = RecipeProgress.from_state(record["progress"])
        if not progress.finished:
            warn_unfinished(progress, stacklevel=3)
        manager = ScheduledModifierManager.from_yaml(record["manager"]["recipe"])
        manager.apply_structure(submodule(module, name), state=record["manager"])
    STRUCTURED.add(module)


def outgrown(pl_module: nn.Module, record: Mapping[str, Any]) -> StateError:
    return StateError(
        f"the checkpoint was saved at {RecipeProgress.from_state(record['progress'])}; {type(pl_module).__name__} has "
        "been changed by the recipe since then, and its layers no longer take those weights. Give a fresh module: "
        "trainer.fit(Module(...), ckpt_path=...), and likewise for validate, test and predict."
    )


def warn_unfinished(progress: RecipeProgress, stacklevel: int = 3) -> None:
    warnings.warn(
        f"the checkpoint was saved before the recipe had done its work: {progress}.",
        SparsifyWarning,
        stacklevel=stacklevel,
    )


def say_what_begins(trainer: Any, before: RecipeProgress | None) -> None:
    """Warns where a recipe begins at its epoch 0 although training has gone on before.

    Args:
        trainer: about to train.
        before: how far this recipe was with this module; None: it was not at work.
    """
    what = None
    if before is not None:
        what = f"{type(trainer.lightning_module).__name__} was trained by this recipe before ({before})"
    elif trainer.global_step:
        what = (
            f"the Trainer is at step {trainer.global_step}, epoch {trainer.current_epoch}, and what it goes on from "
            "holds no state of this recipe"
        )
    if what is not None:
        warnings.warn(
            f"{what}: the recipe begins at its epoch 0. To go on with a recipe give fit(ckpt_path=...) a checkpoint "
            "that was saved with the callback, or raise the epochs of the same Trainer.",
            SparsifyWarning,
            stacklevel=3,
        )


def say_what_was_left(trainer: Any, progress: RecipeProgress, written: Mapping[str, Mapping[str, Any]]) -> None:
    """Warns where training ended before the recipe did, or the best checkpoint is of before that.

    Args:
        trainer: has trained.
        progress: at the end.
        written: the progress of each checkpoint by its path, as `state_dict` gives it.
    """
    if progress.epoch < progress.max_epochs - 1e-6:
        why = " because something asked it to stop (EarlyStopping?)" if trainer.should_stop else ""
        warnings.warn(
            f"training ended{why} before the recipe was through: {progress}. Give Trainer(min_epochs="
            f"{progress.max_epochs}) to keep it from stopping earlier, or go on with fit(ckpt_path=...).",
            SparsifyWarning,
            stacklevel=3,
        )
        return
    for checkpoint in trainer.checkpoint_callbacks:
        best = str(getattr(checkpoint, "best_model_path", "") or "")
        if best in written and not (then := RecipeProgress.from_state(written[best])).finished:
            warnings.warn(
                f"the best checkpoint, {best}, was saved before the recipe had done its work: {then}. The module in "
                'memory is finished. SparsifyCallback(best_model="finished") keeps only those that are.',
                SparsifyWarning,
                stacklevel=3,
            )
