"""Distillation, whole channels, single weights and int8 in one recipe; and what cannot stand together is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from sparsify import ScheduledModifierManager, export_onnx
from sparsify.errors import RecipeError, TargetError
from sparsify.modifiers.base import Modifier
from sparsify.modifiers.distillation import DistillationModifier
from sparsify.modifiers.layer_distillation import PerLayerDistillationModifier
from sparsify.modifiers.layer_pruning import LayerPruningModifier
from sparsify.modifiers.magnitude_pruning import ConstantPruningModifier, GMPruningModifier
from sparsify.modifiers.quantization import QuantizationModifier
from sparsify.modifiers.second_order import OBSPruningModifier
from sparsify.modifiers.sparse_training import MovementPruningModifier
from sparsify.modifiers.structured import StructuredPruningModifier
from sparsify.modifiers.thinning import LayerThinningModifier
from sparsify.modifiers.top_kast import TopKASTPruningModifier
from sparsify.onnx.runtime import open_session, run_session
from sparsify.recipe import Recipe
from tests.loops import channel_pruning
from tests.zoo import prunable as small
from tests.zoo.prunable import Encoder, Residual

both = pytest.mark.parametrize("kind", [Residual, Encoder])


def structured(**changed: Any) -> StructuredPruningModifier:
    return channel_pruning(**{"start_epoch": 0.0, "end_epoch": 1.0, "multiple": 2, "shrink": True, **changed})


def ramp(**changed: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"init_sparsity": 0.1, "final_sparsity": 0.5, "update_frequency": 0.5}
    return {**fields, "params": "__ALL_PRUNABLE__", "start_epoch": 1.0, "end_epoch": 2.0, **changed}


def composed(**single: Any) -> list[Modifier]:
    """Written in no order that would help."""
    return [
        QuantizationModifier(start_epoch=2.0),
        GMPruningModifier(**ramp(**single)),
        DistillationModifier(hardness=0.5),
        structured(),
    ]


# What is pruned to 2:4; the width of the input is 2 and 6.
EVEN = {
    Residual: ["conv2", "fc"],
    Encoder: [f"attention.{n}" for n in ("query", "key", "value", "out")] + ["up", "down"],
}


def at_work(kind: Any, modifiers: list[Modifier], name: str = "sgd") -> tuple[Any, Any, ScheduledModifierManager]:
    model = small.made(kind)
    optimizer = small.optimizer_of(name, model)
    manager = ScheduledModifierManager(modifiers)
    x = small.batch(kind, 0)[0]
    manager.modify(model, optimizer, steps_per_epoch=3, sample_inputs=x, distillation_teacher=small.made(kind, seed=1))
    return model, optimizer, manager


@both
@pytest.mark.parametrize("single", ["unstructured", "2:4"])
def test_zeros_survive_into_the_initializers_of_a_smaller_integer_file(kind: Any, single: str, tmp_path: Path) -> None:
    changed = {"params": EVEN[kind], "mask_type": "2:4", "init_sparsity": 0.0} if single == "2:4" else {}
    # 2:4 wants what a layer reads to be a multiple of 4.
    model, optimizer, manager = at_work(kind, [*composed(**changed)[:3], structured(multiple=4)])
    for number in range(12):
        small.step(model, optimizer, number, update=manager.update_loss)
    sparsity = manager.sparsity()
    manager.finalize(model)
    masked = {name: p.detach().clone() for name, p in model.named_parameters() if name in sparsity}
    assert masked and all(fraction == pytest.approx(0.5, abs=0.03) for fraction in sparsity.values())
    for name, weight in masked.items():
        assert int((weight == 0).sum()) == round(weight.numel() * sparsity[name])
        if single == "2:4":
            groups = weight.flatten(1) if weight.dim() == 2 else weight.movedim(1, -1)
            assert bool(((groups.unflatten(-1, (-1, 4)) != 0).sum(-1) == 2).all())
    x = small.batch(kind, 50)[0]
    path = tmp_path / "model.onnx"
    export_onnx(model.eval(), (x[:1],), path)
    file = onnx.load(path)
    integers = [numpy_helper.to_array(t) for t in file.graph.initializer if t.data_type == onnx.TensorProto.INT8]
    shapes = sorted(tuple(sorted(values.shape)) for values in integers if values.ndim > 1)
    for name, weight in masked.items():
        # The file may hold a matrix the other way round.
        assert tuple(sorted(weight.shape)) in shapes, name
    weights = [values for values in integers if values.ndim > 1]
    zeros = sum(int((values == 0).sum()) for values in weights)
    assert zeros >= sum(int((weight == 0).sum()) for weight in masked.values())
    session = open_session(path)
    (out,) = run_session(session, {session.get_inputs()[0].name: x.numpy()}).values()
    torch.testing.assert_close(torch.from_numpy(out), model(x).detach(), rtol=0.1, atol=0.1)


def test_a_width_that_single_weights_cannot_be_masked_in_is_refused_by_name() -> None:
    modifiers = [structured(multiple=3), GMPruningModifier(**ramp(params=["conv2"], mask_type="2:4"))]
    model, optimizer, manager = at_work(Residual, modifiers)
    with pytest.raises(TargetError, match=r"'conv2.weight' has 6 input channels, which 4 does not divide"):
        for number in range(4):
            small.step(model, optimizer, number, update=manager.update_loss)
    manager.finalize(model)
    assert model(small.batch(Residual, 0)[0]).shape == (8, 4)


@both
def test_quantization_sees_the_model_that_was_shrunk(kind: Any) -> None:
    model, optimizer, manager = at_work(kind, composed())
    for number in range(7):
        small.step(model, optimizer, number, update=manager.update_loss)
    assert manager.qat_active(2.0) and manager.phase(2.5) == "pruned_quantized"
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert all(type(layer) not in (nn.Conv2d, nn.Linear) for layer in layers)
    first = model.conv2 if kind is Residual else model.up
    assert first.weight.shape[0] == {Residual: 6, Encoder: 12}[kind]
    assert (first.out_channels if kind is Residual else first.out_features) == first.weight.shape[0]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@both
def test_resumed_at_every_step_it_is_the_run_that_never_stopped(kind: Any, name: str, tmp_path: Path) -> None:
    model, optimizer, manager = at_work(kind, composed(), name)
    steps = 9
    for number in range(steps):
        parts = (model.state_dict(), optimizer.state_dict(), manager.state_dict())
        torch.save(parts, tmp_path / f"{number}.pt")
        small.step(model, optimizer, number, update=manager.update_loss)
    for number in range(steps):
        parts = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        again, other, second = at_work(kind, composed(), name)
        second.load_state_dict(parts[2])
        again.load_state_dict(parts[0])
        other.load_state_dict(parts[1])
        for later in range(number, steps):
            small.step(again, other, later, update=second.update_loss)
        expected = model.state_dict()
        assert set(again.state_dict()) == set(expected)
        for key, value in expected.items():
            assert torch.equal(again.state_dict()[key], value), (number, key)
        second.finalize(again)


@both
def test_a_checkpoint_loads_into_a_fresh_model(kind: Any) -> None:
    model, optimizer, manager = at_work(kind, composed())
    for number in range(9):
        small.step(model, optimizer, number, update=manager.update_loss)
    fresh = small.made(kind, seed=5)
    ScheduledModifierManager(composed()).apply_structure(fresh, state=manager.state_dict())
    fresh.load_state_dict(model.state_dict())
    x = small.batch(kind, 70)[0]
    assert torch.equal(fresh.eval()(x), model.eval()(x))


def test_the_example_loads_and_its_order_is_checked() -> None:
    path = Path(__file__).parents[2] / "examples" / "digits_composed.yaml"
    assert Recipe.load(path).max_epochs == 26
    with pytest.raises(RecipeError, match=r"digits_composed.yaml:\d+: .*starts at epoch 7, but StructuredPruning"):
        Recipe.load(path, recipe_variables={"quantization_start": 7.0, "pruning_end": 8.0})


# ------------------------------------------------------------------------------------- refused at load


SHRINKS = structured(params=["conv1"], start_epoch=2.0, end_epoch=6.0)
MASKS = structured(params=["conv1"], start_epoch=2.0, end_epoch=6.0, shrink=False)
THINS = LayerThinningModifier(structure_type="filter", start_epoch=6.0)


def single(start: float, end: float, params: Any = "conv1", kind: Any = GMPruningModifier, **changed: Any) -> Modifier:
    modifier: Modifier = kind(**ramp(params=[params], start_epoch=start, end_epoch=end, **changed))
    return modifier


REFUSED: list[tuple[list[Modifier], str]] = [
    ([SHRINKS, QuantizationModifier(start_epoch=4.0)], "QuantizationModifier starts at epoch 4, but Structured.* at 6"),
    ([MASKS, QuantizationModifier(start_epoch=-1.0)], "QuantizationModifier starts at epoch 0"),
    ([QuantizationModifier(start_epoch=5.0), MASKS, THINS], "starts at epoch 5, but LayerThinningModifier"),
    # At one moment those that end come first: this one ends before.
    (
        [QuantizationModifier(start_epoch=6.0, end_epoch=9.0), MASKS, THINS],
        "QuantizationModifier starts at epoch 6, but LayerThinningModifier",
    ),
    ([SHRINKS, single(0.0, 2.0)], "Whole channels come first: let the other one start at epoch 6 or later"),
    ([single(0.0, 1.0, "conv1.weight"), MASKS], "Whole channels come first"),
    ([SHRINKS, single(0.0, 2.0, mask_type="2:4")], "Whole channels come first"),
    ([SHRINKS, single(4.0, 8.0)], "Modifier prunes 'conv1' from epoch .* Whole channels come first"),
    (
        [SHRINKS, ConstantPruningModifier(params=["conv1"])],
        "Modifier prunes 'conv1' from epoch .* Whole channels come first",
    ),
    ([SHRINKS, structured(params=["conv1"], start_epoch=4.0, end_epoch=8.0)], "Let one end where the other starts"),
    (
        [MASKS, LayerThinningModifier(structure_type="filter", start_epoch=2.0)],
        "before any is masked: that starts",
    ),
    ([MASKS, LayerThinningModifier(structure_type="filter")], "removes masked channels at epoch 0, before any"),
    ([SHRINKS, single(5.0, 8.0, "fc", MovementPruningModifier)], "at epoch 6, in the middle of MovementPruning"),
    ([SHRINKS, single(5.0, 8.0, "fc", OBSPruningModifier)], "in the middle of OBSPruningModifier"),
    ([SHRINKS, PerLayerDistillationModifier()], "in the middle of PerLayerDistillationModifier"),
    ([SHRINKS, LayerPruningModifier(layers=["conv2"], start_epoch=3.0)], "LayerPruningModifier changes at epoch 3"),
    (
        [MASKS, LayerPruningModifier(layers=["conv2"], start_epoch=-1.0, end_epoch=4.0)],
        "LayerPruningModifier changes at epoch 4",
    ),
    (
        [
            THINS,
            TopKASTPruningModifier(
                forward_sparsity=0.5,
                backward_sparsity=0.4,
                params=["fc"],
                start_epoch=0.0,
                end_epoch=9.0,
                update_frequency=1.0,
            ),
        ],
        "LayerThinningModifier removes channels at epoch 6, in the middle of TopKASTPruningModifier",
    ),
]


@pytest.mark.parametrize(("modifiers", "text"), REFUSED)
@pytest.mark.parametrize("backwards", [False, True])
def test_what_cannot_stand_together_is_refused_at_load(modifiers: list[Modifier], text: str, backwards: bool) -> None:
    written = modifiers[::-1] if backwards else modifiers
    with pytest.raises(RecipeError, match=text):
        Recipe.from_modifiers(written)


def test_the_line_of_what_is_refused_is_said() -> None:
    text = """modifiers:
  - !StructuredPruningModifier {params: [conv1], init_sparsity: 0.1, final_sparsity: 0.5, start_epoch: 2.0,
      end_epoch: 6.0, update_frequency: 0.5, shrink: true}
  - !QuantizationModifier {start_epoch: 4.0}
"""
    with pytest.raises(RecipeError, match=r"^recipe:4: QuantizationModifier starts at epoch 4"):
        Recipe.from_yaml(text)


ALLOWED: list[list[Modifier]] = [
    [SHRINKS, QuantizationModifier(start_epoch=6.0)],
    [THINS, MASKS, QuantizationModifier(start_epoch=6.0)],
    [SHRINKS, single(6.0, 8.0)],
    [MASKS, single(6.0, 8.0, mask_type="2:4")],
    [SHRINKS, single(0.0, 8.0, "fc")],
    [SHRINKS, structured(params=["conv1"], start_epoch=6.0, end_epoch=8.0)],
    [SHRINKS, single(6.0, 8.0, "fc", MovementPruningModifier), single(1.0, 6.0, "bn", OBSPruningModifier)],
    [SHRINKS, LayerPruningModifier(layers=["conv2"], start_epoch=-1.0)],
    [MASKS, PerLayerDistillationModifier()],
    [MASKS, ConstantPruningModifier(params=["conv1"], start_epoch=6.0), QuantizationModifier(start_epoch=7.0)],
    [THINS],
]


@pytest.mark.parametrize("modifiers", ALLOWED)
def test_what_can_stand_together_is_taken(modifiers: list[Modifier]) -> None:
    assert Recipe.from_modifiers(modifiers).modifiers


def test_names_that_only_a_model_tells_are_checked_with_it() -> None:
    recipe = Recipe.from_modifiers([SHRINKS, single(0.0, 2.0, "re:conv1.*weight")])
    with pytest.raises(RecipeError, match=r"prunes 'conv1.weight' from epoch 0 to 2.*Whole channels come first"):
        recipe.check(small.made(Residual))
    model = small.made(Residual)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RecipeError, match="Whole channels come first"):
        ScheduledModifierManager(recipe).modify(model, small.optimizer_of("sgd", model), steps_per_epoch=2)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
