"""The pruning profile keeps its promises on any layers: the average, the order along the balance, caps and filters."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsify.analysis.layers import LayerInfo, ModelAnalysis
from sparsify.analysis.loss import LossProfile
from sparsify.errors import ArgumentError
from sparsify.optimize.allocation import pruning_profile
from sparsify.optimize.layer_curves import REST, LayerCurve, curves
from sparsify.optimize.pruning_profiles import PruningProfile, PruningSettings

LEVELS = (0.0, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
FRACTION = st.floats(0.0, 1.0)
VALUE = st.integers(0, 10_000).map(lambda value: value / 1000)


@st.composite
def layer(draw: st.DrawFn) -> LayerCurve:
    count = len(LEVELS)
    # Noise too: losses that fall and times that rise.
    losses = [0.0, *draw(st.lists(VALUE, min_size=count - 1, max_size=count - 1))]
    ms = draw(VALUE)
    times = [ms, *draw(st.lists(VALUE, min_size=count - 1, max_size=count - 1))]
    if draw(st.booleans()):
        losses, times = sorted(losses), sorted(times, reverse=True)
        ms = times[0]
    weights = draw(st.integers(1, 10**6))
    return LayerCurve(
        name="",
        weights=weights,
        parameters=weights + draw(st.integers(0, 100)),
        macs=draw(st.integers(0, 10**9)),
        ms=ms,
        first=False,
        grouped=draw(st.integers(0, 9)) == 0,
        why_not="it is a norm" if draw(st.integers(0, 9)) == 0 else "",
        levels=LEVELS,
        losses=tuple(losses),
        times=tuple(times),
    )


@st.composite
def model(draw: st.DrawFn, most: int = 12) -> tuple[LayerCurve, ...]:
    found = draw(st.lists(layer(), min_size=1, max_size=most))
    return tuple(replace(one, name=f"layer{n}", first=n == 0) for n, one in enumerate(found))


@st.composite
def settings(draw: st.DrawFn) -> PruningSettings:
    return PruningSettings(
        sparsity=draw(FRACTION),
        balance=draw(FRACTION),
        min_sparsity=draw(st.sampled_from([0.0, 0.4, 0.7])),
        min_speedup=draw(st.sampled_from([0.0, 1.2, 2.0])),
        min_recovery=draw(st.sampled_from([0.0, 0.5, 0.9])),
        max_sparsity=draw(st.sampled_from([0.95, 0.8, 0.99])),
        first_layer=draw(st.booleans()),
        grouped=draw(st.booleans()),
    )


def counted(layers: tuple[LayerCurve, ...], wanted: PruningSettings) -> list[LayerCurve]:
    return [
        one
        for one in layers
        if not one.why_not and (wanted.first_layer or not one.first) and (wanted.grouped or not one.grouped)
    ]


def average(layers: tuple[LayerCurve, ...], profile: PruningProfile) -> float:
    shares = {choice.name: choice.sparsity for choice in profile.layers}
    those = counted(layers, profile.settings)
    return sum(one.weights * shares[one.name] for one in those) / max(1, sum(one.weights for one in those))


@given(model(), settings())
def test_the_average_is_met_or_it_is_said(layers: tuple[LayerCurve, ...], wanted: PruningSettings) -> None:
    profile = pruning_profile(layers, wanted)
    assert profile.sparsity == pytest.approx(average(layers, profile), abs=1e-9)
    assert abs(profile.sparsity - wanted.sparsity) <= 0.005 or profile.notes


@given(model(), FRACTION)
def test_without_filters_the_average_is_met_up_to_the_caps(layers: tuple[LayerCurve, ...], sparsity: float) -> None:
    wanted = PruningSettings(sparsity=sparsity, min_sparsity=0.0)
    profile = pruning_profile(layers, wanted)
    if counted(layers, wanted):
        assert profile.sparsity == pytest.approx(min(sparsity, 0.95), abs=1e-6)


@given(model(), settings())
def test_towards_performance_it_gets_no_slower_and_recovers_no_better(
    layers: tuple[LayerCurve, ...], wanted: PruningSettings
) -> None:
    along = [pruning_profile(layers, replace(wanted, balance=b)) for b in (1.0, 0.83, 0.5, 0.21, 0.0)]
    for before, after in pairwise(along):
        assert after.speedup >= before.speedup * (1 - 1e-9)
        assert after.recovery <= before.recovery + 1e-9
    assert along[0].recovery == 1.0


@given(model(), settings())
def test_caps_and_filters_hold(layers: tuple[LayerCurve, ...], wanted: PruningSettings) -> None:
    profile = pruning_profile(layers, wanted)
    free = {one.name for one in counted(layers, wanted)}
    for choice in profile.layers:
        assert 0.0 <= choice.sparsity <= wanted.max_sparsity + 1e-9
        if choice.name not in free:
            assert choice.sparsity == 0.0 and choice.why
        if choice.sparsity > 0:
            assert choice.sparsity >= wanted.min_sparsity - 1e-9
            assert choice.speedup >= wanted.min_speedup * (1 - 1e-6)


@given(model(), settings(), st.lists(FRACTION.filter(lambda share: share < 1.0), max_size=3))
def test_recovery_is_at_most_one_and_no_layer_falls_below_its_limit(
    layers: tuple[LayerCurve, ...], wanted: PruningSettings, by_hand: list[float]
) -> None:
    names = [one.name for one in layers if not one.why_not]
    wanted = replace(wanted, overrides=dict(zip(names, by_hand, strict=False)))
    profile = pruning_profile(layers, wanted)
    assert 0.0 <= profile.recovery <= 1.0
    for choice in profile.layers:
        assert choice.overridden or choice.recovery >= wanted.min_recovery - 1e-9, choice
    assert abs(profile.sparsity - wanted.sparsity) <= 0.005 or profile.notes


@given(model(), settings(), st.integers(0, 11), st.floats(0.0, 0.99))
def test_forcing_a_layer_never_raises_recovery(
    layers: tuple[LayerCurve, ...], wanted: PruningSettings, number: int, share: float
) -> None:
    names = [one.name for one in counted(layers, wanted)]
    if not names:
        return
    wanted = replace(wanted, balance=1.0, min_recovery=0.0)
    free = pruning_profile(layers, wanted)
    forced = pruning_profile(layers, replace(wanted, overrides={names[number % len(names)]: share}))
    assert free.recovery == 1.0 and forced.recovery <= 1.0
    if abs(forced.sparsity - free.sparsity) < 1e-9 and free.loss > 0:
        assert forced.recovery == pytest.approx(min(1.0, max(0.0, 2.0 - forced.loss / free.loss)))


@given(model(), settings(), FRACTION)
def test_what_is_set_by_hand_stands(layers: tuple[LayerCurve, ...], wanted: PruningSettings, share: float) -> None:
    names = [one.name for one in layers if not one.why_not]
    if not names or share == 1.0:
        return
    profile = pruning_profile(layers, replace(wanted, overrides={names[0]: share}))
    choice = next(choice for choice in profile.layers if choice.name == names[0])
    assert choice.overridden and choice.sparsity == share and choice.why == "set by hand"


@given(model(), settings())
def test_sums_are_those_of_the_layers(layers: tuple[LayerCurve, ...], wanted: PruningSettings) -> None:
    profile = pruning_profile(layers, wanted)
    assert profile.parameters_before == sum(one.parameters for one in layers)
    assert profile.parameters_after == pytest.approx(
        sum(o.parameters - o.weights * c.sparsity for o, c in zip(layers, profile.layers, strict=True))
    )
    assert profile.macs_after == pytest.approx(
        sum(one.macs * (1 - choice.sparsity) for one, choice in zip(layers, profile.layers, strict=True))
    )
    assert profile.ms_after == pytest.approx(sum(choice.ms for choice in profile.layers), abs=1e-9)
    assert profile == pruning_profile(layers, wanted)


def plain(name: str, weights: int, curve: tuple[float, ...], ms: float = 1.0, **changed: Any) -> LayerCurve:
    levels = (0.0, 0.5, 0.9)
    made = LayerCurve(
        name,
        weights,
        weights,
        weights,
        ms,
        False,
        False,
        "",
        levels,
        curve,
        tuple(ms * (1 - level) for level in levels),
    )
    return replace(made, **changed)


def shares(*layers: LayerCurve, **asked: Any) -> list[float]:
    profile = pruning_profile(layers, PruningSettings(**{"min_sparsity": 0.0, **asked}))
    return [round(choice.sparsity, 6) for choice in profile.layers]


def test_more_goes_where_less_is_lost() -> None:
    tough, soft = plain("tough", 100, (0.0, 1.0, 3.0)), plain("soft", 100, (0.0, 0.1, 0.3))
    assert shares(tough, soft, sparsity=0.45) == [0.0, 0.9]
    assert shares(tough, soft, sparsity=0.6) == [0.3, 0.9]


def test_what_is_cheap_only_behind_what_is_dear_does_not_go_first() -> None:
    wall, ramp = plain("wall", 100, (0.0, 10.0, 10.1)), plain("ramp", 100, (0.0, 2.0, 4.0))
    assert shares(wall, ramp, sparsity=0.45) == [0.0, 0.9]


def test_more_goes_where_more_time_is_saved() -> None:
    slow, fast = plain("slow", 100, (0.0, 1.0, 3.0), ms=10.0), plain("fast", 100, (0.0, 0.1, 0.3))
    assert shares(slow, fast, sparsity=0.45, balance=0.0) == [0.9, 0.0]
    assert shares(slow, fast, sparsity=0.45, balance=1.0) == [0.0, 0.9]


def test_what_a_filter_leaves_dense_goes_to_the_others() -> None:
    tough, soft = plain("tough", 100, (0.0, 1.0, 3.0)), plain("soft", 100, (0.0, 0.1, 0.3))
    # .1 on average over .3 for the tough one; it may have .4 or nothing.
    found = shares(tough, soft, sparsity=0.6, min_sparsity=0.4)
    assert found == [0.4, 0.8]
    # Where the others have room, they take it.
    more = plain("more", 100, (0.0, 2.0, 6.0))
    assert shares(tough, soft, more, sparsity=0.4, min_sparsity=0.4) == [0.4, 0.8, 0.0]
    assert shares(tough, soft, more, sparsity=0.3, min_sparsity=0.4) == [0.0, 0.9, 0.0]


def test_a_time_too_short_to_be_measured_is_no_standstill() -> None:
    pruned = replace(plain("gone", 100, (0.0, 1.0, 3.0)), times=(1.0, 0.5, 0.0))
    profile = pruning_profile([pruned], PruningSettings(sparsity=0.9, min_sparsity=0.0, min_speedup=2.0))
    assert profile.layers[0].sparsity == pytest.approx(0.9)
    assert profile.layers[0].speedup == profile.speedup == pytest.approx(1e9)


def test_nothing_is_pruned_where_a_filter_would_make_it_far_too_much() -> None:
    tough, soft = plain("tough", 100, (0.0, 1.0, 3.0)), plain("soft", 100, (0.0, 0.1, 0.3))
    # .35 on average is the next that can be had; 0 is nearer to .06, and .35 to .3.
    assert shares(tough, soft, sparsity=0.06, min_sparsity=0.7) == [0.0, 0.0]
    assert shares(tough, soft, sparsity=0.3, min_sparsity=0.7) == [0.0, 0.7]


def test_the_average_comes_before_what_is_lost_and_saved() -> None:
    """A spread that misses the average is no candidate, however much better it is."""
    values = [(1000, 8.0, 9.0), (5000, 0.5, 0.1), (1000, 4.0, 3.0)]
    layers = [plain(f"layer{n}", weights, (0.0, loss / 3, loss), ms) for n, (weights, loss, ms) in enumerate(values)]
    for balance in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        for sparsity in (0.5, 0.55, 0.6, 0.65):
            asked = PruningSettings(sparsity=sparsity, balance=balance, min_sparsity=0.7, max_sparsity=0.9)
            assert pruning_profile(layers, asked).sparsity == pytest.approx(sparsity, abs=1e-9), (balance, sparsity)


def test_recovery_stops_a_layer() -> None:
    slow, fast = plain("slow", 100, (0.0, 1.0, 3.0), ms=10.0), plain("fast", 100, (0.0, 0.1, 0.3))
    free = pruning_profile([slow, fast], PruningSettings(sparsity=0.6, balance=0.0, min_sparsity=0.0))
    held = pruning_profile([slow, fast], PruningSettings(sparsity=0.6, balance=0.0, min_sparsity=0.0, min_recovery=0.9))
    assert free.layers[0].sparsity == pytest.approx(0.9) and held.layers[0].sparsity < 0.4
    assert held.recovery > free.recovery


def power(name: str, weights: int, factor: float) -> LayerCurve:
    levels = tuple(step / 100 for step in range(100))
    losses = tuple(factor * level**2 for level in levels)
    times = tuple(1.0 - 0.8 * level for level in levels)
    return LayerCurve(name, weights, weights, weights, 1.0, False, False, "", levels, losses, times)


def test_recovery_falls_where_a_layer_is_forced() -> None:
    layers = [power("n0", 1000, 4.0), power("n1", 2000, 2.0), power("n2", 4000, 1.0)]
    asked = PruningSettings(sparsity=0.5)
    free = pruning_profile(layers, asked)
    forced = pruning_profile(layers, replace(asked, overrides={"n0": 0.95}))
    assert free.recovery == 1.0 and free.loss == pytest.approx(0.766, abs=5e-4)
    assert forced.loss == pytest.approx(4.0166, abs=5e-4) and forced.recovery == 0.0
    assert forced.layers[0].recovery == 0.0
    # A little is forgiven in part, and a layer that is spared costs the others.
    little = pruning_profile(layers, replace(asked, overrides={"n0": 0.2}))
    assert little.recovery == pytest.approx(2.0 - little.loss / free.loss) and 0.0 < little.recovery < 1.0
    spared = pruning_profile(layers, replace(asked, overrides={"n2": 0.0}))
    assert spared.recovery < 1.0 and spared.layers[1].recovery < 1.0
    # More by hand than was asked for is no new average to be measured by.
    everywhere = pruning_profile(layers, replace(asked, overrides={"n0": 0.9, "n1": 0.9, "n2": 0.9}))
    assert everywhere.sparsity == pytest.approx(0.9) and everywhere.recovery == 0.0


def test_a_limit_of_recovery_holds_also_where_the_best_spread_leaves_a_layer_dense() -> None:
    values = [(100, (0.0, 0.74, 1.73)), (1000, (0.0, 0.46, 1.07)), (100, (0.0, 0.09, 0.49))]
    layers = [plain(f"layer{n}", weights, losses) for n, (weights, losses) in enumerate(values)]
    asked = PruningSettings(sparsity=0.6, balance=0.0, min_sparsity=0.0)
    profile = pruning_profile(layers, replace(asked, min_recovery=0.9))
    assert all(choice.recovery >= 0.9 for choice in profile.layers)
    assert profile.sparsity == pytest.approx(0.6, abs=0.005) or "leave no more" in profile.notes[0]


@pytest.mark.parametrize("sparsity", [0.0, 0.95, 1.0])
def test_the_ends_of_the_scale(sparsity: float) -> None:
    layers = [plain("a", 10, (0.0, 0.0, 0.0)), plain("b", 20, (0.0, 0.0, 0.0))]
    profile = pruning_profile(layers, PruningSettings(sparsity=sparsity))
    assert profile.sparsity == pytest.approx(min(sparsity, 0.9))
    assert profile.recovery == 1.0
    assert bool(profile.notes) == (sparsity > 0.9)


def test_nothing_may_be_pruned() -> None:
    profile = pruning_profile([plain("a", 10, (0.0, 1.0, 2.0), first=True)], PruningSettings())
    assert profile.notes == ("no layer may be pruned.",) and profile.layers[0].why == "the first layer"
    assert profile.speedup == 1.0


def test_more_by_hand_than_was_asked_for_is_said() -> None:
    layers = [plain("a", 100, (0.0, 1.0, 2.0)), plain("b", 100, (0.0, 1.0, 2.0))]
    profile = pruning_profile(layers, PruningSettings(sparsity=0.2, overrides={"a": 0.9}))
    assert profile.sparsity == pytest.approx(0.45) and "set by hand is more" in profile.notes[0]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"sparsity": 85.0}, r"sparsity: 85.0 is not a fraction in \[0, 1\]; did you mean 0.85"),
        ({"balance": -0.1}, "balance: -0.1 is not a fraction"),
        ({"min_speedup": -1.0}, "min_speedup: -1.0 is no factor"),
        ({"overrides": {"c": 0.5}}, "overrides: 'c': there is no such layer"),
        ({"overrides": {"norm": 0.5}}, "overrides: 'norm': it cannot be pruned: it is a norm"),
        ({"overrides": {"a": 1.5}}, "1.5 for 'a' is not a fraction"),
    ],
)
def test_wrong_settings_are_refused(asked: dict[str, Any], message: str) -> None:
    layers = [plain("a", 10, (0.0, 1.0, 2.0)), plain("norm", 1, (0.0, 0.0, 0.0), why_not="it is a norm")]
    with pytest.raises(ArgumentError, match=message):
        pruning_profile(layers, PruningSettings(**asked))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"levels": (0.0, 0.9, 0.5)}, "levels must grow"),
        ({"losses": (0.0, 1.0)}, "must be of one length"),
        ({"losses": (0.0, float("nan"), 1.0)}, "must be finite"),
    ],
)
def test_wrong_curves_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        pruning_profile([plain("a", 10, (0.0, 1.0, 2.0), **changed)])


def info(name: str, why: str = "") -> LayerInfo:
    return LayerInfo(name, "Linear", f"{name}.weight", None, ((1, 4),), (1, 5), 25, 20, 20, 1, 1, 0.0, 32, why, "")


def test_curves_sum_up_what_single_weights_cost() -> None:
    analysis = ModelAnalysis("Net", (info("a"), info("b", "it is small"), info("c")), (), 80, 1)
    loss = LossProfile("magnitude", "pruning", (0.0, 0.5, 1.0), {"a": (0.0, 1.0, 3.0), "c": (0.0, 2.0, 2.0)}, 0.0, 0)
    a, b, c, rest = curves(analysis, None, loss)
    # 10 weights at 1, then 10 at 3.
    assert a.losses == (0.0, 10.0, 40.0) and c.losses == (0.0, 20.0, 40.0)
    assert (a.first, b.first, c.first) == (True, False, False) and b.why_not == "it is small"
    assert (rest.name, rest.parameters) == (REST, 5)


def test_curves_take_measured_losses_as_they_are() -> None:
    analysis = ModelAnalysis("Net", (info("a"),), (), 25, 1)
    loss = LossProfile("data", "pruning", (0.0, 0.5, 0.9), {"a": (2.0, 1.9, 2.5)}, 2.0, 8)
    (a,) = curves(analysis, None, loss)
    assert a.losses == (0.0, 0.0, 0.5)


def test_curves_refuse_other_profiles() -> None:
    analysis = ModelAnalysis("Net", (info("a"),), (), 25, 1)
    with pytest.raises(ArgumentError, match="a profile of quantization"):
        curves(analysis, None, LossProfile("data", "quantization", (8.0, 4.0), {"a": (0.0, 1.0)}, 0.0, 8))
