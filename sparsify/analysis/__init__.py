"""Analyzes a model: its layers, the time of each, and the loss of compressing it. Values, nothing printed.

Imports `oneshot`, `onnx`, the mechanisms, `output`, `model`, `errors`.
"""

from sys import modules
from typing import TYPE_CHECKING

from sparsify.analysis.analyze import *
from sparsify.analysis.bits import *
from sparsify.analysis.layers import *
from sparsify.analysis.loss import *
from sparsify.analysis.performance import *
from sparsify.analysis.profiling import *
from sparsify.analysis.weights import *

if not TYPE_CHECKING:  # mypy 2.4.1 takes all that is imported by star, and follows no computed list
    __all__ = [name for path, file in list(modules.items()) if path.startswith(f"{__name__}.") for name in file.__all__]
