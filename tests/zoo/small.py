"""Models for one idea each: a perceptron, tied weights, and a forward that is written where it is read."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


def perceptron(
    *sizes: int, activation: Callable[[], nn.Module] = nn.Tanh, norm: bool = False, dropout: float = 0.0, seed: int = 0
) -> nn.Sequential:
    """Linear layers of these sizes; between any two [BatchNorm,] an activation [and dropout]."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Linear(*sizes[:2])]
    for inner, outer in pairwise(sizes[1:]):
        layers += [nn.BatchNorm1d(inner)] if norm else []
        layers += [activation()]
        layers += [nn.Dropout(dropout)] if dropout else []
        layers += [nn.Linear(inner, outer)]
    return nn.Sequential(*layers)


def written(forward: Callable[..., Any], **members: Any) -> Any:
    """A model of a class of its own, with this forward and these layers, buffers and numbers as attributes.

    >>> double = written(lambda self, x: self.layer(x) * self.gain, layer=nn.Linear(3, 2), gain=2)
    >>> double(torch.zeros(5, 3)).shape
    torch.Size([5, 2])
    """
    model = type("Written", (nn.Module,), {"forward": forward})()
    for name, value in members.items():
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            model.register_buffer(name, value)
        else:
            setattr(model, name, value)
    return model


class Tied(nn.Module):
    """A head that has the weight of its embedding; between them a Linear layer that is called `calls` times."""

    def __init__(self, vocabulary: int, width: int, calls: int = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.body = nn.Linear(width, width) if calls else None
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self.calls = calls

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for _ in range(self.calls):
            x = self.body(x)  # type: ignore[misc]
        y: Tensor = self.head(x)
        return y


class Branching(nn.Module):
    """Control flow that depends on values, which no trace can follow."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x
