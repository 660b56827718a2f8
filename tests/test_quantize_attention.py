"""MultiheadAttention: its projections are quantized layers, and what it computes stays what torch computes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_models import quantized, train
from torch import Tensor, nn

from sparsify.export import export_onnx
from sparsify.quantize.fake import FakeQuantize
from sparsify.quantize.layers import QuantizedMultiheadAttention, quantizers, restore
from sparsify.quantize.placement import make_plan
from sparsify.quantize.plan import Plan, apply_plan
from sparsify.quantize.scheme import Scheme, Settings
from sparsify.runtime import open_session, optimized_operators, run_session
from sparsify.verify import verify_onnx


class Mixed(nn.Module):
    """Self-attention with whatever arguments."""

    def __init__(self, batch_first: bool = True, **arguments: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=batch_first)
        self.arguments = arguments

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        y: tuple[Tensor, Tensor | None] = self.attention(x, x, x, **self.arguments)
        return y


def rounding_off(model: nn.Module) -> None:
    for quantizer in quantizers(model):
        quantizer.enabled = False
    for module in model.modules():
        if hasattr(module, "_wiring"):
            module._wiring.largest = 0


PADDING = torch.tensor([[False] * 5, [False, False, False, True, True], [False] * 4 + [True]])
CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)
CASES: dict[str, dict[str, Any]] = {
    "weights": {},
    "none": {"need_weights": False},
    "each head": {"average_attn_weights": False},
    "padding": {"key_padding_mask": PADDING},
    "causal": {"attn_mask": CAUSAL, "need_weights": False, "is_causal": True},
    "float mask": {"attn_mask": torch.randn(5, 5, generator=torch.Generator().manual_seed(1))},
    "mask of each head": {"attn_mask": CAUSAL.expand(12, 5, 5), "key_padding_mask": PADDING},
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_without_rounding_it_computes_what_torch_computes(case: str, batch_first: bool) -> None:
    torch.manual_seed(0)
    model = Mixed(batch_first, **CASES[case])
    x = torch.randn((3, 5, 16) if batch_first else (5, 3, 16))
    expected, expected_weights = model(x)
    quantized(model, x)
    assert type(model.attention) is QuantizedMultiheadAttention
    rounding_off(model)
    found, weights = model(x)
    torch.testing.assert_close(found, expected)
    assert (weights is None) == (expected_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, expected_weights)


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
    apply_plan(fresh, Plan.from_state(plan.to_state()))
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh.eval()(x), model.eval()(x))
    copied = copy.deepcopy(model)
    assert copied.layers[0].self_attn.in_proj.weight is copied.layers[0].self_attn.in_proj_weight
    restore(model)
    assert list(model.state_dict()) == keys
    assert all(type(module) is not QuantizedMultiheadAttention for module in model.modules())
    assert not any(isinstance(module, FakeQuantize) for module in model.modules())


class Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(x)
        return self.head(self.attention(x, y, y, need_weights=False)[0])


def test_what_stays_in_float_is_named_with_its_reason() -> None:
    model, x = Cross(), torch.randn(2, 4, 8)
    plan = quantized(model, x)
    why = {left.what: left.why for left in plan.left}
    assert "not one tensor" in why["attention"] and "LSTM" in why["lstm"]
    assert "in float: lstm: LSTM computes its steps" in str(plan)
    assert [layer.name for layer in plan.layers] == ["head"]


@pytest.mark.parametrize("name", ["layers.0.self_attn", "MultiheadAttention", "layers.0"])
def test_attention_is_left_out_where_the_recipe_says_so(name: str) -> None:
    model, x = encoder(), torch.randn(3, 5, 16)
    plan = quantized(model, x, settings=Settings(ignore=(name,)))
    assert not any(layer.name.startswith("layers.0.self_attn") for layer in plan.layers)
    assert any(left.what == "layers.0.self_attn" and left.why == "left out by the recipe" for left in plan.left)
    assert model.layers[0].self_attn.in_proj_weight is not None
    model(x)


def test_its_scheme_can_be_overridden() -> None:
    from sparsify.graph import trace

    model, x = encoder(), torch.randn(3, 5, 16)
    four = Scheme.model_validate({"weights": {"num_bits": 4}})
    plan = make_plan(model, trace(model, (x,)), Settings(overrides={"layers.1.self_attn": four}))
    largest = {layer.name: layer.largest for layer in plan.layers}
    assert largest["layers.1.self_attn.in_proj"] == largest["layers.1.self_attn.out_proj"] == 7
    assert largest["layers.0.self_attn.in_proj"] == 127
