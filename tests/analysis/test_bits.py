"""Bits for each layer: the least loss within a goal, and what quantizes the model accordingly."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify import QuantizationModifier, Recipe, ScheduledModifierManager
from sparsify.analysis.bits import ChosenBits, Option, choose_bits, least_loss
from sparsify.analysis.layers import LayerInfo, ModelAnalysis
from sparsify.analysis.loss import LossProfile, loss_profile
from sparsify.analysis.performance import LayerPerformance, PerformanceProfile
from sparsify.errors import ArgumentError, TargetError
from sparsify.oneshot import quantize_model
from sparsify.quantization.conversion import quantized_layers, weight_bits

LEVELS = (8, 6, 4, 3, 2)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def profile(**losses: tuple[float, ...]) -> LossProfile:
    return LossProfile("data", "quantization", LEVELS, {n.removeprefix("l"): v for n, v in losses.items()}, 0.0, 8)


SENSITIVE = profile(l0=(0.0, 0.1, 1.0, 4.0, 9.0), l2=(0.0, 0.001, 0.01, 0.04, 0.09), l4=(0.0, 0.0, 0.001, 0.002, 0.003))


# ---------------------------------------------------------------------------------------------- the choice


def test_what_loses_much_keeps_more_bits() -> None:
    chosen = choose_bits(model(), SENSITIVE, average_bits=4)
    assert chosen.bits["0"] > max(chosen.bits["2"], chosen.bits["4"])
    # The other way round it is the same layer that loses least which gets least.
    swapped = profile(l0=SENSITIVE.losses["4"], l2=SENSITIVE.losses["2"], l4=SENSITIVE.losses["0"])
    assert choose_bits(model(), swapped, average_bits=4).bits["4"] == 8
    assert chosen.loss == sum(dict(zip(LEVELS, SENSITIVE.losses[n], strict=True))[b] for n, b in chosen.bits.items())


@pytest.mark.parametrize("average", [2.0, 2.5, 3.0, 4.0, 5.5, 8.0, 12.0])
def test_an_average_is_met_from_below_within_one_layer(average: float) -> None:
    chosen = choose_bits(model(), SENSITIVE, average_bits=average)
    weights = {"0": 128, "2": 256, "4": 64}
    total = sum(weights.values())
    assert chosen.average_bits == pytest.approx(sum(weights[n] * b for n, b in chosen.bits.items()) / total)
    assert chosen.average_bits <= average
    if average >= 8:
        assert set(chosen.bits.values()) == {8}
    else:
        # The next step of no layer would have fitted.
        steps = {n: next(b for b in reversed(LEVELS) if b > chosen.bits[n]) for n in weights if chosen.bits[n] < 8}
        assert all(
            (average - chosen.average_bits) * total < weights[n] * (b - chosen.bits[n]) for n, b in steps.items()
        )


def test_a_size_counts_all_parameters() -> None:
    rest = 4 * (16 + 16 + 4)
    chosen = choose_bits(model(), SENSITIVE, size_bytes=rest + 448 / 2)
    assert chosen.other_bytes == rest
    assert rest + 448 / 2 - 128 / 4 <= chosen.size_bytes <= rest + 448 / 2
    assert chosen.bits == choose_bits(model(), SENSITIVE, average_bits=4).bits
    assert choose_bits(model(), SENSITIVE, average_bits=8).size_bytes == rest + 448


def test_only_the_bits_that_are_allowed_are_chosen() -> None:
    assert set(choose_bits(model(), SENSITIVE, average_bits=6, bits=(8, 4)).bits.values()) == {8, 4}


def test_losses_that_rise_with_bits_are_taken_for_none() -> None:
    noise = profile(l0=(0.5, 0.2, 0.1, 0.3, 0.1))
    assert choose_bits(model(), noise, average_bits=2).loss == 0.5
    assert choose_bits(model(), noise, average_bits=8).bits == {"0": 8}


ways = st.lists(st.floats(0, 10), min_size=3, max_size=3).map(lambda v: sorted(v, reverse=True))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), ways), min_size=1, max_size=4), st.floats(2, 8))
def test_the_choice_is_within_the_budget_near_the_best_and_no_worse_than_uniform(
    layers: list[tuple[int, list[float]]], average: float
) -> None:
    options = {
        str(i): [Option(b, float(n * b), loss) for b, loss in zip((2, 4, 8), losses, strict=True)]
        for i, (n, losses) in enumerate(layers)
    }
    budget = average * sum(n for n, _ in layers)
    chosen = least_loss(options, budget)
    assert sum(o.cost for o in chosen.values()) <= budget * (1 + 1e-6)
    found = sum(o.adds for o in chosen.values())
    for b in (2, 4, 8):
        if b <= average:
            assert found <= sum(o.adds for ways in options.values() for o in ways if o.bits == b) + 1e-9
    best = min(
        sum(o.adds for o in all_)
        for all_ in itertools.product(*options.values())
        if sum(o.cost for o in all_) <= budget * (1 + 1e-6)
    )
    # Along the hulls the optimum is missed by one layer's step at most.
    largest = max(ways[0].adds - ways[-1].adds for ways in options.values())
    assert best - 1e-9 <= found <= best + largest + 1e-9


def test_a_step_may_skip_what_lies_above_the_hull_and_fill_what_is_left() -> None:
    ways = [Option(2, 2.0, 9.0), Option(3, 3.0, 8.9), Option(4, 4.0, 1.0), Option(8, 8.0, 0.0)]
    other = [Option(2, 20.0, 3.0), Option(3, 30.0, 2.0)]
    found = {
        b: {n: o.bits for n, o in least_loss({"a": ways, "b": other}, b).items()} for b in (23.0, 24.0, 33.5, 38.0)
    }
    assert found == {
        23.0: {"a": 3, "b": 2},
        24.0: {"a": 4, "b": 2},
        33.5: {"a": 8, "b": 2},
        38.0: {"a": 8, "b": 3},
    }


def test_what_saves_most_for_its_cost_comes_before_what_saves_most() -> None:
    dear, cheap = [Option(2, 0.0, 5.0), Option(4, 100.0, 0.0)], [Option(2, 0.0, 3.0), Option(4, 10.0, 0.0)]
    found = least_loss({"a": dear, "b": cheap, "c": cheap}, 100.0)
    assert {name: option.bits for name, option in found.items()} == {"a": 2, "b": 4, "c": 4}


# ---------------------------------------------------------------------------------------------- names


class Tied(nn.Module):
    """A head that is tied to its embedding, and attention with one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(10, 8), nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.attention(x, x, x)[0]
        return self.head(F.relu(self.fc(x)))


def test_a_shared_weight_has_its_bits_wherever_it_is_held() -> None:
    losses = {"embed": (0.0,) * 5, "attention.in_proj": (0.0, 0.0, 0.0, 0.0, 5.0), "fc": (0.0, 1.0, 2.0, 3.0, 4.0)}
    chosen = choose_bits(Tied(), LossProfile("data", "quantization", LEVELS, losses, 0.0, 1), average_bits=3)
    assert chosen.bits == {"embed": 2, "attention.in_proj": 3, "fc": 4}
    overrides = chosen.scheme_overrides
    assert overrides["embed"] == overrides["head"] == {"weights": {"num_bits": 2}}
    assert overrides["attention"] == {"weights": {"num_bits": 3}}
    assert set(overrides) == {"embed", "head", "attention", "fc"}
    # The names are ones that quantization takes.
    quantize_model(Tied(), [torch.randint(0, 10, (16, 5))], scheme_overrides=overrides)


def info(name: str, weights: int, shared: str | None = None) -> LayerInfo:
    return LayerInfo(
        name=name,
        type="Linear",
        weight=f"{shared or name}.weight",
        shared_with=shared,
        input_shapes=((1, 8),),
        output_shape=(1, 8),
        parameters=weights,
        weights=0 if shared else weights,
        macs=0,
        calls=1,
        groups=1,
        sparsity=0.0,
        bits=32,
        why_not_prunable="",
        why_not_quantizable="",
    )


def test_an_analysis_serves_as_the_model() -> None:
    layers = (info("a", 100), info("b", 50), info("c", 100, "a"), info("d", 7))
    analysis = ModelAnalysis("Net", layers, (), 200, 1)
    losses = {"a": (0.0, 1.0, 2.0, 3.0, 4.0), "b": (0.0,) * 5}
    chosen = choose_bits(
        analysis, LossProfile("fisher", "quantization", LEVELS, losses, 0.0, 1), size_bytes=100 + 50 / 4 + 200
    )
    assert chosen.bits == {"a": 8, "b": 2}
    assert chosen.size_bytes == 100 + 50 / 4 + 4 * 50
    assert chosen.scheme_overrides == {
        "a": {"weights": {"num_bits": 8}},
        "c": {"weights": {"num_bits": 8}},
        "b": {"weights": {"num_bits": 2}},
    }


# ---------------------------------------------------------------------------------------------- at work


def unique_values(quantized: nn.Module, name: str) -> int:
    weight = quantized.get_parameter(f"{name}.weight").detach()
    return max(len(row.unique()) for row in weight)


def test_what_is_chosen_is_what_quantization_does() -> None:
    data = [torch.randn(32, 8)]
    chosen = choose_bits(model(), SENSITIVE, average_bits=4)
    quantized = quantize_model(model(), data, scheme_overrides=chosen.scheme_overrides)
    assert {layer.layer: layer.bits for layer in quantized.layers} == chosen.bits
    for name, bits in chosen.bits.items():
        assert unique_values(quantized.model, name) <= 2**bits - 1


def test_a_choice_goes_through_a_recipe() -> None:
    chosen = choose_bits(model(), SENSITIVE, average_bits=4)
    overrides: dict[str, Any] = chosen.scheme_overrides
    modifier = QuantizationModifier(start_epoch=0.0, scheme_overrides=overrides)
    recipe = ScheduledModifierManager([modifier]).recipe
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    trained = model()
    manager = ScheduledModifierManager.from_yaml(recipe.to_yaml())
    manager.apply(trained, sample_inputs=torch.randn(4, 8), calibration_data=[torch.randn(32, 8)])
    with torch.no_grad():
        trained.eval()(torch.randn(4, 8))
    found = {name: weight_bits(layer) for name, layer in quantized_layers(trained)}
    assert {name: found[name] for name in chosen.bits} == chosen.bits


def test_mixed_bits_are_better_than_uniform_ones_of_the_same_size() -> None:
    """On a small trained network whose first layer is small and carries all; through quantization as it is done."""
    torch.manual_seed(0)
    x = torch.randn(512, 6)
    y = ((x[:, 0] * x[:, 1] > 0).long() + 2 * (x[:, 2] > 0).long()).long()
    net = nn.Sequential(nn.Linear(6, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 4))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    net.eval()
    data = list(x.split(64))
    found = loss_profile(net, [(one, torch.zeros(64, dtype=torch.int64)) for one in data], of="quantization")
    chosen = choose_bits(net, found, average_bits=3)
    assert chosen.average_bits <= 3

    def divergence(overrides: dict[str, Any]) -> float:
        options: dict[str, Any] = {"rounding": "nearest", "sequential": False, "scheme_overrides": overrides}
        quantized = quantize_model(net, data, **options).model
        with torch.no_grad():
            return float(F.kl_div(quantized(x).log_softmax(1), net(x).softmax(1), reduction="batchmean"))

    uniform = divergence({name: {"weights": {"num_bits": 3}} for name in found.losses})
    assert divergence(chosen.scheme_overrides) < 0.8 * uniform


# ---------------------------------------------------------------------------------------------- latency


def performance(int8: bool = True) -> PerformanceProfile:
    """Layer 2 gains most, 4 becomes slower, 0 stays in float; adds cost more in the int8 file. Profiled at 1.25."""
    layers = (
        LayerPerformance("0", 1.25, None, (), None, None),
        LayerPerformance("2", 5.0, 1.25 if int8 else None, (), None, None),
        LayerPerformance("4", 2.5, 3.0 if int8 else None, (), None, None),
        LayerPerformance("6", 2.5, 1.25 if int8 else None, (), None, None),
    )
    return PerformanceProfile(
        layers=layers,
        total_ms=10.0,
        total_int8_ms=6.4 if int8 else None,
        totals={},
        batch_size=1,
        threads=1,
        content="",
        versions={},
        profiled_ms=12.5,
        profiled_int8_ms=8.0 if int8 else None,
        others={"Add": 1.25},
        others_int8={"Add": 1.25, "0, in float": 1.25},
        notes={} if int8 else {"int8": "the model cannot be quantized"},
    )


def four() -> nn.Sequential:
    return nn.Sequential(*model(), nn.ReLU(), nn.Linear(4, 4))


TIMED = profile(
    l0=(0.0, 0.0, 0.0, 0.0, 0.0),
    l2=(0.1, 0.2, 0.3, 0.4, 0.5),
    l4=(0.1, 0.2, 0.3, 0.4, 0.5),
    l6=(0.5, 0.6, 0.7, 0.8, 0.9),
)


@pytest.mark.parametrize(
    ("latency", "bits", "predicted"),
    [
        (10.0, {"0": 32, "2": 32, "4": 32, "6": 32}, 10.0),
        (9.9, {"0": 32, "2": 8, "4": 32, "6": 32}, 7.0),
        (6.9, {"0": 32, "2": 8, "4": 32, "6": 8}, 6.0),
    ],
)
def test_a_latency_is_met_by_the_layers_that_gain_most_for_their_loss(
    latency: float, bits: dict[str, int], predicted: float
) -> None:
    chosen = choose_bits(four(), TIMED, latency_ms=latency, performance=performance())
    assert chosen.bits == bits
    assert chosen.latency_ms == pytest.approx(predicted)
    assert chosen.scheme_overrides["0"] is None
    assert chosen.loss == pytest.approx(sum({"2": 0.1, "6": 0.5}[n] for n, b in bits.items() if b == 8))


def test_the_prediction_is_exact_where_all_is_int8() -> None:
    """A whole that is int8 costs what was measured, whatever runs between its layers."""
    layers = tuple(
        LayerPerformance(n, ms, int8, (), None, None)
        for n, ms, int8 in (("0", 3.0, 1.0), ("2", 5.0, 1.5), ("4", 1.0, 0.5))
    )
    timed = PerformanceProfile(
        layers=layers,
        total_ms=9.0,
        total_int8_ms=4.0,
        totals={},
        batch_size=1,
        threads=1,
        content="",
        versions={},
        profiled_ms=10.0,
        profiled_int8_ms=5.0,
        others={"Add": 1.0},
        others_int8={"Add": 0.5, "QuantizeLinear": 1.5},
    )
    chosen = choose_bits(model(), SENSITIVE, latency_ms=4.0, performance=timed)
    assert chosen.bits == {"0": 8, "2": 8, "4": 8}
    assert chosen.latency_ms == pytest.approx(4.0)
    assert choose_bits(model(), SENSITIVE, latency_ms=9.0, performance=timed).latency_ms <= 9.0


# ---------------------------------------------------------------------------------------------- errors

PRUNED = LossProfile("data", "pruning", (0.0, 0.5), {"0": (0.0, 1.0)}, 0.0, 1)
ELSEWHERE = profile(l0=(0.0,) * 5, l7=(0.0,) * 5)
WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "no goal": ((model(), SENSITIVE), {}, ArgumentError, "no goal: give one of average_bits, size_bytes, latency_ms"),
    "two": ((model(), SENSITIVE), {"average_bits": 3, "size_bytes": 9}, ArgumentError, "average_bits and size_bytes"),
    "zero": ((model(), SENSITIVE), {"average_bits": 0}, ArgumentError, "average_bits=0: give a number above 0"),
    "true": ((model(), SENSITIVE), {"average_bits": True}, ArgumentError, "average_bits=True"),
    "nan": ((model(), SENSITIVE), {"size_bytes": float("nan")}, ArgumentError, "size_bytes=nan"),
    "few bits": ((model(), SENSITIVE), {"average_bits": 1.5}, ArgumentError, "the least is 2 bits on average"),
    "small": (
        (model(), SENSITIVE),
        {"size_bytes": 200},
        ArgumentError,
        "least is 256 bytes, of which 144 stay in float",
    ),
    "pruning": ((model(), PRUNED), {"average_bits": 3}, ArgumentError, "the profile is of pruning"),
    "bits": ((model(), SENSITIVE), {"average_bits": 3, "bits": (5, 3)}, ArgumentError, r"bits: \[5\]: the profile has"),
    "no model": (("m.onnx", SENSITIVE), {"average_bits": 3}, ArgumentError, "model is a str"),
    "other model": ((model(), ELSEWHERE), {"average_bits": 3}, TargetError, "layer '7' is not in Sequential"),
    "no times": ((four(), TIMED), {"latency_ms": 5}, ArgumentError, "latency_ms needs performance"),
    "no int8": (
        (four(), TIMED),
        {"latency_ms": 5, "performance": performance(int8=False)},
        ArgumentError,
        "no times in int8: the model cannot be quantized",
    ),
    "too fast": (
        (four(), TIMED),
        {"latency_ms": 1, "performance": performance()},
        ArgumentError,
        "latency_ms cannot be met: the least is 6 ms",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_meant_is_refused(case: str) -> None:
    args, kwargs, error, text = WRONG[case]
    with pytest.raises(error, match=text):
        choose_bits(*args, **kwargs)


def test_the_table_says_what_was_asked_and_what_is_met() -> None:
    chosen = choose_bits(model(), SENSITIVE, average_bits=4)
    assert isinstance(chosen, ChosenBits)
    first, titles, *rows = str(chosen).splitlines()
    assert first.startswith("4 bits on average: ") and "added to the loss" in first
    assert titles.split()[:3] == ["Layer", "Weights", "Bits"]
    assert [row.split()[0] for row in rows] == ["0", "2", "4"]
