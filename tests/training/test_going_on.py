"""A run that goes on in the same process: the model as the recipe has made it, another optimizer, a saved state."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsify.errors import StateError
from sparsify.modifiers.base import Modifier
from sparsify.modifiers.distillation import DistillationModifier
from sparsify.modifiers.quantization import QuantizationModifier
from sparsify.training.manager import ScheduledModifierManager
from tests.loops import (
    STEPS,
    STEPS_PER_EPOCH,
    assert_same_state,
    channel_pruning,
    gradual_pruning,
    regress,
    regression_batch,
    regression_model,
    top_kast,
)

RECIPES: dict[str, list[Modifier]] = {
    "pruning": [gradual_pruning(0.0, 5.0)],
    "top-kast": [top_kast()],
    "int8": [QuantizationModifier(start_epoch=1.5, disable_quantization_observer_epoch=5.0)],
    "channels": [channel_pruning(start_epoch=0.5, end_epoch=2.0, shrink=True)],
    "all": [
        channel_pruning(start_epoch=0.0, end_epoch=1.0, shrink=True),
        gradual_pruning(1.0, 4.0),
        QuantizationModifier(start_epoch=2.5),
    ],
}


def begun(modifiers: list[Modifier], **given: Any) -> tuple[Any, Any, ScheduledModifierManager]:
    model = regression_model()
    manager = ScheduledModifierManager(modifiers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    manager.modify(model, optimizer, steps_per_epoch=STEPS_PER_EPOCH, sample_inputs=regression_batch(0)[0], **given)
    return model, optimizer, manager


@pytest.mark.parametrize("stop", [1, 4, 9, STEPS])
@pytest.mark.parametrize("name", RECIPES)
def test_another_optimizer_goes_on_where_the_first_one_ended(name: str, stop: int) -> None:
    whole, optimizer, manager = begun(RECIPES[name])
    regress(whole, optimizer, range(STEPS))
    wanted = manager.state_dict()

    model, optimizer, manager = begun(RECIPES[name])
    regress(model, optimizer, range(stop))
    state = manager.state_dict()
    manager.finalize()
    bits = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    manager.modify(model, optimizer, steps_per_epoch=STEPS_PER_EPOCH, sample_inputs=regression_batch(0)[0], state=state)
    assert manager.step == stop and all(torch.equal(value, bits[key]) for key, value in model.state_dict().items())
    regress(model, optimizer, range(stop, STEPS))
    assert_same_state(manager.state_dict(), wanted, (name, stop))
    assert_same_state(dict(model.state_dict()), dict(whole.state_dict()), (name, stop))


def test_what_cannot_go_on_is_refused() -> None:
    modifiers: list[Modifier] = [QuantizationModifier(start_epoch=1.0), DistillationModifier()]
    model, optimizer, manager = begun(modifiers, distillation_teacher="self")
    regress(model, optimizer, range(4))
    state = manager.state_dict()
    manager.finalize()
    fresh = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.raises(StateError, match="the state's teacher, a copy of its model, is of another kind"):
        manager.modify(model, fresh, steps_per_epoch=STEPS_PER_EPOCH, distillation_teacher="self", state=state)
    with pytest.raises(StateError, match="holds quantized layers already"):
        manager.modify(model, fresh, steps_per_epoch=STEPS_PER_EPOCH, distillation_teacher="self")
    assert not manager.attached
