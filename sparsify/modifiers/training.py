"""Training settings besides learning rates: weight decay, which parameters learn, values of parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import nn

from sparsify.model import targets
from sparsify.modifiers.base import Active, Epoch, Modifier, ModifierKind, ParamNames, Run, check_frequency
from sparsify.modifiers.learning_rate_ledger import check_groups
from sparsify.modifiers.schedule import Clock, Curve, UpdateGrid, between
from sparsify.output.field_errors import FieldProblem

__all__ = ["GradualParamModifier", "SetParamModifier", "SetWeightDecayModifier", "TrainableParamsModifier"]

Finite = Annotated[float, Field(allow_inf_nan=False)]


class SetWeightDecayModifier(Modifier):
    """Sets the optimizer's weight decay once, at its start."""

    kind: ClassVar[ModifierKind] = "parameters"
    without_effect: ClassVar[frozenset[str]] = frozenset({"log_types", "update_frequency", "constant_logging"})
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(description="The weight decay, 0 or more.")
    param_groups: list[Annotated[int, Field(ge=0)]] | None = Field(
        default=None, description="Indices of the optimizer's parameter groups that it sets; null: all."
    )

    def attach(self, run: Run) -> Active:
        """Sets `weight_decay` at the start."""
        if run.optimizers:
            check_groups(run.optimizers, self.param_groups, f"{type(self).__name__}.param_groups")
        return _WeightDecay(self, run)


class TrainableParamsModifier(Modifier):
    """Says whether parameters learn (`requires_grad`) from its start to its end; undone at the end."""

    kind: ClassVar[ModifierKind] = "parameters"
    without_effect: ClassVar[frozenset[str]] = frozenset({"log_types", "update_frequency"})
    params: ParamNames = Field(description="Names or patterns of parameters or layers.")
    trainable: bool = Field(default=True, description="Whether they learn.")
    params_strict: bool = Field(default=True, description="Whether a name that matches nothing is an error.")

    def names(self) -> list[str]:
        return _names_given(self.params)

    def targets(self, model: nn.Module) -> Mapping[str, nn.Parameter | nn.Module]:
        return _found_parameters(model, self.params, type(self), self.params_strict)

    def attach(self, run: Run) -> Active:
        """Finds the parameters."""
        return _Trainable(self, list(self.targets(run.model)), run.model)


class SetParamModifier(Modifier):
    """Sets every element of parameters to one value, once, at its start."""

    kind: ClassVar[ModifierKind] = "parameters"
    without_effect: ClassVar[frozenset[str]] = frozenset({"log_types", "update_frequency", "constant_logging"})
    start_epoch: Epoch = Field(default=0.0, description="The epoch at which they are set; -1: at once.")
    params: ParamNames = Field(description="Names or patterns of parameters.")
    val: Finite = Field(description="The value of every element.")
    params_strict: bool = Field(default=True, description="Whether a name that matches nothing is an error.")

    def names(self) -> list[str]:
        return _names_given(self.params)

    def targets(self, model: nn.Module) -> Mapping[str, nn.Parameter | nn.Module]:
        return _found_parameters(model, self.params, type(self), self.params_strict)

    def attach(self, run: Run) -> Active:
        """Finds the parameters."""
        return _Value(
            list(self.targets(run.model)),
            run.model,
            lambda clock: self.val if clock.reached(self.window.start) else None,
        )


class GradualParamModifier(Modifier):
    """Moves every element of parameters from one value to another."""

    kind: ClassVar[ModifierKind] = "parameters"
    without_effect: ClassVar[frozenset[str]] = frozenset({"log_types", "constant_logging"})
    start_epoch: Epoch = Field(description="The epoch of `init_val`; -1: at once.")
    end_epoch: Epoch = Field(description="The epoch of `final_val`.")
    update_frequency: Epoch = Field(default=-1.0, description="Epochs between two values; -1: every step.")
    params: ParamNames = Field(description="Names or patterns of parameters.")
    init_val: Finite = Field(description="The value at the start.")
    final_val: Finite = Field(description="The value at the end, exactly.")
    inter_func: Curve = Field(default="linear", description="The curve between the two.")
    params_strict: bool = Field(default=True, description="Whether a name that matches nothing is an error.")

    @model_validator(mode="after")
    def _moves(self) -> GradualParamModifier:
        if self.end_epoch == -1:
            raise FieldProblem("end_epoch", "-1 (never) ends no schedule; give the epoch that reaches final_val")
        check_frequency(self.update_frequency)
        return self

    def names(self) -> list[str]:
        return _names_given(self.params)

    def targets(self, model: nn.Module) -> Mapping[str, nn.Parameter | nn.Module]:
        return _found_parameters(model, self.params, type(self), self.params_strict)

    def value(self, clock: Clock) -> float | None:
        """The value at the last point of the grid that is due at `clock`; None before the start."""
        point = UpdateGrid(self.window, self.update_frequency).latest(clock)
        return (
            None
            if point is None
            else between(self.inter_func, self.init_val, self.final_val, self.window.progress(point))
        )

    def attach(self, run: Run) -> Active:
        """Finds the parameters."""
        return _Value(list(self.targets(run.model)), run.model, self.value)


class _WeightDecay(Active):
    """Sets weight decay when it is due.

    Checkpoint: nothing; it is set again after loading, to the same value.
    """

    def __init__(self, modifier: SetWeightDecayModifier, run: Run) -> None:
        self._modifier, self._optimizers, self._log = modifier, run.optimizers, run.log
        self._set = False

    def update(self, clock: Clock) -> None:
        if self._set or not self._optimizers or not clock.reached(self._modifier.window.start):
            return
        chosen = self._modifier.param_groups
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        for index, group in enumerate(groups):
            if chosen is None or index in chosen:
                group["weight_decay"] = self._modifier.weight_decay
        self._log.scalar("weight_decay", self._modifier.weight_decay, clock.step)
        self._set = True

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._set = False


class _Trainable(Active):
    """Sets requires_grad inside its window, and puts back what was there.

    Checkpoint: what was there when it started.
    """

    def __init__(self, modifier: TrainableParamsModifier, names: list[str], model: nn.Module) -> None:
        self._modifier, self._names, self._model = modifier, names, model
        self._before: dict[str, bool] | None = None

    def update(self, clock: Clock) -> None:
        window = self._modifier.window
        inside = clock.reached(window.start) and not clock.reached(window.end)
        if not inside:
            self.detach()
        elif self._before is None:
            parameters = targets.named_parameters(self._model)
            before = {name: parameters[name].requires_grad for name in self._names}
            # Remembered first: Ctrl-C between the two can be undone.
            self._before = before
            for name in self._names:
                parameters[name].requires_grad_(self._modifier.trainable)

    def detach(self) -> None:
        if self._before is not None:
            parameters = targets.named_parameters(self._model)
            for name, learned in self._before.items():
                if name in parameters:
                    parameters[name].requires_grad_(learned)
            self._before = None

    def state_dict(self) -> dict[str, Any]:
        return {} if self._before is None else {"before": dict(self._before)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.detach()
        if "before" in state:
            parameters = targets.named_parameters(self._model)
            self._before = {name: bool(state["before"][name]) for name in self._names if name in state["before"]}
            for name in self._before:
                parameters[name].requires_grad_(self._modifier.trainable)


class _Value(Active):
    """Fills parameters with a value whenever the schedule moves to another one.

    Checkpoint: the last value that was put in force, so that a resumed run does not undo what was learned since.
    """

    def __init__(self, names: list[str], model: nn.Module, value: Callable[[Clock], float | None]) -> None:
        self._names, self._model, self._value = names, model, value
        self._last: float | None = None

    def update(self, clock: Clock) -> None:
        value = self._value(clock)
        if value is None or value == self._last:
            return
        parameters = targets.named_parameters(self._model)
        with torch.no_grad():
            for name in self._names:
                parameters[name].fill_(value)
        self._last = value

    def state_dict(self) -> dict[str, Any]:
        return {"last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._last = state["last"]


def _names_given(names: ParamNames) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _found_parameters(
    model: nn.Module, names: ParamNames, cls: type[Modifier], strict: bool
) -> dict[str, nn.Parameter]:
    return targets.resolve_parameters(model, names, where=f"{cls.__name__}.params", strict=strict)
