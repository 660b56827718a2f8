"""A latency goal: what the tables of layers foresee against what the whole then takes in onnxruntime.

    python benchmarks/latency_goal.py [--quick] [--sizes 32 64] [--threads 1] [--int8] [--iterations 30]

ResNet-18 with random weights, which play no part in the times, batch 1. Goals are a half and a third of the time that
the model takes as it is. Losses are the shares of norms, as `latency_plan` takes them without a profile. "alone" is
the error of the tables for the solution that was taken: predicted / measured - 1; "rounds" are the errors of all
solutions that were tried, each with what the ones before had shown. A bar: the measured time is within the goal, and
more than 85 % of it is used.
"""

from __future__ import annotations

import argparse
import warnings

import torch
from models import resnet18
from paired import machine

from sparsify.analysis.profiling import WIDTHS, performance_profile
from sparsify.errors import ArgumentError
from sparsify.optimize.latency import latency_plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few calls and widths: shows that it runs, not how well")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--int8", action="store_true", help="all layers in int8, and goals in parts of that time")
    parser.add_argument("--iterations", type=int, default=30)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print(machine("onnx", "onnxruntime"))
    iterations = 5 if arguments.quick else arguments.iterations
    widths = (1.0, 0.5, 0.25) if arguments.quick else WIDTHS
    for size in arguments.sizes:
        torch.manual_seed(0)
        model, inputs = resnet18().eval(), torch.randn(1, 3, size, size)
        profile = performance_profile(
            model,
            inputs,
            threads=(arguments.threads,),
            quantized=arguments.int8,
            widths=widths,
            iterations=iterations,
        )
        float_ms, int8_ms = profile.total_ms, profile.total_int8_ms
        dense = int8_ms if arguments.int8 and int8_ms is not None else float_ms
        print(f"ResNet-18 at {size} pixels: {float_ms:.3f} ms" + (f", int8 {int8_ms:.3f} ms" if int8_ms else ""))
        times = ", ".join(f"{w:.3g}: {ms:.3f}" for w, ms in zip(profile.widths, profile.width_total_ms, strict=True))
        print(f"  all channel groups at one width, ms: {times}", flush=True)
        for part in (2, 3):
            try:
                plan = latency_plan(
                    model,
                    inputs,
                    dense / part,
                    threads=arguments.threads,
                    performance=profile,
                    int8=arguments.int8,
                    iterations=iterations,
                )
            except ArgumentError as error:
                print(f"  1/{part}: {error}", flush=True)
                continue
            assert plan.measured_ms is not None and plan.error is not None
            rounds = ", ".join(f"{one.error:+.1%}" for one in plan.rounds)
            used = plan.measured_ms / plan.goal_ms
            kept = sum(after for _, after in plan.channels.values()) / max(
                sum(before for before, _ in plan.channels.values()), 1
            )
            print(
                f"  1/{part}: goal {plan.goal_ms:.3f} ms, predicted {plan.predicted_ms:.3f}, measured "
                f"{plan.measured_ms:.3f} ({used:.0%} of the goal; bar {'reached' if used > 0.85 else 'NOT reached'}); "
                f"alone {plan.error:+.1%}; rounds {rounds}; {len(plan.sparsity)} layers cut to {kept:.0%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
