"""The recipe of an experiment: by its optim level, spread over the layers that may be pruned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsify.analysis.analyze import analyze_model
from sparsify.errors import ArgumentError, DataError
from sparsify.optimize.layer_curves import TABLES
from sparsify.optimize.levels import optim_level
from sparsify.optimize.pruning_profiles import PruningSettings
from sparsify.optimize.recipe_creation import create_recipe
from sparsify.optimize.stages import OriginalTraining
from sparsify.recipe.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from sparsify.analysis.layers import ModelAnalysis
    from sparsify.experiments.settings import ExperimentSettings
    from sparsify.experiments.tasks import RunTask

__all__: list[str] = []

FINAL_RATE = 0.01
"""The last learning rate of the original training as a share of its first."""
LEAST_ZEROS = 0.2
"""A model with a smaller share of zeros in its layers is no sparse one."""


@dataclass(frozen=True)
class Compression:
    """A recipe, and what it promises.

    Attributes:
        recipe: None where nothing is done: optim level 0.
        asked: zeros / elements of the weights that are pruned; None where nothing is promised.
        kept_dense: layers that are never pruned, each with the reason.
        teaches: whether a teacher is needed.
    """

    recipe: Recipe | None
    asked: float | None
    kept_dense: Mapping[str, str]
    teaches: bool


def compression_of(
    task: RunTask, settings: ExperimentSettings, inputs: Mapping[str, Tensor], fresh: Sequence[str]
) -> Compression:
    """The recipe that the settings ask for.

    Args:
        task: with the model as it is before the recipe.
        settings: with everything filled in.
        inputs: of one call of the model.
        fresh: parameters that began with random values.

    Raises:
        RecipeError: the recipe file cannot be read, or does not fit.
    """
    level = optim_level(settings.optim_level, settings.kind)
    teaches = bool(task.teaches) and settings.distill > 0 and settings.teacher != "none" and settings.kind != "one-shot"
    if settings.recipe is not None:
        recipe = Recipe.load(settings.recipe, dict(settings.recipe_args) if settings.recipe_args else None)
        recipe.check(task.model)
        return Compression(recipe, None, {}, any(m.kind == "distillation" for m in recipe.modifiers))
    if not level.quantize:
        return Compression(None, None, {}, False)
    training = None
    if settings.kind != "one-shot":
        assert settings.learning_rate is not None and settings.epochs is not None
        training = OriginalTraining(
            original_epochs(settings.epochs, prunes=bool(level.sparsity), transfer=settings.kind == "sparse-transfer"),
            settings.learning_rate,
            settings.learning_rate * FINAL_RATE,
            settings.optimizer,
        )
    keys = {} if task.teaches == ("output",) else {"distill_output_keys": list(task.teaches)}
    distill: Any = {"hardness": settings.distill, "teacher_input_keys": list(inputs), **keys} if teaches else False
    given: dict[str, Any] = {"experiment": settings.kind, "training": training, "distill": distill, "quantize": True}
    if settings.kind == "sparse-transfer":
        return Compression(
            create_recipe(task.model, inputs, optim_level=settings.optim_level, **given), None, {}, teaches
        )
    if not level.sparsity:
        recipe = create_recipe(task.model, inputs, optim_level=settings.optim_level, **given)
        return Compression(recipe, None, {}, teaches)
    analysis = analyze_model(task.model, inputs)
    dense = {} if settings.structured else _kept_dense(task, fresh)
    prunable = {info.name for info in analysis.layers if info.prunable}
    dense = {name: why for name, why in dense.items() if name in prunable}
    share = level.sparsity * _free_share(analysis, dense)
    recipe = create_recipe(
        task.model,
        inputs,
        settings=PruningSettings(sparsity=share, overrides=dict.fromkeys(dense, 0.0)),
        analysis=analysis,
        structured=settings.structured,
        **given,
    )
    return Compression(recipe, None if settings.structured else level.sparsity, dense, teaches)


def original_epochs(epochs: int, *, prunes: bool, transfer: bool) -> float:
    """The longest original training whose stages take at most `epochs`.

    Raises:
        ArgumentError: none is so short.
    """
    best = 0
    for candidate in range(2, 20 * epochs + 2):
        if OriginalTraining(candidate).stages(prune=prunes, quantize=True, transfer=transfer)[-1].end <= epochs:
            best = candidate
    if not best:
        raise ArgumentError(f"epochs: {epochs} are too few for the stages of a recipe; give 4 or more.")
    return float(best)


def _kept_dense(task: RunTask, fresh: Sequence[str]) -> dict[str, str]:
    """Layers that are not pruned: the one that gives the labels, the pooler of an encoder, a new head."""
    from torch import nn

    model = task.model
    base = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
    inside = set() if not isinstance(base, nn.Module) or base is model else {id(m) for m in base.modules()}
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)]
    everything = len(fresh) == len(list(model.parameters()))
    new = set() if everything else {name.rpartition(".")[0] for name in fresh}
    found = {}
    for name, module in layers:
        rows = module.weight.shape[0]
        if inside and id(module) not in inside and (rows in (len(task.labels), len(task.labels) + 1) or rows == 2):
            found[name] = "it gives the labels"
        elif name in new:
            found[name] = "it is new"
        elif "pooler" in name.split("."):
            found[name] = "the pooler"
    if not found and layers:
        found[layers[-1][0]] = "it gives the labels"
    return found


def _free_share(analysis: ModelAnalysis, dense: Mapping[str, str]) -> float:
    """Weights that are pruned, as a share of those that the average of a profile is over: the ones kept dense count."""
    layers = [info for info in analysis.layers if info.prunable and info.groups == 1]
    if layers and layers[0].type not in TABLES:
        layers = layers[1:]
    counted = [info for info in layers if info.type not in TABLES]
    total = sum(info.weights for info in counted)
    return sum(info.weights for info in counted if info.name not in dense) / total if total else 1.0


def check_zeros(model: nn.Module, settings: ExperimentSettings) -> None:
    """Refuses a base without zeros where the level of sparse transfer promises them.

    Raises:
        DataError: it has none.
    """
    from torch import nn

    if settings.kind != "sparse-transfer" or not optim_level(settings.optim_level, settings.kind).sparse:
        return
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / max(1, sum(weight.numel() for weight in weights))
    if zeros < LEAST_ZEROS:
        raise DataError(
            f"model: {settings.model}: {zeros:.1%} of its weights are zero, and optim level {settings.optim_level:g} "
            "of sparse-transfer keeps the zeros of a sparse model. Give one that training-aware made (the float model "
            "that --register files), or an optim level below 0.25, which quantizes alone."
        )
