"""Samples as tensors: images at one size, normalized as their model wants; texts as token ids of one length.

Sizes are fixed, since an exported file has them: an image is resized to the size whatever its sides were, a text is cut
or padded to the length.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sparsify.errors import DataError, first_line
from sparsify.experiments.images import decoded
from sparsify.experiments.samples import AskedQuestion, BoxedImage, LabelledText, OutlinedImage, TaggedWords
from sparsify.experiments.tasks import TaskBatch

if TYPE_CHECKING:
    from torch import Tensor

__all__: list[str] = []

IGNORED = -100
"""The label that losses of torch pass over."""
HALF = (0.5, 0.5, 0.5)
SIDE = 224
"""Side of an image, where nothing is known of the model."""


@dataclass(frozen=True)
class ImagePreprocessing:
    """Way from an image to the tensor that a model reads: resized, divided by 255, then (x - mean) / std.

    Attributes:
        height, width: in pixels.
        mean, std: of each channel.
        resample: as pillow numbers its filters: 2 bilinear, 3 bicubic.
    """

    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int = 2

    @classmethod
    def of(cls, folder: str | None, config: Any, size: tuple[int, int] | None) -> ImagePreprocessing:
        """By `preprocessor_config.json` in a model's folder, the model's config, and the size that was asked for.

        Args:
            folder: of the model; None, or a hub id: its file is looked for in the hub's cache.
            config: of the model; None where it has none.
            size: (height, width); None: as the model says, else 224.
        """
        found = _preprocessor_of(folder)
        if size is None:
            size = (
                _size_of(found.get("crop_size")) or _size_of(found.get("size")) or _config_size(config) or (SIDE, SIDE)
            )
        normalizes = found.get("do_normalize", True)
        mean = tuple(float(value) for value in found.get("image_mean") or HALF) if normalizes else (0.0,) * 3
        std = tuple(float(value) for value in found.get("image_std") or HALF) if normalizes else (1.0,) * 3
        return cls(*size, mean, std, int(found.get("resample") or 2))

    def array(self, path: Path) -> np.ndarray:
        """An image as float32 (3, height, width).

        Raises:
            DataError: it cannot be read.
        """
        image = decoded(path).resize((self.width, self.height), self.resample)
        values = np.asarray(image, np.float32) / 255.0
        found: np.ndarray = (values - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(found.transpose(2, 0, 1))


class BatchMaker(ABC):
    """Makes batches of the samples of one use case."""

    @abstractmethod
    def __call__(self, samples: Sequence[Any]) -> TaskBatch:
        """The samples as tensors."""

    def short(self, samples: Sequence[Any]) -> TaskBatch:
        """The samples as tensors for one step of training: without padding that none of them needs."""
        return self(samples)

    def length(self, sample: Any) -> int:
        """The size by which samples are put together for training; one where all take the same time."""
        return 1


class ImageBatches(BatchMaker):
    """Batches of images with classes, boxes or regions.

    Args:
        preprocessing: of each image.
        name: of the parameter of the model's forward.
    """

    def __init__(self, preprocessing: ImagePreprocessing, name: str = "pixel_values") -> None:
        self.preprocessing, self._name = preprocessing, name
        # Small images are read from disk once, not once an epoch.
        per_image = 12 * preprocessing.height * preprocessing.width
        self._array = lru_cache(maxsize=max(1, (512 << 20) // per_image))(preprocessing.array)

    def __call__(self, samples: Sequence[Any]) -> TaskBatch:
        pixels = torch.from_numpy(np.stack([self._array(sample.image) for sample in samples]))
        if isinstance(samples[0], BoxedImage):
            targets: Any = [_boxes(sample) for sample in samples]
        elif isinstance(samples[0], OutlinedImage):
            targets = torch.from_numpy(np.stack([self.regions(sample) for sample in samples]))
        else:
            targets = torch.tensor([sample.label for sample in samples])
        return TaskBatch({self._name: pixels}, {"labels": targets}, samples)

    def regions(self, sample: OutlinedImage) -> np.ndarray:
        """The class of every pixel, int64 (height, width); 0 is the background, and the later region wins."""
        from PIL import Image, ImageDraw

        height, width = self.preprocessing.height, self.preprocessing.width
        drawn = Image.new("I", (width, height), 0)
        pen = ImageDraw.Draw(drawn)
        for outline in sample.outlines:
            pen.polygon([(x * width - 0.5, y * height - 0.5) for x, y in outline.points], fill=outline.label)
        return np.asarray(drawn).astype(np.int64)


def _boxes(sample: BoxedImage) -> dict[str, Tensor]:
    boxes = [[box.x, box.y, box.width, box.height] for box in sample.boxes]
    return {
        "class_labels": torch.tensor([box.label for box in sample.boxes], dtype=torch.long),
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
    }


class TextBatches(BatchMaker):
    """Batches of texts, pairs of texts, tagged words, or questions with their contexts.

    Args:
        tokenizer: of transformers, a fast one.
        max_length: tokens of each sample; longer ones are cut, shorter ones padded.
        names: of the parameters of the model's forward.
    """

    def __init__(self, tokenizer: Any, max_length: int, names: Sequence[str]) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self._names = names
        self._memory: dict[int, tuple[Any, dict[str, list[int]], dict[str, Any]]] = {}

    def __call__(self, samples: Sequence[Any]) -> TaskBatch:
        rows = [self._row(sample) for sample in samples]
        inputs = {name: torch.tensor([row[0][name] for row in rows]) for name in rows[0][0]}
        targets = {name: torch.tensor([row[1][name] for row in rows]) for name in rows[0][1]}
        return TaskBatch(inputs, targets, samples)

    def length(self, sample: Any) -> int:
        """Tokens of a sample that are no padding, at most `max_length`."""
        mask = self._row(sample)[0].get("attention_mask")
        return self.max_length if mask is None else sum(mask)

    def short(self, samples: Sequence[Any]) -> TaskBatch:
        """The samples as tensors that are as long as the longest of them, in multiples of 8: what is cut is padding.

        Where the model has no mask of attention, or the tokenizer pads at the left, all have `max_length`.
        """
        batch = self(samples)
        if self.tokenizer.padding_side != "right" or "attention_mask" not in batch.inputs:
            return batch
        longest = max(map(self.length, samples))
        length = min(self.max_length, -(-longest // 8) * 8)

        def cut(value: Tensor) -> Tensor:
            return value[:, :length] if value.dim() > 1 and value.shape[1] == self.max_length else value

        inputs, targets = ({name: cut(value) for name, value in part.items()} for part in (batch.inputs, batch.targets))
        return TaskBatch(inputs, targets, samples)

    def encoded(self, sample: Any, **options: Any) -> Any:
        """A sample as the tokenizer gives it, cut and padded.

        Raises:
            DataError: it cannot be cut: its question alone is too long.
        """
        try:
            return self._encoded(sample, **options)
        except Exception as error:  # tokenizers raise a bare Exception
            raise DataError(
                f"{sample.where}: cannot be cut to {self.max_length} tokens: {first_line(error)}"
            ) from error

    def is_cut(self, sample: Any) -> bool:
        """True if a sample has more tokens than fit in."""
        return bool(self.encoded(sample).encodings[0].overflowing)

    def loses_answer(self, sample: Any) -> bool:
        """True if the first answer to a question lies, if only in part, where the context is cut off."""
        return isinstance(sample, AskedQuestion) and bool(sample.answers) and not self._row(sample)[1]["end_positions"]

    def _encoded(self, sample: Any, **options: Any) -> Any:
        common = {"padding": "max_length", "max_length": self.max_length, **options}
        if isinstance(sample, AskedQuestion):
            return self.tokenizer(sample.question, sample.context, truncation="only_second", **common)
        if isinstance(sample, TaggedWords):
            return self.tokenizer(list(sample.words), is_split_into_words=True, truncation=True, **common)
        return self.tokenizer(sample.text, sample.second, truncation=True, **common)

    def word_ids(self, sample: TaggedWords) -> Sequence[int | None]:
        """The word of each token; None of one that is of no word."""
        found: Sequence[int | None] = self.encoded(sample).word_ids()
        return found

    def spans(self, sample: AskedQuestion) -> list[tuple[int, int] | None]:
        """First character of each token in the context, and the one behind its last; None of others."""
        found = self.encoded(sample, return_offsets_mapping=True)
        pairs = zip(found.sequence_ids(0), found["offset_mapping"], strict=True)
        return [(int(left), int(right)) if side == 1 else None for side, (left, right) in pairs]

    def _row(self, sample: Any) -> tuple[dict[str, list[int]], dict[str, Any]]:
        known = self._memory.get(id(sample))
        if known is None:
            found = self.encoded(sample, return_offsets_mapping=isinstance(sample, AskedQuestion))
            inputs = {name: list(found[name]) for name in self._names if name in found}
            # The sample is kept with it: its id is not given to another one.
            known = self._memory[id(sample)] = (sample, inputs, _text_targets(sample, found))
        return known[1], known[2]


def _text_targets(sample: Any, found: Any) -> dict[str, Any]:
    if isinstance(sample, LabelledText):
        return {"labels": sample.label}
    if isinstance(sample, TaggedWords):
        before, tags = None, []
        for word in found.word_ids():
            # A word counts once, at its first piece.
            tags.append(IGNORED if word is None or word == before else sample.tags[word])
            before = word
        return {"labels": tags}
    start, end = _answer_tokens(sample, found)
    return {"start_positions": start, "end_positions": end}


def _answer_tokens(sample: AskedQuestion, found: Any) -> tuple[int, int]:
    """The first and last token of the first answer; (0, 0), the token that begins all, where there is none or it is cut
    off."""
    if not sample.answers:
        return 0, 0
    answer = sample.answers[0]
    sequence, offsets = found.sequence_ids(0), found["offset_mapping"]
    inside = [
        number
        for number, (side, (left, right)) in enumerate(zip(sequence, offsets, strict=True))
        if side == 1 and right > answer.start and left < answer.start + len(answer.text)
    ]
    last = max((right for side, (_, right) in zip(sequence, offsets, strict=True) if side == 1), default=0)
    if not inside or last < answer.start + len(answer.text):
        return 0, 0
    return inside[0], inside[-1]


def text_length(tokenizer: Any, samples: Sequence[Any], most: int) -> int:
    """A length that 99 of 100 of the first 2,000 samples fit into, as a multiple of 8, at most `most`."""
    batches = TextBatches(tokenizer, most, ())
    lengths = sorted(len(batches.encoded(sample, padding=False)["input_ids"]) for sample in samples[:2000])
    fitting = lengths[min(len(lengths) - 1, int(0.99 * len(lengths)))]
    return min(most, max(8, -(-fitting // 8) * 8))


def _preprocessor_of(folder: str | None) -> Mapping[str, Any]:
    if folder is None:
        return {}
    path = Path(folder) / "preprocessor_config.json"
    if not Path(folder).is_dir():
        try:
            from transformers.utils import cached_file

            found = cached_file(folder, path.name, _raise_exceptions_for_missing_entries=False, local_files_only=False)
        except Exception:  # A hub that cannot be reached: the model's config says enough.
            found = None
        if found is None:
            return {}
        path = Path(found)
    if not path.is_file():
        return {}
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    return read if isinstance(read, dict) else {}


def _size_of(value: Any) -> tuple[int, int] | None:
    """(height, width) of the ways in which a preprocessor says it."""
    if isinstance(value, int):
        return value, value
    if isinstance(value, Mapping):
        if "height" in value and "width" in value:
            return int(value["height"]), int(value["width"])
        side = value.get("shortest_edge") or value.get("longest_edge")
        return None if side is None else (int(side), int(side))
    return None


def _config_size(config: Any) -> tuple[int, int] | None:
    size = getattr(config, "image_size", None)
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    return (size, size) if isinstance(size, int) else None
