"""Hard swish, hard sigmoid and others that a user's module writes out run as torch's own do."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify import export_onnx, quantize_model, verify_onnx
from sparsify.errors import StateError
from sparsify.model.trace import trace
from sparsify.quantization.plan import QuantizationPlan, apply_plan, undo_plan
from sparsify.quantization.plan_of_model import quantization_of
from tests.loops import quantized, train
from tests.zoo.quantizable import images
from tests.zoo.small import written


class HardSigmoid(nn.Module):
    """As in many ports of MobileNetV3."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU6(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + 3) / 6


class HardSwish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = HardSigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class Net(nn.Module):
    """A gate of channels, and one activation in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 2, 1)
        self.down, self.up = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, 1)
        self.act, self.gate = HardSwish(), HardSigmoid()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.inner(self.act(self.stem(x))))
        return self.last(x * self.gate(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True))))))


WORDS: dict[str, tuple[str, Any]] = {
    "product first": ("hardswish", lambda self, x: x * F.relu6(x + 3) / 6),
    "by clamp": ("hardswish", lambda self, x: x * (x / 6 + 0.5).clamp(0, 1)),
    "number first": ("hardswish", lambda self, x: x * torch.clamp(3 + x, 0, 6) * (1 / 6)),
    "hard sigmoid": ("hardsigmoid", lambda self, x: F.hardtanh(x + 3, 0.0, 6.0) / 6),
    "swish": ("silu", lambda self, x: x * torch.sigmoid(x)),
    "swish by exp": ("silu", lambda self, x: x / (1 + torch.exp(-x))),
    "sigmoid": ("sigmoid", lambda self, x: 1 / (1 + torch.exp(-x))),
    "tanh": ("tanh", lambda self, x: 2 * torch.sigmoid(2 * x) - 1),
}
OTHERS: list[Any] = [
    lambda self, x: x * torch.sigmoid(1.702 * x),
    lambda self, x: (0.2 * x + 0.5).clamp(0, 1),
    lambda self, x: x * torch.sigmoid(x) + x.mean(),
    lambda self, x: x * torch.sigmoid(x) * self.weight,
]


def operations(forward: Any) -> list[str]:
    model = written(forward, weight=nn.Parameter(torch.ones(1)))
    found = trace(nn.Sequential(nn.Conv2d(3, 3, 1), model), (images(),))
    return [node.op for node in found.nodes if node.owner == "1"]


@pytest.mark.parametrize("words", WORDS)
def test_it_is_the_activation_of_torch_in_other_words(words: str) -> None:
    name, forward = WORDS[words]
    assert operations(forward) == [name]


@pytest.mark.parametrize("forward", OTHERS)
def test_what_computes_something_else_is_none(forward: Any) -> None:
    assert len(operations(forward)) > 1


@pytest.mark.parametrize("way", ["training", pytest.param("one-shot", marks=pytest.mark.slow)])
def test_it_runs_in_integers(way: str, tmp_path: Path) -> None:
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


def test_the_plan_survives_files_copies_and_an_undo() -> None:
    torch.manual_seed(0)
    model, inputs = Net(), images()
    before = list(model.state_dict())
    plan = quantized(model, inputs)
    assert {site.gate for site in plan.sites if site.module == "act"} == {"hardswish"}
    model(inputs)
    twin = pickle.loads(pickle.dumps(model.eval()))
    assert torch.equal(twin(inputs), model(inputs))
    assert set(quantization_of(copy.deepcopy(model)).sites) == set(plan.sites)
    again = Net()
    apply_plan(again, QuantizationPlan.from_state(json.loads(json.dumps(plan.to_state()))))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(inputs), model(inputs))
    undo_plan(model)
    assert list(model.state_dict()) == before and type(model.act) is HardSwish and "_function" not in vars(model.act)


def test_a_plan_for_another_activation_is_refused() -> None:
    model = Net()
    plan = quantized(copy.deepcopy(model), images())
    model.act = written(lambda self, x: x * torch.sigmoid(1.702 * x))
    with pytest.raises(StateError, match=r"act is a .* computes none of hardswish"):
        apply_plan(model, plan)
