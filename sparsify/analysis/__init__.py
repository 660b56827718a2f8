"""Layers of a model, what each costs, and what it loses when it is compressed: values, nothing printed.

Imports `oneshot`, `onnx`, the mechanisms, `output`, `model`, `errors`.
"""

from sparsify.analysis import bits, layers, loss, performance, weights
from sparsify.analysis.bits import *
from sparsify.analysis.layers import *
from sparsify.analysis.loss import *
from sparsify.analysis.performance import *
from sparsify.analysis.weights import *

__all__: list[str] = []
__all__ += bits.__all__
__all__ += layers.__all__
__all__ += loss.__all__
__all__ += performance.__all__
__all__ += weights.__all__
