"""An ONNX file -> latency and throughput in onnxruntime. The file alone: no model, no torch."""

from __future__ import annotations

import gzip
import math
import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.errors import ArgumentError, DataError, ExportError
from sparsify.onnx.runtime import open_session, read_model, run_failure, run_session
from sparsify.output.json_values import EXACT
from sparsify.output.tables import DisplayedText

if TYPE_CHECKING:
    import numpy as np
    from onnx import ModelProto
    from onnxruntime import InferenceSession

__all__ = ["benchmark_onnx"]

FILL = {"sequence": 128, "image": 224}
"""Sizes for dynamic dimensions other than the batch: image for axes 2 and up of rank 4 and 5."""
LARGEST_INPUT = 2**31
"""Bytes of random inputs: a broken file may ask for any number."""


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
) -> Benchmark:
    """Times a file in onnxruntime on the CPU, on random inputs.

    Inputs fit their types: floats are normal, whole numbers that look rows up (token ids) lie within the table, those
    called masks and all others are ones. Axis 0 gets `batch_size` where it is dynamic; other dynamic axes get 224 (axes
    2 and up of images) or 128.

    Args:
        path: an ONNX file, also one that sparsify did not write.
        batch_size: items per call. A file with a fixed batch runs with its own, which the result then says, unless
            another than 1 was asked for.
        threads: None leaves the number to onnxruntime.
        warmup: calls that are not timed, >= 0.
        iterations: timed calls, >= 1.

    Raises:
        DataFileError: the file is missing or unreadable.
        DataError: it is not an ONNX model, or a broken one.
        ExportError: a valid file that onnxruntime cannot run.
        ArgumentError: a wrong argument, or a `batch_size` that a fixed batch contradicts.
    """
    _check_whole("batch_size", batch_size, 1)
    _check_whole("warmup", warmup, 0)
    _check_whole("iterations", iterations, 1)
    import numpy as np
    import onnx
    import onnxruntime

    model = read_model(path)
    session = open_session(path, threads=threads, model=model)
    feed, size = _running_inputs(model, session, batch_size)
    for _ in range(warmup):
        run_session(session, feed)
    times = [_timed_runs(session, feed) for _ in range(iterations)]
    mean = statistics.fmean(times)
    content = Path(path).read_bytes()
    return Benchmark(
        path=Path(path),
        batch_size=size,
        threads=threads,
        iterations=iterations,
        latency_p50_ms=float(np.percentile(times, 50)) * 1e3,
        latency_p95_ms=float(np.percentile(times, 95)) * 1e3,
        latency_mean_ms=mean * 1e3,
        throughput=size / mean,
        size_bytes=len(content),
        gzip_bytes=len(gzip.compress(content, 6, mtime=0)),
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
) -> Comparison:
    """Compares the speed of two files, in rounds that run `iterations` calls of each in turn, so that noise hits both.

    Which one goes first alternates from round to round; a round counts with the median of its calls, which a single
    call that was held up does not move.

    Raises:
        As `benchmark_onnx`.
    """
    _check_whole("batch_size", batch_size, 1)
    _check_whole("warmup", warmup, 0)
    _check_whole("rounds", rounds, 1)
    _check_whole("iterations", iterations, 1)
    runs = []
    for path in (first, second):
        model = read_model(path)
        session = open_session(path, threads=threads, model=model)
        feed, _ = _running_inputs(model, session, batch_size)
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


def _running_inputs(model: ModelProto, session: InferenceSession, batch_size: int) -> tuple[dict[str, np.ndarray], int]:
    """As `random_inputs`, for files that hold a state of fixed batch beside inputs of any.

    Raises:
        ArgumentError: another batch size than such a state has.
        ExportError: onnxruntime cannot run the file.
    """
    feed, size = random_inputs(model, session, batch_size)
    try:
        run_session(session, feed)
    except ExportError as error:
        fixed = {value.name: value.shape for value in session.get_inputs() if _is_fixed(value.shape)}
        # Of a recurrent state the batch is the second axis.
        for found in sorted({dim for shape in fixed.values() for dim in shape[:2]} - {batch_size}):
            other, size = random_inputs(model, session, found)
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
        raise
    return feed, size


def _is_fixed(shape: list[int | str | None]) -> bool:
    return len(shape) > 1 and all(isinstance(dim, int) for dim in shape)


def random_inputs(model: ModelProto, session: InferenceSession, batch_size: int) -> tuple[dict[str, np.ndarray], int]:
    """({name: array}, the batch size that they have) for the inputs of a session on `model`.

    Raises:
        DataError: inputs that are no tensors, of a type that is not known, without a shape, or too large.
        ArgumentError: another batch size than the one that the file fixes.
    """
    import numpy as np

    generator = np.random.default_rng(0)
    rows = _rows_looked_up(model)
    shapeless = [v.name for v in model.graph.input if not v.type.tensor_type.HasField("shape")]
    feed: dict[str, np.ndarray] = {}
    fixed = None
    for i, value in enumerate(session.get_inputs()):
        kind = value.type.removeprefix("tensor(").removesuffix(")")
        dtype = _DTYPES.get(kind)
        if dtype is None:
            raise DataError(f"input {value.name!r} is a {value.type}; only tensors of numbers can be made up.")
        if value.name in shapeless:
            raise DataError(
                f"input {value.name!r} has no shape in the file, so that nothing can be made up for it. Export it with "
                "one, or write it into graph.input with onnx."
            )
        shape = [_dimension(dim, axis, len(value.shape), batch_size) for axis, dim in enumerate(value.shape)]
        if i == 0 and shape and isinstance(value.shape[0], int):
            fixed = value.shape[0]
        if math.prod(shape) * np.dtype(dtype).itemsize > LARGEST_INPUT:
            raise DataError(f"input {value.name!r} has the shape {shape}, more than {LARGEST_INPUT} bytes.")
        feed[value.name] = _random(value.name, np.dtype(dtype), shape, rows.get(value.name), generator)
    if fixed is not None and batch_size not in (1, fixed):
        raise ArgumentError(
            f"batch_size={batch_size}: this file has a fixed batch of {fixed}; export it with dynamic_batch."
        )
    return feed, batch_size if fixed is None else fixed


_DTYPES = {
    "float": "float32",
    "float16": "float16",
    "double": "float64",
    "int8": "int8",
    "int16": "int16",
    "int32": "int32",
    "int64": "int64",
    "uint8": "uint8",
    "uint16": "uint16",
    "uint32": "uint32",
    "uint64": "uint64",
    "bool": "bool",
}


def _rows_looked_up(model: ModelProto) -> dict[str, int]:
    """{input: rows of the smallest table that it indexes}."""
    from sparsify.onnx.graph import STORAGE, GraphView, integer, only_moves

    view = GraphView(model.graph)
    rows: dict[str, int] = {}
    for node in model.graph.node:
        if node.op_type != "Gather" or len(node.input) < 2:
            continue
        stored = view.initializers.get(view.origin(node.input[0], lambda each: each.op_type in STORAGE))
        table, axis = [] if stored is None else list(stored.dims), integer(node, "axis", 0)
        if table and -len(table) <= axis < len(table):
            source = view.origin(node.input[1], lambda each: only_moves(each) or each.op_type == "Cast")
            rows[source] = min(rows.get(source, table[axis]), table[axis])
    return rows


def _dimension(dim: int | str | None, axis: int, rank: int, batch_size: int) -> int:
    if isinstance(dim, int) and dim >= 0:
        return dim
    if axis == 0:
        return batch_size
    if rank >= 4:
        return 3 if axis == 1 else FILL["image"]
    return FILL["sequence"]


def _random(
    name: str, dtype: np.dtype[Any], shape: list[int], rows: int | None, generator: np.random.Generator
) -> np.ndarray:
    import numpy as np

    if dtype.kind == "f":
        return generator.standard_normal(shape).astype(dtype)
    if rows is not None and "mask" not in name.lower():
        return generator.integers(0, max(rows, 1), shape).astype(dtype)
    if dtype == np.uint8:
        return generator.integers(0, 256, shape).astype(dtype)
    return np.ones(shape, dtype)


def _timed_runs(session: InferenceSession, feed: dict[str, np.ndarray]) -> float:
    """Seconds of one call; nothing but the call lies between the two readings of the clock."""
    try:
        start = time.perf_counter()
        session.run(None, feed)
        return time.perf_counter() - start
    except Exception as error:
        raise run_failure(error, feed) from error


def _check_whole(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(f"{name}={value!r}: give a whole number, {least} or more.")
