"""Curves, windows and the grid against closed forms."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsify.modifiers.schedule import Clock, Curve, UpdateGrid, Window, between, curve

CURVES = ("linear", "cubic", "inverse_cubic", "cosine", "polynomial")
FORMULA = {
    "linear": lambda x: x,
    "cubic": lambda x: 1 - (1 - x) ** 3,
    "inverse_cubic": lambda x: 1 - (1 - x) ** (1 / 3),
    "cosine": lambda x: 0.5 * (1 - math.cos(math.pi * x)),
    "polynomial": lambda x: 1 - (1 - x) ** 2,
}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cubic", {0: 0.05, 1: 0.127363, 2: 0.19957, 5: 0.387037, 10: 0.612963, 15: 0.75, 20: 0.82037, 29: 0.84997}),
        ("linear", {0: 0.05, 1: 0.076667, 10: 0.316667, 15: 0.45, 29: 0.823333}),
        ("inverse_cubic", {0: 0.05, 1: 0.05899, 10: 0.151136, 15: 0.21504, 29: 0.592536}),
    ],
)
def test_applied_sparsity_follows_the_published_table(kind: Curve, expected: dict[int, float]) -> None:
    window = Window(0.0, 30.0)
    for epoch, value in {**expected, 30: 0.85, 31: 0.85}.items():
        assert between(kind, 0.05, 0.85, window.progress(epoch)) == pytest.approx(value, abs=1e-6)


@given(st.sampled_from(CURVES), st.floats(0, 1))
def test_a_curve_is_its_formula(kind: Curve, x: float) -> None:
    assert curve(kind, x) == pytest.approx(FORMULA[kind](x), abs=1e-12)


@given(st.sampled_from(CURVES), st.floats(0, 1), st.floats(0, 1))
def test_a_curve_never_falls(kind: Curve, a: float, b: float) -> None:
    assert curve(kind, min(a, b)) <= curve(kind, max(a, b))


@given(st.sampled_from(CURVES), st.floats(-5, 5), st.floats(-5, 5), st.floats(-3, 4))
def test_a_value_stays_between_both_ends_and_ends_exactly(kind: Curve, first: float, last: float, x: float) -> None:
    value = between(kind, first, last, x)
    assert min(first, last) - 1e-9 <= value <= max(first, last) + 1e-9
    assert between(kind, first, last, 1.0) == last
    assert between(kind, first, last, 0.0) == first


@given(
    start=st.integers(0, 40).map(lambda n: n / 8),
    length=st.floats(0, 6),
    frequency=st.sampled_from([0.01, 0.1, 0.3, 0.5, 0.7, 1.0, 2.0]),
    steps_per_epoch=st.sampled_from([1, 3, 7, 10, 64, 391]),
    step=st.integers(0, 4000),
)
def test_the_latest_point_is_the_last_one_that_is_due(
    start: float, length: float, frequency: float, steps_per_epoch: int, step: int
) -> None:
    end = start + length
    grid = UpdateGrid(Window(start, end), frequency)
    got = grid.latest(Clock(step, step / steps_per_epoch, steps_per_epoch))

    # By walking all points in exact arithmetic, with the tolerance of a millionth of a step.
    def due(point: float) -> bool:
        return step >= Fraction(point) * steps_per_epoch - Fraction(1, 999_999)

    points = [min(start + k * frequency, end) for k in range(int(length / frequency) + 2)] + [end]
    passed = [point for point in points if due(point)]
    if not passed:
        assert got is None
    else:
        assert got == pytest.approx(max(passed), abs=1e-9)


@given(
    frequency=st.sampled_from([-1.0, 0.01, 0.7, 2.0, 50.0]),
    end=st.sampled_from([0.0, 0.95, 1.0, 3.33, 10 / 7]),
    steps_per_epoch=st.integers(1, 400),
)
def test_the_end_is_reached_at_its_step_whatever_the_frequency(
    frequency: float, end: float, steps_per_epoch: int
) -> None:
    step = math.ceil(end * steps_per_epoch - 1e-6)
    assert UpdateGrid(Window(0.0, end), frequency).latest(Clock(step, step / steps_per_epoch, steps_per_epoch)) == end
    if step:
        before = UpdateGrid(Window(0.0, end), frequency).latest(
            Clock(step - 1, (step - 1) / steps_per_epoch, steps_per_epoch)
        )
        assert before is not None and before < end


@given(st.integers(1, 400), st.sampled_from([0.1, 0.3, 0.5, 1.0]))
def test_points_do_not_depend_on_where_a_run_resumes(steps_per_epoch: int, frequency: float) -> None:
    grid = UpdateGrid(Window(0.5, 2.5), frequency)
    seen = {grid.latest(Clock(s, s / steps_per_epoch, steps_per_epoch)) for s in range(3 * steps_per_epoch + 1)}
    allowed = {min(0.5 + k * frequency, 2.5) for k in range(100)} | {2.5, None}
    assert seen <= allowed


def test_every_step_is_a_point_at_frequency_minus_one() -> None:
    grid = UpdateGrid(Window(1.0, 2.0), -1)
    points = [grid.latest(Clock(step, step / 4, 4)) for step in range(11)]
    assert points == [None] * 4 + [1.0, 1.25, 1.5, 1.75, 2.0, 2.0, 2.0]


def test_without_steps_per_epoch_points_come_at_whole_epochs() -> None:
    grid = UpdateGrid(Window(0.5, 2.0), 0.5)
    assert [grid.latest(Clock(step=9, epoch=float(epoch))) for epoch in (0, 1, 2, 3)] == [None, 1.0, 2.0, 2.0]


def test_windows_that_touch_do_not_overlap() -> None:
    assert not Window(0, 2).overlaps(Window(2, 4))
    assert Window(0, 2.1).overlaps(Window(2, 4))
    assert Window.of(-1, -1).overlaps(Window(100, 101))


def test_an_empty_window_has_passed() -> None:
    assert Window(3.0, 3.0).progress(3.0) == 1.0
    assert UpdateGrid(Window(3.0, 3.0), 1.0).latest(Clock(3, 3.0, 1)) == 3.0
    assert UpdateGrid(Window(3.0, 3.0), 1.0).latest(Clock(2, 2.0, 1)) is None


@pytest.mark.parametrize("frequency", [1e-17, 1e-300, 1e-9])
def test_updates_finer_than_a_step_come_at_every_step(frequency: float) -> None:
    for end in (10.0, 1e9, 1e300):
        grid = UpdateGrid(Window(0.0, end), frequency)
        assert [grid.latest(Clock(step, step / 4, 4)) for step in range(4)] == pytest.approx([0, 0.25, 0.5, 0.75])
    # There floats lie 128 apart.
    assert UpdateGrid(Window(0.0, 1e300), 1e-3).latest(Clock(10**18, 1e18, 1)) == 1e18
