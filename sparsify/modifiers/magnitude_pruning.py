"""Weights go to zero on a schedule: gradual magnitude pruning, and holding the zeros that are there."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field
from torch import nn

from sparsify.errors import SparsifyWarning
from sparsify.model import distributed, targets
from sparsify.modifiers.base import Active, Modifier, ModifierKind, ParamNames, Run
from sparsify.modifiers.doubts import first_of, only_zeros
from sparsify.modifiers.gradual import Gradual, GradualPruning, trainable
from sparsify.modifiers.schedule import Clock

__all__ = ["ConstantPruningModifier", "GMPruningModifier", "GlobalMagnitudePruningModifier", "MagnitudePruningModifier"]


class GMPruningModifier(GradualPruning):
    """Gradual magnitude pruning (Zhu & Gupta 2017, https://arxiv.org/abs/1710.01878): the smallest weights go first."""

    def attach(self, run: Run) -> Active:
        return Gradual(self, run)


class MagnitudePruningModifier(GradualPruning):
    """GMPruningModifier, each parameter ranked by itself."""

    def attach(self, run: Run) -> Active:
        return Gradual(self, run)


class GlobalMagnitudePruningModifier(GradualPruning):
    """GMPruningModifier with one ranking over all parameters."""

    global_sparsity: bool = Field(
        default=True, description="Whether all parameters are ranked together, or each by itself."
    )

    def attach(self, run: Run) -> Active:
        return Gradual(self, run)


class ConstantPruningModifier(Modifier):
    """Holds the zeros that are there when it starts.

    A parameter that holds nothing but zeros and no mask is left out, with a warning: those are initial values, as those
    of `lora_B` and of the last norm of a residual block, and held they would never learn.
    """

    kind: ClassVar[ModifierKind] = "pruning"
    holds: ClassVar[bool] = True
    without_effect: ClassVar[frozenset[str]] = frozenset({"log_types", "phased"})

    params: ParamNames = Field(
        description="What to hold: names of parameters or layers, re:patterns, layer types, __ALL__, __ALL_PRUNABLE__."
    )
    update_frequency: Any = Field(default=-1.0, description="Without effect: the zeros are held after every step.")
    strict: bool = Field(default=True, description="Whether a name that matches nothing is an error.")

    def names(self) -> list[str]:
        return [self.params] if isinstance(self.params, str) else list(self.params)

    def targets(self, model: nn.Module) -> Mapping[str, nn.Parameter | nn.Module]:
        return targets.resolve_parameters(
            model, self.names(), where=f"{type(self).__name__}.params", strict=self.strict, to_mask=True
        )

    def foreseen_zeros(self, clock: Clock, model: nn.Module) -> dict[str, float | None]:
        """None for each parameter, since it holds the zeros that are there, from its start to its end."""
        within = clock.reached(self.window.start) and not clock.reached(self.window.end)
        return dict.fromkeys(self.targets(model)) if within else {}

    def activity(self, clock: Clock) -> str:
        """The words "holding zeros" from its start to its end."""
        return "holding zeros" if super().activity(clock) else ""

    def attach(self, run: Run) -> Active:
        return _Constant(self, run)


class _Constant(Active):
    """Zeros being held.

    Checkpoint: whether it has started and ended, and which parameters it holds; the masks are the Masker's.
    """

    def __init__(self, modifier: ConstantPruningModifier, run: Run) -> None:
        self.modifier = modifier
        self.run = run
        self.held: list[str] = []
        self.started = self.released = False
        where = f"{type(modifier).__name__}.params"
        parameters = targets.resolve_parameters(
            run.model, modifier.names(), where=where, strict=modifier.strict, to_mask=True
        )
        targets.refuse_unusable(parameters, where=where)
        self.names = [name for name, parameter in parameters.items() if parameter.numel()]

    def update(self, clock: Clock) -> None:
        window, masker = self.modifier.window, self.run.masker
        if not self.started and clock.reached(window.start):
            masker.refresh()
            parameters = targets.named_parameters(self.run.model)
            masks = {}
            who = type(self.modifier).__name__
            found = trainable(targets.still_there(parameters, self.names, where=who), who)
            empty = [name for name in only_zeros(found) if name not in masker]
            if empty:
                warnings.warn(
                    f"{who}: {first_of(list(map(repr, empty)))} hold{'s' * (len(empty) == 1)} nothing but zeros, "
                    "which are initial values and no pruned weights: left out, so that they learn. To keep them at "
                    "zero, freeze them (requires_grad_(False)).",
                    SparsifyWarning,
                    stacklevel=2,
                )
            for name in (name for name in found if name not in empty):
                mask = parameters[name].detach() != 0
                masks[name] = mask & masker.masks[name] if name in masker else mask
            distributed.check_same(masks)
            for name, mask in masks.items():
                masker.set(name, mask)
                self.run.log.scalar(f"sparsity/{name}", masker.sparsity()[name], clock.step)
            self.held = list(masks)
            self.started = True
        if self.started and not self.released and math.isfinite(window.end) and clock.reached(window.end):
            for name in self.held:
                masker.remove(name)
            self.released = True

    def state_dict(self) -> dict[str, Any]:
        return {"started": self.started, "released": self.released, "held": list(self.held)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.started, self.released = bool(state["started"]), bool(state["released"])
        self.held = [name for name in state["held"] if name in self.names]
