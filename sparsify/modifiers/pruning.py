"""Weights go to zero on a schedule: gradual magnitude pruning, and holding the zeros that are there."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from sparsify import targets
from sparsify.modifiers.base import Active, Epoch, FieldProblem, Kind, Modifier, Names, Run, not_yet
from sparsify.schedule import Curve

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "ConstantPruningModifier",
    "GMPruningModifier",
    "GlobalMagnitudePruningModifier",
    "GradualPruning",
    "MagnitudePruningModifier",
]

FROM_PARAM = "__FROM_PARAM__"
MaskType = str | list[int]
ScoreType = Literal["magnitude", "movement", "obs", "mfac"]

_MASK_NAME = re.compile(r"unstructured|block\d*|tensorrt|filter|channel|[1-9]\d*:[1-9]\d*")


def _fraction(name: str, value: float) -> float:
    if 0.0 <= value <= 1.0:
        return value
    hint = f"; did you mean {value / 100:g}?" if 1.0 < value <= 100.0 else "; 0.8 means that 80 % are zero"
    raise FieldProblem(name, f"{value} is not a fraction in [0, 1]{hint}")


class GradualPruning(Modifier, ABC):
    """The fields of every modifier that prunes on a ramp from one sparsity to another, and their checks.

    A subclass changes defaults, adds its own fields, or sets `runs` to False while it cannot run yet.
    """

    kind: ClassVar[Kind] = "pruning"
    without_effect: ClassVar[frozenset[str]] = frozenset({"log_types", "phased"})

    start_epoch: Epoch = Field(description="The epoch at which it starts, with `init_sparsity`; -1: epoch 0.")
    end_epoch: Epoch = Field(description="The epoch at which `final_sparsity` is reached, whatever the frequency.")
    update_frequency: Annotated[float, Field(allow_inf_nan=False)] = Field(
        description="Epochs between two updates of the masks; -1: every optimizer step."
    )
    init_sparsity: float | Literal["__FROM_PARAM__"] = Field(
        description="The fraction of zeros, 0 to 1, at start_epoch; __FROM_PARAM__: what is there when it starts."
    )
    final_sparsity: float | dict[float, Names] = Field(
        description="The fraction of zeros, 0 to 1, at end_epoch; or {fraction: [names of parameters]} with `params: []`."
    )
    params: Names = Field(
        default=[],
        description="What to prune: names of parameters or layers, re:patterns, layer types, __ALL__, __ALL_PRUNABLE__.",
    )
    leave_enabled: bool = Field(
        default=True,
        description="Whether the masks stay after end_epoch; False: the weights may grow back from zero then.",
    )
    inter_func: Curve = Field(default="cubic", description="The curve from init_sparsity to final_sparsity.")
    mask_type: MaskType = Field(
        default="unstructured",
        description="What becomes zero together: unstructured; block4 (1x4 along the input channels); [a, b] blocks of "
        "a output by b input channels, -1 for all of them; N:M, of every M along the input channels N stay; tensorrt, "
        "which is 2:4; filter; channel.",
    )
    global_sparsity: bool = Field(
        default=False, description="Whether all parameters are ranked together, or each by itself."
    )
    score_type: ScoreType = Field(default="magnitude", description="What a weight is worth: those worth least go first.")
    strict: bool = Field(
        default=True,
        description="Whether a name that matches nothing, or a layer that the mask type does not fit, is an error; "
        "otherwise it is left out and reported.",
    )

    @field_validator("update_frequency")
    @classmethod
    def _frequency(cls, value: float) -> float:
        if value == -1 or value > 0:
            return value
        raise FieldProblem("update_frequency", f"{value} is no frequency; give epochs above 0, or -1 for every step")

    @field_validator("init_sparsity", mode="before")
    @classmethod
    def _init(cls, value: Any) -> Any:
        if isinstance(value, bool) or not (isinstance(value, int | float) or value == FROM_PARAM):
            raise FieldProblem("init_sparsity", f"{value!r} is neither a fraction in [0, 1] nor {FROM_PARAM}")
        return value if isinstance(value, str) else _fraction("init_sparsity", value)

    @field_validator("final_sparsity", mode="before")
    @classmethod
    def _final_type(cls, value: Any) -> Any:
        for sparsity in value if isinstance(value, dict) else (value,):
            if isinstance(sparsity, bool) or not isinstance(sparsity, int | float):
                raise FieldProblem("final_sparsity", f"{value!r} is neither a fraction in [0, 1] nor {{fraction: [names]}}")
        return value

    @field_validator("final_sparsity")
    @classmethod
    def _final(cls, value: float | dict[float, Names]) -> float | dict[float, Names]:
        for sparsity in value if isinstance(value, dict) else (value,):
            _fraction("final_sparsity", sparsity)
        if isinstance(value, dict) and not value:
            raise FieldProblem("final_sparsity", "{} names nothing to prune; give {0.8: [names of parameters]}")
        return value

    @field_validator("mask_type", mode="before")
    @classmethod
    def _mask_kind(cls, value: Any) -> Any:
        if not isinstance(value, str | list):
            raise FieldProblem("mask_type", f"{value!r} is no mask type; quote N:M, like '2:4'")
        return value

    @field_validator("mask_type")
    @classmethod
    def _mask(cls, value: MaskType) -> MaskType:
        if isinstance(value, list):
            if len(value) != 2 or any(size < 1 and size != -1 for size in value):
                raise FieldProblem("mask_type", f"{value} is no block; give [output channels, input channels], like [1, 4]")
            return value
        if not _MASK_NAME.fullmatch(value) or value == "block0":
            raise FieldProblem(
                "mask_type",
                f"{value!r} is no mask type; give unstructured, block4, [1, 4], 2:4 (any N:M), tensorrt, filter or channel",
            )
        if ":" in value:
            keep, of = map(int, value.split(":"))
            if keep > of:
                raise FieldProblem("mask_type", f"{value!r} keeps more than there is; did you mean '{of}:{keep}'?")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> GradualPruning:
        if self.end_epoch == -1:
            raise FieldProblem("end_epoch", "-1 (never) cannot end a ramp; give the epoch that reaches final_sparsity")
        if isinstance(self.final_sparsity, dict):
            if self.params:
                raise FieldProblem("params", "final_sparsity names the parameters already; give params: [] with it")
            if self.global_sparsity and len(self.final_sparsity) > 1:
                raise FieldProblem("final_sparsity", "one ranking over all parameters has one sparsity; give a single number")
        elif not self.params:
            raise FieldProblem("params", "names nothing to prune; give names, patterns or __ALL_PRUNABLE__")
        if not isinstance(self.init_sparsity, str):
            for final in self.final_by_names():
                if self.init_sparsity > final:
                    raise FieldProblem("init_sparsity", f"{self.init_sparsity} lies above final_sparsity {final}: a mask only grows")
        return self

    def final_by_names(self) -> dict[float, list[str]]:
        """The names to prune, by the sparsity that they end with."""
        if isinstance(self.final_sparsity, dict):
            return {s: [n] if isinstance(n, str) else list(n) for s, n in self.final_sparsity.items()}
        return {self.final_sparsity: [self.params] if isinstance(self.params, str) else list(self.params)}

    def names(self) -> list[str]:
        return [name for names in self.final_by_names().values() for name in names]

    def targets(self, model: nn.Module) -> Mapping[str, nn.Parameter | nn.Module]:
        field = "final_sparsity" if isinstance(self.final_sparsity, dict) else "params"
        return targets.resolve_parameters(
            model, self.names(), where=f"{type(self).__name__}.{field}", strict=self.strict
        )

    @abstractmethod
    def attach(self, run: Run) -> Active: ...


class GMPruningModifier(GradualPruning):
    """Gradual magnitude pruning (Zhu & Gupta 2017, https://arxiv.org/abs/1710.01878): the smallest weights go first."""

    def attach(self, run: Run) -> Active:
        raise not_yet(self)


class MagnitudePruningModifier(GradualPruning):
    """GMPruningModifier, each parameter ranked by itself."""

    def attach(self, run: Run) -> Active:
        raise not_yet(self)


class GlobalMagnitudePruningModifier(GradualPruning):
    """GMPruningModifier with one ranking over all parameters."""

    global_sparsity: bool = Field(
        default=True, description="Whether all parameters are ranked together, or each by itself."
    )

    def attach(self, run: Run) -> Active:
        raise not_yet(self)


class ConstantPruningModifier(Modifier):
    """Holds the zeros that are there when it starts."""

    kind: ClassVar[Kind] = "pruning"
    without_effect: ClassVar[frozenset[str]] = frozenset({"log_types", "phased"})

    params: Names = Field(
        description="What to hold: names of parameters or layers, re:patterns, layer types, __ALL__, __ALL_PRUNABLE__."
    )
    update_frequency: Any = Field(default=-1.0, description="Without effect: the zeros are held after every step.")
    strict: bool = Field(default=True, description="Whether a name that matches nothing is an error.")

    def names(self) -> list[str]:
        return [self.params] if isinstance(self.params, str) else list(self.params)

    def targets(self, model: nn.Module) -> Mapping[str, nn.Parameter | nn.Module]:
        return targets.resolve_parameters(model, self.names(), where=f"{type(self).__name__}.params", strict=self.strict)

    def attach(self, run: Run) -> Active:
        raise not_yet(self)
