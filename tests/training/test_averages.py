"""Averages of the weights (EMA, SWA) are zero where the model is masked, in every library that users take them from."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sparsify.errors import SparsifyWarning, StateError, TargetError
from sparsify.modifiers import EpochRangeModifier, QuantizationModifier
from sparsify.modifiers.base import Modifier
from sparsify.quantization.plan import is_quantized
from sparsify.training.manager import ScheduledModifierManager
from tests.loops import (
    channel_pruning,
    gradual_pruning,
    masks_of,
    regress,
    regression_batch,
    regression_model,
    zeros_of,
)

FINAL = {"0.weight": 48, "2.weight": 32}
Average = tuple[nn.Module, Callable[[nn.Module], Any]]


def _swa(model: nn.Module) -> Average:
    average = AveragedModel(model)
    return average.module, lambda source: average.update_parameters(source)


def _ema(model: nn.Module) -> Average:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    return average.module, lambda source: average.update_parameters(source)


def _timm(name: str) -> Callable[[nn.Module], Average]:
    def make(model: nn.Module) -> Average:
        average = getattr(pytest.importorskip("timm.utils.model_ema"), name)(model, decay=0.9)
        return average.module if name != "ModelEma" else average.ema, lambda source: average.update(source)

    return make


def _ema_pytorch(model: nn.Module) -> Average:
    average = pytest.importorskip("ema_pytorch").EMA(model, beta=0.9, update_after_step=0, update_every=1)
    return average.ema_model, lambda _: average.update()


MAKERS: dict[str, Callable[[nn.Module], Average]] = {
    "swa": _swa,
    "ema": _ema,
    "timm": _timm("ModelEma"),
    "timm V2": _timm("ModelEmaV2"),
    "timm V3": _timm("ModelEmaV3"),
    "ema_pytorch": _ema_pytorch,
}


@pytest.mark.parametrize("moment", ["before modify", "after modify", "later"])
@pytest.mark.parametrize("name", MAKERS)
def test_averaged_weights_are_masked(name: str, moment: str) -> None:
    model = regression_model()
    MAKERS[name](regression_model())  # skips before anything is at work
    made = MAKERS[name](model) if moment == "before modify" else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    manager = ScheduledModifierManager([gradual_pruning()])
    manager.modify(model, optimizer, steps_per_epoch=5)
    made = MAKERS[name](model) if moment == "after modify" else made

    def after(step: int) -> None:
        nonlocal made
        if step == 4 and made is None:
            made = MAKERS[name](model)
        if made is not None:
            average, update = made
            update(model)
            for key, mask in masks_of(manager).items():
                assert not average.get_parameter(key)[~mask].any(), step

    regress(model, optimizer, range(13), after)
    assert made is not None
    manager.finalize(model)
    assert zeros_of(made[0]) == zeros_of(model) == FINAL
    assert not torch.equal(made[0].get_parameter("0.weight"), model.get_parameter("0.weight")), "it is an average"


def test_an_average_of_another_model_is_left_alone_and_methods_are_put_back() -> None:
    gc.collect()  # runs of other tests that were never finalized
    own = AveragedModel.update_parameters
    model, other = regression_model(), regression_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    manager = ScheduledModifierManager([gradual_pruning()])
    manager.modify(model, optimizer, steps_per_epoch=5)
    stranger, snapshot = AveragedModel(other), copy.deepcopy(model)
    before = zeros_of(snapshot)
    for step in range(12):
        regress(model, optimizer, range(step, step + 1))
        stranger.update_parameters(other)
    manager.finalize(model)
    assert zeros_of(stranger.module) == {"0.weight": 0, "2.weight": 0} and zeros_of(snapshot) == before
    assert AveragedModel.update_parameters is own


def test_the_part_of_a_larger_model_that_is_pruned() -> None:
    """As Lightning averages the whole module, of which one network is pruned."""
    whole = nn.ModuleDict({"head": nn.Linear(4, 2), "net": regression_model()})
    model = whole["net"]
    average = AveragedModel(whole)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    manager = ScheduledModifierManager([gradual_pruning()])
    manager.modify(model, optimizer, steps_per_epoch=5)
    regress(model, optimizer, range(12), lambda _: average.update_parameters(whole))
    assert zeros_of(average.module["net"]) == FINAL and zeros_of(average.module["head"]) == {"weight": 0}


class OwnAverage:
    """As users write it."""

    def __init__(self, model: nn.Module) -> None:
        self.shadow = copy.deepcopy(model).eval()

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for mine, theirs in zip(self.shadow.parameters(), model.parameters(), strict=True):
            mine.lerp_(theirs, 0.1)


def test_an_average_of_the_users_own_is_followed() -> None:
    model = regression_model()
    average = OwnAverage(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    manager = ScheduledModifierManager([gradual_pruning()])
    with pytest.raises(StateError, match="not at work"):
        manager.follow(average.shadow)
    manager.modify(model, optimizer, steps_per_epoch=5)
    manager.follow(average.shadow)

    def after(step: int) -> None:
        average.update(model)
        assert zeros_of(average.shadow) == zeros_of(model)

    regress(model, optimizer, range(12), after)
    with pytest.raises(TargetError, match="is masked, but Linear has no such parameter"):
        manager.follow(nn.Linear(2, 2))
    manager.finalize(model)
    assert zeros_of(average.shadow) == FINAL


def test_averages_are_not_kept_alive() -> None:
    model = regression_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    manager = ScheduledModifierManager([gradual_pruning()])
    manager.modify(model, optimizer, steps_per_epoch=5)
    average = AveragedModel(model)
    average.update_parameters(model)
    assert manager._session is not None and len(manager._session.averages._known) == 1
    found: Tensor = average.module.get_parameter("0.weight")
    del average, found
    assert len(manager._session.averages._known) == 0


def _own(model: nn.Module) -> Average:
    average = OwnAverage(model)
    return average.shadow, average.update


def at_work(model: nn.Module, modifiers: list[Modifier]) -> tuple[torch.optim.Optimizer, ScheduledModifierManager]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    manager = ScheduledModifierManager([EpochRangeModifier(start_epoch=0.0, end_epoch=3.0), *modifiers])
    manager.modify(model, optimizer, steps_per_epoch=5, sample_inputs=regression_batch(0)[0])
    return optimizer, manager


@pytest.mark.parametrize("first", ["updated before", "first updated after"])
@pytest.mark.parametrize("name", [*MAKERS, "own"])
def test_an_average_made_before_layers_are_quantized_is_quantized_with_them(name: str, first: str) -> None:
    model = regression_model()
    make = {**MAKERS, "own": _own}[name]
    make(regression_model())
    average, update = make(model)
    optimizer, manager = at_work(model, [QuantizationModifier(start_epoch=1.0), gradual_pruning()])
    if name == "own":
        manager.follow(average)
    begin = 0 if first == "updated before" else 8
    regress(model, optimizer, range(15), lambda step: update(model) if step >= begin else None)
    assert is_quantized(average) and list(average.state_dict()) == list(model.state_dict())
    manager.finalize(model)
    x = regression_batch(3)[0]
    with torch.no_grad():
        for one in (model, average):
            one.eval()
        # The same weights then give the same outputs: ranges are the model's.
        for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
            assert not torch.equal(mine, theirs) or mine.numel() == 1 or name == "own"
            mine.copy_(theirs)
        assert torch.equal(average(x), model(x))


def test_an_average_made_before_channels_are_removed_has_them_removed() -> None:
    model = regression_model()
    average = AveragedModel(model)
    optimizer, manager = at_work(
        model, [channel_pruning(start_epoch=0.0, end_epoch=1.0, shrink=True), QuantizationModifier(start_epoch=2.0)]
    )
    regress(model, optimizer, range(15), lambda _: average.update_parameters(model))
    manager.finalize(model)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert shapes["0.weight"] != regression_model().get_parameter("0.weight").shape
    assert {name: p.shape for name, p in average.module.named_parameters()} == shapes and is_quantized(average)


def test_an_average_of_another_model_of_the_class_is_not_quantized() -> None:
    model, other = regression_model(), regression_model()
    stranger = AveragedModel(other)
    optimizer, manager = at_work(model, [QuantizationModifier(start_epoch=1.0)])
    regress(model, optimizer, range(15), lambda _: stranger.update_parameters(other))
    manager.finalize(model)
    assert not is_quantized(stranger)


def test_weights_that_were_swapped_with_their_average_have_not_moved_by_an_unseen_step() -> None:
    model = regression_model()
    average = AveragedModel(model)
    optimizer, manager = at_work(model, [gradual_pruning()])
    regress(model, optimizer, range(8), lambda _: average.update_parameters(model))
    for mine, theirs in zip(average.module.parameters(), model.parameters(), strict=True):
        mine.data, theirs.data = theirs.data, mine.data
    manager.state_dict()
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(1.5)
    with pytest.warns(SparsifyWarning, match="the weights moved, but no step"):
        manager.state_dict()


def test_weights_that_became_their_average_have_not_moved_by_an_unseen_step() -> None:
    model = regression_model()
    average = AveragedModel(model)
    optimizer, manager = at_work(model, [gradual_pruning()])
    regress(model, optimizer, range(15), lambda _: average.update_parameters(model))
    with torch.no_grad():
        for mine, theirs in zip(average.module.parameters(), model.parameters(), strict=True):
            theirs.copy_(mine)
    manager.finalize(model)
