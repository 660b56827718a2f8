"""Inputs of the model reach whoever waits for them once, before the forward computes, and the trace is kept."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify.errors import DataError, StateError
from sparsify.model.signature import CallArguments
from sparsify.training.model_inputs import TracingInputs

X = torch.arange(6.0).reshape(2, 3)


def inputs_of(
    model: nn.Module,
    given: CallArguments | None = None,
    data: Iterable[Any] | None = None,
    *,
    compiled: bool = False,
    forward_comes: bool = True,
) -> TracingInputs:
    return TracingInputs(model, given, data, compiled=compiled, forward_comes=forward_comes)


def noted(seen: list[Tensor], fails: int = 0) -> Any:
    def callback(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0])
        if len(seen) <= fails:
            raise ValueError("not yet")

    return callback


def test_given_inputs_are_handed_over_at_once() -> None:
    seen: list[Tensor] = []
    model = nn.Linear(3, 1)
    inputs_of(model, ((X,), {})).when_known(noted(seen))
    assert len(seen) == 1 and seen[0] is X and not model._forward_pre_hooks


def test_the_first_forward_tells_all_who_wait_and_leaves_no_hook() -> None:
    seen: list[Tensor] = []
    model = nn.Linear(3, 1)
    inputs = inputs_of(model)
    inputs.when_known(noted(seen))
    inputs.when_known(noted(seen))
    assert inputs.awaited and not seen
    model(X)
    model(X + 1)
    assert len(seen) == 2 and all(torch.equal(x, X) for x in seen)
    assert not inputs.awaited and not model._forward_pre_hooks


def test_a_callback_that_raises_is_asked_again_in_the_next_forward() -> None:
    seen: list[Tensor] = []
    model = nn.Linear(3, 1)
    inputs = inputs_of(model)
    inputs.when_known(noted(seen, fails=1))
    with pytest.raises(ValueError, match="not yet"):
        model(X)
    assert inputs.awaited
    model(X + 1)
    assert torch.equal(seen[1], X + 1) and not inputs.awaited


@pytest.mark.parametrize("iterator", [True, False])
def test_without_a_forward_the_first_batch_of_calibration_data_is_used_and_not_lost(iterator: bool) -> None:
    seen: list[Tensor] = []
    data = [X, X + 1]
    inputs = inputs_of(nn.Linear(3, 1), None, iter(data) if iterator else data, forward_comes=False)
    inputs.when_known(noted(seen))
    assert torch.equal(seen[0], X) and inputs.given is None
    assert [torch.equal(a, b) for a, b in zip(inputs.calibration_data or (), data, strict=True)] == [True, True]


def test_inputs_that_will_never_be_seen_are_refused() -> None:
    model, callback = nn.Linear(3, 1), noted([])
    with pytest.raises(StateError, match="pass sample_inputs"):
        inputs_of(model, forward_comes=False).when_known(callback)
    with pytest.raises(DataError, match="holds no batch"):
        inputs_of(model, None, [], forward_comes=False).when_known(callback)
    with pytest.raises(StateError, match="a compiled one shows no inputs"):
        inputs_of(model, compiled=True).when_known(callback)
    with pytest.raises(StateError, match="a compiled one shows no inputs"):
        inputs_of(model, compiled=True).check_available()
    inputs_of(model, ((X,), {}), compiled=True).check_available()


def test_the_trace_is_taken_once_until_it_is_forgotten() -> None:
    inputs = inputs_of(nn.Linear(3, 1))
    first = inputs.trace((X,), {})
    assert inputs.trace((X,), {}) is first
    inputs.forget_trace()
    assert inputs.trace((X,), {}) is not first


def test_closing_takes_the_hook_off() -> None:
    seen: list[Tensor] = []
    model = nn.Linear(3, 1)
    inputs = inputs_of(model)
    inputs.when_known(noted(seen))
    inputs.close()
    inputs.close()
    model(X)
    assert not seen and not inputs.awaited and not model._forward_pre_hooks
