"""A time instead of a sparsity: which channels and which precision of each layer reach it at the least loss."""

from __future__ import annotations

import bisect
import math
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.errors import ArgumentError, StateError
from sparsify.optimize.widths import Choice, Curve, LayerTime, Part, Tables
from sparsify.report import Column, Table

if TYPE_CHECKING:
    from torch import nn

    from sparsify.analysis.loss import LossProfile
    from sparsify.analysis.performance import PerformanceProfile
    from sparsify.families import Families

__all__ = ["LatencyPlan", "LatencyRound", "latency_plan"]

STEPS = 16
"""Shares of the channels that are tried: sixteenths, rounded to what the family's kernels like."""
ROUNDS = 4


@dataclass(frozen=True)
class LatencyRound:
    """One solution that was measured as a whole. `predicted_ms` is with what the rounds before it had shown."""

    predicted_ms: float
    measured_ms: float
    loss: float

    @property
    def error(self) -> float:
        """predicted / measured - 1: above 0 where the model is faster than was foreseen."""
        return self.predicted_ms / self.measured_ms - 1.0


@dataclass(frozen=True)
class LatencyPlan:
    """What each layer gets so that the model takes at most `goal_ms`. `str()` is a table.

    Attributes:
        sparsity: {layer: fraction of its channels that go}, in the words of StructuredPruningModifier: all layers whose
            rows go together have one. Layers that stay whole are left out.
        channels: {layer: (channels before, after)} of the same.
        weights: {layer: the parameter that gives its channels} of the same.
        bits: {layer: 8 or 32} of every layer that computes.
        dense_ms: the model as it is, in float.
        predicted_ms: by the tables, before anything was known of the whole.
        measured_ms: the model with these widths and bits, exported and run; None where it was not measured.
        loss: what is expected to be added, the sum over layers in the unit of the loss profile.
        rounds: every solution that was measured, in order.
        loss_method: where the losses are from: that of the profile, or "norms", the share of the squared norm of the
            weights of each family that goes.
    """

    goal_ms: float
    batch_size: int
    threads: int
    sparsity: Mapping[str, float]
    channels: Mapping[str, tuple[int, int]]
    weights: Mapping[str, str]
    bits: Mapping[str, int]
    dense_ms: float
    predicted_ms: float
    measured_ms: float | None
    loss: float
    loss_method: str
    rounds: tuple[LatencyRound, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def error(self) -> float | None:
        """Of the prediction: predicted / measured - 1; None where it was not measured."""
        return None if self.measured_ms is None else self.predicted_ms / self.measured_ms - 1.0

    @property
    def floating(self) -> tuple[str, ...]:
        """The layers that stay in float, for `ignore` of QuantizationModifier; empty where nothing is quantized."""
        if all(bits > 8 for bits in self.bits.values()):
            return ()
        return tuple(name for name, bits in self.bits.items() if bits > 8)

    @property
    def quantized(self) -> bool:
        """Whether any layer is in int8."""
        return any(bits <= 8 for bits in self.bits.values())

    def final_sparsity(self) -> dict[float, list[str]]:
        """The value of that field of StructuredPruningModifier, with `params: []`: {sparsity: parameters}."""
        found: dict[float, list[str]] = defaultdict(list)
        for name, share in self.sparsity.items():
            found[share].append(self.weights[name])
        return dict(sorted(found.items()))

    def table(self) -> Table:
        rows = [
            {
                "name": name,
                "before": self.channels[name][0] if name in self.channels else None,
                "after": self.channels[name][1] if name in self.channels else None,
                "sparsity": self.sparsity.get(name),
                "bits": self.bits.get(name),
            }
            for name in dict.fromkeys([*self.bits, *self.sparsity])
        ]
        columns = (
            Column("name", "Layer"),
            Column("before", "Channels", "d"),
            Column("after", "stay", "d"),
            Column("sparsity", "go", ".1%"),
            Column("bits", "Bits", "d"),
        )
        measured = "not measured" if self.measured_ms is None else f"measured {self.measured_ms:.3f} ms"
        error = "" if self.error is None else f" ({self.error:+.1%})"
        title = (
            f"At most {self.goal_ms:.3f} ms at batch {self.batch_size}: predicted {self.predicted_ms:.3f} ms{error}, "
            f"{measured}; as it is {self.dense_ms:.3f} ms; loss +{self.loss:.4g} ({self.loss_method})"
        )
        return Table.of(title, rows, columns)

    def __str__(self) -> str:
        return "\n".join([self.table().text(), *(f"note: {note}" for note in self.notes)])

    def to_json(self) -> str:
        return dumps(asdict(self), indent=1)


def latency_plan(
    model: nn.Module,
    sample_inputs: Any,
    goal_ms: float,
    *,
    batch_size: int = 1,
    threads: int = 1,
    performance: PerformanceProfile | None = None,
    loss: LossProfile | None = None,
    int8: bool = True,
    int8_loss: LossProfile | None = None,
    limits: Mapping[str, float] | None = None,
    measure: bool = True,
    iterations: int = 30,
    progress: bool | None = None,
) -> LatencyPlan:
    """Widths and bits for each layer with the least loss that was found for a model that takes at most `goal_ms`.

    The table of a layer was measured with all channels of the model equally narrow; at other widths its time is read
    off at the share of its multiplications that is left, and what belongs to no layer at the mean width. So the time of
    the whole is foreseen with an error: the solution is really shrunk, quantized, exported and measured. Where it
    misses the goal the tables are scaled by what was seen and it is solved again, up to four times.

    The model itself is not touched.

    Args:
        goal_ms: of one call with `batch_size` items, in onnxruntime on `threads` threads of this machine.
        performance: what `performance_profile` gave at this batch size and these threads; None: it is measured now.
        loss: of pruning, by family where it is structured (`loss_profile(..., structured=True)`); families without a
            loss in it stay whole. Otherwise the losses of the layers whose rows go together are added up. None: of each
            family the share of the squared norm of its weights that goes.
        int8: whether layers may be quantized: all that can be, or with `int8_loss` those where it pays.
        int8_loss: a loss profile of quantization with 8 bits among its levels.
        limits: {layer: the highest fraction of its channels that may go}.
        measure: False leaves the prediction unchecked.
        iterations: timed calls of each solution.
        progress: whether a bar is shown; None: on a terminal.

    Raises:
        ArgumentError: a goal that cannot be met, with the best that can be reached; a wrong argument; profiles that do
            not fit the model or each other.
        StateError: the model is quantized already, or nothing of it can be removed or quantized.
        ExportError: the model cannot be exported.
    """
    from torch import nn

    from sparsify.analysis.forms import cuttable
    from sparsify.analysis.performance import performance_profile
    from sparsify.quantize.plan import is_quantized
    from sparsify.signature import Call, unwrapped

    if isinstance(goal_ms, bool) or not isinstance(goal_ms, (int, float)) or not 0 < goal_ms < math.inf:
        raise ArgumentError(f"goal_ms={goal_ms!r}: give milliseconds, a number above 0.")
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is a {type(model).__name__}: give a torch.nn.Module.")
    model = unwrapped(model)
    if is_quantized(model):
        raise StateError(f"{type(model).__name__} is quantized already; give the float model.")
    _check_losses(loss, int8_loss)
    if performance is None:
        performance = performance_profile(
            model, sample_inputs, batch_sizes=(batch_size,), threads=(threads,), quantized=int8, progress=progress
        )
    _check_performance(performance, batch_size, threads)
    families, why = cuttable(model, Call.of(model, sample_inputs))
    notes = [f"nothing is removed: {why}"] if families is None else []
    if int8 and performance.total_int8_ms is None:
        notes.append(f"nothing is quantized: {performance.notes.get('int8', 'int8 was not measured')}")
        int8 = False
    if families is None and not int8:
        raise StateError(f"nothing can be done for {type(model).__name__}: {'; '.join(notes)}")
    work = _Work(model, sample_inputs, performance, families, int8, loss, int8_loss, _checked_limits(limits))
    notes += work.notes
    whole = f"{type(model).__name__} at batch {batch_size} on {threads} thread{'s' * (threads != 1)}"
    choice = work.tables.solve(goal_ms)
    if choice is None:
        best = work.tables.fastest()
        raise ArgumentError(
            f"goal_ms={goal_ms:g} cannot be met: {whole} takes {performance.total_ms:.3f} ms and, by the measured "
            f"tables, {best.ms:.3f} ms at best, where everything is as narrow as was measured"
            f"{' and in int8' if best.int8 else ''}. Give a goal above that, or wider limits."
        )
    plan = work.plan(choice, goal_ms, batch_size, threads, notes)
    if not measure:
        return plan
    return _measured(work, plan, choice, iterations, whole)


def _measured(work: _Work, plan: LatencyPlan, choice: Choice, iterations: int, whole: str) -> LatencyPlan:
    """Solved again until the whole, as it really runs, meets the goal."""
    scale = 1.0
    rounds: list[LatencyRound] = []
    met: LatencyPlan | None = None
    tried: dict[tuple[tuple[tuple[str, float], ...], frozenset[str]], float] = {}
    for _ in range(ROUNDS):
        key = (tuple(sorted(choice.shares.items())), choice.int8)
        if key in tried:
            break
        ms = tried[key] = work.measure(choice, plan.batch_size, plan.threads, iterations)
        rounds.append(LatencyRound(choice.ms * scale, ms, choice.loss))
        if ms <= plan.goal_ms and (met is None or choice.loss < met.loss):
            met = replace(
                work.plan(choice, plan.goal_ms, plan.batch_size, plan.threads, list(plan.notes)), measured_ms=ms
            )
        # A hair more than what was seen, so that the next one does not miss by a hair.
        scale = ms / choice.ms * (1.01 if ms > plan.goal_ms else 1.0)
        again = work.tables.solve(plan.goal_ms / scale)
        if again is None or (met is not None and again.loss >= met.loss):
            break
        choice = again
    if met is None:
        fastest = work.tables.fastest()
        best = min(min(tried.values()), work.measure(fastest, plan.batch_size, plan.threads, iterations))
        if best <= plan.goal_ms:
            measured = replace(
                work.plan(fastest, plan.goal_ms, plan.batch_size, plan.threads, list(plan.notes)), measured_ms=best
            )
            return replace(measured, rounds=(*rounds, LatencyRound(fastest.ms * scale, best, fastest.loss)))
        raise ArgumentError(
            f"goal_ms={plan.goal_ms:g} was not met: of {len(rounds) + 1} solutions that were measured the fastest "
            f"takes {best:.3f} ms ({whole}; as it is {plan.dense_ms:.3f} ms). Give a goal above that, or measure on a "
            "machine that does nothing else."
        )
    return replace(met, rounds=tuple(rounds))


class _Work:
    """A model, what was measured of it, and the tables made of that."""

    def __init__(
        self,
        model: nn.Module,
        sample_inputs: Any,
        performance: PerformanceProfile,
        families: Families | None,
        int8: bool,
        loss: LossProfile | None,
        int8_loss: LossProfile | None,
        limits: Mapping[str, float],
    ) -> None:
        from sparsify.analysis.layers import analyze_model

        self.model, self.sample_inputs, self.performance = model, sample_inputs, performance
        self.families, self.int8 = families, int8
        self.notes: list[str] = []
        self.loss_method = "norms" if loss is None else loss.method
        self.analysis = {info.name: info for info in analyze_model(model, sample_inputs).layers}
        strange = [layer.name for layer in performance.layers if layer.name not in self.analysis]
        if strange:
            raise ArgumentError(f"performance is of another model: it has {strange[0]!r}, which this one has not.")
        self.layer_of = {info.weight: info.name for info in self.analysis.values() if info.weight is not None}
        self.parts: dict[str, tuple[str, ...]] = {}
        self.counts: dict[str, dict[float, int]] = {}
        self.tables = self._tables(loss, int8_loss, limits)

    # ------------------------------------------------------------------ tables

    def _tables(self, loss: LossProfile | None, int8_loss: LossProfile | None, limits: Mapping[str, float]) -> Tables:
        parts = [] if self.families is None else self._parts(self.families, loss, limits)
        profile = self.performance
        grid = profile.widths or (1.0,)
        usable = {part.name for part in parts}
        dims = self._dims(usable)
        scale = {"float": _scales(profile, int8=False), "int8": _scales(profile, int8=True)}
        times: list[LayerTime] = []
        rest = {"float": [0.0] * len(grid), "int8": [0.0] * len(grid)}
        wide = {
            "float": profile.width_profiled_ms or (profile.profiled_ms,) * len(grid),
            "int8": profile.width_profiled_int8_ms or (profile.profiled_int8_ms or 0.0,) * len(grid),
        }
        for kind in rest:
            rest[kind] = [total * factor for total, factor in zip(wide[kind], scale[kind], strict=True)]
        for layer in profile.layers:
            mine = dims.get(layer.name, ())
            if not mine and layer.width_ms and self.analysis[layer.name].weight is None:
                continue  # Computed of activations that become narrower: one of the rest.
            left = [self._left(mine, width) for width in grid]

            def curve(dense: float, at_widths: tuple[float, ...] | None, kind: str, left: list[float] = left) -> Curve:
                found = [ms * factor for ms, factor in zip(at_widths or (dense,) * len(grid), scale[kind], strict=True)]
                rest[kind] = [all_of_it - ms for all_of_it, ms in zip(rest[kind], found, strict=True)]
                return Curve.of(left, found)

            # A layer that stays as it is takes what it takes at full width.
            own = curve(layer.ms, layer.width_ms if mine else None, "float")
            quantized = None
            if self.int8 and layer.int8_ms is not None:
                quantized = curve(layer.int8_ms, layer.width_int8_ms if mine else None, "int8")
            else:
                # In float there as well.
                curve(layer.ms, layer.width_ms if mine else None, "int8")
            times.append(LayerTime(layer.name, mine, own, quantized, self._int8_loss(layer.name, int8_loss)))
        return Tables(
            tuple(parts),
            tuple(times),
            Curve.of(grid, [max(ms, 0.0) for ms in rest["float"]]),
            Curve.of(grid, [max(ms, 0.0) for ms in rest["int8"]]) if self.int8 else None,
        )

    def _left(self, dims: tuple[Mapping[str, float], ...], width: float) -> float:
        """The share of the multiplications that the profile left at a width, after rounding."""
        shares = {part: self._rounded(part, width) for dim in dims for part in dim}
        return LayerTime("", dims, Curve((1.0,), (0.0,))).left(shares)

    def _rounded(self, part: str, width: float) -> float:
        from sparsify.analysis.forms import kept_channels

        assert self.families is not None
        name = self.parts[part][0]
        return kept_channels(self.families, name, width) / self.families.families[name].size

    def _parts(self, families: Families, loss: LossProfile | None, limits: Mapping[str, float]) -> list[Part]:
        """Families with a weight in common are named together, so they have one share."""
        from sparsify.analysis.forms import kept_channels

        groups: list[tuple[set[str], list[str]]] = []
        for name, family in families.families.items():
            rows, names = set(family.rows), [name]
            for other in [group for group in groups if group[0] & rows]:
                groups.remove(other)
                rows, names = rows | other[0], [*other[1], *names]
            groups.append((rows, names))
        least = min(self.performance.widths, default=1.0)
        unknown = set(limits) - {self._layer(row) for rows, _ in groups for row in rows}
        if unknown:
            raise ArgumentError(f"limits: {min(unknown)!r} is no layer with channels that can go.")
        found = []
        for rows, names in groups:
            sizes = {families.families[name].size for name in names}
            layers = [self._layer(row) for row in rows]
            lowest = max([least, *(1 - limits[layer] for layer in layers if layer in limits)])
            shares: dict[float, int] = {}
            for step in range(STEPS, -1, -1):
                counts = {kept_channels(families, name, max(step / STEPS, lowest)) for name in names}
                share = max(counts) / max(sizes)
                if len(sizes) == len(counts) == 1 and share >= lowest - 1e-9:
                    shares[share] = counts.pop()
            losses = None if not shares else self._losses(families, names, tuple(shares), loss)
            if losses is None or len(shares) < 2:
                continue
            name = names[0]
            self.parts[name], self.counts[name] = tuple(names), shares
            found.append(Part(name, tuple(shares), losses, float(sum(sizes))))
        return found

    def _losses(
        self, families: Families, names: list[str], shares: tuple[float, ...], loss: LossProfile | None
    ) -> tuple[float, ...] | None:
        """At each share; None where the profile does not know these channels."""
        if loss is None:
            from sparsify.channels import norms

            squares = norms(self.model, {name: families.families[name] for name in names})
            found = [0.0] * len(shares)
            for score in squares.values():
                ordered = score.square().sort().values.cumsum(0)
                for i, share in enumerate(shares):
                    gone = round(score.numel() * (1 - share))
                    found[i] += float(ordered[gone - 1] / ordered[-1].clamp(min=1e-300)) if gone else 0.0
            return tuple(found)
        keys: list[str] = []
        for name in names:
            layers = [self._layer(row) for row in families.families[name].rows]
            if loss.families:
                keys += [key for key, members in loss.families.items() if set(members) & set(layers)]
            else:
                keys += [layer for layer in layers if layer in loss.losses]
        if not keys:
            self.notes.append(f"{self._layer(names[0])} stays whole: the loss profile does not have it")
            return None
        total = [0.0] * len(shares)
        for key in dict.fromkeys(keys):
            increase = loss.increase(key)
            for i, share in enumerate(shares):
                total[i] += _at(loss.levels, increase, 1 - share)
        return tuple(total)

    def _dims(self, usable: set[str]) -> dict[str, tuple[Mapping[str, float], ...]]:
        """For each layer, which share of each dimension of its weight belongs to which part."""
        found: dict[str, dict[int, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
        heads: dict[str, str] = {}
        for part, names in self.parts.items():
            assert self.families is not None
            for name in names:
                family = self.families.families[name]
                for place in family.places:
                    layer = self.layer_of.get(place.tensor)
                    if layer is None or part not in usable:
                        continue
                    own = sum(channel >= 0 for channel in place.channels) / len(place.channels)
                    entry = found[layer][place.dim]
                    entry[part] = entry.get(part, 0.0) + own
                    if family.kind == "heads":
                        heads.setdefault(layer.rpartition(".")[0], part)
        dims: dict[str, tuple[Mapping[str, float], ...]] = {
            layer: tuple(entries.values()) for layer, entries in found.items()
        }
        for info in self.analysis.values():
            # A product of activations in attention follows its heads.
            owner = info.name.rpartition(".")[0]
            if info.weight is None and owner in heads:
                dims[info.name] = ({heads[owner]: 1.0},)
        return dims

    def _int8_loss(self, layer: str, profile: LossProfile | None) -> float:
        if profile is None or layer not in profile.losses:
            return 0.0
        return profile.increase(layer)[profile.levels.index(8)]

    def _layer(self, weight: str) -> str:
        return self.layer_of.get(weight, weight.removesuffix(".weight"))

    # ------------------------------------------------------------------ the answer

    def plan(self, choice: Choice, goal_ms: float, batch_size: int, threads: int, notes: list[str]) -> LatencyPlan:
        sparsity: dict[str, float] = {}
        channels: dict[str, tuple[int, int]] = {}
        weights: dict[str, str] = {}
        for part, share in choice.shares.items():
            assert self.families is not None
            for name in self.parts[part] if share < 1 else ():
                family = self.families.families[name]
                kept = self.counts[part][share]
                for row in family.rows:
                    sparsity[self._layer(row)] = 1 - kept / family.size
                    channels[self._layer(row)] = (family.size, kept)
                    weights[self._layer(row)] = row
        bits = {name: 8 if name in choice.int8 else info.bits for name, info in self.analysis.items() if info.weight}
        return LatencyPlan(
            goal_ms=float(goal_ms),
            batch_size=batch_size,
            threads=threads,
            sparsity=sparsity,
            channels=channels,
            weights=weights,
            bits=bits,
            dense_ms=self.performance.total_ms,
            predicted_ms=choice.ms,
            measured_ms=None,
            loss=choice.loss,
            loss_method=self.loss_method,
            notes=tuple(notes),
        )

    def measure(self, choice: Choice, batch_size: int, threads: int, iterations: int) -> float:
        """The whole, really shrunk and quantized, exported and run: the lowest of three medians."""
        from sparsify.analysis.forms import as_int8, export, narrowed
        from sparsify.analysis.measuring import feed_of, median_ms
        from sparsify.runtime import open_session, read_model
        from sparsify.signature import Call

        model = self.model
        if self.families is not None:
            shares = {name: choice.shares[part] for part, names in self.parts.items() for name in names}
            model = narrowed(model, self.families, shares)
        if choice.int8:
            floating = [layer.name for layer in self.tables.layers if layer.int8 and layer.name not in choice.int8]
            model = as_int8(model, self.sample_inputs, floating)
        with tempfile.TemporaryDirectory(prefix="sparsify-") as text:
            path = Path(text) / "model.onnx"
            export(model, self.sample_inputs, path)
            proto = read_model(path)
            feed = feed_of(proto, Call.of(self.model, self.sample_inputs), batch_size)
            session = open_session(path, threads=threads, model=proto)
            # What disturbs the machine for a moment counts in one of three at most.
            return min(median_ms(session, feed, 5, max(iterations // 3, 1)) for _ in range(3))


def _scales(profile: PerformanceProfile, *, int8: bool) -> tuple[float, ...]:
    """At each width, what the profiler's times are multiplied with so that they add up to those without it."""
    profiled = profile.width_profiled_int8_ms if int8 else profile.width_profiled_ms
    totals = profile.width_total_int8_ms if int8 else profile.width_total_ms
    if not profiled or not totals:
        whole = profile.profiled_int8_ms if int8 else profile.profiled_ms
        total = profile.total_int8_ms if int8 else profile.total_ms
        return (total / whole if whole and total else 1.0,) * (len(profile.widths) or 1)
    return tuple(total / seen if seen else 1.0 for total, seen in zip(totals, profiled, strict=True))


def _at(levels: tuple[float, ...], values: tuple[float, ...], level: float) -> float:
    """Between two levels, linear; beyond the last, along its last slope."""
    at = min(max(bisect.bisect_left(levels, level), 1), len(levels) - 1)
    low, high = levels[at - 1], levels[at]
    return values[at - 1] + (values[at] - values[at - 1]) * (level - low) / (high - low)


def _check_losses(loss: LossProfile | None, int8_loss: LossProfile | None) -> None:
    if loss is not None and (loss.of != "pruning" or len(loss.levels) < 2):
        raise ArgumentError(f"loss is a profile of {loss.of} at {len(loss.levels)} levels; give one of pruning.")
    if int8_loss is not None and (int8_loss.of != "quantization" or 8 not in int8_loss.levels):
        raise ArgumentError(
            f"int8_loss is a profile of {int8_loss.of} at {', '.join(map(str, int8_loss.levels))}; give one of "
            "quantization with 8 bits among its levels."
        )


def _checked_limits(limits: Mapping[str, float] | None) -> dict[str, float]:
    for name, limit in (limits or {}).items():
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0 <= limit <= 1:
            raise ArgumentError(f"limits: {limit!r} for {name!r} is no fraction in [0, 1].")
    return dict(limits or {})


def _check_performance(profile: PerformanceProfile, batch_size: int, threads: int) -> None:
    if (profile.batch_size, profile.threads) != (batch_size, threads):
        raise ArgumentError(
            f"performance was measured at batch {profile.batch_size} on {profile.threads} threads, and the goal is for "
            f"batch {batch_size} on {threads}. Measure it so, or leave it out."
        )
