"""Weight decay, trainable parameters, set and gradual values, and the log of sparsity."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from sparsify.errors import ArgumentError, RecipeError, TargetError
from sparsify.modifiers.base import Modifier
from sparsify.modifiers.magnitude_pruning import GMPruningModifier
from sparsify.modifiers.quantization import QuantizationModifier
from sparsify.modifiers.sparsification_logging import SparsificationLoggingModifier
from sparsify.modifiers.training import (
    GradualParamModifier,
    SetParamModifier,
    SetWeightDecayModifier,
    TrainableParamsModifier,
)
from sparsify.training.manager import ScheduledModifierManager


class Scaled(nn.Module):
    """Linear layers with a learned scale of no dimension, which is what gradual values are used for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 2)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.first.bias.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).tanh() * self.scale)


def run(*modifiers: Modifier, epochs: int = 4, frozen: bool = True, writer: Any = None) -> list[dict[str, Any]]:
    """What the model and the optimizer are before every step, and at the end; 4 steps an epoch, rate 0 where frozen."""
    model = Scaled()
    groups = [{"params": model.first.parameters()}, {"params": [*model.second.parameters(), model.scale]}]
    optimizer = torch.optim.SGD(groups, lr=0.0 if frozen else 0.1, weight_decay=0.5 if frozen else 0.0)
    manager = ScheduledModifierManager(list(modifiers))
    manager.modify(model, optimizer, steps_per_epoch=4, writer=writer)
    seen = []

    def look() -> None:
        seen.append(
            {
                "decay": [group["weight_decay"] for group in optimizer.param_groups],
                "learn": {name for name, p in model.named_parameters() if p.requires_grad},
                "scale": float(model.scale.detach()),
                "bias": model.second.bias.tolist(),
            }
        )

    for _ in range(epochs * 4):
        look()
        model(torch.randn(3, 4, requires_grad=True)).sum().backward()
        optimizer.step()
    look()
    manager.finalize(model)
    look()
    return seen


ALL = {"first.weight", "first.bias", "second.weight", "second.bias", "scale"}


def test_weight_decay_is_set_once_at_its_start() -> None:
    seen = [s["decay"] for s in run(SetWeightDecayModifier(weight_decay=0.1, start_epoch=1.5))]
    assert seen == [[0.5, 0.5]] * 6 + [[0.1, 0.1]] * 12
    seen = [s["decay"] for s in run(SetWeightDecayModifier(weight_decay=0.0, param_groups=[1]))]
    assert seen == [[0.5, 0.0]] * 18


def test_weight_decay_of_a_group_that_is_not_there_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"SetWeightDecayModifier.param_groups: there is no parameter group 2"):
        run(SetWeightDecayModifier(weight_decay=0.1, param_groups=[2]))


def test_trainable_parameters_are_so_inside_the_window_only() -> None:
    off = TrainableParamsModifier(params="re:second", trainable=False, start_epoch=1.0, end_epoch=2.0)
    seen = [s["learn"] for s in run(off)]
    usual = ALL - {"first.bias"}
    assert seen == [usual] * 4 + [usual - {"second.weight", "second.bias"}] * 4 + [usual] * 10
    on = TrainableParamsModifier(params=["first.bias", "scale"], end_epoch=3.0)
    assert [s["learn"] for s in run(on)] == [ALL] * 12 + [usual] * 6


def test_trainable_parameters_are_undone_at_finalize() -> None:
    seen = [s["learn"] for s in run(TrainableParamsModifier(params="__ALL__", trainable=False, start_epoch=3.75))]
    assert [len(learn) for learn in seen[-4:]] == [4, 0, 0, 4]


def test_a_value_is_set_once_and_trained_from_there() -> None:
    seen = [s["bias"] for s in run(SetParamModifier(params="second.bias", val=0.25, start_epoch=1.0))]
    assert seen[3] != [0.25, 0.25] and seen[4:] == [[0.25, 0.25]] * 14
    seen = [s["bias"] for s in run(SetParamModifier(params="second.bias", val=0.25), frozen=False)]
    assert seen[0] == [0.25, 0.25] and seen[1] != seen[0] != seen[-1]


@pytest.mark.parametrize(
    ("kind", "reference"),
    [
        ("linear", lambda x: x),
        ("cubic", lambda x: 1 - (1 - x) ** 3),
        ("inverse_cubic", lambda x: 1 - (1 - x) ** (1 / 3)),
        ("cosine", lambda x: (1 - math.cos(math.pi * x)) / 2),
    ],
)
@pytest.mark.parametrize("frequency", [-1.0, 0.5, 0.7])
def test_a_gradual_value_follows_its_curve(kind: Any, reference: Any, frequency: float) -> None:
    modifier = GradualParamModifier(
        params="scale",
        init_val=1.0,
        final_val=-3.0,
        start_epoch=0.5,
        end_epoch=3.0,
        update_frequency=frequency,
        inter_func=kind,
    )
    seen = [s["scale"] for s in run(modifier)]
    for step, value in enumerate(seen[:-1]):
        epoch = step / 4
        if epoch < 0.5:
            wanted = 2.0
        elif epoch >= 3.0:
            wanted = -3.0
        else:
            point = epoch if frequency == -1 else 0.5 + frequency * math.floor((epoch - 0.5) / frequency + 1e-9)
            wanted = 1.0 - 4.0 * reference((point - 0.5) / 2.5)
        assert value == pytest.approx(wanted, abs=1e-6), epoch
    assert seen[-2] == -3.0


@pytest.mark.parametrize("cls", [SetParamModifier, TrainableParamsModifier, GradualParamModifier])
def test_names_that_match_nothing_are_errors_unless_they_may(cls: Any) -> None:
    fields: dict[str, Any] = {
        SetParamModifier: {"val": 1.0},
        TrainableParamsModifier: {"trainable": False},
        GradualParamModifier: {"init_val": 0.0, "final_val": 1.0, "start_epoch": 0.0, "end_epoch": 1.0},
    }[cls]
    with pytest.raises(TargetError, match=rf"{cls.__name__}.params: 'skale' matches nothing"):
        run(cls(params="skale", **fields), epochs=1)
    with pytest.warns(UserWarning, match="'skale' matches nothing"):
        run(cls(params="skale", params_strict=False, **fields), epochs=1)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: SetWeightDecayModifier(weight_decay=-1.0), "weight_decay"),
        (lambda: SetParamModifier(params="a", val=math.nan), "val"),
        (
            lambda: GradualParamModifier(params="a", init_val=0.0, final_val=1.0, start_epoch=0.0, end_epoch=-1.0),
            "end_epoch",
        ),
        (lambda: SparsificationLoggingModifier(update_frequency=0.0), "update_frequency"),
        (lambda: TrainableParamsModifier(params=3), "params"),
    ],
)
def test_wrong_fields_are_refused_by_name(make: Any, field: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make()
    assert (caught.value.field or "").startswith(field)


class Writer:
    def __init__(self) -> None:
        self.scalars: dict[str, list[tuple[int, float]]] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.setdefault(tag, []).append((step, value))


def test_sparsity_is_logged_on_its_own_grid() -> None:
    writer = Writer()
    prune = GMPruningModifier(
        params="first.weight",
        init_sparsity=0.5,
        final_sparsity=0.5,
        start_epoch=1.0,
        end_epoch=2.0,
        update_frequency=1.0,
    )
    run(prune, SparsificationLoggingModifier(update_frequency=1.5), writer=writer, epochs=3)
    assert writer.scalars["zeros/model"] == [(0, 0.0), (6, pytest.approx(10 / 30)), (12, pytest.approx(10 / 30))]
    # The pruning says what it does as well.
    assert (6, 0.5) in writer.scalars["zeros/first.weight"]


def test_bits_of_quantized_weights_are_logged() -> None:
    writer = Writer()
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = ScheduledModifierManager([QuantizationModifier(start_epoch=1.0), SparsificationLoggingModifier()])
    manager.modify(model, optimizer, steps_per_epoch=2, writer=writer, sample_inputs=torch.randn(3, 4))
    for _ in range(4):
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()
    assert {tag: log for tag, log in writer.scalars.items() if tag.startswith("bits")} == {
        "bits/0": [(4, 8)],
        "bits/2": [(4, 8)],
    }, "what starts later is updated later: at step 2 the layers were not quantized yet"
