"""Networks with blocks that are called several times in one forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.quantizable import ResidualBlock


def conv_bn(channels_in: int, channels: int, stride: int = 1) -> nn.Sequential:
    """A convolution, its BatchNorm, and a ReLU."""
    conv = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


class Backbone(nn.Module):
    """A residual block and a squeeze-and-excitation between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.residual, self.last = conv_bn(3, 4), ResidualBlock(4), conv_bn(4, 4, 2)
        self.reduce, self.excite = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.residual(self.stem(x))
        gate = torch.sigmoid(self.excite(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))
        return self.last(x * gate)


class Siamese(nn.Module):
    """One backbone for two images, compared by what follows."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.mix, self.head = Backbone(), conv_bn(8, 4), nn.Linear(4, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        both = torch.cat([self.backbone(left), self.backbone(right)], 1)
        return self.head(self.mix(both).mean((2, 3)))


class Recurrent(nn.Module):
    """One residual block again and again, on what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = conv_bn(3, 4), ResidualBlock(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = self.block(x)
        return self.head(x.mean((2, 3)))


class SharedTower(nn.Module):
    """The towers of a detector: on every level the same convolutions, with BatchNorms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.tower = conv_bn(3, 4), conv_bn(4, 4, 2), nn.Sequential(conv_bn(4, 4), conv_bn(4, 4))
        self.boxes, self.kinds = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        first = self.stem(x)
        towers = [self.tower(level) for level in (first, self.down(first))]
        return [head(tower) for tower in towers for head in (self.boxes, self.kinds)]


class SharedNorm(nn.Module):
    """One BatchNorm behind two convolutions, and before one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn, self.conv = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(2):
            x = x + self.conv(F.relu(self.bn(x)))
        return self.head(x.mean((2, 3)))
