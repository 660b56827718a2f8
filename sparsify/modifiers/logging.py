"""Writes down how sparse and how quantized the model is while it trains."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from sparsify.modifiers.base import Active, Epoch, FieldProblem, Kind, Modifier, Run

__all__ = ["SparsificationLoggingModifier"]


class SparsificationLoggingModifier(Modifier):
    """Logs the sparsity of every prunable parameter and of the model, and the bits of quantized weights."""

    kind: ClassVar[Kind] = "logging"
    without_effect: ClassVar[frozenset[str]] = frozenset({"log_types", "constant_logging"})
    start_epoch: Epoch = Field(default=0.0, description="The epoch of the first entry; -1: at once.")
    update_frequency: Epoch = Field(default=1.0, description="Epochs between two entries; -1: every step.")

    @model_validator(mode="after")
    def _moves(self) -> SparsificationLoggingModifier:
        if self.update_frequency <= 0 and self.update_frequency != -1:
            raise FieldProblem(
                "update_frequency", f"{self.update_frequency} is no distance in epochs; give more than 0, or -1 for every step."
            )
        return self

    def attach(self, run: Run) -> Active:
        """Logs at its own points of time."""
        raise NotImplementedError
