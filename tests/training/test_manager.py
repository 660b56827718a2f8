"""The life cycle of a recipe: what modify, epochs, finalize and the rest do, in which order, and what they refuse."""

from __future__ import annotations

import copy
import gc
import logging
import math
import pickle
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparsify.errors import ArgumentError, RecipeError, SparsifyWarning, StateError, TargetError
from sparsify.modifiers.base import Active, Modifier
from sparsify.modifiers.epochs import EpochRangeModifier
from sparsify.modifiers.learning_rate import SetLearningRateModifier
from sparsify.modifiers.magnitude_pruning import ConstantPruningModifier
from sparsify.modifiers.quantization import QuantizationModifier
from sparsify.recipe import Recipe
from sparsify.training.manager import ScheduledModifierManager
from sparsify.training.timer import Timer
from tests.loops import gradual_pruning, train_step
from tests.zoo.small import perceptron

YAML = """
modifiers:
  - !EpochRangeModifier {start_epoch: 0.0, end_epoch: 4.0}
  - !GMPruningModifier
    params: __ALL_PRUNABLE__
    init_sparsity: 0.1
    final_sparsity: 0.8
    start_epoch: 1.0
    end_epoch: 3.0
    update_frequency: 0.5
"""


def at_work(
    *modifiers: Modifier, **given: Any
) -> tuple[nn.Sequential, torch.optim.Optimizer, ScheduledModifierManager]:
    model = perceptron(6, 9, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = ScheduledModifierManager(list(modifiers) or [gradual_pruning()])
    manager.modify(model, optimizer, **{"steps_per_epoch": 4, **given})
    return model, optimizer, manager


def step(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 1) -> None:
    for _ in range(count):
        train_step(model, optimizer, torch.randn(5, 6))


def zeros(model: nn.Module) -> int:
    return int((model[0].weight == 0).sum())  # type: ignore[index]


# ------------------------------------------------------------------------------------- time


def test_what_is_due_at_the_start_is_in_force_before_the_first_forward() -> None:
    model, _, manager = at_work(gradual_pruning())
    assert (manager.step, manager.epoch, zeros(model)) == (0, 0.0, round(0.1 * 54))
    model, _, manager = at_work(gradual_pruning(), epoch=2.0)
    assert (manager.step, manager.epoch, zeros(model)) == (8, 2.0, round(0.8 * 54))


def test_the_end_is_reached_when_training_stops_exactly_there() -> None:
    for frequency in (0.3, 0.7, 2.0, 5.0, -1.0):
        model, optimizer, manager = at_work(gradual_pruning(end=2.0, frequency=frequency))
        step(model, optimizer, 8)
        assert zeros(model) == 43, frequency
        manager.finalize(model)


def test_integers_are_counted_not_fractions_added() -> None:
    model, optimizer, manager = at_work(gradual_pruning(end=10.0), steps_per_epoch=7)
    step(model, optimizer, 70)
    assert (manager.step, manager.epoch) == (70, 10.0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [(10, 10), (range(7), 7), ([1, 2, 3], 3), (torch.utils.data.DataLoader(list(range(12)), 4), 3)],
)
def test_steps_per_epoch_is_an_int_or_a_container(given: Any, expected: int) -> None:
    model, optimizer, manager = at_work(gradual_pruning(), steps_per_epoch=given)
    step(model, optimizer)
    assert manager.epoch == 1 / expected


class Endless(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[int]:
        return iter(range(5))


@pytest.mark.parametrize(
    "wrong",
    [
        *[0, -1, math.nan, 2.5, 10.0, "10", b"10", True, [], torch.tensor(10), {"a": 1}, object(), 1j],
        torch.utils.data.DataLoader(Endless()),
    ],
)
def test_a_wrong_steps_per_epoch_is_refused_before_anything_changes(wrong: Any) -> None:
    model = perceptron(6, 9, 4)
    before = copy.deepcopy(model.state_dict())
    manager = ScheduledModifierManager([gradual_pruning()])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ArgumentError, match="steps_per_epoch"):
        manager.modify(model, optimizer, steps_per_epoch=wrong)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf, "1", True, None])
def test_a_wrong_epoch_is_refused(wrong: Any) -> None:
    with pytest.raises(ArgumentError, match=r"epoch: .* is not an epoch; give 0 or more"):
        at_work(epoch=wrong)


def test_a_step_without_steps_per_epoch_and_epochs_says_what_to_pass() -> None:
    model, optimizer, manager = at_work(gradual_pruning(), steps_per_epoch=None)
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(5, 6)).sum().backward()
    with pytest.raises(StateError, match=r"Pass steps_per_epoch to modify\(\)"):
        optimizer.step()
    assert manager.step == 0
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_epochs_without_steps_per_epoch_count_them() -> None:
    model, optimizer, manager = at_work(
        gradual_pruning(0.0, 2.0, 0.5), EpochRangeModifier(end_epoch=3.0), steps_per_epoch=None
    )
    seen = []
    with pytest.warns(SparsifyWarning, match="the first epoch has the resolution of a whole epoch") as said:
        for epoch in manager.epochs():
            for _ in range(4):
                seen.append((epoch, manager.epoch, zeros(model)))
                step(model, optimizer)
    assert len(said) == 1
    first, second, third = seen[:4], seen[4:8], seen[8:]
    assert first == [(0, 0.0, 5)] * 4
    assert [epoch for _, epoch, _ in second] == [1.0, 1.25, 1.5, 1.75]
    assert [count for _, _, count in second][1:3] == [second[0][2], second[2][2]]
    assert third[0] == (2, 2.0, 43) and (manager.epoch, manager.step) == (3.0, 12)


def test_the_last_update_comes_when_epochs_end() -> None:
    model, optimizer, manager = at_work(
        gradual_pruning(0.0, 2.0), EpochRangeModifier(end_epoch=2.0), steps_per_epoch=None
    )
    with pytest.warns(SparsifyWarning):
        for _ in manager.epochs():
            step(model, optimizer, 3)
    assert zeros(model) == 43


def test_epochs_with_steps_per_epoch_put_the_clock_on_the_whole_epoch() -> None:
    model, optimizer, manager = at_work(gradual_pruning(0.0, 3.0), EpochRangeModifier(end_epoch=3.0), steps_per_epoch=4)
    seen = []
    for epoch in manager.epochs():
        seen.append((epoch, manager.epoch))
        # Fewer steps than was said, then more: the clock waits at the end of the epoch and never runs back.
        step(model, optimizer, 3 if epoch == 0 else 6)
        seen.append((epoch, manager.epoch))
    assert seen == [(0, 0.0), (0, 0.75), (1, 1.0), (1, 2.0), (2, 2.0), (2, 3.0)]
    assert manager.step == 15 and zeros(model) == 43


def test_epochs_go_on_where_a_run_was_resumed() -> None:
    _, _, manager = at_work(EpochRangeModifier(end_epoch=5.0), epoch=2.75)
    seen = [(epoch, manager.epoch) for epoch in _without_steps(manager)]
    assert seen == [(2, 2.75), (3, 3.0), (4, 4.0)]


def _without_steps(manager: ScheduledModifierManager) -> Iterator[int]:
    with pytest.warns(SparsifyWarning, match="no step of the optimizer was seen"):
        yield from manager.epochs()


def test_a_loop_of_another_marks_its_epochs_and_how_long_they_are() -> None:
    model, optimizer, manager = at_work(steps_per_epoch=4)
    manager.begin_epoch(0, steps_per_epoch=2)
    step(model, optimizer, 1)
    assert manager.epoch == 0.5
    step(model, optimizer, 3)
    assert manager.epoch == 1.0, "an epoch that is longer than was said does not run into the next"
    assert manager.end_epoch(0) == 4
    manager.begin_epoch(1, steps_per_epoch=3)
    step(model, optimizer, 1)
    assert manager.epoch == pytest.approx(4 / 3)
    manager.begin_epoch(1, steps_per_epoch=6)
    assert manager.epoch == pytest.approx(4 / 3), "in the middle of an epoch the clock stays where it is"
    step(model, optimizer, 1)
    assert manager.epoch == pytest.approx(1.5) and manager.step == 6
    for wrong in (0, 2.5, "3"):
        with pytest.raises(ArgumentError, match="steps_per_epoch"):
            manager.begin_epoch(2, steps_per_epoch=wrong)  # type: ignore[arg-type]


def test_steps_in_a_pause_are_not_counted_and_bring_nothing_back() -> None:
    model, optimizer, manager = at_work(gradual_pruning(), SetLearningRateModifier(learning_rate=0.1, start_epoch=0.0))
    step(model, optimizer, 8)
    before, gone = manager.state_dict(), zeros(model)
    manager.pause()
    optimizer.param_groups[0]["lr"] = 0.5
    step(model, optimizer, 5)
    assert optimizer.param_groups[0]["lr"] == 0.5
    manager.pause(False)
    assert manager.step == 8 and zeros(model) == gone > 0
    assert manager.state_dict()["checksum"] == before["checksum"]
    manager.load_state_dict(before)
    step(model, optimizer)
    assert manager.step == 9 and optimizer.param_groups[0]["lr"] == 0.1


def test_the_timer_never_goes_back() -> None:
    generator = torch.Generator().manual_seed(0)
    for given in (None, 5):
        timer, last = Timer(given), 0.0
        for epoch in range(6):
            timer.begin(epoch)
            for _ in range(int(torch.randint(0, 9, (), generator=generator))):
                assert timer.clock().epoch >= last
                last = timer.clock().epoch
                timer.tick()
            assert timer.clock().epoch <= epoch + 1
            timer.end(epoch)
            assert timer.clock().epoch == epoch + 1


# ------------------------------------------------------------------------------------- the whole life


def test_training_leaves_class_keys_and_parameters_as_they_were() -> None:
    model = perceptron(6, 9, 4)
    parameters, keys, types = list(model.parameters()), list(model.state_dict()), [type(m) for m in model.modules()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = ScheduledModifierManager([gradual_pruning(), SetLearningRateModifier(learning_rate=0.2)])
    manager.modify(model, optimizer, steps_per_epoch=4)
    step(model, optimizer, 9)
    manager.finalize(model)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys and [type(m) for m in model.modules()] == types
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    perceptron(6, 9, 4).load_state_dict(model.state_dict(), strict=True)


def test_finalize_may_be_called_twice_and_without_modify() -> None:
    manager = ScheduledModifierManager([gradual_pruning()])
    manager.finalize()
    model, optimizer, manager = at_work()
    step(model, optimizer, 3)
    sparsity = manager.sparsity()
    manager.finalize(model)
    manager.finalize(model)
    assert not manager.attached
    assert (manager.step, manager.epoch, manager.sparsity()) == (3, 0.75, sparsity)
    loss = torch.ones(())
    assert manager.update_loss(loss) is loss


def test_after_finalize_weights_may_grow_again_and_the_manager_works_again() -> None:
    model, optimizer, manager = at_work()
    step(model, optimizer, 8)
    manager.finalize(model)
    step(model, optimizer)
    assert zeros(model) < 43 and manager.step == 8
    manager.modify(model, optimizer, steps_per_epoch=4)
    assert manager.step == 0 and manager.attached


def test_modify_twice_is_an_error_and_changes_nothing() -> None:
    model, optimizer, manager = at_work()
    step(model, optimizer, 3)
    hooks = len(optimizer._optimizer_step_pre_hooks)
    for call in (
        lambda: manager.modify(model, optimizer, steps_per_epoch=4),
        lambda: manager.initialize(model),
        lambda: manager.apply(model),
        lambda: manager.apply_structure(model),
    ):
        with pytest.raises(StateError, match=r"at work already; call finalize\(\) first or make a second manager"):
            call()
    assert len(optimizer._optimizer_step_pre_hooks) == hooks and manager.step == 3


def test_two_managers_work_on_one_model() -> None:
    model = perceptron(6, 9, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = ScheduledModifierManager([gradual_pruning(params="0.weight")])
    second = ScheduledModifierManager([gradual_pruning(params="2.weight")])
    first.modify(model, optimizer, steps_per_epoch=4)
    second.modify(model, optimizer, steps_per_epoch=4)
    step(model, optimizer, 8)
    assert list(first.sparsity()) == ["0.weight"] and list(second.sparsity()) == ["2.weight"]
    first.finalize(model)
    assert second.attached
    step(model, optimizer)
    assert int((model[2].weight == 0).sum()) == 29


def test_finalize_of_another_model_is_refused() -> None:
    model, _, manager = at_work()
    with pytest.raises(ArgumentError, match=r"not the model that modify\(\) was given"):
        manager.finalize(copy.deepcopy(model))
    assert manager.attached


@pytest.mark.parametrize("call", ["step", "epoch", "sparsity", "epochs", "apply_masks", "update_loss"])
def test_before_modify_there_is_nothing_to_ask(call: str) -> None:
    manager = ScheduledModifierManager([gradual_pruning()])
    calls: dict[str, Callable[[], Any]] = {
        "step": lambda: manager.step,
        "epoch": lambda: manager.epoch,
        "sparsity": manager.sparsity,
        "epochs": lambda: list(manager.epochs()),
        "apply_masks": lambda: manager.apply_masks(perceptron(6, 9, 4)),
        "update_loss": lambda: manager.update_loss(torch.ones(())),
    }
    with pytest.raises(StateError, match=r"not at work: call modify\(\) first"):
        calls[call]()


def test_a_manager_that_nobody_holds_goes_on_and_one_that_ended_is_let_go() -> None:
    model, optimizer, manager = at_work()
    watched = weakref.ref(manager._session)
    del manager
    gc.collect()
    step(model, optimizer, 8)
    assert zeros(model) == 43, "the optimizer holds it"
    del optimizer
    gc.collect()
    assert watched() is None, "the model does not"


# ------------------------------------------------------------------------------------- without training


def test_initialize_needs_no_optimizer() -> None:
    model = perceptron(6, 9, 4)
    manager = ScheduledModifierManager([gradual_pruning(), EpochRangeModifier(end_epoch=2.0)])
    manager.initialize(model, epoch=1.0)
    assert manager.attached and manager.epoch == 1.0 and zeros(model) == round(54 * (0.1 + 0.7 * 0.875))
    assert list(manager.epochs()) == [1]
    assert zeros(model) == 43
    manager.finalize(model)


def test_apply_does_everything_at_once() -> None:
    model = perceptron(6, 9, 4)
    kept = model[0].weight.detach().abs().flatten().sort().values[43:]
    manager = ScheduledModifierManager([gradual_pruning(), ConstantPruningModifier(params="0.weight", start_epoch=2.0)])
    assert manager.apply(model) is model
    assert zeros(model) == 43 and not manager.attached
    assert torch.equal(model[0].weight.detach().abs().flatten().sort().values[43:], kept)
    assert (
        ScheduledModifierManager([gradual_pruning()]).apply(perceptron(6, 9, 4), epoch=0.0)[0].weight.eq(0).sum() == 5
    )


def test_apply_reaches_the_sparsity_also_where_the_masks_do_not_stay() -> None:
    assert zeros(ScheduledModifierManager([gradual_pruning(leave_enabled=False)]).apply(perceptron(6, 9, 4))) == 43


def test_apply_structure_touches_no_value_of_what_is_only_pruned() -> None:
    model = perceptron(6, 9, 4)
    before = copy.deepcopy(model.state_dict())
    _, _, other = at_work()
    for given in ({}, {"state": other.state_dict()}):
        manager = ScheduledModifierManager([gradual_pruning()])
        assert manager.apply_structure(model, **given) is model
        assert not manager.attached
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with pytest.raises(StateError, match="another recipe"):
        ScheduledModifierManager([gradual_pruning(end=3.0)]).apply_structure(model, state=other.state_dict())


def test_masks_are_applied_to_an_averaged_copy() -> None:
    model, optimizer, manager = at_work()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(8):
        step(model, optimizer)
        averaged.update_parameters(model)
    assert zeros(averaged.module) == 43, "one that is updated from the model is masked with it"
    with torch.no_grad():
        averaged.module[0].weight.fill_(1.0)
    manager.apply_masks(averaged)
    assert zeros(averaged.module) == 43
    assert torch.equal(averaged.module[0].weight == 0, model[0].weight == 0)
    with pytest.raises(TargetError, match="masked"):
        manager.apply_masks(nn.Linear(3, 3))


# ------------------------------------------------------------------------------------- what the recipe says


def test_a_manager_reads_a_recipe_and_saves_it(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(YAML)
    manager = ScheduledModifierManager.from_yaml(str(file))
    assert manager.max_epochs == 4 and manager.min_epochs == 0
    assert [type(m).__name__ for m in manager.modifiers] == ["GMPruningModifier", "EpochRangeModifier"]
    manager.save(tmp_path / "saved.yaml")
    assert (tmp_path / "saved.yaml").read_text() == str(manager)
    assert ScheduledModifierManager.from_yaml(str(manager)).recipe == manager.recipe
    assert ScheduledModifierManager(manager.recipe).recipe == manager.recipe


def test_modifiers_and_metadata_are_added() -> None:
    added = [SetLearningRateModifier(learning_rate=0.1), "modifiers: [!EpochRangeModifier {end_epoch: 9.0}]"]
    manager = ScheduledModifierManager.from_yaml(YAML, add_modifiers=added, metadata={"run": 7})
    assert len(manager.modifiers) == 4 and manager.max_epochs == 9
    assert manager.recipe.metadata == {"run": 7}
    assert ScheduledModifierManager.from_yaml(str(manager)).recipe == manager.recipe
    with pytest.raises(RecipeError, match="GMPruningModifier prunes"):
        ScheduledModifierManager.from_yaml(YAML, add_modifiers=gradual_pruning(2.0, 4.0))


def test_metadata_that_cannot_be_saved_is_refused_at_once() -> None:
    with pytest.raises(ArgumentError, match="metadata: 5 is no mapping"):
        ScheduledModifierManager.from_yaml(YAML, metadata=5)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="__metadata__: something of type object cannot be written"):
        ScheduledModifierManager.from_yaml(YAML, metadata={"a": [object()]})


def test_stages_are_composed_from_managers_recipes_and_text() -> None:
    first = ScheduledModifierManager.from_yaml(YAML)
    for second in (first, first.recipe, YAML):
        both = ScheduledModifierManager.compose_staged(first, second)
        assert isinstance(both, ScheduledModifierManager) and both.max_epochs == 8
    assert Recipe.from_yaml(str(both)).max_epochs == 8


@pytest.mark.parametrize(
    ("modifiers", "least", "most"),
    [
        ([EpochRangeModifier(end_epoch=4.0)], 0, 4),
        ([gradual_pruning(1.5, 2.2)], 1, 3),
        ([SetLearningRateModifier(learning_rate=0.1)], 0, 0),
        ([SetLearningRateModifier(learning_rate=0.1, start_epoch=7.5), gradual_pruning(2.0, 3.0)], 2, 8),
    ],
)
def test_how_long_it_lasts(modifiers: list[Modifier], least: int, most: int) -> None:
    manager = ScheduledModifierManager(modifiers)
    assert (manager.min_epochs, manager.max_epochs) == (least, most)


def test_a_copy_of_a_manager_is_a_new_one_with_the_same_recipe() -> None:
    model, optimizer, manager = at_work()
    step(model, optimizer, 3)
    for other in (copy.deepcopy(manager), pickle.loads(pickle.dumps(manager)), copy.copy(manager)):
        assert other.recipe == manager.recipe and not other.attached
    both = copy.deepcopy({"manager": manager, "model": model, "optimizer": optimizer})
    step(both["model"], both["optimizer"])
    assert manager.step == 3 and manager.attached


# ------------------------------------------------------------------------------------- what is refused, and undone


class Failing(Modifier):
    kind = "logging"
    when: str

    def attach(self, run: Any) -> Active:
        if self.when == "attach":
            raise ArgumentError("cannot work on this model")
        return FailingActive()


class FailingActive(Active):
    def update(self, clock: Any) -> None:
        raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def _unregistered() -> Iterator[None]:
    yield
    Modifier.registry.pop("Failing", None)


@pytest.mark.parametrize("when", ["attach", "update"])
def test_nothing_is_left_where_a_later_modifier_fails(when: str) -> None:
    model = perceptron(6, 9, 4)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = ScheduledModifierManager([gradual_pruning(end=1.0), Failing(when=when)])
    with pytest.raises(ArgumentError if when == "attach" else KeyboardInterrupt):
        manager.modify(model, optimizer, steps_per_epoch=4)
    if when == "attach":
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not optimizer._optimizer_step_pre_hooks and not manager.attached
    step(model, optimizer)
    ScheduledModifierManager([gradual_pruning()]).modify(model, optimizer, steps_per_epoch=4)


def test_names_that_match_nothing_are_found_before_anything_changes() -> None:
    model = perceptron(6, 9, 4)
    before = copy.deepcopy(model.state_dict())
    manager = ScheduledModifierManager(
        [gradual_pruning(params="0.weight"), gradual_pruning(params="2.weigth", end=3.0)]
    )
    with pytest.raises(TargetError, match=r"(?s)'2.weigth' matches nothing.*'2.weight'"):
        manager.modify(model, torch.optim.SGD(model.parameters(), lr=0.1), steps_per_epoch=4)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_patterns_that_prune_one_parameter_twice_are_refused() -> None:
    model = perceptron(6, 9, 4)
    manager = ScheduledModifierManager(
        [gradual_pruning(params="re:0.*weight"), gradual_pruning(params="__ALL_PRUNABLE__", end=3.0)]
    )
    with pytest.raises(RecipeError, match=r"'0\.weight'"):
        manager.modify(model, torch.optim.SGD(model.parameters(), lr=0.1), steps_per_epoch=4)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"distillation_teacher": "teacher"}, "'teacher' is neither a module nor \"self\""),
        ({"writer": object()}, "writer: object has no add_scalar"),
    ],
)
def test_wrong_arguments_are_refused(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        at_work(**given)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"model is a OrderedDict: give a torch\.nn\.Module"):
        ScheduledModifierManager([gradual_pruning()]).initialize(perceptron(6, 9, 4).state_dict())  # type: ignore[arg-type]


def test_a_run_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "sparsify"):
        at_work()
    assert any("sparsity/0.weight" in record.getMessage() for record in caplog.records)


# ------------------------------------------------------------------------------------- recipes that trace the model


def quantizing(start: float = 0.0) -> list[Modifier]:
    return [gradual_pruning(), QuantizationModifier(start_epoch=start)]


def quantized(model: nn.Module) -> bool:
    return any("scale" in name for name in model.state_dict())


@pytest.mark.parametrize("once", [False, True])
def test_apply_quantizes_with_calibration_data_alone(once: bool) -> None:
    batches = [(torch.randn(5, 6), torch.zeros(5)) for _ in range(4)]
    model = perceptron(6, 9, 4)
    manager = ScheduledModifierManager(quantizing(start=2.0))
    manager.apply(model, calibration_data=iter(batches) if once else batches)
    assert quantized(model) and zeros(model) == 43
    other = ScheduledModifierManager(quantizing(start=2.0)).apply(
        perceptron(6, 9, 4), calibration_data=batches, sample_inputs=batches[0][0]
    )
    for name, value in other.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_apply_without_inputs_says_what_to_pass_and_leaves_a_usable_model() -> None:
    model = perceptron(6, 9, 4)
    manager = ScheduledModifierManager(quantizing())
    with pytest.raises(StateError, match=r"has to trace the model: pass sample_inputs \(or calibration_data"):
        manager.apply(model)
    assert not manager.attached and not quantized(model)
    model(torch.randn(5, 6))


def test_apply_structure_needs_a_state_or_inputs() -> None:
    model, optimizer, manager = at_work(*quantizing(), sample_inputs=torch.randn(5, 6))
    step(model, optimizer, 3)
    state, weights = manager.state_dict(), model.state_dict()
    fresh = perceptron(6, 9, 4)
    with pytest.raises(StateError, match="pass sample_inputs"):
        ScheduledModifierManager(quantizing()).apply_structure(fresh)
    assert not quantized(fresh)
    for given in ({"state": state}, {"sample_inputs": torch.randn(2, 6)}, {"sample_inputs": (torch.randn(2, 6),)}):
        other = ScheduledModifierManager(quantizing()).apply_structure(perceptron(6, 9, 4), **given)
        other.load_state_dict(weights, strict=True)
    assert not quantized(ScheduledModifierManager(quantizing(3.0)).apply_structure(perceptron(6, 9, 4), epoch=2.0))


@pytest.mark.parametrize("given", [{"sample_inputs": {"input": torch.randn(5, 6)}}, {}])
def test_inputs_come_from_the_user_or_from_the_first_forward(given: dict[str, Any]) -> None:
    model, optimizer, manager = at_work(*quantizing(), **given)
    assert quantized(model) == bool(given)
    step(model, optimizer)
    assert quantized(model) and not model._forward_pre_hooks
    manager.finalize(model)
    assert quantized(model)


def test_a_name_that_may_match_nothing_is_warned_of_once() -> None:
    model = nn.Linear(4, 4)
    manager = ScheduledModifierManager.from_yaml(
        "modifiers:\n  - !TrainableParamsModifier {params: [nope], params_strict: false, end_epoch: 1.0}\n"
    )
    with pytest.warns(SparsifyWarning, match="'nope' matches nothing") as said:
        manager.modify(model, torch.optim.SGD(model.parameters(), lr=0.1), steps_per_epoch=2)
    assert len(said) == 1
