"""Chooses the bits of the weights of each layer: the least loss for a size, or for a latency."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from sparsify.analysis.layers import ModelAnalysis
from sparsify.analysis.loss import LossProfile
from sparsify.analysis.performance import PerformanceProfile
from sparsify.analysis.units import layer_name
from sparsify.errors import ArgumentError, TargetError, did_you_mean
from sparsify.model.targets import named_parameters
from sparsify.model.wrappers import by_clean_name, unwrapped
from sparsify.output.tables import Column, Displayed, Table

__all__ = ["ChosenBits", "choose_bits"]

FLOAT_BITS = 32
"""The bits of what stays in float."""
CHOOSE_BITS = "choose_bits"


@dataclass(frozen=True)
class LayerBits:
    """Bits of one layer. `adds`: loss that its rounding adds, by the profile. `modules`: those that hold its weight."""

    name: str
    weights: int
    bits: int
    adds: float
    modules: tuple[str, ...]


@dataclass(frozen=True)
class ChosenBits(Displayed):
    """Bits for every layer of a profile. str() is a table.

    Attributes:
        goal: what was asked for, in words.
        other_bytes: what is not among `layers` (biases, norms, layers that stay in float), at 4 bytes each.
        latency_ms: what is predicted, where a latency was the goal.
    """

    layers: tuple[LayerBits, ...]
    goal: str
    other_bytes: int
    latency_ms: float | None = None

    @property
    def bits(self) -> dict[str, int]:
        """Bits by layer; 32 where it stays in float."""
        return {layer.name: layer.bits for layer in self.layers}

    @property
    def loss(self) -> float:
        """The loss that all layers together add, if each adds what it adds alone."""
        return sum(layer.adds for layer in self.layers)

    @property
    def average_bits(self) -> float:
        """Bits per weight, over `layers`."""
        return sum(layer.weights * layer.bits for layer in self.layers) / sum(layer.weights for layer in self.layers)

    @property
    def size_bytes(self) -> float:
        """Size of all weights at their bits, and the rest in float; scales are not counted.

        A file stores values of 5 to 8 bits in a byte, and of 2 to 4 bits in half of one where its opset has int4.
        """
        return sum(layer.weights * layer.bits for layer in self.layers) / 8 + self.other_bytes

    @property
    def scheme_overrides(self) -> dict[str, dict[str, dict[str, int]] | None]:
        """The value of that argument of QuantizationModifier and of `quantize_model`."""
        return {
            module: None if layer.bits == FLOAT_BITS else {"weights": {"num_bits": layer.bits}}
            for layer in self.layers
            for module in layer.modules
        }

    def table(self) -> Table:
        """A row for each layer."""
        columns = (
            Column("name", "Layer"),
            Column("weights", "Weights", ",d"),
            Column("bits", "Bits"),
            Column("adds", "Adds to loss", ".3g"),
        )
        got = (
            f"{self.average_bits:.2f} bits on average, {self.size_bytes:,.0f} bytes, {self.loss:.4g} added to the loss"
        )
        ms = "" if self.latency_ms is None else f", {self.latency_ms:.3g} ms"
        return Table.of(f"{self.goal}: {got}{ms}", self.layers, columns)

    def _parts(self) -> list[Table | str]:
        return [self.table()]


@dataclass(frozen=True)
class Option:
    """One way to store a layer: what it costs of the goal, in its unit, and what it adds to the loss."""

    bits: int
    cost: float
    adds: float


def choose_bits(
    model: nn.Module | ModelAnalysis,
    loss_profile: LossProfile,
    *,
    average_bits: float | None = None,
    size_bytes: float | None = None,
    latency_ms: float | None = None,
    performance: PerformanceProfile | None = None,
    bits: Iterable[int] | None = None,
) -> ChosenBits:
    """The bits of each layer's weights that add least to the loss, within one goal; layers that lose much keep more.

    What the layers add is taken to add up. From the cheapest bits everywhere, and from each that fits everywhere, the
    step that saves most loss for its cost is taken until none fits, along the lower convex hulls of Shoham & Gersho
    ("Efficient bit allocation for an arbitrary set of quantizers", 1988); the best of these counts. Not always the
    optimum, but never worse than the same bits everywhere.

    Args:
        model: the model, or its analysis.
        loss_profile: of quantization; its layers get bits, the others stay as they are.
        average_bits: the goal: bits of a weight, on average over these layers.
        size_bytes: the goal: the size of all parameters, those that stay in float at 4 bytes.
        latency_ms: the goal: the time of the model in onnxruntime, with each layer in float or int8; by `performance`,
            in which int8 was measured. Nodes between layers are shared out by the layers' times, so the prediction
            is exact where all are in float, or all in int8; in between, export and measure. What rounding
            of activations costs is not in the loss.
        performance: the times for `latency_ms`, measured in float and in int8.
        bits: those that may be chosen, of the profile's levels; None: all of them. (8, 4) are those that a file stores
            without waste.

    Raises:
        ArgumentError: no goal or several, one that cannot be met (the message says what can), or a profile of pruning.
        TargetError: a layer of the profile is not in the model.
    """
    goals = {"average_bits": average_bits, "size_bytes": size_bytes, "latency_ms": latency_ms}
    goal = _one_goal(goals)
    allowed = _allowed(loss_profile, bits if goal != "latency_ms" else (8,))
    held, parameters = _held(model, loss_profile)
    weights = {name: count for name, (count, _) in held.items()}
    adds = {
        name: dict(zip(loss_profile.levels, loss_profile.increase(name), strict=True)) for name in loss_profile.losses
    }
    rest = 4 * (parameters - sum(weights.values()))
    fixed = 0.0
    if latency_ms is not None:
        options, fixed = _layer_times(performance, adds)
        budget, what = latency_ms, f"at most {latency_ms:g} ms"
    else:
        options = {name: [Option(n, weights[name] * n / 8, adds[name][n]) for n in sorted(allowed)] for name in weights}
        if average_bits is not None:
            budget, what = average_bits * sum(weights.values()) / 8, f"{average_bits:g} bits on average"
        else:
            assert size_bytes is not None
            fixed, budget, what = rest, size_bytes, f"at most {size_bytes:,.0f} bytes"
    _check_reach(goal, options, budget - fixed, fixed, sum(weights.values()))
    chosen = least_loss(options, budget - fixed)
    layers = tuple(
        LayerBits(name, weights[name], chosen[name].bits, chosen[name].adds, modules)
        for name, (_, modules) in held.items()
    )
    predicted = None if latency_ms is None else fixed + sum(option.cost for option in chosen.values())
    return ChosenBits(layers, what, rest, predicted)


def least_loss(options: Mapping[str, list[Option]], budget: float) -> dict[str, Option]:
    """One option for each name, with the least sum of losses that is found within the budget.

    >>> ways = [Option(2, 2.0, 8.0), Option(4, 4.0, 1.0), Option(8, 8.0, 0.0)]
    >>> weak = [Option(2, 2.0, 0.5), Option(4, 4.0, 0.4), Option(8, 8.0, 0.0)]
    >>> {name: option.bits for name, option in least_loss({"a": ways, "b": weak}, 6.0).items()}
    {'a': 4, 'b': 2}
    """
    budget += 1e-9 * abs(budget)
    starts = [{name: min(ways, key=_layer_cost) for name, ways in options.items()}]
    for bits in sorted({option.bits for ways in options.values() for option in ways}):
        alike = {name: next((o for o in ways if o.bits == bits), starts[0][name]) for name, ways in options.items()}
        if sum(map(_layer_cost, alike.values())) <= budget:
            starts.append(alike)
    found = [_improved(start, options, budget) for start in starts]
    return min(found, key=lambda one: sum(option.adds for option in one.values()))


def _improved(found: dict[str, Option], options: Mapping[str, list[Option]], budget: float) -> dict[str, Option]:
    """`found` with options exchanged, one at a time, for the one that saves most for its cost, as long as one fits.

    From the cheapest ones this moves along the lower convex hull of each layer's options. What saves nothing but has
    more bits comes last.
    """
    found = dict(found)
    left = budget - sum(map(_layer_cost, found.values()))
    while True:
        better = [
            (found[name].adds - way.adds, way.cost - found[name].cost, name, way)
            for name, ways in options.items()
            for way in ways
            if way.cost - found[name].cost <= left
            and (way.adds < found[name].adds or (way.adds == found[name].adds and way.bits > found[name].bits))
        ]
        if not better:
            return found
        _, cost, name, way = max(better, key=lambda one: (one[0] / max(one[1], 1e-12), one[0]))
        found[name] = way
        left -= cost


def _layer_cost(option: Option) -> float:
    return option.cost


def _layer_times(
    performance: PerformanceProfile | None, adds: Mapping[str, Mapping[float, float]]
) -> tuple[dict[str, list[Option]], float]:
    """Times of each layer in float and in int8, with its share of the nodes between layers; and the fixed time."""
    if performance is None:
        raise ArgumentError(f"{CHOOSE_BITS}: latency_ms needs performance, the performance_profile of the model.")
    if performance.total_int8_ms is None:
        why = performance.notes.get("int8", "make it with int8")
        raise ArgumentError(f"{CHOOSE_BITS}: this performance profile has no times in int8: {why}.")
    layers = {layer.name: layer for layer in performance.layers}
    able = {n: layer for n, layer in layers.items() if layer.int8_ms is not None and n in adds}
    if not able:
        raise ArgumentError(f"{CHOOSE_BITS}: no layer of the loss profile was measured in int8.")
    # The profiler costs time itself: each time as a share of the whole without it.
    in_float = performance.total_ms / (performance.profiled_ms or sum(layer.ms for layer in layers.values()))
    int8 = [layer.int8_ms for layer in layers.values() if layer.int8_ms is not None]
    in_int8 = performance.total_int8_ms / (performance.profiled_int8_ms or sum(int8))
    between = in_float * sum(performance.others.values())
    between_int8 = in_int8 * sum(ms for name, ms in performance.others_int8.items() if not name.endswith(", in float"))
    whole = sum(layer.ms for layer in able.values())
    options = {name: [Option(FLOAT_BITS, 0.0, 0.0)] for name in adds}
    for name, layer in able.items():
        assert layer.int8_ms is not None
        share = layer.ms / whole
        options[name] = [
            Option(FLOAT_BITS, in_float * layer.ms + share * between, 0.0),
            Option(8, in_int8 * layer.int8_ms + share * between_int8, adds[name][8]),
        ]
    return options, in_float * sum(layer.ms for name, layer in layers.items() if name not in able)


def _held(model: nn.Module | ModelAnalysis, profile: LossProfile) -> tuple[dict[str, tuple[int, tuple[str, ...]]], int]:
    """For each layer of the profile its weights and the modules that hold them; and all parameters of the model."""
    found: dict[str, tuple[int, tuple[str, ...]]] = {}
    if isinstance(model, ModelAnalysis):
        title, parameters = model.model, model.parameters
        for info in model.layers:
            if info.weight is None:
                continue
            if info.shared_with is None:
                found[info.name] = (info.weights, (info.weight.rpartition(".")[0],))
            elif info.shared_with in found:
                count, modules = found[info.shared_with]
                found[info.shared_with] = (count, (*modules, info.name))
    elif isinstance(model, nn.Module):
        model = unwrapped(model)
        title = type(model).__name__
        names: dict[int, list[str]] = {}
        for name, parameter in by_clean_name(model.named_parameters(remove_duplicate=False)).items():
            names.setdefault(id(parameter), []).append(name)
        own = named_parameters(model)
        parameters = sum(parameter.numel() for parameter in own.values())
        for name, parameter in own.items():
            modules = tuple(dict.fromkeys(alias.rpartition(".")[0] for alias in names[id(parameter)]))
            path, _, last = name.rpartition(".")
            found[layer_name(name, last)] = (parameter.numel(), modules)
            # In an analysis a layer with one weight has the name of its module.
            if parameter.dim() > 1:
                found.setdefault(path, (parameter.numel(), modules))
    else:
        raise ArgumentError(
            f"{CHOOSE_BITS}: model is a {type(model).__name__}: give a torch.nn.Module, or its analysis."
        )
    for name in profile.losses:
        if name not in found:
            raise TargetError(
                f"{CHOOSE_BITS}: the profile's layer {name!r} is not in {title}.{did_you_mean(name, found)}"
            )
    return {name: found[name] for name in profile.losses}, parameters


# ---------------------------------------------------------------------------------------------- arguments


def _one_goal(goals: Mapping[str, float | None]) -> str:
    given = [name for name, value in goals.items() if value is not None]
    if len(given) != 1:
        raise ArgumentError(f"{CHOOSE_BITS}: {' and '.join(given) or 'no goal'}: give one of {', '.join(goals)}.")
    value = goals[given[0]]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ArgumentError(f"{CHOOSE_BITS}: {given[0]}={value!r}: give a number above 0.")
    return given[0]


def _allowed(profile: LossProfile, bits: Iterable[int] | None) -> set[int]:
    if profile.of != "quantization":
        raise ArgumentError(
            f"{CHOOSE_BITS}: the profile is of {profile.of}; make one with loss_profile(..., of='quantization')."
        )
    if not profile.losses:
        raise ArgumentError(f"{CHOOSE_BITS}: the profile has no layers.")
    known = {int(level) for level in profile.levels}
    wanted = known if bits is None else set(bits)
    if not wanted or not wanted <= known:
        unknown = sorted(wanted - known) or "none"
        raise ArgumentError(f"{CHOOSE_BITS}: bits: {unknown}: the profile has {sorted(known)}.")
    return wanted


def _check_reach(goal: str, options: Mapping[str, list[Option]], budget: float, fixed: float, weights: int) -> None:
    least = sum(min(map(_layer_cost, ways)) for ways in options.values())
    if least <= budget * (1 + 1e-9):
        return
    reach = {
        "average_bits": f"{8 * least / weights:.4g} bits on average",
        "size_bytes": f"{least + fixed:,.0f} bytes, of which {fixed:,.0f} stay in float",
        "latency_ms": f"{least + fixed:.4g} ms",
    }[goal]
    raise ArgumentError(f"{CHOOSE_BITS}: {goal} cannot be met: the least is {reach}.")
