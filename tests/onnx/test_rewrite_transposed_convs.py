"""A transposed convolution becomes a convolution that gives the same integers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import nn

from sparsify.analysis import analyze_model, get_weights_metadata
from sparsify.onnx.export import export_onnx
from sparsify.onnx.reference import Reference
from sparsify.onnx.rewrite_transposed_convs import Axis, transposed_convolutions
from sparsify.onnx.runtime import open_session, optimized_operators, run_session
from sparsify.onnx.verify import verify_onnx
from tests.loops import quantized, train

AXES = st.builds(
    Axis,
    kernel=st.integers(1, 5),
    stride=st.integers(1, 4),
    dilation=st.integers(1, 3),
    ahead=st.integers(0, 5),
    behind=st.integers(0, 5),
    added=st.integers(0, 2),
)


def file_of(
    axes: list[Axis], sizes: list[int], group: int, per_channel: bool, seed: int, bias: bool = True
) -> ModelProto:
    """Q -> DQ -> ConvTranspose -> Relu -> Q -> DQ, with a free batch."""
    generator = np.random.default_rng(seed)
    inner, outer = 2, 3
    weight = generator.integers(-127, 128, (inner * group, outer, *(axis.kernel for axis in axes))).astype(np.int8)
    scale = generator.uniform(0.01, 0.1, outer if per_channel else ()).astype(np.float32)
    steps = np.tile(scale, group) if per_channel else scale
    constants = {
        "s": np.float32(0.05),
        "z": np.uint8(117),
        "up.weight_int8": weight,
        "up.weight_scale": scale,
        "up.bias_int32": generator.integers(-3000, 3000, outer * group).astype(np.int32),
        "up.bias_scale": (np.float32(0.05) * steps).astype(np.float32),
        "t": np.float32(1.7),
        "zero": np.uint8(0),
    }
    pads = [axis.ahead for axis in axes] + [axis.behind for axis in axes]
    along = {"axis": 1} if per_channel else {}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="in"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["up.weight_int8", "up.weight_scale"], ["w"], **along),
        helper.make_node("DequantizeLinear", ["up.bias_int32", "up.bias_scale"], ["b"], axis=0),
        helper.make_node(
            "ConvTranspose",
            ["d", "w", "b"][: 3 if bias else 2],
            ["a"],
            name="up/ConvTranspose",
            strides=[axis.stride for axis in axes],
            dilations=[axis.dilation for axis in axes],
            output_padding=[axis.added for axis in axes],
            pads=pads,
            group=group,
        ),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("QuantizeLinear", ["r", "t", "zero"], ["rq"], name="up/QuantizeLinear"),
        helper.make_node("DequantizeLinear", ["rq", "t", "zero"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", inner * group, *sizes])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", *[None] * (1 + len(axes))])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def sums_of(axes: list[Axis], x: np.ndarray, weight: np.ndarray, group: int) -> np.ndarray:
    """By the definition: every pixel adds its products to all that it reaches; then the edges are cut off."""
    spatial = x.shape[2:]
    sizes = [(n - 1) * axis.stride + axis.extent + axis.added for n, axis in zip(spatial, axes, strict=True)]
    outer = weight.shape[1]
    whole = np.zeros((x.shape[0], outer * group, *sizes), np.int64)
    inner = x.shape[1] // group
    for at in np.ndindex(*spatial):
        for tap in np.ndindex(*weight.shape[2:]):
            place = tuple(p * axis.stride + t * axis.dilation for p, t, axis in zip(at, tap, axes, strict=True))
            for g in range(group):
                mine = slice(g * inner, (g + 1) * inner)
                taps = weight[(mine, slice(None), *tap)].astype(np.int64)
                whole[(slice(None), slice(g * outer, (g + 1) * outer), *place)] += x[(slice(None), mine, *at)] @ taps
    kept = [slice(axis.ahead, size - axis.behind) for axis, size in zip(axes, sizes, strict=True)]
    return whole[(slice(None), slice(None), *kept)]


@settings(max_examples=120, deadline=None)
@given(
    axes=st.lists(AXES, min_size=1, max_size=2),
    size=st.integers(1, 4),
    group=st.sampled_from([1, 1, 2]),
    per_channel=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_integers_are_those_of_the_transposed_convolution(
    axes: list[Axis], size: int, group: int, per_channel: bool, bias: bool, seed: int
) -> None:
    sizes = [size + i for i in range(len(axes))]
    for axis, n in zip(axes, sizes, strict=True):
        assume(axis.added < max(axis.stride, axis.dilation))
        assume((n - 1) * axis.stride + axis.extent + axis.added - axis.ahead - axis.behind > 0)
    model = file_of(axes, sizes, group, per_channel, seed, bias)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    transposed_convolutions(model)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Conv") == 1 and "ConvTranspose" not in kinds
    x = np.random.default_rng(seed).uniform(-6, 6, (2, 2 * group, *sizes)).astype(np.float32)
    q = np.clip(np.rint(x / np.float32(0.05)) + 117, 0, 255).astype(np.int64) - 117
    sums = sums_of(axes, q, constants["up.weight_int8"], group)
    trailing = (-1, *[1] * len(axes))
    if bias:
        sums = sums + constants["up.bias_int32"].astype(np.int64).reshape(trailing)
    scale = constants["up.weight_scale"]
    multiplier = np.float32(0.05) * (np.tile(scale, group).reshape(trailing) if per_channel else scale)
    multiplier = (multiplier / np.float32(1.7)).astype(np.float32)
    expected = np.clip(np.rint(sums.astype(np.float32) * multiplier), 0, 255)
    found = Reference(model).run({"x": x}, keep=["rq"])
    assert found["rq"].shape == sums.shape
    np.testing.assert_array_equal(found["rq"].astype(np.int64), expected.astype(np.int64))


@pytest.mark.parametrize(
    "axes",
    [
        [Axis(2, 2)] * 2,
        [Axis(4, 2, 1, 1, 1)] * 2,
        [Axis(3, 2, 1, 1, 1, 1)] * 2,
        [Axis(3, 3), Axis(2)],
        [Axis(16, 8, 1, 4, 4)],
    ],
    ids=["blocks", "k4 s2 p1", "k3 s2 p1 added 1", "one axis", "line"],
)
def test_onnxruntime_gives_the_integers_of_the_reference(axes: list[Axis], tmp_path: Path) -> None:
    sizes = [7, 6][: len(axes)]
    model = file_of(axes, sizes, 1, True, 0)
    transposed_convolutions(model)
    path = tmp_path / "up.onnx"
    onnx.save(model, path)
    found = optimized_operators(path)
    assert found["QLinearConv"] == 1 and not {"Conv", "ConvTranspose", "Relu"} & set(found)
    x = np.random.default_rng(1).uniform(-6, 6, (3, 2, *sizes)).astype(np.float32)
    expected = Reference(model).run({"x": x})["y"]
    np.testing.assert_array_equal(run_session(open_session(path), {"x": x})["y"], expected)


def test_a_second_rewrite_changes_nothing() -> None:
    model = file_of([Axis(3, 2, 1, 1, 1, 1)] * 2, [4, 5], 1, True, 0)
    transposed_convolutions(model)
    before = model.SerializeToString(deterministic=True)
    transposed_convolutions(model)
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    "change", [{"x": np.int8(3)}, {"up": np.uint8(3)}, {"float": True}], ids=["int8", "uint8 weights", "in float"]
)
def test_what_no_integer_kernel_takes_stays(change: dict[str, object]) -> None:
    model = file_of([Axis(2, 2)] * 2, [4, 4], 1, False, 0)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    if "x" in change:
        tensors["z"].CopyFrom(numpy_helper.from_array(np.asarray(change["x"]), "z"))
    elif "up" in change:
        weight = numpy_helper.to_array(tensors["up.weight_int8"]).view(np.uint8)
        tensors["up.weight_int8"].CopyFrom(numpy_helper.from_array(weight, "up.weight_int8"))
    else:
        model.graph.output[0].name = "r"
    before = model.SerializeToString(deterministic=True)
    transposed_convolutions(model)
    assert model.SerializeToString(deterministic=True) == before


class Doubled(nn.Module):
    """One layer called twice, and one whose kernel its stride does not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.twice = nn.ConvTranspose2d(4, 4, 2, 2)
        self.up = nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.up(self.twice(self.twice(self.stem(x)).relu()).relu()).relu())
        return y


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.ConvTranspose1d(4, 4, 16, 8, 4, groups=2)), (2, 2, 9)),
        (
            nn.Sequential(nn.Conv3d(2, 4, 1), nn.ReLU(), nn.ConvTranspose3d(4, 3, 2, 2), nn.BatchNorm3d(3), nn.ReLU()),
            (2, 2, 3, 4, 5),
        ),
    ],
    ids=["vocoder", "volumes"],
)
def test_lines_and_volumes_run_in_integers(model: nn.Module, shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, path = torch.randn(shape), tmp_path / "up.onnx"
    plan = quantized(model, x)
    assert len(plan.layers) == 2
    train(model, x, 2)
    before = model.eval()(x)
    exported = export_onnx(model, x, path)
    assert exported.floating == exported.unaccelerated == () and len(exported.quantized) == 2
    result = verify_onnx(model, path, x)
    assert result.ok and result.exact and result.unfused == (), str(result)
    assert all(tensor.torch is not None and tensor.torch.steps <= 1 for tensor in result.tensors)
    found = run_session(open_session(path), {"input": x.numpy()})["output"]
    np.testing.assert_allclose(found, before.detach().numpy(), atol=0.02)


def test_torch_is_compared_behind_the_movement(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 6, 4, 2, 1), nn.ReLU(), nn.Conv2d(6, 2, 1)
    )
    x, path = torch.randn(2, 3, 6, 6), tmp_path / "up.onnx"
    quantized(model, x)
    train(model, x, 2)
    export_onnx(model.eval(), x, path)
    result = verify_onnx(model, path, x)
    assert result.ok and result.exact and result.unfused == (), str(result)
    assert all(tensor.torch is not None and tensor.torch.count == 0 for tensor in result.tensors)
    with torch.no_grad():
        model[2].weight.neg_()
    assert not verify_onnx(model, path, x).ok


def test_a_file_tells_of_its_layers_as_they_are_in_torch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, path = Doubled(), torch.randn(2, 3, 6, 6), tmp_path / "up.onnx"
    quantized(model, x)
    train(model, x, 2)
    with torch.no_grad():
        model.up.weight[:, 0] = 0.0
    exported = export_onnx(model.eval(), x, path)
    result = verify_onnx(model, path, x)
    # One layer reads what a ReLU gives, and what goes below zero: the ReLUs behind it are no part of a quantizer.
    assert result.ok and result.exact and {each.operator for each in result.unfused} == {"Relu"}, str(result)
    assert exported.floating == exported.unaccelerated == ()
    assert [name for name in exported.quantized if "up" in name or "twice" in name] == [
        "twice/Conv",
        "twice/Conv_2",
        "up/Conv",
    ]
    layers = {layer.name: layer for layer in analyze_model(path).layers}
    assert set(layers) == {"stem", "twice", "up", "head"} and layers["twice"].calls == 2
    assert layers["up"].weights == 4 * 6 * 9 and layers["up"].parameters == 4 * 6 * 9 + 6
    assert layers["up"].sparsity == pytest.approx(1 / 6, abs=0.02) and layers["up"].bits == 8
    weight = get_weights_metadata(path, 50)["up.weight"]
    assert weight.sparsity == layers["up"].sparsity and weight.zero_rows == pytest.approx(1 / 6)
    assert [op.name for op in weight.child_ops] == ["up/Conv"]
