"""From profiles to a recipe that says why, and what a recipe will do before it is trained."""

from sparsify.optimize import allocation, code, latency, levels, outcome, planning, project, recipes, screen, training
from sparsify.optimize.allocation import *
from sparsify.optimize.code import *
from sparsify.optimize.latency import *
from sparsify.optimize.levels import *
from sparsify.optimize.outcome import *
from sparsify.optimize.planning import *
from sparsify.optimize.project import *
from sparsify.optimize.recipes import *
from sparsify.optimize.screen import *
from sparsify.optimize.training import *

__all__: list[str] = []
__all__ += allocation.__all__
__all__ += code.__all__
__all__ += latency.__all__
__all__ += levels.__all__
__all__ += outcome.__all__
__all__ += planning.__all__
__all__ += project.__all__
__all__ += recipes.__all__
__all__ += screen.__all__
__all__ += training.__all__
