"""Spreads an average sparsity over the layers by the loss and the time of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from sparsify.errors import ArgumentError, did_you_mean
from sparsify.optimize.layer_curves import LayerCurve
from sparsify.optimize.piecewise import at, reaches, slope, within
from sparsify.optimize.pruning_profiles import LayerChoice, PruningProfile, PruningSettings

__all__ = ["pruning_profile"]

BALANCES = tuple(number / 20 for number in range(21))
"""Spreads are computed for these balances; the one that is best at the balance asked for is taken."""
POINTS = 16
"""At most so many points of a layer's curves are used."""
AVERAGE_TOLERANCE = 0.005
"""A spread that misses the sparsity asked for by more than this is reported in the notes."""


def pruning_profile(layers: Sequence[LayerCurve], settings: PruningSettings | None = None) -> PruningProfile:
    """An average sparsity spread over layers: more where little is lost or much time is saved. A pure function.

    With L the summed losses of the layers and T their summed times, each in units of what it can be at most, and b the
    balance, the spread is the one of least b L + (1 - b) T among candidates that all meet the average, the caps and the
    filters. Candidates are the same for every balance, so L never falls and T never rises as b goes to 0. One is made
    for each of 21 balances: on the lower convex hull of b L + (1 - b) T of each layer the steepest gain per weight goes
    first, which is exact but for the last layer (Shoham & Gersho 1988, https://doi.org/10.1109/29.90373).

    Losses that fall and times that rise with sparsity are noise, and held level.

    Args:
        layers: see `curves`; in the order of the model.
        settings: None: the defaults of PruningSettings.

    Raises:
        ArgumentError: a setting out of its range, an override that names no layer which can be pruned, curves that do
            not fit together.
    """
    settings = settings or PruningSettings()
    _check_allocation(layers, settings)
    # What recovery is measured against: the best spread of the same average, with nothing set by hand.
    free = [_SpreadLayer.of(curve, replace(settings, overrides={})) for curve in layers]
    ideal = _least_lossy(_candidates(free, settings.sparsity))
    limited = [_SpreadLayer.of(curve, settings) for curve in layers]
    if settings.min_recovery > 0:
        limited = [
            layer.limited(layer.loss(share), settings.min_recovery)
            for layer, share in zip(limited, ideal.shares, strict=True)
        ]
    # No limit excludes it.
    spreads = _candidates(limited, settings.sparsity, [] if settings.overrides else [ideal])
    reached = max(_average(limited, one.shares) for one in spreads)
    reference = ideal
    if reached < _average(free, ideal.shares) - AVERAGE_TOLERANCE:
        # Fewer zeros than could be had: no better than the best with as few.
        reference = _least_lossy(_candidates(free, reached))
    losses = max(math.fsum(layer.highest for layer in limited), 1e-300)
    times = max(math.fsum(layer.curve.ms for layer in limited), 1e-300)
    balance = settings.balance
    chosen = min(
        spreads,
        key=lambda one: (
            balance * one.loss / losses + (1 - balance) * one.time / times,
            # Ties go to the one that the other term prefers.
            one.loss if balance < 1 else one.time,
        ),
    )
    return _profile(limited, settings, chosen, ideal, reference)


@dataclass(frozen=True)
class _SpreadLayer:
    """One layer under the settings: a share is 0, or from `least` to `most`; `fixed` by hand.

    `levels`, `losses` and `times` are thinned, made monotone, and have points at 0, `least` and `most`.
    """

    curve: LayerCurve
    levels: tuple[float, ...]
    losses: tuple[float, ...]
    times: tuple[float, ...]
    least: float
    most: float
    fixed: float | None
    why: str

    @classmethod
    def of(cls, curve: LayerCurve, settings: PruningSettings) -> _SpreadLayer:
        levels, losses, times = _monotone(curve)
        fixed = settings.overrides.get(curve.name)
        why, least, most = curve.why_not, settings.min_sparsity, min(settings.max_sparsity, levels[-1])
        if fixed is None and not why:
            if curve.first and not settings.first_layer:
                why = "the first layer"
            elif curve.grouped and not settings.grouped:
                why = "a grouped convolution"
        if not why and settings.min_speedup > 1:
            # The share from which on it is fast enough; times only fall.
            wanted = curve.ms / settings.min_speedup
            if curve.ms <= 0 or times[-1] > wanted:
                why = "no share of zeros makes it fast enough"
            else:
                least = max(least, reaches(levels, times, wanted))
        if not why and least > most:
            why = "what it may have lies below what it must have"
        if fixed is not None:
            why = "set by hand"
        made = cls(curve, levels, losses, times, least, most, 0.0 if why and fixed is None else fixed, why)
        return made.thinned()

    def thinned(self) -> _SpreadLayer:
        """At most `POINTS` points, with those that matter."""
        stride = max(1, math.ceil(len(self.levels) / (POINTS - 3)))
        wanted = {0.0, min(self.least, self.levels[-1]), self.most, self.levels[-1], *self.levels[::stride]}
        levels = tuple(sorted(wanted))
        return _SpreadLayer(
            self.curve,
            levels,
            tuple(at(self.levels, self.losses, level) for level in levels),
            tuple(at(self.levels, self.times, level) for level in levels),
            self.least,
            self.most,
            self.fixed,
            self.why,
        )

    def limited(self, best: float, recovery: float) -> _SpreadLayer:
        """With a cap where the recovery of the layer would fall below `recovery`, against the loss `best`."""
        if self.fixed is not None:
            return self
        allowed = best + (1 - recovery) * best
        if self.losses[-1] <= allowed:
            return self
        most = min(self.most, within(self.levels, self.losses, allowed))
        if most < max(self.least, 1e-9):
            why = "its recovery would be too low"
            return _SpreadLayer(self.curve, self.levels, self.losses, self.times, self.least, 0.0, 0.0, why)
        capped = _SpreadLayer(self.curve, self.levels, self.losses, self.times, self.least, most, None, self.why)
        levels = tuple(sorted({*self.levels, most}))
        return _SpreadLayer(
            self.curve,
            levels,
            tuple(capped.loss(level) for level in levels),
            tuple(capped.time(level) for level in levels),
            self.least,
            most,
            None,
            self.why,
        )

    @property
    def counted(self) -> bool:
        """True if it is among the layers of the average: those that may be pruned."""
        return not self.curve.why_not and self.why not in ("the first layer", "a grouped convolution")

    @property
    def highest(self) -> float:
        return self.loss(self.most) if self.counted else 0.0

    def loss(self, share: float) -> float:
        return at(self.levels, self.losses, share)

    def time(self, share: float) -> float:
        return at(self.levels, self.times, share)


@dataclass(frozen=True)
class _Spread:
    """One candidate: a share for each layer, and what they sum up to."""

    shares: tuple[float, ...]
    loss: float
    time: float


def _least_lossy(spreads: Sequence[_Spread]) -> _Spread:
    """The spread that loses least."""
    return min(spreads, key=lambda one: (one.loss, one.time))


def _average(layers: Sequence[_SpreadLayer], shares: Sequence[float]) -> float:
    """The sparsity over all layers that may be pruned."""
    counted = [(layer.curve.weights, share) for layer, share in zip(layers, shares, strict=True) if layer.counted]
    weights = math.fsum(size for size, _ in counted)
    return math.fsum(size * share for size, share in counted) / weights if weights else 0.0


def _candidates(layers: Sequence[_SpreadLayer], sparsity: float, known: Sequence[_Spread] = ()) -> list[_Spread]:
    """Spreads, those that are `known` too, that meet the average as nearly as it can be met: those far from it are left
    out."""
    counted = [layer for layer in layers if layer.counted]
    weights = math.fsum(layer.curve.weights for layer in counted)
    # What is set by hand takes its part of the average first.
    by_hand = math.fsum(layer.curve.weights * layer.fixed for layer in counted if layer.fixed)
    budget = sparsity * weights - by_hand
    scale = max(math.fsum(layer.highest for layer in layers), 1e-300)
    pace = max(math.fsum(layer.curve.ms for layer in layers), 1e-300)
    found = {one.shares: one for one in known}
    for balance in BALANCES:
        shares = _spread(layers, budget, balance / scale, (1 - balance) / pace)
        if shares not in found:
            loss = math.fsum(layer.loss(share) for layer, share in zip(layers, shares, strict=True))
            time = math.fsum(layer.time(share) for layer, share in zip(layers, shares, strict=True))
            found[shares] = _Spread(shares, loss, time)
    if weights == 0:
        return list(found.values())

    missed = [abs(_average(layers, one.shares) - sparsity) for one in found.values()]
    nearest = max(min(missed), AVERAGE_TOLERANCE / 2) + 1e-12
    return [one for one, far in zip(found.values(), missed, strict=True) if far <= nearest]


def _spread(layers: Sequence[_SpreadLayer], budget: float, on_loss: float, on_time: float) -> tuple[float, ...]:
    """The shares of least `on_loss` L + `on_time` T with `budget` weights pruned, as nearly as filters allow."""
    shares = [layer.fixed or 0.0 for layer in layers]
    steps = []
    for index, layer in enumerate(layers):
        if layer.fixed is None:
            steps += _steps(index, layer, on_loss, on_time)
    steps.sort()
    left = budget
    skipped: tuple[int, float] | None = None
    for _, index, _, to in steps:
        size = layers[index].curve.weights
        if left <= 1e-9 or (skipped and skipped[0] == index) or not size:
            continue
        more = (to - shares[index]) * size
        if more <= left:
            shares[index] = to
            left -= more
            continue
        share = shares[index] + left / size
        if share >= layers[index].least:
            shares[index] = share
            left = 0.0
        elif skipped is None:
            # Less than its least share: other layers take it, if they can.
            skipped = (index, shares[index])
    if left > 1e-9 and skipped is not None:
        _made_room(layers, shares, skipped[0], left, steps)
    return tuple(shares)


def _made_room(
    layers: Sequence[_SpreadLayer],
    shares: list[float],
    index: int,
    left: float,
    steps: Sequence[tuple[float, int, float, float]],
) -> None:
    """Gives the layer the least it may have, and takes from the others what that is too much, dearest first."""
    layer = layers[index]
    too_much = layer.least * layer.curve.weights - left
    spare = [
        (max(layers[i].least, 0.0), i) for _, i, _, _ in reversed(steps) if i != index and shares[i] > layers[i].least
    ]
    room = math.fsum((shares[i] - least) * layers[i].curve.weights for least, i in dict.fromkeys(spare))
    if room < too_much and too_much - room > left:
        # It comes nearer to what was asked without this layer.
        return
    shares[index] = layer.least
    for least, i in dict.fromkeys(spare):
        give = min((shares[i] - least) * layers[i].curve.weights, too_much)
        shares[i] -= give / layers[i].curve.weights
        too_much -= give
        if too_much <= 0:
            return


def _steps(index: int, layer: _SpreadLayer, on_loss: float, on_time: float) -> list[tuple[float, int, float, float]]:
    """(cost of one more weight, layer, from, to) along the lower convex hull of the layer's cost."""
    points = [
        (level, on_loss * loss + on_time * time)
        for level, loss, time in zip(layer.levels, layer.losses, layer.times, strict=True)
        if level == 0.0 or layer.least <= level <= layer.most
    ]
    hull: list[tuple[float, float]] = []
    for point in points:
        while len(hull) > 1 and slope(hull[-2], hull[-1]) >= slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    size = max(layer.curve.weights, 1)
    return [(slope(a, b) / size, index, a[0], b[0]) for a, b in pairwise(hull)]


def _profile(
    layers: Sequence[_SpreadLayer], settings: PruningSettings, chosen: _Spread, ideal: _Spread, reference: _Spread
) -> PruningProfile:
    choices = []
    for layer, share, best in zip(layers, chosen.shares, ideal.shares, strict=True):
        curve, ms = layer.curve, layer.time(share)
        why = layer.why
        if not why and share == 0.0:
            why = "its share went to the others"
        choices.append(
            LayerChoice(
                name=curve.name,
                sparsity=share,
                overridden=curve.name in settings.overrides,
                why=why,
                ms=ms,
                speedup=_speedup(curve.ms, ms),
                recovery=_recovery(layer.loss(share), layer.loss(best)),
                macs=curve.macs * (1 - share),
                parameters=curve.parameters - curve.weights * share,
            )
        )
    weights = math.fsum(layer.curve.weights for layer in layers if layer.counted)
    met = _average(layers, chosen.shares)
    before = math.fsum(layer.curve.ms for layer in layers)
    return PruningProfile(
        settings=settings,
        layers=tuple(choices),
        sparsity=met,
        recovery=min(1.0, _recovery(chosen.loss, reference.loss)),
        loss=chosen.loss,
        speedup=_speedup(before, chosen.time),
        ms_before=before,
        ms_after=chosen.time,
        macs_before=math.fsum(layer.curve.macs for layer in layers),
        macs_after=math.fsum(choice.macs for choice in choices),
        parameters_before=math.fsum(layer.curve.parameters for layer in layers),
        parameters_after=math.fsum(choice.parameters for choice in choices),
        notes=tuple(_notes(layers, settings, met, bool(weights))),
    )


def _notes(layers: Sequence[_SpreadLayer], settings: PruningSettings, met: float, any_weights: bool) -> list[str]:
    if not any_weights:
        return ["no layer may be pruned."]
    if abs(met - settings.sparsity) <= AVERAGE_TOLERANCE:
        return []
    by_hand = sum(1 for layer in layers if layer.why == "set by hand")
    if met > settings.sparsity:
        cause = "what is set by hand is more than that" if by_hand else "no layer may have less than its least share"
    else:
        cause = f"caps, filters and {by_hand} overrides leave no more" if by_hand else "caps and filters leave no more"
    return [f"the average is {met:.1%}, not the {settings.sparsity:.1%} that was asked for: {cause}."]


def _speedup(before: float, after: float) -> float:
    """A time of 0 is one too short to be measured: at most a billion times."""
    return before / max(after, 1e-9 * before) if before > 0 else 1.0


def _recovery(loss: float, best: float) -> float:
    """2 - loss / best; 1 where both are nothing, and never below 0."""
    if best <= 0.0:
        return 1.0 if loss <= 0.0 else 0.0
    return max(0.0, 2.0 - loss / best)


def _monotone(curve: LayerCurve) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    losses, times, high, low = [], [], 0.0, curve.ms
    for loss, time in zip(curve.losses, curve.times, strict=True):
        high, low = max(high, loss), min(low, time)
        losses.append(high)
        times.append(low)
    return curve.levels, tuple(losses), tuple(times)


def _check_allocation(layers: Sequence[LayerCurve], settings: PruningSettings) -> None:
    for name in ("sparsity", "balance", "min_sparsity", "min_recovery", "max_sparsity"):
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
            hint = f"; did you mean {value / 100:g}?" if isinstance(value, int | float) and 1 < value <= 100 else "."
            raise ArgumentError(f"{name}: {value!r} is not a fraction in [0, 1]{hint}")
    if not 0.0 <= settings.min_speedup < math.inf:
        raise ArgumentError(f"min_speedup: {settings.min_speedup!r} is no factor; give 0 or more, 1.5 is half again.")
    prunable = [curve.name for curve in layers if not curve.why_not]
    for name, share in settings.overrides.items():
        if name not in prunable:
            known = {curve.name: curve.why_not for curve in layers}
            why = f"it cannot be pruned: {known[name]}" if name in known else "there is no such layer"
            raise ArgumentError(f"overrides: {name!r}: {why}.{did_you_mean(name, prunable)}")
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0.0 <= share < 1.0:
            raise ArgumentError(f"overrides: {share!r} for {name!r} is not a fraction of zeros, 0 to below 1.")
    for curve in layers:
        if not len(curve.levels) == len(curve.losses) == len(curve.times) > 0 or curve.levels[0] != 0.0:
            raise ArgumentError(f"{curve.name}: levels, losses and times must be of one length, the first level 0.")
        if any(b <= a for a, b in pairwise(curve.levels)):
            raise ArgumentError(f"{curve.name}: levels must grow: {curve.levels}.")
        if not all(math.isfinite(value) for value in (*curve.losses, *curve.times, curve.ms)):
            raise ArgumentError(f"{curve.name}: losses and times must be finite.")
