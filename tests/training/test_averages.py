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

from sparsify.errors import StateError, TargetError
from sparsify.training.manager import ScheduledModifierManager
from tests.loops import gradual_pruning, masks_of, regress, regression_model, zeros_of

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
