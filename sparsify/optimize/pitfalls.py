"""Warnings about a recipe: ends that are not reached, jumps of the learning rate, no time to recover."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsify.modifiers.base import Modifier
    from sparsify.optimize.planned import PlannedMoment

__all__: list[str] = []

JUMP = 3.0
"""A learning rate that rises by more than this factor from one moment to the next is a jump."""
DROP = 0.25
"""Shares of zeros may fall by this much between two moments before it is said."""

FAINT = 0.01
"""A learning rate below this share of the highest before it trains next to nothing."""

Labels = Sequence[tuple["Modifier", str]]
Rates = Sequence[tuple[float, float | None]]


def pitfalls(
    modifiers: Sequence[Modifier],
    labels: Labels,
    moments: Sequence[PlannedMoment],
    rates: Rates,
    last: float,
    steps_per_epoch: int | None,
) -> Iterator[str]:
    """The warnings, a sentence each, none of them twice."""
    said: dict[str, None] = {}
    for text in (
        *_unreached(labels, last),
        *_cut_short(labels),
        *_jumps(rates),
        *_standing_still(labels, rates),
        *_no_recovery(labels, last),
        *_too_fine(labels, steps_per_epoch),
        *_still_falling(moments),
        *_frozen_unseen(labels),
    ):
        said[text] = None
    yield from said


def _unreached(labels: Labels, last: float) -> Iterator[str]:
    """Modifiers that start or end after the end of training."""
    for modifier, name in labels:
        start, end = modifier.window.start, modifier.window.end
        if start > last:
            yield f"{name} starts at epoch {start:g}, after training has ended at {last:g}: it never runs."
        elif last < end < math.inf and modifier.kind != "range":
            yield f"{name} ends at epoch {end:g}, but training ends at {last:g}: it does not get to its end."


def _cut_short(labels: Labels) -> Iterator[str]:
    """Learning-rate modifiers that another one replaces before their end."""
    rates = [(modifier, name, entry) for modifier, name in labels if (entry := modifier.rate()) is not None]
    for modifier, name, entry in rates:
        if not math.isfinite(modifier.window.end):
            continue
        for other, other_name, after in rates:
            same = entry.groups is None or after.groups is None or set(entry.groups) & set(after.groups)
            later = (other.window.start, after.scheduled) > (modifier.window.start, entry.scheduled)
            if same and later and other.window.start < modifier.window.end:
                yield (
                    f"{other_name} takes over the learning rate at epoch {other.window.start:g}: {name}, which runs to "
                    f"{modifier.window.end:g}, does not get to its last value."
                )


def _jumps(rates: Rates) -> Iterator[str]:
    for (_, before), (epoch, after) in pairwise(rates):
        if before is None or after is None or after <= before:
            continue
        if before == 0.0 or after / before > JUMP:
            times = "from 0" if before == 0.0 else f"{after / before:.3g} times"
            yield f"the learning rate jumps up at epoch {epoch:.4g}, {times}, from {before:.3g} to {after:.3g}."


def _standing_still(labels: Labels, rates: Rates) -> Iterator[str]:
    """Pruning while the learning rate is 0, or next to nothing: epochs that were changed without it."""
    for modifier, name in labels:
        if modifier.kind != "pruning" or modifier.holds:
            continue
        window = modifier.window
        inside = [(epoch, rate) for epoch, rate in rates if window.start <= epoch < window.end and rate is not None]
        if inside and all(rate == 0.0 for _, rate in inside):
            yield f"the learning rate is 0 while {name} prunes: the weights that stay cannot make up for what goes."
            continue
        highest = max((rate for epoch, rate in rates if rate is not None and epoch < window.end), default=0.0)
        faint = next(((epoch, rate) for epoch, rate in inside if epoch > window.start and rate < FAINT * highest), None)
        # A warm-up rises from next to nothing, and a cosine may end with pruning.
        late = window.end - 0.1 * (window.end - window.start)
        stays = faint is not None and all(rate < FAINT * highest for epoch, rate in inside if epoch >= faint[0])
        if faint is not None and stays and faint[0] < late:
            yield (
                f"the learning rate is {faint[1] / highest:.1%} of its highest at epoch {faint[0]:.4g} while {name} "
                f"prunes until {window.end:g}: the weights that stay cannot make up for what goes. Move its schedule "
                "with the epochs of pruning."
            )


def _no_recovery(labels: Labels, last: float) -> Iterator[str]:
    for modifier, name in labels:
        window = modifier.window
        if modifier.kind == "pruning" and not modifier.holds and window.start <= window.end <= last < window.end + 1:
            rest = last - window.end
            left = "no training" if rest == 0 else f"{rest:g} epochs of training"
            yield f"{name} ends at epoch {window.end:g} with {left} left: give some epochs to recover."
        if modifier.kind == "quantization" and window.start >= last:
            yield (
                f"{name} starts at epoch {window.start:g}, where training ends: the model is quantized and not trained "
                "as such. Let training go on, by an EpochRangeModifier with a later end_epoch."
            )


def _too_fine(labels: Labels, steps_per_epoch: int | None) -> Iterator[str]:
    for modifier, name in labels:
        frequency, window = getattr(modifier, "update_frequency", None), modifier.window
        if modifier.kind != "pruning" or not isinstance(frequency, float | int) or modifier.holds:
            continue
        length = window.end - window.start
        if steps_per_epoch is not None and 0 < frequency < (1 - 1e-6) / steps_per_epoch:
            yield (
                f"{name} is to update every {frequency:g} epochs, less than one of {steps_per_epoch} steps: it updates "
                "at every step."
            )
        if 0 < length < frequency < math.inf:
            yield f"{name} updates every {frequency:g} epochs and runs for {length:g}: all goes at once."


def _still_falling(moments: Sequence[PlannedMoment]) -> Iterator[str]:
    """Sparsities that fall where another modifier takes over."""
    for before, after in pairwise(moments):
        if any("moving masks" in doing for doing in before.doing.values()):
            continue
        for name, share in before.zeros.items():
            now = after.zeros.get(name, share)
            if share is not None and now is not None and share - now > DROP:
                yield f"{name} falls from {share:.0%} zeros to {now:.0%} at epoch {after.epoch:g}."
                break


def _frozen_unseen(labels: Labels) -> Iterator[str]:
    for modifier, name in labels:
        frozen = getattr(modifier, "disable_quantization_observer_epoch", None)
        if modifier.kind == "quantization" and frozen is not None and 0 <= frozen <= modifier.window.start:
            yield (
                f"{name} freezes its ranges at epoch {frozen:g}, when it starts: each range is that of the first batch "
                "(or of calibration_data)."
            )
