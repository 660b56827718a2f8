"""Ctrl-C or an exception at any moment, then finalize: a usable model (promise 5)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import torch
from torch import nn

from sparsify import ScheduledModifierManager
from sparsify.modifiers.base import Active
from sparsify.pruning.masker import Masker
from tests.zoo.small import perceptron

RECIPE = """
modifiers:
  - !EpochRangeModifier
    start_epoch: 0.0
    end_epoch: 4.0
  - !SetLearningRateModifier
    start_epoch: 0.0
    learning_rate: 0.05
  - !TrainableParamsModifier
    params: ["0.bias"]
    trainable: false
    start_epoch: 0.0
    end_epoch: 3.0
  - !GMPruningModifier
    params: ["0.weight", "2.weight"]
    init_sparsity: 0.1
    final_sparsity: 0.8
    start_epoch: 0.0
    end_epoch: 2.0
    update_frequency: 0.5
  - !QuantizationModifier
    start_epoch: 3.0
"""


def _network() -> nn.Module:
    return perceptron(6, 8, 3, activation=nn.ReLU, seed=1)


@contextmanager
def _ctrl_c_at(owner: type, method: str, call: int) -> Iterator[list[int]]:
    """Raises KeyboardInterrupt inside the `call`-th call of `method` of any `owner`, after it has done its work."""
    seen = [0]
    originals: dict[type, object] = {}
    classes = [owner]
    for cls in classes:
        classes.extend(sub for sub in cls.__subclasses__() if sub not in classes)
    for cls in classes:
        if method not in vars(cls):
            continue
        original = vars(cls)[method]
        originals[cls] = original

        def interrupted(self, *args, _original=original, **kwargs):  # type: ignore[no-untyped-def]
            result = _original(self, *args, **kwargs)
            seen[0] += 1
            if seen[0] == call:
                raise KeyboardInterrupt
            return result

        setattr(cls, method, interrupted)
    try:
        yield seen
    finally:
        for cls, original in originals.items():
            setattr(cls, method, original)


def _train(model: nn.Module, manager: ScheduledModifierManager) -> None:
    inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = manager.modify(model, optimizer, steps_per_epoch=2, sample_inputs=(inputs,))
    for _ in range(8):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("owner", "method"),
    [
        (Active, "update"),
        (Active, "before_step"),
        (Active, "after_step"),
        (Masker, "apply"),
        (Masker, "set"),
        (torch.optim.SGD, "step"),
    ],
)
@pytest.mark.parametrize("call", [1, 2, 3, 5, 8, 13, 21, 30])
def test_finalize_after_ctrl_c_leaves_a_usable_model(owner: type, method: str, call: int) -> None:
    model = _network()
    plain = copy.deepcopy(model)
    manager = ScheduledModifierManager.from_yaml(RECIPE)
    with _ctrl_c_at(owner, method, call), suppress(KeyboardInterrupt):
        _train(model, manager)
    sparsity = dict(manager.sparsity()) if manager.attached else {}
    manager.finalize(model)
    manager.finalize(model)
    model.eval()
    outputs = model(torch.randn(4, 6))
    assert torch.isfinite(outputs).all()
    assert set(plain.state_dict()) <= set(model.state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model._forward_hooks and not model._forward_pre_hooks
    for name, fraction in sparsity.items():
        weight = dict(model.named_parameters())[name]
        assert float((weight == 0).float().mean()) == pytest.approx(fraction)
    # Nothing of the manager is left on the model: it trains on as any other.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
