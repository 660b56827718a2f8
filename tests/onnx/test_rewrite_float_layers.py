"""A layer in float between integers stays in float in onnxruntime, and says why it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from sparsify import export_onnx, quantize_model, verify_onnx
from sparsify.onnx.rewrite_float_layers import keep_float_layers
from sparsify.onnx.runtime import SessionSettings, optimized_model, run_session, start_session
from sparsify.quantization.scheme import QuantizationSettings
from tests.loops import quantized, train
from tests.zoo.small import written

WIDTH = 8


def conv(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(WIDTH, WIDTH, 3, padding=1, **options)


def own_convolution() -> Any:
    return written(
        lambda self, x: F.conv2d(x, self.kernel, self.offset, padding=1),
        kernel=nn.Parameter(torch.randn(WIDTH, WIDTH, 3, 3) / 8),
        offset=nn.Parameter(torch.randn(WIDTH) / 8),
    )


def own_product() -> Any:
    return written(
        lambda self, x: x @ self.table + self.offset,
        table=nn.Parameter(torch.randn(WIDTH, WIDTH) / 3),
        offset=nn.Parameter(torch.randn(WIDTH)),
    )


def between(*layers: nn.Module) -> nn.Module:
    """Convolutions that are quantized around each of `layers`, which stands in an attribute of its own."""
    blocks: list[nn.Module] = [nn.Conv2d(3, WIDTH, 3), nn.ReLU()]
    for layer in layers:
        blocks += [nn.Sequential(layer), nn.ReLU(), conv(), nn.ReLU()]
    return nn.Sequential(*blocks, conv())


def with_head(layer: nn.Module) -> nn.Module:
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Sequential(layer), nn.ReLU(), nn.Linear(WIDTH, 3)]
    return nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.ReLU(), *pooled)


def all_kinds() -> nn.Module:
    """Ignored, with BatchNorm, with a weight that is computed, of an own class, transposed."""
    normed = nn.Sequential(conv(bias=False), nn.BatchNorm2d(WIDTH))
    transposed = nn.ConvTranspose2d(WIDTH, WIDTH, 3, padding=1)
    return between(conv(), normed, weight_norm(conv()), own_convolution(), transposed)


LEFT = ("2", "6", "18")
"""The blocks of `all_kinds` that the recipe leaves out; the others are none of the types that can be quantized."""
BITS_4 = {"input_activations": None, "weights": {"num_bits": 4}}


def trained(model: nn.Module, x: Tensor, settings: QuantizationSettings) -> nn.Module:
    quantized(model, x, settings=settings)
    train(model, x, 2)
    return model.eval()


def assert_float_layers_are_float(model: nn.Module, x: Tensor, path: Path, count: int) -> None:
    """Torch and onnxruntime agree, integers are exact, and `count` layers run in float for a reason that is theirs."""
    export_onnx(model, x, path)
    found = verify_onnx(model, path, torch.randn_like(x))
    assert found.ok and found.unproven is None, str(found)
    for tensor in found.tensors:
        assert tensor.optimized is not None and (not tensor.exact or not tensor.optimized.count), tensor
        # In the wrong way up to 22 steps, of up to 40 % of the values.
        assert tensor.optimized.steps <= 1 and tensor.optimized.share < 0.005, tensor
    assert len(found.unfused) == count, found.unfused
    for each in found.unfused:
        assert "as the model has it" in each.why or "its weights alone are quantized" in each.why, each


def test_all_kinds_of_float_layers_between_quantized_ones_run_in_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8)
    model = trained(all_kinds(), x, QuantizationSettings.of(ignore=LEFT))
    assert_float_layers_are_float(model, x, tmp_path / "model.onnx", 5)


@pytest.mark.slow
def test_quantization_without_training_leaves_them_in_float_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8)
    found = quantize_model(all_kinds().eval(), [x], ignore=LEFT, least_samples=1)
    assert_float_layers_are_float(found.model, x, tmp_path / "model.onnx", 5)


@pytest.mark.parametrize(
    ("model", "overrides"),
    [
        pytest.param(lambda: with_head(nn.Linear(WIDTH, WIDTH)), {"4.0": None}, id="Linear"),
        pytest.param(lambda: with_head(own_product()), {}, id="product", marks=pytest.mark.slow),
        pytest.param(lambda: between(conv()), {"2.0": "weight_only"}, id="weights alone", marks=pytest.mark.slow),
        pytest.param(lambda: between(conv()), {"2.0": BITS_4}, id="four bits", marks=pytest.mark.slow),
        pytest.param(lambda: between(conv()), {"2.0": {"weights": None}}, id="inputs alone", marks=pytest.mark.slow),
        pytest.param(lambda: with_head(nn.Linear(WIDTH, WIDTH)), {"4.0": "weight_only"}, id="Linear, weights alone"),
    ],
)
def test_overrides_to_float_and_to_weights_alone_run_in_float(
    model: Any, overrides: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8)
    left = trained(model(), x, QuantizationSettings.of(overrides=overrides))
    assert_float_layers_are_float(left, x, tmp_path / "model.onnx", 1)


def graph_of(operator: str, *, bias: bool = True, behind: str = "Relu", integers: bool = False) -> ModelProto:
    """Q, DQ, an operator with a weight, something behind it, Q, DQ."""
    draw = np.random.default_rng(0)
    images = operator.startswith("Conv")
    weight = draw.normal(size=(4, 4, 3, 3) if images else (4, 4)).astype(np.float32)
    stored = {"scale": np.float32(0.02), "zero": np.uint8(128), "low": np.uint8(0), "step": np.float32(0.1)}
    stored |= (
        {"w_int": np.round(weight * 20).astype(np.int8), "w_scale": np.float32(0.05)} if integers else {"w": weight}
    )
    stored |= {"b": draw.normal(size=4).astype(np.float32)} if bias else {}
    shape: list[int | str] = ["n", 4, 6, 6] if images else ["n", 4]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["x_int"]),
        helper.make_node("DequantizeLinear", ["x_int", "scale", "zero"], ["x_read"]),
    ]
    if integers:
        nodes.append(helper.make_node("DequantizeLinear", ["w_int", "w_scale"], ["w"]))
    apart = operator == "MatMul" and bias
    operands = ["x_read", "w", *(["b"] if bias and not apart else [])]
    nodes.append(helper.make_node(operator, operands, ["sums" if apart else "y"], name="layer"))
    if apart:
        nodes.append(helper.make_node("Add", ["sums", "b"], ["y"]))
    nodes.append(helper.make_node(behind, ["y"], ["activated"]))
    nodes.append(helper.make_node("QuantizeLinear", ["activated", "step", "low"], ["y_int"]))
    nodes.append(helper.make_node("DequantizeLinear", ["y_int", "step", "low"], ["out"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.mark.parametrize("operator", ["Conv", "ConvTranspose", "Gemm", "MatMul"])
@pytest.mark.parametrize("behind", ["Relu", "Identity"])
def test_onnxruntime_rounds_a_float_weight_between_integers_and_no_longer_does(operator: str, behind: str) -> None:
    model = graph_of(operator, behind=behind)
    x = np.random.default_rng(1).normal(size=(64, 4, 6, 6) if operator.startswith("Conv") else (64, 4))
    feed = {"x": x.astype(np.float32)}

    def outputs(optimized: bool) -> np.ndarray:
        settings = SessionSettings(optimized=optimized)
        return run_session(start_session(model, settings, path=None, changed=True), feed)["out"]

    # The reason for all this; when it fails onnxruntime has stopped, and the rewrite can go.
    assert np.abs(outputs(True) - outputs(False)).max() > 0.09
    keep_float_layers(model)
    # A sum in another order may lie on the other side of an edge.
    off = outputs(True) != outputs(False)
    assert off.mean() < 0.001
    again = model.SerializeToString()
    keep_float_layers(model)
    assert model.SerializeToString() == again


@pytest.mark.parametrize(
    ("model", "kept"),
    [
        (graph_of("MatMul", bias=False), False),
        (graph_of("Gemm", integers=True, bias=False), False),
        (graph_of("Gemm", integers=True), True),
        (graph_of("Conv", bias=False), True),
    ],
    ids=["MatMul without bias", "integers", "integers with a float bias", "Conv without bias"],
)
def test_only_what_onnxruntime_would_round_is_copied(model: ModelProto, kept: bool) -> None:
    keep_float_layers(model)
    assert [node.op_type for node in model.graph.node].count("Max") == kept
    done = optimized_model(model, SessionSettings(), path=None, changed=True)
    assert any(node.op_type == "Max" for node in done.graph.node) == kept
