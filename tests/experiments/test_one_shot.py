"""`one_shot`: a model and samples in, a smaller, proved file and its figures out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from sparsify import ArgumentError, DataError, SparsifyError, StateError, one_shot, quantize_model
from sparsify.cli.main import main
from sparsify.experiments.sample_files import ImageForm, InputForm, samples_from_files
from sparsify.onnx.runtime import read_model


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 40),
        nn.ReLU(),
        nn.Linear(40, 4),
    ).eval()


@pytest.fixture(scope="module")
def data() -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = network()(x).argmax(1)
    return list(zip(x.split(16), y.split(16), strict=True))


def test_a_module_becomes_a_file_with_the_zeros_of_the_level(data: Any, tmp_path: Path) -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = one_shot(model, data, path=tmp_path / "small.onnx", samples=32, measure=False)
    assert found.sparsity == round(0.514286 * 3152) / 3152
    assert found.quantized and found.calibration_samples == 32 and found.measured_apart
    assert found.metric == "accuracy" and found.dense.metric == 1.0 and found.compressed.metric is not None
    assert found.agreement is not None and found.agreement.samples == 32 and found.agreement.error < 0.8
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    stored = read_model(found)
    weights = [numpy_helper.to_array(t) for t in stored.graph.initializer if t.data_type == onnx.TensorProto.INT8]
    weights = [w for w in weights if w.ndim > 1]
    assert sum(int((w == 0).sum()) for w in weights) >= round(0.514286 * 3152)
    onnxruntime.InferenceSession(found).run(None, {"input": data[0][0].numpy()})
    text = str(found)
    assert "51.4" in text and "accuracy" in text
    said = json.loads(found.to_json())
    assert said["pruned"][0]["layer"] == "0" and said["quantized"] is True
    assert "<table>" in found.to_html(tmp_path / "report.html").read_text()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["report.html", "small.onnx"]


@pytest.mark.slow
@pytest.mark.parametrize(("level", "sparse", "quantized"), [(0, False, False), (0.2, False, True), (30, True, True)])
def test_levels(level: float, sparse: bool, quantized: bool, data: Any, tmp_path: Path) -> None:
    found = one_shot(network(), data, path=tmp_path / "a.onnx", optim_level=level, measure=False)
    assert bool(found.pruned) is sparse and found.quantized is quantized
    if level == 0:
        assert found.compressed.bytes == found.dense.bytes and found.agreement is not None
        assert found.agreement.error == 0
    if sparse:
        assert found.sparsity == round(0.4 * 3152) / 3152


def test_without_data_nor_batch_norm_weights_alone_or_nothing_is_silent(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    found = one_shot(model.eval(), path=tmp_path / "a.onnx", sample_inputs=torch.randn(2, 3, 8, 8), measure=False)
    assert found.quantized and found.sparsity > 0.5 and found.agreement is None
    with pytest.raises(ArgumentError, match="neither data nor sample_inputs"):
        one_shot(model, path=tmp_path / "b.onnx")
    assert not (tmp_path / "b.onnx").exists()


@pytest.mark.slow
def test_what_is_left_out_stays_dense_and_in_float(data: Any, tmp_path: Path) -> None:
    found = one_shot(network(), data, path=tmp_path / "a.onnx", ignore="6", measure=False)
    assert found.kept_dense == {"6": "left out"} and "6" in found.floating
    assert {layer.layer for layer in found.pruned} == {"0", "4"}


@pytest.mark.slow
def test_a_recipe_instead_of_the_level(data: Any, tmp_path: Path) -> None:
    recipe = (
        "modifiers:\n- !ConstantPruningModifier\n  params: ['re:.*weight']\n- !QuantizationModifier\n  start_epoch: 0\n"
    )
    place = tmp_path / "recipe.yaml"
    place.write_text(recipe)
    found = one_shot(network(), data, path=tmp_path / "a.onnx", recipe=place)
    assert found.quantized and found.level is None
    with pytest.raises(ArgumentError, match="a recipe is given"):
        one_shot(network(), data, path=tmp_path / "b.onnx", recipe=place, optim_level=0.7)


@pytest.mark.slow
def test_wrong_arguments_write_nothing(data: Any, tmp_path: Path) -> None:
    place = tmp_path / "a.onnx"
    place.write_text("old")
    cases: list[tuple[dict[str, Any], type[SparsifyError], str]] = [
        ({"optim_level": 1.5}, ArgumentError, "1.5 is no level"),
        ({"samples": 0}, ArgumentError, "samples=0"),
        ({"metric": "recall"}, ArgumentError, "metric='recall'"),
        ({"ignore": ["nothing"]}, SparsifyError, "nothing"),
        ({"mean": ["a"]}, ArgumentError, "mean="),
    ]
    for options, error, words in cases:
        with pytest.raises(error, match=words):
            one_shot(network(), data, path=place, **options)
    with pytest.raises(StateError, match="already"):
        one_shot(quantize_model(network(), data).model, data, path=place)
    with pytest.raises(DataError):
        one_shot(network(), [(torch.full((16, 3, 8, 8), torch.nan),)], path=place)
    assert place.read_text() == "old" and [one.name for one in tmp_path.iterdir()] == ["a.onnx"]


@pytest.mark.slow
def test_a_folder_of_npz_files(data: Any, tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    folder.mkdir()
    x, y = (torch.cat([pair[at] for pair in data]).numpy() for at in (0, 1))
    for number in range(len(x)):
        np.savez(folder / f"input{number}.npz", input=x[number], label=y[number])
    found = one_shot(
        network(),
        folder,
        path=tmp_path / "a.onnx",
        sample_inputs=data[0][0],
        samples=32,
        measure=False,
        metric="accuracy",
    )
    assert found.dense.metric == 1.0 and found.calibration_samples == 32


IMAGE = InputForm("x", "float32", (None, 3, 4, 4))


def test_samples_keep_their_order_and_fit_the_inputs(tmp_path: Path) -> None:
    for number in range(12):
        np.savez(tmp_path / f"input{number}.npz", x=np.full((3, 4, 4), number, np.float64))
    read = samples_from_files(tmp_path, [IMAGE], most=100)
    assert [row["x"][0, 0, 0, 0] for row in read.rows] == list(range(12)) and read.labels is None
    assert read.rows[0]["x"].dtype == np.float32 and read.rows[0]["x"].shape == (1, 3, 4, 4)
    assert [row["x"][0, 0, 0, 0] for row in samples_from_files(tmp_path, [IMAGE], most=3).rows] == [0, 4, 8]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"y": np.zeros((3, 4, 4), np.float32), "z": np.zeros(1)}, r"input1.npz: no array 'x'"),
        ({"x": np.zeros((3, 4, 4), np.float32), "z": np.zeros(1)}, r"input1.npz: the array 'z' is no input"),
        ({"x": np.zeros((3, 4, 5), np.float32)}, r"\[3, 4, 5\], expected \[3, 4, 4\]"),
        ({"x": np.zeros((2, 3, 4, 4), np.float32)}, "expected one sample without the batch"),
        ({"x": np.full((3, 4, 4), np.nan, np.float32)}, "NaN or infinity"),
        ({"x": np.zeros((3, 4, 4), np.int64)}, "holds int64, expected float32"),
        ({"x": np.array(["a"])}, "expected one sample|expected numbers"),
        (b"PK\x03\x04 broken", "cannot be read as arrays"),
    ],
)
def test_a_bad_sample_is_said_with_its_file(content: Any, words: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "input0.npz", x=np.zeros((3, 4, 4), np.float32))
    bad = tmp_path / "input1.npz"
    if isinstance(content, bytes):
        bad.write_bytes(content)
    else:
        np.savez(bad, **content)
    with pytest.raises(DataError, match=words):
        samples_from_files(tmp_path, [IMAGE], most=9)


def test_images_in_both_layouts_with_and_without_classes(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for each in range(2):
            color = (255, 0, 0) if number else (0, 0, 255)
            pillow.new("RGB", (6, 8), color).save(tmp_path / "data" / name / f"{each}.png")
    read = samples_from_files(tmp_path / "data", [IMAGE], most=9)
    assert read.labels == (0, 0, 1, 1) and read.names == ("cat", "dog")
    assert read.rows[3]["x"][0, :, 0, 0].tolist() == [1, 0, 0] and "not normalized" in read.notes[0]
    last = InputForm("x", "float32", (1, 4, 4, 3))
    form = ImageForm(mean=(0.5,) * 3, std=(0.5,) * 3)
    loose = samples_from_files(tmp_path / "data" / "dog", [last], most=9, images=form)
    assert loose.labels is None and loose.rows[0]["x"][0, 0, 0].tolist() == [1, -1, -1]
    raw = samples_from_files(tmp_path / "data" / "dog", [InputForm("x", "uint8", (None, None, None, 3))], most=9)
    assert raw.rows[0]["x"].dtype == np.uint8 and raw.rows[0]["x"].shape == (1, 224, 224, 3)
    (tmp_path / "data" / "dog" / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"dog/1\.png"):
        samples_from_files(tmp_path / "data", [IMAGE], most=9)


def test_one_array_of_all_samples_and_texts_without_a_tokenizer(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(6, dtype=np.float32).reshape(3, 2))
    np.save(tmp_path / "labels.npy", np.array([0, 1, 1]))
    read = samples_from_files(tmp_path / "x.npy", [InputForm("x", "float32", (None, 2))], most=9)
    assert read.labels == (0, 1, 1) and read.rows[2]["x"].tolist() == [[4, 5]]
    (tmp_path / "a.csv").write_text("text,label\nfine,1\nbad,0\n")
    with pytest.raises(ArgumentError, match="give tokenizer="):
        samples_from_files(tmp_path / "a.csv", [InputForm("input_ids", "int64", (None, None))], most=9)
    with pytest.raises(DataError, match="no such file or folder"):
        samples_from_files(tmp_path / "nowhere", [IMAGE], most=9)


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one_shot_net.py").write_text(
        "import torch\nfrom torch import nn\n\ndef net():\n    torch.manual_seed(0)\n    return nn.Linear(8, 4)\n"
    )
    np.savez(tmp_path / "all.npz", input=np.random.default_rng(0).standard_normal((40, 8), np.float32))
    words = [
        "one-shot",
        "one_shot_net:net",
        "--data",
        "all.npz",
        "--output",
        "small.onnx",
        "--no-measure",
        "--input",
        "1x8",
    ]
    assert main([*words, "--json", "--report-html", "r.html"]) == 0
    assert json.loads(capsys.readouterr().out)["asked_sparsity"] == pytest.approx(0.5142857)
    assert (tmp_path / "r.html").is_file()
    assert main([*words, "--optim-level", "7.5"]) == 2
    assert main([*words, "--report-html", "nowhere/r.html"]) == 2
