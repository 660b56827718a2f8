"""The use cases by name, each with the model class, the metric and the defaults of training that belong to it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from sparsify.errors import ArgumentError, did_you_mean

__all__: list[str] = []

Reads = Literal["images", "boxes", "masks", "texts", "questions", "tokens"]


@dataclass(frozen=True)
class KnownUseCase:
    """One use case.

    Attributes:
        name: as it is written in folders and files.
        aliases: other names; blanks, "-", "_" and case do not count.
        reads: the form of its data.
        auto_class: the class of transformers that builds its models.
        metric: the one that runs are compared by; larger is better.
        teaches: outputs that a teacher and its student are compared by; empty where a teacher is not used unasked.
        epochs: of the run by a recipe, where none are given. These and what follows are those of an encoder of texts.
        dense_epochs: of the training before it, where the head is new.
        learning_rate: the highest, for AdamW.
        batch_size: samples of one optimizer step.
    """

    name: str
    aliases: tuple[str, ...]
    reads: Reads
    auto_class: str
    metric: str
    teaches: tuple[str, ...]
    epochs: int = 6
    dense_epochs: int = 2
    learning_rate: float = 1e-4
    batch_size: int = 32

    @property
    def is_text(self) -> bool:
        """True if its models read token ids."""
        return self.reads in ("texts", "questions", "tokens")

    @property
    def short(self) -> str:
        """The name without the field, as it stands in the names of folders: "sentiment_analysis"."""
        return _SHORT.get(self.name, self.name.split("-", 1)[1])


_LOGITS = ("logits",)
_SHORT = {
    "cv-classification": "image_classification",
    "cv-detection": "object_detection",
    "cv-segmentation": "image_segmentation",
}
_TEXT = "AutoModelForSequenceClassification"
_TOKENS = "AutoModelForTokenClassification"

USE_CASES: tuple[KnownUseCase, ...] = (
    KnownUseCase(
        "cv-classification",
        ("classification", "image-classification", "cv-image-classification", "ic"),
        "images",
        "AutoModelForImageClassification",
        "accuracy",
        _LOGITS,
        epochs=20,
        dense_epochs=10,
        learning_rate=5e-4,
    ),
    KnownUseCase(
        "cv-detection",
        ("detection", "object-detection", "cv-object-detection", "od"),
        "boxes",
        "AutoModelForObjectDetection",
        "mAP",
        (),
        epochs=50,
        dense_epochs=30,
        learning_rate=2e-4,
        batch_size=8,
    ),
    KnownUseCase(
        "cv-segmentation",
        ("segmentation", "image-segmentation", "semantic-segmentation", "cv-image-segmentation"),
        "masks",
        "AutoModelForSemanticSegmentation",
        "mIoU",
        (),
        epochs=30,
        dense_epochs=20,
        learning_rate=2e-4,
        batch_size=8,
    ),
    KnownUseCase(
        "nlp-question_answering",
        ("question-answering", "qa", "nlp-qa", "squad"),
        "questions",
        "AutoModelForQuestionAnswering",
        "f1",
        ("start_logits", "end_logits"),
    ),
    KnownUseCase(
        "nlp-text_classification",
        ("text-classification", "sequence-classification", "nlp-sequence-classification", "glue"),
        "texts",
        _TEXT,
        "accuracy",
        _LOGITS,
    ),
    KnownUseCase(
        "nlp-sentiment_analysis",
        ("sentiment-analysis", "sentiment", "sentiment-classification", "nlp-sentiment", "sst2"),
        "texts",
        _TEXT,
        "accuracy",
        _LOGITS,
    ),
    KnownUseCase(
        "nlp-token_classification",
        ("token-classification", "tagging", "pos", "pos-tagging", "part-of-speech"),
        "tokens",
        _TOKENS,
        "accuracy",
        _LOGITS,
    ),
    KnownUseCase(
        "nlp-named_entity_recognition",
        ("named-entity-recognition", "ner", "nlp-ner", "entity-recognition"),
        "tokens",
        _TOKENS,
        "f1",
        _LOGITS,
    ),
)


def use_case_named(name: object) -> KnownUseCase:
    """The use case of that name or alias; case, blanks, "-" and "_" do not count.

    Raises:
        ArgumentError: there is none; the message has the nearest names.

    >>> use_case_named("Image Classification").name, use_case_named("NER").name
    ('cv-classification', 'nlp-named_entity_recognition')
    """
    wanted = _folded(str(name))
    known = {_folded(alias): case for case in USE_CASES for alias in (case.name, *case.aliases)}
    if wanted in known:
        return known[wanted]
    names = [alias for case in USE_CASES for alias in (case.name, *case.aliases)]
    raise ArgumentError(
        f"use_case: {name!r} is none of {', '.join(case.name for case in USE_CASES)}."
        f"{did_you_mean(str(name).lower(), names)} One of your own is written package.module:UseCase."
    )


def _folded(name: str) -> str:
    return re.sub(r"[-_\s]+", "", name).lower()
