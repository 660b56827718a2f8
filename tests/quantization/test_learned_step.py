"""Learned step size: gradients by the paper's formula, parameters in the user's optimizer, and nets that are better."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify import QuantizationModifier, ScheduledModifierManager, export_onnx, verify_onnx
from sparsify.errors import DataError, StateError
from sparsify.quantization.deployment import deployment_copy
from sparsify.quantization.learned_step import LearnedQuantize, LearnedStep, learned_parameters
from sparsify.quantization.scheme import ActivationScheme, QuantizationSettings, Scheme, WeightScheme
from tests.loops import image_batches, quantized, train, train_step
from tests.zoo.quantizable import ResidualNet, images, mlp

STEPS = 4


def scheme(bits: int = 4, **weights: Any) -> Scheme:
    return Scheme(
        input_activations=ActivationScheme(observer="lsq", num_bits=bits),
        weights=WeightScheme(num_bits=bits, observer="lsq", **weights),
    )


def reference(
    x: Tensor, grad: Tensor, step: float, offset: float, first: int, last: int
) -> tuple[Tensor, float, float]:
    """(gradient by x, by the step, by the offset), one element after another, as in the papers."""
    by_x, by_step, by_offset = torch.zeros_like(x), 0.0, 0.0
    zero = min(max(round(-offset / step), first), last) if offset else 0
    for index, (value, g) in enumerate(zip(x.tolist(), grad.tolist(), strict=True)):
        t = value / step
        if t <= first - zero:
            by_step, by_offset = by_step + g * first, by_offset + g
        elif t >= last - zero:
            by_step, by_offset = by_step + g * last, by_offset + g
        else:
            by_step += g * (round(t) - t)
            by_x[index] = g
    return by_x, by_step, by_offset


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gradients_of_weights_are_those_of_the_paper(bits: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 40, requires_grad=True)
    q_max = 2 ** (bits - 1) - 1
    module = LearnedStep(weight, axis=0, q_max=q_max)
    first = 2 * weight.abs().mean(1) / q_max**0.5
    torch.testing.assert_close(module.step.flatten(), torch.minimum(first, weight.abs().amax(1) / q_max))
    with torch.no_grad():
        module.step.mul_(0.7)  # some are clipped, whatever the bits
    fake = module(weight)
    grad = torch.randn_like(fake)
    fake.backward(grad)
    assert weight.grad is not None and module.step.grad is not None
    clipped = 0
    for row in range(5):
        step = module.step[row].item()
        by_x, by_step, _ = reference(weight[row].detach(), grad[row], step, 0.0, -q_max, q_max)
        assert torch.equal(weight.grad[row], by_x)
        clipped += int((by_x == 0).sum())
        assert module.step.grad[row].item() == pytest.approx(by_step / (40 * q_max) ** 0.5, rel=1e-3, abs=1e-5)
    assert clipped


@pytest.mark.parametrize(("symmetric", "relu"), [(True, False), (False, True), (False, False)])
def test_gradients_of_activations_are_those_of_the_paper(symmetric: bool, relu: bool) -> None:
    torch.manual_seed(0)
    quantizer = LearnedQuantize("x", bits=4, symmetric=symmetric, relu=relu)
    x = torch.randn(6, 10) + 0.5
    quantizer(x)
    assert (quantizer.offset is None) == (symmetric or relu)
    with torch.no_grad():
        quantizer.step.mul_(0.6)
    x = x.requires_grad_()
    y = quantizer(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    offset = 0.0 if quantizer.offset is None else quantizer.offset.item()
    wanted = reference(
        x.detach().flatten(), grad.flatten(), quantizer.step.item(), offset, quantizer.first, quantizer.last
    )
    factor = 1 / (10 * quantizer.last) ** 0.5
    assert x.grad is not None and quantizer.step.grad is not None
    assert torch.equal(x.grad.flatten(), wanted[0])
    assert quantizer.step.grad.item() == pytest.approx(factor * wanted[1], rel=1e-4)
    if quantizer.offset is not None:
        assert quantizer.offset.grad is not None
        assert quantizer.offset.grad.item() == pytest.approx(factor * wanted[2], rel=1e-4)
    # What eval computes has the same grid.
    torch.testing.assert_close(quantizer.eval()(x), y, rtol=0, atol=1e-6)


def start(manager: ScheduledModifierManager, decay: float = 0.1) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = ResidualNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=decay)
    assert manager.modify(model, optimizer, steps_per_epoch=STEPS) is optimizer
    return model, optimizer


def test_the_users_optimizer_trains_the_steps_without_decay_until_they_are_frozen() -> None:
    manager = ScheduledModifierManager(
        [QuantizationModifier(start_epoch=0.0, scheme=scheme(), disable_quantization_observer_epoch=1.0)]
    )
    model, optimizer = start(manager)
    data = image_batches(2 * STEPS)
    train_step(model, optimizer, data[0], 1.0, set_to_none=False)
    steps = learned_parameters(model)
    assert len(steps) > 6
    group = optimizer.param_groups[1]
    assert (
        group["weight_decay"] == 0.0
        and group["lr"] == 0.02
        and {id(p) for p in group["params"]} == {id(p) for p in steps.values()}
    )
    before = {name: parameter.detach().clone() for name, parameter in steps.items()}
    for x in data[1:STEPS]:
        train_step(model, optimizer, x, 1.0, set_to_none=False)
    moved = [name for name, value in before.items() if not torch.equal(value, steps[name])]
    assert len(moved) > 0.8 * len(before)
    before = {name: parameter.detach().clone() for name, parameter in steps.items()}
    for x in data[STEPS:]:
        train_step(model, optimizer, x, 1.0, set_to_none=False)
    assert all(torch.equal(value, steps[name]) for name, value in before.items())
    manager.finalize(model)
    assert len(optimizer.param_groups) == 1 and not {id(p) for p in steps.values()} & {id(p) for p in optimizer.state}


@pytest.mark.parametrize("stop", range(1, 3 * STEPS, 2))
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(stop: int) -> None:
    fields: dict[str, Any] = dict(start_epoch=0.5, scheme=scheme(), disable_quantization_observer_epoch=2.0)
    data = image_batches(3 * STEPS)
    manager = ScheduledModifierManager([QuantizationModifier(**fields)])
    model, optimizer = start(manager)
    losses = []
    for index, x in enumerate(data):
        if index == stop:
            saved = copy.deepcopy((manager.state_dict(), model.state_dict(), optimizer.state_dict()))
        losses.append(train_step(model, optimizer, x, 1.0, set_to_none=False))
    again = ScheduledModifierManager([QuantizationModifier(**fields)])
    fresh, other = start(again)
    again.load_state_dict(saved[0])
    fresh.load_state_dict(saved[1])
    other.load_state_dict(saved[2])
    assert [train_step(fresh, other, x, 1.0, set_to_none=False) for x in data[stop:]] == losses[stop:]
    for name, value in model.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name


@pytest.mark.parametrize("strategy", ["tensor", "channel"])
def test_eval_mode_deployment_and_file_are_what_was_learned(strategy: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, x = ResidualNet(), images()
    quantized(model, x, settings=QuantizationSettings(scheme=scheme(8, strategy=strategy)))
    train(model, x, 6)
    deployed = deployment_copy(model)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(x), deployed(x))
    assert not learned_parameters(deployed)
    file = export_onnx(model, x, tmp_path / "net.onnx")
    assert not file.floating
    verification = verify_onnx(model, file, x)
    assert verification.ok and verification.exact, str(verification)


def test_copies_pickles_and_casts_keep_the_steps() -> None:
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(16, 6)
    quantized(model, x, settings=QuantizationSettings(scheme=scheme()))
    train(model, x, 3)
    keys = {name: value.clone() for name, value in learned_parameters(model).items()}
    other = copy.deepcopy(model).half().float()
    assert all(torch.equal(value, keys[name]) for name, value in learned_parameters(other).items())


def test_calibration_sets_the_first_steps() -> None:
    data = image_batches(3)
    manager = ScheduledModifierManager([QuantizationModifier(start_epoch=0.0, scheme=scheme())])
    torch.manual_seed(0)
    model = ResidualNet()
    manager.modify(model, torch.optim.SGD(model.parameters(), lr=0.1), 4, sample_inputs=data[0], calibration_data=data)
    first: Any = model.get_submodule("stem.input_quantizer")
    assert first.batches.item() == 3
    wanted = torch.stack([(x.amax() - x.amin()) / 15 for x in data]).mean()
    torch.testing.assert_close(first.step.detach(), wanted)


def test_nan_and_an_optimizer_of_one_group_are_refused() -> None:
    fields: dict[str, Any] = dict(start_epoch=0.0, scheme=scheme())
    manager = ScheduledModifierManager([QuantizationModifier(**fields)])
    model, optimizer = start(manager)
    with pytest.raises(DataError, match=r"stem\.input_quantizer: its values hold NaN"):
        train_step(model, optimizer, torch.full((2, 3, 12, 12), float("nan")), 1.0, set_to_none=False)
    model = ResidualNet()
    manager = ScheduledModifierManager([QuantizationModifier(**fields)])
    with pytest.raises(StateError, match="lsq trains scales, and LBFGS takes no further"):
        manager.modify(model, torch.optim.LBFGS(model.parameters()), 4, sample_inputs=images())
    assert not learned_parameters(model)


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits

    found = load_digits()
    x, y = torch.tensor(found.images, dtype=torch.float32).div(16).unsqueeze(1), torch.tensor(found.target)
    return x[:1200], y[:1200], x[1200:], y[1200:]


@pytest.mark.parametrize(("bits", "kind"), [(2, "sgd"), (2, "adam"), (3, "sgd")])
def test_few_bits_learn_better_than_with_the_largest_weight(bits: int, kind: str) -> None:
    x, y, test_x, test_y = digits()
    losses, right = {}, {}
    for observer in ("min_max", "lsq"):
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)),
        )
        weights = WeightScheme(num_bits=bits, observer=observer)  # type: ignore[arg-type]
        manager = ScheduledModifierManager([QuantizationModifier(start_epoch=0.0, scheme=Scheme(weights=weights))])
        if kind == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        else:
            optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        manager.modify(model, optimizer, steps_per_epoch=12)
        generator = torch.Generator().manual_seed(1)
        for _ in range(6):
            total = 0.0
            for rows in torch.randperm(1200, generator=generator).split(100):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
                loss.backward()
                optimizer.step()
                total += loss.item()
        manager.finalize(model)
        losses[observer] = total / 12
        with torch.no_grad():
            right[observer] = model.eval()(test_x).argmax(1) == test_y
    assert losses["lsq"] <= losses["min_max"]
    # Which kernels a CPU has decides single images. If both were equally good, an image that only one of them gets
    # right would fall to either with 1/2: of d such images the difference has a deviation of sqrt(d). 0.005 of 597
    # images, the bound before, were 2.985: less than one deviation where d > 9.
    apart = int((right["lsq"] ^ right["min_max"]).sum())
    assert int(right["lsq"].sum()) >= int(right["min_max"].sum()) - 2 * apart**0.5
