"""Blocks that are called several times in one forward: what they compute is in integers in every call."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify import export_onnx, quantize_model, verify_onnx
from sparsify.model.trace import trace
from sparsify.quantization.calibration import calibrate
from sparsify.quantization.placement import make_plan
from sparsify.quantization.plan import QuantizationPlan
from sparsify.quantization.scheme import QuantizationSettings
from tests.loops import quantized
from tests.zoo.quantizable import images
from tests.zoo.repeated import Recurrent, SharedNorm, SharedTower, Siamese, conv_bn
from tests.zoo.small import written


def plan_of(model: nn.Module, *inputs: Tensor) -> QuantizationPlan:
    return make_plan(model, trace(model, inputs), QuantizationSettings())


def trained(model: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
    """Quantized, after two steps of training."""
    model.train()
    quantized(model, *inputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        found: Any = model(*inputs)
        sum(out.square().mean() for out in (found if isinstance(found, list) else [found])).backward()
        optimizer.step()
    return model.eval()


KINDS: dict[type[nn.Module], int] = {Siamese: 2, Recurrent: 1, SharedTower: 1, SharedNorm: 1}
"""Network -> how many inputs it takes."""


def test_a_block_that_is_called_twice_has_the_plan_of_one_that_is_called_once() -> None:
    plan = plan_of(Siamese(), images(), images())
    assert plan.folds == {
        "backbone.stem.0": "backbone.stem.1",
        "backbone.residual.conv1": "backbone.residual.bn1",
        "backbone.residual.conv2": "backbone.residual.bn2",
        "backbone.last.0": "backbone.last.1",
        "mix.0": "mix.1",
    }
    once = plan_of(Siamese().backbone, images())
    names = {site.name for site in plan.sites if site.module.startswith("backbone")}
    # Each activation within has the one quantizer that it has in a network which is called once.
    assert {f"backbone.{site.name}" for site in once.sites if not site.name.startswith("stem.2")} - {
        "backbone.last.2.output_quantizer"
    } <= names
    assert plan.left == () and QuantizationPlan.from_state(plan.to_state()) == plan


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind is Recurrent else pytest.mark.slow) for kind in KINDS]
)
def test_training_and_one_shot_give_integers_from_end_to_end(kind: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = kind(), tuple(images() for _ in range(KINDS[kind]))
    one_shot = quantize_model(copy.deepcopy(model).eval(), [inputs] * 2, least_samples=1).model
    for number, each in enumerate((trained(model, inputs), one_shot)):
        path = export_onnx(each, inputs, tmp_path / f"{number}.onnx").path
        found = verify_onnx(each, path, inputs)
        assert found.ok and found.exact and found.unfused == (), str(found)


def test_a_norm_that_stands_behind_some_calls_of_a_layer_is_a_layer_of_its_own() -> None:
    model: Any = written(
        lambda self, x: self.last(self.conv(torch.relu(self.bn(self.conv(x))))),
        conv=nn.Conv2d(3, 3, 1),
        bn=nn.BatchNorm2d(3),
        last=nn.Conv2d(3, 2, 1),
    )
    plan = plan_of(model, images())
    assert plan.folds == {} and [norm.name for norm in plan.alone] == ["bn"]


def test_a_norm_behind_several_layers_is_a_layer_of_its_own_in_every_call() -> None:
    plan = plan_of(SharedNorm(), images())
    assert [(norm.name, norm.rank) for norm in plan.alone] == [("bn", 4)] and plan.left == ()
    sites = {site.name: site for site in plan.sites}
    assert sites[plan.alone[0].source].shared_with is None
    # One grid for all that it reads: of the first convolution, and of the sum behind the second.
    assert sites["add_0_quantizer"].shared_with == "stem.output_quantizer"


def test_why_calls_disagree_is_said() -> None:
    def pairs(forward: Any) -> dict[str, str | None]:
        model = written(forward, conv=nn.Conv2d(3, 3, 1), bn=nn.BatchNorm2d(3), other=nn.Conv2d(3, 3, 1))
        return {pair.layer: pair.why_not for pair in trace(model, (images(),)).pairs}

    assert pairs(lambda self, x: self.bn(self.conv(self.bn(self.conv(x))))) == {"conv": None}
    assert pairs(lambda self, x: self.conv(self.bn(self.conv(x)))) == {
        "conv": "conv is called 2 times, and bn stands behind 1 of them"
    }
    assert pairs(lambda self, x: self.bn(self.other(self.bn(self.conv(x))))) == {
        "conv": "bn is called 2 times, 1 of them elsewhere",
        "other": "bn is called 2 times, 1 of them elsewhere",
    }

    def read_elsewhere(self: Any, x: Tensor) -> Tensor:
        first = self.bn(self.conv(x))
        second = self.conv(first)
        return self.bn(second) + second

    assert pairs(read_elsewhere) == {"conv": "what conv gives is also read by add in the model"}


def test_what_is_in_integers_in_one_call_is_so_in_every_call() -> None:
    """One result goes into a sum of integers, the other into a ReLU: one quantizer stands behind the two."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.last = conv_bn(3, 4), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.last(F.relu(self.conv(x)) + self.conv(x + x))

    model, inputs = Twice(), images()
    plan = quantized(model, inputs)
    assert [site.name for site in plan.sites].count("conv.output_quantizer") == 1
    calibrate(model, [inputs])
    model.eval()(inputs)


def test_another_activation_in_another_call_has_no_common_quantizer() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor, gate: bool) -> Tensor:
            x = self.conv(x)
            return torch.sigmoid(x) if gate else torch.tanh(x)

    model: Any = written(
        lambda self, x: self.last(self.block(self.block(self.stem(x), True), False)),
        stem=conv_bn(3, 4),
        block=Block(),
        last=nn.Conv2d(4, 2, 1),
    )
    plan = plan_of(model, images())
    assert not any(site.module == "block" for site in plan.sites)
