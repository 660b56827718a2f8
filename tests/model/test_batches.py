"""Tensors in the containers that batches come in."""

from __future__ import annotations

from collections import ChainMap, OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify.model.batches import mapped, named_fields, sample_count, tensors_in, with_known_mappings
from sparsify.model.signature import SampleInputs, batch_arguments, call_arguments, inputs_and_target

X, MASK, LABELS = torch.ones(2, 3), torch.zeros(2, 3), torch.tensor([1, 2])


@dataclass
class Inputs:
    x: Tensor
    mask: Tensor | None = None
    labels: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Frozen:
    mask: Tensor
    x: Tensor


class Own(dict[str, Any]):
    pass


Named = namedtuple("Named", ["mask", "x", "labels"])
KINDS: dict[str, Callable[[], Any]] = {
    "dict": lambda: {"x": X, "mask": MASK},
    "UserDict": lambda: UserDict(x=X, mask=MASK),
    "proxy": lambda: MappingProxyType({"x": X, "mask": MASK}),
    "OrderedDict": lambda: OrderedDict(x=X, mask=MASK),
    "ChainMap": lambda: ChainMap({"x": X}, {"mask": MASK}),
    "subclass of dict": lambda: Own(x=X, mask=MASK),
    "dataclass": lambda: Inputs(X, MASK),
    "frozen dataclass": lambda: Frozen(MASK, X),
    "named tuple": lambda: Named(MASK, X, None),
}


class Model(nn.Linear):
    def forward(self, x: Tensor, mask: Tensor | None = None, other: Tensor | None = None) -> Tensor:
        return x if mask is None else x * mask


@pytest.mark.parametrize("kind", KINDS)
def test_every_container_gives_arguments_by_name(kind: str) -> None:
    batch, model = KINDS[kind](), Model(1, 1)
    assert {id(tensor) for tensor in tensors_in(batch)} == {id(X), id(MASK)}
    assert sample_count(batch) == 2
    for args, kwargs in (
        batch_arguments(model, batch),
        batch_arguments(model, (batch, LABELS)),
        call_arguments(batch, model),
    ):
        assert not args and kwargs.keys() == {"x", "mask"} and kwargs["x"] is X and kwargs["mask"] is MASK
    assert SampleInputs.of(model, batch).inputs.keys() == {"x", "mask"}


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_changed_in_a_container_of_the_same_class(kind: str) -> None:
    batch = KINDS[kind]()
    assert mapped(batch, lambda tensor: tensor) is batch
    changed = mapped([batch, {"deep": (batch,)}], lambda tensor: tensor + 5)
    assert type(changed[0]) is (dict if kind == "proxy" else type(batch))
    for made in (changed[0], changed[1]["deep"][0]):
        named = named_fields(made)
        assert named is not None and torch.equal(named["x"], X + 5) and torch.equal(named["mask"], MASK + 5)
    assert next(tensor for tensor in tensors_in(batch) if tensor is X)[0, 0] == 1.0


def test_what_a_loss_gets_is_the_last_of_a_tuple_and_else_the_whole() -> None:
    model = Model(1, 1)
    assert inputs_and_target(model, (X, LABELS)) == (X, LABELS)
    assert inputs_and_target(model, (X, MASK, LABELS)) == ((X, MASK), LABELS)
    assert inputs_and_target(model, Named(MASK, X, LABELS)) == ({"mask": MASK, "x": X}, LABELS)
    batch = Inputs(X, labels=LABELS)
    assert inputs_and_target(model, batch) == (batch, batch)
    # A field without a value leaves the default of the parameter.
    assert batch_arguments(model, batch) == ((), {"x": X})


def test_one_whole_container_can_be_the_argument() -> None:
    class Whole(nn.Module):
        def forward(self, batch: Inputs) -> Tensor:
            return batch.x

    batch = Inputs(X)
    assert batch_arguments(Whole(), batch) == ((batch,), {})

    class Wrapper(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return kwargs["x"]

    assert batch_arguments(Wrapper(), batch) == ((), {"x": X})


def test_an_empty_batch_is_one_in_which_nothing_is() -> None:
    assert sample_count((torch.zeros(0, 3), torch.zeros(0))) == 0
    assert sample_count({"boxes": torch.zeros(0, 4), "images": torch.zeros(5, 3)}) == 5
    assert sample_count(torch.zeros(())) == 1


def test_mappings_that_an_export_cannot_look_into_become_dicts() -> None:
    found = with_known_mappings(((UserDict(a=X), OrderedDict(b=X)), {"c": MappingProxyType({"d": [UserDict(e=X)]})}))
    assert found == (({"a": X}, OrderedDict(b=X)), {"c": {"d": [{"e": X}]}})
    assert type(found[0][1]) is OrderedDict
