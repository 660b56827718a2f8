"""Checks before a manager begins: its recipe on the model, and another manager that does the same already."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence

from torch import nn

from sparsify.errors import SparsifyError, SparsifyWarning, StateError
from sparsify.model.at_work import runs_on
from sparsify.model.targets import refuse_without_values
from sparsify.modifiers.base import Modifier
from sparsify.recipe import Recipe
from sparsify.training.session import Session

__all__: list[str] = []

BESIDE = frozenset({"range", "logging"})
"""Kinds of modifiers that are not in one another's way."""
SHAPING = frozenset({"pruning", "structure"})
"""Kinds of which one that takes whole channels meets all others: which weights hang on them is not known ahead."""
BY_WEIGHT = frozenset({"pruning", "parameters", "palettization"})
"""Kinds that are in one another's way where they name the same weights."""


def check_recipe(recipe: Recipe, model: nn.Module) -> None:
    """Refuses a recipe that cannot work on `model`; warns of what will not come out as it was probably meant.

    Raises:
        TargetError, RecipeError, ArgumentError: as `Recipe.check`; or a parameter has no values yet.
    """
    with warnings.catch_warnings():
        # What is no error is said once, by the modifier that is attached afterwards.
        warnings.simplefilter("ignore", SparsifyWarning)
        recipe.check(model)
        for modifier in recipe.modifiers:
            refuse_without_values(model, modifier.targets(model).values(), where=type(modifier).__name__)
        # Whole channels are known from the traced model: the modifier itself says it.
        doubts = [text for m in recipe.written if not m.whole_channels for text in m.doubts(model)]
    for text in dict.fromkeys(doubts):
        warnings.warn(text, SparsifyWarning, stacklevel=5)


def runs_to_end(model: nn.Module, modifiers: Sequence[Modifier], replace: bool) -> list[Session]:
    """The runs of other managers on `model` that are to be ended before one of `modifiers` begins.

    Two managers may be at work together where they do different things: one prunes these weights, the other those.

    Args:
        model: the user's module.
        modifiers: those of the new recipe.
        replace: True where other runs may be ended.

    Raises:
        StateError: there is one that is in the way, its manager is alive, and it is not to be replaced.
    """
    found = [run for run in _sessions(model) if _meets(run, model, modifiers)]
    if any(not run.owned for run in found):
        # Garbage that was not collected yet is no run.
        found.clear()
        gc.collect()
        found = [run for run in _sessions(model) if _meets(run, model, modifiers)]
    who = type(model).__name__
    if any(run.owned for run in found) and not replace:
        raise StateError(
            f"another manager is at work on this {who}, or on a part of it, and does the same: the two would mask and "
            "count one over the other. Call finalize() of the first manager, or give replace=True, which does that. A "
            "deepcopy of the model is free."
        )
    if any(not run.owned for run in found):
        warnings.warn(
            f"an earlier manager of this {who} is gone, but its optimizer is not, whose steps were still masked: that "
            "run is ended now, and its hooks are removed. Call finalize() before a manager is dropped.",
            SparsifyWarning,
            stacklevel=5,
        )
    return found


def _sessions(model: nn.Module) -> list[Session]:
    return [run for run in runs_on(model) if isinstance(run, Session)]


def _meets(run: Session, model: nn.Module, modifiers: Sequence[Modifier]) -> bool:
    """True if the two do the same to the same."""
    theirs = [m for m in run.modifiers if m.kind not in BESIDE]
    ours = [m for m in modifiers if m.kind not in BESIDE]
    kinds = {m.kind for m in theirs} & {m.kind for m in ours}
    shaping = [m for m in (*theirs, *ours) if m.whole_channels or m.cuts()]
    if kinds - BY_WEIGHT or (shaping and all(any(m.kind in SHAPING for m in side) for side in (theirs, ours))):
        return True
    return any(_weights(theirs, kind, run.model) & _weights(ours, kind, model) for kind in kinds)


def _weights(modifiers: Sequence[Modifier], kind: str, model: nn.Module) -> set[int]:
    """The weights that modifiers of a kind name, by identity."""
    found: set[int] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SparsifyWarning)
        for modifier in modifiers:
            if modifier.kind == kind:
                try:
                    found |= {id(target) for target in modifier.targets(model).values()}
                except SparsifyError:
                    # What its names mean has changed since, or is said when the recipe is checked.
                    continue
    return found
