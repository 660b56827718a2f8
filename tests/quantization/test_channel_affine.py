"""Frozen BatchNorms, learned scales and biases: modules that scale and shift channels in place of a BatchNorm."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify import export_onnx, load_model, quantize_model, save_model, verify_onnx
from sparsify.model.trace import trace
from sparsify.quantization.calibration import calibrate
from sparsify.quantization.deployment import deployment_copy
from sparsify.quantization.plan import QuantizationPlan, undo_plan
from sparsify.quantization.plan_of_model import quantization_of
from tests.loops import quantized, train
from tests.zoo.quantizable import images
from tests.zoo.small import written


class FrozenBatchNorm2d(nn.Module):
    """As torchvision, detectron2 and DETR have it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.rand(channels) + 0.5)
        self.register_buffer("bias", torch.randn(channels) * 0.1)
        self.register_buffer("running_mean", torch.randn(channels) * 0.1)
        self.register_buffer("running_var", torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, variance = (each.reshape(1, -1, 1, 1) for each in self.buffers(recurse=False))
        scale = weight * (variance + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


class ScaleAndBias(nn.Module):
    """HGNetV2's and PP-LCNet's: learned, one of each, or one for each channel."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(shape) + 0.5)
        self.bias = nn.Parameter(torch.randn(shape) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + self.bias


class Net(nn.Module):
    """One behind each convolution, and one behind a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.frozen = nn.Conv2d(3, 4, 3, padding=1, bias=False), FrozenBatchNorm2d(4)
        self.conv, self.learned = nn.Conv2d(4, 4, 3, padding=1), ScaleAndBias(1, 4, 1, 1)
        self.behind, self.head = ScaleAndBias(1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.behind(F.relu(self.frozen(self.stem(x))))
        x = F.relu(x + self.learned(self.conv(x)))
        return self.head(x.mean((2, 3)))


def test_they_are_folded_or_layers_of_their_own_and_the_plan_survives() -> None:
    torch.manual_seed(0)
    model, inputs = Net(), images()
    twin = copy.deepcopy(model)
    plan = quantized(model, inputs)
    assert plan.folds == {"stem": "frozen", "conv": "learned"} and plan.left == ()
    assert [(norm.name, norm.channels) for norm in plan.alone] == [("behind", 4)]
    train(model, inputs, 2)
    assert QuantizationPlan.from_state(json.loads(json.dumps(plan.to_state()))) == plan
    again = quantization_of(copy.deepcopy(model))
    assert again.folds == plan.folds and again.alone == plan.alone and set(again.watched) == set(plan.watched)
    undo_plan(model)
    assert list(model.state_dict()) == list(twin.state_dict()) and type(model.frozen) is FrozenBatchNorm2d


def test_eval_mode_is_the_float_model_but_for_rounding_and_what_is_deployed() -> None:
    torch.manual_seed(0)
    model, inputs = Net().eval(), images()
    expected = model(inputs)
    quantized(model, inputs)
    calibrate(model, [inputs])
    found = model.eval()(inputs)
    assert ((found - expected).norm() / expected.norm()).item() < 0.03
    assert torch.equal(deployment_copy(model)(inputs), found)


@pytest.mark.parametrize("way", ["training", pytest.param("one-shot", marks=pytest.mark.slow)])
def test_they_run_in_integers_from_end_to_end(way: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = Net()
    inputs = images()
    if way == "training":
        quantized(model, inputs)
        train(model, inputs, 2)
        model.eval()
    else:
        model = quantize_model(model.eval(), [inputs] * 2, least_samples=1).model
    path = export_onnx(model, (inputs,), tmp_path / "model.onnx").path
    found = verify_onnx(model, path, (inputs,))
    assert found.ok and found.exact and found.unfused == (), str(found)
    saved = load_model(save_model(model, tmp_path / "saved"), Net())
    assert torch.equal(saved.eval()(inputs), model(inputs))


def test_equalization_passes_them_by() -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 1), ScaleAndBias(1, 4, 1, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    model, inputs = nn.Sequential(*layers).eval(), images()
    done = quantize_model(model, [inputs], least_samples=1)
    assert done.plan.folds == {"0": "1"} and done.equalized == {}


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.inner(x) * 2.0,  # numbers alone
        lambda self, x: self.inner(x) * self.weight + x,  # reads what it is given twice
        lambda self, x: self.inner(x) * self.row,  # of a pixel, not of a channel
        lambda self, x: torch.relu(self.inner(x) * self.weight),
        lambda self, x: self.weight / self.inner(x),
    ],
)
def test_what_does_more_is_no_scale_and_bias(forward: Any) -> None:
    model = written(
        forward, inner=nn.Identity(), weight=nn.Parameter(torch.ones(1, 3, 1, 1)), row=nn.Parameter(torch.ones(12))
    )
    found = trace(nn.Sequential(nn.Conv2d(3, 3, 1), model), (images(),))
    assert not any(node.op == "channel_affine" for node in found.nodes)
