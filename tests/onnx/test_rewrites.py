"""Each rewrite leaves the numbers as they were and does what it is there for."""

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

from sparsify.errors import DataError
from sparsify.onnx import rewrite_activations, rewrites
from sparsify.onnx.export import export_onnx
from sparsify.onnx.graph import remove_unused
from sparsify.onnx.runtime import open_session, optimized_operators, run_session
from sparsify.onnx.verify import verify_onnx
from sparsify.quantization.scheme import NAMED, QuantizationSettings
from tests.loops import quantized, quantized_and_trained, train
from tests.zoo.integer_forms import IntegerWeights, Quantizer


def kinds(model: ModelProto | Path) -> Counter[str]:
    graph = (onnx.load(model) if isinstance(model, Path) else model).graph
    return Counter(node.op_type for node in graph.node)


def model_of(nodes: list[onnx.NodeProto], shape: list[int | str], **constants: np.ndarray) -> ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def same_numbers(before: ModelProto, after: ModelProto, x: np.ndarray) -> None:
    expected, found = (ReferenceEvaluator(model).run(None, {"x": x})[0] for model in (before, after))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("axes", [[2, 3], [-1, -2]])
def test_a_mean_over_the_image_becomes_global_average_pool(keepdims: int, axes: list[int]) -> None:
    nodes = [helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=keepdims)]
    model = model_of(nodes, ["n", 3, 4, 5], axes=np.int64(axes))
    before = ModelProto.FromString(model.SerializeToString())
    rewrites.reduce_mean_to_global_average_pool(model)
    assert kinds(model)["GlobalAveragePool"] == 1 and kinds(model)["ReduceMean"] == 0
    same_numbers(before, model, np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32))


@pytest.mark.parametrize(("axes", "shape"), [([1, 2, 3], ["n", 3, 4, 5]), ([2], ["n", 3, 4, 5]), ([1], ["n", 3])])
def test_other_means_stay(axes: list[int], shape: list[int | str]) -> None:
    model = model_of([helper.make_node("ReduceMean", ["x", "axes"], ["y"])], shape, axes=np.int64(axes))
    rewrites.reduce_mean_to_global_average_pool(model)
    assert kinds(model) == {"ReduceMean": 1}


def test_the_mean_of_an_image_is_pooled_in_integers(tmp_path: Path) -> None:
    """What another network's test leaves out: the mean in forward, without a pool."""
    path = tmp_path / "inverted.onnx"
    model, x = quantized_and_trained("inverted")
    exported = export_onnx(model, x, path)
    found = optimized_operators(path)
    assert found["QLinearGlobalAveragePool"] == found["QGemm"] == 1 and exported.floating == ()
    assert not {"GlobalAveragePool", "ReduceMean", "Gemm", "DequantizeLinear"} & set(found)
    assert verify_onnx(model, path, x)


def test_a_flatten_that_others_read_too_stays_in_float() -> None:
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("QuantizeLinear", ["f", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Add", ["f", "d"], ["y"]),
    ]
    model = model_of(nodes, ["n", 3, 2], s=np.float32(0.1), z=np.uint8(128))
    before = model.SerializeToString(deterministic=True)
    rewrites.quantize_before_flatten(model)
    assert model.SerializeToString(deterministic=True) == before


class Chain(nn.Module):
    """Two Linear layers with everything between them quantized, on rank 3."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Quantizer(0.05, 128), Quantizer(0.04, 120)
        self.one = IntegerWeights(6, 8, None, self.first.scale)
        self.two = IntegerWeights(8, 4, None, self.second.scale)
        self.last = Quantizer(0.03, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.two(self.second(self.one(self.first(x)))))


def test_between_quantized_linear_layers_everything_is_integer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "chain.onnx"
    model, x = Chain().eval(), torch.randn(3, 5, 6)
    export_onnx(model, x, path)
    found = optimized_operators(path)
    assert found["QGemm"] == 2 and not {"Gemm", "MatMul", "Add"} & set(found)
    assert found["QuantizeLinear"] == found["DequantizeLinear"] == 1
    for optimized in (False, True):
        results = run_session(open_session(path, optimized=optimized), {"x": x.numpy()})
        np.testing.assert_allclose(results["output"], model(x).numpy(), atol=0.031)


class Pools(nn.Module):
    """The output of a pool is quantized again, with the same grid."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.before, self.after = Quantizer(0.05, 7), Quantizer(scale, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(F.max_pool2d(self.before(x), 2)).flatten(1)


@pytest.mark.parametrize(("scale", "quantizers"), [(0.05, 1), (0.06, 2)])
def test_quantizing_to_the_same_grid_again_is_nothing(tmp_path: Path, scale: float, quantizers: int) -> None:
    path = tmp_path / "pools.onnx"
    model, x = Pools(scale).eval(), torch.randn(2, 3, 4, 4)
    export_onnx(model, x, path)
    assert kinds(path)["QuantizeLinear"] == kinds(path)["DequantizeLinear"] == quantizers
    found = run_session(open_session(path, optimized=False), {"x": x.numpy()})["output"]
    np.testing.assert_allclose(found, model(x).numpy(), atol=1e-6)


class Shared(nn.Module):
    """One quantized tensor, read by a Linear of rank 3 and in float."""

    def __init__(self) -> None:
        super().__init__()
        self.quantizer = Quantizer(0.05, 128)
        self.layer = IntegerWeights(6, 6, None, self.quantizer.scale)

    def forward(self, x: Tensor) -> Tensor:
        x = self.quantizer(x)
        return x + self.layer(x)


def test_a_float_reader_keeps_its_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "shared.onnx"
    model, x = Shared().eval(), torch.randn(2, 3, 5, 6)
    export_onnx(model, x, path)
    assert optimized_operators(path)["QGemm"] == 1
    found = run_session(open_session(path), {"x": x.numpy()})["output"]
    np.testing.assert_allclose(found, model(x).numpy(), atol=1e-4)


def test_a_linear_behind_moved_integers_is_a_gemm(tmp_path: Path) -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 6, 2, 2), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.conv(x).flatten(2).permute(2, 0, 1))
            return y

    torch.manual_seed(0)
    model, x = Patches(), torch.randn(2, 3, 6, 6)
    quantized(model, x)
    train(model, x, 2)
    file = export_onnx(model.eval(), x, tmp_path / "patches.onnx")
    assert kinds(file.path)["Gemm"] == 1 and kinds(file.path)["MatMul"] == 0
    assert optimized_operators(file)["QGemm"] == 1
    assert verify_onnx(model, file.path, x).exact


def test_two_dynamic_axes_keep_their_shape() -> None:
    weight = np.random.default_rng(0).integers(-127, 128, (6, 4)).astype(np.int8)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="d"),
        helper.make_node("DequantizeLinear", ["w", "ws"], ["dw"], name="dw", axis=1),
        helper.make_node("MatMul", ["d", "dw"], ["y"], name="layer/MatMul"),
    ]
    constants = {"s": np.float32(0.1), "z": np.uint8(128), "w": weight, "ws": np.full(4, 0.01, np.float32)}
    model = model_of(nodes, ["n", "t", 6], **constants)
    before = ModelProto.FromString(model.SerializeToString())
    rewrites.linear_as_gemm(model)
    assert kinds(model)["Gemm"] == 1 and kinds(model)["MatMul"] == 0 and kinds(model)["Shape"] == 1
    assert "layer/Gemm" in {node.name for node in model.graph.node}
    same_numbers(before, model, np.random.default_rng(1).standard_normal((2, 5, 6)).astype(np.float32))


def test_a_second_rewrite_changes_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "chain.onnx"
    export_onnx(Chain(), torch.randn(3, 5, 6), path)
    model = onnx.load(path)
    before = model.SerializeToString(deterministic=True)
    rewrites.rewrite(model)
    assert model.SerializeToString(deterministic=True) == before


def test_what_no_output_needs_goes_and_subgraphs_keep_what_they_read() -> None:
    branch = helper.make_graph(
        [helper.make_node("Add", ["x", "kept"], ["inner"])],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch),
        helper.make_node("Add", ["x", "dropped"], ["unused"]),
    ]
    model = model_of(nodes, ["n", 3], yes=np.bool_(True), kept=np.float32([1, 2, 3]), dropped=np.float32([0, 0, 0]))
    remove_unused(model)
    assert kinds(model) == {"If": 1}
    assert {tensor.name for tensor in model.graph.initializer} == {"yes", "kept"}


@pytest.mark.parametrize(("scale", "added"), [(1 / 255, True), (1 / 200, False)])
def test_a_hard_sigmoid_between_integers_becomes_an_add_that_saturates(scale: float, added: bool) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("HardSigmoid", ["d"], ["h"], alpha=1 / 6, beta=0.5),
        helper.make_node("QuantizeLinear", ["h", "t", "zero"], ["r"]),
        helper.make_node("DequantizeLinear", ["r", "t", "zero"], ["y"]),
    ]
    constants = {"s": np.float32(0.05), "z": np.uint8(131), "t": np.float32(scale), "zero": np.uint8(0)}
    model = model_of(nodes, ["n", 256], **constants)
    before = ModelProto.FromString(model.SerializeToString())
    rewrite_activations.hard_sigmoid_as_add(model)
    assert kinds(model)["Add"] == int(added) and kinds(model)["HardSigmoid"] == int(not added)
    # Every integer there is.
    x = ((np.arange(256, dtype=np.float32) - 131) * np.float32(0.05))[None]
    expected, found = (ReferenceEvaluator(one).run(None, {"x": x})[0] for one in (before, model))
    # 1 / 6 is rounded at another place: at a tie the neighbour.
    assert np.abs(found - expected).max() <= scale * 1.01 and (found != expected).mean() < 0.02


@pytest.mark.parametrize(
    ("scale", "zero", "rewritten"), [(1 / 128, 128, True), (1 / 127, 128, False), (1 / 128, 127, False)]
)
@pytest.mark.parametrize("read", [0.001, 0.0137, 0.05])
def test_a_tanh_between_integers_becomes_a_sigmoid(read: float, scale: float, zero: int, rewritten: bool) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Sigmoid", ["d"], ["other"], name="Sigmoid"),
        helper.make_node("Tanh", ["d"], ["h"], name="Tanh"),
        helper.make_node("QuantizeLinear", ["h", "t", "u"], ["r"]),
        helper.make_node("DequantizeLinear", ["r", "t", "u"], ["read"]),
        helper.make_node("Add", ["read", "other"], ["y"]),
    ]
    constants = {"s": np.float32(read), "z": np.uint8(131), "t": np.float32(scale), "u": np.uint8(zero)}
    model = model_of(nodes, ["n", 256], **constants)
    before = ModelProto.FromString(model.SerializeToString())
    rewrite_activations.tanh_as_sigmoid(model)
    assert kinds(model)["Sigmoid"] == 1 + rewritten and kinds(model)["Tanh"] == int(not rewritten)
    named = [node.name for node in model.graph.node if node.name]
    assert len(set(named)) == len(named)
    # Every integer there is.
    x = ((np.arange(256, dtype=np.float32) - 131) * np.float32(read))[None]
    expected, found = (ReferenceEvaluator(one).run(None, {"x": x})[0] for one in (before, model))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("number", [0.75, -0.31, 0.0, 6.0])
@pytest.mark.parametrize("operator", ["Add", "Mul"])
@pytest.mark.parametrize("first", [True, False])
def test_a_number_beside_integers_is_an_integer(operator: str, number: float, first: bool) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node(operator, ["d", "c"] if first else ["c", "d"], ["h"], name=operator),
        helper.make_node("QuantizeLinear", ["h", "t", "z"], ["r"]),
        helper.make_node("DequantizeLinear", ["r", "t", "z"], ["y"]),
    ]
    constants = {"s": np.float32(0.0131), "z": np.uint8(131), "t": np.float32(0.071), "c": np.float32(number)}
    model = model_of(nodes, ["n", 256], **constants)
    before = ModelProto.FromString(model.SerializeToString())
    rewrite_activations.numbers_as_integers(model)
    assert kinds(model)["DequantizeLinear"] == 3
    x = ((np.arange(256, dtype=np.float32) - 131) * np.float32(0.0131))[None]
    expected, found = (ReferenceEvaluator(one).run(None, {"x": x})[0] for one in (before, model))
    np.testing.assert_array_equal(found, expected)
    rewrite_activations.numbers_as_integers(model)
    assert kinds(model)["DequantizeLinear"] == 3


class Scaled(nn.Module):
    """A residual that is scaled, as in EDSR, and hard swish by hand up to its division."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = (nn.Conv2d(*channels, 1) for channels in ((3, 4), (4, 4), (4, 2)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + 0.1 * self.body(x)
        return self.head(x * F.relu6(x + 3))  # type: ignore[no-any-return]


def test_scaled_residuals_and_shifted_activations_run_in_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, path = Scaled(), torch.randn(4, 3, 5, 5), tmp_path / "scaled.onnx"
    quantized(model, x)
    train(model, x, 3)
    export_onnx(model.eval(), x, path)
    result = verify_onnx(model, path, x)
    assert result.ok and result.exact and result.unfused == (), str(result)
    found = optimized_operators(path)
    assert found["QLinearMul"] == found["QLinearAdd"] == 2


class Vocoder(nn.Module):
    """WaveNet's gate, and the tanh of a generator, as a module and in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 4, 3)
        self.filter, self.gate = nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1)
        self.out = nn.Conv1d(4, 2, 1)
        self.tanh = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.tanh(self.out(self.filter(x).tanh_() * torch.sigmoid(self.gate(x))))  # type: ignore[no-any-return]


def test_tanh_runs_in_integers_on_the_grid_that_it_was_trained_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, path = Vocoder(), torch.randn(4, 2, 9), tmp_path / "vocoder.onnx"
    plan = quantized(model, x)
    fixed = {site.name for site in plan.sites if site.fixed}
    assert fixed == {"gate_0_quantizer", "tanh.output_quantizer"}
    train(model, 3 * x, 3)
    for name in fixed:
        quantizer = model.get_submodule(name)
        values = [float(getattr(quantizer, key)) for key in ("scale", "zero_point", "low", "high", "batches")]
        assert values == [1 / 128, 128, -1.0, 127 / 128, 3]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    y = model.eval()(x)
    assert torch.equal((y * 128).round(), y * 128) and y.min() >= -1.0
    with pytest.raises(DataError, match="tanh"):
        model.tanh.output_quantizer.train()(torch.full((2,), torch.nan))
    export_onnx(model.eval(), x, path)
    result = verify_onnx(model, path, x)
    assert result.ok and result.exact and result.unfused == (), str(result)
    assert optimized_operators(path)["QLinearSigmoid"] == 3


def test_signed_tanh_keeps_a_range_of_its_own() -> None:
    model = Vocoder()
    plan = quantized(model, torch.randn(4, 2, 9), settings=QuantizationSettings(scheme=NAMED["tensorrt"]))
    assert not any(site.fixed for site in plan.sites)


def test_gates_run_in_integers(tmp_path: Path) -> None:
    model, inputs = quantized_and_trained("gated")
    found = optimized_operators(export_onnx(model.eval(), inputs, tmp_path / "gated.onnx"))
    # SiLU, HardSwish, and the product of squeeze-and-excitation; its sigmoid and that of SiLU.
    assert found["QLinearMul"] == 3 and found["QLinearSigmoid"] == 2
    assert not {"Sigmoid", "HardSigmoid", "HardSwish", "Mul", "DequantizeLinear"} & set(found)


def test_every_part_of_a_split_moves_as_integers() -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Split", ["d", "sizes"], ["a", "b"], axis=1),
        helper.make_node("Concat", ["b", "a"], ["y"], axis=1),
    ]
    model = model_of(nodes, ["n", 4], s=np.float32(0.5), z=np.uint8(3), sizes=np.int64([1, 3]))
    before = ModelProto.FromString(model.SerializeToString())
    rewrites.dequantize_after_movement(model)
    split = next(node for node in model.graph.node if node.op_type == "Split")
    assert split.input[0] == "q" and kinds(model)["DequantizeLinear"] == 2
    assert len({node.name for node in model.graph.node if node.op_type == "DequantizeLinear"}) == 2
    same_numbers(before, model, np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32))


def _dense_gate() -> nn.Module:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.pool = nn.AdaptiveAvgPool2d(1)
            self.hidden = nn.Linear(8, 8)
            self.swish = nn.Hardswish()
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.swish(self.hidden(self.pool(self.conv(x).relu()).flatten(1))))  # type: ignore[no-any-return]

    return Gated()


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)),
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(2), nn.LayerNorm(36)),
        _dense_gate(),
    ],
    ids=["last", "before a norm", "linear before a gate"],
)
def test_a_layer_in_front_of_floats_runs_in_integers(model: nn.Module, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    path = tmp_path / "model.onnx"
    quantized(model, x)
    train(model, x, 2)
    export_onnx(model.eval(), (x,), path)
    found = verify_onnx(model, path, (x,))
    assert found.ok
    # What is left in float is no layer.
    assert not [each for each in found.unfused if each.operator in ("Conv", "Gemm", "MatMul", "Mul")], str(found)


class Pyramid(nn.Module):
    """What is coarse is laid over what is fine: added by one way of writing it, concatenated by the other."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, 2, 1)
        self.over = nn.Conv2d(4, 4, 1)
        self.up = nn.Upsample(scale_factor=2, mode=mode)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = F.relu(self.fine(x))
        coarse = self.over(F.relu(self.coarse(fine)))
        above = F.interpolate(coarse, size=fine.shape[-2:], mode=self.up.mode)
        return self.head(torch.cat([fine + above, self.up(coarse)], 1))


def test_pixels_are_repeated_as_integers_and_blended_in_float(tmp_path: Path) -> None:
    for mode in ("nearest", "bilinear"):
        torch.manual_seed(0)
        model, x, path = Pyramid(mode), torch.randn(2, 3, 12, 12), tmp_path / f"{mode}.onnx"
        quantized(model, x)
        train(model, x, 2)
        export_onnx(model.eval(), x, path)
        result = verify_onnx(model, path, x)
        assert result.ok, str(result)
        graph = onnx.load(path).graph
        made = {name: node for node in graph.node for name in node.output}
        read = {made[node.input[0]].op_type for node in graph.node if node.op_type == "Resize"}
        assert read == ({"QuantizeLinear"} if mode == "nearest" else {"DequantizeLinear"})
        assert (result.exact and result.unfused == ()) == (mode == "nearest"), str(result)
        blended = [each.operator for each in result.unfused if each.operator == "Resize"]
        assert len(blended) == (2 if mode == "bilinear" else 0), str(result)
