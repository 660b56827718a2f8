"""The networks that the benchmarks run on, written out in plain torch so that nothing else has to be installed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["MODELS", "Encoder", "ResNet", "mlp", "resnet18", "resnet20"]


class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut (He 2016, https://arxiv.org/abs/1512.03385)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu(out)


class ResNet(nn.Module):
    """A residual network: `depths` blocks of `widths` channels, each stage but the first halving the image."""

    def __init__(
        self, widths: tuple[int, ...], depths: tuple[int, ...], classes: int, *, stem: str, channels: int = 3
    ) -> None:
        super().__init__()
        self.conv1 = (
            nn.Conv2d(channels, widths[0], 7, 2, 3, bias=False)
            if stem == "imagenet"
            else nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        )
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.pool1 = nn.MaxPool2d(3, 2, 1) if stem == "imagenet" else nn.Identity()
        blocks: list[nn.Module] = []
        width = widths[0]
        for stage, (channels_out, depth) in enumerate(zip(widths, depths, strict=True)):
            for index in range(depth):
                blocks.append(Block(width, channels_out, 2 if stage and not index else 1))
                width = channels_out
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.pool(self.blocks(x)), 1))


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each with its residual and LayerNorm, in the manner of BERT."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape

        def split(t: Tensor) -> Tensor:
            return t.view(batch, length, self.heads, width // self.heads).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(split(self.query(x)), split(self.key(x)), split(self.value(x)))
        x = self.norm1(x + self.out(mixed.transpose(1, 2).reshape(batch, length, width)))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class Encoder(nn.Module):
    """Token ids (batch, length) -> logits (batch, classes), through `layers` encoder layers."""

    def __init__(
        self, width: int = 256, layers: int = 4, heads: int = 4, vocabulary: int = 1000, classes: int = 10
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(1, 512, width) * 0.02)
        self.layers = nn.Sequential(*(EncoderLayer(width, heads) for _ in range(layers)))
        self.head = nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position[:, : ids.shape[1]]
        return self.head(self.layers(x).mean(dim=1))


def resnet18() -> nn.Module:
    return ResNet((64, 128, 256, 512), (2, 2, 2, 2), 1000, stem="imagenet")


def resnet20() -> nn.Module:
    return ResNet((16, 32, 64), (3, 3, 3), 10, stem="cifar")


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], int]] = {
    "ResNet-18 (batch 8, 224 px)": (resnet18, lambda: torch.randn(8, 3, 224, 224), 1000),
    "ResNet-20 (batch 32, 32 px)": (resnet20, lambda: torch.randn(32, 3, 32, 32), 10),
    "encoder 4 x 256 (batch 8, 128 tokens)": (Encoder, lambda: torch.randint(0, 1000, (8, 128)), 10),
    "MLP 784-1024-1024-10 (batch 64)": (mlp, lambda: torch.randn(64, 784), 10),
}
"""Name -> (constructor, one batch of inputs, number of classes)."""
