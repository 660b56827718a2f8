"""strict=False takes over what fits of the state of another recipe or model, for every modifier; training goes on."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sparsify.errors import SparsifyWarning
from sparsify.modifiers.base import Modifier
from sparsify.modifiers.distillation import DistillationModifier
from sparsify.modifiers.epochs import EpochRangeModifier
from sparsify.modifiers.layer_distillation import PerLayerDistillationModifier
from sparsify.modifiers.magnitude_pruning import (
    ConstantPruningModifier,
    GlobalMagnitudePruningModifier,
    GMPruningModifier,
)
from sparsify.modifiers.quantization import QuantizationModifier
from sparsify.modifiers.regularization import PowerpropagationModifier
from sparsify.modifiers.second_order import MFACPruningModifier, OBSPruningModifier
from sparsify.modifiers.sparse_training import ACDCPruningModifier, MovementPruningModifier, RigLPruningModifier
from sparsify.modifiers.structured import StructuredPruningModifier
from sparsify.modifiers.thinning import LayerThinningModifier
from sparsify.modifiers.top_kast import TopKASTPruningModifier
from sparsify.modifiers.training import (
    GradualParamModifier,
    SetParamModifier,
    TrainableParamsModifier,
)
from sparsify.training.manager import ScheduledModifierManager
from tests.loops import train_step
from tests.zoo.small import perceptron

EPOCHS, PER_EPOCH = 4, 3
Fields = dict[str, Any]


def ramp(**changed: Any) -> Fields:
    return {"start_epoch": 0.0, "end_epoch": 3.0, "update_frequency": 0.5, **changed}


def pruning(**changed: Any) -> Fields:
    return ramp(init_sparsity=0.1, final_sparsity=0.6, **changed)


LAYERS = ["0.weight", "2.weight", "4.weight"]
RECIPES: dict[str, Callable[[list[str]], list[Modifier]]] = {
    "magnitude": lambda names: [GMPruningModifier(params=names, **pruning())],
    "global": lambda names: [GlobalMagnitudePruningModifier(params=names, **pruning())],
    "constant": lambda names: [
        GMPruningModifier(params=names, **pruning(end_epoch=1.0)),
        ConstantPruningModifier(params=names, start_epoch=1.0),
    ],
    "movement": lambda names: [MovementPruningModifier(params=names, **pruning())],
    "OBS": lambda names: [OBSPruningModifier(params=names, num_grads=4, fisher_block_size=4, **pruning())],
    "M-FAC": lambda names: [
        MFACPruningModifier(params=names, num_grads=4, fisher_block_size=4, **pruning(), global_sparsity=True)
    ],
    "RigL": lambda names: [RigLPruningModifier(params=names, final_sparsity=0.6, **ramp())],
    "AC/DC": lambda names: [ACDCPruningModifier(params=names, compression_sparsity=0.6, **ramp(update_frequency=1.0))],
    "Top-KAST": lambda names: [
        TopKASTPruningModifier(params=names, forward_sparsity=0.6, backward_sparsity=0.4, **ramp())
    ],
    "powerpropagation": lambda names: [
        PowerpropagationModifier(params=names, start_epoch=0.0, end_epoch=3.0),
        GMPruningModifier(params=names, **pruning()),
    ],
    "channels": lambda names: [StructuredPruningModifier(params=names[:2], multiple=1, **pruning())],
    "channels removed": lambda names: [
        StructuredPruningModifier(params=names[:2], multiple=1, **pruning(end_epoch=1.0), shrink=True)
    ],
    "thinning": lambda names: [
        StructuredPruningModifier(params=names[:2], multiple=1, **pruning(end_epoch=1.0)),
        LayerThinningModifier(structure_type="filter", start_epoch=1.5),
    ],
    "int8": lambda names: [QuantizationModifier(start_epoch=1.0, ignore=[] if "4.weight" in names else ["4"])],
    "learned steps": lambda names: [
        QuantizationModifier(
            start_epoch=1.0, scheme={"weights": {"observer": "lsq"}}, ignore=[] if "4.weight" in names else ["4"]
        )
    ],
    "a teacher that is itself": lambda names: [DistillationModifier(hardness=0.5), *RECIPES["magnitude"](names)],
    "projections": lambda names: [
        PerLayerDistillationModifier(student_layer_names=["0"], teacher_layer_names=["2"]),
        *RECIPES["magnitude"](names),
    ],
    "parameters": lambda names: [
        SetParamModifier(params="0.bias", val=0.5),
        GradualParamModifier(params="2.bias", init_val=0.5, final_val=-0.5, start_epoch=0.0, end_epoch=3.0),
        TrainableParamsModifier(params=names[-1:], trainable=False, start_epoch=1.0, end_epoch=2.0),
    ],
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "the same": lambda: perceptron(6, 10, 8, 4),
    "wider": lambda: perceptron(6, 14, 8, 4),
    "narrower": lambda: perceptron(6, 7, 8, 4),
    "of other depth": lambda: perceptron(6, 10, 8, 8, 4),
}


def at_work(model: nn.Module, modifiers: list[Modifier]) -> tuple[Any, ScheduledModifierManager]:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    manager = ScheduledModifierManager([EpochRangeModifier(end_epoch=EPOCHS), *modifiers])
    needed = any(isinstance(modifier, DistillationModifier) for modifier in modifiers)
    projected = any(isinstance(modifier, PerLayerDistillationModifier) for modifier in modifiers)
    teacher: Any = "self" if needed else perceptron(6, 12, 9, 4, seed=4) if projected else None
    manager.modify(
        model, optimizer, steps_per_epoch=PER_EPOCH, sample_inputs=torch.ones(2, 6), distillation_teacher=teacher
    )
    return optimizer, manager


def go_on(model: nn.Module, optimizer: Any, manager: ScheduledModifierManager, steps: range) -> None:
    for number in steps:
        inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(number))
        train_step(model, optimizer, inputs, 1.0, update=manager.update_loss)


STATES: dict[str, dict[int, Any]] = {}


def states(name: str) -> dict[int, Any]:
    """The manager's state at a few steps of a run of the first model."""
    if name not in STATES:
        model = MODELS["the same"]()
        optimizer, manager = at_work(model, RECIPES[name](LAYERS))
        found = STATES[name] = {0: manager.state_dict()}
        for first, last in ((0, 2), (2, 5), (5, 8), (8, 12)):
            go_on(model, optimizer, manager, range(first, last))
            found[last] = manager.state_dict()
        manager.finalize()
    return STATES[name]


def check(name: str, step: int, kind: str, names: list[str]) -> None:
    """Loads the state of a step into a run of another model or recipe, and trains to the end."""
    state, model = copy.deepcopy(states(name)[step]), MODELS[kind]()
    optimizer, manager = at_work(model, RECIPES[name](names))
    fits = {
        parameter
        for parameter, mask in state["masks"]["masks"].items()
        if tuple(mask["shape"]) == tuple(dict(model.named_parameters()).get(parameter, torch.empty(0)).shape)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SparsifyWarning)
        manager.load_state_dict(state, strict=False)
        assert manager.step == step
        if "channels" not in name and name != "thinning":
            assert set(manager.sparsity()) == fits
        go_on(model, optimizer, manager, range(step, EPOCHS * PER_EPOCH + 1))
        manager.load_state_dict(manager.state_dict())
        if name not in ("int8", "learned steps", "parameters", "global", "AC/DC"):
            # Masks of parameters that the recipe does not name stay as they were saved.
            found = {parameter: s for parameter, s in manager.sparsity().items() if parameter in names}
            if name == "M-FAC":
                # It ranks all weights together: the share of one may be any, that of all is exact where all take part.
                sizes = {parameter: model.get_parameter(parameter).numel() for parameter in found}
                zeros = sum(round(share * sizes[parameter]) for parameter, share in found.items())
                assert 0.4 < zeros / sum(sizes.values()) < 0.9, found
                assert zeros == round(0.6 * sum(sizes.values())) or found.keys() != set(LAYERS), found
            else:
                assert all(0.4 < sparsity < 0.9 for sparsity in found.values()), found
        manager.finalize()


@pytest.mark.parametrize("name", RECIPES)
def test_what_fits_is_taken_over_and_training_goes_on(name: str) -> None:
    check(name, 5, "wider", LAYERS)


@pytest.mark.slow
@pytest.mark.parametrize("names", [LAYERS, LAYERS[:2]], ids=["the same names", "fewer names"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("step", [0, 2, 5, 8, 12])
@pytest.mark.parametrize("name", RECIPES)
def test_whatever_differs_training_goes_on(name: str, step: int, kind: str, names: list[str]) -> None:
    check(name, step, kind, names)


def test_channels_that_are_chosen_anew_leave_no_mask_of_the_old_ones() -> None:
    """The bias and the readers of a layer may fit although its weight does not."""
    state, model = copy.deepcopy(states("channels removed")[2]), MODELS["narrower"]()
    optimizer, manager = at_work(model, RECIPES["channels removed"](LAYERS))
    with pytest.warns(SparsifyWarning, match="they are chosen anew"):
        manager.load_state_dict(state, strict=False)
    go_on(model, optimizer, manager, range(2, 13))
    assert model.get_parameter("4.weight").shape == (4, 3) and not any(manager.sparsity().values())


def test_what_is_left_out_is_said() -> None:
    state = states("channels removed")[12]
    _, manager = at_work(MODELS["wider"](), RECIPES["channels removed"](LAYERS))
    with pytest.warns(
        SparsifyWarning, match=r"(?s)left out what does not fit:.*removal of channels.*'0.bias'|'0.weight'"
    ):
        manager.load_state_dict(copy.deepcopy(state), strict=False)


@pytest.mark.parametrize("name", ["magnitude", "OBS", "M-FAC", "RigL", "AC/DC", "Top-KAST"])
def test_what_a_recipe_names_besides_is_pruned_after_loading(name: str) -> None:
    model = MODELS["the same"]()
    optimizer, manager = at_work(model, RECIPES[name](LAYERS[:2]))
    go_on(model, optimizer, manager, range(5))
    state = manager.state_dict()
    again = MODELS["the same"]()
    optimizer, manager = at_work(again, RECIPES[name](LAYERS))
    with pytest.warns(SparsifyWarning, match="another recipe"):
        manager.load_state_dict(state, strict=False)
    again.load_state_dict(model.state_dict())
    go_on(again, optimizer, manager, range(5, EPOCHS * PER_EPOCH))
    assert set(manager.sparsity()) == set(LAYERS) and all(s > 0.4 for s in manager.sparsity().values())
