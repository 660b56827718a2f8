"""Quantization without training: what comes out, what is left as it was, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections import UserDict, namedtuple
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import sparsify
from sparsify import (
    ArgumentError,
    DataError,
    ExportError,
    RecipeError,
    ScheduledModifierManager,
    SparsifyWarning,
    StateError,
    TargetError,
    export_onnx,
    loss_profile,
    quantize_model,
    quantize_onnx,
    verify_onnx,
)
from sparsify.quantization.conversion import quantized_layers, quantizers
from sparsify.quantization.deployment import deployment_copy
from sparsify.quantization.plan import is_quantized
from tests.zoo.quantizable import InvertedResidual, ResidualNet, SqueezeExciteNet


def ready(model: nn.Module, seed: int = 0) -> nn.Module:
    """With the statistics of BatchNorm that training would leave."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for module in model.train().modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        for _ in range(8):
            model(torch.randn(8, 3, 16, 16) + 0.3)
    return model.eval()


def samples(count: int = 64, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list((torch.randn(count, 3, 16, 16, generator=generator) + 0.3).split(16))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return ready(ResidualNet())


def error(one: nn.Module, other: nn.Module) -> float:
    x = torch.cat(samples(32, seed=9))
    with torch.no_grad():
        a, b = one.eval()(x), other.eval()(x)
    return float((a - b).norm() / (a - a.mean(0)).norm())


@pytest.mark.parametrize("build", [ResidualNet, InvertedResidual, SqueezeExciteNet])
def test_a_trained_model_becomes_int8_and_computes_the_same(build: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = ready(build())
    result = quantize_model(model, samples())
    assert is_quantized(result.model) and not result.model.training
    assert 0 < error(model, result.model) < 0.2
    assert {layer.layer for layer in result.layers} == {layer.name for layer in result.plan.layers}
    assert result.samples == 64
    assert "64 samples" in str(result)


def test_the_users_model_its_mode_and_the_random_state_stay_as_they_were(net: nn.Module) -> None:
    model = copy.deepcopy(net).train()
    model.first.eval()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    result = quantize_model(model, samples(), scheme={"weights": {"num_bits": 4}})
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert not is_quantized(model)
    assert result.model is not model


def test_in_place_the_model_itself_is_what_comes_back(net: nn.Module) -> None:
    model = copy.deepcopy(net)
    own = dict(model.named_parameters())
    result = quantize_model(model, samples(), inplace=True)
    other = quantize_model(net, samples())
    assert result.model is model
    assert all(model.get_parameter(name) is parameter for name, parameter in own.items())
    x = samples()[0]
    assert torch.equal(model(x), other.model(x))


def test_the_same_samples_give_the_same_model(net: nn.Module) -> None:
    x = samples()[0]
    one, other = (quantize_model(net, samples(), scheme={"weights": {"num_bits": 3}}) for _ in range(2))
    assert torch.equal(one.model(x), other.model(x))


@pytest.mark.parametrize("rounding", ["adaround", "gptq"])
def test_learned_rounding_beats_the_nearest_with_few_bits(net: nn.Module, rounding: Any) -> None:
    scheme = {"weights": {"num_bits": 3}}
    options: dict[str, Any] = {"scheme": scheme, "sequential": False}
    plain = quantize_model(net, samples(), rounding="nearest", correct_bias=False, equalize=False, **options)
    learned = quantize_model(net, samples(), rounding=rounding, **options)
    assert error(net, learned.model) < 0.7 * error(net, plain.model)
    assert all(layer.error <= layer.error_nearest for layer in learned.layers)


def test_layer_by_layer_the_errors_of_earlier_layers_are_made_good(net: nn.Module) -> None:
    options: dict[str, Any] = {"scheme": {"weights": {"num_bits": 3}}, "rounding": "nearest"}
    at_once = quantize_model(net, samples(), sequential=False, **options)
    in_turn = quantize_model(net, samples(), sequential=True, **options)
    assert error(net, in_turn.model) < 0.9 * error(net, at_once.model)


def test_bias_correction_removes_the_shift_of_the_mean(net: nn.Module) -> None:
    x = torch.cat(samples())

    def shift(correct_bias: bool) -> float:
        result = quantize_model(
            net, samples(), scheme={"weights": {"num_bits": 3}}, rounding="nearest", correct_bias=correct_bias
        )
        with torch.no_grad():
            return float((result.model(x) - net(x)).mean(0).abs().max())

    assert shift(True) < 0.2 * shift(False)


def test_equalizing_helps_where_channels_are_unequal(net: nn.Module) -> None:
    model = copy.deepcopy(net)
    with torch.no_grad():
        for block in (model.first, model.second):
            factor = torch.tensor([0.01, 1.0, 30.0, 1.0])
            block.bn1.weight /= factor
            block.bn1.bias /= factor
            block.conv2.weight *= factor.view(1, -1, 1, 1)
    assert error(net, model) < 1e-5
    result = quantize_model(model, samples())
    assert result.equalized["first.conv1"] >= 4
    assert error(net, result.model) < 0.5 * error(net, quantize_model(model, samples(), equalize=False).model)


def test_ranges_are_those_that_were_asked_for(net: nn.Module) -> None:
    found = {}
    for name in ("min_max", "mse", "percentile", "entropy"):
        result = quantize_model(net, samples(), ranges=name, equalize=False)  # type: ignore[arg-type]
        found[name] = next(quantizers(result.model)).high.item()
    largest = max(x.max().item() for x in samples())
    first = next(quantizers(quantize_model(net, samples(), ranges="min_max").model))
    assert first.name.endswith("input_quantizer")
    assert math.isclose(found["min_max"], largest, rel_tol=1e-6)
    assert found["mse"] < largest


def test_without_data_ranges_come_from_batchnorm_with_a_warning(net: nn.Module) -> None:
    x = samples()[0]
    net = copy.deepcopy(net)
    with torch.no_grad():
        # Means and deviations that are not those of a fresh BatchNorm.
        for norm in (net.bn, net.first.bn1):
            norm.weight.mul_(0.3)
            norm.bias.copy_(torch.tensor([2.0, -1.0, 1.5, 0.0]))
        net.second.bn2.weight.mul_(0.1)
    state = torch.get_rng_state()
    with pytest.warns(SparsifyWarning, match="ranges of ResidualNet come from the statistics of its BatchNorms"):
        result = quantize_model(net, sample_inputs=(x,))
    assert torch.equal(torch.get_rng_state(), state)
    known = quantize_model(net, samples(256))
    for ours, theirs in zip(quantizers(result.model), quantizers(known.model), strict=True):
        assert 0.4 < ours.scale.item() / theirs.scale.item() < 2.5, ours.name
    x = torch.cat(samples(32, seed=9))
    with torch.no_grad():
        wanted = net(x)
        assert float((result.model(x) - wanted).norm() / wanted.norm()) < 0.1


def test_without_data_and_without_batchnorm_nothing_is_known() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SparsifyWarning)
        with pytest.raises(DataError, match="has no BatchNorm, so nothing is known"):
            quantize_model(nn.Sequential(nn.Linear(3, 3)), sample_inputs=(torch.randn(2, 3),))


def test_one_call_gives_a_verified_file(net: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    loader = [(x, torch.zeros(len(x))) for x in samples()]
    written = quantize_onnx(net, path, iter(loader))
    assert written.verification.ok and written.exported.path == path
    x = samples()[1]
    options = onnxruntime.SessionOptions()
    # Without it x86 CPUs that lack VNNI saturate sums of two products, and are up to 60 % off: where that happens, the
    # verification says so.
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(written, options, providers=["CPUExecutionProvider"])
    got = session.run(None, {"x": x.numpy()})[0]
    with torch.no_grad():
        wanted = net(x).numpy()
    assert np.linalg.norm(got - wanted) < 0.2 * np.linalg.norm(wanted)
    assert written.exported.quantized and not written.exported.floating
    assert "layers and" in str(written)


def test_a_file_that_computes_something_else_is_not_written(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusal:
        ok = False

    monkeypatch.setattr(sparsify.oneshot.quantize, "verify_onnx", lambda *_: Refusal())
    with pytest.raises(ExportError, match="was not written"):
        quantize_onnx(net, tmp_path / "net.onnx", samples())
    assert not list(tmp_path.iterdir())


class Text(nn.Module):
    """Tied to its embedding; q, k, v from one tensor; a mask among the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.table(ids)
        q, k, v = (layer(x).unsqueeze(1) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.bool()[:, None, None, :])
        x = self.norm(x + y.squeeze(1))
        return self.head(x + self.down(F.gelu(self.up(x))))


def test_transformers_are_quantized_from_batches_of_named_inputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Text().eval()
    batches = [
        {"ids": torch.randint(0, 50, (8, 12)), "mask": torch.ones(8, 12, dtype=torch.int64), "labels": torch.zeros(8)}
        for _ in range(4)
    ]
    written = quantize_onnx(model, tmp_path / "text.onnx", batches, scheme={"weights": {"num_bits": 4}})
    kinds = {layer.layer: layer.rounding for layer in written.quantized.layers}
    assert {kinds[name] for name in ("q", "k", "v", "up", "down")} == {"gptq"}
    # The table moves with the head: neither is rounded but to the nearest.
    assert kinds["head"] == "nearest"
    quantized: Any = written.quantized.model
    assert torch.equal(quantized.head.weight, model.head.weight) and quantized.head.weight is quantized.table.weight
    assert written.verification.ok


@dataclasses.dataclass
class TextBatch:
    """As a collate function gives it: arguments in any order, labels, and a field that is not filled."""

    mask: Tensor
    ids: Tensor
    labels: Tensor | None = None


def container(kind: str, parts: dict[str, Any]) -> Any:
    if kind in ("UserDict", "proxy", "dataclass", "named tuple"):
        make: Any = {"UserDict": UserDict, "proxy": MappingProxyType}.get(kind, lambda parts: TextBatch(**parts))
        return namedtuple("Parts", parts)(**parts) if kind == "named tuple" else make(parts)
    transformers = pytest.importorskip("transformers")
    if kind == "BatchEncoding":
        return transformers.BatchEncoding(parts)

    class Output(transformers.utils.ModelOutput):  # type: ignore[misc, name-defined]
        ids: Tensor | None = None
        mask: Tensor | None = None
        labels: Tensor | None = None

    return dataclasses.dataclass(Output)(**parts)


@pytest.mark.parametrize(
    "kind",
    [
        *("UserDict", "dataclass"),
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("proxy", "named tuple", "BatchEncoding", "ModelOutput")),
    ],
)
def test_any_container_of_named_tensors_is_a_batch_everywhere(kind: str) -> None:
    torch.manual_seed(0)
    model = Text().eval()
    parts = [
        {"ids": torch.randint(0, 50, (8, 12)), "mask": torch.ones(8, 12, dtype=torch.int64), "labels": torch.ones(8)}
        for _ in range(2)
    ]
    batches = [container(kind, part) for part in parts]
    wanted = quantize_model(model, parts).model.state_dict()
    found = quantize_model(model, batches, sample_inputs=batches[0]).model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    losses = loss_profile(model, parts, levels=[0.0, 0.5]).losses
    assert loss_profile(model, batches, levels=[0.0, 0.5]).losses == losses
    assert loss_profile(model, batches, lambda output, _: output.square().mean(), levels=[0.0, 0.5]).samples == 16
    with pytest.raises(ArgumentError, match="give an iterable of batches"):
        quantize_model(model, batches[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dataclass", "BatchEncoding", "named tuple"])
def test_containers_reach_files_samples_and_recipes(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Text().eval()
    batches = [
        container(kind, {"ids": torch.randint(0, 50, (8, 12)), "mask": torch.ones(8, 12, dtype=torch.int64)})
        for _ in range(2)
    ]
    written = quantize_onnx(model, tmp_path / "text.onnx", batches)
    assert verify_onnx(written.quantized.model, written, batches[1])
    manager = ScheduledModifierManager.from_yaml("modifiers:\n  - !QuantizationModifier\n    start_epoch: 0.0")
    manager.apply(model, sample_inputs=batches[0], calibration_data=batches)
    assert is_quantized(model)


class Reshaping(nn.Module):
    """Its forward fails on an empty batch, as many do."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.line(x.reshape(x.shape[0], -1))


@pytest.mark.parametrize("order", [(0, 16, 16), (16, 0, 16), (16, 16, 0)])
def test_an_empty_batch_among_others_changes_nothing(order: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = Reshaping().eval()
    batches = [torch.randn(count, 2, 3) for count in order]
    full = [batch for batch in batches if len(batch)]
    for data in (batches, iter(batches), DataLoader(batches, batch_size=None)):  # type: ignore[arg-type, type-var]
        found = quantize_model(model, data, batches=2)
        assert found.samples == 32
        wanted = quantize_model(model, full).model.state_dict()
        assert all(torch.equal(value, wanted[name]) for name, value in found.model.state_dict().items())
    labelled = [(batch, torch.zeros(len(batch), dtype=torch.int64)) for batch in batches]
    profile = loss_profile(model, labelled, F.cross_entropy, levels=[0.0, 0.5])
    assert profile.samples == 32 and math.isfinite(profile.base)
    manager = ScheduledModifierManager.from_yaml("modifiers:\n  - !QuantizationModifier\n    start_epoch: 0.0")
    manager.apply(model, calibration_data=batches)
    assert is_quantized(model)


def test_empty_batches_alone_are_no_data(tmp_path: Path) -> None:
    empty = torch.zeros(0, 2, 3)
    with pytest.raises(DataError, match="holds no batch"):
        quantize_model(Reshaping(), [empty])
    with pytest.raises(DataError, match="holds no batch"):
        loss_profile(Reshaping(), [empty])
    with pytest.raises(ArgumentError, match="empty batch"):
        quantize_model(Reshaping(), [torch.randn(16, 2, 3)], sample_inputs=empty)
    model = Reshaping().eval()
    export_onnx(model, torch.randn(2, 2, 3), tmp_path / "x.onnx")
    with pytest.raises(ArgumentError, match="empty batch, on which nothing can be compared"):
        verify_onnx(model, tmp_path / "x.onnx", empty)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("inplace", [False, True])
def test_half_precision_is_quantized_in_float32_and_given_back(
    net: nn.Module, dtype: torch.dtype, inplace: bool
) -> None:
    model = copy.deepcopy(net).to(dtype)
    # What half precision itself costs is not counted: the reference has the same weights.
    exact = copy.deepcopy(model).float()
    result = quantize_model(model, [x.to(dtype) for x in samples()], inplace=inplace)
    assert (result.model is model) == inplace
    for name, tensor in exact.state_dict().items():
        kept = dtype if tensor.is_floating_point() else tensor.dtype
        assert result.model.state_dict()[name].dtype == kept, name
    assert all(quantizer.scale.dtype == torch.float32 for quantizer in quantizers(result.model))
    x = samples()[0]
    with torch.no_grad():
        found, expected = result.model(x.to(dtype)), exact(x)
    assert found.dtype == dtype
    assert float((found.float() - expected).norm() / expected.norm()) < 0.05
    assert error(exact, copy.deepcopy(result.model).float()) < 1.3 * error(
        exact, quantize_model(exact, samples()).model
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_the_file_of_a_model_in_half_precision_is_in_float32(
    net: nn.Module, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = copy.deepcopy(net).to(dtype)
    written = quantize_onnx(model, tmp_path / "net.onnx", [x.to(dtype) for x in samples()])
    assert {parameter.dtype for parameter in written.quantized.model.parameters()} == {dtype}
    assert verify_onnx(copy.deepcopy(written.quantized.model).float(), written, samples()[1]).ok
    assert onnxruntime.InferenceSession(written).get_inputs()[0].type == "tensor(float)"


def test_equalizing_makes_no_weight_of_float16_too_small(net: nn.Module) -> None:
    model = copy.deepcopy(net)
    with torch.no_grad():
        factor = torch.tensor([0.02, 1.0, 30.0, 1.0])
        model.first.bn1.weight /= factor
        model.first.bn1.bias /= factor
        model.first.conv2.weight *= factor.view(1, -1, 1, 1)
    model = model.half()
    exact = copy.deepcopy(model).float()
    result = quantize_model(model, [x.half() for x in samples()])
    assert 4 <= result.equalized["first.conv1"] <= 2.0**5
    plain = quantize_model(model, [x.half() for x in samples()], equalize=False)
    found, without = (error(exact, copy.deepcopy(one.model).float()) for one in (result, plain))
    assert found < without


def test_multihead_attention_is_quantized_with_the_rest() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    batches = [torch.randn(8, 6, 16) for _ in range(4)]
    for bits, most in ((8, 0.05), (4, 0.3)):
        result = quantize_model(model, batches, scheme={"weights": {"num_bits": bits}})
        kinds = {layer.layer: layer.rounding for layer in result.layers}
        assert {"self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2"} <= kinds.keys()
        with torch.no_grad():
            wanted = model(batches[0])
            assert 0 < float((result.model(batches[0]) - wanted).norm() / wanted.norm()) < most


def test_overrides_and_exceptions_are_those_of_the_modifier(net: nn.Module) -> None:
    result = quantize_model(
        net, samples(), scheme_overrides={"first.conv1": {"weights": {"num_bits": 4}}}, ignore=["fc"], batches=2
    )
    bits = {layer.layer: layer.bits for layer in result.layers}
    assert bits["first.conv1"] == 4 and bits["first.conv2"] == 8 and "fc" not in bits
    assert result.floating["fc"] == "left out by the recipe"
    assert result.samples == 32


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.broken = False

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) if self.broken else self.one(self.two(x))


def batch(count: int = 32) -> Tensor:
    return torch.randn(count, 4)


def nan_batch() -> Tensor:
    x = batch()
    x[3, 1] = math.nan
    return x


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"calibration_data": [batch(10)]}, DataError, "holds 10 samples.*fewer than 16.*least_samples=10"),
    ({"calibration_data": []}, DataError, "holds no batch"),
    ({"calibration_data": [batch(), nan_batch()]}, DataError, "batch 1 holds NaN"),
    ({"calibration_data": ["text"]}, DataError, "batch 0 is a str without a tensor"),
    ({"calibration_data": batch()}, ArgumentError, "one tensor"),
    ({"calibration_data": {"x": batch()}}, ArgumentError, "is a dict"),
    ({"calibration_data": 3}, ArgumentError, "is a int"),
    ({"calibration_data": None}, ArgumentError, "neither calibration_data nor sample_inputs"),
    ({"ranges": "max"}, ArgumentError, "ranges='max': give one of 'mse'"),
    ({"rounding": "up"}, ArgumentError, "rounding='up'"),
    ({"batches": 0}, ArgumentError, "batches=0"),
    ({"scheme": {"weights": {"num_bits": 9}}}, RecipeError, "num_bits"),
    ({"scheme": "int8"}, RecipeError, "scheme"),
    ({"ignore": ["three"]}, TargetError, "'three'"),
    ({"ignore": ["one", "two"]}, TargetError, "nothing in Branch can be quantized"),
    ({"sample_inputs": (torch.randn(2, 5),)}, ArgumentError, "cannot be traced"),
]


@pytest.mark.parametrize(("options", "kind", "message"), REFUSED)
def test_what_cannot_be_meant_is_refused_before_anything_changes(
    options: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    model = Branch()
    before = copy.deepcopy(model.state_dict())
    arguments = {"calibration_data": [batch()], **options}
    data = arguments.pop("calibration_data")
    with pytest.raises(kind, match=message):
        quantize_model(model, data, inplace=True, **arguments)
    assert not is_quantized(model) and model.training
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    with pytest.raises(kind, match=message):
        quantize_onnx(model, tmp_path / "x.onnx", data, **arguments)
    assert not list(tmp_path.iterdir())


def test_a_range_that_no_sample_reaches_is_refused() -> None:
    class Choosy(Branch):
        def forward(self, x: Tensor) -> Tensor:
            # Calibration takes another way than the trace, as models with a mode of their own do.
            return self.one(x) if not torch.compiler.is_compiling() else self.one(self.two(x))

    with pytest.raises(DataError, match=r"two\.input_quantizer: no batch of calibration_data came there"):
        quantize_model(Choosy(), [batch()])


def test_weights_and_activations_that_are_not_finite_are_refused() -> None:
    model = Branch()
    with torch.no_grad():
        model.two.weight[0, 0] = math.inf
    with pytest.raises(DataError, match=r"two\.weight holds NaN or infinity"):
        quantize_model(model, [batch()])
    with torch.no_grad():
        model.two.weight.fill_(3e38)
    with pytest.raises(DataError, match="reach from"):
        quantize_model(model, [batch() + 5], equalize=False)


def test_a_model_is_quantized_once(net: nn.Module) -> None:
    result = quantize_model(net, samples())
    with pytest.raises(StateError, match="holds quantized layers already"):
        quantize_model(result.model, samples())
    with pytest.raises(ArgumentError, match=r"model is a str: give a torch\.nn\.Module"):
        quantize_model("model.onnx", samples())  # type: ignore[arg-type]


def test_nothing_is_printed_where_there_is_no_terminal(net: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    quantize_model(net, samples())
    assert capsys.readouterr() == ("", "")
    quantize_model(net, samples(), progress=True)
    assert "rounding weights" in capsys.readouterr().err


def test_what_comes_back_is_exported_as_it_is(net: nn.Module, tmp_path: Path) -> None:
    result = quantize_model(net, samples(), scheme={"weights": {"num_bits": 4}})
    exported = export_onnx(result.model, samples()[0][:2], tmp_path / "net.onnx")
    got = onnxruntime.InferenceSession(exported).run(None, {"x": samples()[0].numpy()})[0]
    with torch.no_grad():
        wanted = result.model(samples()[0]).numpy()
    assert np.abs(got - wanted).max() < 0.05 * np.abs(wanted).max()


class Exported(nn.Linear):
    """Computes otherwise in a trace than when it runs, as a layer with a fast path of its own does."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            return nn.functional.linear(x, self.weight, self.bias)
        return x @ self.weight.t() + self.bias


def test_a_layer_that_runs_otherwise_than_traced_stays_in_float_when_ranges_are_known() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Exported(6, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.warns(SparsifyWarning, match="stay in float from now on"):
        result = quantize_model(model, [torch.randn(16, 6)], equalize=False, rounding="nearest")
    x = torch.randn(3, 6)
    assert [name for name, _ in quantized_layers(result.model)] == ["2"]
    with torch.no_grad():
        assert torch.equal(deployment_copy(result.model)(x), result.model(x))
