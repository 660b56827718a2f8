"""Learning rates as functions of the epoch."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from sparsify.modifiers.base import Active, Epoch, FieldProblem, Kind, Modifier, Run

__all__ = ["LearningRateFunctionModifier", "LearningRateModifier", "SetLearningRateModifier"]

Rate = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Groups = list[Annotated[int, Field(ge=0)]]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class SetLearningRateModifier(Modifier):
    """A fixed learning rate from its start until another learning-rate modifier starts."""

    kind: ClassVar[Kind] = "learning_rate"
    without_effect: ClassVar[frozenset[str]] = frozenset({"log_types", "update_frequency"})
    learning_rate: Rate = Field(description="The learning rate, 0 or more.")
    param_groups: Groups | None = Field(
        default=None, description="Indices of the optimizer's parameter groups that it governs; null: all."
    )
    constant_logging: bool = Field(
        default=False, description="Whether the learning rate is logged at every step, not only where it changes."
    )

    def attach(self, run: Run) -> Active:
        """Enters the ledger."""
        raise NotImplementedError


class LearningRateFunctionModifier(Modifier):
    """A learning rate that moves at every step from `init_lr` to `final_lr`, clamped to its window."""

    kind: ClassVar[Kind] = "learning_rate"
    without_effect: ClassVar[frozenset[str]] = frozenset({"log_types", "update_frequency", "constant_logging"})
    start_epoch: Epoch = Field(description="The epoch at which the learning rate is `init_lr`; -1: at once.")
    end_epoch: Epoch = Field(description="The epoch at which the learning rate is `final_lr`, and stays.")
    lr_func: Literal["linear", "cosine", "cyclic_linear"] = Field(
        description="linear; cosine (half a period); cyclic_linear (linear within every `cycle_epochs`, then back to `init_lr`)."
    )
    init_lr: Rate = Field(description="The learning rate at the start.")
    final_lr: Rate = Field(description="The learning rate at the end.")
    cycle_epochs: Positive = Field(default=1.0, description="The length of a cycle of cyclic_linear, in epochs.")
    param_groups: Groups | None = Field(
        default=None, description="Indices of the optimizer's parameter groups that it governs; null: all."
    )

    @model_validator(mode="after")
    def _ends(self) -> LearningRateFunctionModifier:
        if self.end_epoch == -1:
            raise FieldProblem("end_epoch", "-1 (never) is no end for a learning rate that moves; give the epoch of final_lr.")
        return self

    def attach(self, run: Run) -> Active:
        """Enters the ledger."""
        raise NotImplementedError


class LearningRateModifier(Modifier):
    """The learning rate of one of torch's schedulers, as a function of the epoch: a resumed run has the same values."""

    kind: ClassVar[Kind] = "learning_rate"
    without_effect: ClassVar[frozenset[str]] = frozenset({"log_types", "update_frequency"})
    lr_class: Literal["StepLR", "MultiStepLR", "ExponentialLR", "CosineAnnealingWarmRestarts"] = Field(
        description="StepLR, MultiStepLR and ExponentialLR move at whole epochs from the start; CosineAnnealingWarmRestarts at every step."
    )
    lr_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="In epochs. StepLR: step_size, gamma (0.1). MultiStepLR: milestones (absolute epochs), gamma (0.1). "
        "ExponentialLR: gamma. CosineAnnealingWarmRestarts: cycle_epochs, lr_min (0.0).",
    )
    init_lr: Rate = Field(description="The learning rate at the start.")
    param_groups: Groups | None = Field(
        default=None, description="Indices of the optimizer's parameter groups that it governs; null: all."
    )
    constant_logging: bool = Field(
        default=False, description="Whether the learning rate is logged at every step, not only where it changes."
    )

    def attach(self, run: Run) -> Active:
        """Enters the ledger."""
        raise NotImplementedError
