"""Creates recipes from profiles, with evidence, and predicts what a recipe does before it is trained.

Imports `analysis`, `training`, `recipe` and below.
"""

from sparsify.optimize import (
    allocation,
    code_generation,
    latency,
    layer_curves,
    levels,
    outcome,
    planned,
    planning,
    project,
    pruning_profiles,
    recipe_creation,
    screen,
    stages,
)
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

__all__: list[str] = []
__all__ += allocation.__all__
__all__ += code_generation.__all__
__all__ += latency.__all__
__all__ += layer_curves.__all__
__all__ += levels.__all__
__all__ += outcome.__all__
__all__ += planned.__all__
__all__ += planning.__all__
__all__ += project.__all__
__all__ += pruning_profiles.__all__
__all__ += recipe_creation.__all__
__all__ += screen.__all__
__all__ += stages.__all__
