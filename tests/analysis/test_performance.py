"""Times of layers in onnxruntime: names, sums, what cannot be measured, the cache. No test asks for a speed."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from sparsify.analysis import profiling, variants
from sparsify.analysis.analyze import analyze_model
from sparsify.analysis.node_times import ELSEWHERE, node_times, numbered
from sparsify.analysis.performance import SKIPPING_FLOOR, SPARSITIES, LayerPerformance, PerformanceProfile
from sparsify.analysis.profiling import performance_profile
from sparsify.errors import ArgumentError, DataError, DataFileError, ExportError, StateError
from sparsify.oneshot import quantize_model
from sparsify.onnx.export import export_onnx
from sparsify.onnx.runtime import optimized_operators, read_model
from tests.zoo.quantizable import BertLayer, Shortcut
from tests.zoo.small import Branching, Tied, written

FEW: dict[str, Any] = {"iterations": 3, "warmup": 1, "progress": False}


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def scratch(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Every test leaves the folder for temporary files as empty as it found it."""
    folder = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    # torch's compiler keeps a folder of its own there, once a process.
    assert [path for path in folder.iterdir() if not path.name.startswith("torchinductor_")] == []


@pytest.fixture(scope="module")
def residual() -> PerformanceProfile:
    torch.manual_seed(0)
    return performance_profile(
        Shortcut(32, 32, norm=True), IMAGES, batch_sizes=(1, 2), threads=(1, 2), widths=(1.0, 0.5), cache=False, **FEW
    )


def sums_up(profile: PerformanceProfile) -> None:
    assert sum(one.ms for one in profile.layers) + sum(profile.others.values()) == pytest.approx(profile.profiled_ms)
    if profile.profiled_int8_ms is not None:
        found = sum(one.int8_ms or 0.0 for one in profile.layers) + sum(profile.others_int8.values())
        assert found == pytest.approx(profile.profiled_int8_ms)


def test_layers_and_the_rest_add_up_and_have_the_names_of_the_analysis(residual: PerformanceProfile) -> None:
    sums_up(residual)
    assert [one.name for one in residual.layers] == [
        one.name for one in analyze_model(Shortcut(32, 32, norm=True), IMAGES).layers
    ]
    assert all(one.ms > 0 for one in residual.layers)
    assert not any(name.startswith(ELSEWHERE) for name in residual.others)


def test_fused_followers_count_with_their_convolution(residual: PerformanceProfile) -> None:
    assert not {"Relu", "BatchNormalization"} & {name.rpartition("/")[2] for name in residual.others}
    # The norm is folded, both ReLUs and the addition run in the kernels of the convolutions.
    assert "Add" not in residual.others


def test_int8_and_widths_are_measured_layer_by_layer(residual: PerformanceProfile) -> None:
    assert residual.notes == {}
    assert residual.widths == (1.0, 0.5)
    for one in residual.layers:
        assert one.int8_ms is not None and one.int8_ms > 0
        assert one.width_ms is not None and len(one.width_ms) == 2
        assert one.width_ms[0] == one.ms
    assert residual.width_total_ms[0] == residual.total_ms
    assert len(residual.width_total_int8_ms) == len(residual.width_profiled_int8_ms) == 2


def test_totals_cover_every_batch_size_and_number_of_threads(residual: PerformanceProfile) -> None:
    wanted = {f"batch {b}, {t}, {k}" for b in (1, 2) for t in ("1 thread", "2 threads") for k in ("float", "int8")}
    assert set(residual.totals) == wanted
    assert residual.totals["batch 1, 1 thread, float"] == residual.total_ms
    assert residual.totals["batch 1, 1 thread, int8"] == residual.total_int8_ms


def test_zeros_save_time_by_the_cost_model_alone_and_not_below_its_floor(residual: PerformanceProfile) -> None:
    one = residual.layer("conv1")
    assert one.sparse_ms[0] == one.ms
    assert one.sparse_ms == tuple(one.ms * max(1 - s, SKIPPING_FLOOR) for s in SPARSITIES)
    assert residual.sparse_total_ms[0] == pytest.approx(residual.total_ms)
    assert list(residual.sparse_total_ms) == sorted(residual.sparse_total_ms, reverse=True)


def test_a_profile_comes_back_from_its_file(residual: PerformanceProfile, tmp_path: Path) -> None:
    residual.save(tmp_path / "profile.json")
    assert PerformanceProfile.load(tmp_path / "profile.json") == residual


def test_a_profile_reads_as_three_tables(residual: PerformanceProfile) -> None:
    text = str(residual)
    assert text.startswith("Shortcut: batch 1, 1 thread, onnxruntime")
    assert all(word in text for word in ("Speed-up", "Items/s", "By operator", "Conv2d", "conv1", "in no layer"))
    assert "skips no zeros" in text


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": 99}', '{"format": 1, "layers": 3}', '{"format": 1, "layers": [{"name": "x"}]}'],
)
def test_what_is_no_profile_is_said(text: str, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(DataError, match=r"broken\.json.*Measure again"):
        PerformanceProfile.load(tmp_path / "broken.json")


def test_a_profile_with_a_field_of_another_type_is_refused(residual: PerformanceProfile) -> None:
    plain = json.loads(residual.to_json())
    for name, value in (("total_ms", "fast"), ("batch_size", True), ("widths", ["half"])):
        with pytest.raises(DataError, match=name):
            PerformanceProfile.from_json(json.dumps({**plain, name: value}))
    with pytest.raises(DataFileError, match="missing"):
        PerformanceProfile.load("missing.json")


def test_the_profile_of_attention_maps_products_and_tokens() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 20, (2, 6))
    model = BertLayer(16, 4)
    before = copy.deepcopy(model.state_dict())
    profile = performance_profile(model, ids, widths=(1.0, 0.5), **FEW)
    sums_up(profile)
    assert [one.name for one in profile.layers] == [one.name for one in analyze_model(model, ids).layers]
    assert profile.layer("scaled_dot_product_attention").ms > 0
    assert profile.layer("embed").ms > 0
    assert any("LayerNormalization" in name for name in profile.others)
    assert profile.layer("up").width_ms is not None
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["resnet18", "bert"])
def test_real_models_add_up(kind: str) -> None:
    if kind == "bert":
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
        config = transformers.BertConfig(vocab_size=30, max_position_embeddings=16, **sizes)
        model = transformers.BertForSequenceClassification(config)
        inputs: Any = {"input_ids": torch.randint(0, 30, (1, 8)), "attention_mask": torch.ones(1, 8, dtype=torch.int64)}
    else:
        model = pytest.importorskip("torchvision").models.resnet18()
        inputs = torch.randn(1, 3, 32, 32)
    profile = performance_profile(model, inputs, widths=None, **FEW)
    sums_up(profile)
    names = [one.name for one in analyze_model(model, inputs).layers]
    assert [one.name for one in profile.layers] == names
    # A table of constant positions is looked up once, when the file is loaded.
    idle = [one.name for one in profile.layers if one.ms == 0 or not one.int8_ms]
    assert all("position" in name or "attention" in name for name in idle), idle
    assert not any(name.startswith(ELSEWHERE) for name in profile.others), profile.others


class Recurrent(nn.Module):
    """Two LSTM layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(8, 8, num_layers=2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.cells(x)[0])
        return out


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Tied(50, 16, calls=2), torch.zeros(1, 7, dtype=torch.int64)),
        (Recurrent(), torch.randn(1, 5, 8)),
        (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(), torch.randn(1, 5, 16)),
    ],
    ids=["tied", "recurrent", "in_proj"],
)
def test_every_layer_has_its_time_in_odd_models(model: nn.Module, inputs: Tensor) -> None:
    profile = performance_profile(model, inputs, widths=None, **FEW)
    sums_up(profile)
    assert [one.name for one in profile.layers] == [one.name for one in analyze_model(model, inputs).layers]
    assert not [one.name for one in profile.layers if one.ms <= 0]
    # An LSTM has integer weights, and a time as such, although it computes its steps in float.
    assert not [one.name for one in profile.layers if one.name.startswith("cells.") and not one.int8_ms]


def test_a_model_that_cannot_be_traced_is_an_export_error() -> None:
    with pytest.raises(ExportError, match="Branching cannot be traced"):
        performance_profile(Branching(), torch.randn(1, 4), **FEW)


def test_a_quantized_model_is_refused_before_anything_is_done() -> None:
    quantized = quantize_model(Shortcut(32, 32, norm=True), [IMAGES], least_samples=1, progress=False).model
    with pytest.raises(StateError, match="Give the float model"):
        performance_profile(quantized, IMAGES, **FEW)


def test_what_cannot_be_measured_is_none_with_its_reason() -> None:
    profile = performance_profile(nn.Sequential(nn.Linear(4, 3)), torch.randn(1, 4), **FEW)
    assert "no channels can be removed" in profile.notes["widths"]
    assert profile.widths == () and profile.layer("0").width_ms is None
    assert "widths: not measured" in str(profile)


def test_a_batch_that_the_model_fixes_is_asked_for() -> None:
    model = written(lambda self, x: self.layer(x.reshape(2, 4)), layer=nn.Linear(4, 4))
    with pytest.raises(ArgumentError, match=r"fixes its batch to 2; .*batch_sizes=\(1,\)"):
        performance_profile(model, torch.randn(2, 4), **FEW)
    assert performance_profile(model, torch.randn(2, 4), batch_sizes=(2,), **FEW).batch_size == 2


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"batch_sizes": ()}, "batch_sizes"),
        ({"batch_sizes": 4}, "batch_sizes"),
        ({"threads": (0,)}, "threads: 0"),
        ({"threads": (True,)}, "threads: True"),
        ({"iterations": 0}, "iterations: 0"),
        ({"warmup": -1}, "warmup: -1"),
        ({"widths": (0.5,)}, r"1\.0 first"),
        ({"widths": (1.0, 1.5)}, r"1\.5 is no fraction"),
        ({"widths": (1.0, 0.5, 0.5)}, "falling"),
        ({"cache": 3}, "cache=3"),
        ({"sample_inputs": None}, "sample_inputs"),
    ],
)
def test_wrong_arguments_are_told(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        performance_profile(Shortcut(32, 32, norm=True), **{"sample_inputs": IMAGES, "progress": False, **wrong})


# ------------------------------------------------------------------------------------------------------------ cache


def test_the_cache_answers_for_the_same_content_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    really = profiling.Bench.measure_all

    def counted(self: Any, *args: Any) -> Any:
        runs.append(1)
        return really(self, *args)

    monkeypatch.setattr(profiling.Bench, "measure_all", counted)
    given: dict[str, Any] = {"quantized": False, "widths": None, "cache": tmp_path / "kept", **FEW}
    x = torch.randn(1, 4)
    first = performance_profile(nn.Linear(4, 3), x, **given)
    # Other weights of the same shapes take the same time.
    assert performance_profile(nn.Linear(4, 3), x, **given) == first
    assert len(runs) == 1
    performance_profile(nn.Linear(4, 5), x, **given)
    performance_profile(nn.Linear(4, 3), torch.randn(1, 2, 4), **given)
    performance_profile(nn.Linear(4, 3), x, **{**given, "iterations": 4})
    assert len(runs) == 4
    (tmp_path / "kept" / f"{first.content}.json").write_text("{half a fi")
    again = performance_profile(nn.Linear(4, 3), x, **given)
    assert len(runs) == 5 and again.content == first.content
    assert performance_profile(nn.Linear(4, 3), x, **given) == again
    assert len(runs) == 5


def test_nothing_is_kept_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    given: dict[str, Any] = {"quantized": False, "widths": None, **FEW}
    performance_profile(nn.Linear(4, 3), torch.randn(1, 4), **given)
    assert list(tmp_path.iterdir()) == []
    profile = performance_profile(nn.Linear(4, 3), torch.randn(1, 4), cache=True, **given)
    assert (tmp_path / "sparsify" / "performance" / f"{profile.content}.json").exists()


# ------------------------------------------------------------------------------------------------------------ files


def test_a_file_is_measured_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "model.onnx"
    export_onnx(Shortcut(32, 32, norm=True), IMAGES, path)
    profile = performance_profile(path, threads=(1, 2), **FEW)
    sums_up(profile)
    assert {"stem", "conv1", "conv2", "head"} <= {one.name for one in profile.layers if one.ms > 0}
    assert profile.total_int8_ms is None and "torch model" in profile.notes["int8"]
    assert performance_profile(path, IMAGES, batch_sizes=(2,), **FEW).batch_size == 2
    with pytest.raises(ArgumentError, match="sample_inputs: 'x' has the shape"):
        performance_profile(path, IMAGES[:, :2], **FEW)
    with pytest.raises(DataFileError, match="no such file"):
        performance_profile(tmp_path / "none.onnx", **FEW)


@pytest.mark.parametrize(
    "model", [Tied(50, 16, calls=2), Recurrent(), BertLayer(16, 4)], ids=["tied", "recurrent", "attention"]
)
def test_every_layer_of_a_file_has_its_time(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    export_onnx(
        model, torch.randn(1, 5, 8) if isinstance(model, Recurrent) else torch.zeros(1, 5, dtype=torch.int64), path
    )
    profile = performance_profile(path, **FEW)
    sums_up(profile)
    assert [one.name for one in profile.layers] == [one.name for one in analyze_model(path).layers]
    assert not [one.name for one in profile.layers if one.ms <= 0]


def test_a_file_of_others_is_measured_by_its_own_names(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    stored = {"body.weight": np.ones((8, 3, 3, 3)), "w": np.ones((4, 8, 1, 1)), "v": np.ones((4, 4, 1, 1))}
    nodes = [
        helper.make_node("Conv", ["x", "body.weight"], ["a"], name="/body/Conv"),
        helper.make_node("Relu", ["a"], ["b"], name="/Relu"),
        helper.make_node("Conv", ["b", "w"], ["c"], name="second"),
        helper.make_node("Conv", ["c", "v"], ["y"]),
    ]
    weights = [onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in stored.items()]
    graph = helper.make_graph(nodes, "g", [value("x", 1, [1, 3, 9, 9])], [value("y", 1, [1, 4, 7, 7])], weights)
    path = tmp_path / "other.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    profile = performance_profile(path, **FEW)
    sums_up(profile)
    assert {one.name: one.ms > 0 for one in profile.layers} == {"body": True, "second": True, "y": True}


def branching_file() -> onnx.ModelProto:
    """A product, then an If whose branch reads it."""
    value = helper.make_tensor_value_info
    then = helper.make_graph([helper.make_node("Relu", ["y"], ["a"])], "then", [], [value("a", 1, [2, 2])])
    other = helper.make_graph([helper.make_node("Neg", ["y"], ["b"])], "other", [], [value("b", 1, [2, 2])])
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], name="product"),
        helper.make_node("ReduceSum", ["x"], ["sum"], name="sum", keepdims=0),
        helper.make_node("Cast", ["sum"], ["c"], name="cast", to=TensorProto.BOOL),
        helper.make_node("If", ["c"], ["z"], name="choice", then_branch=then, else_branch=other),
    ]
    weights = [onnx.numpy_helper.from_array(np.ones((2, 2), np.float32), "w")]
    graph = helper.make_graph(nodes, "g", [value("x", 1, [2, 2])], [value("z", 1, [2, 2])], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def test_a_branch_counts_within_the_node_around_it() -> None:
    model = branching_file()
    onnx.checker.check_model(numbered(model))
    owners = [("product",), (), (), ()]
    times = node_times(model, {"x": np.ones((2, 2), np.float32)}, owners, {}, threads=1, warmup=1, iterations=3)
    assert set(times.owners) == {"product"}
    assert "choice" in times.others and "Relu" not in times.others
    assert sum(times.owners.values()) + sum(times.others.values()) == pytest.approx(times.total)


def test_numbers_for_names_change_nothing_about_what_is_run(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    export_onnx(BertLayer(16, 4), torch.zeros(1, 6, dtype=torch.int64), path)
    onnx.save(numbered(read_model(path)), tmp_path / "numbered.onnx")
    assert optimized_operators(path) == optimized_operators(tmp_path / "numbered.onnx")


def test_rounding_of_widths_is_that_of_structured_pruning() -> None:
    from sparsify.pruning.groups import find_unchecked_groups

    model = nn.Sequential(nn.Conv2d(3, 48, 3), nn.ReLU(), nn.Conv2d(48, 8, 1)).eval()
    channel_groups = find_unchecked_groups(model, (IMAGES,))
    assert [variants.kept_channels(channel_groups, "0.weight", w) for w in (1.0, 0.9, 0.75, 0.5, 0.1)] == [
        48,
        48,
        32,
        32,
        16,
    ]
    assert variants.narrowed(model, channel_groups, 0.75).get_parameter("0.weight").shape[0] == 32
    assert model.get_parameter("0.weight").shape[0] == 48


def test_a_layer_is_found_by_its_name(residual: PerformanceProfile) -> None:
    assert isinstance(residual.layer("head"), LayerPerformance)
