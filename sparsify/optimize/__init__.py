"""From profiles to a recipe that says why, and what a recipe will do before it is trained."""

from sparsify.optimize import levels, outcome, recipes, training
from sparsify.optimize.levels import *
from sparsify.optimize.outcome import *
from sparsify.optimize.recipes import *
from sparsify.optimize.training import *

__all__: list[str] = []
__all__ += levels.__all__
__all__ += outcome.__all__
__all__ += recipes.__all__
__all__ += training.__all__
