"""Samples of the eight use cases as values, and the data set that they make up.

A sample knows the file and line that it was read from, so that whatever is wrong with it can be said as
"file:line: what is wrong". Labels are positions in `DataSet.labels`. Images are read when a batch needs them; a sample
holds their path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, TypeVar

from sparsify.errors import DataError

__all__: list[str] = []


@dataclass(frozen=True)
class Sample:
    """The place that a sample comes from, which every kind of sample has.

    Args:
        file: the file that says its label: the image itself in a folder for each class, the .txt file of a YOLO image,
            the file of texts.
        line: line of `file` on which it begins, from 1; 0 where it is the file as a whole.
    """

    file: Path
    line: int

    @property
    def where(self) -> str:
        """The place of an error: "file:line", or "file" where the sample is all of it."""
        return f"{self.file}:{self.line}" if self.line else str(self.file)


@dataclass(frozen=True)
class LabelledImage(Sample):
    """An image of one class.

    Args:
        image: path of the image.
        label: its class.
    """

    image: Path
    label: int


@dataclass(frozen=True)
class Box:
    """An object in an image: all in fractions of the image's width and height, 0 to 1.

    Args:
        label: its class.
        x: centre, from the left.
        y: centre, from the top.
        width: of the box, over 0.
        height: of the box, over 0.
    """

    label: int
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class BoxedImage(Sample):
    """An image and the boxes of its objects; none for a background image.

    Args:
        image: path of the image.
        width: of the image in pixels, as it is shown (after the rotation that its EXIF data ask for).
        height: of the image in pixels.
        boxes: its objects, in the order of the file.
    """

    image: Path
    width: int
    height: int
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Outline:
    """A region of an image as a polygon.

    Args:
        label: its class; 0 is the background, so a region has 1 or more.
        points: at least 3 corners (x, y), in fractions of the image's width and height.
    """

    label: int
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class OutlinedImage(Sample):
    """An image and the polygons of its regions; where two overlap, the later one holds.

    Args:
        image: path of the image.
        width: of the image in pixels, as it is shown.
        height: of the image in pixels.
        outlines: its regions, in the order of the file.
    """

    image: Path
    width: int
    height: int
    outlines: tuple[Outline, ...]


@dataclass(frozen=True)
class LabelledText(Sample):
    """A text of one class, or a pair of texts (premise and hypothesis, question and sentence).

    Args:
        text: the text, or the first of the pair.
        second: the second of the pair; None where there is one text.
        label: its class.
    """

    text: str
    second: str | None
    label: int


@dataclass(frozen=True)
class TaggedWords(Sample):
    """A sentence, word by word, with a tag for each.

    Args:
        words: at least one.
        tags: as many as there are words.
    """

    words: tuple[str, ...]
    tags: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """A span of a context: `context[start : start + len(text)] == text`.

    Args:
        text: the answer.
        start: its first character in the context.
    """

    text: str
    start: int


@dataclass(frozen=True)
class AskedQuestion(Sample):
    """A question about a context, with the answers that count as right; none where the context does not answer it.

    Args:
        key: its id, unique in the data set.
        question: the question.
        context: the text that the answer is a part of.
        answers: the right answers.
    """

    key: str
    question: str
    context: str
    answers: tuple[Answer, ...]


S = TypeVar("S", bound=Sample)


@dataclass(frozen=True)
class DataSet(Generic[S]):
    """All that was read: the samples to train with, those to measure with, and what the labels mean.

    Args:
        train: samples to train with, at least one, in the order of the files.
        val: samples to measure with, at least one; none of them is in `train`.
        labels: names of the classes; a sample's label is a position in it. "background" is the first in segmentation,
            and there are none in question answering.
        fingerprint: SHA-256 over names and contents of the files, in hexadecimal: two runs with one fingerprint saw the
            same data.
        files: the files that were read, sorted; images among them.
        split: where `val` comes from, in one line: "given: val/" or "seeded: 10 % of 1797, seed 0".
        notes: what the reader decided that its user should know, each one line; empty where all was plain.
    """

    train: Sequence[S]
    val: Sequence[S]
    labels: tuple[str, ...]
    fingerprint: str
    files: tuple[Path, ...]
    split: str
    notes: tuple[str, ...] = field(default=())

    def limited(self, train: int | None, val: int | None) -> DataSet[S]:
        """The same with at most `train` and `val` samples (None: all), taken evenly over the whole, in their order.

        The fingerprint stays: it is that of the data.
        """
        return replace(self, train=_evenly(self.train, train), val=_evenly(self.val, val))


def _evenly(samples: Sequence[S], count: int | None) -> Sequence[S]:
    if count is None or count >= len(samples):
        return samples
    if count < 1:
        raise DataError(f"{count} samples were asked for; at least 1 is needed.")
    return [samples[i * len(samples) // count] for i in range(count)]
