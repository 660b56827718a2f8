"""The stages of one run, each of which is skipped where a stopped run has it already."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from sparsify.errors import ArgumentError, DataError, StateError, first_line
from sparsify.experiments.checkpoints import CheckpointFile
from sparsify.experiments.compression import Compression, check_zeros, compression_of
from sparsify.experiments.deployment import (
    SAMPLE_COUNT,
    WrittenModel,
    measured_file,
    speed,
    verified,
    write_model,
)
from sparsify.experiments.known_tasks import CustomTask, built_task
from sparsify.experiments.loop import EpochReport, OutOfMemory, measured, on_device, train
from sparsify.experiments.model_card import summary_lines, write_card
from sparsify.experiments.models import load_experiment_model, probe
from sparsify.experiments.registry import Registry
from sparsify.experiments.result import ExperimentResult
from sparsify.experiments.run_page import run_page
from sparsify.experiments.run_report import record_of
from sparsify.experiments.tasks import UseCase
from sparsify.experiments.use_cases import use_case_named
from sparsify.optimize.levels import optim_level
from sparsify.optimize.references import resolve
from sparsify.output.files import replacing
from sparsify.recipe.recipe import Recipe
from sparsify.training.manager import ScheduledModifierManager
from sparsify.training.saved_model import save_model

if TYPE_CHECKING:
    import os

    from torch import nn

    from sparsify.experiments.folder import ExperimentFolder
    from sparsify.experiments.settings import ExperimentSettings
    from sparsify.experiments.tasks import RunTask

__all__: list[str] = []

CALIBRATION = 256
"""Samples from which one-shot takes its ranges, at most."""
SLACK = 0.005
"""By so much less than asked, a sparsity is still the one that was asked for."""


class ExperimentRun:
    """A run that is prepared, then carried out in its folder.

    Args:
        settings: of the run; what is None in them is filled in by `prepare`.
        use_case: of the user's own; None: the settings name one.
        say: called with each line of progress.
        registry: folder of the models to transfer from.
        register: a name under which the float model is filed.
    """

    task: RunTask

    def __init__(
        self,
        settings: ExperimentSettings,
        use_case: UseCase | None,
        say: Callable[[str], None],
        registry: str | os.PathLike[str] | None = None,
        register: str | None = None,
    ) -> None:
        self.settings, self._say, self._register = settings, say, register
        self._registry = Registry.at(registry)
        self._custom = use_case if use_case is not None else _own_use_case(settings.use_case)
        self._prepared = False
        self._about: dict[str, Any] = {}
        self._fresh: tuple[str, ...] = ()
        self._labels: tuple[str, ...] = ()

    # ------------------------------------------------------------------ before anything is written

    def prepare(self) -> None:
        """Reads the data, loads the model, fills the settings in, and tries one batch.

        Raises:
            ArgumentError, DataError: what cannot be used.
        """
        if self._register is not None:
            self._registry.check_new(self._register)
        if self._custom is not None:
            self.task = CustomTask(self._custom, self.settings)
            self._about = {"fingerprint": "", "split": "by the use case", "labels": []}
            defaults: Any = self._custom
        else:
            defaults = use_case_named(self.settings.use_case)
            if self.settings.model is None:
                chosen = self._registry.choose(
                    defaults.name, optim_level(self.settings.optim_level, self.settings.kind)
                )
                self._say(f"model: {chosen.name} of the registry ({chosen.size}, {chosen.form})")
                self.settings = replace(self.settings, model=str(chosen.place))
            built = built_task(defaults, self.settings)
            self.task, self._fresh, self._labels = built.task, built.fresh, built.labels
            self._about = {
                "fingerprint": built.data.fingerprint,
                "split": built.data.split,
                "labels": list(built.labels),
                "train": len(built.data.train),
                "val": len(built.data.val),
            }
            self.settings = built.settings
            for line in (
                f"data: {len(built.data.train)} samples to train with, {len(built.data.val)} to measure with "
                f"({built.data.split})",
                *built.data.notes,
                *built.notes,
            ):
                self._say(line)
        kind = self.settings.kind
        fresh = bool(self._fresh)
        dense = 0 if kind != "training-aware" else defaults.dense_epochs if fresh or self._custom is not None else 0
        if kind == "one-shot" and fresh and not self.settings.dense_epochs:
            raise ArgumentError(
                "model: its head does not fit the labels of the data, and one-shot trains nothing. Give a trained "
                "model, --dense-epochs, or take training-aware."
            )
        filled = {
            "epochs": defaults.epochs,
            "dense_epochs": dense,
            "batch_size": defaults.batch_size,
            "learning_rate": defaults.learning_rate,
            "eval_metric": self.task.metric,
        }
        open_ = {name: value for name, value in filled.items() if getattr(self.settings, name) is None}
        self.settings = replace(self.settings, **open_)
        assert self.settings.eval_metric is not None
        self.task.metric = self.settings.eval_metric
        if self.settings.recipe is None:
            check_zeros(self.task.model, self.settings)
        self._try_one_batch()
        self._prepared = True

    def _try_one_batch(self) -> None:
        model, task = self.task.model, self.task
        device = torch.device(self.settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model.to(device)
        batch = on_device(task.batch(task.train[:SAMPLE_COUNT]), device)
        probe(model, dict(batch.inputs), str(self.settings.model))
        was = model.training
        model.eval()
        try:
            with torch.no_grad():
                loss = task.loss(batch)
                found = {name: value.float().cpu().numpy() for name, value in task.outputs(batch).items()}
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, ArgumentError | DataError | StateError):
                raise
            raise ArgumentError(
                f"model: {self.settings.model} gives no loss on a batch of the data: {first_line(error)}"
            ) from error
        finally:
            model.train(was)
        if loss.dim() != 0 or not bool(torch.isfinite(loss)):
            raise DataError(f"model: {self.settings.model}: the loss on the first samples is {loss.tolist()}.")
        named = task.metrics(found, task.train[:SAMPLE_COUNT])
        if task.metric not in named:
            raise ArgumentError(f"eval_metric: {task.metric!r} is none of {', '.join(named)}.")

    def findings(self) -> dict[str, Any]:
        """Findings of `prepare`, for `--check`."""
        return {"checked": True, **self._about, "arguments": self.settings.plain()}

    def about(self) -> dict[str, Any]:
        """Fingerprint, split and labels, saved beside the arguments."""
        return dict(self._about)

    # ------------------------------------------------------------------ the run

    def carry_out(self, folder: ExperimentFolder) -> ExperimentResult:
        """All stages that the folder does not have yet.

        Raises:
            StateError: the folder was begun otherwise, or memory does not suffice.
        """
        if not self._prepared:
            self.prepare()
        folder.check_same(self.settings, self._about["fingerprint"])
        parts = None
        while True:
            try:
                return self._stages(folder, parts)
            except OutOfMemory as error:
                parts = 2 * error.parts
                size = self.settings.batch_size or 1
                if parts > size:
                    raise StateError(
                        "memory is too small for one sample at a time: give a smaller --image-size or --max-length."
                    ) from None
                self._say(
                    f"out of memory: from the last checkpoint on, {-(-size // parts)} samples are computed at once; a "
                    f"step still sums up {size}. The result is not to the bit that of a run with more memory."
                )
            torch.cuda.empty_cache()
            self.prepare()

    def _stages(self, folder: ExperimentFolder, parts: int | None) -> ExperimentResult:
        task, settings = self.task, self.settings
        checkpoint = CheckpointFile(folder.path / "checkpoint" / "state.pt")
        self._dense(folder, checkpoint, parts)
        baseline, dense = self._baseline(folder)
        task.remember_names()
        done = self._compression(folder)
        manager = None
        if done.recipe is not None:
            manager = ScheduledModifierManager(done.recipe)
            if settings.kind == "one-shot":
                count = min(CALIBRATION, len(task.train))
                data = [task.batch(task.train[i : i + 1]).inputs for i in range(count)]
                model = manager.apply(
                    task.model, calibration_data=[dict(each) for each in data], sample_inputs=dict(data[0])
                )
                assert model is task.model
            else:
                self._say(f"recipe: {manager.max_epochs} epochs, in {folder.path / 'recipe.yaml'}")

                def keep_float(epoch: int, its: ScheduledModifierManager = manager) -> None:
                    # The float model as it is just before quantization: what sparse transfer begins with.
                    if its.qat_active(epoch) and (epoch == 0 or not its.qat_active(epoch - 1)):
                        task.save(folder.path / "training_artifacts" / "float")

                train(
                    task,
                    settings,
                    "recipe",
                    manager.max_epochs,
                    checkpoint,
                    manager=manager,
                    teacher=self._teacher(done),
                    parts=parts,
                    report=partial(self._report, folder),
                    at_end=keep_float,
                )
                manager.finalize(task.model)
        task.model.eval()
        written = write_model(task, folder.path / "deployment" / "model.onnx")
        found = self._figures(folder, done, baseline, dense, written)
        short = self._shortfalls(found, done)
        save_model(task.model, folder.path / "training_artifacts" / "model", recipe=manager, overwrite=True)
        task.save_preprocessing(folder.path / "training_artifacts" / "model")
        write_card(folder.path / "deployment", task, settings, found)
        folder.write_yaml("metrics.yaml", found)
        if self._register is not None:
            self._registry.add(self._register, task, settings, folder.path, found)
        folder.write_page(run_page(replace(record_of(folder.path), short=tuple(short))))
        for line in (*summary_lines(task.metric, found, structured=settings.structured), *short):
            self._say(line)
        folder.finish("\n".join(short) or "ok")
        return ExperimentResult(folder.path, found, tuple(short))

    def _dense(self, folder: ExperimentFolder, checkpoint: CheckpointFile, parts: int | None) -> None:
        """Trains what is new, and keeps the dense weights; on a run that goes on they are loaded."""
        task, settings = self.task, self.settings
        place = folder.path / "checkpoint" / "dense.pt"
        if place.is_file():
            task.model.load_state_dict(torch.load(place, map_location="cpu", weights_only=True))
            return
        if settings.dense_epochs:
            self._say(f"dense: {settings.dense_epochs} epochs, since weights are new")
            report = partial(self._report, folder)
            train(task, settings, "dense", settings.dense_epochs, checkpoint, parts=parts, report=report)
        with replacing(place) as temporary:
            torch.save(task.model.state_dict(), temporary)

    def _baseline(self, folder: ExperimentFolder) -> tuple[WrittenModel, Mapping[str, Any]]:
        """The dense model as a file, and its metrics."""
        place = folder.path / "baseline"
        if (place / "metrics.yaml").is_file():
            saved = folder.read_yaml("baseline/metrics.yaml")
            written = WrittenModel(place / "model.onnx", saved["batch"], tuple(saved["axes"]), (), {})
            return written, saved["metrics"]
        self.task.model.eval()
        written = write_model(self.task, place / "model.onnx")
        found = {"torch": measured(self.task), "onnxruntime": measured_file(self.task, written)}
        folder.write_yaml("baseline/metrics.yaml", {"batch": written.batch, "axes": written.axes, "metrics": found})
        self._say(f"dense: {self.task.metric} {found['onnxruntime'][self.task.metric]:.4f} in onnxruntime")
        return written, found

    def _compression(self, folder: ExperimentFolder) -> Compression:
        """The recipe and what it promises, made once."""
        if (folder.path / "checkpoint" / "compression.yaml").is_file():
            saved = folder.read_yaml("checkpoint/compression.yaml")
            recipe = Recipe.load(folder.path / "recipe.yaml") if saved.pop("has_recipe") else None
            return Compression(recipe, **saved)
        inputs = self.task.batch(self.task.train[:SAMPLE_COUNT]).inputs
        device = next(self.task.model.parameters()).device
        inputs = {name: value.to(device) for name, value in inputs.items()}
        made = compression_of(self.task, self.settings, inputs, self._fresh)
        if made.recipe is not None:
            made.recipe.save(folder.path / "recipe.yaml")
        promised = {"asked": made.asked, "kept_dense": dict(made.kept_dense), "teaches": made.teaches}
        folder.write_yaml("checkpoint/compression.yaml", {"has_recipe": made.recipe is not None, **promised})
        return made

    def _teacher(self, done: Compression) -> Any:
        wanted = self.settings.teacher
        if not done.teaches or wanted in (None, "self"):
            return "self" if done.teaches else None
        case = use_case_named(self.settings.use_case)
        assert wanted is not None
        teacher = load_experiment_model(
            wanted, case, self._labels, factory=None, offline=self.settings.offline, seed=self.settings.seed
        )
        if teacher.fresh:
            raise ArgumentError(
                f"teacher: {wanted} has random weights for these labels: {', '.join(teacher.fresh[:3])}."
            )
        return teacher.model.eval().to(next(self.task.model.parameters()).device)

    def _report(self, folder: ExperimentFolder, epoch: EpochReport) -> None:
        folder.log(vars(epoch))
        zeros = "" if epoch.sparsity is None else f"  sparsity {epoch.sparsity:.1%}"
        left = "" if epoch.seconds_left < 1 else f"  {_duration(epoch.seconds_left)} left"
        value = epoch.metrics[self.task.metric]
        self._say(
            f"{epoch.stage} {epoch.epoch}/{epoch.epochs} ({epoch.phase})  loss {epoch.loss:.4f}  "
            f"{self.task.metric} {value:.4f}{zeros}{left}"
        )

    # ------------------------------------------------------------------ what came out

    def _figures(
        self,
        folder: ExperimentFolder,
        done: Compression,
        baseline: WrittenModel,
        dense: Mapping[str, Any],
        written: WrittenModel,
    ) -> dict[str, Any]:
        import gzip

        task = self.task
        proof = verified(task, written)
        ratio = speed(task, baseline, written, self.settings.threads or 1)
        weights = {n: p for n, p in task.model.named_parameters() if p.dim() > 1}
        pruned = _pruned_weights(done.recipe, task.model)
        zeros = {name: float((p == 0).float().mean()) for name, p in weights.items()}
        total = sum(p.numel() for p in weights.values())
        among = sum(p.numel() for name, p in weights.items() if name in pruned)
        sizes = {}
        for name, path in (("dense", baseline.path), ("compressed", written.path)):
            content = path.read_bytes()
            sizes[name] = {"bytes": len(content), "gzip": len(gzip.compress(content, 6, mtime=0))}
        return {
            "use_case": task.name,
            "metric": task.metric,
            "dense": dict(dense),
            "compressed": {"torch": measured(task), "onnxruntime": measured_file(task, written)},
            "sparsity": {
                "asked": done.asked,
                "of_the_pruned": sum(zeros[n] * weights[n].numel() for n in pruned if n in weights) / among
                if among
                else None,
                "of_all_weights": sum(zeros[n] * p.numel() for n, p in weights.items()) / max(1, total),
                "kept_dense": dict(done.kept_dense),
                "layers": {name: round(zeros[name], 4) for name in sorted(pruned) if name in zeros},
            },
            "size": sizes,
            "speed": {
                "times_as_fast": ratio.median,
                "lowest": ratio.minimum,
                "highest": ratio.maximum,
                "batch_size": 1,
                "threads": self.settings.threads or 1,
            },
            "verification": {"agrees": proof.ok, "exact": proof.exact, "why": proof.why},
            "batch": written.batch,
            "free_axes": list(written.axes),
            "floating": dict(written.floating),
            "notes": [*written.notes],
        }

    def _shortfalls(self, found: Mapping[str, Any], done: Compression) -> list[str]:
        short = []
        zeros = found["sparsity"]["of_the_pruned"]
        if done.asked is not None and zeros is not None and zeros < done.asked - SLACK:
            short.append(f"falls short: {zeros:.1%} of the pruned weights are zero, {done.asked:.1%} were asked for.")
        if not found["verification"]["agrees"]:
            short.append(f"falls short: onnxruntime differs from torch: {found['verification']['why'] or 'outputs'}.")
        least, value = self.settings.at_least, found["compressed"]["onnxruntime"][found["metric"]]
        if least is not None and value < least:
            short.append(f"falls short: {found['metric']} {value:.4f} is less than --at-least {least:g}.")
        return short


def _pruned_weights(recipe: Recipe | None, model: nn.Module) -> set[str]:
    """Names of the weights that the recipe prunes or holds."""
    names: set[str] = set()
    for modifier in recipe.modifiers if recipe is not None else ():
        if modifier.kind == "pruning":
            names.update(modifier.targets(model))
    return names


def _own_use_case(name: str) -> UseCase | None:
    """The user's use case at "package.module:UseCase"; None where it is a known name."""
    if ":" not in name:
        return None
    found = resolve(name, "use_case")
    made = found() if isinstance(found, type) else found
    if not isinstance(made, UseCase):
        raise ArgumentError(f"use_case: {name} is a {type(made).__name__}; it must be a sparsify.UseCase.")
    return made


def _duration(seconds: float) -> str:
    minutes = int(seconds // 60)
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
