"""The way to the ranges of activations: chosen by the error at the outputs, unless it is said."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsify import quantize_model
from sparsify.quantization.conversion import quantizers
from sparsify.training.saved_model import load_model, save_model


def rare_features(large: float) -> tuple[nn.Sequential, list[Tensor]]:
    """A classifier that goes by features which few samples have, and their batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 16), nn.Tanh(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        model[0].weight.mul_(0.001)
        model[0].weight[:, :8] = torch.randn(16, 8) * 0.5 / large
    x = torch.randn(256, 512)
    # One sample in sixteen has one.
    x[torch.arange(0, 256, 16), torch.arange(16) % 8] = large * (0.5 + 0.5 * torch.rand(16))
    return model, list(x.split(64))


def error(model: nn.Module, data: list[Tensor], found: nn.Module) -> float:
    x = torch.cat(data)
    with torch.no_grad():
        wanted = model(x)
        return float((found(x) - wanted).norm() / (wanted - wanted.mean(0)).norm())


def test_ranges_that_cut_off_what_tells_classes_apart_are_not_taken() -> None:
    model, data = rare_features(80.0)
    by_error, chosen = quantize_model(model, data, ranges="mse"), quantize_model(model, data)
    assert by_error.ranges == "mse" and chosen.ranges != "mse"
    assert error(model, data, chosen.model) < 0.8 * error(model, data, by_error.model)
    assert f"ranges by {chosen.ranges}" in str(chosen)
    named = quantize_model(model, data, ranges=chosen.ranges)  # type: ignore[arg-type]
    for one, other in zip(quantizers(chosen.model), quantizers(named.model), strict=True):
        assert abs(float(one.scale) - float(other.scale)) <= 1e-3 * float(other.scale)


def test_least_squared_error_stays_where_nothing_is_much_better() -> None:
    model, data = rare_features(1.0)
    chosen, by_error = quantize_model(model, data), quantize_model(model, data, ranges="mse")
    assert chosen.ranges == "mse"
    wanted = by_error.model.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in chosen.model.state_dict().items())


def test_what_was_chosen_is_kept_in_place_and_in_a_folder(tmp_path: object) -> None:
    model, data = rare_features(80.0)
    copied = quantize_model(model, data)
    save_model(copied.model, f"{tmp_path}/model")
    fresh, _ = rare_features(80.0)
    again = load_model(f"{tmp_path}/model", fresh)
    quantize_model(model, data, inplace=True)
    x = torch.cat(data)
    with torch.no_grad():
        assert torch.equal(model(x), copied.model(x))
        assert torch.equal(again.eval()(x), copied.model(x))
