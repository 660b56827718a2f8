"""Learning rates as functions of the epoch."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from sparsify.errors import did_you_mean
from sparsify.modifiers.base import Active, Epoch, Modifier, ModifierKind, Run
from sparsify.modifiers.learning_rate_ledger import Entry
from sparsify.modifiers.schedule import EPOCH_TOLERANCE, Clock, Window, between
from sparsify.output.field_errors import FieldProblem

__all__ = ["LearningRateFunctionModifier", "LearningRateModifier", "SetLearningRateModifier"]

Rate = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Groups = list[Annotated[int, Field(ge=0)]]
PositiveEpochs = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class SetLearningRateModifier(Modifier):
    """A fixed learning rate from its start until another learning-rate modifier starts."""

    kind: ClassVar[ModifierKind] = "learning_rate"
    without_effect: ClassVar[frozenset[str]] = frozenset({"log_types", "update_frequency"})
    learning_rate: Rate = Field(description="The learning rate, 0 or more.")
    param_groups: Groups | None = Field(
        default=None, description="Indices of the optimizer's parameter groups that it governs; null: all."
    )
    constant_logging: bool = Field(
        default=False, description="Whether the learning rate is logged at every step, not only where it changes."
    )

    def rate(self) -> Entry:
        """The fixed value."""
        groups = None if self.param_groups is None else tuple(self.param_groups)
        start, value = self.window.start, self.learning_rate
        return Entry(type(self).__name__, start, lambda _: value, False, groups, self.constant_logging)

    def attach(self, run: Run) -> Active:
        """Enters the ledger, which asks for the value at every step."""
        run.learning_rates.add(self.rate())
        return Active()


class LearningRateFunctionModifier(Modifier):
    """A learning rate that moves at every step from `init_lr` to `final_lr`, clamped to its window."""

    kind: ClassVar[ModifierKind] = "learning_rate"
    without_effect: ClassVar[frozenset[str]] = frozenset({"log_types", "update_frequency", "constant_logging"})
    start_epoch: Epoch = Field(description="The epoch at which the learning rate is `init_lr`; -1: at once.")
    end_epoch: Epoch = Field(description="The epoch at which the learning rate is `final_lr`, and stays.")
    lr_func: Literal["linear", "cosine", "cyclic_linear"] = Field(
        description="linear; cosine (half a period); cyclic_linear (linear within every cycle, then back to `init_lr`)."
    )
    init_lr: Rate = Field(description="The learning rate at the start.")
    final_lr: Rate = Field(description="The learning rate at the end.")
    cycle_epochs: PositiveEpochs = Field(default=1.0, description="The length of a cycle of cyclic_linear, in epochs.")
    param_groups: Groups | None = Field(
        default=None, description="Indices of the optimizer's parameter groups that it governs; null: all."
    )

    @model_validator(mode="after")
    def _ends(self) -> LearningRateFunctionModifier:
        if self.end_epoch == -1:
            raise FieldProblem("end_epoch", "-1 (never) ends no schedule; give the epoch that reaches final_lr")
        return self

    def value(self, clock: Clock) -> float:
        """The learning rate at `clock`, from x, the fraction of the window (or of the cycle) that has passed.

        linear, cyclic_linear: init + (final - init) x. cosine: init + (final - init) (1 - cos(pi x)) / 2.
        """
        if self.lr_func == "cyclic_linear":
            progress = _into_cycle(clock, self.window, self.cycle_epochs)
            return between("linear", self.init_lr, self.final_lr, progress)
        return between(self.lr_func, self.init_lr, self.final_lr, self.window.progress(clock.epoch))

    def rate(self) -> Entry:
        """`value`, at every step."""
        groups = None if self.param_groups is None else tuple(self.param_groups)
        return Entry(type(self).__name__, self.window.start, self.value, True, groups)

    def attach(self, run: Run) -> Active:
        """Enters the ledger, which asks for the value at every step."""
        run.learning_rates.add(self.rate())
        return Active()


class LearningRateModifier(Modifier):
    """The learning rate of one of torch's schedulers, as a function of the epoch: a resumed run has the same values."""

    kind: ClassVar[ModifierKind] = "learning_rate"
    without_effect: ClassVar[frozenset[str]] = frozenset({"log_types", "update_frequency"})
    lr_class: Literal["StepLR", "MultiStepLR", "ExponentialLR", "CosineAnnealingWarmRestarts"] = Field(
        description="StepLR, MultiStepLR and ExponentialLR move at whole epochs from the start, "
        "CosineAnnealingWarmRestarts at every step."
    )
    lr_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="Its arguments, in epochs. StepLR: step_size, gamma (0.1). MultiStepLR: milestones (absolute), "
        "gamma (0.1). ExponentialLR: gamma. CosineAnnealingWarmRestarts: cycle_epochs, lr_min (0.0).",
    )
    init_lr: Rate = Field(description="The learning rate at the start.")
    param_groups: Groups | None = Field(
        default=None, description="Indices of the optimizer's parameter groups that it governs; null: all."
    )
    constant_logging: bool = Field(
        default=False, description="Whether the learning rate is logged at every step, not only where it changes."
    )

    @model_validator(mode="after")
    def _arguments(self) -> LearningRateModifier:
        known, needed = _ARGUMENTS[self.lr_class]
        for name, value in self.lr_kwargs.items():
            if name not in known:
                raise FieldProblem(
                    "lr_kwargs",
                    f"{self.lr_class} has no {name!r}.{did_you_mean(name, known)} It takes {' and '.join(known)}, in "
                    "epochs",
                )
            values = value if name == "milestones" and isinstance(value, list) else [value]
            if isinstance(value, list) != (name == "milestones") or not all(_is_number(v) for v in values):
                raise FieldProblem("lr_kwargs", f"{name}: {value!r} is not {known[name]}")
            if name in ("step_size", "cycle_epochs") and value == 0:
                raise FieldProblem("lr_kwargs", f"{name}: 0 is not {known[name]}")
        if needed not in self.lr_kwargs:
            raise FieldProblem("lr_kwargs", f"{self.lr_class} needs {needed!r}, {known[needed]}")
        return self

    def value(self, clock: Clock) -> float:
        """The learning rate at `clock`: init_lr at the start, and from then on

        StepLR: init gamma^floor(k / step_size), with k whole epochs since the start. ExponentialLR: init gamma^k.
        MultiStepLR: init gamma^n, with n milestones <= start + k. CosineAnnealingWarmRestarts: from init to lr_min in
        half a cosine within every cycle (Loshchilov & Hutter 2017, https://arxiv.org/abs/1608.03983).

        Unlike torch's classes it does not multiply from step to step, so it has no state and does not drift.
        """
        window, given = self.window, self.lr_kwargs
        if self.lr_class == "CosineAnnealingWarmRestarts":
            progress = _into_cycle(clock, window, given["cycle_epochs"])
            return between("cosine", self.init_lr, float(given.get("lr_min", 0.0)), progress)
        whole = math.floor(max(0.0, min(clock.epoch, window.end) - window.start) + _tolerance(clock))
        gamma = float(given.get("gamma", 0.1))
        if self.lr_class == "StepLR":
            return float(self.init_lr * gamma ** math.floor(whole / given["step_size"] + 1e-9))
        if self.lr_class == "MultiStepLR":
            return float(self.init_lr * gamma ** sum(m <= window.start + whole for m in given["milestones"]))
        return float(self.init_lr * gamma**whole)

    def rate(self) -> Entry:
        """`value`, at every step."""
        groups = None if self.param_groups is None else tuple(self.param_groups)
        return Entry(type(self).__name__, self.window.start, self.value, True, groups, self.constant_logging)

    def attach(self, run: Run) -> Active:
        """Enters the ledger, which asks for the value at every step."""
        run.learning_rates.add(self.rate())
        return Active()


# lr_class -> what it takes, and which of that has no default.
_ARGUMENTS = {
    "StepLR": ({"step_size": "a number of epochs above 0", "gamma": "a factor"}, "step_size"),
    "MultiStepLR": ({"milestones": "a list of epochs", "gamma": "a factor"}, "milestones"),
    "ExponentialLR": ({"gamma": "a factor"}, "gamma"),
    "CosineAnnealingWarmRestarts": (
        {"cycle_epochs": "a number of epochs above 0", "lr_min": "a learning rate"},
        "cycle_epochs",
    ),
}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _tolerance(clock: Clock) -> float:
    """Epochs that a change may come before its moment."""
    return EPOCH_TOLERANCE / (clock.steps_per_epoch or 1)


def _into_cycle(clock: Clock, window: Window, length: float) -> float:
    """The fraction of the cycle at hand that has passed, 0..1; 1 only at the end of a window that ends with a cycle."""
    tolerance = _tolerance(clock) / length
    cycles = max(0.0, min(clock.epoch, window.end) - window.start) / length
    done = math.floor(cycles + tolerance)
    progress = max(0.0, cycles - done)
    # A last cycle that is complete is not rewound: nothing comes after it.
    return 1.0 if clock.reached(window.end) and done > 0 and progress <= tolerance else progress
