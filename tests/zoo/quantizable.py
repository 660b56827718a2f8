"""Small models that are quantized in tests, and the way there without a recipe."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    """One in-place ReLU module at two places, and `out += x`: the residual block as everybody writes it."""

    def __init__(self, channels: int = 4, bias: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class ResidualNet(nn.Module):
    """A residual network with functional ReLU and pools."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.first = ResidualBlock()
        self.second = ResidualBlock(bias=True)
        self.fc = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn(self.stem(x))), 2)
        x = F.adaptive_avg_pool2d(self.second(self.first(x)), 1)
        return self.fc(torch.flatten(x, 1))


class InvertedResidual(nn.Module):
    """MobileNetV2's block: ReLU6, depthwise, and an add without a ReLU behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True))
        self.depthwise = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True)
        )
        self.project = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.again = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(self.depthwise(self.expand(x)))
        x = x + self.again(x)
        return self.head(x.mean((2, 3)))


class NormAct(nn.BatchNorm2d):
    """BatchNorm, dropout and an activation in one forward, as timm has it."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        training = self.training or self.running_mean is None
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training, 0.1, self.eps)
        return self.act(self.drop(x))


class Shortcut(nn.Module):
    """A stem with or without BatchNorm, a way around two convolutions, and a head on what is pooled."""

    def __init__(self, width: int, inner: int, inputs: int = 3, classes: int = 10, norm: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(inputs, width, 3, padding=1, bias=not norm)
        if norm:
            self.norm = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, inner, 3, padding=1)
        self.conv2 = nn.Conv2d(inner, width, 3, padding=1)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.norm(x) if hasattr(self, "norm") else x)
        x = F.relu(x + self.conv2(F.relu(self.conv1(x))))
        return self.head(x.mean((2, 3)))


class SqueezeExciteNet(nn.Module):
    """EfficientNet's block: SiLU inside the BatchNorm, squeeze-and-excitation, an add of a BatchNorm's output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn0 = NormAct(4, nn.ReLU(inplace=True))
        self.expand = nn.Conv2d(4, 8, 1, bias=False)
        self.bn1 = NormAct(8, nn.SiLU(inplace=True))
        self.reduce = nn.Conv2d(8, 2, 1)
        self.act = nn.Hardswish()
        self.excite = nn.Conv2d(2, 8, 1)
        self.project = nn.Conv2d(8, 4, 1, bias=False)
        self.bn2 = NormAct(4, nn.Identity())
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn0(self.stem(x))
        y = self.bn1(self.expand(x))
        gate = self.excite(self.act(self.reduce(y.mean((2, 3), keepdim=True))))
        y = y * torch.sigmoid(gate)
        x = x + self.bn2(self.project(y))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class SamePadded(nn.Conv2d):
    """A convolution that pads its input as TensorFlow does: timm's Conv2dSame."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class PlainLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, bias=self.bias)


class Conv1D(nn.Module):
    """transformers' layer of this name, which GPT-2 is made of: a Linear whose weight is (in, out)."""

    def __init__(self, outer: int, inner: int) -> None:
        super().__init__()
        self.outer = outer
        self.weight = nn.Parameter(torch.randn(inner, outer) * 0.3)
        self.bias = nn.Parameter(torch.randn(outer))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.outer)


class Subclassed(nn.Module):
    """Layers of users' own classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = SamePadded(3, 4, 2, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.mix = Conv1D(6, 4)
        self.head = PlainLinear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x))).flatten(2).transpose(1, 2)
        return self.head(torch.tanh(self.mix(x)))


class GptBlock(nn.Module):
    """A Linear with 70 inputs, which no block divides, one of three dimensions, and transformers' transposed layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(70, 64)
        self.norm = nn.LayerNorm(64)
        self.turned = Conv1D(48, 64)
        self.head = nn.Linear(48, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.turned(self.norm(self.inner(x)))))


class BertLayer(nn.Module):
    """One encoder layer in the manner of BERT, on token ids."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(20, width, padding_idx=0)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm1(self.embed(ids))
        batch, length, width = x.shape

        def split(t: Tensor) -> Tensor:
            return t.view(batch, length, self.heads, -1).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(split(self.query(x)), split(self.key(x)), split(self.value(x)))
        x = self.norm2(x + self.out(mixed.transpose(1, 2).reshape(batch, length, width)))
        return x + self.down(F.gelu(self.up(x)))


class Up(nn.Module):
    """Transposed and one-dimensional convolutions, a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.right = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.line = nn.Conv1d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.up(torch.cat([self.left(x), self.right(x)], 1)))
        return self.line(F.relu(x).flatten(2))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    )


def images(size: int = 4) -> Tensor:
    return torch.randn(size, 3, 12, 12)


class DenseLayer(nn.Module):
    """BatchNorm and ReLU before the convolution, on all that came before."""

    def __init__(self, width: int, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.conv = norm, nn.Conv2d(width, 3, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.norm(torch.cat(features, 1))
        return self.conv(x if isinstance(self.norm, NormAct) else F.relu(x))


class DenseBlock(nn.ModuleDict):
    """DenseNet's: a container, in which no quantizer can stand."""

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.block = DenseBlock(
            {"one": DenseLayer(4, nn.BatchNorm2d(4, affine=False)), "two": DenseLayer(7, NormAct(7, nn.ReLU()))}
        )
        self.norm = nn.BatchNorm2d(10)
        self.fc = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.block(F.max_pool2d(self.stem(x), 2))).mean((2, 3)))


class PyramidDetector(nn.Module):
    """Heads that are called on every level of a pyramid: their layers read what different layers give."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.down = nn.ModuleList(nn.Sequential(nn.Conv2d(6, 6, 3, 2, 1), nn.ReLU()) for _ in range(2))
        self.lateral = nn.ModuleList(nn.Conv2d(6, 4, 1) for _ in range(3))
        self.boxes = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.kinds = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        levels = [self.stem(x)]
        for down in self.down:
            levels.append(down(levels[-1]))
        levels = [lateral(level) for lateral, level in zip(self.lateral, levels, strict=True)]
        boxes = [self.boxes(level).flatten(2) for level in levels]
        kinds = [self.kinds(level).flatten(2) for level in levels]
        return torch.cat([torch.cat(boxes, 2), torch.cat(kinds, 2)], 1)


ZOO: dict[str, tuple[Any, Any]] = {
    "residual": (ResidualNet, images),
    "inverted": (InvertedResidual, images),
    "gated": (SqueezeExciteNet, images),
    "subclassed": (Subclassed, images),
    "attention": (BertLayer, lambda: torch.randint(0, 20, (3, 7))),
    "up": (Up, images),
    "dense": (DenseNet, images),
    "detector": (PyramidDetector, images),
    "mlp": (mlp, lambda: torch.randn(16, 6)),
}
"""Name -> (constructor, one batch)."""
