"""For each use case the reader of its data and the metrics of its outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparsify.errors import ArgumentError

if TYPE_CHECKING:
    import numpy as np

    from sparsify.experiments.batches import BatchMaker
    from sparsify.experiments.samples import DataSet
    from sparsify.experiments.use_cases import KnownUseCase

__all__: list[str] = []


def read_data(case: KnownUseCase, source: str, seed: int) -> DataSet[Any]:
    """The data at `source` in the form that the use case reads.

    Raises:
        DataError: with file and line.
    """
    raise ArgumentError(f"data: {case.name} cannot be read yet: {source}, {seed}")


def metrics_of(
    case: KnownUseCase,
    maker: BatchMaker,
    outputs: Mapping[str, np.ndarray],
    samples: Sequence[Any],
    labels: Sequence[str],
) -> dict[str, float]:
    """Figures of quality by name; larger is better."""
    import numpy as np

    logits = next(iter(outputs.values()))
    return {"accuracy": float(np.mean(logits.argmax(-1) == np.array([s.label for s in samples])))}
