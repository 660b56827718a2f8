"""A recipe after measurements is the one that `create_recipe` makes of the same profiles."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsify.analysis import analyze_model, loss_profile
from sparsify.errors import ArgumentError, SparsifyWarning
from sparsify.optimize import PruningSettings, create_recipe
from sparsify.optimize.measured_recipe import Measurements, recipe_from_measurements

X = torch.zeros(1, 3, 8, 8)


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(8, 3, 8, 8), torch.randint(0, 4, (8,))) for _ in range(2)]


def test_without_measurements_it_is_the_recipe_of_the_model() -> None:
    made = recipe_from_measurements(build(), X, Measurements(), optim_level=0.5)
    assert made.recipe == create_recipe(build(), X, optim_level=0.5)
    assert made.analysis == analyze_model(build(), X) and made.loss is None and made.performance is None


@pytest.mark.parametrize("structured", [False, True])
def test_losses_are_measured_on_data_that_can_be_read_once(structured: bool) -> None:
    settings = PruningSettings(sparsity=0.5)
    criterion = nn.functional.cross_entropy
    measurements = Measurements(data=iter(batches()), criterion=criterion)
    made = recipe_from_measurements(build(), X, measurements, settings=settings, structured=structured)
    loss = loss_profile(build(), batches(), criterion, structured=structured, sample_inputs=X)
    assert made.loss == loss
    assert made.recipe == create_recipe(build(), X, settings=settings, loss=loss, structured=structured or None)


def test_times_need_inputs() -> None:
    with pytest.raises(ArgumentError, match="sample_inputs"):
        recipe_from_measurements(build(), None, Measurements(goal_ms=5.0))


def test_the_page_needs_inputs() -> None:
    made = recipe_from_measurements(build(), None, Measurements(), optim_level=0.5)
    with pytest.raises(ArgumentError, match="give sample inputs"):
        made.report("made.yaml")


def test_the_page_begins_with_the_settings_of_the_recipe() -> None:
    settings = PruningSettings(sparsity=0.6)
    made = recipe_from_measurements(build(), X, Measurements(), settings=settings)
    assert made.report("made.yaml").settings == settings
    by_level = recipe_from_measurements(build(), X, Measurements(), optim_level=0.5)
    assert by_level.report("made.yaml").settings.sparsity == pytest.approx(0.7)


def test_the_page_of_a_recipe_of_channels_says_that_it_differs() -> None:
    settings = PruningSettings(sparsity=0.5)
    made = recipe_from_measurements(build(), X, Measurements(), settings=settings, structured=True)
    with pytest.warns(SparsifyWarning, match="the recipe removes channels"):
        made.report("made.yaml")
