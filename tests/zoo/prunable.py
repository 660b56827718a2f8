"""Small models with whole channels to cut, and how they are trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.pruning.group_masks import deletion_masks
from sparsify.pruning.groups import ChannelGroups


class Residual(nn.Module):
    """Convolutions with a way around two of them: conv1 and conv3 give one channel group, conv2 another."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 10, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(10)
        self.conv3 = nn.Conv2d(10, width, 1)
        self.bn3 = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = (x + self.bn3(self.conv3(self.bn2(self.conv2(x)).sigmoid()))).relu()
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


class HeadsByHand(nn.Module):
    """Hand-written attention of several heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        layers = (self.query, self.key, self.value)
        q, k, v = (layer(x).view(n, length, self.heads, self.head_dim).transpose(1, 2) for layer in layers)
        seen = (q @ k.transpose(2, 3) / self.head_dim**0.5).softmax(3) @ v
        out: Tensor = self.out(seen.transpose(1, 2).flatten(2))
        return out


class Encoder(nn.Module):
    """One block of a transformer: four heads, and 24 columns in between."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 32)
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.attention = HeadsByHand(32, 4)
        self.up, self.down = nn.Linear(32, 24), nn.Linear(24, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attention(self.norm1(x))
        x = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        out: Tensor = self.head(x.mean(1))
        return out


SHAPES = {Residual: (2, 5, 5), Encoder: (3, 6)}
FAMILIES = {
    Residual: {"conv1.weight": 12, "conv2.weight": 10},
    Encoder: {"attention.query.weight": 4, "up.weight": 24},
}
"""The channel groups that are there to be cut, and how many channels each has."""


def made(kind: type[nn.Module], seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A model with norm parameters that are not just ones and zeros."""
    torch.manual_seed(seed)
    model = kind()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
    return model.to(dtype)


def batch(kind: type[nn.Module], number: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1000 + number)
    # A quantized model's class is derived from its own.
    shape = next(shape for known, shape in SHAPES.items() if issubclass(kind, known))
    x = torch.randn(8, *shape, generator=draw)
    return x.to(dtype), torch.randint(0, 4, (8,), generator=draw)


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def step(
    model: nn.Module,
    optimizer: Any,
    number: int,
    dtype: torch.dtype = torch.float32,
    update: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> float:
    """One step of training; the loss before it."""
    inner: Any = model
    x, y = batch(type(inner), number, dtype)
    model.train()
    optimizer.zero_grad()
    loss = update(nn.functional.cross_entropy(model(x), y))
    loss.backward()
    optimizer.step()
    return float(loss.detach())


# float64 for `made_in_double`.
IMAGES = torch.randn(6, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

WORDS = torch.randn(5, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def made_in_double(kind: type[nn.Module] = Residual) -> tuple[nn.Module, Tensor]:
    """A model in float64 and a batch for it."""
    torch.manual_seed(0)
    return kind().double(), IMAGES if kind is Residual else WORDS


def every_second(channel_groups: ChannelGroups) -> dict[str, list[int]]:
    """Half of the channels of every channel group."""
    return {name: list(range(0, channel_group.size, 2)) for name, channel_group in channel_groups.groups.items()}


def mask_channels_(model: nn.Module, channel_groups: ChannelGroups, pruned: dict[str, list[int]]) -> None:
    """Writes zeros into all that belongs to these channels."""
    with torch.no_grad():
        for name, mask in deletion_masks(model, channel_groups, pruned).items():
            dict(model.named_parameters(remove_duplicate=False))[name].mul_(mask)
