"""Operations that training alone computes, or leaves out: each operation of a forward is known again by itself."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sparsify import ScheduledModifierManager, export_onnx, load_model, save_model, verify_onnx
from sparsify.errors import SparsifyWarning
from sparsify.quantization.calling_places import calling_place
from sparsify.quantization.conversion import quantizers
from sparsify.quantization.forward_ops import asleep, operation_places, switched_off
from sparsify.quantization.plan import QuantizationPlan
from sparsify.quantization.plan_of_model import quantization_of
from tests.loops import quantized
from tests.zoo.quantizable import images
from tests.zoo.quantized_runs import QAT_RECIPE
from tests.zoo.repeated import conv_bn


class Body(nn.Module):
    """A sum, a ReLU and a gate in its own forward, and heads that it uses or not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.bn = conv_bn(3, 4), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.gate, self.last, self.head = nn.Conv2d(4, 4, 1), conv_bn(4, 4, 2), nn.Linear(4, 3)
        self.aux = nn.Conv2d(4, 3, 1)

    def sum(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn(self.conv(x)))

    def gated(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.gate(x))

    def classes(self, x: Tensor) -> Tensor:
        return self.head(self.last(x).mean((2, 3)))


class AuxiliaryHead(Body):
    def forward(self, x: Tensor) -> Any:
        x = self.sum(self.stem(x))
        if self.training:
            y = F.relu(self.aux(x) + 0.5)
            side = torch.cat([y, y * y], 1).mean((2, 3))
        y = self.classes(self.gated(x))
        return (y, side) if self.training else y


class LossInside(Body):
    def forward(self, x: Tensor, target: Tensor | None = None) -> Any:
        features = self.gated(self.sum(self.stem(x)))
        y = self.classes(features)
        if target is None and not self.training:
            return y
        loss = F.cross_entropy(y, torch.zeros(len(y), dtype=torch.long)) + 0.1 * (features * features).mean()
        return y, sum((p * p).sum() * 1e-4 for p in self.parameters()) + loss


class Noise(Body):
    """What training adds is read by what follows."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.training:
            x = x + 0.1 * torch.rand_like(x)
        x = self.sum(x)
        x = x * (torch.rand_like(x) > 0.1) if self.training else x
        return self.classes(self.gated(x))


class OtherCode(Body):
    """The same in other lines; the second branch is that of the trace."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.bn(self.conv(x)) + x) if self.training else self.sum(x)
        return self.classes(self.gated(x))


class Checkpointed(Body):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = checkpoint(self.sum, x, use_reentrant=False) if self.training else self.sum(x)
        return self.classes(self.gated(x))


class OneLine(Body):
    """One line, twice the same function, of which the first comes in training alone."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = (F.relu(self.aux(x)).mean() if self.training else 0.0) * 0.1 + F.relu(self.bn(self.conv(x)))
        return self.classes(self.gated(x))


def trained(kind: type[nn.Module], steps: int = 2) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    model, inputs = kind(), images()
    quantized(model, inputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        found: Any = model(inputs)
        optimizer.zero_grad()
        sum(each.square().mean() for each in (found if isinstance(found, tuple) else (found,))).backward()
        optimizer.step()
    return model, inputs


KINDS = [AuxiliaryHead, LossInside, Noise, OtherCode, Checkpointed, OneLine]


@pytest.mark.parametrize("kind", KINDS)
def test_what_training_computes_besides_leaves_the_rest_in_integers(kind: type[nn.Module]) -> None:
    model, inputs = trained(kind)
    assert switched_off(model) == [] and asleep(model) == []
    assert all(quantizer.enabled and quantizer.batches >= 1 for quantizer in quantizers(model))
    read: list[Tensor] = []
    model.last[0].register_forward_pre_hook(lambda module, args: read.append(args[0]))
    for training in (True, False):
        model.train(training)(inputs)
        steps = read.pop() / model.multiply_0_quantizer.scale
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k is AuxiliaryHead else pytest.mark.slow) for k in KINDS])
def test_it_exports_as_integers_from_end_to_end(kind: type[nn.Module], tmp_path: Path) -> None:
    model, inputs = trained(kind)
    path = export_onnx(model.eval(), (inputs,), tmp_path / "model.onnx").path
    found = verify_onnx(model, path, (inputs,))
    assert found.ok and found.exact and found.unfused == (), str(found)


def test_ranges_of_the_traced_operations_see_nothing_of_the_others() -> None:
    class Large(Body):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            if self.training:
                F.relu(self.aux(x) + 1e6)
            return self.classes(self.sum(x))

    model, _ = trained(Large)
    assert model.relu_0_quantizer.high < 100


def test_what_training_leaves_out_is_in_float_until_training_comes_there() -> None:
    class Optional(Body):
        skips = True

        def forward(self, x: Tensor) -> Tensor:
            x = self.sum(self.stem(x))
            return self.classes(x if self.skips and self.training else self.gated(x))

    torch.manual_seed(0)
    model, inputs = Optional(), images()
    quantized(model, inputs)
    with pytest.warns(SparsifyWarning, match=r"did not compute multiply 0, gate 0 \(counted from 0\)"):
        model(inputs)
    names = ["gate_0_quantizer", "multiply_0_quantizer"]
    assert sorted(asleep(model)) == names and switched_off(model) == []
    model(inputs).sum().backward()
    # What it has no range for has no grid either.
    model.eval()(inputs)
    model.train()
    model.skips = False
    model(inputs)
    assert asleep(model) == [] and model.multiply_0_quantizer.batches == 1 and model.multiply_0_quantizer.enabled
    model.skips = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(inputs)
    assert asleep(model) == []


def test_what_evaluation_alone_computes_is_exported_in_float(tmp_path: Path) -> None:
    class Logits(Body):
        def forward(self, x: Tensor) -> Tensor:
            x = self.aux(self.last(self.sum(self.stem(x))))
            return x if self.training else torch.sigmoid(x) * 2.0

    torch.manual_seed(0)
    model, inputs = Logits(), images()
    quantized(model, inputs)
    with pytest.warns(SparsifyWarning, match="did not compute gate 0"):
        model(inputs)
    path = export_onnx(model.eval(), (inputs,), tmp_path / "model.onnx").path
    assert verify_onnx(model, path, (inputs,)).ok
    saved = load_model(save_model(model, tmp_path / "saved"), Logits())
    assert asleep(saved) == ["gate_0_quantizer"] and torch.equal(saved.eval()(inputs), model(inputs))


def test_places_are_in_the_plan_and_hold_for_a_fresh_model() -> None:
    model, _ = trained(OtherCode)
    plan = quantization_of(model)
    # Two places of one sum: that of the trace, and that of training.
    assert len(plan.places[""]["add"]) == 2 and set(plan.places[""]["add"].values()) == {0}
    again = QuantizationPlan.from_state(json.loads(json.dumps(plan.to_state())))
    assert again == plan and again.places == plan.places
    assert all(" > " in place and place.startswith("forward:") for place in plan.places[""]["multiply"])
    assert operation_places(copy.deepcopy(model)) == operation_places(model)


def test_a_resumed_run_goes_on_to_the_bit() -> None:
    """The first step of a fresh model is one of training: nothing but the state tells which operation is which."""

    def made() -> tuple[Any, Any, Any]:
        torch.manual_seed(0)
        model = AuxiliaryHead()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        manager = ScheduledModifierManager.from_yaml(QAT_RECIPE)
        manager.modify(model, optimizer, steps_per_epoch=2, sample_inputs=(images(),))
        return model, optimizer, manager

    def step(model: Any, optimizer: Any) -> float:
        optimizer.zero_grad()
        loss = sum(out.square().mean() for out in model(torch.ones(2, 3, 8, 8)))
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    model, optimizer, manager = made()
    step(model, optimizer)
    states = copy.deepcopy((manager.state_dict(), model.state_dict(), optimizer.state_dict()))
    expected = [step(model, optimizer) for _ in range(3)]
    model, optimizer, manager = made()
    for part, state in zip((manager, model, optimizer), states, strict=True):
        part.load_state_dict(state)
    assert [step(model, optimizer) for _ in range(3)] == expected
    assert switched_off(model) == [] and asleep(model) == []


def test_a_place_is_told_by_line_and_column() -> None:
    def outer(called: Callable[[], Any]) -> Any:
        return called()

    def inner() -> list[str]:
        return [calling_place(outer.__code__), calling_place(outer.__code__)]

    first, second = outer(inner)
    assert first != second and first.startswith("inner:1.") and second.startswith("inner:1.")
    assert outer(inner) == [first, second]
