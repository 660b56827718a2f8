"""What goes wrong in a training loop is said, once, with numbers: weights that move unseen, recipes that end early."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizers

from sparsify.errors import SparsifyWarning, StateError
from sparsify.modifiers.epochs import EpochRangeModifier
from sparsify.modifiers.learning_rate import SetLearningRateModifier
from sparsify.training.manager import ScheduledModifierManager
from tests.loops import gradual_pruning, masks_of, regress, regression_loss, regression_model


def at_work(*modifiers: Any, steps_per_epoch: int = 4) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    model = regression_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    manager = ScheduledModifierManager(list(modifiers) or [gradual_pruning(0.0, 2.0)])
    manager.modify(model, optimizer, steps_per_epoch=steps_per_epoch)
    return model, optimizer, manager


def revive(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)


# ------------------------------------------------------------------------------------- zeros that are none


@pytest.mark.parametrize(
    ("where", "ask"),
    [
        (r"state_dict\(\)", lambda manager, optimizer: manager.state_dict()),
        (r"state_dict\(\)", lambda manager, optimizer: optimizer.state_dict()),
        (r"sparsity\(\)", lambda manager, optimizer: manager.sparsity()),
        (r"finalize\(\)", lambda manager, optimizer: manager.finalize()),
    ],
)
def test_masked_weights_that_are_not_zero_are_told_once_with_numbers(where: str, ask: Callable[..., Any]) -> None:
    model, optimizer, manager = at_work()
    regress(model, optimizer, range(8))
    held = masks_of(manager)
    revive(model)
    with pytest.warns(SparsifyWarning) as said:
        ask(manager, optimizer)
    texts = [str(one.message) for one in said]
    assert texts[0].startswith(f"{where.replace(chr(92), '')}: 80 of 80 masked weights are not zero, in 2 parameters")
    assert "'0.weight', 48 of 48" in texts[0] and "8 steps were seen" in texts[0]
    assert len([text for text in texts if "masked weights" in text]) == 1
    manager.state_dict()
    manager.finalize()
    assert all(not model.get_parameter(name)[~mask].count_nonzero() for name, mask in held.items())


def test_sparsity_is_what_the_weights_are() -> None:
    model, optimizer, manager = at_work()
    regress(model, optimizer, range(8))
    assert manager.sparsity() == {"0.weight": 0.8, "2.weight": 0.8}
    with torch.no_grad():
        model.get_parameter("2.weight").fill_(1.0)
    with pytest.warns(SparsifyWarning, match="sparsity"):
        assert manager.sparsity() == {"0.weight": 0.8, "2.weight": 0.0}
    manager.finalize()
    assert manager.sparsity() == {"0.weight": 0.8, "2.weight": 0.8}
    regress(model, optimizer, range(2))
    assert manager.sparsity()["0.weight"] == 0.0
    del model, optimizer
    gc.collect()
    assert set(manager.sparsity()) == {"0.weight", "2.weight"}


# ------------------------------------------------------------------------------------- steps that are not seen


def test_an_optimizer_that_was_rebuilt_is_told_with_its_name() -> None:
    model, optimizer, manager = at_work()
    regress(model, optimizer, range(4))
    other = torch.optim.AdamW(model.parameters(), lr=0.01)
    regress(model, other, range(9))
    with pytest.warns(
        SparsifyWarning, match=r"an AdamW stepped 4 parameters.*given \(SGD\).*4 steps were seen"
    ) as said:
        regress(model, other, range(3))
    assert len(said) == 1
    with pytest.warns(SparsifyWarning, match="masked weights are not zero"):
        manager.finalize()
    assert manager.sparsity() == {"0.weight": 43 / 60, "2.weight": 28 / 40}


def test_a_few_steps_of_another_optimizer_are_told_at_the_next_look() -> None:
    model, optimizer, manager = at_work()
    regress(model, optimizer, range(4))
    other = torch.optim.SGD(model.parameters(), lr=0.0)
    regress(model, other, range(2))
    with pytest.warns(SparsifyWarning, match="a SGD stepped 4 parameters"):
        manager.state_dict()


def test_an_optimizer_of_other_parameters_is_no_concern() -> None:
    model, optimizer, manager = at_work()
    critic = regression_model(1)
    regress(critic, torch.optim.AdamW(critic.parameters()), range(12))
    regress(model, optimizer, range(8))
    manager.finalize()


def test_steps_that_no_hook_sees_are_told_at_the_next_look() -> None:
    model, optimizer, manager = at_work(SetLearningRateModifier(learning_rate=0.1))
    regress(model, optimizer, range(3))
    manager.state_dict()
    for step in range(2):
        regression_loss(model, step).backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.data.add_(parameter.grad, alpha=-0.1)
    with pytest.warns(
        SparsifyWarning, match="weights moved, but no step .* was seen meanwhile. 3 steps were seen"
    ) as said:
        manager.state_dict()
        manager.state_dict()
    assert len(said) == 1


def test_gradients_without_a_step_are_told_at_the_end() -> None:
    model, _, manager = at_work()
    for step in range(3):
        manager.update_loss(regression_loss(model, step)).backward()
    with pytest.warns(SparsifyWarning, match=r"no step .* since modify\(\), though update_loss\(\) was called 3 times"):
        manager.finalize()


def test_accumulation_is_no_missing_step() -> None:
    model, optimizer, manager = at_work(EpochRangeModifier(end_epoch=1.0), steps_per_epoch=4)
    for step in range(4):
        for _ in range(150):
            manager.update_loss(torch.zeros(()))
        regress(model, optimizer, [step])
    manager.finalize()


def test_losses_without_a_step_are_told_while_they_come() -> None:
    _, _, manager = at_work()
    for _ in range(999):
        manager.update_loss(torch.zeros(()))
    with pytest.warns(SparsifyWarning, match="1,000 times since the last step of the optimizer that was seen"):
        manager.update_loss(torch.zeros(()))


def test_epochs_of_another_length_than_was_given_are_told() -> None:
    model, optimizer, manager = at_work(EpochRangeModifier(end_epoch=2.0), steps_per_epoch=10)
    with pytest.warns(SparsifyWarning, match="steps_per_epoch is 10, but epoch 0 had 4 optimizer steps") as said:
        for _ in manager.epochs():
            regress(model, optimizer, range(4))
    assert len(said) == 1


# ------------------------------------------------------------------------------------- recipes that are not through


def test_a_recipe_that_ends_half_way_is_told_with_what_it_reached() -> None:
    model, optimizer, manager = at_work(gradual_pruning(0.0, 4.0), EpochRangeModifier(end_epoch=6.0), steps_per_epoch=4)
    regress(model, optimizer, range(8))
    with pytest.warns(SparsifyWarning) as said:
        manager.finalize()
    (text,) = [str(one.message) for one in said]
    assert text.startswith(
        "the recipe was not through at finalize(): epoch 2 of 6. 8 steps were seen, 24 expected at 4"
    )
    share = masks_of_share(model)
    assert f"GMPruningModifier (epoch 4: {share:.1%} zeros, 80.0% asked)" in text and "EpochRangeModifier" in text
    assert "Is steps_per_epoch the number of optimizer steps in an epoch" in text


def test_a_clock_that_ran_too_fast_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer, manager = at_work(steps_per_epoch=1)
    regress(model, optimizer, range(8))
    with caplog.at_level("INFO", "sparsify"):
        manager.finalize()
    assert "the clock is at epoch 8, beyond the recipe's end at 2. 8 steps were seen" in caplog.text


def test_an_early_end_that_is_meant_is_not_told() -> None:
    model, optimizer, manager = at_work(gradual_pruning(0.0, 4.0), steps_per_epoch=4)
    regress(model, optimizer, range(8))
    manager.finalize(early=True)
    assert not manager.attached


def masks_of_share(model: nn.Module) -> float:
    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def test_a_recipe_that_is_through_is_not_told() -> None:
    model, optimizer, manager = at_work(gradual_pruning(0.0, 2.0), EpochRangeModifier(end_epoch=3.0))
    regress(model, optimizer, range(9))  # three steps of the last epoch are missing, and nothing was left to do
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        manager.finalize()


def test_an_exception_is_not_told_again() -> None:
    model, optimizer, manager = at_work()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyboardInterrupt):
            try:
                regress(model, optimizer, range(2))
                raise KeyboardInterrupt
            finally:
                manager.finalize()


# ------------------------------------------------------------------------------------- a second manager


def test_a_second_manager_is_refused_with_the_way_out_or_takes_over() -> None:
    model, optimizer, first = at_work()
    regress(model, optimizer, range(2))
    before = copy.deepcopy(model.state_dict())
    second = ScheduledModifierManager([gradual_pruning(0.0, 2.0)])
    for call in (
        lambda: second.modify(model, torch.optim.SGD(model.parameters(), lr=0.1), steps_per_epoch=4),
        lambda: second.initialize(model),
        lambda: second.modify(nn.Sequential(model), torch.optim.SGD(model.parameters(), lr=0.1), steps_per_epoch=4),
    ):
        with pytest.raises(StateError, match=r"Call finalize\(\) of the first manager, or give replace=True"):
            call()
        assert first.attached and not second.attached
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    second.modify(model, other, steps_per_epoch=4, replace=True)
    assert not first.attached and second.attached and first.step == 2
    assert not optimizer._optimizer_step_pre_hooks and len(other._optimizer_step_pre_hooks) == 1
    first.finalize()
    regress(model, other, range(8))
    assert second.sparsity() == {"0.weight": 0.8, "2.weight": 0.8}
    second.finalize()


def test_a_copy_and_a_finalized_model_are_free() -> None:
    model, optimizer, first = at_work()
    copied = copy.deepcopy(model)
    ScheduledModifierManager([gradual_pruning(0.0, 2.0)]).initialize(copied)
    regress(model, optimizer, range(8))
    first.finalize()
    again = ScheduledModifierManager([gradual_pruning(0.0, 2.0)])
    again.modify(model, optimizer, steps_per_epoch=4)
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    again.finalize()


def test_a_manager_that_is_gone_is_ended() -> None:
    model, optimizer, first = at_work()
    del first
    second = ScheduledModifierManager([gradual_pruning(0.0, 2.0)])
    with pytest.warns(SparsifyWarning, match="an earlier manager of this Sequential is gone"):
        second.modify(model, optimizer, steps_per_epoch=4)
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    second.finalize()
    model, optimizer, first = at_work()
    del first, optimizer
    second.modify(model, torch.optim.SGD(model.parameters(), lr=0.1), steps_per_epoch=4)
    second.finalize()


def test_nothing_is_left_behind() -> None:
    gc.collect()
    model, optimizer, manager = at_work()
    regress(model, optimizer, range(8))
    before = len(torch_optimizers._global_optimizer_pre_hooks)
    manager.finalize()
    assert len(torch_optimizers._global_optimizer_pre_hooks) == before - 1
