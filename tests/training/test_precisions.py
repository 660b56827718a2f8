"""Pruning and int8 in mixed and low precision: ranges are those of float32, and the file is what was trained."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparsify.errors import StateError
from sparsify.modifiers.magnitude_pruning import GMPruningModifier
from sparsify.modifiers.quantization import QuantizationModifier
from sparsify.onnx.export import export_onnx
from sparsify.onnx.verify import verify_onnx
from sparsify.quantization.layers import QuantizedLinear
from sparsify.training.manager import ScheduledModifierManager

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

Wrap = Callable[[nn.Module, Any], tuple[nn.Module, Any, Callable[[torch.Tensor], None]]]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 4))


def batch(step: int) -> torch.Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step)) * 3


def trained(wrap: Wrap, autocast: torch.dtype | None = None, **given: Any) -> nn.Sequential:
    """Two epochs of int8 at half sparsity; with a small rate, so that precisions can be compared."""
    model = network()
    outside, optimizer, backward = wrap(model, torch.optim.SGD(model.parameters(), lr=1e-3))
    pruning = GMPruningModifier(
        params="__ALL_PRUNABLE__", start_epoch=0.0, end_epoch=1.0, update_frequency=0.5, init_sparsity=0.1,
        final_sparsity=0.5,
    )  # fmt: skip
    manager = ScheduledModifierManager(
        [pruning, QuantizationModifier(start_epoch=0.0, disable_quantization_observer_epoch=1.5)]
    )
    manager.modify(outside, optimizer, steps_per_epoch=4, **given)
    for step in range(8):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            loss = outside(batch(step)).float().square().mean()
        backward(loss)
        optimizer.step()
    manager.finalize(outside)
    assert set(manager.sparsity().values()) == {0.5}
    return model


def by_fabric(precision: str) -> Wrap:
    def wrap(model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any, Callable[[torch.Tensor], None]]:
        fabric = pytest.importorskip("lightning.fabric")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = fabric.Fabric(accelerator="cpu", devices=1, precision=precision)
            return (*made.setup(model, optimizer), made.backward)

    return wrap


def plain(model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any, Callable[[torch.Tensor], None]]:
    return model, optimizer, torch.Tensor.backward


FORMS: dict[str, tuple[Wrap, torch.dtype | None]] = {
    "bf16 autocast": (plain, torch.bfloat16),
    "fp16 autocast": (plain, torch.float16),
    "Fabric, bf16-mixed": (by_fabric("bf16-mixed"), None),
    "Fabric, bf16-true": (by_fabric("bf16-true"), None),
}


@pytest.mark.parametrize(
    ("form", "given"),
    [
        ("bf16 autocast", False),
        ("fp16 autocast", False),
        ("Fabric, bf16-mixed", False),
        ("Fabric, bf16-true", False),
        *(pytest.param(form, True, marks=pytest.mark.slow) for form in FORMS),
    ],
)
def test_int8_in_lower_precision_has_the_ranges_of_float32(form: str, given: bool, tmp_path: Path) -> None:
    wrap, dtype = FORMS[form]
    inputs = {"sample_inputs": batch(0)} if given else {}
    model, reference = trained(wrap, dtype, **inputs), trained(plain)
    assert sum(isinstance(module, QuantizedLinear) for module in model) == 3
    buffers, expected = dict(model.named_buffers()), dict(reference.named_buffers())
    assert buffers.keys() == expected.keys()
    for name, value in buffers.items():
        if name.endswith(("scale", "high", "low")):
            assert value.dtype == torch.float32, f"{name}: a scale in bfloat16 has two digits"
            assert float(value) == pytest.approx(float(expected[name]), rel=0.03, abs=0.03), name
    model.float()
    export_onnx(model, batch(9), tmp_path / "model.onnx")
    assert verify_onnx(model, tmp_path / "model.onnx", batch(9)).ok


def private(model: nn.Module) -> tuple[nn.Module, Any]:
    opacus = pytest.importorskip("opacus")
    data = torch.utils.data.TensorDataset(torch.randn(32, 6), torch.randn(32, 4))
    made = opacus.PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.Adam(model.parameters(), lr=0.01), noise_multiplier=1.0, max_grad_norm=1.0,
        data_loader=torch.utils.data.DataLoader(data, batch_size=8),
    )  # fmt: skip
    return made[0], made[1]


def test_private_training_is_pruned_and_int8_is_refused_there(tmp_path: Path) -> None:
    model = network()
    outside, optimizer = private(model)
    pruning = GMPruningModifier(
        params="__ALL_PRUNABLE__", start_epoch=0.0, end_epoch=1.0, update_frequency=0.5, init_sparsity=0.1,
        final_sparsity=0.5,
    )  # fmt: skip
    manager = ScheduledModifierManager([pruning, QuantizationModifier(start_epoch=1.0)])
    with pytest.raises(StateError, match=r"'0.weight' has gradients of each sample \(opacus\)"):
        manager.modify(outside, optimizer, steps_per_epoch=4)
    manager = ScheduledModifierManager([pruning])
    optimizer = manager.modify(outside, optimizer, steps_per_epoch=4)
    for step in range(6):
        optimizer.zero_grad()
        outside(batch(step)).square().mean().backward()
        optimizer.step()
        zeros = {name: float((p == 0).double().mean()) for name, p in model.named_parameters()}
        assert all(zeros[name] == share for name, share in manager.sparsity().items())
    assert manager.step == 6
    manager.finalize(outside)
    assert list(manager.sparsity()) == ["0.weight", "3.weight", "5.weight"]
    export_onnx(outside, batch(9), tmp_path / "model.onnx")
    assert verify_onnx(outside, tmp_path / "model.onnx", batch(9)).ok
