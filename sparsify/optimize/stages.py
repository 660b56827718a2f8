"""Lays out the stages of compression and their learning rates from the training of the dense model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sparsify.errors import ArgumentError, did_you_mean
from sparsify.modifiers.base import Modifier
from sparsify.modifiers.learning_rate import (
    LearningRateFunctionModifier,
    LearningRateModifier,
    SetLearningRateModifier,
)
from sparsify.output.json_values import EXACT

__all__ = ["LearningRateSchedule", "OriginalTraining", "TrainingStage", "learning_rates"]

StageName = Literal["stabilization", "pruning", "fine-tuning", "quantization"]
LearningRateSchedule = Literal["set", "step", "multi-step", "exponential", "cosine", "linear"]

FACTOR = 0.25
"""Every step multiplies the learning rate by this, the one from pruning to fine-tuning too."""
UPDATES = 40
"""Updates of the masks in the stage of pruning."""
RISE = 2.5
"""Quantization starts with a learning rate at most this many times the one before it: more undoes what recovered."""
PLAIN = ("SGD", "ASGD", "Rprop", "LBFGS", "Muon", "LARS")
ADAPTIVE = (
    "Adam",
    "AdamW",
    "NAdam",
    "RAdam",
    "Adamax",
    "Adagrad",
    "Adadelta",
    "RMSprop",
    "SparseAdam",
    "Adafactor",
    "LAMB",
    "Lion",
)


@dataclass(frozen=True)
class TrainingStage:
    """One stage of training, in epochs."""

    name: StageName
    start: float
    end: float

    @property
    def epochs(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class OriginalTraining:
    """The training of the dense model, from which that of the compressed one is laid out.

    Attributes:
        epochs: more than 1, generally 20 or more.
        initial_lr: the highest learning rate, above 0 and below 1; None: learning rates are left to the training loop.
        final_lr: the lowest, 0 or more and below `initial_lr`; None where `initial_lr` is. 0, where a cosine or a line
            ended, counts as a hundredth of `initial_lr` where a schedule has to start from it or falls by factors.
        optimizer: the name of its class.

    Raises:
        ArgumentError: one of them cannot be.

    >>> [(stage.name, stage.start, stage.end) for stage in OriginalTraining(90, 0.1, 0.001).stages()]
    [('stabilization', 0.0, 1.0), ('pruning', 1.0, 31.0), ('fine-tuning', 31.0, 53.0)]
    """

    __pydantic_config__ = EXACT

    epochs: float
    initial_lr: float | None = None
    final_lr: float | None = None
    optimizer: str = "SGD"

    def __post_init__(self) -> None:
        epochs = _written_number("epochs", self.epochs)
        if not 1 < epochs <= 1e6:
            raise ArgumentError(
                f"epochs: {self.epochs!r}: the original training took more than 1 epoch, generally 20 or more."
            )
        if (self.initial_lr is None) != (self.final_lr is None):
            raise ArgumentError("initial_lr and final_lr: one alone is no range; give both, or neither.")
        if self.initial_lr is not None:
            initial, final = _written_number("initial_lr", self.initial_lr), _written_number("final_lr", self.final_lr)
            if not 0 < initial < 1:
                raise ArgumentError(f"initial_lr: {self.initial_lr!r} lies not between 0 and 1; give the highest rate.")
            if not 0 <= final < initial:
                raise ArgumentError(
                    f"final_lr: {self.final_lr!r} lies not between 0 and initial_lr {self.initial_lr!r}; give the "
                    "rate at the end, like a hundredth of the initial one, or 0."
                )
        known = (*PLAIN, *ADAPTIVE)
        if not isinstance(self.optimizer, str) or self.optimizer.lower() not in {name.lower() for name in known}:
            raise ArgumentError(
                f"optimizer: {self.optimizer!r} is not known.{did_you_mean(str(self.optimizer), known)} Give the one "
                f"that it is nearest to, of {', '.join(known)}."
            )

    @property
    def adaptive(self) -> bool:
        """True if the optimizer scales each step by past gradients, like Adam."""
        return self.optimizer.lower() in {name.lower() for name in ADAPTIVE}

    @property
    def update_frequency(self) -> float:
        """Epochs between two updates of the masks: 40 updates in the stage of pruning."""
        return self._pruning / UPDATES

    @property
    def base_lr(self) -> float | None:
        """The learning rate up to the end of pruning: (initial + final) / 2."""
        if self.initial_lr is None or self.final_lr is None:
            return None
        return _neat((self.initial_lr + self.final_lr) / 2)

    @property
    def lowest_lr(self) -> float | None:
        """The final rate; a hundredth of the initial one where that is 0."""
        if self.initial_lr is None or self.final_lr is None:
            return None
        return self.final_lr or _neat(0.01 * self.initial_lr)

    @property
    def _pruning(self) -> int:
        return max(1, int(self.epochs / 3))

    def stages(
        self, *, prune: bool = True, quantize: bool = False, transfer: bool = False
    ) -> tuple[TrainingStage, ...]:
        """The stages from epoch 0 on: E / 3 epochs of pruning after one of stabilization, E / 4 of fine-tuning,
        E / 10 of quantization, in whole epochs and at least 1.

        Args:
            prune: with the stages of pruning; without them, and with `quantize`, quantization starts at once.
            quantize: with the stage of quantization.
            transfer: instead of pruning, fine-tuning for as long as both together.
        """
        lengths: list[tuple[StageName, int]] = []
        tuning = max(1, int(self.epochs / 4))
        if transfer:
            lengths += [("fine-tuning", self._pruning + tuning)]
        elif prune:
            lengths += [("stabilization", 1), ("pruning", self._pruning), ("fine-tuning", tuning)]
        elif not quantize:
            lengths += [("fine-tuning", tuning)]
        if quantize:
            lengths += [("quantization", max(1, int(self.epochs / 10)))]
        found, start = [], 0.0
        for name, length in lengths:
            found.append(TrainingStage(name, start, start + length))
            start += length
        return tuple(found)


def learning_rates(
    training: OriginalTraining,
    schedule: LearningRateSchedule | None = None,
    stages: Iterable[TrainingStage] | None = None,
) -> list[Modifier]:
    """The learning-rate modifiers for the stages, as a list to add to, to edit and to remove from.

    (initial + final) / 2 is set up to the end of pruning, after a linear rise in stabilization for adaptive optimizers,
    whose averages are still empty then. Fine-tuning starts with a quarter of it, or with all of it where nothing is
    pruned first, and falls to a tenth of the final rate, or what the steps leave of it: never lower. Quantization
    restarts at the final rate, but not above 2.5 times where fine-tuning ended, and falls to a tenth of that. A final
    rate of 0 counts as a hundredth of the initial one; a last stage that moves in a line or a cosine ends at 0.

    Args:
        training: with learning rates.
        schedule: how it falls in fine-tuning. "set": not at all. "step": by 1/4 every so many epochs. "multi-step":
            twice, after a half and three quarters. "exponential": every epoch. "cosine" and "linear": every step.
            None: "linear" for adaptive optimizers, "step" for others.
        stages: as `training.stages()` gives them; None: those of pruning.

    Raises:
        ArgumentError: no such schedule, or the training has no learning rates.

    >>> found = learning_rates(OriginalTraining(90, 0.1, 0.001))
    >>> found[0].learning_rate, found[1].init_lr, found[1].lr_kwargs
    (0.0505, 0.012625, {'step_size': 6, 'gamma': 0.25})
    """
    check_schedule(schedule)
    base, final = training.base_lr, training.lowest_lr
    if base is None or final is None:
        raise ArgumentError("training: it has no learning rates; give OriginalTraining(epochs, initial_lr, final_lr).")
    chosen = schedule or ("linear" if training.adaptive else "step")
    by_name = {stage.name: stage for stage in (training.stages() if stages is None else stages)}
    found: list[Modifier] = []
    if "pruning" in by_name:
        warm = by_name.get("stabilization")
        if training.adaptive and warm is not None:
            found.append(_moving("linear", warm, 0.1 * base, base))
        start = warm.end if training.adaptive and warm is not None else 0.0
        found.append(SetLearningRateModifier(start_epoch=start, learning_rate=base))
    ended, to_zero = math.inf, training.final_lr == 0
    if (stage := by_name.get("fine-tuning")) is not None:
        init = _neat(FACTOR * base) if "pruning" in by_name else base
        floor = 0.0 if to_zero and chosen in ("cosine", "linear") and "quantization" not in by_name else 0.1 * final
        fall, ended = _falling_rates(chosen, stage, init, floor)
        found.append(fall)
    if (stage := by_name.get("quantization")) is not None:
        first = min(final, RISE * ended)
        found.append(_moving("linear", stage, first, 0.0 if to_zero else 0.1 * first))
    return found


def check_schedule(schedule: object) -> None:
    """Refuses what is no name of a schedule; None is fine."""
    known = get_args(LearningRateSchedule)
    if schedule is not None and schedule not in known:
        raise ArgumentError(
            f"schedule: {schedule!r} is none of {', '.join(known)}.{did_you_mean(str(schedule), known)}"
        )


def _falling_rates(
    schedule: LearningRateSchedule, stage: TrainingStage, init: float, floor: float
) -> tuple[Modifier, float]:
    """From `init` toward `floor` within a stage, and the learning rate that it ends with.

    step: n = ln(floor / init) / ln(1/4) steps fit, one every max(1, floor((epochs - 1) / n)) epochs. Where these are
    more than n, each is smaller.
    """
    start, epochs = stage.start, stage.epochs
    if schedule == "set":
        return SetLearningRateModifier(start_epoch=start, learning_rate=init), init
    if schedule == "cosine" or schedule == "linear":
        return _moving(schedule, stage, init, floor), floor
    kwargs: dict[str, Any]
    if schedule == "step":
        steps = math.log(floor / init) / math.log(FACTOR)
        size = max(1, math.floor((epochs - 1) / steps))
        drops = math.ceil(epochs / size) - 1
        gamma = FACTOR if drops <= steps else _neat((floor / init) ** (1 / drops))
        kwargs, name, last = {"step_size": size, "gamma": gamma}, "StepLR", init * gamma**drops
    elif schedule == "multi-step":
        milestones = sorted({start + math.ceil(epochs * share) for share in (0.5, 0.75)})
        # A stage of one epoch ends where its first drop would be.
        drops = sum(epoch < stage.end for epoch in milestones)
        gamma = _neat((floor / init) ** (1 / max(1, drops)))
        kwargs, name, last = {"milestones": milestones, "gamma": gamma}, "MultiStepLR", init * gamma**drops
    else:
        gamma = _neat((floor / init) ** (1 / max(1.0, epochs - 1)))
        kwargs, name, last = {"gamma": gamma}, "ExponentialLR", init * gamma ** max(0.0, epochs - 1)
    made = LearningRateModifier.model_validate(
        {"start_epoch": start, "end_epoch": stage.end, "lr_class": name, "lr_kwargs": kwargs, "init_lr": init}
    )
    return made, last


def _moving(
    function: Literal["linear", "cosine"], stage: TrainingStage, first: float, last: float
) -> LearningRateFunctionModifier:
    return LearningRateFunctionModifier(
        start_epoch=stage.start, end_epoch=stage.end, lr_func=function, init_lr=_neat(first), final_lr=_neat(last)
    )


def _neat(rate: float) -> float:
    """`rate` with 6 digits: the others are rounding errors, and the file is for people to read."""
    return float(f"{rate:.6g}")


def _written_number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArgumentError(f"{name}: {value!r} is no number.")
    return float(value)
