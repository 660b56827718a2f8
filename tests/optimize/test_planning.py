"""plan() foresees what a run does: it is held against runs, epoch by epoch, and against its own promises."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparsify.errors import ArgumentError, RecipeError, TargetError
from sparsify.optimize.planned import Plan
from sparsify.optimize.planning import plan
from sparsify.recipe import Recipe
from sparsify.training.manager import ScheduledModifierManager

STEPS = 6
RAMP = "init_sparsity: 0.05, final_sparsity: 0.8, start_epoch: 1.0, end_epoch: 4.0, update_frequency: 0.5"
MOVING = "start_epoch: 1.0, end_epoch: 7.0, update_frequency: 2.0, params: __ALL_PRUNABLE__"
PRUNING = {
    "gradual": f"!GMPruningModifier {{params: __ALL_PRUNABLE__, {RAMP}}}",
    "linear by name": "!GMPruningModifier {params: [], final_sparsity: {0.5: ['0.weight'], 0.9: ['3.weight']}, "
    "init_sparsity: 0.1, start_epoch: 0.0, end_epoch: 3.0, update_frequency: 1.0, inter_func: linear}",
    "from what is there": "!MagnitudePruningModifier {params: __ALL_PRUNABLE__, init_sparsity: __FROM_PARAM__, "
    "final_sparsity: 0.9, start_epoch: 0.0, end_epoch: 3.0, update_frequency: 1.0}",
    "2:4": "!GMPruningModifier {params: ['3.weight'], mask_type: '2:4', init_sparsity: 0.0, final_sparsity: 0.5, "
    "start_epoch: 0.0, end_epoch: 3.0, update_frequency: 1.0}",
    "alternating": f"!ACDCPruningModifier {{compression_sparsity: 0.75, global_sparsity: false, {MOVING}}}",
    "regrown": f"!RigLPruningModifier {{final_sparsity: 0.75, {MOVING}}}",
    "few forward": "!TopKASTPruningModifier {forward_sparsity: 0.7, backward_sparsity: 0.4, global_sparsity: false, "
    f"{MOVING}}}",
    "moved": f"!MovementPruningModifier {{params: __ALL_PRUNABLE__, {RAMP}}}",
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 40), nn.ReLU(), nn.Linear(40, 3)
    )
    with torch.no_grad():
        model[5].weight[:, :10] = 0.0
    return model


def recipe(*modifiers: str, end: float = 8.0) -> Recipe:
    text = "".join(f"  - {modifier}\n" for modifier in modifiers)
    return Recipe.from_yaml(f"modifiers:\n  - !EpochRangeModifier {{start_epoch: 0.0, end_epoch: {end}}}\n{text}")


def run(made: Recipe, model: nn.Module) -> list[tuple[dict[str, float], float]]:
    """Zeros and learning rate at every whole epoch of a real run."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    manager = ScheduledModifierManager(made)
    manager.modify(model, optimizer, steps_per_epoch=STEPS)
    found = []
    for step in range(STEPS * int(made.max_epochs) + 1):
        if step % STEPS == 0:
            zeros = {n: float((p == 0).sum()) / p.numel() for n, p in model.named_parameters()}
            found.append((zeros, optimizer.param_groups[0]["lr"]))
        if step < STEPS * made.max_epochs:
            optimizer.zero_grad()
            model(torch.randn(4, 2, 8, 8)).square().mean().backward()
            optimizer.step()
    return found


@pytest.mark.parametrize("name", PRUNING)
def test_zeros_are_those_of_a_run(name: str) -> None:
    made, model = recipe(PRUNING[name]), network()
    foreseen = plan(made, copy.deepcopy(model), STEPS)
    for epoch, (zeros, _) in enumerate(run(made, model)):
        for parameter, share in foreseen.at(epoch).zeros.items():
            assert share is not None
            size = foreseen.weights[parameter]
            # A dense phase leaves what was zero, and what was just regrown is zero still: those are no weights that
            # are held at zero.
            if name == "regrown":
                assert zeros[parameter] >= share - 0.51 / size
            elif share > 0:
                assert zeros[parameter] == pytest.approx(share, abs=0.51 / size + 1e-9), (epoch, parameter)
    assert any(foreseen.moments[-1].zeros_known)


def test_one_ranking_has_the_share_of_all_weights_together() -> None:
    made, model = recipe(f"!GlobalMagnitudePruningModifier {{params: __ALL_PRUNABLE__, {RAMP}}}"), network()
    foreseen = plan(made, model, STEPS)
    zeros = run(made, model)[-1][0]
    names = list(foreseen.moments[-1].zeros)
    whole = sum(foreseen.weights[n] for n in names)
    assert sum(zeros[n] * foreseen.weights[n] for n in names) / whole == pytest.approx(0.8, abs=1 / whole)
    assert foreseen.average(foreseen.moments[-1]) == pytest.approx(0.8)


def test_elements_that_are_not_zero_are_counted_as_in_a_run() -> None:
    made, model = recipe(PRUNING["gradual"]), network()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    foreseen = plan(made, model, STEPS)
    # Zeros that were in the weights before pruning starts are not foreseen.
    for epoch, (zeros, _) in list(enumerate(run(made, model)))[1:]:
        left = sum((1.0 - zeros[name]) * size for name, size in sizes.items())
        assert foreseen.at(epoch).nonzero == pytest.approx(left, abs=2), epoch


def test_macs_that_are_not_zero_follow_the_weights() -> None:
    foreseen = plan(recipe(PRUNING["gradual"]), network(), STEPS, sample_inputs=torch.zeros(1, 2, 8, 8))
    whole = 16 * 18 * 36 + 576 * 40 + 40 * 3
    assert foreseen.at(0).nonzero_macs == whole == foreseen.at(8).macs
    assert foreseen.at(8).nonzero_macs == pytest.approx(0.2 * whole)


SECOND = (
    "!GMPruningModifier {params: __ALL_PRUNABLE__, init_sparsity: 0.8, final_sparsity: 0.9, start_epoch: 5.0, "
    "end_epoch: 7.0, update_frequency: 1.0}"
)
HOLD = "!ConstantPruningModifier {params: __ALL_PRUNABLE__, start_epoch: 5.0}"


@pytest.mark.parametrize(("later", "last"), [(SECOND, 0.9), (HOLD, 0.8)])
@pytest.mark.parametrize("turned", [False, True])
def test_the_later_of_two_modifiers_is_in_force(later: str, last: float, turned: bool) -> None:
    both = [PRUNING["gradual"], later]
    made, model = recipe(*(both[::-1] if turned else both)), network()
    foreseen = plan(made, model, STEPS)
    for epoch, (zeros, _) in enumerate(run(made, model)):
        for parameter, share in foreseen.at(epoch).zeros.items():
            assert zeros[parameter] == pytest.approx(share, abs=0.51 / foreseen.weights[parameter] + 1e-9), epoch
    assert set(foreseen.moments[-1].zeros.values()) == {last}


def test_dense_phases_alternate_with_sparse_ones_and_come_first() -> None:
    foreseen = plan(recipe(PRUNING["alternating"]), network(), STEPS)
    shares = [foreseen.at(epoch).zeros.get("3.weight") for epoch in range(9)]
    assert shares == [None, 0.0, 0.0, 0.75, 0.75, 0.0, 0.0, 0.75, 0.75]


@pytest.mark.parametrize(
    "rates",
    [
        ["!SetLearningRateModifier {start_epoch: 0.0, learning_rate: 0.3}"],
        [
            "!LearningRateFunctionModifier {start_epoch: 0.0, end_epoch: 8.0, lr_func: cosine, init_lr: 0.1, "
            "final_lr: 0.001}"
        ],
        [
            "!SetLearningRateModifier {start_epoch: 0.0, learning_rate: 0.3}",
            "!LearningRateModifier {start_epoch: 3.0, lr_class: StepLR, lr_kwargs: {step_size: 2, gamma: 0.5}, "
            "init_lr: 0.2}",
        ],
    ],
)
def test_learning_rates_are_those_of_a_run(rates: list[str]) -> None:
    made, model = recipe(*rates), network()
    foreseen = plan(made, model, STEPS)
    for epoch, (_, rate) in enumerate(run(made, model)):
        assert foreseen.at(epoch).learning_rates == {0: pytest.approx(rate)}


def test_what_starts_within_a_step_is_shown_at_the_next() -> None:
    """Steps of a quarter of an epoch: 0.3 is reached at the second, 1.7 at the seventh."""
    recipe = """
modifiers:
  - !GMPruningModifier
    params: __ALL_PRUNABLE__
    init_sparsity: 0.2
    final_sparsity: 0.8
    start_epoch: 0.3
    end_epoch: 1.7
    update_frequency: 0.5
"""
    moments = plan(recipe, steps_per_epoch=4).moments
    assert [moment.epoch for moment in moments] == [0.0, 0.5, 1.0, 1.75, 2.0]
    assert [bool(moment.doing) for moment in moments] == [False, True, True, True, True]


def test_a_rate_that_nobody_sets_is_left_open() -> None:
    late = plan(recipe("!SetLearningRateModifier {start_epoch: 2.0, learning_rate: 0.3}"))
    assert late.at(1).learning_rates == {0: None} and late.at(2).learning_rates == {0: 0.3}
    assert plan(recipe(PRUNING["gradual"])).moments[0].learning_rates == {}


def test_groups_have_rates_of_their_own() -> None:
    made = plan(
        recipe(
            "!SetLearningRateModifier {start_epoch: 0.0, learning_rate: 0.3, param_groups: [0]}",
            "!SetLearningRateModifier {start_epoch: 0.0, learning_rate: 0.1, param_groups: [1]}",
        )
    )
    assert made.moments[0].learning_rates == {0: 0.3, 1: 0.1}


def test_what_is_left_after_channels_go_is_that_of_a_run() -> None:
    structured = (
        "!StructuredPruningModifier {params: __ALL_PRUNABLE__, init_sparsity: 0.0, final_sparsity: 0.5, "
        "start_epoch: 0.0, end_epoch: 2.0, update_frequency: 1.0, shrink: true}"
    )
    made, model = recipe(structured, end=3.0), network()
    sample = torch.zeros(1, 2, 8, 8)
    before = copy.deepcopy(model.state_dict())
    foreseen = plan(made, model, STEPS, sample_inputs=sample)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    run(made, model)
    left = sum(p.numel() for p in model.parameters())
    last = foreseen.moments[-1]
    assert last.parameters == left < (foreseen.moments[0].parameters or 0)
    # 8 of 16 channels of 3x3x2 at 6x6 places, 288 of 576 inputs and 20 of 40 outputs, 20 inputs of 3.
    assert last.macs == 8 * 18 * 36 + 288 * 20 + 20 * 3
    assert foreseen.at(1).macs == 16 * 18 * 36 + 576 * 40 + 40 * 3
    assert foreseen.at(1).parameters == foreseen.moments[0].parameters and foreseen.at(2).parameters == left
    assert not foreseen.notes
    assert any("sample_inputs" in note for note in plan(made, network(), STEPS).notes)


def test_size_follows_the_bits() -> None:
    made = plan(recipe("!QuantizationModifier {start_epoch: 4.0}"), network(), STEPS)
    weights, biases = 16 * 18 + 576 * 40 + 120, 16 + 40 + 3
    assert made.at(3).size_bytes == 4 * (weights + biases)
    assert made.at(5).size_bytes == weights + 4 * biases
    assert made.at(5).doing == {"Quantization": "quantized"}


RATE = "!LearningRateFunctionModifier {{start_epoch: {}, end_epoch: {}, lr_func: linear, init_lr: {}, final_lr: {}}}"


@pytest.mark.parametrize(
    ("modifiers", "said"),
    [
        (
            [RATE.format(0.0, 8.0, 0.1, 0.01), RATE.format(4.0, 8.0, 0.05, 0.001)],
            "takes over the learning rate at epoch 4",
        ),
        (
            [RATE.format(0.0, 4.0, 0.1, 0.001), RATE.format(4.0, 8.0, 0.1, 0.001)],
            "jumps up at epoch 4, 19.5 times, from 0.00512 to 0.1",
        ),
        (["!QuantizationModifier {start_epoch: 8.0}"], "starts at epoch 8, where training ends"),
        ([PRUNING["gradual"].replace("end_epoch: 4.0", "end_epoch: 8.0")], "with no training left"),
        ([PRUNING["gradual"].replace("frequency: 0.5", "frequency: 0.01")], "less than one of 6 steps"),
        ([PRUNING["gradual"].replace("frequency: 0.5", "frequency: 9.0")], "all goes at once"),
        (
            ["!QuantizationModifier {start_epoch: 2.0, disable_quantization_observer_epoch: 2.0}"],
            "that of the first batch",
        ),
        (
            ["!SetLearningRateModifier {start_epoch: 0.0, learning_rate: 0.0}", PRUNING["gradual"]],
            "the learning rate is 0",
        ),
        (
            [RATE.format(0.0, 2.0, 0.1, 0.0003), PRUNING["gradual"]],
            "the learning rate is 0.3% of its highest at epoch 2 while GMPruning prunes until 4",
        ),
    ],
)
def test_what_was_probably_not_meant_is_said(modifiers: list[str], said: str) -> None:
    made = plan(recipe(*modifiers), network(), STEPS)
    assert [text for text in made.warnings if said in text], made.warnings
    assert said in str(made)


def test_a_shorter_training_is_said_to_miss_ends() -> None:
    made = plan(recipe(PRUNING["gradual"]), network(), STEPS, epochs=3)
    assert any("ends at epoch 4, but training ends at 3" in text for text in made.warnings)
    assert made.moments[-1].epoch == 3


def test_a_sound_recipe_has_no_warnings() -> None:
    made = plan(recipe(RATE.format(0.0, 8.0, 0.1, 0.001), PRUNING["gradual"]), network(), STEPS)
    assert made.warnings == () and made.notes == ()


def test_a_schedule_that_rises_at_first_or_ends_with_pruning_is_no_pitfall() -> None:
    rising = RATE.format(0.0, 1.0, 0.0001, 0.1), RATE.format(1.0, 8.0, 0.1, 0.01)
    ending = RATE.format(0.0, 4.0, 0.1, 0.0), RATE.format(4.0, 8.0, 0.0, 0.0)
    for rates in (rising, ending):
        made = plan(recipe(*rates, PRUNING["gradual"]), network(), STEPS)
        assert not [text for text in made.warnings if "of its highest" in text], made.warnings


def test_schedules_that_follow_one_another_are_no_pitfall() -> None:
    made = plan(recipe(RATE.format(0.0, 4.0, 0.1, 0.01), RATE.format(4.0, 8.0, 0.01, 0.001)), network(), STEPS)
    assert made.warnings == ()


def test_zeros_that_are_given_up_are_said() -> None:
    weaker = SECOND.replace("init_sparsity: 0.8, final_sparsity: 0.9", "init_sparsity: 0.1, final_sparsity: 0.5")
    made = plan(recipe(PRUNING["gradual"], weaker), network(), STEPS)
    assert [text for text in made.warnings if "falls from 80% zeros to 10% at epoch 5" in text], made.warnings


def test_table_json_and_plot(tmp_path: Path) -> None:
    made = plan(recipe(RATE.format(0.0, 8.0, 0.1, 0.001), PRUNING["gradual"]), network(), STEPS)
    rows = made.table().rows
    assert rows[0]["epoch"] == 0.0 and rows[-1]["epoch"] == 8.0 and rows[-1]["zeros"] == pytest.approx(0.8)
    said = json.loads(made.to_json())
    assert said["moments"][-1]["zeros"]["0.weight"] == 0.8 and said["steps_per_epoch"] == STEPS
    assert len(made.layers().rows) == 3
    pytest.importorskip("matplotlib")
    assert made.plot(tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ArgumentError, match=r"is written as \.png"):
        made.plot(tmp_path / "plan.gif")


def test_modifiers_that_do_the_same_are_counted() -> None:
    one = "!GMPruningModifier {{params: ['{}.weight'], " + RAMP.replace("{", "{{") + "}}"
    made = plan(recipe(*(one.format(number) for number in (0, 3, 5))), network(), STEPS)
    assert [row["doing"] for row in made.table().rows][1:3] == ["3 x GMPruning pruning"] * 2
    assert set(made.at(2).doing) == {"GMPruning 1", "GMPruning 2", "GMPruning 3"}


def test_a_long_recipe_has_a_short_table() -> None:
    made = plan(recipe(PRUNING["gradual"], end=400.0), network(), STEPS)
    assert len(made.moments) > 400 and len(made.table().rows) < 25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps_per_epoch": 0}, "steps_per_epoch: 0 is no number of steps"),
        ({"steps_per_epoch": 2.5}, "steps_per_epoch: 2.5 is no whole number"),
        ({"epochs": math.inf}, "epochs: inf is no length"),
        ({"sample_inputs": torch.zeros(1)}, "sample_inputs are inputs of a model"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        plan(recipe(PRUNING["gradual"]), **options)


def test_a_wrong_recipe_is_refused() -> None:
    with pytest.raises(TargetError, match="matches nothing"):
        plan(recipe(PRUNING["linear by name"].replace("'3.weight'", "'9.weight'")), network())
    with pytest.raises(RecipeError):
        plan("modifiers: [!NoSuchModifier {}]")


def test_plan_is_a_value() -> None:
    first, second = (plan(recipe(PRUNING["gradual"]), network(), STEPS) for _ in range(2))
    assert isinstance(first, Plan) and first == second


@pytest.mark.parametrize("end", ["1e9", "1e300", "1.7e308"])
def test_the_plan_of_an_endless_training_is_bounded(end: str) -> None:
    text = f"modifiers: [!EpochRangeModifier {{end_epoch: {end}}}, !SetLearningRateModifier {{learning_rate: 0.1}}]"
    made = plan(Recipe.from_yaml(text), None, 10)
    assert made.max_epochs == float(end) and len(made.moments) <= 1003
    assert made.moments[-1].epoch == pytest.approx(float(end))
    short = plan(Recipe.from_yaml("modifiers: [!EpochRangeModifier {end_epoch: 3.0}]"), None, 10)
    assert [moment.epoch for moment in short.moments] == [0.0, 1.0, 2.0, 3.0]
