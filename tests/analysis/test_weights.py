"""The large weights of models and files: which ones, their zeros and values, and who reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from sparsify import export_onnx, quantize_model
from sparsify.analysis import get_weights_metadata, weights_table
from sparsify.errors import ArgumentError, DataFileError
from tests.zoo.small import Tied


@pytest.mark.parametrize(
    ("threshold", "names"), [(47, ["0.weight"]), (48, []), (5, ["0.weight", "0.bias"]), (6, ["0.weight"])]
)
def test_strictly_more_elements_than_the_threshold(threshold: int, names: list[str], tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    export_onnx(model, torch.zeros(2, 8), tmp_path / "model.onnx")
    assert list(get_weights_metadata(model, threshold)) == names
    assert sorted(get_weights_metadata(tmp_path / "model.onnx", threshold)) == sorted(names)


def test_the_default_threshold_is_2048() -> None:
    assert list(get_weights_metadata(nn.ModuleList([nn.Linear(32, 64), nn.Linear(32, 65)]))) == ["1.weight"]


def test_a_shared_weight_stands_once_with_both_children(tmp_path: Path) -> None:
    model = Tied(30, 8, calls=1)
    found = get_weights_metadata(model, 100)
    assert list(found) == ["embed.weight"]
    assert np.shares_memory(found["embed.weight"].val, model.embed.weight.detach().numpy())
    children = [(op.op_type, op.name, dict(op.params_name_mapping)) for op in found["embed.weight"].child_ops]
    assert children == [
        ("Embedding", "embed", {"weight": "embed.weight"}),
        ("Linear", "head", {"weight": "embed.weight"}),
    ]
    export_onnx(model, torch.zeros(2, 3, dtype=torch.int64), tmp_path / "model.onnx")
    of_file = get_weights_metadata(tmp_path / "model.onnx", 100)
    assert list(of_file) == ["embed.weight"]
    assert {op.op_type for op in of_file["embed.weight"].child_ops} == {"Gather", "MatMul"}
    assert {op.name.split("/")[0] for op in of_file["embed.weight"].child_ops} == {"embed", "head"}
    assert all(list(op.params_name_mapping.values()) == ["embed.weight"] for op in of_file["embed.weight"].child_ops)


def test_zeros_rows_and_values_are_counted_one_by_one() -> None:
    layer = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        # The first row sums to 0 and is not pruned; the second is.
        layer.weight.copy_(torch.tensor([[1.0, -1.0, 2.0, -2.0], [0.0, -0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 5.0]]))
    found = get_weights_metadata(layer, 0)["weight"]
    assert found.sparsity == 5 / 12
    assert found.zero_rows == pytest.approx(1 / 3)
    assert found.unique_values == 6
    assert (found.bits, found.size_bytes) == (32, 48)


def test_a_file_holds_what_the_model_holds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    with torch.no_grad():
        for weight in (model[0].weight, model[3].weight):
            weight.mul_(torch.rand_like(weight) > 0.7)
        model[0].weight[:2] = 0
    export_onnx(model, torch.zeros(2, 3, 8, 8), tmp_path / "model.onnx")
    of_model, of_file = get_weights_metadata(model, 100), get_weights_metadata(tmp_path / "model.onnx", 100)
    assert set(of_file) == set(of_model) == {"0.weight", "3.weight"}
    for name, one in of_model.items():
        assert of_file[name].sparsity == pytest.approx(one.sparsity)
        assert of_file[name].unique_values == one.unique_values
        assert of_file[name].size_bytes == one.size_bytes
    np.testing.assert_array_equal(of_file["0.weight"].val, of_model["0.weight"].val)
    assert of_file["0.weight"].zero_rows == of_model["0.weight"].zero_rows == 0.25
    (child,) = of_file["0.weight"].child_ops
    assert (child.op_type, dict(child.params_name_mapping)) == ("Conv", {"W": "0.weight"})


def test_quantized_weights_have_bits_and_at_most_so_many_values(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    x = torch.randn(16, 32)
    quantized = quantize_model(model, [x], scheme={"weights": {"num_bits": 4}}).model
    export_onnx(quantized, x, tmp_path / "model.onnx")
    assert get_weights_metadata(quantized, 1000)["0.weight"].bits == 4
    of_file = get_weights_metadata(tmp_path / "model.onnx", 1000)["0.weight"]
    assert of_file.bits == 8, "4 bits are stored in 8"
    assert of_file.unique_values <= 16
    assert of_file.val.dtype == np.int8
    assert of_file.sparsity == pytest.approx((of_file.val == 0).mean())


def test_names_are_clean_and_modules_of_several_weights_are_children(tmp_path: Path) -> None:
    model = nn.DataParallel(nn.Sequential(nn.LSTM(4, 8), nn.MultiheadAttention(8, 2)))
    found = get_weights_metadata(model, 127)
    assert {name: [op.op_type for op in one.child_ops] for name, one in found.items()} == {
        "0.weight_ih_l0": ["LSTM"],
        "0.weight_hh_l0": ["LSTM"],
        "1.in_proj_weight": ["MultiheadAttention"],
    }
    assert dict(found["1.in_proj_weight"].child_ops[0].params_name_mapping) == {"in_proj_weight": "1.in_proj_weight"}


def test_a_table_of_them() -> None:
    table = weights_table(get_weights_metadata(nn.Sequential(nn.Linear(64, 64)), 4000))
    assert table.text().splitlines()[0] == "1 weights, 16,384 bytes"
    assert table.text().splitlines()[2].split()[:4] == ["0.weight", "64x64", "0.0%", "0.0%"]
    assert "0.weight" in table.markdown()


@pytest.mark.parametrize("threshold", [-1, True, 1.5, "2048", None])
def test_thresholds_that_are_none(threshold: Any) -> None:
    with pytest.raises(ArgumentError, match=r"weight_threshold=.*give a number of elements"):
        get_weights_metadata(nn.Linear(2, 2), threshold)


def test_models_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="model is a dict"):
        get_weights_metadata({})  # type: ignore[arg-type]
    with pytest.raises(DataFileError, match="no such file"):
        get_weights_metadata(tmp_path / "missing.onnx")


def test_values_outside_the_file_are_read(tmp_path: Path) -> None:
    layer = nn.Sequential(nn.Linear(64, 64))
    export_onnx(layer, torch.zeros(1, 64), tmp_path / "whole.onnx")
    whole = get_weights_metadata(tmp_path / "whole.onnx")
    onnx.save_model(
        onnx.load(tmp_path / "whole.onnx"),
        tmp_path / "split.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    split = get_weights_metadata(tmp_path / "split.onnx")
    np.testing.assert_array_equal(split["0.weight"].val, whole["0.weight"].val)
