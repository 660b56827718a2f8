"""The analysis of a file agrees with that of the model it was written from, and stands alone on files of others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from sparsify import benchmark_onnx, export_onnx, get_weights_metadata, performance_profile, quantize_model
from sparsify.analysis import ModelAnalysis, analyze_model
from sparsify.errors import ArgumentError, DataError, DataFileError
from sparsify.onnx.runtime import FILE_ELEMENTS, FILE_WEIGHTS
from tests.zoo.architectures import ARCHITECTURES

# What is looked up at constant positions is a constant of the file.
FOLDED = {
    "BERT": {"embeddings.position_embeddings"},
    "GPT-2": {"transformer.wpe"},
    "T5 encoder": {"encoder.block.0.layer.0.SelfAttention.relative_attention_bias", "shared"},
}
QUICK = ["U-Net", "attention by hand", "tied embeddings", "ShuffleNetV2", "BERT", "GPT-2"]
SLOW = ["norms of all kinds", "MobileNetV2", "ViT", "T5 encoder", "SegFormer", "Swin", "Llama with grouped queries"]
NAMES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def exported(name: str, path: Path, *, quantized: bool = False) -> tuple[nn.Module, Any]:
    architecture = ARCHITECTURES[name]
    if architecture.library is not None:
        pytest.importorskip(architecture.library)
    torch.manual_seed(0)
    model, inputs = architecture.build().eval(), architecture.inputs()
    if quantized:
        model = quantize_model(model, [inputs], least_samples=2).model
    export_onnx(model, inputs, path)
    return model, inputs


def weights(analysis: ModelAnalysis) -> dict[str, str | None]:
    return {layer.name: layer.weight for layer in analysis.layers if layer.weight is not None}


@pytest.mark.parametrize("name", NAMES)
def test_a_file_has_the_layers_and_macs_of_its_model(name: str, tmp_path: Path) -> None:
    model, inputs = exported(name, tmp_path / "model.onnx")
    of_model, of_file = analyze_model(model, inputs), analyze_model(tmp_path / "model.onnx", batch_size=2)
    assert of_file.macs == of_model.macs
    assert of_file.unknown == ()
    folded = FOLDED.get(name, set())
    assert weights(of_file) == {key: value for key, value in weights(of_model).items() if key not in folded}
    for layer in of_file.layers:
        if layer.weight is not None:
            other = of_model.layer(layer.name)
            assert (layer.macs, layer.groups, layer.weights) == (other.macs, other.groups, other.weights)
            assert layer.sparsity == pytest.approx(other.sparsity)


@pytest.mark.parametrize(
    "name",
    [
        "tied embeddings",
        "nn.TransformerEncoder",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("nn.Transformer", "MobileNetV2")),
    ],
)
def test_a_quantized_file_has_names_bits_and_zeros(name: str, tmp_path: Path) -> None:
    model, inputs = exported(name, tmp_path / "model.onnx", quantized=True)
    of_model, of_file = analyze_model(model, inputs), analyze_model(tmp_path / "model.onnx", batch_size=2)
    assert of_file.macs == of_model.macs
    assert set(weights(of_file)) == set(weights(of_model))
    assert {layer.bits for layer in of_file.layers if layer.weight} == {8}
    stored = {
        tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer
    }
    checked = 0
    for layer in of_file.layers:
        if layer.weight is not None and f"{layer.weight}_int8" in stored:
            assert layer.sparsity == pytest.approx((stored[f"{layer.weight}_int8"] == 0).mean())
            checked += 1
    assert checked > 1


def test_a_recurrent_layer_counts_as_in_torch(tmp_path: Path) -> None:
    model, inputs = exported("LSTM tagger", tmp_path / "model.onnx")
    of_model, of_file = analyze_model(model, inputs), analyze_model(tmp_path / "model.onnx", batch_size=2)
    assert of_file.macs == of_model.macs
    names = ["embed", "lstm.weight_ih", "lstm.weight_hh", "head"]
    assert [layer.name for layer in of_file.layers] == names


def test_zeros_of_pruned_weights_are_counted(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight[:3] = 0
        # A row that sums to 0 is not a pruned row.
        model[2].weight[0] = torch.tensor([1.0, -1.0, 2.0, -2.0])
    export_onnx(model, torch.zeros(2, 8), tmp_path / "model.onnx")
    analysis = analyze_model(tmp_path / "model.onnx")
    assert [layer.sparsity for layer in analysis.layers] == [0.75, 0.0]
    assert analysis.batch_size == 1
    assert analysis.macs == 32 + 16


def build(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, list[int | str]],
    constants: dict[str, np.ndarray],
    path: Path,
    *,
    producer: str = "",
) -> Path:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    # What the checker asks for: the shape of the output, or at least its rank.
    domains = [helper.make_opsetid("", 20), helper.make_opsetid("custom", 1)]
    model = helper.make_model(graph, opset_imports=domains, producer_name=producer, ir_version=10)
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph.output[0]
    if not inferred.type.tensor_type.HasField("shape"):
        inferred = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", "columns"])
    model.graph.output[0].CopyFrom(inferred)
    onnx.save(model, path)
    return path


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def node(kind: str, inputs: list[str], output: str = "y", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, [output], name=attributes.pop("name", f"the_{kind}"), **attributes)


@pytest.mark.parametrize(
    ("nodes", "inputs", "constants", "macs"),
    [
        ([node("Conv", ["x", "w"])], {"x": [1, 3, 32, 32]}, {"w": floats(8, 3, 3, 3)}, 194_400),
        ([node("Conv", ["x", "w"], group=8)], {"x": [1, 8, 32, 32]}, {"w": floats(8, 1, 3, 3)}, 64_800),
        ([node("ConvTranspose", ["x", "w"], group=2)], {"x": [1, 6, 7, 7]}, {"w": floats(6, 2, 3, 3)}, 6 * 49 * 2 * 9),
        ([node("Gemm", ["x", "w"], transB=1)], {"x": [5, 4]}, {"w": floats(3, 4)}, 60),
        ([node("Gemm", ["x", "w"], transA=1)], {"x": [4, 5]}, {"w": floats(4, 3)}, 60),
        ([node("MatMul", ["x", "z"])], {"x": [2, 3, 4], "z": [2, 4, 5]}, {}, 120),
        ([node("Einsum", ["x", "z"], equation="bij,bjk->bik")], {"x": [2, 3, 4], "z": [2, 4, 5]}, {}, 120),
        (
            [node("LSTM", ["x", "w", "r"], hidden_size=3)],
            {"x": [7, 2, 5]},
            {"w": floats(1, 12, 5), "r": floats(1, 12, 3)},
            14 * 96,
        ),
        ([node("Relu", ["x"])], {"x": [2, 3]}, {}, 0),
    ],
)
def test_one_node(
    nodes: list[onnx.NodeProto], inputs: dict[str, Any], constants: dict[str, Any], macs: int, tmp_path: Path
) -> None:
    analysis = analyze_model(build(nodes, inputs, constants, tmp_path / "model.onnx"))
    assert analysis.macs == macs
    assert analysis.unknown == ()


@pytest.mark.parametrize("kind", ["Det", "DFT", "QuantumProduct"])
def test_what_is_not_known_is_listed(kind: str, tmp_path: Path) -> None:
    domain = "custom" if kind == "QuantumProduct" else ""
    nodes = [node(kind, ["x"], domain=domain)]
    analysis = analyze_model(build(nodes, {"x": [1, 4, 4, 1]}, {}, tmp_path / "model.onnx"))
    (unknown,) = analysis.unknown
    assert unknown.operator == (f"custom::{kind}" if domain else kind)
    assert (unknown.calls, unknown.where) == (1, (f"the_{kind}",))
    assert "not counted" in str(analysis)


def test_a_product_within_a_branch_is_not_counted_as_zero(tmp_path: Path) -> None:
    def branch(inner: onnx.NodeProto) -> onnx.GraphProto:
        return helper.make_graph([inner], "branch", [], [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)])

    for inner, listed in ((node("MatMul", ["x", "x"], "b"), 1), (node("Relu", ["x"], "b"), 0)):
        then = branch(inner)
        nodes = [node("If", ["condition"], then_branch=then, else_branch=branch(node("Abs", ["x"], "b")))]
        path = build(nodes, {"x": [4, 4]}, {"condition": np.array(True)}, tmp_path / "model.onnx")
        assert len(analyze_model(path).unknown) == listed


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_zeros_are_counted_from_the_zero_point(axis: int | None, tmp_path: Path) -> None:
    points = {None: np.uint8(3), 0: np.array([3, 5, 0, 7], np.uint8), 1: np.array([3, 5, 9], np.uint8)}[axis]
    shaped = {None: np.asarray(3), 0: np.asarray(points).reshape(-1, 1), 1: np.asarray(points).reshape(1, -1)}[axis]
    values = np.full((4, 3), 200, np.uint8)
    pruned = np.array([[1, 1, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1]], bool)
    values = np.where(pruned, np.broadcast_to(shaped, (4, 3)), values).astype(np.uint8)
    scale = np.ones_like(points, dtype=np.float32)
    options = {} if axis is None else {"axis": axis}
    nodes = [node("DequantizeLinear", ["w.weight", "s", "p"], "f", **options), node("MatMul", ["x", "f"])]
    constants = {"w.weight": values, "s": np.asarray(scale), "p": np.asarray(points)}
    (layer,) = analyze_model(build(nodes, {"x": [2, 4]}, constants, tmp_path / "model.onnx")).layers
    assert layer.sparsity == pytest.approx(5 / 12)
    assert (layer.bits, layer.name, layer.weight, layer.macs) == (8, "w", "w.weight", 24)


def test_four_bits_are_four_bits(tmp_path: Path) -> None:
    weight = helper.make_tensor("w", TensorProto.INT4, [4, 4], [0, 1, -2, 3] * 4)
    path = build(
        [node("DequantizeLinear", ["w", "s"], "f"), node("MatMul", ["x", "f"])],
        {"x": [1, 4]},
        {"s": np.float32(1).reshape(())},
        tmp_path / "model.onnx",
    )
    model = onnx.load(path)
    model.graph.initializer.append(weight)
    next(iter(opset for opset in model.opset_import if not opset.domain)).version = 21
    onnx.save(model, path)
    (layer,) = analyze_model(path).layers
    assert (layer.bits, layer.sparsity) == (4, 0.25)


def test_files_of_others_keep_the_names_that_they_have(tmp_path: Path) -> None:
    nodes = [
        node("Conv", ["x", "stem.conv.weight"], "a", name="/stem/conv/Conv"),
        node("Conv", ["a", "onnx::Conv_12"], "b", name="/next/Conv"),
        node("Mul", ["b", "b"], "y"),
    ]
    constants = {"stem.conv.weight": floats(4, 3, 1, 1), "onnx::Conv_12": floats(4, 4, 1, 1)}
    analysis = analyze_model(build(nodes, {"x": ["batch", 3, 5, 5]}, constants, tmp_path / "model.onnx"), batch_size=3)
    assert [layer.name for layer in analysis.layers] == ["stem.conv", "/next/Conv"]
    assert analysis.macs == 3 * 25 * (12 + 16)
    assert analysis.batch_size == 3


def test_free_sizes_come_from_samples(tmp_path: Path) -> None:
    path = build([node("MatMul", ["x", "w"])], {"x": ["batch", "length", 4]}, {"w": floats(4, 5)}, tmp_path / "m.onnx")
    with pytest.raises(ArgumentError, match="axis 1 of input 'x' is 'length'"):
        analyze_model(path)
    for sample in (torch.zeros(2, 7, 4), {"x": np.zeros((2, 7, 4))}, [torch.zeros(2, 7, 4)]):
        analysis = analyze_model(path, sample)
        assert (analysis.macs, analysis.batch_size) == (2 * 7 * 20, 2)
    with pytest.raises(ArgumentError, match=r"sample_inputs are z, the inputs x"):
        analyze_model(path, {"z": np.zeros((2, 7, 4))})
    with pytest.raises(ArgumentError, match="2 sample inputs for 1 inputs"):
        analyze_model(path, (np.zeros(1), np.zeros(1)))


def test_shapes_that_cannot_be_inferred_are_run(tmp_path: Path) -> None:
    # What is not zero decides how long z is.
    nodes = [
        node("Abs", ["x"], "a"),
        node("Add", ["a", "one"], "b"),
        node("NonZero", ["b"], "i"),
        node("Cast", ["i"], "f", to=TensorProto.FLOAT),
        node("MatMul", ["x", "f"], "y"),
    ]
    analysis = analyze_model(build(nodes, {"x": [2, 2]}, {"one": np.float32(1)}, tmp_path / "model.onnx"))
    assert analysis.macs == 2 * 4 * 2


def test_local_functions_are_looked_into(tmp_path: Path) -> None:
    body = [helper.make_node("MatMul", ["a", "b"], ["c"])]
    opsets = [helper.make_opsetid("", 20)]
    function = helper.make_function("custom", "Product", ["a", "b"], ["c"], body, opsets)
    path = build(
        [node("Product", ["x", "w"], domain="custom")], {"x": [2, 4]}, {"w": floats(4, 3)}, tmp_path / "m.onnx"
    )
    model = onnx.load(path)
    model.functions.append(function)
    onnx.save(model, path)
    analysis = analyze_model(path)
    assert (analysis.macs, analysis.unknown) == (24, ())


@pytest.mark.parametrize(
    ("content", "error", "match"),
    [(None, DataFileError, "no such file"), (b"what", DataError, "not a usable ONNX model")],
)
def test_broken_files(content: bytes | None, error: type[Exception], match: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=match):
        analyze_model(path)


@pytest.mark.parametrize("batch", [0, -1, True, 1.5])
def test_batch_sizes_that_are_none(batch: Any, tmp_path: Path) -> None:
    path = build([node("Relu", ["x"])], {"x": ["batch", 3]}, {}, tmp_path / "model.onnx")
    with pytest.raises(ArgumentError, match="batch_size"):
        analyze_model(path, batch_size=batch)


def test_an_analysis_of_a_file_goes_through_json(tmp_path: Path) -> None:
    path = build([node("Conv", ["x", "w"])], {"x": [1, 3, 8, 8]}, {"w": floats(4, 3, 3, 3)}, tmp_path / "model.onnx")
    analysis = analyze_model(path)
    assert ModelAnalysis.from_json(analysis.to_json()) == analysis
    assert analysis.model == "model.onnx"


def test_the_file_on_disk_stays_as_it_is(tmp_path: Path) -> None:
    path = build([node("Conv", ["x", "w"])], {"x": [1, 3, 8, 8]}, {"w": floats(4, 3, 3, 3)}, tmp_path / "model.onnx")
    before = path.read_bytes()
    analyze_model(path)
    assert path.read_bytes() == before


def test_importing_the_analysis_imports_no_onnx() -> None:
    script = "import sys, sparsify.analysis.onnx_layers; print([m for m in sys.modules if m.startswith('onnx')])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def branching(path: Path) -> Path:
    """A file whose weights lie in Constant nodes of two branches, under the same names."""

    def branch(scale: float) -> onnx.GraphProto:
        weight = numpy_helper.from_array(scale * floats(64, 64))
        nodes = [
            helper.make_node("Constant", [], ["w"], value=weight),
            helper.make_node("MatMul", ["x", "w"], ["b"], name="product"),
        ]
        return helper.make_graph(nodes, "branch", [], [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)])

    node_ = node("If", ["condition"], name="choice", then_branch=branch(1.0), else_branch=branch(0.0))
    return build([node_], {"x": ["batch", 64]}, {"condition": np.array(True)}, path)


def test_weights_in_branches_are_listed_and_counted(tmp_path: Path) -> None:
    path = branching(tmp_path / "model.onnx")
    analysis = analyze_model(path)
    assert [(layer.name, layer.weight, layer.sparsity) for layer in analysis.layers] == [
        ("product", "w", 1.0),
        ("b_2", "w_2", 0.0),
    ]
    assert analysis.parameters == 2 * 64 * 64 and not analysis.layers[0].quantizable
    assert analysis.macs == 0 and "not counted: If" in str(analysis)
    assert set(get_weights_metadata(path)) == {"w", "w_2"}
    profile = performance_profile(path, iterations=1, warmup=0)
    assert "choice" in profile.notes["layers in branches and loops"] and profile.others["choice"] > 0


def tensor(**fields: Any) -> TensorProto:
    return TensorProto(name="w", data_type=TensorProto.FLOAT, **fields)


def outside(location: str, **more: str) -> TensorProto:
    made = tensor(dims=[4, 5], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **more}.items():
        made.external_data.add(key=key, value=value)
    return made


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (tensor(dims=[4, 5], raw_data=b"12"), r"shape \[4, 5\] needs 80 bytes, and has 2"),
        (tensor(dims=[4, 5], float_data=[1.0]), "needs 20 values, and has 1"),
        (tensor(dims=[-4, 5], raw_data=b""), "absurd shape"),
        (tensor(dims=[2**40, 2**40]), "absurd shape"),
        (outside("../w.bin"), "outside the file's folder"),
        (outside("w.bin", offset="x"), "at offset 'x', which is no number"),
        (outside("w.bin", offset="-1"), "at offset '-1'"),
        (outside("w.bin", offset="1000"), "needs 80 bytes at 1000 of 'w.bin', which has 80"),
        (outside("w.bin", length="8"), "needs 80 bytes, and 8 of 'w.bin' are said"),
        (outside("none.bin"), "which is no file beside it"),
        (outside("link.bin"), "a link that leads outside"),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_values_that_do_not_fit_are_refused(stored: TensorProto, message: str, inside: bool, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "w.bin").write_bytes(b"1234" * 20)
    (tmp_path / "other.bin").write_bytes(b"1234" * 20)
    (folder / "link.bin").symlink_to(tmp_path / "other.bin")
    path = build([node("MatMul", ["x", "w"])], {"x": [2, 4]}, {"w": floats(4, 5)}, folder / "m.onnx")
    model = onnx.load(path)
    if inside:
        del model.graph.initializer[:]
        model.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=stored))
    else:
        model.graph.initializer[0].CopyFrom(stored)
    path.write_bytes(model.SerializeToString())
    for call in (analyze_model, get_weights_metadata, benchmark_onnx):
        with pytest.raises(DataError, match=message):
            call(path)


def test_names_that_are_no_text_are_said(tmp_path: Path) -> None:
    path = build([node("MatMul", ["x", "weight"])], {"x": [2, 4]}, {"weight": floats(4, 5)}, tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes().replace(b"weight", b"wei\xff\xfet"))
    with pytest.raises(DataError, match="no UTF-8"):
        analyze_model(path)


@pytest.mark.parametrize(
    "note", ["[]", "5", "{", '{"w": 3}', '{"w": null}', '{"w": ""}', "[" * 100000, '{"w": {"a": []}}']
)
def test_notes_of_ours_that_were_edited_are_refused(note: str, tmp_path: Path) -> None:
    path = build([node("MatMul", ["x", "w"])], {"x": [2, 4]}, {"w": floats(4, 5)}, tmp_path / "m.onnx")
    model = onnx.load(path)
    for key in (FILE_WEIGHTS, FILE_ELEMENTS) if note != '{"w": 3}' else (FILE_WEIGHTS,):
        del model.metadata_props[:]
        model.metadata_props.add(key=key, value=note)
        onnx.save(model, path)
        with pytest.raises(DataError, match=f"note '{key}' was edited"):
            analyze_model(path)
