"""Optimizers with two weight sets or methods of their own: Lookahead, SAM, schedule-free ones, wrappers of wrappers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

from sparsify.modifiers.learning_rate import SetLearningRateModifier
from sparsify.modifiers.sparse_training import ACDCPruningModifier
from sparsify.training.manager import ScheduledModifierManager
from tests.loops import (
    channel_pruning,
    gradual_pruning,
    masks_of,
    pruning_fields,
    regress,
    regression_batch,
    regression_model,
    zeros_of,
)
from tests.optimizer_forms import SAM, Lookahead

FINAL = {"0.weight": 48, "2.weight": 32}


def at_work(model: nn.Module, optimizer: Any, *modifiers: Any) -> tuple[ScheduledModifierManager, Any]:
    manager = ScheduledModifierManager([*modifiers] or [gradual_pruning()])
    return manager, manager.modify(model, optimizer, steps_per_epoch=5)


def masked(manager: ScheduledModifierManager, model: nn.Module) -> list[Tensor]:
    """The weights under masks."""
    return [model.get_parameter(name).detach()[~mask] for name, mask in masks_of(manager).items()]


def backward(model: nn.Module, step: int) -> Tensor:
    inputs, target = regression_batch(step)
    loss: Tensor = (model(inputs) - target).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


# ---------------------------------------------------------------------------------------------- Lookahead


def lookahead(model: nn.Module) -> Lookahead:
    return Lookahead(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))


@pytest.mark.parametrize("scheduled", [None, "before", "after"])
def test_lookahead_without_hooks_of_its_own(scheduled: str | None) -> None:
    model = regression_model()
    optimizer = lookahead(model)
    scheduler = StepLR(optimizer, 3) if scheduled == "before" else None
    manager, back = at_work(model, optimizer)
    scheduler = StepLR(optimizer, 3) if scheduled == "after" else scheduler
    assert back is optimizer
    other = lookahead(regression_model(1))
    for count in range(1, 14):
        optimizer.zero_grad()
        backward(model, count)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        assert manager.step == count and not any(w.any() for w in masked(manager, model))
        slow = optimizer._base_optimizer.state[model.get_parameter("0.weight")].get("lookahead_slow_buff")
        assert slow is None or not slow[~masks_of(manager)["0.weight"]].any()
    assert zeros_of(model) == FINAL
    other.step()
    manager.finalize(model)
    optimizer.step()
    assert manager.step == 13
    if scheduled is None:
        assert "step" not in vars(optimizer), "left as it was"


def test_lookahead_around_an_optimizer_that_is_resumed() -> None:
    def start() -> tuple[nn.Module, Lookahead, ScheduledModifierManager]:
        model = regression_model()
        optimizer = lookahead(model)
        return model, optimizer, at_work(model, optimizer)[0]

    whole, optimizer, _ = start()
    regress(whole, optimizer, range(12))
    model, optimizer, manager = start()
    regress(model, optimizer, range(5))
    saved = copy.deepcopy((manager.state_dict(), model.state_dict(), optimizer.state_dict()))
    model, optimizer, manager = start()
    for one, state in zip((manager, model, optimizer), saved, strict=True):
        one.load_state_dict(state)
    regress(model, optimizer, range(5, 12))
    assert all(map(torch.equal, whole.parameters(), model.parameters()))


# ---------------------------------------------------------------------------------------------- SAM


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("two_calls", [True, False])
def test_a_round_of_sam_counts_once(base: Any, two_calls: bool) -> None:
    model = regression_model()
    optimizer = SAM(model.parameters(), base, lr=0.05)
    manager, back = at_work(model, optimizer)
    assert back is optimizer
    for count in range(1, 14):
        backward(model, count)

        def closure(count: int = count) -> Tensor:
            perturbed = masked(manager, model)
            assert not any(w.any() for w in perturbed), "masked weights are not perturbed"
            return backward(model, count)

        if two_calls:
            optimizer.first_step(zero_grad=True)
            closure()
            optimizer.second_step(zero_grad=True)
        else:
            optimizer.step(closure)
            optimizer.zero_grad()
        assert manager.step == count and not any(w.any() for w in masked(manager, model))
    assert zeros_of(model) == FINAL
    manager.finalize(model)
    assert "first_step" not in vars(optimizer)
    assert not optimizer.base_optimizer._optimizer_step_pre_hooks


def test_learning_rates_of_a_recipe_reach_the_optimizer_that_sam_holds() -> None:
    model = regression_model()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.05)
    at_work(model, optimizer, SetLearningRateModifier(learning_rate=0.01))
    assert [group["lr"] for group in optimizer.base_optimizer.param_groups] == [0.01]


def test_state_of_every_part_loses_the_channels_that_are_removed() -> None:
    model = regression_model()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9)
    manager = ScheduledModifierManager([channel_pruning(shrink=True)])
    manager.modify(model, optimizer, steps_per_epoch=2, sample_inputs=torch.randn(2, 6))
    for count in range(10):
        backward(model, count)
        optimizer.first_step(zero_grad=True)
        backward(model, count)
        optimizer.second_step(zero_grad=True)
    weight = model.get_parameter("0.weight")
    assert weight.shape == (5, 6)
    assert optimizer.base_optimizer.state[weight]["momentum_buffer"].shape == (5, 6)
    assert optimizer.state[weight]["old_p"].shape == (5, 6)


# ---------------------------------------------------------------------------------------------- schedule-free


def schedule_free(name: str, model: nn.Module) -> Any:
    schedulefree = pytest.importorskip("schedulefree")
    if name == "wrapper":
        base = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=0.01)
        return schedulefree.ScheduleFreeWrapper(base, momentum=0.9, weight_decay_at_y=0.01)
    return getattr(schedulefree, name)(model.parameters(), lr=0.05, weight_decay=0.01)


FREE = ["SGDScheduleFree", "AdamWScheduleFree", "RAdamScheduleFree", "wrapper"]


@pytest.mark.parametrize("name", FREE)
def test_both_weight_sets_of_schedule_free_optimizers_are_masked(name: str) -> None:
    model = regression_model()
    given = schedule_free(name, model)
    manager, optimizer = at_work(model, given)
    for count in range(1, 14):
        optimizer.train()
        optimizer.zero_grad()
        backward(model, count)
        optimizer.step()
        assert manager.step == count
        for mode in (optimizer.eval, optimizer.train, optimizer.eval):
            mode()
            assert not any(w.any() for w in masked(manager, model)), (count, mode)
        for key, mask in masks_of(manager).items():
            assert not given.state[model.get_parameter(key)]["z"][~mask].any()
    assert zeros_of(model) == FINAL
    manager.finalize(model)
    optimizer.train()
    assert zeros_of(model) == FINAL


@pytest.mark.parametrize("name", ["SGDScheduleFreeClosure", "AdamWScheduleFreeClosure"])
def test_schedule_free_optimizers_with_closures(name: str) -> None:
    model = regression_model()
    optimizer = schedule_free(name, model)
    manager, _ = at_work(model, optimizer)
    for count in range(1, 14):

        def closure(count: int = count) -> Tensor:
            optimizer.zero_grad()
            return backward(model, count)

        optimizer.step(closure)
        assert manager.step == count and not any(w.any() for w in masked(manager, model))
    assert zeros_of(model) == FINAL


def test_weights_that_go_dense_train_on_from_where_a_schedule_free_optimizer_has_them() -> None:
    """What it forgets is forgotten: its second sequence begins at the weights, as that of a new one does."""
    model = regression_model()
    optimizer = schedule_free("SGDScheduleFree", model)
    modifier = ACDCPruningModifier(**pruning_fields(end_epoch=3.0), compression_sparsity=0.5)
    at_work(model, optimizer, modifier)
    optimizer.train()
    regress(model, optimizer, range(12))
    for key in ("0.weight", "2.weight"):
        parameter = model.get_parameter(key)
        assert bool(optimizer.state[parameter]["z"].any()) and float(parameter.detach().abs().max()) < 10


# ---------------------------------------------------------------------------------------------- others, by hand


class Chained(torch.optim.Optimizer):
    """One optimizer that steps two others, as in public trainers of Muon with AdamW."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        super().__init__([p for one in optimizers for group in one.param_groups for p in group["params"]], {})
        self.optimizers = list(optimizers)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for one in self.optimizers:
            one.step()


def test_an_optimizer_that_steps_two_others_counts_once() -> None:
    model = regression_model()
    assert isinstance(model, nn.Sequential)
    first = torch.optim.SGD(model[0].parameters(), lr=0.05, momentum=0.9)
    second = torch.optim.Adam(model[2].parameters(), lr=0.01)
    optimizer = Chained(first, second)
    manager, _ = at_work(model, optimizer)
    for count in range(1, 14):
        optimizer.zero_grad()
        backward(model, count)
        optimizer.step()
        assert manager.step == count and not any(w.any() for w in masked(manager, model))
    mask = masks_of(manager)["2.weight"]
    assert not second.state[model.get_parameter("2.weight")]["exp_avg"][~mask].any()


def _timm(model: nn.Module) -> Any:
    return pytest.importorskip("timm.optim").Lookahead(torch.optim.AdamW(model.parameters(), lr=0.01), k=2)


def _of_pytorch_optimizer(name: str, **given: Any) -> Callable[[nn.Module], Any]:
    def make(model: nn.Module) -> Any:
        library = pytest.importorskip("pytorch_optimizer")
        if name in ("SAM", "WSAM", "BSAM"):
            extra = {"model": model} if name == "WSAM" else {}
            return getattr(library, name)(*extra.values(), model.parameters(), torch.optim.SGD, lr=0.05, **given)
        return getattr(library, name)(torch.optim.AdamW(model.parameters(), lr=0.01), **given)

    return make


OTHERS: dict[str, Callable[[nn.Module], Any]] = {
    "timm Lookahead": _timm,
    "Lookahead": _of_pytorch_optimizer("Lookahead", k=2),
    "Lookahead, pullback": _of_pytorch_optimizer("Lookahead", k=2, pullback_momentum="reset"),
    "SAM": _of_pytorch_optimizer("SAM"),
    "ScheduleFreeWrapper": _of_pytorch_optimizer("ScheduleFreeWrapper"),
    "TRAC": _of_pytorch_optimizer("TRAC"),
    "OrthoGrad": _of_pytorch_optimizer("OrthoGrad"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_optimizers_of_other_libraries(name: str) -> None:
    model = regression_model()
    given = OTHERS[name](model)
    manager, optimizer = at_work(model, given)
    for count in range(1, 14):
        if name == "ScheduleFreeWrapper":
            optimizer.train()
        optimizer.zero_grad()
        loss = backward(model, count)
        if name == "SAM":

            def closure(count: int = count) -> Tensor:
                optimizer.zero_grad()
                return backward(model, count)

            optimizer.step(closure)
        else:
            optimizer.step()
        assert manager.step == count and bool(loss.isfinite())
        assert not any(w.any() for w in masked(manager, model)), count
    if name == "ScheduleFreeWrapper":
        optimizer.eval()
    assert zeros_of(model) == FINAL
    manager.finalize(model)
    assert zeros_of(model) == FINAL
