"""Weights that another module's forward reads: torch and the file see the same, rounded in products, in float else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify import export_onnx, quantize_model, verify_onnx
from sparsify.onnx.verify import Verification
from sparsify.quantization.plan import QuantizationPlan, apply_plan, unquantized
from sparsify.quantization.plan_of_model import quantization_of
from sparsify.quantization.scheme import QuantizationSettings
from tests.loops import quantized
from tests.zoo.quantized_runs import squares_of
from tests.zoo.small import written

ROWS, IMAGES = (16, 12), (4, 3, 8, 8)


def logits_by_embedding() -> nn.Module:
    def forward(self: Any, ids: Tensor) -> Tensor:
        x = self.emb((ids * 3).long().clamp(-9, 9) + 10)
        y: Tensor = self.body(x).relu() @ self.emb.weight.T
        return y

    return written(forward, emb=nn.Embedding(20, 12), body=nn.Linear(12, 12))


def tied_autoencoder() -> nn.Module:
    return written(
        lambda self, x: F.linear(self.norm(self.enc(x)).relu(), self.enc.weight.t(), self.offset),
        enc=nn.Linear(12, 8),
        norm=nn.BatchNorm1d(8),
        offset=nn.Parameter(torch.randn(12)),
    )


def norms_as_outputs() -> nn.Module:
    """Penalties of a weight, of its bias, and of the BatchNorm that is folded into it."""

    def forward(self: Any, x: Tensor) -> tuple[Tensor, ...]:
        y = self.head(self.norm(self.conv(x)).relu().mean((2, 3)))
        return y, self.conv.weight.flatten(1).norm(dim=1), self.norm.weight * 2, self.conv.bias + 1, self.head.bias * 3

    return written(forward, conv=nn.Conv2d(3, 8, 3), norm=nn.BatchNorm2d(8), head=nn.Linear(8, 3))


def borrowed_linear(own_bias: bool = True, rank: int = 2) -> nn.Module:
    """The layer `qkv` is never called; as torchvision's Swin, or with a bias that is put together, as BEiT."""

    def forward(self: Any, x: Tensor) -> Tensor:
        bias = self.qkv.bias if own_bias else torch.cat((self.bias, torch.zeros_like(self.bias)))
        y: Tensor = self.out(F.linear(x, self.qkv.weight, bias).relu())
        return y

    bias = nn.Parameter(torch.randn(4))
    return written(forward, qkv=nn.Linear(12, 8, bias=own_bias), bias=bias, out=nn.Linear(8, 3))


def borrowed_convolution() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.first.weight, self.first.bias, padding=1, stride=2).relu()
        y: Tensor = self.second(x).relu().mean((2, 3))
        return y

    return written(forward, first=nn.Conv2d(3, 8, 3), second=nn.Conv2d(8, 4, 3))


def through_others() -> nn.Module:
    """A weight that is moved in one forward and multiplied with in another, and one in slices."""

    def decode(self: Any, h: Tensor, weight: Tensor) -> Tensor:
        return h @ weight

    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.enc(x).relu()
        return self.dec(h, self.enc.weight.contiguous()) + F.linear(h, self.wide.weight[:12]) + self.wide(h)[:, 12:]

    return written(forward, enc=nn.Linear(12, 8), wide=nn.Linear(8, 24), dec=written(decode))


def matrix_product() -> nn.Module:
    return written(
        lambda self, x: (self.a(x).relu() @ self.b.weight.transpose(0, 1) + self.b.bias) * self.scale,
        a=nn.Linear(12, 8),
        b=nn.Linear(8, 5),
        scale=nn.Parameter(torch.ones(5)),
    )


def called_and_computed() -> nn.Module:
    return written(
        lambda self, x: self.b(self.a(x).relu()) + F.linear(self.c(x).relu(), self.b.weight, self.b.bias),
        a=nn.Linear(12, 8),
        b=nn.Linear(8, 5),
        c=nn.Linear(12, 8),
    )


def cosine() -> nn.Module:
    return written(
        lambda self, x: F.linear(F.normalize(self.a(x)), F.normalize(self.b.weight)),
        a=nn.Linear(12, 8),
        b=nn.Linear(8, 5),
    )


def spread(model: nn.Module) -> nn.Module:
    """With statistics and weights of BatchNorm that folding shows: a weight becomes up to 13 times as large."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_var.fill_(0.05)  # type: ignore[union-attr]
            module.weight.data.uniform_(-3, 3)
    return model


def steps(model: nn.Module, shape: tuple[int, ...]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        squares_of(model(torch.randn(shape))).backward()
        optimizer.step()
    model.eval()


def proven(model: nn.Module, shape: tuple[int, ...], path: Path) -> Verification:
    export_onnx(model, torch.randn(shape), path)
    found = verify_onnx(model, path, torch.randn(shape))
    assert found.ok and found.unproven is None, str(found)
    assert all(not tensor.exact or (tensor.optimized and not tensor.optimized.count) for tensor in found.tensors)
    # Torch in eval mode, which is what was trained and measured, gives what the file gives.
    assert max(output.rms for output in found.outputs) < 1e-6, str(found)
    return found


Built = Callable[[], nn.Module]
CASES: dict[str, tuple[Built, tuple[int, ...], set[str]]] = {
    "logits by an embedding": (logits_by_embedding, ROWS, {"emb", "body"}),
    "tied autoencoder": (tied_autoencoder, ROWS, {"enc"}),
    "norms as outputs": (norms_as_outputs, IMAGES, {"conv", "head"}),
    "borrowed Linear": (borrowed_linear, ROWS, {"qkv", "out"}),
    "a bias put together": (lambda: borrowed_linear(own_bias=False), (2, 5, 12), {"qkv", "out"}),
    "borrowed convolution": (borrowed_convolution, IMAGES, {"first", "second"}),
    "moved here, multiplied there": (through_others, ROWS, {"enc", "wide"}),
    "matrix product": (matrix_product, ROWS, {"a", "b"}),
    "called and computed": (called_and_computed, ROWS, {"a", "b", "c"}),
    "cosine": (cosine, ROWS, {"a"}),
}
FAST = ("logits by an embedding", "tied autoencoder", "norms as outputs", "a bias put together")


@pytest.mark.parametrize("how", ["trained", pytest.param("without training", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in CASES])
def test_torch_and_the_file_see_the_same_weights(name: str, how: str, tmp_path: Path) -> None:
    build, shape, layers = CASES[name]
    torch.manual_seed(0)
    model = spread(build())
    if how == "trained":
        plan = quantized(model, torch.randn(shape))
        steps(model, shape)
    else:
        found = quantize_model(model.eval(), [torch.randn(shape)], least_samples=1)
        model, plan = found.model, found.plan
    assert {layer.name for layer in plan.layers} == layers
    proven(model, shape, tmp_path / "model.onnx")


def nearest(weight: Tensor) -> Tensor:
    """Rows on grids of 255 integers, independently of the package."""
    step = weight.abs().amax(1, keepdim=True) / 127
    return (weight / step).round() * step


@pytest.mark.parametrize("training", [True, False])
def test_a_product_sees_the_rounded_weight_and_a_norm_the_parameter(training: bool) -> None:
    torch.manual_seed(0)
    model = written(
        lambda self, x: (F.linear(self.enc(x), self.enc.weight.t()), self.enc.weight.norm(), self.enc.weight),
        enc=nn.Linear(12, 8),
    )
    quantized(model, torch.randn(ROWS))
    model.train(training)
    x = torch.randn(ROWS)
    y, norm, same = model(x)
    weight = model.enc.weight.detach()
    assert same is model.enc.weight and torch.equal(norm, weight.norm())
    torch.testing.assert_close(y, model.enc(x) @ nearest(weight))
    assert not torch.allclose(y, model.enc(x) @ weight, atol=1e-4)
    # The gradient goes through the rounding, to the weight as it is.
    y.square().sum().backward()
    assert model.enc.weight.grad is not None and (model.enc.weight.grad != 0).all()


def test_a_product_that_is_the_layers_own_is_quantized_like_a_call() -> None:
    torch.manual_seed(0)
    model = borrowed_linear()
    called = written(
        lambda self, x: self.out(self.qkv(x).relu()), qkv=copy.deepcopy(model.qkv), out=copy.deepcopy(model.out)
    )
    x = torch.randn(ROWS)
    for each in (model, called):
        quantized(each, x)
        each(x)
    assert torch.equal(model(x), called(x))
    assert torch.equal(model.eval()(x), called.eval()(x))
    plain, lent = (QuantizationPlan.from_state(quantization_of(each).to_state()) for each in (called, model))
    assert lent.layers == plain.layers and {site.name for site in lent.sites} == {site.name for site in plain.sites}


@pytest.mark.parametrize("name", ["tied autoencoder", "borrowed Linear", "norms as outputs"])
def test_the_plan_of_a_model_says_who_reads_weights(name: str) -> None:
    build, shape, _ = CASES[name]
    torch.manual_seed(0)
    model = build()
    fresh = copy.deepcopy(model)
    plan = quantized(model, torch.randn(shape))
    assert plan.reads and set(quantization_of(model).reads) == set(plan.reads)
    steps(model, shape)
    apply_plan(fresh, QuantizationPlan.from_state(plan.to_state()))
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(shape)
    for one, other in zip(_tuple(model(x)), _tuple(fresh.eval()(x)), strict=True):
        assert torch.equal(one, other)


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def test_a_weight_that_others_read_is_neither_scaled_nor_clipped_without_training() -> None:
    torch.manual_seed(0)
    model = written(
        lambda self, x: (self.b(self.a(x).relu()), self.a.weight.norm()), a=nn.Linear(12, 8), b=nn.Linear(8, 5)
    )
    model.a.weight.data[0] *= 100
    found = quantize_model(model.eval(), [torch.randn(64, 12)], scheme={"weights": {"num_bits": 4}})
    assert found.equalized == {} and torch.equal(found.model.a.weight, model.a.weight)


def test_what_is_ignored_reads_the_weight_in_float(tmp_path: Path) -> None:
    decoder = written(lambda self, h, layer: F.linear(h, layer.weight.t()))
    model = written(lambda self, x: self.dec(self.enc(x), self.enc), enc=nn.Linear(12, 8), dec=decoder)
    torch.manual_seed(0)
    quantized(model, torch.randn(ROWS), settings=QuantizationSettings.of(ignore="dec"))
    model.eval()
    x = torch.randn(ROWS)
    model(x)
    torch.testing.assert_close(model(x), model.enc(x) @ model.enc.weight)


def test_a_weight_that_goes_into_a_function_of_torch_stays_in_float_and_is_named() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        own = (self.q.weight, self.k.weight, self.v.weight)
        bias = torch.cat([self.q.bias, self.k.bias, self.v.bias])
        y = F.multi_head_attention_forward(
            *(x, x, x, 12, 2, None, bias, None, None, False, 0.0, self.out.weight, self.out.bias),
            use_separate_proj_weight=True,
            q_proj_weight=own[0],
            k_proj_weight=own[1],
            v_proj_weight=own[2],
        )[0]
        return self.head(y)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    pool = written(forward, q=nn.Linear(12, 12), k=nn.Linear(12, 12), v=nn.Linear(12, 12), out=nn.Linear(12, 12))
    pool.head = nn.Linear(12, 3)
    model, x = nn.Sequential(pool), torch.randn(5, 4, 12)
    before = copy.deepcopy(model)
    quantized(model, x)
    model(x)
    assert "0" in unquantized(model)
    exact, found = (each.eval()(x) for each in (before, model))
    # The head alone is quantized.
    assert (exact - found).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.slow
def test_swin_of_torchvision_runs_in_integers(tmp_path: Path) -> None:
    pytest.importorskip("torchvision", exc_type=(ImportError, RuntimeError))
    from torchvision.models import SwinTransformer

    torch.manual_seed(0)
    model = SwinTransformer([2, 2], 16, [1, 1], [2, 4], [4, 4], stochastic_depth_prob=0.0, num_classes=10)
    plan = quantized(model, torch.randn(2, 3, 32, 32))
    steps(model, (2, 3, 32, 32))
    layers = {layer.name for layer in plan.layers}
    assert not plan.left and {"features.1.0.attn.qkv", "features.3.0.attn.proj"} <= layers
    found = proven(model, (2, 3, 32, 32), tmp_path / "model.onnx")
    assert sum(tensor.kernel == "QGemm" for tensor in found.tensors) == len(plan.layers) - 1
