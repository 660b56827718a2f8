"""Fake quantization against references that are written the long way, values and gradients."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsify.errors import DataError, StateError
from sparsify.quantization.fake_quantize import FakeQuantize
from sparsify.quantization.straight_through import fake_weight, on_grid


def reference_weight(weight: Tensor, axis: int | None, q_max: int) -> Tensor:
    out = torch.empty_like(weight)
    parts = (
        [(slice(None),) * weight.dim()]
        if axis is None
        else [(*[slice(None)] * axis, index) for index in range(weight.shape[axis])]
    )
    for part in parts:
        values = weight[part].double()
        scale = max(values.abs().max().item(), 1e-12) / q_max
        out[part] = ((values / scale).round() * scale).float()
    return out


@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 3, 3), (6, 2, 5)])
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("q_max", [127, 63, 7])
def test_weights_are_those_of_the_long_way(shape: tuple[int, ...], axis: int | None, q_max: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    torch.testing.assert_close(
        fake_weight(weight, axis=axis, q_max=q_max), reference_weight(weight, axis, q_max), rtol=1e-5, atol=1e-6
    )


def test_zeros_of_weights_stay_exactly_zero_and_gradients_pass() -> None:
    weight = torch.randn(8, 6)
    weight[weight.abs() < 0.5] = 0.0
    weight[3] = 0.0
    weight.requires_grad_()
    out = fake_weight(weight, axis=0, q_max=127)
    assert torch.equal(out[weight == 0], torch.zeros_like(out[weight == 0]))
    upstream = torch.randn(8, 6)
    out.backward(upstream)
    assert torch.equal(weight.grad, upstream)


def reference_range(batches: list[Tensor], constant: float = 0.01, relu: bool = False) -> tuple[float, float]:
    low = high = 0.0
    for index, batch in enumerate(batches):
        batch_low, batch_high = min(batch.min().item(), 0.0), max(batch.max().item(), 0.0)
        batch_low = 0.0 if relu else batch_low
        low = batch_low if index == 0 else low + constant * (batch_low - low)
        high = batch_high if index == 0 else high + constant * (batch_high - high)
    return low, high


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_ranges_are_the_moving_average_and_values_lie_on_the_grid(relu: bool, symmetric: bool, bits: int) -> None:
    torch.manual_seed(0)
    quantizer = FakeQuantize("x", bits=bits, symmetric=symmetric, relu=relu)
    batches = [torch.randn(4, 50) * (1 + index) for index in range(4)]
    for index, batch in enumerate(batches):
        out = quantizer(batch.clone())
        low, high = reference_range(batches[: index + 1], relu=relu)
        assert (quantizer.low.item(), quantizer.high.item()) == pytest.approx((low, high))
        if symmetric:
            scale, zero = max(-low, high) / (2 ** (bits - 1) - 1), 0
            first, last = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        else:
            first, last = 0, 2**bits - 1
            scale = (high - low) / last
            zero = round(-low / scale)
        values = batch.clamp(min=0.0) if relu else batch
        expected = ((values.double() / scale).round() + zero).clamp(first, last).sub(zero) * scale
        torch.testing.assert_close(out, expected.float(), rtol=1e-4, atol=scale * 1e-3)


def test_after_a_relu_the_zero_point_is_zero_and_zero_is_exact() -> None:
    quantizer = FakeQuantize("x", relu=True)
    x = torch.randn(100)
    out = quantizer(x.clone())
    assert quantizer.zero_point.item() == 0
    assert torch.equal(out[x <= 0], torch.zeros_like(out[x <= 0]))


@pytest.mark.parametrize("in_place", [False, True])
def test_the_gradient_of_relu_and_rounding_is_that_of_both(in_place: bool) -> None:
    torch.manual_seed(0)
    quantizer = FakeQuantize("x", relu=True, in_place=in_place)
    quantizer(torch.linspace(-1, 1, 50))
    quantizer.observing = False
    x = torch.linspace(-2, 2, 401, requires_grad=True)
    out = quantizer(x * 1.0)
    out.backward(torch.ones(401))
    scale = quantizer.scale.item()
    clear = (x / scale - 0.5).abs().gt(0.01) & (x / scale - 254.5).abs().gt(0.01)
    expected = ((x > 0.5 * scale) & (x < 254.5 * scale)).float()
    assert torch.equal(x.grad[clear], expected[clear])


@pytest.mark.parametrize("in_place", [False, True])
def test_the_gradient_is_zero_outside_of_the_range_only(in_place: bool) -> None:
    quantizer = FakeQuantize("x", in_place=in_place)
    quantizer(torch.tensor([-1.0, 2.0]))
    quantizer.observing = False
    for values in (torch.linspace(-3, 4, 301), torch.linspace(-0.9, 1.9, 301)):
        x = values.clone().requires_grad_()
        quantizer(x * 1.0).sum().backward()
        scale, zero = quantizer.scale.item(), quantizer.zero_point.item()
        inside = (values >= (-zero - 0.49) * scale) & (values <= (255 - zero + 0.49) * scale)
        outside = (values < (-zero - 0.51) * scale) | (values > (255 - zero + 0.51) * scale)
        assert torch.equal(x.grad[inside], torch.ones_like(x.grad[inside]))
        assert torch.equal(x.grad[outside], torch.zeros_like(x.grad[outside]))


def test_what_it_gives_may_be_overwritten_by_the_user() -> None:
    quantizer = FakeQuantize("x", in_place=True)
    for scale in (1.0, 5.0):
        x = (scale * torch.randn(64)).requires_grad_()
        out = quantizer(x * 1.0)
        out += torch.ones(64)
        out.sum().backward()
        assert x.grad is not None


def test_two_paths_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an accelerator and a compiler compute, on the CPU."""
    for relu, symmetric in ((False, False), (True, False), (False, True), (True, True)):
        torch.manual_seed(0)
        fast = FakeQuantize("x", relu=relu, symmetric=symmetric)
        slow = copy.deepcopy(fast)
        for index in range(5):
            x = torch.randn(200) * (index + 1)
            a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
            out = fast(a)
            with monkeypatch.context() as patch:
                patch.setattr("sparsify.quantization.fake_quantize.readable", lambda x: False)
                other = slow(b)
            torch.testing.assert_close(out, other, rtol=1e-5, atol=1e-5)
            out.sum().backward()
            other.sum().backward()
            assert (a.grad != b.grad).sum() <= 1
            torch.testing.assert_close(fast.state_dict(), slow.state_dict(), rtol=1e-6, atol=1e-7)


def test_relu6_is_cut_off_at_six() -> None:
    quantizer = FakeQuantize("x", relu=True, ceiling=6.0)
    out = quantizer(torch.linspace(-10, 10, 101))
    assert quantizer.high.item() == 6.0
    assert out.max().item() == pytest.approx(6.0)
    quantizer.eval()
    assert quantizer(torch.tensor([9.0])).item() == pytest.approx(6.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("relu", [False, True])
def test_a_range_that_is_not_finite_is_refused_by_name(value: float, relu: bool) -> None:
    quantizer = FakeQuantize("layer1.relu", relu=relu)
    with pytest.raises(DataError, match=r"layer1\.relu"):
        quantizer(torch.tensor([0.0, value]))
    assert quantizer.batches.item() == 0


def test_a_frozen_range_stays_and_an_unseen_one_leaves_values_alone() -> None:
    quantizer = FakeQuantize("x")
    x = torch.randn(10)
    quantizer.observing = False
    assert torch.equal(quantizer(x), x)
    with pytest.raises(StateError, match="ever observed"):
        quantizer.require_range()
    quantizer.eval()
    assert torch.equal(quantizer(x), x)
    quantizer.train()
    quantizer.observing = True
    quantizer(x)
    before = copy.deepcopy(quantizer.state_dict())
    quantizer.observing = False
    quantizer(10 * x)
    assert all(torch.equal(before[name], value) for name, value in quantizer.state_dict().items())


def test_casts_of_the_model_leave_the_range_in_float32() -> None:
    quantizer = FakeQuantize("x")
    quantizer(torch.tensor([-0.123456789, 1.23456789]))
    scale = quantizer.scale.clone()
    quantizer.half()
    assert quantizer.scale.dtype == torch.float32
    assert torch.equal(quantizer.scale, scale)
    out = quantizer(torch.randn(4, dtype=torch.float16))
    assert out.dtype == torch.float16


def test_eval_computes_what_is_exported() -> None:
    from sparsify.quantization.qdq_ops import quantize_dequantize

    torch.manual_seed(0)
    quantizer = FakeQuantize("x")
    quantizer(torch.randn(1000))
    quantizer.eval()
    x = 2 * torch.randn(10_000)
    assert torch.equal(quantizer(x), quantize_dequantize(x, quantizer.scale, quantizer.zero_point))
    assert torch.equal(quantizer(x), on_grid(x, quantizer.scale, quantizer.zero_point, 0, 255))


def test_layers_that_share_a_tensor_compute_it_once() -> None:
    quantizer = FakeQuantize("x")
    quantizer.readers = 3
    x = torch.randn(5)
    outs = [quantizer(x) for _ in range(3)]
    assert outs[0] is outs[1] is outs[2]
    assert quantizer.batches.item() == 1
    assert quantizer._held is None
    quantizer(x)
    assert quantizer.batches.item() == 2
    assert copy.deepcopy(quantizer)._held is None


def test_a_tensor_that_was_written_to_between_its_readers_is_computed_anew() -> None:
    shared, alone = FakeQuantize("x", bits=4), FakeQuantize("x", bits=4)
    shared.readers = 2
    x = torch.linspace(-1.0, 3.0, 41)
    before, after = x.clone(), x.clone().mul_(-0.5)
    assert torch.equal(shared(x), alone(before))
    x.mul_(-0.5)
    assert torch.equal(shared(x), alone(after))


@pytest.mark.parametrize(("gate", "plain"), [("silu", F.silu), ("hardswish", F.hardswish)])
def test_a_gate_rounds_its_factor_and_has_the_gradient_of_the_activation(gate: str, plain: Any) -> None:
    quantizer = FakeQuantize("x", gate=gate)
    x = torch.linspace(-7, 7, 301, requires_grad=True)
    y = quantizer(x)
    factor = torch.sigmoid(x) if gate == "silu" else (x / 6 + 0.5).clamp(0, 1)
    exact = x * (factor * 256).round().clamp(0, 255) / 256
    scale = quantizer.scale.item()
    expected = ((exact / scale).round() * scale).detach()
    off = (y - expected).abs().detach()
    # One operation more in the comparison: a tie may fall the other way.
    assert off.max() <= scale * 1.01 and (off > 1e-5).float().mean() < 0.02
    y.sum().backward()
    other = x.detach().clone().requires_grad_()
    plain(other).sum().backward()
    assert torch.allclose(x.grad, other.grad)


def test_a_gate_rounds_nothing_while_it_only_observes() -> None:
    quantizer = FakeQuantize("x", gate="silu").eval()
    x = torch.linspace(-3, 3, 50)
    assert torch.equal(quantizer(x), F.silu(x))
    quantizer.calibrating = True
    assert torch.equal(quantizer(x), F.silu(x)) and quantizer.batches == 1
