"""Weights alone in few bits: scales of blocks, in training as in a file; int4 where a file can hold it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from sparsify import QuantizationModifier, ScheduledModifierManager, export_onnx, quantize_model, verify_onnx
from sparsify.errors import ExportError, RecipeError
from sparsify.quantization.deployment import deployment_copy
from sparsify.quantization.scheme import ActivationScheme, QuantizationSettings, Scheme, WeightScheme
from tests.loops import quantized, train_step
from tests.zoo.quantizable import GptBlock, images


def weights(bits: int, block: Any = None, **more: Any) -> QuantizationSettings:
    strategy: Any = "block" if block else "channel"
    return QuantizationSettings(
        scheme=Scheme(
            input_activations=None,
            weights=WeightScheme(num_bits=bits, strategy=strategy, block_size=block, **more),
        )
    )


def step(model: nn.Module, x: Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        train_step(model, optimizer, x, 1.0)


def by_hand(weight: Tensor, bits: int, block: int) -> Tensor:
    """(out, in) on the grid, one block after another."""
    result, q_max = weight.clone(), 2 ** (bits - 1) - 1
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], block):
            values = weight[row, start : start + block]
            scale = values.abs().max() / q_max
            result[row, start : start + block] = (values / scale).round() * scale
    return result


@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_block_has_the_scale_of_its_largest_weight(bits: int, block: int) -> None:
    torch.manual_seed(0)
    model, x = GptBlock(), torch.randn(2, 3, 70)
    plain = copy.deepcopy(model)
    quantized(model, x, settings=weights(bits, block))
    with torch.no_grad():
        for layer in (plain.inner, plain.head):
            layer.weight.copy_(by_hand(layer.weight, bits, block))
        plain.turned.weight.copy_(by_hand(plain.turned.weight.t(), bits, block).t())
    torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-6)
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(("bits", "block"), [(4, 32), (4, None), (2, 16), (8, 128)])
@pytest.mark.parametrize("dims", [2, 3])
def test_the_file_computes_the_same_in_the_fused_kernel(
    bits: int, block: int | None, dims: int, learned: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = GptBlock(), torch.randn(3, 4, 70)
    x = x if dims == 3 else x[0]
    quantized(model, x, settings=weights(bits, block, observer="lsq" if learned else "min_max"))
    step(model, x)
    deployed = deployment_copy(model)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(x), deployed(x))
    file = export_onnx(model, x, tmp_path / "net.onnx")
    assert file.opset == 21 and len(file.quantized) == 3 and not file.floating
    assert ("int4" in file.initializers) == (bits <= 4) == ("qdq_matmulnbits_accuracy_level" in str(file))
    verification = verify_onnx(model, file, x)
    assert verification.ok and verification.unproven is None, str(verification)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of a file for this machine
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(file.path), options)
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    # Transformers' Conv1D too, behind which a ReLU stands.
    assert kinds.count("MatMulNBits") == 3 and not {"MatMul", "Gemm", "FusedGemm"} & set(kinds)


def test_int4_files_are_half_as_large(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, sizes = torch.randn(2, 512), {}
    for bits in (4, 8):
        model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
        quantized(model, x, settings=weights(bits))
        file = export_onnx(model, x, tmp_path / f"{bits}.onnx")
        sizes[bits] = file.size_bytes
    assert sizes[4] < 0.53 * sizes[8]


def test_convolutions_of_four_bits_are_stored_so_and_activations_in_integers_keep_int8(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for settings, kind in (
        (weights(4), "int4"),
        (QuantizationSettings(scheme=Scheme(weights=WeightScheme(num_bits=4))), "int8"),
    ):
        model, x = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1)), images()
        quantized(model, x, settings=settings)
        model(x)
        file = export_onnx(model, x, tmp_path / "net.onnx")
        assert kind in file.initializers and ("int4" in file.initializers) == (kind == "int4")
        verification = verify_onnx(model, file, x)
        assert verification.ok, str(verification)
        if kind == "int4":
            stored = next(t for t in onnx.load(file.path).graph.initializer if t.name == "3.weight_int8")
            wanted: Any = deployment_copy(model).get_submodule("3").get_buffer("weight_int8")
            assert np.array_equal(onnx.numpy_helper.to_array(stored).astype(np.int8), wanted.numpy())


def test_what_a_file_cannot_say_is_refused_before_the_work(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = GptBlock(), torch.randn(3, 70)
    quantized(model, x, settings=weights(3, 32))
    with pytest.raises(ExportError, match="from opset 21 on; pass opset=21 instead of 18"):
        export_onnx(model, x, tmp_path / "net.onnx", opset=18)
    assert not list(tmp_path.iterdir())
    # Four bits without blocks can be written, in int8.
    model = nn.Sequential(nn.Linear(8, 8))
    quantized(model, x[:, :8], settings=weights(4))
    file = export_onnx(model, x[:, :8], tmp_path / "net.onnx", opset=18)
    assert "int8" in file.initializers and verify_onnx(model, file, x[:, :8])


def test_blocks_beside_quantized_activations_are_refused_at_modify() -> None:
    model = GptBlock()
    blocks = WeightScheme(strategy="block", block_size=32)
    manager = ScheduledModifierManager([QuantizationModifier(start_epoch=5.0, scheme=Scheme(weights=blocks))])
    with pytest.raises(RecipeError, match=r"inner would have weights with a scale for each block of 32 and quantized"):
        manager.modify(model, torch.optim.SGD(model.parameters(), lr=0.1), 4)
    override = Scheme(input_activations=ActivationScheme())
    manager = ScheduledModifierManager(
        [
            QuantizationModifier(
                start_epoch=5.0,
                scheme=Scheme(input_activations=None, weights=blocks),
                scheme_overrides={"head": override},
            )
        ]
    )
    with pytest.raises(RecipeError, match="head would have"):
        manager.modify(model, torch.optim.SGD(model.parameters(), lr=0.1), 4)


@pytest.mark.parametrize("fields", [{"strategy": "block"}, {"block_size": 32}, {"strategy": "block", "block_size": 48}])
def test_half_a_block_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="block_size"):
        WeightScheme(**fields)


def test_without_training_blocks_are_rounded_to_the_nearest() -> None:
    torch.manual_seed(0)
    model, data = GptBlock(), [torch.randn(8, 70) for _ in range(4)]
    chosen = weights(4, 32).scheme
    found = quantize_model(model, data, scheme=chosen, least_samples=8)
    assert {one.rounding for one in found.layers} == {"nearest"}
    inner: Any = found.model.get_submodule("inner")
    wanted = by_hand(inner.weight.detach(), 4, 32)
    with torch.no_grad():
        got = inner(data[0])
        torch.testing.assert_close(got, nn.functional.linear(data[0], wanted, inner.bias), rtol=1e-5, atol=1e-5)
