"""What a recipe will do, epoch by epoch, before anything is trained: no data, no steps, the model left as it is."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.analysis.layers import analyze_model
from sparsify.errors import ArgumentError, SparsifyError
from sparsify.modifiers.schedule import Clock
from sparsify.optimize.expectations import stored_bits, without_channels
from sparsify.optimize.pitfalls import pitfalls
from sparsify.output.files import replacing
from sparsify.output.tables import Column, Table
from sparsify.recipe.recipe import read_recipe

if TYPE_CHECKING:
    from torch import nn

    from sparsify.analysis.layers import ModelAnalysis
    from sparsify.modifiers.base import Modifier
    from sparsify.recipe import Recipe

__all__ = ["Plan", "PlannedMoment", "plan"]


@dataclass(frozen=True)
class PlannedMoment:
    """What is in force at one epoch.

    Attributes:
        learning_rates: by the optimizer's parameter group; None where the recipe leaves it to the optimizer.
        zeros: the share of zeros by parameter, 0 to 1; None where only training will tell.
        channels: the share of channels that are masked, by parameter, where whole channels go.
        doing: what each modifier does now, by its name; those that do nothing are left out.
        parameters: elements that are stored, after channels were removed.
        nonzero: how many of them are expected not to be zero, as far as it is known.
        macs: multiply-accumulates that a runtime computes which does not skip zeros.
        nonzero_macs: those with weights that are not zero.
        size_bytes: of the parameters in the exported file, uncompressed, with the bits that they have by then.
    """

    epoch: float
    learning_rates: Mapping[int, float | None]
    zeros: Mapping[str, float | None]
    channels: Mapping[str, float]
    doing: Mapping[str, str]
    parameters: int | None = None
    nonzero: float | None = None
    macs: int | None = None
    nonzero_macs: float | None = None
    size_bytes: float | None = None

    @property
    def zeros_known(self) -> list[float]:
        return [share for share in self.zeros.values() if share is not None]


@dataclass(frozen=True)
class Plan:
    """A recipe laid out over the epochs of training.

    Attributes:
        moments: at every whole epoch and wherever a modifier starts, ends or removes channels; in order.
        rates: (epoch, learning rate) of the first parameter group, finely enough to be drawn.
        weights: elements by parameter that is pruned or quantized.
        warnings: what will not come out as it was probably meant.
        notes: what could not be foreseen, and why.
    """

    max_epochs: float
    steps_per_epoch: int | None
    moments: tuple[PlannedMoment, ...]
    rates: tuple[tuple[float, float | None], ...]
    spans: tuple[tuple[str, float, float], ...]
    weights: Mapping[str, int]
    warnings: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())

    def at(self, epoch: float) -> PlannedMoment:
        """What is in force at `epoch`: the last moment that is not after it."""
        before = [moment for moment in self.moments if moment.epoch <= epoch]
        return before[-1] if before else self.moments[0]

    def average(self, moment: PlannedMoment) -> float | None:
        """The share of zeros over all parameters that are pruned, as far as it is known."""
        known = {name: share for name, share in moment.zeros.items() if share is not None}
        weights = sum(self.weights.get(name, 1) for name in known)
        return sum(share * self.weights.get(name, 1) for name, share in known.items()) / weights if weights else None

    def table(self) -> Table:
        """One row where something changes; long quiet stretches and ramps are thinned out."""
        rows = []
        for moment in _telling(self.moments):
            shares = moment.zeros_known
            channels = list(moment.channels.values())
            rows.append(
                {
                    "epoch": moment.epoch,
                    "rate": next(iter(moment.learning_rates.values()), None),
                    "zeros": self.average(moment),
                    "most": max(shares, default=None),
                    "channels": sum(channels) / len(channels) if channels else None,
                    "parameters": moment.parameters,
                    "nonzero": moment.nonzero,
                    "macs": moment.macs,
                    "kib": None if moment.size_bytes is None else moment.size_bytes / 1024,
                    "doing": _merged_moments(moment.doing),
                }
            )
        wanted = (
            Column("epoch", "Epoch", "g"),
            Column("rate", "LR", ".3g"),
            Column("zeros", "Zeros", ".1%"),
            Column("most", "highest", ".1%"),
            Column("channels", "Channels gone", ".1%"),
            Column("parameters", "Parameters", ",d"),
            Column("nonzero", "not zero", ",.0f"),
            Column("macs", "MACs", ",d"),
            Column("kib", "KiB", ",.0f"),
            Column("doing", "What happens", left=True),
        )
        # A column in which nothing stands says nothing.
        shown = [column for column in wanted if any(row[column.field] is not None for row in rows)]
        return Table.of(f"Plan of {self.max_epochs:g} epochs", rows, shown)

    def layers(self) -> Table:
        """One row for each parameter that is pruned: its share of zeros along the way."""
        last = self.moments[-1]
        names = dict.fromkeys(name for moment in self.moments for name in (*moment.zeros, *moment.channels))
        rows = [
            {
                "name": name,
                "weights": self.weights.get(name),
                "half": self.at(self.max_epochs / 2).zeros.get(name),
                "zeros": last.zeros.get(name),
                "channels": last.channels.get(name),
            }
            for name in names
        ]
        columns = [
            Column("name", "Parameter"),
            Column("weights", "Weights", ",d"),
            Column("half", "Zeros half way", ".1%"),
            Column("zeros", "at the end", ".1%"),
            Column("channels", "Channels gone", ".1%"),
        ]
        shown = [c for c in columns if c.field != "channels" or any(row["channels"] is not None for row in rows)]
        return Table.of("Layers", rows, shown)

    def __str__(self) -> str:
        said = [self.table().text()]
        said += [f"warning: {text}" for text in self.warnings]
        said += [f"note: {text}" for text in self.notes]
        return "\n".join(said)

    def to_json(self) -> str:
        """Everything, as JSON; what is not known is null."""
        plain = asdict(self)
        plain["max_epochs"] = float(self.max_epochs)
        return json.dumps(plain, indent=2)

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draws learning rate, zeros by layer and who is at work over the epochs, to a PNG, PDF or SVG file.

        Raises:
            ArgumentError: matplotlib is not installed, or the ending is none that it writes.
            DataError: the file cannot be written.
        """
        return _draw(self, Path(path))


def plan(
    recipe: Any,
    model: nn.Module | None = None,
    steps_per_epoch: int | None = None,
    *,
    sample_inputs: Any = None,
    epochs: float | None = None,
) -> Plan:
    """What `recipe` will do over the epochs: learning rates, zeros, quantization, parameters, MACs and size.

    The modifiers themselves are asked, so the figures are those of a run. Nothing is trained, no data is read, and the
    model stays as it is. Where channels are removed, that is tried on a copy with the weights as they are now.

    Args:
        recipe: a Recipe, a manager, a path or a text.
        model: None leaves out all that depends on its layers.
        steps_per_epoch: optimizer steps in an epoch; None: what changes within an epoch is shown at its fraction.
        sample_inputs: as in `modify`, for MACs and for sizes after channels were removed.
        epochs: how long training really lasts, where that is not the recipe's `max_epochs`.

    Raises:
        RecipeError: the recipe is wrong. TargetError: a name in it matches nothing in the model.
        ArgumentError: an argument is none of what is asked for.
    """
    recipe = read_recipe(recipe)
    if steps_per_epoch is not None and (isinstance(steps_per_epoch, bool) or not isinstance(steps_per_epoch, int)):
        raise ArgumentError(f"steps_per_epoch: {steps_per_epoch!r} is no whole number; give optimizer steps per epoch.")
    if steps_per_epoch is not None and steps_per_epoch < 1:
        raise ArgumentError(f"steps_per_epoch: {steps_per_epoch} is no number of steps; give 1 or more.")
    if epochs is not None and not 0 < epochs < math.inf:
        raise ArgumentError(f"epochs: {epochs!r} is no length of a training; give a number above 0.")
    if sample_inputs is not None and model is None:
        raise ArgumentError("sample_inputs are inputs of a model: give it too.")
    last = float(recipe.max_epochs if epochs is None else epochs)
    if model is not None:
        recipe.check(model)
    modifiers = recipe.modifiers
    labels = _labels(modifiers)
    view = _View(recipe, model, sample_inputs)
    times = [_clock(epoch, steps_per_epoch) for epoch in _epochs(modifiers, last)]
    moments = tuple(view.moment(clock, labels) for clock in times)
    fine = {_clock(last * i / 200, steps_per_epoch) for i in range(201)} | set(times)
    rates = tuple((clock.epoch, view.rate(0, clock)) for clock in sorted(fine, key=lambda clock: clock.epoch))
    spans = tuple(
        (label, modifier.window.start, min(modifier.window.end, last))
        for modifier, label in labels
        if modifier.kind != "range"
    )
    said = pitfalls(modifiers, labels, moments, rates, last, steps_per_epoch)
    return Plan(last, steps_per_epoch, moments, rates, spans, view.weights(), tuple(said), tuple(view.notes))


class _View:
    """A recipe and, where there is one, a model: what holds at a moment."""

    def __init__(self, recipe: Recipe, model: nn.Module | None, sample_inputs: Any) -> None:
        from sparsify.model.wrappers import unwrapped
        from sparsify.modifiers.learning_rate_ledger import LearningRateLedger

        self.modifiers = recipe.modifiers
        self.model = None if model is None else unwrapped(model)
        self.inputs = sample_inputs
        self.notes: list[str] = []
        self.ledger = LearningRateLedger(None)
        for modifier in recipe.written:
            entry = modifier.rate()
            if entry is not None:
                self.ledger.add(entry)
        named = {group for m in self.modifiers if (e := m.rate()) for group in e.groups or ()}
        self.groups = sorted(named | {0}) if len(self.ledger) else []
        self.sizes = self._sizes(self.model)
        self.analysis = None if self.model is None or self.inputs is None else analyze_model(self.model, self.inputs)
        self.cost = _compute_cost(self.analysis)
        self.removals = sorted({cut for m in self.modifiers for cut in m.cuts()})
        self.after = {cut: self._after(recipe, cut) for cut in self.removals} if model is not None else {}

    def weights(self) -> dict[str, int]:
        return {name: size for name, (size, _) in self.sizes.items()}

    def rate(self, group: int, clock: Clock) -> float | None:
        entry = self.ledger.governing(group, clock)
        return None if entry is None else entry.value(clock)

    def moment(self, clock: Clock, labels: Sequence[tuple[Modifier, str]]) -> PlannedMoment:
        doing = {label: text for m, label in labels if m.kind != "range" and (text := m.activity(clock))}
        rates = {group: self.rate(group, clock) for group in self.groups}
        if self.model is None:
            return PlannedMoment(clock.epoch, rates, {}, {}, doing)
        zeros: dict[str, float | None] = {}
        channels: dict[str, float] = {}
        bits = stored_bits(self.modifiers, clock, self.model, self.analysis)
        for modifier in sorted(self.modifiers, key=lambda m: m.window.start):
            found = modifier.foreseen_zeros(clock, self.model)
            if modifier.whole_channels:
                channels.update({name: share for name, share in found.items() if share is not None})
            else:
                # What only holds zeros does not know how many: what was known before stands.
                zeros.update({n: zeros.get(n) if s is None and modifier.holds else s for n, s in found.items()})
        sizes, cost = self.sizes, self.cost
        pruned = [cut for cut in self.removals if clock.reached(cut)]
        if pruned:
            sizes, cost = self.after[pruned[-1]]
        parameters = sum(size for size, _ in sizes.values()) if sizes else None
        kept = {name: 1.0 - (zeros.get(name) or 0.0) for name in sizes}
        return PlannedMoment(
            clock.epoch,
            rates,
            zeros,
            channels,
            doing,
            parameters,
            sum(size * kept[name] for name, (size, _) in sizes.items()) if sizes else None,
            sum(cost.values()) if cost else None,
            sum(macs * kept.get(name, 1.0) for name, macs in cost.items()) if cost else None,
            sum(size * bits.get(name, 8 * width) / 8 for name, (size, width) in sizes.items()) if sizes else None,
        )

    def _sizes(self, model: nn.Module | None) -> dict[str, tuple[int, int]]:
        """Elements and bytes of an element, by parameter."""
        from sparsify.model.targets import named_parameters

        return {} if model is None else {n: (p.numel(), p.element_size()) for n, p in named_parameters(model).items()}

    def _after(self, recipe: Recipe, cut: float) -> tuple[dict[str, tuple[int, int]], dict[str, int]]:
        """Sizes and MACs once the channels are gone that go up to `cut`, tried on a copy."""
        assert self.model is not None
        if self.inputs is None:
            self._note(f"what is left after channels are removed at epoch {cut:g} needs sample_inputs.")
            return {}, {}
        try:
            smaller = without_channels(self.model, recipe.written, self.inputs, cut)
        except SparsifyError as error:
            self._note(f"what is left after channels are removed at epoch {cut:g} is not known ahead: {error}")
            return {}, {}
        return self._sizes(smaller), _compute_cost(analyze_model(smaller, self.inputs))

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def _compute_cost(analysis: ModelAnalysis | None) -> dict[str, int]:
    """MACs by the weight that is multiplied with, under "" those between activations; empty if not known."""
    found: Counter[str] = Counter()
    for layer in analysis.layers if analysis is not None else ():
        found[layer.weight or ""] += layer.macs
    return dict(found)


def _clock(epoch: float, steps_per_epoch: int | None) -> Clock:
    if steps_per_epoch is None:
        return Clock(0, epoch)
    step = math.ceil(epoch * steps_per_epoch - 1e-6)
    return Clock(step, step / steps_per_epoch, steps_per_epoch)


def _epochs(modifiers: Iterable[Modifier], last: float) -> list[float]:
    """Whole epochs, and every start, end and cut, up to the end of training."""
    found = {float(epoch) for epoch in range(math.floor(last) + 1)} | {last}
    for modifier in modifiers:
        found |= {e for e in (modifier.window.start, modifier.window.end, *modifier.cuts()) if e <= last}
    return sorted(found)


def _labels(modifiers: Sequence[Modifier]) -> list[tuple[Modifier, str]]:
    """Each modifier with its name, numbered where there are several of one kind."""
    total = Counter(type(m).__name__ for m in modifiers)
    seen: Counter[str] = Counter()
    found = []
    for modifier in sorted(modifiers, key=lambda m: (m.window.start, m.window.end)):
        name = type(modifier).__name__
        seen[name] += 1
        short = name.removesuffix("Modifier")
        found.append((modifier, f"{short} {seen[name]}" if total[name] > 1 else short))
    return found


def _merged_moments(doing: Mapping[str, str]) -> str:
    """One phrase; those of a kind that do the same are counted."""
    alike = Counter((name.rstrip(" 0123456789"), what) for name, what in doing.items())
    said = []
    for (name, what), count in alike.items():
        # A single one keeps its number, which tells it from another.
        only = next(n for n, w in doing.items() if (n.rstrip(" 0123456789"), w) == (name, what))
        said.append((only if count == 1 else f"{count} x {name}") + ("" if what == "active" else f" {what}"))
    return "; ".join(said)


def _telling(moments: Sequence[PlannedMoment]) -> list[PlannedMoment]:
    """Those at which somebody starts or ends something, the first and the last, and every so many between."""
    stride = max(1, math.ceil(len(moments) / 16))
    kept = []
    for number, moment in enumerate(moments):
        new = number == 0 or moment.doing != moments[number - 1].doing
        if new or number == len(moments) - 1 or number % stride == 0:
            kept.append(moment)
    return kept


def _draw(plan: Plan, path: Path) -> Path:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ArgumentError("a plot needs matplotlib: pip install sparsify[report]") from error
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise ArgumentError(f"{path}: a plot is written as .png, .pdf or .svg, not as {path.suffix or 'no ending'}")
    lanes = [(label, start, end) for label, start, end in plan.spans if start < plan.max_epochs or start == end]
    shares = plan.weights and any(moment.zeros or moment.channels for moment in plan.moments)
    heights = [2.0] * any(rate is not None for _, rate in plan.rates) + [3.0] * bool(shares) + [0.3 * len(lanes) + 0.6]
    figure = Figure(figsize=(9, sum(heights) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0])
    if any(rate is not None for _, rate in plan.rates):
        axis = axes.pop(0)
        axis.plot([e for e, _ in plan.rates], [math.nan if r is None else r for _, r in plan.rates], color="#1f5fa8")
        axis.set_ylabel("learning rate")
    if shares:
        axis = axes.pop(0)
        epochs = [moment.epoch for moment in plan.moments]
        names = dict.fromkeys(name for moment in plan.moments for name in (*moment.zeros, *moment.channels))
        for name in names:
            line = [m.channels.get(name, m.zeros.get(name, 0.0)) for m in plan.moments]
            values = [math.nan if value is None else value for value in line]
            axis.step(epochs, values, where="post", color="#9aa7b5", linewidth=0.8)
        average = [plan.average(moment) for moment in plan.moments]
        values = [math.nan if value is None else value for value in average]
        axis.step(epochs, values, where="post", color="#b3401c", linewidth=2, label="average of weights")
        axis.set_ylim(0, 1)
        axis.set_ylabel("zeros")
        axis.legend(loc="lower right", frameon=False)
    axis = axes.pop(0)
    for row, (_, start, end) in enumerate(lanes):
        axis.barh(row, max(end - start, plan.max_epochs / 200), left=start, height=0.6, color="#4d8f6b")
    axis.set_yticks(range(len(lanes)), [label for label, _, _ in lanes])
    axis.invert_yaxis()
    axis.set_xlim(0, max(plan.max_epochs, 1e-9))
    axis.set_xlabel("epoch")
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=120)
    return path
