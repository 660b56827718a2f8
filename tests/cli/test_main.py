"""The command line: every command does its work, says it in text and JSON, and refuses bad input in a line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsify import Recipe, ScheduledModifierManager
from sparsify.cli.commands import FINE, SHORT
from sparsify.cli.main import BAD, main

MODELS = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))

def words():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 4))

def sample():
    return (torch.zeros(2, 3, 8, 8),)

def batches():
    torch.manual_seed(1)
    return [(torch.randn(8, 3, 8, 8), torch.randint(0, 10, (8,))) for _ in range(2)]

def broken():
    raise RuntimeError("no weights here")

number = 3
"""
RECIPE = """
last: 4.0
modifiers:
  - !EpochRangeModifier {start_epoch: 0.0, end_epoch: eval(last)}
  - !SetLearningRateModifier {start_epoch: 0.0, learning_rate: 0.05}
  - !GMPruningModifier
    params: __ALL_PRUNABLE__
    init_sparsity: 0.05
    final_sparsity: 0.8
    start_epoch: 0.0
    end_epoch: 2.0
    update_frequency: 0.5
  - !QuantizationModifier {start_epoch: 3.0}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "shop", raising=False)
    Path("shop.py").write_text(MODELS)
    Path("recipe.yaml").write_text(RECIPE)
    return tmp_path


def said(words: str, capsys: pytest.CaptureFixture[str], code: int = FINE) -> str:
    assert main(words.split()) == code
    return capsys.readouterr().out


def answer(words: str, capsys: pytest.CaptureFixture[str], code: int = FINE) -> Any:
    return json.loads(said(f"{words} --json", capsys, code))


def test_analyze_lists_layers(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer("analyze shop:build --input 1x3x8x8", capsys)
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert layers["0"]["macs"] == 8 * 27 * 36 and layers["4"]["parameters"] == 2890
    assert "Conv2d" in said("analyze shop:build --input 1x3x8x8", capsys)


def test_analyze_reads_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    said("export shop:build --input shop:sample --output model.onnx", capsys)
    found = answer("analyze model.onnx", capsys)
    assert {layer["name"]: layer["macs"] for layer in found["layers"]} == {"0": 8 * 27 * 36, "4": 2880}


def test_optimize_writes_a_recipe_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    words = "optimize shop:build --input 2x3x8x8 --level 0.5 --epochs 20 --initial-lr 0.1 --final-lr 0.001"
    found = answer(f"{words} --output made.yaml --html page.html", capsys)
    assert found["recipe"] == "made.yaml" and found["evidence"]["layers"]
    page = Path("page.html").read_text(encoding="utf-8")
    # The page begins where the recipe stands: 70 % and int8 for level .5.
    assert "made.yaml" in page and '"sparsity":0.7,' in page and "QuantizationModifier" in page.split('id="data">')[1]
    said("check made.yaml --model shop:build", capsys)
    foreseen = answer("plan made.yaml --model shop:build --input 2x3x8x8 --steps-per-epoch 20", capsys)
    assert foreseen["warnings"] == [] and foreseen["moments"][-1]["zeros"]["4.weight"] > 0.4


def test_optimize_with_measurements(capsys: pytest.CaptureFixture[str]) -> None:
    words = "optimize shop:build --input 2x3x8x8 --sparsity 0.7 --balance 0.5 --override 4=0.5 --measure --force"
    text = said(f"{words} --data shop:batches --loss torch.nn.functional:cross_entropy --no-quantize", capsys)
    assert "recipe.yaml" in text
    made = Recipe.load("recipe.yaml")
    assert {type(m).__name__ for m in made.modifiers} >= {"GMPruningModifier", "EpochRangeModifier"}
    assert "QuantizationModifier" not in text


def test_a_page_beside_a_recipe_of_channels_is_said_to_differ(capsys: pytest.CaptureFixture[str]) -> None:
    words = "optimize shop:build --input 2x3x8x8 --structured --sparsity 0.5 --html page.html --force"
    assert main(words.split()) == FINE
    assert "moves single weights, while the recipe removes channels" in capsys.readouterr().err


@pytest.mark.slow
def test_optimize_for_a_latency(capsys: pytest.CaptureFixture[str]) -> None:
    answer("optimize shop:build --input 1x3x8x8 --goal-ms 1000 --output fast.yaml", capsys)
    said("check fast.yaml --model shop:build", capsys)


def test_plan_with_and_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    bare = answer("plan recipe.yaml", capsys)
    assert bare["max_epochs"] == 4.0 and bare["moments"][0]["zeros"] == {}
    full = answer("plan recipe.yaml --model shop:build --input 2x3x8x8 --steps-per-epoch 10 --plot plan.png", capsys)
    assert full["moments"][-1]["zeros"] == {"0.weight": 0.8, "4.weight": 0.8}
    assert Path("plan.png").exists()
    assert "80.0%" in said("plan recipe.yaml --model shop:build", capsys)


def test_plan_is_strict_where_it_is_asked_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    assert "starts at epoch 3, after training has ended" in said("plan recipe.yaml --epochs 2.5", capsys)
    said("plan recipe.yaml --epochs 2.5 --strict", capsys, SHORT)
    said("plan recipe.yaml --strict", capsys, FINE)


def test_variables_are_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer("plan recipe.yaml --set last=7.0", capsys)["max_epochs"] == 7.0


def test_check_finds_every_name(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer("check recipe.yaml --model shop:build", capsys)
    assert found["modifiers"]["3. GMPruningModifier"] == ["0.weight", "4.weight"]
    assert "__ALL_PRUNABLE__" in said("check recipe.yaml", capsys)


def test_recipe_schema_convert_compose(capsys: pytest.CaptureFixture[str]) -> None:
    assert "GMPruningModifier" in json.dumps(json.loads(said("recipe schema", capsys)))
    said("recipe convert recipe.yaml --output converted.yaml", capsys)
    assert Recipe.load("converted.yaml").modifiers == Recipe.load("recipe.yaml").modifiers
    Path("more.yaml").write_text("modifiers: [!SetLearningRateModifier {start_epoch: 0.0, learning_rate: 0.01}]")
    composed = Recipe.from_yaml(said("recipe compose recipe.yaml more.yaml", capsys))
    assert [stage.name for stage in composed.stages] == ["stage_0", "stage_1"]


def test_export_verify_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    exported = answer("export shop:build --input 2x3x8x8 --output model.onnx", capsys)
    assert exported["size_bytes"] == Path("model.onnx").stat().st_size
    assert answer("verify shop:build model.onnx --input shop:sample", capsys)["ok"] is True
    found = answer("benchmark model.onnx --iterations 3 --threads 1 --compare model.onnx", capsys)
    assert found["benchmark"]["iterations"] == 3 and found["compared"]["median"] > 0
    said("benchmark model.onnx --iterations 3 --at-most 1e-9", capsys, SHORT)
    said("benchmark model.onnx --iterations 3 --at-most 1e9", capsys)


def test_verify_falls_short_with_another_model(capsys: pytest.CaptureFixture[str]) -> None:
    said("export shop:build --input 2x3x8x8 --output model.onnx", capsys)
    Path("shop.py").write_text(MODELS.replace("manual_seed(0)", "manual_seed(1)"))
    sys.modules.pop("shop")
    said("verify shop:build model.onnx --input 2x3x8x8", capsys, SHORT)


def test_a_checkpoint_of_a_recipe_is_exported(capsys: pytest.CaptureFixture[str]) -> None:
    import shop  # type: ignore[import-not-found]

    model = shop.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    manager = ScheduledModifierManager.from_yaml("recipe.yaml")
    manager.modify(model, optimizer, steps_per_epoch=2, sample_inputs=shop.sample())
    for _ in range(8):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    torch.save({"manager": manager.state_dict(), "model": model.state_dict()}, "checkpoint.pt")
    words = "shop:build --input 2x3x8x8 --checkpoint checkpoint.pt"
    exported = answer(f"export {words} --recipe recipe.yaml --output model.onnx", capsys)
    assert len(exported["quantized"]) == 2
    assert answer(f"verify {words} --recipe recipe.yaml model.onnx", capsys)["ok"] is True
    assert main(f"export {words} --output other.onnx".split()) == BAD
    assert "needs --recipe too" in capsys.readouterr().err and not Path("other.onnx").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("analyze shop", "model: 'shop' is not written as package.module:function"),
        ("analyze shop:bild --input 1x3x8x8", "there is no 'bild'. Did you mean 'build'"),
        ("analyze shp:build --input 1x3x8x8", "shp cannot be imported: ModuleNotFoundError"),
        ("analyze shop:broken --input 1x3x8x8", "shop:broken() failed: RuntimeError: no weights here"),
        ("analyze shop:number --input 1x3x8x8", "is a int, not a function"),
        ("analyze shop:sample --input 1x3x8x8", "gave a tuple; it must give a torch.nn.Module"),
        ("analyze shop:build --input 1,3,8,8", "input: '1,3,8,8' is no shape. Write 1x3x224x224"),
        ("analyze shop:build --input 1x3:float<3", "only whole numbers have a largest value"),
        ("analyze nothing.onnx", "nothing.onnx: there is no such file"),
        ("optimize shop:build --sparsity 0.5 --goal-ms 3 --output m.onnx", "--goal-ms says how much goes"),
        ("optimize shop:build --sparsity 85 --output m.onnx", "did you mean 0.85"),
        ("optimize shop:build", "recipe.yaml is there already; give another --output, or --force"),
        ("optimize shop:build --initial-lr 0.1 --output m.onnx", "belong to an original training"),
        ("optimize shop:build --measure --output m.onnx", "--measure and --goal-ms run the model: give --input"),
        ("optimize shop:build --html p.html --output m.onnx", "--html shows what layers compute: give --input"),
        ("optimize shop:build --override 4 --output m.onnx", "--override: '4' is not written as layer=sparsity"),
        ("optimize shop:build --override 9=0.5 --output m.onnx", "there is no such layer"),
        ("optimize shop:build --data shop:broken --output m.onnx", "no weights here"),
        ("plan nothing.yaml", "cannot read the recipe 'nothing.yaml'"),
        ("plan recipe.yaml --set last:5", "--set: 'last:5' is not written as name=value"),
        ("plan recipe.yaml --model shop:build --steps-per-epoch 0", "steps_per_epoch: 0 is no number of steps"),
        ("check recipe.yaml --model shop:words --set last=x", "recipe.yaml"),
        ("benchmark nothing.onnx", "nothing.onnx"),
        ("verify shop:build recipe.yaml --input 2x3x8x8", "recipe.yaml"),
        ("export shop:build --input 2x3x8x8 --checkpoint no.pt --output m.onnx", "no.pt: there is no such file"),
        ("export shop:build --input 2x3x8x8 --checkpoint shop.py --output m.onnx", "cannot be read as a checkpoint"),
        ("export shop:build --input 2x4x8x8 --output m.onnx", "to have 3 channels, but got 4 channels"),
    ],
)
def test_bad_input_is_said_in_a_line(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == BAD
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.startswith("error: ") and "Traceback" not in shown.err
    assert shown.out == "" and not Path("m.onnx").exists()


def test_ids_are_made_inside_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer("analyze shop:words --input 1x6:int<50", capsys)
    assert {layer["name"]: layer["macs"] for layer in found["layers"]}["1"] == 6 * 8 * 4


def test_the_module_is_the_command() -> None:
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}

    def run(*words: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run([sys.executable, "-m", "sparsify", *words], env=here, capture_output=True, check=False)

    done = run("recipe", "schema")
    assert done.returncode == 0 and json.loads(done.stdout)["title"] == "Recipe"
    wrong = run("frobnicate")
    assert wrong.returncode == BAD and b"frobnicate" in wrong.stderr


def test_inputs_of_a_file_are_given_by_shape_name_or_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx = pytest.importorskip("onnx")
    ids = onnx.helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["n", "length"])
    table = onnx.numpy_helper.from_array(np.zeros((5, 3), np.float32), "table.weight")
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", "length", 3])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Gather", ["table.weight", "ids"], ["y"])], "g", [ids], [result], [table]
    )
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9), path)
    np.savez(tmp_path / "ids.npz", ids=np.array([[0, 4]]))
    for words, shape in ((["2x7"], "2x7x3"), (["ids=3x4"], "3x4x3"), ([str(tmp_path / "ids.npz")], "1x2x3")):
        given = [word for text in words for word in ("--input", text)]
        assert main(["analyze", str(path), *given]) == 0 and shape in capsys.readouterr().out
        assert main(["benchmark", str(path), *given, "--iterations", "1", "--threads", "1"]) == 0
        assert "int64" in capsys.readouterr().out
    for text in ("2xq", "other=2x7", "2x7x8", "none.npz", str(path)):
        assert main(["benchmark", str(path), "--input", text]) == 2
        assert capsys.readouterr().err.startswith("error: ")
