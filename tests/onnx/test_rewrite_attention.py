"""Attention blocks in a file: fewer float operators between integer layers, and the same numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify.onnx import rewrite_attention
from sparsify.onnx.export import export_onnx
from sparsify.onnx.runtime import open_session, optimized_operators, run_session
from tests.loops import quantized


def kinds(model: ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def model_of(nodes: list[onnx.NodeProto], shape: list[int | str], constants: dict[str, np.ndarray]) -> ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def copied(model: ModelProto) -> ModelProto:
    return ModelProto.FromString(model.SerializeToString())


def same_numbers(before: ModelProto, after: ModelProto, x: np.ndarray) -> None:
    expected, found = (ReferenceEvaluator(model).run(None, {"x": x})[0] for model in (before, after))
    np.testing.assert_array_equal(found, expected)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("last", "fused"), [([-1, 2, 5, 3], True), ([-1, 2, 3, 5], False), ([-1, 1, 10, 3], False)])
def test_keys_are_transposed_at_once_where_the_shape_comes_back(last: list[int], fused: bool) -> None:
    nodes = [
        helper.make_node("Reshape", ["x", "three"], ["a"]),
        helper.make_node("Transpose", ["a"], ["b"], perm=[0, 2, 1]),
        helper.make_node("Reshape", ["b", "four"], ["y"]),
    ]
    model = model_of(nodes, ["n", 2, 3, 5], {"three": np.int64([-1, 3, 5]), "four": np.int64(last)})
    before = copied(model)
    rewrite_attention.transpose_keys(model)
    assert kinds(model) == (Counter({"Transpose": 1}) if fused else Counter({"Reshape": 2, "Transpose": 1}))
    same_numbers(before, model, normal(4, 2, 3, 5))


def test_keys_whose_middle_dimensions_are_mixed_are_left_alone() -> None:
    nodes = [
        helper.make_node("Reshape", ["x", "three"], ["a"]),
        helper.make_node("Transpose", ["a"], ["b"], perm=[0, 2, 1]),
        helper.make_node("Reshape", ["b", "four"], ["y"]),
    ]
    # (n, 2, 4, 3) read as (n, 8, 3): not the last two dimensions of x.
    model = model_of(nodes, ["n", 2, 4, 3], {"three": np.int64([-1, 8, 3]), "four": np.int64([-1, 2, 3, 4])})
    before = copied(model)
    rewrite_attention.transpose_keys(model)
    assert kinds(model)["Reshape"] == 2
    same_numbers(before, model, normal(3, 2, 4, 3))


def masked(fill: float) -> ModelProto:
    nodes = [
        helper.make_node("Greater", ["x", "zero"], ["keep"]),
        helper.make_node("Where", ["keep", "zero", "fill"], ["mask"]),
        helper.make_node("Add", ["x", "mask"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["p"], axis=-1),
        helper.make_node("IsNaN", ["p"], ["nan"]),
        helper.make_node("Where", ["nan", "zero", "p"], ["q"]),
        helper.make_node("MatMul", ["q", "v"], ["y"]),
    ]
    return model_of(nodes, ["n", 3, 4], {"zero": np.float32(0), "fill": np.float32(fill), "v": normal(4, 2)})


def test_the_guard_of_a_softmax_goes_only_where_no_row_can_be_nan() -> None:
    x = normal(2, 3, 4)
    x[0, 0] = -1.0  # A row of which nothing is kept.
    for fill, guards in ((float(np.finfo(np.float32).min), 0), (-np.inf, 1)):
        model = masked(fill)
        before = copied(model)
        rewrite_attention.drop_guards(model)
        assert kinds(model)["IsNaN"] == guards
        with np.errstate(invalid="ignore"):
            same_numbers(before, model, x)


def sequence(*between: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Two layers over a sequence as `linear_as_gemm` leaves them, and what stands between."""
    return [
        helper.make_node("Reshape", ["x", "rows"], ["x_rows"]),
        helper.make_node("Gemm", ["x_rows", "w"], ["a_rows"]),
        helper.make_node("Reshape", ["a_rows", "whole"], ["a"]),
        *between,
        helper.make_node("Reshape", ["b", "rows"], ["b_rows"]),
        helper.make_node("Gemm", ["b_rows", "w"], ["c_rows"]),
        helper.make_node("Reshape", ["c_rows", "whole"], ["y"]),
    ]


BETWEEN: dict[str, list[onnx.NodeProto]] = {
    "activation": [helper.make_node("Gelu", ["a"], ["b"])],
    "residual": [helper.make_node("Add", ["a", "x"], ["s"]), helper.make_node("Tanh", ["s"], ["b"])],
    "norm": [helper.make_node("LayerNormalization", ["a", "g", "g"], ["b"], axis=2)],
    "chain": [
        helper.make_node("Add", ["x", "a"], ["s"]),
        helper.make_node("LayerNormalization", ["s", "g", "g"], ["n"], axis=-1),
        helper.make_node("Relu", ["n"], ["r"]),
        helper.make_node("Mul", ["r", "n"], ["b"]),
    ],
}


@pytest.mark.parametrize("name", BETWEEN)
def test_between_layers_over_a_sequence_there_are_no_reshapes(name: str) -> None:
    constants = {"rows": np.int64([-1, 4]), "whole": np.int64([-1, 3, 4]), "w": normal(4, 4), "g": normal(4)}
    model = model_of(sequence(*BETWEEN[name]), ["n", 3, 4], constants)
    before = copied(model)
    rewrite_attention.rows(model)
    # In, and out again. What the Add reads besides is the input, whose rows are there already or are made once more.
    assert kinds(model)["Reshape"] <= 3 and kinds(before)["Reshape"] == 4
    order = [node.op_type for node in model.graph.node]
    first, second = (i for i, kind in enumerate(order) if kind == "Gemm")
    assert "Reshape" not in order[first:second] or name in ("residual", "chain")
    same_numbers(before, model, normal(2, 3, 4))
    again = copied(model)
    rewrite_attention.rows(again)
    assert again == model


@pytest.mark.parametrize(
    "between",
    [
        [helper.make_node("Softmax", ["a"], ["b"], axis=1)],
        [helper.make_node("LayerNormalization", ["a", "k", "k"], ["b"], axis=1)],
        [helper.make_node("Add", ["a", "one"], ["b"])],
    ],
)
def test_what_mixes_rows_or_broadcasts_over_them_stays(between: list[onnx.NodeProto]) -> None:
    constants = {"rows": np.int64([-1, 4]), "whole": np.int64([-1, 3, 4]), "w": normal(4, 4)}
    constants.update(k=normal(3, 4), one=normal(1, 3, 4))
    model = model_of(sequence(*between), ["n", 3, 4], constants)
    before = copied(model)
    rewrite_attention.rows(model)
    assert kinds(model)["Reshape"] == 4
    same_numbers(before, model, normal(2, 3, 4))


class Masked(nn.Module):
    """Two encoder layers with a padding mask, in the manner of transformers."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    **{name: nn.Linear(width, width) for name in ("query", "key", "value", "out")},
                    **{"up": nn.Linear(width, 3 * width), "down": nn.Linear(3 * width, width)},
                    **{"norm1": nn.LayerNorm(width), "norm2": nn.LayerNorm(width)},
                }
            )
            for _ in range(2)
        )

    def forward(self, ids: Tensor, keep: Tensor) -> Tensor:
        x = self.embed(ids)
        batch, length, width = x.shape

        def split(t: Tensor) -> Tensor:
            return t.view(batch, length, 2, -1).transpose(1, 2)

        for layer in self.layers:
            q, k, v = (split(layer[name](x)) for name in ("query", "key", "value"))
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :])
            x = layer["norm1"](x + layer["out"](mixed.transpose(1, 2).reshape(batch, length, width)))
            x = layer["norm2"](x + layer["down"](F.gelu(layer["up"](x))))
        return x


def test_an_encoder_keeps_its_values_and_few_reshapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Masked()
    ids, keep = torch.randint(0, 20, (3, 7)), torch.ones(3, 7, dtype=torch.bool)
    keep[1, 4:] = False
    quantized(model, ids, keep)
    with torch.no_grad():
        model(ids, keep)
    model.eval()
    feeds = {"ids": ids.numpy(), "keep": keep.numpy()}
    file = export_onnx(model, (ids, keep), tmp_path / "rewritten.onnx")
    found = run_session(open_session(file.path), feeds)
    with monkeypatch.context() as patch:
        for name in ("transpose_keys", "drop_guards", "rows"):
            patch.setattr(rewrite_attention, name, lambda proto: None)
        plain = export_onnx(model, (ids, keep), tmp_path / "plain.onnx")
    expected = run_session(open_session(plain.path), feeds)
    np.testing.assert_allclose(found["output"], expected["output"], rtol=1e-5, atol=1e-6)
    before, after = (optimized_operators(one.path) for one in (plain, file))
    assert after["QGemm"] == before["QGemm"] == 12
    assert after["IsNaN"] == 0 < before["IsNaN"]
    assert after["Reshape"] <= 2 * 6 + 2 < before["Reshape"]
    assert kinds(onnx.load(file.path))["Shape"] < kinds(onnx.load(plain.path))["Shape"]
