"""From a model and a goal to a recipe that trains, with the evidence for each of its numbers."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify.analysis.analyze import analyze_model
from sparsify.analysis.loss import LossProfile, loss_profile
from sparsify.analysis.performance import SPARSITIES, LayerPerformance, PerformanceProfile
from sparsify.errors import ArgumentError, DataError, TargetError
from sparsify.modifiers import SetLearningRateModifier
from sparsify.optimize.allocation import pruning_profile
from sparsify.optimize.latency import LatencyPlan
from sparsify.optimize.layer_curves import curves
from sparsify.optimize.planning import plan
from sparsify.optimize.pruning_profiles import PruningSettings
from sparsify.optimize.recipe_creation import create_recipe
from sparsify.optimize.stages import OriginalTraining, learning_rates
from sparsify.recipe import Recipe
from sparsify.training.manager import ScheduledModifierManager

SGD = OriginalTraining(20, 0.1, 0.001)


class Net(nn.Module):
    """Four convolutions, two of which share a residual sum, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.inner = nn.Conv2d(16, 32, 3, padding=1)
        self.outer = nn.Conv2d(32, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.outer(F.relu(self.inner(x)))
        return self.fc(F.relu(self.down(x)).mean((2, 3)))


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net()


X = torch.zeros(2, 1, 8, 8)


def of(recipe: Recipe, name: str) -> list[Any]:
    return [modifier for modifier in recipe.written if type(modifier).__name__ == name]


def given(recipe: Recipe) -> dict[str, float]:
    """{parameter: sparsity} of the pruning modifiers."""
    return {name: m.final_sparsity for m in recipe.written if m.kind == "pruning" for name in m.names()}  # type: ignore[attr-defined]


def measured(model: Net) -> tuple[LossProfile, PerformanceProfile]:
    """Profiles with figures of our own: the first of the two inner layers is cheap to prune, and slow."""
    levels = (0.0, 0.5, 0.9)
    losses = {"stem": (1.0, 3.0, 9.0), "inner": (1.0, 1.1, 1.2), "outer": (1.0, 1.5, 3.0), "down": (1.0, 1.2, 1.6)}
    loss = LossProfile("data", "pruning", levels, {**losses, "fc": (1.0, 2.0, 5.0)}, 1.0, 64)
    layers = tuple(
        LayerPerformance(name, ms, ms / 2, tuple(ms * (1 - 0.9 * s) for s in SPARSITIES), None, None)
        for name, ms in (("stem", 0.1), ("inner", 1.0), ("outer", 0.8), ("down", 0.4), ("fc", 0.1))
    )
    performance = PerformanceProfile(
        layers, 2.4, 1.5, {}, 2, 1, "content", {"onnxruntime": "1.31"}, profiled_ms=2.4, profiled_int8_ms=1.5
    )
    return loss, performance


# ---------------------------------------------------------------------- what comes out


def test_a_model_and_a_level_are_enough(model: Net) -> None:
    before = copy.deepcopy(model.state_dict())
    recipe = create_recipe(model, optim_level=0.5)
    recipe.check(model)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    weights = dict(model.named_parameters())
    shares = given(recipe)
    total = sum(weights[name].numel() for name in ("inner.weight", "outer.weight", "down.weight", "fc.weight"))
    assert sum(share * weights[name].numel() for name, share in shares.items()) / total == pytest.approx(0.7, abs=0.03)
    assert "stem.weight" not in shares and recipe.evidence is not None and "stem" in recipe.evidence.dense
    assert {m.init_sparsity for m in of(recipe, "GMPruningModifier")} == {0.05}
    assert len(of(recipe, "GMPruningModifier")) == len(set(shares.values()))
    assert (recipe.max_epochs, len(of(recipe, "QuantizationModifier"))) == (62, 1)
    assert not [m for m in recipe.written if m.kind == "learning_rate"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_same_call_gives_the_same_recipe(model: Net) -> None:
    assert create_recipe(model, X, optim_level=0.6) == create_recipe(model, X, optim_level=60)
    assert create_recipe(model) == create_recipe(model, optim_level=0.5)


def test_channels_that_miss_the_level_say_what_they_reach() -> None:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    evidence = create_recipe(mlp, torch.zeros(2, 512), optim_level=0.5, structured=True, quantize=False).evidence
    assert evidence is not None and evidence.expected is not None
    gone = 1 - evidence.expected.parameters / evidence.expected.parameters_before
    assert abs(gone - 0.7) > 0.02
    assert any(f"{gone:.1%} of the parameters go, where 70.0% were asked for" in note for note in evidence.notes)


def test_where_no_loss_was_measured_none_is_named(model: Net) -> None:
    text = create_recipe(model, optim_level=0.5, quantize=False).to_yaml()
    comments = "\n".join(line.partition("#")[2] for line in text.splitlines())
    assert "sum of removed magnitudes +" in comments and not re.search(r"\bloss\b|\bcost\b", comments)
    loss, performance = measured(model)
    assert "loss +" in create_recipe(model, X, sparsity=0.8, loss=loss, performance=performance).to_yaml()


def test_numbers_cite_profiles(model: Net) -> None:
    loss, performance = measured(model)
    recipe = create_recipe(model, X, sparsity=0.8, loss=loss, performance=performance, training=SGD)
    evidence, shares = recipe.evidence, given(recipe)
    assert evidence is not None
    for name, layer in evidence.layers.items():
        assert layer.sparsity == shares[name]
        levels, losses = (0.0, 0.5, 0.9), loss.losses[name.removesuffix(".weight")]
        at = max(i for i in range(3) if levels[i] <= layer.sparsity)
        low, high = losses[at] - 1.0, losses[min(at + 1, 2)] - 1.0
        assert layer.loss is not None and low - 1e-3 <= layer.loss <= high + 1e-3
        ms = performance.layer(name.removesuffix(".weight")).ms
        assert layer.ms is not None and layer.ms == pytest.approx(0.9 * layer.sparsity * ms, rel=0.02)
    text = recipe.to_yaml()
    inner = evidence.layers["inner.weight"]
    assert f"- inner.weight  # loss {inner.loss:+.3g}, saves {inner.ms:.3g} ms, 4,608 weights" in text
    assert "# loss: measured on 64 samples, one layer at a time; 1 as it is" in text
    assert "# time: measured in onnxruntime 1.31, batch 2, 1 threads" in text
    assert "learning_rate: 0.0505  # (0.1 + 0.001) / 2" in text
    assert "update_frequency: 0.15  # 40 updates within the 6 epochs" in text
    assert evidence.expected.ms_before == evidence.expected.ms == 2.4, "onnxruntime skips no zeros"
    assert evidence.expected.ms_skipping is not None and evidence.expected.ms_skipping < 2.4
    assert evidence.asked["training"] == {"epochs": 20, "initial_lr": 0.1, "final_lr": 0.001, "optimizer": "SGD"}


def test_a_profile_edited_by_hand_is_taken_as_it_is(model: Net) -> None:
    loss, performance = measured(model)
    layers = curves(analyze_model(model, X), performance, loss)
    profile = pruning_profile(layers, PruningSettings(0.8, overrides={"outer": 0.33}))
    recipe = create_recipe(model, X, pruning_profile=profile)
    assert given(recipe)["outer.weight"] == 0.33
    assert not of(recipe, "QuantizationModifier"), "nobody asked for it"


def test_level_zero_changes_nothing(model: Net) -> None:
    recipe = create_recipe(model, optim_level=0, training=SGD)
    assert [type(m).__name__ for m in recipe.written] == ["EpochRangeModifier"]
    assert recipe.max_epochs == 0
    recipe = create_recipe(model, optim_level=0.2, training=SGD)
    assert [m.kind for m in recipe.written] == ["range", "learning_rate", "parameters", "quantization"]
    assert recipe.max_epochs == 2


def test_one_shot_is_applied_without_training(model: Net) -> None:
    recipe = create_recipe(model, optim_level=0.3, experiment="one-shot", quantize=False)
    assert recipe.max_epochs == 0
    ScheduledModifierManager(recipe).apply(model)
    for name, share in given(recipe).items():
        weight = model.get_parameter(name)
        assert int((weight == 0).sum()) == round(share * weight.numel())


def test_sparse_transfer_keeps_zeros(model: Net) -> None:
    recipe = create_recipe(model, optim_level=0.5, experiment="sparse-transfer", training=SGD)
    assert [m.kind for m in recipe.written if m.kind != "learning_rate"] == [
        "range",
        "pruning",
        "parameters",
        "quantization",
    ]
    assert len(of(recipe, "ConstantPruningModifier")) == 1
    assert (recipe.max_epochs, recipe.written[2].rate() is not None) == (13, True)
    assert recipe.evidence is not None and "the medium sparse model" in recipe.evidence.goal
    assert not of(create_recipe(model, optim_level=0.1, experiment="sparse-transfer"), "ConstantPruningModifier")


def test_whole_channels_go_by_channel_groups(model: Net) -> None:
    recipe = create_recipe(model, X, preset="structured", training=SGD, quantize=False)
    modifiers = of(recipe, "StructuredPruningModifier")
    assert modifiers and all(modifier.shrink for modifier in modifiers)
    shares = given(recipe)
    if "stem.weight" in shares:
        assert shares["stem.weight"] == shares["outer.weight"], "their channels go together"
    evidence = recipe.evidence
    assert evidence is not None
    assert evidence.expected.what == "channels"
    assert evidence.expected.macs is not None and evidence.expected.macs_before is not None
    assert evidence.expected.macs < evidence.expected.macs_before
    weights = sum(model.get_parameter(name).numel() for name in ("inner.weight", "outer.weight", "down.weight"))
    left = evidence.expected.parameters - (evidence.expected.parameters_before - weights)
    assert left / weights == pytest.approx(1 - 0.65, abs=0.05), "of weights, not of channels"
    assert evidence.expected.sparsity == pytest.approx(1 - 0.35**0.5, abs=0.005)
    smaller = copy.deepcopy(model)
    ScheduledModifierManager(recipe).apply(smaller, sample_inputs=X)
    assert sum(p.numel() for p in smaller.parameters()) == evidence.expected.parameters
    assert analyze_model(smaller, X).macs == evidence.expected.macs


def test_a_latency_plan_gives_widths_and_bits(model: Net) -> None:
    latency = LatencyPlan(
        goal_ms=1.0,
        batch_size=2,
        threads=1,
        sparsity={"inner": 0.5, "down": 0.25},
        weights={"inner": "inner.weight", "down": "down.weight"},
        channels={"inner": (32, 16), "down": (32, 24)},
        bits={"stem": 32, "inner": 8, "outer": 8, "down": 8, "fc": 8},
        dense_ms=2.4,
        predicted_ms=0.9,
        measured_ms=0.95,
        loss=0.1,
        loss_method="norms",
    )
    recipe = create_recipe(model, X, latency_plan=latency, training=SGD)
    assert given(recipe) == {"inner.weight": 0.5, "down.weight": 0.25}
    assert of(recipe, "QuantizationModifier")[0].ignore == ["stem"]
    evidence = recipe.evidence
    assert evidence is not None and (evidence.expected.ms_before, evidence.expected.ms) == (2.4, 0.95)
    assert "at most 1 ms" in recipe.to_yaml()
    with pytest.raises(ArgumentError, match="'inner' is no layer of this model"):
        create_recipe(nn.Sequential(nn.Conv2d(1, 4, 3)), X, latency_plan=latency)


@pytest.mark.parametrize("schedule", ["set", "step", "multi-step", "exponential", "cosine", "linear"])
def test_a_recipe_gives_no_cause_for_warnings(model: Net, schedule: Any) -> None:
    recipe = create_recipe(model, X, optim_level=0.5, training=SGD, learning_rate=schedule)
    assert plan(recipe, model, 20).warnings == ()


def test_learning_rates_can_be_edited(model: Net) -> None:
    rates = learning_rates(SGD)
    rates[0] = SetLearningRateModifier(start_epoch=0.0, learning_rate=0.02)
    recipe = create_recipe(model, training=SGD, learning_rate=rates)
    assert [m for m in recipe.written if m.kind == "learning_rate"] == rates


def test_fields_of_others_can_be_given(model: Net) -> None:
    recipe = create_recipe(
        model, optim_level=0.5, quantize={"ignore": ["fc"], "start_epoch": 60.0}, distill={"hardness": 0.9}
    )
    assert of(recipe, "QuantizationModifier")[0].ignore == ["fc"]
    assert of(recipe, "QuantizationModifier")[0].start_epoch == 60.0
    assert of(recipe, "DistillationModifier")[0].hardness == 0.9
    assert len(of(create_recipe(model, distill=True), "DistillationModifier")) == 1


def test_what_is_frozen_stays_frozen_unless_it_is_pruned(model: Net) -> None:
    assert of(create_recipe(model), "TrainableParamsModifier")[0].params == "__ALL__"
    model.norm.bias.requires_grad_(False)
    recipe = create_recipe(model)
    assert set(of(recipe, "TrainableParamsModifier")[0].params) == set(given(recipe))


# ---------------------------------------------------------------------- training


def test_the_recipe_trains_digits_and_comes_out_as_predicted() -> None:
    torch.manual_seed(0)
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:600, None] / 16
    y = torch.tensor(data.target)[:600]
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def epoch() -> None:
        for rows in torch.randperm(len(x)).split(60):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()

    def accuracy() -> float:
        model.eval()
        with torch.no_grad():
            right = float((model(x).argmax(1) == y).float().mean())
        model.train()
        return right

    for _ in range(12):
        epoch()
    dense = accuracy()
    loss = loss_profile(model, [(x[:200], y[:200])], F.cross_entropy, progress=False)
    recipe = create_recipe(
        model, x[:2], sparsity=0.8, loss=loss, training=OriginalTraining(20, 5e-3, 5e-4, "Adam"), quantize=True
    )
    manager = ScheduledModifierManager.from_yaml(recipe.to_yaml())
    manager.modify(model, optimizer, steps_per_epoch=10, sample_inputs=x[:2])
    for _ in range(manager.max_epochs):
        epoch()
    manager.finalize(model)
    for name, share in given(recipe).items():
        weight = model.get_parameter(name)
        assert int((weight == 0).sum()) == round(share * weight.numel())
    assert dense > 0.9
    assert accuracy() > dense - 0.05


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optim_level": 1.5}, "optim_level: 1.5 is no level"),
        ({"optim_level": 0.5, "sparsity": 0.5}, "optim_level and sparsity: each says how much"),
        ({"sparsity": 80}, "sparsity: 80 is no fraction in [0, 1]. Did you mean 0.8?"),
        ({"sparsity": float("nan")}, "sparsity: nan is no fraction"),
        ({"sparsity": True}, "sparsity: True is no fraction"),
        ({"preset": "fast"}, "preset: 'fast' is none of"),
        ({"preset": "speed", "settings": PruningSettings()}, "preset and settings: the latter says all"),
        ({"experiment": "oneshot"}, "experiment: 'oneshot' is none of"),
        ({"experiment": "one-shot", "training": SGD}, "training: one-shot trains nothing"),
        ({"experiment": "one-shot", "distill": True}, "distill: one-shot trains nothing"),
        ({"experiment": "sparse-transfer", "sparsity": 0.5}, "sparsity: sparse transfer keeps the zeros"),
        ({"settings": 0.5}, "settings: a float is none"),
        ({"pruning_profile": 0.5}, "pruning_profile: a float is none"),
        ({"latency_plan": 0.5}, "latency_plan: a float is none"),
        ({"training": 90}, "training: a int is none"),
        ({"learning_rate": "step"}, "learning_rate: a schedule needs the rates of `training`"),
        ({"learning_rate": "steps", "training": SGD}, "schedule: 'steps' is none of"),
        ({"learning_rate": [1]}, "learning_rate: give the name of a schedule, or a list"),
        ({"quantize": "int8"}, "quantize: 'int8' is neither"),
        ({"distill": 1}, "distill: 1 is neither"),
        ({"structured": "yes"}, "structured: 'yes' is neither"),
        ({"structured": True}, "sample_inputs: which channels go together"),
    ],
)
def test_what_cannot_be_meant_is_refused(model: Net, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(message)):
        create_recipe(model, **fields)


def test_other_models_and_profiles_are_refused(model: Net) -> None:
    with pytest.raises(DataError, match=r"model\.onnx: no such file"):
        create_recipe("model.onnx")
    with pytest.raises(ArgumentError, match="model is a int: give a torch"):
        create_recipe(3)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="loss: a profile of quantization"):
        create_recipe(model, loss=loss_profile(model, of="quantization", progress=False))
    with pytest.raises(TargetError):
        create_recipe(nn.Sequential(nn.ReLU()))
    loss, performance = measured(model)
    other = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3))
    with pytest.raises(ArgumentError, match="loss: it is of another model: 'stem' is no layer of this one"):
        create_recipe(other, X, loss=loss)
    with pytest.raises(ArgumentError, match="performance: it is of another model: 'stem'"):
        create_recipe(other, X, performance=performance)


def test_channels_follow_the_losses_of_their_layers(model: Net) -> None:
    loss, _ = measured(model)
    of_weights = given(create_recipe(model, X, sparsity=0.6, structured=True, loss=loss))
    assert of_weights["inner.weight"] > max(of_weights.get("stem.weight", 0), of_weights.get("down.weight", 0))
    levels = (0.0, 0.25, 0.5, 0.75)
    channel_groups = {"stem": ("stem", "outer"), "inner": ("inner",), "down": ("down",)}
    losses = {"stem": (1.0, 5.0, 9.0, 20.0), "inner": (1.0, 4.0, 8.0, 9.0), "down": (1.0, 1.1, 1.2, 1.3)}
    of_channels = LossProfile("data", "pruning", levels, losses, 1.0, 64, channel_groups)
    recipe = create_recipe(model, X, sparsity=0.5, structured=True, loss=of_channels)
    shares = given(recipe)
    assert shares["down.weight"] > shares.get("inner.weight", 0)
    assert recipe.evidence is not None and recipe.evidence.layers["down.weight"].loss == pytest.approx(0.25, abs=0.06)
    with pytest.raises(ArgumentError, match="this is a profile of channels"):
        create_recipe(model, X, sparsity=0.5, loss=of_channels)


def test_layers_that_inputs_do_not_reach_are_left_alone(model: Net) -> None:
    model.spare = nn.Linear(32, 10)
    recipe = create_recipe(model, X, sparsity=0.5)
    assert "spare.weight" not in given(recipe)


def test_an_empty_profile_or_a_stranger_changes_nothing(model: Net) -> None:
    layers = curves(analyze_model(model, X), None, loss_profile(model, progress=False))
    profile = pruning_profile(layers, PruningSettings(0.0))
    assert not of(create_recipe(model, X, pruning_profile=profile), "GMPruningModifier")
    other = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3))
    profile = pruning_profile(layers, PruningSettings(0.5))
    with pytest.raises(ArgumentError, match=r"pruning_profile: '.*' is no layer of this model"):
        create_recipe(other, X, pruning_profile=profile)


class Idle(nn.Sequential):
    """With a layer that is never computed: its weight stays in float."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 4)
        )
        self.idle = nn.Linear(50, 50)

    def forward(self, x: Tensor) -> Tensor:
        for layer in list(self)[:-1]:
            x = layer(x)
        return x


@pytest.mark.parametrize("structured", [False, True])
def test_the_plan_of_a_recipe_expects_what_the_recipe_does(structured: bool) -> None:
    torch.manual_seed(0)
    model = Idle()
    sample = torch.zeros(2, 3, 8, 8)
    recipe = create_recipe(model, sample, sparsity=0.6, structured=structured, quantize=True)
    assert recipe.evidence is not None
    promised, last = recipe.evidence.expected, plan(recipe, model, 10, sample_inputs=sample).moments[-1]
    assert (last.parameters, last.macs) == (promised.parameters, promised.macs)
    # Bytes of int8 weights, floats of biases and of the layer that is never computed.
    assert last.size_bytes == promised.size_bytes is not None and 4 * 2550 < promised.size_bytes < 4 * 2550 + 5000
