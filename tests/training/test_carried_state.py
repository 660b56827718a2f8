"""The manager's state travels inside the optimizer's, and the structure with the model's: a checkpoint of these two is
whole, and they may be loaded in any order."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from sparsify.errors import SparsifyWarning, StateError
from sparsify.modifiers.base import Modifier
from sparsify.modifiers.distillation import DistillationModifier
from sparsify.modifiers.magnitude_pruning import GMPruningModifier
from sparsify.modifiers.quantization import QuantizationModifier
from sparsify.training.manager import ScheduledModifierManager
from tests.loops import (
    assert_same_state,
    channel_pruning,
    gradual_pruning,
    regress,
    regression_at_work,
    regression_model,
    reloaded,
)
from tests.zoo import prunable
from tests.zoo.prunable import Encoder, Residual

ORDERS = [
    ("model", "optimizer"),
    ("optimizer", "model"),
    *itertools.permutations(("model", "optimizer", "manager")),
]
STEPS = 9


def everything() -> list[Modifier]:
    """Channels that are removed at epoch 1, single weights pruned from 1 to 2, int8 from 2 on."""
    ramp: dict[str, Any] = {"init_sparsity": 0.1, "final_sparsity": 0.5, "update_frequency": 0.5}
    return [
        channel_pruning(start_epoch=0.0, end_epoch=1.0, multiple=2, shrink=True),
        GMPruningModifier(params="__ALL_PRUNABLE__", start_epoch=1.0, end_epoch=2.0, **ramp),
        QuantizationModifier(start_epoch=2.0),
        DistillationModifier(hardness=0.5),
    ]


def at_work(kind: Any, name: str = "sgd", recipe: list[Modifier] | None = None, seed: int = 0) -> dict[str, Any]:
    model = prunable.made(kind, seed=seed)
    optimizer = prunable.optimizer_of(name, model)
    manager = ScheduledModifierManager(recipe or everything())
    inputs, teacher = prunable.batch(kind, 0)[0], prunable.made(kind, seed=1)
    manager.modify(model, optimizer, steps_per_epoch=3, sample_inputs=inputs, distillation_teacher=teacher)
    return {"model": model, "optimizer": optimizer, "manager": manager}


def go_on(parts: dict[str, Any], steps: range) -> None:
    for number in steps:
        prunable.step(parts["model"], parts["optimizer"], number, update=parts["manager"].update_loss)


def states_of(parts: dict[str, Any]) -> dict[str, Any]:
    return {name: part.state_dict() for name, part in parts.items()}


def checkpoints(kind: Any, name: str) -> tuple[list[Any], dict[str, Any]]:
    """What was saved before every step, and the states at the end."""
    parts = at_work(kind, name)
    found = []
    for number in range(STEPS):
        found.append(reloaded(**states_of(parts)))
        go_on(parts, range(number, number + 1))
    return found, states_of(parts)


def resumed_equals(kind: Any, name: str, pairs: list[tuple[tuple[str, ...], int]]) -> None:
    found, end = checkpoints(kind, name)
    assert any("quantizer" in key for key in end["model"]), "it was quantized"
    for order, number in pairs:
        parts = at_work(kind, name, seed=3)
        # Copied: torch's optimizers go on working in the tensors that they are given to load.
        saved = copy.deepcopy(found[number])
        for part in order:
            parts[part].load_state_dict(saved[part])
        assert parts["manager"].step == number
        go_on(parts, range(number, STEPS))
        assert_same_state(states_of(parts), end, (order, number))


def test_resumed_in_any_order_it_is_the_run_that_never_stopped() -> None:
    resumed_equals(Residual, "adamw", [(ORDERS[number % len(ORDERS)], number) for number in range(STEPS)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("kind", [Residual, Encoder])
def test_resumed_at_every_step_in_every_order_it_is_the_run_that_never_stopped(kind: Any, name: str) -> None:
    resumed_equals(kind, name, list(itertools.product(ORDERS, range(STEPS))))


@pytest.mark.parametrize("order", [("model", "optimizer"), ("optimizer", "model")])
def test_a_run_goes_back_to_an_earlier_checkpoint_of_its_own(order: tuple[str, ...]) -> None:
    recipe = [gradual_pruning(end=2.0), QuantizationModifier(start_epoch=1.0)]
    parts = at_work(Residual, recipe=recipe)
    early = reloaded(model=parts["model"].state_dict(), optimizer=parts["optimizer"].state_dict())
    go_on(parts, range(5))
    late = reloaded(model=parts["model"].state_dict(), optimizer=parts["optimizer"].state_dict())
    assert len(late["model"]) > len(early["model"])
    for saved, step in ((early, 0), (late, 5)):
        saved = copy.deepcopy(saved)
        for part in order:
            parts[part].load_state_dict(saved[part])
        assert parts["manager"].step == step
        assert parts["model"].state_dict().keys() == saved["model"].keys()
    go_on(parts, range(5, 7))


# ---------------------------------------------------------------------------------------------- the optimizer's


def test_the_state_is_in_the_optimizers_and_a_plain_optimizer_loads_that() -> None:
    model, optimizer, manager = regression_at_work(gradual_pruning(), "adam")
    regress(model, optimizer, range(3))
    saved = reloaded(optimizer=optimizer.state_dict())["optimizer"]
    assert_same_state(saved["sparsify"], manager.state_dict(), "the manager's own")
    plain = torch.optim.Adam(regression_model().parameters())
    plain.load_state_dict(saved)
    assert "sparsify" not in plain.state_dict() and len(plain.state) == len(optimizer.state)
    manager.finalize()
    assert "sparsify" not in optimizer.state_dict()


def test_the_state_of_another_recipe_in_the_optimizers_is_refused_before_anything_changes() -> None:
    _, theirs, other = regression_at_work(gradual_pruning(end=3.0), "adam")
    model, optimizer, manager = regression_at_work(gradual_pruning(), "adam")
    regress(model, optimizer, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    saved = copy.deepcopy(theirs.state_dict())
    with pytest.raises(StateError, match=r"(?s)another recipe.*end_epoch: 3.*strict=False"):
        optimizer.load_state_dict(saved)
    assert_same_state(optimizer.state_dict(), before, "unchanged")
    # The way out: it was taken over already.
    with pytest.warns(SparsifyWarning, match="another recipe"):
        manager.load_state_dict(other.state_dict(), strict=False)
    optimizer.load_state_dict(saved)
    assert manager.step == 0


def test_an_optimizers_state_of_another_time_is_said_with_both_numbers() -> None:
    model, optimizer, _ = regression_at_work(gradual_pruning(), "adam")
    regress(model, optimizer, range(5))
    old = {key: value for key, value in copy.deepcopy(optimizer.state_dict()).items() if key != "sparsify"}
    again, optimizer, manager = regression_at_work(gradual_pruning(), "adam")
    optimizer.load_state_dict(old)
    with pytest.warns(SparsifyWarning, match=r"has taken 5 steps, the manager is at step 0.*load_state_dict"):
        regress(again, optimizer, range(1))
    regress(again, optimizer, range(1, 2))
    assert manager.step == 2


@pytest.mark.parametrize("apart", [0, 1])
def test_an_optimizers_state_of_the_same_time_is_not_mentioned(apart: int) -> None:
    model, optimizer, manager = regression_at_work(gradual_pruning(), "adam")
    regress(model, optimizer, range(5 - apart))
    state = manager.state_dict()
    regress(model, optimizer, range(5 - apart, 5))
    old = {key: value for key, value in copy.deepcopy(optimizer.state_dict()).items() if key != "sparsify"}
    again, optimizer, manager = regression_at_work(gradual_pruning(), "adam")
    manager.load_state_dict(state)
    optimizer.load_state_dict(old)
    regress(again, optimizer, range(1))


class Descent:
    """An optimizer that is none of torch's."""

    def __init__(self, model: nn.Module) -> None:
        self.param_groups = [{"params": list(model.parameters()), "lr": 0.1}]
        self.count = 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None

    def step(self) -> None:
        self.count += 1
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.sub_(0.1 * parameter.grad)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert set(state) == {"count"}
        self.count = state["count"]


def test_the_state_travels_with_an_optimizer_that_is_none_of_torchs() -> None:
    def start(seed: int) -> tuple[nn.Module, Any, ScheduledModifierManager]:
        model = regression_model(seed)
        manager = ScheduledModifierManager([gradual_pruning()])
        return model, manager.modify(model, Descent(model), steps_per_epoch=2), manager

    model, optimizer, manager = start(0)
    regress(model, optimizer, range(3))
    saved = reloaded(model=model.state_dict(), optimizer=optimizer.state_dict())
    regress(model, optimizer, range(3, 8))
    again, other, second = start(1)
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    assert (second.step, other.count) == (3, 3)
    regress(again, other, range(3, 8))
    assert_same_state(again.state_dict(), model.state_dict(), "resumed")
    assert_same_state(second.state_dict(), manager.state_dict(), "resumed")
    second.finalize()
    assert other.state_dict() == {"count": 8}


def test_two_managers_of_two_models_share_an_optimizer_and_its_checkpoint() -> None:
    def start(seed: int) -> tuple[list[nn.Module], Any, list[ScheduledModifierManager]]:
        models = [regression_model(seed), regression_model(seed + 1)]
        optimizer = torch.optim.Adam([p for model in models for p in model.parameters()], lr=0.01)
        managers = [ScheduledModifierManager([gradual_pruning(end=end)]) for end in (2.0, 3.0)]
        for model, manager in zip(models, managers, strict=True):
            manager.modify(model, optimizer, steps_per_epoch=2)
        return models, optimizer, managers

    models, optimizer, managers = start(0)
    regress(nn.Sequential(models[0], nn.Linear(4, 6, bias=False).requires_grad_(False), models[1]), optimizer, range(3))
    saved = reloaded(optimizer=optimizer.state_dict())["optimizer"]
    _, other, others = start(5)
    other.load_state_dict(saved)
    for one, two in zip(others, managers, strict=True):
        assert_same_state(one.state_dict(), two.state_dict(), "each its own")


# ---------------------------------------------------------------------------------------------- the model's


def test_a_models_state_dict_has_no_key_of_ours_while_pruning() -> None:
    model, optimizer, _ = regression_at_work(gradual_pruning())
    regress(model, optimizer, range(3))
    assert list(model.state_dict()) == list(regression_model().state_dict())
    regression_model().load_state_dict(reloaded(model=model.state_dict())["model"])


@pytest.mark.parametrize(("steps", "what"), [(4, "channels were removed"), (8, "tensors were quantized")])
def test_keys_that_do_not_tell_their_structure_are_refused_with_the_order_to_load_in(steps: int, what: str) -> None:
    parts = at_work(Residual, recipe=everything() if steps == 4 else everything()[1:])
    go_on(parts, range(steps))
    # As safetensors and `{key: value.cpu() ...}` keep it.
    bare = {key: value.clone() for key, value in parts["model"].state_dict().items()}
    again = at_work(Residual, recipe=everything() if steps == 4 else everything()[1:], seed=3)
    before = copy.deepcopy(again["model"].state_dict())
    with pytest.raises(StateError, match=rf"(?s){what}.*Load the optimizer's state first.*Nothing was changed"):
        again["model"].load_state_dict(bare)
    assert_same_state(again["model"].state_dict(), before, "unchanged")
    again["optimizer"].load_state_dict(copy.deepcopy(parts["optimizer"].state_dict()))
    again["model"].load_state_dict(bare)
    go_on(parts, range(steps, 10))
    go_on(again, range(steps, 10))
    assert_same_state(states_of(again), states_of(parts), "resumed")


def test_weights_from_before_quantization_are_said_to_leave_the_ranges() -> None:
    recipe: list[Modifier] = [QuantizationModifier(start_epoch=0.0)]
    parts = at_work(Residual, recipe=recipe)
    go_on(parts, range(2))
    with pytest.warns(SparsifyWarning, match="holds no ranges of quantized tensors"):
        parts["model"].load_state_dict(prunable.made(Residual).state_dict(), strict=False)


def test_a_step_with_the_structure_of_another_time_is_refused_until_the_state_comes() -> None:
    parts = at_work(Residual)
    go_on(parts, range(8))
    saved = reloaded(**states_of(parts))
    again = at_work(Residual, seed=3)
    again["model"].load_state_dict(saved["model"])
    for _ in range(2):
        with pytest.raises(StateError, match=r"is of step 8.*the manager is at step 0\. Load the optimizer's state"):
            go_on(again, range(8, 9))
    again["manager"].load_state_dict(saved["manager"])
    again["optimizer"].load_state_dict(saved["optimizer"])
    go_on(again, range(8, 9))


def test_weights_of_another_step_alone_are_said_at_the_next_step_and_at_finalize() -> None:
    model, optimizer, _ = regression_at_work(gradual_pruning())
    regress(model, optimizer, range(5))
    saved = reloaded(model=model.state_dict())["model"]
    for end in (False, True):
        again, optimizer, manager = regression_at_work(gradual_pruning(), seed=2)
        again.load_state_dict(saved)
        with pytest.warns(SparsifyWarning, match="are those of step 5, the manager is at step 0"):
            manager.finalize() if end else regress(again, optimizer, range(1))


def test_a_damaged_structure_is_refused() -> None:
    parts = at_work(Residual)
    go_on(parts, range(4))
    saved = reloaded(model=parts["model"].state_dict())["model"]
    structure = saved._metadata[""]["sparsify"]["structure"]
    next(iter(structure["removals"][0]["keep"].values()))["0"][0] += 1
    with pytest.raises(StateError, match="does not match its checksum"):
        at_work(Residual, seed=3)["model"].load_state_dict(saved)


def test_a_model_inside_another_brings_its_structure() -> None:
    parts = at_work(Residual)
    go_on(parts, range(8))
    saved = reloaded(model=nn.ModuleDict({"net": parts["model"], "more": nn.Linear(2, 2)}).state_dict())["model"]
    again = at_work(Residual, seed=3)
    nn.ModuleDict({"net": again["model"], "more": nn.Linear(2, 2)}).load_state_dict(saved)
    assert_same_state(again["model"].state_dict(), parts["model"].state_dict(), "in another")


# ---------------------------------------------------------------------------------------------- order and copies


def quantized_run(kind: Any, observer: str = "moving_average") -> dict[str, Any]:
    scheme: Any = {"weights": {"observer": "lsq"}} if observer == "lsq" else None
    parts = at_work(kind, recipe=[QuantizationModifier(start_epoch=1.0, scheme=scheme)])
    go_on(parts, range(5))
    return parts


@pytest.mark.parametrize("observer", ["moving_average", "lsq"])
@pytest.mark.parametrize("kind", [Residual, Encoder])
def test_keys_that_quantization_adds_stand_behind_the_models_own(kind: Any, observer: str) -> None:
    parts = quantized_run(kind, observer)
    own, found = list(prunable.made(kind).state_dict()), list(parts["model"].state_dict())
    assert found[: len(own)] == own and len(found) > len(own)
    assert list(copy.deepcopy(parts["model"]).state_dict()) == found
    inside = list(nn.Sequential(parts["model"], nn.Linear(1, 1)).state_dict())
    assert inside == [f"0.{key}" for key in found] + ["1.weight", "1.bias"]
    parts["manager"].finalize()
    assert list(parts["model"].state_dict()) == found


def test_a_state_dict_is_in_the_order_it_had_where_quantization_is_undone() -> None:
    parts = at_work(Residual, recipe=[QuantizationModifier(start_epoch=1.0)])
    saved = reloaded(**states_of(parts))
    go_on(parts, range(5))
    parts["manager"].load_state_dict(saved["manager"])
    assert list(parts["model"].state_dict()) == list(saved["model"])
    assert len(parts["model"]._state_dict_hooks) == 1


def test_an_average_can_be_given_the_structure_by_hand() -> None:
    parts = at_work(Residual, recipe=[QuantizationModifier(start_epoch=1.0)])
    average = torch.optim.swa_utils.AveragedModel(parts["model"])
    go_on(parts, range(4))
    manager = parts["manager"]
    manager.apply_structure(average.module, state=manager.state_dict())
    average.update_parameters(parts["model"])
    assert list(average.module.state_dict()) == list(parts["model"].state_dict())
    go_on(parts, range(4, 6))
    with pytest.raises(StateError, match="at work already"):
        manager.apply_structure(parts["model"], state=manager.state_dict())
