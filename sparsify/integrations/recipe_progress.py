"""Progress of a recipe, in the words of a checkpoint and of a warning: the same in every framework."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from sparsify.model.targets import named_parameters
from sparsify.quantization.plan import is_quantized
from sparsify.training.manager import ScheduledModifierManager
from sparsify.training.phases import settled_epoch

__all__: list[str] = []


@dataclass(frozen=True)
class RecipeProgress:
    """A recipe at work at one moment; plain numbers, so that it can stand in a checkpoint."""

    epoch: float
    max_epochs: int
    sparsity: float
    """Fraction of zeros, 0 to 1, in the weights that the recipe prunes so far."""
    quantizes: bool
    quantized: bool
    finished: bool
    """True if pruning and quantization have done their work."""

    def __str__(self) -> str:
        said = [f"epoch {self.epoch:.4g} of {self.max_epochs}", f"{self.sparsity:.1%} of the pruned weights zero"]
        if self.quantizes:
            said.append("quantized" if self.quantized else "not quantized yet")
        return ", ".join(said)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> RecipeProgress:
        return cls(**state)


def progress_of(manager: ScheduledModifierManager, model: nn.Module) -> RecipeProgress:
    """The progress of the recipe of `manager`, at work on `model` or ended, is."""
    quantizes = any(modifier.kind == "quantization" for modifier in manager.modifiers)
    quantized = quantizes and is_quantized(model)
    epoch = manager.epoch
    zeros = total = 0.0
    parameters = named_parameters(model)
    for name, sparsity in manager.sparsity().items():
        if name in parameters:
            zeros += sparsity * parameters[name].numel()
            total += parameters[name].numel()
    # A billionth of an epoch is less than a step, and more than what rounding makes of one.
    reached = epoch >= settled_epoch(manager.modifiers) - 1e-9
    return RecipeProgress(
        epoch=epoch,
        max_epochs=manager.max_epochs,
        sparsity=zeros / total if total else 0.0,
        quantizes=quantizes,
        quantized=quantized,
        finished=reached and quantized == quantizes,
    )
