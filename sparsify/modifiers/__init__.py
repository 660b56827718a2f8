"""The modifiers: what a recipe says about one mechanism, and when it happens. One file a subject.

Imports `pruning`, `quantization`, `palettization`, `output`, `model`, `errors`.
"""

from sys import modules
from typing import TYPE_CHECKING

from sparsify.modifiers.base import *
from sparsify.modifiers.distillation import *
from sparsify.modifiers.epochs import *
from sparsify.modifiers.gradual import *
from sparsify.modifiers.layer_distillation import *
from sparsify.modifiers.layer_pruning import *
from sparsify.modifiers.learning_rate import *
from sparsify.modifiers.magnitude_pruning import *
from sparsify.modifiers.palettization import *
from sparsify.modifiers.quantization import *
from sparsify.modifiers.regularization import *
from sparsify.modifiers.second_order import *
from sparsify.modifiers.sparse_training import *
from sparsify.modifiers.sparsification_logging import *
from sparsify.modifiers.structured import *
from sparsify.modifiers.thinning import *
from sparsify.modifiers.top_kast import *
from sparsify.modifiers.training import *

if not TYPE_CHECKING:  # mypy 2.4.1 takes all that is imported by star, and follows no computed list
    __all__ = [name for path, file in list(modules.items()) if path.startswith(f"{__name__}.") for name in file.__all__]
