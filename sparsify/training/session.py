"""The order of a step: modifiers attached to one model together, called around every step, and detached together."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsify.errors import SparsifyWarning, StateError
from sparsify.model import at_work
from sparsify.model.agreement import Agreement
from sparsify.model.gradients import GradSampler, sampling
from sparsify.model.optimizer_hooks import ModelCallback, StepHooks, innermost_optimizer, only_sets_up_state, skips_step
from sparsify.model.optimizer_parts import parts_with_state
from sparsify.model.sharding import reshard
from sparsify.model.signature import CallArguments, InputsLike, call_arguments
from sparsify.model.targets import named_parameters
from sparsify.model.wrappers import data_parallel, is_compiled, is_distributed, joins_uneven_inputs, unwrapped
from sparsify.modifiers.base import Active, Modifier, Run
from sparsify.modifiers.learning_rate_ledger import LearningRateLedger
from sparsify.modifiers.run_log import RunLog, ScalarWriter
from sparsify.pruning.masker import Masker
from sparsify.training.averages import Averages
from sparsify.training.carried_state import CarriedState
from sparsify.training.channel_removal import ChannelRemoval
from sparsify.training.checkpoint import Seal, keyed
from sparsify.training.given_optimizers import GivenOptimizers
from sparsify.training.model_inputs import TracingInputs
from sparsify.training.sharded_models import changes_weights, refuse_unshardable
from sparsify.training.timer import Timer
from sparsify.training.watch import Ended, Watch

if TYPE_CHECKING:
    from sparsify.pruning.removal import Removal

__all__: list[str] = []


class Session:
    """One model, its optimizers, if there are any, and the modifiers at work on them.

    On construction everything is checked and nothing changed; `start` puts in force what is due and hooks in; `finish`
    ends it all and may be called at any moment, and again where it was interrupted.

    Checkpoint: the clock, the masks, the removals of channels, and the state of each modifier by its key. Learning
    rates are recomputed from the epoch; what is in force is what the clock says. It travels inside the optimizer's
    state_dict, and the structure with the model's (`CarriedState`).

    Args:
        written: the modifiers as they stand in the recipe.
        modifiers: the same, in the order in which they are updated.
        model: the model that is trained, wrappers included.
        given: its optimizers, wrappers included; None: nothing is trained.
        timer: the clock, at the epoch where training starts.
        seal: the mark of the recipe on saved states.
        teacher: of distillation: a module, or "self".
        grad_sampler: losses to back-propagate for scores.
        calibration_data: batches of inputs.
        sample_inputs: inputs of one call of the model; None: those of the first forward.
        writer: a TensorBoard-like writer.
        forward_comes: False where the model will not be called before it has to be traced.
        goes_on: True where a state follows whose structure the model may have already.

    Raises:
        TargetError, DataError, ArgumentError, StateError: a modifier cannot work on this model.
    """

    def __init__(
        self,
        written: Sequence[Modifier],
        modifiers: Sequence[Modifier],
        model: nn.Module,
        given: GivenOptimizers | None,
        timer: Timer,
        *,
        seal: Seal,
        teacher: nn.Module | Literal["self"] | None = None,
        grad_sampler: GradSampler | None = None,
        calibration_data: Iterable[Any] | None = None,
        sample_inputs: InputsLike | None = None,
        writer: ScalarWriter | None = None,
        forward_comes: bool = True,
        goes_on: bool = False,
    ) -> None:
        self.model = unwrapped(model)
        # After an evaluation the outermost module may still hold whole parameters, which no optimizer steps.
        reshard(self.model)
        self.timer = timer
        self.hooks: list[StepHooks] = []
        self._given, self._seal = given, seal
        self._optimizers = () if given is None else tuple(innermost_optimizer(one) for one in given.optimizers)
        self._optimizer = None if given is None else self._optimizers[given.counting]
        self._handles: list[RemovableHandle] = []
        self._modifiers = list(written)
        self._modifiers_in_order = list(modifiers)
        # The optimizers, by position, whose step has begun and whose modifiers wait for its end; those that skip it.
        self._due: set[int] = set()
        self._skipped: set[int] = set()
        self._seen: tuple[CallArguments, Any] | None = None
        self._said_detached = False
        self.paused = False
        self.owner: weakref.ref[Any] | None = None
        # Holding zeros sends nothing; all else that works on weights does, at some steps.
        sends = any(m.kind in ("pruning", "quantization") and not m.holds for m in modifiers)
        self._uneven = data_parallel(model) if sends else None

        log = RunLog(writer)
        self.ledger = LearningRateLedger(self._optimizers, log)
        # An optimizer that is no torch Optimizer may keep no state, or keep it in another place.
        parts = [] if given is None else [part for one in given.optimizers for part in parts_with_state(one)]
        self._stateful = tuple({id(part.state): part for part in parts}.values())
        self.masker = Masker(self.model, self._stateful)
        self.averages = Averages(self.model, self.masker, self._give_structure)
        self.inputs = TracingInputs(
            self.model,
            None if sample_inputs is None else call_arguments(sample_inputs, self.model),
            calibration_data,
            compiled=is_compiled(model) or is_compiled(self.model),
            forward_comes=forward_comes,
        )
        self.channels = ChannelRemoval(
            self.model, self._modifiers, self.masker, self._stateful, self.inputs, self._resized
        )
        seen = (self.model, self.masker, self.averages)
        self.watch = Watch(*seen, timer, modifiers, self._optimizers, lambda: self.paused)
        self.carried = CarriedState(self, self.model, self._optimizer, seal)
        self.agreement = Agreement(self._place, lambda: self.carried.structure_checksum)
        self._run = run = Run(
            model=self.model,
            optimizer=self._optimizer,
            optimizers=self._optimizers,
            stepping=self._optimizer,
            masker=self.masker,
            learning_rates=self.ledger,
            log=log,
            inputs=self.inputs,
            channels=self.channels,
            teacher=teacher,
            grad_sampler=grad_sampler,
            steps_per_epoch=timer.given,
            goes_on=goes_on,
        )
        self.actives: dict[str, Active] = {}
        has_inputs = sample_inputs is not None or (calibration_data is not None and not forward_comes)
        refuse_unshardable(self.model, self._modifiers, teacher, has_inputs=has_inputs)
        if any(m.traces for m in modifiers):
            self.inputs.check_available()
        if is_distributed(model) and any(m.cuts() for m in modifiers):
            raise StateError(
                "channels cannot be removed while DistributedDataParallel holds their gradients. Mask them in training "
                "(shrink: false, no LayerThinningModifier), unwrap the model, and call sparsify.shrink(model, "
                "sample_inputs)."
            )
        keys = {id(modifier): key for key, modifier in keyed(modifiers).items()}
        try:
            # Attached as written: where two learning rates start together, the later in the file governs.
            for modifier in written:
                self.actives[keys[id(modifier)]] = modifier.attach(run)
            self.actives = {key: self.actives[key] for key in keys.values()}
            self._check_optimizer()
        except BaseException:
            self.finish()
            raise
        working = list(self.actives.values())
        # Only those that have something to do there: a step of a pruned model runs this Python 10,000 times an hour.
        self._updates = [a.update for a in working if _overrides(a, "update")]
        outside_in = sorted(working, key=lambda active: active.innermost)
        inside_out = sorted(working, key=lambda active: not active.innermost)
        self._closures = [a for a in working if _overrides(a, "after_closure")]
        self._befores = [a for a in outside_in if _overrides(a, "before_step")]
        self._afters = [a for a in inside_out if _overrides(a, "after_step")]
        self._losses = [a for a in working if _overrides(a, "loss")]

    def start(self, state: Mapping[str, Any] | None = None) -> Any:
        """Puts in force what is due, or was in `state`, and registers the hooks; gives the optimizers to train with.
        Where it raises, call `finish`."""
        at_work.enter(self.model, self)
        for index, optimizer in enumerate(self._given.optimizers if self._given is not None else ()):
            before, after = partial(self._before, index), partial(self._after, index)
            # The one whose steps are counted, and which takes parameters that a modifier adds.
            carried = self.carried if self._optimizers[index] is self._optimizer else None
            computed = partial(self._computed, index)
            self.hooks.append(StepHooks(optimizer, before, after, self._loaded, carried, computed))
            self.hooks[-1].attach()
        self.averages.watch()
        watch = ModelCallback(self._model_loaded)
        self._handles.append(self.model.register_load_state_dict_post_hook(watch))  # type: ignore[no-untyped-call]
        self._handles += self.carried.watch()
        if any(active.needs_outputs for active in self._losses):
            watch = ModelCallback(self._forward_done)
            self._handles.append(self.model.register_forward_hook(watch, with_kwargs=True))
        if state is None:
            self.update()
        else:
            # Nothing of epoch 0 before it: that would prune weights which have trained on since.
            self.carried.load(state)
        if self._given is not None and changes_weights(self._modifiers):
            self.agreement.begin()
        if self.agreement.due:
            begins = ModelCallback(self._forward_begins)
            self._handles.append(self.model.register_forward_pre_hook(begins, prepend=True))
        self.watch.start()
        return None if self._given is None else self._given.returned([hooks.given for hooks in self.hooks])

    def finish(self) -> None:
        """Removes hooks, detaches modifiers and applies masks for good; each of them, also where another one raises."""
        undo: list[Callable[[], object]] = [
            self.watch.close,
            self.channels.settle,
            self.inputs.close,
            self.agreement.end,
        ]
        undo += (handle.remove for handle in self._handles)
        undo += [hooks.remove for hooks in self.hooks]
        undo += [active.detach for active in reversed(self.actives.values())]
        undo += [self.averages.close, self.masker.finalize]
        undo.append(partial(at_work.leave, self))
        self._seen = None
        _all_of(undo)

    # ------------------------------------------------------------------ around a step

    def _before(self, index: int, closure: bool) -> None:
        """Before an optimizer steps; may be called twice. With a closure forward and backward are still to come."""
        self.watch.step_begins()
        if self.paused:
            return
        if only_sets_up_state(self._optimizers[index]):
            self._skipped.add(index)
            return
        if not self.timer.runs:
            raise StateError(
                "a step was taken, but how many make an epoch is not known. Pass steps_per_epoch to modify() "
                "(optimizer steps in an epoch, or the loader), or train with `for epoch in manager.epochs():`."
            )
        if self.carried.unsettled:
            self.carried.settle()
        self.agreement.attend()
        self.masker.follow()
        if not closure:
            self._refuse_waiting()
        run, optimizer = self._run, self._optimizers[index]
        run.closure, run.stepping = closure, optimizer
        self._due.add(index)
        if self._uneven is not None and joins_uneven_inputs(self._uneven):
            raise StateError(
                "a step was taken in join(): ranks that run out of batches stop stepping, and masks and ranges are "
                "compared and summed over all ranks. Give every rank as many batches (DistributedSampler does, or "
                "drop_last), or join(throw_on_early_termination=True)."
            )
        self.ledger.hold()
        if skips_step(optimizer):
            self._skipped.add(index)
            return
        self._skipped.discard(index)
        for active in self._befores:
            if active.each_optimizer or run.counts:
                active.before_step()
        if not closure:
            self._mask_gradients(optimizer)

    def _computed(self, index: int) -> None:
        """A closure inside of the step has computed gradients."""
        if self.paused or index in self._skipped:
            return
        for active in self._closures:
            if active.each_optimizer or self._run.counts:
                active.after_closure()
        self._mask_gradients(self._optimizers[index])

    def _mask_gradients(self, optimizer: Any) -> None:
        """Zeroes gradients of masked weights, so that what an optimizer remembers of them does not grow.

        Gradients of other optimizers' parameters are theirs: they are read, as they are, when those step.
        """
        if len(self._optimizers) > 1:
            self.masker.apply_to_grads({id(p) for group in optimizer.param_groups for p in group["params"]})
        else:
            self.masker.apply_to_grads()

    def _after(self, index: int) -> None:
        """After an optimizer stepped; may be called twice, or not at all where the step raised."""
        self._stepped(index)
        self.watch.step_ends()

    def _stepped(self, index: int) -> None:
        if self.paused:
            self.masker.apply()
            return
        run = self._run
        run.stepping = self._optimizers[index]
        due = index in self._due
        self._due.discard(index)
        if index in self._skipped:
            return
        if not due:
            # The outer one of two calls: the subclass may have moved weights after super().step().
            self.masker.apply()
            return
        # With a closure the forward was inside the step.
        self._refuse_waiting()
        for active in self._afters:
            if active.each_optimizer or run.counts:
                active.after_step()
        self.masker.apply()
        if run.counts:
            self.timer.tick()
            self._seen = None
            self.update()

    def _forward_begins(self, *_: object) -> None:
        # Ranges of activations are compared in the forward already. An evaluation may run on one rank alone.
        if torch.is_grad_enabled() and not sampling():
            self.agreement.attend(in_forward=True)

    def _place(self) -> str:
        """The step and the structure, which are the same on every rank."""
        return f"step {self.timer.step} (structure {self.carried.structure_checksum[:8]})"

    def _refuse_waiting(self) -> None:
        if self.inputs.awaited:
            raise StateError(
                "a step was taken, but the model's inputs were never seen: it was called in compiled code, or not as a "
                "whole. Pass sample_inputs to modify()."
            )

    def _loaded(self) -> None:
        self.ledger.loaded()

    def _model_loaded(self, *_: object) -> None:
        # Observers freeze only after data, and loading may have filled their buffers: ask again.
        # Masks wait for the next step: the manager's state may be loaded next, with other ones.
        self.watch.weights_loaded()
        self.update()
        self.watch.note_values()

    def update(self) -> None:
        """Puts in force what is due at the timer's clock; nothing while the model's structure is of another time."""
        if self.carried.waits_for is not None:
            return
        self.masker.follow()
        clock = self.timer.clock()
        for update in self._updates:
            update(clock)
        self.masker.note_ways()
        self.ledger.update(clock)
        self.averages.apply()
        if not self.watch.inside:
            self.watch.note_values()

    # ------------------------------------------------------------------ structure

    def _resized(self, removal: Removal) -> None:
        for active in self.actives.values():
            active.resized(removal)

    def structure(self, epoch: float, state: Mapping[str, Any] | None) -> None:
        """Gives the model the structure that it had at `epoch`, or in `state`."""
        if state is not None:
            for removal in self.channels.outstanding(state.get("removals", ()), self.channels.shapes()):
                self.channels.remove(removal)
        else:
            for modifier in self._modifiers:
                if any(cut <= epoch for cut in modifier.cuts()):
                    raise StateError(
                        f"{type(modifier).__name__} has removed channels by epoch {epoch:g}; which ones, only a state "
                        "knows. Pass state=manager.state_dict() as it was saved."
                    )
        for key, active in self.actives.items():
            active.structure(epoch, None if state is None else state["modifiers"].get(key))

    def _give_structure(self, copy: nn.Module) -> None:
        parts = (self._modifiers, self._modifiers_in_order, copy, None, Timer(None))
        Session(*parts, seal=self._seal, forward_comes=False).structure(
            self.timer.clock().epoch, self.structure_state()
        )

    def structure_state(self) -> dict[str, Any]:
        """The part of the state that tells the model's structure."""
        structural = {key: active for key, active in self.actives.items() if active.structural}
        return {
            "removals": list(self.channels.done),
            "modifiers": {key: active.state_dict() for key, active in structural.items()},
        }

    def load_structure(self, state: Mapping[str, Any]) -> None:
        """Gives the model the structure of `state`, also one that it had before; the clock and the masks wait for the
        whole state.

        Raises:
            StateError: it does not fit; nothing was changed.
        """
        removals = self.channels.outstanding(state["removals"], self.channels.shapes())
        for key, saved in state["modifiers"].items():
            self.actives[key].check_state(saved)
        self.agreement.call()
        for removal in removals:
            self.channels.remove(removal)
        for key, saved in state["modifiers"].items():
            self.actives[key].load_state_dict(saved)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter and buffer, by clean name."""
        return self.channels.shapes()

    @property
    def step(self) -> int:
        """The number of real optimizer steps."""
        return self.timer.step

    @property
    def quantizes(self) -> bool:
        """True if the recipe quantizes."""
        return any(modifier.kind == "quantization" for modifier in self._modifiers)

    @property
    def removes_channels(self) -> bool:
        """True if the recipe removes channels."""
        return any(modifier.cuts() for modifier in self._modifiers)

    # ------------------------------------------------------------------ outputs

    def _forward_done(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        # An evaluation between forward and loss must not take the place of the batch in training.
        if torch.is_grad_enabled():
            self._seen = ((args, kwargs), output)

    def update_loss(self, loss: Tensor, outputs: Any, inputs: Any, labels: Any) -> Tensor:
        """`loss` with what every modifier adds to it."""
        self.watch.loss_asked()
        seen_inputs, seen_outputs = self._seen or (None, None)
        if outputs is None:
            outputs = seen_outputs
        inputs = seen_inputs if inputs is None else call_arguments(inputs, self.model)
        for active in self._losses:
            loss = active.loss(loss, outputs=outputs, inputs=inputs, labels=labels)
        return loss

    # ------------------------------------------------------------------ saved and resumed

    def state_dict(self) -> dict[str, Any]:
        """The time, the masks, and what modifiers cannot recompute."""
        return {
            **self.timer.state_dict(),
            "masks": self.masker.state_dict(),
            **({"removals": list(self.channels.done)} if self.channels.done else {}),
            "modifiers": {key: active.state_dict() for key, active in self.actives.items()},
        }

    def _check_masks(self, saved: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuses masks that do not fit parameters of these shapes, with a StateError that names the first."""
        parameters = named_parameters(self.model)
        for name, mask in saved["masks"].items():
            here = shapes[name] if name in parameters else None
            if here != tuple(mask["shape"]):
                what = "does not have" if here is None else f"has in shape {here}"
                raise StateError(
                    f"the state holds a mask of shape {tuple(mask['shape'])} for {name!r}, which "
                    f"{type(self.model).__name__} {what}. Load the state of this model, or give strict=False to take "
                    "over what fits."
                )

    def load_state_dict(self, state: Mapping[str, Any], strict: bool) -> None:
        """Goes on from `state`, whose seal was checked; the rest of it is checked before anything changes.

        Raises:
            StateError: something in it does not fit.
        """
        left: list[str] = []
        shapes, masks = self.channels.shapes(), state["masks"]
        saved = {key: state["modifiers"][key] for key in self.actives if key in state["modifiers"]}
        removals: list[Removal] = []
        try:
            removals = self.channels.outstanding(state.get("removals", ()), shapes)
        except StateError as error:
            if strict:
                raise
            left.append(f"the removal of channels: {error}")
            # Those that mask and remove channels start anew with it.
            cutting = {key for key, modifier in keyed(self._modifiers_in_order).items() if modifier.cuts()}
            saved = {key: one for key, one in saved.items() if key not in cutting}
        if strict:
            self._check_masks(state["masks"], shapes)
            for key, one in saved.items():
                self.actives[key].check_state(one)
        self.agreement.call()
        self.timer.load_state_dict(state)
        # Structure first: what follows is about parameters as they are then.
        for removal in removals:
            self.channels.remove(removal)
        for key, one in saved.items():
            if strict:
                self.actives[key].load_state_dict(one)
            else:
                reason = self.actives[key].take_over(one)
                left += [] if reason is None else [f"{key}: {reason}"]
                masks = masks if reason is None else self.channels.masks_left(masks, key)
        # The optimizer's own state says what it remembers of masked weights, whether it is loaded before or after this.
        self.masker.bind(None)
        try:
            self.masker.load_state_dict(masks, strict=strict)
        finally:
            self.masker.bind(self._stateful)
        if left:
            text = "\n  ".join(["of the state was left out what does not fit:", *left])
            warnings.warn(text, SparsifyWarning, stacklevel=4)
        self.update()

    # ------------------------------------------------------------------ what can go wrong

    @property
    def attached(self) -> bool:
        """True if the steps of all optimizers are seen, and where there is no optimizer."""
        return all(hooks.attached for hooks in self.hooks)

    @property
    def trains(self) -> bool:
        """True if there is an optimizer whose steps are seen."""
        return bool(self.hooks)

    @property
    def modifiers(self) -> list[Modifier]:
        """The modifiers as they are written."""
        return self._modifiers

    @property
    def owned(self) -> bool:
        """True if the manager is alive, which can end it."""
        return self.owner is not None and self.owner() is not None

    def look(self, where: str) -> None:
        """Warns once of what is wrong with the weights; `where` says who asks."""
        self.watch.look(where)

    def sparsity(self) -> dict[str, float]:
        """The fraction of zeros in every masked parameter as its weights are."""
        self.look("sparsity()")
        return Ended(self.timer.clock(), self.model, self.masker.names).note()

    def epoch_ends(self, epoch: int) -> None:
        """Marks for the clock that an epoch is over; warns of what went wrong in it."""
        self.warn_if_detached()
        steps = self.timer.end(epoch)
        self.watch.epoch_ends(epoch, steps)
        if steps:
            self.look("epochs()")

    def end(self) -> None:
        """Ends the run: by its manager, where there is one."""
        manager = None if self.owner is None else self.owner()
        if manager is not None:
            manager.finalize()
        else:
            self.finish()

    def warn_if_detached(self) -> None:
        """Warns once where the optimizer has lost the hooks."""
        if not self.attached and not self._said_detached:
            self._said_detached = True
            self.watch.told()
            warnings.warn(
                "the optimizer has lost the manager's hooks, so its steps are not seen and masks are not applied. Was "
                "it rebuilt? Call finalize(), then modify() again with the optimizer that steps.",
                SparsifyWarning,
                stacklevel=4,
            )

    def _check_optimizer(self) -> None:
        mine = {id(parameter) for parameter in named_parameters(self.model).values()}
        theirs = [p for one in self._optimizers for group in one.param_groups for p in group["params"]]
        if mine and theirs and not any(id(parameter) in mine for parameter in theirs):
            warnings.warn(
                "none of the optimizer's parameters is a parameter of this model: was the model copied or moved after "
                "the optimizer was made? Make the optimizer from model.parameters() of the model that is trained.",
                SparsifyWarning,
                stacklevel=4,
            )


def _overrides(active: Active, method: str) -> bool:
    return getattr(type(active), method) is not getattr(Active, method)


def _all_of(calls: Sequence[Callable[[], object]]) -> None:
    """Makes every call, also after one that raises (Ctrl-C too); raises the first exception at the end."""
    first: BaseException | None = None
    for call in calls:
        try:
            call()
        except BaseException as error:
            first = first or error
    if first is not None:
        raise first
