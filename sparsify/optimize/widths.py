"""Chooses the width of each part of a model within a time: measured tables in, the choice of least loss out.

The time of a layer is read off its measured table at the share of its multiplications that is left. The table was
measured with all channel groups equally wide; that a layer with half of its inputs takes as long as one
with half of its outputs is the approximation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from sparsify.optimize.piecewise import at

__all__: list[str] = []

SWEEPS = 12
BISECTIONS = 40
RESTARTS = 100
"""Up to so many (part, share) are each tried as a start of their own."""
EXCHANGES = 20_000


@dataclass(frozen=True)
class WidthCurve:
    """Times over a share from 0 to 1, linear in between, the nearest outside; never falling as the share grows.

    >>> curve = WidthCurve.of((0.25, 0.5, 1.0), (1.0, 3.0, 2.0))
    >>> curve(1.0), curve(0.1), curve(0.375)
    (2.5, 1.0, 1.75)
    """

    shares: tuple[float, ...]
    times: tuple[float, ...]

    @classmethod
    def of(cls, shares: Sequence[float], times: Sequence[float]) -> WidthCurve:
        """Measured times made monotone by least squares: neighbours in the wrong order both get their mean.

        That a layer becomes slower with less to do is noise, or a width that kernels dislike, which nothing gains from.
        """
        alike: dict[float, list[float]] = defaultdict(list)
        for share, ms in zip(shares, times, strict=True):
            alike[round(share, 12)].append(ms)
        points = [(share, sum(found) / len(found)) for share, found in sorted(alike.items())]
        blocks: list[tuple[float, int]] = []
        for _, ms in points:
            blocks.append((ms, 1))
            while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
                (a, n), (b, m) = blocks[-2:]
                blocks[-2:] = [((a * n + b * m) / (n + m), n + m)]
        level = tuple(ms for ms, count in blocks for _ in range(count))
        return cls(tuple(share for share, _ in points), level)

    def __call__(self, share: float) -> float:
        return at(self.shares, self.times, share)


@dataclass(frozen=True)
class LayerTime:
    """Times of a layer.

    Attributes:
        dims: for each dimension of its weight {part: the share of the dimension that is the part's}; the product over
            the dimensions is what is left of the multiplications. Empty for a layer that stays as it is.
        dense: the time over the share of multiplications that is left.
        int8: likewise in int8; None where it stays in float.
        int8_loss: what int8 adds to the loss.
    """

    name: str
    dims: tuple[Mapping[str, float], ...]
    dense: WidthCurve
    int8: WidthCurve | None = None
    int8_loss: float = 0.0

    def left(self, shares: Mapping[str, float]) -> float:
        """The share of its multiplications."""
        product = 1.0
        for dim in self.dims:
            product *= 1.0 - sum(weight * (1.0 - shares[part]) for part, weight in dim.items())
        return product


@dataclass(frozen=True)
class SpeedPart:
    """Channels that have one share: a channel group, or several with a weight in common.

    Attributes:
        shares: what may be left of the channels, falling, 1.0 first.
        losses: what that adds to the loss, growing, 0 first.
        weight: of its share in the mean width, on which the time of what is no layer depends.
    """

    name: str
    shares: tuple[float, ...]
    losses: tuple[float, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Choice:
    """A choice: {part: share}, the layers in int8, and the time and the loss expected of them."""

    shares: Mapping[str, float]
    int8: frozenset[str]
    ms: float
    loss: float


@dataclass(frozen=True)
class Tables:
    """Measured tables of a model: the loss of each part, the time of each layer, and of the rest by the mean width."""

    parts: tuple[SpeedPart, ...]
    layers: tuple[LayerTime, ...]
    rest: WidthCurve
    rest_int8: WidthCurve | None = None

    @cached_property
    def touching(self) -> dict[str, tuple[LayerTime, ...]]:
        """The layers whose time depends on each part."""
        return {
            part.name: tuple(layer for layer in self.layers if any(part.name in dim for dim in layer.dims))
            for part in self.parts
        }

    def time(self, shares: Mapping[str, float], int8: frozenset[str]) -> float:
        """The whole model; conversions between layers in float and in int8 are left out."""
        total = dense = 0.0
        for layer in self.layers:
            total += self._time(layer, shares, layer.name in int8)
            dense += 0.0 if layer.name in int8 else layer.dense(1.0)
        weights = sum(part.weight for part in self.parts)
        mean = sum(shares[part.name] * part.weight for part in self.parts) / weights if weights else 1.0
        if self.rest_int8 is None or not int8:
            return total + self.rest(mean)
        whole = sum(layer.dense(1.0) for layer in self.layers)
        floating = dense / whole if whole else 0.0
        return total + floating * self.rest(mean) + (1 - floating) * self.rest_int8(mean)

    def loss(self, shares: Mapping[str, float], int8: frozenset[str]) -> float:
        return sum(part.losses[part.shares.index(shares[part.name])] for part in self.parts) + sum(
            layer.int8_loss for layer in self.layers if layer.name in int8
        )

    def choice(self, shares: Mapping[str, float], int8: frozenset[str]) -> Choice:
        return Choice(dict(shares), int8, self.time(shares, int8), self.loss(shares, int8))

    @staticmethod
    def _time(layer: LayerTime, shares: Mapping[str, float], in_int8: bool) -> float:
        curve = layer.int8 if in_int8 and layer.int8 is not None else layer.dense
        return curve(layer.left(shares))

    # ------------------------------------------------------------------ solving

    def fastest(self) -> Choice:
        """The choice with everything as narrow as it may be."""
        shares = {part.name: part.shares[-1] for part in self.parts}
        return self.choice(shares, self._bits(shares, None))

    def widest(self) -> Choice:
        """The choice with nothing removed, and int8 only where it costs nothing."""
        shares = {part.name: 1.0 for part in self.parts}
        return self.choice(shares, self._bits(shares, 0.0))

    def solve(self, goal_ms: float) -> Choice | None:
        """The least loss that was found within the goal; None where even the fastest choice is above it.

        For a price of time, every part in turn takes the share with the least loss + price * time, given the others;
        the price is bisected. What that leaves of the goal, steps and exchanges of two parts use up.
        """
        fastest, widest = self.fastest(), self.widest()
        if fastest.ms > goal_ms:
            return None
        if widest.ms <= goal_ms:
            return widest
        best = fastest
        spread = max((part.losses[-1] for part in self.parts), default=0.0) + max(
            (layer.int8_loss for layer in self.layers), default=0.0
        )
        smallest = 1e-9 * max(widest.ms, 1e-9)
        low, high = 0.0, max(spread, 1e-12) / smallest
        start = widest
        for _ in range(BISECTIONS):
            # Prices are compared by their order of magnitude first.
            price = (max(low, high * 1e-18) * high) ** 0.5
            for begin in (start, fastest):
                found = self._descend(begin, price)
                if found.ms <= goal_ms and (found.loss, found.ms) < (best.loss, best.ms):
                    best = found
                if begin is start:
                    start = found
            if start.ms <= goal_ms:
                high = price
            else:
                low = price
        best = self._polished(best, goal_ms)
        starts: list[tuple[str, Mapping[str, float], frozenset[str]]] = [
            (part.name, {**best.shares, part.name: share}, best.int8) for part in self.parts for share in part.shares
        ]
        starts += [(layer.name, best.shares, best.int8 ^ {layer.name}) for layer in self.layers if layer.int8_loss > 0]
        if len(starts) <= RESTARTS:
            # With few parts the choices are coarse: the best one with a part held elsewhere may be far from here.
            for held, shares, int8 in starts:
                found = self._polished(self._repaired(self.choice(shares, int8), goal_ms, held), goal_ms)
                if (found.loss, found.ms) < (best.loss, best.ms):
                    best = found
        return best

    def _repaired(self, choice: Choice, goal_ms: float, held: str) -> Choice:
        """`choice` brought within the goal by steps of least loss for the time they save; one part or layer is held."""
        while choice.ms > goal_ms:
            steps = []
            for part in (part for part in self.parts if part.name != held):
                for share in part.shares[part.shares.index(choice.shares[part.name]) + 1 :]:
                    steps.append(self.choice({**choice.shares, part.name: share}, choice.int8))
            for layer in self.layers:
                if layer.int8 is not None and layer.name not in {*choice.int8, held}:
                    steps.append(self.choice(choice.shares, choice.int8 | {layer.name}))
            steps = [step for step in steps if step.ms < choice.ms]
            if not steps:
                return self.fastest()
            base = choice
            choice = min(steps, key=lambda step: (step.loss - base.loss) / (base.ms - step.ms))
        return choice

    def _bits(self, shares: Mapping[str, float], price: float | None) -> frozenset[str]:
        """The layers for which int8 saves more than its loss at this price of a millisecond; None: at any."""
        found = set()
        for layer in self.layers:
            if layer.int8 is None:
                continue
            left = layer.left(shares)
            gain = layer.dense(left) - layer.int8(left)
            if layer.int8_loss <= 0:
                # Its loss is not known: where int8 is wanted, it is taken everywhere.
                found.add(layer.name)
            elif gain > 0 and (price is None or price * gain > layer.int8_loss):
                found.add(layer.name)
        return frozenset(found)

    def _descend(self, begin: Choice, price: float) -> Choice:
        shares, int8 = dict(begin.shares), self._bits(begin.shares, price)
        weights = sum(part.weight for part in self.parts) or 1.0
        for _ in range(SWEEPS):
            before = dict(shares)
            for part in self.parts:
                layers = self.touching[part.name]
                mean = sum(shares[p.name] * p.weight for p in self.parts) / weights
                costs = []
                for share, loss in zip(part.shares, part.losses, strict=True):
                    now = {**shares, part.name: share}
                    rest = self.rest_int8 if int8 and self.rest_int8 is not None else self.rest
                    ms = sum(self._time(layer, now, layer.name in int8) for layer in layers)
                    ms += rest(mean + (share - shares[part.name]) * part.weight / weights)
                    costs.append((loss + price * ms, loss, share))
                shares[part.name] = min(costs)[2]
            bits = self._bits(shares, price)
            if shares == before and bits == int8:
                break
            int8 = bits
        return self.choice(shares, int8)

    def _polished(self, best: Choice, goal_ms: float) -> Choice:
        """`best` improved by single steps and exchanges, as long as there are any."""
        while True:
            better = self._step(best, goal_ms)
            if better is None:
                return best
            best = better

    def _step(self, now: Choice, goal_ms: float) -> Choice | None:
        def candidates(parts: Sequence[SpeedPart], wider: bool) -> list[tuple[str, float]]:
            found = []
            for part in parts:
                at = part.shares.index(now.shares[part.name])
                ahead = part.shares[:at] if wider else part.shares[at + 1 :]
                found += [(part.name, share) for share in ahead]
            return found

        wider = candidates(self.parts, True)
        found = [self.choice({**now.shares, name: share}, now.int8) for name, share in wider]
        for layer in self.layers:
            if layer.int8 is not None and layer.int8_loss > 0:
                found.append(self.choice(now.shares, now.int8 ^ {layer.name}))
        fitting = [choice for choice in found if choice.ms <= goal_ms and choice.loss < now.loss]
        if fitting:
            return min(fitting, key=lambda choice: choice.loss)
        narrower = candidates(self.parts, False)
        # Exchanges are tried where there are few enough to be tried at once.
        if len(wider) * len(narrower) > EXCHANGES:
            return None
        best = None
        flips = [layer.name for layer in self.layers if layer.int8 is not None and layer.int8_loss > 0]
        losses = {part.name: dict(zip(part.shares, part.losses, strict=True)) for part in self.parts}
        for name, share in wider:
            won = losses[name][now.shares[name]] - losses[name][share]
            changes: list[tuple[dict[str, float], frozenset[str]]] = [
                ({other: less}, now.int8)
                for other, less in narrower
                if other != name and losses[other][less] - losses[other][now.shares[other]] < won
            ]
            changes += [({}, now.int8 ^ {layer}) for layer in flips]
            for change, int8 in changes:
                choice = self.choice({**now.shares, name: share, **change}, int8)
                if choice.ms <= goal_ms and choice.loss < (now if best is None else best).loss:
                    best = choice
        return best
