"""Lays out a recipe epoch by epoch before anything is trained: no data, no steps, the model left as it is."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from sparsify.analysis.analyze import analyze_model
from sparsify.errors import ArgumentError, SparsifyError, SparsifyWarning
from sparsify.model.targets import named_parameters
from sparsify.model.wrappers import unwrapped
from sparsify.modifiers.learning_rate_ledger import LearningRateLedger
from sparsify.modifiers.schedule import Clock
from sparsify.optimize.expectations import stored_bits, without_channels
from sparsify.optimize.pitfalls import pitfalls
from sparsify.optimize.planned import Plan, PlannedMoment
from sparsify.recipe.recipe import read_recipe

if TYPE_CHECKING:
    from torch import nn

    from sparsify.analysis.layers import ModelAnalysis
    from sparsify.model.signature import InputsLike
    from sparsify.modifiers.base import Modifier
    from sparsify.recipe import Recipe

__all__ = ["plan"]


MOST_EPOCHS = 1000
"""Whole epochs at which a plan looks."""


def plan(
    recipe: Any,
    model: nn.Module | None = None,
    steps_per_epoch: int | None = None,
    *,
    sample_inputs: InputsLike | None = None,
    epochs: float | None = None,
) -> Plan:
    """Lays out `recipe` over the epochs: learning rates, zeros, quantization, parameters, MACs and size.

    The modifiers themselves are asked, so the figures are those of a run. Nothing is trained, no data is read, and the
    model stays as it is. Where channels are removed, that is tried on a copy with the weights as they are now.

    Args:
        recipe: a Recipe, a manager, a path or a text.
        model: None leaves out all that depends on its layers.
        steps_per_epoch: optimizer steps in an epoch; None: what changes within an epoch is shown at its fraction.
        sample_inputs: as in `modify`, for MACs and for sizes after channels were removed.
        epochs: how long training really lasts, where that is not the recipe's `max_epochs`.

    Raises:
        RecipeError: the recipe is wrong. TargetError: a name in it matches nothing in the model.
        ArgumentError: an argument is none of what is asked for.
    """
    recipe = read_recipe(recipe)
    if steps_per_epoch is not None and (isinstance(steps_per_epoch, bool) or not isinstance(steps_per_epoch, int)):
        raise ArgumentError(f"steps_per_epoch: {steps_per_epoch!r} is no whole number; give optimizer steps per epoch.")
    if steps_per_epoch is not None and steps_per_epoch < 1:
        raise ArgumentError(f"steps_per_epoch: {steps_per_epoch} is no number of steps; give 1 or more.")
    if epochs is not None and not 0 < epochs < math.inf:
        raise ArgumentError(f"epochs: {epochs!r} is no length of a training; give a number above 0.")
    if sample_inputs is not None and model is None:
        raise ArgumentError("sample_inputs are inputs of a model: give it too.")
    last = float(recipe.max_epochs if epochs is None else epochs)
    if model is not None:
        with warnings.catch_warnings():
            # What is no error stands in the plan.
            warnings.simplefilter("ignore", SparsifyWarning)
            recipe.check(model)
    modifiers = recipe.modifiers
    labels = _labels(modifiers)
    view = _View(recipe, model, sample_inputs)
    times = [_clock(epoch, steps_per_epoch) for epoch in _epochs(modifiers, last)]
    moments = tuple(view.moment(clock, labels) for clock in times)
    fine = {_clock(last * i / 200, steps_per_epoch) for i in range(201)} | set(times)
    rates = tuple((clock.epoch, view.rate(0, clock)) for clock in sorted(fine, key=lambda clock: clock.epoch))
    spans = tuple(
        (label, modifier.window.start, min(modifier.window.end, last))
        for modifier, label in labels
        if modifier.kind != "range"
    )
    said = [*recipe.doubts(view.model), *pitfalls(modifiers, labels, moments, rates, last, steps_per_epoch)]
    return Plan(last, steps_per_epoch, moments, rates, spans, view.weights(), tuple(said), tuple(view.notes))


class _View:
    """A recipe and, where there is one, a model, asked for their state at a moment."""

    def __init__(self, recipe: Recipe, model: nn.Module | None, sample_inputs: InputsLike | None) -> None:
        self.modifiers = recipe.modifiers
        self.model = None if model is None else unwrapped(model)
        self.inputs = sample_inputs
        self.notes: list[str] = []
        self.ledger = LearningRateLedger(None)
        for modifier in recipe.written:
            entry = modifier.rate()
            if entry is not None:
                self.ledger.add(entry)
        named = {group for m in self.modifiers if (e := m.rate()) for group in e.groups or ()}
        self.groups = sorted(named | {0}) if len(self.ledger) else []
        self.sizes = self._sizes(self.model)
        self.analysis = None if self.model is None or self.inputs is None else analyze_model(self.model, self.inputs)
        self.cost = _compute_cost(self.analysis)
        self.removals = sorted({cut for m in self.modifiers for cut in m.cuts()})
        self.after = {cut: self._after(recipe, cut) for cut in self.removals} if model is not None else {}

    def weights(self) -> dict[str, int]:
        return {name: size for name, (size, _) in self.sizes.items()}

    def rate(self, group: int, clock: Clock) -> float | None:
        entry = self.ledger.governing(group, clock)
        return None if entry is None else entry.value(clock)

    def moment(self, clock: Clock, labels: Sequence[tuple[Modifier, str]]) -> PlannedMoment:
        doing = {label: text for m, label in labels if m.kind != "range" and (text := m.activity(clock))}
        rates = {group: self.rate(group, clock) for group in self.groups}
        if self.model is None:
            return PlannedMoment(clock.epoch, rates, {}, {}, doing)
        zeros: dict[str, float | None] = {}
        channels: dict[str, float] = {}
        bits = stored_bits(self.modifiers, clock, self.model, self.analysis)
        for modifier in sorted(self.modifiers, key=lambda m: m.window.start):
            found = modifier.foreseen_zeros(clock, self.model)
            if modifier.whole_channels:
                channels.update({name: share for name, share in found.items() if share is not None})
            else:
                # A modifier that only keeps zeros does not know how many: the figure from before stands.
                zeros.update({n: zeros.get(n) if s is None and modifier.holds else s for n, s in found.items()})
        sizes, cost = self.sizes, self.cost
        pruned = [cut for cut in self.removals if clock.reached(cut)]
        if pruned:
            sizes, cost = self.after[pruned[-1]]
        parameters = sum(size for size, _ in sizes.values()) if sizes else None
        kept = {name: 1.0 - (zeros.get(name) or 0.0) for name in sizes}
        return PlannedMoment(
            clock.epoch,
            rates,
            zeros,
            channels,
            doing,
            parameters,
            sum(size * kept[name] for name, (size, _) in sizes.items()) if sizes else None,
            sum(cost.values()) if cost else None,
            sum(macs * kept.get(name, 1.0) for name, macs in cost.items()) if cost else None,
            sum(size * bits.get(name, 8 * width) / 8 for name, (size, width) in sizes.items()) if sizes else None,
        )

    def _sizes(self, model: nn.Module | None) -> dict[str, tuple[int, int]]:
        """Elements and bytes of an element, by parameter."""
        return {} if model is None else {n: (p.numel(), p.element_size()) for n, p in named_parameters(model).items()}

    def _after(self, recipe: Recipe, cut: float) -> tuple[dict[str, tuple[int, int]], dict[str, int]]:
        """Sizes and MACs after all removals of channels up to `cut`, tried on a copy."""
        assert self.model is not None
        if self.inputs is None:
            self._note(f"what is left after channels are removed at epoch {cut:g} needs sample_inputs.")
            return {}, {}
        try:
            smaller = without_channels(self.model, recipe.written, self.inputs, cut)
        except SparsifyError as error:
            self._note(f"what is left after channels are removed at epoch {cut:g} is not known ahead: {error}")
            return {}, {}
        return self._sizes(smaller), _compute_cost(analyze_model(smaller, self.inputs))

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def _compute_cost(analysis: ModelAnalysis | None) -> dict[str, int]:
    """MACs by the weight that is multiplied with, under "" those between activations; empty if not known."""
    found: Counter[str] = Counter()
    for layer in analysis.layers if analysis is not None else ():
        found[layer.weight or ""] += layer.macs
    return dict(found)


def _clock(epoch: float, steps_per_epoch: int | None) -> Clock:
    if steps_per_epoch is None or math.isinf(epoch * steps_per_epoch):
        return Clock(0, epoch, steps_per_epoch)
    step = math.ceil(epoch * steps_per_epoch - 1e-6)
    return Clock(step, step / steps_per_epoch, steps_per_epoch)


def _epochs(modifiers: Iterable[Modifier], last: float) -> list[float]:
    """Whole epochs (of a long training, `MOST_EPOCHS` of them), and every start, end and cut, up to its end."""
    whole = math.floor(last)
    found = (
        {float(whole * i // min(whole, MOST_EPOCHS)) for i in range(min(whole, MOST_EPOCHS) + 1)} if whole else {0.0}
    )
    found.add(last)
    for modifier in modifiers:
        found |= {e for e in (modifier.window.start, modifier.window.end, *modifier.cuts()) if e <= last}
    return sorted(found)


def _labels(modifiers: Sequence[Modifier]) -> list[tuple[Modifier, str]]:
    """Each modifier with its name, numbered where there are several of one kind."""
    total = Counter(type(m).__name__ for m in modifiers)
    seen: Counter[str] = Counter()
    found = []
    for modifier in sorted(modifiers, key=lambda m: (m.window.start, m.window.end)):
        name = type(modifier).__name__
        seen[name] += 1
        short = name.removesuffix("Modifier")
        found.append((modifier, f"{short} {seen[name]}" if total[name] > 1 else short))
    return found
