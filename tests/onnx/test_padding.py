"""Padding by mode moves integers, and the convolution behind it runs in integers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify.model.trace import trace
from sparsify.onnx import rewrites
from sparsify.onnx.export import export_onnx
from sparsify.onnx.verify import verify_onnx
from tests.loops import quantized, train
from tests.zoo.small import written


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
@pytest.mark.parametrize("number", [None, 0.0, 1.5])
def test_a_pad_of_integers_gives_the_same_numbers(mode: str, number: float | None) -> None:
    constants: dict[str, Any] = {"s": np.float32(0.5), "z": np.uint8(7), "p": np.int64([0, 0, 1, 2, 0, 0, 0, 1])}
    inputs = ["d", "p"] + ([] if number is None else ["number"])
    if number is not None:
        constants["number"] = np.float32(number)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Pad", inputs, ["y"], mode=mode),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2, 4, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2, "h", "w"])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    before = ModelProto.FromString(model.SerializeToString())
    rewrites.dequantize_after_movement(model)
    moved = mode != "constant" or not number
    # A number other than 0 need not be on the grid.
    assert [node.op_type for node in model.graph.node][1:] == (
        ["Pad", "DequantizeLinear"] if moved else ["DequantizeLinear", "Pad"]
    )
    x = np.random.default_rng(0).standard_normal((2, 2, 4, 5)).astype(np.float32) * 4
    expected, found = (ReferenceEvaluator(each).run(None, {"x": x})[0] for each in (before, model))
    np.testing.assert_array_equal(found, expected)
    onnx.checker.check_model(model, full_check=True)


def test_a_padding_with_a_number_of_its_own_is_no_movement() -> None:
    for mode in ("reflect", "replicate", "circular", "constant"):
        model = written(lambda self, x, mode=mode: F.pad(x, (1, 1, 0, 1), mode=mode))
        assert [node.kind for node in trace(model, (torch.zeros(1, 2, 4, 4),)).nodes] == ["input", "move"], mode
    for value, kind in ((0, "move"), (2.0, "other"), (float("-inf"), "other")):
        model = written(lambda self, x, value=value: F.pad(x, (1, 1), value=value))
        assert trace(model, (torch.zeros(1, 2, 4),)).nodes[-1].kind == kind


def padded(mode: str, dimensions: int) -> nn.Module:
    """Two convolutions that pad by `mode`, and F.pad between them."""
    conv: Any = (nn.Conv1d, nn.Conv2d)[dimensions - 1]

    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = F.pad(x, (1, 2) * dimensions, mode="constant" if mode == "zeros" else mode)
        return self.last(F.relu(self.second(x)))

    return written(  # type: ignore[no-any-return]
        forward,
        first=conv(3, 4, 3, padding=1, padding_mode=mode),
        second=conv(4, 4, 5, padding="same", padding_mode=mode),
        last=conv(4, 2, 1),
    )


@pytest.mark.parametrize("dimensions", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize(
    "mode", ["reflect", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("replicate", "circular", "zeros"))]
)
def test_convolutions_that_pad_by_mode_run_in_integers(mode: str, dimensions: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, path = padded(mode, dimensions), torch.randn(2, 3, *[8] * dimensions), tmp_path / "model.onnx"
    quantized(model, x)
    train(model, x, 2)
    export_onnx(model.eval(), (x,), path)
    found = verify_onnx(model, path, (x,))
    assert found.ok and found.exact and found.unfused == (), str(found)
    assert Counter(tensor.kernel for tensor in found.tensors) == {"QuantizeLinear": 1, "QLinearConv": 3}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d, nn.ZeroPad2d])
def test_padding_layers_move_integers(kind: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), kind(1), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten())
    model, x, path = nn.Sequential(*layers, nn.Linear(144, 3)), torch.randn(2, 3, 8, 8), tmp_path / "model.onnx"
    quantized(model, x)
    train(model, x, 2)
    export_onnx(model.eval(), (x,), path)
    found = verify_onnx(model, path, (x,))
    assert found.ok and found.exact and found.unfused == (), str(found)
