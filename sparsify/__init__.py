"""Compress PyTorch models while they train: a recipe says what to prune and quantize, an int8 ONNX file comes out.

Every name that is public stands in the `__all__` of its file and is carried from there. Importing this imports neither onnx
nor onnxruntime, and has no side effects.
"""

from sparsify import errors, modifiers
from sparsify.errors import *
from sparsify.modifiers import *

__version__ = "0.1.0"

__all__: list[str] = ["__version__"]
__all__ += errors.__all__
__all__ += modifiers.__all__
