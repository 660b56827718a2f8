"""Recipes: text in, frozen values out. Imports `modifiers` and below."""

from sparsify.recipe import recipe
from sparsify.recipe.recipe import *
from sparsify.recipe.recipe import read_recipe as read_recipe

__all__: list[str] = []
__all__ += recipe.__all__
