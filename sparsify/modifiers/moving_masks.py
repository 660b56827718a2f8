"""The fields and the work that modifiers with moving masks share: a constant sparsity, updated on a grid of epochs."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field, field_validator, model_validator
from torch import Tensor, nn

from sparsify.errors import SparsifyWarning, TargetError
from sparsify.model import distributed, targets
from sparsify.model.recomputed import recomputed_weights
from sparsify.modifiers.base import Active, Epoch, Modifier, ModifierKind, ParamNames, Run, check_frequency
from sparsify.modifiers.doubts import first_of, only_zeros
from sparsify.modifiers.gradual import fitting, trainable
from sparsify.modifiers.schedule import Clock, OnceAfterLoading, UpdateGrid
from sparsify.output.field_errors import FieldProblem
from sparsify.pruning.masks import MaskType, compute_masks

__all__: list[str] = []

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def _mask_type(value: str | list[int]) -> str | list[int]:
    try:
        MaskType.parse(value)
    except (ValueError, IndexError):
        choices = "unstructured, block4, [1, 4], 2:4 (any N:M), tensorrt, filter or channel"
        raise ValueError(f"{value!r} is no mask type; give {choices}.") from None
    return value


MaskName = Annotated[str | list[int], AfterValidator(_mask_type)]


class SparseTraining(Modifier, ABC):
    """The fields of every modifier that trains at a constant sparsity with masks that move."""

    kind: ClassVar[ModifierKind] = "pruning"
    without_effect: ClassVar[frozenset[str]] = frozenset({"log_types", "phased"})

    start_epoch: Epoch = Field(description="The epoch at which it starts; -1: epoch 0.")
    end_epoch: Epoch = Field(description="The epoch from which the masks no longer move.")
    update_frequency: Annotated[float, Field(allow_inf_nan=False)] = Field(
        description="Epochs between two updates of the masks; -1: every optimizer step."
    )
    params: ParamNames = Field(
        description="What to prune: names of parameters or layers, re:patterns, layer types, __ALL__, __ALL_PRUNABLE__."
    )
    leave_enabled: bool = Field(
        default=True,
        description="Whether the masks stay after end_epoch; False: the weights may grow back from zero then.",
    )

    @field_validator("update_frequency")
    @classmethod
    def _frequency(cls, value: float) -> float:
        check_frequency(value)
        return value

    @model_validator(mode="after")
    def _ends(self) -> SparseTraining:
        if self.end_epoch == -1:
            raise FieldProblem("end_epoch", "-1 (never) is no end for masks that move; give the epoch of the last move")
        if not self.params:
            raise FieldProblem("params", "names nothing to prune; give names, patterns or __ALL_PRUNABLE__")
        return self

    def names(self) -> list[str]:
        """The names in `params`, as a list."""
        return [self.params] if isinstance(self.params, str) else list(self.params)

    def targets(self, model: nn.Module) -> Mapping[str, nn.Parameter | nn.Module]:
        """The parameters that `params` means in `model`."""
        return targets.resolve_parameters(model, self.names(), where=f"{type(self).__name__}.params", to_mask=True)

    @abstractmethod
    def sparsities(self, point: float, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, float]:
        """The share of zeros in each parameter from `point` of the grid on, by its shape."""

    def foreseen_zeros(self, clock: Clock, model: nn.Module) -> dict[str, float | None]:
        """The `sparsities` at the last point of the grid; None once the masks are released."""
        point = UpdateGrid(self.window, self.update_frequency).latest(clock)
        if point is None:
            return {}
        shapes = {name: tuple(p.shape) for name, p in self.targets(model).items() if isinstance(p, nn.Parameter)}
        if point >= self.window.end and not self.leave_enabled:
            return dict.fromkeys(shapes)
        return {**self.sparsities(point, shapes)}

    def activity(self, clock: Clock) -> str:
        """The words "moving masks", and "holding zeros" from its end on."""
        if not clock.reached(self.window.start):
            return ""
        if not clock.reached(self.window.end):
            return "moving masks"
        return "holding zeros" if self.leave_enabled else ""

    @abstractmethod
    def attach(self, run: Run) -> Active:
        """Its work on one model."""


class Moving(Active, ABC):
    """Masks that move on a grid of epochs.

    Checkpoint: the point of the grid that is in force, whether the masks were released, and which parameters are meant.
    The masks are the Masker's.
    """

    def __init__(self, modifier: SparseTraining, run: Run, final: float, mask_type: str | list[int]) -> None:
        self.modifier = modifier
        self.run = run
        self.mask_type = MaskType.parse(mask_type)
        who = type(modifier).__name__
        where = f"{who}.params"
        parameters = targets.resolve_parameters(run.model, modifier.names(), where=where, to_mask=True)
        targets.refuse_unusable(parameters, where=where)
        for name, made in {made.direction: made for made in recomputed_weights(run.model).values()}.items():
            if name in parameters and made.divided_over:
                raise TargetError(
                    f"{where}: {name!r} is divided by its norm before every forward, by {made.kind}, and masks that "
                    "move may leave a norm of zero. Use GMPruningModifier, or remove the norm first."
                )
        self.said = getattr(modifier, "input_dims", {})
        self.finals, self.input_dims = fitting(
            run.model,
            dict.fromkeys(parameters, final),
            self.mask_type,
            where=where,
            strict=True,
            said_input_dims=self.said,
        )
        self.names = list(self.finals)
        self.held = targets.Held(run.model, self.names)
        self.grid = UpdateGrid(modifier.window, modifier.update_frequency)
        self.point: float | None = None
        self.released = False
        self.frozen: list[str] = []
        self.after_loading = OnceAfterLoading()

    def update(self, clock: Clock) -> None:
        point = self.grid.latest(clock)
        if point is None or self.released:
            return
        late = self._late(clock)
        if point == self.point and not late:
            return
        masker = self.run.masker
        masker.refresh()
        self.held.refresh()
        if self.point is None:
            # Asked again: channels may have been removed since.
            who = type(self.modifier).__name__
            fitting(self.run.model, self.finals, self.mask_type, where=who, strict=True, said_input_dims=self.said)
            there = targets.still_there(self._parameters(), self.names, where=who)
            self.names = list(trainable(there, who))
            self.frozen = [name for name in self.finals if name not in self.names]
            empty = only_zeros({n: p for n, p in self._parameters().items() if n not in masker})
            if empty:
                warnings.warn(
                    f"{who}: {first_of(list(map(repr, empty)))} hold"
                    f"{'s' * (len(empty) == 1)} nothing but zeros, so that its first mask goes by position. Leave out "
                    "what begins at zero (lora_B, zero-initialized norms), or give a later start_epoch.",
                    SparsifyWarning,
                    stacklevel=2,
                )
        if late:
            self.begin({name: p for name, p in self._parameters().items() if name in late}, point, clock)
        if point != self.point and not self.move(self._parameters(), point, clock):
            return
        self.point = point
        done = masker.sparsity()
        for name in self.names:
            self.run.log.scalar(f"sparsity/{name}", done.get(name, 0.0), clock.step)
        if point >= self.modifier.window.end and not self.modifier.leave_enabled:
            for name in self.names:
                masker.remove(name)
            self.released = True

    def _late(self, clock: Clock) -> list[str]:
        """Parameters without a mask though they should have one: the saved recipe did not name them, or their masks did
        not fit. Asked once, a step after loading: the weights of the checkpoint are loaded after this state."""
        if self.point is None or not self.after_loading.due(clock):
            return []
        return [name for name in self.names if name not in self.run.masker]

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.held.now().items() if name in self.names}

    @abstractmethod
    def move(self, parameters: Mapping[str, nn.Parameter], point: float, clock: Clock) -> bool:
        """Puts in force what belongs to a point of the grid; False to be asked again at the next step."""

    @abstractmethod
    def begin(self, parameters: Mapping[str, nn.Parameter], point: float, clock: Clock) -> None:
        """Sets the first masks of parameters that come late, at a point of the grid that is in force already."""

    def largest(self, weights: Mapping[str, Tensor], sparsity: float, together: bool) -> dict[str, Tensor]:
        """Masks that keep the largest weights, whatever the masks so far."""
        masks = compute_masks(weights, sparsity, self.mask_type, input_dims=self.input_dims, together=together)
        distributed.check_same(masks)
        return masks

    def state_dict(self) -> dict[str, Any]:
        return {
            "point": -1.0 if self.point is None else self.point,
            "released": self.released,
            "names": list(self.names),
            "frozen": list(self.frozen),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.point = None if state["point"] < 0 else float(state["point"])
        self.released = bool(state["released"])
        self.frozen = [name for name in state.get("frozen", ()) if name in self.finals]
        # States of older versions do not tell what was frozen.
        known = [name for name in self.finals if name not in self.frozen] if "frozen" in state else state["names"]
        self.names = [name for name in known if name in self.finals]
        self.after_loading.loaded()


def taken_over(saved: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Copies of saved tensors on the device of the parameters whose shape they have."""
    fits = {name: value for name, value in saved.items() if name in parameters}
    return {n: v.to(parameters[n].device, copy=True) for n, v in fits.items() if v.shape == parameters[n].shape}
