"""A raw Linear result that is quantized for one reader and a float for another: the product runs in integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from sparsify.oneshot.quantize import quantize_onnx
from sparsify.onnx import integer_kernels, rewrites
from sparsify.onnx.export import export_onnx
from sparsify.onnx.runtime import optimized_operators
from sparsify.onnx.verify import Verification, verify_onnx
from sparsify.quantization.scheme import QuantizationSettings
from tests.loops import quantized, train
from tests.zoo.raw_results import RAW_RESULTS, raw_results
from tests.zoo.small import written

FLOAT_PRODUCTS = {"Gemm", "MatMul", "FusedGemm", "Conv", "FusedConv"}


def assert_in_integers(found: Verification, layers: int) -> None:
    assert found.ok and found.unproven is None, str(found)
    kernels = [tensor for tensor in found.tensors if tensor.kernel in ("QGemm", "QLinearConv")]
    assert len(kernels) == layers and all(tensor.exact for tensor in found.tensors if tensor in kernels), str(found)
    assert not [each for each in found.unfused if each.operator in FLOAT_PRODUCTS], str(found)


@pytest.mark.parametrize("name", RAW_RESULTS)
def test_trained_products_run_in_integers_and_are_exact(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model, x = raw_results(name)
    quantized(model, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        outputs = model(x)
        loss = sum(each.square().mean() for each in ([outputs] if isinstance(outputs, Tensor) else outputs))
        torch.as_tensor(loss).backward()
        optimizer.step()
    exported = export_onnx(model.eval(), (x,), path)
    assert_in_integers(verify_onnx(model, path, (torch.randn_like(x),)), len(exported.quantized))
    # Attention multiplies activations with each other, and that stays in float.
    assert not (FLOAT_PRODUCTS - {"MatMul"}) & set(optimized_operators(path))
    names = [node.name for node in onnx.load(path).graph.node if node.name]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if at else ()) for at, name in enumerate(RAW_RESULTS)]
)
def test_without_training_the_file_is_written(name: str, tmp_path: Path) -> None:
    model, x = raw_results(name)
    data = [torch.randn_like(x) for _ in range(8)]
    made = quantize_onnx(model.eval(), tmp_path / "model.onnx", data, least_samples=8, progress=False)
    assert_in_integers(made.verification, len(made.exported.quantized))


def test_a_product_of_activations_that_is_read_twice_runs_in_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path, x = tmp_path / "model.onnx", torch.randn(4, 6, 8)

    def forward(self: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.query(x) @ self.key(x).transpose(1, 2)  # type: ignore[operator]
        return self.mix(scores) + scores.softmax(-1), scores.relu()  # type: ignore[operator]

    model = written(forward, query=nn.Linear(8, 8), key=nn.Linear(8, 8), mix=nn.Linear(6, 6))
    quantized(model, x, settings=QuantizationSettings.of({"matmul_activations": {}}, None, (), where="test"))
    model(x)
    export_onnx(model.eval(), (x,), path)
    found = verify_onnx(model, path, (x,))
    assert found.ok and not found.unfused, str(found)
    assert optimized_operators(path)["MatMulIntegerToFloat"] == 1
    assert all(tensor.exact for tensor in found.tensors if tensor.name == "MatMul")


def test_the_last_bit_of_a_product_in_float_is_no_difference_and_another_sum_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As files of others are, and as other versions of onnxruntime may run ours."""
    monkeypatch.setattr(rewrites, "part_float_results", lambda model: None)
    path = tmp_path / "model.onnx"
    model, x = raw_results("residual MLP")
    quantized(model, x)
    train(model, x, 2)
    export_onnx(model.eval(), (x,), path)
    assert optimized_operators(path)["Gemm"] == 1
    found = verify_onnx(model, path, (x,))
    stem = next(tensor for tensor in found.tensors if tensor.name == "stem/Gemm")
    assert found.ok and stem.kernel == "Gemm" and not stem.exact
    assert [each.name for each in found.unfused if "left it in float" in each.why] != []
    product = integer_kernels.matmul

    def hundred_more(a: Any, b: Any, bias: Any, grid: Any) -> Any:
        return product(a, b, bias if bias is None else bias + np.int32(100), grid)

    monkeypatch.setattr(integer_kernels, "matmul", hundred_more)
    found = verify_onnx(model, path, (x,))
    stem = next(tensor for tensor in found.tensors if tensor.name == "stem/Gemm")
    assert not found.ok and stem.why is not None
    assert "farther off than float rounding explains" in stem.why
