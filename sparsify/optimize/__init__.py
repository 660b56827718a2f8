"""Creates recipes from profiles, with evidence, and predicts what a recipe does before it is trained.

Imports `analysis`, `training`, `recipe` and below.
"""

from sys import modules
from typing import TYPE_CHECKING

from sparsify.optimize.allocation import *
from sparsify.optimize.code_generation import *
from sparsify.optimize.latency import *
from sparsify.optimize.layer_curves import *
from sparsify.optimize.levels import *
from sparsify.optimize.outcome import *
from sparsify.optimize.planned import *
from sparsify.optimize.planning import *
from sparsify.optimize.project import *
from sparsify.optimize.pruning_profiles import *
from sparsify.optimize.recipe_creation import *
from sparsify.optimize.screen import *
from sparsify.optimize.stages import *

if not TYPE_CHECKING:  # mypy 2.4.1 takes all that is imported by star, and follows no computed list
    __all__ = [name for path, file in list(modules.items()) if path.startswith(f"{__name__}.") for name in file.__all__]
