"""Bits for each layer, chosen by loss profiles, against the same bits everywhere at the same size. Nothing is trained.

    python benchmarks/mixed_precision.py [--seeds 0 1 2] [--averages 3 2.5]

The network of `loss_profile.py`, quantized after training on 256 images (activations 8 bits). On 400 images that were
held out: the share of right answers, and the divergence of the outputs from those in float. Rounding: each weight to
the nearest; or what quantize_model does by itself below 8 bits, AdaRound layer by layer. There is nothing uniform
between two whole numbers. Bar: at 3 bits, rounded to the nearest, the choices by data and by Fisher diverge less than
uniform bits, in the mean over seeds.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from typing import Any

import torch
from loss_profile import digits, trained
from paired import machine
from torch import Tensor, nn

from sparsify.analysis.bits import choose_bits
from sparsify.analysis.loss import loss_profile
from sparsify.oneshot import quantize_model

METHODS: dict[str, dict[str, Any]] = {
    "data": {"method": "data"},
    "fisher": {"method": "fisher"},
    "magnitude": {"method": "magnitude"},
    "shape": {"method": "shape"},
}
ROUNDINGS: dict[str, dict[str, Any]] = {
    "nearest": {"rounding": "nearest", "sequential": False},
    "auto": {"rounding": "auto"},
}


def quality(model: nn.Module, dense: nn.Module, held: tuple[Tensor, Tensor]) -> tuple[float, float]:
    with torch.no_grad():
        logs, wanted = model(held[0]).log_softmax(1), dense(held[0]).log_softmax(1)
    right = (logs.argmax(1) == held[1]).float().mean().item()
    return 100 * right, float((wanted.exp() * (wanted - logs)).sum(1).mean())


def shown(values: list[float], digits: int) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ({spread:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--averages", type=float, nargs="+", default=[3.0, 2.5])
    parser.add_argument("--roundings", nargs="+", default=list(ROUNDINGS), choices=list(ROUNDINGS))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print(machine("scikit-learn"))
    found: dict[tuple[str, float, str], list[tuple[float, float]]] = {}
    dense_right = []
    for seed in arguments.seeds:
        (x, y), held = digits(seed)
        dense = trained(seed, x, y)
        dense_right.append(quality(dense, dense, held)[0])
        batches = [(a, b) for a, b in zip(x[:256].split(64), y[:256].split(64), strict=True)]
        profiles = {
            name: loss_profile(
                dense,
                batches if name in ("data", "fisher") else None,
                sample_inputs=x[:1],
                of="quantization",
                progress=False,
                **options,
            )
            for name, options in METHODS.items()
        }
        for average in arguments.averages:
            chosen = {
                name: choose_bits(dense, profile, average_bits=average, bits=(2, 3, 4, 6, 8))
                for name, profile in profiles.items()
            }
            overrides: dict[str, Any] = {name: choice.scheme_overrides for name, choice in chosen.items()}
            if average == int(average):
                overrides["uniform"] = {
                    name: {"weights": {"num_bits": int(average)}} for name in profiles["data"].losses
                }
            for rounding in arguments.roundings:
                for name, override in overrides.items():
                    model = quantize_model(
                        dense, [a for a, _ in batches], scheme_overrides=override, progress=False, **ROUNDINGS[rounding]
                    ).model
                    found.setdefault((rounding, average, name), []).append(quality(model, dense, held))
                    right, divergence = found[rounding, average, name][-1]
                    print(
                        f"seed {seed} {rounding:8} {average:g} bits {name:10} {right:6.2f} % {divergence:.4f}",
                        flush=True,
                    )
    print(f"\nmean (standard deviation) over {len(arguments.seeds)} seeds; in float {shown(dense_right, 2)} %")
    print(f"{'rounding':8} {'bits':>5}  {'chosen by':10} {'right, %':>16} {'divergence':>18}")
    missed = []
    for (rounding, average, name), values in found.items():
        rights, divergences = (list(v) for v in zip(*values, strict=True))
        print(f"{rounding:8} {average:5g}  {name:10} {shown(rights, 2):>16} {shown(divergences, 4):>18}")
        uniform = found.get((rounding, average, "uniform"))
        barred = name in ("data", "fisher") and rounding == "nearest"
        if barred and uniform and statistics.mean(divergences) >= statistics.mean(d for _, d in uniform):
            missed.append(f"{name} at {average:g}")
    print(f"bar, less than uniform: {'MISSED by ' + ', '.join(missed) if missed else 'reached'}")


if __name__ == "__main__":
    main()
