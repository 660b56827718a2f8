"""What evaluation in `integer_exact` costs beside plain eval mode, and how far each is off the exported file.

    python benchmarks/integer_exact.py [--only MLP] [--pairs 9]

Networks with random weights, quantized without training; an evaluation is four batches, entering the context included.
Ratios are medians of paired rounds on one thread, by the time of the process on the CPU; the bar is 4. The differences
are the largest of an output to onnxruntime's, as a fraction of its largest value: of the encoder, whose norms and
products of attention are in float, they are float32's.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from pathlib import Path

import torch
from models import MODELS, MobileNetV2
from paired import machine, paired
from torch import Tensor, nn

from sparsify import export_onnx, integer_exact, quantize_model
from sparsify.onnx.runtime import open_session, run_session

BAR = 4.0
BATCHES = 4
NETWORKS = {**MODELS, "MobileNetV2 (batch 8, 224 px)": (MobileNetV2, lambda: torch.randn(8, 3, 224, 224), 1000)}


def evaluate(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        outputs = [model(x) for _ in range(BATCHES)]
    return outputs[-1]


def evaluate_exactly(model: nn.Module, x: Tensor) -> Tensor:
    with integer_exact(model):
        return evaluate(model, x)


def of_the_file(model: nn.Module, x: Tensor) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        path = export_onnx(model, x, Path(folder) / "model.onnx")
        session = open_session(path, optimized=True, float_inputs=True)
        (outputs,) = run_session(session, {session.get_inputs()[0].name: x.numpy()}).values()
    return torch.from_numpy(outputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="networks whose name holds this")
    parser.add_argument("--pairs", type=int, default=9)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"{machine()}\n| network | integer_exact / eval | eval, off | integer_exact, off |\n|---|---|---|---|")
    for name, (build, batch, _) in NETWORKS.items():
        if options.only not in name:
            continue
        torch.manual_seed(0)
        model = quantize_model(build(), [batch(), batch()]).model.eval()
        x = batch()
        file = of_the_file(model, x)
        off = [float((how(model, x) - file).abs().max() / file.abs().max()) for how in (evaluate, evaluate_exactly)]
        ratio = paired(
            lambda model=model, x=x: evaluate_exactly(model, x),
            lambda model=model, x=x: evaluate(model, x),
            pairs=options.pairs,
            warmup=1,
            clock=time.process_time,
        )
        over = "" if ratio.median <= BAR else f", over the bar of {BAR}"
        print(f"| {name} | {ratio}{over} | {off[0]:.1e} | {off[1]:.1e} |", flush=True)


if __name__ == "__main__":
    main()
