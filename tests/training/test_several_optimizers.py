"""Several optimizers on one model: masks hold after every step of each, one of them counts, all are acted on."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify.errors import ArgumentError
from sparsify.modifiers.layer_distillation import PerLayerDistillationModifier
from sparsify.modifiers.learning_rate import LearningRateFunctionModifier, SetLearningRateModifier
from sparsify.modifiers.regularization import PowerpropagationModifier
from sparsify.modifiers.second_order import MFACPruningModifier, OBSPruningModifier
from sparsify.modifiers.sparse_training import ACDCPruningModifier, MovementPruningModifier, RigLPruningModifier
from sparsify.modifiers.training import SetWeightDecayModifier
from sparsify.training.manager import ScheduledModifierManager
from tests.loops import (
    channel_pruning,
    gradual_pruning,
    holds_state,
    masks_of,
    pruning_fields,
    regression_batch,
    regression_model,
    reloaded,
    top_kast,
    weights_of,
    zeros_of,
)
from tests.zoo.small import perceptron

Pair = tuple[torch.optim.Optimizer, torch.optim.Optimizer]


def matrices_and_rest(model: nn.Module) -> Pair:
    """As one trains a transformer: one optimizer for matrices, another one for the rest."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    muon = getattr(torch.optim, "Muon", None)
    first = torch.optim.SGD(matrices, lr=0.05, momentum=0.9) if muon is None else muon(matrices, lr=0.02)
    return first, torch.optim.AdamW(rest, lr=1e-2)


def first_and_last_layer(model: nn.Module) -> Pair:
    """Both have weights that are pruned."""
    assert isinstance(model, nn.Sequential)
    first = torch.optim.SGD(model[0].parameters(), lr=0.05, momentum=0.9)
    return first, torch.optim.AdamW(model[2].parameters(), lr=1e-2)


def backward(model: nn.Module, step: int) -> None:
    inputs, target = regression_batch(step)
    (model(inputs) - target).square().mean().backward()


def zeros_hold(manager: ScheduledModifierManager, model: nn.Module) -> bool:
    weights = weights_of(model)
    return all(bool((weights[name][~mask] == 0).all()) for name, mask in masks_of(manager).items())


@pytest.mark.parametrize("form", [list, tuple, lambda pair: dict(zip(("matrices", "rest"), pair, strict=True))])
@pytest.mark.parametrize("divided", [matrices_and_rest, first_and_last_layer])
def test_masks_hold_after_every_step_of_each_and_one_counts(divided: Callable[[nn.Module], Pair], form: Any) -> None:
    model = regression_model()
    given = form(divided(model))
    manager = ScheduledModifierManager([gradual_pruning()])
    optimizers = manager.modify(model, given, steps_per_epoch=5)
    assert type(optimizers) is type(given)
    both = list(optimizers.values()) if isinstance(optimizers, dict) else list(optimizers)
    if isinstance(given, dict):
        assert list(optimizers) == list(given) and all(optimizers[key] is given[key] for key in given)
    for count in range(1, 13):
        for optimizer in both:
            optimizer.zero_grad()
        backward(model, count)
        for optimizer in both:
            optimizer.step()
            assert manager.step == count and zeros_hold(manager, model)
    assert zeros_of(model) == {"0.weight": 48, "2.weight": 32}
    manager.finalize(model)
    assert all(not optimizer._optimizer_step_pre_hooks for optimizer in both)


@pytest.mark.parametrize(
    ("chosen", "expected"), [({}, 3), ({"counting_optimizer": "d"}, 6), ({"counting_optimizer": "g"}, 3)]
)
def test_optimizers_that_step_unequally_often_are_counted_by_the_one_chosen(chosen: Any, expected: int) -> None:
    """As a GAN trains: two losses, the discriminator stepped twice for each step of the generator."""
    model = nn.ModuleDict({"g": perceptron(6, 9, 6), "d": perceptron(6, 9, 1)})
    optimizers = {name: torch.optim.Adam(model[name].parameters(), lr=1e-2) for name in ("g", "d")}
    manager = ScheduledModifierManager([gradual_pruning(end=1.0)])
    optimizers = manager.modify(model, optimizers, steps_per_epoch=expected, **chosen)
    for _ in range(3):
        for _ in range(2):
            optimizers["d"].zero_grad()
            (
                model["d"](torch.randn(8, 6)).mean() - model["d"](model["g"](torch.randn(8, 6)).detach()).mean()
            ).backward()
            optimizers["d"].step()
            assert zeros_hold(manager, model)
        optimizers["g"].zero_grad()
        model["d"](model["g"](torch.randn(8, 6))).mean().backward()
        optimizers["g"].step()
        assert zeros_hold(manager, model)
    assert manager.step == expected and manager.epoch == 1.0
    assert set(manager.sparsity().values()) == {43 / 54, 7 / 9}


def test_learning_rates_and_weight_decay_reach_the_groups_of_all() -> None:
    model = regression_model()
    first, second = first_and_last_layer(model)
    second.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.5})
    modifiers = [
        SetLearningRateModifier(learning_rate=0.3, param_groups=[1]),
        LearningRateFunctionModifier(
            lr_func="linear", init_lr=1.0, final_lr=0.0, start_epoch=0.0, end_epoch=2.0, param_groups=[2]
        ),
        SetWeightDecayModifier(weight_decay=0.25, param_groups=[0, 2]),
    ]
    manager = ScheduledModifierManager(modifiers)
    manager.modify(model, [first, second], steps_per_epoch=5)
    for count in range(6):
        rates = [group["lr"] for one in (first, second) for group in one.param_groups]
        assert rates == [0.05, 0.3, pytest.approx(1.0 - 0.1 * count)]
        backward(model, count)
        first.step()
        second.step()
    assert [group["weight_decay"] for one in (first, second) for group in one.param_groups] == [0.25, 0.01, 0.25]
    manager.finalize()
    everywhere = ScheduledModifierManager([SetLearningRateModifier(learning_rate=0.7)])
    everywhere.modify(model, [first, second], steps_per_epoch=5)
    assert [group["lr"] for one in (first, second) for group in one.param_groups] == [0.7, 0.7, 0.7]


def test_what_the_owner_of_a_parameter_remembers_of_masked_weights_is_reset() -> None:
    model = regression_model()
    first, second = first_and_last_layer(model)
    manager = ScheduledModifierManager([gradual_pruning(start=1.0)])
    manager.modify(model, [first, second], steps_per_epoch=5, counting_optimizer=1)
    for count in range(10):
        backward(model, count)
        first.step()
        second.step()
    masks = masks_of(manager)
    kept = {
        "0.weight": [first.state[model.get_parameter("0.weight")]["momentum_buffer"]],
        "2.weight": [second.state[model.get_parameter("2.weight")][key] for key in ("exp_avg", "exp_avg_sq")],
    }
    for name, several in kept.items():
        for state in several:
            assert not state[~masks[name]].any() and bool(state[masks[name]].any()), name


def test_removed_channels_are_removed_from_the_state_of_each_optimizer() -> None:
    model = regression_model()
    first, second = first_and_last_layer(model)
    manager = ScheduledModifierManager([channel_pruning(shrink=True)])
    manager.modify(model, [first, second], steps_per_epoch=2, sample_inputs=torch.randn(2, 6))
    for count in range(10):
        first.zero_grad()
        second.zero_grad()
        backward(model, count)
        first.step()
        second.step()
    assert model.get_parameter("0.weight").shape == (5, 6) and model.get_parameter("2.weight").shape == (4, 5)
    assert first.state[model.get_parameter("0.weight")]["momentum_buffer"].shape == (5, 6)
    assert second.state[model.get_parameter("2.weight")]["exp_avg"].shape == (4, 5)


MODIFIERS = {
    "movement": lambda: MovementPruningModifier(**pruning_fields(), init_sparsity=0.1, final_sparsity=0.6),
    "acdc": lambda: ACDCPruningModifier(**pruning_fields(), compression_sparsity=0.5),
    "rigl": lambda: RigLPruningModifier(**pruning_fields(), final_sparsity=0.5),
    "top-kast": top_kast,
    "powerpropagation": lambda: PowerpropagationModifier(params="__ALL_PRUNABLE__", alpha=2.0),
    "obs": lambda: OBSPruningModifier(**pruning_fields(), init_sparsity=0.1, final_sparsity=0.6, num_grads=2),
    "mfac": lambda: MFACPruningModifier(**pruning_fields(), init_sparsity=0.1, final_sparsity=0.6, num_grads=2),
}


def run(name: str, optimizers: Callable[[nn.Module], list[torch.optim.Optimizer]], **given: Any) -> dict[str, Tensor]:
    model = regression_model()
    several = optimizers(model)
    manager = ScheduledModifierManager([MODIFIERS[name]()])
    manager.modify(model, several if len(several) > 1 else several[0], steps_per_epoch=2, **given)
    for count in range(14):
        for optimizer in several:
            optimizer.zero_grad()
        backward(model, count)
        for optimizer in several:
            optimizer.step()
    manager.finalize()
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("name", MODIFIERS)
def test_one_optimizer_divided_in_two_trains_the_same(name: str) -> None:
    """The last one to step counts, so that what is due comes after all have stepped."""

    def one(model: nn.Module) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)]

    def two(model: nn.Module) -> list[torch.optim.Optimizer]:
        assert isinstance(model, nn.Sequential)
        return [torch.optim.SGD(model[i].parameters(), lr=0.05, momentum=0.9) for i in (0, 2)]

    wanted, found = run(name, one), run(name, two, counting_optimizer=1)
    assert all(torch.equal(found[key], value) for key, value in wanted.items())


@pytest.mark.parametrize("name", MODIFIERS)
def test_the_first_may_count_whatever_prunes(name: str) -> None:
    found = run(name, lambda model: list(first_and_last_layer(model)))
    assert all(bool(value.isfinite().all()) for value in found.values())
    if name in ("rigl", "obs", "mfac", "movement"):
        unmoved = run(name, lambda model: list(first_and_last_layer(model)), counting_optimizer=1)
        assert {key: int((v == 0).sum()) for key, v in found.items()} == {
            key: int((v == 0).sum()) for key, v in unmoved.items()
        }


def test_weights_of_an_optimizer_that_steps_after_the_counting_one_are_regrown() -> None:
    model = regression_model()
    first, second = first_and_last_layer(model)
    manager = ScheduledModifierManager([MODIFIERS["rigl"]()])
    manager.modify(model, [first, second], steps_per_epoch=2)
    masks: list[Tensor] = []
    for count in range(10):
        first.zero_grad()
        second.zero_grad()
        backward(model, count)
        first.step()
        second.step()
        masks.append(masks_of(manager)["2.weight"])
    assert any(bool((later & ~earlier).any()) for earlier, later in itertools.pairwise(masks))


def test_projections_go_to_the_optimizer_that_takes_any_shape_and_learn() -> None:
    model, teacher = perceptron(6, 9, 4), perceptron(6, 12, 4)
    matrices, rest = matrices_and_rest(model)
    manager = ScheduledModifierManager(
        [PerLayerDistillationModifier(student_layer_names=["0"], teacher_layer_names=["0"], start_epoch=0.0)]
    )
    manager.modify(model, [matrices, rest], steps_per_epoch=2, distillation_teacher=teacher)
    seen = []
    for _ in range(3):
        matrices.zero_grad()
        rest.zero_grad()
        manager.update_loss(model(torch.randn(8, 6)).square().mean()).backward()
        matrices.step()
        rest.step()
        seen.append([p.detach().clone() for p in rest.param_groups[-1]["params"]])
    assert len(rest.param_groups) == 2 and len(matrices.param_groups) == 1
    assert not torch.equal(seen[0][0], seen[2][0])


def test_resumed_at_every_step_it_is_the_run_that_never_stopped() -> None:
    def start() -> tuple[nn.Module, Pair, ScheduledModifierManager]:
        model = regression_model()
        both = first_and_last_layer(model)
        manager = ScheduledModifierManager(
            [
                gradual_pruning(),
                LearningRateFunctionModifier(
                    lr_func="cosine", init_lr=0.1, final_lr=0.0, start_epoch=0.0, end_epoch=4.0
                ),
            ]
        )
        manager.modify(model, list(both), steps_per_epoch=2)
        return model, both, manager

    def train(model: nn.Module, both: Pair, steps: range) -> None:
        for count in steps:
            for optimizer in both:
                optimizer.zero_grad()
            backward(model, count)
            for optimizer in both:
                optimizer.step()

    whole, both, _ = start()
    train(whole, both, range(8))
    for stop in range(1, 8, 2):
        model, both, manager = start()
        train(model, both, range(stop))
        saved = reloaded(
            model=model.state_dict(), manager=manager.state_dict(), optimizers=[one.state_dict() for one in both]
        )
        model, both, manager = start()
        manager.load_state_dict(saved["manager"])
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(both, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        train(model, both, range(stop, 8))
        assert holds_state(whole, model.state_dict()), stop


@pytest.mark.parametrize(
    ("given", "chosen", "message"),
    [
        (lambda a, b: [a, "adam"], None, r"optimizer\[1\]: an object of type str is no optimizer"),
        (lambda a, b: {"g": a, "d": None}, None, r"optimizer\['d'\]: an object of type NoneType is no optimizer"),
        (lambda a, b: ([a], [b]), None, r"optimizer\[0\]: an object of type list is no optimizer"),
        (lambda a, b: [a, a], None, "optimizer: 0 and 1 are the same SGD; give each once"),
        (lambda a, b: [], None, "optimizer: an object of type list is no optimizer"),
        (lambda a, b: {}, None, "optimizer: an object of type dict is no optimizer"),
        (lambda a, b: [a, b], 2, "counting_optimizer: 2 names none of the 2 optimizers; give one of 0, 1"),
        (lambda a, b: [a, b], -1, "counting_optimizer: -1 names none"),
        (lambda a, b: [a, b], True, "counting_optimizer: True names none"),
        (lambda a, b: {"gen": a, "disc": b}, "disk", "names none of the 2 optimizers; .* Did you mean 'disc'"),
        (lambda a, b: {"gen": a, "disc": b}, 0, "counting_optimizer: 0 names none"),
        (lambda a, b: a, "gen", "counting_optimizer: 'gen' chooses among several optimizers; there is one"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_changes(given: Any, chosen: Any, message: str) -> None:
    model = regression_model()
    before = copy.deepcopy(model.state_dict())
    both = first_and_last_layer(model)
    manager = ScheduledModifierManager([gradual_pruning()])
    with pytest.raises(ArgumentError, match=message):
        manager.modify(model, given(*both), steps_per_epoch=5, counting_optimizer=chosen)
    assert not manager.attached and holds_state(model, before)
    assert not any(optimizer._optimizer_step_pre_hooks for optimizer in both)


def test_parameter_groups_are_counted_through_in_messages() -> None:
    model = regression_model()
    manager = ScheduledModifierManager([SetLearningRateModifier(learning_rate=0.3, param_groups=[2])])
    with pytest.raises(ArgumentError, match="no parameter group 2; the 2 optimizers have 2 parameter groups, 0 to 1"):
        manager.modify(model, list(first_and_last_layer(model)), steps_per_epoch=5)
