"""What compressing a layer costs: the figures of each method, and a model that is the same afterwards."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sparsify.analysis import trials
from sparsify.analysis.analyze import analyze_model
from sparsify.analysis.loss import BITS, DATA_LEVELS, LEVELS, LossProfile, loss_profile
from sparsify.errors import ArgumentError, DataError, DataFileError, StateError, TargetError
from sparsify.oneshot import quantize_model
from tests.zoo.small import written


class Net(nn.Module):
    """Convolutions with BatchNorm and dropout, and a buffer that counts forwards, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)
        self.conv2, self.drop = nn.Conv2d(6, 8, 3), nn.Dropout(0.5)
        self.fc = nn.Linear(8, 4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = F.relu(self.conv2(F.relu(self.norm(self.conv1(x)))))
        return self.fc(self.drop(x.mean((2, 3))))


def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    model.conv2.eval()
    return model


def batches(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 1, 8, 8, generator=generator), torch.randint(0, 4, (8,), generator=generator))
        for _ in range(count)
    ]


def everything(model: nn.Module) -> dict[str, Any]:
    """All that a profile might disturb."""
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "required": [p.requires_grad for p in model.parameters()],
        "objects": [id(p) for p in [*model.parameters(), *model.buffers()]],
        "versions": [p._version for p in model.parameters()],
        "grads": [p.grad for p in model.parameters()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "rng": torch.get_rng_state(),
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


# ---------------------------------------------------------------------------------------------- without data


def linear(values: Tensor) -> nn.Module:
    model = nn.Sequential(nn.Linear(len(values), 1))
    with torch.no_grad():
        model[0].weight.copy_(values[None])
    return model


@pytest.mark.parametrize(
    ("values", "levels", "expected"),
    [
        (torch.arange(1.0, 101.0), (0, 0.5, 0.9), (0.0, 25.5, 70.5)),
        (-torch.arange(1.0, 101.0).flip(0), (0, 0.5, 0.9), (0.0, 25.5, 70.5)),
        (torch.arange(1.0, 17.0), (0.25, 0.5, 0.75), (0.0, 2.5, 6.5, 10.5)),
        (torch.tensor([3.0]), (0.2, 0.4, 0.6, 0.8), (0.0, 0.0, 0.0, 3.0, 3.0)),
        (torch.zeros(8), (0.5,), (0.0, 0.0)),
        (torch.full((8,), -2.0), (0.5, 0.75), (0.0, 2.0, 2.0)),
    ],
)
def test_marginal_magnitudes(values: Tensor, levels: tuple[float, ...], expected: tuple[float, ...]) -> None:
    assert loss_profile(linear(values), levels=levels).losses == {"0": expected}


def test_marginal_magnitudes_in_steps_of_one_percent() -> None:
    profile = loss_profile(linear(torch.arange(1.0, 101.0)[torch.randperm(100)]))
    assert profile.levels == LEVELS and profile.method == "magnitude" and profile.samples == 0
    assert profile.losses["0"][50] == 50 and profile.losses["0"][0] == 0 and profile.losses["0"][99] == 99


@pytest.mark.parametrize("batch", [1, 5])
def test_the_formula_of_shapes_is_that_of_one_sample(batch: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    x = torch.randn(batch, 3, 32, 32)
    before = everything(model)
    profile = loss_profile(model, method="shape", sample_inputs=x, levels=(0, 0.5))
    assert profile.losses["0"] == pytest.approx((0.0, 107.477679 / 2))
    assert same(before, everything(model))


def test_rounding_without_data_is_its_share_of_the_squares() -> None:
    model = nn.Sequential(nn.Linear(4, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -0.3, 0.7, 0.1]]))
    # Two bits: 0.85 and nothing else. Three: thirds.
    expected = [(2 * 0.15**2 + 0.3**2 + 0.1**2) / 1.59, (2 * (1 / 30) ** 2 + 0.1**2) / 1.59]
    profile = loss_profile(model, of="quantization", levels=(2, 3))
    assert profile.levels == (3, 2)
    assert profile.losses["0"] == pytest.approx(expected[::-1], rel=1e-5)


# ---------------------------------------------------------------------------------------------- with data


def reference(
    model: Net, data: list[tuple[Tensor, Tensor]], loss: Callable[[Tensor, Tensor], Tensor], change: Callable[[], None]
) -> float:
    """The loss after `change`, computed the plain way; the model is put back."""
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        change()
        value = sum(float(loss(model(x), y)) * len(x) for x, y in data) / sum(len(x) for x, _ in data)
    model.load_state_dict(kept)
    for module, mode in modes:
        module.training = mode
    return value


def zero_lowest(weight: Tensor, sparsity: float) -> None:
    flat = weight.view(-1)
    order = np.argsort(flat.abs().numpy(), kind="stable")[: round(len(flat) * sparsity)]
    flat[torch.tensor(order)] = 0.0


def round_rows(weight: Tensor, bits: int) -> None:
    """Each row to the grid of least squared error, whose largest value is 16/40 to 40/40 of the row's."""
    largest = 2 ** (bits - 1) - 1
    for row in weight:
        found = []
        for share in range(40, 15, -1):
            scale = row.abs().max() * share / 40 / largest
            rounded = (row / scale).round().clamp(-largest, largest) * scale
            found.append((float((rounded - row).square().sum()), rounded))
        row.copy_(min(found, key=lambda one: one[0])[1])


def test_losses_are_those_of_the_model_with_one_layer_pruned() -> None:
    model, data = net(), [*batches(2), (torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 2]))]
    profile = loss_profile(model, data, F.cross_entropy)
    assert profile.levels == DATA_LEVELS and profile.method == "data" and profile.samples == 19
    assert list(profile.losses) == ["conv1", "conv2", "fc"]
    base = reference(model, data, F.cross_entropy, lambda: None)
    assert profile.base == pytest.approx(base, rel=1e-6)
    for name, losses in profile.losses.items():
        weight = model.get_submodule(name).weight.data
        for level, found in zip(profile.levels, losses, strict=True):
            expected = reference(model, data, F.cross_entropy, lambda w=weight, s=level: zero_lowest(w, s))
            assert found == pytest.approx(expected, rel=1e-5), (name, level)
        assert losses[0] == profile.base
        assert len(set(losses)) > 4


def test_losses_are_those_of_the_model_with_one_layer_rounded() -> None:
    model, data = net(), batches()
    profile = loss_profile(model, data, F.cross_entropy, of="quantization")
    assert profile.levels == BITS
    for name, losses in profile.losses.items():
        weight = model.get_submodule(name).weight.data
        for bits, found in zip(BITS, losses, strict=True):
            expected = reference(model, data, F.cross_entropy, lambda w=weight, b=bits: round_rows(w, b))
            assert found == pytest.approx(expected, rel=1e-4), (name, bits)


@pytest.mark.parametrize("method", ["data", "fisher"])
@pytest.mark.parametrize("of", ["pruning", "quantization"])
@pytest.mark.parametrize("loss", [None, F.cross_entropy])
def test_a_profile_leaves_the_model_as_it_was(method: Any, of: Any, loss: Any) -> None:
    model = net()
    model.conv1.weight.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    before = everything(model)
    loss_profile(model, batches(), loss, of=of, method=method)
    assert same(before, everything(model))


def test_structure_profiles_leave_the_model_as_it_was() -> None:
    model = net()
    before = everything(model)
    loss_profile(model, batches(), F.cross_entropy, structured=True)
    after = everything(model)
    assert same(before, after)


def test_a_shuffling_loader_is_gone_through_once_and_draws_nothing() -> None:
    x, y = batches(1)[0]
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    model = net()
    before = everything(model)
    first, second = (loss_profile(model, loader, F.cross_entropy) for _ in range(2))
    assert first == second
    assert same(before, everything(model))


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("at", [1, 2, 5, 12])
def test_weights_come_back_when_a_loss_is_interrupted(failure: type[BaseException], at: int) -> None:
    model = net()
    before = everything(model)
    calls = 0

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == at:
            raise failure
        return F.cross_entropy(outputs, target)

    with pytest.raises(failure):
        loss_profile(model, batches(1), loss)
    assert same(before, everything(model))


def test_weights_come_back_when_putting_them_back_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(2))

    held, calls, copy = {"a": first, "b": second}, 0, Tensor.copy_

    def interrupted(self: Tensor, other: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:  # two are changed, the first is put back
            raise KeyboardInterrupt
        return copy(self, other)

    monkeypatch.setattr(Tensor, "copy_", interrupted)
    with (
        pytest.raises(KeyboardInterrupt),
        trials.replaced_weights(held, {"a": torch.full((2,), 5.0), "b": torch.ones(2) * 6}),
    ):
        assert first.tolist() == [5.0, 5.0]
    assert first.tolist() == [0.0, 0.0] and second.tolist() == [1.0, 1.0]


def test_a_graph_that_is_held_can_still_be_differentiated() -> None:
    model, (x, y) = net().eval(), batches(1)[0]
    F.cross_entropy(model(x), y).backward()
    expected = model.fc.weight.grad.clone()
    model.zero_grad()
    held = F.cross_entropy(model(x), y)
    loss_profile(model, [(x, y)], F.cross_entropy)
    held.backward()
    assert torch.equal(model.fc.weight.grad, expected)


def test_levels_that_change_nothing_cost_no_run() -> None:
    model = net()
    with torch.no_grad():
        model.fc.weight.view(-1)[:16] = 0.0
    calls = 0

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return F.cross_entropy(outputs, target)

    profile = loss_profile(model, batches(1), loss, layers=["fc"], levels=(0.2, 0.5, 0.51, 0.75, 0.76))
    assert calls == 1 + 1  # as it is, and 24 of 32 zeros; 16 were there, and 51 % are 16
    assert profile.losses["fc"][:4] == (profile.base,) * 4
    assert profile.losses["fc"][5] == profile.losses["fc"][4] != profile.base


# ---------------------------------------------------------------------------------------------- batches and losses


class Named(nn.Module):
    """Outputs as transformers give them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, values: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.fc(values)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss) if labels is not None else {"logits": logits, "hidden": values}


def test_outputs_own_loss_is_taken() -> None:
    model, x, y = Named(), torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])
    batch = {"values": x, "labels": y, "idx": torch.arange(5)}
    profile = loss_profile(model, [batch])
    assert profile.base == pytest.approx(F.cross_entropy(model.fc(x), y).item(), rel=1e-6)
    assert loss_profile(model, [batch], method="fisher").losses["fc"][-1] > 0


def test_a_loss_of_a_dict_gets_the_whole_dict() -> None:
    model, x, y = Named(), torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])
    profile = loss_profile(
        model, [{"values": x, "answer": y}], lambda outputs, batch: F.cross_entropy(outputs["logits"], batch["answer"])
    )
    assert profile.base == pytest.approx(F.cross_entropy(model.fc(x), y).item(), rel=1e-6)


def test_without_a_loss_logits_are_compared_by_divergence() -> None:
    model, x = Named(), torch.randn(5, 6)
    profile = loss_profile(model, [{"values": x}], levels=(0.5,))
    with torch.no_grad():
        weight = model.fc.weight.clone()
        zero_lowest(weight, 0.5)
        dense, pruned = model.fc(x).softmax(-1), F.linear(x, weight, model.fc.bias).softmax(-1)
    expected = float((dense * (dense / pruned).log()).sum(-1).mean())
    assert profile.base == 0.0
    assert profile.losses["fc"] == pytest.approx((0.0, expected), rel=1e-4)


def test_whole_number_targets_say_that_outputs_are_classes() -> None:
    model, data = net(), batches()
    by_divergence = loss_profile(model, data, levels=(0.9,))
    by_squares = loss_profile(model, [x for x, _ in data], levels=(0.9,))
    model.eval()
    with torch.no_grad():
        dense = [model(x) for x, _ in data]
        zero_lowest(model.fc.weight, 0.9)
        pruned = [model(x) for x, _ in data]
    squares = [float((p - d).square().mean() / d.square().mean()) for p, d in zip(pruned, dense, strict=True)]
    kl = [
        float(F.kl_div(p.log_softmax(1), d.softmax(1), reduction="batchmean"))
        for p, d in zip(pruned, dense, strict=True)
    ]
    assert by_squares.losses["fc"][1] == pytest.approx(sum(squares) / 2, rel=1e-5)
    assert by_divergence.losses["fc"][1] == pytest.approx(sum(kl) / 2, rel=1e-4)


def test_classes_that_are_masked_by_infinity_do_not_count() -> None:
    mask = torch.tensor([False, True, False])
    model = written(lambda self, x: {"logits": self.fc(x).masked_fill(mask, -torch.inf)}, fc=nn.Linear(6, 3))

    losses = loss_profile(model, [torch.randn(4, 6)], levels=(0.9,)).losses["fc"]
    assert losses[0] == 0 and losses[1] > 0


def test_one_tensor_is_its_own_target() -> None:
    model, x = nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 6)), torch.randn(5, 6)
    expected = F.mse_loss(model(x), x).item()
    for batch in (x, (x,)):
        assert loss_profile(model, [batch], F.mse_loss).base == pytest.approx(expected, rel=1e-6)


def test_batches_limit_what_is_taken() -> None:
    assert loss_profile(net(), batches(3), F.cross_entropy, batches=2).samples == 16


# ---------------------------------------------------------------------------------------------- fisher


def test_fisher_is_half_the_curvature_times_the_square() -> None:
    """Of a linear model under squares with targets, against gradients written out."""
    x, y = torch.randn(4, 3).double(), torch.randn(4, 1).double()
    model = nn.Sequential(nn.Linear(3, 1, bias=False)).double()
    weight = model[0].weight.detach().clone()
    profile = loss_profile(model, [(x[:2], y[:2]), (x[2:], y[2:])], F.mse_loss, method="fisher", levels=(1 / 3, 2 / 3))
    squares = torch.zeros(3).double()
    for rows in (slice(0, 2), slice(2, 4)):
        error = (x[rows] @ weight[0]) - y[rows, 0]
        squares += (2 * error[:, None] * x[rows]).mean(0).square() * 2 / 2
    saliency = (squares * weight[0].square() / 2)[weight[0].abs().argsort()].cumsum(0)
    assert profile.losses["0"] == pytest.approx((0.0, float(saliency[0]), float(saliency[1])), rel=1e-9)
    assert profile.base == 0


@pytest.mark.parametrize("classes", [False, True])
def test_fisher_of_the_outputs_is_the_curvature_of_their_distance(classes: bool) -> None:
    """Drawn answers: in the mean over many batches, what one small move of one weight measures."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 4, generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    target = [torch.zeros(64, dtype=torch.int64)] if classes else []
    data = [(x, *target)] * 200
    profile = loss_profile(model, data, method="fisher", levels=(1 / 12,))
    least = int(model[0].weight.abs().argmin())
    with torch.no_grad():
        dense = model(x)
        moved = model[0].weight.clone().view(-1)
        moved[least] = 0.0
        now = F.linear(x, moved.view(3, 4), model[0].bias)
    expected = (
        F.kl_div(now.log_softmax(1), dense.softmax(1), reduction="batchmean")
        if classes
        else (now - dense).square().mean() / dense.square().mean()
    )
    assert profile.losses["0"][1] == pytest.approx(float(expected), rel=0.15)


# ---------------------------------------------------------------------------------------------- channels


def test_channels_are_lost_with_all_that_belongs_to_them() -> None:
    """The loss is that of the model without the channels of least norm: here those of conv1, by hand."""
    model, data = net(), batches()
    profile = loss_profile(model, data, F.cross_entropy, structured=True, levels=(0.5,))
    assert profile.families == {"conv1": ("conv1",), "conv2": ("conv2",)}
    norms = (
        model.conv1.weight.flatten(1).square().sum(1) + model.conv2.weight.movedim(1, 0).flatten(1).square().sum(1)
    ).detach()
    lowest = norms.argsort()[:3]

    def change() -> None:
        model.conv2.weight[:, lowest] = 0.0

    expected = reference(model, data, F.cross_entropy, change)
    assert profile.losses["conv1"] == pytest.approx((profile.base, expected), rel=1e-5)


def test_layers_whose_channels_go_together_are_one() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.head((x + self.second(x)).mean((2, 3)))

    profile = loss_profile(Residual(), [torch.randn(4, 1, 6, 6)], structured=True, method="fisher")
    assert profile.families == {"first": ("first", "second")}
    assert set(profile.losses) == {"first"}


# ---------------------------------------------------------------------------------------------- layers


def test_layers_are_chosen_by_name_type_and_pattern() -> None:
    def chosen(layers: Any) -> list[str]:
        return list(loss_profile(net(), layers=layers).losses)

    assert chosen(None) == ["conv1", "conv2", "fc"]
    assert chosen("fc") == ["fc"]
    assert chosen(["Linear", "conv1.weight"]) == ["conv1", "fc"]
    assert chosen("re:conv.*weight") == ["conv1", "conv2"]


def test_a_shared_weight_is_profiled_once_and_a_recomputed_one_not() -> None:
    model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 5), nn.Linear(5, 7, bias=False))
    model[2].weight = model[0].weight
    nn.utils.parametrizations.weight_norm(model[1])
    assert list(loss_profile(model).losses) == ["0"]


def attention() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 1)


def test_layers_bear_the_names_of_an_analysis_and_can_be_chosen_by_them() -> None:
    model, x = attention(), torch.randn(3, 5, 16)
    analysis = analyze_model(model, x)
    names = ["layers.0.self_attn.in_proj", "layers.0.self_attn.out_proj", "layers.0.linear1", "layers.0.linear2"]
    for layers in (None, analysis, names):
        profile = loss_profile(model, [x], layers=layers, levels=(0.5,))
        assert list(profile.losses) == names
        assert all(losses[1] > 0 for losses in profile.losses.values())
    assert list(loss_profile(model, layers=names[:1]).losses) == names[:1]
    for of in ("pruning", "quantization"):
        by_sample = loss_profile(model, method="shape", sample_inputs=x, of=of)
        assert by_sample == loss_profile(model, method="shape", layers=analysis, of=of)


def test_an_analysis_of_another_model_is_refused() -> None:
    with pytest.raises(TargetError, match="of the analysis is not in Net"):
        loss_profile(net(), layers=analyze_model(attention(), torch.randn(3, 5, 16)))


def test_a_wrapped_model_has_the_names_of_its_module() -> None:
    assert list(loss_profile(nn.DataParallel(net())).losses) == ["conv1", "conv2", "fc"]


# ---------------------------------------------------------------------------------------------- errors


def not_finite(outputs: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(outputs, target) * torch.nan


X = torch.randn(4, 1, 8, 8)
GOOD = [(X, torch.tensor([0, 1, 2, 3]))]
WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "of": ((), {"of": "distillation"}, ArgumentError, "of='distillation' is none of pruning, quantization"),
    "method": ((), {"method": "magnitud"}, ArgumentError, "Did you mean 'magnitude'"),
    "no data": ((), {"method": "data"}, ArgumentError, "needs data"),
    "a loss without data": ((None, F.cross_entropy), {}, ArgumentError, "a loss needs data"),
    "a loss that is none": ((GOOD, "mse"), {}, ArgumentError, "loss is a str"),
    "percent": ((), {"levels": (0, 80)}, ArgumentError, "80 is no sparsity.*mean 0.8"),
    "all": ((), {"levels": (1.0,)}, ArgumentError, "1.0 is no sparsity"),
    "nan": ((), {"levels": (float("nan"),)}, ArgumentError, "nan is no sparsity"),
    "a negative one": ((), {"levels": (-0.1,)}, ArgumentError, "-0.1 is no sparsity"),
    "one number": ((), {"levels": 0.5}, ArgumentError, "several numbers"),
    "none": ((), {"levels": ()}, ArgumentError, "levels is empty"),
    "1 bit": ((), {"levels": (1,), "of": "quantization"}, ArgumentError, "1 is no number of bits"),
    "half a bit": ((), {"levels": (2.5,), "of": "quantization"}, ArgumentError, "2.5 is no number of bits"),
    "a tensor": ((X,), {}, ArgumentError, "data is one tensor"),
    "a dict": (({"x": X},), {}, ArgumentError, "data is a dict"),
    "batches": ((GOOD,), {"batches": 0}, ArgumentError, "batches=0"),
    "empty": (([],), {}, DataError, "holds no batch"),
    "no tensor": (([("text",)],), {}, DataError, "batch 0 of data is a tuple without a tensor"),
    "nan inputs": (([*GOOD, (X * torch.nan, GOOD[0][1])], F.cross_entropy), {}, DataError, "loss of batch 1 is nan"),
    "nan loss": ((GOOD, not_finite), {}, DataError, "loss of batch 0 is nan with the model as it is"),
    "no number": ((GOOD, lambda outputs, target: outputs), {}, DataError, r"a Tensor of shape \(4, 4\)"),
    "no graph": (
        (GOOD, lambda outputs, target: outputs.sum().item()),
        {"method": "fisher"},
        DataError,
        "cannot be differentiated",
    ),
    "layers": ((), {"layers": ["conv3"]}, TargetError, "'conv3' matches nothing.*\n.*'conv1'"),
    "a bias": ((), {"layers": ["fc.bias"]}, TargetError, "'fc.bias' has 1 dimension"),
    "shape": ((), {"method": "shape"}, ArgumentError, "needs sample_inputs"),
    "structured magnitudes": ((), {"structured": True}, ArgumentError, "structured=True needs data"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_meant_is_refused_and_nothing_changes(case: str) -> None:
    args, kwargs, error, text = WRONG[case]
    model = net()
    before = everything(model)
    with pytest.raises(error, match=text):
        loss_profile(model, *args, **kwargs)
    assert same(before, everything(model))


def test_a_loss_that_is_infinite_at_a_level_is_named_and_the_weights_come_back() -> None:
    model = net()
    before = everything(model)

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        zeros = int((model.conv2.weight == 0).sum())
        return outputs.sum() * 0 + (torch.inf if zeros > 100 else 1.0)

    with pytest.raises(DataError, match=r"is inf with the model with 'conv2' at 0\.4"):
        loss_profile(model, GOOD, loss)
    assert same(before, everything(model))


def test_weights_that_are_not_finite_and_models_without_layers_are_refused() -> None:
    model = net()
    with torch.no_grad():
        model.fc.weight[0, 0] = torch.nan
    with pytest.raises(DataError, match=r"'fc\.weight' holds NaN"):
        loss_profile(model, GOOD)
    with pytest.raises(TargetError, match="no layer that can be compressed"):
        loss_profile(nn.ReLU())
    with pytest.raises(ArgumentError, match=r"model is a int: give a torch\.nn\.Module, or the path of an ONNX file"):
        loss_profile(3)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"model\.onnx: no such file"):
        loss_profile("model.onnx")
    with pytest.raises(TargetError, match="no channels that can be removed"):
        loss_profile(nn.Sequential(nn.Linear(3, 2)), [torch.randn(2, 3)], structured=True)


def test_a_quantized_model_is_not_quantized_again() -> None:
    quantized = quantize_model(net(), [X, X, X, X]).model
    with pytest.raises(StateError, match="holds quantized layers already"):
        loss_profile(quantized, of="quantization")


# ---------------------------------------------------------------------------------------------- the value


def profile() -> LossProfile:
    return loss_profile(net(), batches(1), F.cross_entropy, levels=(0.5, 0.9))


def test_a_profile_is_equal_to_itself_loaded(tmp_path: Path) -> None:
    for one in (profile(), loss_profile(net()), loss_profile(net(), GOOD, structured=True)):
        one.save(tmp_path / "profile.json")
        assert LossProfile.load(tmp_path / "profile.json") == one
    assert [file.name for file in tmp_path.iterdir()] == ["profile.json"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"format": "other"}, "is no loss profile"),
        ({"version": 2}, "version 2; this sparsify reads 1"),
        ({"method": "guess"}, "broken loss profile.*guess"),
        ({"levels": [0.0, 0.5]}, "'conv1' has 3 losses at 2 levels"),
        ({"base": "1"}, r"broken loss profile: base is '1': input should be a valid number"),
        ({"losses": [1]}, "broken loss profile: losses is "),
        ({"losses": {"conv1": [1, "2", 3]}}, r"losses\.conv1\.1 is '2'"),
        ({"base": math.nan}, "base is nan: input should be a finite number"),
        ({"more": 1}, "broken loss profile: more is unknown"),
    ],
)
def test_a_broken_file_is_a_data_error(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    path = tmp_path / "profile.json"
    profile().save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=text):
        LossProfile.load(path)


def test_a_missing_file_is_an_os_error_too(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"cannot read .*nothing\.json") as caught:
        LossProfile.load(tmp_path / "nothing.json")
    assert isinstance(caught.value, DataError)
    (tmp_path / "text.json").write_text("[1")
    with pytest.raises(DataError, match="is no loss profile"):
        LossProfile.load(tmp_path / "text.json")


def test_the_monotone_view_never_falls() -> None:
    one = LossProfile("data", "pruning", (0.0, 0.5, 0.7, 0.9), {"a": (1.0, 0.8, 1.4, 1.2)}, 1.0, 4)
    assert one.increase("a") == pytest.approx((0.0, 0.0, 0.4, 0.4))
    assert one.monotone().losses["a"] == pytest.approx((1.0, 1.0, 1.4, 1.4))
    assert one.monotone().monotone() == one.monotone()


def test_the_table_names_layers_and_levels() -> None:
    text = str(profile())
    assert text.splitlines()[0].startswith("Loss by layer, pruning, data: base 1.")
    assert text.splitlines()[1].split() == ["Layer", "0%", "50%", "90%"]
    assert [line.split()[0] for line in text.splitlines()[2:]] == ["conv1", "conv2", "fc"]
    # A hundred levels are no table.
    assert len(str(loss_profile(net())).splitlines()[1].split()) == 1 + len(DATA_LEVELS)
    assert "8 bits" in str(loss_profile(net(), of="quantization"))


def test_progress_is_shown_where_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    loss_profile(net(), GOOD, levels=(0.5,), progress=True)
    assert "losses" in capsys.readouterr().err
    loss_profile(net(), GOOD, levels=(0.5,))
    assert capsys.readouterr().err == ""


def test_a_file_that_is_no_text_is_said(tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataFileError, match=r"cannot read .*profile\.json"):
        LossProfile.load(tmp_path / "profile.json")
