"""Analyzes a model: its layers, the time of each, and the loss of compressing it. Values, nothing printed.

Imports `oneshot`, `onnx`, the mechanisms, `output`, `model`, `errors`.
"""

from typing import TYPE_CHECKING

from sparsify.analysis.analyze import *
from sparsify.analysis.bits import *
from sparsify.analysis.layers import *
from sparsify.analysis.loss import *
from sparsify.analysis.performance import *
from sparsify.analysis.profiling import *
from sparsify.analysis.weights import *

if not TYPE_CHECKING:  # mypy 2.4.1 does not follow `module.__all__`, and takes all that is imported by star
    from sparsify.analysis import analyze, bits, layers, loss, performance, profiling, weights

    __all__ = [
        name
        for file in (
            analyze,
            bits,
            layers,
            loss,
            performance,
            profiling,
            weights,
        )
        for name in file.__all__
    ]
