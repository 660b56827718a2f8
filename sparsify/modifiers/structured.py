"""Whole channels and layers: masked, sliced away, or replaced by nothing.

These modifiers load, save and check; they do not run yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from sparsify import targets
from sparsify.modifiers.base import Active, Epoch, FieldProblem, Kind, Modifier, Names, Run, not_yet
from sparsify.modifiers.pruning import GradualPruning

if TYPE_CHECKING:
    from torch import nn

__all__ = ["LayerPruningModifier", "LayerThinningModifier", "StructuredPruningModifier"]


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


class LayerPruningModifier(Modifier):
    """Replaces layers by the identity between its start and its end; at the end they come back."""

    kind: ClassVar[Kind] = "structure"
    runs: ClassVar[bool] = False
    without_effect: ClassVar[frozenset[str]] = frozenset({"log_types", "update_frequency"})
    layers: Names = Field(description="Names or patterns of the layers that are replaced, or types of layers.")

    def names(self) -> list[str]:
        """What `layers` says, as a list."""
        return [self.layers] if isinstance(self.layers, str) else list(self.layers)

    def targets(self, model: nn.Module) -> Mapping[str, nn.Parameter | nn.Module]:
        """The layers that `layers` means in `model`."""
        return targets.resolve_layers(model, self.names(), where=f"{type(self).__name__}.layers")

    def attach(self, run: Run) -> Active:
        """Says that it cannot run yet."""
        raise not_yet(self)
