"""What layers compute, against torch's own counter of FLOPs and figures worked out by hand."""

from __future__ import annotations

import copy
import json
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sparsify import quantize_model
from sparsify.analysis import ModelAnalysis, analyze_model
from sparsify.analysis.macs import CountedOperand, einsum_macs, operation_cost
from sparsify.errors import ArgumentError, DataError, TargetError
from tests.zoo.architectures import ARCHITECTURES

# Those that build without a download in a second or two each.
QUICK = [
    *("VGG with BatchNorm", "U-Net", "Inception-like", "squeeze and excite", "norms of all kinds", "WaveNet-like"),
    *("LSTM tagger", "attention by hand", "tied autoencoder", "tied embeddings", "two inputs", "nn.TransformerEncoder"),
    *("ResNet-18", "MobileNetV2", "ShuffleNetV2", "Swin of torchvision", "ViT", "ConvNeXt", "MLP-Mixer"),
    *("BERT", "GPT-2", "ALBERT, one layer for all", "SegFormer", "T5 encoder", "Llama with grouped queries"),
]
REST = [name for name in ARCHITECTURES if name not in QUICK]


def counted_by_torch(model: nn.Module, inputs: Any) -> int:
    """FLOPs are 2 MACs. The counter knows the pieces that attention and recurrent layers are made of, not the
    operators that the CPU has for them as a whole: these are turned off."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain = torch.backends.mkldnn.flags(enabled=False)
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), plain, FlopCounterMode(display=False) as counter:
                _ = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        # Leaving the flags sets this too, and warns.
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in REST)])
def test_macs_equal_the_counter_of_torch(name: str) -> None:
    architecture = ARCHITECTURES[name]
    if architecture.library is not None:
        pytest.importorskip(architecture.library)
    torch.manual_seed(0)
    model, inputs = architecture.build().eval(), architecture.inputs()
    analysis = analyze_model(model, inputs)
    assert analysis.macs == counted_by_torch(model, inputs)
    assert analysis.unknown == ()
    assert analysis.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert len({layer.name for layer in analysis.layers}) == len(analysis.layers)
    named = dict(model.named_parameters(remove_duplicate=False))
    assert all(layer.weight in named for layer in analysis.layers if layer.weight is not None)
    assert all(layer.quantizable or layer.why_not_quantizable for layer in analysis.layers)


def test_known_totals() -> None:
    torchvision = pytest.importorskip("torchvision")
    image = torch.zeros(1, 3, 224, 224)
    # Published: 1.81 and 0.30 billion.
    assert analyze_model(torchvision.models.resnet18(), image).macs == 1_814_073_344
    assert analyze_model(torchvision.models.mobilenet_v2(), image).macs == 300_774_272


@pytest.mark.parametrize(
    ("layer", "shape", "macs", "groups"),
    [
        (nn.Conv2d(3, 8, 3), (1, 3, 32, 32), 194_400, 1),
        (nn.Conv2d(8, 8, 3, groups=8), (1, 8, 32, 32), 64_800, 8),
        (nn.Conv2d(8, 16, 3, groups=4), (2, 8, 10, 10), 2 * 16 * 64 * 2 * 9, 4),
        (nn.Conv1d(4, 6, 5, stride=2), (3, 4, 21), 3 * 6 * 9 * 4 * 5, 1),
        (nn.Conv3d(2, 4, 3), (1, 2, 5, 5, 5), 4 * 27 * 2 * 27, 1),
        (nn.Conv2d(3, 8, 3), (3, 32, 32), 194_400, 1),
        (nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2), (1, 6, 7, 7), 6 * 49 * 2 * 9, 2),
        (nn.ConvTranspose1d(6, 4, 4), (2, 6, 7), 2 * 6 * 7 * 4 * 4, 1),
        (nn.Linear(10, 7, bias=False), (2, 3, 10), 2 * 3 * 70, 1),
        (nn.Linear(10, 7), (10,), 70, 1),
    ],
)
def test_one_layer(layer: nn.Module, shape: tuple[int, ...], macs: int, groups: int) -> None:
    (found,) = analyze_model(layer, torch.zeros(shape)).layers
    assert (found.macs, found.groups, found.calls) == (macs, groups, 1)
    assert found.weight == "weight"
    assert found.type == type(layer).__name__
    assert found.input_shapes == (shape,)
    assert found.output_shape == tuple(layer(torch.zeros(shape)).shape)
    assert found.parameters == sum(parameter.numel() for parameter in layer.parameters())
    assert found.weights == layer.weight.numel()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("packed", [False, True])
def test_recurrent_layers_by_formula(kind: type[nn.RNNBase], packed: bool) -> None:
    gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind]

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = kind(6, 5, num_layers=2, bidirectional=True, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            if packed:
                x = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([7, 4]), batch_first=True)
            return self.layer(x)[1]

    with warnings.catch_warnings():
        # The tracer's, about the list of its weights that a recurrent layer keeps.
        warnings.simplefilter("ignore")
        analysis = analyze_model(Reader(), torch.zeros(2, 7, 6))
    steps = 11 if packed else 14
    found = {layer.name: layer.macs for layer in analysis.layers}
    assert found["layer.weight_ih_l0"] == steps * gates * 5 * 6
    assert found["layer.weight_hh_l1_reverse"] == steps * gates * 5 * 5
    assert analysis.macs == steps * gates * 5 * 2 * ((6 + 5) + (10 + 5))
    assert sum(layer.parameters for layer in analysis.layers) == analysis.parameters
    # Packing takes lengths for numbers.
    why = analysis.layer("layer.weight_ih_l0").why_not_quantizable
    assert "cannot be traced" in why if packed else ("step by step" in why) == (kind is nn.RNN)


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bij,bjk->bik", [(2, 3, 4), (2, 4, 5)]),
        ("bhid,bhjd->bhij", [(2, 3, 4, 5), (2, 3, 6, 5)]),
        ("...ij,jk->...ik", [(2, 3, 4, 5), (5, 7)]),
        ("i,j->ij", [(3,), (4,)]),
        ("i,i", [(3,), (3,)]),
        ("ij,jk,kl->il", [(2, 3), (3, 4), (4, 5)]),
        ("bi,bi->b", [(2, 3), (2, 3)]),
        ("ij->ji", [(2, 3)]),
    ],
)
def test_einsum_equals_the_counter_of_torch(equation: str, shapes: list[tuple[int, ...]]) -> None:
    operands = [torch.zeros(shape) for shape in shapes]
    with FlopCounterMode(display=False) as counter, torch.backends.opt_einsum.flags(enabled=False):
        torch.einsum(equation, *operands)
    assert einsum_macs(equation, shapes) == counter.get_total_flops() // 2


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 9))
def test_groups_divide_once(per_group: int, groups: int, kernel: int, size: int) -> None:
    channels, side = per_group * groups, size + kernel - 1
    x, weight = CountedOperand((1, channels, side, side)), CountedOperand((channels, per_group, kernel, kernel))
    cost = operation_cost("conv2d", [x, weight], (1, channels, size, size))
    assert cost is not None
    assert cost.macs == groups * (per_group * per_group * kernel**2 * size**2)
    assert cost.groups == groups


class Products(nn.Module):
    """Every way to multiply two activations, twice each."""

    def forward(self, x: Tensor) -> Tensor:
        y = x @ x.transpose(1, 2)
        y = y @ y
        y = torch.baddbmm(y, y, y) + torch.einsum("bij,bkj->bik", y, y)
        return F.scaled_dot_product_attention(y, y, y) * 2 + y.softmax(-1)


def test_functions_are_layers_of_their_own() -> None:
    analysis = analyze_model(nn.Sequential(Products(), nn.ReLU()), torch.randn(2, 4, 6))
    found = {layer.name: (layer.type, layer.macs) for layer in analysis.layers}
    assert found == {
        "0.matmul": ("matmul", 2 * 16 * 6),
        "0.matmul_1": ("matmul", 2 * 16 * 4),
        "0.baddbmm": ("baddbmm", 2 * 16 * 4),
        "0.einsum": ("einsum", 2 * 16 * 4),
        "0.scaled_dot_product_attention": ("scaled_dot_product_attention", 2 * 2 * 16 * 4),
    }
    assert all(layer.weight is None and not layer.prunable and not layer.quantizable for layer in analysis.layers)
    assert analysis.unknown == ()


def test_attention_whose_values_are_narrower_than_its_keys_multiplies_less() -> None:
    class Attention(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(query, key, value)

    given = (torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 4))
    analysis = analyze_model(Attention(), given)
    assert analysis.macs == 2 * 3 * (5 * 8 * 7 + 5 * 7 * 4)
    assert analysis.macs == counted_by_torch(Attention(), given)


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.inv(x) @ torch.cdist(x, x)


def test_what_multiplies_in_an_unknown_way_is_listed_and_never_zero() -> None:
    analysis = analyze_model(nn.Sequential(Unknown()), torch.eye(4).repeat(2, 1, 1))
    assert {one.operator for one in analysis.unknown} == {"linalg_inv", "cdist"}
    assert {one.where for one in analysis.unknown} == {("0",)}
    assert analysis.macs == 2 * 64
    assert "MACs at least" in str(analysis)
    assert "not counted: linalg_inv, called 1 times, in '0'" in str(analysis)


class Shared(nn.Module):
    """One layer called twice, one weight in two layers, and one used as a function as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.twice = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.twice(self.twice(self.embed(ids)))
        return self.head(x) + F.linear(x, self.embed.weight)


def test_shared_weights_are_counted_where_they_come_first() -> None:
    model = Shared()
    analysis = analyze_model(model, torch.zeros(2, 3, dtype=torch.int64))
    twice, head, function = analysis.layer("twice"), analysis.layer("head"), analysis.layer("linear")
    assert (twice.calls, twice.macs) == (2, 2 * 6 * 64)
    assert (head.weight, head.shared_with, head.weights, head.parameters) == ("embed.weight", "embed", 0, 20)
    assert (function.weight, function.shared_with, function.macs) == ("embed.weight", "embed", 6 * 8 * 20)
    assert sum(layer.parameters for layer in analysis.layers) == analysis.parameters
    assert analysis.layer("embed").macs == 0


class Doubled(nn.ConvTranspose3d):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        y: Tensor = super().forward(input, output_size) + super().forward(2 * input, output_size)
        return y


def test_why_a_layer_cannot_be_pruned_or_quantized() -> None:
    model = nn.Sequential(
        nn.Linear(4, 4),
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        Doubled(1, 1, 1),
    )
    model[0].weight.data[0, 0] = float("nan")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model
            self.idle = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner[2](self.inner[:2](x).reshape(1, 1, 1, 2, 2))

    analysis = analyze_model(Model(), torch.zeros(1, 4))
    assert "holds NaN" in analysis.layer("inner.0").why_not_prunable
    assert analysis.layer("inner.0").quantizable
    assert "recomputed" in analysis.layer("inner.1").why_not_prunable
    assert "recomputed" in analysis.layer("inner.1").why_not_quantizable
    assert analysis.layer("inner.1").weights == 16
    assert analysis.layer("inner.1").macs == 16
    assert analysis.layer("inner.2").prunable
    assert "not the one of its class" in analysis.layer("inner.2").why_not_quantizable
    idle = analysis.layers[-1]
    assert (idle.name, idle.calls, idle.macs) == ("idle", 0, 0)
    assert idle.why_not_prunable == idle.why_not_quantizable == "it is not computed on the sample inputs"


def test_quantizable_is_what_quantization_does() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten())
    model.append(nn.Linear(4 * 16, 3))
    x = torch.randn(16, 3, 8, 8)
    before = analyze_model(model, x)
    quantized = quantize_model(model, [x])
    after = analyze_model(quantized.model, x)
    assert {layer.name for layer in before.layers if layer.quantizable} == {one.layer for one in quantized.layers}
    assert {layer.bits for layer in before.layers} == {32}
    assert {layer.bits for layer in after.layers} == {8}
    assert [layer.name for layer in after.layers] == [layer.name for layer in before.layers]
    assert [layer.type for layer in after.layers] == [layer.type for layer in before.layers]
    assert after.macs == before.macs


def test_attention_has_the_same_names_before_and_after_quantization() -> None:
    torch.manual_seed(0)
    architecture = ARCHITECTURES["nn.TransformerEncoder"]
    model, inputs = architecture.build().eval(), architecture.inputs()
    before = analyze_model(model, inputs)
    after = analyze_model(quantize_model(model, [inputs], least_samples=2).model, inputs)
    weighted = [layer.name for layer in before.layers if layer.weight]
    assert [layer.name for layer in after.layers if layer.weight] == weighted
    assert "0.layers.0.self_attn.in_proj" in weighted
    assert {layer.bits for layer in after.layers if layer.weight and layer.quantizable} == {8}
    assert after.macs == before.macs


def test_sparsity_counts_zeros_and_a_row_that_sums_to_zero_is_none() -> None:
    layer = nn.Linear(4, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -1.0, 2.0, -2.0], [0.0, 0.0, 0.0, 3.0]]))
    analysis = analyze_model(layer, torch.zeros(1, 4))
    assert analysis.layers[0].sparsity == analysis.sparsity == 3 / 8


class Branches(nn.Module):
    """Control flow that depends on values: no trace. It counts its calls and draws random numbers, in eval mode too."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, groups=1)
        self.lstm = nn.GRU(4, 5)
        self.attention = nn.MultiheadAttention(5, 1)
        self.out = nn.Linear(5, 2)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        y = self.conv(x) + 0 * torch.randn(())
        y = y if y.sum() > 1e6 else y.relu()
        z = self.lstm(y.mean(3).permute(2, 0, 1))[0]
        return self.out(self.attention(z, z, z)[0])


def test_a_model_that_cannot_be_traced_is_watched() -> None:
    torch.manual_seed(0)
    model, x = Branches(), torch.randn(2, 3, 6, 6)
    analysis = analyze_model(model, x)
    with torch.no_grad():
        y = model.conv(x).relu().mean(3).permute(2, 0, 1)
        z = model.lstm(y)[0]
    expected = (
        analyze_model(model.conv, x).macs
        + analyze_model(model.lstm, y).macs
        + analyze_model(model.attention, (z, z, z)).macs
        + analyze_model(model.out, z).macs
    )
    assert analysis.macs == expected
    assert analysis.layer("conv").weight == "conv.weight"
    assert analysis.layer("lstm.weight_hh_l0").macs == 8 * 15 * 5
    assert {"attention.in_proj", "attention.out_proj"} <= {layer.name for layer in analysis.layers}
    assert "cannot be traced" in analysis.layer("conv").why_not_quantizable
    assert analysis.layer("conv").prunable


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.out(x) @ x.bfloat16().t()


def test_programs_within_the_program_are_watched() -> None:
    analysis = analyze_model(Autocast(), torch.zeros(3, 4))
    assert analysis.macs == 3 * 16 + 3 * 3 * 4
    assert analysis.layer("out").weight == "out.weight"


@pytest.mark.parametrize("model", [Branches(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())])
def test_nothing_is_changed(model: nn.Module) -> None:
    model.train()
    next(model.children()).eval()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    x = torch.randn(2, 3, 6, 6)
    state, versions = torch.get_rng_state(), [parameter._version for parameter in model.parameters()]
    analyze_model(model, x)
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert versions == [parameter._version for parameter in model.parameters()]
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_wrapped_models_have_clean_names() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    plain = analyze_model(model, torch.zeros(2, 4))
    with warnings.catch_warnings():
        # Importing the compiler warns of what torch itself uses.
        warnings.simplefilter("ignore")
        compiled = torch.compile(model)
    for wrapped in (nn.DataParallel(model), compiled):
        assert analyze_model(wrapped, torch.zeros(2, 4)) == plain


def test_inputs_in_every_form() -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor, *, scale: float = 1.0) -> Tensor:
            return a @ b * scale

    a, b = torch.zeros(2, 3), torch.zeros(3, 4)
    for inputs, more in (((a, b), {"scale": 2.0}), ({"a": a, "b": b}, None), ([a], {"b": b}), (a, {"b": b})):
        analysis = analyze_model(Two(), inputs, sample_kwargs=more)
        assert (analysis.macs, analysis.batch_size) == (24, 2)
    assert analyze_model(Two(), sample_kwargs={"a": a, "b": b}).macs == 24


def test_half_precision_is_16_bits() -> None:
    (layer,) = analyze_model(nn.Linear(4, 4).bfloat16(), torch.zeros(1, 4, dtype=torch.bfloat16)).layers
    assert layer.bits == 16


def test_a_model_that_fails_says_where() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x)

    with pytest.raises(ArgumentError, match=r"Model fails on these inputs in first\.1: RuntimeError"):
        analyze_model(Model(), torch.zeros(1, 4))
    with pytest.raises(ArgumentError, match="model is a int"):
        analyze_model(3, torch.zeros(1))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="do not fit Linear"):
        analyze_model(nn.Linear(1, 1), ())


def test_an_analysis_goes_through_json() -> None:
    analysis = analyze_model(nn.Sequential(Unknown(), Products()), torch.eye(4).repeat(2, 1, 1))
    assert ModelAnalysis.from_json(analysis.to_json()) == analysis
    for text in ("", "[]", "{}", '{"format": 2}', json.dumps({**json.loads(analysis.to_json()), "more": 1})):
        with pytest.raises(DataError, match="no analysis of a model"):
            ModelAnalysis.from_json(text)
    with pytest.raises(TargetError, match=r"has no layer '1.matmull'. Did you mean '1.matmul'"):
        analysis.layer("1.matmull")


def test_an_analysis_is_a_table() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 900, 2))
    with torch.no_grad():
        model[0].weight[:4] = 0
    lines = str(analyze_model(model, torch.zeros(1, 3, 32, 32))).splitlines()
    assert lines[0] == "Sequential, batch 1: 2 layers, 14,626 parameters, 208,800 MACs, 0.7% zeros"
    assert lines[1].split() == ["Layer", "Type", "Output", "Parameters", "MACs", "Share", "Zeros", "Bits", "Note"]
    assert lines[2].split() == ["0", "Conv2d", "1x8x30x30", "224", "194,400", "93.1%", "50.0%", "32", "-"]
