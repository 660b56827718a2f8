"""For each use case the reader of its data and the metrics of its outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparsify.errors import ArgumentError
from sparsify.experiments.batches import ImageBatches, TextBatches
from sparsify.experiments.hub_data import data_at
from sparsify.experiments.images import read_image_folder
from sparsify.experiments.scoring import box_scores, class_scores, question_scores, region_scores, tag_scores
from sparsify.experiments.splits import SeededSplit
from sparsify.experiments.text import read_questions, read_tags, read_texts
from sparsify.experiments.yolo import MissingLabels, read_boxes, read_outlines

if TYPE_CHECKING:
    import numpy as np

    from sparsify.experiments.batches import BatchMaker
    from sparsify.experiments.samples import DataSet
    from sparsify.experiments.settings import ExperimentSettings
    from sparsify.experiments.use_cases import KnownUseCase

__all__: list[str] = []


def read_data(case: KnownUseCase, settings: ExperimentSettings) -> DataSet[Any]:
    """The data of a run, in the form that its use case reads.

    Raises:
        DataError: with file and line.
        ArgumentError: no data are named, or columns of data that have none.
    """
    if not settings.data:
        raise ArgumentError("data: there is none; give a folder or a file.")
    if settings.columns and not case.is_text:
        raise ArgumentError(f"columns: the data of {case.name} have none.")
    source, split = data_at(settings.data, settings.offline), SeededSplit(seed=settings.seed)
    missing: MissingLabels = "background" if settings.missing_labels == "background" else "error"
    if case.reads == "images":
        return read_image_folder(source, split)
    if case.reads == "boxes":
        return read_boxes(source, missing, split)
    if case.reads == "masks":
        return read_outlines(source, missing, split)
    if case.reads == "texts":
        return read_texts(source, settings.columns, split)
    if case.reads == "questions":
        return read_questions(source, settings.columns, split)
    return read_tags(source, case.name == "nlp-named_entity_recognition", settings.columns, split)


def metrics_of(
    case: KnownUseCase,
    maker: BatchMaker,
    outputs: Mapping[str, np.ndarray],
    samples: Sequence[Any],
    labels: Sequence[str],
) -> dict[str, float]:
    """Figures of quality by name; larger is better.

    Args:
        case: the use case.
        maker: made the batches that the outputs are of.
        outputs: by name, all samples along axis 0.
        samples: in the same order.
        labels: names of the classes.
    """
    if case.reads in ("images", "texts"):
        return class_scores(outputs, samples, len(labels))
    if case.reads == "boxes":
        return box_scores(outputs, samples, len(labels))
    if isinstance(maker, ImageBatches):
        return region_scores(outputs, samples, maker.regions, len(labels))
    assert isinstance(maker, TextBatches)
    if case.reads == "questions":
        return question_scores(outputs, samples, maker.spans)
    return tag_scores(outputs, samples, maker.word_ids, labels, case.name == "nlp-named_entity_recognition")
