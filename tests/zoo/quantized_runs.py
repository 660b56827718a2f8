"""Architectures through quantization-aware training, export and verification, for a test and docs/quantized_zoo.md."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify import ScheduledModifierManager, export_onnx, integer_exact, verify_onnx
from sparsify.model.signature import SampleInputs, named_outputs
from sparsify.onnx.runtime import open_session, run_session
from sparsify.onnx.verify import Verification
from tests.zoo.architectures import ARCHITECTURES

QAT_RECIPE = """
modifiers:
  - !QuantizationModifier
    start_epoch: 0.0
"""

QAT_STEPS = 3

QAT_ARCHITECTURES = {
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
class QatRun:
    """One architecture after quantization-aware training, export and verification."""

    name: str
    quantized: int
    """Layers with integer weights."""
    floating: int
    size_bytes: int
    verification: Verification
    seconds: float
    """Of the verification."""
    exactly: float
    """The largest difference between the outputs of the model in `integer_exact` and those of onnxruntime."""

    @property
    def kernels(self) -> Counter[str]:
        """onnxruntime's integer kernels, by kind."""
        return Counter(tensor.kernel for tensor in self.verification.tensors if tensor.kernel != "QuantizeLinear")


def squares_of(outputs: Any) -> Tensor:
    tensors = [tensor for tensor in named_outputs(outputs)[0].values() if tensor.is_floating_point()]
    return torch.stack([tensor.float().square().mean() for tensor in tensors]).sum()


def call(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def run_qat(name: str, path: Path) -> QatRun:
    """Quantization-aware training for a few steps, export, verification."""
    torch.manual_seed(0)
    architecture = ARCHITECTURES[name]
    model = architecture.build().train()
    inputs = architecture.inputs()
    manager = ScheduledModifierManager.from_yaml(QAT_RECIPE)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    manager.modify(model, optimizer, steps_per_epoch=QAT_STEPS, sample_inputs=copy.deepcopy(inputs))
    for _ in range(QAT_STEPS):
        optimizer.zero_grad()
        squares_of(call(model, architecture.inputs())).backward()
        optimizer.step()
    manager.finalize(model)
    model.eval()
    exported = export_onnx(model, inputs, path)
    start = time.perf_counter()
    verification = verify_onnx(model, path, architecture.inputs())
    seconds = time.perf_counter() - start
    return QatRun(
        name,
        len(exported.quantized),
        len(exported.floating),
        exported.size_bytes,
        verification,
        seconds,
        exactly=largest_gap(model, path, architecture.inputs()),
    )


def largest_gap(model: nn.Module, path: Path, inputs: Any) -> float:
    """Between the outputs in `integer_exact` and those of the file in onnxruntime, as a fraction of the largest."""
    given = SampleInputs.of(model, inputs).inputs
    session = open_session(path, optimized=True, float_inputs=True)
    found = run_session(session, {value.name: given[value.name].numpy() for value in session.get_inputs()})
    with integer_exact(model):
        exact = named_outputs(call(model, inputs))[0]
    gaps = [
        (mine - torch.from_numpy(file)).abs().max() for mine, file in zip(exact.values(), found.values(), strict=True)
    ]
    largest = [abs(file).max() for file in found.values()]
    return max(float(gap) / float(size or 1) for gap, size in zip(gaps, largest, strict=True))
