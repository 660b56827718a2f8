"""What a model loses when one layer is compressed: from its weights alone, from data, or from gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["LossProfile"]

LEVELS = tuple(level / 100 for level in range(100))
"""Of a profile without data: 0.00, 0.01, ... 0.99."""
DATA_LEVELS = (0.0, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99)
BITS = (8, 6, 4, 3, 2)


@dataclass(frozen=True)
class LossProfile:
    """How the loss grows with compression, one layer at a time, all others as they are.

    Attributes:
        method: "magnitude" and "shape" need no data, "data" measures the loss, "fisher" estimates it from gradients.
        of: "pruning", where `levels` are sparsities, 0 first; or "quantization", where they are bits of
            the weights, most first.
        losses: by the layer's name in `ModelAnalysis`: the loss at each level. Measured losses are those of the model;
            the others start at 0 and order the layers, no more.
        base: the loss of the model as it is; 0 where it was not measured.
        samples: what was fed, 0 without data.
    """

    method: Literal["magnitude", "shape", "data", "fisher"]
    of: Literal["pruning", "quantization"]
    levels: tuple[float, ...]
    losses: Mapping[str, tuple[float, ...]]
    base: float
    samples: int
