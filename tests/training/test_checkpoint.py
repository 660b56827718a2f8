"""Saved and resumed equals never stopped, bit for bit; a state that does not fit is refused before anything changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from sparsify.errors import SparsifyWarning, StateError
from sparsify.modifiers.base import Modifier
from sparsify.modifiers.distillation import DistillationModifier
from sparsify.modifiers.epochs import EpochRangeModifier
from sparsify.modifiers.learning_rate import LearningRateFunctionModifier, SetLearningRateModifier
from sparsify.modifiers.magnitude_pruning import ConstantPruningModifier, GMPruningModifier
from sparsify.modifiers.quantization import QuantizationModifier
from sparsify.modifiers.training import (
    GradualParamModifier,
    SetParamModifier,
    SetWeightDecayModifier,
    TrainableParamsModifier,
)
from sparsify.training.checkpoint import checksum
from sparsify.training.manager import ScheduledModifierManager
from tests.loops import assert_same_state, reloaded, train_step
from tests.optimizer_forms import FORMS, Form
from tests.zoo.quantizable import Shortcut
from tests.zoo.small import perceptron

STEPS_PER_EPOCH = 4
STEPS = 14


def recipe(final: float = 0.8) -> list[Modifier]:
    return [
        EpochRangeModifier(end_epoch=3.5),
        GMPruningModifier(
            params="__ALL_PRUNABLE__",
            init_sparsity=0.1,
            final_sparsity=final,
            start_epoch=0.25,
            end_epoch=2.3,
            update_frequency=0.4,
        ),
        ConstantPruningModifier(params="__ALL_PRUNABLE__", start_epoch=2.3),
        LearningRateFunctionModifier(lr_func="cosine", init_lr=0.05, final_lr=0.001, start_epoch=1.0, end_epoch=2.6),
        SetLearningRateModifier(learning_rate=0.01, start_epoch=3.0),
    ]


def network(seed: int = 0) -> nn.Module:
    return perceptron(6, 9, 3, norm=True, dropout=0.2, seed=seed)


def train(
    model: nn.Module, optimizer: Any, manager: Any, steps: range, after: Callable[[int], None] | None = None
) -> None:
    """Steps that depend on their number alone, and on the RNG that a checkpoint would carry."""
    for step in steps:
        torch.manual_seed(1000 + step)
        train_step(model, optimizer, torch.randn(8, 6), update=manager.update_loss)
        if after is not None:
            after(step + 1)


def snapshots(form: Form, modifiers: Sequence[Modifier], **given: Any) -> tuple[dict[int, Any], Any]:
    """A checkpoint before every step and the states at the end, of one run that is never stopped."""
    model = network()
    optimizer = form(model)
    manager = ScheduledModifierManager(list(modifiers))
    manager.modify(model, optimizer, steps_per_epoch=STEPS_PER_EPOCH, **given)
    found: dict[int, Any] = {}

    def keep(step: int) -> None:
        found[step] = reloaded(model=model.state_dict(), optimizer=optimizer.state_dict(), manager=manager.state_dict())

    keep(0)
    train(model, optimizer, manager, range(STEPS), keep)
    return found, found[STEPS]


@pytest.mark.parametrize("name", FORMS)
def test_resuming_at_any_step_equals_never_stopping(name: str) -> None:
    found, end = snapshots(FORMS[name], recipe())
    for step in range(STEPS):
        model = network(seed=step + 1)
        optimizer = FORMS[name](model)
        manager = ScheduledModifierManager(recipe())
        manager.modify(model, optimizer, steps_per_epoch=STEPS_PER_EPOCH)
        # Copied: torch's optimizers go on working in the tensors that they are given to load.
        checkpoint = copy.deepcopy(found[step])
        manager.load_state_dict(checkpoint["manager"])
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        assert manager.step == step
        train(model, optimizer, manager, range(step, STEPS))
        final = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "manager": manager.state_dict()}
        assert_same_state(final, end, f"{name}, resumed at step {step}")


def _without(states: Any) -> Any:
    return {key: value for key, value in states.items() if key != "manager"}


@pytest.mark.parametrize("order", ["model first", "manager between", "after some steps"])
@pytest.mark.parametrize("name", ["sgd momentum", "adamw two groups", *(["muon"] if "muon" in FORMS else [])])
def test_for_pruning_any_order_of_loading_works(name: str, order: str) -> None:
    form = FORMS[name]
    found, end = snapshots(form, recipe())
    for step in range(0, STEPS, 3):
        model, checkpoint = network(seed=9), copy.deepcopy(found[step])
        optimizer = form(model)
        manager = ScheduledModifierManager(recipe())
        if order == "model first":
            model.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
        manager.modify(model, optimizer, steps_per_epoch=STEPS_PER_EPOCH)
        if order == "after some steps":
            train(model, optimizer, manager, range(5))
        model.load_state_dict(checkpoint["model"])
        if order == "manager between":
            manager.load_state_dict(checkpoint["manager"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if order != "manager between":
            manager.load_state_dict(checkpoint["manager"])
        train(model, optimizer, manager, range(step, STEPS))
        # What the optimizer remembers of masked weights too: muon mixes it into the others.
        assert_same_state(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, _without(end), (order, step)
        )


def test_resuming_with_training_modifiers_and_a_teacher_that_is_itself() -> None:
    modifiers = [
        *recipe(),
        TrainableParamsModifier(params="1", trainable=False, start_epoch=1.0, end_epoch=2.0),
        GradualParamModifier(params="4.bias", init_val=0.5, final_val=-0.5, start_epoch=0.5, end_epoch=2.0),
        SetWeightDecayModifier(weight_decay=0.02, start_epoch=1.5),
        DistillationModifier(hardness=0.7, temperature=3.0, start_epoch=0.5, end_epoch=3.0),
    ]
    form = FORMS["adam"]
    found, end = snapshots(form, modifiers, distillation_teacher="self")
    for step in range(STEPS):
        model, checkpoint = network(seed=step + 1), copy.deepcopy(found[step])
        optimizer = form(model)
        manager = ScheduledModifierManager(modifiers)
        manager.modify(model, optimizer, steps_per_epoch=STEPS_PER_EPOCH, distillation_teacher="self")
        manager.load_state_dict(checkpoint["manager"])
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        train(model, optimizer, manager, range(step, STEPS))
        final = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "manager": manager.state_dict()}
        assert_same_state(final, end, f"resumed at step {step}")


def residual(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Shortcut(4, 4, inputs=2, classes=3, norm=True)


def convolve(model: nn.Module, optimizer: Any, manager: Any, steps: range, after: Any = None) -> None:
    for step in steps:
        inputs = torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(step))
        train_step(model, optimizer, inputs, update=manager.update_loss)
        if after is not None:
            after(step + 1)


QAT = QuantizationModifier(
    start_epoch=1.0, disable_quantization_observer_epoch=2.0, freeze_bn_stats_epoch=2.5, end_epoch=-1.0
)


@pytest.mark.parametrize("modifiers", [[QAT], [*recipe(), QAT]], ids=["quantized", "pruned and quantized"])
@pytest.mark.parametrize("name", ["sgd momentum", "adam", "adamw two groups", "rmsprop centered momentum"])
def test_resuming_quantization_at_any_step_equals_never_stopping(name: str, modifiers: list[Modifier]) -> None:
    def start(seed: int) -> tuple[nn.Module, Any, ScheduledModifierManager]:
        model = residual(seed)
        optimizer = FORMS[name](model)
        manager = ScheduledModifierManager(modifiers)
        manager.modify(model, optimizer, steps_per_epoch=STEPS_PER_EPOCH)
        return model, optimizer, manager

    found: dict[int, Any] = {}

    def states(model: nn.Module, optimizer: Any, manager: Any) -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "manager": manager.state_dict()}

    model, optimizer, manager = start(0)
    found[0] = reloaded(**states(model, optimizer, manager))
    convolve(
        model,
        optimizer,
        manager,
        range(STEPS),
        lambda step: found.__setitem__(step, reloaded(**states(model, optimizer, manager))),
    )
    assert any("scale" in key for key in found[STEPS]["model"]), "it was quantized"
    for step in range(STEPS):
        other, optimizer, manager = start(step + 1)
        checkpoint = copy.deepcopy(found[step])
        manager.load_state_dict(checkpoint["manager"])
        other.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        convolve(other, optimizer, manager, range(step, STEPS))
        assert_same_state(states(other, optimizer, manager), found[STEPS], f"{name}, resumed at step {step}")
    plain = ScheduledModifierManager(modifiers).apply_structure(residual(3), state=found[STEPS]["manager"])
    plain.load_state_dict(found[STEPS]["model"])
    inputs = torch.randn(2, 2, 5, 5)
    assert torch.equal(plain.eval()(inputs), model.eval()(inputs))


@pytest.mark.parametrize("cut", [1, 5, 6, 9])
def test_resuming_with_marked_epochs_equals_never_stopping(cut: int) -> None:
    lengths = [5, 3, 4]

    def run(stop: int | None, checkpoint: Any = None) -> Any:
        model = network(seed=0 if checkpoint is None else 7)
        optimizer = FORMS["sgd momentum"](model)
        manager = ScheduledModifierManager([recipe()[1], EpochRangeModifier(end_epoch=3.0)])
        manager.modify(model, optimizer)
        if checkpoint is not None:
            manager.load_state_dict(checkpoint["manager"])
            model.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
        for epoch in manager.epochs():
            for step in range(sum(lengths[:epoch]), sum(lengths[: epoch + 1])):
                if step < manager.step:
                    continue
                if step == stop:
                    return reloaded(
                        model=model.state_dict(), optimizer=optimizer.state_dict(), manager=manager.state_dict()
                    )
                train(model, optimizer, manager, range(step, step + 1))
        return model.state_dict()

    with pytest.warns(SparsifyWarning, match="steps_per_epoch was not given"):
        whole = run(None)
        resumed = run(None, run(cut))
    assert_same_state(resumed, whole, cut)


# ---------------------------------------------------------------------------------------------- what is in it


def test_values_that_were_set_are_not_set_again_over_what_was_learned() -> None:
    modifiers: list[Modifier] = [
        SetParamModifier(params="4.bias", val=0.5),
        GradualParamModifier(params="0.bias", init_val=0.5, final_val=-0.5, start_epoch=0.0, end_epoch=1.0),
    ]
    model, _, manager = at_work(modifiers)
    checkpoint = reloaded(model=model.state_dict(), manager=manager.state_dict())
    other = network(seed=5)
    resumed = ScheduledModifierManager(modifiers)
    resumed.modify(other, FORMS["adam"](other), steps_per_epoch=STEPS_PER_EPOCH)
    other.load_state_dict(checkpoint["model"])
    resumed.load_state_dict(checkpoint["manager"])
    assert_same_state(other.state_dict(), checkpoint["model"], "")


def at_work(modifiers: list[Modifier] | None = None, steps: int = 6) -> tuple[nn.Module, Any, ScheduledModifierManager]:
    model = network()
    optimizer = FORMS["adam"](model)
    manager = ScheduledModifierManager(modifiers or recipe())
    manager.modify(model, optimizer, steps_per_epoch=STEPS_PER_EPOCH)
    train(model, optimizer, manager, range(steps))
    return model, optimizer, manager


def test_a_state_holds_plain_types_and_tensors() -> None:
    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return type(value) is dict and all(type(key) is str and plain(item) for key, item in value.items())
        if isinstance(value, list):
            return all(map(plain, value))
        return value is None or type(value) in (bool, int, float, str, torch.Tensor)

    _, _, manager = at_work()
    state = manager.state_dict()
    assert plain(state) and state["step"] == 6 and state["epoch"] == 1.5 and state["version"] == 1


def test_a_state_in_memory_does_not_change_while_training_goes_on() -> None:
    model, optimizer, manager = at_work()
    state = manager.state_dict()
    before = copy.deepcopy(state)
    train(model, optimizer, manager, range(6, 9))
    assert_same_state(state, before, "")
    manager.load_state_dict(state)
    assert manager.step == 6


def test_the_checksum_covers_every_piece() -> None:
    value = {"a": [1, 2.0, "x", None, True], "b": {"c": torch.arange(6.0).reshape(2, 3)}}
    first = checksum(value)
    assert checksum(copy.deepcopy(value)) == first
    others = [
        {**value, "a": [1, 2.0, "x", None, False]},
        {**value, "a": [1, 2.0, "x", None, 1]},
        {**value, "a": [1, 2.0, "y", None, True]},
        {**value, "b": {"c": torch.arange(6.0).reshape(3, 2)}},
        {**value, "b": {"c": torch.arange(6.0).reshape(2, 3).double()}},
        {**value, "b": {"c": torch.tensor([[0.0, 1, 2], [3, 4, -5]])}},
        {**value, "b": {"c": -torch.tensor([[0.0, -1, -2], [-3, -4, -5]])}},
        {"a": value["a"]},
    ]
    assert len({first, *map(checksum, others)}) == len(others) + 1
    with pytest.raises(StateError, match=r"state\['a'\] is a set"):
        checksum({"a": {1}})


# ---------------------------------------------------------------------------------------------- what is refused


def damaged(state: dict[str, Any]) -> dict[str, Any]:
    state["masks"]["masks"]["0.weight"]["bits"][3] ^= 4
    return state


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (damaged, "does not match its checksum"),
        (lambda state: {**state, "step": 7}, "does not match its checksum"),
        (lambda state: {"version": state["version"], "checksum": ""}, "does not match its checksum"),
        (lambda state: {**state, "version": 99}, "of version 99; this sparsify reads version 1"),
        (lambda state: {"model": 1}, r"not a manager's state but a dict of \['model'\]"),
        (lambda state: [state], "not a manager's state but a list"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(spoil: Callable[[Any], Any], text: str, strict: bool) -> None:
    _, _, other = at_work(steps=9)
    model, optimizer, manager = at_work(steps=3)
    before = reloaded(model=model.state_dict(), optimizer=optimizer.state_dict(), manager=manager.state_dict())
    with pytest.raises(StateError, match=text):
        manager.load_state_dict(spoil(other.state_dict()), strict=strict)
    after = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "manager": manager.state_dict()}
    assert_same_state(after, before, text)


def test_every_flipped_byte_of_a_mask_is_found() -> None:
    _, _, manager = at_work()
    state = manager.state_dict()
    for name, mask in state["masks"]["masks"].items():
        for byte in range(len(mask["bits"])):
            mask["bits"][byte] ^= 16
            with pytest.raises(StateError, match="checksum"):
                manager.load_state_dict(state)
            mask["bits"][byte] ^= 16
        assert name in manager.sparsity()
    manager.load_state_dict(state)


def test_the_state_of_another_recipe_is_refused_and_what_differs_is_said() -> None:
    _, _, other = at_work(recipe(final=0.7))
    model, _, manager = at_work(steps=2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StateError, match=r"(?s)another recipe.*- .*0\.7.*\+ .*0\.8.*strict=False"):
        manager.load_state_dict(other.state_dict())
    assert manager.step == 2
    assert_same_state(model.state_dict(), before, "")
    with pytest.warns(SparsifyWarning, match="another recipe"):
        manager.load_state_dict(other.state_dict(), strict=False)
    assert manager.step == 6
    assert manager.sparsity() == other.sparsity()


def test_masks_of_another_model_are_refused_by_name() -> None:
    _, _, manager = at_work()
    wide = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Dropout(0.2), nn.Linear(9, 5))
    other = ScheduledModifierManager(recipe())
    other.modify(wide, FORMS["sgd"](wide), steps_per_epoch=STEPS_PER_EPOCH)
    before = copy.deepcopy(wide.state_dict())
    with pytest.raises(StateError, match=r"\(3, 9\) for '4.weight', which Sequential has in shape \(5, 9\)"):
        other.load_state_dict(manager.state_dict())
    assert other.step == 0
    assert_same_state(wide.state_dict(), before, "")
    other.load_state_dict(manager.state_dict(), strict=False)
    assert other.step == 6 and other.sparsity()["0.weight"] == manager.sparsity()["0.weight"]


@pytest.mark.parametrize("steps", [6, 17])
@pytest.mark.parametrize("params", ["0.weight", "4.weight", "re:[04].weight"])
def test_what_an_edited_recipe_prunes_besides_is_pruned_after_loading(params: str, steps: int) -> None:
    def pruning(params: str) -> list[Modifier]:
        times = {"start_epoch": 0.0, "end_epoch": 2.3, "update_frequency": 0.4}
        return [GMPruningModifier(params=params, init_sparsity=0.1, final_sparsity=0.8, **times)]  # type: ignore[arg-type]

    saved_model, _, other = at_work(pruning(params), steps=steps)
    model, optimizer, manager = at_work(pruning("__ALL_PRUNABLE__"), steps=0)
    with pytest.warns(SparsifyWarning, match="another recipe"):
        manager.load_state_dict(other.state_dict(), strict=False)
    model.load_state_dict(saved_model.state_dict())
    # Not yet: what is worth least is known once the saved weights are there.
    assert manager.sparsity() == other.sparsity()
    train(model, optimizer, manager, range(steps, steps + 1))
    assert len(manager.sparsity()) == 2
    assert len({round(sparsity, 1) for sparsity in manager.sparsity().values()}) == 1
    train(model, optimizer, manager, range(steps + 1, 20))
    assert manager.sparsity() == {"0.weight": round(54 * 0.8) / 54, "4.weight": round(27 * 0.8) / 27}


def test_a_frozen_parameter_stays_left_alone_after_loading() -> None:
    def start() -> tuple[nn.Module, Any, ScheduledModifierManager]:
        model = network()
        model[4].weight.requires_grad_(False)
        manager = ScheduledModifierManager(recipe()[:2])
        with pytest.warns(SparsifyWarning, match="frozen"):
            optimizer = manager.modify(model, FORMS["adam"](model), steps_per_epoch=STEPS_PER_EPOCH, epoch=0.25)
        return model, optimizer, manager

    model, optimizer, manager = start()
    train(model, optimizer, manager, range(2))
    state = manager.state_dict()
    other, optimizer, again = start()
    again.load_state_dict(state)
    other[4].weight.requires_grad_(True)
    train(other, optimizer, again, range(2, 6))
    assert list(again.sparsity()) == ["0.weight"]


def test_a_state_needs_a_manager_at_work() -> None:
    _, _, manager = at_work()
    state = manager.state_dict()
    fresh = ScheduledModifierManager(recipe())
    for call in (fresh.state_dict, lambda: fresh.load_state_dict(state)):
        with pytest.raises(StateError, match=r"not at work: call modify\(\) first"):
            call()
    manager.finalize()
    with pytest.raises(StateError, match=r"finalize\(\) ended it"):
        manager.load_state_dict(state)


def test_after_finalize_the_state_is_that_of_the_end() -> None:
    model, _, manager = at_work()
    state = manager.state_dict()
    manager.finalize()
    assert_same_state(manager.state_dict(), state, "finalized")
    manager.finalize()
    fresh = ScheduledModifierManager(recipe())
    fresh.modify(model, FORMS["adam"](model), steps_per_epoch=STEPS_PER_EPOCH)
    fresh.load_state_dict(manager.state_dict())
    assert (fresh.step, fresh.sparsity()) == (manager.step, manager.sparsity())


def test_with_another_number_of_steps_in_an_epoch_the_epoch_goes_on() -> None:
    _, _, manager = at_work(steps=6)
    model = network()
    other = ScheduledModifierManager(recipe())
    optimizer = FORMS["sgd"](model)
    other.modify(model, optimizer, steps_per_epoch=10)
    other.load_state_dict(manager.state_dict())
    assert (other.step, other.epoch) == (6, 1.5)
    train(model, optimizer, other, range(5))
    assert (other.step, other.epoch) == (11, 2.0)


def test_the_plan_of_another_model_is_refused_before_the_clock_moves() -> None:
    def at(last: nn.Module, steps: int) -> tuple[nn.Module, ScheduledModifierManager]:
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), last)
        manager = ScheduledModifierManager([QuantizationModifier(start_epoch=0.0)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        manager.modify(model, optimizer, steps_per_epoch=4, sample_inputs=torch.randn(2, 8))
        for _ in range(steps):
            model(torch.randn(2, 8)).sum().backward()
            optimizer.step()
        return model, manager

    _, other = at(nn.Linear(16, 4), steps=3)
    model, manager = at(nn.Tanh(), steps=1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StateError, match=r"2 is a Tanh, not one of"):
        manager.load_state_dict(other.state_dict())
    assert manager.step == 1
    assert_same_state(model.state_dict(), before, "weights")
