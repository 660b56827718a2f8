"""Makes the tables that a latency goal is solved on, from a model, its performance profile and its loss profiles."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING

from sparsify.analysis.analyze import analyze_model
from sparsify.analysis.variants import kept_channels
from sparsify.errors import ArgumentError
from sparsify.optimize.widths import LayerTime, SpeedPart, Tables, WidthCurve
from sparsify.pruning.group_scores import norms

if TYPE_CHECKING:
    from torch import nn

    from sparsify.analysis.loss import LossProfile
    from sparsify.analysis.performance import PerformanceProfile
    from sparsify.model.signature import InputsLike
    from sparsify.pruning.groups import ChannelGroups

__all__: list[str] = []

WIDTH_STEPS = 16
"""Shares of the channels that are tried: sixteenths, rounded to what the channel group's kernels like."""


class ModelTables:
    """A model, its profiles, and the tables made of them."""

    def __init__(
        self,
        model: nn.Module,
        sample_inputs: InputsLike,
        performance: PerformanceProfile,
        channel_groups: ChannelGroups | None,
        int8: bool,
        loss: LossProfile | None,
        int8_loss: LossProfile | None,
        limits: Mapping[str, float],
    ) -> None:
        self.model, self.sample_inputs, self.performance = model, sample_inputs, performance
        self.channel_groups, self.int8 = channel_groups, int8
        self.notes: list[str] = []
        self.loss_method = "norms" if loss is None else loss.method
        self.analysis = {info.name: info for info in analyze_model(model, sample_inputs).layers}
        strange = [layer.name for layer in performance.layers if layer.name not in self.analysis]
        if strange:
            raise ArgumentError(f"performance is of another model: it has {strange[0]!r}, which this one has not.")
        self.layer_of = {info.weight: info.name for info in self.analysis.values() if info.weight is not None}
        self.parts: dict[str, tuple[str, ...]] = {}
        self.counts: dict[str, dict[float, int]] = {}
        self.tables = self._tables(loss, int8_loss, limits)

    # ------------------------------------------------------------------ tables

    def _tables(self, loss: LossProfile | None, int8_loss: LossProfile | None, limits: Mapping[str, float]) -> Tables:
        parts = [] if self.channel_groups is None else self._parts(self.channel_groups, loss, limits)
        profile = self.performance
        grid = profile.widths or (1.0,)
        usable = {part.name for part in parts}
        dims = self._dims(usable)
        scale = {"float": _scales(profile, int8=False), "int8": _scales(profile, int8=True)}
        times: list[LayerTime] = []
        rest = {"float": [0.0] * len(grid), "int8": [0.0] * len(grid)}
        wide = {
            "float": profile.width_profiled_ms or (profile.profiled_ms,) * len(grid),
            "int8": profile.width_profiled_int8_ms or (profile.profiled_int8_ms or 0.0,) * len(grid),
        }
        for kind in rest:
            rest[kind] = [total * factor for total, factor in zip(wide[kind], scale[kind], strict=True)]
        for layer in profile.layers:
            mine = dims.get(layer.name, ())
            if not mine and layer.width_ms and self.analysis[layer.name].weight is None:
                continue  # A product of activations that become narrower belongs to the rest.
            left = [self._left(mine, width) for width in grid]

            def curve(
                dense: float, at_widths: tuple[float, ...] | None, kind: str, left: list[float] = left
            ) -> WidthCurve:
                found = [ms * factor for ms, factor in zip(at_widths or (dense,) * len(grid), scale[kind], strict=True)]
                rest[kind] = [all_of_it - ms for all_of_it, ms in zip(rest[kind], found, strict=True)]
                return WidthCurve.of(left, found)

            # The time of a layer that stays as it is is that at full width.
            own = curve(layer.ms, layer.width_ms if mine else None, "float")
            quantized = None
            if self.int8 and layer.int8_ms is not None:
                quantized = curve(layer.int8_ms, layer.width_int8_ms if mine else None, "int8")
            else:
                # In float there as well.
                curve(layer.ms, layer.width_ms if mine else None, "int8")
            times.append(LayerTime(layer.name, mine, own, quantized, self._int8_loss(layer.name, int8_loss)))
        return Tables(
            tuple(parts),
            tuple(times),
            WidthCurve.of(grid, [max(ms, 0.0) for ms in rest["float"]]),
            WidthCurve.of(grid, [max(ms, 0.0) for ms in rest["int8"]]) if self.int8 else None,
        )

    def _left(self, dims: tuple[Mapping[str, float], ...], width: float) -> float:
        """The share of the multiplications that the profile left at a width, after rounding."""
        shares = {part: self._rounded(part, width) for dim in dims for part in dim}
        return LayerTime("", dims, WidthCurve((1.0,), (0.0,))).left(shares)

    def _rounded(self, part: str, width: float) -> float:
        assert self.channel_groups is not None
        name = self.parts[part][0]
        return kept_channels(self.channel_groups, name, width) / self.channel_groups.groups[name].size

    def _parts(
        self, channel_groups: ChannelGroups, loss: LossProfile | None, limits: Mapping[str, float]
    ) -> list[SpeedPart]:
        """Channel groups with a weight in common are named together, so they have one share."""
        groups: list[tuple[set[str], list[str]]] = []
        for name, channel_group in channel_groups.groups.items():
            rows, names = set(channel_group.rows), [name]
            for other in [group for group in groups if group[0] & rows]:
                groups.remove(other)
                rows, names = rows | other[0], [*other[1], *names]
            groups.append((rows, names))
        least = min(self.performance.widths, default=1.0)
        unknown = set(limits) - {self.layer_name(row) for rows, _ in groups for row in rows}
        if unknown:
            raise ArgumentError(f"limits: {min(unknown)!r} is no layer with channels that can go.")
        found = []
        for rows, names in groups:
            sizes = {channel_groups.groups[name].size for name in names}
            layers = [self.layer_name(row) for row in rows]
            lowest = max([least, *(1 - limits[layer] for layer in layers if layer in limits)])
            shares: dict[float, int] = {}
            for step in range(WIDTH_STEPS, -1, -1):
                counts = {kept_channels(channel_groups, name, max(step / WIDTH_STEPS, lowest)) for name in names}
                share = max(counts) / max(sizes)
                if len(sizes) == len(counts) == 1 and share >= lowest - 1e-9:
                    shares[share] = counts.pop()
            losses = None if not shares else self._losses(channel_groups, names, tuple(shares), loss)
            if losses is None or len(shares) < 2:
                continue
            name = names[0]
            self.parts[name], self.counts[name] = tuple(names), shares
            found.append(SpeedPart(name, tuple(shares), losses, float(sum(sizes))))
        return found

    def _losses(
        self, channel_groups: ChannelGroups, names: list[str], shares: tuple[float, ...], loss: LossProfile | None
    ) -> tuple[float, ...] | None:
        """At each share; None where the profile does not know these channels."""
        if loss is None:
            squares = norms(self.model, {name: channel_groups.groups[name] for name in names})
            found = [0.0] * len(shares)
            for score in squares.values():
                ordered = score.square().sort().values.cumsum(0)
                for i, share in enumerate(shares):
                    pruned = round(score.numel() * (1 - share))
                    found[i] += float(ordered[pruned - 1] / ordered[-1].clamp(min=1e-300)) if pruned else 0.0
            return tuple(found)
        keys: list[str] = []
        for name in names:
            layers = [self.layer_name(row) for row in channel_groups.groups[name].rows]
            if loss.families:
                keys += [key for key, members in loss.families.items() if set(members) & set(layers)]
            else:
                keys += [layer for layer in layers if layer in loss.losses]
        if not keys:
            self.notes.append(f"{self.layer_name(names[0])} stays whole: the loss profile does not have it")
            return None
        total = [0.0] * len(shares)
        for key in dict.fromkeys(keys):
            increase = loss.increase(key)
            for i, share in enumerate(shares):
                total[i] += _at(loss.levels, increase, 1 - share)
        return tuple(total)

    def _dims(self, usable: set[str]) -> dict[str, tuple[Mapping[str, float], ...]]:
        """For each layer, which share of each dimension of its weight belongs to which part."""
        found: dict[str, dict[int, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
        heads: dict[str, str] = {}
        for part, names in self.parts.items():
            assert self.channel_groups is not None
            for name in names:
                channel_group = self.channel_groups.groups[name]
                for member in channel_group.members:
                    layer = self.layer_of.get(member.tensor)
                    if layer is None or part not in usable:
                        continue
                    own = sum(channel >= 0 for channel in member.channels) / len(member.channels)
                    entry = found[layer][member.dim]
                    entry[part] = entry.get(part, 0.0) + own
                    if channel_group.kind == "heads":
                        heads.setdefault(layer.rpartition(".")[0], part)
        dims: dict[str, tuple[Mapping[str, float], ...]] = {
            layer: tuple(entries.values()) for layer, entries in found.items()
        }
        for info in self.analysis.values():
            # A product of activations in attention follows its heads.
            owner = info.name.rpartition(".")[0]
            if info.weight is None and owner in heads:
                dims[info.name] = ({heads[owner]: 1.0},)
        return dims

    def _int8_loss(self, layer: str, profile: LossProfile | None) -> float:
        if profile is None or layer not in profile.losses:
            return 0.0
        return profile.increase(layer)[profile.levels.index(8)]

    def layer_name(self, weight: str) -> str:
        return self.layer_of.get(weight, weight.removesuffix(".weight"))


def _scales(profile: PerformanceProfile, *, int8: bool) -> tuple[float, ...]:
    """At each width, what the profiler's times are multiplied with so that they add up to those without it."""
    profiled = profile.width_profiled_int8_ms if int8 else profile.width_profiled_ms
    totals = profile.width_total_int8_ms if int8 else profile.width_total_ms
    if not profiled or not totals:
        whole = profile.profiled_int8_ms if int8 else profile.profiled_ms
        total = profile.total_int8_ms if int8 else profile.total_ms
        return (total / whole if whole and total else 1.0,) * (len(profile.widths) or 1)
    return tuple(total / seen if seen else 1.0 for total, seen in zip(totals, profiled, strict=True))


def _at(levels: tuple[float, ...], values: tuple[float, ...], level: float) -> float:
    """Between two levels, linear; beyond the last, along its last slope."""
    at = min(max(bisect.bisect_left(levels, level), 1), len(levels) - 1)
    low, high = levels[at - 1], levels[at]
    return values[at - 1] + (values[at] - values[at - 1]) * (level - low) / (high - low)
