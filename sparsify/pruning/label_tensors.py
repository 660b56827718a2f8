"""Label tensors: for every element of a tensor the id of the channel that it is removed with; 0 for never.

A label tensor has stride 0 along the dimensions on which the label does not depend, so one for (N, C, H, W) may cost C
numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__: list[str] = []


def core(labels: Tensor) -> Tensor:
    """`labels` with size 1 along the dimensions on which they do not depend.

    >>> core(torch.tensor([[1], [2]]).expand(2, 500)).shape
    torch.Size([2, 1])
    """
    for dim, (size, stride) in enumerate(zip(labels.shape, labels.stride(), strict=True)):
        if size > 1 and stride == 0:
            labels = labels.narrow(dim, 0, 1)
    return labels


def thin(labels: Tensor) -> Tensor:
    """The same labels, with stride 0 along every dimension on which they do not depend."""
    inner = core(labels)
    for dim, size in enumerate(inner.shape):
        if size > 1:
            first = inner.narrow(dim, 0, 1)
            if (inner == first).all():
                inner = first
    return inner.expand(labels.shape)


def varying(labels: Tensor) -> list[int]:
    """The dimensions on which the labels depend."""
    return [dim for dim, size in enumerate(core(labels).shape) if size > 1]


def never(shape: Sequence[int]) -> Tensor:
    """Labels of what is never removed."""
    return torch.zeros((1,) * len(shape), dtype=torch.int64).expand(tuple(shape))


def along(vector: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """Labels of a tensor of `shape` that depend on `dim` alone, as `vector` says."""
    view = [1] * len(shape)
    view[dim] = -1
    return vector.reshape(view).expand(tuple(shape))


def reshaped(labels: Tensor, shape: Sequence[int]) -> Tensor:
    """`labels` in another shape; only the dimensions that change together and vary are written out.

    >>> reshaped(torch.tensor([1, 2]).view(1, 2, 1).expand(9, 2, 9), (9, 18)).stride()
    (0, 1)
    """
    inner = core(labels)
    sizes_in, sizes_out = [], []
    for before, after in _matching_dims(labels.shape, shape):
        constant = all(inner.shape[dim] == 1 for dim in before)
        sizes_in += [inner.shape[dim] if constant else labels.shape[dim] for dim in before]
        sizes_out += [1 if constant else shape[dim] for dim in after]
    return thin(inner.expand(sizes_in).reshape(sizes_out)).expand(tuple(shape))


def _matching_dims(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Pairs of dimensions of two shapes of one size that belong together: the shortest runs with equal products."""
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = ([i], []) if i < len(before) else ([], [j])
        a, b = (before[i], 1) if left else (1, after[j])
        i, j = i + len(left), j + len(right)
        while a != b:
            if a < b:
                a, left, i = a * before[i], [*left, i], i + 1
            else:
                b, right, j = b * after[j], [*right, j], j + 1
        found.append((left, right))
    return found
