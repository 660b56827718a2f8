"""Sparse training: what is zero changes while training goes on, by movement, by phases or by regrowth.

These modifiers load, save and check; they do not run yet.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from sparsify import targets
from sparsify.masking import MaskType
from sparsify.modifiers.base import Active, Epoch, FieldProblem, Kind, Modifier, Names, Run, not_yet
from sparsify.modifiers.pruning import GradualPruning

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "ACDCPruningModifier",
    "MovementPruningModifier",
    "RigLPruningModifier",
    "TopKASTPruningModifier",
]

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def _mask_type(value: str | list[int]) -> str | list[int]:
    try:
        MaskType.parse(value)
    except (ValueError, IndexError):
        choices = "unstructured, block4, [1, 4], 2:4 (any N:M), tensorrt, filter or channel"
        raise ValueError(f"{value!r} is no mask type; give {choices}.") from None
    return value


MaskName = Annotated[str | list[int], AfterValidator(_mask_type)]


class MovementPruningModifier(GradualPruning):
    """Pruning by movement: weights that training moves towards zero go first (Sanh 2020, arXiv 2005.07683).

    The score of a weight accumulates -0.01 * gradient * weight over the steps; the rest is as GMPruningModifier.
    """

    runs: ClassVar[bool] = False

    def attach(self, run: Run) -> Active:
        """Says that it cannot run yet."""
        raise not_yet(self)


class SparseTraining(Modifier, ABC):
    """The fields of every modifier that trains at a constant sparsity with masks that move."""

    kind: ClassVar[Kind] = "pruning"
    runs: ClassVar[bool] = False
    without_effect: ClassVar[frozenset[str]] = frozenset({"log_types", "phased"})

    start_epoch: Epoch = Field(description="The epoch at which it starts; -1: epoch 0.")
    end_epoch: Epoch = Field(description="The epoch from which the masks no longer move.")
    update_frequency: Annotated[float, Field(allow_inf_nan=False)] = Field(
        description="Epochs between two updates of the masks; -1: every optimizer step."
    )
    params: Names = Field(
        description="What to prune: names of parameters or layers, re:patterns, layer types, __ALL__, __ALL_PRUNABLE__."
    )
    leave_enabled: bool = Field(
        default=True,
        description="Whether the masks stay after end_epoch; False: the weights may grow back from zero then.",
    )

    @field_validator("update_frequency")
    @classmethod
    def _frequency(cls, value: float) -> float:
        if value == -1 or value > 0:
            return value
        raise FieldProblem("update_frequency", f"{value} is no frequency; give epochs above 0, or -1 for every step")

    @model_validator(mode="after")
    def _ends(self) -> SparseTraining:
        if self.end_epoch == -1:
            raise FieldProblem("end_epoch", "-1 (never) is no end for masks that move; give the epoch of the last move")
        if not self.params:
            raise FieldProblem("params", "names nothing to prune; give names, patterns or __ALL_PRUNABLE__")
        return self

    def names(self) -> list[str]:
        """What `params` says, as a list."""
        return [self.params] if isinstance(self.params, str) else list(self.params)

    def targets(self, model: nn.Module) -> Mapping[str, nn.Parameter | nn.Module]:
        """The parameters that `params` means in `model`."""
        return targets.resolve_parameters(model, self.names(), where=f"{type(self).__name__}.params")

    @abstractmethod
    def attach(self, run: Run) -> Active:
        """Its work on one model."""


class ACDCPruningModifier(SparseTraining):
    """Alternating compressed and decompressed phases, of `update_frequency` epochs each (Peste 2021, arXiv 2106.12379).

    Phases are counted from the start; an even one is dense, unless less than one phase is left before the end, an odd
    one is sparse: so it ends sparse.
    """

    compression_sparsity: Fraction = Field(description="The fraction of zeros, 0 to 1, in a sparse phase.")
    global_sparsity: bool = Field(
        default=True, description="Whether all parameters are ranked together, or each by itself."
    )
    momentum_buffer_reset: bool = Field(
        default=True, description="Whether the optimizer's state is set to zero where a phase begins."
    )
    mask_type: MaskName = Field(
        default="unstructured", description="What becomes zero together, as in GMPruningModifier."
    )

    def attach(self, run: Run) -> Active:
        """Says that it cannot run yet."""
        raise not_yet(self)


class RigLPruningModifier(SparseTraining):
    """Constant sparsity whose masks move: drop by magnitude, grow by gradient (Evci 2020, arXiv 1911.11134).

    The fraction that is dropped and grown at epoch t of T is init_update_fraction * (1 + cos(pi t / T)) / 2.
    """

    final_sparsity: Fraction = Field(description="The fraction of zeros, 0 to 1, over all parameters, from the start.")
    num_grads: Annotated[int, Field(ge=1)] = Field(
        default=1, description="How many batches' gradients are averaged for a move."
    )
    momentum_buffer_reset: bool = Field(
        default=True, description="Whether the optimizer's state of a weight is set to zero when it is grown."
    )
    sparsity_strategy: Literal["erdos_renyi_kernel", "erdos_renyi", "uniform"] = Field(
        default="erdos_renyi_kernel",
        description="How the sparsity is spread over layers: by their shapes with or without the kernel, or evenly.",
    )
    init_update_fraction: Fraction = Field(
        default=0.3, description="The fraction of the kept weights that moves first."
    )
    grad_sampler_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Arguments for the gradient sampler that is given to modify()."
    )

    def attach(self, run: Run) -> Active:
        """Says that it cannot run yet."""
        raise not_yet(self)


class TopKASTPruningModifier(SparseTraining):
    """Forward with few weights, backward with more, so that others may come in (Jayakumar 2020, arXiv 2106.03517).

    Between steps, and so in every checkpoint, the model holds the weights of the forward set alone.
    """

    forward_sparsity: Fraction = Field(description="The fraction of zeros, 0 to 1, in the forward pass.")
    backward_sparsity: Fraction = Field(
        description="The fraction of weights, 0 to 1, that get no gradient; at most forward_sparsity."
    )
    global_sparsity: bool = Field(
        default=True, description="Whether all parameters are ranked together, or each by itself."
    )
    mask_type: MaskName = Field(
        default="unstructured", description="What becomes zero together, as in GMPruningModifier."
    )
    active_weight_decay: Annotated[float, Field(ge=0.0)] = Field(
        default=1e-4,
        description="Weight decay of the forward set; that of the rest of the backward set is divided by the forward "
        "density.",
    )

    @model_validator(mode="after")
    def _backward_is_larger(self) -> TopKASTPruningModifier:
        if self.backward_sparsity > self.forward_sparsity:
            raise FieldProblem(
                "backward_sparsity",
                f"{self.backward_sparsity} lies above forward_sparsity {self.forward_sparsity}: "
                "the backward pass sees the weights of the forward pass and more",
            )
        return self

    def attach(self, run: Run) -> Active:
        """Says that it cannot run yet."""
        raise not_yet(self)
