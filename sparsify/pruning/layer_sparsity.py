"""One sparsity over several layers -> a sparsity for each of them, by their shapes. Pure floats, no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

__all__: list[str] = []

Strategy = Literal["erdos_renyi_kernel", "erdos_renyi", "uniform"]


def spread(shapes: Mapping[str, Sequence[int]], sparsity: float, strategy: Strategy) -> dict[str, float]:
    """The sparsity of each layer, such that the share of zeros over all of them is `sparsity`.

    erdos_renyi: the density of a layer is proportional to (inputs + outputs) / (inputs * outputs) (Mocanu 2018,
    https://arxiv.org/abs/1707.04780). erdos_renyi_kernel: the same with the kernel's sizes, (sum of all sizes) /
    (product of all sizes) (Evci 2020, https://arxiv.org/abs/1911.11134, section 3). A layer that would need more than
    all of its weights is dense, and the others share what is left. uniform: the same for every layer; what differs from
    the paper is that the first layer is no exception: leave it out of `params` to keep it dense.

    Args:
        shapes: the sizes of each weight, output and input channels first.
        sparsity: the fraction of zeros over all layers, 0 to 1.
        strategy: one of the three above.

    >>> shapes = {"a": (16, 3, 3, 3), "b": (32, 16, 3, 3), "c": (10, 32)}
    >>> {name: round(s, 6) for name, s in spread(shapes, 0.9, "erdos_renyi_kernel").items()}
    {'a': 0.743649, 'b': 0.948089, 'c': 0.418595}
    """
    if strategy == "uniform":
        return dict.fromkeys(shapes, sparsity)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    counted = {name: shape if strategy == "erdos_renyi_kernel" else shape[:2] for name, shape in shapes.items()}
    raw = {name: sum(shape) / math.prod(shape) for name, shape in counted.items()}
    kept = (1.0 - sparsity) * sum(sizes.values())
    dense: set[str] = set()
    while True:
        others = [name for name in shapes if name not in dense]
        weight = sum(raw[name] * sizes[name] for name in others)
        scale = (kept - sum(sizes[name] for name in dense)) / weight if others else 0.0
        full = {name for name in others if scale * raw[name] >= 1.0}
        if not full:
            return {name: 0.0 if name in dense else 1.0 - scale * raw[name] for name in shapes}
        dense |= full
