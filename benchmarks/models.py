"""The networks that the benchmarks run on, written out in plain torch so that nothing else has to be installed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["MODELS", "Encoder", "MobileNetV2", "ResNet", "mlp", "resnet18", "resnet20", "resnet50"]


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


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, the last to four times the channels: the block of ResNet-50."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        inner = channels // 4
        self.conv1 = nn.Conv2d(channels_in, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += self.shortcut(x)
        return self.relu(out)


class ResNet(nn.Module):
    """A residual network: `depths` blocks of `widths` channels, each stage but the first halving the image."""

    def __init__(
        self,
        widths: tuple[int, ...],
        depths: tuple[int, ...],
        classes: int,
        *,
        stem: str,
        channels: int = 3,
        block: Callable[[int, int, int], nn.Module] = Block,
    ) -> None:
        super().__init__()
        first = widths[0] if block is Block else widths[0] // 4
        self.conv1 = (
            nn.Conv2d(channels, first, 7, 2, 3, bias=False)
            if stem == "imagenet"
            else nn.Conv2d(channels, first, 3, 1, 1, bias=False)
        )
        self.bn1 = nn.BatchNorm2d(first)
        self.relu = nn.ReLU(inplace=True)
        self.pool1 = nn.MaxPool2d(3, 2, 1) if stem == "imagenet" else nn.Identity()
        blocks: list[nn.Module] = []
        width = first
        for stage, (channels_out, depth) in enumerate(zip(widths, depths, strict=True)):
            for index in range(depth):
                blocks.append(block(width, channels_out, 2 if stage and not index else 1))
                width = channels_out
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.pool(self.blocks(x)), 1))


class InvertedResidual(nn.Module):
    """Wide, depthwise, narrow again, with ReLU6 (Sandler 2018, https://arxiv.org/abs/1801.04381)."""

    def __init__(self, channels_in: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels_in * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [nn.Conv2d(channels_in, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(inplace=True)]
        layers += [nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(True)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.shortcut = stride == 1 and channels_in == channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.shortcut else self.layers(x)


class MobileNetV2(nn.Module):
    """`stages` of (expansion, channels, blocks, stride) between a 3x3 stem and a 1x1 head; images of 3 channels."""

    IMAGENET = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(
        self,
        stages: tuple[tuple[int, int, int, int], ...] = IMAGENET,
        *,
        stem: int = 32,
        stem_stride: int = 2,
        head: int = 1280,
        classes: int = 1000,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, stem, 3, stem_stride, 1, bias=False), nn.BatchNorm2d(stem), nn.ReLU6()]
        width = stem
        for expansion, channels, blocks, stride in stages:
            for index in range(blocks):
                layers.append(InvertedResidual(width, channels, 1 if index else stride, expansion))
                width = channels
        self.features = nn.Sequential(*layers, nn.Conv2d(width, head, 1, bias=False), nn.BatchNorm2d(head), nn.ReLU6())
        self.classifier = nn.Linear(head, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


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
        batch, length, _ = x.shape

        def split(t: Tensor) -> Tensor:
            return t.view(batch, length, self.heads, -1).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(split(self.query(x)), split(self.key(x)), split(self.value(x)))
        x = self.norm1(x + self.out(mixed.transpose(1, 2).reshape(batch, length, -1)))
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


def resnet50() -> nn.Module:
    return ResNet((256, 512, 1024, 2048), (3, 4, 6, 3), 1000, stem="imagenet", block=Bottleneck)


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
