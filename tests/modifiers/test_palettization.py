"""Training with palettes: when things happen, what a weight is, joint with zeros and integers, resume to the bit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sparsify import (
    GMPruningModifier,
    PalettizationModifier,
    QuantizationModifier,
    Recipe,
    ScheduledModifierManager,
    export_onnx,
    pack_onnx,
    plan,
    save_model,
    verify_onnx,
)
from sparsify.errors import ArgumentError, DataError, RecipeError, SparsifyWarning, StateError, TargetError
from sparsify.model.made_weights import makers
from tests.loops import image_batches, regress, regression_at_work, regression_model, same_bits, train_step, weights_of
from tests.optimizer_forms import FORMS
from tests.zoo.quantizable import GptBlock, ResidualNet, Subclassed, images
from tests.zoo.small import Tied, perceptron, written


def palettes(**fields: Any) -> PalettizationModifier:
    return PalettizationModifier(**{"nbits": 2, "start_epoch": 0.0, **fields})


def different(weight: Tensor) -> int:
    return len(weight.detach().unique())


def test_palettes_are_there_from_the_start_epoch_on_and_weights_hold_them_at_the_end() -> None:
    model, optimizer, manager = regression_at_work(palettes(start_epoch=1.0))
    keys = list(model.state_dict())
    regress(model, optimizer, range(1))
    assert not makers(model)
    regress(model, optimizer, range(1, 3))
    assert set(makers(model)) == set(weights_of(model))
    regress(model, optimizer, range(3, 8))
    assert all(different(weight) > 4 for weight in weights_of(model).values())
    inputs = torch.randn(5, 6)
    before = model.eval()(inputs)
    manager.finalize(model)
    assert all(different(weight) == 4 for weight in weights_of(model).values())
    assert torch.equal(model(inputs), before)
    assert list(model.state_dict()) == keys and not makers(model)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_before_the_start_the_weights_are_those_without_a_recipe() -> None:
    model, optimizer, _ = regression_at_work(palettes(start_epoch=9.0))
    regress(model, optimizer, range(6))
    alone = regression_model()
    regress(alone, FORMS["sgd momentum"](alone), range(6))
    assert same_bits(model.state_dict(), alone.state_dict())


@pytest.mark.parametrize("end", [-1.0, 3.0])
@pytest.mark.parametrize("stop", range(1, 10))
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(stop: int, end: float) -> None:
    recipe = [palettes(start_epoch=1.0, end_epoch=end), palettes_free_pruning()]
    model, optimizer, manager = regression_at_work(recipe)
    regress(model, optimizer, range(stop))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), manager.state_dict()))
    regress(model, optimizer, range(stop, 12))
    manager.finalize(model)
    for order in ((0, 1), (1, 0), (2, 0, 1)):
        fresh, other, again = regression_at_work(recipe, seed=7)
        for part in order:
            (fresh, other, again)[part].load_state_dict(copy.deepcopy(saved[part]))
        regress(fresh, other, range(stop, 12))
        again.finalize(fresh)
        assert same_bits(fresh.state_dict(), model.state_dict()), order


def palettes_free_pruning() -> GMPruningModifier:
    return GMPruningModifier(
        params="__ALL_PRUNABLE__",
        start_epoch=0.0,
        end_epoch=4.0,
        init_sparsity=0.1,
        final_sparsity=0.6,
        update_frequency=0.5,
    )


def test_a_state_from_before_the_start_takes_palettes_off_again() -> None:
    model, optimizer, manager = regression_at_work(palettes(start_epoch=1.0))
    saved = copy.deepcopy((manager.state_dict(), model.state_dict(), optimizer.state_dict()))
    regress(model, optimizer, range(4))
    for part, state in zip((manager, model, optimizer), saved, strict=True):
        part.load_state_dict(state)
    assert not makers(model)
    regress(model, optimizer, range(4))
    assert makers(model)


def test_indices_are_kept_from_the_end_on_and_values_go_on_learning() -> None:
    model, optimizer, manager = regression_at_work(palettes(end_epoch=2.0))
    regress(model, optimizer, range(4))
    inputs = torch.randn(3, 6)
    assert torch.equal(model.train()(inputs), model.eval()(inputs))
    model.train()
    codes = {name: each.codes.clone() for name, each in makers(model).items()}  # type: ignore[operator, union-attr]
    values = {name: each.values.clone() for name, each in makers(model).items()}  # type: ignore[operator, union-attr]
    regress(model, optimizer, range(4, 10))
    for name, each in makers(model).items():
        assert torch.equal(each.codes, codes[name]) and not torch.equal(each.values, values[name])  # type: ignore[arg-type]
    manager.finalize(model)
    assert all(different(weight) == 4 for weight in weights_of(model).values())


@pytest.mark.parametrize("start", [0.0, 2.0])
def test_pruned_weights_stay_zero_and_palettes_have_a_value_for_them(start: float) -> None:
    model, optimizer, manager = regression_at_work([palettes(start_epoch=start), palettes_free_pruning()])
    regress(model, optimizer, range(12))
    zeros = {name: weight == 0 for name, weight in weights_of(model).items()}
    assert all(abs(float(each.float().mean()) - 0.6) < 0.03 for each in zeros.values())
    for name, each in makers(model).items():
        assert not each(weights_of(model)[name])[zeros[name]].any()
    manager.finalize(model)
    for name, weight in weights_of(model).items():
        assert not weight[zeros[name]].any() and different(weight) <= 4


@pytest.mark.parametrize("first", ["palettes", "integers"])
def test_with_integers_the_palette_is_one_of_integers_in_the_file(first: str, tmp_path: Path) -> None:
    late = {"palettes": 0.0, "integers": 1.0}
    starts = late if first == "palettes" else {"palettes": 1.0, "integers": 0.0}
    recipe = [
        PalettizationModifier(nbits=3, start_epoch=starts["palettes"]),
        QuantizationModifier(start_epoch=starts["integers"]),
    ]
    torch.manual_seed(0)
    model = ResidualNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    manager = ScheduledModifierManager(recipe)
    manager.modify(model, optimizer, steps_per_epoch=2)
    for x in image_batches(5):
        train_step(model, optimizer, x, 1.0)
    model.eval()
    inputs = images()
    trained = model(inputs)
    export_onnx(model, inputs, tmp_path / "training.onnx")
    manager.finalize(model)
    assert torch.equal(model(inputs), trained)
    export_onnx(model, inputs, tmp_path / "whole.onnx")
    for name in ("training.onnx", "whole.onnx"):
        assert verify_onnx(model, tmp_path / name, inputs).ok
        held = [numpy_helper.to_array(each) for each in onnx.load(tmp_path / name).graph.initializer]
        integers = [each for each in held if each.dtype == np.int8 and each.size > 20]
        # A BatchNorm's factor below zero changes signs of a channel.
        assert integers and all(len(np.unique(np.abs(each))) <= 8 for each in integers)


def test_the_file_holds_indices_where_it_is_packed(tmp_path: Path) -> None:
    model = perceptron(64, 128, 64).requires_grad_(False)
    manager = ScheduledModifierManager([palettes(nbits=4)])
    manager.apply(model)
    manager.finalize(model)
    inputs = torch.randn(2, 64)
    export_onnx(model, inputs, tmp_path / "plain.onnx")
    # Float weights of products are packed where sums without optimizations may differ (docs/compression.md).
    pack_onnx(tmp_path / "plain.onnx", tmp_path / "packed.onnx", exact_unoptimized=False)
    assert verify_onnx(model, tmp_path / "packed.onnx", inputs).ok
    sizes = [(tmp_path / name).stat().st_size for name in ("plain.onnx", "packed.onnx")]
    assert sizes[1] < 0.3 * sizes[0]


def test_tied_weights_have_one_palette() -> None:
    torch.manual_seed(0)
    model = Tied(20, 8)
    manager = ScheduledModifierManager([palettes()])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager.modify(model, optimizer, steps_per_epoch=2)
    ids = torch.randint(0, 20, (4, 5))
    palette = makers(model)["embed.weight"].train()
    made = palette(model.embed.weight)
    assert torch.equal(model(ids), F.linear(F.embedding(ids, made), made))
    manager.finalize(model)
    assert model.head.weight is model.embed.weight and different(model.embed.weight) == 4


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "attention": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0),
        lambda: torch.randn(2, 5, 8),
    ),
    "gpt": (GptBlock, lambda: torch.randn(2, 3, 70)),
    "subclasses": (Subclassed, images),
    "convolutions": (ResidualNet, images),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 3), images),
    "recomputed": (lambda: _Recomputing(), lambda: torch.randn(4, 6)),
}


class _Recomputing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = perceptron(6, 10, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.body, x, use_reentrant=False)
        return y


@pytest.mark.parametrize("name", MODELS)
def test_what_training_saw_is_what_is_kept(name: str) -> None:
    build, batch = MODELS[name]
    torch.manual_seed(0)
    model, inputs = build(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    manager = ScheduledModifierManager([palettes()])
    manager.modify(model, optimizer, steps_per_epoch=2)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    for _ in range(3):
        train_step(model, optimizer, inputs, 1.0)
    targets = set(makers(model))
    assert targets and all(not torch.equal(before[key], dict(model.named_parameters())[key]) for key in targets)
    with torch.no_grad():
        trained = model.eval()(inputs)
        manager.finalize(model)
        assert all(different(dict(model.named_parameters())[key]) <= 4 for key in targets)
        assert torch.equal(model(inputs), trained)


def test_a_copy_and_a_pickle_go_on_by_themselves() -> None:
    model, optimizer, _ = regression_at_work(palettes())
    regress(model, optimizer, range(2))
    inputs = torch.randn(3, 6)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.eval()(inputs), model.eval()(inputs))
        with torch.no_grad():
            next(other.parameters()).zero_()
        assert not torch.equal(other(inputs), model(inputs))
        model.train()


def test_averages_get_palettes_too() -> None:
    model, optimizer, manager = regression_at_work(palettes(start_epoch=1.0))
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    for step in range(6):
        regress(model, optimizer, [step])
        average.update_parameters(model)
    assert set(makers(average.module)) == set(makers(model))
    made = makers(average.module)["0.weight"].eval()(average.module[0].weight)  # type: ignore[index]
    assert different(made) <= 4
    manager.finalize(model)


def test_groups_overrides_and_what_is_left_out() -> None:
    model = perceptron(8, 16, 16, 6)
    recipe = palettes(
        granularity="per_grouped_channel",
        group_size=4,
        scheme_overrides={"2": {"nbits": 1, "granularity": "per_tensor"}, "4.weight": None},
    )
    manager = ScheduledModifierManager([recipe])
    manager.apply(model)
    manager.finalize(model)
    first, second, third = (model[i].weight for i in (0, 2, 4))
    assert all(different(first[i : i + 4]) == 4 for i in range(0, 16, 4)) and different(first) == 16
    assert different(second) == 2 and different(third) == third.numel()
    with pytest.warns(SparsifyWarning, match=r"4\.weight: its 6 channels are not divided by group_size=4"):
        ScheduledModifierManager([palettes(granularity="per_grouped_channel", group_size=4)]).apply(model)


def test_values_start_where_the_loss_is_steep() -> None:
    inputs, target = torch.randn(64, 6), torch.randn(64, 4)
    inputs[:, 0] *= 30.0
    losses = []
    for sampler in (None, ([(inputs[i : i + 1], target[i : i + 1]) for i in range(64)], F.mse_loss)):
        model = regression_model()
        wanted = model(inputs).detach()
        manager = ScheduledModifierManager([palettes(params="0", nbits=1)])
        manager.apply(model, grad_sampler=sampler)
        manager.finalize(model)
        losses.append(float(F.mse_loss(model(inputs), wanted).detach()))
    assert losses[1] < losses[0]


def test_trained_palettes_are_better_than_rounded_ones() -> None:
    torch.manual_seed(0)
    teacher = perceptron(8, 24, 4, seed=3)
    inputs = torch.randn(256, 8)
    target = teacher(inputs).detach()
    errors = []
    for steps in (0, 150):
        model = copy.deepcopy(teacher)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        manager = ScheduledModifierManager([palettes(nbits=2)])
        manager.modify(model, optimizer, steps_per_epoch=10)
        for _ in range(steps):
            train_step(model, optimizer, inputs, target)
        manager.finalize(model.eval())
        errors.append(float((model(inputs) - target).square().mean().detach()))
    assert errors[1] < 0.5 * errors[0]


def test_recipes_read_and_write_it_and_plans_foresee_its_bits() -> None:
    text = "modifiers:\n  - !PalettizationModifier\n    start_epoch: 1.0\n    end_epoch: 3.0\n    nbits: 2\n"
    recipe = Recipe.from_yaml(text)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    recipe.check(regression_model())
    assert "palettes" in str(plan(recipe, regression_model(), steps_per_epoch=2))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"nbits": 5}, "nbits"),
        ({"nbits": 0}, "nbits"),
        ({"granularity": "per_channel"}, "granularity"),
        ({"group_size": 0}, "group_size"),
        ({"tau": 0.0}, "tau"),
        ({"tau": float("nan")}, "tau"),
        ({"iterations": 0}, "iterations"),
        ({"lut_dtype": "int4"}, "lut_dtype"),
        ({"scheme_overrides": {"0": {"bits": 2}}}, "scheme_overrides"),
    ],
)
def test_wrong_fields_are_recipe_errors(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        palettes(**fields)


def test_what_cannot_work_is_said_before_anything_is_changed(tmp_path: Path) -> None:
    model = regression_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TargetError, match=r"'0\.weigth' matches nothing"):
        ScheduledModifierManager([palettes(params="0.weigth")]).apply(model)
    with pytest.raises(TargetError, match=r"no weight of Sequential can have one: .*group_size=7"):
        ScheduledModifierManager([palettes(granularity="per_grouped_channel", group_size=7)]).apply(model)
    with pytest.raises(ArgumentError, match="grad_sampler"):
        ScheduledModifierManager([palettes()]).apply(model, grad_sampler=3)  # type: ignore[arg-type]
    assert same_bits(model.state_dict(), before)
    normed = written(lambda self, x: self.one(x), one=nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(TargetError, match="recomputed before every forward"):
        ScheduledModifierManager([palettes()]).apply(normed)
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")  # type: ignore[index, operator]
    with pytest.raises(DataError, match=r"0\.weight.*NaN"):
        ScheduledModifierManager([palettes()]).apply(model)
    assert not makers(model)


def test_a_model_whose_palettes_train_is_not_saved_as_a_finished_one(tmp_path: Path) -> None:
    model, optimizer, manager = regression_at_work(palettes())
    regress(model, optimizer, range(2))
    with pytest.raises(StateError, match="palette that still trains"):
        save_model(model, tmp_path / "saved")
    manager.finalize(model)
    save_model(model, tmp_path / "saved")
