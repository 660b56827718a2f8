"""The pruning modifiers on real training steps: what the recipe says is what the weights are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify.errors import DataError, RecipeError, SparsifyWarning, TargetError
from sparsify.modifiers.base import Modifier
from sparsify.modifiers.gradual import GradualPruning
from sparsify.modifiers.magnitude_pruning import (
    ConstantPruningModifier,
    GlobalMagnitudePruningModifier,
    GMPruningModifier,
    MagnitudePruningModifier,
)
from sparsify.training.manager import ScheduledModifierManager
from tests.loops import masks_of, train_step

STEPS = 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.a = nn.Linear(8, 16)
        self.b = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(self.conv(x).relu().mean((2, 3))).relu())
        return out


def fields(**changed: Any) -> dict[str, Any]:
    common = {"init_sparsity": 0.05, "final_sparsity": 0.85, "start_epoch": 0, "end_epoch": 4, "update_frequency": 1}
    return {**common, "params": "__ALL_PRUNABLE__", **changed}


def fresh(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def train(model: nn.Module, optimizer: Any, steps: int, first: int = 0) -> list[float]:
    losses = []
    for number in range(first, first + steps):
        x = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(number))
        losses.append(train_step(model, optimizer, x, 1.0))
    return losses


def attached(
    model: nn.Module, *modifiers: Modifier, epoch: float = 0.0, steps: int | None = STEPS
) -> tuple[ScheduledModifierManager, Any]:
    manager = ScheduledModifierManager(list(modifiers))
    return manager, manager.modify(model, sgd(model), steps_per_epoch=steps, epoch=epoch)


def zeros(weight: Tensor) -> int:
    return int((weight == 0).sum())


def test_zeros_follow_the_published_table() -> None:
    model = nn.Linear(128, 64)
    manager = ScheduledModifierManager([GMPruningModifier(**fields(end_epoch=30, params="weight"))])
    optimizer = manager.modify(model, torch.optim.SGD(model.parameters(), lr=0.1), steps_per_epoch=2)
    seen = {0: zeros(model.weight)}
    for step in range(1, 2 * 31 + 1):
        optimizer.zero_grad()
        model(torch.randn(4, 128)).square().mean().backward()
        optimizer.step()
        seen[step / 2] = zeros(model.weight)
    table = {0: 410, 1: 1043, 2: 1635, 5: 3171, 10: 5021, 15: 6144, 20: 6720, 29: 6963, 30: 6963, 31: 6963}
    assert {epoch: seen[epoch] for epoch in table} == table
    assert all(seen[epoch + 0.5] == seen[epoch] for epoch in range(31))  # only at the points of the grid


def test_a_dictionary_gives_each_parameter_its_own_final_sparsity() -> None:
    model = nn.Module()
    model.a, model.b = nn.Parameter(torch.randn(1000, 1000)), nn.Parameter(torch.randn(1000, 1000))
    manager = ScheduledModifierManager(
        [GMPruningModifier(**fields(final_sparsity={0.6: ["a"], 0.8: ["b"]}, params=[]))]
    )
    for epoch, (a, b) in {1: (0.367969, 0.483594), 3: (0.591406, 0.788281), 4: (0.6, 0.8)}.items():
        manager.initialize(model, epoch=epoch)
        assert manager.sparsity() == pytest.approx({"a": a, "b": b}, abs=1e-6)
        manager.finalize(model)


@pytest.mark.parametrize("frequency", [-1, 0.01, 0.7, 2.0, 50])
@pytest.mark.parametrize(("start", "end"), [(0, 3.33), (1, 1), (0.95, 2.5), (0, 0), (-1, 1)])
def test_the_final_sparsity_is_exact_at_the_end_whatever_the_frequency(
    frequency: float, start: float, end: float
) -> None:
    model = fresh()
    modifier = GMPruningModifier(**fields(update_frequency=frequency, start_epoch=start, end_epoch=end))
    _, optimizer = attached(model, modifier, steps=5)
    before = -1
    for step in range(26):
        now = zeros(model.a.weight)
        assert before <= now
        if step / 5 >= end - 1e-9:
            assert [zeros(layer.weight) for layer in (model.conv, model.a, model.b)] == [245, 109, 109]
        elif step / 5 < start:
            assert now == 0
        before = now
        train(model, optimizer, 1, step)


@pytest.mark.parametrize("text", ["unstructured", "block4", "2:4", "tensorrt", [2, 2], "1:2"])
@pytest.mark.parametrize("together", [False, True])
def test_every_mask_type_holds_its_zeros_in_training(text: str | list[int], together: bool) -> None:
    model = fresh()
    modifier = GMPruningModifier(**fields(final_sparsity=0.5, mask_type=text, global_sparsity=together))
    manager, optimizer = attached(model, modifier)
    for step in range(5 * STEPS):
        train(model, optimizer, 1, step)
        done = manager.sparsity()
        found = {name: zeros(model.get_parameter(name)) / model.get_parameter(name).numel() for name in done}
        assert found == done
    sizes = {name: model.get_parameter(name).numel() for name in done}
    assert sum(done[n] * sizes[n] for n in done) == 0.5 * sum(sizes.values())
    if not together or ":" in str(text):
        assert set(done.values()) == {0.5}


def test_one_ranking_prunes_small_layers_harder() -> None:
    model = fresh()
    model.a.weight.data *= 0.01
    manager, _ = attached(model, GlobalMagnitudePruningModifier(**fields(end_epoch=0, final_sparsity=0.5)))
    done = manager.sparsity()
    assert done["a.weight"] == 1.0
    total = 288 + 128 + 128
    assert sum(zeros(layer.weight) for layer in (model.conv, model.a, model.b)) == round(0.5 * total)
    other = fresh()
    manager, _ = attached(other, MagnitudePruningModifier(**fields(end_epoch=0, final_sparsity=0.5)))
    assert set(manager.sparsity().values()) == {0.5}


def test_masks_only_grow() -> None:
    model = fresh()
    _, optimizer = attached(model, GMPruningModifier(**fields(update_frequency=-1)))
    before = torch.zeros_like(model.a.weight, dtype=torch.bool)
    for step in range(5 * STEPS):
        train(model, optimizer, 1, step)
        now = model.a.weight == 0
        assert (now | ~before).all()
        before = now
    assert int(before.sum()) == 109


def test_sparsity_zero_is_as_if_nothing_were_there() -> None:
    plain, model = fresh(), fresh()
    expected = train(plain, sgd(plain), 12)
    _, optimizer = attached(model, GMPruningModifier(**fields(init_sparsity=0.0, final_sparsity=0.0)))
    assert train(model, optimizer, 12) == expected
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


def test_from_param_is_read_when_the_modifier_starts() -> None:
    model = fresh()
    _, optimizer = attached(model, GMPruningModifier(**fields(init_sparsity="__FROM_PARAM__", start_epoch=1)))
    train(model, optimizer, STEPS - 1)
    with torch.no_grad():
        model.a.weight[:8] = 0.0  # half of it, after modify and before the start
    model.a.weight.register_hook(lambda g: g * 0)
    optimizer.state[model.a.weight]["momentum_buffer"].zero_()
    train(model, optimizer, 1)
    assert [zeros(layer.weight) for layer in (model.conv, model.a)] == [0, 64]


def test_more_zeros_than_the_final_sparsity_are_reported() -> None:
    model = fresh()
    with torch.no_grad():
        model.a.weight[:15] = 0.0
    modifier = GMPruningModifier(**fields(init_sparsity="__FROM_PARAM__", params="a", final_sparsity=0.5))
    with pytest.warns(SparsifyWarning, match=r"'a.weight' starts with 0.9375 zeros, above its final_sparsity 0.5"):
        manager, _ = attached(model, modifier)
    # What the weights are; the mask has half of it.
    assert manager.sparsity() == {"a.weight": 0.9375} and int((~masks_of(manager)["a.weight"]).sum()) == 64


def test_without_leave_enabled_the_final_sparsity_is_reached_and_then_weights_grow_back() -> None:
    model = fresh()
    manager, optimizer = attached(model, GMPruningModifier(**fields(leave_enabled=False, end_epoch=2)))
    train(model, optimizer, 2 * STEPS - 1)
    assert 0 < zeros(model.a.weight) < 109
    train(model, optimizer, 1)
    assert zeros(model.a.weight) == 109  # at the end: final sparsity, and nothing that would revive them
    pruned = model.a.weight == 0
    assert (optimizer.state[model.a.weight]["momentum_buffer"][pruned] == 0).all()
    assert manager.sparsity() == {}
    train(model, optimizer, 1)
    assert zeros(model.a.weight) < 109
    assert zeros(model.conv.weight) < 100


def test_constant_pruning_holds_the_zeros_that_are_there() -> None:
    model = fresh()
    with torch.no_grad():
        model.a.weight[model.a.weight.abs() < 0.2] = 0.0
    held = model.a.weight == 0
    manager, optimizer = attached(model, ConstantPruningModifier(params=["a"], start_epoch=0, end_epoch=2))
    train(model, optimizer, 2 * STEPS - 1)
    assert torch.equal(model.a.weight == 0, held)
    assert manager.sparsity() == {"a.weight": int(held.sum()) / 128}
    train(model, optimizer, 2)
    assert zeros(model.a.weight) < int(held.sum())


def test_constant_pruning_takes_over_from_another() -> None:
    model = fresh()
    first = GMPruningModifier(**fields(end_epoch=2, leave_enabled=False))
    second = ConstantPruningModifier(params="__ALL_PRUNABLE__", start_epoch=2)
    _, optimizer = attached(model, first, second)
    train(model, optimizer, 6 * STEPS)
    assert [zeros(layer.weight) for layer in (model.conv, model.a, model.b)] == [245, 109, 109]


@pytest.mark.parametrize("leave_enabled", [True, False])
@pytest.mark.parametrize("extra", [{}, {"global_sparsity": True}, {"mask_type": "2:4", "final_sparsity": 0.5}])
def test_a_run_resumed_at_any_step_equals_one_never_stopped(leave_enabled: bool, extra: dict[str, Any]) -> None:
    modifier = GMPruningModifier(
        **fields(leave_enabled=leave_enabled, init_sparsity="__FROM_PARAM__", start_epoch=0.5, end_epoch=3, **extra)
    )
    whole = fresh()
    manager, optimizer = attached(whole, modifier)
    total = 4 * STEPS + 1
    saved = []
    for step in range(total):
        state = (manager.state_dict(), whole.state_dict(), optimizer.state_dict())
        saved.append(copy.deepcopy(state))
        train(whole, optimizer, 1, step)
    for stopped, (of_manager, of_model, of_optimizer) in enumerate(saved):
        model = fresh(seed=1)
        resumed, optimizer = attached(model, modifier)
        resumed.load_state_dict(of_manager)
        model.load_state_dict(of_model)
        optimizer.load_state_dict(of_optimizer)
        train(model, optimizer, total - stopped, stopped)
        for name, value in whole.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), (stopped, name)


def test_a_run_started_late_has_the_sparsity_of_its_epoch() -> None:
    model = fresh()
    attached(model, GMPruningModifier(**fields(end_epoch=30)), epoch=15.5)
    assert zeros(model.a.weight) == round(128 * 0.75)


def test_frozen_parameters_are_left_alone_and_reported() -> None:
    model = fresh()
    model.a.weight.requires_grad_(False)
    before = model.a.weight.clone()
    with pytest.warns(SparsifyWarning, match=r"1 frozen parameter is left alone: a.weight"):
        manager, optimizer = attached(model, GMPruningModifier(**fields()))
    train(model, optimizer, 2)
    assert torch.equal(model.a.weight, before)
    assert "a.weight" not in manager.sparsity()


def test_empty_parameters_are_skipped() -> None:
    model = nn.Module()
    model.a, model.b = nn.Parameter(torch.empty(0, 4)), nn.Parameter(torch.randn(4, 4))
    manager = ScheduledModifierManager([GMPruningModifier(**fields(params="__ALL__", end_epoch=0))])
    manager.initialize(model)
    assert manager.sparsity() == {"b": 14 / 16}


def test_sparsity_is_logged() -> None:
    class Writer:
        def __init__(self) -> None:
            self.seen: list[tuple[str, float, int]] = []

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            self.seen.append((tag, value, step))

    model, writer = fresh(), Writer()
    manager = ScheduledModifierManager([GMPruningModifier(**fields(params="a", end_epoch=1))])
    optimizer = manager.modify(model, sgd(model), steps_per_epoch=STEPS, writer=writer)
    train(model, optimizer, STEPS)
    assert writer.seen == [("sparsity/a.weight", 6 / 128, 0), ("sparsity/a.weight", 109 / 128, STEPS)]


@pytest.mark.parametrize(
    ("changed", "field", "message"),
    [
        ({"final_sparsity": 80.0}, "final_sparsity", r"80.0 is not a fraction in \[0, 1\]; did you mean 0.8\?"),
        ({"final_sparsity": -0.1}, "final_sparsity", r"-0.1 is not a fraction in \[0, 1\]"),
        ({"final_sparsity": True}, "final_sparsity", "True is neither a fraction"),
        ({"final_sparsity": "0.8"}, "final_sparsity", "'0.8' is neither a fraction"),
        ({"final_sparsity": {}, "params": []}, "final_sparsity", "names nothing to prune"),
        ({"final_sparsity": {0.8: ["a"]}}, "params", r"give params: \[\] with it"),
        ({"final_sparsity": {80: ["a"]}, "params": []}, "final_sparsity", "did you mean 0.8"),
        ({"final_sparsity": {"x": ["a"]}, "params": []}, "final_sparsity", "neither a fraction"),
        (
            {"final_sparsity": {0.8: ["a"], 0.6: ["b"]}, "params": [], "global_sparsity": True},
            "final_sparsity",
            "one ranking over all parameters has one sparsity",
        ),
        ({"init_sparsity": 5}, "init_sparsity", "did you mean 0.05"),
        ({"init_sparsity": "FROM_PARAM"}, "init_sparsity", "nor __FROM_PARAM__"),
        (
            {"init_sparsity": 0.75, "final_sparsity": 0.5, "mask_type": "2:4"},
            "init_sparsity",
            "0.75 lies above final_sparsity 0.5, and a mask of 2:4 never has more zeros than at its end",
        ),
        ({"end_epoch": -1}, "end_epoch", "cannot end a ramp"),
        ({"start_epoch": 5}, "start_epoch", "5.0 lies after end_epoch 4.0"),
        ({"start_epoch": -3}, "start_epoch", "-3.0 is not an epoch"),
        ({"update_frequency": 0}, "update_frequency", "0.0 is no frequency"),
        ({"update_frequency": -2}, "update_frequency", "-2.0 is no frequency"),
        ({"update_frequency": float("nan")}, "update_frequency", "nan"),
        ({"inter_func": "quartic"}, "inter_func", "'quartic': input should be 'linear'"),
        ({"mask_type": "4:2"}, "mask_type", "keeps more than there is; did you mean '2:4'"),
        ({"mask_type": "2:0"}, "mask_type", "is no mask type"),
        ({"mask_type": "blocks"}, "mask_type", "is no mask type"),
        ({"mask_type": 124}, "mask_type", "124 is no mask type; quote N:M"),
        ({"mask_type": [1, 2, 3]}, "mask_type", "is no block"),
        ({"mask_type": [0, 2]}, "mask_type", "is no block"),
        ({"params": []}, "params", "names nothing to prune"),
        ({"parms": "a"}, "parms", "no such field. Did you mean 'params'"),
        ({"score_type": "random"}, "score_type", "'random'"),
        ({"score_type": "movement"}, "score_type", "'movement' is MovementPruningModifier's"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_field(changed: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        GMPruningModifier(**fields(**changed))
    assert caught.value.field == field
    assert str(caught.value).startswith(f"GMPruningModifier.{field}: ")


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"params": ["conv.wieght"]}, TargetError, r"GMPruningModifier.params: 'conv.wieght' matches nothing in Net"),
        ({"mask_type": "4:6"}, TargetError, r"'conv.weight' has 4 input channels, which 6 does not divide"),
        (
            {"mask_type": "2:4"},
            TargetError,
            r"'conv.weight': mask_type 2:4 ends at sparsity 0.5, but final_sparsity is 0.85",
        ),
        (
            {"mask_type": "block4", "params": "__ALL__"},
            TargetError,
            r"'conv.bias' has 1 dimension, but \[1, 4\] needs 2",
        ),
        (
            {"mask_type": "filter", "params": "__ALL__"},
            TargetError,
            r"'conv.bias' has 1 dimension, but filter needs 2",
        ),
        (
            {"final_sparsity": {0.6: ["a"], 0.8: ["re:a.w"]}, "params": []},
            TargetError,
            r"GMPruningModifier.final_sparsity: 'a.weight' has two sparsities, 0.6 and 0.8",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_anything_changes(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = fresh()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        attached(model, GMPruningModifier(**fields(**changed)))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_with_strict_off_what_does_not_fit_is_left_out_and_reported() -> None:
    model = fresh()
    modifier = GMPruningModifier(**fields(mask_type="4:8", final_sparsity=0.5, end_epoch=0, strict=False))
    with pytest.warns(SparsifyWarning, match=r"'conv.weight' has 4 input channels, which 8 does not divide. Left out"):
        manager, _ = attached(model, modifier)
    assert manager.sparsity() == {"a.weight": 0.5, "b.weight": 0.5}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("cls", [GMPruningModifier, ConstantPruningModifier])
def test_weights_that_cannot_be_ranked_are_refused_by_name(cls: type[Modifier], value: float) -> None:
    model = fresh()
    model.b.weight.data[0, 0] = value
    modifier = cls(**fields()) if cls is GMPruningModifier else cls(params="__ALL_PRUNABLE__")
    with pytest.raises(DataError, match=f"{cls.__name__}.params: 'b.weight' holds NaN or infinity"):
        attached(model, modifier)
    assert zeros(model.a.weight) == 0


def test_the_same_field_set_is_shared_and_the_base_is_no_modifier() -> None:
    assert "GradualPruning" not in Modifier.registry
    assert set(GradualPruning.model_fields) == set(GlobalMagnitudePruningModifier.model_fields)
    assert GlobalMagnitudePruningModifier(**fields()).global_sparsity
    assert not GMPruningModifier(**fields()).global_sparsity
    assert GMPruningModifier(**fields()).inter_func == "cubic"


def test_a_kept_weight_that_is_zero_does_not_take_the_place_of_a_masked_one() -> None:
    model = nn.Linear(10, 10)
    manager = ScheduledModifierManager(
        [GMPruningModifier(**fields(params="weight", init_sparsity=0.5, final_sparsity=0.52, end_epoch=1))]
    )
    optimizer = manager.modify(model, torch.optim.SGD(model.parameters(), lr=0.0), steps_per_epoch=1)
    first = model.weight == 0
    with torch.no_grad():
        model.weight[~first] = 0.0  # all tie now: those that were masked stay masked, then the first kept ones go
    optimizer.step()
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer.step()
    after = model.weight == 0
    assert int(after.sum()) == 52
    assert (after | ~first).all()


def test_from_param_of_one_ranking_is_the_share_over_all() -> None:
    model = fresh()
    with torch.no_grad():
        model.a.weight.zero_()
    manager, _ = attached(
        model, GMPruningModifier(**fields(init_sparsity="__FROM_PARAM__", global_sparsity=True, final_sparsity=0.5))
    )
    assert manager.sparsity() == {"conv.weight": 0.0, "a.weight": 1.0, "b.weight": 0.0}
