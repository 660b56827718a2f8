"""The callback for Lightning's Trainer, under either of its import names."""

from __future__ import annotations

import inspect
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsify.errors import ArgumentError, StateError, install_line
from sparsify.integrations.finished_model import export_finished, moved_tensors
from sparsify.integrations.lightning_checkpoint import (
    RECORDS,
    STRUCTURED,
    ResumedRun,
    apply_checkpoint_structure,
    outgrown,
    say_what_begins,
    say_what_was_left,
    warn_unfinished,
)
from sparsify.integrations.lightning_epochs import EpochLength
from sparsify.integrations.lightning_module import (
    averages_beside,
    callbacks_of,
    fits_state,
    is_trial,
    refuse_strategy,
    refuse_what_cannot_work,
    submodule,
)
from sparsify.integrations.lightning_strategy import Between, KeepFinished, LoggerWriter, stand_aside, stand_before
from sparsify.integrations.recipe_progress import RecipeProgress, progress_of
from sparsify.model.gradients import GradSampler
from sparsify.model.optimizer_hooks import Callback as InertCallback
from sparsify.model.signature import InputsLike
from sparsify.modifiers.run_log import ScalarWriter
from sparsify.onnx.exported import ExportedModel
from sparsify.onnx.verify import Verification
from sparsify.recipe.recipe import Source, Variables
from sparsify.training.manager import ScheduledModifierManager
from sparsify.training.timer import steps_in_epoch

if TYPE_CHECKING:
    from lightning.pytorch import Callback as TrainerCallback
    from lightning.pytorch import LightningModule, Trainer
else:
    # Each name has its own Callback class, and its Trainer takes no other (is_overridden in utilities/model_helpers.py
    # of lightning 2.6.6): the callback is one of both where both are installed.
    _classes = []
    try:
        from lightning.pytorch import Callback

        _classes.append(Callback)
    except ImportError:
        pass
    try:
        from pytorch_lightning import Callback

        _classes.append(Callback)
    except ImportError:
        pass
    if not _classes:
        raise ImportError(f"sparsify.integrations.lightning needs Lightning: {install_line('lightning')}")
    TrainerCallback = type("TrainerCallback", tuple(_classes), {})

__all__ = ["SparsifyCallback", "apply_checkpoint_structure"]

log = logging.getLogger("sparsify")


class SparsifyCallback(TrainerCallback):
    """Applies a recipe while Lightning's Trainer trains; nothing else is needed.

    ::

        trainer = Trainer(max_epochs=10, callbacks=[SparsifyCallback("recipe.yaml")])
        trainer.fit(module, loader)

    When training starts the recipe is attached to the module and its optimizers. The loss of distillation is added,
    optimizer steps are counted, values go to the Trainer's loggers, and at the end the recipe is finalized. A search
    for a learning rate or a batch size is no part of the run.

    Checkpoint: `checkpoint["sparsify"]` holds the manager's state, and how far the recipe is. `fit(ckpt_path=...)` puts
    the structure (quantized layers, removed channels) in place before the weights are loaded, and so do `validate`,
    `test` and `predict`. For `load_from_checkpoint` see `apply_checkpoint_structure`.

    Args:
        recipe: a path, YAML or Markdown text, a file object, a Recipe, or a manager.
        recipe_variables: values for the recipe's variables.
        model: the attribute of the LightningModule that is the model ("net", "net.backbone"), whose names the recipe
            uses; None: the LightningModule itself.
        steps_per_epoch: optimizer steps in an epoch, where that cannot be seen from the data (endless streams) or is
            not one a batch (manual optimization); None: batches divided by the accumulation, rounded up.
        distillation_teacher: as for `ScheduledModifierManager.modify`; a module is moved to the model's device.
        grad_sampler: as for `modify`.
        calibration_data: as for `modify`.
        sample_inputs: as for `modify`; None: `example_input_array` of the LightningModule, where it is the model and
            has one, else the inputs of the first forward.
        writer: takes the place of the Trainer's loggers.
        update_loss: False: `training_step` calls `callback.manager.update_loss` itself.
        strict: False: resuming takes over what fits of the state of another recipe, and warns.
        set_max_epochs: True: the Trainer trains as many epochs as the recipe has; False: it never does; None: where it
            was given neither epochs nor steps.
        best_model: "finished": checkpoints that are kept for a monitored value (`save_top_k`) are only those in which
            pruning and quantization have done their work; "any": a best one of before that is warned about.
        export_path: an ONNX file that is written at the end; None: none.
        verify: False: that file is not compared with the model, layer by layer where it is quantized.

    Attributes:
        manager: the manager, at work during `fit`.
        exported: the summary of the file at `export_path`; None before.
        verification: what `verify_onnx` found; None before.

    Raises:
        RecipeError, ArgumentError: something that cannot be meant.
    """

    def __init__(
        self,
        recipe: Source | ScheduledModifierManager,
        *,
        recipe_variables: Variables = None,
        model: str | None = None,
        steps_per_epoch: SupportsIndex | Sized | None = None,
        distillation_teacher: nn.Module | Literal["self"] | None = None,
        grad_sampler: GradSampler | None = None,
        calibration_data: Iterable[Any] | None = None,
        sample_inputs: InputsLike | None = None,
        writer: ScalarWriter | None = None,
        update_loss: bool = True,
        strict: bool = True,
        set_max_epochs: bool | None = None,
        best_model: Literal["any", "finished"] = "any",
        export_path: str | os.PathLike[str] | None = None,
        verify: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(recipe, ScheduledModifierManager):
            if recipe_variables:
                raise ArgumentError("recipe_variables: the manager has its recipe already; give the recipe's file.")
            recipe = recipe.recipe
        self.manager = ScheduledModifierManager.from_yaml(recipe, recipe_variables)
        if model is not None and (not isinstance(model, str) or not model):
            raise ArgumentError(f'model: {model!r} is no name of a submodule; give "net", or None for all of it.')
        if best_model not in ("any", "finished"):
            raise ArgumentError(f'best_model: {best_model!r} is neither "any" nor "finished".')
        self.exported: ExportedModel | None = None
        self.verification: Verification | None = None
        self._name = model or ""
        self._epochs = EpochLength(self.manager, steps_in_epoch(steps_per_epoch))
        self._update_loss, self._strict, self._set_max_epochs = update_loss, strict, set_max_epochs
        self._best_model, self._export_path, self._verify = best_model, export_path, verify
        self._teacher, self._samples, self._writer = distillation_teacher, sample_inputs, writer
        self._grad_sampler, self._calibration_data = grad_sampler, calibration_data
        self._adds_loss = any(m.kind in ("distillation", "regularization") for m in self.manager.modifiers)
        self._loggers = LoggerWriter()
        self._module: weakref.ref[LightningModule] | None = None
        self._last: dict[str, Any] | None = None
        self._last_step = -1
        self._written: dict[str, dict[str, Any]] = {}
        self._handles: list[RemovableHandle] = []
        self._seen_inputs: Any = None
        self._reset_run()

    def _reset_run(self) -> None:
        """The state of one call of `fit`, at its beginning."""
        self._epochs.reset()
        self._resume: ResumedRun | None = None
        self._suspended = self._loss_due = False
        self._known_modules: set[str] | None = None
        self._new_modules: list[str] = []

    @property
    def state_key(self) -> str:
        """Tells the callbacks of two submodules apart."""
        return self._generate_state_key(model=self._name)

    # ------------------------------------------------------------------ before training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stands in between the Trainer and its strategy.

        Args:
            trainer: the Trainer.
            pl_module: the LightningModule.
            stage: "fit", "validate", "test" or "predict".
        """
        if stage == "fit":
            refuse_strategy(trainer)
        submodule(pl_module, self._name)
        stand_before(trainer, "training_step", self, self._around_training_step)
        stand_before(trainer, "backward", self, self._around_backward)
        stand_before(trainer, "load_model_state_dict", self, self._around_load_model_state_dict)
        stand_before(trainer, "save_checkpoint", self, self._around_save_checkpoint)
        if stage != "fit":
            return
        self.manager.finalize(early=True)
        self._reset_run()
        if self._known_module() is not pl_module:
            self._last, self._written = None, {}
        self._module = weakref.ref(pl_module)
        self._epochs.choose_max_epochs(trainer, self._set_max_epochs)
        if self._best_model == "finished":
            for checkpoint in self._monitoring(trainer):
                checkpoint.check_monitor_top_k = KeepFinished(checkpoint, self._is_finished)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where a checkpoint is resumed: the recipe first, then the structure, then the weights; Lightning loads the
        optimizers' states after this.

        Arguments are those of `setup`.
        """
        if self._resume is not None and not self.manager.attached:
            self._begin(trainer, pl_module, self._resume)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attaches the recipe: optimizers are there, a search for a learning rate is over, the data is known.

        Arguments are those of `setup`.
        """
        if self.manager.attached:
            self._epochs.resumed(trainer)
        elif self._last is not None and trainer.global_step == self._last_step > 0:
            # The same Trainer goes on, with optimizers that Lightning has made anew.
            self._begin(trainer, pl_module, ResumedRun(self._last, None))
            self._epochs.resumed(trainer)
        else:
            say_what_begins(trainer, None if self._last is None else self._last_progress())
            self._epochs.pace = self._epochs.count(trainer)
            self._epochs.offset = trainer.current_epoch if self._epochs.marks else 0
            self._begin(trainer, pl_module, None)
        self._loggers.offset = trainer.global_step - self.manager.step
        self._epochs.say_how_long(trainer)

    def _begin(self, trainer: Trainer, pl_module: LightningModule, resumed: ResumedRun | None) -> None:
        """Attaches the manager, as documented: `modify`, the manager's state, the weights."""
        model = submodule(pl_module, self._name)
        optimizers = self._optimizers_of(trainer, model)
        refuse_what_cannot_work(self.manager, trainer, self._name)
        teacher = self._teacher
        if isinstance(teacher, nn.Module):
            teacher = teacher.to(pl_module.device)
        weights = None if resumed is None else resumed.weights
        # In the process in which the module was trained before, it has the structure already.
        here = pl_module in STRUCTURED and (weights is None or fits_state(pl_module, weights))
        state = None
        if resumed is not None:
            self._epochs.load_state_dict(resumed.record["epochs"])
            state = resumed.record["manager"]
        inputs = self._sample_inputs(trainer, pl_module)
        if self._export_path is not None and inputs is None:
            # Before the manager's own hooks, which trace the model in its first forward.
            self._handles.append(model.register_forward_pre_hook(InertCallback(self._remember), with_kwargs=True))
        self._loggers.trainer = trainer
        # What is put in force on the way to the saved state was logged when it was.
        self._loggers.muted = resumed is not None
        try:
            given: Any = self.manager.modify(
                # With its wrapper, where that wraps the model itself.
                (trainer.strategy.model if not self._name else None) or model,
                optimizers[0] if len(optimizers) == 1 else optimizers,
                steps_per_epoch=self._epochs.pace,
                distillation_teacher=teacher,
                sample_inputs=inputs,
                writer=self._writer or self._loggers,
                grad_sampler=self._grad_sampler,
                calibration_data=self._calibration_data,
                state=state if here else None,
            )
            if state is not None and not here:
                self.manager.load_state_dict(state, strict=self._strict)
        finally:
            self._loggers.muted = False
        STRUCTURED.add(pl_module)
        after = given if len(optimizers) > 1 else [given]
        other = {id(old): new for old, new in zip(optimizers, after, strict=True) if old is not new}
        if other:
            # One that is no torch Optimizer comes back in a wrapper, which is to be stepped.
            trainer.strategy.optimizers = [other.get(id(old), old) for old in trainer.optimizers]
        if weights is not None and resumed is not None:
            others = [one for one in callbacks_of(trainer) if isinstance(one, SparsifyCallback) and one is not self]
            # Another callback may have its part of the structure still to put in place; the last one loads, or fails.
            if not any(other.waits for other in others):
                pl_module.load_state_dict(weights, strict=resumed.strict)

    @property
    def waits(self) -> bool:
        """True while a checkpoint is being resumed, and this callback's recipe is not attached yet."""
        return self._resume is not None and not self.manager.attached

    def _optimizers_of(self, trainer: Trainer, model: nn.Module) -> list[Any]:
        mine = {id(parameter) for parameter in model.parameters()}
        found = [
            optimizer
            for optimizer in trainer.optimizers
            if any(id(parameter) in mine for group in optimizer.param_groups for parameter in group["params"])
        ]
        if not found:
            raise StateError(
                f"configure_optimizers gave no optimizer of a parameter of {self._name or 'the module'}: a recipe "
                "follows the steps of the optimizer that trains it."
            )
        return found

    def _sample_inputs(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        inputs: Any = self._samples
        if inputs is None and not self._name:
            inputs = pl_module.example_input_array
        if inputs is None:
            return None
        return moved_tensors(trainer.precision_plugin.convert_input(inputs), pl_module.device)

    def _remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Positional ones by their names too, where there are others: an exporter is given one kind or the other.
        named = {**inspect.signature(module.forward).bind_partial(*args).arguments, **kwargs} if kwargs else args
        self._seen_inputs = moved_tensors(named, torch.device("cpu"))
        self._take_off()

    def _take_off(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # ------------------------------------------------------------------ epochs

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Marks the epoch for the recipe's clock.

        Arguments are those of `setup`.
        """
        if self.manager.attached:
            self._epochs.begin(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """At the first batch of an epoch its length is looked at again.

        Args:
            trainer: the Trainer.
            pl_module: the LightningModule.
            batch: the batch.
            batch_idx: its number in the epoch.
        """
        if self._new_modules:
            self._put_in_mode(pl_module)
        if not batch_idx and self.manager.attached:
            self._epochs.first_batch(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Marks the end of an epoch that ran to its end.

        Arguments are those of `setup`.
        """
        if self.manager.attached:
            self._epochs.end(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Knows which modules there are before the model is called for validation.

        Arguments are those of `setup`.
        """
        self._known_modules = {name for name, _ in pl_module.named_modules()} if self.manager.attached else None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds quantizers that were added in validation, the first forward after an epoch: the Trainer gives the modes
        of modules back by their names, and leaves these in eval mode (_ModuleMode, lightning 2.4 to 2.6).

        Arguments are those of `setup`.
        """
        known, self._known_modules = self._known_modules, None
        if known is not None:
            self._new_modules = [name for name, _ in pl_module.named_modules() if name not in known]

    def _put_in_mode(self, pl_module: LightningModule) -> None:
        for name in self._new_modules:
            parent = pl_module.get_submodule(name.rpartition(".")[0])
            pl_module.get_submodule(name).train(parent.training)
        self._new_modules = []

    # ------------------------------------------------------------------ in between the Trainer and its strategy

    def _around_training_step(self, trainer: Trainer, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A batch: the loss of the recipe is added to what `training_step` gives."""
        if not self.manager.attached:
            return inner(*args, **kwargs)
        # A search for a learning rate or a batch size runs without the callbacks (tuner/lr_finder.py of lightning
        # 2.4 to 2.6), and puts everything back afterwards.
        suspended = self not in callbacks_of(trainer)
        if suspended != self._suspended:
            self.manager.pause(suspended)
            self._suspended = suspended
        if suspended or not self._adds_loss or not self._update_loss:
            return inner(*args, **kwargs)
        self._loss_due = True
        output = inner(*args, **kwargs)
        if not trainer.lightning_module.automatic_optimization:
            return output
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            return output
        with trainer.precision_plugin.train_step_context():
            loss = self.manager.update_loss(loss)
        return {**output, "loss": loss} if isinstance(output, Mapping) else loss

    def _around_backward(
        self, trainer: Trainer, inner: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """A `manual_backward`: the loss of the recipe is added to the first of a `training_step`."""
        if self._loss_due and not trainer.lightning_module.automatic_optimization:
            self._loss_due = False
            with trainer.precision_plugin.train_step_context():
                loss = self.manager.update_loss(loss)
        return inner(loss, *args, **kwargs)

    def _around_load_model_state_dict(
        self, trainer: Trainer, inner: Callable[..., Any], checkpoint: Mapping[str, Any], strict: bool = True
    ) -> None:
        """Weights are loaded: the structure comes first."""
        pl_module = trainer.lightning_module
        record = (checkpoint.get(RECORDS) or {}).get(self._name)
        if self.manager.attached:
            # A search gives back what was there before it, or the strategy loads when all is set up.
            if record is not None:
                self.manager.load_state_dict(record["manager"], strict=self._strict)
            inner(checkpoint, strict=strict)
            return
        if record is None:
            inner(checkpoint, strict=strict)
            return
        weights = checkpoint["state_dict"]
        if trainer.state.fn == "fit":
            # A callback that averages weights saves the model's own under this key.
            averaged = any(hasattr(callback, "_average_model") for callback in callbacks_of(trainer))
            own = checkpoint.get("current_model_state", weights) if averaged else weights
            self._resume = ResumedRun(record, own, strict)
            # What does not fit yet is loaded when the recipe has put the structure in place, in on_fit_start.
            if pl_module in STRUCTURED and not fits_state(pl_module, weights):
                raise outgrown(pl_module, record)
            if isinstance(inner, Between) or fits_state(pl_module, weights):
                inner(checkpoint, strict=strict)
            return
        progress = RecipeProgress.from_state(record["progress"])
        if not progress.finished:
            warn_unfinished(progress)
        if pl_module not in STRUCTURED:
            self.manager.apply_structure(submodule(pl_module, self._name), state=record["manager"])
            if not isinstance(inner, Between):
                STRUCTURED.add(pl_module)
        elif not fits_state(pl_module, weights):
            raise outgrown(pl_module, record)
        inner(checkpoint, strict=strict)

    def _around_save_checkpoint(
        self,
        trainer: Trainer,
        inner: Callable[..., Any],
        checkpoint: dict[str, Any],
        filepath: str | os.PathLike[str],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """A checkpoint is written: those of weights alone do not ask callbacks, but hold the same structure."""
        self._put_record(trainer, checkpoint)
        record = checkpoint.get(RECORDS, {}).get(self._name)
        if record is not None:
            self._written[str(filepath)] = record["progress"]
        inner(checkpoint, filepath, *args, **kwargs)

    # ------------------------------------------------------------------ saved

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Puts the manager's state, and how far the recipe is, into the checkpoint of `trainer` and `pl_module`."""
        self._mask_averages(trainer)
        self._put_record(trainer, checkpoint)

    def state_dict(self) -> dict[str, Any]:
        """Which checkpoints were written, and how far the recipe was; empty before training."""
        return {"written": dict(self._written)} if self.manager.attached or self._last is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Knows again how far the recipe was in each checkpoint, from `state_dict`."""
        self._written = {**state_dict.get("written", {}), **self._written}

    def _put_record(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        record = self._record() if self.manager.attached else self._last
        if record is not None and self._known_module() is trainer.lightning_module and not self._suspended:
            checkpoint.setdefault(RECORDS, {}).setdefault(self._name, record)

    def _record(self) -> dict[str, Any]:
        module = self._known_module()
        assert module is not None
        return {
            "manager": self.manager.state_dict(),
            "progress": progress_of(self.manager, submodule(module, self._name)).state_dict(),
            "epochs": self._epochs.state_dict(),
        }

    def _known_module(self) -> LightningModule | None:
        return None if self._module is None else self._module()

    def _is_finished(self) -> bool:
        """True if pruning and quantization have done their work on the module that is trained."""
        module = self._known_module()
        if module is None or not self.manager.attached:
            return False
        return progress_of(self.manager, submodule(module, self._name)).finished

    def _last_progress(self) -> RecipeProgress:
        assert self._last is not None
        return RecipeProgress.from_state(self._last["progress"])

    # ------------------------------------------------------------------ averaged weights

    def _mask_averages(self, trainer: Trainer) -> None:
        """Zeros of the model are zeros of its averages; a callback may have the two swapped at the moment."""
        if not self.manager.attached:
            return
        averages = averages_beside(trainer)
        for module in [trainer.lightning_module, *(average for _, average in averages)] if averages else ():
            self.manager.apply_masks(submodule(module, self._name))

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Averages that are validated are pruned.

        Arguments are those of `setup`.
        """
        self._mask_averages(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Averages that take the model's place are pruned.

        Arguments are those of `setup`.
        """
        self._mask_averages(trainer)

    # ------------------------------------------------------------------ the end

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finalizes, says what is not as it seems, and exports where that is asked for.

        Arguments are those of `setup`.
        """
        if not self.manager.attached:
            return
        progress = self._end(trainer)
        if not is_trial(trainer):
            say_what_was_left(trainer, progress, self._written)
        if self._export_path is not None and trainer.is_global_zero:
            self._export(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves a usable `pl_module` of `trainer`; a checkpoint that is saved because of `exception` is whole."""
        if self.manager.attached:
            self._end(trainer)
        self._step_back(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves the strategy as it was.

        Arguments are those of `setup`.
        """
        self._step_back(trainer)

    def _end(self, trainer: Trainer) -> RecipeProgress:
        try:
            self._last, self._last_step = self._record(), trainer.global_step
            return self._last_progress()
        finally:
            self.manager.finalize(early=True)

    def _step_back(self, trainer: Trainer) -> None:
        self._take_off()
        for name in ("training_step", "backward", "load_model_state_dict"):
            stand_aside(trainer, name, self)
        for checkpoint in self._monitoring(trainer):
            vars(checkpoint).pop("check_monitor_top_k", None)

    def _monitoring(self, trainer: Trainer) -> list[Any]:
        return [one for one in trainer.checkpoint_callbacks if getattr(one, "monitor", None) is not None]

    def _export(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = submodule(pl_module, self._name)
        inputs = self._sample_inputs(trainer, pl_module)
        inputs = self._seen_inputs if inputs is None else inputs
        self._seen_inputs = None
        if inputs is None:
            raise StateError(
                "export_path: the model's inputs were never seen. Give SparsifyCallback(sample_inputs=...)."
            )
        assert self._export_path is not None
        self.exported, self.verification = export_finished(model, inputs, self._export_path, verify=self._verify)
