"""The layers of a model as values: types, shapes, parameters, MACs, and which of them can be compressed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from sparsify.errors import DataError, TargetError, did_you_mean
from sparsify.output.json_values import EXACT, from_json_object, json_object, json_text
from sparsify.output.tables import Column, Displayed, Table

__all__ = ["LayerInfo", "ModelAnalysis", "UnknownOperator"]

Shape = tuple[int, ...]
ANALYSIS_FORMAT = 1
"""The version of an analysis as text."""


@dataclass(frozen=True)
class LayerInfo:
    """One layer, which has at most one weight; or a functional operation that costs something (a product in attention).

    Attributes:
        name: the module's path, as in `named_modules()`; with the parameter's name without "_weight" behind it where a
            module has several ("attention.in_proj"); the owner's path and the operation for a functional one
            ("encoder.layer.0.matmul").
        type: the module's class ("Conv2d"), or the operation ("matmul").
        weight: the name of the parameter that pruning and quantization act on; None for layers without.
        shared_with: the layer that holds the same weight and comes first; its parameters are counted there.
        input_shapes, output_shape: of the first call, batch included.
        parameters: elements of the layer's own parameters, bias included; 0 where they are shared with an earlier one.
        weights: elements of `weight` alone, 0 where it is shared with an earlier one.
        macs: multiply-accumulates of all its calls on the sample inputs; FLOPs are twice that.
        calls: how often it is computed in one forward.
        groups: of a convolution; 1 elsewhere.
        sparsity: the fraction of zeros in `weight`, 0 to 1, now.
        bits: of the weight's values, now: 32, 16, or what its quantizer has.
        why_not_prunable, why_not_quantizable: empty where it can be.
    """

    __pydantic_config__ = EXACT

    name: str
    type: str
    weight: str | None
    shared_with: str | None
    input_shapes: tuple[Shape, ...]
    output_shape: Shape
    parameters: int
    weights: int
    macs: int
    calls: int
    groups: int
    sparsity: float
    bits: int
    why_not_prunable: str
    why_not_quantizable: str

    @property
    def prunable(self) -> bool:
        return not self.why_not_prunable

    @property
    def quantizable(self) -> bool:
        return not self.why_not_quantizable


@dataclass(frozen=True)
class UnknownOperator:
    """An operator whose MACs are not known, so that the total is a lower bound."""

    __pydantic_config__ = EXACT

    operator: str
    calls: int
    where: tuple[str, ...]


@dataclass(frozen=True)
class ModelAnalysis(Displayed):
    """All layers in the order in which they are first computed, and the operators whose cost is not known.

    Layers with a weight that are not computed at all stand at the end, with 0 calls. `parameters` counts all of the
    model's, those of norms and of layers that are not listed too. str() is a table.
    """

    __pydantic_config__ = EXACT

    model: str
    layers: tuple[LayerInfo, ...]
    unknown: tuple[UnknownOperator, ...]
    parameters: int
    batch_size: int

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Zeros in all weights / elements of all weights."""
        weights = sum(layer.weights for layer in self.layers)
        return sum(layer.sparsity * layer.weights for layer in self.layers) / weights if weights else 0.0

    def layer(self, name: str) -> LayerInfo:
        """The layer of this name.

        Raises:
            TargetError: there is none.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise TargetError(f"{self.model} has no layer {name!r}.{did_you_mean(name, [one.name for one in self.layers])}")

    def table(self) -> Table:
        """One line a layer: its share of the MACs, and the reasons why it cannot be compressed, "-" where it can."""
        total = self.macs
        rows = [
            {
                **dataclasses.asdict(layer),
                "shape": "x".join(map(str, layer.output_shape)),
                "share": layer.macs / total if total else 0.0,
                "note": _note(layer),
            }
            for layer in self.layers
        ]
        columns = [
            Column("name", "Layer"),
            Column("type", "Type", left=True),
            Column("shape", "Output"),
            Column("parameters", "Parameters", ","),
            Column("macs", "MACs", ","),
            Column("share", "Share", ".1%"),
            Column("sparsity", "Zeros", ".1%"),
            Column("bits", "Bits"),
            Column("note", "Note", left=True),
        ]
        title = (
            f"{self.model}, batch {self.batch_size}: {len(rows)} layers, {self.parameters:,} parameters, "
            f"{total:,} MACs{' at least' if self.unknown else ''}, {self.sparsity:.1%} zeros"
        )
        return Table.of(title, rows, columns)

    def _parts(self) -> list[Table | str]:
        lines = [
            f"not counted: {one.operator}, called {one.calls} times, in {', '.join(map(repr, one.where))}"
            for one in self.unknown
        ]
        return [self.table(), *lines]

    def to_json(self) -> str:
        """JSON that `from_json` reads back into an equal analysis."""
        return json_text(self, {"format": ANALYSIS_FORMAT}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> ModelAnalysis:
        """The analysis that `to_json` wrote as `text`.

        Raises:
            DataError: text that is none, or of another version.
        """
        try:
            state = json_object(text)
            if state.pop("format") != ANALYSIS_FORMAT:
                raise ValueError(f"its format is not {ANALYSIS_FORMAT}")
            return from_json_object(cls, state)
        except (ValueError, KeyError) as error:
            raise DataError(f"the text is no analysis of a model: {error}. Give what `to_json` wrote.") from error


def _note(layer: LayerInfo) -> str:
    """The reasons why a layer with a weight cannot be compressed, and what it shares; "-" where there are none."""
    notes = [f"shared with {layer.shared_with}"] if layer.shared_with else []
    notes += [f"{layer.calls} calls"] if layer.calls > 1 else []
    if layer.weight is not None or layer.weights:
        why = {"not prunable": layer.why_not_prunable, "not quantizable": layer.why_not_quantizable}
        if layer.why_not_prunable and layer.why_not_prunable == layer.why_not_quantizable:
            why = {"not compressed": layer.why_not_prunable}
        notes += [f"{what}: {text}" for what, text in why.items() if text]
    return "; ".join(notes) or "-"
