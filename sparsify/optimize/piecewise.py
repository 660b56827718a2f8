"""Piecewise linear curves over levels of sparsity: values between points, and where a value is reached. Pure floats."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

__all__: list[str] = []


def slope(one: tuple[float, float], other: tuple[float, float]) -> float:
    """Slope of the line from one point to another."""
    return (other[1] - one[1]) / (other[0] - one[0])


def at(levels: Sequence[float], values: Sequence[float], level: float) -> float:
    """The value at `level`, on the line between the two levels next to it; the last one's beyond it."""
    right = bisect_left(levels, level)
    if right >= len(levels):
        return values[-1]
    if levels[right] == level or right == 0:
        return values[right]
    before, after = levels[right - 1], levels[right]
    return values[right - 1] + (values[right] - values[right - 1]) * ((level - before) / (after - before))


def reaches(levels: Sequence[float], falling: Sequence[float], wanted: float) -> float:
    """The first level at which `falling` is at most `wanted`; the last where it never is."""
    for number, value in enumerate(falling):
        if value <= wanted:
            if number == 0:
                return levels[0]
            above = falling[number - 1]
            return levels[number - 1] + (levels[number] - levels[number - 1]) * ((above - wanted) / (above - value))
    return levels[-1]


def within(levels: Sequence[float], rising: Sequence[float], allowed: float) -> float:
    """The last level at which `rising` is at most `allowed`."""
    number = bisect_right(rising, allowed)
    if number >= len(levels):
        return levels[-1]
    if number == 0:
        return 0.0
    below, above = rising[number - 1], rising[number]
    return levels[number - 1] + (levels[number] - levels[number - 1]) * ((allowed - below) / (above - below))
