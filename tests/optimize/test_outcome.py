"""What was predicted against what came out."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsify.errors import ArgumentError, DataError, StateError
from sparsify.onnx.export import export_onnx
from sparsify.optimize.outcome import Prediction, score_prediction
from sparsify.optimize.recipe_creation import create_recipe
from sparsify.recipe import Recipe
from sparsify.training.manager import ScheduledModifierManager

X = torch.zeros(2, 1, 8, 8)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    nn.init.zeros_(model.get_parameter("0.bias"))
    return model


@cache
def _trained(structured: bool | None, sparsity: float) -> tuple[Recipe, nn.Module]:
    model = network()
    recipe = create_recipe(model, X, sparsity=sparsity, structured=structured)
    manager = ScheduledModifierManager(recipe)
    manager.apply(model, sample_inputs=X)
    return recipe, model


def trained(structured: bool | None = None, sparsity: float = 0.8) -> tuple[Recipe, nn.Module]:
    """The recipe and a copy of the model to which it was applied."""
    recipe, model = _trained(structured, sparsity)
    return recipe, copy.deepcopy(model)


def test_predictions_are_met_to_a_weight() -> None:
    recipe, model = trained()
    with torch.no_grad():
        # What training does to biases.
        model.get_parameter("0.bias").fill_(1.0)
    outcome = score_prediction(recipe, model, sample_inputs=X)
    assert outcome["MACs"].error == 0 and outcome["parameters"].error == 0
    for layer in outcome.layers:
        size = model.get_parameter(layer.what).numel()
        assert layer.error is not None and abs(layer.error) <= 0.5 / size
    assert outcome["nonzero"].relative == pytest.approx(0.0, abs=1e-3)
    assert outcome["zeros"].error == pytest.approx(0.0, abs=1e-3)
    assert outcome["ms"].measured is None and outcome["recovery"].measured is None


def test_a_weight_that_grew_back_is_seen() -> None:
    recipe, model = trained()
    with torch.no_grad():
        model.get_parameter("2.weight").fill_(1.0)
    outcome = score_prediction(recipe, model)
    worst = outcome.worst_layer
    assert worst is not None and worst.what == "2.weight" and worst.measured == 0.0
    assert "MACs: give sample_inputs" in str(outcome)


def test_measured_figures_are_compared(tmp_path: Path) -> None:
    recipe, model = trained()
    path = tmp_path / "model.onnx"
    export_onnx(model, X, path)
    outcome = score_prediction(recipe, model, path=path, ms=0.5, score_before=0.8, score_after=0.76)
    assert outcome["recovery"].measured == pytest.approx(0.95)
    assert outcome["ms"] == Prediction("ms", None, 0.5)
    assert outcome["size_bytes"].measured == path.stat().st_size
    assert "off by" in str(outcome) and "Sparsity by layer" in str(outcome)


def test_channels_that_went_are_compared_by_what_is_left() -> None:
    recipe, model = trained(structured=True, sparsity=0.6)
    outcome = score_prediction(recipe, model, sample_inputs=X)
    assert outcome.layers == ()
    assert outcome["parameters"].error == outcome["MACs"].error == 0
    with pytest.raises(StateError, match="none of its channels was removed"):
        score_prediction(recipe, network())


def test_prediction_errors() -> None:
    assert Prediction("ms", 2.0, 3.0).error == 1.0
    assert Prediction("ms", 2.0, 3.0).relative == 0.5
    assert Prediction("ms", 0.0, 3.0).relative is None
    assert Prediction("ms", None, 3.0).error is None


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    recipe, model = trained()
    with pytest.raises(StateError, match="none of the weights that the recipe prunes is zero"):
        score_prediction(recipe, network())
    with pytest.raises(ArgumentError, match=r"model: it has no '2\.weight'"):
        score_prediction(recipe, nn.Sequential(nn.Conv2d(1, 2, 3)))
    with pytest.raises(ArgumentError, match="recipe: it has no evidence"):
        score_prediction(Recipe.from_modifiers(recipe.written), model)
    with pytest.raises(ArgumentError, match="score_before and score_after"):
        score_prediction(recipe, model, score_before=0.5)
    for value in (-1.0, float("nan"), True, "3"):
        with pytest.raises(ArgumentError, match=r"ms: .* is no measured figure"):
            score_prediction(recipe, model, ms=value)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="there is no such file"):
        score_prediction(recipe, model, path=tmp_path / "none.onnx")
    with pytest.raises(KeyError):
        score_prediction(recipe, model)["nothing"]
