"""The two operators: what they compute, and what they export as."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

import sparsify
from sparsify.quantization import qdq_ops


class Both(nn.Module):
    """A quantized activation times a weight stored as integers."""

    def __init__(self, kind: torch.dtype = torch.uint8, zero_point: int = 3, axis: int | None = 0) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("scale", torch.tensor(0.1))
        self.register_buffer("zero_point", torch.tensor(zero_point, dtype=kind))
        self.register_buffer("weight_int8", torch.tensor([[-127, 0, 5], [127, 1, 0]], dtype=torch.int8))
        scale = {None: torch.tensor(0.02), 0: torch.tensor([0.01, 0.02]), 1: torch.tensor([0.1, 0.2, 0.3])}[axis]
        self.register_buffer("weight_scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        x = qdq_ops.quantize_dequantize(x, self.scale, self.zero_point)
        return x @ qdq_ops.dequantize(self.weight_int8, self.weight_scale, self.axis).T


def exported(model: nn.Module, x: Tensor, opset: int) -> onnx.ModelProto:
    program = torch.export.export(model, (x,), strict=False, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    result = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=opset,
        custom_translation_table=qdq_ops.translations(opset),
        verbose=False,
    )
    assert result is not None
    return result.model_proto


def test_eager_computes_what_the_standard_says() -> None:
    scale, zero_point = np.float32(0.1), 3
    x = np.concatenate([np.linspace(-2, 40, 5001, dtype=np.float32), np.float32([0.05, 0.15, 0.25, -0.05])])
    # rint rounds half to even; the clip holds the integers, zero point included.
    expected = (np.clip(np.rint(x / scale) + zero_point, 0, 255) - zero_point).astype(np.float32) * scale
    found = qdq_ops.quantize_dequantize(
        torch.from_numpy(x), torch.tensor(scale), torch.tensor(zero_point, dtype=torch.uint8)
    )
    np.testing.assert_array_equal(found.numpy(), expected)


def test_the_input_is_left_as_it_was() -> None:
    x = torch.randn(100)
    before = x.clone()
    qdq_ops.quantize_dequantize(x, torch.tensor(0.5), torch.tensor(0, dtype=torch.int8))
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("scale", "axis", "expected"),
    [
        (torch.tensor(0.5), None, [[-1.0, 1.0], [1.5, 0.0]]),
        (torch.tensor([0.5, 2.0]), 0, [[-1.0, 1.0], [6.0, 0.0]]),
        (torch.tensor([0.5, 2.0]), 1, [[-1.0, 4.0], [1.5, 0.0]]),
    ],
)
def test_dequantize_scales_along_its_axis(scale: Tensor, axis: int | None, expected: list[list[float]]) -> None:
    for kind in (torch.int8, torch.int32):
        found = qdq_ops.dequantize(torch.tensor([[-2, 2], [3, 0]], dtype=kind), scale, axis)
        assert found.tolist() == expected


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("opset", [18, 20, 21])
def test_the_export_keeps_quantization_and_folds_nothing(opset: int) -> None:
    model, x = Both().eval(), torch.randn(4, 3)
    proto = exported(model, x, opset)
    assert proto.opset_import[0].version == opset
    kinds = [node.op_type for node in proto.graph.node]
    assert kinds.count("QuantizeLinear") == 1 and kinds.count("DequantizeLinear") == 2
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    np.testing.assert_array_equal(numpy_helper.to_array(stored["weight_int8"]), model.weight_int8.numpy())
    assert list(stored["scale"].dims) == list(stored["zero_point"].dims) == []
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [torch.uint8, torch.int8])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_the_file_computes_what_eager_does(kind: torch.dtype, axis: int | None) -> None:
    model = Both(kind, axis=axis).eval()
    proto = exported(model, torch.randn(4, 3), 20)
    x = torch.randn(7, 3) * 10
    found = ReferenceEvaluator(proto).run(None, {proto.graph.input[0].name: x.numpy()})[0]
    np.testing.assert_allclose(found, model(x).numpy(), rtol=1e-6)


def test_importing_registers_nothing() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(sparsify.__file__).parents[1])!r}); "
        "import torch, sparsify.quantization.qdq_ops as emit; "
        "assert not hasattr(torch.ops.sparsify, 'quantize_dequantize'); "
        "emit.dequantize(torch.ones(2, dtype=torch.int8), torch.tensor(1.0), None); "
        "assert torch.ops.sparsify.quantize_dequantize"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
