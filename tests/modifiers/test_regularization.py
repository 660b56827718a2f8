"""Powerpropagation and the penalty on activations, against references of their own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from sparsify.errors import RecipeError, SparsifyWarning, StateError, TargetError
from sparsify.modifiers.base import Modifier
from sparsify.modifiers.magnitude_pruning import GMPruningModifier
from sparsify.modifiers.regularization import ASRegModifier, PowerpropagationModifier, penalty
from sparsify.modifiers.sparse_training import RigLPruningModifier
from sparsify.training.manager import ScheduledModifierManager
from tests.loops import (
    assert_same_state,
    masks_of,
    regress,
    regression_at_work,
    regression_batch,
    regression_loss,
    regression_model,
    reloaded,
    top_kast,
    weights_of,
    zeros_of,
)
from tests.optimizer_forms import FORMS

STEPS = 10


def power(alpha: float = 2.0, **changed: Any) -> PowerpropagationModifier:
    return PowerpropagationModifier(**{"params": "__ALL_PRUNABLE__", "alpha": alpha, **changed})


def gradual(**changed: Any) -> GMPruningModifier:
    window = {"start_epoch": 1.0, "end_epoch": 4.0, "update_frequency": 1.0}
    return GMPruningModifier(
        **{"params": "__ALL_PRUNABLE__", "init_sparsity": 0.1, "final_sparsity": 0.8, **window, **changed}
    )


class Reparametrized(nn.Module):
    """`network()` with v as its parameters and w computed in forward."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        plain = regression_model()
        self.alpha = alpha
        for number in (0, 2):
            layer = plain[number]  # type: ignore[index]
            w = layer.weight.detach()
            setattr(self, f"v{number}", nn.Parameter(w.sign() * w.abs() ** (1 / alpha)))
            setattr(self, f"b{number}", nn.Parameter(layer.bias.detach()))

    def w(self, number: int) -> Tensor:
        v: Tensor = getattr(self, f"v{number}")
        return v * v.abs() ** (self.alpha - 1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(functional.linear(x, self.w(0), self.b0).tanh(), self.w(2), self.b2)


@pytest.mark.parametrize("alpha", [1.5, 2.0, 4.0])
@pytest.mark.parametrize("form", ["sgd momentum", "sgd fused", "adam", "adamw two groups", "rmsprop centered momentum"])
def test_training_is_that_of_a_reparametrized_network(form: str, alpha: float) -> None:
    model, optimizer, manager = regression_at_work(power(alpha), form)
    reference = Reparametrized(alpha)
    other = FORMS[form](reference)
    for step in range(STEPS):
        regress(model, optimizer, [step])
        regress(reference, other, [step])
        for number in (0, 2):
            found = model.get_parameter(f"{number}.weight")
            assert torch.allclose(found, reference.w(number), rtol=1e-4, atol=1e-6), step
    before = copy.deepcopy(model.state_dict())
    manager.finalize()
    assert_same_state(model.state_dict(), before, "w is what the model holds")


def test_the_model_stays_an_ordinary_one() -> None:
    plain = regression_model()
    parameters = list(plain.parameters())
    model, optimizer, manager = regression_at_work(power(3.0))
    assert_same_state(model.state_dict(), plain.state_dict(), "w at the start is what was there")
    regress(model, optimizer, range(3))
    assert list(model.state_dict()) == list(plain.state_dict()) and type(model[0]) is nn.Linear  # type: ignore[index]
    twin = copy.deepcopy(model)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(regression_batch(0)[0]), model(regression_batch(0)[0]))
    manager.finalize()
    assert not model._forward_pre_hooks
    assert len(parameters) == len(list(twin.parameters()))
    assert torch.equal(twin(regression_batch(0)[0]), model(regression_batch(0)[0]))


def test_gradients_after_a_step_are_those_of_the_weights() -> None:
    model, optimizer, _ = regression_at_work(power(2.0))
    optimizer.zero_grad()
    regression_loss(model, 0).backward()
    before = [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    optimizer.step()
    for p, (gradient, values) in zip(model.parameters(), before, strict=True):
        assert p.grad is gradient and torch.equal(gradient, values)  # type: ignore[arg-type]


def test_an_optimizer_that_steps_inside_of_its_step_steps_once() -> None:
    class Nested(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            return super().step(closure)

    def run(cls: Any) -> Any:
        model = regression_model()
        optimizer = cls(model.parameters(), lr=0.05, momentum=0.9)
        manager = ScheduledModifierManager([power(2.0), top_kast(active_weight_decay=0.1)])
        manager.modify(model, optimizer, steps_per_epoch=2)
        regress(model, optimizer, range(6))
        return model.state_dict()

    assert_same_state(run(Nested), run(torch.optim.SGD), "")


@pytest.mark.parametrize("form", [name for name in FORMS if name not in ("lbfgs", "muon")])
def test_with_an_exponent_of_one_nothing_changes(form: str) -> None:
    plain = regression_model()
    regress(plain, FORMS[form](plain), range(6))
    model, optimizer, _ = regression_at_work(power(1.0), form)
    regress(model, optimizer, range(6))
    assert_same_state(model.state_dict(), plain.state_dict(), form)


@pytest.mark.parametrize("form", ["sgd momentum", "adam"])
def test_zeros_stay_zero(form: str) -> None:
    model = regression_model()
    with torch.no_grad():
        model.get_parameter("0.weight")[:, ::2] = 0
    optimizer = FORMS[form](model)
    ScheduledModifierManager([power(2.0)]).modify(model, optimizer, steps_per_epoch=2)
    regress(model, optimizer, range(STEPS))
    assert zeros_of(model) == {"0.weight": 30, "2.weight": 0}


def test_it_ends_and_training_goes_on_with_the_weights() -> None:
    model, optimizer, manager = regression_at_work(power(2.0, start_epoch=1.0, end_epoch=3.0), "adam")
    plain = regression_model()
    other = FORMS["adam"](plain)
    regress(model, optimizer, range(2))
    regress(plain, other, range(2))
    assert_same_state(model.state_dict(), plain.state_dict(), "before its start")
    regress(model, optimizer, range(2, 6))
    twin = copy.deepcopy(model)
    fresh = FORMS["adam"](twin)
    biases = {name: p for name, p in model.named_parameters() if name.endswith("bias")}
    for name, p in biases.items():  # what the optimizer remembers of others is left alone
        fresh.state[twin.get_parameter(name)] = copy.deepcopy(optimizer.state[p])
    regress(model, optimizer, range(6, 10))
    regress(twin, fresh, range(6, 10))
    assert_same_state(model.state_dict(), twin.state_dict(), "after its end")
    assert not manager.state_dict()["modifiers"]["PowerpropagationModifier"]["roots"]


@pytest.mark.parametrize("form", ["sgd momentum", "adam", "adamw two groups"])
@pytest.mark.parametrize(
    "modifiers",
    [
        [power(2.0, start_epoch=0.5, end_epoch=4.5), gradual()],
        [power(3.0), top_kast(end_epoch=4.0)],
        [
            power(2.0, end_epoch=3.0),
            RigLPruningModifier(
                params="__ALL_PRUNABLE__", final_sparsity=0.6, start_epoch=0, end_epoch=4, update_frequency=1
            ),
        ],
    ],
    ids=["gradual", "top-kast", "rigl"],
)
def test_resuming_at_any_step_equals_never_stopping(form: str, modifiers: list[Modifier]) -> None:
    def states(model: nn.Module, optimizer: Any, manager: Any) -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "manager": manager.state_dict()}

    model, optimizer, manager = run = regression_at_work(modifiers, form)
    found = {0: reloaded(**states(*run))}

    def keep(step: int) -> None:
        found[step] = reloaded(**states(*run))
        assert not any(weights_of(model)[name][~mask].any() for name, mask in masks_of(manager).items())

    regress(model, optimizer, range(STEPS), keep)
    for step in range(STEPS):
        model, optimizer, manager = other = regression_at_work(modifiers, form, seed=step + 1)
        checkpoint_ = copy.deepcopy(found[step])
        manager.load_state_dict(checkpoint_["manager"])
        model.load_state_dict(checkpoint_["model"])
        optimizer.load_state_dict(checkpoint_["optimizer"])
        regress(model, optimizer, range(step, STEPS))
        assert_same_state(states(*other), found[STEPS], f"{form}, resumed at step {step}")


def test_top_kast_inside_of_powerpropagation_trains_both_sets_in_v() -> None:
    """One step by hand: the forward set is seen, the penalty is on w, and the step is one of v."""
    model, optimizer, manager = regression_at_work([power(2.0), top_kast(active_weight_decay=0.1)], "sgd")
    whole = weights_of(regression_model())
    state = manager.state_dict()["modifiers"]["TopKASTPruningModifier"]
    forward = {name: mask.clone() for name, mask in masks_of(manager).items()}
    backward = {name: mask | state["extra"][name] for name, mask in forward.items()}
    optimizer.zero_grad()
    regression_loss(model, 0).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    rest = manager.state_dict()["modifiers"]["TopKASTPruningModifier"]["rest"]
    for name, w in whole.items():
        slope = gradients[name] + w * torch.where(forward[name], 0.1, 0.1 / 0.2)
        v = w.sign() * w.abs().sqrt()
        v = torch.where(backward[name], v - 0.1 * slope * 2 * v.abs(), v)
        found = torch.where(forward[name], weights_of(model)[name], rest[name])
        assert torch.allclose(found, v * v.abs(), rtol=1e-4, atol=1e-6), name
        assert not weights_of(model)[name][~forward[name]].any()


def test_under_a_fused_optimizer_and_a_gradient_scaler() -> None:
    def run(scale: float | None) -> Any:
        model = regression_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)
        ScheduledModifierManager([power(2.0), top_kast()]).modify(model, optimizer, steps_per_epoch=2)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None, growth_interval=1000)
        for step in (0, 99, 1, 2, 3):
            if step == 99 and scale is None:
                continue
            optimizer.zero_grad()
            scaler.scale(regression_loss(model, step) * (float("inf") if step == 99 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
        return model.state_dict()

    assert_same_state(run(1024.0), run(None), "powers of two change no bit")


def test_what_computes_the_loss_inside_of_a_step_is_refused() -> None:
    with pytest.raises(StateError, match="PowerpropagationModifier: LBFGS computes the loss inside of the optimizer's"):
        regression_at_work(power(), "lbfgs")
    model, optimizer, _ = regression_at_work(power(), "sgd")

    def closure() -> Tensor:
        loss = regression_loss(model, 0)
        loss.backward()
        return loss

    with pytest.raises(StateError, match=r"PowerpropagationModifier: step\(closure\) computes the loss inside"):
        optimizer.step(closure)


def test_interrupted_inside_a_step_the_model_ends_with_weights() -> None:
    model, optimizer, manager = regression_at_work(power(3.0))
    regress(model, optimizer, range(3))
    before = copy.deepcopy(model.state_dict())

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    optimizer.register_step_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        regress(model, optimizer, range(3, 4))
    assert not torch.equal(model.get_parameter("0.weight"), before["0.weight"]), "v, in the middle of the step"
    manager.finalize()
    for name, value in model.state_dict().items():
        assert torch.allclose(value, before[name], rtol=1e-5), name


def test_names_that_match_nothing() -> None:
    with pytest.raises(TargetError, match=r"PowerpropagationModifier.params: 'conv' matches nothing"):
        regression_at_work(power(params="conv"))
    with pytest.warns(SparsifyWarning, match="'conv' matches nothing"):
        regression_at_work(power(params=["conv", "0"], strict=False))
    with pytest.raises(RecipeError, match=r"PowerpropagationModifier\.alpha: 0\.5"):
        power(0.5)


# ---------------------------------------------------------------------------------------------- activations


def reference(x: Tensor, function: str) -> Tensor:
    values = x.reshape(-1)
    if function == "hs":
        return sum(abs(v) for v in values) ** 2 / sum(v * v for v in values) / len(values)  # type: ignore[no-any-return]
    each = {"l1": abs, "l2": lambda v: v * v, "relu": lambda v: max(v, 0 * v)}[function]
    return sum(each(v) for v in values) / len(values)  # type: ignore[no-any-return, operator]


@pytest.mark.parametrize("function", ["l1", "l2", "relu", "hs"])
@pytest.mark.parametrize("side", ["inp", "out"])
@pytest.mark.parametrize("normalized", [False, True])
def test_the_penalty_and_its_gradient(function: Any, side: Any, normalized: bool) -> None:
    modifier = ASRegModifier(
        layers=["2", "0"], alpha=[0.5, 2.0], reg_func=function, reg_tens=side, layer_normalized=normalized
    )
    model, _, manager = regression_at_work(modifier)
    inputs, target = regression_batch(0)
    loss = manager.update_loss((model(inputs) - target).square().mean())
    loss.backward()
    twin = regression_model()
    first = twin[0](inputs)  # type: ignore[index]
    hidden = first.tanh()
    out = twin[2](hidden)  # type: ignore[index]
    tensors = {"inp": (inputs, hidden), "out": (first, out)}[side]
    wanted = (out - target).square().mean()
    for x, alpha in zip(tensors, (2.0, 0.5), strict=True):
        wanted = wanted + alpha * reference(x, function) / (2 if normalized else 1)
    wanted.backward()
    assert torch.allclose(loss, wanted)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6)  # type: ignore[arg-type]


def test_hoyers_square_does_not_depend_on_scale() -> None:
    x = torch.tensor([3.0, 0.0, -1.0, 0.5])
    assert penalty(x * 1e-25, "hs").item() == pytest.approx(penalty(x, "hs").item())
    zero = torch.zeros(4, requires_grad=True)
    penalty(zero, "hs").backward()  # type: ignore[no-untyped-call]
    assert zero.grad is not None and not zero.grad.any()
    assert penalty(x.half() * 1e4, "l2").isfinite()


def test_it_acts_inside_of_its_window_and_leaves_nothing_behind() -> None:
    model, optimizer, manager = regression_at_work(
        ASRegModifier(layers="Linear", alpha=1.0, start_epoch=1.0, end_epoch=2.0)
    )
    seen = []
    for step in range(6):
        optimizer.zero_grad()
        loss = regression_loss(model, step)
        updated = manager.update_loss(loss)
        seen.append(updated is not loss)
        assert bool(model[0]._forward_hooks) == seen[-1]  # type: ignore[index]
        updated.backward()
        optimizer.step()
    assert seen == [False, False, True, True, False, False]
    model, _, manager = regression_at_work(ASRegModifier(layers="Linear", alpha=1.0))
    twin = copy.deepcopy(model)
    manager.finalize()
    assert not any(module._forward_hooks for module in model.modules())
    twin(regression_batch(0)[0]).sum().backward()


def test_a_weight_of_zero_changes_nothing() -> None:
    plain = regression_model()
    other = FORMS["adam"](plain)
    regress(plain, other, range(4))
    model, optimizer, manager = regression_at_work(ASRegModifier(layers="Linear", alpha=0.0), "adam")
    for step in range(4):
        optimizer.zero_grad()
        manager.update_loss(regression_loss(model, step)).backward()
        optimizer.step()
    assert_same_state(model.state_dict(), plain.state_dict(), "")


def test_activations_become_sparser() -> None:
    def run(alpha: float) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(inplace=True), nn.Linear(32, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        manager = ScheduledModifierManager([ASRegModifier(layers="1", alpha=alpha, reg_tens="out", reg_func="hs")])
        manager.modify(model, optimizer, steps_per_epoch=10)
        for step in range(60):
            optimizer.zero_grad()
            manager.update_loss(regression_loss(model, step)).backward()
            optimizer.step()
        return float((model[:2](regression_batch(999)[0]) == 0).float().mean())

    assert run(1.0) > run(0.0) + 0.05


class Odd(nn.Module):
    """A layer called twice, one that works in place, and activation checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(6, 6)
        self.inside = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(x)).relu_()
        out: Tensor = checkpoint(lambda x: self.inside(x).tanh(), x, use_reentrant=False)
        return out


def test_layers_that_are_called_twice_or_again_in_backward() -> None:
    torch.manual_seed(0)
    model = Odd()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = ScheduledModifierManager([ASRegModifier(layers=["twice", "inside"], alpha=1.0, reg_tens="out")])
    manager.modify(model, optimizer, steps_per_epoch=10)
    for _ in range(3):  # accumulated: no step in between
        inputs = torch.randn(3, 6)
        out = model(inputs)
        loss = manager.update_loss(out.sum())
        first = functional.linear(inputs, model.twice.weight, model.twice.bias)
        second = functional.linear(first, model.twice.weight, model.twice.bias)
        last = functional.linear(second.relu(), model.inside.weight, model.inside.bias)
        wanted = last.tanh().sum() + (first.abs().mean() + second.abs().mean()) / 2 + last.abs().mean()
        assert torch.allclose(loss, wanted)
        loss.backward()
    with torch.no_grad():
        model(inputs * 100)
    model(inputs)
    optimizer.step()  # a forward whose loss was not updated belongs to no later one
    with pytest.raises(StateError, match="ASRegModifier: no activation of its layers was seen since the last loss"):
        manager.update_loss(torch.zeros((), requires_grad=True))


def test_activations_that_a_gradient_sampler_computes_do_not_count() -> None:
    moves = RigLPruningModifier(
        params="__ALL_PRUNABLE__", final_sparsity=0.6, start_epoch=0, end_epoch=4, update_frequency=-1
    )
    penalized = ASRegModifier(layers="2", alpha=3.0)
    model: nn.Module = regression_model()
    model, optimizer, manager = regression_at_work(
        [moves, penalized], grad_sampler=lambda: (regression_loss(model, 70) for _ in "1")
    )
    for step in range(3):
        optimizer.zero_grad()
        loss = regression_loss(model, step)
        updated = manager.update_loss(loss)
        hidden = model[0](regression_batch(step)[0]).tanh()  # type: ignore[index]
        assert torch.allclose(updated, loss + 3 * hidden.abs().mean())
        updated.backward()
        optimizer.step()


def test_one_weight_for_each_layer() -> None:
    with pytest.raises(TargetError, match=r"ASRegModifier\.alpha: 3 values for 2 layers: 0, 2"):
        regression_at_work(ASRegModifier(layers="Linear", alpha=[1.0, 2.0, 3.0]))


def test_a_compiled_model_shows_no_activations() -> None:
    model = regression_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = ScheduledModifierManager([ASRegModifier(layers="Linear", alpha=1.0)])
    compiled = torch.compile(model, backend="eager")
    manager.modify(compiled, optimizer, steps_per_epoch=2)
    with pytest.raises(StateError, match="the model is compiled and calls no hooks"):
        manager.update_loss(compiled(regression_batch(0)[0]).sum())
