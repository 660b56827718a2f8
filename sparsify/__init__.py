"""Compress PyTorch models while they train: a recipe says what to prune and quantize, an int8 ONNX file comes out.

Every name that is public stands in the `__all__` of its file and is carried from there. Importing this imports neither
onnx nor onnxruntime, and has no side effects. What is used before training or without it, analysis, optimize and
oneshot, is imported when a name of it is first asked for: a training job needs none of it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparsify import errors, modifiers, recipe
from sparsify.errors import *
from sparsify.modifiers import *
from sparsify.onnx import benchmark, export, verify
from sparsify.onnx.benchmark import *
from sparsify.onnx.export import *
from sparsify.onnx.verify import *
from sparsify.pruning import shrinking
from sparsify.pruning.shrinking import *
from sparsify.recipe import *
from sparsify.training import manager
from sparsify.training.manager import *

if TYPE_CHECKING:
    from sparsify.analysis import *
    from sparsify.oneshot import *
    from sparsify.optimize import *

__version__ = "0.1.0"

__all__: list[str] = ["__version__"]
__all__ += benchmark.__all__
__all__ += errors.__all__
__all__ += export.__all__
__all__ += manager.__all__
__all__ += modifiers.__all__
__all__ += recipe.__all__
__all__ += shrinking.__all__
__all__ += verify.__all__

# Names that are read before what they stand for is imported.
_LATER = {
    "sparsify.analysis": [
        "ChildOp",
        "ChosenBits",
        "LayerInfo",
        "LayerPerformance",
        "LossProfile",
        "ModelAnalysis",
        "PerformanceProfile",
        "UnknownOperator",
        "WeightMetadata",
        "analyze_model",
        "choose_bits",
        "get_weights_metadata",
        "loss_profile",
        "performance_profile",
        "weights_table",
    ],
    "sparsify.oneshot": ["quantize_model", "quantize_onnx"],
    "sparsify.optimize": [
        "Experiment",
        "Framework",
        "LatencyPlan",
        "LatencyRound",
        "LayerChoice",
        "LayerCurve",
        "LearningRateSchedule",
        "OptimLevel",
        "OriginalTraining",
        "Optimization",
        "Outcome",
        "PRESETS",
        "Plan",
        "PlannedMoment",
        "Prediction",
        "Preset",
        "Project",
        "ProjectSettings",
        "PruningProfile",
        "PruningSettings",
        "Report",
        "TrainingStage",
        "create_recipe",
        "curves",
        "integration_code",
        "latency_plan",
        "learning_rates",
        "optim_level",
        "plan",
        "pruning_profile",
        "score_prediction",
        "training_script",
    ],
}
for _names in _LATER.values():
    __all__ += _names


def __getattr__(name: str) -> Any:
    for room, names in _LATER.items():
        if name in names or room == f"sparsify.{name}":
            found = import_module(room)
            return found if room == f"sparsify.{name}" else getattr(found, name)
    raise AttributeError(f"module 'sparsify' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
