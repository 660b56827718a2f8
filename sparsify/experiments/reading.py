"""For each use case the reader of its data and the metrics of its outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparsify.experiments.images import read_image_folder
from sparsify.experiments.splits import SeededSplit
from sparsify.experiments.text import read_questions, read_tags, read_texts
from sparsify.experiments.yolo import read_boxes, read_outlines

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
    split = SeededSplit(seed=seed)
    if case.reads == "images":
        return read_image_folder(source, split)
    if case.reads == "boxes":
        return read_boxes(source, split=split)
    if case.reads == "masks":
        return read_outlines(source, split=split)
    if case.reads == "texts":
        return read_texts(source, split=split)
    if case.reads == "questions":
        return read_questions(source, split=split)
    return read_tags(source, case.name == "nlp-named_entity_recognition", split=split)


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
