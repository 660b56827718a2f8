"""Differentiable k-means against the formulas written out, with autograd's own gradients; chunks change nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsify.palettization import soft_kmeans
from sparsify.palettization.soft_kmeans import looked_up, means_of, nearest_codes, soft_means, soft_values


def written_out(weights: Tensor, values: Tensor, tau: Tensor, pinned: Tensor) -> tuple[Tensor, Tensor]:
    """(the new values, the weights that are made) as the paper has it."""

    def shares(by: Tensor) -> Tensor:
        distances = ((weights[:, :, None] - by[:, None]) ** 2).sum(3)
        return torch.softmax(-distances / tau[:, None, None], 2)

    first = shares(values) * ((weights != 0).any(2) | ~pinned.any(1, keepdim=True))[:, :, None]
    means = torch.einsum("pnk,pnd->pkd", first, weights) / first.sum(1)[:, :, None]
    means = torch.where(pinned[:, :, None], values, means)
    made = torch.einsum("pnk,pkd->pnd", shares(means), means)
    return means, made


def example(cluster_dim: int, zeros: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(4)
    weights = torch.randn(2, 40, cluster_dim, generator=draw, dtype=torch.float64)
    values = torch.randn(2, 4, cluster_dim, generator=draw, dtype=torch.float64)
    pinned = torch.zeros(2, 4, dtype=torch.bool)
    if zeros:
        weights[0, :25] = 0.0
        values[0, 1], pinned[0, 1] = 0.0, True
    return weights, values, torch.tensor([0.5, 0.8], dtype=torch.float64), pinned


@pytest.mark.parametrize("chunk", [2**22, 40])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("cluster_dim", [1, 2, 3])
def test_values_and_gradients_are_those_of_the_formulas(
    cluster_dim: int, zeros: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soft_kmeans, "SHARES_AT_ONCE", chunk)
    weights, values, tau, pinned = example(cluster_dim, zeros)
    mine, theirs = weights.clone().requires_grad_(), weights.clone().requires_grad_()
    means = soft_means(mine, values, tau, pinned)
    made = soft_values(mine, means, tau, pinned)
    wanted_means, wanted = written_out(theirs, values, tau, pinned)
    kept = (weights == 0) & pinned.any(1)[:, None, None]
    torch.testing.assert_close(means, wanted_means)
    torch.testing.assert_close(made, wanted.masked_fill(kept, 0.0))
    slopes = torch.randn(made.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (made * slopes).sum().backward()
    (wanted * slopes).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad)


def test_a_value_that_no_weight_is_near_stays_where_it_is() -> None:
    weights = torch.zeros(1, 5, 1) + torch.linspace(0.9, 1.1, 5).reshape(1, 5, 1)
    values = torch.tensor([[[1.0], [100.0]]])
    means = soft_means(weights, values, torch.tensor([0.01]))
    torch.testing.assert_close(means, values)


@pytest.mark.parametrize("cluster_dim", [1, 2])
def test_the_nearest_value_is_found(cluster_dim: int) -> None:
    weights, values, _, _ = example(cluster_dim, False)
    wanted = ((weights[:, :, None] - values[:, None]) ** 2).sum(3).argmin(2)
    assert torch.equal(nearest_codes(weights, values), wanted)


def test_means_are_those_of_the_weights_of_a_code_and_zeros_pull_at_none() -> None:
    weights = torch.tensor([0.0, 1.0, 5.0, 0.0, -2.0]).reshape(1, 5, 1)
    codes = torch.tensor([[0, 1, 1, 1, 2]])
    values = torch.tensor([0.0, 9.0, 9.0, 7.0]).reshape(1, 4, 1)
    pinned = torch.tensor([[True, False, False, False]])
    means = means_of(weights, codes, values, pinned)
    assert means.flatten().tolist() == [0.0, 3.0, -2.0, 7.0]
    assert looked_up(means, codes).flatten().tolist() == [0.0, 3.0, 3.0, 3.0, -2.0]
    assert means_of(weights, codes, values, torch.zeros_like(pinned)).flatten().tolist() == [0.0, 2.0, -2.0, 7.0]
