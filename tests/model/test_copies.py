"""Models are copied whatever their modules keep of a forward, and used so from the first export on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify import export_onnx, floating_layers, quantize_model, verify_onnx
from sparsify.model.copies import deep_copied
from sparsify.quantization.deployment import deployment_copy
from tests.loops import quantizing
from tests.zoo.small import written

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
X = torch.randn(8, 4, 20, generator=torch.Generator().manual_seed(0))
OLD: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": lambda layer: nn.utils.weight_norm(layer),
    "spectral_norm": lambda layer: nn.utils.spectral_norm(layer),
}
"""In their old form: hooks that set the weight before every forward."""


def normed(kind: str) -> nn.Module:
    """Freshly built; its weights are loaded from another, as from a file, and no forward was made since."""
    one, other = (
        nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU(), OLD[kind](nn.Conv1d(8, 8, 3)), nn.ReLU(), nn.Conv1d(8, 4, 3))
        for _ in range(2)
    )
    one.load_state_dict({name: value.detach() * 1.5 for name, value in other.state_dict().items()})
    return one


@pytest.mark.parametrize("kind", OLD)
@pytest.mark.parametrize("steps", [0, 1])
def test_a_model_that_sets_its_weights_in_forward_is_copied(kind: str, steps: int) -> None:
    torch.manual_seed(0)
    model = normed(kind)
    for _ in range(steps):
        model(X).square().mean().backward()
    weight = model[2].weight
    copy = deep_copied(model).eval()
    assert model[2].weight is weight and copy[2].weight is not weight
    assert {id(p) for p in copy.parameters()}.isdisjoint(id(p) for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(copy(X), model.eval()(X))


def test_what_a_forward_left_behind_is_copied_without_its_history() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.kept = {"last": [self.layer(x)]}
        y: Tensor = self.kept["last"][0] * 2
        return y

    model = written(forward, layer=nn.Linear(3, 2))
    model(torch.ones(1, 3))
    kept = deep_copied(model).kept["last"][0]
    assert kept.is_leaf and torch.equal(kept, model.kept["last"][0])


@pytest.mark.parametrize("kind", OLD)
def test_it_is_quantized_around_a_layer_that_stays_in_float(kind: str) -> None:
    torch.manual_seed(0)
    model = normed(kind).eval()
    with torch.no_grad():
        expected = model(X)
        found = quantize_model(model, [X], least_samples=1)
        # The layer between is as it was: what is lost are the two around it.
        assert (found.model(X) - expected).abs().max() < 0.05 * expected.abs().max()
        assert torch.equal(deployment_copy(found.model)(X), found.model(X))
    assert "recomputed before every forward" in found.floating["2"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", OLD)
def test_it_is_trained_exported_and_verified(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = normed(kind)
    manager = quantizing()
    # Said before training, not after it.
    with pytest.warns(match="recomputed before every forward"):
        optimizer = manager.modify(model, torch.optim.SGD(model.parameters(), lr=0.01), 2, sample_inputs=(X,))
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    manager.finalize(model)
    export_onnx(model.eval(), (X,), tmp_path / "model.onnx")
    found = verify_onnx(model, tmp_path / "model.onnx", (X,))
    assert found.ok and found.unproven is None and "2" in floating_layers(model), str(found)
