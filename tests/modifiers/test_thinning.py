"""Channels that are zero are removed at the epochs that a recipe says."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparsify import ScheduledModifierManager, SparsifyWarning
from sparsify.errors import RecipeError, StateError, TargetError
from sparsify.modifiers.structured import StructuredPruningModifier
from sparsify.modifiers.thinning import LayerThinningModifier
from tests.loops import channel_pruning
from tests.zoo import prunable as small
from tests.zoo.prunable import Residual

MAP = {"conv1.weight,conv3.weight": ["bn1.weight", "bn3.bias", "fc.weight"]}


def thinning(**changed: Any) -> LayerThinningModifier:
    return LayerThinningModifier(**{"structure_type": "filter", "start_epoch": 4.0, **changed})


def pruning(**changed: Any) -> StructuredPruningModifier:
    return channel_pruning(**{"init_sparsity": 0.2, "start_epoch": 0.0, "update_frequency": 1.0, **changed})


def at_work(*modifiers: Any, model: Any = None, name: str = "sgd", **given: Any) -> tuple[Any, Any, Any]:
    model = small.made(Residual) if model is None else model
    optimizer = small.optimizer_of(name, model)
    manager = ScheduledModifierManager(list(modifiers))
    given.setdefault("sample_inputs", small.batch(Residual, 0)[0])
    return model, manager.modify(model, optimizer, steps_per_epoch=2, **given), manager


def widths(model: Any) -> tuple[int, int]:
    return model.conv1.out_channels, model.conv2.out_channels


def with_dead(*channels: int) -> Any:
    """A model that comes with channels of its first channel group that are zero."""
    model = small.made(Residual)
    with torch.no_grad():
        for channel in channels:
            for name in ("conv1.weight", "conv1.bias", "bn1.weight", "bn1.bias", "conv3.weight", "conv3.bias"):
                model.get_parameter(name)[channel] = 0.0
            model.bn3.weight[channel] = model.bn3.bias[channel] = 0.0
            model.conv2.weight[:, channel] = 0.0
            model.fc.weight[:, channel] = 0.0
    return model


def test_what_is_masked_is_removed_at_its_epochs_and_the_ramp_goes_on_from_there() -> None:
    model, optimizer, manager = at_work(pruning(), thinning(start_epoch=0.0, update_epochs=[1.0, 2.0, 5.0]))
    seen = []
    for number in range(12):
        small.step(model, optimizer, number)
        pruned = tuple(int((bn.weight == 0).sum()) for bn in (model.bn1, model.bn2))
        seen.append((manager.epoch, widths(model), pruned))
    # Of 12 and 10: 2 and 2 at first, then by the cubic ramp 4 and 4, 5 and 5, 6 and 5.
    counts = {0.0: (2, 2)}
    for point in (1.0, 2.0, 3.0, 4.0):
        share = 0.2 + 0.3 * (1 - (1 - point / 4) ** 3)
        counts[point] = (round(12 * share), round(10 * share))
    for epoch, width, pruned in seen:
        total = counts[min(float(int(epoch)), 4.0)]
        removed = (0, 0)
        for moment in (0.0, 1.0, 2.0, 5.0):
            if epoch >= moment:
                removed = counts[min(moment, 4.0)]
        assert width == (12 - removed[0], 10 - removed[1]), epoch
        assert pruned == (total[0] - removed[0], total[1] - removed[1]), epoch
    assert widths(model) == (6, 5)


def test_it_comes_after_the_masks_of_the_same_epoch() -> None:
    model, optimizer, _ = at_work(pruning(end_epoch=2.0), thinning(start_epoch=2.0))
    for number in range(4):
        assert widths(model) == (12, 10)
        small.step(model, optimizer, number)
    assert widths(model) == (6, 5)


@pytest.mark.parametrize("inputs", [True, False])
def test_at_once_means_a_model_that_comes_with_zeros(inputs: bool) -> None:
    model = with_dead(2, 5)
    whole = copy.deepcopy(model).double().eval()
    given: dict[str, Any] = {} if inputs else {"sample_inputs": None}
    model, optimizer, _ = at_work(thinning(start_epoch=-1.0), model=model, **given)
    if inputs:
        x = small.batch(Residual, 1, torch.float64)[0]
        torch.testing.assert_close(copy.deepcopy(model).double().eval()(x), whole(x), rtol=1e-10, atol=1e-12)
    else:
        assert widths(model) == (12, 10)
    small.step(model, optimizer, 0)
    assert widths(model) == (10, 10)


def test_nothing_to_remove_is_said() -> None:
    with pytest.warns(SparsifyWarning, match="no channel is zero with all that hangs together with it"):
        at_work(thinning(start_epoch=0.0))


def test_where_inputs_never_come_that_is_said_at_the_end() -> None:
    _, _, manager = at_work(thinning(start_epoch=0.0), model=with_dead(1), sample_inputs=None)
    with pytest.warns(SparsifyWarning, match="inputs of the model were never seen"):
        manager.finalize()


@pytest.mark.parametrize("text", [False, True])
def test_a_map_says_which_channels_are_removed(text: bool) -> None:
    known: Any = json.dumps(MAP) if text else MAP
    modifier = thinning(start_epoch=1.0, param_group_dependency_map=known)
    model, optimizer, _ = at_work(pruning(end_epoch=1.0), modifier)
    for number in range(3):
        small.step(model, optimizer, number)
    assert widths(model) == (6, 10)


def test_a_map_that_is_not_so_is_refused_or_left_out() -> None:
    wrong: dict[str, Any] = {"param_group_dependency_map": {"conv1.weight": ["bn2.weight"]}}
    with pytest.raises(
        TargetError, match=r"conv1.weight and bn2.weight do not lose channels together.*conv3.weight ->"
    ):
        at_work(pruning(), thinning(**wrong))
    with pytest.warns(SparsifyWarning, match="do not lose channels together"):
        at_work(pruning(), thinning(strict=False, **wrong))
    with pytest.raises(TargetError, match=r"'conv9.weight' matches nothing"):
        at_work(pruning(), thinning(param_group_dependency_map={"conv9.weight": []}), sample_inputs=None)
    # Columns are what a layer reads.
    at_work(pruning(), thinning(structure_type="channel", param_group_dependency_map={"fc.weight": ["conv1.bias"]}))


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"update_epochs": [-2.0]}, "update_epochs: -2.0 is not an epoch"),
        ({"param_group_dependency_map": "{conv1"}, "param_group_dependency_map: is no JSON text"),
        ({"param_group_dependency_map": '{"a": 3}'}, "param_group_dependency_map: must be like"),
    ],
)
def test_what_cannot_be_meant_is_refused(changed: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        thinning(**changed)


@pytest.mark.parametrize("inputs", [True, False])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_resumed_at_every_step_it_is_the_run_that_never_stopped(inputs: bool, name: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"name": name, **({} if inputs else {"sample_inputs": None})}
    recipe = [pruning(end_epoch=3.0), thinning(start_epoch=0.0, update_epochs=[1.0, 4.0])]
    model, optimizer, manager = at_work(*recipe, **given)
    for number in range(10):
        parts = (model.state_dict(), optimizer.state_dict(), manager.state_dict())
        torch.save(parts, tmp_path / f"{number}.pt")
        small.step(model, optimizer, number)
    for number in range(10):
        parts = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        again, other, second = at_work(*recipe, **given)
        second.load_state_dict(parts[2])
        again.load_state_dict(parts[0])
        other.load_state_dict(parts[1])
        for later in range(number, 10):
            small.step(again, other, later)
        for key, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[key], value), (number, key)
        second.finalize(again)


def test_no_structure_without_a_state() -> None:
    with pytest.raises(StateError, match="LayerThinningModifier has removed channels by epoch 9"):
        ScheduledModifierManager([pruning(), thinning()]).apply_structure(small.made(Residual), epoch=9.0)


def test_apply_does_all_of_it() -> None:
    model = small.made(Residual)
    x = small.batch(Residual, 0)[0]
    ScheduledModifierManager([pruning(), thinning()]).apply(model, sample_inputs=x)
    assert widths(model) == (6, 5)
    assert model.train()(x).shape == (8, 4)
    assert isinstance(model.conv1, nn.Conv2d)
