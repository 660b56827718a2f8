"""A model is left as it was given: each thing that is kept, after success and after each way to fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer

from sparsify.model.preserved import eval_mode_, preserved, preserved_rng

THINGS = ("modes", "buffers", "grads", "requires_grad", "rng")


class Stubborn(nn.Module):
    """One that a user will not have switched: train() does nothing."""

    def train(self, mode: bool = True) -> Stubborn:
        return self


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(3), nn.Linear(3, 2)
        self.frozen, self.stubborn = nn.BatchNorm1d(2), Stubborn()
        self.frozen.training = False
        self.norm.weight.requires_grad_(False)
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("cache", None)
        self.register_buffer("odd", torch.tensor([float("nan"), float("inf"), -0.0]))
        self.register_buffer("nowhere", torch.empty(2, device="meta"))
        self.register_buffer("lazy", UninitializedBuffer())
        # One tensor under two names, and a sparse one.
        self.frozen.register_buffer("steps", self.steps)
        self.register_buffer("sparse", torch.eye(3).to_sparse())
        self.fc.weight.grad = torch.ones(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.fc(self.norm(x)))  # type: ignore[no-any-return]


def state(model: Model) -> dict[str, Any]:
    """What is kept, by thing; values of tensors as text, so that NaN and -0.0 are told apart."""
    held = [(f"{path}.{n}", b) for path, m in model.named_modules() for n, b in m._buffers.items()]
    known = [(name, b) for name, b in held if not name.endswith(("new", "nowhere", "lazy"))]
    return {
        "modes": [(name, module.training) for name, module in model.named_modules() if name != "added"],
        "buffers": [(name, id(b), None if b is None else str(b.to_dense().tolist())) for name, b in known],
        "grads": [
            (name, id(p.grad), None if p.grad is None else p.grad.tolist()) for name, p in model.named_parameters()
        ],
        "requires_grad": [(name, p.requires_grad) for name, p in model.named_parameters()],
        "rng": torch.get_rng_state().tolist(),
    }


def use(model: Model) -> None:
    """Changes each thing, in several ways."""
    torch.rand(7)
    model.eval()
    model.stubborn.training = False
    model.frozen.train()
    model.train()(torch.randn(5, 3)).sum().backward()
    model.fc.bias.grad = torch.zeros(2)
    model.fc.bias.requires_grad_(False)
    model.norm.weight.requires_grad_(True)
    model.steps += 1
    model.cache = torch.ones(2)
    model.odd.zero_()
    model.frozen.running_mean = torch.full((2,), 7.0)
    del model._buffers["sparse"]
    model.register_buffer("new", torch.zeros(1))
    model.added = nn.Dropout()


def raises(error: type[BaseException]) -> Callable[[], None]:
    def end() -> None:
        raise error

    return end


ENDS: dict[str, tuple[Callable[[], None], type[BaseException] | None]] = {
    "success": (lambda: None, None),
    "exception": (raises(ValueError), ValueError),
    "Ctrl-C": (raises(KeyboardInterrupt), KeyboardInterrupt),
    "exit": (raises(SystemExit), SystemExit),
}


def run(model: Model, end: str, **kept: bool) -> None:
    finish, error = ENDS[end]
    caught = None
    try:
        with preserved(model, **kept):
            use(model)
            finish()
    except BaseException as raised:
        caught = type(raised)
    assert caught is error


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("thing", THINGS)
def test_each_thing_is_kept(thing: str, end: str) -> None:
    model = Model()
    before = state(model)
    assert len({str(value) for value in before.values()}) == len(THINGS)
    run(model, end)
    assert state(model)[thing] == before[thing]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("thing", THINGS)
def test_a_thing_that_is_not_asked_for_is_let_go_and_the_others_are_kept(thing: str, end: str) -> None:
    model = Model()
    before = state(model)
    run(model, end, **{thing: False})
    after = state(model)
    assert [other for other in THINGS if after[other] != before[other]] == [thing]


def test_what_the_block_adds_stays() -> None:
    model = Model()
    run(model, "success")
    assert "new" in model._buffers
    assert model.added.training


def test_gradients_are_not_added_to_in_the_block() -> None:
    model = Model()
    own = model.fc.weight.grad
    with preserved(model):
        assert all(parameter.grad is None for parameter in model.parameters())
        model(torch.randn(5, 3)).sum().backward()
        assert model.fc.weight.grad is not own
    assert model.fc.weight.grad is own
    assert own is not None and bool((own == 1).all())


def test_a_graph_that_the_user_holds_can_still_be_gone_through() -> None:
    model = nn.BatchNorm1d(3).eval()
    loss = model(torch.randn(4, 3, requires_grad=True)).sum()
    version = model.running_mean._version  # type: ignore[union-attr]
    with preserved(model), torch.no_grad():
        model.running_mean.data.add_(1.0)  # type: ignore[union-attr]
    assert model.running_mean._version == version  # type: ignore[union-attr]
    loss.backward()


def test_interrupted_while_it_puts_back_it_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    before = state(model)
    real, calls = torch.set_rng_state, []

    def interrupted(new: Tensor) -> None:
        calls.append(new)
        if len(calls) == 1:
            raise KeyboardInterrupt
        real(new)

    monkeypatch.setattr(torch, "set_rng_state", interrupted)
    with pytest.raises(KeyboardInterrupt), preserved(model):
        use(model)
    assert state(model) == before


def test_one_thing_that_cannot_be_put_back_does_not_keep_the_others() -> None:
    model = Model()
    before = state(model)
    with pytest.raises(RuntimeError), preserved(model):
        use(model)
        model.odd.resize_(8)
    after = state(model)
    assert [thing for thing in THINGS if after[thing] != before[thing]] == ["buffers"]


def test_the_random_state_alone() -> None:
    model = Model()
    before = state(model)
    with preserved_rng(model):
        use(model)
    after = state(model)
    assert [thing for thing in THINGS if after[thing] == before[thing]] == ["rng"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_random_state_of_the_device_of_the_model() -> None:
    for model in (nn.Linear(2, 2).cuda(), nn.BatchNorm1d(3, affine=False).cuda()):
        before = torch.cuda.get_rng_state()
        with preserved(model):
            torch.rand(3, device="cuda")
        assert torch.equal(torch.cuda.get_rng_state(), before)


def test_eval_mode_passes_a_train_that_was_overridden() -> None:
    model = Model()
    eval_mode_(model)
    assert not any(module.training for module in model.modules())
