"""Time that each pruning method adds to a training step between two updates, and that of an update of its masks.

    python benchmarks/method_overhead.py [--quick] [--only MLP] [--methods GM RigL]

First a whole step (zero_grad, forward, loss, backward, optimizer) with the method at work at 90 % zeros against a bare
one. Methods work inside of the optimizer's step, so whole steps are taken in turn, and the bare one with its own
optimizer's step exchanged for the other's is compared with itself: what forward and backward passes vary by cancels
out. (step_overhead.py compares whole steps.) Bars, medians, one thread: 1.01 on ResNet-18 and the encoder, 1.08 on the
MLP, for every method that need not see every gradient. Movement pruning adds up scores and Top-KAST puts weights in and
out at every step; OBS and M-FAC without a grad_sampler take in the gradients of the last `num_grads` steps before an
update: their rows have no bar. Then, on the MLP, the optimizer's step in which an update falls less one without.

Times are the process's own on the CPU, so that other programs disturb little; --wall takes the clock on the wall.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from models import MODELS
from paired import Ratio, machine, paired
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify import (
    ACDCPruningModifier,
    GlobalMagnitudePruningModifier,
    GMPruningModifier,
    MFACPruningModifier,
    MovementPruningModifier,
    OBSPruningModifier,
    RigLPruningModifier,
    ScheduledModifierManager,
    TopKASTPruningModifier,
)
from sparsify.modifiers.base import Modifier

BARS = {"ResNet-18": 1.01, "encoder": 1.01, "MLP": 1.08}
EPOCHS = 1000.0
STEPS = 1000
"""Steps in an epoch: no run gets to the next update, unless every step is one."""
GRADIENTS = 16
"""How many OBS and M-FAC take in here: what they cost a step hardly depends on it, the memory of M-FAC does."""

Make = Callable[[float], Modifier]
"""From epochs between two updates, -1 for every step."""
NAMED: dict[str, Any] = {"params": "__ALL_PRUNABLE__", "start_epoch": 0.0, "end_epoch": EPOCHS}
# Up to 95 %, so that an update has something to do.
RAMP: dict[str, Any] = {**NAMED, "init_sparsity": 0.9, "final_sparsity": 0.95}
METHODS: dict[str, Make] = {
    "GM": lambda every: GMPruningModifier(update_frequency=every, **RAMP),
    "global": lambda every: GlobalMagnitudePruningModifier(update_frequency=every, **RAMP),
    # In the middle of a sparse phase: the whole window is one. Phases of one step, sparse and dense, for the updates.
    "AC/DC": lambda every: ACDCPruningModifier(
        compression_sparsity=0.9, update_frequency=2 * EPOCHS if every > 0 else 1 / STEPS, **NAMED
    ),
    "RigL": lambda every: RigLPruningModifier(final_sparsity=0.9, update_frequency=every, **NAMED),
    "OBS": lambda every: OBSPruningModifier(num_grads=GRADIENTS, update_frequency=every, **RAMP),
    "M-FAC": lambda every: MFACPruningModifier(num_grads=GRADIENTS, update_frequency=every, **RAMP),
    "movement": lambda every: MovementPruningModifier(update_frequency=every, **RAMP),
    "Top-KAST": lambda every: TopKASTPruningModifier(
        forward_sparsity=0.9, backward_sparsity=0.8, update_frequency=every, **NAMED
    ),
}
EVERY_STEP = ("movement", "Top-KAST")
COLLECTING = ("OBS", "M-FAC")


class Trained:
    """A copy of a model in training, with `modifier` at work from the start.

    Attributes:
        step: a whole step.
        optimizer_step: the optimizer's alone, with the gradients of the last step.
        inside: seconds in the optimizer's step, of the last whole step.
    """

    def __init__(
        self,
        problem: tuple[nn.Module, Tensor, Tensor],
        modifier: Modifier | None,
        clock: Callable[[], float],
        steps_per_epoch: int = STEPS,
    ) -> None:
        self.model, self.inputs, self.labels = copy.deepcopy(problem[0]).train(), *problem[1:]
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
        self.clock, self.inside = clock, 0.0
        if modifier is not None:
            # Kept alive by the optimizer's hooks.
            ScheduledModifierManager([modifier]).modify(self.model, self.optimizer, steps_per_epoch=steps_per_epoch)
        self.optimizer_step = self.optimizer.step
        self.step()

    def step(self) -> float:
        """Takes one step. Returns its time in seconds."""
        start = self.clock()
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.inputs), self.labels).backward()
        before = self.clock()
        self.optimizer.step()
        end = self.clock()
        self.inside = end - before
        return end - start


def problem(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    build, batch, classes = MODELS[name]
    torch.manual_seed(0)
    model, inputs = build(), batch()
    return model, inputs, torch.randint(0, classes, (len(inputs),))


def in_turn(a: Trained, b: Trained, pairs: int) -> Ratio:
    """Whole steps of b with the optimizer's step of a, against whole steps of b."""
    times: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        for one in (a, b) if pair % 2 else (b, a):
            whole = one.step()
            if one is b:
                times[1].append(whole)
        times[0].append(times[1][-1] - b.inside + a.inside)
    return Ratio(*times)


def between_updates(name: str, options: argparse.Namespace) -> None:
    task, clock = problem(name), options.clock
    bar = next(value for key, value in BARS.items() if name.startswith(key))
    bare = Trained(task, None, clock)
    for method in options.methods:
        ratio = in_turn(Trained(task, METHODS[method](EPOCHS), clock), bare, options.pairs)
        free = method in EVERY_STEP
        note = "at every step" if free else f"bar {bar}: {'reached' if ratio.median <= bar else 'NOT reached'}"
        print(f"{name:40} {method:19} {ratio}  {note}", flush=True)
    if not name.startswith("MLP"):
        return
    for method in (m for m in options.methods if m in COLLECTING):
        # One step an epoch, and updates every 16: gradients are wanted at all steps, and one of 16 is an update, an
        # outlier that the median drops.
        collecting = Trained(task, METHODS[method](float(GRADIENTS)), clock, steps_per_epoch=1)
        ratio = in_turn(collecting, bare, min(options.pairs, 2 * GRADIENTS))
        print(f"{name:40} {method + ', collecting':19} {ratio}  while it collects", flush=True)


def updates(options: argparse.Namespace) -> None:
    name = next(name for name in MODELS if name.startswith("MLP"))
    task = problem(name)
    weights = sum(p.numel() for p in task[0].parameters() if p.dim() > 1)
    print(
        f"\nan update of the masks of {weights / 1e6:.1f} M weights, {name}: the optimizer's step with less without it"
    )
    for method in options.methods:
        with_update, without = (Trained(task, METHODS[method](every), options.clock) for every in (-1.0, EPOCHS))
        # Repeats are even: an update of AC/DC is one of two kinds in turn.
        pairs, repeats = (3, 1) if method in COLLECTING else (options.pairs // 2, 4)
        ratio = paired(
            with_update.optimizer_step,
            without.optimizer_step,
            pairs=pairs,
            repeats=repeats,
            warmup=1,
            clock=options.clock,
        )
        seconds = statistics.median(x - y for x, y in zip(ratio.a, ratio.b, strict=True))
        also = " with one gradient taken in" if method in COLLECTING else ""
        print(f"{method:19} {1e3 * seconds:9.2f} ms  {1e9 * seconds / weights:8.1f} ns a weight{also}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few pairs: shows that it runs, not how fast")
    parser.add_argument("--only", default="", help="only the models whose name contains this")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--pairs", type=int, default=41)
    parser.add_argument("--wall", action="store_true", help="the clock on the wall instead of the processor's time")
    options = parser.parse_args()
    options.clock = time.perf_counter if options.wall else time.process_time
    options.pairs = 4 if options.quick else options.pairs
    torch.set_num_threads(1)
    # OBS and M-FAC say that their first masks go by magnitude: here that is how they get to 90 %.
    logging.getLogger("sparsify").setLevel(logging.ERROR)
    print(machine())
    for name in MODELS:
        if options.only.lower() in name.lower() and any(name.startswith(key) for key in BARS):
            between_updates(name, options)
    if options.only.lower() in "mlp":
        updates(options)


if __name__ == "__main__":
    main()
