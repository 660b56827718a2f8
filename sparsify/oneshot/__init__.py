"""The mechanisms without a training loop: a trained model is quantized, with samples or without.

Imports `modifiers`, `onnx`, the mechanisms, `output`, `model`, `errors`.
"""

from sys import modules
from typing import TYPE_CHECKING

from sparsify.oneshot.compress import *
from sparsify.oneshot.compression_config import *
from sparsify.oneshot.quantize import *

if not TYPE_CHECKING:  # mypy 2.4.1 takes all that is imported by star, and follows no computed list
    __all__ = [name for path, file in list(modules.items()) if path.startswith(f"{__name__}.") for name in file.__all__]
