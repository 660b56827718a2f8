"""Recipes: text in, frozen values out. Imports `modifiers` and below."""

from typing import TYPE_CHECKING

from sparsify.recipe.recipe import *
from sparsify.recipe.recipe import read_recipe as read_recipe

if not TYPE_CHECKING:  # mypy 2.4.1 does not follow `module.__all__`, and takes all that is imported by star
    from sparsify.recipe import recipe

    __all__ = [name for file in (recipe,) for name in file.__all__]
