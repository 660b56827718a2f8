"""Quantization from a recipe: when things happen, what stays the same, and resuming at every step, to the bit."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify import QuantizationModifier, ScheduledModifierManager
from sparsify.errors import DataError, RecipeError, StateError, TargetError
from sparsify.quantization.conversion import quantizers
from sparsify.quantization.deployment import deployment_copy
from sparsify.quantization.plan import is_quantized
from tests.loops import image_batches, quantizing, train, train_step
from tests.zoo.quantizable import ResidualNet, images, mlp

STEPS = 4
"""Optimizer steps in an epoch."""


def start(manager: ScheduledModifierManager, **more: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = ResidualNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    given = manager.modify(model, optimizer, steps_per_epoch=STEPS, **more)
    assert given is optimizer
    return model, optimizer


def test_a_model_is_quantized_from_its_start_epoch_on() -> None:
    manager = quantizing(start_epoch=1.0)
    data = image_batches(6)
    model, optimizer = start(manager)
    for index, x in enumerate(data):
        assert is_quantized(model) == (index > STEPS), index
        train_step(model, optimizer, x, 1.0)
    manager.finalize(model)
    assert is_quantized(model)
    deployed = deployment_copy(model)
    assert torch.equal(deployed(data[0]), model.eval()(data[0]))


def test_with_sample_inputs_it_is_in_force_at_once() -> None:
    manager = quantizing(start_epoch=0.0)
    model, _ = start(manager, sample_inputs=images())
    assert is_quantized(model)


def test_before_the_start_the_losses_are_those_without_a_recipe() -> None:
    data = image_batches(STEPS)
    model, optimizer = start(quantizing(start_epoch=5.0))
    with_recipe = [train_step(model, optimizer, x, 1.0) for x in data]
    torch.manual_seed(0)
    model = ResidualNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    assert [train_step(model, optimizer, x, 1.0) for x in data] == with_recipe


def test_ranges_stand_still_after_their_epoch() -> None:
    manager = quantizing(start_epoch=0.0, disable_quantization_observer_epoch=1.0)
    model, optimizer = start(manager, sample_inputs=images())
    ranges: list[Tensor] = []
    for x in image_batches(3 * STEPS):
        train_step(model, optimizer, x, 1.0)
        ranges.append(torch.stack([torch.stack([q.low, q.high]) for q in quantizers(model)]).clone())
    assert not torch.equal(ranges[STEPS - 2], ranges[STEPS - 1])
    assert all(torch.equal(ranges[STEPS - 1], later) for later in ranges[STEPS:])


def test_a_freeze_at_the_start_waits_for_the_first_batch() -> None:
    manager = quantizing(start_epoch=0.0, disable_quantization_observer_epoch=0.0)
    model, optimizer = start(manager, sample_inputs=images())
    counts = []
    for x in image_batches(3):
        train_step(model, optimizer, x, 1.0)
        counts.append({int(q.batches) for q in quantizers(model)})
    assert counts == [{1}, {1}, {1}]


def test_statistics_of_batches_stand_still_after_their_epoch_and_are_used() -> None:
    manager = quantizing(start_epoch=0.0, freeze_bn_stats_epoch=1.0)
    model, optimizer = start(manager, sample_inputs=images())
    means = []
    for x in image_batches(2 * STEPS):
        train_step(model, optimizer, x, 1.0)
        means.append(model.bn.running_mean.clone())
    assert not torch.equal(means[STEPS - 2], means[STEPS - 1])
    assert torch.equal(means[STEPS - 1], means[-1])
    x = torch.randn(4, 4, 5, 5)
    model.bn.train()
    norm = nn.BatchNorm2d(4).eval()
    norm.load_state_dict({k: v for k, v in model.bn.state_dict().items() if "quantizer" not in k})
    assert torch.allclose(model.bn(x), norm(x), atol=1e-6)
    assert model.bn.num_batches_tracked.item() == STEPS


@pytest.mark.parametrize("stop", range(1, 3 * STEPS))
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(stop: int) -> None:
    fields = dict(start_epoch=0.5, disable_quantization_observer_epoch=1.5, freeze_bn_stats_epoch=2.0)
    data = image_batches(3 * STEPS)
    manager = quantizing(**fields)
    model, optimizer = start(manager)
    losses = []
    for index, x in enumerate(data):
        if index == stop:
            saved = copy.deepcopy((manager.state_dict(), model.state_dict(), optimizer.state_dict()))
        losses.append(train_step(model, optimizer, x, 1.0))
    again = quantizing(**fields)
    fresh, other = start(again)
    again.load_state_dict(saved[0])
    fresh.load_state_dict(saved[1])
    other.load_state_dict(saved[2])
    assert [train_step(fresh, other, x, 1.0) for x in data[stop:]] == losses[stop:]
    for name, value in model.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name


def test_the_managers_state_is_plain_and_rebuilds_the_structure() -> None:
    manager = quantizing(start_epoch=0.0)
    model, optimizer = start(manager)
    for x in image_batches(2):
        train_step(model, optimizer, x, 1.0)
    fresh = ResidualNet()
    quantizing(start_epoch=0.0).apply_structure(fresh, state=manager.state_dict())
    fresh.load_state_dict(model.state_dict())
    x = images()
    assert torch.equal(fresh.eval()(x), model.eval()(x))
    traced = ResidualNet()
    quantizing(start_epoch=0.0).apply_structure(traced, sample_inputs=x)
    assert traced.state_dict().keys() == model.state_dict().keys()
    with pytest.raises(StateError):
        quantizing(start_epoch=0.0).apply_structure(ResidualNet())


def test_loading_a_state_from_before_the_start_gives_float_layers_back() -> None:
    manager = quantizing(start_epoch=1.0)
    model, optimizer = start(manager)
    train_step(model, optimizer, images(), 1.0)
    early = copy.deepcopy((manager.state_dict(), model.state_dict()))
    for x in image_batches(STEPS + 1):
        train_step(model, optimizer, x, 1.0)
    assert is_quantized(model)
    manager.load_state_dict(early[0])
    assert not is_quantized(model)
    model.load_state_dict(early[1])


def test_calibration_data_set_the_ranges_before_the_first_step() -> None:
    data = image_batches(6)
    seen = quantizing(start_epoch=0.0, num_calibration_steps=3)
    torch.manual_seed(0)
    model = ResidualNet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loader = [(x, torch.zeros(8)) for x in data]
    seen.modify(model, optimizer, steps_per_epoch=4, sample_inputs=data[0], calibration_data=loader)
    assert {int(q.batches) for q in quantizers(model)} == {3}
    assert model.training
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    deployment_copy(model)


def test_calibration_without_a_batch_is_refused_and_the_model_is_as_before() -> None:
    model = ResidualNet()
    with pytest.raises(DataError, match="no batch"):
        quantizing(start_epoch=0.0).modify(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            steps_per_epoch=2,
            sample_inputs=images(),
            calibration_data=[],
        )
    assert not is_quantized(model)


def test_apply_quantizes_without_training() -> None:
    model = mlp().eval()
    x = torch.randn(16, 6)
    expected = model(x)
    quantizing().apply(model, sample_inputs=x, calibration_data=[x])
    got = deployment_copy(model)(x)
    assert not torch.equal(got, expected)
    assert (got - expected).abs().max() < 0.05


def test_zeros_of_pruned_weights_stay_through_quantized_training() -> None:
    manager = ScheduledModifierManager.from_yaml("""
modifiers:
  - !ConstantPruningModifier
    params: __ALL_PRUNABLE__
  - !QuantizationModifier
    start_epoch: 0.5
""")
    torch.manual_seed(0)
    model = ResidualNet()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight[torch.rand_like(module.weight) < 0.7] = 0.0
    zeros = {n: p == 0 for n, p in model.named_parameters() if n.endswith("weight") and p.dim() == 4}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    manager.modify(model, optimizer, steps_per_epoch=STEPS)
    for x in image_batches(2 * STEPS):
        train_step(model, optimizer, x, 1.0)
    manager.finalize(model)
    deployed = deployment_copy(model)
    for name, mask in zeros.items():
        assert (dict(model.named_parameters())[name][mask] == 0).all()
        assert (dict(deployed.named_buffers())[f"{name}_int8"][mask] == 0).all()


def test_the_phase_and_the_second_modify() -> None:
    manager = quantizing(start_epoch=0.0)
    model, _ = start(manager, sample_inputs=images())
    manager.finalize(model)
    with pytest.raises(StateError, match="quantized layers already"):
        start_on = quantizing(start_epoch=0.0)
        start_on.modify(model, torch.optim.SGD(model.parameters(), lr=0.1), steps_per_epoch=2)


def test_names_are_checked_at_modify_before_anything_changes() -> None:
    with pytest.raises(TargetError, match=r"QuantizationModifier\.ignore: 'nope'"):
        start(quantizing(start_epoch=3.0, ignore=["nope"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start(quantizing(start_epoch=3.0, ignore=["nope"], strict=False))


def test_a_model_in_which_nothing_can_be_quantized_is_refused() -> None:
    model = nn.Sequential(nn.LayerNorm(3))
    with pytest.raises(TargetError, match="nothing in Sequential can be quantized"):
        quantizing().modify(
            model, torch.optim.SGD(model.parameters(), lr=0.1), steps_per_epoch=1, sample_inputs=torch.randn(2, 3)
        )
    assert not is_quantized(model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scheme": {"weights": {"num_bits": 9}}}, "less than or equal to 8"),
        ({"scheme": {"weights": {"bits": 4}}}, "bits"),
        ({"scheme": "fast"}, "scheme"),
        ({"tensorrt": True, "scheme": "deepsparse"}, "contradicts"),
        ({"freeze_bn_stats_epoch": -3.0}, "not an epoch"),
        ({"num_calibration_steps": 0}, "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        QuantizationModifier(**fields)


def test_legacy_fields_mean_what_they_meant() -> None:
    def settings(**fields: Any) -> Any:
        return QuantizationModifier(**fields).settings()

    assert settings(tensorrt=True).scheme.input_activations.symmetric
    assert settings(weight_bits=4, activation_bits=5).scheme.weights.num_bits == 4
    assert settings(weight_bits=4, activation_bits=5).scheme.input_activations.num_bits == 5
    assert settings(submodules=["blocks", "head"]).within == ("blocks", "head")
    assert settings(quantize_embeddings=False, exclude_module_types=["LayerNorm"]).ignore_types == (
        "Embedding",
        "LayerNorm",
    )
    assert settings(reduce_range=True).reduce_range
    assert settings(quantize_linear_activations=False).overrides["Linear"].input_activations is None
    modifier = QuantizationModifier(
        model_fuse_fn_name="conv_bn_relus", exclude_batchnorm=True, weight_qconfig_kwargs={"dtype": "qint8"}
    )
    assert [note.split()[0] for note in modifier.notes()] == [
        "model_fuse_fn_name",
        "exclude_batchnorm",
        "weight_qconfig_kwargs:",
    ]


def test_it_learns() -> None:
    torch.manual_seed(0)
    model = mlp()
    x = torch.randn(64, 6)
    manager = quantizing(start_epoch=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    manager.modify(model, optimizer, steps_per_epoch=10)
    target = torch.stack([x[:, 0] * x[:, 1], x.sum(1), x[:, 2].abs()], 1)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_nan_in_training_is_an_error_that_names_the_tensor() -> None:
    manager = quantizing(start_epoch=0.0)
    model, optimizer = start(manager, sample_inputs=images())
    with pytest.raises(DataError, match=r"stem\.input_quantizer"):
        train_step(model, optimizer, torch.full((2, 3, 12, 12), float("nan")), 1.0)


def test_an_optimizer_made_before_goes_on_with_the_same_parameters() -> None:
    manager = quantizing(start_epoch=0.0)
    model, optimizer = start(manager)
    ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
    train_step(model, optimizer, images(), 1.0)
    assert ids == [id(p) for p in model.parameters()]
    train(model, images(), 1)
