"""ONNX files on samples: their outputs, how they agree, and their times in turn."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsify.errors import ArgumentError, DataError
from sparsify.experiments.sample_files import InputForm
from sparsify.onnx.file_inputs import file_inputs
from sparsify.onnx.runtime import open_session, read_model, run_session
from sparsify.optimize.references import resolve

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

__all__: list[str] = []

Arrays = dict[str, np.ndarray]
QualityMetric = Callable[[Mapping[str, np.ndarray], Any], float]
TIMED_MS = 20.0
"""Milliseconds of one side of a round, about: what takes less is run several times in a round."""


@dataclass(frozen=True)
class OutputAgreement:
    """The outputs of a file beside those of another on the same samples.

    Attributes:
        samples: number of them.
        error: root mean square of the difference / that of the spread of the output between samples; the largest of the
            float outputs.
        cosine: mean over samples of the cosine of the first float output with the other's.
        same_decisions: share of samples (positions) at which the largest of the first output is the same; None where
            that is no choice among several.
    """

    samples: int
    error: float
    cosine: float
    same_decisions: float | None


def input_forms(path: str | os.PathLike[str]) -> list[InputForm]:
    """The inputs of a file that have to be given, as the samples have to fit them.

    Raises:
        DataError: an input that is no tensor of numbers.
    """
    forms = []
    for name, one in file_inputs(read_model(path)).items():
        if one.dtype is None:
            raise DataError(f"{path}: the input {name!r} is a {one.kind}, for which no samples can be given.")
        shape = None if one.shape is None else tuple(size if isinstance(size, int) else None for size in one.shape)
        forms.append(InputForm(name, one.dtype, shape))
    return forms


class FileRunner:
    """A file in a session that computes exactly, on batches of any size.

    Args:
        path: of the file.
        threads: of onnxruntime.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int | None = 1) -> None:
        self.path = Path(path)
        model = read_model(path)
        self.session: InferenceSession = open_session(path, threads=threads, model=model)
        self.names = [value.name for value in self.session.get_inputs()]
        sizes = [value.shape[0] for value in self.session.get_inputs() if value.shape]
        self.fixed = next((size for size in sizes if isinstance(size, int) and size > 0), None)

    def feed(self, batch: Mapping[str, Any]) -> Arrays:
        """The arrays of a batch under the names of the file's inputs; those of other names by their order.

        Raises:
            ArgumentError: an input is not there.
        """
        arrays = {name: np.asarray(value) for name, value in batch.items()}
        missing = [name for name in self.names if name not in arrays]
        if missing and len(arrays) == len(self.names):
            arrays = dict(zip(self.names, arrays.values(), strict=True))
        elif missing:
            raise ArgumentError(f"{self.path}: the data have no input {missing[0]!r}; they have {', '.join(arrays)}.")
        return {name: arrays[name] for name in self.names}

    def __call__(self, batch: Mapping[str, Any]) -> Arrays:
        """The outputs on one batch; where the file takes another number of samples at once, on its parts."""
        feed = self.feed(batch)
        length = len(next(iter(feed.values()))) if feed else 0
        size = self.fixed
        if size is None or size == length or not length:
            return run_session(self.session, feed)
        parts: list[Arrays] = []
        for at in range(0, length, size):
            part = {name: value[at : at + size] for name, value in feed.items()}
            short = size - len(next(iter(part.values())))
            if short:
                part = {name: np.concatenate([value, *[value[-1:]] * short]) for name, value in part.items()}
            found = run_session(self.session, part)
            parts.append({name: value[: size - short] if value.ndim else value for name, value in found.items()})
        return {
            name: np.concatenate([part[name] for part in parts]) if value.ndim else value
            for name, value in parts[0].items()
        }

    def outputs(self, batches: Sequence[Mapping[str, Any]]) -> list[Arrays]:
        """The outputs on each batch."""
        return [self(batch) for batch in batches]


def agreement(wanted: Sequence[Arrays], found: Sequence[Arrays]) -> OutputAgreement | None:
    """Distance of outputs from those that they should be; None where none is of floats.

    Args:
        wanted: of each batch, by output.
        found: the same of another file, whose outputs may have other names.
    """
    names = [name for name, value in wanted[0].items() if value.dtype.kind == "f" and value.size]
    if not names or len(found[0]) != len(wanted[0]):
        return None
    others = dict(zip(wanted[0], found[0], strict=True))
    errors = []
    for name in names:
        off = power = 0.0
        mean = np.mean([value[name].mean(0) if value[name].ndim else value[name] for value in wanted], axis=0)
        for one, other in zip(wanted, found, strict=True):
            a, b = one[name].astype(np.float64), other[others[name]].astype(np.float64)
            if a.shape != b.shape:
                return None
            near = np.isfinite(a) & np.isfinite(b)
            spread = a - mean if len(wanted) > 1 or (a.ndim and len(a) > 1) else a
            off += float(np.square((a - b)[near]).sum())
            power += float(np.square(np.broadcast_to(spread, a.shape)[near]).sum())
        errors.append((off / power) ** 0.5 if power else float(off > 0))
    first, same, count, cosines, samples = names[0], 0, 0, [], 0
    for one, other in zip(wanted, found, strict=True):
        a, b = one[first], other[others[first]]
        samples += len(a) if a.ndim else 1
        rows = [each.reshape(len(each) if each.ndim else 1, -1).astype(np.float64) for each in (a, b)]
        lengths = np.linalg.norm(rows[0], axis=1) * np.linalg.norm(rows[1], axis=1)
        cosines += list((rows[0] * rows[1]).sum(1) / np.where(lengths > 0, lengths, 1))
        if a.ndim >= 2 and a.shape[-1] > 1:
            same += int((a.argmax(-1) == b.argmax(-1)).sum())
            count += int(np.prod(a.shape[:-1]))
    return OutputAgreement(samples, max(errors), float(np.mean(cosines)), same / count if count else None)


def quality_metric(
    metric: str | QualityMetric | None, labels: Sequence[Any] | None
) -> tuple[str, QualityMetric] | None:
    """(name, function of outputs and labels) of what was asked for; None where nothing can be measured.

    Args:
        metric: "accuracy", "package.module:function", or a function; None: accuracy where labels are whole numbers.
        labels: of all samples.

    Raises:
        ArgumentError: no such metric, or one without labels.
    """
    if metric is None:
        whole = labels is not None and all(isinstance(one, int | np.integer) for one in labels)
        return ("accuracy", accuracy) if whole else None
    if labels is None:
        raise ArgumentError(f"metric={metric!r}: the data have no labels to measure it with.")
    if callable(metric):
        return getattr(metric, "__name__", "metric"), metric
    if metric == "accuracy":
        return "accuracy", accuracy
    if isinstance(metric, str) and ":" in metric:
        found = resolve(metric, "metric")
        if callable(found):
            return metric.rpartition(":")[2], found
    raise ArgumentError(f"metric={metric!r}: give 'accuracy', a function of (outputs, labels), or its reference.")


def accuracy(outputs: Mapping[str, np.ndarray], labels: Any) -> float:
    """Share of labels at which the first output with an entry for each class is largest.

    Raises:
        DataError: no output has classes, or there are other numbers of both.
    """
    labels = np.asarray(labels)
    for value in outputs.values():
        if value.dtype.kind == "f" and value.ndim == 2 and value.shape[1] > 1 and len(value) == len(labels):
            return float((value.argmax(1) == labels).mean())
        if value.dtype.kind in "iu" and value.shape == labels.shape:
            return float((value == labels).mean())
    raise DataError(
        "accuracy: no output has an entry for each class: "
        f"{', '.join(f'{name} {list(value.shape)}' for name, value in outputs.items())} for {len(labels)} labels."
    )


def measured_value(metric: QualityMetric, outputs: Sequence[Arrays], labels: Sequence[Any]) -> float:
    """The metric on all samples.

    Raises:
        ArgumentError: the function fails, or gives no number.
    """
    joined = {
        name: np.concatenate([one[name] for one in outputs]) if outputs[0][name].ndim else outputs[0][name]
        for name in outputs[0]
    }
    try:
        value = metric(joined, np.asarray(labels))
        return float(value)
    except DataError:
        raise
    except Exception as error:  # A user's function may raise anything.
        name = getattr(metric, "__name__", "metric")
        raise ArgumentError(f"metric {name} failed: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class TimesInTurn:
    """Times of several files on the same inputs, in rounds that run each in turn.

    Attributes:
        latencies_ms: median of each file.
        ratios: of each file, round by round: time of the first / its own.
    """

    latencies_ms: tuple[float, ...]
    ratios: tuple[tuple[float, ...], ...]

    def times_as_fast(self, which: int) -> float:
        """Speed of a file as a multiple of the first's: the median over the rounds."""
        return statistics.median(self.ratios[which])

    def noise(self, which: int) -> float:
        """The standard error of that median, about."""
        ratios = self.ratios[which]
        middle = self.times_as_fast(which)
        spread = statistics.median(abs(ratio - middle) for ratio in ratios)
        return float(1.4826 * spread * 1.2533 / len(ratios) ** 0.5)


def times_in_turn(runners: Sequence[FileRunner], batch: Mapping[str, Any], rounds: int = 21) -> TimesInTurn:
    """Times of files in turn, the order reversed every round, so that noise hits all alike."""
    feeds = []
    for runner in runners:
        feed = runner.feed(batch)
        if runner.fixed is not None:
            size = runner.fixed
            feed = {
                name: np.concatenate([value] * -(-size // max(len(value), 1)))[:size] if value.ndim else value
                for name, value in feed.items()
            }
        feeds.append(feed)
    times: list[list[float]] = [[] for _ in runners]
    repeats = 1
    for number in range(-2, rounds):
        order = range(len(runners)) if number % 2 else reversed(range(len(runners)))
        for which in order:
            session, feed = runners[which].session, feeds[which]
            start = time.perf_counter()
            for _ in range(repeats):
                session.run(None, feed)
            if number >= 0:
                times[which].append((time.perf_counter() - start) * 1e3 / repeats)
            elif number == -1 and which == 0:
                repeats = min(50, max(1, round(TIMED_MS / max((time.perf_counter() - start) * 1e3, 0.01))))
    medians = tuple(statistics.median(own) for own in times)
    ratios = tuple(tuple(first / own for first, own in zip(times[0], each, strict=True)) for each in times)
    return TimesInTurn(medians, ratios)
