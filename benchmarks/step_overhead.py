"""Time that a recipe adds to a training step: with pruning active / bare, and with everything quantized / bare.

    python benchmarks/step_overhead.py [--quick] [--threads N] [--only NAME]

Both models start from the same weights and take whole steps (zero_grad, forward, loss, backward, optimizer) on the
same batch, in turn. Bars (medians, one thread): pruning 1.01 on ResNet-18 and the encoder, 1.08 on the MLP;
quantization 1.20 on ResNet-20 and the encoder, 1.45 on the MLP.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import torch
from models import MODELS
from paired import Ratio, machine, paired
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify import ScheduledModifierManager

PRUNING = """
modifiers:
  - !GMPruningModifier
    params: __ALL_PRUNABLE__
    init_sparsity: 0.9
    final_sparsity: 0.9
    start_epoch: 0.0
    end_epoch: 1000.0
    update_frequency: 1000.0
"""
QUANTIZATION = """
modifiers:
  - !QuantizationModifier
    start_epoch: 0.0
"""
BARS = {
    ("pruning", "ResNet-18"): 1.01,
    ("pruning", "encoder"): 1.01,
    ("pruning", "MLP"): 1.08,
    ("quantization", "ResNet-20"): 1.20,
    ("quantization", "encoder"): 1.20,
    ("quantization", "MLP"): 1.45,
}


def stepper(model: nn.Module, inputs: Tensor, labels: Tensor, recipe: str | None) -> Callable[[], None]:
    """One training step as a function; `recipe` is put in force first."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    if recipe is not None:
        # Kept alive by the optimizer's hooks.
        ScheduledModifierManager.from_yaml(recipe).modify(
            model, optimizer, steps_per_epoch=1000, sample_inputs=(inputs,)
        )

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        if inputs.is_cuda:
            torch.cuda.synchronize()

    return step


def measure(name: str, recipe: str, pairs: int, device: str) -> Ratio:
    build, batch, classes = MODELS[name]
    torch.manual_seed(0)
    model = build().to(device)
    inputs = batch().to(device)
    labels = torch.randint(0, classes, (len(inputs),), device=device)
    with_recipe = stepper(copy.deepcopy(model), inputs, labels, recipe)
    bare = stepper(model, inputs, labels, None)
    for work in (with_recipe, bare):
        work()
    start = time.perf_counter()
    bare()
    repeats = max(1, round(0.05 / (time.perf_counter() - start)))
    return paired(with_recipe, bare, pairs=pairs, repeats=repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few pairs: shows that it runs, not how fast")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="only the models whose name contains this")
    parser.add_argument("--what", choices=["pruning", "quantization", "both"], default="both")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(machine("onnxruntime"))
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        for what, recipe in (("pruning", PRUNING), ("quantization", QUANTIZATION)):
            if arguments.what not in (what, "both"):
                continue
            for name in MODELS:
                if arguments.only.lower() not in name.lower():
                    continue
                ratio = measure(name, recipe, 3 if arguments.quick else 41, device)
                bar = next(
                    (value for (kind, key), value in BARS.items() if kind == what and name.startswith(key)), None
                )
                note = "" if bar is None else f"  bar {bar}: {'reached' if ratio.median <= bar else 'NOT reached'}"
                print(f"{device:5} {what:13} {name:40} {ratio}{note}", flush=True)


if __name__ == "__main__":
    main()
