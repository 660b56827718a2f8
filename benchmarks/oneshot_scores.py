"""One-shot pruning of a trained network, nothing trained afterwards: second-order scores against magnitude.

    python benchmarks/oneshot_scores.py [--seeds 0 1 2]

A perceptron with two hidden layers on the 8 x 8 digits; each seed has its own split, initial weights and order of
batches. All methods rank all weights together, and see the training data alone. Bar: OBS and M-FAC are better than
magnitude, in accuracy and in loss on the test data, on average at every sparsity. This network fits its training data,
so that most gradients vanish: with recomputations OBS needs more dampening than its default of 1e-7.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from paired import machine
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from sparsify import (
    GlobalMagnitudePruningModifier,
    MFACPruningModifier,
    OBSPruningModifier,
    ScheduledModifierManager,
)
from sparsify.modifiers.base import Modifier

SPARSITIES = (0.7, 0.8, 0.9)
Data = tuple[Tensor, Tensor]
METHODS: dict[str, Callable[..., Modifier]] = {
    "magnitude": GlobalMagnitudePruningModifier,
    "OBS": OBSPruningModifier,
    "OBS, damp 1e-5": lambda **common: OBSPruningModifier(damp=1e-5, **common),
    "the same, 8 recomputed": lambda **common: OBSPruningModifier(damp=1e-5, num_recomputations=8, **common),
    "M-FAC": lambda **common: MFACPruningModifier(num_grads=512, global_sparsity=True, **common),
}


def digits(seed: int) -> tuple[Data, Data]:
    data = load_digits()
    inputs = torch.tensor(data.data, dtype=torch.float32) / 16.0
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, test = order[:1200], order[1200:]
    return (inputs[train], labels[train]), (inputs[test], labels[test])


def trained(seed: int, data: Data) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    inputs, labels = data
    for _ in range(30):
        for batch in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


def pruned(model: nn.Module, data: Data, make: Callable[..., Modifier], sparsity: float) -> nn.Module:
    model = copy.deepcopy(model)
    inputs, labels = data

    def losses(**_: Any) -> Iterator[Tensor]:
        for i in torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)):
            yield functional.cross_entropy(model(inputs[i : i + 1]), labels[i : i + 1])

    at_once: dict[str, Any] = {"start_epoch": 0.0, "end_epoch": 0.0, "update_frequency": 1.0, "init_sparsity": 0.0}
    modifier = make(params="__ALL_PRUNABLE__", final_sparsity=sparsity, **at_once)
    ScheduledModifierManager([modifier]).apply(model, grad_sampler=losses)
    return model


def quality(model: nn.Module, data: Data) -> tuple[float, float]:
    with torch.no_grad():
        outputs = model(data[0])
    accuracy = (outputs.argmax(1) == data[1]).float().mean().item()
    return 100 * accuracy, functional.cross_entropy(outputs, data[1]).item()


def figures(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):7.2f} ({spread:5.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    print(machine("scikit-learn"))
    found: dict[tuple[float, str], list[tuple[float, float]]] = {}
    seconds: dict[str, list[float]] = {}
    dense = []
    for seed in arguments.seeds:
        train, test = digits(seed)
        model = trained(seed, train)
        dense.append(quality(model, test))
        print(f"seed {seed}: dense {dense[-1][0]:.2f} %", end="", flush=True)
        for sparsity in SPARSITIES:
            for name, make in METHODS.items():
                begun = time.perf_counter()
                sparse = pruned(model, train, make, sparsity)
                seconds.setdefault(name, []).append(time.perf_counter() - begun)
                found.setdefault((sparsity, name), []).append(quality(sparse, test))
            shown = ", ".join(f"{found[sparsity, name][-1][0]:.2f}" for name in METHODS)
            print(f"; at {sparsity:.0%}: {shown}", end="", flush=True)
        print()
    print(f"\nmean (standard deviation) over {len(arguments.seeds)} seeds")
    print(f"{'zeros':>5}  {'method':22} {'accuracy, %':>15} {'loss':>15} {'seconds':>9}")
    print(f"{'0 %':>5}  {'dense':22} {figures([a for a, _ in dense])} {figures([x for _, x in dense])}")
    missed = []
    for (sparsity, name), values in found.items():
        accuracies, losses = ([value[i] for value in values] for i in (0, 1))
        took = statistics.mean(seconds[name])
        print(f"{sparsity:>5.0%}  {name:22} {figures(accuracies)} {figures(losses)} {took:9.2f}")
        base = found[sparsity, "magnitude"]
        better = statistics.mean(accuracies) > statistics.mean(a for a, _ in base)
        if name != "magnitude" and not (better and statistics.mean(losses) < statistics.mean(x for _, x in base)):
            missed.append(f"{name} at {sparsity:.0%}")
    print(f"bar, better than magnitude: {'NOT reached by ' + ', '.join(missed) if missed else 'reached'}")


if __name__ == "__main__":
    main()
