"""The mechanisms without a training loop: a trained model is quantized, with samples or without.

Imports `modifiers`, `onnx`, the mechanisms, `output`, `model`, `errors`.
"""

from typing import TYPE_CHECKING

from sparsify.oneshot.quantize import *

if not TYPE_CHECKING:  # mypy 2.4.1 does not follow `module.__all__`, and takes all that is imported by star
    from sparsify.oneshot import quantize

    __all__ = [name for file in (quantize,) for name in file.__all__]
