"""Ranges of activations: each observer against what it promises, on values with outliers."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparsify.modifiers.quantization import QuantizationModifier
from sparsify.quantization import observers
from sparsify.quantization.calibration import calibrate
from sparsify.quantization.fake_quantize import FakeQuantize
from sparsify.quantization.scheme import ActivationScheme, QuantizationSettings, Scheme
from sparsify.quantization.straight_through import on_grid
from tests.loops import quantized, quantized_and_trained


def values(seed: int = 0, count: int = 20000) -> Tensor:
    """Normal, with a few outliers."""
    x = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    x[:2] = torch.tensor([60.0, -35.0])
    return x


def calibrated(observer: str, batches: list[Tensor], **kwargs: Any) -> FakeQuantize:
    quantizer = FakeQuantize("x", observer=observer, **kwargs)
    quantizer.calibrating = True
    for batch in batches:
        quantizer(batch)
    quantizer.calibrating = False
    return quantizer.eval()


def squared_error(quantizer: FakeQuantize, x: Tensor) -> float:
    return (quantizer(x) - x).square().mean().item()


def test_min_max_is_of_all_batches_and_the_moving_average_is_not() -> None:
    batches = [torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 1.0]), torch.tensor([-0.5, 5.0])]
    found = calibrated("min_max", batches)
    assert (found.low.item(), found.high.item()) == (-3.0, 5.0)
    moving = calibrated("moving_average", batches)
    assert moving.low.item() == pytest.approx(-1.0 - 0.01 * 2.0 + 0.01 * (1.02 - 0.5), abs=1e-6)


@pytest.mark.parametrize("percentile", [99.0, 99.9, 100.0])
def test_percentile_is_that_of_numpy_up_to_a_bin(percentile: float) -> None:
    batches = [values(seed) for seed in range(3)]
    found = calibrated("percentile", batches, percentile=percentile)
    together = torch.cat(batches).numpy()
    width = 2 * 64 / observers.BINS
    assert found.high.item() == pytest.approx(np.percentile(together, percentile), abs=2 * width)
    assert found.low.item() == pytest.approx(np.percentile(together, 100 - percentile), abs=2 * width)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_is_as_good_as_the_best_range_of_a_fine_search(bits: int, symmetric: bool) -> None:
    x = values(count=8000)
    found = calibrated("mse", [x], bits=bits, symmetric=symmetric)
    best = float("inf")
    for low in np.linspace(-35, -0.1, 25):
        for high in np.linspace(0.1, 60, 30):
            first, last = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
            scale = torch.tensor(max(-low, high) / last if symmetric else (high - low) / last)
            zero = torch.tensor(0.0) if symmetric else (-low / scale).round()
            best = min(best, (on_grid(x, scale, zero, first, last) - x).square().mean().item())
    assert squared_error(found, x) <= 1.1 * best
    assert squared_error(found, x) <= squared_error(calibrated("min_max", [x], bits=bits, symmetric=symmetric), x)


def test_entropy_sees_through_outliers_at_few_bits() -> None:
    x = values()
    found, widest = (calibrated(name, [x], bits=4) for name in ("entropy", "min_max"))
    assert found.high < 0.5 * widest.high and squared_error(found, x) < squared_error(widest, x)
    # Even values: nothing to clip.
    even = torch.linspace(-1, 1, 10001)
    assert calibrated("entropy", [even], bits=4).high.item() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("observer", sorted(observers.HISTOGRAMS))
def test_a_histogram_does_not_care_where_its_batches_were_small(observer: str) -> None:
    """The extent doubles without loss: batches of growing reach give the same range as all at once."""
    batches = [values(seed) * 2.0**seed for seed in range(4)]
    apart, together = calibrated(observer, batches, bits=4), calibrated(observer, [torch.cat(batches)], bits=4)
    assert torch.allclose(apart.histogram, together.histogram, atol=1e-12) and apart.extent == together.extent
    assert apart.scale == together.scale


@pytest.mark.parametrize("observer", ["min_max", *sorted(observers.HISTOGRAMS)])
def test_behind_a_relu_the_range_begins_at_zero(observer: str) -> None:
    found = calibrated(observer, [values()], relu=True, ceiling=6.0)
    assert found.low == 0 and 0 < found.high <= 6.01 and found.zero_point == 0


@pytest.mark.parametrize("observer", ["min_max", *sorted(observers.HISTOGRAMS)])
def test_training_resumes_to_the_bit_with_every_observer(observer: str) -> None:
    scheme = Scheme(input_activations=ActivationScheme(observer=observer, num_bits=4))
    model, inputs = quantized_and_trained("residual", 2, QuantizationSettings(scheme=scheme))
    other = copy.deepcopy(model)
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for batch in range(15):
            model(inputs * (1 + batch))
        other.load_state_dict(state)
        for batch in range(15):
            other(inputs * (1 + batch))
    for (name, one), two in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    assert any(name.endswith("histogram") for name in state) == (observer in observers.HISTOGRAMS)


def test_calibration_with_mse_is_better_than_with_min_max_at_four_bits() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4)).eval()
    data = [values(seed, 16 * 512).view(512, 16) for seed in range(4)]
    unseen = values(9, 16 * 256).view(256, 16)[4:]
    errors = {}
    for observer in ("min_max", "mse"):
        model = copy.deepcopy(plain)
        args = ActivationScheme(observer=observer, num_bits=4)
        quantized(model, data[0], settings=QuantizationSettings(scheme=Scheme(input_activations=args)))
        calibrate(model, data)
        errors[observer] = (model.eval()(unseen) - plain(unseen)).square().mean().item()
    assert errors["mse"] < 0.5 * errors["min_max"]


@pytest.mark.parametrize(
    ("kwargs", "what"),
    [
        ({"percentile": 20.0}, "percentile"),
        ({"averaging_constant": 0}, "averaging_constant"),
        ({"percentile": "9"}, "9"),
    ],
)
def test_unusable_settings_of_observers_are_refused(kwargs: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        QuantizationModifier(start_epoch=0.0, scheme=Scheme(input_activations=ActivationScheme(kwargs=kwargs)))
