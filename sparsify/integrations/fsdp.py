"""Checkpoints of sharded runs (`fully_shard`) by torch.distributed.checkpoint, with the manager's state among them."""

from __future__ import annotations

import io
import os
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sparsify.errors import StateError
from sparsify.model.sharding import reshard
from sparsify.training.manager import ScheduledModifierManager

__all__ = ["load_sharded_checkpoint", "save_sharded_checkpoint"]

_KEY = "sparsify"


def save_sharded_checkpoint(
    folder: str | os.PathLike[str], manager: ScheduledModifierManager, model: nn.Module, optimizer: Optimizer
) -> None:
    """Writes the model's, the optimizer's and the manager's state into `folder`; each rank writes the parts it has.

    Collective: every rank calls it. Masks are gathered, a bit a weight; weights and moments are not.

    Args:
        folder: one that all ranks see; it is made where it is missing.
        manager: at work on `model`.
        model: the model, as it was given to `modify`.
        optimizer: the optimizer that steps.

    Raises:
        StateError: the manager is not at work.
    """
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict

    # After an evaluation the outermost module may hold whole parameters, which the optimizer does not know.
    reshard(model)
    dcp: Any = checkpoint
    whole = io.BytesIO()
    torch.save(manager.state_dict(), whole)
    of_model, of_optimizer = get_state_dict(model, optimizer)
    # In one piece: of a nested state dcp loads only what a fresh run has already, and that has no masks.
    dcp.save({"model": of_model, "optimizer": of_optimizer, _KEY: whole.getvalue()}, checkpoint_id=os.fspath(folder))


def load_sharded_checkpoint(
    folder: str | os.PathLike[str], manager: ScheduledModifierManager, model: nn.Module, optimizer: Optimizer
) -> None:
    """Goes on from what `save_sharded_checkpoint` wrote, also on another number of ranks; on the same, bit for bit.

    Collective: every rank calls it, after `fully_shard` and `modify`. The structure (quantized layers) is put in place
    before weights are loaded.

    Args:
        folder: the folder that was written.
        manager: a manager of the same recipe, at work on `model`.
        model: the model, sharded over the ranks that are there now.
        optimizer: its optimizer.

    Raises:
        StateError: the folder holds no state of a manager, or one that does not fit; nothing was changed.
    """
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    reshard(model)
    dcp: Any = checkpoint
    held: dict[str, Any] = {_KEY: b""}
    try:
        dcp.load(held, checkpoint_id=os.fspath(folder))
    except dcp.api.CheckpointException as error:
        raise StateError(
            f"{os.fspath(folder)!r} holds no state of a manager. Save with save_sharded_checkpoint()."
        ) from error
    manager.load_state_dict(torch.load(io.BytesIO(held[_KEY]), weights_only=True))
    of_model, of_optimizer = get_state_dict(model, optimizer)
    rest: dict[str, Any] = {"model": of_model, "optimizer": of_optimizer}
    dcp.load(rest, checkpoint_id=os.fspath(folder))
    set_state_dict(model, optimizer, model_state_dict=rest["model"], optim_state_dict=rest["optimizer"])
