"""Quantization-aware training beside float training, at usual learning rates, from scratch and in fine-tuning.

    python benchmarks/qat_stability.py [--seeds 0 1 2 3 4] [--epochs 12] [--only NETWORK] [--rates 0.03 ...] [--quick]

ResNet-20 and a MobileNetV2 of narrow, depthwise blocks, whose BatchNorms are the hard case, on the 8 x 8 digits at 16 x
16. Everything is quantized (uint8 activations, int8 weights per channel), BatchNorm learns and averages as in float.
Each pair starts from the same weights and sees the same batches. Bar: the quantized network, in eval mode as it is
deployed, is on average over the seeds at most 1 point of accuracy below the float one at every learning rate, and no
loss is NaN. Float runs that differ by rounding alone end apart too: --twice trains the float network a second time,
from weights that differ in their last digits, and prints how far that one is.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable

import torch
from models import MobileNetV2, ResNet
from paired import machine
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify import ScheduledModifierManager

RECIPE = "modifiers:\n  - !QuantizationModifier\n    start_epoch: 0.0\n"
NETWORKS = {
    "ResNet-20": lambda: ResNet((16, 32, 64), (3, 3, 3), 10, stem="cifar"),
    "MobileNetV2-like": lambda: MobileNetV2(
        ((1, 8, 1, 1), (4, 16, 2, 2), (4, 24, 2, 2), (4, 32, 2, 1)), stem=16, stem_stride=1, head=128, classes=10
    ),
}
FROM_SCRATCH, FINE_TUNING = (0.1, 0.03), (0.01, 0.001)
BATCH = 64


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32).view(-1, 1, 8, 8) / 8.0 - 1.0
    images = F.interpolate(images, size=16, mode="bilinear", align_corners=False).expand(-1, 3, -1, -1).contiguous()
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1200], order[1200:]
    return images[train], labels[train], images[test], labels[test]


def train(model: nn.Module, data: tuple[Tensor, ...], rate: float, epochs: int, seed: int, recipe: str | None) -> float:
    """Accuracy on the test images in percent; NaN where a loss was not finite."""
    x, y, test_x, test_y = data
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
    steps = epochs * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    manager = None
    model.train()
    if recipe is not None:
        manager = ScheduledModifierManager.from_yaml(recipe)
        manager.modify(model, optimizer, steps_per_epoch=len(x) // BATCH, sample_inputs=(x[:BATCH],))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(BATCH)[: len(x) // BATCH]:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[batch]), y[batch])
            if not loss.isfinite():
                return float("nan")
            loss.backward()
            optimizer.step()
            schedule.step()
    if manager is not None:
        manager.finalize(model)
    model.eval()
    with torch.no_grad():
        return 100.0 * (model(test_x).argmax(1) == test_y).float().mean().item()


def nudged(model: nn.Module) -> nn.Module:
    """A copy whose weights differ in their last digits."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.0 + 1e-6)
    return other


def figures(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):6.2f} ({spread:4.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--only", default="", help="only the networks whose name contains this")
    parser.add_argument("--rates", type=float, nargs="+", help="only these learning rates")
    parser.add_argument("--twice", action="store_true", help="a second float run, from weights 1e-6 away")
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch: shows that it runs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.epochs = [0], 1
    print(machine())
    print(f"accuracy in percent, mean (standard deviation) over {len(arguments.seeds)} seed(s)")
    data = digits()
    for name, build in NETWORKS.items():
        if arguments.only.lower() not in name.lower():
            continue
        trained: dict[int, nn.Module] = {}
        for what, rates in (("from scratch", FROM_SCRATCH), ("fine-tuning", FINE_TUNING)):
            for rate in rates:
                if arguments.rates and rate not in arguments.rates:
                    continue
                row(name, build, what, rate, data, trained, arguments)


def row(
    name: str,
    build: Callable[[], nn.Module],
    what: str,
    rate: float,
    data: tuple[Tensor, ...],
    trained: dict[int, nn.Module],
    arguments: argparse.Namespace,
) -> None:
    """One line: the same training in float and quantized, seed by seed. `trained`: where fine-tuning starts."""
    floats, quantized, again = [], [], []
    for seed in arguments.seeds:
        torch.manual_seed(seed)
        model = build()
        if what == "fine-tuning":
            if seed not in trained:
                train(model, data, 0.1, arguments.epochs, seed, None)
                trained[seed] = model
            model = copy.deepcopy(trained[seed])
        epochs = arguments.epochs if what == "from scratch" else max(1, arguments.epochs // 4)
        floats.append(train(copy.deepcopy(model), data, rate, epochs, seed, None))
        if arguments.twice:
            again.append(train(nudged(model), data, rate, epochs, seed, None))
        quantized.append(train(model, data, rate, epochs, seed, RECIPE))
    lost = [one - other for one, other in zip(floats, quantized, strict=True)]
    note = ""
    if again:
        note = f", float again {figures([one - other for one, other in zip(floats, again, strict=True)])}"
    verdict = "" if arguments.quick else f"; bar 1: {'reached' if statistics.mean(lost) <= 1.0 else 'NOT reached'}"
    print(
        f"{name:17} {what:13} LR {rate:<6} float {figures(floats)}, quantized {figures(quantized)}, "
        f"lost {figures(lost)}{note}{verdict}",
        flush=True,
    )


if __name__ == "__main__":
    main()
