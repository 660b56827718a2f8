"""Wrapped, compiled, copied, tied, averaged: the model goes on as if nobody were there (promise 2)."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sparsify.errors import StateError
from sparsify.modifiers.base import Modifier
from sparsify.modifiers.distillation import DistillationModifier
from sparsify.modifiers.learning_rate import LearningRateFunctionModifier
from sparsify.modifiers.quantization import QuantizationModifier
from sparsify.training.manager import ScheduledModifierManager
from tests.loops import gradual_pruning, train_step
from tests.zoo.small import Tied, perceptron

# torch warns about its own insides while it compiles.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def recipe(*more: Modifier) -> list[Modifier]:
    rate = LearningRateFunctionModifier(lr_func="linear", init_lr=0.1, final_lr=0.01, start_epoch=0.0, end_epoch=2.0)
    return [gradual_pruning(), rate, *more]


class Network(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # torch compiles no frame of its own: Sequential.forward would run in eager.
        for layer in self:
            x = layer(x)
        return x


def network() -> nn.Module:
    return Network(*perceptron(6, 9, 4))


def train(model: nn.Module, optimizer: Any, manager: Any, steps: int = 10, start: int = 0) -> None:
    for index in range(start, start + steps):
        inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(index))
        train_step(model, optimizer, inputs, update=manager.update_loss)


def trained(wrap: Callable[[nn.Module], nn.Module], after: Callable[[nn.Module], nn.Module], **given: Any) -> nn.Module:
    """Ten steps of a model that was wrapped before modify, after it, or not at all."""
    model = network()
    outside = wrap(model)
    optimizer = torch.optim.SGD(outside.parameters(), lr=0.1, momentum=0.9)
    manager = ScheduledModifierManager(recipe())
    manager.modify(outside, optimizer, steps_per_epoch=4, **given)
    assert list(manager.sparsity()) == ["0.weight", "2.weight"]
    train(after(outside), optimizer, manager)
    manager.finalize(outside)
    return model


def same(model: nn.Module) -> nn.Module:
    return model


def eager(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager", fullgraph=True)  # type: ignore[return-value]


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager", fullgraph=True)
    return model


def called_before(model: nn.Module) -> nn.Module:
    compiled = eager(model)
    compiled(torch.randn(5, 6))
    return compiled


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (eager, same),
        (called_before, same),
        (same, eager),
        (same, called_before),
        (in_place, same),
        (same, in_place),
        (nn.DataParallel, same),
        (lambda model: nn.DataParallel(eager(model)), same),
        (lambda model: eager(nn.DataParallel(model)), same),
    ],
)
def test_wrappers_change_no_bit(
    before: Callable[[nn.Module], nn.Module], after: Callable[[nn.Module], nn.Module]
) -> None:
    torch.compiler.reset()
    plain, wrapped = trained(same, same), trained(before, after)
    assert list(plain.state_dict()) == list(wrapped.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(value, wrapped.state_dict()[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(torch.compile, same), (same, torch.compile)])
def test_with_the_default_compiler_masks_are_as_exact(before: Any, after: Any) -> None:
    torch.compiler.reset()
    model = trained(before, after)
    assert {n: int((p == 0).sum()) for n, p in model.named_parameters() if p.dim() > 1} == {
        "0.weight": 43,
        "2.weight": 29,
    }


def test_a_compiled_model_asks_for_outputs() -> None:
    for before, after in ((eager, same), (same, eager), (in_place, same), (same, in_place)):
        torch.compiler.reset()
        model = before(network())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        manager = ScheduledModifierManager(recipe(DistillationModifier()))
        manager.modify(model, optimizer, steps_per_epoch=4, distillation_teacher="self")
        outside = after(model)
        inputs = torch.randn(5, 6)
        outputs = outside(inputs)
        with pytest.raises(StateError, match=r"or the model is compiled and calls no hooks. Pass them"):
            manager.update_loss(outputs.sum())
        manager.update_loss(outputs.sum(), outputs=outputs, inputs=inputs).backward()
        optimizer.step()
        manager.finalize(model)


def test_a_compiled_model_that_is_to_be_traced_asks_for_inputs_at_once() -> None:
    for before in (eager, in_place):
        model = before(network())
        manager = ScheduledModifierManager(recipe(QuantizationModifier(start_epoch=3.0)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(StateError, match="a compiled one shows no inputs: pass sample_inputs"):
            manager.modify(model, optimizer, steps_per_epoch=4)
        assert not optimizer._optimizer_step_pre_hooks
        manager.modify(model, optimizer, steps_per_epoch=4, sample_inputs=torch.randn(5, 6))
        manager.finalize()


def test_a_model_that_is_compiled_before_its_first_forward_is_told_at_the_first_step() -> None:
    torch.compiler.reset()
    model = network()
    manager = ScheduledModifierManager([QuantizationModifier(start_epoch=0.0)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager.modify(model, optimizer, steps_per_epoch=4)
    before = copy.deepcopy(model.state_dict())
    eager(model)(torch.randn(5, 6)).sum().backward()
    with pytest.raises(StateError, match=r"the model's inputs were never seen.*Pass sample_inputs"):
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# ------------------------------------------------------------------------------------- copies of the model


def by_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), by_torch_save])
@pytest.mark.parametrize("forwards", [0, 1])
def test_a_copy_of_the_model_is_free(copied: Callable[[nn.Module], nn.Module], forwards: int) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    waits = QuantizationModifier(start_epoch=0.0)
    manager = ScheduledModifierManager(recipe(DistillationModifier(), *([waits] if not forwards else [])))
    manager.modify(model, optimizer, steps_per_epoch=4, distillation_teacher="self")
    assert model._forward_hooks
    train(model, optimizer, manager, forwards)
    other = copied(model)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))
    optimizer_of_other = torch.optim.SGD(other.parameters(), lr=0.5)
    other(torch.randn(5, 6)).sum().backward()
    assert manager._session is not None and (manager._session._seen is None), "the copy's outputs are not the model's"
    assert type(other[0]) is nn.Linear
    optimizer_of_other.step()
    assert manager.step == forwards
    assert (other[0].weight != 0).all(), "nobody masks the copy"


def test_an_averaged_model_is_free_and_masked_when_asked() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = ScheduledModifierManager(recipe())
    manager.modify(model, optimizer, steps_per_epoch=4)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    for index in range(10):
        train(model, optimizer, manager, 1, index)
        average.update_parameters(model)
    manager.apply_masks(average)
    manager.finalize(model)
    for mine, other in zip(model.parameters(), average.module.parameters(), strict=True):
        assert torch.equal((mine == 0), (other == 0))


# ------------------------------------------------------------------------------------- weights in mid-run


@pytest.mark.parametrize("params", ["embed.weight", "head.weight", "head", "__ALL_PRUNABLE__"])
def test_tied_weights_are_pruned_and_counted_once(params: str) -> None:
    torch.manual_seed(0)
    model = Tied(12, 6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    manager = ScheduledModifierManager([recipe()[0].model_copy(update={"params": params})])
    manager.modify(model, optimizer, steps_per_epoch=2)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randint(0, 12, (4, 3))).square().mean().backward()
        optimizer.step()
    assert len(manager.sparsity()) == 1
    assert int((model.head.weight == 0).sum()) == round(0.8 * 72)
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("assign", [False, True])
def test_dense_weights_that_are_loaded_in_mid_run_are_masked_again(assign: bool) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    manager = ScheduledModifierManager(recipe()[:1])
    manager.modify(model, optimizer, steps_per_epoch=4)
    train(model, optimizer, manager, 8)
    zeros = model[0].weight == 0
    model.load_state_dict({name: torch.ones_like(value) for name, value in model.state_dict().items()}, assign=assign)
    train(model, optimizer, manager, 1)
    assert torch.equal(model[0].weight == 0, zeros)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_model_may_change_its_dtype(dtype: torch.dtype) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = ScheduledModifierManager(recipe())
    manager.modify(model, optimizer, steps_per_epoch=4)
    train(model, optimizer, manager, 4)
    model.to(dtype)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(5, 6, dtype=dtype)).square().mean().backward()
        optimizer.step()
    assert int((model[0].weight == 0).sum()) == 43
    manager.finalize(model)
    assert not torch.signbit(model[0].weight[model[0].weight == 0]).any()
