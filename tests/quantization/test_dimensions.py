"""Convolutions over one and three dimensions, SyncBatchNorm and the TensorRT preset: trained, exported, verified."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from sparsify import export_onnx, verify_onnx
from sparsify.quantization.deployment import deployment_copy
from sparsify.quantization.plan import QuantizationPlan
from sparsify.quantization.scheme import NAMED, QuantizationSettings, Scheme
from tests.loops import quantized, train
from tests.zoo.quantizable import images


class Volume(nn.Module):
    """A residual block over video: grouped, strided and dilated convolutions of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 8, 3, stride=(1, 2, 2), padding=1, bias=False)
        self.norm = nn.BatchNorm3d(8)
        self.inner = nn.Conv3d(8, 8, 3, padding=2, dilation=2, groups=4)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.inner(x))
        return self.head(x.flatten(2).mean(2))


def audio() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv1d(2, 8, 5, stride=2), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 3, groups=8, dilation=2)),
        *(nn.ReLU(), nn.Conv1d(8, 4, 1)),
    )


def trained(model: nn.Module, x: Tensor, settings: QuantizationSettings) -> QuantizationPlan:
    plan = quantized(model, x, settings=settings)
    losses = train(model, x, 6, lr=0.02)
    assert losses[-1] < losses[0]
    return plan


@pytest.mark.parametrize("preset", ["default", "tensorrt"])
@pytest.mark.parametrize("kind", ["volume", "audio"])
def test_other_dimensions_go_all_the_way(kind: str, preset: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = (Volume(), torch.randn(4, 3, 5, 8, 8)) if kind == "volume" else (audio(), torch.randn(6, 2, 40))
    plan = trained(model, x, QuantizationSettings(scheme=NAMED[preset]))
    assert len(plan.layers) == 3 and len(plan.folds) == 1
    deployed = deployment_copy(model)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(x), deployed(x))
    file = export_onnx(model, x, tmp_path / "net.onnx")
    assert len(file.quantized) == 3 and not file.floating
    verification = verify_onnx(model, file, x)
    assert verification.ok, str(verification)


def test_synchronized_batch_norm_is_folded_like_the_plain_one(tmp_path: Path) -> None:
    results = []
    for synchronized in (False, True):
        torch.manual_seed(0)
        model: nn.Module = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1))
        if synchronized:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        x = images()
        plan = quantized(model.eval(), x)
        assert plan.folds == {"0": "1"}
        # In training on one process SyncBatchNorm wants a device; its statistics stand still here.
        model[0].train(), model[2].train(), model[3].train()  # type: ignore[index]
        model(x)
        results.append(model.eval()(x))
        file = export_onnx(model, x, tmp_path / "net.onnx")
        assert not any(node.op_type == "BatchNormalization" for node in onnx.load(file.path).graph.node)
        assert verify_onnx(model, file, x)
    assert torch.equal(*results)


def test_tensorrt_files_have_signed_activations_of_zero_point_0_and_scales_of_channels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1)), images()
    assert NAMED["tensorrt"] != Scheme()
    trained(model, x, QuantizationSettings(scheme=NAMED["tensorrt"]))
    proto = onnx.load(export_onnx(model, x, tmp_path / "net.onnx").path)
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    activations = [node for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    assert activations
    for node in activations:
        zero = stored[node.input[2]]
        assert zero.dtype == "int8" and not zero.any() and stored[node.input[1]].ndim == 0
    assert stored["0.weight_scale"].shape == (6,) and stored["3.weight_scale"].shape == (4,)
