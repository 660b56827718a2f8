"""Phases of training, told from a recipe's windows: dense, pruned, quantized, and None while that changes."""

from __future__ import annotations

import pytest

from sparsify.modifiers.base import Modifier
from sparsify.modifiers.epochs import EpochRangeModifier
from sparsify.modifiers.magnitude_pruning import ConstantPruningModifier
from sparsify.modifiers.quantization import QuantizationModifier
from sparsify.training.manager import ScheduledModifierManager
from sparsify.training.phases import is_settled, settled_epoch
from tests.loops import channel_pruning, gradual_pruning


@pytest.mark.parametrize(
    ("modifiers", "expected"),
    [
        ([gradual_pruning(2.0, 4.0)], {1: "dense", 2: None, 3: None, 4: None, 4.5: "pruned", 9: "pruned"}),
        ([QuantizationModifier(start_epoch=2.0)], {1: "dense", 2: None, 2.1: "dense_quantized"}),
        (
            [gradual_pruning(1.0, 2.0), QuantizationModifier(start_epoch=3.0)],
            {0: "dense", 1.5: None, 2.5: "pruned", 3: None, 4: "pruned_quantized"},
        ),
        (
            [QuantizationModifier(start_epoch=1.0), gradual_pruning(2.0, 3.0)],
            {0: "dense", 1: None, 1.5: "dense_quantized", 2.5: None, 4: "quantized_pruned"},
        ),
        ([ConstantPruningModifier(params="__ALL__")], {0: "pruned", 5: "pruned"}),
        (
            [gradual_pruning(1.0, 2.0), ConstantPruningModifier(params="__ALL_PRUNABLE__", start_epoch=2.0)],
            {0.5: "dense", 2: None, 2.5: "pruned", 9: "pruned"},
        ),
        ([EpochRangeModifier(end_epoch=4.0)], {0: "dense", 4: "dense"}),
    ],
)
def test_phases(modifiers: list[Modifier], expected: dict[float, str | None]) -> None:
    manager = ScheduledModifierManager(modifiers)
    assert {epoch: manager.phase(epoch) for epoch in expected} == expected


def test_qat_is_active_by_the_end_of_an_epochs_first_step() -> None:
    manager = ScheduledModifierManager([QuantizationModifier(start_epoch=2.0)])
    assert [manager.qat_active(epoch) for epoch in (0.0, 1.0, 1.99, 2.0, 3.0)] == [False, False, False, True, True]
    assert not ScheduledModifierManager([gradual_pruning()]).qat_active(5.0)


@pytest.mark.parametrize(
    ("modifiers", "expected"),
    [
        ([gradual_pruning(1.0, 4.0), EpochRangeModifier(end_epoch=9.0)], 4.0),
        ([gradual_pruning(1.0, 4.0), QuantizationModifier(start_epoch=6.0)], 6.0),
        ([QuantizationModifier(start_epoch=1.0), gradual_pruning(1.0, 4.0)], 4.0),
        ([ConstantPruningModifier(params="__ALL__")], 0.0),
        ([channel_pruning(end_epoch=3.0, shrink=True)], 3.0),
        ([EpochRangeModifier(end_epoch=9.0)], 0.0),
    ],
)
def test_the_work_is_done_when_nothing_changes_the_model_any_more(modifiers: list[Modifier], expected: float) -> None:
    assert settled_epoch(modifiers) == expected
    if expected:
        assert not is_settled(modifiers, expected - 0.25, 4) and is_settled(modifiers, expected + 0.25, 4)
    quantized = any(modifier.kind == "quantization" and expected == modifier.start_epoch for modifier in modifiers)
    assert is_settled(modifiers, expected, 4) is not quantized, "quantized layers have to see a step"
