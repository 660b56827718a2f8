"""benchmark_onnx needs a file and nothing else, feeds it what it takes, and survives any file."""

from __future__ import annotations

import gzip
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import sparsify
from sparsify.errors import ArgumentError, DataError, DataFileError, ExportError
from sparsify.onnx.benchmark import benchmark_onnx, compare_onnx, same_inputs
from sparsify.onnx.export import export_onnx
from sparsify.onnx.file_inputs import made_up_inputs
from sparsify.onnx.runtime import open_session, optimized_operators, read_model
from tests.zoo.integer_forms import IntegerResNet

FAST = {"threads": 1, "warmup": 1, "iterations": 3}


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.types, self.head = nn.Embedding(37, 8), nn.Embedding(2, 8), nn.Linear(8, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        x = self.words(input_ids) + self.types(token_type_ids)
        return self.head((x * attention_mask.unsqueeze(-1)).sum(1))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "resnet.onnx"
    torch.manual_seed(0)
    export_onnx(IntegerResNet(1, 4), torch.randn(2, 3, 8, 8), path)
    return path


def write(path: Path, shape: list[Any], kind: int = TensorProto.FLOAT) -> Path:
    """A file that adds its input to itself."""
    value = helper.make_tensor_value_info("x", kind, shape)
    result = helper.make_tensor_value_info("y", kind, shape)
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "g", [value], [result])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_the_figures_belong_together(quantized: Path) -> None:
    result = benchmark_onnx(quantized, batch_size=4, threads=1, warmup=2, iterations=20)
    assert 0 < result.latency_p50_ms <= result.latency_p95_ms
    assert result.throughput == pytest.approx(4 / (result.latency_mean_ms / 1e3))
    assert result.size_bytes == quantized.stat().st_size
    assert result.gzip_bytes == len(gzip.compress(quantized.read_bytes(), 6, mtime=0))
    assert (result.batch_size, result.threads, result.iterations) == (4, 1, 20)
    assert result.inputs == {"x": "float32[4, 3, 8, 8]"}
    assert result.versions["onnxruntime"] == onnxruntime.__version__
    assert result.providers == ("CPUExecutionProvider",)
    for word in ("p50", "p95", "items/s", "batch 4", "1 thread,", "gzipped"):
        assert word in str(result)


def test_token_ids_lie_in_their_tables_and_masks_are_ones(tmp_path: Path) -> None:
    path = tmp_path / "tokens.onnx"
    ids = torch.zeros(2, 6, dtype=torch.long)
    export_onnx(Tokens(), (ids, torch.ones_like(ids), ids), path)
    model = read_model(path)
    feed, size = made_up_inputs(model, 8)
    assert size == 8 and {name: value.shape for name, value in feed.items()} == dict.fromkeys(feed, (8, 6))
    assert 20 < feed["input_ids"].max() < 37 and feed["input_ids"].min() >= 0
    assert set(feed["token_type_ids"].reshape(-1)) == {0, 1}
    assert (feed["attention_mask"] == 1).all()
    assert benchmark_onnx(path, **FAST).batch_size == 1


@pytest.mark.parametrize(
    ("shape", "fed"),
    [
        (["n", 3], "float32[6, 3]"),
        (["batch", "sequence"], "float32[6, 128]"),
        (["batch", "c", "h", "w"], "float32[6, 3, 224, 224]"),
        ([None, 5], "float32[6, 5]"),
        ([], "float32[]"),
    ],
)
def test_dynamic_dimensions_are_filled(tmp_path: Path, shape: list[Any], fed: str) -> None:
    path = write(tmp_path / "add.onnx", shape)
    assert benchmark_onnx(path, batch_size=6, **FAST).inputs == {"x": fed}


@pytest.mark.parametrize("kind", ["INT64", "INT32", "UINT8", "FLOAT16", "DOUBLE", "INT8"])
def test_inputs_have_the_type_of_the_file(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "add.onnx", ["n", 3], getattr(TensorProto, kind))
    name = {"DOUBLE": "float64"}.get(kind, kind.lower())
    assert benchmark_onnx(path, **FAST).inputs == {"x": f"{name}[1, 3]"}


def test_a_type_that_cannot_be_run_or_made_up_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="onnxruntime cannot run this file"):
        benchmark_onnx(write(tmp_path / "add.onnx", ["n", 3], TensorProto.FLOAT8E5M2))
    value = helper.make_tensor_value_info("x", TensorProto.STRING, ["n"])
    result = helper.make_tensor_value_info("y", TensorProto.STRING, ["n"])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [result])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "text.onnx"
    )
    with pytest.raises(DataError, match="input 'x' is a tensor"):
        benchmark_onnx(tmp_path / "text.onnx")


def test_a_fixed_batch_is_used_and_said(tmp_path: Path) -> None:
    path = write(tmp_path / "add.onnx", [8, 3])
    result = benchmark_onnx(path, **FAST)
    assert result.batch_size == 8 and benchmark_onnx(path, batch_size=8, **FAST).batch_size == 8
    with pytest.raises(ArgumentError, match="batch_size=2: this file has a fixed batch of 8"):
        benchmark_onnx(path, batch_size=2, **FAST)


def test_latencies_are_percentiles_of_the_timed_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seconds = write(tmp_path / "add.onnx", [8, 3]), iter([0.005, 0.001, 0.004, 0.002, 0.003])
    monkeypatch.setattr("sparsify.onnx.benchmark._timed_runs", lambda session, feed: next(seconds))
    result = benchmark_onnx(path, warmup=0, iterations=5)
    # Between the ranks 0 to 4, .95 lies at 3.8: 4 ms and 8 tenths of the way to 5.
    assert result.latency_p50_ms == pytest.approx(3.0) and result.latency_p95_ms == pytest.approx(4.8)
    assert result.latency_mean_ms == pytest.approx(3.0) and result.throughput == pytest.approx(8 / 0.003)


def test_a_comparison_is_of_paired_rounds(quantized: Path, tmp_path: Path) -> None:
    small = write(tmp_path / "add.onnx", ["n", 3])
    result = compare_onnx(quantized, small, rounds=4, iterations=2)
    assert result.minimum <= result.median <= result.maximum and result.rounds == 4
    assert result.median > 1
    assert f"{small} runs" in str(result) and "4 paired rounds" in str(result)


def test_it_knows_no_torch(quantized: Path) -> None:
    root = Path(sparsify.__file__).parents[1]
    code = (
        "import sys, types; package = types.ModuleType('sparsify'); "
        f"package.__path__ = [{str(root / 'sparsify')!r}]; sys.modules['sparsify'] = package; "
        "from sparsify.onnx.benchmark import benchmark_onnx; "
        f"benchmark_onnx({str(quantized)!r}, iterations=2); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: give a whole number, 1 or more"),
        ({"batch_size": 1.5}, "batch_size=1.5"),
        ({"batch_size": True}, "batch_size=True"),
        ({"threads": 0}, "threads=0: give a positive int"),
        ({"warmup": -1}, "warmup=-1: give a whole number, 0 or more"),
        ({"iterations": 0}, "iterations=0"),
        ({"path": 3}, "path=3: give the path"),
    ],
)
def test_wrong_arguments_are_named(quantized: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        benchmark_onnx(**({"path": quantized} | arguments))


def test_files_that_are_none_are_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match="no such file"):
        benchmark_onnx(tmp_path / "missing.onnx")
    with pytest.raises(DataFileError, match="not a file"):
        benchmark_onnx(tmp_path)
    path = tmp_path / "model.onnx"
    for content in (b"", b"\x00" * 100, b"PK\x03\x04", b"<html>", b"\xff" * 1000):
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"{path}: not a usable ONNX model"):
            benchmark_onnx(path)


@pytest.mark.parametrize("location", ["/etc/passwd", "../secret.bin"])
def test_weights_outside_the_folder_are_refused(tmp_path: Path, location: str) -> None:
    path = write(tmp_path / "add.onnx", ["n", 3])
    model = onnx.load(path)
    tensor = model.graph.initializer.add(name="w", data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match="outside the file's folder"):
        benchmark_onnx(path)


def mutated(content: bytes, generator: random.Random) -> bytes:
    data = bytearray(content)
    kind = generator.randrange(4)
    if kind == 0:
        return bytes(data[: generator.randrange(len(data))])
    for _ in range(generator.choice([1, 3, 30])):
        at = generator.randrange(len(data))
        if kind == 1:
            data[at] ^= 1 << generator.randrange(8)
        elif kind == 2:
            data[at : at + generator.randrange(1, 9)] = generator.randbytes(generator.randrange(9))
        else:
            data[at] = generator.choice([0, 1, 127, 128, 255])
    return bytes(data)


@pytest.mark.parametrize("seed", range(4))
def test_a_mutated_file_gives_a_result_or_one_kind_of_error(quantized: Path, tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    # The weights are most of the bytes; half of the mutants are of a file that has next to none.
    small = write(tmp_path / "small.onnx", ["n", 3]).read_bytes()
    for i in range(30):
        source = quantized.read_bytes() if i % 2 else small
        path = tmp_path / f"{i}.onnx"
        path.write_bytes(mutated(source, generator))
        try:
            benchmark_onnx(path, threads=1, warmup=0, iterations=1)
            optimized_operators(path)
        except (DataError, ExportError):
            pass


def product(path: Path, inputs: list[Any], nodes: list[Any], output: Any) -> Path:
    weight = helper.make_tensor("weight", TensorProto.FLOAT, [8, 4], [0.1] * 32)
    graph = helper.make_graph(nodes, "g", inputs, [output], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def shapeless(name: str) -> Any:
    value = helper.make_tensor_value_info(name, TensorProto.FLOAT, [])
    value.type.tensor_type.ClearField("shape")
    return value


MATMUL = helper.make_node("MatMul", ["x", "weight"], ["y"])
FREE = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])


def test_outputs_need_no_shape(tmp_path: Path) -> None:
    path = product(tmp_path / "x.onnx", [FREE], [MATMUL], shapeless("y"))
    assert benchmark_onnx(path, batch_size=3, iterations=2).inputs == {"x": "float32[3, 8]"}
    assert sparsify.analyze_model(path).layers[0].output_shape == (1, 4)
    assert sparsify.get_weights_metadata(path, weight_threshold=8)


def test_an_input_without_a_shape_is_named_with_the_way_out(tmp_path: Path) -> None:
    path = product(tmp_path / "x.onnx", [shapeless("x")], [MATMUL], shapeless("y"))
    with pytest.raises(DataError, match="input 'x' has no shape in the file"):
        benchmark_onnx(path)
    with pytest.raises(ArgumentError, match=r"input 'x' has no shape in the file\. Give sample_inputs"):
        sparsify.analyze_model(path)
    assert sparsify.analyze_model(path, {"x": torch.zeros(5, 8).numpy()}).layers[0].output_shape == (5, 4)
    assert sparsify.get_weights_metadata(path, weight_threshold=8)


def test_a_state_of_fixed_batch_decides_the_batch(tmp_path: Path) -> None:
    state = helper.make_tensor_value_info("state", TensorProto.FLOAT, [3, 4])
    nodes = [MATMUL, helper.make_node("Concat", ["y", "state"], ["z"], axis=1)]
    path = product(
        tmp_path / "x.onnx", [FREE, state], nodes, helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", 8])
    )
    found = benchmark_onnx(path, iterations=2)
    assert found.batch_size == 3 and found.inputs == {"x": "float32[3, 8]", "state": "float32[3, 4]"}
    with pytest.raises(ArgumentError, match="runs with a batch of 3 only, to which 'state' are fixed"):
        benchmark_onnx(path, batch_size=4)


def test_one_name_is_one_size(tmp_path: Path) -> None:
    inputs = [
        helper.make_tensor_value_info("state", TensorProto.FLOAT, [2, "batch", 4]),
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8]),
    ]
    nodes = [MATMUL, helper.make_node("Add", ["y", "state"], ["z"])]
    path = product(
        tmp_path / "x.onnx", inputs, nodes, helper.make_tensor_value_info("z", TensorProto.FLOAT, [2, "b", 4])
    )
    found = benchmark_onnx(path, batch_size=3, **FAST)
    assert found.inputs == {"state": "float32[2, 3, 4]", "x": "float32[3, 8]"}
    assert sparsify.analyze_model(path, batch_size=3).batch_size == 2
    with pytest.raises(
        ArgumentError, match=r"'x' has the shape \[5, 8\], so that 'batch' is 5 on axis 0; it is 3 on axis 1"
    ):
        benchmark_onnx(path, inputs=(np.zeros((2, 3, 4)), np.zeros((5, 8))), **FAST)


def test_inputs_and_shapes_can_be_given(tmp_path: Path) -> None:
    path = write(tmp_path / "add.onnx", ["n", 3, "height", "width"])
    assert benchmark_onnx(path, shapes={"x": (2, 3, 10, 20)}, **FAST).inputs == {"x": "float32[2, 3, 10, 20]"}
    found = benchmark_onnx(path, inputs=torch.zeros(4, 3, 5, 5), **FAST)
    assert (found.batch_size, found.inputs) == (4, {"x": "float32[4, 3, 5, 5]"})
    profile = sparsify.performance_profile(path, np.zeros((2, 3, 5, 5)), iterations=1, warmup=0)
    assert profile.total_ms > 0 and list(profile.others) == ["Add_0"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"inputs": {"z": np.zeros(3)}}, "sample_inputs are z, the inputs x"),
        ({"inputs": (1, 2)}, "2 sample inputs for 1 inputs"),
        (
            {"inputs": np.zeros((2, 4))},
            r"'x' has the shape \[2, 4\]; the file takes \['n', 3\], of which axis 1 is fixed to 3",
        ),
        ({"inputs": np.zeros(3)}, r"'x' has the shape \[3\]; the file takes"),
        ({"inputs": np.zeros((2, 3), np.int64)}, "holds int64; the file takes float32"),
        ({"inputs": "text"}, "holds <U4; the file takes float32"),
        ({"inputs": np.zeros((2, 3)), "batch_size": 4}, "batch_size=4: the inputs that were given have a batch of 2"),
        ({"shapes": {"z": (1, 3)}}, "shapes: 'z' is no input that is made up; those are x"),
        ({"shapes": {"x": (1, -3)}}, "is no list of whole numbers"),
        ({"shapes": {"x": (1, 4)}}, "axis 1 is fixed to 3"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        benchmark_onnx(write(tmp_path / "add.onnx", ["n", 3]), **given)


def test_ids_are_taken_if_they_fit_the_type(tmp_path: Path) -> None:
    path = write(tmp_path / "add.onnx", ["n", 3], TensorProto.INT8)
    assert benchmark_onnx(path, inputs=np.full((1, 3), 5), **FAST).inputs == {"x": "int8[1, 3]"}
    with pytest.raises(ArgumentError, match="holds 0 to 500; the file takes int8"):
        benchmark_onnx(path, inputs=np.array([[0, 1, 500]]), **FAST)


def test_rows_of_tables_in_constant_nodes_are_known(tmp_path: Path) -> None:
    table = helper.make_node(
        "Constant", [], ["table"], value=helper.make_tensor("", TensorProto.FLOAT, [5, 2], [0.0] * 10)
    )
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", "?", "?"])
    graph = helper.make_graph(
        [table, helper.make_node("Gather", ["table", "ids"], ["y"])], "g", [ids], [shapeless("y")]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    feed, _ = made_up_inputs(model, shapes={"ids": (2, 30, 40)})
    assert feed["ids"].max() == 4 and feed["ids"].min() == 0


def test_two_files_get_the_same_work(tmp_path: Path) -> None:
    free, fixed = write(tmp_path / "free.onnx", ["n", 3]), write(tmp_path / "fixed.onnx", [8, 3])
    for pair in ((free, fixed), (fixed, free)):
        files = [(path, read_model(path), open_session(path)) for path in pair]
        feeds = same_inputs(files, 1)
        assert [feed["x"].shape for feed in feeds] == [(8, 3)] * 2 and (feeds[0]["x"] == feeds[1]["x"]).all()
    with pytest.raises(ArgumentError, match="the two files do not do the same work"):
        compare_onnx(fixed, write(tmp_path / "other.onnx", [4, 3]))


def test_values_beside_the_file_count(tmp_path: Path) -> None:
    path = product(tmp_path / "x.onnx", [FREE], [MATMUL], shapeless("y"))
    whole, model = benchmark_onnx(path, **FAST).size_bytes, onnx.load(path)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.full((8, 4), 0.1, np.float32), "weight"))
    onnx.save(model, path, save_as_external_data=True, location="x.data", size_threshold=0)
    assert (
        benchmark_onnx(path, **FAST).size_bytes == path.stat().st_size + (tmp_path / "x.data").stat().st_size >= whole
    )
