"""Epochs and learning rates that follow from the original training."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import Any, get_args

import pytest

from sparsify.errors import ArgumentError
from sparsify.modifiers import LearningRateFunctionModifier, LearningRateModifier, SetLearningRateModifier
from sparsify.modifiers.learning_rate_ledger import LearningRateLedger
from sparsify.modifiers.schedule import Clock
from sparsify.optimize import LearningRateSchedule, OriginalTraining, learning_rates

SCHEDULES = get_args(LearningRateSchedule)


@pytest.mark.parametrize(
    ("epochs", "start", "end", "last", "frequency"),
    [
        (90, 1, 31, 53, 0.75),
        (100, 1, 34, 59, 0.825),
        (20, 1, 7, 12, 0.15),
        (300, 1, 101, 176, 2.5),
        (2, 1, 2, 3, 0.025),
        (1.5, 1, 2, 3, 0.025),
    ],
)
def test_stages_follow_from_the_epochs(epochs: float, start: int, end: int, last: int, frequency: float) -> None:
    training = OriginalTraining(epochs)
    stabilization, pruning, fine_tuning = training.stages()
    assert (stabilization.start, stabilization.end) == (0, 1)
    assert (pruning.start, pruning.end, pruning.epochs) == (start, end, end - start)
    assert (fine_tuning.start, fine_tuning.end) == (end, last)
    assert training.update_frequency == pytest.approx(frequency)


def test_quantization_comes_last_and_alone_where_nothing_is_pruned() -> None:
    training = OriginalTraining(90)
    assert [(s.name, s.start, s.end) for s in training.stages(quantize=True)][-1] == ("quantization", 53, 62)
    assert [(s.name, s.start, s.end) for s in training.stages(prune=False, quantize=True)] == [("quantization", 0, 9)]
    assert [s.name for s in training.stages(prune=False)] == ["fine-tuning"]


def test_the_learning_rates_of_the_documented_example() -> None:
    first, second = learning_rates(OriginalTraining(90, 0.1, 0.001))
    assert isinstance(first, SetLearningRateModifier) and isinstance(second, LearningRateModifier)
    assert (first.start_epoch, first.learning_rate) == (0.0, 0.0505)
    assert (second.lr_class, second.start_epoch, second.end_epoch, second.init_lr) == ("StepLR", 31.0, 53.0, 0.012625)
    assert second.lr_kwargs == {"step_size": 6, "gamma": 0.25}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 1}, "epochs: 1: the original training took more than 1 epoch"),
        ({"epochs": 0}, "more than 1 epoch"),
        ({"epochs": -3}, "more than 1 epoch"),
        ({"epochs": math.nan}, "more than 1 epoch"),
        ({"epochs": math.inf}, "more than 1 epoch"),
        ({"epochs": True}, "epochs: True is no number"),
        ({"epochs": "90"}, "epochs: '90' is no number"),
        ({"epochs": 90, "initial_lr": 1.0, "final_lr": 0.1}, "initial_lr: 1.0 lies not between 0 and 1"),
        ({"epochs": 90, "initial_lr": 0.0, "final_lr": 0.0}, "initial_lr: 0.0 lies not between"),
        ({"epochs": 90, "initial_lr": math.nan, "final_lr": 0.1}, "initial_lr: nan"),
        ({"epochs": 90, "initial_lr": 0.1, "final_lr": 0.1}, "final_lr: 0.1 lies not between 0 and initial_lr 0.1"),
        ({"epochs": 90, "initial_lr": 0.1, "final_lr": -0.1}, "final_lr: -0.1 lies not"),
        ({"epochs": 90, "initial_lr": 0.1}, "one alone is no range"),
        ({"epochs": 90, "final_lr": 0.1}, "one alone is no range"),
        ({"epochs": 90, "optimizer": "Adma"}, "optimizer: 'Adma' is not known. Did you mean 'Adam"),
        ({"epochs": 90, "optimizer": None}, "optimizer: None is not known"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(message)):
        OriginalTraining(**fields)


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("epochs", [2, 7, 20, 90, 300])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates_fall_and_do_not_jump(schedule: Any, epochs: int, optimizer: str, quantize: bool) -> None:
    training = OriginalTraining(epochs, 0.1, 0.001, optimizer)
    stages = training.stages(quantize=quantize)
    ledger = LearningRateLedger(None)
    for modifier in learning_rates(training, schedule, stages):
        entry = modifier.rate()
        assert entry is not None
        ledger.add(entry)
    steps = int(stages[-1].end) * 10
    clocks = [Clock(step, step / 10, 10) for step in range(steps + 1)]
    rates = [entry.value(clock) for clock in clocks if (entry := ledger.governing(0, clock)) is not None]
    assert len(rates) == len(clocks), "some group governs at every step"
    assert max(rates) == pytest.approx(0.0505)
    warm = int(stages[0].end) * 10
    if optimizer == "AdamW":
        assert rates[0] == pytest.approx(0.00505) and rates[warm] == pytest.approx(0.0505)
    rest = rates[warm:] if optimizer == "AdamW" else rates
    assert all(after <= 2.501 * before for before, after in pairwise(rest))
    end = next(stage for stage in stages if stage.name == "fine-tuning")
    inside = rates[int(end.start) * 10 : int(end.end) * 10]
    assert inside[0] == pytest.approx(0.012625)
    assert all(after <= before for before, after in pairwise(inside))
    if schedule != "set":
        # Half an epoch before the end, where those that move in steps have made their last.
        assert 0.99e-4 <= inside[-5] <= (1e-3 if epochs >= 90 else math.inf)
    if quantize:
        first = rates[int(end.end) * 10]
        assert first <= 0.001
        assert rates[-1] == pytest.approx(first / 10, rel=1e-4)


@pytest.mark.parametrize("epochs", range(8, 121))
def test_steps_end_no_lower_than_they_say(epochs: int) -> None:
    """A tenth of the final rate, or up to four times that: each step is a quarter, or less where there are many."""
    training = OriginalTraining(epochs, 0.1, 0.001)
    fall = learning_rates(training)[-1]
    assert isinstance(fall, LearningRateModifier)
    drops = math.ceil((fall.end_epoch - fall.start_epoch) / fall.lr_kwargs["step_size"]) - 1
    last = 0.012625 * fall.lr_kwargs["gamma"] ** drops
    assert last >= 0.999e-4
    if fall.end_epoch - fall.start_epoch >= 5:
        assert last <= 4.1e-4


def test_thirty_epochs_end_where_the_recipe_says() -> None:
    fall = learning_rates(OriginalTraining(30, 0.1, 0.001))[-1]
    assert isinstance(fall, LearningRateModifier) and fall.lr_kwargs["step_size"] == 1
    assert 0.012625 * fall.lr_kwargs["gamma"] ** 6 == pytest.approx(1e-4, rel=1e-4)


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_final_rate_of_zero(schedule: Any, quantize: bool) -> None:
    training = OriginalTraining(90, 0.1, 0.0)
    stages = training.stages(quantize=quantize)
    made = learning_rates(training, schedule, stages)
    assert isinstance(made[0], SetLearningRateModifier) and made[0].learning_rate == 0.05
    last = made[-1]
    if isinstance(last, LearningRateFunctionModifier):
        assert last.final_lr == 0.0 and 0 < last.init_lr <= 0.0125
    if quantize:
        assert isinstance(last, LearningRateFunctionModifier) and last.start_epoch == stages[-1].start


def test_a_schedule_fits_the_optimizer_unless_it_is_named() -> None:
    plain, adaptive = OriginalTraining(90, 0.1, 0.001), OriginalTraining(90, 1e-3, 1e-5, "adamw")
    assert isinstance(learning_rates(plain)[-1], LearningRateModifier)
    assert isinstance(learning_rates(adaptive)[-1], LearningRateFunctionModifier)
    assert isinstance(learning_rates(adaptive, "step")[-1], LearningRateModifier)


def test_no_rates_without_a_range_and_no_unknown_schedule() -> None:
    with pytest.raises(ArgumentError, match="it has no learning rates"):
        learning_rates(OriginalTraining(90))
    with pytest.raises(ArgumentError, match=r"schedule: 'cosin' is none of .* Did you mean 'cosine'"):
        learning_rates(OriginalTraining(90, 0.1, 0.001), "cosin")  # type: ignore[arg-type]
