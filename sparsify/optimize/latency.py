"""Chooses channels and precision of each layer that reach a latency at the least loss."""

from __future__ import annotations

import math
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING

from sparsify.analysis.profiling import feed_of, median_ms, performance_profile
from sparsify.analysis.variants import as_int8, cuttable, export, narrowed
from sparsify.errors import ArgumentError, StateError
from sparsify.model.signature import SampleInputs, check_module
from sparsify.model.wrappers import unwrapped
from sparsify.onnx.runtime import open_session, read_model
from sparsify.optimize.latency_tables import ModelTables
from sparsify.optimize.widths import Choice
from sparsify.output.tables import Column, Displayed, Table
from sparsify.quantization.plan import is_quantized

if TYPE_CHECKING:
    from torch import nn

    from sparsify.analysis.loss import LossProfile
    from sparsify.analysis.performance import PerformanceProfile
    from sparsify.model.signature import InputsLike

__all__ = ["LatencyPlan", "LatencyRound", "latency_plan"]

SEARCH_ROUNDS = 4


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
class LatencyPlan(Displayed):
    """The channels and bits of each layer with which the model takes at most `goal_ms`. `str()` is a table.

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
            weights of each channel group that goes.
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
        """Relative error of the prediction: predicted / measured - 1; None where it was not measured."""
        return None if self.measured_ms is None else self.predicted_ms / self.measured_ms - 1.0

    @property
    def floating(self) -> tuple[str, ...]:
        """The layers that stay in float, for `ignore` of QuantizationModifier; empty where nothing is quantized."""
        if all(bits > 8 for bits in self.bits.values()):
            return ()
        return tuple(name for name, bits in self.bits.items() if bits > 8)

    @property
    def quantized(self) -> bool:
        """True if any layer is in int8."""
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

    def _parts(self) -> list[Table | str]:
        return [self.table(), *(f"note: {note}" for note in self.notes)]

    def to_json(self) -> str:
        return dumps(asdict(self), indent=1)


def latency_plan(
    model: nn.Module,
    sample_inputs: InputsLike,
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
        model: a float model.
        sample_inputs: as the model is called with them.
        goal_ms: of one call with `batch_size` items, in onnxruntime on `threads` threads of this machine.
        batch_size: items in one call.
        threads: of onnxruntime.
        performance: what `performance_profile` gave at this batch size and these threads; None: it is measured now.
        loss: of pruning, by channel group where it is structured (`loss_profile(..., structured=True)`); channel groups
            without a loss in it stay whole. Otherwise the losses of the layers whose rows go together are added up.
            None: the share of the squared norm that a channel group's weights lose.
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
    if isinstance(goal_ms, bool) or not isinstance(goal_ms, (int, float)) or not 0 < goal_ms < math.inf:
        raise ArgumentError(f"goal_ms={goal_ms!r}: give milliseconds, a number above 0.")
    check_module(model)
    model = unwrapped(model)
    if is_quantized(model):
        raise StateError(f"{type(model).__name__} is quantized already; give the float model.")
    _check_losses(loss, int8_loss)
    if performance is None:
        performance = performance_profile(
            model, sample_inputs, batch_sizes=(batch_size,), threads=(threads,), quantized=int8, progress=progress
        )
    _check_performance(performance, batch_size, threads)
    channel_groups, why = cuttable(model, SampleInputs.of(model, sample_inputs))
    notes = [f"nothing is removed: {why}"] if channel_groups is None else []
    if int8 and performance.total_int8_ms is None:
        notes.append(f"nothing is quantized: {performance.notes.get('int8', 'int8 was not measured')}")
        int8 = False
    if channel_groups is None and not int8:
        raise StateError(f"nothing can be done for {type(model).__name__}: {'; '.join(notes)}")
    work = ModelTables(
        model, sample_inputs, performance, channel_groups, int8, loss, int8_loss, _checked_limits(limits)
    )
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
    plan = _width_plan(work, choice, goal_ms, batch_size, threads, notes)
    if not measure:
        return plan
    return _measured_ms(work, plan, choice, iterations, whole)


def _measured_ms(work: ModelTables, plan: LatencyPlan, choice: Choice, iterations: int, whole: str) -> LatencyPlan:
    """The plan solved again until the whole model, as it really runs, meets the goal."""
    scale = 1.0
    rounds: list[LatencyRound] = []
    met: LatencyPlan | None = None
    tried: dict[tuple[tuple[tuple[str, float], ...], frozenset[str]], float] = {}
    for _ in range(SEARCH_ROUNDS):
        key = (tuple(sorted(choice.shares.items())), choice.int8)
        if key in tried:
            break
        ms = tried[key] = _measure(work, choice, plan.batch_size, plan.threads, iterations)
        rounds.append(LatencyRound(choice.ms * scale, ms, choice.loss))
        if ms <= plan.goal_ms and (met is None or choice.loss < met.loss):
            met = replace(
                _width_plan(work, choice, plan.goal_ms, plan.batch_size, plan.threads, list(plan.notes)), measured_ms=ms
            )
        # 1 % more than was measured, so that the next solution does not miss the goal by a little.
        scale = ms / choice.ms * (1.01 if ms > plan.goal_ms else 1.0)
        again = work.tables.solve(plan.goal_ms / scale)
        if again is None or (met is not None and again.loss >= met.loss):
            break
        choice = again
    if met is None:
        fastest = work.tables.fastest()
        best = min(min(tried.values()), _measure(work, fastest, plan.batch_size, plan.threads, iterations))
        if best <= plan.goal_ms:
            measured = replace(
                _width_plan(work, fastest, plan.goal_ms, plan.batch_size, plan.threads, list(plan.notes)),
                measured_ms=best,
            )
            return replace(measured, rounds=(*rounds, LatencyRound(fastest.ms * scale, best, fastest.loss)))
        raise ArgumentError(
            f"goal_ms={plan.goal_ms:g} was not met: of {len(rounds) + 1} solutions that were measured the fastest "
            f"takes {best:.3f} ms ({whole}; as it is {plan.dense_ms:.3f} ms). Give a goal above that, or measure on a "
            "machine that does nothing else."
        )
    return replace(met, rounds=tuple(rounds))


def _width_plan(
    tables: ModelTables, choice: Choice, goal_ms: float, batch_size: int, threads: int, notes: list[str]
) -> LatencyPlan:
    sparsity: dict[str, float] = {}
    channels: dict[str, tuple[int, int]] = {}
    weights: dict[str, str] = {}
    for part, share in choice.shares.items():
        assert tables.channel_groups is not None
        for name in tables.parts[part] if share < 1 else ():
            channel_group = tables.channel_groups.groups[name]
            kept = tables.counts[part][share]
            for row in channel_group.rows:
                sparsity[tables.layer_name(row)] = 1 - kept / channel_group.size
                channels[tables.layer_name(row)] = (channel_group.size, kept)
                weights[tables.layer_name(row)] = row
    bits = {name: 8 if name in choice.int8 else info.bits for name, info in tables.analysis.items() if info.weight}
    return LatencyPlan(
        goal_ms=float(goal_ms),
        batch_size=batch_size,
        threads=threads,
        sparsity=sparsity,
        channels=channels,
        weights=weights,
        bits=bits,
        dense_ms=tables.performance.total_ms,
        predicted_ms=choice.ms,
        measured_ms=None,
        loss=choice.loss,
        loss_method=tables.loss_method,
        notes=tuple(notes),
    )


def _measure(tables: ModelTables, choice: Choice, batch_size: int, threads: int, iterations: int) -> float:
    """Time of the whole model, shrunk, quantized, exported and run: the lowest of three medians."""
    model = tables.model
    if tables.channel_groups is not None:
        shares = {name: choice.shares[part] for part, names in tables.parts.items() for name in names}
        model = narrowed(model, tables.channel_groups, shares)
    if choice.int8:
        floating = [layer.name for layer in tables.tables.layers if layer.int8 and layer.name not in choice.int8]
        model = as_int8(model, tables.sample_inputs, floating)
    with tempfile.TemporaryDirectory(prefix="sparsify-") as text:
        path = Path(text) / "model.onnx"
        export(model, tables.sample_inputs, path)
        proto = read_model(path)
        feed = feed_of(proto, SampleInputs.of(tables.model, tables.sample_inputs), batch_size)
        session = open_session(path, threads=threads, model=proto)
        # A short disturbance of the machine affects one of three medians at most.
        return min(median_ms(session, feed, 5, max(iterations // 3, 1)) for _ in range(3))


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
