"""Any torch optimizer, stepped in any way: masks are exact and only real steps count (promises 1, 2 and 4)."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, ReduceLROnPlateau

from sparsify.errors import ArgumentError, SparsifyWarning
from sparsify.modifiers.base import Active, Modifier
from sparsify.modifiers.epochs import EpochRangeModifier
from sparsify.modifiers.learning_rate import LearningRateFunctionModifier
from sparsify.modifiers.quantization import QuantizationModifier
from sparsify.training.manager import ScheduledModifierManager
from tests.loops import gradual_pruning, train_step, weights_of
from tests.optimizer_forms import FORMS, TwiceStepped
from tests.zoo.small import perceptron


def batch(model: nn.Module, optimizer: Any, scale: float = 1.0) -> Callable[[], torch.Tensor]:
    inputs = torch.randn(8, 6)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(inputs).square().mean() * scale
        loss.backward()
        return loss

    return closure


def step(model: nn.Module, optimizer: Any) -> None:
    train_step(model, optimizer, torch.randn(8, 6))


@pytest.mark.parametrize("name", FORMS)
def test_pruned_weights_are_zero_after_every_step(name: str) -> None:
    model = perceptron(6, 9, 4)
    optimizer = FORMS[name](model)
    manager = ScheduledModifierManager([gradual_pruning()])
    manager.modify(model, optimizer, steps_per_epoch=5)
    masks: dict[str, torch.Tensor] = {}
    for count in range(1, 16):
        step(model, optimizer)
        assert manager.step == count
        for key, weight in weights_of(model).items():
            zeros = weight == 0
            assert int(zeros.sum()) == round(manager.sparsity()[key] * weight.numel()), (count, key)
            assert not (masks.get(key, zeros) & ~zeros).any(), "a mask only grows"
            masks[key] = zeros
    assert {key: int(zeros.sum()) for key, zeros in masks.items()} == {"0.weight": 43, "2.weight": 29}
    manager.finalize(model)
    for weight in weights_of(model).values():
        assert not torch.signbit(weight[weight == 0]).any(), "+0.0, not -0.0"


@pytest.mark.parametrize("name", FORMS)
def test_a_recipe_that_prunes_nothing_changes_no_bit(name: str) -> None:
    def losses(with_manager: bool) -> list[float]:
        model = perceptron(6, 9, 4)
        optimizer = FORMS[name](model)
        if with_manager:
            ScheduledModifierManager(
                [gradual_pruning().model_copy(update={"init_sparsity": 0.0, "final_sparsity": 0.0})]
            ).modify(model, optimizer, steps_per_epoch=5)
        torch.manual_seed(1)
        found = []
        for _ in range(10):
            step(model, optimizer)
            found += [p.double().sum().item() for p in model.parameters()]
        return found

    assert losses(True) == losses(False)


# ---------------------------------------------------------------------------------------------- what counts as a step


class Counting(Modifier):
    """Writes down in which order it is called."""

    kind = "logging"

    def attach(self, run: Any) -> Active:
        return CountingActive()


CALLS: list[str] = []


class CountingActive(Active):
    def update(self, clock: Any) -> None:
        CALLS.append(f"update {clock.step}")

    def before_step(self) -> None:
        CALLS.append("before")

    def after_step(self) -> None:
        CALLS.append("after")


@pytest.fixture(autouse=True)
def _forget_calls() -> Any:
    CALLS.clear()
    yield
    Modifier.registry.pop("Counting", None)


def test_hooks_that_torch_calls_twice_count_one_step() -> None:
    model = perceptron(6, 9, 4)
    torch.optim.SGD(model.parameters(), lr=0.1)  # its step is wrapped too from here on
    optimizer = TwiceStepped(model.parameters(), lr=0.1)
    raw: list[str] = []
    optimizer.register_step_post_hook(lambda *_: raw.append("post"))
    manager = ScheduledModifierManager([Counting(), gradual_pruning()])
    manager.modify(model, optimizer, steps_per_epoch=5)
    CALLS.clear()
    for count in range(1, 4):
        step(model, optimizer)
        assert manager.step == count
    assert len(raw) == 6, "torch does call them twice"
    assert [c for c in CALLS if c != "before"] == ["after", "update 1", "after", "update 2", "after", "update 3"]


def test_a_step_that_raises_is_no_step() -> None:
    model = perceptron(6, 9, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = ScheduledModifierManager([gradual_pruning()])
    manager.modify(model, optimizer, steps_per_epoch=5)

    def fails() -> float:
        raise RuntimeError("no loss today")

    with pytest.raises(RuntimeError, match="no loss today"):
        optimizer.step(fails)
    assert manager.step == 0
    step(model, optimizer)
    assert manager.step == 1


def test_lbfgs_counts_one_step_a_call() -> None:
    model = perceptron(6, 9, 4)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=10)
    manager = ScheduledModifierManager([gradual_pruning()])
    manager.modify(model, optimizer, steps_per_epoch=5)
    evaluations = [0]

    def closure() -> torch.Tensor:
        evaluations[0] += 1
        return batch(model, optimizer)()

    for _ in range(3):
        optimizer.step(closure)
    assert manager.step == 3 < evaluations[0]


@pytest.mark.parametrize("cls", [torch.optim.LBFGS, torch.optim.SGD])
def test_the_first_forward_may_come_inside_the_step(cls: Any) -> None:
    model = perceptron(6, 9, 4)
    optimizer = cls(model.parameters(), lr=0.1)
    manager = ScheduledModifierManager([gradual_pruning(), QuantizationModifier(start_epoch=0.0)])
    manager.modify(model, optimizer, steps_per_epoch=5)
    for _ in range(3):
        optimizer.step(batch(model, optimizer))
    assert manager.step == 3 and any("scale" in name for name in model.state_dict())


@pytest.mark.parametrize("accumulation", [1, 2, 5])
def test_accumulation_counts_optimizer_steps(accumulation: int) -> None:
    model = perceptron(6, 9, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    manager = ScheduledModifierManager([gradual_pruning()])
    manager.modify(model, optimizer, steps_per_epoch=20 // accumulation)
    for index in range(20):
        model(torch.randn(4, 6)).mean().backward()
        if (index + 1) % accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert (manager.step, manager.epoch) == (20 // accumulation, 1.0)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_that_mixed_precision_skips_advances_nothing(cls: Any, fused: bool) -> None:
    model = perceptron(6, 9, 4)
    optimizer = cls(model.parameters(), lr=0.01, fused=fused)
    hooks: list[str] = []
    optimizer.register_step_post_hook(lambda *_: hooks.append("post"))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    manager = ScheduledModifierManager([Counting(), gradual_pruning()])
    manager.modify(model, optimizer, steps_per_epoch=5)
    CALLS.clear()
    real = 0
    for index in range(6):
        overflow = index in (1, 4)
        before = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        scale = float("inf") if overflow else 1.0
        scaler.scale(model(torch.randn(8, 6)).square().mean() * scale).backward()
        scaler.step(optimizer)
        scaler.update()
        real += not overflow
        assert manager.step == real
        if overflow:
            assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert len(hooks) == (6 if fused else 4)
    assert [c for c in CALLS if c.startswith("update")] == ["update 1", "update 2", "update 3", "update 4"]
    assert CALLS.count("before") == 4


def test_bfloat16_autocast_counts_every_step() -> None:
    model = perceptron(6, 9, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = ScheduledModifierManager([gradual_pruning()])
    manager.modify(model, optimizer, steps_per_epoch=5)
    for _ in range(10):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.randn(8, 6)).square().mean()
        loss.backward()
        optimizer.step()
    assert manager.epoch == 2.0 and manager.sparsity()["0.weight"] == 43 / 54


# ------------------------------------------------------------------------------------- the object that comes back


def test_the_same_optimizer_comes_back_and_is_left_clean() -> None:
    model = perceptron(6, 9, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = ScheduledModifierManager([gradual_pruning()])
    assert manager.modify(model, optimizer, steps_per_epoch=5) is optimizer
    assert isinstance(optimizer, torch.optim.Optimizer) and manager.attached
    manager.finalize(model)
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks and not manager.attached


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    "make",
    [lambda o: CosineAnnealingLR(o, 10), lambda o: LambdaLR(o, lambda n: 0.9**n), lambda o: ReduceLROnPlateau(o)],
)
def test_schedulers_work_before_and_after(before: bool, make: Callable[[Any], Any]) -> None:
    def run(with_manager: bool) -> list[float]:
        model = perceptron(6, 9, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = make(optimizer) if before else None
        if with_manager:
            optimizer = ScheduledModifierManager([gradual_pruning()]).modify(model, optimizer, steps_per_epoch=5)
        scheduler = scheduler or make(optimizer)
        found = []
        for _ in range(10):
            step(model, optimizer)
            scheduler.step(*([1.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
            found.append(optimizer.param_groups[0]["lr"])
        return found

    assert run(True) == run(False)


def test_accelerates_wrapper_is_looked_through() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = perceptron(6, 9, 4)
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    prepared, optimizer = accelerator.prepare(model, inner)
    manager = ScheduledModifierManager([gradual_pruning()])
    assert manager.modify(prepared, optimizer, steps_per_epoch=5) is optimizer
    for _ in range(20):
        with accelerator.accumulate(prepared):
            loss = prepared(torch.randn(8, 6)).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    assert (manager.step, manager.epoch) == (10, 2.0)
    assert int((weights_of(model)["0.weight"] == 0).sum()) == 43
    manager.finalize(prepared)


class Foreign:
    """No torch Optimizer, as some libraries have them."""

    def __init__(self, parameters: Any, rate: float) -> None:
        self.param_groups = [{"params": list(parameters), "lr": rate}]
        self.rate = rate

    def step(self, factor: float = 1.0) -> str:
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.sub_(parameter.grad, alpha=self.param_groups[0]["lr"] * factor)
        return "stepped"

    def zero_grad(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None


def test_another_object_that_steps_comes_back_in_a_thin_wrapper() -> None:
    model = perceptron(6, 9, 4)
    foreign = Foreign(model.parameters(), 0.1)
    manager = ScheduledModifierManager([gradual_pruning()])
    optimizer = manager.modify(model, foreign, steps_per_epoch=5)
    assert optimizer is not foreign and optimizer.rate == 0.1 and optimizer.param_groups is foreign.param_groups
    optimizer.rate = 0.2
    assert foreign.rate == 0.2
    for _ in range(10):
        batch(model, optimizer)()
        assert optimizer.step(factor=0.5) == "stepped"
    assert manager.epoch == 2.0 and int((weights_of(model)["0.weight"] == 0).sum()) == 43
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        batch(model, optimizer)()
        copied.param_groups[0]["params"] = []
        copied.step()
    assert manager.step == 10
    assert manager.attached
    manager.finalize(model)
    optimizer.step()
    assert manager.step == 10


def test_a_wrapper_that_shares_param_groups_is_looked_through() -> None:
    class Around:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer
            self.param_groups = optimizer.param_groups

        def step(self) -> None:
            self.optimizer.step()

    model = perceptron(6, 9, 4)
    around = Around(torch.optim.SGD(model.parameters(), lr=0.1))
    manager = ScheduledModifierManager([gradual_pruning()])
    assert manager.modify(model, around, steps_per_epoch=5) is around
    batch(model, around.optimizer)()
    around.step()
    assert manager.step == 1


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (None, "an object of type NoneType"),
        ("adam", "an object of type str"),
        (torch.optim.SGD, "the class SGD"),
        (nn.Linear(2, 2), "an object of type Linear"),
        ([], "an object of type list"),
    ],
)
def test_what_is_no_optimizer_is_a_type_error_and_changes_nothing(wrong: object, named: str) -> None:
    model = perceptron(6, 9, 4)
    before = copy.deepcopy(model.state_dict())
    manager = ScheduledModifierManager([gradual_pruning()])
    with pytest.raises(ArgumentError, match=f"optimizer: {named} is no optimizer"):
        manager.modify(model, wrong, steps_per_epoch=5)
    assert issubclass(ArgumentError, TypeError) and not manager.attached
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


# ---------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o)), copy.copy])
def test_a_copy_of_the_optimizer_has_no_hooks_and_does_no_harm(copied: Callable[[Any], Any]) -> None:
    model = perceptron(6, 9, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    manager = ScheduledModifierManager([gradual_pruning()])
    manager.modify(model, optimizer, steps_per_epoch=5)
    step(model, optimizer)
    other = copied(optimizer)
    other.step()
    assert manager.step == 1 and manager.attached


def test_a_training_loop_with_a_copied_optimizer_is_told_so() -> None:
    model = perceptron(6, 9, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = ScheduledModifierManager([gradual_pruning(), EpochRangeModifier(end_epoch=2.0)])
    manager.modify(model, optimizer, steps_per_epoch=3)
    other = copy.copy(optimizer)
    with pytest.warns(SparsifyWarning, match="no step of the optimizer was seen in epoch 0"):
        for epoch in manager.epochs():
            for _ in range(3):
                step(model, other if epoch == 0 else optimizer)


def test_hooks_that_were_lost_are_told() -> None:
    model = perceptron(6, 9, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = ScheduledModifierManager([gradual_pruning()])
    manager.modify(model, optimizer, steps_per_epoch=3)
    state = optimizer.__getstate__()
    optimizer.__dict__.clear()
    optimizer.__setstate__(state)
    assert not manager.attached
    with pytest.warns(SparsifyWarning, match="lost the manager's hooks"):
        manager.update_loss(torch.ones(()))
    manager.update_loss(torch.ones(()))
    manager.finalize(model)


def test_an_optimizer_of_another_model_is_told() -> None:
    model = perceptron(6, 9, 4)
    optimizer = torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1)
    with pytest.warns(SparsifyWarning, match="none of the optimizer's parameters is a parameter of this model"):
        ScheduledModifierManager([gradual_pruning()]).modify(model, optimizer, steps_per_epoch=3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("fused", [False, True])
def test_between_updates_a_step_does_not_wait_for_the_device(fused: bool) -> None:
    model = perceptron(6, 9, 4).cuda()
    rate = torch.tensor(0.1, device="cuda") if fused else 0.1
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=fused)
    modifiers = [
        gradual_pruning(end=1.0),
        LearningRateFunctionModifier(lr_func="linear", init_lr=0.1, final_lr=0.01, start_epoch=0.0, end_epoch=4.0),
    ]
    manager = ScheduledModifierManager(modifiers)
    manager.modify(model, optimizer, steps_per_epoch=8)
    inputs = torch.randn(8, 6, device="cuda")
    for count in range(1, 17):
        optimizer.zero_grad()
        manager.update_loss(model(inputs).square().mean()).backward()
        # Updates of masks lie on multiples of 4, the last one on 8.
        waits = count % 4 == 0 and count <= 8
        torch.cuda.set_sync_debug_mode("default" if waits or count == 1 else "error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert int((weights_of(model)["0.weight"] == 0).sum()) == 43


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, in its own imports
def test_a_compiled_step_is_counted() -> None:
    model = perceptron(6, 9, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    manager = ScheduledModifierManager([gradual_pruning()])
    manager.modify(model, optimizer, steps_per_epoch=5)
    compiled = torch.compile(optimizer.step, backend="eager")
    for count in range(1, 11):
        batch(model, optimizer)()
        compiled()
        assert manager.step == count
        for key, weight in weights_of(model).items():
            assert int((weight == 0).sum()) == round(manager.sparsity()[key] * weight.numel())
