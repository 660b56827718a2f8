"""The arguments in what a user gives as inputs, and in one batch of a loader."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify.errors import ArgumentError
from sparsify.model.signature import CallArguments, SampleInputs, batch_arguments, call_arguments, check_module

X, Y, LABEL = torch.zeros(2, 3), torch.ones(2, 3), torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("inputs", "arguments"),
    [
        (X, ((X,), {})),
        (None, ((None,), {})),
        ((), ((), {})),
        ((X, Y), ((X, Y), {})),
        ([X, Y], ((X, Y), {})),
        ({"x": X}, ((), {"x": X})),
        (((X,), {"y": Y}), ((X,), {"y": Y})),
        (((), {}), ((), {})),
        # Not (args, kwargs): a list is one argument, and so is a lone pair's tuple.
        ([(X,), {"y": Y}], (((X,), {"y": Y}), {})),
        (((X,), Y), (((X,), Y), {})),
    ],
)
def test_call_arguments(inputs: Any, arguments: CallArguments) -> None:
    assert call_arguments(inputs) == arguments


def model(forward: Callable[..., Tensor]) -> nn.Module:
    made = nn.Linear(3, 3).double()
    made.forward = forward  # type: ignore[assignment]
    return made


def one(x: Tensor) -> Tensor:
    return x


def two(x: Tensor, y: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
    return x


def any_number(*xs: Tensor) -> Tensor:
    return xs[0]


def any_name(x: Tensor, **more: Any) -> Tensor:
    return x


@pytest.mark.parametrize(
    ("forward", "batch", "arguments"),
    [
        (one, X, ((X,), {})),
        (one, (X, LABEL), ((X,), {})),
        (one, [X, LABEL], ((X,), {})),
        (two, (X, Y, LABEL), ((X, Y), {})),
        (two, (X,), ((X,), {})),
        (any_number, (X, Y, LABEL), ((X, Y, LABEL), {})),
        (one, {"x": X, "labels": LABEL}, ((), {"x": X})),
        (two, {"x": X, "scale": 2.0, "labels": LABEL}, ((), {"x": X, "scale": 2.0})),
        (any_name, {"x": X, "labels": LABEL}, ((), {"x": X, "labels": LABEL})),
        (one, "text", (("text",), {})),
    ],
)
def test_batch_arguments(forward: Callable[..., Tensor], batch: Any, arguments: CallArguments) -> None:
    assert batch_arguments(model(forward), batch) == arguments


@pytest.mark.parametrize("batch", [X, (X, LABEL), {"x": X}])
def test_a_batch_goes_to_the_device_of_the_model(batch: Any) -> None:
    args, kwargs = batch_arguments(model(one).to("meta"), batch)
    assert [value.device.type for value in (*args, *kwargs.values())] == ["meta"]


def test_sample_inputs_are_a_tensor_or_hold_some() -> None:
    with pytest.raises(ArgumentError, match="give a tensor, a tuple of arguments or a dictionary"):
        SampleInputs.of(model(one), 3)
    with pytest.raises(ArgumentError, match="there is no tensor among the inputs"):
        SampleInputs.of(model(one), (3,))
    assert list(SampleInputs.of(model(two), {"x": X, "y": Y}).inputs) == ["x", "y"]
    # A tuple is a tuple of arguments, also where its parts look like (args, kwargs).
    assert list(SampleInputs.of(model(two), ((X,), {"a": Y})).inputs) == ["x_0", "y_a"]


def test_a_module_is_given_back_and_all_else_refused() -> None:
    model = nn.Linear(1, 1)
    assert check_module(model) is model
    with pytest.raises(ArgumentError, match=r"^model is a dict: give a torch\.nn\.Module\.$"):
        check_module({})
    with pytest.raises(ArgumentError, match=r"^analyze: model is a int: give a torch\.nn\.Module, or a path\.$"):
        check_module(3, "analyze", other=", or a path")
