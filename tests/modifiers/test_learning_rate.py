"""Learning rates: the tables of the recipe dialect, the ledger's rules, and peace with the user's own schedulers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, ExponentialLR, LambdaLR, MultiStepLR, StepLR

from sparsify.errors import ArgumentError, RecipeError, SparsifyWarning
from sparsify.modifiers.base import Modifier
from sparsify.modifiers.epochs import EpochRangeModifier
from sparsify.modifiers.learning_rate import (
    LearningRateFunctionModifier,
    LearningRateModifier,
    SetLearningRateModifier,
)
from sparsify.training.manager import ScheduledModifierManager


def function(kind: str = "linear", start: float = 0.0, end: float = 10.0, **fields: object) -> Modifier:
    rates = {"init_lr": 0.1, "final_lr": 0.001, **fields}
    return LearningRateFunctionModifier(lr_func=kind, start_epoch=start, end_epoch=end, **rates)


def scheduler(kind: str, start: float, end: float = -1.0, init_lr: float = 0.1, **kwargs: object) -> Modifier:
    return LearningRateModifier(lr_class=kind, lr_kwargs=kwargs, start_epoch=start, end_epoch=end, init_lr=init_lr)


def fixed(rate: float, start: float = -1.0, **fields: object) -> Modifier:
    return SetLearningRateModifier(learning_rate=rate, start_epoch=start, **fields)


def optimizer_of(groups: int = 1, lr: object = 1.0) -> torch.optim.Optimizer:
    layers = [nn.Linear(2, 2) for _ in range(groups)]
    model = nn.ModuleList(layers)
    optimizer = torch.optim.SGD([{"params": list(layer.parameters())} for layer in layers], lr=lr)
    optimizer.model = model  # type: ignore[attr-defined]
    return optimizer


def rates(modifiers: list[Modifier], epochs: int, steps_per_epoch: int = 4, group: int = 0) -> dict[float, float]:
    """The learning rate that each step uses, by the epoch at which the step is made."""
    optimizer = optimizer_of(3)
    manager = ScheduledModifierManager(modifiers)
    manager.modify(optimizer.model, optimizer, steps_per_epoch=steps_per_epoch)  # type: ignore[attr-defined]
    seen: dict[float, float] = {}
    used: list[float] = []
    optimizer.register_step_pre_hook(lambda *_: used.append(optimizer.param_groups[group]["lr"]))
    for step in range(epochs * steps_per_epoch + 1):
        optimizer.step()
        seen[step / steps_per_epoch] = used[-1]
    return seen


@pytest.mark.parametrize("steps_per_epoch", [1, 3, 10])
@pytest.mark.parametrize(
    ("modifier", "expected"),
    [
        (function("linear"), {0: 0.1, 1: 0.0901, 9: 0.0109, 10: 0.001, 11: 0.001, 12: 0.001}),
        (function("cosine"), {0: 0.1, 1: 0.0975773, 5: 0.0505, 9: 0.0034227, 10: 0.001, 12: 0.001}),
        (
            scheduler("StepLR", 5.0, 11.0, 0.01, gamma=0.5, step_size=2),
            {4: 1.0, 5: 0.01, 6: 0.01, 7: 0.005, 8: 0.005, 9: 0.0025, 10: 0.0025},
        ),
        (
            scheduler("MultiStepLR", 2.0, gamma=0.1, milestones=[4, 8]),
            {1: 1.0, 2: 0.1, 3: 0.1, 4: 0.01, 7: 0.01, 8: 0.001, 12: 0.001},
        ),
        (scheduler("ExponentialLR", 1.0, 3.0, gamma=0.5), {0: 1.0, 1: 0.1, 2: 0.05, 3: 0.025, 4: 0.025, 12: 0.025}),
        (fixed(0.3, 2.0), {0: 1.0, 1: 1.0, 2: 0.3, 12: 0.3}),
        (fixed(0.3), {0: 0.3, 12: 0.3}),
        (function("linear", 3.0, 3.0), {2: 1.0, 3: 0.001, 4: 0.001}),
        (function("cyclic_linear", 0.0, 4.0, cycle_epochs=2.0), {0: 0.1, 1: 0.0505, 2: 0.1, 3: 0.0505, 4: 0.001}),
    ],
)
def test_learning_rates_are_those_of_the_table(
    modifier: Modifier, expected: dict[int, float], steps_per_epoch: int
) -> None:
    seen = rates([modifier], 12, steps_per_epoch)
    assert {epoch: seen[float(epoch)] for epoch in expected} == pytest.approx(expected, abs=5e-8)


def test_functions_move_at_every_step_and_stay_inside_their_ends() -> None:
    def linear(e: float) -> float:
        return 0.1 + (0.001 - 0.1) * min(1.0, max(0.0, (e - 2.5) / 4.0))

    def cosine(e: float) -> float:
        return 0.001 + (0.1 - 0.001) * (1 + math.cos(math.pi * min(1.0, max(0.0, (e - 2.5) / 4.0)))) / 2

    for kind, reference in (("linear", linear), ("cosine", cosine)):
        seen = rates([function(kind, 2.5, 6.5)], 9, 7)
        for epoch, rate in seen.items():
            # The window starts at the first step that is not before it.
            assert rate == (1.0 if epoch < 2.5 else pytest.approx(reference(epoch), rel=1e-12)), epoch
        assert min(seen.values()) == 0.001


def test_cyclic_linear_is_a_saw() -> None:
    seen = rates([function("cyclic_linear", 1.0, 7.0, cycle_epochs=1.5)], 8, 6)
    for epoch, rate in seen.items():
        if 1.0 <= epoch < 7.0:
            assert rate == pytest.approx(0.1 - 0.099 * ((epoch - 1.0) % 1.5) / 1.5, rel=1e-9), epoch
        elif epoch >= 7.0:
            assert rate == 0.001, "a complete last cycle is not rewound"


def by_torch(make: Callable[[torch.optim.Optimizer], object], epochs: int) -> list[float]:
    optimizer = optimizer_of(lr=0.1)
    driven = make(optimizer)
    seen = []
    for _ in range(epochs):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        driven.step()  # type: ignore[attr-defined]
    return seen


@pytest.mark.parametrize(
    ("modifier", "make"),
    [
        (scheduler("StepLR", 0.0, step_size=3, gamma=0.3), lambda o: StepLR(o, step_size=3, gamma=0.3)),
        (scheduler("StepLR", 0.0, step_size=4), lambda o: StepLR(o, step_size=4)),
        (scheduler("MultiStepLR", 0.0, milestones=[2, 5, 6]), lambda o: MultiStepLR(o, milestones=[2, 5, 6])),
        (scheduler("ExponentialLR", 0.0, gamma=0.9), lambda o: ExponentialLR(o, gamma=0.9)),
        (
            scheduler("CosineAnnealingWarmRestarts", 0.0, cycle_epochs=4, lr_min=0.01),
            lambda o: CosineAnnealingWarmRestarts(o, T_0=4, eta_min=0.01),
        ),
    ],
)
def test_schedulers_have_torchs_values_at_whole_epochs(modifier: Modifier, make: Callable[..., object]) -> None:
    seen = rates([modifier], 12, 5)
    assert [seen[float(epoch)] for epoch in range(12)] == pytest.approx(by_torch(make, 12), rel=1e-9)
    if modifier.lr_class != "CosineAnnealingWarmRestarts":  # type: ignore[attr-defined]
        # Between whole epochs nothing moves.
        assert all(rate == seen[float(int(epoch))] for epoch, rate in seen.items())


@pytest.mark.parametrize("start", [0.3, 0.7, 1.1, 2.3])
@pytest.mark.parametrize("steps_per_epoch", [10, 30])
def test_whole_epochs_from_a_fractional_start_come_at_their_step(start: float, steps_per_epoch: int) -> None:
    seen = rates([scheduler("ExponentialLR", start, gamma=0.5)], 8, steps_per_epoch)
    first = round(start * steps_per_epoch)
    for epoch, rate in seen.items():
        step = round(epoch * steps_per_epoch)
        if step >= first:
            assert rate == pytest.approx(0.1 * 0.5 ** ((step - first) // steps_per_epoch)), epoch


# ---------------------------------------------------------------------------------------------- the ledger


def test_the_latest_start_governs_and_holds_its_last_value() -> None:
    seen = rates([fixed(0.5, 0.0), function("linear", 2.0, 4.0), fixed(0.7, 8.0)], 10, 2)
    assert (seen[0.0], seen[1.5], seen[2.0], seen[3.0], seen[4.0]) == pytest.approx((0.5, 0.5, 0.1, 0.0505, 0.001))
    assert (seen[7.5], seen[8.0], seen[10.0]) == (0.001, 0.7, 0.7)


def test_a_later_start_cuts_a_schedule_short() -> None:
    seen = rates([function("linear", 0.0, 10.0), fixed(0.7, 5.0)], 10, 2)
    assert (seen[4.5], seen[5.0], seen[9.5], seen[10.0]) == pytest.approx((0.05545, 0.7, 0.7, 0.7))


@pytest.mark.parametrize("turned", [False, True])
def test_at_one_start_a_schedule_beats_a_set_value(turned: bool) -> None:
    both = [fixed(0.5, 2.0), function("linear", 2.0, 4.0)]
    seen = rates(both[::-1] if turned else both, 5, 2)
    assert seen[2.0] == 0.1 and seen[5.0] == 0.001


def test_of_equals_the_later_in_the_file_governs() -> None:
    assert rates([fixed(0.5), fixed(0.6)], 1)[1.0] == 0.6
    assert rates([fixed(0.6), fixed(0.5)], 1)[1.0] == 0.5
    step, line = scheduler("StepLR", 0.0, step_size=1), function("linear", 0.0, 4.0)
    assert rates([step, line], 2)[2.0] == pytest.approx(0.0505)
    assert rates([line, step], 2)[2.0] == pytest.approx(0.001)


def test_parameter_groups_are_governed_apart() -> None:
    modifiers = [fixed(0.5, param_groups=[0]), fixed(0.25, 1.0, param_groups=[0, 2])]
    first, second, third = (rates(modifiers, 2, group=group) for group in range(3))
    assert (first[0.0], first[1.0], second[2.0], third[0.0], third[1.0]) == (0.5, 0.25, 1.0, 1.0, 0.25)


def test_a_parameter_group_that_is_not_there_is_refused() -> None:
    optimizer = optimizer_of(2)
    with pytest.raises(ArgumentError, match=r"SetLearningRateModifier.param_groups: there is no parameter group 2"):
        ScheduledModifierManager([fixed(0.5, param_groups=[2])]).modify(optimizer.model, optimizer, 4)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 1.0]


def test_a_group_that_is_added_in_mid_run_is_governed_too() -> None:
    optimizer = optimizer_of()
    ScheduledModifierManager([fixed(0.5)]).modify(optimizer.model, optimizer, 4)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    optimizer.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


def test_a_learning_rate_tensor_stays_the_same_tensor() -> None:
    rate = torch.tensor(1.0)
    optimizer = optimizer_of(lr=rate)
    ScheduledModifierManager([function("linear", 0.0, 2.0)]).modify(optimizer.model, optimizer, 4)
    inside = optimizer.param_groups[0]["lr"]
    for step in range(10):
        assert float(inside) == pytest.approx(0.1 - 0.099 * min(1.0, step / 8))
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] is inside


def test_resuming_gives_the_learning_rates_of_an_uninterrupted_run() -> None:
    modifiers = [fixed(0.5, 0.0), function("cosine", 1.0, 3.0), scheduler("ExponentialLR", 4.0, gamma=0.7)]
    whole = list(rates(modifiers, 7, 3).values())
    for cut in range(len(whole)):
        optimizer = optimizer_of(3)
        manager = ScheduledModifierManager(modifiers)
        manager.modify(optimizer.model, optimizer, steps_per_epoch=3, epoch=cut / 3)
        assert optimizer.param_groups[0]["lr"] == whole[cut]
        assert manager.step == cut


# ---------------------------------------------------------------------------------------------- the user's schedulers


@pytest.mark.parametrize("before", [True, False])
def test_the_recipe_wins_and_one_warning_names_the_scheduler(before: bool) -> None:
    optimizer = optimizer_of()
    manager = ScheduledModifierManager([function("linear", 0.0, 4.0)])
    driven = LambdaLR(optimizer, lambda n: 0.5**n) if before else None
    manager.modify(optimizer.model, optimizer, steps_per_epoch=2)
    driven = driven or LambdaLR(optimizer, lambda n: 0.5**n)
    used: list[float] = []
    optimizer.register_step_pre_hook(lambda *_: used.append(optimizer.param_groups[0]["lr"]))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(8):
            optimizer.step()
            driven.step()
    mine = [warning for warning in said if issubclass(warning.category, SparsifyWarning)]
    assert len(mine) == 1 and "LambdaLR set the learning rate" in str(mine[0].message)
    assert "LearningRateFunctionModifier" in str(mine[0].message)
    assert used == pytest.approx([0.1 - 0.099 * step / 8 for step in range(8)])


def test_without_learning_rate_modifiers_the_learning_rate_is_never_touched() -> None:
    optimizer = optimizer_of()
    driven = ExponentialLR(optimizer, 0.5)
    ScheduledModifierManager([EpochRangeModifier(end_epoch=4.0)]).modify(optimizer.model, optimizer, steps_per_epoch=2)
    for step in range(8):
        assert optimizer.param_groups[0]["lr"] == 0.5**step
        optimizer.step()
        driven.step()


def test_before_the_first_start_the_users_learning_rate_is_in_force() -> None:
    optimizer = optimizer_of()
    driven = ExponentialLR(optimizer, 0.5)
    manager = ScheduledModifierManager([fixed(0.3, 2.0)])
    manager.modify(optimizer.model, optimizer, steps_per_epoch=2)
    for step in range(3):
        assert optimizer.param_groups[0]["lr"] == 0.5**step
        optimizer.step()
        driven.step()
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.3


def test_loading_the_optimizer_is_no_quarrel() -> None:
    optimizer = optimizer_of()
    saved = optimizer.state_dict()
    ScheduledModifierManager([fixed(0.3)]).modify(optimizer.model, optimizer, steps_per_epoch=2)
    used: list[float] = []
    optimizer.register_step_pre_hook(lambda *_: used.append(optimizer.param_groups[0]["lr"]))
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert used == [0.3]


def test_a_learning_rate_set_by_hand_is_told_apart_from_a_scheduler() -> None:
    optimizer = optimizer_of(lr=torch.tensor(1.0))
    ScheduledModifierManager([fixed(0.3)]).modify(optimizer.model, optimizer, steps_per_epoch=2)
    optimizer.param_groups[0]["lr"].fill_(0.9)
    with pytest.warns(SparsifyWarning, match=r"something other than the recipe set the learning rate .* to 0.9"):
        optimizer.step()
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.3)


# ---------------------------------------------------------------------------------------------- what is written down


class Writer:
    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag, value, step))


@pytest.mark.parametrize(("always", "count"), [(False, 1), (True, 5)])
def test_a_writer_gets_learning_rates_where_they_change(always: bool, count: int) -> None:
    optimizer, writer = optimizer_of(), Writer()
    manager = ScheduledModifierManager([fixed(0.3, constant_logging=always)])
    manager.modify(optimizer.model, optimizer, steps_per_epoch=2, writer=writer)
    for _ in range(4):
        optimizer.step()
    assert writer.scalars == [("learning_rate/group_0", 0.3, step) for step in range(count)]


# ---------------------------------------------------------------------------------------------- wrong fields


@pytest.mark.parametrize(
    ("make", "field", "text"),
    [
        (lambda: fixed(-0.1), "learning_rate", "greater than or equal to 0"),
        (lambda: fixed(0.1, param_groups=[-1]), "param_groups.0", "greater than or equal to 0"),
        (lambda: function(end=-1.0), "end_epoch", "ends no schedule"),
        (lambda: function(cycle_epochs=0.0), "cycle_epochs", "greater than 0"),
        (lambda: function("quadratic"), "lr_func", "quadratic"),
        (lambda: scheduler("StepLR", 0.0), "lr_kwargs", "StepLR needs 'step_size'"),
        (lambda: scheduler("StepLR", 0.0, step_size=0), "lr_kwargs", "step_size: 0 is not a number of epochs above 0"),
        (
            lambda: scheduler("StepLR", 0.0, stepsize=1),
            "lr_kwargs",
            "StepLR has no 'stepsize'. Did you mean 'step_size'",
        ),
        (lambda: scheduler("MultiStepLR", 0.0, milestones=4), "lr_kwargs", "milestones: 4 is not a list of epochs"),
        (
            lambda: scheduler("MultiStepLR", 0.0, milestones=["4"]),
            "lr_kwargs",
            "milestones: .* is not a list of epochs",
        ),
        (lambda: scheduler("ExponentialLR", 0.0, gamma=True), "lr_kwargs", "gamma: True is not a factor"),
        (lambda: scheduler("CosineLR", 0.0), "lr_class", "CosineLR"),
    ],
)
def test_wrong_fields_are_refused_by_name(make: Callable[[], Modifier], field: str, text: str) -> None:
    with pytest.raises(RecipeError, match=text) as caught:
        make()
    assert caught.value.field == field
