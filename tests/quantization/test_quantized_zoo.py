"""Real architectures, quantized while they train, exported, and proven kernel by kernel."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify import ScheduledModifierManager, export_onnx, verify_onnx
from sparsify.model.signature import named_outputs
from sparsify.onnx.verify import Verification
from tests.zoo.architectures import ARCHITECTURES

RECIPE = """
modifiers:
  - !QuantizationModifier
    start_epoch: 0.0
"""
STEPS = 3

INTEGER = frozenset(
    {"VGG", "VGG with BatchNorm", "ResNet-18", "ResNet-50, thin", "SqueezeNet", "MobileNetV2", "MNASNet"}
)
INTEGER |= {"EfficientNet", "RegNetY", "MobileNetV3", "ShuffleNetV2", "DenseNet", "Inception-like"}
INTEGER |= {"U-Net", "WaveNet-like"}
"""Integer kernels from the first layer to the last: exact from end to end, and nothing next to Q or DQ in float."""
NAMES = {
    "VGG": True,
    "VGG with BatchNorm": False,
    "U-Net": False,
    "Inception-like": True,
    "squeeze and excite": False,
    "WaveNet-like": False,
    "LSTM tagger": False,
    "nn.TransformerEncoder": False,
    "nn.Transformer": False,
    "DETR-like": False,
    "ResNet-18": False,
    "ResNet-50, thin": True,
    "MobileNetV2": True,
    "MobileNetV3": True,
    "EfficientNet": True,
    "DenseNet": False,
    "SqueezeNet": True,
    "ShuffleNetV2": True,
    "RegNetY": True,
    "MNASNet": True,
    "ViT": False,
    "Swin": True,
    "ConvNeXt": True,
    "MLP-Mixer": True,
    "BERT": True,
    "DistilBERT": False,
    "GPT-2": False,
    "T5 encoder": True,
    "T5": True,
    "BART": True,
    "Llama with grouped queries": True,
}
"""{architecture: whether it is for `make test-all`}."""


@dataclass(frozen=True)
class Passed:
    """One architecture after quantization-aware training, export and verification."""

    name: str
    quantized: int
    """Layers with integer weights."""
    floating: int
    size_bytes: int
    verification: Verification
    seconds: float
    """Of the verification."""

    @property
    def kernels(self) -> Counter[str]:
        """onnxruntime's integer kernels, by kind."""
        return Counter(tensor.kernel for tensor in self.verification.tensors if tensor.kernel != "QuantizeLinear")


def loss_of(outputs: Any) -> Tensor:
    tensors = [tensor for tensor in named_outputs(outputs)[0].values() if tensor.is_floating_point()]
    return torch.stack([tensor.float().square().mean() for tensor in tensors]).sum()


def called(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def taken_through(name: str, path: Path) -> Passed:
    """Quantization-aware training for a few steps, export, verification."""
    torch.manual_seed(0)
    architecture = ARCHITECTURES[name]
    model = architecture.build().train()
    inputs = architecture.inputs()
    manager = ScheduledModifierManager.from_yaml(RECIPE)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    manager.modify(model, optimizer, steps_per_epoch=STEPS, sample_inputs=copy.deepcopy(inputs))
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(called(model, architecture.inputs())).backward()
        optimizer.step()
    manager.finalize(model)
    model.eval()
    exported = export_onnx(model, inputs, path)
    start = time.perf_counter()
    verification = verify_onnx(model, path, architecture.inputs())
    seconds = time.perf_counter() - start
    return Passed(name, len(exported.quantized), len(exported.floating), exported.size_bytes, verification, seconds)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if slow else ()) for name, slow in NAMES.items()]
)
def test_what_was_trained_is_what_runs(name: str, tmp_path: Path) -> None:
    library = ARCHITECTURES[name].library
    if library:
        pytest.importorskip(library)
    passed = taken_through(name, tmp_path / "model.onnx")
    found = passed.verification
    assert found.ok and found.unproven is None, str(found)
    assert passed.quantized > 0
    # Torch takes part: nearly every quantizer of the file is known there by its name.
    quantizers = [tensor for tensor in found.tensors if tensor.name.split("/")[-1].startswith("QuantizeLinear")]
    assert sum(tensor.torch is not None for tensor in quantizers) >= 0.9 * len(quantizers) > 0
    for tensor in found.tensors:
        if tensor.exact:
            assert tensor.optimized is not None and tensor.optimized.count == 0, tensor
        assert tensor.optimized is None or tensor.optimized.steps <= 1, tensor
        # Also of sums and gates, which `ok` lets differ: no constant of ours lies half-way between two integers.
        assert tensor.torch is None or tensor.torch.share <= 0.02, tensor
    if name in INTEGER:
        assert found.exact and found.unfused == (), str(found)
