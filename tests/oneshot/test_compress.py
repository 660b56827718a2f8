"""Compression of weights without data: on modules and files, in any sequence, and what it says about itself."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from sparsify import (
    LinearQuantizerConfig,
    MagnitudePrunerConfig,
    OptimizationConfig,
    PalettizerConfig,
    ThresholdPrunerConfig,
    compression_report,
    decompress_weights,
    export_onnx,
    get_weights_metadata,
    linear_quantize_weights,
    palettize_weights,
    prune_weights,
)
from sparsify.errors import ArgumentError, DataError, ExportError, TargetError
from sparsify.oneshot.weight_forms import LaidOutWeight, integer_weight, pruning_mask
from sparsify.onnx.runtime import open_session, run_session

INT8 = LinearQuantizerConfig()
PALETTE = PalettizerConfig(nbits=3)
HALF = MagnitudePrunerConfig(target_sparsity=0.5)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 32, 3), nn.ReLU(), nn.ConvTranspose2d(32, 16, 3), nn.Flatten(), nn.Linear(16 * 64, 24)]
    return nn.Sequential(*layers).eval()


WEIGHTS = ("2.weight", "4.weight")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compress") / "plain.onnx"
    export_onnx(network(), torch.randn(2, 4, 8, 8), path)
    return path


def outputs(path: Any) -> np.ndarray:
    session = open_session(path, exact=False, model=onnx.ModelProto())
    x = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
    return np.asarray(next(iter(run_session(session, {session.get_inputs()[0].name: x}).values())))


def apply(functions: list[tuple[Callable[..., Any], Any]], model: Any, folder: Path | None) -> Any:
    for number, (function, config) in enumerate(functions):
        path = () if folder is None else (folder / f"{number}.onnx",)
        model = function(model, config, *path)
    return model


SEQUENCES = {
    "int8": [(linear_quantize_weights, INT8)],
    "uint8 linear": [(linear_quantize_weights, LinearQuantizerConfig(mode="linear", dtype="uint8"))],
    "int4 in blocks": [(linear_quantize_weights, LinearQuantizerConfig(dtype="int4", granularity="per_block"))],
    "uint4 a tensor": [(linear_quantize_weights, LinearQuantizerConfig(dtype="uint4", granularity="per_tensor"))],
    "palette": [(palettize_weights, PALETTE)],
    "groups": [
        (palettize_weights, PalettizerConfig(nbits=2, granularity="per_grouped_channel", group_size=8)),
        (linear_quantize_weights, INT8),
    ],
    "vectors": [(palettize_weights, PalettizerConfig(nbits=4, cluster_dim=2))],
    "channel scale": [(palettize_weights, PalettizerConfig(nbits=4, enable_per_channel_scale=True))],
    "prune": [(prune_weights, HALF)],
    "prune, int8": [(prune_weights, HALF), (linear_quantize_weights, INT8)],
    "int8, prune": [(linear_quantize_weights, INT8), (prune_weights, HALF)],
    "prune, palette, int8": [(prune_weights, HALF), (palettize_weights, PALETTE), (linear_quantize_weights, INT8)],
    "palette, int8, prune": [(palettize_weights, PALETTE), (linear_quantize_weights, INT8), (prune_weights, HALF)],
    "int8, palette": [(linear_quantize_weights, INT8), (palettize_weights, PALETTE)],
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_a_file_and_a_module_get_the_same_weights_and_the_file_runs(name: str, file: Path, tmp_path: Path) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    module, written = apply(SEQUENCES[name], model, None), apply(SEQUENCES[name], file, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "the given one changed"
    assert written.unproven is None
    assert written.size_bytes < file.stat().st_size
    plain = decompress_weights(written, tmp_path / "floats.onnx")
    assert np.array_equal(outputs(plain), outputs(written))
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(plain).graph.initializer}
    described, in_module = get_weights_metadata(written), get_weights_metadata(module)
    for weight in WEIGHTS:
        values = module.get_parameter(weight).detach().numpy()
        assert np.array_equal(stored[weight], values)
        one, other = described[weight], in_module[weight]
        assert (one.bits, one.sparsity, one.unique_values) == (other.bits, other.sparsity, other.unique_values)
        assert one.val.size == other.val.size == values.size
        assert np.array_equal(one.val, values)
        if "prune" in name:
            assert np.mean(values == 0) >= 0.5
        if "palette" in name:
            assert len(np.unique(values)) <= 8
    assert {child.op_type for one in described.values() for child in one.child_ops} == {"ConvTranspose", "Gemm"}


def test_integers_are_those_of_the_formulas() -> None:
    w = np.array([0.31, -0.9, 0.52, 2], np.float32)
    one = integer_weight(w, "linear_symmetric", "int8", None)
    assert one.scale == pytest.approx(0.01574803) and one.q.tolist() == [20, -57, 33, 127] and int(one.zero) == 0
    other = integer_weight(w, "linear", "int8", None)
    assert other.q.tolist() == [-22, -128, -3, 127] and int(other.zero) == -49
    assert integer_weight(w, "linear_symmetric", "uint8", None).q.tolist() == [147, 70, 160, 254]
    assert integer_weight(w, "linear_symmetric", "uint4", None).q.max() == 14


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int4", "uint4"])
@pytest.mark.parametrize("mode", ["linear", "linear_symmetric"])
@pytest.mark.parametrize("draw", ["normal", "positive", "negative", "zeros", "tiny"])
def test_zeros_stay_zero_and_no_weight_is_further_than_half_a_step(dtype: str, mode: str, draw: str) -> None:
    w = np.random.default_rng(0).standard_normal((6, 7)).astype(np.float32)
    w = {"normal": w, "positive": abs(w), "negative": -abs(w), "zeros": 0 * w, "tiny": w * np.float32(1e-30)}[draw]
    w[0, :3] = 0
    for axis, inputs, block in ((None, 0, 0), (0, 0, 0), (1, 0, 0), (0, 1, 3), (1, 0, 4)):
        form = integer_weight(w, mode, dtype, axis, inputs, block)
        values = form.values()
        assert not values[w == 0].any()
        assert (np.abs(values - w) <= np.broadcast_to(form.spread(form.scale), w.shape) * 0.501).all()


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("tied", [False, True])
def test_exactly_the_asked_share_becomes_zero_also_of_ties(sparsity: float, tied: bool) -> None:
    w = np.ones((5, 7), np.float32) if tied else np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    mask = pruning_mask(LaidOutWeight(w, 0, 1), MagnitudePrunerConfig(target_sparsity=sparsity))
    assert not isinstance(mask, str)
    assert mask.sum() == round(sparsity * w.size)
    assert not mask.any() or mask.all() or np.abs(w[mask]).max() <= np.abs(w[~mask]).min()


@pytest.mark.parametrize(("n", "m"), [(0, 4), (2, 4), (4, 4), (15, 22), (13, 23), (15, 26), (1, 1)])
@pytest.mark.parametrize("dim", [None, 0])
def test_n_of_every_m_are_zero(n: int, m: int, dim: int | None) -> None:
    w = np.random.default_rng(0).standard_normal((2 * m, 3 * m, 2)).astype(np.float32)
    mask = pruning_mask(LaidOutWeight(w, 0, 1), MagnitudePrunerConfig(n_m_ratio=(n, m), dim=dim))
    assert not isinstance(mask, str)
    rows = np.moveaxis(mask, 1 if dim is None else dim, -1).reshape(-1, m)
    assert (rows.sum(1) == n).all()


def test_blocks_become_zero_together() -> None:
    w = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
    mask = pruning_mask(LaidOutWeight(w, 0, 1), MagnitudePrunerConfig(target_sparsity=0.5, block_size=4))
    assert not isinstance(mask, str)
    blocks = mask.reshape(2, 4, 6)
    assert (blocks.all(1) == blocks.any(1)).all() and blocks.all(1).sum() == 6


def test_a_name_goes_before_a_type_and_a_type_before_all() -> None:
    config = OptimizationConfig(INT8, {nn.Linear: PALETTE, "nn.ConvTranspose2d": None}, {"4": INT8, r"0\..*": None})
    assert config.of(["4.weight", "4"], ["Linear"]) is INT8
    assert config.of(["5.weight", "5"], ["Linear"]) is PALETTE
    assert config.of(["2.weight", "2"], ["ConvTranspose2d"]) is None
    assert config.of(["0.weight", "0"], ["Conv2d"]) is None
    assert config.of(["14.weight", "14"], ["Conv2d"]) is INT8, "a name matches as a whole"
    made = linear_quantize_weights(network(), OptimizationConfig(INT8, name_configs={"2": None}))
    rows = {row["name"]: row for row in compression_report(made).rows}
    assert rows["2.weight"]["skipped"] == "config leaves it out"
    assert rows["4.weight"]["form"] == "int8" and rows["4.weight"]["rms_error"] > 0
    assert "weight_threshold=2,048" in str(rows["0.weight"]["skipped"])


def test_settings_are_read_from_yaml(tmp_path: Path) -> None:
    text = "global_config: {type: PalettizerConfig, nbits: 4}\ntype_configs: {Linear: null}\n"
    (tmp_path / "config.yaml").write_text(text)
    for source in (text, tmp_path / "config.yaml", str(tmp_path / "config.yaml")):
        config = OptimizationConfig.from_yaml(source)
        assert config.global_config == PalettizerConfig(nbits=4) and config.type_configs == {"Linear": None}


WRONG: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: PalettizerConfig(), ArgumentError, "nbits: is required"),
    (lambda: PalettizerConfig(nbits=5), ArgumentError, "nbits"),
    (lambda: PalettizerConfig(nbit=4), ArgumentError, "Did you mean 'nbits'"),
    (lambda: PalettizerConfig(nbits=4, cluster_dim=2, enable_per_channel_scale=True), ArgumentError, "cluster_dim"),
    (lambda: PalettizerConfig(mode="custom"), ArgumentError, "lut_function"),
    (lambda: MagnitudePrunerConfig(), ArgumentError, "either target_sparsity or n_m_ratio"),
    (lambda: MagnitudePrunerConfig(target_sparsity=80.0), ArgumentError, r"did you mean 0\.8"),
    (lambda: MagnitudePrunerConfig(n_m_ratio=(5, 4)), ArgumentError, "n_m_ratio"),
    (lambda: LinearQuantizerConfig(dtype="int2"), ArgumentError, "dtype"),
    (lambda: OptimizationConfig.from_dict({"global": {}}), ArgumentError, "Did you mean 'global_config'"),
    (lambda: OptimizationConfig.from_dict({"global_config": {"type": "Palettizer"}}), ArgumentError, "Did you mean"),
    (
        lambda: OptimizationConfig.from_dict({"type_configs": {"Conv": {"type": "PalettizerConfig"}}}),
        ArgumentError,
        "Conv",
    ),
    (lambda: OptimizationConfig.from_yaml("a: [1"), DataError, "no YAML"),
    (lambda: OptimizationConfig.from_yaml("/nowhere.yaml"), OSError, "nowhere"),
    (lambda: OptimizationConfig(name_configs={"(": None}), ArgumentError, "regular expression"),
    (lambda: OptimizationConfig("int8"), ArgumentError, "none of"),  # type: ignore[arg-type]
    (lambda: palettize_weights(network(), INT8), ArgumentError, "it takes PalettizerConfig"),
    (lambda: linear_quantize_weights(network(), INT8, "x.onnx"), ArgumentError, "is for files"),
    (lambda: linear_quantize_weights("model.onnx", INT8), ArgumentError, "give path="),
    (lambda: linear_quantize_weights(3, INT8), ArgumentError, "give a torch.nn.Module"),
    (
        lambda: linear_quantize_weights(network(), OptimizationConfig(name_configs={"4.weigth": INT8})),
        TargetError,
        "Did you mean '4.weight'",
    ),
    (
        lambda: linear_quantize_weights(network(), OptimizationConfig(type_configs={"Liner": INT8})),
        TargetError,
        "Did you mean 'Linear'",
    ),
    (lambda: compression_report(network()), ArgumentError, "comes from no compressing function"),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_what_cannot_be_meant_is_an_error(number: int) -> None:
    call, kind, text = WRONG[number]
    with pytest.raises(kind, match=text):
        call()


def test_weights_that_are_nan_are_refused_and_nothing_is_written(file: Path, tmp_path: Path) -> None:
    model = network()
    with torch.no_grad():
        model[4].weight[0, 0] = float("nan")
    with pytest.raises(DataError, match=r"4\.weight holds 1 values that are NaN"):
        prune_weights(model, HALF)
    damaged = onnx.load(file)
    tensor = next(each for each in damaged.graph.initializer if each.name == "4.weight")
    values = numpy_helper.to_array(tensor).copy()
    values[0, 0] = np.inf
    tensor.CopyFrom(numpy_helper.from_array(values, "4.weight"))
    with pytest.raises(DataError, match=r"4\.weight"):
        prune_weights(damaged, HALF, tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())


def test_a_note_that_was_edited_is_a_data_error(file: Path, tmp_path: Path) -> None:
    written = linear_quantize_weights(file, INT8, tmp_path / "int8.onnx")
    for wrong in ("[", "[]", '{"4.weight": 3}', '{"4.weight": {"made": [], "stored": []}}'):
        model = onnx.load(written)
        next(entry for entry in model.metadata_props if entry.key == "sparsify.compressed").value = wrong
        onnx.save(model, tmp_path / "edited.onnx")
        with pytest.raises(DataError):
            prune_weights(tmp_path / "edited.onnx", HALF, tmp_path / "out.onnx")
        with pytest.raises(DataError):
            get_weights_metadata(tmp_path / "edited.onnx")


def test_what_training_changed_is_no_longer_taken_for_integers() -> None:
    made = linear_quantize_weights(network(), INT8)
    assert get_weights_metadata(made)["4.weight"].bits == 8
    with torch.no_grad():
        made[4].weight.mul_(1.1)
    assert get_weights_metadata(made)["4.weight"].bits == 32


def test_tied_weights_are_one(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(100, 32), nn.Linear(32, 100, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embedding(ids))

    made = palettize_weights(Tied(), OptimizationConfig(PALETTE, name_configs={"head": PalettizerConfig(nbits=1)}))
    assert made.head.weight is made.embedding.weight
    assert len(made.head.weight.unique()) == 2


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_weights_in_branches_and_constant_nodes_are_found(kind: type, tmp_path: Path) -> None:
    generator, number = np.random.default_rng(0), helper.np_dtype_to_tensor_dtype(np.dtype(kind))

    def branch(name: str) -> onnx.GraphProto:
        weight = numpy_helper.from_array(generator.standard_normal((64, 64)).astype(kind), f"w_{name}")
        node = helper.make_node("MatMul", ["h", f"w_{name}"], [name], name=f"product_{name}")
        return helper.make_graph([node], name, [], [helper.make_tensor_value_info(name, number, None)], [weight])

    held = numpy_helper.from_array(generator.standard_normal((64, 64)).astype(kind))
    nodes = [
        helper.make_node("Constant", [], ["w"], name="held", value=held),
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("If", ["c"], ["y"], then_branch=branch("a"), else_branch=branch("b")),
    ]
    inputs = [helper.make_tensor_value_info("x", number, [2, 64]), helper.make_tensor_value_info("c", 9, [])]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", number, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    written = palettize_weights(model, PalettizerConfig(nbits=4), tmp_path / "out.onnx")
    assert [row["form"] for row in written.report.rows] == ["palette of 4 bits"] * 3
    plain = decompress_weights(written, tmp_path / "floats.onnx")
    feed = {"x": generator.standard_normal((2, 64)).astype(kind), "c": np.array(True)}
    results = [run_session(open_session(p, exact=False, model=onnx.ModelProto()), feed)["y"] for p in (written, plain)]
    assert np.array_equal(*results)


def test_a_file_of_an_old_opset_is_refused(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    io = [helper.make_tensor_value_info(name, 1, [1, 64]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", io[:1], io[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 9)], ir_version=4)
    with pytest.raises(ExportError, match="opset 9"):
        prune_weights(model, HALF, tmp_path / "out.onnx")


def test_what_is_skipped_says_why(file: Path, tmp_path: Path) -> None:
    config = PalettizerConfig(nbits=2, granularity="per_grouped_channel", group_size=7, weight_threshold=10)
    skipped = [row["skipped"] for row in palettize_weights(file, config, tmp_path / "a.onnx").report.rows]
    assert skipped == [f"its {n} channels are not divided by group_size=7" for n in (32, 16, 24)]
    unique = palettize_weights(network(), PalettizerConfig(mode="unique"))
    assert "different values, more than 256" in str(compression_report(unique).rows[2]["skipped"])
    dense = prune_weights(network(), ThresholdPrunerConfig(threshold=1e-6))
    assert "minimum_sparsity_percentile=0.5" in str(compression_report(dense).rows[2]["skipped"])
    zeros = palettize_weights(prune_weights(network(), HALF), PalettizerConfig(nbits=2, cluster_dim=2))
    assert "its zeros do not fill whole vectors" in str(compression_report(zeros).rows[2]["skipped"])


def test_other_modes_of_palettes_give_what_they_say() -> None:
    few = network()
    with torch.no_grad():
        few[4].weight.copy_((few[4].weight * 100).round() / 100)
    values = palettize_weights(few, PalettizerConfig(mode="unique"))[4].weight
    assert torch.equal(values, few[4].weight)
    custom = PalettizerConfig(mode="custom", lut_function=lambda w: [w.min(), 0, w.max()])
    assert len(palettize_weights(network(), custom)[4].weight.unique()) == 3
    even = palettize_weights(network(), PalettizerConfig(mode="uniform", nbits=3))[4].weight.detach().unique()
    assert len(even) == 8 and float((even.diff() - even.diff()[0]).abs().max()) < 1e-6
    with pytest.raises(ArgumentError, match="returned 0 values"):
        palettize_weights(network(), PalettizerConfig(mode="custom", lut_function=lambda w: []))


def test_reports_add_up_and_are_json(file: Path, tmp_path: Path) -> None:
    written = linear_quantize_weights(file, INT8, tmp_path / "int8.onnx")
    rows = written.report.rows
    assert sum(row["skipped"] is None for row in rows) == 2
    assert json.loads(json.dumps([dict(row) for row in rows])) == [dict(row) for row in rows]
    assert "2 of 3 weights compressed" in str(written)
