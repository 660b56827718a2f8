"""The public face: the names, and what importing them costs and touches."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import sparsify
from sparsify.modifiers.base import Modifier

# A name that is taken out or renamed breaks somebody's program: that belongs in CHANGELOG.md, and here.
ERRORS = {
    "ArgumentError",
    "DataError",
    "ExportError",
    "RecipeError",
    "SparsifyError",
    "SparsifyWarning",
    "StateError",
    "TargetError",
}
NAMES = {
    "__version__",
    "Active",
    "GradualPruning",
    "Modifier",
    "Phase",
    "Recipe",
    "ScheduledModifierManager",
    "Shrunk",
    "benchmark_onnx",
    "export_onnx",
    "floating_layers",
    "shrink",
    "verify_onnx",
}
LATER = {
    "sparsify.analysis": {
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
    },
    "sparsify.oneshot": {"quantize_model", "quantize_onnx"},
    "sparsify.optimize": {
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
    },
}
MODIFIERS = {
    "ACDCPruningModifier",
    "ASRegModifier",
    "ConstantPruningModifier",
    "DistillationModifier",
    "EpochRangeModifier",
    "GMPruningModifier",
    "GlobalMagnitudePruningModifier",
    "GradualParamModifier",
    "LayerPruningModifier",
    "LayerThinningModifier",
    "LearningRateFunctionModifier",
    "LearningRateModifier",
    "MFACPruningModifier",
    "MagnitudePruningModifier",
    "MovementPruningModifier",
    "OBSPruningModifier",
    "PerLayerDistillationModifier",
    "PowerpropagationModifier",
    "QuantizationModifier",
    "RigLPruningModifier",
    "SetLearningRateModifier",
    "SetParamModifier",
    "SetWeightDecayModifier",
    "SparsificationLoggingModifier",
    "StructuredPruningModifier",
    "TopKASTPruningModifier",
    "TrainableParamsModifier",
}


def test_the_public_names_are_these() -> None:
    assert set(sparsify.__all__) == NAMES | ERRORS | MODIFIERS | set().union(*LATER.values())
    assert len(sparsify.__all__) == len(set(sparsify.__all__)), "a name is carried twice"
    assert all(hasattr(sparsify, name) for name in sparsify.__all__)


@pytest.mark.parametrize("room", LATER)
def test_what_is_imported_later_is_what_is_there(room: str) -> None:
    assert set(import_module(room).__all__) == LATER[room]
    name = min(LATER[room])
    assert getattr(sparsify, name) is getattr(import_module(room), name) and name in dir(sparsify)
    assert getattr(sparsify, room.removeprefix("sparsify.")) is import_module(room)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'analyse_model'"):
        _ = sparsify.analyse_model


def test_every_modifier_is_registered_under_its_public_name() -> None:
    ours = {name for name, cls in Modifier.registry.items() if cls.__module__.startswith("sparsify.")}
    assert ours == MODIFIERS


def test_every_public_name_is_documented() -> None:
    bare = [name for name in sparsify.__all__ if not name.startswith("_") and not getattr(sparsify, name).__doc__]
    # Literals, aliases and mappings can carry no text.
    assert set(bare) <= {"Experiment", "Framework", "LearningRateSchedule", "PRESETS", "Phase"}


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    root = str(Path(sparsify.__file__).parents[1])
    command = f"import sys; sys.path.insert(0, {root!r})\n{code}"
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", command], cwd=folder, capture_output=True, text=True, check=False
    )


def test_importing_is_quiet_light_and_leaves_no_trace(tmp_path: Path) -> None:
    heavy = "onnx onnxruntime onnxscript transformers matplotlib rich torch.onnx._internal.exporter lightning sklearn"
    done = run(
        "import os, logging, torch; before = dict(os.environ), logging.getLogger().handlers[:], torch.get_rng_state(); "
        "import sparsify; "
        "after = dict(os.environ), logging.getLogger().handlers[:], torch.get_rng_state(); "
        "assert before[:2] == after[:2] and torch.equal(before[2], after[2]); "
        f"heavy = [name for name in '{heavy}'.split() if name in sys.modules]; "
        "assert not heavy, heavy; assert not logging.getLogger('sparsify').handlers",
        tmp_path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


WATCH = """
import torch
seen = []
sys.dont_write_bytecode = True

def watch(event, args):
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if writes or event.startswith(("socket.", "subprocess.")):
        seen.append((event, str(args)))

sys.addaudithook(watch)
import sparsify
assert not seen, seen
"""


def test_importing_opens_no_socket_and_writes_no_file(tmp_path: Path) -> None:
    # Audit hooks see what Python does, whoever asks for it.
    done = run(WATCH, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_costs_far_less_than_torch(tmp_path: Path) -> None:
    # benchmarks/import_time.py keeps the bar of 0.3 s; here only what is grossly wrong shows.
    code = (
        "import time; start = time.perf_counter(); import torch; middle = time.perf_counter(); import sparsify; "
        "print(time.perf_counter() - middle)"
    )
    best = min(float(run(code, tmp_path).stdout) for _ in range(3))
    assert best < 2.0, f"{best:.2f} s"


def test_star_import_brings_no_modules() -> None:
    space: dict[str, object] = {}
    exec("from sparsify import *", space)
    assert not [name for name, value in space.items() if isinstance(value, type(sys))]
