"""Whole channels are masked on a schedule, exactly so many, and removed so that nothing changes."""

from __future__ import annotations

import copy
import gc
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparsify import ScheduledModifierManager, SparsifyWarning
from sparsify.errors import DataError, RecipeError, StateError, TargetError
from sparsify.modifiers.base import Modifier
from sparsify.modifiers.magnitude_pruning import GMPruningModifier
from sparsify.modifiers.training import TrainableParamsModifier
from sparsify.pruning.group_scores import Bounds
from sparsify.training.channel_removal import ChannelRemoval
from tests.loops import channel_pruning, same_bits
from tests.ranks import on_two_ranks
from tests.zoo import prunable as small
from tests.zoo.prunable import Encoder, Residual

PER_EPOCH = 3
both = pytest.mark.parametrize("kind", [Residual, Encoder])
optimizers = pytest.mark.parametrize("name", ["sgd", "adamw"])


def at_work(
    kind: type[nn.Module], *modifiers: Modifier, name: str = "sgd", dtype: torch.dtype = torch.float32, **given: Any
) -> tuple[Any, Any, ScheduledModifierManager]:
    model = small.made(kind, dtype=dtype)
    optimizer = small.optimizer_of(name, model)
    manager = ScheduledModifierManager(list(modifiers) or [channel_pruning()])
    given.setdefault("sample_inputs", small.batch(kind, 0, dtype)[0])
    return model, manager.modify(model, optimizer, steps_per_epoch=PER_EPOCH, **given), manager


# What hangs together, written by hand: the parameters and the dimension of each, and how many slices a channel takes.
RESIDUAL: dict[str, list[tuple[str, int, int]]] = {
    "conv1.weight": [
        *((f"{name}.{own}", 0, 1) for name in ("conv1", "bn1", "conv3", "bn3") for own in ("weight", "bias")),
        ("conv2.weight", 1, 1),
        ("fc.weight", 1, 1),
    ],
    "conv2.weight": [("conv2.weight", 0, 1), ("bn2.weight", 0, 1), ("bn2.bias", 0, 1), ("conv3.weight", 1, 1)],
}
ENCODER: dict[str, list[tuple[str, int, int]]] = {
    "attention.query.weight": [
        *((f"attention.{name}.{own}", 0, 8) for name in ("query", "key", "value") for own in ("weight", "bias")),
        ("attention.out.weight", 1, 8),
    ],
    "up.weight": [("up.weight", 0, 1), ("up.bias", 0, 1), ("down.weight", 1, 1)],
}
PARTS: dict[type[nn.Module], dict[str, list[tuple[str, int, int]]]] = {Residual: RESIDUAL, Encoder: ENCODER}


def slices_of(model: nn.Module, channel_group: str, channel: int) -> list[Tensor]:
    """All that is one channel."""
    parts = []
    for name, dim, width in PARTS[type(model)][channel_group]:
        parts.append(model.get_parameter(name).detach().narrow(dim, channel * width, width))
    return parts


def pruned(model: nn.Module, channel_group: str, size: int) -> set[int]:
    """Channels of which nothing is left; one of which something is zero but not all is a mistake."""
    found = set()
    for channel in range(size):
        zero = [not bool(part.any()) for part in slices_of(model, channel_group, channel)]
        # A bias may be zero by itself.
        if all(zero):
            found.add(channel)
    return found


def importance(model: nn.Module, channel_group: str, size: int) -> list[float]:
    """The norm of all that is one channel of weights, without biases and norms."""
    total = [0.0] * size
    for name, dim, width in PARTS[type(model)][channel_group]:
        weight = model.get_parameter(name).detach().double()
        for channel in range(size if weight.dim() > 1 else 0):
            total[channel] += float(weight.narrow(dim, channel * width, width).square().sum())
    return [math.sqrt(value) for value in total]


def ramp(step: int, init: float, final: float, size: int, start: float = 1.0, end: float = 4.0, f: float = 0.5) -> int:
    """How many channels are gone before the step of this number, on a cubic ramp."""
    epoch = step / PER_EPOCH
    if epoch < start - 1e-9:
        return 0
    last = round(size * final) / size
    init = min(init, last)
    point = min(start + math.floor((epoch - start) / f + 1e-9) * f, end) if epoch < end - 1e-9 else end
    x = (point - start) / (end - start)
    return round(size * (init + (last - init) * (1 - (1 - x) ** 3)))


# ------------------------------------------------------------------------------------- what is masked, and when


@both
@optimizers
def test_exactly_so_many_channels_are_gone_at_every_step_and_they_only_grow(kind: Any, name: str) -> None:
    model, optimizer, _ = at_work(kind, name=name)
    before: dict[str, set[int]] = {channel_group: set() for channel_group in small.FAMILIES[kind]}
    for number in range(15):
        for channel_group, size in small.FAMILIES[kind].items():
            now = pruned(model, channel_group, size)
            assert len(now) == ramp(number, 0.1, 0.5, size), (number, channel_group)
            assert before[channel_group] <= now
            before[channel_group] = now
        small.step(model, optimizer, number)
    assert all(len(now) == small.FAMILIES[kind][channel_group] // 2 for channel_group, now in before.items())


def reference(kind: Any, name: str, steps: int) -> Any:
    """The same training without sparsify: the lowest channels are chosen and zeroed by hand."""
    model = small.made(kind)
    optimizer = small.optimizer_of(name, model)
    dead: dict[str, list[int]] = {channel_group: [] for channel_group in small.FAMILIES[kind]}
    for number in range(steps + 1):
        orders = {f: sorted(range(n), key=importance(model, f, n).__getitem__) for f, n in small.FAMILIES[kind].items()}
        for channel_group, size in small.FAMILIES[kind].items():
            ranked = dead[channel_group] + [
                channel for channel in orders[channel_group] if channel not in dead[channel_group]
            ]
            dead[channel_group] = ranked[: ramp(number, 0.1, 0.5, size)]
            for channel in dead[channel_group]:
                for part in slices_of(model, channel_group, channel):
                    part.zero_()
        if number < steps:
            small.step(model, optimizer, number)
    return model


@both
@optimizers
def test_training_is_that_of_a_loop_that_zeroes_the_lowest_channels_by_hand(kind: Any, name: str) -> None:
    model, optimizer, _ = at_work(kind, name=name)
    for number in range(14):
        small.step(model, optimizer, number)
    other = reference(kind, name, 14)
    for one, two in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert one[0] == two[0] and torch.equal(one[1], two[1]), one[0]


@both
def test_what_is_masked_is_the_sparsity_that_is_reported(kind: Any) -> None:
    model, optimizer, manager = at_work(kind)
    for number in range(13):
        small.step(model, optimizer, number)
    for name, fraction in manager.sparsity().items():
        parameter = model.get_parameter(name)
        assert int((parameter == 0).sum()) == round(parameter.numel() * fraction) > 0
    manager.finalize(model)
    assert all(not bool(torch.signbit(p[p == 0]).any()) for p in model.parameters())


@both
def test_a_sparsity_of_zero_changes_no_loss(kind: Any) -> None:
    model, optimizer, _ = at_work(kind, channel_pruning(init_sparsity=0.0, final_sparsity=0.0, shrink=True))
    plain = small.made(kind)
    bare = small.optimizer_of("sgd", plain)
    for number in range(14):
        assert small.step(model, optimizer, number) == small.step(plain, bare, number)
    assert [tuple(p.shape) for p in model.parameters()] == [tuple(p.shape) for p in plain.parameters()]


@both
def test_without_inputs_the_first_forward_shows_the_channel_groups(kind: Any) -> None:
    modifier = channel_pruning(start_epoch=0.0, shrink=True)
    given, optimizer, _ = at_work(kind, modifier)
    waits, other, _ = at_work(kind, modifier, sample_inputs=None)
    assert not any(pruned(waits, channel_group, size) for channel_group, size in small.FAMILIES[kind].items())
    for number in range(14):
        assert small.step(given, optimizer, number) == small.step(waits, other, number)
    assert same_bits(given.state_dict(), waits.state_dict())


def test_a_compiled_model_needs_inputs() -> None:
    model = small.made(Residual)
    manager = ScheduledModifierManager([channel_pruning()])
    with pytest.raises(StateError, match="pass sample_inputs"):
        manager.modify(torch.compile(model, backend="eager"), small.optimizer_of("sgd", model), steps_per_epoch=3)


# ------------------------------------------------------------------------------------- how many


def kept_of(kind: Any, *modifiers: Modifier) -> dict[str, int]:
    """How many channels stay of each channel group when all is done."""
    model, optimizer, _ = at_work(kind, *modifiers)
    for number in range(13):
        small.step(model, optimizer, number)
    return {
        channel_group: size - len(pruned(model, channel_group, size))
        for channel_group, size in small.FAMILIES[kind].items()
    }


@pytest.mark.parametrize(
    ("multiple", "sparsity", "kept"),
    [
        (None, 0.5, {"conv1.weight": 8, "conv2.weight": 4}),  # 6 and 5, to a multiple of 4, of two the larger
        (1, 0.5, {"conv1.weight": 6, "conv2.weight": 5}),
        (5, 0.5, {"conv1.weight": 5, "conv2.weight": 5}),
        (4, 1.0, {"conv1.weight": 4, "conv2.weight": 4}),
        (1, 1.0, {"conv1.weight": 1, "conv2.weight": 1}),
        (11, 0.5, {"conv1.weight": 11, "conv2.weight": 5}),  # 11 of 10 there are not
        (None, 0.0, {"conv1.weight": 12, "conv2.weight": 10}),
    ],
)
def test_the_number_that_stays_is_rounded(multiple: int | None, sparsity: float, kept: dict[str, int]) -> None:
    assert kept_of(Residual, channel_pruning(multiple=multiple, final_sparsity=sparsity, init_sparsity=0.0)) == kept


def test_products_of_matrices_are_not_rounded_unless_told() -> None:
    assert kept_of(Encoder, channel_pruning(multiple=None, final_sparsity=0.3)) == {
        "attention.query.weight": 3,
        "up.weight": 17,
    }
    # A head is eight columns, so one head is a multiple of 4.
    assert kept_of(Encoder, channel_pruning(multiple=4, final_sparsity=0.3)) == {
        "attention.query.weight": 3,
        "up.weight": 16,
    }


@pytest.mark.parametrize("together", [False, True])
def test_limits_hold(together: bool) -> None:
    modifier = channel_pruning(final_sparsity=0.8, limits={"conv3": 0.25, "re:fc": 0.5}, global_sparsity=together)
    kept = kept_of(Residual, modifier)
    # conv3 gives the channels of the first channel group and reads those of the second; fc reads those of the first.
    assert kept == {"conv1.weight": 9, "conv2.weight": 8}


def test_one_ranking_takes_exactly_so_many_of_all_and_leaves_one_of_each() -> None:
    for sparsity in (0.3, 0.5, 0.8):
        kept = kept_of(Residual, channel_pruning(final_sparsity=sparsity, global_sparsity=True))
        assert sum(kept.values()) == 22 - round(22 * sparsity)
    assert kept_of(Residual, channel_pruning(final_sparsity=1.0, global_sparsity=True)) == {
        "conv1.weight": 1,
        "conv2.weight": 1,
    }


def test_in_one_ranking_what_a_limit_spares_comes_from_the_others() -> None:
    kept = kept_of(Residual, channel_pruning(final_sparsity=0.3, global_sparsity=True, limits={"fc": 0.0}))
    assert kept == {"conv1.weight": 12, "conv2.weight": 10 - round(22 * 0.3)}


def test_one_ranking_is_in_units_of_a_groups_mean() -> None:
    model = small.made(Residual)
    with torch.no_grad():
        model.conv2.weight.mul_(100.0)
    sizes = small.FAMILIES[Residual]
    values = {channel_group: importance(model, channel_group, size) for channel_group, size in sizes.items()}
    ranked = sorted(
        (value * len(own) / sum(own), channel_group, channel)
        for channel_group, own in values.items()
        for channel, value in enumerate(own)
    )
    ScheduledModifierManager([channel_pruning(global_sparsity=True, init_sparsity=0.5, start_epoch=0.0)]).modify(
        model, small.optimizer_of("sgd", model), steps_per_epoch=3, sample_inputs=small.batch(Residual, 0)[0]
    )
    expected = {(channel_group, channel) for _, channel_group, channel in ranked[:11]}
    assert {(f, channel) for f, size in sizes.items() for channel in pruned(model, f, size)} == expected


def test_bounds() -> None:
    for size in (1, 3, 16, 40):
        for multiple in (1, 4, 16):
            for limit in (0.0, 0.3, 1.0):
                bounds = Bounds.of(size, multiple, limit)
                kept = [bounds.nearest(count) for count in range(size + 1)]
                assert kept == sorted(kept) and kept[-1] == size
                assert min(kept) >= max(1, size - size * limit - 1e-9)
                unit = multiple if multiple <= size else 1
                assert all(count % unit == 0 or count == size for count in kept)


def test_the_start_can_be_what_is_there() -> None:
    model = small.made(Residual)
    for channel in (1, 4, 7):
        for part in slices_of(model, "conv1.weight", channel):
            part.zero_()
    manager = ScheduledModifierManager([channel_pruning(init_sparsity="__FROM_PARAM__", start_epoch=0.0)])
    optimizer = small.optimizer_of("sgd", model)
    manager.modify(model, optimizer, steps_per_epoch=3, sample_inputs=small.batch(Residual, 0)[0])
    assert pruned(model, "conv1.weight", 12) == {1, 4, 7} and not pruned(model, "conv2.weight", 10)
    for number in range(13):
        small.step(model, optimizer, number)
    assert len(pruned(model, "conv1.weight", 12)) == 6 and len(pruned(model, "conv2.weight", 10)) == 5


def test_channels_can_be_named_by_those_who_read_them() -> None:
    # fc reads the first channel group, and gives no channel that can go.
    assert kept_of(Residual, channel_pruning(params=["fc"], mask_type="channel")) == {
        "conv1.weight": 6,
        "conv2.weight": 10,
    }
    assert kept_of(Residual, channel_pruning(params=["conv3"], mask_type="channel")) == {
        "conv1.weight": 12,
        "conv2.weight": 5,
    }
    assert kept_of(Residual, channel_pruning(params=["conv3"])) == {"conv1.weight": 6, "conv2.weight": 10}


def test_sparsities_by_name() -> None:
    modifier = channel_pruning(params=[], final_sparsity={0.25: ["conv1"], 0.8: ["conv2"]}, init_sparsity=0.0)
    assert kept_of(Residual, modifier) == {"conv1.weight": 9, "conv2.weight": 2}


def test_at_the_end_channels_can_grow_back() -> None:
    model, optimizer, manager = at_work(Residual, channel_pruning(leave_enabled=False))
    for number in range(12):
        small.step(model, optimizer, number)
    assert manager.sparsity() == {}
    small.step(model, optimizer, 12)
    assert not pruned(model, "conv2.weight", 10)


# ------------------------------------------------------------------------------------- removed for good


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@both
@optimizers
def test_a_shrunk_model_computes_what_the_masked_one_does_and_trains_the_same(kind: Any, name: str) -> None:
    one, first, _ = at_work(kind, channel_pruning(), name=name, dtype=torch.float64)
    two, second, manager = at_work(kind, channel_pruning(shrink=True), name=name, dtype=torch.float64)
    kept = [id(parameter) for parameter in two.parameters()]
    for number in range(18):
        a, b = (small.step(m, o, number, torch.float64) for m, o in ((one, first), (two, second)))
        # Sums over fewer channels round differently, and AdamW divides by what is nearly zero.
        assert a == pytest.approx(b, rel=1e-6)
        assert (shapes(one) == shapes(two)) == (number < 11)
        if number == 11:
            assert_equal_outputs(one, two)
    assert [id(parameter) for parameter in two.parameters()] == kept
    for channel_group, size in small.FAMILIES[kind].items():
        for tensor, dim, width in PARTS[kind][channel_group]:
            assert two.get_parameter(tensor).shape[dim] == width * (size - size // 2)
    for parameter in two.parameters():
        for value in second.state[parameter].values():
            assert not isinstance(value, Tensor) or value.dim() == 0 or value.shape == parameter.shape
    assert manager.sparsity() == {}
    x = small.batch(kind, 99, torch.float64)[0]
    before = two.eval()(x)
    manager.finalize(two)
    assert torch.equal(two.eval()(x), before)


def assert_equal_outputs(one: nn.Module, two: nn.Module) -> None:
    """What was masked and what was removed give the same, in evaluation and in training."""
    x = small.batch(type(one), 99, torch.float64)[0]
    for train in (False, True):
        # Copies: training moves the statistics of batches.
        a, b = (copy.deepcopy(model).train(train)(x) for model in (one, two))
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_loss_that_is_still_held_does_not_stop_the_next_step() -> None:
    model, optimizer, _ = at_work(Residual, channel_pruning(shrink=True))
    losses = []
    for number in range(14):
        x, y = small.batch(Residual, number)
        optimizer.zero_grad()
        losses.append(nn.functional.cross_entropy(model(x), y))
        losses[-1].backward()
        optimizer.step()
    assert model.conv1.out_channels == 6 and model.conv2.in_channels == 6 and model.bn2.num_features == 5


@both
def test_apply_and_initialize_need_no_optimizer(kind: Any) -> None:
    model = small.made(kind)
    x = small.batch(kind, 0)[0]
    ScheduledModifierManager([channel_pruning(shrink=True)]).apply(model, sample_inputs=x)
    dense = small.made(kind)
    for channel_group, size in small.FAMILIES[kind].items():
        tensor, dim, width = PARTS[kind][channel_group][0]
        assert model.get_parameter(tensor).shape[dim] == width * (size - size // 2)
    model(x)
    manager = ScheduledModifierManager([channel_pruning(shrink=True)])
    manager.initialize(dense, epoch=2.0, sample_inputs=x)
    assert shapes(dense) == shapes(small.made(kind))
    assert manager.sparsity()
    with pytest.raises(StateError, match="has to trace the model"):
        ScheduledModifierManager([channel_pruning()]).apply(small.made(kind))


def test_copies_are_masked_and_get_the_structure() -> None:
    model, optimizer, manager = at_work(Residual, channel_pruning(shrink=True))
    average = copy.deepcopy(model)
    for number in range(9):
        small.step(model, optimizer, number)
    manager.apply_masks(average)
    assert all(pruned(average, f, n) == pruned(model, f, n) != set() for f, n in small.FAMILIES[Residual].items())
    for number in range(9, 12):
        small.step(model, optimizer, number)
    manager_two = ScheduledModifierManager([channel_pruning(shrink=True)])
    manager_two.apply_structure(average, state=manager.state_dict())
    assert shapes(average) == shapes(model)
    average.load_state_dict(model.state_dict())


def test_structure_needs_a_state_where_channels_are_gone() -> None:
    manager = ScheduledModifierManager([channel_pruning(shrink=True)])
    model = small.made(Residual)
    manager.apply_structure(model, epoch=3.9)
    assert shapes(model) == shapes(small.made(Residual))
    with pytest.raises(StateError, match="StructuredPruningModifier has removed channels by epoch 4"):
        manager.apply_structure(model, epoch=4.0)


# ------------------------------------------------------------------------------------- stopped and resumed


def everything(model: nn.Module, optimizer: Any, manager: ScheduledModifierManager, path: Path) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "manager": manager.state_dict()}
    torch.save({**state, "rng": torch.get_rng_state()}, path)


@both
@optimizers
@pytest.mark.parametrize("inputs", [True, False])
def test_resumed_at_every_step_it_is_the_run_that_never_stopped(
    kind: Any, name: str, inputs: bool, tmp_path: Path
) -> None:
    given: dict[str, Any] = {} if inputs else {"sample_inputs": None}
    modifier = channel_pruning(start_epoch=0.0, end_epoch=2.0, shrink=True)
    model, optimizer, manager = at_work(kind, modifier, name=name, **given)
    steps = 9
    for number in range(steps):
        everything(model, optimizer, manager, tmp_path / f"{number}.pt")
        small.step(model, optimizer, number)
    for number in range(steps):
        saved = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        again, other, second = at_work(kind, modifier, name=name, **given)
        second.load_state_dict(saved["manager"])
        again.load_state_dict(saved["model"])
        other.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
        for later in range(number, steps):
            small.step(again, other, later)
        assert same_bits(again.state_dict(), model.state_dict()), number
        assert same_bits(other.state_dict(), optimizer.state_dict()), number
        assert same_bits(second.state_dict(), manager.state_dict()), number
        second.finalize(again)


def test_a_state_from_before_cannot_undo_a_removal() -> None:
    model, optimizer, manager = at_work(Residual, channel_pruning(shrink=True))
    early = manager.state_dict()
    for number in range(12):
        small.step(model, optimizer, number)
    before = shapes(model)
    with pytest.raises(StateError, match="what was removed cannot come back"):
        manager.load_state_dict(early)
    assert shapes(model) == before and manager.step == 12


def test_the_state_of_another_width_is_refused_before_anything_changes() -> None:
    model, optimizer, manager = at_work(Residual, channel_pruning(shrink=True))
    for number in range(12):
        small.step(model, optimizer, number)
    state = manager.state_dict()
    other = Residual(width=14)
    second = ScheduledModifierManager([channel_pruning(shrink=True)])
    second.modify(other, small.optimizer_of("sgd", other), steps_per_epoch=3)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(StateError, match=r"after channels of 'conv1.weight' were removed, of shape \(12, 2, 3, 3\)"):
        second.load_state_dict(state)
    assert same_bits(other.state_dict(), before) and second.step == 0


@pytest.mark.parametrize("where", ["remove", "resize", "rerouted", "resized", "plan_removal", "deletion_masks"])
def test_an_interruption_leaves_a_whole_model(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sparsify.pruning.group_masks
    import sparsify.pruning.removal
    from sparsify.modifiers.structured import _Structured
    from sparsify.pruning.masker import Masker

    model, optimizer, manager = at_work(Residual, channel_pruning(shrink=True))
    for number in range(11):
        small.step(model, optimizer, number)
    owners: dict[str, Any] = {
        "resize": Masker,
        "rerouted": ChannelRemoval,
        "resized": _Structured,
        "deletion_masks": sparsify.pruning.group_masks,
    }
    owner = owners.get(where, sparsify.pruning.removal)
    original = getattr(owner, where)
    calls = []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        small.step(model, optimizer, 11)
    manager.finalize(model)
    manager.finalize(model)
    model.eval()
    x = small.batch(Residual, 3)[0]
    out = model(x)
    assert out.shape == (8, 4) and bool(out.isfinite().all())
    assert model.conv1.weight.shape[0] == model.conv1.out_channels == model.bn1.num_features == model.fc.in_features


# ------------------------------------------------------------------------------------- refused, or said


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"score_type": "movement"}, "score_type: 'movement' is MovementPruningModifier's"),
        ({"mask_type": "2:4"}, "mask_type"),
        ({"limits": {"conv1": 1.5}}, r"limits: 1.5 for 'conv1' is not a fraction in \[0, 1\]"),
        ({"multiple": 0}, "multiple"),
        ({"shrink": True, "leave_enabled": False}, "shrink: true removes at end_epoch what leave_enabled"),
        ({"params": []}, "names nothing to prune"),
    ],
)
def test_what_cannot_be_meant_is_refused_when_it_is_read(changed: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        channel_pruning(**changed)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"params": ["conv9"]}, "'conv9' matches nothing in Residual"),
        ({"params": ["fc"]}, r"nothing that is named can be cut in Residual: 'fc.weight': .*conv1.weight"),
        ({"limits": {"conv9": 0.5}}, "limits: 'conv9' matches nothing"),
        (
            {"param_groups": [["conv1", "conv2"]]},
            "conv1.weight, conv2.weight are not one channel group.*conv3",
        ),
        ({"param_groups": [["conv9"]]}, "param_groups: 'conv9' matches nothing"),
        (
            {"params": [], "final_sparsity": {0.5: ["conv1"], 0.6: ["conv3"]}},
            "'conv1.weight', 'conv3.weight' go together, but have 2 sparsities, 0.5, 0.6",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_anything_changes(changed: dict[str, Any], text: str) -> None:
    model = small.made(Residual)
    before = copy.deepcopy(model.state_dict())
    manager = ScheduledModifierManager([channel_pruning(start_epoch=0.0, **changed)])
    with pytest.raises(TargetError, match=text):
        manager.modify(
            model, small.optimizer_of("sgd", model), steps_per_epoch=3, sample_inputs=small.batch(Residual, 0)[0]
        )
    assert same_bits(model.state_dict(), before) and not manager.attached


def test_groups_that_are_channel_groups_are_taken() -> None:
    assert kept_of(Residual, channel_pruning(param_groups=[["conv3", "conv1"], ["conv2"]]))["conv1.weight"] == 6


def test_a_name_that_cannot_be_cut_is_said_once_and_a_pattern_means_what_can_be() -> None:
    with pytest.warns(SparsifyWarning, match="leaves whole: 'fc.weight'"):
        at_work(Residual, channel_pruning(params=["conv1", "fc"]))
    at_work(Residual, channel_pruning(params=["re:.*weight"]))


def test_a_channel_group_with_a_frozen_weight_is_left_alone() -> None:
    model = small.made(Residual)
    model.bn2.weight.requires_grad_(False)
    manager = ScheduledModifierManager([channel_pruning(start_epoch=0.0, init_sparsity=0.5)])
    with pytest.warns(SparsifyWarning, match="'conv2.weight': 'bn2.weight' is frozen"):
        manager.modify(
            model, small.optimizer_of("sgd", model), steps_per_epoch=3, sample_inputs=small.batch(Residual, 0)[0]
        )
    assert len(pruned(model, "conv1.weight", 12)) == 6 and not pruned(model, "conv2.weight", 10)


def test_weights_that_are_not_finite_are_refused() -> None:
    model, optimizer, _ = at_work(Residual)
    with torch.no_grad():
        model.conv1.weight[0, 0, 0, 0] = math.nan
    with pytest.raises(DataError, match=r"'conv1.weight' holds NaN"):
        for number in range(6):
            small.step(model, optimizer, number)


def _wrapped(rank: int, folder: str) -> None:
    for shrink in (False, True):
        inner = small.made(Residual)
        model = nn.parallel.DistributedDataParallel(inner)
        optimizer = small.optimizer_of("sgd", inner)
        manager = ScheduledModifierManager([channel_pruning(start_epoch=0.0, end_epoch=2.0, shrink=shrink)])
        x = small.batch(Residual, 0)[0]
        if shrink:
            with pytest.raises(StateError, match="while DistributedDataParallel holds"):
                manager.modify(model, optimizer, steps_per_epoch=3, sample_inputs=x)
            continue
        manager.modify(model, optimizer, steps_per_epoch=3, sample_inputs=x)
        for number in range(7):
            own, y = small.batch(Residual, 10 * rank + number)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(own), y).backward()
            optimizer.step()
        torch.save(inner.state_dict(), Path(folder) / f"{rank}.pt")
        manager.finalize()
        del model
        gc.collect()
        dist.barrier()


def test_on_two_ranks_masks_are_the_same_and_nothing_is_removed(tmp_path: Path) -> None:
    on_two_ranks(_wrapped, tmp_path)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(one[n], two[n]) for n in one if "running" not in n)
    assert int((one["conv2.weight"] == 0).flatten(1).all(1).sum()) == 5


def test_two_at_work_on_one_channel_group_are_refused_though_they_name_other_weights() -> None:
    first, second = channel_pruning(params=["conv1"]), channel_pruning(params=["conv3"], start_epoch=2.0)
    with pytest.raises(RecipeError, match=r"mask the same channels, those of 'conv1.weight'"):
        at_work(Residual, first, second)
    at_work(Residual, first, channel_pruning(params=["conv3"], start_epoch=4.0, end_epoch=5.0))


def test_one_that_prunes_what_reads_the_channels_is_refused() -> None:
    single = GMPruningModifier(
        params=["fc"], init_sparsity=0.1, final_sparsity=0.5, start_epoch=0.0, end_epoch=2.0, update_frequency=1.0
    )
    with pytest.raises(RecipeError, match=r"GMPruningModifier prunes 'fc.weight' from epoch 0, but until 4"):
        at_work(Residual, channel_pruning(params=["conv1"]), single)
    # Those of conv2 it does not touch.
    at_work(Residual, channel_pruning(params=["conv2"]), single)


def test_two_on_channel_groups_that_share_a_weight_mask_it_together() -> None:
    # The columns of conv3 read sigmoid(0), so only their own mask holds them, whoever masks its rows afterwards.
    model, optimizer, _ = at_work(Residual, channel_pruning(params=["conv2"]), channel_pruning(params=["conv1"]))
    for number in range(13):
        assert len(pruned(model, "conv1.weight", 12)) == ramp(number, 0.1, 0.5, 12)
        assert len(pruned(model, "conv2.weight", 10)) == ramp(number, 0.1, 0.5, 10)
        small.step(model, optimizer, number)


def test_two_on_channel_groups_that_share_a_weight_end_apart() -> None:
    """conv2's rows are of one, its columns of the other; one shrinks in the middle of the other's ramp."""
    one = channel_pruning(params=["conv1"], end_epoch=2.0, shrink=True)
    model, optimizer, _ = at_work(Residual, one, channel_pruning(params=["conv2"], shrink=True))
    seen = []
    for number in range(13):
        small.step(model, optimizer, number)
        seen.append((tuple(model.conv2.weight.shape[:2]), int((model.bn2.weight == 0).sum())))
    assert seen[4] == ((10, 12), ramp(5, 0.1, 0.5, 10)) and seen[5] == ((10, 6), ramp(6, 0.1, 0.5, 10))
    assert seen[10] == ((10, 6), ramp(11, 0.1, 0.5, 10)) and seen[11] == ((5, 6), 0)


def test_what_else_is_in_the_recipe_goes_on() -> None:
    frozen = TrainableParamsModifier(params=["fc.bias"], trainable=False, start_epoch=0.0)
    model, optimizer, _ = at_work(Residual, channel_pruning(shrink=True), frozen)
    before = model.fc.bias.detach().clone()
    for number in range(13):
        small.step(model, optimizer, number)
    assert torch.equal(model.fc.bias, before) and model.fc.weight.shape == (4, 6)
