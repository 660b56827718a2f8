"""k-means: of numbers the best there is, of vectors a good one, and zeros stay zero."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from sparsify.palettization import kmeans as subject
from sparsify.palettization.kmeans import kmeans, kmeans_vectors, nearest_numbers, nearest_vectors

DRAWS = {
    "normal": lambda g, n: g.standard_normal(n),
    "heavy tails": lambda g, n: g.standard_cauchy(n),
    "ties": lambda g, n: g.integers(-6, 7, n) / 4,
    "all below zero": lambda g, n: -g.exponential(1, n) - 0.5,
}


def error(values: np.ndarray, centers: np.ndarray, importance: np.ndarray | None = None) -> float:
    distance = (values[:, None] - centers[None]).__abs__().min(1) ** 2
    return float((distance if importance is None else distance * importance).sum())


def least(values: np.ndarray, count: int, importance: np.ndarray | None, zero: bool) -> float:
    """The least error of all ways to cut the sorted values into intervals."""
    order = np.argsort(values)
    v, w = values[order], (np.ones(len(values)) if importance is None else importance)[order]
    best = np.inf
    for ends in combinations(range(1, len(v)), min(count - zero, len(v)) - 1):
        parts = np.split(np.arange(len(v)), ends)
        means = [np.average(v[p], weights=w[p]) if w[p].any() else v[p][0] for p in parts]
        best = min(best, error(v, np.array([*means, 0.0] if zero else means), w))
    return best


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_no_other_centers_have_a_smaller_error(draw: str, weighted: bool, count: int) -> None:
    generator = np.random.default_rng(count)
    values = DRAWS[draw](generator, 11)
    importance = generator.exponential(1, 11) if weighted else None
    centers = kmeans(values, count, importance)
    assert len(centers) <= count
    assert (np.diff(centers) > 0).all()
    assert error(values, centers, importance) <= least(values, count, importance, zero=False) * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_zero_is_exact_and_the_others_are_the_best_beside_it(draw: str, count: int) -> None:
    generator = np.random.default_rng(count)
    values = np.append(DRAWS[draw](generator, 9), 0.0)
    centers = kmeans(values, count, zero=True)
    assert 0.0 in centers
    assert len(centers) <= count
    assert error(values, centers) <= least(values, count, None, zero=True) * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("draw", ["normal", "heavy tails"])
@pytest.mark.parametrize(("count", "bound"), [(2, 1e-9), (16, 1e-5), (64, 2e-3)])
def test_of_many_values_the_error_is_nearly_the_least(
    draw: str, count: int, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = DRAWS[draw](np.random.default_rng(0), 3000)
    exact = error(values, kmeans(values, count))
    monkeypatch.setattr(subject, "EXACT_SIZE", 0)
    monkeypatch.setattr(subject, "MOST_PLACES", 256)
    assert error(values, kmeans(values, count)) <= exact * (1 + bound)


@pytest.mark.parametrize("values", [[3.0], [1.0, 1.0, 1.0], [0.0, 0.0], [1.0, 2.0], [-1e30, 1e-30, 1e30]])
def test_few_different_values_are_their_own_centers(values: list[float]) -> None:
    assert kmeans(np.array(values), 4).tolist() == sorted(set(values))
    assert kmeans(np.array(values), 4, zero=True).tolist() == sorted({0.0, *values})


def test_importance_of_nothing_is_that_of_all_alike() -> None:
    values = np.random.default_rng(0).standard_normal(50)
    assert np.array_equal(kmeans(values, 3, np.zeros(50)), kmeans(values, 3))


def test_the_nearest_of_the_centers_is_found() -> None:
    generator = np.random.default_rng(0)
    values, centers = generator.standard_normal(200), np.sort(generator.standard_normal(7))
    assert np.array_equal(nearest_numbers(values, centers), np.abs(values[:, None] - centers).argmin(1))
    vectors, rows = generator.standard_normal((200, 2)), generator.standard_normal((7, 2))
    assert np.array_equal(nearest_vectors(vectors, rows)[0], ((vectors[:, None] - rows) ** 2).sum(2).argmin(1))


def test_vectors_that_lie_together_have_one_center_and_zero_stays() -> None:
    generator = np.random.default_rng(0)
    true = np.array([[0, 0], [5, 5], [-5, 5], [5, -5]])
    vectors = true[generator.integers(0, 4, 400)] + generator.standard_normal((400, 2)) * 0.01
    vectors[:3] = 0.0
    centers = kmeans_vectors(vectors, 4, zero=True)
    assert np.array_equal(centers[0], [0.0, 0.0])
    assert np.abs(centers[np.lexsort(centers.round().T)] - true[np.lexsort(true.T)]).max() < 0.01
    assert np.array_equal(centers, kmeans_vectors(vectors, 4, zero=True))
    assert kmeans_vectors(true, 8).shape == (4, 2)
