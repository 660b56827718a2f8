"""Accuracy on the demo's digits of weights on palettes of 1 to 4 bits: by k-means, weighted by Fisher, and trained.

    python benchmarks/palettization.py [--seeds 0] [--bits 1 2 3 4] [--dense-epochs 12] [--epochs 4]

Bar: at 2 bits and fewer the trained ones lose less than those without training. Each seed has its own split.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from paired import machine
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from digits_resnet import Digits, accuracy, train_dense

from sparsify import PalettizationModifier, ScheduledModifierManager

HOW = ("k-means", "Fisher", "trained")


def without_training(model: nn.Module, bits: int, sampler: Any = None) -> nn.Module:
    """A copy on palettes by k-means, weighted where a sampler is given."""
    copied = copy.deepcopy(model)
    manager = ScheduledModifierManager([PalettizationModifier(nbits=bits)])
    manager.apply(copied, grad_sampler=sampler)
    manager.finalize(copied)
    return copied


def trained(model: nn.Module, bits: int, digits: Digits, epochs: int) -> nn.Module:
    """A copy that was trained on palettes, with a learning rate that goes down to zero."""
    copied = copy.deepcopy(model)
    optimizer = torch.optim.Adam(copied.parameters(), lr=1e-3)
    steps = epochs * digits.steps_per_epoch
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    manager = ScheduledModifierManager([PalettizationModifier(nbits=bits, start_epoch=0.0)])
    manager.modify(copied, optimizer, steps_per_epoch=digits.steps_per_epoch)
    copied.train()
    for _ in range(epochs):
        for images, labels in digits.batches():
            optimizer.zero_grad()
            nn.functional.cross_entropy(copied(images), labels).backward()
            optimizer.step()
            rates.step()
    manager.finalize(copied)
    return copied


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--dense-epochs", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=4)
    arguments = parser.parse_args()
    print(machine("scikit-learn"))
    for seed in arguments.seeds:
        torch.manual_seed(seed)
        digits = Digits.load(seed)
        dense = train_dense(digits, arguments.dense_epochs)
        print(f"seed {seed}: dense {accuracy(dense, digits):.2%}", flush=True)

        def batches(digits: Digits = digits) -> Iterator[tuple[Tensor, Tensor]]:
            for images, labels in digits.batches():
                yield from zip(images.split(1), labels.split(1), strict=True)

        for bits in arguments.bits:
            found = [
                accuracy(without_training(dense, bits), digits),
                accuracy(without_training(dense, bits, (batches, nn.functional.cross_entropy)), digits),
                accuracy(trained(dense, bits, digits, arguments.epochs), digits),
            ]
            bar = "" if bits > 2 else f"  bar {'reached' if found[2] > max(found[:2]) else 'NOT reached'}"
            print(
                f"  {bits} bits: k-means {found[0]:.2%}, Fisher {found[1]:.2%}, trained {found[2]:.2%}{bar}", flush=True
            )


if __name__ == "__main__":
    main()
