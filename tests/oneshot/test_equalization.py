"""Channels scaled between layers: the function stays, their ranges become equal."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify.model.trace import trace
from sparsify.oneshot.equalization import Neighbours, equalize, neighbours
from tests.zoo.quantizable import ResidualBlock


class Depthwise(nn.Module):
    """Wide, depthwise, narrow, grouped, and a Linear behind a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, 12, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.depth = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.bn2 = nn.BatchNorm2d(12)
        self.grouped = nn.Conv2d(12, 8, 1, groups=2)
        self.first = nn.Linear(8, 6)
        self.second = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.expand(x)))
        x = F.max_pool2d(F.relu(self.bn2(self.depth(x))), 2)
        x = F.adaptive_avg_pool2d(F.leaky_relu(self.grouped(x)), 1).flatten(1)
        return self.second(F.relu(self.first(x)))


def ready(model: nn.Module, x: Tensor) -> nn.Module:
    """With statistics and channels of very different ranges."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.running_var):
                    tensor.copy_(torch.exp(2 * torch.randn(tensor.shape, generator=generator)))
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator))
                module.running_mean.copy_(torch.randn(module.bias.shape, generator=generator))
    return model.eval()


def found_in(model: nn.Module, x: Tensor) -> tuple[Neighbours, ...]:
    traced = trace(model, (x,))
    return neighbours(model, traced, {pair.layer: pair.norm for pair in traced.pairs if pair.why_not is None})


def test_pairs_are_found_through_batchnorm_activations_pools_and_flatten() -> None:
    x = torch.randn(2, 3, 8, 8)
    assert found_in(ready(Depthwise(), x), x) == (
        Neighbours("expand", "bn1", "depth"),
        Neighbours("depth", "bn2", "grouped"),
        Neighbours("grouped", None, "first"),
        Neighbours("first", None, "second"),
    )


def test_equalizing_leaves_the_function_as_it_is_and_ranges_equal() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    model = ready(Depthwise(), x)
    before = model(x)
    other = copy.deepcopy(model)
    factors = equalize(other, found_in(other, x))
    assert max(factors.values()) > 2
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    after = other(x)
    assert (after - before).abs().max() <= 1e-6 * before.abs().max()

    def spread(one: nn.Module) -> float:
        """Of the BatchNorm-folded weights that make each channel against those that read it."""
        made = one.expand.weight.flatten(1).abs().amax(1) * one.bn1.weight.abs()
        made = made / (one.bn1.running_var + one.bn1.eps).sqrt()
        read = one.depth.weight.flatten(1).abs().amax(1)
        return (made / read).log2().abs().max().item()

    assert spread(model) > 2.0
    assert spread(other) <= 1.0 + 1e-4  # a factor is a power of two


class Shapes(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a = nn.Conv2d(3, 4, 1)
        self.b = nn.Conv2d(4, 4, 1)
        self.line = nn.Linear(8, 8)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "relu6":
            return self.b(F.relu6(self.a(x)))
        if self.kind == "gelu":
            return self.b(F.gelu(self.a(x)))
        if self.kind == "read twice":
            y = self.a(x)
            return self.b(y) + y
        if self.kind == "shared":
            return self.b(F.relu(self.b(F.relu(self.a(x)))))
        if self.kind == "linear over width":
            return self.line(F.relu(self.a(x)))
        if self.kind == "pool over features":
            return self.last(F.avg_pool1d(F.relu(self.line(x[:, 0])), 3, 1, 1))
        if self.kind == "output":
            y = F.relu(self.a(x))
            return self.b(y), y
        raise AssertionError(self.kind)


@pytest.mark.parametrize(
    "kind", ["relu6", "gelu", "read twice", "shared", "linear over width", "pool over features", "output"]
)
def test_nothing_is_scaled_where_the_function_would_change(kind: str) -> None:
    x = torch.randn(2, 3, 8, 8)
    assert found_in(Shapes(kind).eval(), x) == ()


def test_tied_weights_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    x = torch.randn(4, 6)
    assert len(found_in(model, x)) == 1
    model[2].weight = model[0].weight
    assert found_in(model, x) == ()


def test_residual_blocks_are_scaled_inside_only() -> None:
    x = torch.randn(2, 4, 6, 6)
    model = ready(ResidualBlock(), x)
    pairs = found_in(model, x)
    assert pairs == (Neighbours("conv1", "bn1", "conv2"),)
    before = model(x)
    equalize(model, pairs)
    assert torch.allclose(model(x), before, rtol=1e-6, atol=0)


def test_dead_channels_keep_their_zeros() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        model[0].weight[1] = 0.0
        model[2].weight[:, 2] = 0.0
    x = torch.randn(4, 6)
    before = model(x)
    equalize(model, found_in(model, x))
    assert torch.equal(model(x), before)
