"""Measures a performance profile: a model is exported, quantized, shrunk, and run under onnxruntime's profiler."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from sparsify.analysis.analyze import analyze_model
from sparsify.analysis.layers import LayerInfo, ModelAnalysis
from sparsify.analysis.node_layers import layers_of_nodes
from sparsify.analysis.node_times import NodeTimes, node_times
from sparsify.analysis.noise import Spread, spreads, too_fast, twins, unlike_twins, unsteady
from sparsify.analysis.performance import (
    PERFORMANCE_FORMAT,
    SKIPPING_FLOOR,
    SPARSITIES,
    LayerPerformance,
    PerformanceProfile,
)
from sparsify.analysis.variants import Form, cuttable, export, exported_forms
from sparsify.errors import ArgumentError, DataError, StateError
from sparsify.model.signature import SampleInputs, check_module
from sparsify.model.wrappers import unwrapped
from sparsify.onnx.benchmark import running_inputs
from sparsify.onnx.file_inputs import file_inputs, samples_by_name
from sparsify.onnx.runtime import open_session, read_model, run_session
from sparsify.output.tables import track
from sparsify.pruning.groups import ChannelGroups
from sparsify.quantization.plan import is_quantized

if TYPE_CHECKING:
    from onnx import ModelProto
    from onnxruntime import InferenceSession

    from sparsify.model.signature import InputsLike

__all__ = ["performance_profile"]

AGAIN = 3
"""Further measurements of files with times that cannot be right."""
WIDTHS = (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25)


def performance_profile(
    model: nn.Module | str | os.PathLike[str],
    sample_inputs: InputsLike | None = None,
    *,
    batch_sizes: Sequence[int] = (1,),
    threads: Sequence[int] = (1,),
    quantized: bool = True,
    widths: Sequence[float] | None = WIDTHS,
    iterations: int = 10,
    warmup: int = 5,
    cache: bool | str | os.PathLike[str] = False,
    progress: bool | None = None,
) -> PerformanceProfile:
    """Measures a model and each of its layers in onnxruntime: in float, in int8, and with fewer channels.

    The model is exported as it is, quantized, and shrunk to each of `widths` in all channel groups at once,
    with the rounding of StructuredPruningModifier; each file runs under onnxruntime's profiler, and the time of each
    node counts to the layer it came from, with what was fused into it and the conversions made for it. What belongs to
    no layer is reported as `others`. The model itself is not touched; weights play no part in the times.

    Zeros: with a fraction s of zeros, `sparse_ms` is time * max(1 - s, 0.1), which a runtime that skips zeros would
    reach. onnxruntime gains 0 from zeros: there only removed channels and int8 save time.

    Args:
        model: a torch module that was not quantized before, or an ONNX file, of which the times as it is are measured.
        sample_inputs: a tensor, a tuple of arguments or a dictionary of keywords, as the model is called with: batches
            are made of its items, so token ids stay inside their tables. Of a file: arrays as `benchmark_onnx` takes
            them; None: they are made up.
        batch_sizes, threads: layers are measured at the first of each, the whole model at all combinations.
        quantized: whether int8 is measured; ranges come from the sample inputs, which is good enough for times only.
        widths: fractions of the channels that stay, 1.0 first; None: not measured.
        iterations, warmup: calls that are timed, and calls before them.
        cache: a folder where profiles are kept by the hash of graph, shapes, settings, versions and processor; True:
            the user's cache folder; False: nothing is kept.
        progress: whether a bar is shown; None: on a terminal.

    Raises:
        ExportError: the model cannot be exported, or not be run. Parts that cannot be measured, int8 or widths, are
            None, with the reason in `notes`.
        StateError: the model is quantized already; profile its file.
        ArgumentError: a wrong argument. DataFileError, DataError: a file that is missing or broken.
    """
    settings = ProfileSettings(
        batch_sizes=_wholes("batch_sizes", batch_sizes, 1),
        threads=_wholes("threads", threads, 1),
        quantized=quantized,
        widths=() if widths is None else _fractions(widths),
        iterations=_wholes("iterations", [iterations], 1)[0],
        warmup=_wholes("warmup", [warmup], 0)[0],
    )
    folder = _cache_folder(cache)
    if isinstance(model, (str, os.PathLike)):
        return profile_of_file(Path(model), sample_inputs, settings, folder, progress)
    return profile_of_model(model, sample_inputs, settings, folder, progress)


@dataclass(frozen=True)
class ProfileSettings:
    """The arguments of `performance_profile` that say what is measured."""

    batch_sizes: tuple[int, ...]
    threads: tuple[int, ...]
    quantized: bool
    widths: tuple[float, ...]
    iterations: int
    warmup: int


@dataclass(frozen=True)
class Measured:
    """Times of one file: from the profiler, and without it by (batch size, threads)."""

    times: NodeTimes
    totals: Mapping[tuple[int, int], float]
    floating: frozenset[str] = frozenset()
    spreads: Mapping[str, Spread] = field(default_factory=dict)
    total_spread: Spread = (0.0, 0.0)

    @classmethod
    def quietest(cls, rounds: Sequence[Measured]) -> Measured:
        """The quietest of several measurements; the spreads are those of the two quietest."""
        best = sorted(rounds, key=lambda one: one.times.total)[:2]
        first = next(iter(best[0].totals))
        return cls(
            best[0].times,
            {which: min(one.totals[which] for one in rounds) for which in best[0].totals},
            best[0].floating,
            spreads([one.times.owners for one in best]),
            spreads([{"": one.totals[first]} for one in sorted(rounds, key=lambda one: one.totals[first])[:2]])[""],
        )


# ---------------------------------------------------------------------- the two ways in


def profile_of_model(
    model: nn.Module,
    sample_inputs: InputsLike | None,
    settings: ProfileSettings,
    cache: Path | None,
    progress: bool | None,
) -> PerformanceProfile:
    check_module(model, other=", or the path of an ONNX file")
    if sample_inputs is None:
        raise ArgumentError("sample_inputs: a torch model is exported with them; give inputs as it is called with.")
    model = unwrapped(model)
    if is_quantized(model):
        raise StateError(
            f"{type(model).__name__} is quantized already. Give the float model, whose int8 times are measured with "
            "it, or the file that was exported."
        )
    call = SampleInputs.of(model, sample_inputs)
    with tempfile.TemporaryDirectory(prefix="sparsify-") as text:
        path = Path(text) / "model.onnx"
        export(model, sample_inputs, path)
        proto = read_model(path)
        feeds = {size: feed_of(proto, call, size) for size in settings.batch_sizes}
        content, versions = _content(proto, feeds, settings)
        if (kept := _cached(cache, content)) is not None:
            return kept
        analysis = analyze_model(model, sample_inputs)
        notes: dict[str, str] = {}
        channel_groups: ChannelGroups | None = None
        if settings.widths:
            channel_groups, why = cuttable(model, call)
            if why:
                notes["widths"] = why
        folder = Path(text)
        forms = exported_forms(
            model, sample_inputs, channel_groups, settings.quantized, settings.widths, folder, path, notes, progress
        )
        bench = Bench(analysis, feeds, settings)
        found = bench.measure_all(forms, progress)
    touched = (
        set()
        if channel_groups is None
        else {member.tensor for one in channel_groups.groups.values() for member in one.members}
    )
    profile = _assembled(type(model).__name__, bench, found, touched, content, versions, notes)
    _cache(cache, profile)
    return profile


def profile_of_file(
    path: Path, sample_inputs: InputsLike | None, settings: ProfileSettings, cache: Path | None, progress: bool | None
) -> PerformanceProfile:
    proto = read_model(path)
    session = open_session(path, model=proto)
    declared = file_inputs(proto)
    given = {} if sample_inputs is None else samples_by_name(declared, sample_inputs, path)

    def items(size: int) -> dict[str, np.ndarray]:
        free = {name for name, one in declared.items() if one.shape and not isinstance(one.shape[0], int)}
        return {name: array[np.arange(size) % len(array)] if name in free else array for name, array in given.items()}

    feeds = {size: running_inputs(proto, session, size, items(size), path=path)[0] for size in settings.batch_sizes}
    content, versions = _content(proto, feeds, settings)
    if (kept := _cached(cache, content)) is not None:
        return kept
    analysis = analyze_model(path, feeds[settings.batch_sizes[0]])
    bench = Bench(analysis, feeds, settings)
    found = bench.measure_all({("float", 1.0): Form(path)}, progress)
    why = "a file is measured as it is; give the torch model for int8 and widths"
    notes = {"int8": why} if settings.quantized else {}
    notes |= {"widths": why} if settings.widths else {}
    from sparsify.onnx.graph import has_graphs

    inner = [node.name or node.op_type for node in proto.graph.node if has_graphs(node)]
    if inner and any(not layer.calls for layer in analysis.layers):
        notes["layers in branches and loops"] = f"they count to the nodes that hold them: {', '.join(inner)}"
    profile = _assembled(path.name, bench, found, set(), content, versions, notes)
    _cache(cache, profile)
    return profile


def _wholes(name: str, values: Sequence[int], least: int) -> tuple[int, ...]:
    if isinstance(values, (str, bytes, int)) or not isinstance(values, Sequence) or not values:
        raise ArgumentError(f"{name}={values!r}: give a list of whole numbers, {least} or more.")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ArgumentError(f"{name}: {value!r} is no whole number, {least} or more.")
    return tuple(dict.fromkeys(values))


def _fractions(widths: Sequence[float]) -> tuple[float, ...]:
    if isinstance(widths, (str, bytes)) or not isinstance(widths, Sequence) or not widths:
        raise ArgumentError(f"widths={widths!r}: give a list of fractions, 1.0 first, or None.")
    for width in widths:
        if isinstance(width, bool) or not isinstance(width, (int, float)) or not 0 < width <= 1:
            raise ArgumentError(f"widths: {width!r} is no fraction of the channels, above 0 and up to 1.")
    if widths[0] != 1 or any(a <= b for a, b in itertools.pairwise(widths)):
        raise ArgumentError(f"widths={tuple(widths)}: give them falling, 1.0 first, each once.")
    return tuple(float(width) for width in widths)


def _cache_folder(cache: bool | str | os.PathLike[str]) -> Path | None:
    if cache is False:
        return None
    if cache is True:
        base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
        return (Path(base) if base else Path.home() / ".cache") / "sparsify" / "performance"
    if not isinstance(cache, (str, os.PathLike)):
        raise ArgumentError(f"cache={cache!r}: give a folder, True or False.")
    return Path(cache)


# ---------------------------------------------------------------------- measuring


class Bench:
    """Measures files of one model, in its several forms, on the same inputs."""

    def __init__(
        self, analysis: ModelAnalysis, feeds: Mapping[int, Mapping[str, np.ndarray]], settings: ProfileSettings
    ) -> None:
        self.analysis, self.feeds, self.settings = analysis, feeds, settings
        self.twins = twins(analysis)

    def measure_all(
        self, forms: Mapping[tuple[str, float], Form], progress: bool | None
    ) -> dict[tuple[str, float], Measured]:
        """Every file at two times, the second time in the opposite order, and what cannot be right up to three times
        more; the quietest counts."""
        rounds: dict[tuple[str, float], list[Measured]] = {key: [] for key in forms}
        todo, what = [*forms, *reversed(list(forms))], "measuring"
        for again in range(AGAIN + 1):
            for key in track(todo, what, progress=progress):
                form = forms[key]
                rounds[key].append(self.measure(form.path, form.floating, all_totals=key[1] == 1))
            found = {key: Measured.quietest(measured) for key, measured in rounds.items()}
            todo, what = [key for key in forms if self.doubts(found, key)], f"measuring again, {again + 1} of {AGAIN}"
            if not todo:
                break
        return found

    def doubts(self, found: Mapping[tuple[str, float], Measured], key: tuple[str, float]) -> dict[str, str]:
        """{layer: why its time in this file is not believed}."""
        doubted = unsteady(found[key].spreads) | unlike_twins(self.twins, found[key].spreads)
        dense, int8 = found.get(("float", key[1])), found.get(("int8", key[1]))
        return doubted if dense is None or int8 is None else doubted | too_fast(dense.spreads, int8.spreads)

    def measure(self, path: Path, floating: frozenset[str] = frozenset(), *, all_totals: bool = False) -> Measured:
        settings = self.settings
        proto = read_model(path)
        times = node_times(
            proto,
            self.feeds[settings.batch_sizes[0]],
            layers_of_nodes(proto.graph, self.analysis),
            {layer.name: float(layer.macs) for layer in self.analysis.layers},
            threads=settings.threads[0],
            warmup=settings.warmup,
            iterations=settings.iterations,
            path=path,
        )
        totals = {}
        for count in settings.threads if all_totals else settings.threads[:1]:
            session = open_session(path, threads=count, model=proto)
            for size in settings.batch_sizes if all_totals else settings.batch_sizes[:1]:
                totals[size, count] = median_ms(session, self.feeds[size], settings.warmup, settings.iterations)
        return Measured(times, totals, floating)


def median_ms(session: InferenceSession, feed: Mapping[str, np.ndarray], warmup: int, iterations: int) -> float:
    """Median time of one call, in milliseconds."""
    inputs = dict(feed)
    for _ in range(warmup):
        run_session(session, inputs)
    times = []
    for _ in range(iterations):
        start = time.perf_counter()
        session.run(None, inputs)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def _assembled(
    name: str,
    bench: Bench,
    found: Mapping[tuple[str, float], Measured],
    touched: set[str],
    content: str,
    versions: Mapping[str, str],
    notes: Mapping[str, str],
) -> PerformanceProfile:
    analysis, settings = bench.analysis, bench.settings
    dense, int8 = found["float", 1.0], found.get(("int8", 1.0))
    doubtful = {name: why for key in found if key[1] == 1 for name, why in bench.doubts(found, key).items()}
    first = (settings.batch_sizes[0], settings.threads[0])
    wide = {kind: [found[kind, w] for w in settings.widths if (kind, w) in found] for kind in ("float", "int8")}
    for kind in wide:
        if len(wide[kind]) < len(settings.widths) or not touched:
            wide[kind] = []

    # The planner decides which layers are quantized; the file may leave more of them in float.
    stay = (
        set()
        if int8 is None
        else {*int8.floating, *(i.name for i in analysis.layers if i.weight and not i.quantizable)}
    )

    def layer(info: LayerInfo) -> LayerPerformance:
        ms = dense.times.owners.get(info.name, 0.0)
        removable = info.weight in touched or (info.weight is None and bool(touched))
        floating = int8 is None or info.name in stay
        at_widths = {
            kind: tuple(one.times.owners.get(info.name, 0.0) for one in wide[kind]) if removable else ()
            for kind in wide
        }
        return LayerPerformance(
            name=info.name,
            ms=ms,
            int8_ms=None if int8 is None or floating else int8.times.owners.get(info.name, 0.0),
            sparse_ms=tuple(ms * max(1 - s, SKIPPING_FLOOR) if info.prunable else ms for s in SPARSITIES),
            width_ms=at_widths["float"] or None,
            width_int8_ms=None if floating else at_widths["int8"] or None,
            type=info.type,
            spread_ms=dense.spreads.get(info.name),
            int8_spread_ms=None if int8 is None or floating else int8.spreads.get(info.name),
        )

    others_int8: dict[str, float] = {}
    if int8 is not None:
        others_int8 = {f"{name}, in float": ms for name, ms in int8.times.owners.items() if name in stay}
        others_int8 |= int8.times.others
    totals = {}
    for kind, measured in (("float", dense), ("int8", int8)):
        for (size, count), ms in measured.totals.items() if measured is not None else ():
            totals[f"batch {size}, {count} thread{'s' * (count != 1)}, {kind}"] = ms
    return PerformanceProfile(
        layers=tuple(layer(info) for info in analysis.layers),
        total_ms=dense.totals[first],
        total_int8_ms=None if int8 is None else int8.totals[first],
        totals=totals,
        batch_size=first[0],
        threads=first[1],
        content=content,
        versions=versions,
        profiled_ms=dense.times.total,
        profiled_int8_ms=None if int8 is None else int8.times.total,
        others=dense.times.others,
        others_int8=others_int8,
        widths=settings.widths if wide["float"] else (),
        width_total_ms=tuple(one.totals[first] for one in wide["float"]),
        width_total_int8_ms=tuple(one.totals[first] for one in wide["int8"]),
        width_profiled_ms=tuple(one.times.total for one in wide["float"]),
        width_profiled_int8_ms=tuple(one.times.total for one in wide["int8"]),
        notes=notes,
        model=name,
        total_spread_ms=dense.total_spread,
        total_int8_spread_ms=None if int8 is None else int8.total_spread,
        doubtful=doubtful,
    )


# ---------------------------------------------------------------------- inputs and the cache


def feed_of(proto: ModelProto, call: SampleInputs, size: int) -> dict[str, np.ndarray]:
    """The sample inputs repeated to a batch of `size` items."""
    feed = {}
    for value in proto.graph.input:
        tensor = call.inputs[value.name].detach().cpu()
        dims = value.type.tensor_type.shape.dim
        if len(dims) and dims[0].dim_param:
            tensor = tensor[torch.arange(size) % tensor.shape[0]]
        feed[value.name] = tensor.contiguous().numpy()
    if not any(
        len(v.type.tensor_type.shape.dim) and v.type.tensor_type.shape.dim[0].dim_param for v in proto.graph.input
    ):
        own = next((array.shape[0] for array in feed.values() if array.ndim), 1)
        if size != own:
            raise ArgumentError(
                f"batch_sizes: this model's forward fixes its batch to {own}; give sample_inputs of {size} items, and "
                f"batch_sizes=({size},)."
            )
    return feed


def _content(
    proto: ModelProto, feeds: Mapping[int, Mapping[str, np.ndarray]], settings: ProfileSettings
) -> tuple[str, dict[str, str]]:
    """(the hash of graph, shapes, settings, versions and processor; the versions)."""
    import onnx
    import onnxruntime

    versions = {
        "onnxruntime": onnxruntime.__version__,
        "onnx": onnx.__version__,
        "torch": torch.__version__,
        "processor": processor(),
    }
    hashed = hashlib.sha256()
    for node in proto.graph.node:
        hashed.update(node.SerializeToString(deterministic=True))
    for tensor in proto.graph.initializer:
        hashed.update(f"{tensor.name} {list(tensor.dims)} {tensor.data_type}".encode())
        if tensor.data_type == onnx.TensorProto.INT64:  # shapes and axes, which are part of the graph
            hashed.update(tensor.SerializeToString(deterministic=True))
    inputs = [[name, str(a.dtype), list(a.shape)] for feed in feeds.values() for name, a in feed.items()]
    hashed.update(json.dumps([PERFORMANCE_FORMAT, inputs, asdict(settings), versions], sort_keys=True).encode())
    return hashed.hexdigest(), versions


def processor() -> str:
    """The name of the processor, as far as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # Not on Linux.
    return platform.processor() or platform.machine()


def _cached(cache: Path | None, content: str) -> PerformanceProfile | None:
    """The profile that was kept for this content; None also for a damaged one: it is measured again, and replaced."""
    if cache is None:
        return None
    try:
        profile = PerformanceProfile.load(cache / f"{content}.json")
    except DataError:
        return None
    return profile if profile.content == content else None


def _cache(cache: Path | None, profile: PerformanceProfile) -> None:
    if cache is not None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArgumentError(f"cache: the folder {cache} cannot be made: {error.strerror or error}.") from error
        profile.save(cache / f"{profile.content}.json")
