"""Channels are removed from weights, gradients, optimizers and layers' own numbers; all or nothing."""

from __future__ import annotations

import copy
import io
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify.errors import ArgumentError, StateError
from sparsify.pruning import removal as removals
from sparsify.pruning.dry_run import find_groups
from sparsify.pruning.group_masks import deletion_masks
from sparsify.pruning.groups import ChannelGroup, ChannelGroups, GroupMember, find_unchecked_groups
from sparsify.pruning.masker import Masker
from sparsify.pruning.removal import Removal, plan_removal, remove, tensors
from sparsify.training.checkpoint import checksum
from tests.loops import holds_state, train_step
from tests.optimizer_forms import FORMS, Form
from tests.zoo.prunable import Encoder, Residual, every_second, made_in_double
from tests.zoo.small import written


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = model(x)
    return out.square().mean()


def kept(model: nn.Module, removal: Removal) -> dict[str, Tensor]:
    """What stays of a model's tensors, taken by hand."""
    found = {}
    for name, tensor in tensors(model).items():
        value = tensor.detach()
        for dim, index in removal.keep.get(name, {}).items():
            value = value.movedim(dim, 0)[index].movedim(0, dim)
        found[name] = value
    return found


# Adafactor divides by the number of weights, LBFGS keeps no history across a removal, Muon looks at whole matrices.
LOCAL = {name: form for name, form in FORMS.items() if name not in ("adafactor", "lbfgs", "muon", "sgd stepped twice")}

# The loss does not hang on a bias in front of a BatchNorm, nor on that of keys under softmax: their gradients are
# rounding, and a sum of another order is another rounding.
UNMOVED = {f"{layer}.{what}" for layer in ("conv1", "conv3", "attention.key") for what in ("bias",)} | {
    f"bn{i}.running_mean" for i in (1, 3)
}


@pytest.mark.parametrize("kind", [Residual, Encoder])
@pytest.mark.parametrize("form", LOCAL.values(), ids=LOCAL.keys())
def test_training_goes_on_as_the_masked_model_would(form: Form, kind: type[nn.Module]) -> None:
    masked, x = made_in_double(kind)
    optimizer = form(masked)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    for _ in range(3):
        train_step(masked, optimizer, x)
        scheduler.step()
    channel_groups = find_unchecked_groups(masked, (x,))
    pruned = every_second(channel_groups)
    assert pruned
    masker = Masker(masked, optimizer)
    for name, mask in deletion_masks(masked, channel_groups, pruned).items():
        masker.set(name, mask)
    shrunk, its_optimizer, its_scheduler = copy.deepcopy((masked, optimizer, scheduler))
    plan = plan_removal(shrunk, channel_groups, pruned)
    remove(shrunk, plan, its_optimizer)
    for _ in range(3):
        train_step(masked, optimizer, x)
        masker.apply()
        scheduler.step()
        train_step(shrunk, its_optimizer, x)
        its_scheduler.step()
    assert its_optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert torch.allclose(shrunk(x), masked(x), rtol=1e-9, atol=1e-11)
    for name, value in kept(masked, plan).items():
        if name in UNMOVED:
            continue
        assert torch.allclose(tensors(shrunk)[name], value, rtol=1e-9, atol=1e-11), name


def test_lbfgs_begins_its_history_anew_and_goes_on() -> None:
    model, x = made_in_double()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        return loss

    optimizer.step(closure)
    channel_groups = find_unchecked_groups(model, (x,))
    remove(model, plan_removal(model, channel_groups, every_second(channel_groups)), optimizer)
    before = closure().item()
    optimizer.step(closure)
    assert closure().item() < before


def test_parameters_stay_the_objects_that_they_are() -> None:
    model, x = made_in_double()
    parameters = dict(model.named_parameters())
    ids = {name: id(p) for name, p in parameters.items()}
    refs = {name: weakref.ref(p) for name, p in parameters.items()}
    seen: list[torch.Size] = []
    parameters["conv1.weight"].register_hook(lambda grad: seen.append(grad.shape))
    held = loss_of(model, x)  # a user's own variable, alive across the removal
    held.backward(retain_graph=True)
    channel_groups = find_unchecked_groups(model, (x,))
    remove(model, plan_removal(model, channel_groups, every_second(channel_groups)))
    assert {name: id(p) for name, p in model.named_parameters()} == ids
    assert all(refs[name]() is p for name, p in model.named_parameters())
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    loss_of(model, x).backward()
    assert seen[-1] == parameters["conv1.weight"].shape == (6, 2, 3, 3)
    assert held.isfinite()


def test_compiled_code_sees_the_smaller_model() -> None:
    model, x = made_in_double()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(x).sum().backward()
    channel_groups = find_unchecked_groups(model, (x,))
    remove(model, plan_removal(model, channel_groups, every_second(channel_groups)))
    assert torch.allclose(compiled(x), model(x))
    compiled(x).sum().backward()


def test_gradients_are_cut_and_memory_is_given_back() -> None:
    model, x = made_in_double()
    loss_of(model, x).backward()
    channel_groups = find_unchecked_groups(model, (x,))
    plan = plan_removal(model, channel_groups, every_second(channel_groups))
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    remove(model, plan)
    index = plan.keep["conv1.weight"][0]
    assert torch.equal(dict(model.named_parameters())["conv1.weight"].grad, grads["conv1.weight"][index])
    for tensor in [*model.parameters(), *model.buffers()]:
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


LAYERS: list[tuple[nn.Module, tuple[int, ...], dict[str, Any]]] = [
    (nn.Conv1d(4, 8, 3), (2, 4, 9), {"out_channels": 4}),
    (nn.Conv3d(4, 8, 1), (2, 4, 3, 3, 3), {"out_channels": 4}),
    (nn.ConvTranspose2d(4, 8, 2), (2, 4, 5, 5), {"out_channels": 4}),
    (nn.Conv2d(4, 8, 1, groups=4), (2, 4, 5, 5), {}),
]


@pytest.mark.parametrize(("layer", "shape", "expected"), LAYERS, ids=lambda v: type(v).__name__)
def test_layers_numbers_follow_their_weights(
    layer: nn.Module, shape: tuple[int, ...], expected: dict[str, Any]
) -> None:
    one = {4: nn.Conv2d, 3: nn.Conv1d, 5: nn.Conv3d}[len(shape)]
    model = nn.Sequential(one(4, 4, 1), layer, nn.ReLU(), one(8, 3, 1)).double()
    x = torch.randn(shape, dtype=torch.float64)
    channel_groups = find_unchecked_groups(model, (x,))
    pruned = every_second(channel_groups)
    for name, mask in deletion_masks(model, channel_groups, pruned).items():
        with torch.no_grad():
            dict(model.named_parameters())[name].mul_(mask)
    before = model(x)
    remove(model, plan_removal(model, channel_groups, pruned))
    assert torch.allclose(model(x), before, rtol=1e-10, atol=1e-12)
    assert {key: getattr(layer, key) for key in expected} == expected
    assert str(layer.weight.shape[0]) in repr(layer)


def test_groups_of_a_depthwise_convolution_become_fewer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 2, 1))
    channel_groups = find_unchecked_groups(model, (torch.randn(1, 3, 6, 6),))
    remove(model, plan_removal(model, channel_groups, every_second(channel_groups)))
    depthwise = model[1]
    assert (depthwise.groups, depthwise.in_channels, depthwise.out_channels) == (4, 4, 4)


def test_channels_last_stays() -> None:
    model, x = made_in_double()
    model.to(memory_format=torch.channels_last)
    channel_groups = find_unchecked_groups(model, (x,))
    remove(model, plan_removal(model, channel_groups, every_second(channel_groups)))
    weight = dict(model.named_parameters())["conv2.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()


def test_tied_weights_stay_tied() -> None:
    layers = {"enter": nn.Linear(3, 6), "first": nn.Linear(6, 6), "second": nn.Linear(6, 6), "last": nn.Linear(6, 2)}
    layers["second"].weight = layers["first"].weight
    model = written(lambda self, x: self.last(self.second(self.first(self.enter(x)).relu()).relu()), **layers).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    channel_groups = find_unchecked_groups(model, (x,))
    pruned = every_second(channel_groups)
    remove(model, plan_removal(model, channel_groups, pruned))
    assert model.first.weight is model.second.weight
    assert model.first.in_features == model.second.out_features == model.first.weight.shape[0] < 6
    model(x).sum().backward()


def test_a_removal_is_saved_and_applied_to_a_fresh_model() -> None:
    model, x = made_in_double(Encoder)
    channel_groups = find_unchecked_groups(model, (x,))
    plan = plan_removal(model, channel_groups, every_second(channel_groups))
    file = io.BytesIO()
    torch.save(plan.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert checksum(state) == checksum(plan.state_dict())
    fresh, _ = made_in_double(Encoder)
    fresh.load_state_dict(model.state_dict())
    remove(model, plan)
    remove(fresh, Removal.from_state(state))
    assert torch.equal(fresh(x), model(x))
    assert fresh.attention.heads == 2


def test_a_config_is_changed_in_a_copy() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=20
    )
    model = transformers.BertModel(config)
    inputs = (torch.randint(0, 20, (2, 5)),)
    channel_groups = find_unchecked_groups(model, inputs)
    columns = {name: range(8) for name, group in channel_groups.groups.items() if group.kind == "linear"}
    plan = plan_removal(model, channel_groups, columns)
    remove(model, plan)
    assert config.intermediate_size == 24
    assert model.config.intermediate_size == model.encoder.layer[1].intermediate.dense.out_features == 16
    # What was removed stands in the config: a model made from it takes the weights.
    transformers.BertModel(model.config).load_state_dict(model.state_dict())
    # And a model made as this one was takes the removal.
    remove(transformers.BertModel(config), plan)


def test_what_fails_half_way_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = made_in_double(Encoder)
    optimizer = torch.optim.AdamW(model.parameters())
    train_step(model, optimizer, x)
    before, remembered = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    channel_groups = find_unchecked_groups(model, (x,))
    plan = plan_removal(model, channel_groups, every_second(channel_groups))
    put, calls = removals._set_data, []

    def fails(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        put(*args)

    monkeypatch.setattr(removals, "_set_data", fails)
    with pytest.raises(KeyboardInterrupt):
        remove(model, plan, optimizer)
    monkeypatch.undo()
    assert holds_state(model, before)
    assert model.attention.heads == 4
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(after[i]["exp_avg"], s["exp_avg"]) for i, s in remembered["state"].items())
    train_step(model, optimizer, x)


@pytest.mark.parametrize(
    ("pruned", "error", "message"),
    [
        ({"nothing": [0]}, ArgumentError, "'nothing' is no channel group"),
        ({"conv2.weight": [10]}, ArgumentError, "channels 0 to 9, not 10"),
        ({"conv2.weight": range(10)}, ArgumentError, "all 10 channels of 'conv2.weight'"),
    ],
)
def test_what_cannot_be_removed_is_refused(pruned: dict[str, Any], error: type[Exception], message: str) -> None:
    model, x = made_in_double()
    with pytest.raises(error, match=message):
        plan_removal(model, find_unchecked_groups(model, (x,)), pruned)


def test_another_model_is_refused_before_anything_changes() -> None:
    model, x = made_in_double()
    channel_groups = find_unchecked_groups(model, (x,))
    plan = plan_removal(model, channel_groups, every_second(channel_groups))
    other = Residual(width=14).double()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(StateError, match=r"'conv1.weight' has shape \(14, 2, 3, 3\).*\(12, 2, 3, 3\)"):
        remove(other, plan)
    assert holds_state(other, before)
    with pytest.raises(StateError, match=r"has no 'conv1\.weight'"):
        remove(nn.Linear(2, 2), plan)


def test_channel_groups_of_a_model_that_changed_since_are_refused() -> None:
    model, x = made_in_double()
    channel_groups = find_unchecked_groups(model, (x,))
    remove(model, plan_removal(model, channel_groups, every_second(channel_groups)))
    with pytest.raises(StateError, match="the model was changed since"):
        plan_removal(model, channel_groups, every_second(channel_groups))


def test_a_number_in_code_that_means_two_sizes_is_left_alone() -> None:
    layers = {"a": nn.Linear(2, 4), "b": nn.Linear(2, 4), "c": nn.Linear(4, 2), "d": nn.Linear(4, 2)}
    model = written(lambda self, x: self.c(self.a(x).relu() * 2) + self.d(self.b(x).relu() * 2), width=4, **layers)

    channel_groups = find_unchecked_groups(model, (torch.randn(3, 2),))
    assert plan_removal(model, channel_groups, {"a.weight": [0], "b.weight": [1]}).attributes[""] == {"width": 3}
    assert "" not in plan_removal(model, channel_groups, {"a.weight": [0]}).attributes
    assert "" not in plan_removal(model, channel_groups, {"a.weight": [0], "b.weight": [0, 1]}).attributes


def test_places_of_two_channel_groups_in_one_tensor_are_both_cut() -> None:
    weight = GroupMember("weight", 0, "row", (0, 1, -1, -1)), GroupMember("weight", 0, "row", (-1, -1, 0, 1))
    channel_groups = ChannelGroups({n: ChannelGroup(n, "linear", 2, (p,)) for n, p in zip("ab", weight, strict=True)})
    plan = plan_removal(nn.Linear(3, 4, bias=False), channel_groups, {"a": [0], "b": [1]})
    assert plan.keep["weight"][0].tolist() == [1, 2]


class Power(nn.Module):
    """A GELU by its tanh formula: exponent and factor are numbers of the model. A gate begins at 0."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)
        self.gate = nn.Parameter(torch.zeros(1))
        for name, value in (("exponent", 3.0), ("factor", 0.044715)):
            number = torch.tensor(value)
            if where == "buffer":
                self.register_buffer(name, number)
            else:
                setattr(self, name, nn.Parameter(number.reshape(1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = 0.5 * x * (1 + torch.tanh(0.8 * (x + self.factor * torch.pow(x, self.exponent))))
        result: Tensor = self.second(x + self.gate * x)
        return result


@pytest.mark.parametrize("where", ["buffer", "parameter"])
def test_numbers_of_a_model_keep_their_values_where_removal_is_tried(where: str) -> None:
    model, x = Power(where), torch.randn(4, 6)
    found = find_groups(model, (x,))
    assert found.groups["first.weight"].size == 8 and "first.weight" not in found.whole
    smaller = copy.deepcopy(model)
    remove(smaller, plan_removal(smaller, found, {"first.weight": [0, 5]}))
    assert smaller.first.out_features == 6 and smaller(x).isfinite().all()
    assert not model.gate.any() and bool(torch.as_tensor(model.exponent).eq(3.0).all())
