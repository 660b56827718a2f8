"""Second-order scores and moves against a dense inverse of the Fisher matrix, in float64."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparsify.errors import ArgumentError
from sparsify.pruning import second_order

DAMP = 1e-3
SHAPES = [(6, 7), (3, 5, 2), (13,), (1,)]


def problem(shape: tuple[int, ...], count: int = 9, dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(sum(shape))
    return torch.randn(shape, dtype=dtype), [torch.randn(shape, dtype=dtype) for _ in range(count)]


def dense_fisher(gradients: list[Tensor], size: int, damp: float = DAMP) -> Tensor:
    """The whole matrix, zero outside of the blocks."""
    flat = torch.stack([gradient.reshape(-1) for gradient in gradients]).double()
    n = flat.shape[1]
    same = (torch.arange(n) // size)[:, None] == (torch.arange(n) // size)[None, :]
    return flat.T @ flat / len(gradients) * same + damp * torch.eye(n, dtype=torch.float64)


def some_mask(shape: tuple[int, ...], share: float, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) >= share


def scores_by(way: str, weight: Tensor, gradients: list[Tensor], size: int, kept: Tensor | None, pages: int) -> Tensor:
    if way == "mfac":
        flat = [gradient.reshape(-1) for gradient in gradients]
        return second_order.mfac_scores(weight, flat, len(flat), size, DAMP, kept, pages)
    sums = second_order.fisher_sums(weight, size)
    for at in range(0, len(gradients), 4):
        second_order.add_gradients(sums, gradients[at : at + 4])
    return second_order.fisher_scores(weight, sums, len(gradients), DAMP, kept)


def update_by(way: str, weight: Tensor, gradients: list[Tensor], size: int, mask: Tensor, pages: int) -> Tensor:
    if way == "mfac":
        flat = [gradient.reshape(-1) for gradient in gradients]
        return second_order.mfac_update(weight, flat, len(flat), size, DAMP, mask, pages)
    sums = second_order.fisher_sums(weight, size)
    second_order.add_gradients(sums, gradients)
    return second_order.fisher_update(weight, sums, len(gradients), DAMP, mask)


WAYS = [("fisher", 1), ("mfac", 1), ("mfac", 7), ("mfac", 1000)]


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize(("way", "pages"), WAYS)
@pytest.mark.parametrize("shape", SHAPES)
def test_scores_are_those_of_the_dense_inverse(shape: tuple[int, ...], way: str, pages: int, size: int) -> None:
    weight, gradients = problem(shape)
    inverse = torch.linalg.inv(dense_fisher(gradients, size))
    wanted = weight.reshape(-1) ** 2 / (2 * inverse.diagonal())
    found = scores_by(way, weight, gradients, size, None, pages)
    torch.testing.assert_close(found.reshape(-1), wanted, rtol=1e-8, atol=0)


@pytest.mark.parametrize("size", [4, 1000])
@pytest.mark.parametrize(("way", "pages"), WAYS)
@pytest.mark.parametrize("shape", SHAPES)
def test_scores_of_what_is_kept_are_those_of_the_smaller_matrix(
    shape: tuple[int, ...], way: str, pages: int, size: int
) -> None:
    weight, gradients = problem(shape)
    kept = some_mask(shape, 0.5)
    flat = kept.reshape(-1)
    inverse = torch.linalg.inv(dense_fisher(gradients, size)[flat][:, flat])
    wanted = torch.zeros(weight.numel(), dtype=torch.float64)
    wanted[flat] = weight.reshape(-1)[flat] ** 2 / (2 * inverse.diagonal())
    found = scores_by(way, weight, gradients, size, kept, pages)
    torch.testing.assert_close(found.reshape(-1), wanted, rtol=1e-8, atol=0)


@pytest.mark.parametrize("size", [4, 1000])
@pytest.mark.parametrize(("way", "pages"), WAYS)
@pytest.mark.parametrize("shape", SHAPES)
def test_one_weight_that_goes_moves_the_others_by_the_column_of_the_inverse(
    shape: tuple[int, ...], way: str, pages: int, size: int
) -> None:
    weight, gradients = problem(shape)
    inverse = torch.linalg.inv(dense_fisher(gradients, size))
    for i in range(0, weight.numel(), 5):
        mask = torch.ones(weight.numel(), dtype=torch.bool)
        mask[i] = False
        wanted = weight.reshape(-1) - weight.reshape(-1)[i] * inverse[:, i] / inverse[i, i]
        found = update_by(way, weight, gradients, size, mask.view(shape), pages).reshape(-1)
        assert found[i] == 0
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("size", [4, 1000])
@pytest.mark.parametrize(("way", "pages"), WAYS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_move_is_where_the_quadratic_is_lowest_under_the_mask(
    shape: tuple[int, ...], way: str, pages: int, size: int
) -> None:
    weight, gradients = problem(shape)
    fisher, mask = dense_fisher(gradients, size), some_mask(shape, 0.6, seed=5)
    found = update_by(way, weight, gradients, size, mask, pages)
    slope = fisher @ (found - weight).reshape(-1)
    assert torch.equal(found == 0, ~mask)
    assert not mask.any() or slope[mask.reshape(-1)].abs().max().item() < 1e-9


@pytest.mark.parametrize("way", ["fisher", "mfac"])
def test_the_predicted_increase_is_that_of_a_quadratic(way: str) -> None:
    """The loss of a linear regression at its minimum, with gradients that have its Hessian."""
    torch.manual_seed(0)
    inputs = torch.randn(40, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64)
    target = torch.randn(40, dtype=torch.float64)
    gradients = list(inputs)  # (1/2) mean of squares: the Hessian is the mean of x x^T
    weight = torch.linalg.solve(inputs.T @ inputs / 40 + DAMP * torch.eye(8).double(), inputs.T @ target / 40)

    def loss(w: Tensor) -> float:
        return (0.5 * (inputs @ w - target).square().mean() + 0.5 * DAMP * w.square().sum()).item()

    scores = scores_by(way, weight, gradients, 8, None, 1)
    for i in range(8):
        mask = torch.arange(8) != i
        moved = update_by(way, weight, gradients, 8, mask, 1)
        assert loss(moved) - loss(weight) == pytest.approx(scores[i].item(), rel=1e-8)
        assert loss(moved) < loss(weight * mask)


@pytest.mark.parametrize("way", ["fisher", "mfac"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_close(way: str, dtype: torch.dtype) -> None:
    weight, gradients = problem((8, 16), 200, dtype)
    scores = scores_by(way, weight, gradients, 16, None, 1)
    exact = weight.double().reshape(-1) ** 2 / (2 * torch.linalg.inv(dense_fisher(gradients, 16)).diagonal())
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.reshape(-1).double(), exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("way", ["fisher", "mfac"])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e6])
def test_fewer_gradients_than_weights_still_solve_with_next_to_no_dampening(way: str, scale: float) -> None:
    torch.manual_seed(0)
    weight, gradients = torch.randn(50), [torch.randn(50) * scale for _ in range(3)]
    scores = scores_by(way, weight, gradients, 50, None, 1)
    moved = update_by(way, weight, gradients, 50, some_mask((50,), 0.7), 1)
    assert scores.isfinite().all() and (scores >= 0).all() and moved.isfinite().all()


@pytest.mark.parametrize("way", ["fisher", "mfac"])
def test_infinite_gradients_give_nan_and_no_numbers(way: str) -> None:
    weight, gradients = problem((6,))
    gradients[3][2] = torch.inf
    assert not scores_by(way, weight, gradients, 6, None, 1).isfinite().all()


def test_work_goes_in_pages_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gradients = problem((12, 11))
    mask = some_mask((12, 11), 0.5)
    ways = list(itertools.product(["fisher", "mfac"], [10, 132]))
    whole = [
        (scores_by(w, weight, gradients, b, None, 1), update_by(w, weight, gradients, b, mask, 1)) for w, b in ways
    ]
    monkeypatch.setattr(second_order, "PAGE", 100)
    for (way, size), (scores, moved) in zip(ways, whole, strict=True):
        torch.testing.assert_close(scores_by(way, weight, gradients, size, None, 1), scores)
        torch.testing.assert_close(update_by(way, weight, gradients, size, mask, 1), moved)


def test_sums_forget_with_keep() -> None:
    weight, gradients = problem((5,), 2)
    sums = second_order.fisher_sums(weight, 5)
    second_order.add_gradients(sums, gradients[:1])
    second_order.add_gradients(sums, gradients[1:], keep=0.25)
    torch.testing.assert_close(sums[0], 0.25 * gradients[0].outer(gradients[0]) + gradients[1].outer(gradients[1]))


def test_memory_bounds_hold_and_are_near() -> None:
    parameters = [torch.zeros(1000, 300), torch.zeros(7)]
    need = second_order.fisher_bytes(parameters, 50)
    held = sum(4 * second_order.fisher_sums(p, 50).numel() for p in parameters)
    assert held < need < held + 4 * (second_order.FISHER_ROWS + 2) * 300_100 + 6 * 8 * second_order.PAGE + 1000
    kept, work = second_order.mfac_bytes(parameters, 64)
    assert kept == 4 * 65 * 300_007 and work == 12 * 8 * second_order.PAGE + 8 * 300_007


def test_what_does_not_fit_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(second_order, "free_bytes", lambda device: 10**9)
    second_order.refuse_beyond(10**9, torch.device("cpu"), who="X", lower="num_grads")
    with pytest.raises(ArgumentError, match=r"X needs up to 2\.00 GB on cpu, and 1\.00 GB are free\. Lower num_grads"):
        second_order.refuse_beyond(2 * 10**9, torch.device("cpu"), who="X", lower="num_grads")
    monkeypatch.setattr(second_order, "free_bytes", lambda device: None)
    second_order.refuse_beyond(2**60, torch.device("cpu"), who="X", lower="num_grads")


def test_free_memory_is_known_where_the_system_says_it() -> None:
    free = second_order.free_bytes(torch.device("cpu"))
    assert (free is not None and free > 0) or not Path("/proc/meminfo").exists()
    assert second_order.free_bytes(torch.device("meta")) is None
