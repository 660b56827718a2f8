"""Analyzes a model: its layers, the time of each, and the loss of compressing it. Values, nothing printed.

Imports `oneshot`, `onnx`, the mechanisms, `output`, `model`, `errors`.
"""

from sparsify.analysis import analyze, bits, layers, loss, performance, profiling, weights
from sparsify.analysis.analyze import *
from sparsify.analysis.bits import *
from sparsify.analysis.layers import *
from sparsify.analysis.loss import *
from sparsify.analysis.performance import *
from sparsify.analysis.profiling import *
from sparsify.analysis.weights import *

__all__: list[str] = []
__all__ += analyze.__all__
__all__ += bits.__all__
__all__ += layers.__all__
__all__ += loss.__all__
__all__ += performance.__all__
__all__ += profiling.__all__
__all__ += weights.__all__
