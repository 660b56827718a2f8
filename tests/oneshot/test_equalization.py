"""Channels scaled between layers: the function stays, their ranges become equal."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify import SparsifyWarning, quantize_model
from sparsify.model.trace import trace
from sparsify.oneshot.equalization import Neighbours, equalize, neighbours
from sparsify.quantization.placement import make_plan
from sparsify.quantization.scheme import QuantizationSettings
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


def equalized(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Equalizes in place; gives the largest factor of each layer."""
    plan = make_plan(model, trace(model, (x,)), QuantizationSettings.of(None, None, (), where=""))
    return equalize(model, found_in(model, x), plan, [x])


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
    factors = equalized(other, x)
    assert max(factors.values()) > 2
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    after = other(x)
    assert (after - before).abs().max() <= 1e-6 * before.abs().max()


def test_channels_of_a_depthwise_layer_come_to_one_range() -> None:
    """Each of them has a grid of weights for itself, so that nothing is lost there."""
    model, data = unequal("depthwise", torch.exp(2 * torch.randn(12, generator=torch.Generator().manual_seed(1))))
    x = torch.cat(data)

    def octaves() -> float:
        reach = F.relu(model[1](model[0](x))).detach().amax((0, 2, 3)).log2()
        return float(reach.max() - reach.min())

    assert octaves() > 4.0
    equalized(model, x)
    assert octaves() <= 1.0 + 1e-4  # a factor is a power of two


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
    equalized(model, x)
    assert torch.allclose(model(x), before, rtol=1e-6, atol=0)


def unequal(shape: str, factors: Tensor) -> tuple[nn.Sequential, list[Tensor]]:
    """Two layers of `shape`, of whose channels between each is made larger by its factor and read as much smaller."""
    torch.manual_seed(0)
    channels = len(factors)
    first, norm, second, size = {
        "linear": (nn.Linear(12, channels), nn.Identity(), nn.Linear(channels, 10), (32, 12)),
        "linear bn": (nn.Linear(12, channels), nn.BatchNorm1d(channels), nn.Linear(channels, 10), (32, 12)),
        "conv1d": (nn.Conv1d(3, channels, 3), nn.Identity(), nn.Conv1d(channels, 10, 3), (16, 3, 12)),
        "conv1d bn": (nn.Conv1d(3, channels, 3), nn.BatchNorm1d(channels), nn.Conv1d(channels, 10, 3), (16, 3, 12)),
        "conv2d": (nn.Conv2d(3, channels, 3), nn.Identity(), nn.Conv2d(channels, 10, 3), (8, 3, 8, 8)),
        "conv2d bn": (nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.Conv2d(channels, 10, 3), (8, 3, 8, 8)),
        "depthwise": (nn.Conv2d(3, channels, 1), nn.BatchNorm2d(channels), depthwise(channels), (8, 3, 8, 8)),
    }[shape]
    model = nn.Sequential(first, norm, nn.ReLU(), second)
    data = [torch.randn(size) for _ in range(3)]
    if not isinstance(norm, nn.Identity):
        norm.momentum = None
        for x in data:
            model(x)
    maker = first if isinstance(norm, nn.Identity) else norm
    with torch.no_grad():
        for tensor in (maker.weight, maker.bias):
            tensor.mul_(factors.view(-1, *[1] * (tensor.dim() - 1)))
        dim = 0 if shape == "depthwise" else 1
        second.weight.div_(factors.view([-1 if at == dim else 1 for at in range(second.weight.dim())]))
    return model.eval(), data


def depthwise(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, groups=channels)


SHAPES = ["linear", "linear bn", "conv1d", "conv1d bn", "conv2d", "conv2d bn", "depthwise"]
FEW = [
    *("linear bn", "conv2d", "depthwise"),
    *(pytest.param(shape, marks=pytest.mark.slow) for shape in ("linear", "conv1d", "conv1d bn", "conv2d bn")),
]


def errors(model: nn.Sequential, data: list[Tensor], **options: Any) -> list[float]:
    """Relative error of the output without equalization and with it."""
    x, found = torch.cat(data), []
    for wanted in (False, True):
        result = quantize_model(model, data, equalize=wanted, **options)
        with torch.no_grad():
            found.append(float((result.model(x) - model(x)).norm() / model(x).norm()))
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "factor", [1e-10, *(pytest.param(other, marks=pytest.mark.slow) for other in (1e-3, 1e-6, 0.0))]
)
def test_channels_that_died_make_nothing_worse(shape: str, factor: float) -> None:
    model, data = unequal(shape, torch.ones(12))
    first, norm = model[0], model[1]
    with torch.no_grad():
        # Weight decay takes the weights and leaves the bias.
        maker = first if isinstance(norm, nn.Identity) else norm
        for layer in {first, maker}:
            layer.weight[2:5] *= factor
        maker.bias[2:5] = torch.tensor([0.6, 0.05, 2.0])
    plain, with_it = errors(model, data)
    assert plain < 0.04
    assert with_it <= 1.05 * plain


@pytest.mark.parametrize("shape", FEW)
def test_unequal_channels_lose_no_accuracy(shape: str) -> None:
    factors = torch.exp(2 * torch.randn(12, generator=torch.Generator().manual_seed(1)))
    plain, with_it = errors(*unequal(shape, factors))
    assert with_it < 0.04 < plain
    _, equal = errors(*unequal(shape, torch.ones(12)))
    assert with_it < 1.3 * equal


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "scheme",
    [
        {"weights": {"strategy": "tensor"}},
        {"weights": {"num_bits": 4}},
        "tensorrt",
        "weight_only",
        {"input_activations": None, "weights": {"num_bits": 4, "symmetric": False}},
    ],
)
def test_every_scheme_gains_where_channels_are_unequal_and_loses_nowhere(shape: str, scheme: Any) -> None:
    factors = torch.exp(2 * torch.randn(12, generator=torch.Generator().manual_seed(1)))
    plain, with_it = errors(*unequal(shape, factors), scheme=scheme)
    # Where activations stay in float a depthwise layer has a grid for each channel already.
    floating = scheme == "weight_only" or "input_activations" in scheme
    assert with_it <= plain if shape == "depthwise" and floating else with_it < plain
    dead, data = unequal(shape, torch.ones(12))
    with torch.no_grad():
        dead[0].weight[2:5] *= 1e-8
        dead[0].bias[2:5] = 1.0
    plain, with_it = errors(dead, data, scheme=scheme)
    assert with_it <= 1.05 * plain


def test_one_scale_for_all_weights_is_helped_on_both_sides() -> None:
    factors = torch.exp(2 * torch.randn(12, generator=torch.Generator().manual_seed(1)))
    plain, with_it = errors(*unequal("linear", factors), scheme={"weights": {"strategy": "tensor"}})
    assert with_it < 0.1 * plain


def test_without_data_statistics_of_batchnorm_count_as_activations() -> None:
    model, data = unequal("conv2d bn", torch.ones(12))
    with torch.no_grad():
        model[1].weight[3] = 1e-8
        model[1].bias[3] = 1.0
    found = []
    for wanted in (False, True):
        with pytest.warns(SparsifyWarning, match="ranges of Sequential come from the statistics"):
            result = quantize_model(model, sample_inputs=data[0], equalize=wanted)
        with torch.no_grad():
            found.append(float((result.model(data[1]) - model(data[1])).norm() / model(data[1]).norm()))
    assert found[1] <= 1.05 * found[0] < 0.05


def test_dead_channels_keep_their_zeros() -> None:
    model, data = unequal("linear", torch.exp(2 * torch.randn(12, generator=torch.Generator().manual_seed(1))))
    with torch.no_grad():
        model[0].weight[1] = 0.0
        model[0].bias[1] = 0.0
        model[3].weight[:, 2] = 0.0
    x = torch.cat(data)
    before = model(x)
    assert equalized(model, x)
    assert torch.equal(model(x), before)
    assert not model[0].weight[1].any() and not model[3].weight[:, 2].any()
    # What nobody reads is not the largest of all.
    reach = F.relu(model[0](x)).amax(0)
    assert reach[2] <= 2 * reach[[0, *range(3, 12)]].max()
