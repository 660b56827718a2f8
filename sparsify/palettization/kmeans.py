"""The few values that stand for many with the least squared error: k-means, of numbers and of vectors.

Clusters of numbers are intervals, so that the best ones are found by dynamic programming (Wang & Song 2011,
https://journal.r-project.org/articles/RJ-2011-015/), not from random starts. Up to 2^20 distinct values times clusters
the result is the best there is. Of more, the recursion runs over about a thousand places where intervals may end; then
each end moves to the best of all values around it, all ends at once, and the recursion runs again over places within
the intervals, until nothing is gained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__: list[str] = []

DoubleArray = np.ndarray[Any, np.dtype[np.float64]]
Places = np.ndarray[Any, np.dtype[np.int64]]

EXACT_SIZE = 2**20
"""Distinct values times clusters up to which every value may begin an interval."""
MOST_PLACES = 1024
"""Ends of intervals that the recursion tries of more."""
TRIED_AROUND = 8
"""Places to each side of an interval's end that are tried when it is moved."""
MOST_MOVES = 100
MOST_ROUNDS = 12
LEAST_GAIN = 1e-9
VECTOR_STARTS = 3
VECTOR_ITERATIONS = 60
CHUNK = 2**22
"""Distances between vectors and centers that are held at once."""


def kmeans(values: np.ndarray, count: int, importance: np.ndarray | None = None, *, zero: bool = False) -> DoubleArray:
    """At most `count` numbers, ascending, with the least sum of importance x squared distance to the nearest.

    Args:
        values: numbers in any shape, finite.
        count: how many, 1 or more; fewer come back where fewer values differ.
        importance: of each value, 0 or more, in the shape of `values`; None, or nothing but zeros: all alike.
        zero: True: one of the numbers is exactly 0, and the others are the best beside it.
    """
    points, weights = _distinct(values, importance)
    if zero and not (points == 0).any():
        at = int(np.searchsorted(points, 0.0))
        points, weights = np.insert(points, at, 0.0), np.insert(weights, at, 0.0)
    if len(points) <= count:
        return points
    if count == 1:
        return np.zeros(1) if zero else np.array([np.average(points, weights=weights)])
    sums = _Sums.of(points, weights)
    places = np.arange(len(points) + 1) if len(points) * count <= EXACT_SIZE else _first_places(points, weights)
    zero_at = int(np.searchsorted(points, 0.0)) if zero else None
    ends, pinned = _recursion(sums, places, count, zero_at)
    error = np.inf
    for _ in range(MOST_ROUNDS if len(places) <= len(points) else 0):
        ends = _ends_moved(sums, ends, pinned)
        before, error = error, sums.error(ends, pinned)
        if not error < before * (1 - LEAST_GAIN):
            break
        ends, pinned = _recursion(sums, _places_within(points, ends), count, zero_at)
    centers = sums.means(ends[:-1], ends[1:])
    if pinned is not None:
        centers[pinned] = 0.0
    found: DoubleArray = np.unique(centers[~np.isnan(centers)])
    return found


def nearest_numbers(values: np.ndarray, centers: np.ndarray) -> Places:
    """The index of the nearest of `centers`, which ascend, for each of `values`; the lower of two that are as near."""
    between = (centers[1:].astype(np.float64) + centers[:-1].astype(np.float64)) / 2
    return np.searchsorted(between, values, side="left").astype(np.int64)


def kmeans_vectors(
    vectors: np.ndarray, count: int, importance: np.ndarray | None = None, *, zero: bool = False
) -> DoubleArray:
    """At most `count` vectors, in rows, with a small sum of importance x squared distance to the nearest.

    Lloyd's iterations from three starts of k-means++ (Arthur & Vassilvitskii 2007,
    https://theory.stanford.edu/~sergei/papers/kMeansPP-soda.pdf), with a generator of their own: the same every time.

    Args:
        vectors: one in each row, finite.
        count: how many, 1 or more; fewer come back where fewer differ.
        importance: of each row, 0 or more; None, or nothing but zeros: all alike.
        zero: True: the first of them is the zero vector.
    """
    rows, inverse = np.unique(np.asarray(vectors, np.float64), axis=0, return_inverse=True)
    given = None if importance is None else np.asarray(importance, np.float64).reshape(-1)
    usable = given if given is not None and given.any() else None
    weights = np.bincount(inverse.reshape(-1), usable, len(rows)).astype(np.float64)
    if zero:
        weights[~rows.any(1)] = 0.0
    if len(rows) + (zero and bool(rows.any(1).all())) <= count:
        return np.concatenate([np.zeros((1, rows.shape[1])), rows[rows.any(1)]]) if zero else rows
    generator, best, least = np.random.default_rng(0), rows[:count], np.inf
    for _ in range(VECTOR_STARTS):
        centers = _spread_starts(rows, weights, count, zero, generator)
        for _ in range(VECTOR_ITERATIONS):
            codes = nearest_vectors(rows, centers)[0]
            moved = centers.copy()
            totals = np.bincount(codes, weights, count)
            for d in range(rows.shape[1]):
                sums = np.bincount(codes, weights * rows[:, d], count)
                np.divide(sums, totals, out=moved[:, d], where=totals > 0)
            if zero:
                moved[0] = 0.0
            if np.array_equal(moved, centers):
                break
            centers = moved
        error = float((weights * nearest_vectors(rows, centers)[1]).sum())
        if error < least:
            best, least = centers, error
    return best


def nearest_vectors(vectors: np.ndarray, centers: np.ndarray) -> tuple[Places, DoubleArray]:
    """(index of the nearest of `centers`, squared distance to it) for each row of `vectors`."""
    codes, distances = np.empty(len(vectors), np.int64), np.empty(len(vectors))
    norms = (centers.astype(np.float64) ** 2).sum(1)
    rows = max(1, CHUNK // len(centers))
    for start in range(0, len(vectors), rows):
        part = np.asarray(vectors[start : start + rows], np.float64)
        codes[start : start + rows] = (norms - 2 * part @ centers.T).argmin(1)
        distances[start : start + rows] = ((part - centers[codes[start : start + rows]]) ** 2).sum(1)
    return codes, distances


# ---------------------------------------------------------------------- numbers


@dataclass(frozen=True)
class _Sums:
    """Sums over the first i values, for i from 0 on: of weights, weights x value, weights x value^2."""

    weight: DoubleArray
    first: DoubleArray
    second: DoubleArray

    @classmethod
    def of(cls, points: DoubleArray, weights: DoubleArray) -> _Sums:
        def summed(terms: DoubleArray) -> DoubleArray:
            return np.concatenate([np.zeros(1), np.cumsum(terms)])

        return cls(summed(weights), summed(weights * points), summed(weights * points**2))

    def errors(self, start: Places, end: Places) -> DoubleArray:
        """The squared error of the values from `start` to before `end` around their mean."""
        weight, first = self.weight[end] - self.weight[start], self.first[end] - self.first[start]
        explained = np.divide(first**2, weight, out=np.zeros_like(first), where=weight > 0)
        found: DoubleArray = np.maximum(self.second[end] - self.second[start] - explained, 0.0)
        return found

    def mirrored(self) -> _Sums:
        """The sums of the values in the opposite order."""
        return _Sums(*(sums[-1] - sums[::-1] for sums in (self.weight, self.first, self.second)))

    def error(self, ends: Places, pinned: int | None) -> float:
        """The error of all intervals between `ends`; the pinned one's around 0."""
        errors = self.errors(ends[:-1], ends[1:])
        if pinned is not None:
            errors[pinned] = self.second[ends[pinned + 1]] - self.second[ends[pinned]]
        return float(errors.sum())

    def means(self, start: Places, end: Places) -> DoubleArray:
        """Their mean; NaN where there are none."""
        weight, first = self.weight[end] - self.weight[start], self.first[end] - self.first[start]
        return np.divide(first, weight, out=np.full_like(first, np.nan), where=weight > 0)


def _distinct(values: np.ndarray, importance: np.ndarray | None) -> tuple[DoubleArray, DoubleArray]:
    flat = np.asarray(values).reshape(-1)
    given = None if importance is None else np.asarray(importance, np.float64).reshape(-1)
    if given is None or not given.any():
        points, counts = np.unique(flat, return_counts=True)
        return points.astype(np.float64), counts.astype(np.float64)
    points, inverse = np.unique(flat, return_inverse=True)
    return points.astype(np.float64), np.bincount(inverse.reshape(-1), given, len(points)).astype(np.float64)


def _first_places(points: DoubleArray, weights: DoubleArray) -> Places:
    """Where intervals may end, ascending, 0 and the number of points among them."""
    total = len(points)
    # As many by number as by distance: few values far out need intervals of their own.
    steps = np.arange(MOST_PLACES // 2 + 1) / (MOST_PLACES // 2)
    mass = np.cumsum(weights)
    by_number = np.searchsorted(mass, steps * mass[-1])
    by_distance = np.searchsorted(points, points[0] + steps * (points[-1] - points[0]))
    return np.unique(np.concatenate([by_number, by_distance, [0, total]]))


def _places_within(points: DoubleArray, ends: Places) -> Places:
    """As many places in each interval, by number and by distance, with its ends."""
    start, end = ends[:-1, None], ends[1:, None]
    parts = max(8, MOST_PLACES // (len(ends) - 1) // 2)
    steps = np.arange(1, parts) / parts
    by_number = start + np.rint((end - start) * steps).astype(np.int64)
    low, high = points[np.minimum(start, len(points) - 1)], points[np.maximum(end - 1, 0)]
    by_distance = np.searchsorted(points, low + (high - low) * steps)
    return np.unique(np.concatenate([ends, by_number.reshape(-1), by_distance.reshape(-1)]))


def _recursion(sums: _Sums, places: Places, count: int, zero_at: int | None) -> tuple[Places, int | None]:
    """(ends of the best intervals over `places`, from 0 to the last; the interval whose value is 0, if one is)."""
    if zero_at is None:
        return np.array(_Table(sums, places, count).ends(count, len(places) - 1)), None
    total = len(sums.weight) - 1
    low = _Table(sums, np.unique([*places[places <= zero_at], zero_at]), count - 1)
    high = _Table(sums.mirrored(), np.unique([*(total - places[places > zero_at]), total - zero_at - 1]), count - 1)
    # The interval around zero costs the difference of two sums, so that both of its ends are chosen alone.
    lows = low.costs - sums.second[low.places]
    highs = high.costs + sums.second[total - high.places]
    below = min(range(count), key=lambda m: float(lows[m].min() + highs[count - 1 - m].min()))
    first = low.ends(below, int(lows[below].argmin()))
    last = high.ends(count - 1 - below, int(highs[count - 1 - below].argmin()))
    return np.array([*first, *(total - end for end in reversed(last))]), below


class _Table:
    """The least error of m intervals that lie side by side from the first place on, up to each place.

    `costs[m, i]`: of m intervals up to the i-th place; some of them may be empty. The last interval begins no earlier
    for a later place, which bounds where it is looked for: first for the place in the middle, then for those in the
    middle of both halves, and so on.
    """

    def __init__(self, sums: _Sums, places: Places, most: int) -> None:
        self.places = places
        size = len(places)
        self.costs, self._from = np.full((most + 1, size), np.inf), np.zeros((most + 1, size), np.int64)
        self.costs[0, 0] = 0.0
        strides = [2**e for e in range(size.bit_length() - 1, -1, -1)]
        levels = [np.arange(stride - 1, size, 2 * stride) for stride in strides]
        for m in range(1, most + 1):
            if m == 1:
                self.costs[1] = sums.errors(places[:1], places)
                continue
            before, cost, origin = self.costs[m - 1], self.costs[m], self._from[m]
            for stride, middle in zip(strides, levels, strict=True):
                low = np.where(middle >= stride, origin[middle - stride], 0)
                after = middle + stride
                high = np.where(after < size, np.minimum(origin[np.minimum(after, size - 1)], middle), middle)
                lengths = high - low + 1
                begin = np.cumsum(lengths) - lengths
                which = np.repeat(np.arange(len(middle)), lengths)
                tried = np.arange(len(which)) + (low - begin)[which]
                totals = before[tried] + sums.errors(places[tried], places[middle][which])
                cost[middle] = np.minimum.reduceat(totals, begin)
                best = np.flatnonzero(totals == cost[middle][which])[::-1]
                origin[middle[which[best]]] = tried[best]

    def ends(self, intervals: int, place: int) -> list[int]:
        """The ends of so many intervals up to the place with this index, from the first place on."""
        found = [place]
        for m in range(intervals, 0, -1):
            found.append(int(self._from[m, found[-1]]))
        return [int(self.places[at]) for at in reversed(found)]


def _ends_moved(sums: _Sums, ends: Places, pinned: int | None) -> Places:
    """`ends`, each moved to the best place around it, all at once, until none moves any more."""
    total = len(sums.weight) - 1
    inner = ends[1:-1].copy()
    steps = np.maximum((ends[2:] - ends[:-2]) // TRIED_AROUND, 1)
    for _ in range(MOST_MOVES):
        steps = np.maximum(steps // 2, 1)
        offsets = np.arange(-TRIED_AROUND, TRIED_AROUND + 1)
        around = np.clip(inner[:, None] + offsets * steps[:, None], 0, total)
        cost, origin = _interval_error(sums, np.zeros(1, np.int64), around[0], pinned == 0)[0], []
        for j in range(1, len(inner)):
            totals = cost[:, None] + _interval_error(sums, around[j - 1], around[j], pinned == j)
            origin.append(totals.argmin(0))
            cost = totals.min(0)
        last = cost + _interval_error(sums, around[-1], np.array([total]), pinned == len(inner))[:, 0]
        chosen = [int(last.argmin())]
        for back in reversed(origin):
            chosen.append(int(back[chosen[-1]]))
        new = around[np.arange(len(inner)), chosen[::-1]]
        if np.array_equal(new, inner) and (steps == 1).all():
            break
        inner = new
    return np.concatenate([ends[:1], inner, ends[-1:]])


def _interval_error(sums: _Sums, starts: Places, ends: Places, pinned: bool) -> DoubleArray:
    start, end = starts[:, None], ends[None]
    errors = sums.second[end] - sums.second[start] if pinned else sums.errors(start, end)
    return np.where(start <= end, errors, np.inf)


# ---------------------------------------------------------------------- vectors


def _spread_starts(
    rows: DoubleArray, weights: DoubleArray, count: int, zero: bool, generator: np.random.Generator
) -> DoubleArray:
    """Starts of k-means++: each next one drawn by its distance to those before."""
    first = np.zeros(rows.shape[1]) if zero else rows[generator.choice(len(rows), p=weights / weights.sum())]
    centers = [first]
    distances = ((rows - first) ** 2).sum(1)
    while len(centers) < count:
        chances = weights * distances
        total = chances.sum()
        if not total > 0:
            centers.append(rows[int(distances.argmax())])
        else:
            centers.append(rows[generator.choice(len(rows), p=chances / total)])
        distances = np.minimum(distances, ((rows - centers[-1]) ** 2).sum(1))
    return np.array(centers)
