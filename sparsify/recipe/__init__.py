"""Recipes: text in, frozen values out. Imports `modifiers` and below."""

from sys import modules
from typing import TYPE_CHECKING

from sparsify.recipe.recipe import *
from sparsify.recipe.recipe import read_recipe as read_recipe

if not TYPE_CHECKING:  # mypy 2.4.1 takes all that is imported by star, and follows no computed list
    __all__ = [name for path, file in list(modules.items()) if path.startswith(f"{__name__}.") for name in file.__all__]
