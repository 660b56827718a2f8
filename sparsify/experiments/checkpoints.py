"""Where a run stands: weights, optimizer, manager, random numbers, and the position in the data; to the bit."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsify.errors import DataError
from sparsify.output.files import replacing

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from sparsify.training.manager import ScheduledModifierManager

__all__: list[str] = []


@dataclass(frozen=True)
class Position:
    """Progress of training.

    Attributes:
        stage: "dense", or "recipe".
        epoch: that is under way.
        step: of this epoch, that comes next.
        parts: into which the samples of one step are divided, so that they fit into memory.
        loss_sum: of the steps of this epoch, for its mean.
    """

    stage: str
    epoch: int = 0
    step: int = 0
    parts: int = 1
    loss_sum: float = 0.0


class CheckpointFile:
    """One file that is replaced whole.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(
        self, position: Position, model: nn.Module, optimizer: Optimizer, manager: ScheduledModifierManager | None
    ) -> None:
        """Writes where training stands."""
        state = {
            "position": vars(position),
            "manager": None if manager is None else manager.state_dict(),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "random": _random_state(),
        }
        with replacing(self.path) as temporary:
            torch.save(state, temporary)

    def load(self) -> dict[str, Any] | None:
        """State that `save` wrote; None where there is nothing yet.

        Raises:
            DataError: the file is damaged.
        """
        if not self.path.is_file():
            return None
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            position = Position(**state["position"])
        except Exception as error:  # torch.load raises many types for a broken file.
            raise DataError(
                f"{self.path}: cannot be read as a checkpoint: {str(error).splitlines()[0]} Begin the run again with "
                "another --experiment-id."
            ) from error
        return {**state, "position": position}


def put_back(
    state: Mapping[str, Any], model: nn.Module, optimizer: Optimizer, manager: ScheduledModifierManager | None
) -> None:
    """Loads a saved state. The manager's comes first: it puts the structure in place that the weights need.

    The model and the optimizer are already under the manager (`modify`); random numbers come last, since what went
    before may have drawn some.
    """
    if manager is not None:
        manager.load_state_dict(state["manager"])
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    _set_random_state(state["random"])


def _random_state() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
    }


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
