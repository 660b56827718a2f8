"""Distillation of features: the formula over a whole run, projections in the user's optimizer, saved and resumed."""

from __future__ import annotations

import copy
import io
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from sparsify.errors import ArgumentError, StateError, TargetError
from sparsify.modifiers.layer_distillation import PerLayerDistillationModifier
from sparsify.training.manager import ScheduledModifierManager
from tests.loops import same_bits, train_step
from tests.zoo.small import perceptron

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
NAMES = {"student_layer_names": ["0", "2"], "teacher_layer_names": ["0", "2"]}


def network(width: int = 5, seed: int = 0) -> nn.Sequential:
    return perceptron(4, width, 3, activation=partial(nn.ReLU, inplace=True), seed=seed)


def manager_of(**fields: Any) -> ScheduledModifierManager:
    return ScheduledModifierManager([PerLayerDistillationModifier(**{**NAMES, **fields})])


def optimizer_of(model: nn.Module, kind: str = "adam") -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return torch.optim.Adam(model.parameters(), lr=0.01)


def train(manager: Any, model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor = X) -> float:
    return train_step(model, optimizer, x, update=manager.update_loss)


def projection(wide: int, narrow: int, number: int) -> torch.Tensor:
    drawn = torch.rand(wide, narrow, generator=torch.Generator().manual_seed(number))
    return (drawn * 2 - 1) / narrow**0.5


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("width", [5, 9])
def test_a_run_is_the_formula(kind: str, normalize: bool, width: int) -> None:
    """Student 5 wide, teacher `width`: projected where that differs."""
    model, reference, teacher = network(), network(), network(width, 7).requires_grad_(False)
    optimizer, plain = optimizer_of(model, kind), optimizer_of(reference, kind)
    manager = manager_of(gain=0.7, normalize=normalize, epsilon=0.01, start_epoch=1.0, end_epoch=3.0)
    manager.modify(model, optimizer, steps_per_epoch=2, distillation_teacher=teacher)
    weight = nn.Parameter(projection(width, 5, 0))
    for step in range(8):
        if step == 2 and width != 5:
            plain.add_param_group({"params": [weight]})
        plain.zero_grad()
        first = functional.linear(X, reference[0].weight, reference[0].bias)
        last = functional.linear(first.relu(), reference[2].weight, reference[2].bias)
        loss = last.square().mean()
        if 2 <= step < 6:
            wide = functional.linear(X, teacher[0].weight, teacher[0].bias)
            wanted = functional.linear(wide.relu(), teacher[2].weight, teacher[2].bias)
            for mine, theirs in ((first if width == 5 else first @ weight.T, wide), (last, wanted)):
                error = ((mine - theirs) ** 2).mean()
                loss = loss + 0.7 * (error / ((theirs**2).mean() + 0.01) if normalize else error)
        loss.backward()
        plain.step()
        assert train(manager, model, optimizer) == pytest.approx(float(loss.detach()), rel=1e-5)
        assert len(optimizer.param_groups) == (2 if width != 5 and 2 <= step < 5 else 1), step
        for a, b in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert len(optimizer.state) == 4


@pytest.mark.parametrize("fields", [{"gain": 0.0}, {"start_epoch": 9.0}])
def test_without_a_share_the_run_is_a_plain_one(fields: dict[str, Any]) -> None:
    model, reference = network(), network()
    optimizer, plain = optimizer_of(model), optimizer_of(reference)
    manager = manager_of(**fields)
    manager.modify(model, optimizer, steps_per_epoch=2, distillation_teacher=network(9))
    for _ in range(5):
        plain.zero_grad()
        loss = reference(X).square().mean()
        loss.backward()
        plain.step()
        assert train(manager, model, optimizer) == float(loss.detach())
    assert same_bits(model.state_dict(), reference.state_dict()) and len(optimizer.param_groups) == 1


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("teacher", ["self", "wide"])
def test_a_run_resumed_at_every_step_is_the_one_that_never_stopped(kind: str, teacher: str) -> None:
    def begun(seed: int) -> Any:
        model = network(seed=seed)
        optimizer = optimizer_of(model, kind)
        manager = manager_of(start_epoch=1.0, end_epoch=3.0)
        other: Any = "self" if teacher == "self" else network(9, 7)
        manager.modify(model, optimizer, steps_per_epoch=2, distillation_teacher=other)
        return manager, model, optimizer

    manager, model, optimizer = begun(0)
    saved = []
    for _ in range(8):
        saved.append(copy.deepcopy((manager.state_dict(), model.state_dict(), optimizer.state_dict())))
        train(manager, model, optimizer)
    for step, (state, weights, memory) in enumerate(saved):
        second, again, other = begun(3)
        file = io.BytesIO()
        torch.save((state, weights, memory), file)
        file.seek(0)
        state, weights, memory = torch.load(file, weights_only=True)
        second.load_state_dict(state)
        again.load_state_dict(weights)
        other.load_state_dict(memory)
        for _ in range(8 - step):
            train(second, again, other)
        assert same_bits(again.state_dict(), model.state_dict()), step


def test_projections_leave_no_trace_in_the_optimizer() -> None:
    model = network()
    optimizer = optimizer_of(model)
    manager = manager_of()
    manager.modify(model, optimizer, steps_per_epoch=2, distillation_teacher=network(9))
    before = torch.get_rng_state()
    train(manager, model, optimizer)
    assert torch.equal(before, torch.get_rng_state())
    assert len(optimizer.param_groups) == 2 and len(optimizer.state) == 5
    manager.finalize(model)
    manager.finalize(model)
    assert len(optimizer.param_groups) == 1 and len(optimizer.state) == 4
    optimizer_of(network()).load_state_dict(optimizer.state_dict())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 0.5**n),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, 10),
        lambda o: torch.optim.lr_scheduler.StepLR(o, 1),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o),
    ],
)
def test_schedulers_go_on_working(make: Any, when: str) -> None:
    model = network()
    optimizer = optimizer_of(model)
    manager = manager_of(end_epoch=2.0)
    scheduler = make(optimizer) if when == "before" else None
    manager.modify(model, optimizer, steps_per_epoch=2, distillation_teacher=network(9))
    scheduler = scheduler or make(optimizer)
    for step in range(6):
        train(manager, model, optimizer)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == [rates[0]] * (2 if step < 3 else 1)
        scheduler.step(*([1.0] if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else []))


def test_convolutions_are_projected_along_their_channels() -> None:
    torch.manual_seed(0)
    model, teacher = nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.Conv2d(3, 7, 3))
    manager = manager_of(student_layer_names=None, teacher_layer_names=None, gain=1.0, normalize=False)
    manager.modify(model, optimizer_of(model), 2, distillation_teacher=teacher)
    x = torch.randn(2, 3, 6, 6)
    found = manager.update_loss(model(x).sum() * 0)
    mine = functional.conv2d(model[0](x), projection(7, 4, 0)[:, :, None, None])
    torch.testing.assert_close(found, functional.mse_loss(mine, teacher[0](x)))


def test_a_layer_is_seen_before_what_works_in_place_on_it() -> None:
    model, teacher = network(), network(seed=7)
    manager = manager_of(student_layer_names="0", teacher_layer_names="0", gain=1.0, normalize=False)
    manager.modify(model, optimizer_of(model), 2, distillation_teacher=teacher)
    found = manager.update_loss(model(X).sum() * 0)
    torch.testing.assert_close(found, functional.mse_loss(model[0](X), teacher[0](X)))


def test_an_evaluation_does_not_take_the_place_of_the_batch() -> None:
    model = network()
    manager = manager_of(gain=1.0)
    manager.modify(model, optimizer_of(model), 2, distillation_teacher=network(seed=7))
    wanted = manager.update_loss(model(X).sum() * 0)
    model(X + 1).sum()
    loss = model(X).sum() * 0
    with torch.no_grad():
        model(X + 2)
    assert torch.equal(manager.update_loss(loss), wanted)


@pytest.mark.parametrize(
    ("fields", "teacher", "error", "text"),
    [
        ({"teacher_layer_names": ["0"]}, network(), TargetError, r"student_layer_names are 2 layers .* and teacher_l"),
        ({"teacher_layer_names": ["0", "9"]}, network(), TargetError, r"teacher_layer_names: '9' matches nothing"),
        ({"student_layer_names": ["0", "9"]}, network(), TargetError, r"student_layer_names: '9' matches nothing"),
        ({}, None, ArgumentError, "PerLayerDistillationModifier needs a teacher"),
    ],
)
def test_names_that_do_not_fit_are_refused(fields: Any, teacher: Any, error: Any, text: str) -> None:
    model = network()
    with pytest.raises(error, match=text):
        manager_of(**fields).modify(model, optimizer_of(model), 2, distillation_teacher=teacher)


def test_features_that_do_not_fit_are_refused() -> None:
    model = network()
    for fields, text in (({"project_features": False}, r"\(6, 5\), '0' of the teacher \(6, 9\).*project_features"),):
        manager = manager_of(**fields)
        manager.modify(model, optimizer_of(model), 2, distillation_teacher=network(9))
        with pytest.raises(StateError, match=text):
            manager.update_loss(model(X).sum())
        manager.finalize(model)
    manager = manager_of()
    optimizer = torch.optim.LBFGS(model.parameters())
    manager.modify(model, optimizer, 2, distillation_teacher=network(9))
    with pytest.raises(StateError, match="LBFGS takes no further parameter groups"):
        manager.update_loss(model(X).sum())


def test_a_compiled_model_says_what_to_do() -> None:
    model = network()
    manager = manager_of()
    manager.modify(model, optimizer_of(model), 2, distillation_teacher="self")
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(StateError, match=r"features of layer '0' were not seen.*Train the model uncompiled"):
        manager.update_loss(compiled(X).sum())
    manager.finalize(model)
    assert model(X).isfinite().all()


def test_the_projections_of_other_layers_are_refused() -> None:
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = network(9)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.b(self.a(x)))

    manager, other = manager_of(teacher_layer_names="Linear"), manager_of(teacher_layer_names="Linear")
    model, again = network(), network()
    optimizer = optimizer_of(again)
    manager.modify(model, optimizer_of(model), 2, distillation_teacher=network(9))
    other.modify(again, optimizer, 2, distillation_teacher=Renamed())
    manager.update_loss(model(X).sum())
    with pytest.raises(StateError, match="a projection for '0 -> 0', which is no pair of layers here"):
        other.load_state_dict(manager.state_dict())
    assert len(optimizer.param_groups) == 1


def test_a_loop_that_clears_the_gradients_of_the_model_is_as_good() -> None:
    ends = []
    for clears_optimizer in (True, False):
        model = network()
        optimizer = optimizer_of(model, "sgd")
        manager = manager_of()
        manager.modify(model, optimizer, 2, distillation_teacher=network(9, 7))
        for _ in range(4):
            optimizer.zero_grad() if clears_optimizer else model.zero_grad()
            manager.update_loss(model(X).square().mean()).backward()
            optimizer.step()
        ends.append(model.state_dict())
    assert same_bits(*ends)
