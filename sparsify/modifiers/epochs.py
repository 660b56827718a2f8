"""The range of training."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from sparsify.modifiers.base import Active, Epoch, Modifier, ModifierKind, Run

__all__ = ["EpochRangeModifier"]


class EpochRangeModifier(Modifier):
    """The length of training: `max_epochs` is the latest end or start among this and all other modifiers."""

    kind: ClassVar[ModifierKind] = "range"
    start_epoch: Epoch = Field(default=0.0, description="The epoch at which training starts.")
    end_epoch: Epoch = Field(description="The epoch at which training ends.")

    def attach(self, run: Run) -> Active:
        """Nothing to do on a model: the range is read from the recipe."""
        return Active()
