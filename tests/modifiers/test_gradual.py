"""Ramps that are not as usual: a sparsity that falls, shares that round to nothing, tensors of zeros only."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify.errors import SparsifyWarning
from sparsify.modifiers.base import Modifier
from sparsify.modifiers.gradual import GradualPruning
from sparsify.modifiers.magnitude_pruning import ConstantPruningModifier, GMPruningModifier
from sparsify.modifiers.schedule import between
from sparsify.modifiers.second_order import OBSPruningModifier
from sparsify.modifiers.sparse_training import ACDCPruningModifier, MovementPruningModifier, RigLPruningModifier
from sparsify.modifiers.structured import StructuredPruningModifier
from sparsify.modifiers.top_kast import TopKASTPruningModifier
from sparsify.optimize.planning import plan
from sparsify.pruning.masks import MaskType, compute_masks
from sparsify.recipe import Recipe
from sparsify.training.manager import ScheduledModifierManager
from tests.loops import assert_same_state, masks_of, regress, regression_model, reloaded

RECAL = {"params": "2.weight", "init_sparsity": 0.5, "final_sparsity": 0.06, "start_epoch": 1.0, "end_epoch": 5.0}


def recal(cls: type[GradualPruning] = GMPruningModifier, **changed: Any) -> GradualPruning:
    return cls(**{**RECAL, "update_frequency": 0.5, **changed})


def at_work(*modifiers: Modifier, model: nn.Module | None = None) -> tuple[nn.Module, Any, ScheduledModifierManager]:
    model = regression_model() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    manager = ScheduledModifierManager(list(modifiers))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SparsifyWarning)
        manager.modify(model, optimizer, steps_per_epoch=2, sample_inputs=torch.randn(2, 6))
    return model, optimizer, manager


def checkpoint(model: nn.Module, optimizer: Any, manager: ScheduledModifierManager) -> Any:
    return reloaded(model=model.state_dict(), optimizer=optimizer.state_dict(), manager=manager.state_dict())


# ------------------------------------------------------------------------------------- a sparsity that falls


@pytest.mark.parametrize(
    ("cls", "changed"),
    [
        (GMPruningModifier, {}),
        (GMPruningModifier, {"mask_type": "block2"}),
        (GMPruningModifier, {"global_sparsity": True, "params": ["0.weight", "2.weight"]}),
        (MovementPruningModifier, {}),
        (OBSPruningModifier, {"num_grads": 2, "damp": 1e-3}),
    ],
)
def test_a_sparsity_that_falls_is_exact_at_every_step(cls: type[GradualPruning], changed: dict[str, Any]) -> None:
    modifier = recal(cls, **changed)
    model, optimizer, manager = at_work(modifier)
    kind = MaskType.parse(modifier.mask_type)
    before: dict[str, Tensor] = {}
    for step in range(12):
        regress(model, optimizer, [step])
        masks, epoch = masks_of(manager), (step + 1) / 2
        if epoch >= 1.0:
            share = between("cubic", 0.5, 0.06, (epoch - 1.0) / 4.0)
            units = sum(kind.units(mask.shape, 1) for mask in masks.values())
            size = kind.block[1]
            assert sum(int((~mask).sum()) for mask in masks.values()) == round(units * share) * size, epoch
        for name, mask in masks.items():
            assert not model.get_parameter(name)[~mask].count_nonzero()
            # What was given back is never taken again.
            assert name not in before or not (before[name] & ~mask).any()
        before = {name: mask.clone() for name, mask in masks.items()}


def test_what_is_released_trains_on_from_zero() -> None:
    model, optimizer, manager = at_work(recal())
    regress(model, optimizer, range(2))
    held, weight = masks_of(manager)["2.weight"].clone(), model.get_parameter("2.weight")
    regress(model, optimizer, [2])
    released = masks_of(manager)["2.weight"] & ~held
    assert released.any() and not weight[released].count_nonzero()
    assert not optimizer.state[weight]["momentum_buffer"][released].count_nonzero()
    regress(model, optimizer, [3])
    assert weight[released].count_nonzero() == released.sum()


def test_what_is_released_is_spread_over_the_tensor() -> None:
    held = {"w": torch.zeros(40, 40, dtype=torch.bool)}
    kept = compute_masks({"w": torch.zeros(40, 40)}, 0.5, previous=held, releases=["w"])["w"]
    assert kept.sum() == 800 and kept.sum(1).min() > 8 and kept.sum(0).min() > 8
    assert torch.equal(kept, compute_masks({"w": torch.zeros(40, 40)}, 0.5, previous=held, releases=["w"])["w"])
    assert not compute_masks({"w": torch.zeros(40, 40)}, 0.5, previous=held)["w"].any()


def test_a_run_that_falls_is_resumed_at_any_step() -> None:
    whole, whole_optimizer, manager = at_work(recal())
    states = []
    for step in range(10):
        states.append(checkpoint(whole, whole_optimizer, manager))
        regress(whole, whole_optimizer, [step])
    for step, state in enumerate(states):
        model, optimizer, again = at_work(recal(), model=regression_model(1))
        again.load_state_dict(state["manager"])
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        regress(model, optimizer, range(step, 10))
        assert_same_state(model.state_dict(), whole.state_dict(), step)


def test_channels_that_are_released_are_counted_exactly_and_it_is_said_that_they_do_not_learn() -> None:
    modifier = recal(StructuredPruningModifier, params="0.weight", multiple=1)
    model, optimizer, manager = at_work(modifier)
    regress(model, optimizer, range(2))
    assert manager.sparsity()["0.weight"] == 0.5
    regress(model, optimizer, range(2, 12))
    assert int((~masks_of(manager)["0.weight"]).any(1).sum()) == round(0.06 * 10)
    assert any("gets no gradient" in text for text in modifier.doubts(None))


def test_check_plan_and_modify_say_that_it_falls() -> None:
    recipe, model = Recipe.from_modifiers([recal()]), regression_model()
    text = r"init_sparsity 0.5 lies above final_sparsity 0.06: from epoch 1 to 5 the sparsity falls"
    with pytest.warns(SparsifyWarning, match=text):
        recipe.check(model)
    with pytest.warns(SparsifyWarning, match=text):
        ScheduledModifierManager(recipe).initialize(model)
    foreseen = plan(recipe, model)
    assert "the sparsity falls" in foreseen.warnings[0] and "the sparsity falls" in plan(recipe).warnings[0]
    assert [foreseen.at(epoch).zeros.get("2.weight") for epoch in (0, 1, 5)] == [None, 0.5, 0.06]


# ------------------------------------------------------------------------------------- shares that round to nothing


def wide() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 4, 1), nn.Flatten())


@pytest.mark.parametrize("given", [{}, {"sample_inputs": torch.randn(2, 3, 4, 4)}])
def test_a_share_that_rounds_to_nothing_is_said_and_foreseen(given: dict[str, Any]) -> None:
    fields = {"params": "0.weight", "init_sparsity": 0.0, "start_epoch": 0.0, "end_epoch": 1.0, "update_frequency": 1.0}
    recipe = Recipe.from_modifiers([StructuredPruningModifier(**fields, final_sparsity=0.2, multiple=16)])
    text = r"rounds to nothing in '0.weight' \(0.2 of 32 channels, those that stay in multiples of 16\)"
    with pytest.warns(SparsifyWarning, match=text) as said:
        recipe.check(wide())
    assert len(said) == 1
    with pytest.warns(SparsifyWarning, match=text) as said:
        ScheduledModifierManager(recipe).initialize(wide(), **given)
    assert len(said) == 1
    foreseen = plan(recipe, wide())
    assert "rounds to nothing" in foreseen.warnings[0] and foreseen.moments[-1].channels == {"0.weight": 0.0}
    more = Recipe.from_modifiers([StructuredPruningModifier(**fields, final_sparsity=0.3, multiple=16)])
    assert more.doubts(wide()) == [] and plan(more, wide()).moments[-1].channels == {"0.weight": 0.5}


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"final_sparsity": 0.1, "mask_type": "filter"}, r"nothing in '2.weight' \(0.1 of 4 filters\)"),
        ({"final_sparsity": 0.9, "mask_type": "filter"}, r"all of '2.weight' \(0.9 of 4 filters\)"),
        ({"final_sparsity": 0.02, "mask_type": [4, 1]}, r"nothing in '2.weight' \(0.02 of 10 blocks\)"),
        ({"final_sparsity": 0.01}, r"nothing in '2.weight' \(0.01 of 40 weights\)"),
    ],
)
def test_shares_of_every_unit_are_looked_at(changed: dict[str, Any], text: str) -> None:
    recipe = Recipe.from_modifiers([recal(**{"init_sparsity": 0.0, **changed})])
    with pytest.warns(SparsifyWarning, match=text):
        recipe.check(regression_model())
    with pytest.warns(SparsifyWarning, match=text):
        ScheduledModifierManager(recipe).initialize(regression_model(), epoch=5.0)
    foreseen = plan(recipe, regression_model())
    assert foreseen.moments[-1].zeros["2.weight"] == (0.0 if "nothing" in text else 1.0)


# ------------------------------------------------------------------------------------- tensors of zeros only


def residual() -> nn.Module:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.lora_B, self.last = nn.Linear(6, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 4)
            nn.init.zeros_(self.lora_B.weight)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            out: Tensor = self.last(hidden + self.lora_B(hidden))
            return out

    torch.manual_seed(0)
    return Around()


def test_constant_pruning_leaves_out_what_is_zeros_only_and_says_so() -> None:
    model = residual()
    with torch.no_grad():
        model.get_parameter("first.weight")[0].zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = ScheduledModifierManager([ConstantPruningModifier(params="__ALL_PRUNABLE__")])
    with pytest.warns(SparsifyWarning, match=r"'lora_B.weight' holds nothing but zeros, which are initial values"):
        manager.modify(model, optimizer, steps_per_epoch=2)
    regress(model, optimizer, range(3))
    assert model.get_parameter("lora_B.weight").count_nonzero() == 64
    assert manager.sparsity() == {"first.weight": 6 / 48, "last.weight": 0.0}


def test_constant_pruning_takes_over_a_mask_of_everything() -> None:
    ramp = {"init_sparsity": 0.0, "final_sparsity": 1.0, "start_epoch": 0.0, "end_epoch": 1.0, "update_frequency": 1.0}
    all_of_it = GMPruningModifier(params="lora_B.weight", **ramp)
    model, optimizer, manager = at_work(
        all_of_it, ConstantPruningModifier(params="lora_B.weight", start_epoch=1.0), model=residual()
    )
    nn.init.normal_(model.get_parameter("lora_B.weight"))
    with pytest.warns(SparsifyWarning, match="the weights moved, but no step of the optimizer was seen"):
        manager.finalize(model)
    model, optimizer, manager = at_work(*manager.modifiers, model=model)
    regress(model, optimizer, range(4))
    assert manager.sparsity() == {"lora_B.weight": 1.0}


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("cls", [GMPruningModifier, MovementPruningModifier, OBSPruningModifier])
def test_gradual_pruning_waits_until_zeros_have_moved(cls: type[GradualPruning], together: bool) -> None:
    changed = {"num_grads": 2, "damp": 1e-3} if cls is OBSPruningModifier else {}
    ramp = {"init_sparsity": 0.25, "final_sparsity": 0.5, "start_epoch": 0.0, "end_epoch": 3.0, "update_frequency": 1.0}
    modifier = cls(params="__ALL_PRUNABLE__", global_sparsity=together, **ramp, **changed)
    model, manager = residual(), ScheduledModifierManager([modifier])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(SparsifyWarning, match=r"'lora_B.weight' holds nothing but zeros.*Left out until") as said:
        manager.modify(model, optimizer, steps_per_epoch=2)
    assert len(said) == 1 and sorted(masks_of(manager)) == ["first.weight", "last.weight"]
    states, states_of_model = [], []
    for step in range(7):
        states.append(checkpoint(model, optimizer, manager))
        regress(model, optimizer, [step])
        states_of_model.append(copy.deepcopy(model.state_dict()))
    masks = masks_of(manager)
    zeros = {name: int((~mask).sum()) for name, mask in masks.items()}
    assert sum(zeros.values()) == round(0.5 * (48 + 64 + 32)) and list(masks) == [*zeros]
    # Not by position: what is kept is where training put the largest.
    assert len({tuple(row) for row in masks["lora_B.weight"].tolist()}) > 2
    for step, state in enumerate(states):
        model, optimizer, again = at_work(modifier, model=residual())
        again.load_state_dict(state["manager"])
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        regress(model, optimizer, range(step, 7))
        assert_same_state(model.state_dict(), states_of_model[-1], step)


def test_what_stays_zero_is_never_masked() -> None:
    ramp = {"init_sparsity": 0.25, "final_sparsity": 0.5, "start_epoch": 0.0, "end_epoch": 1.0, "update_frequency": 1.0}
    model = residual()
    model, optimizer, manager = at_work(GMPruningModifier(params=["lora_B.weight"], **ramp), model=model)
    optimizer.param_groups[0]["lr"] = 0.0
    regress(model, optimizer, range(3))
    assert masks_of(manager) == {}


@pytest.mark.parametrize(
    "modifier",
    [
        ACDCPruningModifier(
            params="lora_B.weight", start_epoch=0.0, end_epoch=2.0, update_frequency=1.0, compression_sparsity=0.5
        ),
        RigLPruningModifier(
            params="lora_B.weight", start_epoch=0.0, end_epoch=2.0, update_frequency=1.0, final_sparsity=0.5
        ),
        TopKASTPruningModifier(
            params="lora_B.weight",
            start_epoch=0.0,
            end_epoch=2.0,
            update_frequency=1.0,
            forward_sparsity=0.5,
            backward_sparsity=0.2,
        ),
    ],
    ids=lambda modifier: type(modifier).__name__,
)
def test_masks_that_move_say_that_the_first_goes_by_position(modifier: Modifier) -> None:
    model = residual()
    with pytest.warns(SparsifyWarning, match=r"'lora_B.weight' holds nothing but zeros, so that its first mask goes"):
        ScheduledModifierManager([modifier]).modify(
            model, torch.optim.SGD(model.parameters(), lr=0.1), steps_per_epoch=2
        )
