"""The deployment copy: integers that compute bit for bit what the trained model computes in eval mode."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify.errors import DataError, StateError
from sparsify.quantization.conversion import quantizers
from sparsify.quantization.deployment import deployment_copy
from sparsify.quantization.layers import WEIGHTED, QuantizedLayer
from sparsify.quantization.plan import undo_plan
from sparsify.quantization.scheme import NAMED, ActivationScheme, QuantizationSettings, Scheme, WeightScheme
from tests.loops import quantized, quantized_and_trained, train
from tests.zoo.quantizable import ZOO, Conv1D, ResidualNet, images, mlp
from tests.zoo.small import written

SETTINGS = {
    "default": QuantizationSettings(),
    "tensorrt": QuantizationSettings(scheme=NAMED["tensorrt"]),
    "one scale": QuantizationSettings(scheme=Scheme(weights=WeightScheme(strategy="tensor"))),
    "4 bits": QuantizationSettings(
        scheme=Scheme(input_activations=ActivationScheme(num_bits=4), weights=WeightScheme(num_bits=4))
    ),
    "weights alone": QuantizationSettings(scheme=Scheme(input_activations=None)),
    "7 bits": QuantizationSettings(reduce_range=True),
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", ZOO)
def test_eval_mode_and_deployment_copy_agree_to_the_bit(name: str, settings: str) -> None:
    model, inputs = quantized_and_trained(name, settings=SETTINGS[settings])
    keys = list(model.state_dict())
    deployed = deployment_copy(model)
    assert model.training and list(model.state_dict()) == keys
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(inputs), deployed(inputs))


@pytest.mark.parametrize("name", ZOO)
def test_it_holds_integers_and_no_float_weights(name: str) -> None:
    model, _ = quantized_and_trained(name)
    deployed = deployment_copy(model)
    for path, module in model.named_modules():
        if isinstance(module, (*WEIGHTED, Conv1D)):
            buffers = dict(deployed.get_submodule(path).named_buffers(recurse=False))
            assert buffers["weight_int8"].dtype == torch.int8
            assert buffers["weight_int8"].abs().max() <= 127
            assert not list(deployed.get_submodule(path).parameters(recurse=False))
            if isinstance(module, nn.Embedding) or (module.bias is None and module._wiring.norm is None):
                continue
            assert buffers["bias_int32"].dtype == torch.int32
            scale = buffers["weight_scale"] * module._wiring.source.scale  # type: ignore[union-attr]
            assert torch.equal(buffers["bias_scale"], scale)


def test_batch_norm_is_folded_exactly() -> None:
    """Against the long way: fold in float64, then the integers of the unfolded weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    quantized(model, images())
    train(model, images(), 3)
    norm: Any = model[1]
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -0.5, 0.0, 2.0, -3.0, 1e-12]))
        norm.bias.copy_(torch.randn(6))
    whole = model[0].deployed_integers()
    c = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    weight = model[0].weight.double()
    scale = weight.abs().amax((1, 2, 3)) / 127
    exact = (weight / scale.view(-1, 1, 1, 1)).round() * scale.view(-1, 1, 1, 1) * c.view(-1, 1, 1, 1)
    got = whole.weight.double() * whole.scale.double().view(-1, 1, 1, 1)
    torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-9)
    bias = norm.bias.double() - norm.running_mean.double() * c + c * model[0].bias.double()
    assert whole.bias is not None
    error = (whole.bias.double() * whole.bias_scale.double() - bias).abs()
    assert (error <= 0.51 * whole.bias_scale.double() + 1e-6 * bias.abs()).all()
    assert (whole.scale > 0).all()


def test_a_norm_alone_is_exact_but_for_the_grid_of_its_bias() -> None:
    """Also where its factor is negative, 0, or so small that a bias has no room in 32 bits beside it."""
    model, x = quantized_and_trained("dense")
    norm: Any = model.norm  # type: ignore[union-attr]
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -0.5, 0.0, 1e-12, -1e-12, 1e-30, 3.0, 1.0, 1.0, 1.0]))
        norm.bias.copy_(torch.linspace(-2, 2, 10))
    whole = norm.deployed_integers()
    factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    offset = norm.bias.double() - norm.running_mean.double() * factor
    usual = norm.weight.abs() > 1e-9
    assert (whole.weight.flatten()[usual].abs() == 127).all() and (whole.scale > 0).all()
    weight = whole.weight.double().flatten() * whole.scale.double()
    torch.testing.assert_close(weight[usual], factor[usual], rtol=2e-7, atol=0.0)
    assert (weight - factor).abs()[~usual].max() < 1e-11
    assert whole.bias is not None
    error = (whole.bias.double() * whole.bias_scale.double() - offset).abs()
    assert (error <= 0.51 * whole.bias_scale.double() + 1e-6 * offset.abs()).all()
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(x), deployment_copy(model)(x))


def calibrate(model: nn.Module, x: Tensor) -> None:
    for calibrating in (True, False):
        for quantizer in quantizers(model):
            quantizer.calibrating = calibrating
            quantizer.batches.fill_(not calibrating)
        model(x)


@pytest.mark.parametrize("rank", [3, 4, 5])
@pytest.mark.parametrize("kind", ["own", "synchronized"])
def test_norms_before_convolutions_of_one_to_three_dimensions(rank: int, kind: str) -> None:
    torch.manual_seed(0)
    conv = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[rank]
    norm = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[rank]
    model: Any = nn.Sequential(conv(3, 4, 3), nn.ReLU(), norm(4), nn.ReLU(), conv(4, 5, 1))
    if kind == "synchronized":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    x = torch.randn(6, 3, *[7] * (rank - 2))
    # A SyncBatchNorm trains with others only, and on accelerators.
    plan = quantized(model.eval(), x)
    calibrate(model, x)
    assert [norm.rank for norm in plan.alone] == [rank]
    deployed = deployment_copy(model)
    with torch.no_grad():
        assert torch.equal(model(x), deployed(x)) and model(x).any()
    assert deployed[2].weight_int8.shape == (4, 1, *[1] * (rank - 2))  # type: ignore[index]


def test_a_norm_alone_learns_in_training_and_in_eval_mode_and_is_given_back() -> None:
    model, x = quantized_and_trained("dense")
    norm: Any = model.norm  # type: ignore[union-attr]
    for mode in (True, False):
        model.train(mode).zero_grad()
        model(x).square().mean().backward()
        for parameter in (norm.weight, norm.bias, model.stem.weight):  # type: ignore[union-attr]
            assert parameter.grad.abs().max() > 0  # type: ignore[union-attr]
    with torch.no_grad():
        calibrate(model, x)
        rounded = model(x)
        for quantizer in quantizers(model):
            quantizer.enabled = False
        assert not norm.is_layer()
    undo_plan(model)
    assert type(norm) is nn.BatchNorm2d and not [name for name, _ in norm.named_children()]
    with torch.no_grad():
        assert 0 < (model(x) - rounded).abs().max() < 0.1 * rounded.abs().max()


def test_the_float_model_is_near() -> None:
    model, inputs = quantized_and_trained("residual", steps=150, lr=0.01)
    model.eval()
    with torch.no_grad():
        got = model(inputs)
        from sparsify.quantization.plan import undo_plan

        undo_plan(model)
        expected = model(inputs)
    assert ((got - expected).norm() / expected.norm()).item() < 0.1


def test_pruned_zeros_are_zeros_of_the_integers() -> None:
    model, inputs = quantized_and_trained("residual")
    zeros: dict[str, Tensor] = {}
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, QuantizedLayer):
                zeros[path] = torch.rand_like(module.weight) < 0.8
                module.weight[zeros[path]] = 0.0  # type: ignore[index]
    model(inputs)
    deployed = deployment_copy(model)
    for path, mask in zeros.items():
        q = dict(deployed.get_submodule(path).named_buffers())["weight_int8"]
        assert (q[mask] == 0).all()


def test_a_model_without_quantized_layers_gives_a_plain_copy() -> None:
    model = ResidualNet().train()
    deployed = deployment_copy(model)
    assert not deployed.training and deployed is not model
    inputs = images()
    assert torch.equal(deployed(inputs), copy.deepcopy(model).eval()(inputs))


def test_a_model_that_saw_nothing_is_refused() -> None:
    model = ResidualNet()
    quantized(model, images())
    with pytest.raises(StateError, match="no values were ever observed"):
        deployment_copy(model)


def test_a_broken_range_is_refused() -> None:
    model, _ = quantized_and_trained("mlp")
    model[0].input_quantizer.high.fill_(float("nan"))
    with pytest.raises(DataError, match=r"0\.input_quantizer"):
        deployment_copy(model)


def test_weights_that_are_not_finite_are_refused_by_name() -> None:
    model, _ = quantized_and_trained("mlp")
    with torch.no_grad():
        model[4].weight[0, 0] = float("nan")
    with pytest.raises(DataError, match=r"4\.weight"):
        deployment_copy(model)


@pytest.mark.parametrize("name", ZOO)
def test_it_is_traced_by_torch_export_with_a_dynamic_batch(name: str) -> None:
    model, inputs = quantized_and_trained(name)
    deployed = deployment_copy(model)
    program = torch.export.export(deployed, (inputs,), strict=False, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    names = [str(node.target) for node in program.graph.nodes]
    assert any("sparsify.dequantize" in n for n in names) and any("sparsify.quantize_dequantize" in n for n in names)
    with torch.no_grad():
        assert torch.equal(program.module()(inputs[:2]), deployed(inputs[:2]))


def test_it_stays_the_same_when_the_model_trains_on() -> None:
    model, inputs = quantized_and_trained("mlp")
    deployed = deployment_copy(model)
    before = deployed(inputs)
    train(model, inputs, 2)
    assert torch.equal(deployed(inputs), before)


def test_a_model_in_another_dtype_keeps_float32_scales() -> None:
    model = mlp()
    inputs = torch.randn(16, 6)
    quantized(model, inputs)
    train(model, inputs, 2)
    scale = model[0].input_quantizer.scale.clone()
    assert torch.equal(copy.deepcopy(model).half()[0].input_quantizer.scale, scale)


def test_a_model_that_looks_at_its_layers_weights_in_forward_still_runs() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 6)
            self.conv = nn.Conv1d(6, 6, 1)
            self.out = nn.Linear(6, 3)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids).to(self.conv.weight.dtype)
            x = self.conv(x.transpose(1, 2)).transpose(1, 2)
            assert isinstance(self.out.weight, Tensor) and self.embed.weight.shape == (7, 6)
            return self.out(x.to(self.out.bias.dtype))

    torch.manual_seed(0)
    ids = torch.randint(0, 7, (4, 5))
    model = Looks()
    quantized(model, ids)
    train(model, ids, steps=2)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(ids), deployment_copy(model)(ids))


def test_products_inside_an_embedding_are_none_of_its_callers() -> None:
    # The product is the first of its kind in this forward: T5 scales what goes into its head.

    torch.manual_seed(0)
    layers = {"embed": nn.Embedding(7, 6), "head": nn.Linear(6, 3)}
    model = written(lambda self, ids: self.head(torch.tanh(self.embed(ids)) * 0.5), **layers)
    ids = torch.randint(0, 7, (4, 5))
    quantized(model, ids)
    assert "multiply_0_quantizer" in dict(model.named_modules())
    train(model, ids, steps=2)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(ids), deployment_copy(model)(ids))
