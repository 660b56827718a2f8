"""Profiles the loss of compressing one layer at a time: from its weights alone, from data, or from gradients."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from sparsify.analysis.file_module import FileModule, module_or_file, refuse_file
from sparsify.analysis.layers import ModelAnalysis
from sparsify.analysis.torch_layers import analyze_module
from sparsify.analysis.trials import Batch, Loss, Trials, collected_batches
from sparsify.analysis.units import Layers, Of, Unit, layer_weights, weights_of_channel_groups
from sparsify.errors import ArgumentError, DataError, StateError, did_you_mean
from sparsify.model.signature import InputsLike
from sparsify.model.wrappers import unwrapped
from sparsify.output.files import read_text, replacing
from sparsify.output.json_values import EXACT_AND_FINITE, from_json_object, json_object, json_text
from sparsify.output.tables import Column, Displayed, Table, track
from sparsify.quantization.plan import is_quantized

__all__ = ["LossProfile", "loss_profile"]

Method = Literal["magnitude", "shape", "data", "fisher"]
HOW: dict[str, str] = {
    "data": "measured on data, one layer at a time",
    "fisher": "estimated from gradients",
    "magnitude": "ordered by the magnitudes of the weights, without data",
    "shape": "ordered by the shapes of the layers, without data",
}
"""The origin of the losses in words, by method."""
COSTS: dict[str, str] = {"magnitude": "sum of removed magnitudes", "shape": "cost by shape"}
"""The name of what orders the layers where no loss was measured, by method."""

LEVELS = tuple(level / 100 for level in range(100))
"""Sparsities of a profile without data: 0.00, 0.01, ... 0.99."""
DATA_LEVELS = (0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99)
BITS = (8, 6, 4, 3, 2)
LOSS_FORMAT = 1
"""The version of a saved profile."""
LOSS_FILE = "sparsify loss profile"
LOSS_PROFILE = "loss_profile"


@dataclass(frozen=True)
class LossProfile(Displayed):
    """Loss over compression, one layer at a time, all others as they are. str() is a table.

    Attributes:
        method: "magnitude" and "shape" need no data, "data" measures the loss, "fisher" estimates it from gradients.
        of: "pruning", where `levels` are sparsities, 0 first; or "quantization", where they are bits of
            the weights, most first.
        losses: by the layer's name in `ModelAnalysis`: the loss at each level. Measured losses are those of the model;
            the others start at 0 and order the layers, no more.
        base: the loss of the model as it is; 0 where it was not measured.
        samples: what was fed, 0 without data.
        families: of a profile of channels, whose `levels` are shares of them: {name in `losses`: all layers whose rows
            go together}. A group bears the name of its first layer. Empty otherwise.
    """

    __pydantic_config__ = EXACT_AND_FINITE

    method: Method
    of: Of
    # Bits are whole numbers in the file too.
    levels: tuple[int | float, ...]
    losses: Mapping[str, tuple[float, ...]]
    base: float
    samples: int
    families: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def increase(self, layer: str) -> tuple[float, ...]:
        """Loss that compression of this layer adds at each level: >= 0, and never less at a stronger one.

        >>> LossProfile("data", "pruning", (0.0, 0.5, 0.9), {"fc": (1.0, 0.9, 1.5)}, 1.0, 8).increase("fc")
        (0.0, 0.0, 0.5)
        """
        start = self.base if self.method == "data" else 0.0
        return tuple(accumulate((max(loss - start, 0.0) for loss in self.losses[layer]), max))

    def monotone(self) -> LossProfile:
        """The profile with losses that never fall from a level to a stronger one, nor below `base`."""
        start = self.base if self.method == "data" else 0.0
        return replace(self, losses={name: tuple(start + more for more in self.increase(name)) for name in self.losses})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the profile to `path` as JSON, whole or not at all.

        Raises:
            DataFileError: it cannot be written.
        """
        with replacing(path) as temporary:
            temporary.write_text(self.to_json() + "\n", encoding="utf-8")

    def to_json(self) -> str:
        """The JSON that `save` writes."""
        return json_text(self, {"format": LOSS_FILE, "version": LOSS_FORMAT}, indent=1, allow_nan=False)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LossProfile:
        """The profile that `save` wrote to `path`, equal to the one that was saved.

        Raises:
            DataFileError: the file is missing or cannot be read. DataError: it is no loss profile, a broken one, or of
                a newer version.
        """
        text = read_text(path)
        try:
            state = json_object(text)
            if (written := state.pop("format")) != LOSS_FILE:
                raise ValueError(f"its format is {written!r}")
            version = state.pop("version")
        except (ValueError, KeyError) as error:
            raise DataError(f"{path} is no loss profile ({error}). Give a file that LossProfile.save wrote.") from error
        if version != LOSS_FORMAT:
            raise DataError(
                f"{path} has version {version!r}; this sparsify reads {LOSS_FORMAT}. Make the profile again."
            )
        try:
            profile = from_json_object(cls, state)
            for name, losses in profile.losses.items():
                if len(losses) != len(profile.levels):
                    raise ValueError(f"{name!r} has {len(losses)} losses at {len(profile.levels)} levels")
            return profile
        except ValueError as error:
            raise DataError(f"{path} is a broken loss profile: {error}. Make the profile again.") from error

    def table(self) -> Table:
        """A row for each layer, a column for each level; of many levels those that are measured by default."""
        shown = [i for i, level in enumerate(self.levels) if len(self.levels) <= 12 or level in DATA_LEVELS]
        titles = [f"{self.levels[i]:.0%}" if self.of == "pruning" else f"{self.levels[i]:g} bits" for i in shown]
        rows = [
            {"layer": name} | {title: losses[i] for title, i in zip(titles, shown, strict=True)}
            for name, losses in self.losses.items()
        ]
        what = "channels" if self.families else "layer"
        title = f"Loss by {what}, {self.of}, {self.method}: base {self.base:.4g}, {self.samples} samples"
        return Table.of(title, rows, [Column("layer", "Layer"), *(Column(title, title, ".4g") for title in titles)])

    def _parts(self) -> list[Table | str]:
        return [self.table()]


def loss_profile(
    model: nn.Module | str | os.PathLike[str],
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    *,
    of: Of = "pruning",
    method: Method | None = None,
    levels: Iterable[float] | None = None,
    layers: Layers = None,
    structured: bool = False,
    sample_inputs: InputsLike | None = None,
    batches: int | None = None,
    progress: bool | None = None,
) -> LossProfile:
    """Measures the loss of compressing each layer; the model is the same afterwards, bit for bit.

    Methods, from the best to the cheapest:

    - "data": the loss is measured with one layer at a time compressed to each level: layers x levels runs through
      `data`. Weights are pruned by magnitude; for quantization they are rounded, symmetrically and per output channel,
      to the grid of so many bits; with `structured` the channels of the least norm go, with all that belongs to them.
    - "fisher": half the sum of F (w' - w)^2 over the weights w that become w', where F is the mean square of gradients:
      one run through `data` forwards and backwards gives all levels.
    - "magnitude": no data. At the level s_k of pruning the mean of abs(w), sorted, in the slice from round(s_k-1 n) to
      round(s_k n) of n weights: the importance of the next weights. Of quantization: the squared error of rounding as a
      share of the layer's sum of squares.
    - "shape": no data, no weights. V_in and V_out are the elements of one sample's input and output; the loss is s
      times the level, s = (V_in + V_out) / parameters * max(V_in / V_out, V_out / V_in). Of quantization: s / 4^bits.

    Args:
        model: a module, wrapped in DistributedDataParallel or torch.compile, too; or the path of an ONNX file, whose
            losses on `data` are those of its outputs in onnxruntime ("fisher" and `structured` need the module).
        data: batches, kept in memory while this works: tensors, tuples, dicts of arguments by name. None: without data.
        loss: gives one number, a mean over the batch, from (outputs, target). The target is the last of a tuple,
            and not given to the model; of a dict it is the whole dict, of a tensor the tensor itself. None: the
            outputs' own `.loss` where they have one (models of transformers that are given labels); else how far the
            outputs are from those of the model as it is: Kullback-Leibler divergence where they are logits, mean
            square as a share of their own otherwise.
        of: the compression of the weights, "pruning" or "quantization".
        method: None: "data" where data is given, else "magnitude".
        levels: sparsities from 0 to below 1 (0 is put first where it is missing), or bits from 2 to 8, in any order.
            None: 0 to .99 in steps of .01 without data, else 0, .2, .4, .6, .7, .8, .85, .9, .95, .99; bits 8, 6, 4,
                3, 2.
        layers: names as in a recipe, or an analysis, whose prunable (quantizable) layers are taken. None: all
            convolutions, Linear, Embedding and the projections of MultiheadAttention.
        structured: whether whole channels go, by groups of layers that must lose them together; "data" and "fisher".
        sample_inputs: inputs to trace the model on ("shape", `structured`); None: the first batch.
        batches: number of batches of `data` at most; None: all.
        progress: whether a bar is shown; None: on a terminal.

    Raises:
        ArgumentError: an argument that cannot be meant. TargetError: a name matches nothing, or no layer.
        DataError: no data, weights or a loss that are not finite; the model was put back.
        StateError: quantization of a model that is quantized.
    """
    method = _checked_method(of, method, data, loss, structured)
    steps = _checked_levels(of, levels, method)
    model = unwrapped(module_or_file(model, LOSS_PROFILE))
    if method == "fisher" or structured:
        refuse_file(model, f"{LOSS_PROFILE}: {'structured=True' if structured else 'method=' + repr(method)}")
    own = isinstance(model, FileModule) and layers is None
    if isinstance(model, FileModule) and layers is None:
        layers = model.analysis()
    if of == "quantization" and is_quantized(model):
        raise StateError(
            f"{LOSS_PROFILE}: {type(model).__name__} holds quantized layers already; give the float model."
        )
    units = [] if structured else layer_weights(model, layers, of, where=LOSS_PROFILE)
    given: list[Batch] = []
    if data is not None and (method in ("data", "fisher") or sample_inputs is None):
        given = collected_batches(model, data, with_target=loss is not None, most=batches, where=LOSS_PROFILE)
    sample = (
        collected_batches(model, [sample_inputs], with_target=False, most=1, where=LOSS_PROFILE)
        if sample_inputs is not None
        else []
    )
    families: dict[str, tuple[str, ...]] = {}
    if structured:
        units, families = weights_of_channel_groups(model, (sample or given)[0], layers, where=LOSS_PROFILE)
    if method == "magnitude":
        losses = {unit.name: _magnitude(unit, of, steps) for unit in track(units, "magnitudes", progress=progress)}
        return LossProfile(method, of, steps, losses, 0.0, 0)
    if method == "shape":
        analysis = layers
        if not isinstance(analysis, ModelAnalysis) or own:
            first = next(iter([*sample, *given]), None)
            if first is None:
                raise ArgumentError(
                    f"{LOSS_PROFILE}: method='shape' needs sample_inputs, or the layers of an analysis."
                )
            if isinstance(model, FileModule):
                analysis = model.analysis(first.kwargs or first.args)
            else:
                analysis = analyze_module(model, first.args, first.kwargs)
        return LossProfile(method, of, steps, _shapes(analysis, units, of, steps), 0.0, 0)
    trials = Trials(model, given, loss, where=LOSS_PROFILE)
    if method == "fisher":
        losses = _fisher(trials, units, steps, progress)
        return LossProfile(method, of, steps, losses, 0.0, trials.samples, families)
    return LossProfile(
        method, of, steps, _measured_losses(trials, units, steps, progress), trials.base, trials.samples, families
    )


# ---------------------------------------------------------------------------------------------- methods


def _measured_losses(
    trials: Trials, units: list[Unit], levels: tuple[float, ...], progress: bool | None
) -> dict[str, tuple[float, ...]]:
    found: dict[str, list[float]] = {unit.name: [] for unit in units}
    seen: dict[str, Tensor] = {}
    for unit, level in track([(unit, level) for unit in units for level in levels], "losses", progress=progress):
        values = unit.compressed(level)
        losses = found[unit.name]
        before = seen if losses else {name: parameter.detach() for name, parameter in unit.parameters.items()}
        if all(torch.equal(value, before[name]) for name, value in values.items()):
            # No step of this level changes anything: sparsity 0, few weights, or zeros that were there.
            losses.append(losses[-1] if losses else trials.base)
        else:
            losses.append(trials.with_weights(unit.parameters, values, f"with {unit.name!r} at {level:g}"))
        seen = values
    return {name: tuple(losses) for name, losses in found.items()}


def _fisher(
    trials: Trials, units: list[Unit], levels: tuple[float, ...], progress: bool | None
) -> dict[str, tuple[float, ...]]:
    curvature = trials.curvature({name: p for unit in units for name, p in unit.parameters.items()})

    def at(unit: Unit, level: float) -> float:
        total = 0.0
        for name, value in unit.compressed(level).items():
            moved = (value - unit.parameters[name].detach()).to(curvature[name].dtype)
            total += float((curvature[name] * moved.square_()).sum(dtype=torch.float64)) / 2
        return total

    return {unit.name: tuple(at(unit, level) for level in levels) for unit in track(units, "losses", progress=progress)}


def _magnitude(unit: Unit, of: Of, levels: tuple[float, ...]) -> tuple[float, ...]:
    (weight,) = (parameter.detach() for parameter in unit.parameters.values())
    if of == "quantization":
        whole = float(weight.double().square().sum()) or 1.0
        (values,) = zip(*(unit.compressed(bits).values() for bits in levels), strict=True)
        return tuple(float((value - weight).double().square().sum()) / whole for value in values)
    ordered = weight.abs().flatten().sort().values.double()
    found: list[float] = []
    last = 0
    for level in levels:
        to = round(level * len(ordered))
        # In a small layer no weight may go between two levels.
        found.append(float(ordered[last:to].mean()) if to > last else found[-1] if found else 0.0)
        last = to
    return tuple(found)


def _shapes(
    analysis: ModelAnalysis, units: list[Unit], of: Of, levels: tuple[float, ...]
) -> dict[str, tuple[float, ...]]:
    layers = {info.name: info for info in analysis.layers}
    found = {}
    for unit in units:
        info = layers.get(unit.name)
        if info is None or not info.calls:
            raise DataError(
                f"{LOSS_PROFILE}: {unit.name!r} is not computed on the sample inputs; leave it out of `layers`."
            )
        into = sum(map(math.prod, info.input_shapes)) / analysis.batch_size
        out = math.prod(info.output_shape) / analysis.batch_size
        slope = (into + out) / info.parameters * max(into / out, out / into)
        found[unit.name] = tuple(slope * (level if of == "pruning" else 4.0**-level) for level in levels)
    return found


# ---------------------------------------------------------------------------------------------- arguments


def _checked_method(of: object, method: Method | None, data: object, loss: object, structured: bool) -> Method:
    if of not in get_args(Of):
        raise ArgumentError(f"{LOSS_PROFILE}: of={of!r} is none of {', '.join(get_args(Of))}.")
    chosen: Method = ("magnitude" if data is None else "data") if method is None else method
    if chosen not in get_args(Method):
        hint = did_you_mean(str(chosen), get_args(Method))
        raise ArgumentError(f"{LOSS_PROFILE}: method={chosen!r} is none of {', '.join(get_args(Method))}.{hint}")
    if chosen in ("data", "fisher") and data is None:
        raise ArgumentError(
            f"{LOSS_PROFILE}: method={chosen!r} needs data; without it there are 'magnitude' and 'shape'."
        )
    if loss is not None and not callable(loss):
        raise ArgumentError(
            f"{LOSS_PROFILE}: loss is a {type(loss).__name__}; give a function of (outputs, target), or None."
        )
    if loss is not None and data is None:
        raise ArgumentError(f"{LOSS_PROFILE}: a loss needs data to be computed on; give data, or leave the loss out.")
    if structured and (of != "pruning" or chosen not in ("data", "fisher")):
        raise ArgumentError(
            f"{LOSS_PROFILE}: structured=True needs data, and of='pruning'; the importance of channels comes from data."
        )
    return chosen


def _checked_levels(of: Of, levels: Iterable[float] | None, method: Method) -> tuple[float, ...]:
    if levels is None:
        return BITS if of == "quantization" else DATA_LEVELS if method in ("data", "fisher") else LEVELS
    try:
        found = list(levels)
    except TypeError:
        raise ArgumentError(f"{LOSS_PROFILE}: levels={levels!r}: give several numbers.") from None
    if not found:
        raise ArgumentError(f"{LOSS_PROFILE}: levels is empty; leave it out for those that are usual.")
    for level in found:
        number = isinstance(level, int | float) and not isinstance(level, bool)
        if of == "pruning" and not (number and 0 <= level < 1):
            percent = f" Did you mean {level / 100:g}?" if number and 1 < level < 100 else ""
            raise ArgumentError(f"{LOSS_PROFILE}: level {level!r} is no sparsity from 0 to below 1.{percent}")
        if of == "quantization" and not (number and level == int(level) and 2 <= level <= 8):
            raise ArgumentError(f"{LOSS_PROFILE}: level {level!r} is no number of bits from 2 to 8.")
    if of == "quantization":
        return tuple(sorted({int(level) for level in found}, reverse=True))
    return tuple(sorted({0.0, *map(float, found)}))
