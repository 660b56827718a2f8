"""Compress PyTorch models while they train: a recipe says what to prune and quantize, an int8 ONNX file comes out.

A name is public where it stands in the `__all__` of its file; from there it is carried here. Importing this imports
neither onnx nor onnxruntime, and has no side effects. Analysis, optimization, compression without training, packing and
`integer_exact` are imported when a name of theirs is first asked for: a training job needs none of them. Imports every
room.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from sparsify.errors import *
from sparsify.modifiers import *
from sparsify.onnx.benchmark import *
from sparsify.onnx.export import *
from sparsify.onnx.verify import *
from sparsify.pruning.shrinking import *
from sparsify.recipe import *
from sparsify.training.manager import *
from sparsify.training.phases import *
from sparsify.training.saved_model import *

if TYPE_CHECKING:
    from sparsify.analysis import *
    from sparsify.experiments import *
    from sparsify.oneshot import *
    from sparsify.onnx.packing import *
    from sparsify.optimize import *
    from sparsify.palettization.config import *
    from sparsify.quantization.integer_exact import *

__version__ = "0.1.0"

_AT_ONCE = ["errors", "modifiers", "recipe", "training.manager", "training.phases", "pruning.shrinking"]
_AT_ONCE += ["training.saved_model", "onnx.export", "onnx.verify", "onnx.benchmark"]
_LATER = [
    "palettization.config",
    "onnx.packing",
    "quantization.integer_exact",
    "oneshot",
    "analysis",
    "optimize",
    "experiments",
]


def _public() -> list[str]:
    rooms = [import_module(f"sparsify.{room}") for room in _AT_ONCE + _LATER]
    return ["__version__", *(name for room in rooms for name in room.__all__)]


if not TYPE_CHECKING:  # a type checker shall not take every name for one that is there

    def __getattr__(name):
        if name == "__all__":
            return _public()
        if name in _LATER:
            return import_module(f"sparsify.{name}")
        for room in () if name.startswith("_") else _LATER:
            if name in __getattr__(room).__all__:
                return getattr(__getattr__(room), name)
        raise AttributeError(f"module 'sparsify' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_public())
