"""A recipe laid out over the epochs of training: values, tables and a drawing."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sparsify.errors import ArgumentError, install_line
from sparsify.output.files import replacing
from sparsify.output.tables import Column, Displayed, Table

__all__ = ["Plan", "PlannedMoment"]


@dataclass(frozen=True)
class PlannedMoment:
    """Learning rates, sparsities and sizes that are in force at one epoch.

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
class Plan(Displayed):
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
        """The moment in force at `epoch`: the last one that is not after it."""
        before = [moment for moment in self.moments if moment.epoch <= epoch]
        return before[-1] if before else self.moments[0]

    def average(self, moment: PlannedMoment) -> float | None:
        """The share of zeros at `moment` over all parameters that are pruned, as far as it is known."""
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
            Column("channels", "Channels pruned", ".1%"),
            Column("parameters", "Parameters", ",d"),
            Column("nonzero", "not zero", ",.0f"),
            Column("macs", "MACs", ",d"),
            Column("kib", "KiB", ",.0f"),
            Column("doing", "What happens", left=True),
        )
        # Empty columns are left out.
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
            Column("channels", "Channels pruned", ".1%"),
        ]
        shown = [c for c in columns if c.field != "channels" or any(row["channels"] is not None for row in rows)]
        return Table.of("Layers", rows, shown)

    def _parts(self) -> list[Table | str]:
        notes = [*(f"warning: {text}" for text in self.warnings), *(f"note: {text}" for text in self.notes)]
        return [self.table(), *notes]

    def to_json(self) -> str:
        """Everything, as JSON; what is not known is null."""
        plain = asdict(self)
        plain["max_epochs"] = float(self.max_epochs)
        return json.dumps(plain, indent=2)

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draws learning rate, zeros by layer and active modifiers to `path`, a PNG, PDF or SVG file. Returns the path.

        Raises:
            ArgumentError: matplotlib is not installed, or the ending is none that it writes.
            DataError: the file cannot be written.
        """
        return _draw(self, Path(path))


def _merged_moments(doing: Mapping[str, str]) -> str:
    """The activities as one phrase; modifiers of a kind that do the same are counted."""
    alike = Counter((name.rstrip(" 0123456789"), what) for name, what in doing.items())
    said = []
    for (name, what), count in alike.items():
        # A single one keeps its number, which tells it from another.
        only = next(n for n, w in doing.items() if (n.rstrip(" 0123456789"), w) == (name, what))
        said.append((only if count == 1 else f"{count} x {name}") + ("" if what == "active" else f" {what}"))
    return "; ".join(said)


def _telling(moments: Sequence[PlannedMoment]) -> list[PlannedMoment]:
    """The moments at which a modifier starts or ends, the first and the last, and every so many between."""
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
        raise ArgumentError(f"a plot needs matplotlib: {install_line('report')}") from error
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
