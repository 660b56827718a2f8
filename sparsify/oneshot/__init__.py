"""The mechanisms without a training loop: a trained model is quantized, with samples or without.

Imports `modifiers`, `onnx`, the mechanisms, `output`, `model`, `errors`.
"""

from sparsify.oneshot import quantize
from sparsify.oneshot.quantize import *

__all__: list[str] = []
__all__ += quantize.__all__
