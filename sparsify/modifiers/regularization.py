"""What makes weights or activations inclined to become zero.

These modifiers load, save and check; they do not run yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from sparsify import targets
from sparsify.modifiers.base import Active, Kind, Modifier, Names, Run, not_yet

if TYPE_CHECKING:
    from torch import nn

__all__ = ["ASRegModifier", "PowerpropagationModifier"]


class PowerpropagationModifier(Modifier):
    """Weights are w = v * abs(v)^(alpha - 1), so that small ones learn slowly (Schwarz 2021, arXiv 2110.00296)."""

    kind: ClassVar[Kind] = "regularization"
    runs: ClassVar[bool] = False
    without_effect: ClassVar[frozenset[str]] = frozenset({"log_types", "update_frequency"})
    params: Names = Field(description="Names or patterns of the parameters, or of layers or their types.")
    alpha: Annotated[float, Field(ge=1.0)] = Field(
        default=1.0, description="The exponent, 1 or more; 1 changes nothing, 2 and above are usual."
    )
    strict: bool = Field(default=True, description="Whether a name that matches nothing is an error.")

    def names(self) -> list[str]:
        """What `params` says, as a list."""
        return [self.params] if isinstance(self.params, str) else list(self.params)

    def targets(self, model: nn.Module) -> Mapping[str, nn.Parameter | nn.Module]:
        """The parameters that `params` means in `model`."""
        where = f"{type(self).__name__}.params"
        return targets.resolve_parameters(model, self.names(), where=where, strict=self.strict)

    def attach(self, run: Run) -> Active:
        """Says that it cannot run yet."""
        raise not_yet(self)


class ASRegModifier(Modifier):
    """Adds a penalty on activations to the loss, so that more of them are zero."""

    kind: ClassVar[Kind] = "regularization"
    runs: ClassVar[bool] = False
    without_effect: ClassVar[frozenset[str]] = frozenset({"log_types", "update_frequency"})
    layers: Names = Field(description="Names or patterns of the layers whose activations count, or types of layers.")
    alpha: float | list[float] = Field(description="The weight of the penalty in the loss; a list: one for each layer.")
    layer_normalized: bool = Field(
        default=False, description="Whether the penalty is divided by the number of layers, so that it keeps its size."
    )
    reg_func: Literal["l1", "l2", "relu", "hs"] = Field(
        default="l1",
        description="l1: mean of absolute values; l2: of squares; relu: of positive parts; hs: Hoyer's square, which "
        "does not depend on scale.",
    )
    reg_tens: Literal["inp", "out"] = Field(default="inp", description="inp: what a layer reads; out: what it gives.")

    def names(self) -> list[str]:
        """What `layers` says, as a list."""
        return [self.layers] if isinstance(self.layers, str) else list(self.layers)

    def targets(self, model: nn.Module) -> Mapping[str, nn.Parameter | nn.Module]:
        """The layers that `layers` means in `model`."""
        return targets.resolve_layers(model, self.names(), where=f"{type(self).__name__}.layers")

    def attach(self, run: Run) -> Active:
        """Says that it cannot run yet."""
        raise not_yet(self)
