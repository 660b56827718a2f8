"""What training changes besides learning rates: weight decay, which parameters learn, values of parameters."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from sparsify.modifiers.base import Active, Epoch, FieldProblem, Kind, Modifier, Names, Run
from sparsify.schedule import Curve

__all__ = ["GradualParamModifier", "SetParamModifier", "SetWeightDecayModifier", "TrainableParamsModifier"]

Finite = Annotated[float, Field(allow_inf_nan=False)]


class SetWeightDecayModifier(Modifier):
    """Sets the optimizer's weight decay once, at its start."""

    kind: ClassVar[Kind] = "parameters"
    without_effect: ClassVar[frozenset[str]] = frozenset({"log_types", "update_frequency", "constant_logging"})
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(description="The weight decay, 0 or more.")
    param_groups: list[Annotated[int, Field(ge=0)]] | None = Field(
        default=None, description="Indices of the optimizer's parameter groups that it sets; null: all."
    )

    def attach(self, run: Run) -> Active:
        """Sets `weight_decay` at the start."""
        raise NotImplementedError


class TrainableParamsModifier(Modifier):
    """Says whether parameters learn (`requires_grad`) from its start to its end; undone at the end."""

    kind: ClassVar[Kind] = "parameters"
    without_effect: ClassVar[frozenset[str]] = frozenset({"log_types", "update_frequency"})
    params: Names = Field(description="Names or patterns of parameters or layers.")
    trainable: bool = Field(default=True, description="Whether they learn.")
    params_strict: bool = Field(default=True, description="Whether a name that matches nothing is an error.")

    def attach(self, run: Run) -> Active:
        """Finds the parameters."""
        raise NotImplementedError


class SetParamModifier(Modifier):
    """Sets every element of parameters to one value, once, at its start."""

    kind: ClassVar[Kind] = "parameters"
    without_effect: ClassVar[frozenset[str]] = frozenset({"log_types", "update_frequency", "constant_logging"})
    start_epoch: Epoch = Field(default=0.0, description="The epoch at which they are set; -1: at once.")
    params: Names = Field(description="Names or patterns of parameters.")
    val: Finite = Field(description="The value of every element.")
    params_strict: bool = Field(default=True, description="Whether a name that matches nothing is an error.")

    def attach(self, run: Run) -> Active:
        """Finds the parameters."""
        raise NotImplementedError


class GradualParamModifier(Modifier):
    """Moves every element of parameters from one value to another."""

    kind: ClassVar[Kind] = "parameters"
    without_effect: ClassVar[frozenset[str]] = frozenset({"log_types", "constant_logging"})
    start_epoch: Epoch = Field(description="The epoch of `init_val`; -1: at once.")
    end_epoch: Epoch = Field(description="The epoch of `final_val`.")
    update_frequency: Epoch = Field(default=-1.0, description="Epochs between two values; -1: every step.")
    params: Names = Field(description="Names or patterns of parameters.")
    init_val: Finite = Field(description="The value at the start.")
    final_val: Finite = Field(description="The value at the end, exactly.")
    inter_func: Curve = Field(default="linear", description="The curve between the two.")
    params_strict: bool = Field(default=True, description="Whether a name that matches nothing is an error.")

    @model_validator(mode="after")
    def _moves(self) -> GradualParamModifier:
        if self.end_epoch == -1:
            raise FieldProblem("end_epoch", "-1 (never) is no end for a value that moves; give the epoch of final_val.")
        if self.update_frequency <= 0 and self.update_frequency != -1:
            raise FieldProblem(
                "update_frequency", f"{self.update_frequency} is no distance in epochs; give more than 0, or -1 for every step."
            )
        return self

    def attach(self, run: Run) -> Active:
        """Finds the parameters."""
        raise NotImplementedError
