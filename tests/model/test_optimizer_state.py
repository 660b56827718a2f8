"""State that is set back: to what the optimizer itself begins with, in masked weights alone or everywhere."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import ASGD, SGD, Adagrad, NAdam, Optimizer, Rprop

from sparsify.model.masked_memory import bits_and_mask, zero_masked_
from sparsify.model.optimizer_state import reset_where
from sparsify.modifiers.magnitude_pruning import GMPruningModifier
from sparsify.modifiers.structured import StructuredPruningModifier
from sparsify.training.manager import ScheduledModifierManager
from tests.optimizer_forms import FORMS, Form
from tests.zoo.small import perceptron

ALL: dict[str, Form] = {
    **FORMS,
    "adagrad, initial value": lambda m: Adagrad(m.parameters(), lr=0.05, initial_accumulator_value=0.3),
    "rprop, another rate": lambda m: Rprop(m.parameters(), lr=0.003),
    "rprop, tensor rate": lambda m: Rprop(m.parameters(), lr=torch.tensor(0.02)),
    "asgd, averaging soon": lambda m: ASGD(m.parameters(), lr=0.05, t0=2),
}
BY_WEIGHT = [name for name in ALL if name not in ("adafactor", "muon", "lbfgs")]


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for index in steps:
        inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(index))

        def closure(inputs: Tensor = inputs) -> Tensor:
            optimizer.zero_grad()
            loss = (model(inputs) - 1).square().mean()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)


def values(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def some(parameter: Tensor) -> Tensor:
    """A mask that keeps about half."""
    return torch.rand(parameter.shape, generator=torch.Generator().manual_seed(3)) > 0.5


@pytest.mark.parametrize("name", ALL)
def test_reset_everywhere_an_optimizer_goes_on_like_a_new_one(name: str) -> None:
    model = perceptron(6, 9, 4)
    optimizer = ALL[name](model)
    train(model, optimizer, range(4))
    other = copy.deepcopy(model)
    fresh = ALL[name](other)
    for parameter in model.parameters():
        reset_where(optimizer, parameter)
    for start in range(10, 15):
        train(model, optimizer, range(start, start + 1))
        train(other, fresh, range(start, start + 1))
        assert all(map(torch.equal, values(model), values(other)))


def expected_of(name: str, key: str, parameter: Tensor) -> Tensor | float:
    """What torch's own code begins with, where it is not zero."""
    rates = {"rprop": 0.01, "rprop, another rate": 0.003, "rprop, tensor rate": 0.02}
    if key == "step_size":
        return rates[name]
    if key == "ax":
        return parameter.detach()
    return 0.3 if (name, key) == ("adagrad, initial value", "sum") else 0.0


@pytest.mark.parametrize("name", ALL)
def test_reset_where_masked_the_others_keep_every_bit(name: str) -> None:
    model = perceptron(6, 9, 4)
    optimizer = ALL[name](model)
    train(model, optimizer, range(4))
    if name == "lbfgs":
        return
    for parameter in model.parameters():
        before = copy.deepcopy(dict(optimizer.state.get(parameter, {})))
        mask = some(parameter)
        reset_where(optimizer, parameter, mask)
        state = optimizer.state.get(parameter, {})
        assert state.keys() == before.keys()
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.shape != parameter.shape:
                assert value is before[key] or torch.equal(torch.as_tensor(value), torch.as_tensor(before[key]))
                continue
            first = torch.as_tensor(expected_of(name, key, parameter)).expand(parameter.shape)
            assert torch.equal(value, torch.where(mask, before[key], first)), key
            assert not torch.equal(value, before[key]) or key == "ax", "the state was there to be reset"


@pytest.mark.parametrize("name", BY_WEIGHT)
def test_the_weights_that_are_kept_train_on_as_if_nothing_was_reset(name: str) -> None:
    """Gradients that do not depend on the weights, so that each weight is an optimization of its own."""
    results = []
    for reset in (False, True):
        model = perceptron(6, 9, 4)
        optimizer = ALL[name](model)
        for index in range(8):
            for number, parameter in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(100 * index + number)
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            if reset and index == 4:
                for parameter in model.parameters():
                    reset_where(optimizer, parameter, some(parameter))
            optimizer.step()
        results.append([torch.where(some(p), p.detach(), 0.0) for p in model.parameters()])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("mask", [None, "some"])
def test_lbfgs_forgets_all_curvature(mask: str | None) -> None:
    model = perceptron(6, 9, 4)
    optimizer = FORMS["lbfgs"](model)
    train(model, optimizer, range(3))
    parameter = model[2].weight
    assert isinstance(parameter, Tensor)
    reset_where(optimizer, parameter, None if mask is None else some(parameter))
    other = copy.deepcopy(model)
    train(model, optimizer, range(10, 13))
    train(other, FORMS["lbfgs"](other), range(10, 13))
    assert all(map(torch.equal, values(model), values(other)))


def test_state_that_is_not_there_is_not_made() -> None:
    model = perceptron(6, 9, 4)
    optimizer = FORMS["adam"](model)
    reset_where(optimizer, model[0].weight)  # type: ignore[arg-type]
    reset_where(optimizer, model[0].weight, some(model[0].weight))  # type: ignore[arg-type]
    reset_where(None, model[0].weight)  # type: ignore[arg-type]
    reset_where(object(), model[0].weight)  # type: ignore[arg-type]
    assert not optimizer.state


def test_a_parameter_of_one_weight_keeps_the_count() -> None:
    weight = nn.Parameter(torch.tensor(1.0))
    optimizer = NAdam([weight], lr=0.1)
    for _ in range(3):
        weight.grad = torch.tensor(0.5)
        optimizer.step()
    product = float(optimizer.state[weight]["mu_product"])
    reset_where(optimizer, weight, torch.tensor(False))
    state = {key: float(value) for key, value in optimizer.state[weight].items()}
    assert state == {"step": 3.0, "mu_product": product, "exp_avg": 0.0, "exp_avg_sq": 0.0}
    assert 0.0 < product < 1.0


# ---------------------------------------------------------------------------------------------- packed moments


class Packed(Optimizer):
    """SGD with momentum in 8 bits, as bitsandbytes keeps it: codes of the parameter's shape, a scale, a table."""

    def __init__(self, parameters: Any, lr: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr})

    def set_up(self, parameter: Tensor) -> dict[str, Any]:
        return {
            "step": 0,
            # Code 0 is the most negative number of the table: zeros are not zero.
            "state1": torch.full(parameter.shape, 128, dtype=torch.uint8),
            "qmap1": (torch.arange(256) - 128) / 127.0,
            "absmax1": torch.zeros(1),
        }

    def unpacked(self, state: dict[str, Any]) -> Tensor:
        return state["qmap1"][state["state1"].long()] * state["absmax1"]  # type: ignore[no-any-return]

    def pack(self, state: dict[str, Any], moment: Tensor) -> None:
        state["absmax1"].copy_(moment.abs().max())
        state["state1"].copy_((moment / state["absmax1"].clamp(min=1e-12) * 127).round() + 128)

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                state = self.state[parameter]
                if len(state) == 0:
                    state.update(self.set_up(parameter))
                state["step"] += 1
                moment = 0.9 * self.unpacked(state) + parameter.grad
                parameter.sub_(moment, alpha=self.param_groups[0]["lr"])
                self.pack(state, moment)
        return loss


class Moment(Tensor):
    """A tensor subclass that looks like floats of the parameter's shape and takes nothing but what it must, as
    torchao's OptimState8bit."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Moment:
        made: Moment = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)  # type: ignore[attr-defined]
        made.codes, made.scale = codes, scale
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{func} is not implemented for {cls.__name__}")


class Subclassed(Packed):
    def set_up(self, parameter: Tensor) -> dict[str, Any]:
        return {"step": 0, "exp_avg": Moment(torch.zeros(parameter.shape, dtype=torch.int8), torch.zeros(1))}

    def unpacked(self, state: dict[str, Any]) -> Tensor:
        return state["exp_avg"].codes.float() * state["exp_avg"].scale / 127  # type: ignore[no-any-return]

    def pack(self, state: dict[str, Any], moment: Tensor) -> None:
        state["exp_avg"].scale.copy_(moment.abs().max())
        state["exp_avg"].codes.copy_((moment / state["exp_avg"].scale.clamp(min=1e-12) * 127).round())


class Float8(Packed):
    def set_up(self, parameter: Tensor) -> dict[str, Any]:
        return {"step": 0, "exp_avg": torch.zeros(parameter.shape).to(torch.float8_e4m3fn), "scale": torch.ones(())}

    def unpacked(self, state: dict[str, Any]) -> Tensor:
        return state["exp_avg"].float() * state["scale"]  # type: ignore[no-any-return]

    def pack(self, state: dict[str, Any], moment: Tensor) -> None:
        state["scale"].copy_(moment.abs().max().clamp(min=1e-12))
        state["exp_avg"].copy_((moment / state["scale"]).to(torch.float8_e4m3fn))


PACKED = [Packed, Subclassed, Float8]


def snapshot(value: Any) -> Any:
    if isinstance(value, Moment):
        return value.codes.clone(), value.scale.clone()
    return value.clone() if isinstance(value, Tensor) else value


@pytest.mark.parametrize("cls", PACKED)
def test_packed_moments_of_masked_weights_are_not_written_to(cls: type[Packed]) -> None:
    model = perceptron(6, 9, 4)
    optimizer = cls(model.parameters())
    train(model, optimizer, range(3))
    for parameter in model.parameters():
        before = {key: snapshot(value) for key, value in optimizer.state[parameter].items()}
        reset_where(optimizer, parameter, some(parameter))
        after = {key: snapshot(value) for key, value in optimizer.state[parameter].items()}
        assert str(after) == str(before)


@pytest.mark.parametrize("cls", PACKED)
def test_packed_moments_are_set_up_again_by_the_optimizer(cls: type[Packed]) -> None:
    model = perceptron(6, 9, 4)
    optimizer = cls(model.parameters())
    train(model, optimizer, range(3))
    other = copy.deepcopy(model)
    for parameter in model.parameters():
        reset_where(optimizer, parameter)
    train(model, optimizer, range(10, 14))
    train(other, cls(other.parameters()), range(10, 14))
    assert all(map(torch.equal, values(model), values(other)))


def test_plain_moments_beside_packed_ones_are_reset() -> None:
    """bitsandbytes keeps the moments of small parameters, and one moment of some optimizers, in float."""
    model = perceptron(6, 9, 4)
    optimizer = Packed(model.parameters())
    train(model, optimizer, range(3))
    parameter = model[0].weight
    assert isinstance(parameter, Tensor)
    optimizer.state[parameter]["state2"] = torch.ones(parameter.shape)
    codes = optimizer.state[parameter]["state1"].clone()
    reset_where(optimizer, parameter, some(parameter))
    assert torch.equal(optimizer.state[parameter]["state2"], some(parameter).float())
    assert torch.equal(optimizer.state[parameter]["state1"], codes)


@pytest.mark.parametrize("cls", PACKED)
def test_an_8_bit_optimizer_is_pruned_under(cls: type[Packed]) -> None:
    model = perceptron(6, 9, 4)
    optimizer = cls(model.parameters())
    modifier = GMPruningModifier(
        params="__ALL_PRUNABLE__",
        init_sparsity=0.1,
        final_sparsity=0.8,
        start_epoch=0.0,
        end_epoch=2.0,
        update_frequency=0.5,
    )
    manager = ScheduledModifierManager([modifier])
    manager.modify(model, optimizer, steps_per_epoch=4)
    train(model, optimizer, range(10))
    manager.finalize()
    assert [int((p == 0).sum()) for p in model.parameters() if p.dim() > 1] == [43, 29]
    assert all(bool(p.isfinite().all()) for p in model.parameters())


# ---------------------------------------------------------------------------------------------- masks under torch's


@pytest.mark.parametrize(
    ("name", "key", "first"), [("rprop", "step_size", 0.01), ("adagrad, initial value", "sum", 0.3)]
)
def test_a_mask_sets_state_to_its_initial_value_and_not_to_zero(name: str, key: str, first: float) -> None:
    model = perceptron(6, 9, 4)
    optimizer = ALL[name](model)
    modifier = GMPruningModifier(
        params="0.weight",
        init_sparsity=0.5,
        final_sparsity=0.5,
        start_epoch=1.0,
        end_epoch=1.0,
        update_frequency=-1.0,
    )
    manager = ScheduledModifierManager([modifier])
    manager.modify(model, optimizer, steps_per_epoch=3)
    train(model, optimizer, range(3))
    weight = model[0].weight
    assert isinstance(weight, Tensor)
    pruned = weight == 0
    assert int(pruned.sum()) == 27
    assert optimizer.state[weight][key][pruned].unique().tolist() == [pytest.approx(first)]
    train(model, optimizer, range(3, 6))
    assert bool((weight[pruned] == 0).all())


# ---------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "form", ["plain", "channels last", "transposed", "strided", "empty", "scalar", "other strides"]
)
def test_zero_masked_is_the_same_in_every_memory_format(form: str, dtype: torch.dtype) -> None:
    shape = {"empty": (0, 3, 2, 2), "scalar": ()}.get(form, (4, 3, 2, 2))
    tensor = torch.randn(shape).to(dtype)
    if form == "channels last":
        tensor = tensor.to(memory_format=torch.channels_last)
    if form == "transposed":
        tensor = tensor.transpose(0, 1)
    if form == "strided":
        tensor = torch.randn(8, 3, 2, 2).to(dtype)[::2]
    mask = torch.empty_like(tensor, dtype=torch.bool).copy_(torch.rand(tensor.shape) > 0.5)
    if form == "other strides":
        mask = mask.to(memory_format=torch.channels_last)
    if tensor.numel() > 1:
        tensor[~mask] = torch.tensor([float("nan"), float("inf"), -1.0], dtype=dtype).repeat(99)[: int((~mask).sum())]
    expected = torch.where(mask, tensor, torch.zeros((), dtype=dtype))
    assert (bits_and_mask(tensor, mask) is None) == (form in ("strided", "other strides"))
    zero_masked_(tensor, mask)
    assert torch.equal(tensor, expected)
    assert not bool(torch.signbit(tensor[~mask]).any())


def test_sgd_without_momentum_has_nothing_to_reset() -> None:
    model = perceptron(6, 9, 4)
    optimizer = SGD(model.parameters(), lr=0.1)
    train(model, optimizer, range(2))
    reset_where(optimizer, model[0].weight, some(model[0].weight))  # type: ignore[arg-type]


@pytest.mark.parametrize("cls", PACKED)
def test_packed_moments_of_channels_that_are_removed_are_set_up_again(cls: type[Packed]) -> None:
    model = perceptron(6, 9, 4)
    optimizer = cls(model.parameters())
    ramp = {"init_sparsity": 0.1, "final_sparsity": 0.5, "update_frequency": 0.5, "multiple": 1}
    modifier = StructuredPruningModifier(params="__ALL_PRUNABLE__", start_epoch=0.0, end_epoch=2.0, shrink=True, **ramp)
    manager = ScheduledModifierManager([modifier])
    manager.modify(model, optimizer, steps_per_epoch=2, sample_inputs=torch.randn(2, 6))
    train(model, optimizer, range(8))
    weight = model[0].weight
    assert isinstance(weight, Tensor) and weight.shape == (5, 6) and bool(weight.isfinite().all())
    codes = optimizer.state[weight].get("state1", optimizer.state[weight].get("exp_avg"))
    assert codes.shape == (5, 6) and optimizer.state[weight]["step"] == 4


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_optimizers_of_torchao_prune_and_lose_channels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    optim = pytest.importorskip("torchao.optim")
    # Compiled code of each shape takes seconds; the same function runs as it is.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model = perceptron(64, 128, 64)
    inputs = torch.randn(4, 64)
    optimizer = getattr(optim, name)(model.parameters(), lr=1e-2)
    ramp = {"init_sparsity": 0.1, "final_sparsity": 0.5, "update_frequency": 0.5, "multiple": 64}
    modifiers = [
        GMPruningModifier(
            params="0.weight",
            init_sparsity=0.2,
            final_sparsity=0.8,
            start_epoch=0.0,
            end_epoch=2.0,
            update_frequency=0.5,
        ),
        StructuredPruningModifier(params="__ALL_PRUNABLE__", start_epoch=3.0, end_epoch=4.0, shrink=True, **ramp),
    ]
    modifiers = modifiers[1:] if name == "AdamW4bit" else modifiers[:1]
    manager = ScheduledModifierManager(modifiers)
    manager.modify(model, optimizer, steps_per_epoch=2, sample_inputs=(inputs,))
    for count in range(12):
        optimizer.zero_grad()
        (model(inputs) - 1).square().mean().backward()
        optimizer.step()
        assert manager.step == count + 1
        masks = manager.sparsity()
        for key, sparsity in masks.items():
            weight = model.get_parameter(key).detach()
            assert int((weight == 0).sum()) >= round(sparsity * weight.numel())
    weight = model[0].weight
    assert isinstance(weight, Tensor) and bool(weight.isfinite().all())
    if name == "AdamW4bit":
        assert weight.shape == (64, 64) and optimizer.state[weight]["exp_avg"].shape == (64, 64)
    else:
        mask = weight == 0
        assert int(mask.sum()) == round(0.8 * weight.numel())
        assert not optimizer.state[weight]["exp_avg"].dequantize()[mask].abs().gt(1e-2).any()
    assert type(optimizer.state[weight]["exp_avg"]) is not Tensor
