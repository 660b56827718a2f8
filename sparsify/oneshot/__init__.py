"""The mechanisms without a training loop: quantization of a trained model, with samples or without."""

from sparsify.oneshot import quantize
from sparsify.oneshot.quantize import *

__all__: list[str] = []
__all__ += quantize.__all__
