"""Profiles and recipes of a file are those of the model that it was written from; files of others name initializers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from sparsify import create_recipe, export_onnx, loss_profile, quantize_model
from sparsify.cli.main import main
from sparsify.errors import ArgumentError, StateError
from sparsify.optimize import Project

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 16, 1),
        nn.Flatten(),
        nn.Linear(256, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    ).eval()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("file") / "model.onnx"
    export_onnx(build(), X, target)
    return target


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 3, 8, 8, generator=generator), torch.arange(4)) for _ in range(2)]


def test_losses_of_a_file_are_those_of_its_model(path: Path) -> None:
    assert loss_profile(path) == loss_profile(build())
    assert loss_profile(path, of="quantization") == loss_profile(build(), of="quantization")
    shapes = {"method": "shape", "sample_inputs": X}
    assert loss_profile(path, **shapes).losses == loss_profile(build(), **shapes).losses
    for loss in (None, nn.functional.cross_entropy):
        found, expected = loss_profile(path, batches(), loss), loss_profile(build(), batches(), loss)
        assert found.levels == expected.levels and found.base == pytest.approx(expected.base, abs=1e-5)
        for name, losses in expected.losses.items():
            assert found.losses[name] == pytest.approx(losses, abs=1e-4, rel=1e-3)


@pytest.mark.parametrize("options", [{}, {"optim_level": 0.8}, {"sparsity": 0.6, "quantize": False}])
def test_the_recipe_of_a_file_is_that_of_its_model(path: Path, options: dict[str, Any]) -> None:
    for inputs in (None, X):
        assert create_recipe(path, inputs, **options).to_yaml() == create_recipe(build(), inputs, **options).to_yaml()


def test_what_needs_the_model_is_refused(path: Path, tmp_path: Path) -> None:
    for options in ({"method": "fisher"}, {"structured": True}):
        with pytest.raises(ArgumentError, match="needs the torch model"):
            loss_profile(path, batches(), **options)
    with pytest.raises(ArgumentError, match="the removal of channels needs the torch model"):
        create_recipe(path, X, structured=True)
    quantized = quantize_model(build(), [X], least_samples=2).model
    export_onnx(quantized, X, tmp_path / "int8.onnx")
    with pytest.raises(StateError, match="holds integers of 8 bits; give the float file"):
        create_recipe(tmp_path / "int8.onnx")
    with pytest.raises(ArgumentError, match="'input' has the shape"):
        loss_profile(path, [torch.zeros(2, 4, 8, 8)])


def foreign(path: Path) -> Path:
    """A file of another program: a convolution, and products whose weights are an initializer, a constant, inside."""
    draw = np.random.default_rng(0).standard_normal

    def stored(name: str, *shape: int) -> TensorProto:
        return numpy_helper.from_array(draw(shape).astype(np.float32), name)

    def branch(name: str) -> onnx.GraphProto:
        nodes = [helper.make_node("MatMul", ["hidden", "inner"], ["b"], name=f"{name}/MatMul")]
        result = helper.make_tensor_value_info("b", TensorProto.FLOAT, ["n", 4])
        return helper.make_graph(nodes, name, [], [result], [stored("inner", 6, 4)])

    nodes = [
        helper.make_node("Conv", ["pixels", "onnx::Conv_7"], ["maps"], name="/stem/Conv"),
        helper.make_node("Relu", ["maps"], ["positive"]),
        helper.make_node("GlobalAveragePool", ["positive"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Constant", [], ["W:0"], value=stored("", 8, 6)),
        helper.make_node("MatMul", ["flat", "W:0"], ["hidden"], name="dense"),
        helper.make_node("If", ["fast"], ["y"], then_branch=branch("quick"), else_branch=branch("slow")),
    ]
    inputs = [
        helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", 3, "height", "width"]),
        helper.make_tensor_value_info("fast", TensorProto.BOOL, []),
    ]
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
    graph = helper.make_graph(nodes, "g", inputs, [result], [stored("onnx::Conv_7", 8, 3, 3, 3)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9, producer_name="other")
    onnx.save(model, path)
    return path


def test_a_recipe_for_a_file_of_others_names_initializers_and_says_so(tmp_path: Path) -> None:
    path = foreign(tmp_path / "other.onnx")
    recipe = create_recipe(path, sparsity=0.5)
    assert recipe.evidence is not None
    assert set(recipe.evidence.layers) == {"W:0", "inner", "inner_2"}
    assert "names are those of initializers in other.onnx, which another program wrote." in recipe.evidence.notes
    profile = loss_profile(path)
    assert set(profile.losses) == {"/stem/Conv", "dense", "slow/MatMul", "quick/MatMul"}


def test_losses_of_a_file_of_others_are_measured_in_onnxruntime(tmp_path: Path) -> None:
    path = foreign(tmp_path / "other.onnx")
    images = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(2))
    for fast, taken in ((True, "quick/MatMul"), (False, "slow/MatMul")):
        profile = loss_profile(path, [{"pixels": images, "fast": torch.tensor(fast)}], levels=[0.9])
        changed = {name for name, losses in profile.losses.items() if losses[-1] > 0}
        assert changed == {"/stem/Conv", "dense", taken}


def test_a_project_of_a_file_takes_sizes_and_the_values_beside_it(tmp_path: Path) -> None:
    path = foreign(tmp_path / "other.onnx")
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="other.data", size_threshold=0)
    with pytest.raises(ArgumentError, match=r"axis 2 of input 'pixels' is 'height'\. Give sample_inputs"):
        Project.create(tmp_path / "none", path)
    inputs = {"pixels": np.zeros((1, 3, 9, 9), np.float32), "fast": np.array(True)}
    project = Project.create(tmp_path / "project", path, sample_inputs=inputs)
    path.unlink()
    (tmp_path / "other.data").unlink()
    assert project.analysis.macs == 49 * 8 * 27 + 48 and len(loss_profile(project.model_path).losses) == 4


def test_the_command_makes_a_recipe_and_a_page_of_a_file(path: Path, tmp_path: Path) -> None:
    recipe, page = tmp_path / "recipe.yaml", tmp_path / "page.html"
    words = ["optimize", str(path), "--input", "1x3x8x8", "--output", str(recipe), "--html", str(page)]
    assert main(words) == 0 and recipe.exists() and "<html" in page.read_text(encoding="utf-8")
    assert main(["optimize", str(path), "--output", str(tmp_path / "other.yaml"), "--structured"]) == 2
