"""The modifiers: what a recipe says about one mechanism, and when it happens. One file a subject.

Imports `pruning`, `quantization`, `output`, `model`, `errors`.
"""

from sparsify.modifiers import (
    base,
    distillation,
    epochs,
    gradual,
    layer_distillation,
    layer_pruning,
    learning_rate,
    magnitude_pruning,
    quantization,
    regularization,
    second_order,
    sparse_training,
    sparsification_logging,
    structured,
    thinning,
    top_kast,
    training,
)
from sparsify.modifiers.base import *
from sparsify.modifiers.distillation import *
from sparsify.modifiers.epochs import *
from sparsify.modifiers.gradual import *
from sparsify.modifiers.layer_distillation import *
from sparsify.modifiers.layer_pruning import *
from sparsify.modifiers.learning_rate import *
from sparsify.modifiers.magnitude_pruning import *
from sparsify.modifiers.quantization import *
from sparsify.modifiers.regularization import *
from sparsify.modifiers.second_order import *
from sparsify.modifiers.sparse_training import *
from sparsify.modifiers.sparsification_logging import *
from sparsify.modifiers.structured import *
from sparsify.modifiers.thinning import *
from sparsify.modifiers.top_kast import *
from sparsify.modifiers.training import *

__all__: list[str] = []
__all__ += base.__all__
__all__ += distillation.__all__
__all__ += epochs.__all__
__all__ += gradual.__all__
__all__ += layer_distillation.__all__
__all__ += layer_pruning.__all__
__all__ += learning_rate.__all__
__all__ += sparsification_logging.__all__
__all__ += magnitude_pruning.__all__
__all__ += quantization.__all__
__all__ += regularization.__all__
__all__ += second_order.__all__
__all__ += sparse_training.__all__
__all__ += structured.__all__
__all__ += thinning.__all__
__all__ += top_kast.__all__
__all__ += training.__all__
