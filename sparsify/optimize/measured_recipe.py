"""Creates a recipe after measurements: losses on data, times in onnxruntime, a goal in milliseconds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.analysis.analyze import analyze_model
from sparsify.analysis.loss import loss_profile
from sparsify.analysis.profiling import performance_profile
from sparsify.errors import ArgumentError, SparsifyWarning
from sparsify.optimize.latency import latency_plan
from sparsify.optimize.pruning_profiles import PruningSettings
from sparsify.optimize.recipe_creation import create_recipe
from sparsify.optimize.screen import Report

if TYPE_CHECKING:
    from torch import nn

    from sparsify.analysis.layers import ModelAnalysis
    from sparsify.analysis.loss import LossProfile
    from sparsify.analysis.performance import PerformanceProfile
    from sparsify.model.signature import InputsLike
    from sparsify.optimize.stages import OriginalTraining
    from sparsify.recipe import Recipe

__all__: list[str] = []


@dataclass(frozen=True)
class Measurements:
    """Measurements to make before the recipe is created.

    Attributes:
        data: batches on which losses are measured; None: losses are estimated from the weights alone.
        criterion: the loss of (outputs, target) on `data`; None: as in `loss_profile`.
        times: whether layers are timed in onnxruntime.
        goal_ms: the latency to reach with whole channels removed; times are measured for it then.
        batch_size, threads: those of the times.
    """

    data: Iterable[Any] | None = None
    criterion: Callable[[Any, Any], Any] | None = None
    times: bool = False
    goal_ms: float | None = None
    batch_size: int = 1
    threads: int = 1


@dataclass(frozen=True)
class MeasuredRecipe:
    """A recipe with the analysis and the profiles that it was created from."""

    model: nn.Module | Path
    recipe: Recipe
    structured: bool
    settings: PruningSettings | None
    training: OriginalTraining | None
    analysis: ModelAnalysis | None
    loss: LossProfile | None
    performance: PerformanceProfile | None

    def report(self, path: str) -> Report:
        """The Optimize screen, on which the recipe can be changed by hand.

        Args:
            path: the recipe file, as the page is to name it.

        Raises:
            ArgumentError: the model was not analyzed, because there were no sample inputs.
        """
        if self.analysis is None:
            raise ArgumentError("the page shows what layers compute: give sample inputs.")
        if self.structured:
            warnings.warn(
                "the page moves single weights, while the recipe removes channels: take the file, not the recipe of "
                "the page.",
                SparsifyWarning,
                stacklevel=2,
            )
        loss = self.loss
        if loss is None or loss.families:
            # The page shows single weights, which a loss profile of channels does not know.
            loss = loss_profile(self.model, progress=False)
        asked = self.recipe.evidence.asked.get("settings") if self.recipe.evidence is not None else None
        return Report.of(
            self.analysis,
            loss,
            self.performance,
            settings=self.settings or (None if asked is None else PruningSettings(**asked)),
            training=self.training,
            recipe=path,
            quantize=any(one.kind == "quantization" for one in self.recipe.modifiers),
        )


def recipe_from_measurements(
    model: nn.Module | Path,
    sample_inputs: InputsLike | None,
    measurements: Measurements,
    *,
    settings: PruningSettings | None = None,
    training: OriginalTraining | None = None,
    structured: bool = False,
    **options: Any,
) -> MeasuredRecipe:
    """The recipe that `create_recipe` makes of `model` after these measurements; the model is not touched.

    Args:
        model: the dense model, or an ONNX file.
        sample_inputs: as the model is called with; None: no times can be measured and no MACs are counted.
        measurements: those to make.
        settings, training, structured: as in `create_recipe`.
        options: further arguments of `create_recipe`.

    Raises:
        ArgumentError: as in `create_recipe`, `loss_profile`, `performance_profile` and `latency_plan`.
    """
    if isinstance(model, Path) and (structured or measurements.goal_ms is not None):
        raise ArgumentError(f"channels are removed from a torch model; {model} is a file.")
    loss = performance = latency = None
    by_latency = measurements.goal_ms is not None
    if measurements.data is not None:
        data = measurements.data if isinstance(measurements.data, list | tuple) else list(measurements.data)
        channels = structured or by_latency
        loss = loss_profile(model, data, measurements.criterion, structured=channels, sample_inputs=sample_inputs)
    if measurements.times or by_latency:
        performance = performance_profile(
            model, sample_inputs, batch_sizes=(measurements.batch_size,), threads=(measurements.threads,)
        )
    if measurements.goal_ms is not None:
        assert not isinstance(model, Path)
        assert sample_inputs is not None  # performance_profile has refused None
        latency = latency_plan(
            model,
            sample_inputs,
            measurements.goal_ms,
            batch_size=measurements.batch_size,
            threads=measurements.threads,
            performance=performance,
            loss=loss,
        )
    analysis = None if sample_inputs is None else analyze_model(model, sample_inputs)
    recipe = create_recipe(
        model,
        sample_inputs,
        settings=settings,
        latency_plan=latency,
        analysis=analysis,
        performance=performance,
        loss=None if latency is not None else loss,
        training=training,
        structured=True if structured else None,
        **options,
    )
    return MeasuredRecipe(
        model, recipe, structured or latency is not None, settings, training, analysis, loss, performance
    )
