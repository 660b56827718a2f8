"""Compress PyTorch models while they train: a recipe says what to prune and quantize, an int8 ONNX file comes out.

Every name that is public stands in the `__all__` of its file and is carried from there. Importing this imports neither
onnx nor onnxruntime, and has no side effects.
"""

from sparsify import benchmark, errors, export, manager, modifiers, oneshot, recipe, shrinking, verify
from sparsify.benchmark import *
from sparsify.errors import *
from sparsify.export import *
from sparsify.manager import *
from sparsify.modifiers import *
from sparsify.oneshot import *
from sparsify.recipe import *
from sparsify.shrinking import *
from sparsify.verify import *

__version__ = "0.1.0"

__all__: list[str] = ["__version__"]
__all__ += benchmark.__all__
__all__ += errors.__all__
__all__ += export.__all__
__all__ += manager.__all__
__all__ += modifiers.__all__
__all__ += oneshot.__all__
__all__ += recipe.__all__
__all__ += shrinking.__all__
__all__ += verify.__all__
