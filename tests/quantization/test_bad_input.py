"""What quantization cannot be right with is said where it is given: what, where, and the way out."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify import ScheduledModifierManager, export_onnx, floating_layers
from sparsify.errors import ArgumentError, DataError, ExportError, RecipeError, SparsifyWarning, StateError, TargetError
from sparsify.quantization.conversion import quantizers
from sparsify.quantization.plan import is_quantized, undo_plan
from tests.loops import quantizing, train_step
from tests.zoo.quantizable import ResidualBlock, ResidualNet, images

STEPS = 2
"""Optimizer steps in an epoch."""


def with_nan(value: float = math.nan) -> Tensor:
    x = images(8)
    x[3, 1, 2, 0] = value
    return x


def modify(manager: ScheduledModifierManager, model: nn.Module, **more: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    manager.modify(model, optimizer, steps_per_epoch=STEPS, **{"sample_inputs": images(8), **more})
    return optimizer


@pytest.mark.parametrize(
    ("weights", "activations", "message"),
    [
        ({"symmetric": False}, {}, r"would have affine weights .* twice as long .* input_activations: null"),
        ({"symmetric": False, "observer": "lsq"}, None, "symmetric: false with observer: lsq; .* observer: min_max"),
        ({"symmetric": "no"}, None, "symmetric"),
    ],
)
def test_affine_weights_are_refused_where_they_would_be_slow_or_cannot_be(
    weights: dict[str, Any], activations: dict[str, Any] | None, message: str
) -> None:
    model = ResidualNet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RecipeError, match=message):
        scheme: Any = {"input_activations": activations, "weights": weights}
        modify(quantizing(start_epoch=5.0, scheme=scheme), model)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], value) for name, value in before.items())
    assert type(model) is ResidualNet and not model._forward_pre_hooks


CALIBRATION: dict[str, tuple[Any, type[Exception], str]] = {
    "empty": ([], DataError, "calibration_data holds no batch"),
    "empty generator": (lambda: iter(()), DataError, "calibration_data holds no batch"),
    "empty loader": (torch.utils.data.DataLoader([]), DataError, "calibration_data holds no batch"),
    "one tensor": (images(), ArgumentError, r"is one tensor: .* \[x\] for a single one"),
    "a dict": ({"x": images()}, ArgumentError, "is a dict: give an iterable of batches"),
    "a number": (3, ArgumentError, "is a int: give an iterable of batches"),
    "text": (["one"], DataError, "batch 0 is a str without a tensor"),
    "NaN": ([images(16), with_nan()], DataError, "batch 1 holds NaN or infinity; take that sample out"),
    "infinity": (lambda: iter([images(), with_nan(math.inf)]), DataError, "batch 1 holds NaN or infinity"),
}


@pytest.mark.parametrize("start", [0.0, 1.0])
@pytest.mark.parametrize("case", CALIBRATION)
def test_calibration_data_is_refused_at_modify_however_late_it_is_needed(case: str, start: float) -> None:
    data, kind, message = CALIBRATION[case]
    if callable(data):
        data = data()
    model = ResidualNet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(kind, match=message):
        modify(quantizing(start_epoch=start), model, calibration_data=data)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], value) for name, value in before.items())
    assert type(model) is ResidualNet and not model._forward_pre_hooks


def test_batches_that_the_model_cannot_take_are_named() -> None:
    model = ResidualNet()
    with pytest.raises(DataError, match=r"batch 1 does not run through .*Net: RuntimeError.*a tensor, a tuple, or a"):
        modify(quantizing(), model, calibration_data=[images(16), torch.randn(2, 5)])
    assert not is_quantized(model) and type(model) is ResidualNet


def test_a_batch_of_a_loader_that_is_not_finite_is_named() -> None:
    loader = torch.utils.data.DataLoader([*images(8), *with_nan()], batch_size=8)
    model = ResidualNet()
    with pytest.raises(DataError, match="batch 1 holds NaN"):
        modify(quantizing(), model, calibration_data=loader)
    assert not is_quantized(model)


def test_values_that_become_infinite_in_the_model_are_said_with_their_batch() -> None:
    model = ResidualNet()
    with torch.no_grad():
        model.first.conv2.weight.fill_(3e38)
    with pytest.raises(DataError, match=r"calibration_data: batch 0: .*quantizer: its values reach from"):
        modify(quantizing(), model, calibration_data=[images(16)])
    assert not is_quantized(model)


def test_a_generator_that_somebody_else_goes_through_still_calibrates() -> None:
    data = (images(16) for _ in range(3))
    model = ResidualNet()
    optimizer = modify(quantizing(start_epoch=1.0), model, calibration_data=data)
    assert not list(data)
    train_step(model, optimizer, images(8))
    assert not is_quantized(model)
    train_step(model, optimizer, images(8))
    assert {int(quantizer.batches) for quantizer in quantizers(model)} == {3}


def test_a_generator_is_read_no_further_than_asked() -> None:
    data = (images(16) for _ in range(5))
    modify(quantizing(num_calibration_steps=2), ResidualNet(), calibration_data=data)
    assert len(list(data)) == 3


def test_a_generator_that_was_gone_through_is_refused_at_the_second_run() -> None:
    data = (images(16) for _ in range(3))
    modify(quantizing(), ResidualNet(), calibration_data=data)
    with pytest.raises(DataError, match=r"holds no batch.*gone through once more"):
        modify(quantizing(), ResidualNet(), calibration_data=data)


def test_ranges_from_few_samples_are_warned_about() -> None:
    with pytest.warns(SparsifyWarning, match="held 15 samples, and ranges from fewer than 16 are chance") as said:
        modify(quantizing(), ResidualNet(), calibration_data=[images(8), images(7)])
    assert len(said) == 1
    modify(quantizing(), ResidualNet(), calibration_data=[images(8), images(8)])


def test_fewer_batches_than_asked_are_warned_about() -> None:
    with pytest.warns(SparsifyWarning, match="held 2 batches, of the 9 that num_calibration_steps asks for"):
        modify(quantizing(num_calibration_steps=9), ResidualNet(), calibration_data=[images(8), images(8)])


class Gates(nn.LSTM):
    pass


class Tagger(nn.Module):
    """An LSTM of its own class, a weight in a module, one that the model itself multiplies by, one that never runs."""

    def __init__(self, bare: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.lstm = Gates(4, 4, batch_first=True)
        self.mix = Mix() if bare else nn.Identity()
        self.head = nn.Linear(4, 4)
        self.unused = nn.Linear(2, 2)
        self.last = nn.Parameter(torch.randn(4, 3)) if bare else None

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.head(self.mix(self.lstm(self.embed(ids))[0]))
        return x if self.last is None else x @ self.last


class Mix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.own


IDS = torch.arange(12).reshape(3, 4) % 9
IN_FLOAT = {
    "unused": "was not called on the example inputs",
    "lstm": "Gates is not one of LSTM, GRU exactly",
    "mix: matmul": "mix.own is not the weight of a layer; an nn.Linear or nn.Conv2d could be quantized",
    "the model: matmul": "last is not the weight of a layer; an nn.Linear or nn.Conv2d could be quantized",
}


def test_layers_that_stay_in_float_unasked_are_said_once_with_reasons(tmp_path: Path) -> None:
    model = Tagger()
    with pytest.warns(SparsifyWarning, match="layers with weights stay in float") as said:
        optimizer = modify(quantizing(), model, sample_inputs=IDS)
        for _ in range(3):
            train_step(model, optimizer, IDS)
    assert len(said) == 1
    assert str(said[0].message).splitlines()[1:] == [
        # What no input reaches computes nothing in float; it is listed, and not warned about.
        *(f"  {what}: {why}" for what, why in IN_FLOAT.items() if what != "unused"),
        "Name them in `ignore` where that is meant.",
    ]
    assert floating_layers(model) == floating_layers(copy.deepcopy(model)) == IN_FLOAT
    file = export_onnx(model, IDS, tmp_path / "model.onnx")
    assert file.reasons == {
        "lstm/LSTM": IN_FLOAT["lstm"],
        "mix/MatMul": IN_FLOAT["mix: matmul"],
        "MatMul": IN_FLOAT["the model: matmul"],
    }
    assert set(file.floating) == set(file.reasons)
    assert f"  in float: lstm/LSTM: {IN_FLOAT['lstm']}\n" in str(file) and "in float: 3;" in str(file)


@pytest.mark.parametrize("how", [{"ignore": ["lstm", "unused"]}, {"scheme_overrides": {"lstm": None, "unused": None}}])
def test_what_the_recipe_leaves_out_is_listed_and_not_warned_about(how: dict[str, Any], tmp_path: Path) -> None:
    model = Tagger(bare=False)
    train_step(model, modify(quantizing(**how), model, sample_inputs=IDS), IDS)
    assert floating_layers(model) == dict.fromkeys(["lstm", "unused"], "left out by the recipe")
    file = export_onnx(model, IDS, tmp_path / "model.onnx")
    assert str(file).endswith("\n  in float: lstm/LSTM: left out by the recipe")


def test_a_plain_model_and_a_fully_quantized_one_have_nothing_to_list() -> None:
    model = ResidualNet()
    assert floating_layers(model) == {}
    manager = quantizing()
    modify(manager, model)
    assert floating_layers(model) == {}


def test_a_resumed_model_has_the_same_list_and_a_restored_one_none() -> None:
    manager, model = quantizing(ignore=["fc"]), ResidualNet()
    modify(manager, model)
    fresh = ResidualNet()
    again = quantizing(ignore=["fc"]).apply_structure(fresh, state=manager.state_dict())
    assert again is fresh and floating_layers(fresh) == floating_layers(model) == {"fc": "left out by the recipe"}
    undo_plan(fresh)
    assert floating_layers(fresh) == {} and vars(fresh).keys() == vars(ResidualNet()).keys()


def test_a_long_list_is_cut_in_the_warning_and_whole_in_the_function() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)
            self.spare = nn.ModuleList(nn.RNN(4, 4) for _ in range(13))

        def forward(self, x: Tensor) -> Tensor:
            for each in self.spare:
                x = each(x)[0]
            return self.head(x)

    model = Many()
    with pytest.warns(SparsifyWarning, match=r"spare\.9: [^\n]*\n  and 3 more: see sparsify.floating_layers\(model\)"):
        modify(quantizing(), model, sample_inputs=torch.randn(8, 4))
    assert len(floating_layers(model)) == 13


NOTHING: dict[str, tuple[nn.Module, dict[str, Any], str]] = {
    "no layer": (nn.Sequential(nn.LayerNorm(3)), {}, "it has none of Linear, Conv1d"),
    "an LSTM": (nn.LSTM(3, 4), {}, "it has none of"),
    "all ignored": (nn.Sequential(nn.Linear(3, 4)), {"ignore": ["Linear"]}, "all its layers are left out"),
    "an empty scheme": (
        nn.Sequential(nn.Linear(3, 4)),
        {"scheme": {"weights": None, "input_activations": None}},
        "all its layers are left out",
    ),
}


@pytest.mark.parametrize("case", NOTHING)
def test_a_recipe_that_quantizes_nothing_is_refused_at_check_and_modify(case: str) -> None:
    model, fields, message = NOTHING[case]
    manager = quantizing(start_epoch=5.0, **fields)
    with pytest.raises(TargetError, match=rf"nothing in {type(model).__name__} can be quantized: {message}"):
        manager.recipe.check(model)
    with pytest.raises(TargetError, match=message):
        modify(manager, model, sample_inputs=None)
    quantizing().recipe.check(nn.TransformerEncoderLayer(8, 2))
    quantizing().recipe.check(nn.Sequential(nn.MultiheadAttention(8, 2)))


def test_blocks_beside_quantized_activations_are_refused_at_check() -> None:
    with pytest.raises(RecipeError, match="conv1 would have weights with a scale for each block of 32"):
        quantizing(start_epoch=5.0, scheme={"weights": {"strategy": "block", "block_size": 32}}).recipe.check(
            ResidualBlock()
        )


def test_weights_that_are_not_finite_are_refused_at_the_start() -> None:
    model = ResidualNet()
    with torch.no_grad():
        model.first.conv1.weight[0, 0, 0, 0] = math.nan
    with pytest.raises(DataError, match=r"first\.conv1\.weight holds NaN or infinity"):
        modify(quantizing(), model)
    assert not is_quantized(model) and type(model) is ResidualNet


@pytest.mark.parametrize("observer", ["moving_average", "min_max", "mse", "lsq"])
def test_a_batch_with_nan_is_refused_and_training_goes_on_as_if_it_never_came(observer: str) -> None:
    good, states = images(8), []
    for bad in (None, math.nan, math.inf):
        torch.manual_seed(0)
        model = ResidualNet()
        scheme = {"input_activations": {"observer": observer}}
        optimizer = modify(quantizing(scheme=scheme), model, sample_inputs=good)
        train_step(model, optimizer, good)
        if bad is not None:
            with pytest.raises(DataError, match=r"stem.*NaN or infinity"):
                train_step(model, optimizer, with_nan(bad))
        train_step(model, optimizer, good)
        states.append(model.state_dict())
    assert all(torch.equal(state[name], value) for state in states[1:] for name, value in states[0].items())


@pytest.mark.parametrize("what", ["bn.running_mean", "bn.running_var", "bn.bias", "fc.bias", "fc.weight"])
@pytest.mark.parametrize("scheme", ["default", "weight_only"])
def test_what_is_not_finite_is_refused_before_export(what: str, scheme: str, tmp_path: Path) -> None:
    model = ResidualNet()
    train_step(model, modify(quantizing(scheme=scheme), model), images(8))
    with torch.no_grad():
        model.state_dict()[what][0] = math.nan
    with pytest.raises(DataError, match=rf"{what} holds NaN or infinity"):
        export_onnx(model, images(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_integers_beside_other_floats_are_refused_before_export(dtype: torch.dtype, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).to(dtype)
    x = torch.randn(8, 4, dtype=dtype)
    train_step(model, modify(quantizing(), model, sample_inputs=x), x)
    with pytest.raises(ExportError, match=rf"has weights in {str(dtype)[6:]}; .*deepcopy\(model\)\.float\(\)"):
        export_onnx(model, x, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
    assert len(export_onnx(copy.deepcopy(model).float(), x.float(), tmp_path / "model.onnx").quantized) == 2


class Turning(nn.Module):
    """Its second layer runs in eval mode alone, as in the trace, and never in training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x if self.training and not torch.compiler.is_compiling() else self.second(torch.tanh(x))


def test_a_layer_that_never_ran_in_training_is_refused_before_export(tmp_path: Path) -> None:
    model = Turning()
    x = torch.randn(8, 4)
    train_step(model, modify(quantizing(), model, sample_inputs=x), x)
    with pytest.raises(StateError, match=r"second\..*no values were ever observed.*name the layer in `ignore`"):
        export_onnx(model, x, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_an_opset_that_cannot_say_the_scheme_is_refused_before_export(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(32, 8))
    weights = {"strategy": "block", "block_size": 16}
    x = torch.randn(4, 32)
    modify(quantizing(scheme={"input_activations": None, "weights": weights}), model, sample_inputs=x)
    with pytest.raises(ExportError, match="pass opset=21 instead of 20, or train with strategy: channel"):
        export_onnx(model, x, tmp_path / "model.onnx", opset=20)
    assert not list(tmp_path.iterdir())
