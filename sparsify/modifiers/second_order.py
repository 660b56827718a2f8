"""Pruning by second-order information: importance from the Fisher matrix, and an update of the weights that stay."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from sparsify.errors import ArgumentError, DataError, StateError
from sparsify.model import distributed, gradients, targets
from sparsify.model.targets import is_finite
from sparsify.modifiers.base import Active, Run
from sparsify.modifiers.gradual import Gradual, GradualPruning, ScoreType
from sparsify.modifiers.schedule import EPOCH_TOLERANCE, Clock, UpdateGrid, between
from sparsify.output.field_errors import FieldProblem
from sparsify.pruning import second_order
from sparsify.pruning.masks import compute_masks

__all__ = ["MFACPruningModifier", "OBSPruningModifier"]

log = logging.getLogger("sparsify")

PositiveCount = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]


class OBSPruningModifier(GradualPruning):
    """Optimal brain surgeon over blocks of the empirical Fisher matrix (oBERT, Kurtic 2022).

    Weights of least importance, w^2 / (2 [F^-1]_ii), are pruned, and those that stay make up for them (paper:
    https://arxiv.org/abs/2203.07259); the rest is as GMPruningModifier. Gradients are those of losses that the
    `grad_sampler` given to modify() yields (one example each is best); without one those of the last `num_grads` steps
    of training before an update, and where updates lie closer, a running mean over about as many. Masks that are due
    before any gradient is seen go by magnitude.

    What differs from the paper: blocks are summed up and solved at an update, where it updates their inverses gradient
    by gradient; the weights that stay make up for all that go in their block at once; with `num_recomputations` the
    sparsity grows in even steps, without a sampler on the same gradients; the score of a block of `mask_type` is the
    mean of its weights' scores; one rounding error of a block's trace is added to `damp`. Where a network fits its
    training data most gradients vanish, and the default `damp` trusts noise: try 1e-3 then.

    Cost, with the defaults on one CPU core: a gradient that is taken in 10 ns a weight, an update 1 to 2 us a weight;
    at steps before the last `num_grads`, and with a sampler at all of them, no more than GMPruningModifier.

    Memory, while gradients are collected: 4 * (fisher_block_size + 10) bytes for each weight in float32 or less, and
    to work in what is most of 100 MB, 96 bytes for each weight of the largest parameter, and 48 *
    fisher_block_size^2 bytes. Checked in modify(), before it is taken; in training, the sums are in checkpoints too.
    """

    resizable: ClassVar[bool] = False
    sharded: ClassVar[bool] = False
    without_effect: ClassVar[frozenset[str]] = frozenset({"log_types", "phased", "available_devices", "available_gpus"})
    score_type: ScoreType = Field(
        default="obs", description="Always obs; magnitude is read from older files, and means the same."
    )
    global_sparsity: bool = Field(
        default=True, description="Whether all parameters are ranked together, or each by itself."
    )
    num_grads: Count = Field(default=1024, description="How many gradients the Fisher matrix is estimated from.")
    damp: PositiveCount = Field(default=1e-7, description="What is added to the diagonal of the Fisher matrix.")
    fisher_block_size: Count = Field(default=50, description="Weights in a block of the Fisher matrix.")
    grad_sampler_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Arguments for the gradient sampler that is given to modify()."
    )
    num_recomputations: Count = Field(
        default=1, description="How often the Fisher matrix is estimated anew within one update of the masks."
    )

    @field_validator("score_type")
    @classmethod
    def _only_obs(cls, value: ScoreType) -> ScoreType:
        return _one_of("obs", value)

    def attach(self, run: Run) -> Active:
        return _OBS(self, run)


class MFACPruningModifier(GradualPruning):
    """As OBSPruningModifier without matrices of block by block, for larger blocks (M-FAC, Frantar 2021).

    Scores and the move of the weights that stay are computed from the gradients themselves (paper:
    https://arxiv.org/abs/2107.03356); the rest is as GMPruningModifier, and gradients come as for OBSPruningModifier.

    What differs from the paper: its recursion over gradients is done at once, by factoring a matrix of `num_grads` by
    `num_grads` a block; the weights that stay make up for all that go in their block at once.

    Cost on one CPU core: a gradient that is taken in 2 ns a weight, an update with 16 of them 0.2 us a weight;
    otherwise as OBSPruningModifier.

    Memory, while gradients are collected: 4 * (num_grads + 1) bytes for each weight in float32 or less on
    `grads_device`, and to work in on the model's 8 bytes for each weight and 200 MB, or 96 * num_grads^2 bytes where
    that is more. Checked in modify(), before it is taken; in training, the gradients are in checkpoints too.
    """

    resizable: ClassVar[bool] = False
    sharded: ClassVar[bool] = False
    without_effect: ClassVar[frozenset[str]] = frozenset(
        {"log_types", "phased", "available_devices", "available_gpus", "use_gradient_buffering"}
    )
    score_type: ScoreType = Field(
        default="mfac", description="Always mfac; magnitude is read from older files, and means the same."
    )
    num_grads: Count | dict[float, Count] = Field(
        default=64,
        description="How many gradients are kept; or {fraction of zeros: count}, each from that sparsity on.",
    )
    damp: PositiveCount = Field(default=1e-5, description="What is added to the diagonal of the Fisher matrix.")
    fisher_block_size: Count | None = Field(
        default=2000, description="Weights in a block of the Fisher matrix; null: one block a parameter."
    )
    num_pages: Count = Field(
        default=1, description="In how many parts at least a parameter's gradients go to its device, to save memory."
    )
    grads_device: str | int = Field(default="cpu", description="The device on which gradients are kept.")
    grad_sampler_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Arguments for the gradient sampler that is given to modify()."
    )

    @field_validator("score_type")
    @classmethod
    def _only_mfac(cls, value: ScoreType) -> ScoreType:
        return _one_of("mfac", value)

    @field_validator("num_grads")
    @classmethod
    def _some_grads(cls, value: int | dict[float, int]) -> int | dict[float, int]:
        if isinstance(value, dict) and not value:
            raise FieldProblem("num_grads", "{} says no count; give one, or {0.0: 64, 0.5: 128}")
        return value

    def attach(self, run: Run) -> Active:
        return _MFAC(self, run)


def _one_of(own: ScoreType, value: ScoreType) -> ScoreType:
    if value in (own, "magnitude"):
        return value
    raise FieldProblem("score_type", f"{value!r} is another modifier's; leave it out here")


class _SecondOrder(Gradual, ABC):
    """Collects gradients; at an update they give the importance of weights and the new values of those that stay.

    Checkpoint: that of Gradual, the number of gradients that were collected, and what is kept of them. With a sampler
    nothing is.
    """

    each_optimizer: ClassVar[bool] = True
    modifier: OBSPruningModifier | MFACPruningModifier
    at_once: ClassVar[int] = 1
    """Number of sampled gradients that are added together."""

    def __init__(self, modifier: OBSPruningModifier | MFACPruningModifier, run: Run) -> None:
        super().__init__(modifier, run)
        self.who = type(modifier).__name__
        if run.optimizer is None and run.grad_sampler is None:
            raise StateError(f"{self.who}: without training there are no gradients. Pass a grad_sampler.")
        gradients.check_sampler(run.grad_sampler)
        self.held = targets.Held(run.model, self.finals)
        self.gradients = gradients.RoundGradients(run.optimizers)
        self.count = 0
        self.collecting = self.nearly = False
        self.check_memory(list(self.held.now().values()))

    # ------------------------------------------------------------------ by the form of the Fisher matrix

    @property
    @abstractmethod
    def wanted(self) -> int:
        """Number of gradients that the next update should stand on."""

    @abstractmethod
    def check_memory(self, parameters: Sequence[nn.Parameter]) -> None:
        """Refuses settings that need more memory than there is; nothing was allocated yet."""

    @abstractmethod
    def add_gradients(self, several: Sequence[Mapping[str, Tensor]], parameters: Mapping[str, nn.Parameter]) -> None:
        """Adds gradients to what is kept, and to `count`, which never exceeds `wanted`."""

    @abstractmethod
    def forget(self) -> None:
        """Frees what is kept."""

    @abstractmethod
    def importance(self, name: str, parameter: Tensor, kept: Tensor | None) -> Tensor:
        """The growth of the loss without each weight."""

    @abstractmethod
    def updated(self, name: str, parameter: Tensor, mask: Tensor) -> Tensor:
        """The weights under a new mask, those that stay moved to where the loss grows least."""

    # ------------------------------------------------------------------ gradients

    def update(self, clock: Clock) -> None:
        point = self.point
        super().update(clock)
        if self.point != point:
            self.held.refresh()
        self._plan(clock, updated=self.point != point)

    def _plan(self, clock: Clock, updated: bool) -> None:
        """Decides if the next step's gradients are collected: only those of the last steps before an update are."""
        window, frequency = self.modifier.window, self.modifier.update_frequency
        done = self.point is not None and self.point >= window.end
        if self.run.grad_sampler is not None or self.released or done:
            self.collecting = self.nearly = False
            self.forget()
            return
        # Where the next update's step is not known ahead, there is a running mean.
        self.collecting = self.nearly = True
        if clock.steps_per_epoch is None or (
            self.point is not None and UpdateGrid(window, frequency).every_step(clock)
        ):
            return
        upcoming = window.start
        if self.point is not None:
            k = math.floor((self.point - window.start) / frequency + EPOCH_TOLERANCE) + 1
            upcoming = min(window.start + k * frequency, window.end)
        left = (upcoming - clock.epoch) * clock.steps_per_epoch
        self.collecting = left <= self.wanted + EPOCH_TOLERANCE
        # Optimizers that step after the counting one have their last step before the update in the round before.
        self.nearly = left <= self.wanted + 1 + EPOCH_TOLERANCE
        if not self.collecting or (updated and left >= self.wanted - EPOCH_TOLERANCE):
            self.forget()

    @property
    def reads(self) -> bool:
        """True if the gradients of the step at hand are read."""
        return self.collecting if self.run.counts else self.nearly

    def before_step(self) -> None:
        if self.reads:
            parameters = self.run.stepped(self.held.now())
            self.gradients.before(parameters, closure=self.run.closure, optimizer=self.run.stepping)

    def after_closure(self) -> None:
        if self.reads:
            self.gradients.keep(self.run.stepped(self.held.now()))

    def after_step(self) -> None:
        if not self.reads:
            return
        parameters = self.held.now()
        self.gradients.after(self.run.stepped(parameters))
        found = self.gradients.take() if self.run.counts else {}
        if found:
            self.add_gradients([found], parameters)

    def _sample(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.forget()
        sampler = self.run.grad_sampler
        if sampler is None:
            return
        pending: list[Mapping[str, Tensor]] = []
        options = self.modifier.grad_sampler_kwargs
        for found in gradients.sampled(self.run.model, parameters, sampler, self.wanted, options):
            pending.append(found)
            if len(pending) == self.at_once:
                self.add_gradients(pending, parameters)
                pending = []
        if pending:
            self.add_gradients(pending, parameters)

    # ------------------------------------------------------------------ an update

    @property
    def rounds(self) -> int:
        """Number of steps in which an update reaches its sparsity."""
        return 1

    def _prune(self, parameters: Mapping[str, nn.Parameter], progress: float, clock: Clock) -> None:
        masker, modifier = self.run.masker, self.modifier
        together = modifier.global_sparsity and bool(parameters)
        groups = [list(parameters)] if together else [[name] for name in parameters]
        goals = [between(modifier.inter_func, self.initials[g[0]], self.finals[g[0]], progress) for g in groups]
        now = [self._masked(group, parameters) for group in groups]
        if all(goal <= before for goal, before in zip(goals, now, strict=True)):
            super()._prune(parameters, progress, clock)
            return
        if not self.count and self.run.grad_sampler is None:
            if progress >= 1.0 and not self.come_late:
                raise StateError(
                    f"{self.who}: final_sparsity is due before any gradient was seen. Pass a grad_sampler to modify(), "
                    "or give a later end_epoch."
                )
            log.warning("%s: no gradient was seen yet, so the first masks go by magnitude.", self.who)
            super()._prune(parameters, progress, clock)
            return
        for part in range(1, self.rounds + 1):
            if self.run.grad_sampler is not None:
                self._sample(parameters)
            before = masker.masks
            scores = {name: self._finite_importance(name, p, before.get(name)) for name, p in parameters.items()}
            scores = dict(self.sparing_norms(scores, before, False))
            masks: dict[str, Tensor] = {}
            for group, goal, start in zip(groups, goals, now, strict=True):
                masks |= compute_masks(
                    {name: scores[name] for name in group},
                    goal if part == self.rounds else start + (goal - start) * part / self.rounds,
                    self.mask_type,
                    previous={name: before[name] for name in group if name in before},
                    input_dims=self.input_dims,
                    together=together,
                    absolute=False,
                    releases=group if self.falls(group) else (),
                )
            distributed.check_same(masks)
            for name, mask in masks.items():
                with torch.no_grad():
                    parameters[name].copy_(self.updated(name, parameters[name], mask))
                masker.set(name, mask, fresh=self.falls([name]))
        done = masker.sparsity()
        for name in parameters:
            self.run.log.scalar(f"sparsity/{name}", done[name], clock.step)

    def _masked(self, group: Sequence[str], parameters: Mapping[str, nn.Parameter]) -> float:
        """The fraction of a group that is masked."""
        masks = self.run.masker.sparsity()
        pruned = sum(round(masks.get(name, 0.0) * parameters[name].numel()) for name in group)
        return pruned / max(sum(parameters[name].numel() for name in group), 1)

    def _finite_importance(self, name: str, parameter: nn.Parameter, kept: Tensor | None) -> Tensor:
        found = self.importance(name, parameter, kept)
        if is_finite(found):
            return found
        raise DataError(
            f"{self.who}: the gradients of {name!r} hold NaN or infinity, or are too large for their squares. Find "
            "where training diverged, or lower the learning rate or the loss."
        )

    def detach(self) -> None:
        self.forget()
        self.gradients.take()
        self.collecting = self.nearly = False

    def state_dict(self) -> dict[str, Any]:
        shapes = {name: list(parameter.shape) for name, parameter in self.held.now().items()}
        return {**super().state_dict(), "count": self.count, "shapes": shapes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.forget()
        self.count = int(state["count"])

    @staticmethod
    def fits(name: str, parameter: Tensor, state: Mapping[str, Any]) -> bool:
        """True if the parameter has the shape that it had when `state` was saved, or that is not known."""
        saved: list[int] | None = state.get("shapes", {}).get(name)
        return saved is None or saved == list(parameter.shape)


class _OBS(_SecondOrder):
    """The blocks of the Fisher matrix, summed up.

    Checkpoint: that of _SecondOrder, and the sums of the blocks.
    """

    modifier: OBSPruningModifier
    at_once = second_order.FISHER_ROWS

    def __init__(self, modifier: OBSPruningModifier, run: Run) -> None:
        self.sums: dict[str, Tensor] = {}
        super().__init__(modifier, run)

    @property
    def wanted(self) -> int:
        return self.modifier.num_grads

    @property
    def rounds(self) -> int:
        return self.modifier.num_recomputations

    def check_memory(self, parameters: Sequence[nn.Parameter]) -> None:
        for device in {parameter.device: None for parameter in parameters}:
            here = [parameter for parameter in parameters if parameter.device == device]
            need = second_order.fisher_bytes(here, self.modifier.fisher_block_size)
            second_order.refuse_beyond(need, device, who=self.who, lower="fisher_block_size")

    def add_gradients(self, several: Sequence[Mapping[str, Tensor]], parameters: Mapping[str, nn.Parameter]) -> None:
        new = len(several)
        keep = min((self.wanted - new) / self.count, 1.0) if self.count else 1.0
        self.count = min(self.count + new, self.wanted)
        for name, parameter in parameters.items():
            rows = [found[name] for found in several if name in found]
            if rows and name not in self.sums:
                self.sums[name] = second_order.fisher_sums(parameter, self.modifier.fisher_block_size)
            if rows:
                second_order.add_gradients(self.sums[name], rows, keep)
            elif name in self.sums and keep < 1.0:
                self.sums[name].mul_(keep)

    def forget(self) -> None:
        self.sums, self.count = {}, 0

    def _sums(self, name: str, parameter: Tensor) -> Tensor:
        # One that no gradient reached: only the dampening is known of it.
        found = self.sums.get(name)
        return second_order.fisher_sums(parameter, self.modifier.fisher_block_size) if found is None else found

    def importance(self, name: str, parameter: Tensor, kept: Tensor | None) -> Tensor:
        return second_order.fisher_scores(parameter, self._sums(name, parameter), self.count, self.modifier.damp, kept)

    def updated(self, name: str, parameter: Tensor, mask: Tensor) -> Tensor:
        return second_order.fisher_update(parameter, self._sums(name, parameter), self.count, self.modifier.damp, mask)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "sums": dict(self.sums)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        known = self.held.now()
        self.sums = {
            name: sums.to(known[name].device, copy=True)
            for name, sums in state["sums"].items()
            if name in known
            and self.fits(name, known[name], state)
            and sums.shape == second_order.fisher_shape(known[name], self.modifier.fisher_block_size)
        }


class _MFAC(_SecondOrder):
    """The last gradients, as they are.

    Checkpoint: that of _SecondOrder, and these gradients.
    """

    modifier: MFACPruningModifier

    def __init__(self, modifier: MFACPruningModifier, run: Run) -> None:
        self.rows: dict[str, list[Tensor]] = {}
        try:
            self.device = torch.empty(0, device=modifier.grads_device).device
        except (RuntimeError, AssertionError) as error:
            raise ArgumentError(
                f"{type(modifier).__name__}.grads_device: {modifier.grads_device!r} is no device here ({error}). Give "
                "cpu, or the device of the model."
            ) from None
        super().__init__(modifier, run)

    @property
    def wanted(self) -> int:
        counts = self.modifier.num_grads
        if isinstance(counts, int):
            return counts
        parameters = self.held.now()
        done = self._masked(list(self.initials), parameters)
        reached = [sparsity for sparsity in counts if sparsity <= done + EPOCH_TOLERANCE]
        return counts[max(reached, default=min(counts))]

    def check_memory(self, parameters: Sequence[nn.Parameter]) -> None:
        counts = self.modifier.num_grads
        most = counts if isinstance(counts, int) else max(counts.values())
        need, work = second_order.mfac_bytes(parameters, most)
        if any(parameter.device == self.device for parameter in parameters):
            need += work
        second_order.refuse_beyond(need, self.device, who=self.who, lower="num_grads")
        for device in {parameter.device: None for parameter in parameters if parameter.device != self.device}:
            second_order.refuse_beyond(work, device, who=self.who, lower="num_grads")

    def add_gradients(self, several: Sequence[Mapping[str, Tensor]], parameters: Mapping[str, nn.Parameter]) -> None:
        wanted = self.wanted
        for found in several:
            for name in parameters:
                rows = self.rows.setdefault(name, []) if name in found else self.rows.get(name)
                if rows is None:
                    continue
                if name in found:
                    flat = found[name].reshape(-1)
                    rows.append(flat.to(self.device, second_order.wide(flat.dtype)))
                else:
                    rows.append(torch.zeros_like(rows[-1]))
                del rows[:-wanted]
        self.count = min(self.count + len(several), wanted)

    def forget(self) -> None:
        self.rows, self.count = {}, 0

    def _rows(self, name: str, parameter: Tensor) -> list[Tensor]:
        none = torch.zeros((), dtype=second_order.wide(parameter.dtype), device=self.device)
        return self.rows.get(name) or [none.expand(parameter.numel())]

    def importance(self, name: str, parameter: Tensor, kept: Tensor | None) -> Tensor:
        modifier, rows = self.modifier, self._rows(name, parameter)
        size, pages = modifier.fisher_block_size, modifier.num_pages
        return second_order.mfac_scores(parameter, rows, self.count, size, modifier.damp, kept, pages)

    def updated(self, name: str, parameter: Tensor, mask: Tensor) -> Tensor:
        modifier, rows = self.modifier, self._rows(name, parameter)
        size, pages = modifier.fisher_block_size, modifier.num_pages
        return second_order.mfac_update(parameter, rows, self.count, size, modifier.damp, mask, pages)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "gradients": {name: list(rows) for name, rows in self.rows.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        known = self.held.now()
        self.rows = {
            name: [row.to(self.device, copy=True) for row in rows]
            for name, rows in state["gradients"].items()
            if name in known
            and self.fits(name, known[name], state)
            and all(row.numel() == known[name].numel() for row in rows)
        }
        self.count = min(self.count, self.wanted)
