"""The recipes that a model has been through, kept with it as text, so that a saved model tells how it was made."""

from __future__ import annotations

from torch import nn

__all__: list[str] = []

_APPLIED = "_applied_recipes"


def note_recipe(model: nn.Module, text: str) -> None:
    """Notes that `model`, without wrappers, has been through the recipe of this text."""
    model.__dict__[_APPLIED] = (*recipes_of(model), text)


def recipes_of(model: nn.Module) -> tuple[str, ...]:
    """The texts of the recipes that `model` has been through, the first one first."""
    found: tuple[str, ...] = model.__dict__.get(_APPLIED, ())
    return found
