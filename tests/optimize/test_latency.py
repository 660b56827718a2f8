"""Widths and bits for a time: the solver against every combination, plans against StructuredPruningModifier."""

from __future__ import annotations

import itertools
import json
import random
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from sparsify.analysis.analyze import analyze_model
from sparsify.analysis.loss import LossProfile
from sparsify.analysis.performance import LayerPerformance, PerformanceProfile
from sparsify.errors import ArgumentError, StateError
from sparsify.modifiers import StructuredPruningModifier
from sparsify.optimize import latency
from sparsify.optimize.latency import LatencyPlan, latency_plan
from sparsify.optimize.latency_tables import ModelTables
from sparsify.optimize.widths import Choice, LayerTime, SpeedPart, Tables, WidthCurve
from sparsify.training.manager import ScheduledModifierManager
from tests.zoo.quantizable import Shortcut

SHARES = (1.0, 0.75, 0.5, 0.25)


def problem(seed: int, parts: int, *, int8: bool) -> Tables:
    """A chain of layers with random times and losses."""
    rng = random.Random(seed)
    given = []
    for i in range(parts):
        steps = [0.0, *(rng.random() ** 3 for _ in SHARES[1:])]
        given.append(SpeedPart(f"p{i}", SHARES, tuple(itertools.accumulate(steps)), rng.choice([16.0, 32.0, 64.0])))
    layers = []
    left = (1.0, 0.5625, 0.25, 0.0625)
    for i in range(parts + 1):
        dims: list[dict[str, float]] = [{f"p{i - 1}": 1.0}] if i else []
        if i < parts:
            dims.append({f"p{i}": rng.choice([0.5, 1.0])})
        ms = 3 * rng.random()
        times = [ms * (0.2 + 0.8 * share) + 0.05 * rng.random() for share in left]
        fast = WidthCurve.of(left, [time / 3 for time in times]) if int8 else None
        layers.append(
            LayerTime(f"l{i}", tuple(dims), WidthCurve.of(left, times), fast, 0.3 * rng.random() if int8 else 0.0)
        )
    rest = WidthCurve.of((1.0, 0.25), (0.3, 0.1))
    return Tables(tuple(given), tuple(layers), rest, rest if int8 else None)


def every(tables: Tables) -> list[Choice]:
    names = [layer.name for layer in tables.layers if layer.int8 is not None]
    some = [frozenset(c) for k in range(len(names) + 1) for c in itertools.combinations(names, k)]
    shares = itertools.product(*(part.shares for part in tables.parts))
    parts = [part.name for part in tables.parts]
    return [tables.choice(dict(zip(parts, one, strict=True)), int8) for one in shares for int8 in some]


@pytest.mark.parametrize(("parts", "int8"), [(4, False), (5, False), (3, True)])
@pytest.mark.parametrize("seed", range(4))
def test_the_solver_finds_the_least_loss_of_all(parts: int, int8: bool, seed: int) -> None:
    tables = problem(seed, parts, int8=int8)
    choices = every(tables)
    low, high = tables.fastest().ms, tables.widest().ms
    for part in (0.1, 0.4, 0.7):
        goal = low + part * (high - low)
        found = tables.solve(goal)
        assert found is not None and found.ms <= goal
        assert found.loss == pytest.approx(min(choice.loss for choice in choices if choice.ms <= goal), abs=1e-9)
        assert found == tables.choice(found.shares, found.int8)


def test_a_tighter_goal_never_costs_less() -> None:
    tables = problem(7, 12, int8=True)
    low, high = tables.fastest().ms, tables.widest().ms
    losses = []
    for part in (1.0, 0.8, 0.6, 0.4, 0.2, 0.0):
        found = tables.solve(low + part * (high - low) + 1e-12)
        assert found is not None
        losses.append(found.loss)
    assert losses == sorted(losses)
    assert losses[0] == 0.0


def test_a_goal_below_the_fastest_has_no_solution() -> None:
    tables = problem(1, 3, int8=False)
    assert tables.solve(tables.fastest().ms * 0.999) is None


@pytest.mark.parametrize("seed", range(5))
def test_less_width_never_takes_longer(seed: int) -> None:
    tables = problem(seed, 4, int8=True)
    for part in tables.parts:
        for int8 in (frozenset[str](), frozenset(layer.name for layer in tables.layers)):
            shares = {p.name: 0.75 for p in tables.parts}
            times = [tables.time({**shares, part.name: share}, int8) for share in SHARES]
            assert times == sorted(times, reverse=True)


def test_curves_pool_what_is_in_the_wrong_order() -> None:
    curve = WidthCurve.of((1.0, 0.75, 0.5, 0.25), (4.0, 5.0, 1.0, 2.0))
    assert curve.times == (1.5, 1.5, 4.5, 4.5)
    assert [curve(share) for share in (0.0, 0.25, 0.625, 1.0, 2.0)] == [1.5, 1.5, 3.0, 4.5, 4.5]
    assert WidthCurve.of((0.5, 0.5, 1.0), (1.0, 3.0, 4.0)).times == (2.0, 4.0)
    assert WidthCurve.of((1.0,), (2.0,))(0.3) == 2.0


# ------------------------------------------------------------------------------------------------------------ plans


IMAGES = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
WIDTHS = (1.0, 0.75, 0.5, 0.25)


def net() -> Shortcut:
    torch.manual_seed(0)
    return Shortcut(64, 128).eval()


def injected(model: nn.Module, **changed: Any) -> PerformanceProfile:
    """A profile in which a layer takes a nanosecond for a multiplication, in int8 a third; the rest takes .01 ms."""
    layers = []
    for info in analyze_model(model, IMAGES).layers:
        ms = info.macs / 1e6
        # The stem's input and the head's output stay as wide as they are.
        power = 1 if info.name in ("stem", "head") else 2
        at = tuple(ms * width**power for width in WIDTHS)
        layers.append(LayerPerformance(info.name, ms, ms / 3, (ms,) * 10, at, tuple(one / 3 for one in at), info.type))
    sums = tuple(sum(one.width_ms[k] for one in layers if one.width_ms) + 0.01 for k in range(len(WIDTHS)))
    int8 = tuple((one - 0.01) / 3 + 0.01 for one in sums)
    profile = PerformanceProfile(
        tuple(layers), sums[0], int8[0], {}, 1, 1, "", {}, sums[0], int8[0], {"x/Add": 0.01}, {"x/Add": 0.01},
        WIDTHS, sums, int8, sums, int8,
    )  # fmt: skip
    return replace(profile, **changed)


def losses(**given: tuple[float, ...]) -> LossProfile:
    channel_groups = {"stem": ("stem", "conv2"), "conv1": ("conv1",)}
    return LossProfile(
        "data", "pruning", (0.0, 0.5, 1.0), given, 1.0, 8, {name: channel_groups[name] for name in given}
    )


def planned(goal: float, **more: Any) -> LatencyPlan:
    model = net()
    given: dict[str, Any] = {"performance": injected(model), "int8": False, "measure": False, **more}
    return latency_plan(model, IMAGES, goal, **given)


def test_what_costs_more_loss_stays_wider() -> None:
    dense = injected(net()).total_ms
    cheap_middle = planned(dense * 0.6, loss=losses(stem=(1.0, 3.0, 5.0), conv1=(1.0, 1.1, 1.2)))
    assert set(cheap_middle.sparsity) == {"conv1"}
    cheap_stream = planned(dense * 0.6, loss=losses(stem=(1.0, 1.1, 1.2), conv1=(1.0, 3.0, 5.0)))
    assert set(cheap_stream.sparsity) == {"stem", "conv2"}
    assert cheap_middle.predicted_ms <= dense * 0.6 and cheap_stream.predicted_ms <= dense * 0.6
    assert cheap_middle.loss_method == "data" and 0 < cheap_middle.loss <= 0.2


def test_the_time_of_a_whole_is_that_of_its_table_where_all_are_as_wide() -> None:
    model, profile = net(), injected(net())
    plan = planned(profile.width_total_ms[2], loss=losses(stem=(1.0, 1.0, 1.0), conv1=(1.0, 1.0, 1.0)))
    assert plan.dense_ms == profile.total_ms
    work = ModelTables(model, IMAGES, profile, latency_channel_groups(model), False, None, None, {})
    for k, width in enumerate(WIDTHS):
        shares = {part.name: min(part.shares, key=lambda share: abs(share - width)) for part in work.tables.parts}
        assert work.tables.time(shares, frozenset()) == pytest.approx(profile.width_total_ms[k])


def latency_channel_groups(model: nn.Module) -> Any:
    from sparsify.analysis.variants import cuttable
    from sparsify.model.signature import SampleInputs

    channel_groups, why = cuttable(model, SampleInputs.of(model, IMAGES))
    assert channel_groups is not None and not why
    return channel_groups


def test_a_plan_says_what_structured_pruning_then_does() -> None:
    plan = planned(injected(net()).total_ms * 0.4)
    assert plan.sparsity and plan.loss_method == "norms"
    assert {name for names in plan.final_sparsity().values() for name in names} == {
        f"{n}.weight" for n in plan.sparsity
    }
    model = net()
    modifier = StructuredPruningModifier(
        params=[],
        init_sparsity=0.0,
        final_sparsity={**plan.final_sparsity()},
        start_epoch=0.0,
        end_epoch=1.0,
        update_frequency=0.5,
        shrink=True,
    )
    manager = ScheduledModifierManager([modifier])
    manager.apply(model, sample_inputs=IMAGES)
    for name, (before, after) in plan.channels.items():
        assert model.get_parameter(f"{name}.weight").shape[0] == after < before
        assert plan.sparsity[name] == pytest.approx(1 - after / before)
    assert model.get_parameter("stem.weight").shape[0] == plan.channels.get("stem", (64, 64))[1]


def test_limits_are_kept() -> None:
    dense = injected(net()).total_ms
    plan = planned(dense * 0.5, limits={"conv1": 0.3})
    assert plan.sparsity.get("conv1", 0.0) <= 0.3
    with pytest.raises(ArgumentError, match=r"limits: 'head' is no layer"):
        planned(dense * 0.5, limits={"head": 0.3})
    with pytest.raises(ArgumentError, match=r"limits: 30 for 'conv1' is no fraction"):
        planned(dense * 0.5, limits={"conv1": 30})


def test_channel_groups_without_a_loss_stay_whole() -> None:
    plan = planned(injected(net()).total_ms * 0.7, loss=losses(conv1=(1.0, 1.1, 5.0)))
    assert set(plan.sparsity) == {"conv1"}
    assert any("stem stays whole" in note for note in plan.notes) and "note: stem" in str(plan)


def test_losses_by_layer_are_added_up() -> None:
    by_layer = LossProfile("data", "pruning", (0.0, 1.0), {"stem": (0, 1), "conv2": (0, 1), "conv1": (0, 9)}, 0.0, 8)
    plan = planned(injected(net()).total_ms * 0.7, loss=by_layer)
    assert set(plan.sparsity) == {"stem", "conv2"}
    assert plan.loss == pytest.approx(2 * plan.sparsity["stem"])


def test_int8_is_taken_everywhere_or_where_it_pays() -> None:
    dense = injected(net()).total_ms
    plan = planned(dense * 0.5, int8=True)
    assert set(plan.bits.values()) == {8} and plan.sparsity == {} and plan.floating == () and plan.quantized
    low, high = (0.1, 1.0), (9.0, 9.0)
    by_layer = {"stem": high, "conv1": low, "conv2": low, "head": high}
    int8_loss = LossProfile("data", "quantization", (8, 4), by_layer, 0.0, 8)
    mixed = planned(dense * 0.5, int8=True, int8_loss=int8_loss)
    assert mixed.bits["conv1"] == mixed.bits["conv2"] == 8
    assert mixed.floating == ("stem", "head")
    assert planned(dense, int8=True, int8_loss=int8_loss).bits["conv1"] == 32


def test_a_goal_that_is_met_already_changes_nothing() -> None:
    plan = planned(injected(net()).total_ms + 1)
    assert plan.sparsity == {} and plan.loss == 0.0 and set(plan.bits.values()) == {32} and not plan.quantized


def test_a_goal_that_cannot_be_met_says_what_can() -> None:
    profile = injected(net())
    with pytest.raises(ArgumentError, match=r"goal_ms=0\.001 cannot be met") as caught:
        planned(0.001)
    best = float(re.findall(r"tables, ([\d.]+) ms at best", str(caught.value))[0])
    assert best == pytest.approx(profile.width_total_ms[-1], rel=0.01)
    plan = planned(best * 1.01)
    assert plan.predicted_ms <= best * 1.01


@pytest.mark.parametrize("goal", [0, -1.0, float("nan"), float("inf"), "5", True, None])
def test_a_goal_is_a_number_of_milliseconds(goal: Any) -> None:
    with pytest.raises(ArgumentError, match="goal_ms="):
        planned(goal)


def test_profiles_must_fit() -> None:
    with pytest.raises(ArgumentError, match="measured at batch 1 on 1 threads, and the goal is for batch 2 on 1"):
        planned(1.0, batch_size=2)
    with pytest.raises(ArgumentError, match="performance is of another model: it has 'stem'"):
        latency_plan(nn.Conv2d(3, 4, 1), IMAGES, 1.0, performance=injected(net()))
    with pytest.raises(ArgumentError, match="loss is a profile of quantization"):
        planned(1.0, loss=LossProfile("data", "quantization", (8, 4), {}, 0.0, 1))
    with pytest.raises(ArgumentError, match="8 bits among its levels"):
        planned(1.0, int8_loss=LossProfile("data", "quantization", (6, 4), {}, 0.0, 1))
    head = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    layer = LayerPerformance("1", 1.0, None, (1.0,) * 10, None, None)
    only = PerformanceProfile((layer,), 1.0, None, {}, 1, 1, "", {}, 1.0)
    with pytest.raises(StateError, match="nothing can be done for Sequential"):
        latency_plan(head, IMAGES, 0.5, performance=only, int8=False)


# ------------------------------------------------------------------------------------------------------------ measuring


def with_times(monkeypatch: pytest.MonkeyPatch, factor: float) -> list[float]:
    """Measured times are those of the tables times `factor`."""
    asked: list[float] = []

    def measured(tables: Any, choice: Choice, *args: Any) -> float:
        asked.append(choice.ms * factor)
        return asked[-1]

    monkeypatch.setattr(latency, "_measure", measured)
    return asked


@pytest.mark.parametrize("factor", [1.3, 0.8, 1.0])
def test_tables_are_scaled_by_what_is_seen(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    asked = with_times(monkeypatch, factor)
    goal = injected(net()).total_ms * 0.5
    plan = planned(goal, measure=True)
    assert plan.measured_ms is not None and plan.measured_ms <= goal
    assert plan.measured_ms in asked and [one.measured_ms for one in plan.rounds] == asked
    assert plan.error == pytest.approx(1 / factor - 1)
    # After the first round the scale is known.
    assert all(abs(one.error) <= 0.0101 for one in plan.rounds[1:])
    if factor > 1:
        assert asked[0] > goal and len(asked) > 1
    loss = planned(goal / factor).loss
    assert loss <= plan.loss <= planned(goal / factor / 1.011).loss


def test_a_goal_that_is_never_met_says_what_was_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    with_times(monkeypatch, 50.0)
    with pytest.raises(ArgumentError, match=r"was not met: of 2 solutions that were measured the fastest takes"):
        planned(injected(net()).total_ms * 0.5, measure=True)


def test_a_plan_is_really_measured() -> None:
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = latency_plan(
        model, IMAGES, 1e3, performance=injected(model, total_ms=2e3, width_total_ms=(2e3, 1e3, 500.0, 100.0)),
        iterations=3,
    )  # fmt: skip
    assert plan.measured_ms is not None and 0 < plan.measured_ms <= 1e3
    assert plan.quantized and len(plan.rounds) >= 1
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    text = str(plan)
    assert "measured" in text and "conv1" in text and json.loads(plan.to_json())["goal_ms"] == 1e3
