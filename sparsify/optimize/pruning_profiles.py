"""Settings of a pruning profile, and the profile: the sparsity of each layer with what is expected of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sparsify.output.json_values import EXACT
from sparsify.output.tables import Column, Displayed, Table

__all__ = ["LayerChoice", "PruningProfile", "PruningSettings"]


@dataclass(frozen=True)
class PruningSettings:
    """Settings of a pruning profile.

    Attributes:
        sparsity: zeros / elements, over all layers that may be pruned, 0 to 1.
        balance: 1.0 looks at recovery alone, 0.0 at performance alone.
        min_sparsity: a layer that would get less is left dense; its share goes to the others.
        min_speedup: a layer that would not become this many times faster is left dense; 0: all may.
        min_recovery: a layer's sparsity stops where its recovery would fall below this, unless it is set by hand; 0:
            nowhere.
        max_sparsity: of any layer.
        first_layer, grouped: whether the first prunable layer, and grouped convolutions, are pruned too.
        overrides: {layer: sparsity} set by hand; they stand whatever the rest says.
    """

    __pydantic_config__ = EXACT

    sparsity: float = 0.85
    balance: float = 1.0
    min_sparsity: float = 0.4
    min_speedup: float = 0.0
    min_recovery: float = 0.0
    max_sparsity: float = 0.95
    first_layer: bool = False
    grouped: bool = False
    overrides: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerChoice:
    """The sparsity of one layer. `why` says what left it dense or set it by hand; empty where it was free."""

    name: str
    sparsity: float
    overridden: bool
    why: str
    ms: float
    speedup: float
    recovery: float
    macs: float
    parameters: float


@dataclass(frozen=True)
class PruningProfile(Displayed):
    """An average sparsity spread over layers, with the figures expected of it. Units are those of LayerCurve.

    Attributes:
        sparsity: what is met, over all layers that may be pruned.
        recovery: 2 - L / L(best), 0 to 1, where best is the spread that loses least at the same average with nothing
            set by hand; 1.0 for a profile that looks at recovery alone. Of a layer: against its part of the best spread
            of the average that was asked for; above 1 where it loses less than there.
        loss: what all layers lose together, in the units of the loss profile.
        notes: what could not be met, and why.
    """

    settings: PruningSettings
    layers: tuple[LayerChoice, ...]
    sparsity: float
    recovery: float
    loss: float
    speedup: float
    ms_before: float
    ms_after: float
    macs_before: float
    macs_after: float
    parameters_before: float
    parameters_after: float
    notes: tuple[str, ...]

    def table(self) -> Table:
        """One row for each layer: sparsity, speed-up, recovery, and why it is dense or was set by hand."""
        columns = [
            Column("name", "Layer"),
            Column("sparsity", "Zeros", ".1%"),
            Column("speedup", "Speed-up", ".2f"),
            Column("recovery", "Recovery", ".3f"),
            Column("parameters", "Parameters left", ",.0f"),
            Column("why", "Why", left=True),
        ]
        title = f"{self.sparsity:.1%} zeros on average, recovery {self.recovery:.3f}, {self.speedup:.2f} times as fast"
        return Table.of(f"{title} where zeros are skipped", self.layers, columns)

    def _parts(self) -> list[Table | str]:
        return [self.table(), *(f"note: {note}" for note in self.notes)]
