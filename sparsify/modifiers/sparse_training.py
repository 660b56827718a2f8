"""Sparse training: masks that change while training goes on, by movement, by phases or by regrowth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from sparsify.model import distributed, gradients, targets
from sparsify.model.optimizer_state import reset_where
from sparsify.modifiers.base import Active, Run
from sparsify.modifiers.gradual import Gradual, GradualPruning, ScoreType
from sparsify.modifiers.moving_masks import Fraction, MaskName, Moving, SparseTraining, taken_over
from sparsify.modifiers.schedule import EPOCH_TOLERANCE, Clock, UpdateGrid
from sparsify.output.field_errors import FieldProblem
from sparsify.pruning import layer_sparsity
from sparsify.pruning.selection import mask_lowest

__all__ = [
    "ACDCPruningModifier",
    "MovementPruningModifier",
    "RigLPruningModifier",
]


class MovementPruningModifier(GradualPruning):
    """Pruning by movement: weights that training moves towards zero go first (Sanh 2020,
    https://arxiv.org/abs/2005.07683).

    The score of a weight accumulates -0.01 * gradient * weight over the steps since `modify`; the rest is as
    GMPruningModifier. What differs from the paper: the scores are that sum, and no parameters that an optimizer
    trains; a mask only grows; and before the first step, when no score is there, the smallest weights go first.

    Cost: the scores are added up at every step until the end, 1.0 ns a weight on one CPU core with the masks, where the
    masks of GMPruningModifier take 0.3; 4 bytes a weight. An update takes 12 ns a weight.
    """

    resizable: ClassVar[bool] = False
    sharded: ClassVar[bool] = False
    score_type: ScoreType = Field(
        default="movement", description="Always movement; magnitude is read from older files, and means the same."
    )

    @field_validator("score_type")
    @classmethod
    def _only_movement(cls, value: ScoreType) -> ScoreType:
        if value in ("movement", "magnitude"):
            return value
        raise FieldProblem("score_type", f"{value!r} is another modifier's; leave it out here")

    def attach(self, run: Run) -> Active:
        return _Movement(self, run)


class ACDCPruningModifier(SparseTraining):
    """Alternating compressed and decompressed phases, of `update_frequency` epochs each (Peste 2021).

    Phases are counted from the start; an even one is dense, unless less than one phase is left before the end, an odd
    one is sparse: so it ends sparse. In a dense phase all weights are trained, those that were pruned from zero on.
    Paper: https://arxiv.org/abs/2106.12379. What differs: `momentum_buffer_reset` holds for any optimizer, Adam's
    moments and their count of steps included.
    """

    compression_sparsity: Fraction = Field(description="The fraction of zeros, 0 to 1, in a sparse phase.")
    global_sparsity: bool = Field(
        default=True, description="Whether all parameters are ranked together, or each by itself."
    )
    momentum_buffer_reset: bool = Field(
        default=True, description="Whether the optimizer forgets what it remembers of the weights when they go dense."
    )
    mask_type: MaskName = Field(
        default="unstructured", description="What becomes zero together, as in GMPruningModifier."
    )
    input_dims: dict[str, int] = Field(
        default={}, description="Dimension of the input channels of raw parameters, as in GMPruningModifier."
    )

    @model_validator(mode="after")
    def _phases_have_a_length(self) -> ACDCPruningModifier:
        if self.update_frequency == -1:
            raise FieldProblem("update_frequency", "-1 (every step) is no length of a phase; give epochs, 5 is usual")
        if self.update_frequency <= EPOCH_TOLERANCE:
            raise FieldProblem("update_frequency", f"{self.update_frequency} is no length of a phase; 5 is usual")
        return self

    def dense(self, point: float) -> bool:
        """True if the phase that begins at `point` is a dense one."""
        window, length = self.window, self.update_frequency
        phase = math.floor((point - window.start) / length + EPOCH_TOLERANCE)
        return point < window.end and phase % 2 == 0 and window.end - point >= length * (1.0 - EPOCH_TOLERANCE)

    def sparsities(self, point: float, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, float]:
        """Nothing in a dense phase."""
        return dict.fromkeys(shapes, 0.0 if self.dense(point) else self.compression_sparsity)

    def attach(self, run: Run) -> Active:
        return _ACDC(self, run)


class RigLPruningModifier(SparseTraining):
    """Constant sparsity whose masks move: drop by magnitude, grow by gradient (Evci 2020,
    https://arxiv.org/abs/1911.11134).

    At epoch t of T, the fraction init_update_fraction * (1 + cos(pi t / T)) / 2 of the weights that are kept is
    dropped, the smallest first, and as many are grown from zero where the gradient is largest; a weight that was just
    dropped may be among them, and then keeps its value. Gradients are those of the last `num_grads` steps of
    training, or of losses that the `grad_sampler` given to modify() yields, then of the masked weights as they are
    now. What differs from the paper: the first masks keep the largest weights and are not random; what the optimizer
    remembers of a grown weight is forgotten, under Adam both moments.

    Cost: gradients are copied in the last `num_grads` steps before a move alone; a move takes 7 ns a weight on one CPU
    core, and its gradients with them 4 bytes a weight.
    """

    resizable: ClassVar[bool] = False
    sharded: ClassVar[bool] = False
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

    def sparsities(self, point: float, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, float]:
        """Spread over the layers by their shapes, from the start on."""
        return layer_sparsity.spread(shapes, self.final_sparsity, self.sparsity_strategy)

    def attach(self, run: Run) -> Active:
        return _RigL(self, run)


class _Movement(Gradual):
    """Movement pruning at work.

    Checkpoint: that of Gradual, and the scores until the end is reached.
    """

    each_optimizer: ClassVar[bool] = True

    def __init__(self, modifier: MovementPruningModifier, run: Run) -> None:
        super().__init__(modifier, run)
        self.held = targets.Held(run.model, self.finals)
        self.gradients = gradients.StepGradients(run.optimizers)
        self.sums: dict[str, Tensor] = {}
        self.step: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}

    @property
    def done(self) -> bool:
        """True once no mask will change any more, so that no score is needed."""
        return self.point is not None and self.point >= self.modifier.window.end

    def update(self, clock: Clock) -> None:
        point = self.point
        super().update(clock)
        if self.point != point:
            self.held.refresh()
        if self.done:
            self.sums.clear()

    def before_step(self) -> None:
        if self.done:
            return
        parameters = self.run.stepped(self.held.now())
        found = self.gradients.before(parameters, closure=self.run.closure, optimizer=self.run.stepping)
        self.step = {name: _product(gradient, parameters[name]) for name, gradient in found.items()}
        # The step will compute gradients of the weights as they are now.
        self.weights = {} if found else {name: p.detach().clone() for name, p in parameters.items()}

    def after_closure(self) -> None:
        if not self.done:
            self.gradients.keep(self.run.stepped(self.held.now()))

    def after_step(self) -> None:
        if self.done:
            return
        parameters = self.run.stepped(self.held.now())
        late = self.gradients.after(parameters)
        if late is not None:
            weights = self.weights or parameters
            self.step = {name: _product(gradient, weights[name]) for name, gradient in late.items()}
        for name, product in self.step.items():
            # Scaled while it is added: one tensor fewer is allocated, which is most of the cost.
            self.sums[name] = self.sums[name].add_(product, alpha=-0.01) if name in self.sums else product.mul_(-0.01)
        self.step, self.weights = {}, {}

    def scores(self, parameters: Mapping[str, nn.Parameter]) -> tuple[Mapping[str, Tensor], bool]:
        if not self.sums:
            return parameters, True
        # One that no gradient ever reached has moved nowhere.
        return {n: self.sums[n] if n in self.sums else torch.zeros_like(p) for n, p in parameters.items()}, False

    def detach(self) -> None:
        self.sums.clear()
        self.step, self.weights = {}, {}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "scores": dict(self.sums)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.sums = taken_over(state["scores"], self.held.now())


def _product(gradient: Tensor, weight: Tensor) -> Tensor:
    """gradient * weight, in float32 or better: a sum in half precision stands still after 2,000 steps."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return gradient.to(wide) * weight.detach().to(wide)


class _ACDC(Moving):
    """Dense and sparse phases at work.

    Checkpoint: that of Moving; the phase is recomputed from the point of the grid.
    """

    modifier: ACDCPruningModifier

    def __init__(self, modifier: ACDCPruningModifier, run: Run) -> None:
        super().__init__(modifier, run, modifier.compression_sparsity, modifier.mask_type)

    def move(self, parameters: Mapping[str, nn.Parameter], point: float, clock: Clock) -> bool:
        modifier, masker = self.modifier, self.run.masker
        if modifier.dense(point):
            for name, parameter in parameters.items():
                if name in masker:
                    masker.remove(name)
                    if modifier.momentum_buffer_reset:
                        reset_where(self.run.masker.optimizer, parameter)
            return True
        if any(name not in masker for name in parameters):
            sparsity = next(iter(self.finals.values()), modifier.compression_sparsity)
            for name, mask in self.largest(parameters, sparsity, modifier.global_sparsity).items():
                masker.set(name, mask)
        return True

    def begin(self, parameters: Mapping[str, nn.Parameter], point: float, clock: Clock) -> None:
        self.move(self._parameters(), point, clock)


class _RigL(Moving):
    """RigL at work.

    Checkpoint: that of Moving, each layer's sparsity, and the gradients that were collected.
    """

    each_optimizer: ClassVar[bool] = True
    modifier: RigLPruningModifier

    def __init__(self, modifier: RigLPruningModifier, run: Run) -> None:
        super().__init__(modifier, run, modifier.final_sparsity, "unstructured")
        gradients.check_sampler(run.grad_sampler)
        self.gradients = gradients.RoundGradients(run.optimizers)
        self.sparsities: dict[str, float] = {}
        self.collecting = self.nearly = self.last_alone = False
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def update(self, clock: Clock) -> None:
        super().update(clock)
        self._plan(clock)

    def _plan(self, clock: Clock) -> None:
        """Decides if the next step's gradients are copied: only those of the last steps before a move are."""
        window, frequency = self.modifier.window, self.modifier.update_frequency
        self.collecting = self.nearly = False
        if self.run.grad_sampler is not None or self.point is None or self.released or self.point >= window.end:
            return
        # Where the next move's step is not known ahead, the last gradients are kept alone.
        self.last_alone = clock.steps_per_epoch is None or UpdateGrid(window, frequency).every_step(clock)
        if self.last_alone:
            self.collecting = self.nearly = True
            return
        k = math.floor((self.point - window.start) / frequency + EPOCH_TOLERANCE) + 1
        upcoming = window.start + k * frequency
        left = (upcoming - clock.epoch) * (clock.steps_per_epoch or 1)
        # The last point is the end, and there nothing moves.
        self.collecting = upcoming < window.end and left <= self.modifier.num_grads + EPOCH_TOLERANCE
        # Optimizers that step after the counting one have their last step before the move in the round before.
        self.nearly = upcoming < window.end and left <= self.modifier.num_grads + 1 + EPOCH_TOLERANCE

    @property
    def reads(self) -> bool:
        """True if the gradients of the step at hand are read."""
        return self.collecting if self.run.counts else self.nearly

    def before_step(self) -> None:
        if self.reads:
            parameters = self.run.stepped(self._parameters())
            self.gradients.before(parameters, closure=self.run.closure, optimizer=self.run.stepping)

    def after_closure(self) -> None:
        if self.reads:
            self.gradients.keep(self.run.stepped(self._parameters()))

    def after_step(self) -> None:
        if not self.reads:
            return
        self.gradients.after(self.run.stepped(self._parameters()))
        found = self.gradients.take() if self.run.counts else {}
        if not found:
            return
        if self.last_alone:
            self.sums, self.count = {}, 0
        self._collect(found)

    def _collect(self, found: Mapping[str, Tensor]) -> None:
        self.count += 1
        for name, gradient in found.items():
            wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=name not in self.sums)
            self.sums[name] = self.sums[name].add_(wide) if name in self.sums else wide

    def move(self, parameters: Mapping[str, nn.Parameter], point: float, clock: Clock) -> bool:
        modifier, masker = self.modifier, self.run.masker
        if self.point is None:
            self.begin(parameters, point, clock)
            return True
        fraction = modifier.init_update_fraction * (1.0 + math.cos(math.pi * modifier.window.progress(point))) / 2.0
        if point >= modifier.window.end or fraction == 0.0:
            self.sums, self.count = {}, 0
            return True
        if run_sampler := self.run.grad_sampler:
            self.sums, self.count = {}, 0
            options = modifier.grad_sampler_kwargs
            for found in gradients.sampled(self.run.model, parameters, run_sampler, modifier.num_grads, options):
                self._collect(found)
        if not self.count:
            return False
        masks = {
            name: moved(name, parameters[name], masker.masks[name], self.sums[name] / self.count, fraction)
            for name in parameters
            if name in self.sums and name in masker
        }
        self.sums, self.count = {}, 0
        distributed.check_same(masks)
        for name, mask in masks.items():
            grown = mask & ~masker.masks[name]
            masker.set(name, mask)
            if modifier.momentum_buffer_reset:
                reset_where(self.run.masker.optimizer, parameters[name], ~grown)
        return True

    def begin(self, parameters: Mapping[str, nn.Parameter], point: float, clock: Clock) -> None:
        shapes = {name: tuple(parameter.shape) for name, parameter in self._parameters().items()}
        self.sparsities = self.modifier.sparsities(point, shapes)
        for name, parameter in parameters.items():
            self.run.masker.set(name, self.largest({name: parameter}, self.sparsities[name], False)[name])

    def detach(self) -> None:
        self.gradients.take()
        self.sums, self.count = {}, 0

    def state_dict(self) -> dict[str, Any]:
        collected = {"sums": dict(self.sums), "count": self.count}
        return {**super().state_dict(), "sparsities": dict(self.sparsities), **collected}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.sparsities = {name: float(value) for name, value in state["sparsities"].items()}
        self.sums, self.count = taken_over(state["sums"], self.held.now()), int(state["count"])


def moved(name: str, weight: Tensor, mask: Tensor, gradient: Tensor, fraction: float) -> Tensor:
    """A mask that keeps as many weights, round(fraction * kept) of them others: the smallest weights are dropped, those
    with the largest gradients are grown.

    A weight that was just dropped may be grown again. Of equal ones the first in logical order is dropped, and the last
    is grown.

    >>> weight, gradient = torch.tensor([3.0, -1.0, 0.0, 0.0]), torch.tensor([0.0, 0.1, -5.0, 2.0])
    >>> moved("w", weight, weight != 0, gradient, 0.5)
    tensor([ True, False,  True, False])

    Args:
        name: of the weight, for messages.
        weight: the weights.
        mask: True where kept, of the same shape.
        gradient: of the weights, those that are masked too.
        fraction: of the kept weights, 0 to 1.

    Raises:
        DataError: the weight or the gradient holds NaN.
    """
    kept = int(mask.count_nonzero())
    change = round(fraction * kept)
    if not change:
        return mask
    stays = mask_lowest({name: weight}, mask.numel() - kept + change, kept={name: mask}, absolute=True)[name]
    comes = mask_lowest(
        {f"{name}.grad": gradient}, mask.numel() - change, kept={f"{name}.grad": ~stays}, absolute=True
    )[f"{name}.grad"]
    return stays | comes
