"""What is written computes what the model computes, also near 0; what does not is refused before it is in place."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from sparsify.errors import ExportError, SparsifyWarning
from sparsify.onnx import rewrites
from sparsify.onnx.export import export_onnx
from sparsify.onnx.runtime import open_session, run_session
from tests.zoo.small import perceptron, written

NEAR_ZERO: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "logarithm": lambda x: torch.log(x + 1e-10),
    "other side": lambda x: torch.log(1e-10 + x),
    "normalized": lambda x: x / (x.norm(dim=-1, keepdim=True) + 1e-9),
    "difference": lambda x: (x - 1e-9).abs().rsqrt(),
    "product": lambda x: (x * (1 + 2**-20) - x) * 2**20,
    "quotient": lambda x: (x / (1 + 2**-20) - x) * 2**20,
}


def values_of(path: Path, x: torch.Tensor) -> np.ndarray:
    session = open_session(path, optimized=False)
    (value,) = run_session(session, {session.get_inputs()[0].name: x.numpy()}).values()
    return value


@pytest.mark.parametrize("kind", NEAR_ZERO)
def test_constants_near_zero_and_one_are_kept(kind: str, tmp_path: Path) -> None:
    model = written(lambda self, x: NEAR_ZERO[kind](x)).eval()
    x = torch.tensor([[0.0, 0.0], [1e-9, 3e-9], [1.0, 0.5]])
    export_onnx(model, x, tmp_path / "model.onnx")
    np.testing.assert_allclose(values_of(tmp_path / "model.onnx", x), model(x).numpy(), rtol=1e-5)


def test_what_does_nothing_is_dropped_all_the_same(tmp_path: Path) -> None:
    model = written(lambda self, x: ((x + 0) * 1 - 0.0) / 1.0 + torch.zeros(1, 3)).eval()
    export_onnx(model, torch.ones(1, 3), tmp_path / "model.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert not {"Mul", "Sub", "Div"} & set(kinds) and kinds.count("Add") == 1


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[onnx.ModelProto], None]], None]:
    """Lets the export write something else: the fault that is to be found."""

    def install(fault: Callable[[onnx.ModelProto], None]) -> None:
        monkeypatch.setattr(rewrites, "clear_traces", fault)

    return install


def lost_constant(model: onnx.ModelProto) -> None:
    """The first sum loses its constant."""
    node = next(node for node in model.graph.node if node.op_type == "Add")
    node.op_type = "Identity"
    del node.input[1:]


def doubled_weight(model: onnx.ModelProto) -> None:
    """The first weight is twice what it was."""
    tensor = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 2)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 2, tensor.name))


@pytest.mark.parametrize(
    ("model", "x", "fault", "message"),
    [
        (
            written(lambda self, x: torch.log(x + 1e-10)),
            torch.ones(2, 3),
            lost_constant,
            "on zeros .* Log .* the first",
        ),
        (perceptron(3, 4, 2), torch.ones(2, 3), doubled_weight, "on the sample inputs .* differs by"),
    ],
    ids=["not finite", "differs"],
)
def test_what_differs_is_refused_and_the_old_file_stays(
    model: Any, x: torch.Tensor, fault: Any, message: str, faulty: Any, tmp_path: Path
) -> None:
    (tmp_path / "model.onnx").write_bytes(b"old")
    faulty(fault)
    with pytest.raises(ExportError, match=message):
        export_onnx(model.eval(), x, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_bytes() == b"old"


def test_a_constant_that_the_exporter_cannot_write_is_said(tmp_path: Path) -> None:
    # Numbers of a double model go through float32.
    model = written(lambda self, x: torch.log(x.double() + 1e-300)).eval()
    with pytest.raises(ExportError, match="on zeros its output 'output' is not finite"):
        export_onnx(model, torch.ones(2, 3), tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_steps_random_values_and_overflow_are_no_faults(tmp_path: Path) -> None:
    models = [
        written(lambda self, x: x.topk(2).values.sum() + x.argmax(-1)),
        written(lambda self, x: x + torch.randn_like(x)),
        written(lambda self, x: torch.softmax(x * 1e30, -1)),
        written(lambda self, x: (x + 0.1).softmax(-1) - (x * 3 + 0.1).log_softmax(-1).exp()),
        written(lambda self, x: x.sum(-1) * self.one, one=torch.tensor(1e38)),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error", SparsifyWarning)
        for model in models:
            export_onnx(model.eval(), torch.rand(2, 4), tmp_path / "model.onnx")
