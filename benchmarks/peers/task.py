"""The task that all methods share: data, network, optimizer, order of batches, learning rate. Needs torch alone."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from models import ResNet

__all__ = [
    "BATCH",
    "CHANNELS_REMOVED",
    "DENSE_EPOCHS",
    "DENSE_RATE",
    "EPOCHS",
    "PRUNED_BY",
    "RATE",
    "STEPS_PER_EPOCH",
    "TRAIN_IMAGES",
    "UPDATE_EVERY",
    "Digits",
    "accuracy",
    "cubic",
    "load",
    "macs",
    "network",
    "peer",
    "pruned_layers",
    "sgd",
    "shifted",
    "timed",
    "train",
    "zeros",
]

TRAIN_IMAGES = 300
BATCH = 30
STEPS_PER_EPOCH = TRAIN_IMAGES // BATCH
DENSE_EPOCHS = 16
"""Epochs of the dense network that every method starts from."""
EPOCHS = 16
"""Epochs of every method, and of dense training that goes on beside them."""
PRUNED_BY = 10.0
"""Gradual methods reach their sparsity at this epoch."""
UPDATE_EVERY = 0.5
"""Epochs between two updates of a gradual mask."""
CHANNELS_REMOVED = (0.125, 0.3125, 0.5)
"""Fractions of every layer's channels: 16, 32 and 64 leave whole numbers, and about 1/4, 1/2 and 3/4 of the MACs go."""
DENSE_RATE, RATE = 0.1, 0.05
"""The highest learning rates of dense training and of what follows."""


Started = Callable[[torch.optim.Optimizer], None]
AfterStep = Callable[[int, torch.optim.Optimizer], torch.optim.Optimizer]


@dataclass(frozen=True)
class Digits:
    """A part of the 8 x 8 digits to train on, and all others to test with."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @classmethod
    def load(cls, seed: int) -> Digits:
        """The split of a seed; needs scikit-learn, which the environments of peers do not have."""
        from sklearn.datasets import load_digits

        data = load_digits()
        x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16.0
        y = torch.tensor(data.target)
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
        train, test = order[:TRAIN_IMAGES], order[TRAIN_IMAGES:]
        return cls(x[train], y[train], x[test], y[test])


def network() -> nn.Module:
    """ResNet-20 for images of one channel; 8 x 8 pixels become 8, 4 and 2."""
    return ResNet((16, 32, 64), (3, 3, 3), 10, stem="cifar", channels=1)


def pruned_layers(model: nn.Module) -> list[str]:
    """The convolutions after the first, 99.7 % of the weights: the first layer and the classifier stay dense."""
    return [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and name != "conv1"]


def load(folder: Path, seed: int) -> tuple[nn.Module, Digits]:
    """The dense network and the data of a seed."""
    saved = torch.load(folder / f"seed_{seed}.pt", weights_only=True)
    model = network()
    model.load_state_dict(saved["weights"])
    return model, Digits(**saved["data"])


def timed(
    model: nn.Module,
    data: Digits,
    seed: int,
    *,
    started: Started | None = None,
    after_step: AfterStep | None = None,
    finish: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """One row's training and what came of it; `finish` is called after training, before anything is measured."""
    begun = time.perf_counter()
    # Another order of batches than in dense training.
    train(model, data, 1000 + seed, EPOCHS, RATE, started=started, after_step=after_step)
    finish()
    seconds = time.perf_counter() - begun
    return {
        "accuracy": accuracy(model, data),
        "zeros": zeros(model),
        "macs": macs(model, data),
        "seconds": round(seconds, 2),
    }


def peer(work: Callable[[nn.Module, Digits, int, float], dict[str, float]]) -> None:
    """The command line of a peer's script: a folder and `seed:level` for each run; prints a line of JSON for each."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for text in sys.argv[2:]:
        seed, level = int(text.split(":")[0]), float(text.split(":")[1])
        result = work(*load(folder, seed), seed, level)
        print(json.dumps({"seed": seed, "level": level, **result}), flush=True)


def cubic(progress: float) -> float:
    return 1.0 - (1.0 - progress) ** 3


def train(
    model: nn.Module,
    data: Digits,
    seed: int,
    epochs: int,
    peak: float,
    *,
    started: Started | None = None,
    after_step: AfterStep | None = None,
) -> None:
    """SGD with Nesterov's momentum; the learning rate rises for a tenth of the steps and falls as a cosine.

    Args:
        seed: of the order of batches, and of the shift of each image by up to one pixel.
        started: called with the optimizer before the first step.
        after_step: called with how many steps are done; gives the optimizer to go on with.
    """
    optimizer: torch.optim.Optimizer = sgd(model)
    if started is not None:
        started(optimizer)
    random = torch.Generator().manual_seed(seed)
    steps = epochs * STEPS_PER_EPOCH
    done = 0
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(data.train_x), generator=random).split(BATCH):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(done, steps, peak)
            x = shifted(data.train_x[rows], random)
            optimizer.zero_grad()
            F.cross_entropy(model(x), data.train_y[rows]).backward()
            optimizer.step()
            done += 1
            if after_step is not None:
                optimizer = after_step(done, optimizer)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)


def learning_rate(done: int, steps: int, peak: float) -> float:
    rising = max(steps // 10, 1)
    if done < rising:
        return peak * (done + 1) / rising
    return peak * 0.5 * (1.0 + math.cos(math.pi * (done - rising) / (steps - rising)))


def shifted(x: Tensor, random: torch.Generator) -> Tensor:
    """Each image moved by -1, 0 or 1 pixel in both directions, zeros coming in."""
    count, _, height, width = x.shape
    padded = F.pad(x, (1, 1, 1, 1))
    down, right = torch.randint(0, 3, (2, count, 1, 1), generator=random)
    rows = down + torch.arange(height)[None, :, None]
    columns = right + torch.arange(width)[None, None, :]
    return padded[torch.arange(count)[:, None, None], :, rows, columns].movedim(-1, 1).contiguous()


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    """Percent of the test images."""
    model.eval()
    return 100.0 * float((model(data.test_x).argmax(1) == data.test_y).float().mean())


def zeros(model: nn.Module) -> float:
    """The fraction of zeros in the layers that are pruned."""
    weights = [model.get_submodule(name).weight for name in pruned_layers(model)]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


@torch.no_grad()
def macs(model: nn.Module, data: Digits) -> int:
    """Multiplications of one image in convolutions and linear layers, counted as the model runs."""
    total = 0

    def count(layer: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        total += layer.weight[0].numel() * output[0].numel() if isinstance(layer, nn.Conv2d) else layer.weight.numel()

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    try:
        model.eval()
        model(data.test_x[:1])
    finally:
        for handle in handles:
            handle.remove()
    return total
