"""Compares the prediction in a recipe's evidence with the trained model."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparsify.analysis.analyze import analyze_model
from sparsify.errors import ArgumentError, DataFileError, StateError
from sparsify.model.signature import check_module
from sparsify.model.targets import named_modules, named_parameters
from sparsify.model.wrappers import unwrapped
from sparsify.onnx.benchmark import benchmark_onnx
from sparsify.output.tables import Column, Displayed, Table
from sparsify.quantization.fake_quantize import FakeQuantize
from sparsify.recipe.evidence import Evidence

if TYPE_CHECKING:
    from torch import nn

    from sparsify.model.signature import InputsLike
    from sparsify.recipe import Recipe

__all__ = ["Outcome", "Prediction", "score_prediction"]


@dataclass(frozen=True)
class Prediction:
    """One figure.

    Attributes:
        what: "parameters", "ms", or the name of a parameter for its sparsity.
        predicted, measured: None where it is not known.
    """

    what: str
    predicted: float | None
    measured: float | None

    @property
    def error(self) -> float | None:
        """measured - predicted."""
        return None if self.predicted is None or self.measured is None else self.measured - self.predicted

    @property
    def relative(self) -> float | None:
        """The error as a share of what was predicted; None where that is 0."""
        return None if self.error is None or not self.predicted else self.error / abs(self.predicted)


@dataclass(frozen=True)
class Outcome(Displayed):
    """All figures that were predicted, of the model and of each layer. str() is a table.

    Attributes:
        model: zeros, recovery, parameters, nonzero, MACs, size_bytes, ms.
        layers: the sparsity of each parameter that the recipe prunes; where whole channels go, the share of its
            elements that was removed is not a share of its channels, so there are none.
        notes: what could not be compared, and why.
    """

    model: tuple[Prediction, ...]
    layers: tuple[Prediction, ...]
    notes: tuple[str, ...] = ()

    def __getitem__(self, what: str) -> Prediction:
        for found in (*self.model, *self.layers):
            if found.what == what:
                return found
        raise KeyError(what)

    @property
    def worst_layer(self) -> Prediction | None:
        """The one whose sparsity is farthest from what was predicted."""
        known = [layer for layer in self.layers if layer.error is not None]
        return max(known, key=lambda layer: abs(layer.error or 0.0), default=None)

    def table(self) -> Table:
        """One row a figure of the model."""
        rows = [
            {
                "what": found.what,
                "predicted": _shown_value(found.predicted),
                "measured": _shown_value(found.measured),
                "relative": found.relative,
            }
            for found in self.model
        ]
        columns = (
            Column("what", "Figure"),
            Column("predicted", "predicted"),
            Column("measured", "measured"),
            Column("relative", "off by", "+.1%"),
        )
        return Table.of("Prediction and outcome", rows, columns)

    def layer_table(self) -> Table:
        """One row a layer: its sparsity."""
        rows = [
            {"what": found.what, "predicted": found.predicted, "measured": found.measured, "error": found.error}
            for found in self.layers
        ]
        columns = (
            Column("what", "Parameter"),
            Column("predicted", "predicted", ".2%"),
            Column("measured", "measured", ".2%"),
            Column("error", "off by", "+.2%"),
        )
        return Table.of("Sparsity by layer", rows, columns)

    _between = "\n\n"

    def _parts(self) -> list[Table | str]:
        return [self.table(), *([self.layer_table()] if self.layers else []), *self.notes]


def score_prediction(
    recipe: Recipe,
    model: nn.Module,
    *,
    sample_inputs: InputsLike | None = None,
    path: str | os.PathLike[str] | None = None,
    ms: float | None = None,
    score_before: float | None = None,
    score_after: float | None = None,
) -> Outcome:
    """Compares what `create_recipe` predicted with the model that was trained by its recipe.

    Args:
        recipe: with the evidence that `create_recipe` gave it.
        model: after `finalize`; it is read and not changed.
        sample_inputs: as the model is called with; None: MACs are not compared.
        path: the exported ONNX file; its size is compared, and its time in onnxruntime measured unless `ms` says it.
        ms: time of one call, measured as in the performance profile.
        score_before, score_after: of the dense and of the trained model, like accuracy: more is better. Their quotient
            is compared with the recovery.

    Raises:
        ArgumentError: the recipe has no evidence, a parameter that it names is not in the model, or a number that is
            none.
        StateError: the model was not trained by this recipe to its end: nothing that should be zero is.
        DataFileError: there is no such file.
    """
    evidence = recipe.evidence
    if evidence is None:
        raise ArgumentError("recipe: it has no evidence, so nothing was predicted; give one that create_recipe made.")
    check_module(model)
    _check_figures(ms=ms, score_before=score_before, score_after=score_after)
    file = None if path is None else Path(path)
    if file is not None and not file.is_file():
        raise DataFileError(f"{file}: there is no such file.")
    model = unwrapped(model)
    notes: list[str] = []
    structured = any(modifier.whole_channels for modifier in recipe.written)
    layers = () if structured else _layer_sparsities(evidence, model)
    expected = evidence.expected
    parameters = named_parameters(model)
    zeros = _zeros(layers, parameters)
    if zeros.predicted and not zeros.measured:
        raise StateError("model: none of the weights that the recipe prunes is zero; give the model that it trained.")
    if structured and sum(p.numel() for p in parameters.values()) == expected.parameters_before:
        raise StateError("model: none of its channels was removed; give the model that the recipe trained.")
    if file is not None and ms is None and expected.ms is not None:
        ms = benchmark_onnx(file, batch_size=int(evidence.asked.get("batch_size", 1))).latency_p50_ms
    found = [
        zeros,
        Prediction("recovery", expected.recovery, _quotient(score_after, score_before)),
        Prediction("parameters", expected.parameters, sum(_stored_share(model).values())),
        Prediction("nonzero", expected.nonzero, sum(int(p.detach().count_nonzero()) for p in parameters.values())),
        Prediction("MACs", expected.macs, _remaining_macs(model, sample_inputs, notes)),
        Prediction("size_bytes", expected.size_bytes, None if file is None else file.stat().st_size),
        Prediction("ms", expected.ms, ms),
    ]
    if file is not None:
        notes.append("size_bytes: the file holds the graph too, and scales where it is quantized.")
    return Outcome(tuple(found), layers, tuple(notes))


def _check_figures(*, ms: float | None, score_before: float | None, score_after: float | None) -> None:
    for name, value in (("ms", ms), ("score_before", score_before), ("score_after", score_after)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0):
            raise ArgumentError(f"{name}: {value!r} is no measured figure; give a number that is not negative.")
    if (score_before is None) != (score_after is None):
        raise ArgumentError("score_before and score_after: one alone compares nothing; give both, or neither.")


def _zeros(layers: Sequence[Prediction], parameters: Mapping[str, nn.Parameter]) -> Prediction:
    """The share of zeros over all layers, weighted by their sizes; None where there are no layers."""
    weights = sum(parameters[layer.what].numel() for layer in layers)
    if not weights:
        return Prediction("zeros", None, None)
    planned = sum((layer.predicted or 0.0) * parameters[layer.what].numel() for layer in layers)
    zeros = sum((layer.measured or 0.0) * parameters[layer.what].numel() for layer in layers)
    return Prediction("zeros", planned / weights, zeros / weights)


def _layer_sparsities(evidence: Evidence, model: nn.Module) -> tuple[Prediction, ...]:
    parameters = named_parameters(model)
    missing = [name for name in evidence.layers if name not in parameters]
    if missing:
        raise ArgumentError(
            f"model: it has no {missing[0]!r}, which the recipe prunes; give the model that it was trained on."
        )
    found = []
    for name, layer in evidence.layers.items():
        weight = parameters[name].detach()
        zeros = 1.0 - int(weight.count_nonzero()) / max(weight.numel(), 1)
        found.append(Prediction(name, layer.sparsity, zeros))
    return tuple(found)


def _stored_share(model: nn.Module) -> dict[str, int]:
    """Elements by parameter, without those that quantized layers keep for themselves."""
    own = {name for name, module in named_modules(model).items() if isinstance(module, FakeQuantize)}
    return {n: p.numel() for n, p in named_parameters(model).items() if n.rpartition(".")[0] not in own}


def _remaining_macs(model: nn.Module, sample_inputs: InputsLike | None, notes: list[str]) -> int | None:
    if sample_inputs is None:
        notes.append("MACs: give sample_inputs to have them counted.")
        return None
    return analyze_model(model, sample_inputs).macs


def _quotient(after: float | None, before: float | None) -> float | None:
    if after is None or before is None:
        return None
    return after / before if before else math.nan


def _shown_value(value: float | None) -> str | None:
    if value is None or math.isnan(value):
        return None
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
