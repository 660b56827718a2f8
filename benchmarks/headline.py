"""Speed-up and lost accuracy of a trained classifier without half of its channels and in int8.

    python benchmarks/headline.py [--seeds 0 1 2] [--threads 1 2] [--quick] [--channels-removed 0.5]

A ResNet-18 for images of 32 pixels (11.2 M weights), on scikit-learn's handwritten digits at that size: 1,257 to train
on, 540 held out. A dense float network is trained first; one recipe, headline.yaml beside this file, then takes a copy
through structured pruning and quantization-aware training in an ordinary loop. Both are exported; the compressed file
is proven with verify_onnx. Accuracies are those of the files in onnxruntime; the files are timed in turn, batch 1.

Each seed has its own split, initial weights and order of batches. Bars: at least 6 times as fast on every number of
threads, and at most 1 point of accuracy lost on average.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from int8_speed import compare, session
from models import ResNet
from paired import Ratio, machine
from shrink_speed import macs
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify import ScheduledModifierManager, export_onnx, verify_onnx
from sparsify.output.tables import Column, Table, track

RECIPE = Path(__file__).with_name("headline.yaml")
WIDTHS, QUICK_WIDTHS = (64, 128, 256, 512), (16, 32, 64, 128)
DENSE_EPOCHS, BATCH, SIZE = 12, 32, 32
QUICK = {"channels_end": 1.0, "quantization_start": 2.0, "num_epochs": 3.0}
SPEEDUP, LOST = 6.0, 1.0
"""Bars: times as fast, points of accuracy."""
COLUMNS = (
    Column("model", "Model"),
    Column("accuracy", "Accuracy", ".2%"),
    Column("mega_macs", "M MACs", ".1f"),
    Column("mega_weights", "M weights", ".2f"),
    Column("kilobytes", "KB", ".0f"),
)
"""Behind them come the milliseconds and the speed-up on each number of threads."""


@dataclass(frozen=True)
class Digits:
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @classmethod
    def load(cls, seed: int) -> Digits:
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16.0
        images = F.interpolate(images, size=SIZE, mode="bilinear", align_corners=False)
        rows = torch.arange(len(images)).numpy()
        train, test = train_test_split(rows, test_size=0.3, stratify=digits.target, random_state=seed)
        labels = torch.tensor(digits.target)
        return cls(images[train], labels[train], images[test], labels[test])

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """One epoch in a new order."""
        order = torch.randperm(len(self.train_x)).split(BATCH)
        return [(self.train_x[rows], self.train_y[rows]) for rows in order]

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.train_x) / BATCH)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)


def train_dense(model: nn.Module, digits: Digits, epochs: int) -> None:
    optimizer = sgd(model)
    steps = epochs * digits.steps_per_epoch
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=steps)
    model.train()
    for _ in track(range(epochs), "training, dense"):
        for x, y in digits.batches():
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()
    model.eval()


def compress(model: nn.Module, digits: Digits, variables: dict[str, float]) -> None:
    """Trains as a user does: a loop, and four lines about a recipe."""
    manager = ScheduledModifierManager.from_yaml(RECIPE, recipe_variables=variables)
    optimizer = manager.modify(
        model, sgd(model), steps_per_epoch=digits.steps_per_epoch, sample_inputs=(digits.train_x[:2],)
    )
    model.train()
    for _ in track(range(manager.max_epochs), "training, by the recipe"):
        for x, y in digits.batches():
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    manager.finalize(model)
    model.eval()


def measured(name: str, model: nn.Module, path: Path, digits: Digits) -> dict[str, Any]:
    """A row of the table: one model and its file."""
    run = session(path, 1)
    right = 0
    for x, y in zip(digits.test_x.split(BATCH), digits.test_y.split(BATCH), strict=True):
        (scores,) = run.run(None, {run.get_inputs()[0].name: x.numpy()})
        right += int((torch.from_numpy(scores).argmax(1) == y).sum())
    return {
        "model": name,
        "accuracy": right / len(digits.test_y),
        "mega_macs": macs(model, {"x": digits.test_x[:1]}) / 1e6,
        "mega_weights": sum(p.numel() for p in model.parameters()) / 1e6,
        "kilobytes": path.stat().st_size / 1024,
    }


def once(seed: int, folder: Path, arguments: argparse.Namespace) -> tuple[float, dict[int, Ratio]]:
    """Points of accuracy lost, and the speed-up by threads; prints the table of this seed."""
    torch.manual_seed(seed)
    digits = Digits.load(seed)
    dense = ResNet(QUICK_WIDTHS if arguments.quick else WIDTHS, (2, 2, 2, 2), 10, stem="cifar", channels=1)
    train_dense(dense, digits, 2 if arguments.quick else DENSE_EPOCHS)
    small = copy.deepcopy(dense)
    variables = {"channels_removed": arguments.channels_removed, **(QUICK if arguments.quick else {})}
    compress(small, digits, variables)

    sample = (digits.test_x[:2],)
    paths = [folder / f"{name}_{seed}.onnx" for name in ("dense", "compressed")]
    for model, path in zip((dense, small), paths, strict=True):
        export_onnx(model, sample, path)
    proof = verify_onnx(small, paths[1], (digits.test_x[:BATCH],))
    if not proof:
        raise SystemExit(str(proof))
    rows = [
        measured("dense, float", dense, paths[0], digits),
        measured("compressed, int8", small, paths[1], digits),
    ]
    feeds = {"x": digits.test_x[:1].numpy()}
    ratios = {}
    columns = list(COLUMNS)
    for threads in arguments.threads:
        ratio = compare(*paths, feeds, threads, 3 if arguments.quick else 15)
        ratios[threads] = ratio
        for row, seconds, speedup in zip(rows, (ratio.a, ratio.b), (1.0, ratio.median), strict=True):
            row.update({f"ms_{threads}": 1e3 * statistics.median(seconds), f"speedup_{threads}": speedup})
        where = f"{threads} thread{'s' * (threads != 1)}"
        columns += [Column(f"ms_{threads}", f"ms, {where}", ".3f"), Column(f"speedup_{threads}", "Speed-up", ".2f")]
    print(Table.of(f"Seed {seed}: {len(digits.test_x)} images held out, batch 1", rows, columns).text())
    for threads, ratio in ratios.items():
        print(f"{threads} thread(s): dense / compressed {ratio}")
    integer = sum(1 for tensor in proof.tensors if tensor.exact)
    whole = "exact from end to end" if proof.exact else "not exact from end to end"
    print(f"verify_onnx: agrees, {integer} integer kernels, {whole}", flush=True)
    return 100 * (rows[0]["accuracy"] - rows[1]["accuracy"]), ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--quick", action="store_true", help="a thin network, few epochs: shows that it runs")
    parser.add_argument("--channels-removed", type=float, default=0.5, help="of every channel group, a fraction")
    parser.add_argument("--outputs", type=Path, help="a folder that keeps the files")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print(machine("onnx", "onnxruntime", "scikit-learn"))
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.outputs or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for seed in arguments.seeds:
            found.append(once(seed, folder, arguments))
    if arguments.quick:
        return
    losses = [lost for lost, _ in found]
    spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
    mean = statistics.mean(losses)
    print(
        f"\n{len(losses)} seed(s): lost {mean:+.2f} points on average (standard deviation {spread:.2f}, at worst "
        f"{max(losses):+.2f}); bar {LOST:g}: {'reached' if mean <= LOST else 'NOT reached'}"
    )
    for threads in arguments.threads:
        every = [ratio for _, ratios in found for ratio in ratios[threads].ratios]
        median = statistics.median(every)
        print(
            f"{threads} thread(s): {median:.2f} times as fast (min {min(every):.2f}, max {max(every):.2f}, "
            f"{len(every)} pairs); bar {SPEEDUP:g}: {'reached' if median >= SPEEDUP else 'NOT reached'}"
        )


if __name__ == "__main__":
    main()
