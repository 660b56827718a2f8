"""The callback for the Trainer of Hugging Face's transformers, 4.50 and newer: one line for all that a recipe needs."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import torch
from torch import Tensor, nn

from sparsify.errors import ArgumentError, SparsifyWarning, StateError, install_line
from sparsify.integrations.data_inputs import inputs_of_data
from sparsify.integrations.finished_model import export_finished
from sparsify.integrations.method_around import MethodAround
from sparsify.integrations.refused import refuse_cuts, refuse_foreign_weights
from sparsify.integrations.state_file import read_state, whole_checkpoint, write_state
from sparsify.integrations.trainer_log import TrainerLog, overall_sparsity
from sparsify.model.gradients import GradSampler
from sparsify.model.signature import InputsLike
from sparsify.model.targets import named_parameters
from sparsify.modifiers.base import Modifier
from sparsify.modifiers.magnitude_pruning import ConstantPruningModifier
from sparsify.modifiers.run_log import ScalarWriter
from sparsify.onnx.exported import ExportedModel
from sparsify.onnx.verify import Verification
from sparsify.quantization.plan import is_quantized, undo_plan
from sparsify.recipe import Recipe
from sparsify.training.manager import ScheduledModifierManager
from sparsify.training.phases import is_settled, settled_epoch

try:
    from transformers import TrainerCallback

    from sparsify.integrations.trainer_search import tell_of_additions, trainer_with
except ImportError as error:  # pragma: no cover
    raise ImportError(
        "sparsify.integrations.transformers needs transformers 4.50 or newer: "
        f"{install_line('transformers')} ({error})."
    ) from error

__all__ = ["SparsifyCallback", "SparsifyTrainerMixin"]

log = logging.getLogger("sparsify")


class SparsifyCallback(TrainerCallback):  # type: ignore[misc]
    """Applies a recipe while a Trainer trains: `Trainer(..., callbacks=[SparsifyCallback("recipe.yaml")])`.

    `modify` when the optimizer is made, distillation in the loss, the number of optimizer steps in an epoch as the
    Trainer counts them, the sparsity in its logs, the manager's state in its checkpoints, resuming, the choice of the
    best model among those where the recipe has done its work, and `finalize` at the end, also where training raises or
    is interrupted. A callback is told too little for that, so it puts itself around some methods of its one Trainer
    object (`compute_loss`, `create_optimizer`, `save_model`, ...); the class stays as it is, and what subclasses
    override keeps working.

    A second `train()` without a checkpoint goes on with the recipe where the first one left it: past its end it holds
    what there is.

    Checkpoint: `sparsify.pt` in the Trainer's own folder, with the manager's state and what waits to be logged. It is
    there before the file that makes the checkpoint whole (`trainer_state.json`).

    Args:
        recipe: a path, text, a Recipe, modifiers built in Python, or a manager.
        recipe_variables: values for the recipe's variables.
        steps_per_epoch: optimizer steps in an epoch of the recipe; None: as the Trainer counts them, and for a data set
            without a length `max_steps` divided by the recipe's epochs.
        best_model: "finished": with `load_best_model_at_end`, `save_strategy="best"` and early stopping, only
            evaluations from where the recipe has done its work compete; "any": all do, and a best one from before is
            warned about.
        log_layers: True: also logs the sparsity of each layer when it changes.
        export_path: an ONNX file that is written when training is over; None: none.
        verify: False: that file is not compared with the model, layer by layer where it is quantized.
        sample_inputs: inputs of one call of the model, as for `modify`; None: those of the first forward, and of the
            training set where these are not seen (compiled models, export).
        distillation_teacher, grad_sampler, calibration_data, writer: as for `modify`.

    Attributes:
        manager: the manager of the recipe.
        trainer: the Trainer that it was added to.
        exported: the summary of the file at `export_path`; None before.
        verification: what `verify_onnx` found; None before.

    Raises:
        RecipeError: the recipe says something that cannot be meant.
        ArgumentError: `best_model` is neither of the two.
    """

    def __init__(
        self,
        recipe: ScheduledModifierManager | Recipe | Sequence[Modifier] | str | os.PathLike[str],
        *,
        recipe_variables: Mapping[str, Any] | str | None = None,
        steps_per_epoch: SupportsIndex | None = None,
        best_model: Literal["finished", "any"] = "finished",
        log_layers: bool = False,
        export_path: str | os.PathLike[str] | None = None,
        verify: bool = True,
        sample_inputs: InputsLike | None = None,
        distillation_teacher: nn.Module | Literal["self"] | None = None,
        grad_sampler: GradSampler | None = None,
        calibration_data: Iterable[Any] | None = None,
        writer: ScalarWriter | None = None,
    ) -> None:
        if best_model not in ("finished", "any"):
            raise ArgumentError(f'best_model: {best_model!r} is neither "finished" nor "any".')
        if isinstance(recipe, ScheduledModifierManager):
            self.manager = recipe
        elif isinstance(recipe, list | tuple):
            self.manager = ScheduledModifierManager(recipe)
        else:
            self.manager = ScheduledModifierManager.from_yaml(recipe, recipe_variables)
        self.trainer: Any = None
        self.exported: ExportedModel | None = None
        self.verification: Verification | None = None
        self._given: dict[str, Any] = {
            "distillation_teacher": distillation_teacher,
            "grad_sampler": grad_sampler,
            "calibration_data": calibration_data,
        }
        self._steps_wanted = steps_per_epoch
        self._best_model = best_model
        self._export_path, self._verify, self._sample_inputs = export_path, verify, sample_inputs
        self._scalars = TrainerLog(writer, log_layers)
        self._run: ScheduledModifierManager | None = None
        """The manager at work: `manager`, or one that holds what a finished recipe left."""
        self._training = self._loop_begins = False
        self._steps_per_epoch = 0
        self._resume: str | None = None
        self._load: Callable[[], Any] | None = None
        self._rewind: dict[str, Any] | None = None
        self._last: tuple[nn.Module, dict[str, Any], list[str]] | None = None
        """Where the last run ended: its model, its state, and the names of what has a mask."""
        self._kept_out = 0
        self._told = False
        tell_of_additions(SparsifyCallback)

    # ------------------------------------------------------------------ its Trainer

    def attach(self, trainer: Any) -> None:
        """Puts itself around the methods of `trainer`; done by itself where the callback is given to a Trainer."""
        if self.trainer is trainer:
            return
        self.trainer = trainer
        for name in AROUND:
            original = getattr(trainer, name, None)
            if original is not None:
                setattr(trainer, name, MethodAround(getattr(self, f"_around_{name.strip('_')}"), original))

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finds the Trainer; `args`, `state`, `control` and `kwargs` are those of every callback."""
        self._find(kwargs)

    def _find(self, kwargs: Mapping[str, Any]) -> None:
        trainer = kwargs.get("trainer") or trainer_with(self)
        if trainer is not None:
            self.attach(trainer)

    # ------------------------------------------------------------------ around train()

    def _around_train(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        resume = args[0] if args else kwargs.get("resume_from_checkpoint")
        if resume is True:
            # Killed while it wrote a checkpoint, the Trainer would resume from half of one.
            resume = whole_checkpoint(Path(self.trainer.args.output_dir))
            if resume is not None:
                args, kwargs = (resume, *args[1:]), {k: v for k, v in kwargs.items() if k != "resume_from_checkpoint"}
        self._check()
        self._training = self._loop_begins = True
        self._kept_out = self._steps_per_epoch = 0
        self._resume = self._load = self._rewind = None
        self._told = False
        try:
            return original(*args, **kwargs)
        finally:
            # Where training raised or Ctrl-C came; at its end `on_train_end` did it.
            self._end()
            self._training = False

    def _check(self) -> None:
        """Refuses what cannot work, before anything is changed."""
        trainer = self.trainer
        if getattr(trainer, "is_deepspeed_enabled", False):
            refuse_foreign_weights("DeepSpeed")
        modifiers = self.manager.modifiers
        changing = [m for m in modifiers if m.kind in ("quantization", "structure", "distillation")]
        if trainer.args.n_gpu > 1 and not getattr(trainer, "is_model_parallel", False) and changing:
            raise StateError(
                f"the Trainer runs the model on {trainer.args.n_gpu} GPUs through nn.DataParallel, whose copies "
                f"{type(changing[0]).__name__} does not see. Start it with torchrun, or set CUDA_VISIBLE_DEVICES=0."
            )
        refuse_cuts(modifiers, trainer.args.world_size)

    def _around_set_initial_training_values(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        # The inner loop begins here, and begins again where a smaller batch is tried after running out of memory.
        self._loop_begins = True
        self._steps_per_epoch = self._steps(int(found[1]), sized=_length(args, kwargs) is not None)
        return found

    def _steps(self, counted: int, *, sized: bool) -> int:
        if self._steps_wanted is not None:
            return int(self._steps_wanted)
        if sized or self.manager.max_epochs < 1:
            return counted
        # No epochs in the data: those of the recipe are laid over max_steps.
        steps = max(1, counted // self.manager.max_epochs)
        log.warning(
            "the training set has no length: the %d epochs of the recipe have %d steps each, so that they fit into "
            "max_steps=%d. Pass steps_per_epoch to SparsifyCallback for other ones.",
            self.manager.max_epochs,
            steps,
            counted,
        )
        return steps

    def _around_create_optimizer(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        return self._begun(found)

    def _around_create_optimizer_and_scheduler(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        self._begun(self.trainer.optimizer)
        return found

    def _begun(self, optimizer: Any) -> Any:
        """Begins the run, where it is time for that; gives the optimizer to train with."""
        # Fully sharded models get their parameters later, when they are prepared.
        if self._training and self._loop_begins and not getattr(self.trainer, "is_fsdp_enabled", False):
            return self._begin(optimizer)
        return optimizer

    def _begin(self, optimizer: Any) -> Any:
        trainer = self.trainer
        self._loop_begins = False
        if self._run is not None:
            # A smaller batch is tried: to where this run began.
            if self._rewind is not None:
                self._run.load_state_dict(self._rewind)
            self._end()
        saved = None
        if self._resume is not None:
            saved = read_state(self._resume, "SparsifyCallback")
        elif self._last is not None and self._last[0] is trainer.model:
            saved = self._last[1]
        given = {**self._given, "writer": self._scalars, "sample_inputs": self._inputs_for_trace()}
        self._scalars.begin()
        if self._resume is not None and is_quantized(trainer.model):
            # A checkpoint of this very object's earlier run: its structure is put in place anew.
            undo_plan(trainer.model)
        weights = None
        if saved is not None and self._last is not None and self._resume is None:
            if saved["manager"].get("removals") or self._lost_layers(saved):
                return self._hold(optimizer, saved, self._last[2], given)
            if is_quantized(trainer.model):
                weights = {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}
                undo_plan(trainer.model)
        trainer.optimizer = self.manager.modify(trainer.model, optimizer, self._steps_per_epoch or None, **given)
        self._run = self.manager
        if saved is not None:
            # Structure first: then the weights fit.
            self.manager.load_state_dict(saved["manager"])
        if weights is not None:
            trainer.model.load_state_dict(weights)
        if self._load is not None:
            self._load()
        if saved is not None:
            # Not what was logged while the state was put in place: that run had logged it.
            self._scalars.waiting = dict(saved["waiting"])
        if getattr(trainer.args, "auto_find_batch_size", False):
            self._rewind = self.manager.state_dict()
        return trainer.optimizer

    def _lost_layers(self, saved: Mapping[str, Any]) -> bool:
        epoch = saved["manager"]["epoch"]
        return any(m.kind == "structure" and m.window.start <= epoch for m in self.manager.modifiers)

    def _hold(self, optimizer: Any, saved: dict[str, Any], masked: list[str], given: dict[str, Any]) -> Any:
        """Trains on a model whose channels or layers are gone: what is zero stays zero, what is quantized quantized."""
        epoch = float(saved["manager"]["epoch"])
        if epoch < settled_epoch(self.manager.modifiers):
            warnings.warn(
                f"the recipe was stopped at epoch {epoch:g} of {self.manager.max_epochs}, after it had removed "
                "channels or layers, and cannot be taken up in this process: zeros are held, nothing more is pruned. "
                "Build the Trainer anew with the original model and call train(resume_from_checkpoint=...).",
                SparsifyWarning,
                stacklevel=6,
            )
        zeros = [name for name in masked if name in named_parameters(self.trainer.model)]
        kept = [m for m in self.manager.modifiers if m.kind in ("learning_rate", "parameters", "logging")]
        held = [ConstantPruningModifier(params=zeros, start_epoch=0.0)] if zeros else []
        self._run = ScheduledModifierManager([*kept, *held])
        optimizer = self._run.modify(self.trainer.model, optimizer, self._steps_per_epoch or None, epoch, **given)
        self.trainer.optimizer = optimizer
        return optimizer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Checks that the recipe is at work, and that training (`args`, `state`) is as long as the recipe.

        Of `control` and `kwargs` it reads nothing but the Trainer.
        """
        if self.trainer is None:
            self._find(kwargs)
        if self.trainer is None or not self._training:
            raise StateError(
                "SparsifyCallback did not find the Trainer that it was given to, so nothing would be pruned. Give it "
                "in Trainer(callbacks=[...]), or derive your trainer from SparsifyTrainerMixin."
            )
        if self._loop_begins:
            self._begin(self.trainer.optimizer)
        # The Trainer's scheduler has just been made, and set its first learning rate.
        self._scalars.hold_rates(self.trainer.optimizer.param_groups)
        steps, epochs = self._steps_per_epoch, self.manager.max_epochs
        if self._run is not self.manager or not steps or not epochs:
            return
        # As far as the steps of a whole run go; the last epoch may be cut by max_steps or a fraction of an epoch.
        planned, needed = state.max_steps, steps * epochs
        if planned != needed and (planned < needed or planned >= needed + steps):
            what = (
                f"max_steps={args.max_steps}" if args.max_steps > 0 else f"num_train_epochs={args.num_train_epochs:g}"
            )
            then = (
                f"it ends in epoch {planned / steps:.4g}, and what the recipe says for later never happens"
                if planned < needed
                else f"from epoch {epochs} on nothing changes any more"
            )
            warnings.warn(
                f"the recipe has max_epochs={epochs}, {needed} optimizer steps of {steps} an epoch; TrainingArguments "
                f"has {what}, {planned} steps: {then}. Give num_train_epochs={epochs}, or end_epoch in the recipe.",
                SparsifyWarning,
                stacklevel=4,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Puts the recipe's learning rates back: every Trainer has a scheduler, which has just set others.

        Reads none of `args`, `state`, `control`, `kwargs`.
        """
        if self._scalars.rates:
            self._scalars.hold_rates(self.trainer.optimizer.param_groups)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends the recipe, tells by `args` and `state` where it was not through, and exports on request.

        Reads neither `control` nor `kwargs`.
        """
        if self._run is None:
            return
        run, trainer = self._run, self.trainer
        needed = settled_epoch(self.manager.modifiers)
        if run is self.manager and not self._told and not self._done(run.epoch):
            sparsity = overall_sparsity(run, trainer.model)
            warnings.warn(
                f"training ended at step {state.global_step} of {state.max_steps}, epoch {run.epoch:.4g} of the "
                f"recipe, which is through at epoch {needed:g}: the sparsity is {sparsity:.4g}. "
                "Train on with train(resume_from_checkpoint=True), or make the recipe shorter.",
                SparsifyWarning,
                stacklevel=4,
            )
        elif self._kept_out and args.load_best_model_at_end and state.best_model_checkpoint is None:
            warnings.warn(
                f"load_best_model_at_end: no checkpoint was evaluated and saved after the recipe was through at epoch "
                f"{needed:g}, so the last weights are kept. Train longer, or evaluate more often.",
                SparsifyWarning,
                stacklevel=4,
            )
        self._end()
        if self._export_path is not None and state.is_world_process_zero:
            # Without the mixed precision of training.
            self._export(trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False))

    def _end(self) -> None:
        run = self._run
        if run is None:
            return
        try:
            if run is self.manager:
                self._last = (self.trainer.model, self._state(), list(run.sparsity()))
        finally:
            self._run = None
            run.finalize(early=True)

    def _export(self, model: nn.Module) -> None:
        inputs = self._sample_inputs if self._sample_inputs is not None else self._inputs_of_data()
        assert self._export_path is not None
        self.exported, self.verification = export_finished(model, inputs, self._export_path, verify=self._verify)

    # ------------------------------------------------------------------ the loss and the log

    def _around_compute_loss(
        self, original: Callable[..., Any], model: nn.Module, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        run = self._run
        # Evaluation computes a loss as well, without gradients.
        if run is None or not torch.is_grad_enabled():
            return original(model, inputs, *args, **kwargs)
        wanted = bool(args[0] if args else kwargs.get("return_outputs", False))
        seen, labels = None, inputs.get("labels") if isinstance(inputs, Mapping) else None
        compiled = self.trainer.args.torch_compile and not args
        if compiled:
            # Compiled code calls no hooks: outputs and inputs are handed over.
            kwargs["return_outputs"], seen = True, dict(inputs)
        result = original(model, inputs, *args, **kwargs)
        loss, outputs = (result[0], result[1]) if wanted or compiled else (result, None)
        share = _groups_divided(self.trainer, kwargs.get("num_items_in_batch"))
        given = {"outputs": outputs, "inputs": ((), seen)} if compiled else {}
        scaled = loss * share if share != 1 else loss
        updated: Tensor = run.update_loss(scaled, labels=labels, **given)
        if updated is not scaled:
            loss = updated / share if share != 1 else updated
        return (loss, *result[1:]) if wanted else loss

    def _around_log(self, original: Callable[..., Any], logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        # Entries of training; those of evaluation and of the end of a run are left as they are.
        if self._run is not None and "loss" in logs:
            logs["sparsity"] = overall_sparsity(self._run, self.trainer.model)
            rate = self._scalars.rate_of_step(self._run.step)
            if rate is not None and "learning_rate" in logs:
                # The Trainer asks its scheduler, whose value was not in force.
                logs["learning_rate"] = rate
            logs |= self._scalars.waiting
            self._scalars.waiting.clear()
        return original(logs, *args, **kwargs)

    # ------------------------------------------------------------------ checkpoints

    def _state(self) -> dict[str, Any]:
        assert self._run is not None
        if self._run is self.manager or self._last is None:
            return {"manager": self._run.state_dict(), "waiting": dict(self._scalars.waiting)}
        # What is held is what the recipe left: its last state says it.
        return self._last[1]

    def _around_save_model(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        if self._run is not None:
            # On all ranks, since a sharded state is gathered; written by those that write the Trainer's.
            state = self._state()
            folder = args[0] if args else kwargs.get("output_dir")
            if self.trainer.args.should_save:
                write_state(folder or self.trainer.args.output_dir, state)
        return found

    def _around_load_from_checkpoint(self, original: Callable[..., Any], folder: str, *args: Any, **kwargs: Any) -> Any:
        self._resume = str(folder)
        if self._training and self._run is None:
            # The structure comes first, and the manager gives it once there is an optimizer.
            self._load = functools.partial(original, folder, *args, **kwargs)
            return None
        return original(folder, *args, **kwargs)

    def _around_determine_best_metric(self, original: Callable[..., bool], metrics: Any, *args: Any, **kw: Any) -> bool:
        run = self._run
        if run is None or self._best_model == "any" or self._done(run.epoch):
            return original(metrics, *args, **kw)
        name = str(self.trainer.args.metric_for_best_model or "")
        if name and (name if name.startswith("eval_") else f"eval_{name}") not in metrics:
            return original(metrics, *args, **kw)  # which says what is missing
        if not self._kept_out and name:
            log.warning(
                "the best model is chosen among those from epoch %g on, where the recipe has done its work; "
                'SparsifyCallback(best_model="any") takes earlier ones too.',
                settled_epoch(self.manager.modifiers),
            )
        self._kept_out += 1
        return False

    def _done(self, epoch: float) -> bool:
        return is_settled(self.manager.modifiers, epoch, self._steps_per_epoch)

    def _around_load_best_model(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._run is not self.manager:
            return original(*args, **kwargs)
        folder = Path(self.trainer.state.best_model_checkpoint)
        now = self.manager.epoch
        try:
            saved = read_state(folder, "SparsifyCallback")
            # Masks and structure of that moment first, then its weights fit.
            self.manager.load_state_dict(saved["manager"])
        except StateError as error:
            warnings.warn(
                f"load_best_model_at_end: {folder} cannot be loaded into the model as it is at epoch {now:.4g}, so "
                f"the last weights are kept: {error}",
                SparsifyWarning,
                stacklevel=4,
            )
            return None
        found = original(*args, **kwargs)
        if not self._done(self.manager.epoch):
            self._told = True
            sparsity = overall_sparsity(self.manager, self.trainer.model)
            warnings.warn(
                f"load_best_model_at_end: the best checkpoint is of epoch {self.manager.epoch:.4g}, before the recipe "
                f"was through at epoch {settled_epoch(self.manager.modifiers):g}: its sparsity is {sparsity:.4g}. "
                'Leave best_model at "finished" to choose among later ones.',
                SparsifyWarning,
                stacklevel=4,
            )
        return found

    # ------------------------------------------------------------------ inputs

    def _inputs_for_trace(self) -> InputsLike | None:
        if self._sample_inputs is not None:
            return self._sample_inputs
        if self.trainer.args.torch_compile and any(m.traces for m in self.manager.modifiers):
            return self._inputs_of_data()
        return None

    def _inputs_of_data(self) -> dict[str, Any]:
        trainer = self.trainer
        return inputs_of_data(trainer.model, trainer.train_dataset, trainer.data_collator, trainer.label_names or ())


class SparsifyTrainerMixin:
    """For trainers in which the callback does not find its object: `class MyTrainer(SparsifyTrainerMixin, Trainer)`.

    Not needed with the Trainer and Seq2SeqTrainer of transformers, nor with what derives from them. `args` and `kwargs`
    are those of the trainer.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._attach_callbacks()

    def add_callback(self, callback: Any) -> None:
        """Adds `callback`, as the Trainer does."""
        super().add_callback(callback)  # type: ignore[misc]
        self._attach_callbacks()

    def _attach_callbacks(self) -> None:
        for callback in getattr(getattr(self, "callback_handler", None), "callbacks", ()):
            if isinstance(callback, SparsifyCallback):
                callback.attach(self)


AROUND = (
    "train",
    "set_initial_training_values",
    "create_optimizer",
    "create_optimizer_and_scheduler",
    "compute_loss",
    "log",
    "save_model",
    "_load_from_checkpoint",
    "_determine_best_metric",
    "_load_best_model",
)
"""Methods of a Trainer that the callback stands around: all are in transformers 4.50.0 and 5.23.0."""


def _groups_divided(trainer: Any, num_items_in_batch: object) -> int:
    """The number of batches by which a Trainer takes the loss to be divided already: 1 where it divides later.

    What a recipe adds is a mean over one batch, and has to be divided as the task's loss is. The rule is that of
    `training_step` in transformers 4.50.0 and 5.23.0.
    """
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is None:
        takes = getattr(trainer, "model_accepts_loss_kwargs", False) and num_items_in_batch is not None
        scaled = takes or getattr(trainer, "compute_loss_func", None) is not None
    if not scaled:
        return 1
    return int(getattr(trainer, "current_gradient_accumulation_steps", trainer.args.gradient_accumulation_steps))


def _length(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    loader = kwargs.get("dataloader", args[1] if len(args) > 1 else None)
    try:
        return len(loader)
    except TypeError:
        return None
