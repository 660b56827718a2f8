"""LSTM and GRU: weights on a grid of integers in training, in eval mode, and in the file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from sparsify import export_onnx, floating_layers, quantize_model, verify_onnx
from sparsify.analysis.weights import get_weights_metadata
from sparsify.quantization.conversion import restore_layers
from sparsify.quantization.deployment import deployment_copy
from sparsify.training.saved_model import load_model, save_model
from tests.loops import quantizing, train_step


class Steps(nn.Module):
    """A recurrent layer over time, and a head."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, **how: Any) -> None:
        super().__init__()
        self.cells = kind(6, 8, **{"batch_first": True, **how})
        self.head = nn.Linear(8 * (1 + bool(how.get("bidirectional"))), 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.cells(x)[0])
        return y


X = torch.randn(24, 5, 6)
FORMS: dict[str, dict[str, Any]] = {
    "one": {},
    "deep in both directions": {"num_layers": 2, "bidirectional": True},
    "without biases": {"bias": False},
    "dropout": {"num_layers": 2, "dropout": 0.1},
}


def int8(model: nn.Module, **how: Any) -> nn.Module:
    return quantize_model(model.eval(), [X], progress=False, **how).model


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("form", ["one", *(pytest.param(name, marks=pytest.mark.slow) for name in list(FORMS)[1:])])
def test_the_file_holds_bytes_and_computes_what_torch_computes(kind: Any, form: str, tmp_path: Path) -> None:
    model = int8(Steps(kind, **FORMS[form]))
    file = export_onnx(model, X, tmp_path / "model.onnx")
    found = verify_onnx(model, file.path, X[:3])
    assert found.ok and found.exact and not file.floating and not floating_layers(model)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(file.path).graph.initializer}
    large = [name for name, values in stored.items() if values.size > 150 and values.dtype != np.int8]
    assert not large
    # onnxruntime makes floats of them when it loads the file, and packs them as it packs floats.
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "opened.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(str(file.path), options, providers=["CPUExecutionProvider"])
    opened = onnx.load(tmp_path / "opened.onnx").graph
    constants = {tensor.name for tensor in opened.initializer}
    cells = [node for node in opened.node if node.op_type in ("LSTM", "GRU")]
    assert cells and all({*node.input[1:3]} <= constants for node in cells)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("how", [{"symmetric": False}, {"strategy": "tensor"}])
def test_every_grid_of_weights_comes_out_as_in_torch(how: dict[str, Any], bits: int, tmp_path: Path) -> None:
    scheme = {"weights": {"num_bits": bits, **how}, "input_activations": None}
    model = int8(Steps(nn.GRU, bidirectional=True), scheme=scheme)
    file = export_onnx(model, X, tmp_path / "model.onnx")
    assert verify_onnx(model, file.path, X[:3]).ok
    assert get_weights_metadata(file.path, 8)["cells.weight_ih_l0"].bits == 8


def test_training_eval_and_deployment_round_to_one_grid() -> None:
    model = Steps(num_layers=2)
    at_work(model)
    cells: Any = model.cells
    names = ["weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1"]
    operands = dict(zip(cells._flat_weights_names, cells._operands(), strict=True))
    for name in names:
        weight = getattr(cells, name).detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        torch.testing.assert_close(operands[name].detach(), (weight / scale).round() * scale)
    assert operands["bias_ih_l0"] is cells.bias_ih_l0
    train_step_with(model)
    model.eval()
    with torch.no_grad():
        expected = cells(X)[0]
        torch.testing.assert_close(deployment_copy(model).cells(X)[0], expected, rtol=0, atol=0)


def at_work(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    quantizing().modify(model, optimizer, steps_per_epoch=1, sample_inputs=X)


def train_step_with(model: nn.Module) -> None:
    model.train()
    before = copy.deepcopy(list(model.parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_step(model, optimizer, X)
    assert all(
        p.grad is not None and not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)
    )


def test_pruned_weights_stay_zero_and_an_undo_leaves_the_layer_as_it_was() -> None:
    model = Steps()
    with torch.no_grad():
        model.cells.weight_hh_l0[:, ::2] = 0
    keys, expected = list(model.state_dict()), model(X)
    at_work(model)
    model(X)
    assert [key for key in model.state_dict() if "quantizer" not in key] == keys
    deployed: Any = deployment_copy(model).cells
    assert deployed.weight_hh_l0_int8[:, ::2].count_nonzero() == 0 and deployed.weight_hh_l0_int8[:, 1::2].any()
    restore_layers(model)
    assert type(model.cells) is nn.LSTM
    torch.testing.assert_close(model(X), expected, rtol=0, atol=0)


def test_a_saved_model_comes_back(tmp_path: Path) -> None:
    model = int8(Steps(nn.GRU))
    save_model(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved", Steps(nn.GRU))
    torch.testing.assert_close(again.eval()(X), model(X), rtol=0, atol=0)


class Reads(nn.Module):
    """A recurrent layer of which somebody else reads a weight, and a subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.own = nn.GRU(6, 8), Own(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.own(self.cells(x)[0])[0]) + self.cells.weight_hh_l0.norm()
        return y


class Own(nn.GRU):
    pass


def test_what_cannot_be_rounded_is_named_with_the_reason() -> None:
    normed = Steps()
    nn.utils.parametrizations.weight_norm(normed.cells, "weight_hh_l0")
    left = {**floating_layers(int8(Reads())), "normed": floating_layers(int8(normed))["cells"]}
    assert left["cells"] == "others read its weights"
    assert left["own"] == "Own is not one of LSTM, GRU exactly"
    assert left["normed"] == "ParametrizedLSTM is not one of LSTM, GRU exactly"
    assert floating_layers(int8(Steps(), scheme_overrides={"LSTM": None})) == {"cells": "left out by the recipe"}
