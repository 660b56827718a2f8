"""Writes the Optimize screen: one HTML page that computes by itself, with all data of a model inside it."""

from __future__ import annotations

import dataclasses
import html
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from sparsify.analysis.loss import COSTS, HOW
from sparsify.errors import DISTRIBUTION, ArgumentError
from sparsify.modifiers.base import Modifier
from sparsify.modifiers.quantization import QuantizationModifier
from sparsify.modifiers.training import TrainableParamsModifier
from sparsify.optimize.allocation import pruning_profile
from sparsify.optimize.code_generation import Framework, integration_code
from sparsify.optimize.group_curves import weights_by_layer
from sparsify.optimize.layer_curves import REST, LayerCurve, curves
from sparsify.optimize.pruning_profiles import PruningSettings
from sparsify.optimize.recipe_creation import FIRST, UNKNOWN, quantization_epochs
from sparsify.optimize.stages import LearningRateSchedule, OriginalTraining, learning_rates
from sparsify.output.files import replacing

if TYPE_CHECKING:
    from sparsify.analysis.layers import LayerInfo, ModelAnalysis
    from sparsify.analysis.loss import LossProfile
    from sparsify.analysis.performance import PerformanceProfile
    from sparsify.onnx.benchmark import Benchmark

__all__ = ["Report"]

SCRIPTS = ("allocation.js", "recipe_text.js", "drawing.js", "screen.js", "schedules.js")
"""In the order in which they are read; all run in the scope of the page."""


@dataclass(frozen=True)
class Report:
    """Contents of the Optimize screen: a model's layers, what pruning them costs and saves, and how it is trained.

    Attributes:
        analysis: the layers of the model.
        curves: of the same layers, as `curves` makes them from profiles.
        settings: what the sliders start with.
        training: how the dense model was trained; without its learning rates the page shows none.
        performance: where it was measured; its figures are in the benchmarks, and times in the page are milliseconds.
        benchmarks: of files, by the name to show: {"dense": benchmark_onnx(...), "pruned, int8": ...}.
        loss_method: how losses came to be, as in LossProfile; said in the page.
        loss_base: the loss of the dense model; None where it was not measured.
        recipe: the path of the recipe file in the integration code.
        quantize: whether the recipe ends with int8.
    """

    analysis: ModelAnalysis
    curves: tuple[LayerCurve, ...]
    settings: PruningSettings = field(default_factory=PruningSettings)
    training: OriginalTraining | None = None
    performance: PerformanceProfile | None = None
    benchmarks: Mapping[str, Benchmark] = field(default_factory=dict)
    loss_method: str = ""
    loss_base: float | None = None
    recipe: str = "recipe.yaml"
    quantize: bool = False

    @classmethod
    def of(
        cls,
        analysis: ModelAnalysis,
        loss: LossProfile,
        performance: PerformanceProfile | None = None,
        *,
        settings: PruningSettings | None = None,
        training: OriginalTraining | None = None,
        benchmarks: Mapping[str, Benchmark] | None = None,
        recipe: str = "recipe.yaml",
        quantize: bool = False,
    ) -> Report:
        """The report of a model, from its profiles.

        Args:
            analysis: the layers of the model.
            loss: a profile of pruning single weights.
            performance: measured times; None: by MACs.
            settings: those that the sliders start with; None: the defaults of PruningSettings.
            training: how the dense model was trained; None: not known.
            benchmarks: of files, by the name to show.
            recipe: the path of the recipe file in the integration code.
            quantize: whether the recipe ends with int8.

        Raises:
            ArgumentError: the loss profile is one of quantization, or of channels.
        """
        return cls(
            analysis=analysis,
            curves=curves(analysis, performance, loss, tables=settings.overrides if settings else ()),
            settings=settings or PruningSettings(),
            training=training,
            performance=performance,
            benchmarks=dict(benchmarks or {}),
            loss_method=loss.method,
            loss_base=loss.base if loss.method == "data" else None,
            recipe=recipe,
            quantize=quantize,
        )

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Writes the page: one file that needs no server and no network. Returns its path.

        Raises:
            ArgumentError: the settings or curves cannot be, as in `pruning_profile`.
            DataFileError: it cannot be written; an old file stays as it was.
        """
        text = self.html()
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return Path(path)

    def html(self) -> str:
        """The page as text.

        Raises:
            ArgumentError: the settings or curves cannot be, as in `pruning_profile`.
        """
        pruning_profile(self.curves, self.settings)
        parts = {
            "@title@": html.escape(self.analysis.model),
            "@footer@": f"Written by sparsify{html.escape(_version_behind_the_name())}. Nothing leaves this page.",
            "@style@": _file("screen.css"),
            "@script@": "\n".join(_file(name) for name in SCRIPTS),
        }
        # The data are inserted last, by splitting: nothing in them is ever taken for a placeholder.
        before, after = _file("screen.html").split("@data@")
        for place, text in parts.items():
            before, after = before.replace(place, text), after.replace(place, text)
        return before + self._json() + after

    def data(self) -> dict[str, Any]:
        """The values that the page reads, all of plain types."""
        by_name = {layer.name: layer for layer in self.analysis.layers}
        weights = weights_by_layer(self.analysis)
        training = self.training or UNKNOWN
        stages = training.stages(quantize=self.quantize)
        last: list[Modifier] = [TrainableParamsModifier(params="__ALL__", trainable=True, start_epoch=0.0)]
        if self.quantize:
            last.append(QuantizationModifier.model_validate(quantization_epochs(stages[-1])))
        schedules: dict[str, list[dict[str, Any]]] = {}
        if training.initial_lr is not None:
            schedules = {
                name: [_plain_number(one) for one in learning_rates(training, name, stages)] for name in _SCHEDULES
            }
            schedules = {
                "suggested": [_plain_number(one) for one in learning_rates(training, None, stages)],
                **schedules,
            }
        return {
            "model": self.analysis.model,
            "batch": self.analysis.batch_size,
            "timed": self.performance is not None,
            "loss": HOW.get(self.loss_method, "given"),
            "lost": {"name": COSTS.get(self.loss_method, "loss"), "base": self.loss_base},
            "layers": [{**dataclasses.asdict(one), **_shown_layers(by_name.get(one.name))} for one in self.curves],
            "rest": REST,
            "weights": weights,
            "settings": {**dataclasses.asdict(self.settings), "overrides": dict(self.settings.overrides)},
            "training": {
                "known": self.training is not None,
                "epochs": training.epochs,
                "optimizer": training.optimizer,
                "stages": {stage.name: (stage.start, stage.end) for stage in stages},
                "frequency": training.update_frequency,
                "first": FIRST,
            },
            "last": [_plain_number(one) for one in last],
            "schedules": schedules,
            "code": {name: integration_code(self.recipe, framework=name) for name in get_args(Framework)},
            "recipe": Path(self.recipe).name,
            "benchmarks": [_benchmark_table(name, one) for name, one in self.benchmarks.items()],
            "performance": None if self.performance is None else _performance(self.performance),
        }

    def _json(self) -> str:
        try:
            text = json.dumps(self.data(), allow_nan=False, ensure_ascii=True, separators=(",", ":"))
        except ValueError as error:
            raise ArgumentError(f"report: a figure in it is no finite number ({error}); measure again.") from error
        # Inside a script element only "<" could end it or begin a comment.
        return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


_SCHEDULES: tuple[LearningRateSchedule, ...] = get_args(LearningRateSchedule)


def _file(name: str) -> str:
    return resources.files("sparsify.optimize").joinpath(name).read_text(encoding="utf-8")


def _plain_number(modifier: Modifier) -> dict[str, Any]:
    """A modifier in the form that the page and `recipe_text.js` read."""
    return {"type": type(modifier).__name__, "fields": modifier.model_dump(mode="json", exclude_unset=True)}


def _shown_layers(layer: LayerInfo | None) -> dict[str, Any]:
    if layer is None:
        return {"type": "", "shape": ""}
    return {"type": layer.type, "shape": " x ".join(map(str, layer.output_shape))}


def _benchmark_table(name: str, one: Benchmark) -> dict[str, Any]:
    threads = "default threads" if one.threads is None else f"{one.threads} threads" if one.threads > 1 else "1 thread"
    return {
        "name": name,
        "p50": one.latency_p50_ms,
        "p95": one.latency_p95_ms,
        "items": one.throughput,
        "size": one.size_bytes,
        "gzip": one.gzip_bytes,
        "how": f"batch {one.batch_size}, {threads}, {one.iterations} calls",
    }


def _performance(one: PerformanceProfile) -> dict[str, Any]:
    totals = {"float": one.total_ms}
    if one.total_int8_ms is not None:
        totals["int8"] = one.total_int8_ms
    for kind, found in (("float", one.width_total_ms), ("int8", one.width_total_int8_ms)):
        totals |= {f"{kind}, {w:.0%} of the channels": ms for w, ms in zip(one.widths, found, strict=False) if w < 1}
    same = f"batch {one.batch_size}, {one.threads} thread{'s' * (one.threads != 1)}"
    further = {name: ms for name, ms in one.totals.items() if not name.startswith(f"{same},")}
    return {
        "how": f"{same}, onnxruntime",
        "totals": totals | further,
        "layers": [[layer.name, layer.type, layer.ms, layer.int8_ms] for layer in one.layers],
        "others": sum(one.others.values()),
    }


def _version_behind_the_name() -> str:
    """The version behind the name; nothing where the package runs from its source folder."""
    try:
        return f" {version(DISTRIBUTION)}"
    except PackageNotFoundError:
        return ""
