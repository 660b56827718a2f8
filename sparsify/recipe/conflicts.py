"""Conflicts in a recipe: two modifiers on the same weights at one time, or steps in an impossible order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sparsify.modifiers.base import Modifier
from sparsify.recipe import grammar

__all__: list[str] = []

Conflict = tuple[int, str]
"""The position of the modifier that is in the way, and what to say."""


def in_order(modifiers: Sequence[Modifier]) -> list[Modifier]:
    """As they are updated: those that end first, then those that start first, then by name."""
    return sorted(modifiers, key=lambda m: (m.window.end, m.start_epoch, type(m).__name__))


def conflict(modifiers: Sequence[Modifier], names: Sequence[Sequence[str]] | None = None) -> Conflict | None:
    """The first of `modifiers`, as they are written, that cannot be with the others.

    `names` are the parameters of each in a model; without them the names that it says are compared as they stand.
    """
    return _overlap(modifiers, names) or next(_out_of_order(modifiers), None)


def _overlap(modifiers: Sequence[Modifier], names: Sequence[Sequence[str]] | None) -> Conflict | None:
    """A modifier that prunes what another one prunes at the same time, or before whole channels of it are chosen."""
    windows: dict[str, list[tuple[float, float, int]]] = {}
    for index, modifier in enumerate(modifiers):
        if modifier.kind == "pruning":
            said = modifier.names() if names is None else names[index]
            # "conv1" is the weight of the layer conv1.
            for name in {n if names or n.startswith("re:") else n.removesuffix(".weight") for n in said}:
                windows.setdefault(name, []).append((modifier.window.start, modifier.window.end, index))
    conflicts: list[tuple[int, int, str]] = []
    for name, entries in windows.items():
        entries.sort()
        last = entries[0]
        for entry in entries[1:]:
            if entry[0] < last[1] and last[0] < entry[1]:
                conflicts.append((max(entry[2], last[2]), min(entry[2], last[2]), name))
            last = max(last, entry, key=lambda e: e[1])
        channels = [entry for entry in entries if modifiers[entry[2]].whole_channels]
        if channels:
            last = max(channels, key=lambda e: e[1])
            for entry in entries:
                if entry[0] < last[1] and not modifiers[entry[2]].whole_channels:
                    conflicts.append((max(entry[2], last[2]), min(entry[2], last[2]), name))
    if not conflicts:
        return None
    second, first, name = min(conflicts)
    one, other = modifiers[first], modifiers[second]
    text = (
        f"{_who(other)} prunes {grammar.shown(name)} from epoch {_span(other)}, but {_who(one)} does so from "
        f"{_span(one)}. "
    )
    if one.whole_channels != other.whole_channels:
        end = (one if one.whole_channels else other).window.end
        return second, f"{text}Whole channels come first: let the other one start at epoch {end:g} or later."
    return second, f"{text}Let one end where the other starts, or leave the name out of one."


def _out_of_order(modifiers: Sequence[Modifier]) -> Iterator[Conflict]:
    """Conflicts whatever the names: channels are removed while another modifier depends on their number."""
    place = {id(modifier): position for position, modifier in enumerate(in_order(modifiers))}
    position = {id(modifier): index for index, modifier in enumerate(modifiers)}
    # Channels are masked or removed until then; a modifier of the same moment may come before it.
    until = [(max(m.cuts(), default=m.window.end), m) for m in modifiers if m.cuts() or m.whole_channels]
    if not until:
        return
    last, cutter = max(until, key=lambda each: (each[0], place[id(each[1])]))
    cuts = [(epoch, m) for m in modifiers for epoch in m.cuts()]
    for other in modifiers:
        start, end, at = other.window.start, other.window.end, position[id(other)]
        if other.kind == "quantization" and (start < last or (start == last and place[id(other)] < place[id(cutter)])):
            yield (
                max(at, position[id(cutter)]),
                f"{_who(other)} starts at epoch {start:g}, but {_who(cutter)} still masks or removes channels at "
                f"{last:g}, and what is quantized keeps its size. Start the quantization after it.",
            )
        if other.reroutes:
            # "At once" is before anything is traced.
            for edge in (start, end):
                if 0 < edge < last:
                    yield (
                        max(at, position[id(cutter)]),
                        f"{_who(other)} changes at epoch {edge:g} which layers the model runs through, but "
                        f"{_who(cutter)} masks or removes channels until {last:g} of the model as it ran before. Let "
                        "it start at once (start_epoch: -1) and never end, or start it later.",
                    )
        for epoch, modifier in () if other.resizable else cuts:
            if start < epoch < end:
                yield (
                    max(at, position[id(modifier)]),
                    f"{_who(modifier)} removes channels at epoch {epoch:g}, in the middle of {_who(other)}, which "
                    f"keeps something for each weight from {_span(other)}. Remove them before it starts or after it "
                    "ends.",
                )
    masks = [m.window.start for m in modifiers if m.whole_channels]
    for modifier in modifiers:
        if masks and modifier.cuts() and not modifier.whole_channels and max(modifier.cuts()) <= min(masks):
            yield (
                position[id(modifier)],
                f"{_who(modifier)} removes masked channels at epoch {max(modifier.cuts()):g}, before any is masked: "
                f"that starts at {min(masks):g}. Give the epoch at which masking ends.",
            )


def _who(modifier: Modifier) -> str:
    return type(modifier).__name__


def _span(modifier: Modifier) -> str:
    return f"{modifier.window.start:g} to {modifier.window.end:g}"
