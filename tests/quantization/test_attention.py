"""MultiheadAttention: its projections are quantized layers, and what it computes stays what torch computes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor, nn

from sparsify import ScheduledModifierManager, analyze_model, get_weights_metadata
from sparsify.errors import ArgumentError, DataError
from sparsify.onnx.export import export_onnx
from sparsify.onnx.runtime import open_session, optimized_operators, run_session
from sparsify.onnx.verify import verify_onnx
from sparsify.quantization.attention import FORMS, Projection, QuantizedMultiheadAttention
from sparsify.quantization.conversion import quantizers
from sparsify.quantization.deployment import deployment_copy
from sparsify.quantization.fake_quantize import FakeQuantize
from sparsify.quantization.placement import make_plan
from sparsify.quantization.plan import QuantizationPlan, apply_plan, undo_plan
from sparsify.quantization.scheme import QuantizationSettings, Scheme
from tests.loops import quantized, train


class Mixed(nn.Module):
    """An attention whose query, key and value are the given of its inputs, with whatever arguments."""

    def __init__(self, order: tuple[int, int, int], arguments: dict[str, Any], **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, **options)
        self.order, self.arguments = order, arguments
        with torch.no_grad():
            for bias in (self.attention.in_proj_bias, self.attention.out_proj.bias):
                if bias is not None:
                    bias.normal_()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        query, key, value = (inputs[i] for i in self.order)
        y: tuple[Tensor, Tensor | None] = self.attention(query, key, value, **self.arguments)
        return y


def rounding_off(model: nn.Module) -> None:
    for quantizer in quantizers(model):
        quantizer.enabled = False
    for module in model.modules():
        if hasattr(module, "_wiring"):
            module._wiring.enabled = False


QUERIES, KEYS = 4, 5
PADDING = torch.tensor([[False] * KEYS, [False, False, False, True, True], [False] * 4 + [True]])
CAUSAL = torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(1)
CASES: dict[str, dict[str, Any]] = {
    "weights": {},
    "none": {"need_weights": False},
    "each head": {"average_attn_weights": False},
    "padding": {"key_padding_mask": PADDING},
    "float padding": {"key_padding_mask": torch.zeros(3, KEYS).masked_fill(PADDING, -1.5), "need_weights": False},
    "causal": {"attn_mask": CAUSAL, "need_weights": False, "is_causal": True},
    "float mask": {"attn_mask": torch.randn(QUERIES, KEYS, generator=torch.Generator().manual_seed(1))},
    "mask of each head": {"attn_mask": CAUSAL.expand(12, QUERIES, KEYS), "key_padding_mask": PADDING},
}
ALONE = {
    **CASES,
    "padding": {"key_padding_mask": PADDING[1]},
    "mask of each head": {"attn_mask": CAUSAL.expand(4, 4, 5)},
}
del ALONE["float padding"]

FORM: dict[str, tuple[tuple[int, int, int], tuple[int, ...], dict[str, Any], tuple[str, ...]]] = {
    "one tensor": ((0, 0, 0), (16,), {}, ("in_proj",)),
    "a memory": ((0, 1, 1), (16, 16), {}, ("q_proj", "kv_proj")),
    "all differ": ((0, 1, 2), (16, 16, 16), {}, ("q_proj", "k_proj", "v_proj")),
    "no bias": ((0, 1, 2), (16, 16, 16), {"bias": False}, ("q_proj", "k_proj", "v_proj")),
    "other widths": ((0, 1, 2), (16, 6, 10), {"kdim": 6, "vdim": 10}, ("q_proj", "k_proj", "v_proj")),
    "a memory of another width": ((0, 1, 1), (16, 6), {"kdim": 6, "vdim": 6}, ("q_proj", "k_proj", "v_proj")),
}
"""{what it is: (query, key and value among the inputs, the widths of these, options, the layers in front)}."""


def inputs_of(form: str, batch_first: bool = True, batch: int | None = 3) -> tuple[Tensor, ...]:
    """As many queries as keys where these are one tensor."""
    widths = FORM[form][1]
    lengths = [QUERIES if i == 0 and len(widths) > 1 else KEYS for i in range(len(widths))]
    made = [torch.randn(*([] if batch is None else [batch]), n, w) for n, w in zip(lengths, widths, strict=True)]
    return tuple(x if batch_first or batch is None else x.transpose(0, 1) for x in made)


def fitting(form: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with masks for as many queries as there are."""
    mask = arguments.get("attn_mask")
    if len(FORM[form][1]) > 1 or mask is None:
        return arguments
    return {**arguments, "attn_mask": torch.cat([mask, torch.zeros_like(mask[..., :1, :])], -2)}


def built(form: str, arguments: dict[str, Any] | None = None, batch_first: bool = True, **options: Any) -> Mixed:
    torch.manual_seed(0)
    order, _, own, _ = FORM[form]
    return Mixed(order, fitting(form, arguments or {}), batch_first=batch_first, **own, **options)


def layers_of(model: Mixed) -> tuple[str, ...]:
    return tuple(name for name, _ in model.attention.named_children() if name not in ("out_proj",))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", FORM)
def test_without_rounding_it_computes_what_torch_computes(form: str, case: str, batch_first: bool) -> None:
    model = built(form, CASES[case], batch_first)
    inputs = inputs_of(form, batch_first)
    _same_without_rounding(model, inputs, FORM[form][3])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("case", ALONE)
@pytest.mark.parametrize("form", ["one tensor", "a memory", "other widths"])
def test_without_rounding_and_without_a_batch_too(form: str, case: str, batch_first: bool) -> None:
    # Torch adds a dimension to each of the three, and no two are one tensor any more.
    _same_without_rounding(built(form, ALONE[case], batch_first), inputs_of(form, batch=None), FORMS[2])


def _same_without_rounding(model: Mixed, inputs: tuple[Tensor, ...], layers: tuple[str, ...]) -> None:
    expected, expected_weights = model(*inputs)
    plan = quantized(model, *inputs)
    assert type(model.attention) is QuantizedMultiheadAttention and not plan.left
    assert layers_of(model) == layers
    rounding_off(model)
    found, weights = model(*inputs)
    torch.testing.assert_close(found, expected)
    assert (weights is None) == (expected_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, expected_weights)
    gradients = []
    for y in (found, expected):
        model.zero_grad()
        y.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) == len(list(model.parameters()))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)


def train_outputs(model: nn.Module, inputs: tuple[Tensor, ...], steps: int = 4) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(*inputs)[0] - 1.0).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("form", FORM)
def test_what_was_trained_is_deployed_and_runs_in_integers(form: str, batch_first: bool, tmp_path: Path) -> None:
    model, inputs = built(form, {"need_weights": False}, batch_first), inputs_of(form, batch_first)
    keys, parameters = list(model.state_dict()), dict(model.named_parameters())
    before = {name: parameter.clone() for name, parameter in parameters.items()}
    float_y = model(*inputs)[0]
    quantized(model, *inputs)
    assert list(dict(model.named_parameters())) == list(parameters)
    assert all(one is other for one, other in zip(parameters.values(), model.parameters(), strict=True))
    assert set(keys) <= set(model.state_dict())
    torch.testing.assert_close(model(*inputs)[0], float_y, rtol=0.05, atol=0.05)
    train_outputs(model, inputs)
    assert all(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    trained = model(*inputs)[0]
    model.eval()
    with torch.no_grad():
        expected = model(*inputs)[0]
        torch.testing.assert_close(expected, trained, rtol=0.02, atol=0.02)
        assert torch.equal(deployment_copy(model)(*inputs)[0], expected)
    file = export_onnx(model, inputs, tmp_path / "attention.onnx", dynamic_batch=batch_first)
    layers = [f"attention.{name}/Gemm" for name in ("out_proj", *FORM[form][3])]
    assert sorted(file.quantized) == sorted(layers) and not file.floating
    assert optimized_operators(file)["QGemm"] == len(layers)
    found = verify_onnx(model, file.path, inputs)
    assert found.ok and found.unproven is None, str(found)


@pytest.mark.parametrize("form", ["a memory", "all differ", "other widths"])
def test_a_plan_makes_a_fresh_model_the_same_and_restore_takes_all_back(form: str) -> None:
    model, inputs = built(form), inputs_of(form)
    keys = list(model.state_dict())
    plan = quantized(model, *inputs)
    assert QuantizationPlan.from_state(plan.to_state()) == plan
    train_outputs(model, inputs)
    fresh = built(form)
    apply_plan(fresh, QuantizationPlan.from_state(plan.to_state()))
    fresh.load_state_dict(model.state_dict())
    model.eval()
    with torch.no_grad():
        expected = model(*inputs)[0]
        for other in (fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other.eval()(*inputs)[0], expected)
            # Its own parameters, not those of what it was copied from.
            name = "q_proj_weight" if form == "other widths" else "in_proj_weight"
            getattr(other.attention, name).zero_()
            assert not other.attention.q_proj.weight.any() and getattr(model.attention, name).any()
    undo_plan(model)
    assert list(model.state_dict()) == keys and type(model.attention) is nn.MultiheadAttention
    assert not any(isinstance(module, (FakeQuantize, Projection)) for module in model.modules())
    model(*inputs)


def test_pruned_weights_stay_pruned_and_are_zeros_in_the_file(tmp_path: Path) -> None:
    model, inputs = built("a memory", {"need_weights": False}), inputs_of("a memory")
    manager = ScheduledModifierManager.from_yaml(
        "modifiers:\n  - !ConstantPruningModifier\n    start_epoch: 0.0\n    end_epoch: 2.0\n"
        "    params: [attention.in_proj_weight]\n  - !QuantizationModifier\n    start_epoch: 0.0\n"
    )
    with torch.no_grad():
        model.attention.in_proj_weight[::2] = 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    manager.modify(model, optimizer, steps_per_epoch=2, sample_inputs=inputs)
    for _ in range(4):
        optimizer.zero_grad()
        model(*inputs)[0].square().mean().backward()
        optimizer.step()
    manager.finalize(model)
    assert not model.attention.in_proj_weight[::2].any() and model.attention.in_proj_weight[1::2].all()
    weights = get_weights_metadata(export_onnx(model.eval(), inputs, tmp_path / "pruned.onnx").path, weight_threshold=0)
    assert [weights[f"attention.{name}.weight"].zero_rows for name in ("q_proj", "kv_proj")] == [0.5, 0.5]


# Of torch: it makes an instance of an autograd function while it compiles.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("form", ["one tensor", "a memory", "other widths"])
def test_eval_mode_compiled_code_and_assigned_parameters_have_gradients(form: str) -> None:
    model, inputs = built(form), inputs_of(form)
    quantized(model, *inputs)
    model(*inputs)[0].square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    other = copy.deepcopy(model)
    torch.compile(other, backend="eager", fullgraph=True)(*inputs)[0].square().sum().backward()
    assigned = copy.deepcopy(model)
    assigned.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    assigned(*inputs)[0].square().sum().backward()
    for one in (other, assigned):
        for name, parameter in one.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=0.05, atol=0.1)
    model.eval()(*inputs)[0].square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("form", ["a memory", "other widths"])
def test_weights_that_are_not_finite_are_not_deployed(form: str) -> None:
    model, inputs = built(form), inputs_of(form)
    quantized(model, *inputs)
    model(*inputs)
    name = "k_proj_weight" if form == "other widths" else "in_proj_weight"
    with torch.no_grad():
        getattr(model.attention, name)[3, 2] = float("nan")
    with pytest.raises(DataError, match=rf"attention\.{name} holds NaN"):
        deployment_copy(model)


SCHEMES: dict[str, dict[str, Any]] = {
    "learned steps": {"weights": {"observer": "lsq"}, "input_activations": {"observer": "lsq"}},
    "one scale": {"weights": {"strategy": "tensor"}},
    "weights of four bits": {"weights": {"num_bits": 4}, "input_activations": None},
    "blocks": {"weights": {"num_bits": 4, "strategy": "block", "block_size": 16}, "input_activations": None},
    "outputs": {"output_activations": {}},
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_reaches_the_rows_of_a_packed_weight(scheme: str) -> None:
    model, inputs = built("a memory"), inputs_of("a memory")
    keys = list(model.state_dict())
    plan = quantized(model, *inputs, settings=QuantizationSettings(scheme=Scheme.model_validate(SCHEMES[scheme])))
    assert {layer.name.rpartition(".")[2] for layer in plan.layers} == {"q_proj", "kv_proj", "out_proj"}
    train_outputs(model, inputs)
    model.eval()
    with torch.no_grad():
        deployed = deployment_copy(model)
        assert torch.equal(deployed(*inputs)[0], model(*inputs)[0])
        assert deployed.attention.kv_proj.weight_int8.shape == (32, 16)
    undo_plan(model)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("form", FORM)
def test_weights_in_float_stay_where_they_are(form: str) -> None:
    """`weights: null`: what the layers read is quantized, and the rows are those of the parameter, deployed too."""
    model, inputs = built(form), inputs_of(form)
    quantized(model, *inputs, settings=QuantizationSettings.of({"weights": None}))
    train_outputs(model, inputs)
    model.eval()
    with torch.no_grad():
        expected = model(*inputs)[0]
        deployed = deployment_copy(model)
        assert torch.equal(deployed(*inputs)[0], expected)
    assert not [name for name in deployed.state_dict() if "int8" in name]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORM)
def test_weights_in_float_are_written_as_they_are(form: str, tmp_path: Path) -> None:
    model, inputs = built(form), inputs_of(form)
    quantized(model, *inputs, settings=QuantizationSettings.of({"weights": None}))
    train_outputs(model, inputs)
    export_onnx(model.eval(), inputs, tmp_path / "model.onnx")
    found = verify_onnx(model, tmp_path / "model.onnx", inputs)
    assert found.ok and found.unproven is None, str(found)


@pytest.mark.parametrize("form", FORM)
def test_an_analysis_finds_the_rows_of_each_layer(form: str) -> None:
    model, inputs = built(form), inputs_of(form)
    parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}
    floating = analyze_model(model, inputs)
    assert all(layer.why_not_quantizable == "" for layer in floating.layers if layer.weight)
    quantized(model, *inputs)
    found = {layer.name: layer for layer in analyze_model(model, inputs).layers if layer.weight}
    assert set(found) == {f"attention.{name}" for name in (*FORM[form][3], "out_proj")}
    assert all(layer.bits == 8 and layer.shared_with is None for layer in found.values())
    assert sum(layer.parameters for layer in found.values()) == sum(parameters.values())
    assert sum(layer.macs for layer in found.values()) == sum(layer.macs for layer in floating.layers if layer.weight)
    metadata = get_weights_metadata(model, weight_threshold=0)
    assert {name: one.bits for name, one in metadata.items()} == {
        name: 8 if "weight" in name else 32 for name in parameters
    }


@pytest.mark.parametrize("form", ["one tensor", "a memory"])
def test_a_call_with_other_tensors_than_traced_computes_the_same_function(form: str) -> None:
    model = built(form, {"need_weights": False})
    sample, inputs = inputs_of(form), inputs_of("all differ")
    model.attention(*inputs)
    expected = model.attention(*inputs, need_weights=False)[0]
    quantized(model, *sample)
    model.attention(*inputs)
    torch.testing.assert_close(model.attention(*inputs)[0], expected, rtol=0.05, atol=0.05)
    rounding_off(model)
    torch.testing.assert_close(model.attention(*inputs)[0], expected)


BAD: dict[str, tuple[tuple[tuple[int, ...], ...], dict[str, Any], str]] = {
    "a batch": (((3, 4, 16), (2, 5, 16), (2, 5, 16)), {}, r"\(3, 4, 16\), \(2, 5, 16\), \(2, 5, 16\)\] do not fit"),
    "lengths": (((3, 4, 16), (3, 5, 16), (3, 6, 16)), {}, "do not fit together"),
    "widths": (((3, 4, 16), (3, 5, 8), (3, 5, 16)), {}, "16, 16 and 16 channels"),
    "dimensions": (((3, 4, 16), (5, 16), (5, 16)), {}, "three dimensions each, or two"),
    "a mask": (
        ((3, 4, 16), (3, 5, 16), (3, 5, 16)),
        {"attn_mask": torch.zeros(1, 5)},
        r"\(1, 5\); it is to be \(4, 5\)",
    ),
    "a mask of heads": (((3, 4, 16), (3, 5, 16), (3, 5, 16)), {"attn_mask": torch.zeros(1, 4, 5)}, r"\(12, 4, 5\) for"),
    "padding": (((3, 4, 16), (3, 5, 16), (3, 5, 16)), {"key_padding_mask": torch.zeros(1, 5)}, r"the shape \(1, 5\)"),
    "a hint": (((3, 4, 16), (3, 5, 16), (3, 5, 16)), {"is_causal": True}, "there is none; give both"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_torch_refuses_is_refused_before_anything_is_observed(case: str) -> None:
    shapes, arguments, message = BAD[case]
    model = built("all differ")
    given = [torch.randn(shape) for shape in shapes]
    with pytest.raises((RuntimeError, AssertionError)):
        model.attention(*given, **arguments)
    quantized(model, *inputs_of("all differ"))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ArgumentError, match=message):
        model.attention(*given, **arguments)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def test_an_encoder_of_torch_is_quantized_whole_and_runs_in_integers(tmp_path: Path) -> None:
    model, x = encoder(), torch.randn(3, 5, 16)
    plan = quantized(model, x)
    assert [layer.name for layer in plan.layers if ".self_attn." in layer.name] == [
        f"layers.{i}.self_attn.{name}" for i in range(2) for name in ("in_proj", "out_proj")
    ]
    assert not plan.left
    before = model.layers[0].self_attn.in_proj_weight.clone()
    losses = train(model, x, 6)
    assert losses[-1] < losses[0] and not torch.equal(before, model.layers[0].self_attn.in_proj_weight)
    file = export_onnx(model.eval(), x, tmp_path / "encoder.onnx")
    assert len(file.quantized) == 8 and not file.floating
    found = optimized_operators(file)
    assert found["QGemm"] == 8
    with torch.no_grad():
        expected = model(x)
    output = run_session(open_session(file.path), {"src": x.numpy()})["output"]
    torch.testing.assert_close(torch.tensor(output), expected, rtol=1e-4, atol=1e-4)
    assert verify_onnx(model, file.path, x).ok


def test_its_plan_makes_a_fresh_model_the_same_and_restore_takes_it_back() -> None:
    model, x = encoder(), torch.randn(3, 5, 16)
    keys, parameters = list(model.state_dict()), dict(model.named_parameters())
    plan = quantized(model, x)
    assert dict(model.named_parameters()).items() >= parameters.items()
    train(model, x, 2)
    fresh = encoder()
    apply_plan(fresh, QuantizationPlan.from_state(plan.to_state()))
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh.eval()(x), model.eval()(x))
    copied = copy.deepcopy(model)
    assert copied.layers[0].self_attn.in_proj.weight is copied.layers[0].self_attn.in_proj_weight
    assert not any(key.endswith("in_proj.weight") for key in model.state_dict())
    undo_plan(model)
    assert list(model.state_dict()) == keys
    assert all(type(module) is not QuantizedMultiheadAttention for module in model.modules())
    assert not any(isinstance(module, FakeQuantize) for module in model.modules())


def test_layers_of_a_decoder_read_their_memory_through_one_quantizer() -> None:
    torch.manual_seed(0)
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, batch_first=True), 3)
    inputs = torch.randn(2, 4, 16), torch.randn(2, 5, 16)
    plan = quantized(model, *inputs)
    assert not plan.left and len(plan.layers) == 3 * (2 + 3 + 2)
    memory = [site for site in plan.sites if site.module == "layers.0.multihead_attn.kv_proj"]
    assert [site.readers for site in memory] == [tuple(f"layers.{i}.multihead_attn.kv_proj" for i in (1, 2))]


def test_padding_makes_no_nested_tensors_of_what_quantized_layers_read() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model, x = nn.TransformerEncoder(layer, 2), torch.randn(3, 5, 16)
    quantized(model, x)
    model(x)
    model.eval()
    with torch.no_grad():
        found = model(x, src_key_padding_mask=PADDING)
        model.enable_nested_tensor = False
        expected = torch.cat([model(x[i : i + 1, : (~PADDING[i]).sum()]) for i in range(3)], 1)
    torch.testing.assert_close(found[~PADDING], expected[0], rtol=0.02, atol=0.02)
    undo_plan(model)
    assert model.use_nested_tensor is True and type(model) is nn.TransformerEncoder


class Shared(nn.Module):
    """One attention, called twice: in one way, or in two."""

    def __init__(self, alike: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.alike = alike

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.attention(x, y, y, need_weights=False)[0]
        return self.attention(x, *((y, y) if self.alike else (x, x)), need_weights=False)[0]


def test_an_attention_that_is_called_twice_in_one_way_is_quantized(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = Shared(True), (torch.randn(2, 4, 16), torch.randn(2, 5, 16))
    plan = quantized(model, *inputs)
    assert not plan.left and len(plan.layers) == 3
    expected = model(*inputs)
    model.eval()
    torch.testing.assert_close(model(*inputs), expected, rtol=0.02, atol=0.02)
    file = export_onnx(model, inputs, tmp_path / "shared.onnx")
    assert not file.floating and verify_onnx(model, file.path, inputs).ok


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Shared(False)
        self.zero = nn.MultiheadAttention(16, 2, batch_first=True, add_zero_attn=True)
        self.biased = nn.MultiheadAttention(16, 2, batch_first=True, add_bias_kv=True)
        self.rnn = nn.RNN(16, 16, batch_first=True)
        self.pruned = nn.MultiheadAttention(16, 2, batch_first=True)
        nn.utils.prune.identity(self.pruned, "in_proj_weight")
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(self.rnn(x)[0], x)
        for module in (self.zero, self.biased, self.pruned):
            y = module(y, x, x)[0]
        z: Tensor = self.head(y)
        return z


def test_what_stays_in_float_is_named_with_its_reason() -> None:
    model, x = Odd(), torch.randn(2, 4, 16)
    plan = quantized(model, x)
    why = {left.what: left.why for left in plan.left}
    assert "one tensor in some of its calls" in why["attention.attention"] and "RNN" in why["rnn"]
    assert "add_zero_attn" in why["zero"] and "bias_k" in why["biased"] and "recomputed" in why["pruned"]
    assert "in float: rnn: RNN is written step by step" in str(plan)
    assert [layer.name for layer in plan.layers] == ["head"]
    assert all(left.unasked for left in plan.left)
    model(x)


@pytest.mark.parametrize("name", ["layers.0.self_attn", "MultiheadAttention", "layers.0"])
def test_attention_is_left_out_where_the_recipe_says_so(name: str) -> None:
    model, x = encoder(), torch.randn(3, 5, 16)
    plan = quantized(model, x, settings=QuantizationSettings(ignore=(name,)))
    assert not any(layer.name.startswith("layers.0.self_attn") for layer in plan.layers)
    assert any(left.what == "layers.0.self_attn" and left.why == "left out by the recipe" for left in plan.left)
    assert model.layers[0].self_attn.in_proj_weight is not None
    model(x)


def test_its_scheme_can_be_overridden() -> None:
    from sparsify.model.trace import trace

    model, x = encoder(), torch.randn(3, 5, 16)
    four = Scheme.model_validate({"weights": {"num_bits": 4}})
    plan = make_plan(model, trace(model, (x,)), QuantizationSettings(overrides={"layers.1.self_attn": four}))
    bounds = {layer.name: layer.q_max for layer in plan.layers}
    assert bounds["layers.1.self_attn.in_proj"] == bounds["layers.1.self_attn.out_proj"] == 7
    assert bounds["layers.0.self_attn.in_proj"] == 127
