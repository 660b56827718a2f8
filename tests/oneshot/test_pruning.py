"""Pruning without training: how many zeros, where, and that the other weights make up for them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify import ArgumentError, DataError, TargetError
from sparsify.oneshot import reconstruction
from sparsify.oneshot.pruning import prunable_layers, prune_model_, zeros_by_layer
from tests.zoo.quantizable import InvertedResidual, ResidualNet


def calibrated(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.train().modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        for _ in range(4):
            model(torch.randn(8, 3, 16, 16) + 0.3)
    return model.eval()


def inputs(seed: int = 1, count: int = 32) -> list[Tensor]:
    return list((torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) + 0.3).split(16))


def zeros(model: nn.Module) -> tuple[int, int]:
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)


def off(model: nn.Module, exact: nn.Module) -> float:
    x = torch.cat(inputs(9))
    with torch.no_grad():
        a, b = model(x), exact(x)
    return float((a - b).norm() / (b - b.mean(0)).norm())


def by_magnitude(model: nn.Module, share: float) -> nn.Module:
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight.data
            weight.masked_fill_(reconstruction.lowest_scores(weight.abs(), round(share * weight.numel())), 0)
    return model


@pytest.mark.parametrize("build", [ResidualNet, InvertedResidual])
def test_zeros_are_as_many_as_asked_and_cost_less_than_by_magnitude(build: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = calibrated(build())
    pruned = copy.deepcopy(model)
    layers = prune_model_(pruned, inputs(), 0.514286)
    found, count = zeros(pruned)
    assert found == round(0.514286 * count) == sum(layer.zeros for layer in layers)
    assert off(pruned, model) < 0.6 * off(by_magnitude(model, 0.514286), model)
    measured = [layer for layer in layers if layer.error is not None and layer.zeros]
    assert all(layer.error <= 1.01 * layer.error_magnitude for layer in measured if layer.error_magnitude)  # type: ignore[operator]


def test_without_data_magnitudes_as_shares_of_their_layers_are_all_that_is_known() -> None:
    torch.manual_seed(0)
    model = calibrated(ResidualNet())
    pruned = copy.deepcopy(model)
    layers = prune_model_(pruned, [], 0.4, sample_inputs=inputs()[0][:2])
    found, count = zeros(pruned)
    assert found == round(0.4 * count)
    assert {layer.method for layer in layers} == {"magnitude"}
    kept, gone = [], []
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and (now := pruned.get_parameter(name)).eq(0).any():
            share = weight.detach().square() / weight.detach().square().sum()
            kept.append(float(share[now != 0].min()))
            gone.append(float(share[now == 0].max()))
            assert torch.equal(now[now != 0], weight[now != 0])
    assert max(gone) <= min(kept), "no layer is at its bound here: one threshold for all"


def test_zeros_that_are_there_count_and_stay() -> None:
    torch.manual_seed(0)
    model = calibrated(ResidualNet())
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    first.weight.data[:, :, 0] = 0
    before = first.weight == 0
    prune_model_(model, inputs(), 0.5)
    assert bool((first.weight == 0)[before].all())
    found, count = zeros(model)
    assert found == round(0.5 * count)


def test_layers_without_a_matrix_shared_weights_and_embeddings() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(16, 8)
            self.up = nn.ConvTranspose1d(8, 8, 2)
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight
            self.out = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Any:
            y = self.up(self.table(x).mT).mT
            return self.out(self.b(self.a(y)))

    torch.manual_seed(0)
    model = Odd().eval()
    layers, dense = prunable_layers(model)
    assert list(layers) == ["up", "out"] and set(dense) == {"table", "a", "b"}
    x = torch.randint(0, 16, (32, 5), generator=torch.Generator().manual_seed(1))
    found = prune_model_(model, [x], 0.5)
    assert {layer.layer: layer.method for layer in found} == {"up": "magnitude", "out": "reconstruction"}
    assert sum(layer.zeros for layer in found) == round(0.5 * (128 + 32))


def test_half_precision_stays_and_bad_input_is_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    half = copy.deepcopy(model).to(torch.bfloat16)
    prune_model_(half, [torch.randn(32, 8, dtype=torch.bfloat16)], 0.5)
    assert half[0].weight.dtype == torch.bfloat16
    assert sum(int((half[at].weight == 0).sum()) for at in (0, 2)) == 96
    with pytest.raises(ArgumentError, match=r"sparsity=1\.5"):
        prune_model_(model, [torch.randn(32, 8)], 1.5)
    with pytest.raises(TargetError, match="nothing in ReLU"):
        prune_model_(nn.ReLU(), [torch.randn(32, 8)], 0.5)
    model[0].weight.data[0, 0] = torch.nan
    with pytest.raises(DataError, match="0: its weights are not finite"):
        prune_model_(model, [torch.randn(32, 8)], 0.5)


def test_the_cheapest_go_first_up_to_a_bound() -> None:
    scores = {"cheap": torch.full((100,), 1e-6), "dear": torch.full((100,), 1.0)}
    assert zeros_by_layer(scores, 0.5) == {"cheap": 80, "dear": 20}
    assert zeros_by_layer(scores, 0.0) == {"cheap": 0, "dear": 0}
    assert sum(zeros_by_layer(scores, 0.99).values()) == 198


def test_the_rest_of_a_row_is_where_its_error_is_least() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator, dtype=torch.float64) @ torch.randn(
        6, 6, generator=generator, dtype=torch.float64
    )
    weight = torch.randn(1, 3, 6, generator=generator, dtype=torch.float64)
    kept = torch.rand(1, 3, 6, generator=generator) > 0.5
    moment = (x.T @ x / len(x))[None]
    found = reconstruction.made_up(weight, moment, kept, weight)
    for row in range(3):
        columns = kept[0, row]
        best = torch.linalg.lstsq(x[:, columns], x @ weight[0, row]).solution
        torch.testing.assert_close(found[0, row, columns], best, rtol=1e-3, atol=1e-4)
        assert not found[0, row, ~columns].any()
