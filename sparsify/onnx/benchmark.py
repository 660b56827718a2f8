"""An ONNX file -> latency and throughput in onnxruntime. The file alone: no model, no torch."""

from __future__ import annotations

import os
import statistics
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from sparsify.errors import ArgumentError, ExportError
from sparsify.onnx.file_inputs import FileInput, Size, file_inputs, made_up_inputs, samples_by_name
from sparsify.onnx.model_files import files_beside
from sparsify.onnx.runtime import open_session, read_model, run_failure, run_session
from sparsify.output.json_values import EXACT
from sparsify.output.tables import DisplayedText

if TYPE_CHECKING:
    import numpy as np
    from onnx import ModelProto
    from onnxruntime import InferenceSession

__all__ = ["benchmark_onnx"]


@dataclass(frozen=True)
class Benchmark(DisplayedText):
    """Latency, throughput and size of a file. Latencies are of one call with the whole batch, in milliseconds."""

    __pydantic_config__ = EXACT

    path: Path
    batch_size: int
    threads: int | None
    iterations: int
    latency_p50_ms: float
    latency_p95_ms: float
    latency_mean_ms: float
    throughput: float
    """Items per second: batch_size / mean latency."""
    size_bytes: int
    gzip_bytes: int
    inputs: Mapping[str, str]
    """Type and shape of what was fed: {"x": "float32[1, 3, 32, 32]"}."""
    versions: Mapping[str, str]
    providers: tuple[str, ...]

    def __str__(self) -> str:
        fed = ", ".join(f"{name} {kind}" for name, kind in self.inputs.items())
        threads = "default threads" if self.threads is None else f"{self.threads} thread{'s' * (self.threads != 1)}"
        return (
            f"{self.path}: p50 {self.latency_p50_ms:.3f} ms, p95 {self.latency_p95_ms:.3f} ms, "
            f"mean {self.latency_mean_ms:.3f} ms, {self.throughput:.1f} items/s (batch {self.batch_size}, {threads}, "
            f"{self.iterations} iterations)\n"
            f"  {self.size_bytes} bytes, gzipped {self.gzip_bytes}; {fed}; "
            f"onnxruntime {self.versions['onnxruntime']} on {', '.join(self.providers)}"
        )


@dataclass(frozen=True)
class Comparison(DisplayedText):
    """Speed of the second file beside the first: ratios first / second of paired rounds, above 1 is faster."""

    first: Path
    second: Path
    median: float
    minimum: float
    maximum: float
    rounds: int

    def __str__(self) -> str:
        return (
            f"{self.second} runs {self.median:.2f} times as fast as {self.first} "
            f"({self.minimum:.2f} to {self.maximum:.2f} in {self.rounds} paired rounds)"
        )


def benchmark_onnx(
    path: str | os.PathLike[str],
    *,
    batch_size: int = 1,
    threads: int | None = None,
    warmup: int = 5,
    iterations: int = 50,
    inputs: object = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> Benchmark:
    """Times a file in onnxruntime on the CPU, on random inputs or on given ones.

    Random inputs fit their types: floats are normal, whole numbers that look rows up (token ids) lie within the table,
    those called masks and all others are ones. Axis 0 gets `batch_size` where it is dynamic; other dynamic axes get 224
    (axes 2 and up of images) or 128. A size with a name in the file is the same wherever the name stands.

    Args:
        path: an ONNX file, also one that sparsify did not write.
        batch_size: items per call. A file with a fixed batch runs with its own, which the result then says, unless
            another than 1 was asked for.
        threads: None leaves the number to onnxruntime.
        warmup: calls that are not timed, >= 0.
        iterations: timed calls, >= 1.
        inputs: arrays to feed: one, a tuple in the file's order, or a mapping by name, which may leave some to chance.
        shapes: {input: its sizes}, for inputs of free size that are made up.

    Raises:
        DataFileError: the file is missing or unreadable.
        DataError: it is not an ONNX model, or a broken one.
        ExportError: a valid file that onnxruntime cannot run.
        ArgumentError: a wrong argument, a `batch_size` that a fixed batch contradicts, inputs that do not fit.
    """
    _check_whole("batch_size", batch_size, 1)
    _check_whole("warmup", warmup, 0)
    _check_whole("iterations", iterations, 1)
    import numpy as np
    import onnx
    import onnxruntime

    model = read_model(path)
    session = open_session(path, threads=threads, model=model)
    feed, size = running_inputs(model, session, batch_size, inputs, shapes, path)
    for _ in range(warmup):
        run_session(session, feed)
    times = [_timed_runs(session, feed) for _ in range(iterations)]
    mean = statistics.fmean(times)
    size_bytes, gzip_bytes = _sizes_on_disk([Path(path), *files_beside(model, path)])
    return Benchmark(
        path=Path(path),
        batch_size=size,
        threads=threads,
        iterations=iterations,
        latency_p50_ms=float(np.percentile(times, 50)) * 1e3,
        latency_p95_ms=float(np.percentile(times, 95)) * 1e3,
        latency_mean_ms=mean * 1e3,
        throughput=size / mean,
        size_bytes=size_bytes,
        gzip_bytes=gzip_bytes,
        inputs={name: f"{value.dtype}{list(value.shape)}" for name, value in feed.items()},
        versions={"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__},
        providers=tuple(session.get_providers()),
    )


def compare_onnx(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    *,
    batch_size: int = 1,
    threads: int | None = 1,
    warmup: int = 5,
    rounds: int = 20,
    iterations: int = 5,
    inputs: object = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> Comparison:
    """Compares the speed of two files, in rounds that run `iterations` calls of each in turn, so that noise hits both.

    Which one goes first alternates from round to round; a round counts with the median of its calls, which a single
    call that was held up does not move. Both get the same inputs, as far as they take inputs of the same names.

    Raises:
        As `benchmark_onnx`; ArgumentError: inputs of one name have another size or type in the other file.
    """
    _check_whole("batch_size", batch_size, 1)
    _check_whole("warmup", warmup, 0)
    _check_whole("rounds", rounds, 1)
    _check_whole("iterations", iterations, 1)
    files = []
    for path in (first, second):
        model = read_model(path)
        files.append((path, model, open_session(path, threads=threads, model=model)))
    runs = []
    for (_, _, session), feed in zip(files, same_inputs(files, batch_size, inputs, shapes), strict=True):
        for _ in range(warmup):
            run_session(session, feed)
        runs.append((session, feed))
    ratios = []
    for i in range(rounds):
        spent = [0.0, 0.0]
        for which in (0, 1) if i % 2 == 0 else (1, 0):
            spent[which] = statistics.median(_timed_runs(*runs[which]) for _ in range(iterations))
        ratios.append(spent[0] / spent[1])
    return Comparison(Path(first), Path(second), statistics.median(ratios), min(ratios), max(ratios), rounds)


def same_inputs(
    files: Sequence[tuple[str | os.PathLike[str], ModelProto, InferenceSession]],
    batch_size: int,
    inputs: object = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> list[dict[str, np.ndarray]]:
    """Inputs of two files, equal where their names are: those of one, the more fixed, serve the other too.

    Raises:
        ArgumentError: neither file takes what the other takes.
    """
    refused: ArgumentError | None = None
    for order in (1, -1):
        (path, model, session), (other, twin, second) = files[::order]
        try:
            feed, size = running_inputs(model, session, batch_size, inputs, shapes, path)
            mine, others = file_inputs(model), file_inputs(twin)
            taken = {name: value for name, value in feed.items() if _alike(mine[name], others.get(name))}
            rest = {name: value for name, value in (shapes or {}).items() if name not in taken}
            fed, _ = running_inputs(twin, second, size, taken, rest, other)
        except ArgumentError as error:
            refused = refused or error
            continue
        return [feed, fed][::order]
    assert refused is not None
    raise ArgumentError(f"the two files do not do the same work: {refused}") from refused


def _alike(one: FileInput, other: FileInput | None) -> bool:
    """True if inputs of two files are meant to get the same: they differ in the batch at most."""
    if other is None or one.dtype is None or other.dtype is None or one.dtype[:3] != other.dtype[:3]:
        return False
    if one.shape is None or other.shape is None:
        return True
    fixed = [(a, b) for a, b in zip(one.shape[1:], other.shape[1:], strict=False) if isinstance(a, int)]
    return len(one.shape) == len(other.shape) and all(a == b or not isinstance(b, int) for a, b in fixed)


def running_inputs(
    model: ModelProto,
    session: InferenceSession,
    batch_size: int,
    inputs: object = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    path: str | os.PathLike[str] = "the file",
) -> tuple[dict[str, np.ndarray], int]:
    """As `made_up_inputs`, for files that hold a state of fixed batch beside inputs of any.

    Raises:
        ArgumentError: another batch size than such a state has; inputs that do not fit the file.
        ExportError: onnxruntime cannot run the file.
    """
    declared = file_inputs(model)
    samples = {} if inputs is None else samples_by_name(declared, inputs, path)
    _check_shapes(shapes, [name for name in declared if name not in samples])

    def made_up(batch: int) -> tuple[dict[str, np.ndarray], int]:
        return made_up_inputs(model, batch, samples=samples, shapes=shapes, path=path)

    feed, size = made_up(batch_size)
    try:
        run_session(session, feed)
    except ExportError as error:
        fixed = {} if samples or shapes else {n: one.shape for n, one in declared.items() if _is_fixed(one.shape)}
        # Of a recurrent state the batch is the second axis.
        for found in sorted({dim for shape in fixed.values() for dim in shape[:2]} - {batch_size}):
            other, size = made_up(found)
            try:
                run_session(session, other)
            except ExportError:
                continue
            if batch_size == 1:
                return other, size
            raise ArgumentError(
                f"batch_size={batch_size}: this file runs with a batch of {found} only, to which "
                f"{', '.join(map(repr, fixed))} are fixed; export it with dynamic_batch."
            ) from error
        if len(samples) < len(declared):
            raise ExportError(f"{error} Inputs were made up: give inputs or shapes that the file runs with.") from error
        raise
    return feed, size


def _check_shapes(shapes: Mapping[str, Sequence[int]] | None, names: Sequence[str]) -> None:
    for name, sizes in (shapes or {}).items():
        if name not in names:
            raise ArgumentError(f"shapes: {name!r} is no input that is made up; those are {', '.join(names)}.")
        whole = isinstance(sizes, Sequence) and not isinstance(sizes, str)
        if not whole or not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in sizes):
            raise ArgumentError(f"shapes: {name!r}: {sizes!r} is no list of whole numbers, 0 or more.")


def _is_fixed(shape: tuple[Size, ...] | None) -> TypeGuard[tuple[int, ...]]:
    return shape is not None and len(shape) > 1 and all(isinstance(dim, int) for dim in shape)


def _timed_runs(session: InferenceSession, feed: dict[str, np.ndarray]) -> float:
    """Seconds of one call; nothing but the call lies between the two readings of the clock."""
    try:
        start = time.perf_counter()
        session.run(None, feed)
        return time.perf_counter() - start
    except Exception as error:
        raise run_failure(error, feed) from error


def _sizes_on_disk(files: Sequence[Path]) -> tuple[int, int]:
    """Bytes of files together, and gzipped as one; read piece by piece, since they may be larger than memory."""
    gzipped, size, left = zlib.compressobj(6, wbits=31), 0, 0
    for path in files:
        with path.open("rb") as file:
            while piece := file.read(2**24):
                size += len(piece)
                left += len(gzipped.compress(piece))
    return size, left + len(gzipped.flush())


def _check_whole(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(f"{name}={value!r}: give a whole number, {least} or more.")
