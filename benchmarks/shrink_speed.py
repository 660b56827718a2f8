"""The speed-up by removed channels in onnxruntime: dense against shrunk, in float and in int8.

    python benchmarks/shrink_speed.py [--quick] [--only NAME] [--threads 1 2] [--widths half ...] [--no-int8]

Every file comes from the same random weights: speed does not depend on them. "half": half of the channels of every
channel group go (of heads and columns of the feed-forward networks in the encoder), rounded to widths that kernels
like, as StructuredPruningModifier does by default; "0.60" and "0.55": so many channels stay, not rounded. int8 files
come from a recipe with QuantizationModifier, calibrated on the shrunk model. Images of 224 pixels, 128 tokens, batch 1.
Bars for half in float on one thread: 3 for ResNet-18 and ResNet-50, 2 for MobileNetV2, 1.7 for the encoder.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from int8_speed import RECIPE, compare, images, tokens
from models import Encoder, MobileNetV2, resnet18, resnet50
from paired import machine
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sparsify import ScheduledModifierManager, export_onnx
from sparsify.pruning.dry_run import find_groups
from sparsify.pruning.group_scores import Bounds, lowest, multiple_of, norms
from sparsify.pruning.groups import ChannelGroups
from sparsify.pruning.removal import plan_removal, remove

MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], dict[str, Tensor]], float]] = {
    "ResNet-18": (resnet18, images, 3.0),
    "ResNet-50": (resnet50, images, 3.0),
    "MobileNetV2": (MobileNetV2, images, 2.0),
    "encoder 12 x 768": (lambda: Encoder(768, 12, 12), tokens, 1.7),
}
"""Name -> (constructor, inputs of so many items, bar)."""
WIDTHS: dict[str, tuple[float, int | None]] = {"half": (0.5, None), "0.60": (0.6, 1), "0.55": (0.55, 1)}
"""Name -> (fraction of the channels that stay, multiple; None for the default of each channel group)."""


def shrunk(dense: nn.Module, channel_groups: ChannelGroups, kept: float, multiple: int | None) -> nn.Module:
    """A copy without the channels of the lowest norms."""
    model = copy.deepcopy(dense)
    counts = {
        name: channel_group.size
        - Bounds.of(channel_group.size, multiple_of(channel_group, multiple)).nearest(round(channel_group.size * kept))
        for name, channel_group in channel_groups.groups.items()
    }
    remove(model, plan_removal(model, channel_groups, lowest(norms(model, channel_groups.groups), counts, {})))
    return model


def macs(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Multiplications with an addition in one pass."""
    # Attention is counted where it is written as two matrix products.
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(**inputs)
    return counter.get_total_flops() // 2


def int8(model: nn.Module, inputs: Callable[[int], dict[str, Tensor]], path: Path) -> None:
    model = copy.deepcopy(model)
    manager = ScheduledModifierManager.from_yaml(RECIPE)
    manager.initialize(model, calibration_data=[inputs(2) for _ in range(2)], sample_inputs=inputs(2))
    manager.finalize(model)
    export_onnx(model, inputs(2), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few pairs: shows that it runs, not how fast")
    parser.add_argument("--only", default="", help="only the models whose name contains this")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--widths", choices=list(WIDTHS), nargs="+", default=list(WIDTHS))
    parser.add_argument("--no-int8", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print(machine("onnx", "onnxruntime"))
    pairs = 3 if arguments.quick else 15
    for name, (build, inputs, bar) in MODELS.items():
        if arguments.only.lower() not in name.lower():
            continue
        torch.manual_seed(0)
        dense, sample = build().eval(), inputs(1)
        channel_groups = find_groups(dense, (), inputs(1))
        size = sum(p.numel() for p in dense.parameters())
        print(f"{name}: {macs(dense, sample) / 1e9:.3f} G MACs, {size / 1e6:.2f} M parameters", flush=True)
        feeds = {key: value.numpy() for key, value in sample.items()}
        with tempfile.TemporaryDirectory() as text:
            folder = Path(text)
            export_onnx(dense, inputs(2), folder / "float.onnx")
            if not arguments.no_int8:
                int8(dense, inputs, folder / "int8.onnx")
            for width in arguments.widths:
                model = shrunk(dense, channel_groups, *WIDTHS[width])
                left = sum(p.numel() for p in model.parameters())
                work = macs(model, sample) / 1e9
                print(f"  {width}: {work:.3f} G MACs, {left / 1e6:.2f} M parameters ({left / size:.2f})", flush=True)
                kinds = ["float"] if arguments.no_int8 else ["float", "int8"]
                for kind in kinds:
                    path = folder / f"{kind}-{width}.onnx"
                    if kind == "float":
                        export_onnx(model, inputs(2), path)
                    else:
                        int8(model, inputs, path)
                    for threads in arguments.threads:
                        ratio = compare(folder / f"{kind}.onnx", path, feeds, threads, pairs)
                        note = ""
                        if width == "half" and kind == "float" and threads == 1:
                            note = f"; bar {bar}: {'reached' if ratio.median >= bar else 'NOT reached'}"
                        print(f"    {kind:5} {threads} thread(s): dense / shrunk {ratio}{note}", flush=True)


if __name__ == "__main__":
    main()
