"""A packed file takes the bytes of what it holds, and computes in onnxruntime what the plain one computes."""

from __future__ import annotations

import copy
import json
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import nn

from sparsify import analyze_model, benchmark_onnx, export_onnx, get_weights_metadata, verify_onnx
from sparsify.cli.main import main
from sparsify.errors import ArgumentError, DataError, DataFileError, ExportError
from sparsify.onnx import model_files, packing
from sparsify.onnx.packing import pack_onnx, unpack_onnx
from sparsify.onnx.rebuilding import Rebuilding
from sparsify.onnx.rebuilt_weights import FILE_PACKED, rebuilt_value
from sparsify.onnx.runtime import open_session, optimized_operators, read_model, run_session
from sparsify.onnx.storage_forms import CountedValues, StorageForm, code_bits, storage_form
from tests.loops import quantized_and_trained

NEWEST = 24


def pruned(shape: tuple[int, ...], zeros: float, dtype: Any = np.float32, levels: int = 0) -> np.ndarray:
    """Exactly so many zeros, at random; `levels`: so many other values, which all stand in it."""
    draw = np.random.default_rng(0)
    values = draw.integers(1, levels + 1, shape) if levels else draw.integers(1, 120, shape)
    if np.dtype(dtype).kind == "f" and not levels:
        values = draw.standard_normal(shape) + 4
    flat = values.reshape(-1).astype(dtype)
    flat[draw.permutation(flat.size)[: round(zeros * flat.size)]] = 0
    return flat.reshape(shape)


def written(
    folder: Path,
    nodes: list[Any],
    weights: dict[str, np.ndarray | TensorProto],
    *,
    x: list[Any],
    y: list[Any],
    opset: int = 17,
    kind: int = TensorProto.FLOAT,
    more_inputs: tuple[Any, ...] = (),
) -> Path:
    """A file with the input x, the output y, and these nodes and initializers."""
    tensors = [
        value if isinstance(value, TensorProto) else numpy_helper.from_array(value, name)
        for name, value in weights.items()
    ]
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", kind, x), *more_inputs],
        [helper.make_tensor_value_info("y", kind, y)],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 6 if opset < 15 else 8 if opset < 21 else 10
    path = folder / "plain.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def integer_conv(folder: Path, weight: np.ndarray, opset: int = 17) -> Path:
    """One convolution in integers."""
    scales = {"s": np.float32(0.05), "z": np.uint8(128), "t": np.float32(0.002), "o": weight.dtype.type(0)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "t", "o"], ["v"]),
        helper.make_node("Conv", ["d", "v"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("QuantizeLinear", ["c", "s", "z"], ["r"]),
        helper.make_node("DequantizeLinear", ["r", "s", "z"], ["y"]),
    ]
    weights = {"w": weight, **{name: np.asarray(value) for name, value in scales.items()}}
    rows, channels = weight.shape[:2]
    return written(folder, nodes, weights, x=["n", channels, 4, 4], y=["n", rows, 4, 4], opset=opset)


def product(folder: Path, weight: np.ndarray, opset: int = 17) -> Path:
    """A float weight that is moved before it is multiplied by: no product reads it itself."""
    nodes = [
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    rows, columns = weight.shape
    kind = helper.np_dtype_to_tensor_dtype(weight.dtype)
    return written(folder, nodes, {"w": weight}, x=["n", columns], y=["n", rows], opset=opset, kind=kind)


def outputs(path: Path, optimized: bool, feed: dict[str, np.ndarray]) -> list[bytes]:
    session = open_session(path, optimized=optimized, exact=False, model=ModelProto())
    return [value.tobytes() for value in run_session(session, feed).values()]


def assert_same(plain: Path, packed: Path, **feed: np.ndarray) -> None:
    """The outputs in both modes, and the plain file again."""
    for optimized in (False, True):
        assert outputs(plain, optimized, feed) == outputs(packed, optimized, feed)
    unpacked = unpack_onnx(packed, packed.with_name("unpacked.onnx"))
    assert onnx.load(unpacked) == onnx.load(plain)


TYPES = [
    "bool",
    "int8",
    "uint8",
    "int16",
    "uint16",
    "float16",
    "int32",
    "float32",
    "uint32",
    "int64",
    "uint64",
    "float64",
]


@pytest.mark.parametrize("dtype", TYPES)
def test_every_form_rebuilds_every_bit(dtype: str) -> None:
    for size, zeros in ((1027, 0.5), (1024, 1.0), (2000, 0.9)):
        values = pruned((size,), zeros, dtype, levels=5)
        if values.dtype.kind == "f":
            values[:4] = -0.0, np.nan, np.inf, -np.nan
        counted = CountedValues(values.view(f"u{values.itemsize}"))
        assert counted.palette is not None
        bits = code_bits(len(counted.palette) + 1)
        for positions, gap_bits in (("all", 0), ("mask", 0), ("gaps", 3), ("gaps", 4), ("gaps", 6), ("gaps", 8)):
            for value_bits in {bits, 6, 8} if positions == "all" else {0, bits}:
                form = StorageForm(positions, gap_bits, value_bits, 0, 0.0)  # type: ignore[arg-type]
                rebuilding = Rebuilding(f"v{i}" for i in count())
                rebuilding.tensor("w", counted, values.dtype, [size], form)
                model = helper.make_model(
                    helper.make_graph(rebuilding.nodes, "test", [], [], rebuilding.initializers),
                    opset_imports=[helper.make_opsetid("", 11)],
                    ir_version=6,
                )
                found = numpy_helper.to_array(rebuilt_value(model, model.graph, "w", Path()))
                assert (found.dtype, found.tobytes()) == (values.dtype, values.tobytes()), form


@pytest.mark.parametrize(
    ("dtype", "zeros", "levels", "bar"),
    [
        (np.int8, 0.9, 0, 0.205),
        (np.int8, 0.95, 0, 0.105),
        (np.int8, 0.5, 0, 0.63),
        (np.float32, 0.0, 16, 0.505),
        (np.float32, 0.0, 8, 0.38),
        (np.float32, 0.0, 4, 0.255),
        (np.float32, 0.9, 15, 0.155),
        (np.float32, 0.0, 200, 1.005),
        (np.float32, 0.0, 0, 4.001),
        (np.int8, 1.0, 0, 0.001),
    ],
)
def test_a_weight_takes_the_bytes_of_what_it_holds(dtype: Any, zeros: float, levels: int, bar: float) -> None:
    values = pruned((1 << 19,), zeros, dtype, levels)
    form = storage_form(CountedValues(values.view(f"u{values.itemsize}")))
    assert form.size / values.size <= bar


def test_a_plain_form_is_kept_where_another_is_hardly_smaller() -> None:
    # 1.5 % zeros: a mask would save less than it costs.
    assert storage_form(CountedValues(pruned((1 << 16,), 0.015, np.int8).view("u1"))).plain


def test_most_frequent_values_need_not_be_zeros() -> None:
    values = np.where(pruned((4096,), 0.9, np.uint8) == 0, np.uint8(128), pruned((4096,), 0.9, np.uint8))
    assert storage_form(CountedValues(values)).positions == "gaps"


def test_integers_are_packed_and_run_in_the_same_kernels(tmp_path: Path) -> None:
    weight = pruned((128, 64, 3, 3), 0.9, np.int8)
    plain = integer_conv(tmp_path, weight)
    packed = pack_onnx(plain, tmp_path / "packed.onnx")
    assert packed.size_bytes / weight.size <= 0.205 and packed.size_bytes == (tmp_path / "packed.onnx").stat().st_size
    assert [(tensor.name, tensor.form) for tensor in packed.tensors] == [("w", "gaps of 6 bits")]
    assert packed.unproven is None and "gaps of 6 bits: 1" in str(packed)
    assert optimized_operators(packed) == optimized_operators(plain) and optimized_operators(packed)["QLinearConv"] == 1
    onnx.checker.check_model(str(packed.path), full_check=True)
    assert_same(plain, packed.path, x=np.random.default_rng(1).standard_normal((2, 64, 4, 4), np.float32))


@pytest.mark.parametrize("opset", [11, 13, 18, 21, NEWEST])
def test_every_opset_from_11_on_is_packed(opset: int, tmp_path: Path) -> None:
    plain = product(tmp_path, pruned((40, 50), 0.7, np.float32, levels=3), opset)
    packed = pack_onnx(plain, tmp_path / "packed.onnx")
    assert packed.size_bytes < packed.plain_bytes / 3
    assert_same(plain, packed.path, x=np.ones((3, 50), np.float32))


def test_an_older_opset_is_refused_with_the_way_out(tmp_path: Path) -> None:
    plain = product(tmp_path, pruned((40, 50), 0.9), opset=10)
    with pytest.raises(ExportError, match=r"opset 10; a packed one needs 11.*convert_version"):
        pack_onnx(plain, tmp_path / "packed.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain.onnx"]


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_floats_are_packed(dtype: str, tmp_path: Path) -> None:
    plain = product(tmp_path, pruned((40, 50), 0.8, dtype))
    assert len(pack_onnx(plain, tmp_path / "packed.onnx").tensors) == 1
    assert_same(plain, tmp_path / "packed.onnx", x=np.ones((3, 50), dtype))


def test_integers_of_four_bits_are_packed(tmp_path: Path) -> None:
    values = pruned((64, 64), 0.9, np.int8, levels=7)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=0, block_size=32),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    stored = helper.make_tensor("w", TensorProto.INT4, values.shape, values.reshape(-1).tolist())
    stored = numpy_helper.from_array(numpy_helper.to_array(stored), "w")
    scales = np.full((2, 64), 0.01, np.float32)
    plain = written(tmp_path, nodes, {"w": stored, "s": scales}, x=["n", 64], y=["n", 64], opset=21)
    packed = pack_onnx(plain, tmp_path / "packed.onnx")
    assert {tensor.name for tensor in packed.tensors} == {"w"}
    assert optimized_operators(packed) == optimized_operators(plain) and optimized_operators(plain)["MatMulNBits"]
    assert_same(plain, packed.path, x=np.ones((3, 64), np.float32))


def test_float_weights_of_products_are_stored_sparse_and_on_request_like_all_others(tmp_path: Path) -> None:
    weight = pruned((300, 64), 0.9)
    plain = written(tmp_path, [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weight}, x=["n", 300], y=["n", 64])
    packed = pack_onnx(plain, tmp_path / "packed.onnx")
    assert [tensor.form for tensor in packed.tensors] == ["sparse"]
    assert packed.size_bytes / weight.size < 1.25 and "less with exact_unoptimized=False" in str(packed)
    assert_same(plain, packed.path, x=np.random.default_rng(1).standard_normal((1, 300), np.float32))
    smaller = pack_onnx(plain, tmp_path / "packed.onnx", exact_unoptimized=False)
    assert smaller.size_bytes / weight.size < 0.55 and not smaller.held_back
    x = {"x": np.random.default_rng(1).standard_normal((1, 300), np.float32)}
    assert outputs(plain, True, x) == outputs(smaller.path, True, x)
    assert onnx.load(unpack_onnx(smaller, tmp_path / "unpacked.onnx")) == onnx.load(plain)


def branch(name: str, weight: np.ndarray) -> Any:
    """A branch with a weight of its own, an initializer; and one in a Constant node."""
    nodes = [
        helper.make_node("Constant", [], [f"{name}_c"], name=f"{name}/held", value=numpy_helper.from_array(weight)),
        helper.make_node("Add", [f"{name}_w", f"{name}_c"], [f"{name}_s"]),
        helper.make_node("Add", ["x", f"{name}_s"], [f"{name}_t"]),
        helper.make_node("Add", ["outer", f"{name}_t"], [f"{name}_y"]),
    ]
    result = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, list(weight.shape))
    return helper.make_graph(nodes, name, [], [result], [numpy_helper.from_array(weight + 1, f"{name}_w")])


def test_branches_loops_and_constant_nodes_are_packed_where_they_stand(tmp_path: Path) -> None:
    weight = pruned((40, 50), 0.8, np.float32, levels=3)
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["going"]),
            helper.make_node("Add", ["state", "body_w"], ["next"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, [40, 50]),
        ],
        [
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, [40, 50]),
        ],
        [numpy_helper.from_array(weight, "body_w")],
    )
    nodes = [
        helper.make_node("Constant", [], ["c"], name="held", value=numpy_helper.from_array(weight)),
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["condition"]),
        helper.make_node(
            "If", ["condition"], ["z"], then_branch=branch("then", weight), else_branch=branch("else", -weight)
        ),
        helper.make_node("Loop", ["three", "", "z"], ["l"], body=body),
        helper.make_node("Add", ["l", "c"], ["y"]),
    ]
    weights = {"outer": weight, "zero": np.zeros((), np.float32), "three": np.array(3)}
    plain = written(tmp_path, nodes, weights, x=[40, 50], y=[40, 50])
    packed = pack_onnx(plain, tmp_path / "packed.onnx")
    names = {tensor.name for tensor in packed.tensors}
    assert names == {"outer", "c", "body_w", "then_w", "then_c", "else_w", "else_c"}
    assert packed.unproven is None and packed.size_bytes < packed.plain_bytes / 3
    for sign in (1, -1):
        assert_same(plain, packed.path, x=np.full((40, 50), sign, np.float32))


def test_what_may_be_overridden_or_is_an_output_stays(tmp_path: Path) -> None:
    weight = pruned((40, 50), 0.9)
    given = helper.make_tensor_value_info("w", TensorProto.FLOAT, [40, 50])
    plain = written(
        tmp_path,
        [helper.make_node("Add", ["x", "w"], ["y"])],
        {"w": weight},
        x=[40, 50],
        y=[40, 50],
        more_inputs=(given,),
    )
    assert not pack_onnx(plain, tmp_path / "packed.onnx").tensors
    other = {"x": weight, "w": weight + 1}
    assert outputs(plain, True, other) == outputs(tmp_path / "packed.onnx", True, other)
    plain = written(tmp_path, [helper.make_node("Relu", ["x"], ["r"])], {"y": weight}, x=[2], y=[40, 50])
    assert not pack_onnx(plain, tmp_path / "packed.onnx").tensors


def test_external_data_is_read_and_written_where_one_file_does_not_hold_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(2)
    weights = {"w": pruned((64, 64), 0.9), "v": draw.standard_normal((64, 64)).astype(np.float32)}
    nodes = [helper.make_node("Add", ["w", "v"], ["s"]), helper.make_node("Add", ["x", "s"], ["y"])]
    plain = written(tmp_path, nodes, weights, x=[64, 64], y=[64, 64])
    whole = onnx.load(plain)
    folder = tmp_path / "external"
    folder.mkdir()
    external = {"save_as_external_data": True, "location": "values.bin", "size_threshold": 0}
    onnx.save(copy.deepcopy(whole), folder / "plain.onnx", **external)
    x = {"x": np.ones((64, 64), np.float32)}
    # Small enough for one file now.
    packed = pack_onnx(folder / "plain.onnx", folder / "one.onnx")
    assert packed.size_bytes == (folder / "one.onnx").stat().st_size and packed.plain_bytes > 32768
    assert outputs(folder / "one.onnx", True, x) == outputs(plain, True, x)
    monkeypatch.setattr(model_files, "MOST_BYTES", 10_000)
    out = tmp_path / "two" / "packed.onnx"
    out.parent.mkdir()
    for _ in range(2):
        packed = pack_onnx(folder / "plain.onnx", out)
        data = [path for path in out.parent.iterdir() if path != out]
        assert len(data) == 1 and 16384 < data[0].stat().st_size < 20_000 and out.stat().st_size < 10_000
        assert packed.size_bytes == data[0].stat().st_size + out.stat().st_size
    for optimized in (False, True):
        assert outputs(out, optimized, x) == outputs(plain, optimized, x)
    # Another model takes its place, with its values; an error leaves both files.
    changed = product(tmp_path, draw.standard_normal((64, 64)).astype(np.float32))
    pack_onnx(changed, out)
    now = sorted((path.name, path.read_bytes()) for path in out.parent.iterdir())
    assert len(now) == 2 and data[0].name not in {name for name, _ in now}
    with monkeypatch.context() as patch:
        patch.setattr(packing, "prove_packed", lambda *_: (_ for _ in ()).throw(ExportError("no")))
        with pytest.raises(ExportError, match="no"):
            pack_onnx(folder / "plain.onnx", out)
    assert sorted((path.name, path.read_bytes()) for path in out.parent.iterdir()) == now
    monkeypatch.undo()
    unpacked = unpack_onnx(out, tmp_path / "two" / "unpacked.onnx")
    assert onnx.load(unpacked) == onnx.load(changed)


def test_a_file_that_would_differ_is_not_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = product(tmp_path, pruned((40, 50), 0.9))
    out = tmp_path / "packed.onnx"
    out.write_text("old")
    right = Rebuilding.tensor

    def wrong(self: Rebuilding, name: str, counted: CountedValues, *rest: Any, **more: Any) -> None:
        right(self, name, CountedValues(counted.bits[::-1].copy()), *rest, **more)

    monkeypatch.setattr(Rebuilding, "tensor", wrong)
    with pytest.raises(ExportError, match=r"'w' would not be rebuilt as it was. Nothing was written"):
        pack_onnx(plain, out)
    assert out.read_text() == "old" and len(list(tmp_path.iterdir())) == 2


def test_given_inputs_are_compared_and_wrong_ones_refused(tmp_path: Path) -> None:
    plain = product(tmp_path, pruned((40, 50), 0.9))
    out = tmp_path / "packed.onnx"
    assert pack_onnx(plain, out, inputs={"x": np.ones((2, 50), np.float32)}).unproven is None
    with pytest.raises(ArgumentError, match=r"inputs=\['z'\]: the file takes x"):
        pack_onnx(plain, out, inputs={"z": np.ones((2, 50), np.float32)})
    with pytest.raises(DataFileError, match="no such file"):
        pack_onnx(tmp_path / "none.onnx", out)
    with pytest.raises(DataFileError, match="cannot write"):
        pack_onnx(plain, tmp_path / "no" / "packed.onnx")


def test_random_numbers_are_said_not_to_be_compared(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("RandomNormalLike", ["w"], ["r"]),
        helper.make_node("Add", ["w", "r"], ["s"]),
        helper.make_node("Add", ["x", "s"], ["y"]),
    ]
    plain = written(tmp_path, nodes, {"w": pruned((40, 50), 0.9)}, x=[40, 50], y=[40, 50])
    packed = pack_onnx(plain, tmp_path / "packed.onnx")
    assert packed.unproven == "it draws random numbers" and "not compared: it draws" in str(packed)


@pytest.mark.parametrize(
    "note",
    [
        "[]",
        "{",
        '{"w": 3}',
        '{"w": ["gaps", "x"]}',
        '{"nothing": ["gaps", 0]}',
        '{"y": ["gaps", 0]}',
        '{"x": ["gaps", 0]}',
        "[" * 5000,
    ],
)
def test_a_note_that_was_edited_is_a_data_error(note: str, tmp_path: Path) -> None:
    model = onnx.load(product(tmp_path, pruned((40, 50), 0.9)))
    model.metadata_props.add(key=FILE_PACKED, value=note)
    (tmp_path / "edited.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match=r"says that it is packed, but .*: pack the plain file again"):
        read_model(tmp_path / "edited.onnx")


def test_a_packed_file_with_an_absurd_shape_is_refused_at_once(tmp_path: Path) -> None:
    plain = product(tmp_path, pruned((40, 50), 1.0))
    path = pack_onnx(plain, tmp_path / "packed.onnx").path
    model = onnx.load(path)
    length = next(node.input[0] for node in model.graph.node if node.op_type == "ConstantOfShape")
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == length)
    tensor.CopyFrom(numpy_helper.from_array(np.array([1 << 45]), length))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match="absurd shape"):
        unpack_onnx(path, tmp_path / "plain_again.onnx")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, torch.Tensor, Path, Path]:
    """A quantized network with pruned weights; its plain file and its packed one, with small tensors packed too."""
    model, inputs = quantized_and_trained("residual")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter[parameter.abs() < parameter.abs().quantile(0.9)] = 0
    model.eval()
    folder = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "FEWEST_VALUES", 32)
        patch.setattr("sparsify.onnx.storage_forms.NODES", {"all": 0, "mask": 0, "gaps": 0, "sparse": 0})
        patch.setattr("sparsify.onnx.storage_forms.CODE_NODES", dict.fromkeys((1, 2, 3, 4, 6, 8), 0))
        exported = export_onnx(model, inputs, folder / "packed.onnx", packed=True)
    unpack_onnx(folder / "packed.onnx", folder / "plain.onnx")
    assert exported.plain_bytes == (folder / "plain.onnx").stat().st_size and "(packed from" in str(exported)
    assert exported.size_bytes == (folder / "packed.onnx").stat().st_size
    return model, inputs, folder / "plain.onnx", folder / "packed.onnx"


Files = tuple[nn.Module, torch.Tensor, Path, Path]


def test_an_export_is_packed_and_reads_as_the_plain_file(files: Files) -> None:
    model, inputs, plain, packed = files
    noted = json.loads(next(entry.value for entry in onnx.load(packed).metadata_props if entry.key == FILE_PACKED))
    assert len(noted) >= 3
    assert optimized_operators(plain) == optimized_operators(packed)
    assert read_model(packed) == read_model(plain)
    assert verify_onnx(model, packed, inputs).exact
    assert get_weights_metadata(packed) == get_weights_metadata(plain)
    assert str(analyze_model(packed)).replace("packed", "plain") == str(analyze_model(plain))
    assert benchmark_onnx(packed, iterations=1).size_bytes == packed.stat().st_size


def test_the_command_line_packs_and_unpacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = product(tmp_path, pruned((40, 50), 0.9))
    out, back = tmp_path / "packed.onnx", tmp_path / "back.onnx"
    assert main(["pack", str(plain), "--output", str(out)]) == 0
    assert "1 tensor stored in another form, same values to the bit" in capsys.readouterr().out
    assert main(["pack", str(plain), "--output", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"][0]["form"].startswith("gaps")
    assert main(["unpack", str(out), "--output", str(back)]) == 0
    assert onnx.load(back) == onnx.load(plain) and str(back) in capsys.readouterr().out
    assert main(["pack", str(tmp_path / "none.onnx"), "--output", str(out)]) == 2
    assert "no such file" in capsys.readouterr().err


def test_a_packed_file_is_packed_again_the_same(tmp_path: Path) -> None:
    plain = product(tmp_path, pruned((40, 50), 0.9))
    first = pack_onnx(plain, tmp_path / "first.onnx")
    second = pack_onnx(first, tmp_path / "second.onnx")
    assert second.plain_bytes == first.plain_bytes and second.path.read_bytes() == first.path.read_bytes()
    # In place, too.
    assert pack_onnx(plain, plain).size_bytes == first.size_bytes == plain.stat().st_size
