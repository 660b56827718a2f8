"""Real architectures, quantized while they train, exported, and proven kernel by kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.zoo.architectures import ARCHITECTURES
from tests.zoo.quantized_runs import QAT_ARCHITECTURES, run_qat

INTEGER = frozenset(
    {"VGG", "VGG with BatchNorm", "ResNet-18", "ResNet-50, thin", "SqueezeNet", "MobileNetV2", "MNASNet"}
)
INTEGER |= {"EfficientNet", "RegNetY", "MobileNetV3", "ShuffleNetV2", "DenseNet", "Inception-like"}
INTEGER |= {"U-Net", "WaveNet-like"}
"""Integer kernels from the first layer to the last: exact from end to end, and nothing next to Q or DQ in float."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if slow else ()) for name, slow in QAT_ARCHITECTURES.items()]
)
def test_what_was_trained_is_what_runs(name: str, tmp_path: Path) -> None:
    library = ARCHITECTURES[name].library
    if library:
        pytest.importorskip(library)
    passed = run_qat(name, tmp_path / "model.onnx")
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
        assert passed.exactly == 0.0
