"""Whole channels: masked, then sliced away.

These modifiers load, save and check; they do not run yet.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from sparsify.modifiers.base import Active, Epoch, FieldProblem, Kind, Modifier, Run, not_yet
from sparsify.modifiers.pruning import GradualPruning

__all__ = ["LayerThinningModifier", "StructuredPruningModifier"]


class StructuredPruningModifier(GradualPruning):
    """Gradual pruning of whole channels: those that must go together are scored together.

    The rest is as GMPruningModifier.
    """

    runs: ClassVar[bool] = False
    param_groups: list[list[str]] | None = Field(
        default=None,
        description="Names of parameters whose channels must go together; null: found in the traced model.",
    )
    mask_type: Literal["filter", "channel"] = Field(
        default="filter", description="filter: what a layer gives; channel: what it reads."
    )

    def attach(self, run: Run) -> Active:
        """Says that it cannot run yet."""
        raise not_yet(self)


class LayerThinningModifier(Modifier):
    """Slices masked channels away: layers become really smaller, the optimizer's state with them."""

    kind: ClassVar[Kind] = "structure"
    runs: ClassVar[bool] = False
    without_effect: ClassVar[frozenset[str]] = frozenset({"log_types", "update_frequency"})
    param_group_dependency_map: dict[str, list[str]] | str | None = Field(
        default=None,
        description="Names of pruned parameters, joined by commas -> the parameters that lose the same channels, or "
        "that as JSON text; null: found in the traced model.",
    )
    structure_type: Literal["filter", "channel"] = Field(
        description="Which channels were masked: filter (what a layer gives) or channel (what it reads)."
    )
    update_epochs: list[Epoch] = Field(
        default_factory=list, description="Further epochs, after start_epoch, at which channels are sliced away."
    )
    strict: bool = Field(
        default=True, description="Whether a name that is not in the model, or a channel that cannot go, is an error."
    )

    @field_validator("update_epochs")
    @classmethod
    def _epochs(cls, value: list[float]) -> list[float]:
        for epoch in value:
            if epoch < 0:
                raise FieldProblem("update_epochs", f"{epoch} is not an epoch; give epochs of 0 or more")
        return value

    def attach(self, run: Run) -> Active:
        """Says that it cannot run yet."""
        raise not_yet(self)
