"""Products of two activations with quantized operands: the same function, the same plan, the same file."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify import export_onnx, verify_onnx
from sparsify.model.trace import trace
from sparsify.quantization import attention_products
from sparsify.quantization.conversion import quantizers
from sparsify.quantization.deployment import deployment_copy
from sparsify.quantization.placement import make_plan
from sparsify.quantization.plan import QuantizationPlan, undo_plan
from sparsify.quantization.scheme import ActivationScheme, QuantizationSettings, Scheme
from tests.loops import quantized, train
from tests.zoo.quantizable import BertLayer
from tests.zoo.small import written

SCHEME = Scheme(matmul_activations=ActivationScheme())
MASKS: dict[str, Callable[[], dict[str, Any]]] = {
    "none": dict,
    "causal": lambda: {"is_causal": True},
    "boolean": lambda: {"attn_mask": torch.rand(2, 1, 5, 7) > 0.3},
    "float": lambda: {"attn_mask": torch.randn(5, 7)},
    "lowest": lambda: {"attn_mask": torch.where(torch.rand(5, 7) > 0.3, 0.0, torch.finfo(torch.float32).min)},
    "infinite": lambda: {"attn_mask": torch.where(torch.rand(2, 4, 5, 7) > 0.3, 0.0, -torch.inf)},
    "scale": lambda: {"scale": 0.3},
}


class Bare(nn.Module):
    """Attention in the words of `way`, with what they need around it."""

    def __init__(self, way: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self.query(x), self.key(x), self.value(x))


def by_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.bmm(torch.bmm(q, mat2=k.transpose(1, 2)).softmax(-1), v)


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    "operator": lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
    "method": lambda q, k, v: q.matmul(k.transpose(1, 2)).softmax(-1).matmul(other=v),
    "function": lambda q, k, v: torch.matmul(torch.matmul(q, other=k.mT).softmax(-1), v),
    "reflected": lambda q, k, v: k.mT.__rmatmul__(q).softmax(-1) @ v,
    "bmm": by_bmm,
}


def plan_of(model: nn.Module, *inputs: Tensor, **settings: Any) -> QuantizationPlan:
    return make_plan(model, trace(model, inputs), QuantizationSettings(**settings))


def products_of(plan: QuantizationPlan) -> list[str]:
    return [site.name for site in plan.sites if "matmul" in site.child]


@pytest.mark.parametrize("mask", MASKS)
def test_in_float_it_is_torchs_attention(mask: str) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 6)
    given = MASKS[mask]()
    seen: list[str] = []

    def nothing(name: str, x: Tensor) -> Tensor:
        seen.append(name)
        return x

    got = attention_products.attention(nothing, q, k, v, **given)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, **given), rtol=1e-4, atol=1e-5)
    assert sorted(seen) == sorted(attention_products.ATTENTION)


def test_heads_that_share_keys() -> None:
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    got = attention_products.attention(lambda _, x: x, q, k, v, enable_gqa=True)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, enable_gqa=True), rtol=1e-4, atol=1e-5)


def test_who_may_look_at_nothing_gives_no_nan() -> None:
    q, k, v = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4)
    for mask in (torch.tensor([[False] * 3, [True] * 3]), torch.tensor([[-torch.inf] * 3, [0.0] * 3])):
        got = attention_products.attention(lambda _, x: x, q, k, v, attn_mask=mask)
        assert got.isfinite().all()
        torch.testing.assert_close(got[:, :, 1], F.scaled_dot_product_attention(q, k, v)[:, :, 1])


@pytest.mark.parametrize("way", WAYS)
def test_however_it_is_written_operands_are_quantized_and_the_file_is_exact(way: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Bare(WAYS[way]), torch.randn(4, 6, 8)
    before = copy.deepcopy(model)
    plan = quantized(model, x, settings=QuantizationSettings(scheme=SCHEME))
    if way == "sdpa":
        names = [f"matmul_{name}_0_quantizer" for name in attention_products.ATTENTION]
    else:
        names = [f"matmul_{name}_{n}_quantizer" for n in range(2) for name in ("left", "right")]
    assert products_of(plan) == names and plan.left == ()
    assert len(set(train(model, x, 5))) == 5
    assert all(quantizer.batches == 5 for quantizer in quantizers(model))
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(x), deployment_copy(model)(x))
    path = tmp_path / "model.onnx"
    export_onnx(model, (x,), path)
    found = verify_onnx(model, path, (x,))
    assert found.ok and found.unfused == (), str(found)
    kernels = [tensor.kernel for tensor in found.tensors]
    assert sum("MatMul" in kernel for kernel in kernels) >= 1, kernels
    assert all(tensor.optimized.count == 0 for tensor in found.tensors if tensor.exact and tensor.optimized)
    undo_plan(model)
    with torch.no_grad():
        before.load_state_dict(model.state_dict())
        assert torch.equal(model(x), before(x))


@pytest.mark.parametrize("weights", [True, False])
def test_multihead_attention(weights: bool, tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y, found = self.attention(x, x, x, need_weights=weights)
            assert (found is not None) == weights
            return y

    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 6, 8)
    plan = quantized(model, x, settings=QuantizationSettings(scheme=SCHEME))
    assert products_of(plan) == [f"attention.matmul_{name}_0_quantizer" for name in attention_products.ATTENTION]
    train(model, x, 3)
    assert all(quantizer.batches == 3 for quantizer in quantizers(model))
    path = tmp_path / "model.onnx"
    export_onnx(model.eval(), (x,), path)
    found = verify_onnx(model, path, (x,))
    assert found.ok and found.exact and "QLinearMatMul" in {tensor.kernel for tensor in found.tensors}, str(found)


def test_what_the_recipe_says_of_each_attention() -> None:

    model = nn.Sequential(OrderedDict(first=Bare(WAYS["sdpa"]), second=Bare(WAYS["operator"])))
    x = torch.randn(2, 5, 8)
    assert products_of(plan_of(model, x)) == []
    first = [f"first.matmul_{name}_0_quantizer" for name in attention_products.ATTENTION]
    assert products_of(plan_of(model, x, overrides={"first": SCHEME})) == first
    assert products_of(plan_of(model, x, scheme=SCHEME, ignore=("second",))) == first
    assert products_of(plan_of(model, x, scheme=SCHEME, overrides={"second": Scheme()})) != first
    off = Scheme(matmul_activations=None)
    assert products_of(plan_of(model, x, scheme=SCHEME, overrides={"second": off})) == first
    signed = Scheme(input_activations=None, matmul_activations=ActivationScheme(symmetric=True, num_bits=6))
    plan = plan_of(model, x, scheme=signed)
    assert len(plan.sites) == 8 and all(site.symmetric and site.bits == 6 for site in plan.sites)
    assert QuantizationPlan.from_state(plan.to_state()) == plan


def test_an_attention_that_is_called_twice_has_each_quantizer_once(tmp_path: Path) -> None:

    torch.manual_seed(0)
    model = written(lambda self, x: self.inner(self.inner(x)), inner=Bare(WAYS["sdpa"]))
    x, path = torch.randn(2, 5, 8), tmp_path / "model.onnx"
    plan = quantized(model, x, settings=QuantizationSettings(scheme=SCHEME))
    assert products_of(plan) == [f"inner.matmul_{name}_0_quantizer" for name in attention_products.ATTENTION]
    train(model, x, 2)
    export_onnx(model.eval(), (x,), path)
    assert verify_onnx(model, path, (x,)).exact


def test_a_product_that_cannot_be_watched_is_named() -> None:
    model, x = Bare(lambda q, k, v: torch.einsum("bij,bkj,bkl->bil", q, k, v)), torch.randn(2, 5, 8)
    plan = plan_of(model, x, scheme=SCHEME)
    assert products_of(plan) == [] and plan.left and "cannot" in plan.left[0].why


def test_products_that_training_alone_computes_stay_in_float_and_the_others_do_not() -> None:
    class Sometimes(Bare):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y @ y.mT @ y if x.shape[0] > 2 else y

    model = Sometimes(WAYS["sdpa"])
    quantized(model, torch.randn(2, 5, 8), settings=QuantizationSettings(scheme=SCHEME))
    model(torch.randn(3, 5, 8))
    found = [quantizer for name, quantizer in model.named_children() if "matmul" in name]
    assert len(found) == 4 and all(quantizer.enabled and quantizer.batches == 1 for quantizer in found)


def test_it_learns() -> None:
    torch.manual_seed(0)
    model, ids = BertLayer(), torch.randint(0, 20, (8, 7))
    plan = quantized(model, ids, settings=QuantizationSettings(scheme=SCHEME))
    assert products_of(plan)
    losses = train(model, ids, 40, lr=0.05)
    assert losses[-1] < 0.3 * losses[0]


def test_heads_are_quantized_before_they_are_moved(tmp_path: Path) -> None:
    """onnxruntime moves a quantizer to the product that it reads, and rounds once: the file has to say so."""

    def in_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)

    torch.manual_seed(0)
    model, x = nn.Sequential(Bare(in_heads), nn.Linear(8, 3)), torch.randn(4, 6, 8)
    quantized(model, x, settings=QuantizationSettings(scheme=SCHEME))
    train(model, x, 3)
    path = tmp_path / "model.onnx"
    export_onnx(model.eval(), (x,), path)
    found = verify_onnx(model, path, (x,))
    assert found.ok and found.exact, str(found)
    nodes = list(onnx.load(path).graph.node)
    made = {name: node for node in nodes for name in node.output}
    behind = {node.input[0]: node for node in nodes if node.op_type == "QuantizeLinear"}
    products = [node for node in nodes if node.op_type in ("Gemm", "MatMul") and node.output[0] in behind]
    # Query, key and value, and what the attention gives to the Linear behind it.
    assert [node.op_type for node in products].count("Gemm") == 3
    assert [node.op_type for node in products].count("MatMul") == 1
    # Nothing is moved in float.
    movers = [node for node in nodes if node.op_type == "Transpose"]
    assert movers and all(made[node.input[0]].op_type != "DequantizeLinear" for node in movers)
