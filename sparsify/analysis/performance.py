"""Times of each layer in onnxruntime: in float, in int8, and with fewer channels. Values, read and written as JSON."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from sparsify.errors import DataError
from sparsify.output.files import read_text, replacing
from sparsify.output.json_values import EXACT, from_json_object, json_object, json_text
from sparsify.output.tables import Column, Displayed, Table

__all__ = ["LayerPerformance", "PerformanceProfile"]

SPARSITIES = (0.0, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.975, 0.99)
SKIPPING_FLOOR = 0.1
"""The share of the dense time that a runtime which skips zeros still needs, for reading and writing activations."""
PERFORMANCE_FORMAT = 2
"""The format of saved profiles; raised whenever fields or the way of measuring change."""


@dataclass(frozen=True)
class LayerPerformance:
    """Times of one layer, by the name that it has in `ModelAnalysis`.

    Attributes:
        ms: one call of the model with the profile's batch, in float; measured, the layer's fused followers included.
        int8_ms: likewise in int8; None where it was not measured or stays in float.
        sparse_ms: at each of `SPARSITIES`, of a runtime that skips zeros: the stated cost model. onnxruntime skips
            none: its time is `ms` at each.
        width_ms: measured, at each of the profile's widths: this fraction of the channels in and out; None where
            nothing of it can be removed.
        width_int8_ms: likewise in int8.
        type: as in `ModelAnalysis`.
        spread_ms, int8_spread_ms: the lowest and the highest of the measurements that count, of `ms` and `int8_ms`.
    """

    __pydantic_config__ = EXACT

    name: str
    ms: float
    int8_ms: float | None
    sparse_ms: tuple[float, ...]
    width_ms: tuple[float, ...] | None
    width_int8_ms: tuple[float, ...] | None
    type: str = ""
    spread_ms: tuple[float, float] | None = None
    int8_spread_ms: tuple[float, float] | None = None


@dataclass(frozen=True)
class PerformanceProfile(Displayed):
    """Times of a whole model and of its layers. `str()` is three tables: the model, by operator, by layer.

    The profiler costs time itself, so what it saw (`profiled_ms`) is more than what the model takes (`total_ms`). The
    times of layers are the profiler's: `sum(layer.ms) + sum(others) == profiled_ms`, and likewise in int8.

    Attributes:
        total_ms, total_int8_ms: the whole model, without the profiler: the median of the calls, which were made at two
            times; the lower of both.
        totals: the whole model in float and int8 at further batch sizes and threads: {"batch 8, 2 threads, int8": ms}.
        content: the hash of what was measured; a profile of the same content is not measured again.
        versions: of onnxruntime and so on, and the processor.
        profiled_ms, profiled_int8_ms: the whole model as the profiler saw it.
        others, others_int8: what runs but belongs to no layer, by the node's name in the file ("block.0/Add"); layers
            that stay in float in the int8 file ("head, in float"); and what onnxruntime put in ("nowhere in the file").
        widths: the fractions of channels that were measured; empty where none was.
        width_total_ms, width_total_int8_ms: the whole model at these widths, without the profiler.
        width_profiled_ms, width_profiled_int8_ms: the same as the profiler saw it.
        notes: what could not be measured, and why: {"int8": ..., "widths": ...}.
        total_spread_ms, total_int8_spread_ms: the lowest and the highest of the measurements of `total_ms` and
            `total_int8_ms`.
        doubtful: {layer: why its times are not believed}, also after measuring again: layers that took different
            times, or others than layers that compute the same, or are faster in int8 than any kernel is. The machine
            did something else too.
    """

    __pydantic_config__ = EXACT

    layers: tuple[LayerPerformance, ...]
    total_ms: float
    total_int8_ms: float | None
    totals: Mapping[str, float]
    batch_size: int
    threads: int
    content: str
    versions: Mapping[str, str]
    profiled_ms: float = 0.0
    profiled_int8_ms: float | None = None
    others: Mapping[str, float] = field(default_factory=dict)
    others_int8: Mapping[str, float] = field(default_factory=dict)
    widths: tuple[float, ...] = ()
    width_total_ms: tuple[float, ...] = ()
    width_total_int8_ms: tuple[float, ...] = ()
    width_profiled_ms: tuple[float, ...] = ()
    width_profiled_int8_ms: tuple[float, ...] = ()
    notes: Mapping[str, str] = field(default_factory=dict)
    model: str = ""
    total_spread_ms: tuple[float, float] | None = None
    total_int8_spread_ms: tuple[float, float] | None = None
    doubtful: Mapping[str, str] = field(default_factory=dict)

    def layer(self, name: str) -> LayerPerformance:
        """The times of the layer `name`."""
        return next(layer for layer in self.layers if layer.name == name)

    @property
    def sparse_total_ms(self) -> tuple[float, ...]:
        """The whole model at each of `SPARSITIES` in a runtime that skips zeros: what layers save, off `total_ms`.

        By the cost model of `performance_profile`; in onnxruntime the time is `total_ms` at each.
        """
        rest = sum(self.others.values())
        scale = self.total_ms / self.profiled_ms if self.profiled_ms else 0.0
        return tuple(scale * (rest + sum(layer.sparse_ms[i] for layer in self.layers)) for i in range(len(SPARSITIES)))

    def tables(self) -> tuple[Table, Table, Table]:
        """The model, by operator, by layer."""
        return self._summary(), self._by_operator(), self._by_layer()

    def _summary(self) -> Table:
        rows: list[dict[str, object]] = []

        def add(what: str, ms: float, spread: tuple[float, float] | None = None) -> None:
            items, speedup = (1e3 * self.batch_size / ms, self.total_ms / ms) if ms else (None, None)
            rows.append({"what": what, "ms": ms, "spread": _half(spread, ms), "items": items, "x": speedup})

        add("float", self.total_ms, self.total_spread_ms)
        if self.total_int8_ms is not None:
            add("int8", self.total_int8_ms, self.total_int8_spread_ms)
        for kind, totals in (("float", self.width_total_ms), ("int8", self.width_total_int8_ms)):
            for width, ms in zip(self.widths, totals, strict=False):
                if width < 1:
                    add(f"{kind}, {width:.1%} of the channels", ms)
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
        columns = (
            Column("what", "Model"),
            Column("ms", "ms per batch", ".3f"),
            Column("spread", "Spread", ".0%"),
            Column("items", "Items/s", ",.1f"),
            Column("x", "Speed-up", ".2f"),
        )
        return Table.of(f"{self.model}: batch {self.batch_size}, {threads}, onnxruntime", rows, columns)

    def _by_operator(self) -> Table:
        times: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        for layer in self.layers:
            entry = times[layer.type or "layer"]
            entry[0] += 1
            entry[1] += layer.ms
            entry[2] += layer.int8_ms or 0.0
        for label in dict.fromkeys([*self.others, *self.others_int8]):
            entry = times[_layer_operator(label)]
            entry[0] += 1
            entry[1] += self.others.get(label, 0.0)
            entry[2] += self.others_int8.get(label, 0.0)
        rows = [
            {
                "type": kind,
                "count": int(count),
                "ms": ms,
                "share": ms / self.profiled_ms if self.profiled_ms else None,
                "int8": int8 if self.profiled_int8_ms is not None else None,
            }
            for kind, (count, ms, int8) in sorted(times.items(), key=lambda item: -item[1][1])
        ]
        columns = (
            Column("type", "Operator"),
            Column("count", "Number", "d"),
            Column("ms", "ms", ".3f"),
            Column("share", "Share", ".1%"),
            Column("int8", "int8 ms", ".3f"),
        )
        return Table.of("By operator", rows, columns)

    def _by_layer(self) -> Table:
        half = self.widths.index(0.5) if 0.5 in self.widths else None
        rows: list[dict[str, object]] = [
            {
                "name": f"{layer.name} (?)" if layer.name in self.doubtful else layer.name,
                "type": layer.type,
                "ms": layer.ms,
                "spread": _half(layer.spread_ms, layer.ms),
                "share": layer.ms / self.profiled_ms if self.profiled_ms else None,
                "int8": layer.int8_ms,
                "half": layer.width_ms[half] if layer.width_ms and half is not None else None,
                "skip": layer.sparse_ms[SPARSITIES.index(0.9)],
            }
            for layer in self.layers
        ]
        dense, int8 = sum(self.others.values()), sum(self.others_int8.values())
        rest: dict[str, object] = {
            "name": "in no layer",
            "type": "",
            "ms": dense,
            "spread": None,
            "int8": int8,
            "half": None,
            "skip": dense,
        }
        rest["share"] = dense / self.profiled_ms if self.profiled_ms else None
        columns = [
            Column("name", "Layer"),
            Column("type", "Type", left=True),
            Column("ms", "ms", ".3f"),
            Column("spread", "Spread", ".0%"),
            Column("share", "Share", ".1%"),
            Column("int8", "int8 ms", ".3f"),
            Column("half", "half as wide", ".3f"),
            Column("skip", "90% zeros, if skipped", ".3f"),
        ]
        rows.append(rest)
        shown = [column for column in columns if any(row[column.field] is not None for row in rows)]
        return Table.of("By layer, under the profiler (onnxruntime itself skips no zeros)", rows, shown)

    _between = "\n\n"

    def _parts(self) -> list[Table | str]:
        found: list[Table | str] = [
            *self.tables(),
            *(f"{what}: not measured: {why}" for what, why in self.notes.items()),
        ]
        if self.doubtful:
            layers = "".join(f"\n  {name} {why}" for name, why in self.doubtful.items())
            found.append(f"Not believed (?): the machine was busy. Measure again when it is quiet.{layers}")
        return found

    def to_json(self) -> str:
        """JSON that `from_json` reads back into an equal profile."""
        return json_text(self, {"format": PERFORMANCE_FORMAT}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> PerformanceProfile:
        """The profile that `to_json` wrote as `text`.

        Raises:
            DataError: another text, or a profile of another format.
        """
        try:
            state = json_object(text)
            written = state.pop("format")
            if written != PERFORMANCE_FORMAT:
                raise DataError(
                    f"a performance profile of format {written}; this version reads {PERFORMANCE_FORMAT}. "
                    "Measure again."
                )
            return from_json_object(cls, state)
        except DataError:
            raise
        except (ValueError, KeyError) as error:
            raise DataError(f"not a performance profile: {error}. Measure again.") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the profile to `path` as JSON, whole or not at all.

        Raises:
            DataFileError: it cannot be written.
        """
        with replacing(path) as temporary:
            temporary.write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PerformanceProfile:
        """The profile that `save` wrote to `path`.

        Raises:
            DataFileError: it is missing or unreadable. DataError: it holds something else.
        """
        text = read_text(path)
        try:
            return cls.from_json(text)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error


def _half(spread: tuple[float, float] | None, ms: float) -> float | None:
    """Half of the way from the lowest to the highest time, as a share of `ms`."""
    return (spread[1] - spread[0]) / 2 / ms if spread is not None and ms else None


def _layer_operator(label: str) -> str:
    """The operator in the label of a time that belongs to no layer.

    >>> [_layer_operator(label) for label in ("block.0/Add_2", "nowhere in the file/ReorderOutput", "head, in float")]
    ['Add', 'ReorderOutput', 'in float']
    """
    if "/" not in label:
        return label.rpartition(", ")[2]
    last = label.rpartition("/")[2]
    head, _, number = last.rpartition("_")
    return head if head and number.isdigit() else last
