"""Gradients of masked weights are zero when an optimizer sees them, so that what it remembers of them does not grow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify.modifiers.magnitude_pruning import ConstantPruningModifier
from sparsify.modifiers.sparse_training import MovementPruningModifier, RigLPruningModifier
from sparsify.training.manager import ScheduledModifierManager
from tests.loops import gradual_pruning, masks_of, pruning_fields, regression_batch, top_kast
from tests.optimizer_forms import FORMS
from tests.zoo.small import perceptron


def train(model: nn.Module, optimizer: Any, steps: range, *, closure: bool) -> None:
    for count in steps:
        inputs, target = regression_batch(count)

        def compute(inputs: Tensor = inputs, target: Tensor = target) -> Tensor:
            optimizer.zero_grad()
            loss = (model(inputs) - target).square().mean()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        if closure:
            optimizer.step(compute)
        else:
            compute()
            optimizer.step()


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_nothing_is_remembered_of_masked_weights(name: str, closure: bool) -> None:
    if name == "lbfgs" and not closure:
        pytest.skip("LBFGS needs a closure")
    model = perceptron(6, 9, 4)
    optimizer = FORMS[name](model)
    manager = ScheduledModifierManager([gradual_pruning(end=1.0)])
    manager.modify(model, optimizer, steps_per_epoch=4)
    train(model, optimizer, range(4), closure=closure)
    first = {key: model.get_parameter(key).detach().clone() for key in masks_of(manager)}
    train(model, optimizer, range(4, 10), closure=closure)
    for key, mask in masks_of(manager).items():
        parameter = model.get_parameter(key)
        assert parameter.grad is not None and not parameter.grad[~mask].any() and bool(parameter.grad[mask].any())
        assert not torch.equal(parameter, first[key]), "it is trained"
        for part, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and part not in ("step_size", "ax"):
                # Muon mixes rows and columns, and orthogonalizes in the step: its momentum is zero all the same.
                # Adamax adds its eps to what it remembers.
                assert value[~mask].abs().max() <= (1e-7 if name == "adamax" else 0.0), part


def test_gradients_of_other_weights_are_the_same_bits() -> None:
    model = perceptron(6, 9, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    manager = ScheduledModifierManager([gradual_pruning(end=1.0)])
    manager.modify(model, optimizer, steps_per_epoch=1)
    train(model, optimizer, range(2), closure=False)
    inputs, target = regression_batch(7)
    optimizer.zero_grad()
    (model(inputs) - target).square().mean().backward()
    dense = {key: model.get_parameter(key).grad.clone() for key in masks_of(manager)}  # type: ignore[union-attr]
    optimizer.step()
    for key, mask in masks_of(manager).items():
        assert torch.equal(model.get_parameter(key).grad, torch.where(mask, dense[key], 0.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("closure", [False, True])
def test_modifiers_that_score_by_gradients_see_those_of_masked_weights(closure: bool) -> None:
    """RigL grows the weight with the largest gradient, which only the gradient of a masked weight can be."""
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.9, 0.1, 0.0]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    modifier = RigLPruningModifier(
        **pruning_fields(end_epoch=9.0), final_sparsity=0.5, init_update_fraction=0.5, sparsity_strategy="uniform"
    )
    manager = ScheduledModifierManager([modifier])
    manager.modify(model, optimizer, steps_per_epoch=1)
    assert masks_of(manager)["weight"].tolist() == [[True, True, False, False]]

    def compute() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.tensor([[0.1, 0.1, 0.1, 5.0]])).sum()
        loss.backward()
        return loss

    if closure:
        optimizer.step(compute)
    else:
        compute()
        optimizer.step()
    assert masks_of(manager)["weight"].tolist() == [[True, False, False, True]]


@pytest.mark.parametrize("closure", [False, True])
def test_movement_scores_count_the_gradients_of_masked_weights_alike(closure: bool) -> None:
    """A closure that is called at the start of a step changes no mask and no weight."""
    found = []
    for inside in (False, closure):
        model = perceptron(6, 9, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        fields = pruning_fields(end_epoch=3.0, update_frequency=0.5)
        manager = ScheduledModifierManager([MovementPruningModifier(**fields, init_sparsity=0.1, final_sparsity=0.6)])
        manager.modify(model, optimizer, steps_per_epoch=2)
        train(model, optimizer, range(8), closure=inside)
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *found))


def test_weights_outside_of_the_forward_set_are_trained_by_top_kast() -> None:
    model = perceptron(6, 9, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    manager = ScheduledModifierManager([top_kast(end_epoch=4.0)])
    manager.modify(model, optimizer, steps_per_epoch=2)
    train(model, optimizer, range(3), closure=False)
    key, mask = "0.weight", masks_of(manager)["0.weight"]
    momentum = optimizer.state[model.get_parameter(key)]["momentum_buffer"]
    assert bool(momentum[~mask].any()), "the backward set is larger than the forward set"
    train(model, optimizer, range(3, 12), closure=False)
    assert not momentum[~masks_of(manager)[key]].any(), "and after the end nothing is"


def test_sparse_gradients_of_masked_embeddings_are_zeroed() -> None:
    model = nn.Embedding(12, 4, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.1)
    with torch.no_grad():
        model.weight[:, 1] = 0.0
        model.weight[3] = 0.0
    manager = ScheduledModifierManager([ConstantPruningModifier(params="weight")])
    manager.modify(model, optimizer, steps_per_epoch=3)
    mask = masks_of(manager)["weight"]
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.tensor([1, 3, 3, 5])).square().sum().add(model(torch.tensor([3])).sum()).backward()
        optimizer.step()
        assert not model.weight[~mask].any()
    assert not optimizer.state[model.weight]["exp_avg"][~mask].any()
    assert bool(optimizer.state[model.weight]["exp_avg"][mask].any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_of_any_dtype_and_memory_format(dtype: torch.dtype, channels_last: bool) -> None:
    model = nn.Conv2d(3, 4, 3).to(dtype)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    manager = ScheduledModifierManager([gradual_pruning(end=1.0)])
    manager.modify(model, optimizer, steps_per_epoch=2)
    for count in range(5):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        masked = (~masks_of(manager)["weight"]).nonzero()
        if count > 1:
            model.weight.grad[tuple(masked[count])] = float("nan")  # type: ignore[index]
        optimizer.step()
        assert bool(model.weight.isfinite().all())
    assert int((model.weight == 0).sum()) == 86
    assert not optimizer.state[model.weight]["momentum_buffer"][model.weight == 0].any()
