"""The exported int8 file against onnxruntime's own quantize_static, and against the float file, in onnxruntime.

    python benchmarks/int8_speed.py [--quick] [--only NAME] [--threads 1 2] [--batch 1 8]

Both int8 files come from the same weights and the same calibration batches: ours from a recipe, the other from
quant_pre_process and quantize_static (QDQ, uint8 activations, int8 weights per channel) on the float file. Files run in
turn. Ratios above 1: ours is the faster. The error is the relative difference from the float file's output on inputs
that calibration has not seen.
Bars: 1.0 of quantize_static in every row of a CNN; 1.25 in the encoder's, with a smaller error.

Measured on an AMD EPYC (AVX-512 VNNI, 2 cores, shared), onnxruntime 1.31, BERT base: error .025 against .070. Of
quantize_static 1.19 and 1.18 at batch 1 (1 and 2 threads), 1.10 at batch 8; of float 2.8 to 3.4. The encoder's bar is
NOT reached there. onnxruntime's profile of four such layers and the embeddings, 1 thread, milliseconds:

                                        batch 1             batch 8
                                   static     ours     static     ours
    linear layers, int8              9.87     9.78       72.9     72.0
    matmuls of attention              .81      .95        6.5      9.9
    softmax                          1.66      .19       11.7      1.5
    GELU                              .65      .65        5.1      5.2
    LayerNorm                         .36      .36        2.7      2.7
    adds and products                 .94      .30        5.7      3.5
    (de)quantization                  .57      .23        5.2      2.2
    transposes, reshapes, the rest    .34      .55        1.6      3.8
    all                              15.2     13.0      111.5    100.7

Both spend most of their time in the same integer kernel. 1.25 would take 12.2 at batch 1: what is left when every
add, transpose, reshape and embedding costs nothing. One QGemm for query, key and value is no faster than three (.62
against .60), SkipLayerNormalization takes .41 where Add and LayerNormalization take .05, and the Attention operator on
(batch, length, width) (opset 23; the default is 20) saves 2 to 3 % at 1 thread; at 2 the spread hides the difference.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from calibration import Batches
from models import Encoder, MobileNetV2, resnet18, resnet50
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from paired import Ratio, machine, paired
from torch import Tensor, nn

from sparsify import ScheduledModifierManager, export_onnx
from sparsify.onnx.runtime import optimized_operators

RECIPE = "modifiers:\n  - !QuantizationModifier\n    start_epoch: 0.0\n"
CALIBRATION = 4
"""Batches of eight items."""


def images(count: int) -> dict[str, Tensor]:
    return {"x": torch.randn(count, 3, 224, 224)}


def tokens(count: int) -> dict[str, Tensor]:
    return {"ids": torch.randint(0, 1000, (count, 128))}


def masked_tokens(count: int) -> dict[str, Tensor]:
    return {
        "input_ids": torch.randint(0, 1000, (count, 128)),
        "attention_mask": torch.ones(count, 128, dtype=torch.int64),
    }


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig())


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], dict[str, Tensor]], float]] = {
    "ResNet-18": (resnet18, images, 1.0),
    "ResNet-50": (resnet50, images, 1.0),
    "MobileNetV2": (MobileNetV2, images, 1.0),
    "encoder 12 x 768": (lambda: Encoder(768, 12, 12), tokens, 1.25),
    "BERT base (transformers)": (bert, masked_tokens, 1.25),
}
"""Name -> (constructor, inputs of so many items, bar against quantize_static)."""


def files(name: str, folder: Path) -> tuple[Path, Path, Path]:
    """The float file, that of quantize_static and ours."""
    build, inputs, _ = MODELS[name]
    torch.manual_seed(0)
    model = build()
    batches = [inputs(8) for _ in range(CALIBRATION)]
    with torch.no_grad():
        # Statistics of BatchNorm as training would leave them, not those of a network that was never run.
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        model.train()
        for batch in batches[:2]:
            model(**batch)
    model.eval()
    plain, prepared, static, ours = (folder / f"{kind}.onnx" for kind in ("float", "prepared", "static", "ours"))
    export_onnx(model, inputs(2), plain)
    try:
        quant_pre_process(plain, prepared, skip_symbolic_shape=True)
    except Exception as error:  # Whatever onnxruntime's tools raise: the row goes on without this step, and says so.
        print(f"  quant_pre_process failed ({type(error).__name__}); quantize_static gets the file as it is")
        prepared = plain
    quantize_static(
        prepared,
        static,
        Batches(batches),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    manager = ScheduledModifierManager.from_yaml(RECIPE)
    manager.initialize(model, calibration_data=batches, sample_inputs=inputs(2))
    manager.finalize(model)
    export_onnx(model, inputs(2), ours)
    return plain, static, ours


def session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # A session's threads that wait by spinning would take the cores of the one that is being timed.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def compare(one: Path, other: Path, feeds: dict[str, Any], threads: int, pairs: int) -> Ratio:
    first, second = session(one, threads), session(other, threads)
    start = time.perf_counter()
    for _ in range(2):
        second.run(None, feeds)
    repeats = max(1, round(0.1 / (time.perf_counter() - start)))
    return paired(lambda: first.run(None, feeds), lambda: second.run(None, feeds), pairs=pairs, repeats=repeats)


def error(path: Path, plain: Path, feeds: dict[str, Any]) -> float:
    """Relative difference of the first outputs."""
    wanted, got = (session(one, 1).run(None, feeds)[0] for one in (plain, path))
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few pairs: shows that it runs, not how fast")
    parser.add_argument("--only", default="", help="only the models whose name contains this")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print(machine("onnx", "onnxruntime"))
    for name, (_, inputs, bar) in MODELS.items():
        if arguments.only.lower() not in name.lower():
            continue
        with tempfile.TemporaryDirectory() as text:
            try:
                plain, static, ours = files(name, Path(text))
            except ModuleNotFoundError as missing:
                print(f"{name}: left out, {missing}")
                continue
            unseen = {key: value.numpy() for key, value in inputs(8).items()}
            mine, theirs = error(ours, plain, unseen), error(static, plain, unseen)
            same = not optimized_operators(ours) - optimized_operators(static)
            print(
                f"{name}: error {mine:.4f}, quantize_static {theirs:.4f}{'; its kernels, no other' if same else ''}",
                flush=True,
            )
            for batch in arguments.batch:
                feeds = {key: value.numpy() for key, value in inputs(batch).items()}
                for threads in arguments.threads:
                    pairs = 3 if arguments.quick else 15
                    against = compare(static, ours, feeds, threads, pairs)
                    floats = compare(plain, ours, feeds, threads, pairs)
                    reached = against.median >= bar and (bar == 1.0 or mine < theirs)
                    print(
                        f"  batch {batch}, {threads} thread(s): quantize_static / ours {against}; bar {bar}: "
                        f"{'reached' if reached else 'NOT reached'}\n    float / ours {floats}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
