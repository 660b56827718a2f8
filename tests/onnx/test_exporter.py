"""The registry of translations is built once, changes no file, and torch's own stays as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.onnx._internal.exporter._registration import ONNXRegistry

from sparsify.onnx import exporter
from sparsify.onnx.export import export_onnx
from sparsify.onnx.exporter import kept_registry
from sparsify.onnx.verify import verify_onnx
from tests.zoo.small import perceptron


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The registries that torch builds from here on, by the arguments."""
    original, calls = vars(ONNXRegistry)["from_torchlib"], []

    def counted(cls: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return original.__func__(cls, *args, **kwargs)

    monkeypatch.setattr(ONNXRegistry, "from_torchlib", classmethod(counted))
    monkeypatch.setattr(exporter, "_kept", {})
    exporter._original.cache_clear()
    yield calls
    exporter._original.cache_clear()


def test_exports_share_one_and_write_what_they_wrote(built: list[Any], tmp_path: Path) -> None:
    model, x = perceptron(4, 6, 3).eval(), torch.zeros(2, 4)
    for name in ("fresh", "kept", "again"):
        export_onnx(model, x, tmp_path / f"{name}.onnx")
        assert len(built) == 1
    fresh, kept, again = (tmp_path.joinpath(f"{name}.onnx").read_bytes() for name in ("fresh", "kept", "again"))
    assert fresh == kept == again


def test_each_opset_has_its_own_and_what_one_export_adds_is_gone_in_the_next() -> None:
    before = vars(ONNXRegistry)["from_torchlib"]
    with kept_registry():
        first, other = ONNXRegistry.from_torchlib(opset_version=20), ONNXRegistry.from_torchlib(opset_version=21)
        assert (first.opset_version, other.opset_version) == (20, 21)
        relu = torch.ops.aten.relu.default
        count = len(first.get_decomps(relu))
        first.register_op(relu, lambda x: x)
        assert len(first.get_decomps(relu)) == count + 1
        assert len(ONNXRegistry.from_torchlib(opset_version=20).get_decomps(relu)) == count
    assert vars(ONNXRegistry)["from_torchlib"] is before


def test_it_is_given_back_where_the_export_raises_and_where_exports_nest() -> None:
    before = vars(ONNXRegistry)["from_torchlib"]
    with pytest.raises(KeyError), kept_registry(), kept_registry():
        raise KeyError
    assert vars(ONNXRegistry)["from_torchlib"] is before


def test_operators_that_were_registered_since_are_seen() -> None:
    with kept_registry():
        ONNXRegistry.from_torchlib(opset_version=20)
        kept = len(exporter._kept)
        library = torch.library.Library("sparsify_registry_test", "DEF")
        library.define("twice(Tensor x) -> Tensor")
        ONNXRegistry.from_torchlib(opset_version=20)
        assert len(exporter._kept) == kept + 1


class Checked(nn.Module):
    """Asks about values of a tensor in the forward, as `torch._check` does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        small = torch.ops.aten._is_all_true(y < 1)
        large = torch.ops.aten._is_any_true(y > 2)
        return torch.where(small, y, -y) + torch.where(large, 1.0, 0.0)


@pytest.mark.parametrize("factor", [0.0, 100.0])
def test_questions_about_all_values_have_a_translation(factor: float, tmp_path: Path) -> None:
    model, x = Checked().eval(), torch.ones(2, 4)
    with torch.no_grad():
        model.fc.weight.abs_().mul_(factor)
        model.fc.bias.zero_()
    assert bool(model(x).lt(0).any()) == (factor > 0)
    export_onnx(model, (x,), tmp_path / "model.onnx")
    assert verify_onnx(model, tmp_path / "model.onnx", (x,)).ok
