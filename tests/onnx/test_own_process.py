"""Files at which onnxruntime ends its process: ours open, and of others verification says it and goes on."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from sparsify.errors import ExportError
from sparsify.onnx import own_process, rewrites
from sparsify.onnx.export import export_onnx
from sparsify.onnx.verify import verify_onnx
from tests.zoo.small import written


def test_an_encoder_in_float16_opens_and_agrees(tmp_path: Path) -> None:
    """It ended the process that opened it: the sequence comes first inside of an attention."""
    torch.manual_seed(0)
    path, x = tmp_path / "model.onnx", torch.randn(2, 5, 16).half()
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).half().eval()
    export_onnx(model, x, path)
    assert verify_onnx(model, path, torch.randn(3, 5, 16).half())


def counts_by_place() -> nn.Module:
    """Whole numbers, transposed, made floats, multiplied: the same crash in float32."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return x.transpose(0, 1).float() @ self.weight  # type: ignore[operator]

    return written(forward, weight=nn.Parameter(torch.randn(6, 4)))  # type: ignore[no-any-return]


def test_whole_numbers_that_become_floats_behind_a_transpose_open(tmp_path: Path) -> None:
    path, x = tmp_path / "model.onnx", torch.arange(48).reshape(2, 4, 6)
    model = counts_by_place()
    export_onnx(model, x, path)
    assert verify_onnx(model, path, x)
    before = onnx.load(path)
    rewrites.part_transposes(after := onnx.load(path))
    assert sum(node.op_type == "Reshape" for node in after.graph.node) >= 1
    assert [node.op_type for node in after.graph.node].count("Transpose") == 1 == len(before.graph.output)


def test_a_crash_of_onnxruntime_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, x = tmp_path / "model.onnx", torch.arange(48).reshape(2, 4, 6)
    model = counts_by_place()
    with monkeypatch.context() as patch:
        patch.setattr(rewrites, "part_transposes", lambda proto: None)
        export_onnx(model, x, path)
    proto = onnx.load(path)
    proto.producer_name = "another"
    onnx.save(proto, path)
    with pytest.raises(ExportError, match=r"ends its process with optimizations \(SIG\w+\), and would end yours"):
        verify_onnx(model, path, x)


def test_ordinary_files_start_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_process.subprocess, "run", None)
    path, model = tmp_path / "model.onnx", nn.Linear(3, 2)
    export_onnx(model, torch.randn(2, 3), path)
    assert verify_onnx(model, path, torch.randn(2, 3))
