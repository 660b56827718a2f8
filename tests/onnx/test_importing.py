"""Files of others: an imported graph computes what onnxruntime does, and is quantized as its module is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify import export_onnx, quantize_model, verify_onnx
from sparsify.onnx.importing import import_onnx
from sparsify.onnx.runtime import open_session, optimized_operators
from tests.zoo.quantizable import ZOO

torch.manual_seed(0)


@pytest.mark.parametrize("name", ["residual", "mlp"])
def test_a_file_gives_the_integers_of_its_module(name: str, tmp_path: Path) -> None:
    files_agree(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inverted", "gated", "attention", "up"])
def test_other_files_give_the_integers_of_their_modules(name: str, tmp_path: Path) -> None:
    files_agree(name, tmp_path)


def files_agree(name: str, folder: Path) -> None:
    """The module and its file, both quantized on the same data, give the same outputs from the same kernels."""
    torch.manual_seed(1)
    make, batch = ZOO[name]
    model, data = make().eval(), [batch() for _ in range(3)]
    export_onnx(model, data[0], folder / "float.onnx")
    imported = import_onnx(folder / "float.onnx")
    with torch.no_grad():
        torch.testing.assert_close(imported(data[0]), model(data[0]), rtol=1e-5, atol=1e-6)
    outputs, kernels = [], []
    for each in (model, imported):
        quantized = quantize_model(each, data, least_samples=1).model
        export_onnx(quantized, data[0], folder / "int8.onnx")
        assert verify_onnx(quantized, folder / "int8.onnx", data[0]).ok
        outputs.append(run(folder / "int8.onnx", data[0]))
        kernels.append(optimized_operators(folder / "int8.onnx"))
    assert kernels[0] == kernels[1]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)


def run(path: Path, x: torch.Tensor) -> Any:
    session = open_session(path)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
