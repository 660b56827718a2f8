"""Trains a small ResNet on scikit-learn's handwritten digits, then prunes it to 90 % and quantizes it to int8.

    python examples/digits_resnet.py [--seed 0] [--quick] [--outputs outputs]

Every accuracy in the table is measured in onnxruntime, on the files that are written. The recipe stands beside this
file, in digits_resnet.yaml. Models, recipe, table and a plot of what happened when go to `outputs/`.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify import ScheduledModifierManager, benchmark_onnx, export_onnx
from sparsify.onnx.benchmark import compare_onnx
from sparsify.output.tables import Column, Table, track

RECIPE = Path(__file__).with_name("digits_resnet.yaml")
BATCH = 64
COLUMNS = (
    Column("model", "Model"),
    Column("accuracy", "Test accuracy", ".2%"),
    Column("sparsity", "Zeros", ".1%"),
    Column("kilobytes", "KB", ".1f"),
    Column("gzipped_kilobytes", "KB gzipped", ".1f"),
    Column("p50_ms", "p50 ms", ".3f"),
    Column("p95_ms", "p95 ms", ".3f"),
    Column("speedup", "Speed-up", ".2f"),
)


class Block(nn.Module):
    """Two 3x3 convolutions and a way around them."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """For images of 8x8 pixels, one channel, ten classes."""

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256)) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        before = (widths[0], *widths[:-1])
        self.blocks = nn.Sequential(
            *(
                Block(a, b, stride=1 if index == 0 else 2)
                for index, (a, b) in enumerate(zip(before, widths, strict=True))
            )
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.blocks(self.stem(x))).flatten(1))


@dataclass(frozen=True)
class Digits:
    """1,797 handwritten digits: 70 % to train on, 30 % to test with."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @classmethod
    def load(cls, seed: int) -> Digits:
        digits = load_digits()
        images = (digits.images[:, None] / 16.0).astype(np.float32)
        train_x, test_x, train_y, test_y = train_test_split(
            images, digits.target, test_size=0.3, stratify=digits.target, random_state=seed
        )
        return cls(*(torch.from_numpy(part) for part in (train_x, train_y, test_x, test_y)))

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """One epoch in a new order."""
        order = torch.randperm(len(self.train_x)).split(BATCH)
        return [(self.train_x[rows], self.train_y[rows]) for rows in order]

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.train_x) / BATCH)


@dataclass(frozen=True)
class Result:
    """A row of the table: one ONNX file, as it runs."""

    model: str
    accuracy: float
    sparsity: float
    kilobytes: float
    gzipped_kilobytes: float
    p50_ms: float
    p95_ms: float
    speedup: float


@dataclass(frozen=True)
class Epoch:
    """The figures that the plot shows, at the end of each epoch of the recipe."""

    epoch: float
    learning_rate: float
    sparsity: float
    quantized: bool
    accuracy: float


def train_dense(digits: Digits, epochs: int) -> ResNet:
    model = ResNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = epochs * digits.steps_per_epoch
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    for _ in track(range(epochs), "training, dense"):
        for x, y in digits.batches():
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()
    return model.eval()


def train_with_recipe(model: ResNet, digits: Digits, manager: ScheduledModifierManager) -> tuple[ResNet, list[Epoch]]:
    """Trains `model` by the recipe, in place; returns the network as it was before quantization, and the history."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    optimizer = manager.modify(
        model, optimizer, steps_per_epoch=digits.steps_per_epoch, sample_inputs=(digits.train_x[:2],)
    )
    quantization_start = min(m.start_epoch for m in manager.modifiers if m.kind == "quantization")
    pruned = ResNet()
    history = []
    for epoch in track(range(manager.max_epochs), "training, by the recipe"):
        model.train()
        for x, y in digits.batches():
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        if epoch + 1 == quantization_start:
            # A quantized model's state has all keys of the plain one, and some more.
            state = model.state_dict()
            pruned.load_state_dict({name: state[name] for name in pruned.state_dict()})
        history.append(
            Epoch(
                epoch=manager.epoch,
                learning_rate=optimizer.param_groups[0]["lr"],
                sparsity=zeros(model),
                quantized=manager.qat_active(epoch),
                accuracy=accuracy(model, digits),
            )
        )
    manager.finalize(model)
    model.eval()
    return pruned.eval(), history


def zeros(model: nn.Module) -> float:
    """The fraction of zeros among the weights of convolutions and linear layers."""
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    model.eval()
    return float((model(digits.test_x).argmax(1) == digits.test_y).float().mean())


def accuracy_in_onnxruntime(path: Path, digits: Digits) -> float:
    options = onnxruntime.SessionOptions()
    # Without it sums of int8 products saturate on CPUs without VNNI.
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {session.get_inputs()[0].name: digits.test_x.numpy()})
    return float((scores.argmax(1) == digits.test_y.numpy()).mean())


def zeros_in_file(path: Path) -> float:
    """The same fraction, counted in the file: all initializers with two dimensions or more are weights."""
    weights = [numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer if len(tensor.dims) > 1]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.size for w in weights)


def measure(files: dict[str, Path], digits: Digits) -> list[Result]:
    """One row a file; the speed-up is against the first."""
    results = []
    first = next(iter(files.values()))
    for name, path in files.items():
        speed = benchmark_onnx(path, threads=1, warmup=100, iterations=1000)
        results.append(
            Result(
                model=name,
                accuracy=accuracy_in_onnxruntime(path, digits),
                sparsity=zeros_in_file(path),
                kilobytes=speed.size_bytes / 1024,
                gzipped_kilobytes=speed.gzip_bytes / 1024,
                p50_ms=speed.latency_p50_ms,
                p95_ms=speed.latency_p95_ms,
                speedup=1.0 if path == first else compare_onnx(first, path, rounds=50, iterations=20).median,
            )
        )
    return results


def plot(history: list[Epoch], dense_accuracy: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    epochs = [row.epoch for row in history]
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6), layout="constrained")
    above.plot(epochs, [100 * row.sparsity for row in history], color="tab:blue", label="zeros, %")
    above.set_ylabel("zeros, % of the weights")
    rate = above.twinx()
    rate.plot(epochs, [row.learning_rate for row in history], color="tab:orange", label="learning rate")
    rate.set_ylabel("learning rate")
    below.plot(epochs, [100 * row.accuracy for row in history], color="tab:green", label="test accuracy")
    below.axhline(100 * dense_accuracy, color="gray", linestyle="--", label="dense")
    below.set_ylabel("test accuracy, %")
    below.set_xlabel("epoch of the recipe")
    quantized = [row.epoch for row in history if row.quantized]
    for axis in (above, below):
        if quantized:
            axis.axvspan(quantized[0] - 1, quantized[-1], color="tab:red", alpha=0.1, label="trains as int8")
    lines = [*above.get_legend_handles_labels()[0], *rate.get_legend_handles_labels()[0]]
    figure.legend(handles=[*lines, *below.get_legend_handles_labels()[0][:2]], loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def run(seed: int, outputs: Path, *, quick: bool = False) -> list[Result]:
    """The whole way for one seed: train, compress, export, measure; writes everything to `outputs`."""
    outputs.mkdir(parents=True, exist_ok=True)
    # One thread: the figures do not depend on the number of cores, and a busy machine does not stall two at a time.
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    digits = Digits.load(seed)
    variables = {"pruning_end": 2.0, "quantization_start": 3.0, "num_epochs": 4.0} if quick else None
    model = train_dense(digits, epochs=3 if quick else 25)
    files = {name: outputs / f"digits_{name.split()[0]}.onnx" for name in ("dense", "pruned", "int8 + pruned")}
    sample = (digits.test_x[:2],)
    export_onnx(model, sample, files["dense"])

    manager = ScheduledModifierManager.from_yaml(RECIPE, recipe_variables=variables)
    pruned, history = train_with_recipe(model, digits, manager)
    export_onnx(pruned, sample, files["pruned"])
    export_onnx(model, sample, files["int8 + pruned"])
    torch.save(model.state_dict(), outputs / "digits.pt")
    manager.save(outputs / "recipe.yaml")

    results = measure(files, digits)
    table = Table.of(f"Digits, seed {seed}: {len(digits.test_x)} test images, one thread, batch 1", results, COLUMNS)
    table.write(outputs / "table.md")
    table.write(outputs / "table.json")
    plot(history, results[0].accuracy, outputs / "plot.png")
    print(table.text())
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few epochs: shows that it runs, not how well")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="the folder for all that is written")
    arguments = parser.parse_args()
    run(arguments.seed, arguments.outputs, quick=arguments.quick)
    print(f"Models, recipe, table and plot are in {arguments.outputs}/")


if __name__ == "__main__":
    main()
