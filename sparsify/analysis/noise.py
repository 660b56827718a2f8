"""Judges measured times: their spread, and which of them cannot be right."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from sparsify.analysis.layers import ModelAnalysis

__all__: list[str] = []

APART = 1.5
"""How many times as long as another a layer may take that computes the same, since what is fused into both may differ;
and as long as it took itself in another measurement."""
INT8_AT_MOST = 8.0
"""How many times faster a layer can be in int8: a quarter of the bytes, and twice the products of an instruction."""
RESOLUTION_MS = 0.02
"""Differences below this say nothing: the profiler counts whole microseconds."""

Spread = tuple[float, float]
"""The lower and the higher of two measurements, in milliseconds."""


def spreads(rounds: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    """The lowest and the highest time of each layer over several measurements.

    >>> spreads([{"conv": 1.0}, {"conv": 1.5}])
    {'conv': (1.0, 1.5)}
    """
    names = dict.fromkeys(name for one in rounds for name in one)
    times = {name: [one.get(name, 0.0) for one in rounds] for name in names}
    return {name: (min(values), max(values)) for name, values in times.items()}


def unsteady(times: Mapping[str, Spread]) -> dict[str, str]:
    """{layer: why its time is not believed}, for layers whose measurements lie apart.

    >>> unsteady({"a": (1.0, 1.1), "b": (1.0, 3.4)})
    {'b': 'took 1 to 3.4 ms'}
    """
    return {
        name: f"took {low:.3g} to {high:.3g} ms"
        for name, (low, high) in times.items()
        if high > APART * low and high - low > RESOLUTION_MS
    }


def twins(analysis: ModelAnalysis) -> list[list[str]]:
    """Groups of layers that compute the same on tensors of the same sizes, so that they take the same time."""
    groups: dict[object, list[str]] = defaultdict(list)
    for layer in analysis.layers:
        if layer.weight is not None and layer.shared_with is None and layer.calls == 1:
            key = (layer.type, layer.input_shapes, layer.output_shape, layer.weights, layer.macs, layer.groups)
            groups[key].append(layer.name)
    return [names for names in groups.values() if len(names) > 1]


def unlike_twins(groups: Sequence[Sequence[str]], times: Mapping[str, Spread]) -> dict[str, str]:
    """{layer: why its time is not believed}, for layers that take longer or less than others that compute the same.

    >>> unlike_twins([["a", "b"]], {"a": (2.8, 2.9), "b": (0.19, 0.2)})["a"]
    'takes 2.8 ms, and b, which computes the same, 0.2 ms'
    >>> unlike_twins([["a", "b"]], {"a": (0.2, 0.3), "b": (0.19, 0.2)})
    {}
    """
    found: dict[str, str] = {}
    for names in groups:
        measured = sorted((name for name in names if name in times), key=lambda name: times[name])
        if len(measured) < 2:
            continue
        middle = measured[(len(measured) - 1) // 2]
        for name in measured:
            fast, slow = (times[name], times[middle]) if times[name] < times[middle] else (times[middle], times[name])
            if slow[0] > APART * fast[1] and slow[0] - fast[1] > RESOLUTION_MS:
                own, other = (slow[0], fast[1]) if slow is times[name] else (fast[1], slow[0])
                found[name] = f"takes {own:.3g} ms, and {middle}, which computes the same, {other:.3g} ms"
    return found


def too_fast(dense: Mapping[str, Spread], int8: Mapping[str, Spread]) -> dict[str, str]:
    """{layer: why it is not believed}, for layers that are faster in int8 than any kernel is.

    >>> too_fast({"a": (2.8, 2.9)}, {"a": (0.19, 0.2)})
    {'a': 'takes 2.8 ms in float and 0.2 ms in int8, 14 times less'}
    """
    found = {}
    for name, (low, _) in dense.items():
        high = int8[name][1] if name in int8 else 0.0
        if high > 0 and low > INT8_AT_MOST * high and low - high > RESOLUTION_MS:
            found[name] = f"takes {low:.3g} ms in float and {high:.3g} ms in int8, {low / high:.0f} times less"
    return found
