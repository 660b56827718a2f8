"""A list of modifiers at work on one model: attached together, called around every step, taken off together."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsify.errors import DataError, RecipeError, SparsifyWarning, StateError
from sparsify.model.optimizer_hooks import ModelCallback, StepHooks, innermost_optimizer, skips_step
from sparsify.model.signature import CallArguments, batch_arguments, call_arguments
from sparsify.model.targets import named_parameters
from sparsify.model.wrappers import is_compiled, is_distributed, unwrapped
from sparsify.modifiers.base import Active, Modifier, Run
from sparsify.modifiers.learning_rate_ledger import LearningRateLedger
from sparsify.modifiers.run_log import RunLog
from sparsify.pruning.masker import Masker
from sparsify.training.checkpoint import checksum
from sparsify.training.timer import Timer

if TYPE_CHECKING:
    from sparsify.pruning.groups import ChannelGroups
    from sparsify.pruning.removal import Removal

__all__: list[str] = []


class Session:
    """One model, one optimizer or none, and the modifiers at work on them.

    On construction everything is checked and nothing changed; `start` puts in force what is due and hooks in; `finish`
    ends it all and may be called at any moment, and again where it was interrupted.

    Args:
        written: the modifiers as they stand in the recipe.
        modifiers: the same, in the order in which they are updated.

    Raises:
        TargetError, DataError, ArgumentError, StateError: a modifier cannot work on this model.
    """

    def __init__(
        self,
        written: Sequence[Modifier],
        modifiers: Sequence[Modifier],
        model: nn.Module,
        optimizer: Any,
        timer: Timer,
        *,
        teacher: nn.Module | Literal["self"] | None = None,
        grad_sampler: Any = None,
        calibration_data: Iterable[Any] | None = None,
        sample_inputs: Any = None,
        writer: Any = None,
        waits_for_inputs: bool = True,
    ) -> None:
        self.model = unwrapped(model)
        self.timer = timer
        self.hooks: StepHooks | None = None
        self._optimizer = None if optimizer is None else innermost_optimizer(optimizer)
        self._given = optimizer
        self._compiled = is_compiled(model) or is_compiled(self.model)
        self._waits_for_inputs = waits_for_inputs
        self._inputs: CallArguments | None = None if sample_inputs is None else call_arguments(sample_inputs)
        self._waiting: list[Callable[[tuple[Any, ...], dict[str, Any]], None]] = []
        self._handles: list[RemovableHandle] = []
        self._watch: RemovableHandle | None = None
        self._trace: Any = None
        self._channel_groups: ChannelGroups | None = None
        self._claims: list[tuple[Modifier, Mapping[str, Iterable[str]]]] = []
        self._removals: list[dict[str, Any]] = []
        self._removing: Removal | None = None
        self._modifiers = list(written)
        self._due = False
        self._skipped = False
        self._seen: tuple[CallArguments, Any] | None = None
        self._said_detached = False

        log = RunLog(writer)
        self.ledger = LearningRateLedger(self._optimizer, log)
        # What is no torch Optimizer may keep no state, or where nobody knows.
        self._stateful = self._optimizer if isinstance(getattr(self._optimizer, "state", None), Mapping) else None
        self.masker = Masker(self.model, self._stateful)
        self._run = run = Run(
            model=self.model,
            optimizer=self._optimizer,
            masker=self.masker,
            learning_rates=self.ledger,
            log=log,
            on_inputs=self._on_inputs,
            trace=self._traced,
            channel_groups=self._found,
            claim=self._claim,
            shrink=self._shrink,
            rerouted=self._rerouted,
            teacher=teacher,
            grad_sampler=grad_sampler,
            calibration_data=calibration_data,
            sample_inputs=self._inputs,
            steps_per_epoch=timer.given,
        )
        self.actives: dict[str, Active] = {}
        if self._compiled and self._inputs is None and any(m.traces for m in modifiers) and waits_for_inputs:
            raise self._compiled_needs_inputs()
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
        self._befores = [a.before_step for a in outside_in if _overrides(a, "before_step")]
        self._afters = [a.after_step for a in inside_out if _overrides(a, "after_step")]
        self._losses = [a for a in working if _overrides(a, "loss")]

    def start(self) -> Any:
        """Puts in force what is due and hooks in; gives the optimizer to go on with. Where it fails, call `finish`."""
        if self._given is not None:
            self.hooks = StepHooks(self._given, self._before, self._after, self._loaded)
            self.hooks.attach()
        watch = ModelCallback(self._model_loaded)
        self._handles.append(self.model.register_load_state_dict_post_hook(watch))  # type: ignore[no-untyped-call]
        if any(active.needs_outputs for active in self._losses):
            watch = ModelCallback(self._forward_done)
            self._handles.append(self.model.register_forward_hook(watch, with_kwargs=True))
        self.update()
        return None if self.hooks is None else self.hooks.given

    def finish(self) -> None:
        """Hooks off, modifiers detached, masks baked in; each of them, also where another one raises."""
        undo: list[Callable[[], object]] = [self._settle, *(handle.remove for handle in self._handles)]
        if self.hooks is not None:
            undo.append(self.hooks.remove)
        undo += [active.detach for active in reversed(self.actives.values())]
        undo.append(self.masker.finalize)
        self._waiting.clear()
        self._seen = None
        _all_of(undo)

    # ------------------------------------------------------------------ around a step

    def _before(self, closure: bool) -> None:
        """Before the optimizer steps; may be called twice. With a closure forward and backward are still to come."""
        if not self.timer.runs:
            raise StateError(
                "a step was taken, but how many make an epoch is not known. Pass steps_per_epoch to modify() "
                "(optimizer steps in an epoch, or the loader), or train with `for epoch in manager.epochs():`."
            )
        if not closure:
            self._refuse_waiting()
        self._run.closure = closure
        self._skipped = skips_step(self._optimizer)
        self.ledger.hold()
        if not self._skipped:
            for before in self._befores:
                before()
        self._due = True

    def _after(self) -> None:
        """After the optimizer stepped; may be called twice, or not at all where the step raised."""
        if self._skipped:
            self._due = False
            return
        if not self._due:
            # The outer one of two calls: the subclass may have moved weights after super().step().
            self.masker.apply()
            return
        self._due = False
        # With a closure the forward was inside the step.
        self._refuse_waiting()
        for after in self._afters:
            after()
        self.masker.apply()
        self.timer.tick()
        self._seen = None
        self.update()

    def _refuse_waiting(self) -> None:
        if self._waiting:
            raise StateError(
                "a step was taken, but the model's inputs were never seen: it was called in compiled code, or not as a "
                "whole. Pass sample_inputs to modify()."
            )

    def _loaded(self) -> None:
        self.ledger.loaded()

    def _model_loaded(self, *_: Any) -> None:
        # What is due may hang on values: a range that was never seen is not frozen, and now it may have been seen.
        # Masks wait for the next step: the manager's state may be loaded next, with other ones.
        self.update()

    def update(self) -> None:
        """Puts in force what is due at the timer's clock."""
        clock = self.timer.clock()
        for update in self._updates:
            update(clock)
        self.ledger.update(clock)

    # ------------------------------------------------------------------ inputs and outputs

    def _on_inputs(self, callback: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> None:
        if self._inputs is None and not self._waits_for_inputs:
            self._inputs = self._first_of_calibration()
        if self._inputs is not None:
            callback(*self._inputs)
            return
        if self._compiled:
            raise self._compiled_needs_inputs()
        if not self._waiting:
            begins = ModelCallback(self._forward_begins)
            self._watch = self.model.register_forward_pre_hook(begins, with_kwargs=True)
            self._handles.append(self._watch)
        self._waiting.append(callback)

    def _first_of_calibration(self) -> CallArguments:
        """Where no forward will come: the inputs of the first batch of calibration data."""
        data = self._run.calibration_data
        if data is None:
            raise StateError(
                "this recipe has to trace the model: pass sample_inputs (or calibration_data, or the state= of a saved "
                "run, where there is such an argument)."
            )
        batches = iter(data)
        first = next(batches, None)
        if first is None:
            raise DataError("calibration_data holds no batch.")
        if batches is data:
            # It can be gone through only once: the first batch is put back.
            self._run.calibration_data = chain([first], batches)
        return batch_arguments(self.model, first)

    def _compiled_needs_inputs(self) -> StateError:
        return StateError("this recipe has to trace the model, and a compiled one shows no inputs: pass sample_inputs.")

    def _forward_begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The first forward: whoever waited for inputs gets them."""
        while self._waiting:
            self._waiting[0](args, kwargs)
            self._waiting.pop(0)
        if self._watch is not None:
            self._watch.remove()

    def _traced(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._trace is None:
            # Here and not above: torch.export is slow to import, and pruning never asks for it.
            from sparsify.model.trace import trace

            self._trace = trace(self.model, args, kwargs)
        return self._trace

    # ------------------------------------------------------------------ channels

    def _found(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ChannelGroups:
        if self._channel_groups is None:
            # Here and not above, as in `_traced`.
            from sparsify.pruning.groups import find
            from sparsify.pruning.shrinking import dry_run

            self._channel_groups = dry_run(self.model, find(self.model, args, kwargs), args, kwargs)
        return self._channel_groups

    def _rerouted(self) -> None:
        self._trace = self._channel_groups = None

    def _claim(self, modifier: Modifier, channel_groups: Mapping[str, Iterable[str]]) -> None:
        name = type(modifier).__name__
        for other, theirs in self._claims:
            both = [channel_group for channel_group in channel_groups if channel_group in theirs]
            if other is not modifier and both and modifier.window.overlaps(other.window):
                raise RecipeError(
                    f"{name} and {type(other).__name__} mask the same channels, those of {both[0]!r}, from epoch "
                    f"{modifier.window.start:g} to {modifier.window.end:g} and from {other.window.start:g} to "
                    f"{other.window.end:g}. Let one end where the other starts, or take names out of one."
                )
        masked = {tensor for tensors in channel_groups.values() for tensor in tensors}
        for other in self._modifiers:
            if other.kind != "pruning" or other.whole_channels or other.window.start >= modifier.window.end:
                continue
            both = [tensor for tensor in other.targets(self.model) if tensor in masked]
            if both:
                raise RecipeError(
                    f"{type(other).__name__} prunes {both[0]!r} from epoch {other.window.start:g}, but until "
                    f"{modifier.window.end:g} {name} masks channels that this weight gives or reads. Let it start at "
                    f"epoch {modifier.window.end:g} or later, or leave the name out."
                )
        self._claims = [claim for claim in self._claims if claim[0] is not modifier] + [(modifier, channel_groups)]

    def _shrink(self, removal: Removal) -> None:
        from sparsify.pruning.removal import remove

        # Remembered first: where Ctrl-C comes in between, `finish` brings the masks up to it.
        self._removing = removal
        remove(self.model, removal, self._stateful)
        self._settle()

    def _settle(self) -> None:
        """After channels were removed: masks, the trace and modifiers follow. Nothing to do where none were."""
        removal = self._removing
        if removal is None:
            return
        shapes = self._shapes()
        if all(shapes.get(name) == tuple(after) for name, after in removal.after.items()):
            self.masker.resize(removal)
            self._rerouted()
            self._removals.append(removal.state_dict())
            for active in self.actives.values():
                active.resized(removal)
        self._removing = None

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        from sparsify.pruning.removal import tensors

        return {name: tuple(tensor.shape) for name, tensor in tensors(self.model).items()}

    def _to_remove(self, saved: Sequence[Any], shapes: dict[str, tuple[int, ...]]) -> list[Removal]:
        """What was removed when a state was saved and is here still; `shapes` become those after it.

        Raises:
            StateError: something else was removed here, or the model is another one.
        """
        if not saved and not self._removals:
            return []
        from sparsify.pruning.removal import Removal

        done = len(self._removals)
        if [checksum(one) for one in saved[:done]] != [checksum(one) for one in self._removals]:
            raise StateError(
                "channels were removed from this model that are there, or other ones, in the one whose state this is, "
                "and what was removed cannot come back. Call modify() on a fresh model, at epoch 0, then load the "
                "state: it says the epoch, and what is removed."
            )
        removals = [Removal.from_state(one) for one in saved[done:]]
        for removal in removals:
            for name, before in removal.before.items():
                if shapes.get(name) != tuple(before):
                    raise StateError(
                        f"the state was saved after channels of {name!r} were removed, of shape {tuple(before)} then; "
                        f"in {type(self.model).__name__} it has {shapes.get(name, 'no such tensor')}. Load it into a "
                        "model as it was before the first modify()."
                    )
            shapes.update({name: tuple(after) for name, after in removal.after.items()})
        return removals

    def structure(self, epoch: float, state: Mapping[str, Any] | None) -> None:
        """Gives the model the structure that it had at `epoch`, or in `state`."""
        if state is not None:
            for removal in self._to_remove(state.get("removals", ()), self._shapes()):
                self._shrink(removal)
        else:
            for modifier in self._modifiers:
                if any(cut <= epoch for cut in modifier.cuts()):
                    raise StateError(
                        f"{type(modifier).__name__} has removed channels by epoch {epoch:g}; which ones, only a state "
                        "knows. Pass state=manager.state_dict() as it was saved."
                    )
        for key, active in self.actives.items():
            active.structure(epoch, None if state is None else state["modifiers"].get(key))

    # ------------------------------------------------------------------ outputs

    def _forward_done(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # An evaluation between forward and loss must not take the place of the batch in training.
        if torch.is_grad_enabled():
            self._seen = ((args, kwargs), output)

    def update_loss(self, loss: Tensor, outputs: Any, inputs: Any, labels: Any) -> Tensor:
        """`loss` with what every modifier adds to it."""
        seen_inputs, seen_outputs = self._seen or (None, None)
        if outputs is None:
            outputs = seen_outputs
        inputs = seen_inputs if inputs is None else call_arguments(inputs)
        for active in self._losses:
            loss = active.loss(loss, outputs=outputs, inputs=inputs, labels=labels)
        return loss

    # ------------------------------------------------------------------ saved and resumed

    def state_dict(self) -> dict[str, Any]:
        """The time, the masks, and what modifiers cannot recompute."""
        return {
            **self.timer.state_dict(),
            "masks": self.masker.state_dict(),
            **({"removals": list(self._removals)} if self._removals else {}),
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
        shapes = self._shapes()
        removals = self._to_remove(state.get("removals", ()), shapes)
        if strict:
            self._check_masks(state["masks"], shapes)
        for key, active in self.actives.items():
            if key in state["modifiers"]:
                active.check_state(state["modifiers"][key])
        self.timer.load_state_dict(state)
        # Structure first: what follows is about parameters as they are then.
        for removal in removals:
            self._shrink(removal)
        for key, active in self.actives.items():
            if key in state["modifiers"]:
                active.load_state_dict(state["modifiers"][key])
        # The optimizer's own state says what it remembers of masked weights, whether it is loaded before or after this.
        self.masker.bind(None)
        try:
            self.masker.load_state_dict(state["masks"], strict=strict)
        finally:
            self.masker.bind(self._stateful)
        self.update()

    # ------------------------------------------------------------------ what can go wrong

    @property
    def attached(self) -> bool:
        """Whether steps of the optimizer reach us; True where there is none."""
        return self.hooks is None or self.hooks.attached

    def warn_if_detached(self) -> None:
        """Says once that the hooks are gone."""
        if not self.attached and not self._said_detached:
            self._said_detached = True
            warnings.warn(
                "the optimizer has lost the manager's hooks, so its steps are not seen and masks are not applied. Was "
                "it rebuilt? Call finalize(), then modify() again with the optimizer that steps.",
                SparsifyWarning,
                stacklevel=4,
            )

    def _check_optimizer(self) -> None:
        if self._optimizer is None:
            return
        mine = {id(parameter) for parameter in named_parameters(self.model).values()}
        theirs = [p for group in self._optimizer.param_groups for p in group["params"]]
        if mine and theirs and not any(id(parameter) in mine for parameter in theirs):
            warnings.warn(
                "none of the optimizer's parameters is a parameter of this model: was the model copied or moved after "
                "the optimizer was made? Make the optimizer from model.parameters() of the model that is trained.",
                SparsifyWarning,
                stacklevel=4,
            )


def keyed(modifiers: Sequence[Modifier]) -> dict[str, Modifier]:
    """Modifiers under names for saved state: the class, numbered from the second on, so that others may come and go."""
    found: dict[str, Modifier] = {}
    for modifier in modifiers:
        name = type(modifier).__name__
        count = sum(key.partition("#")[0] == name for key in found)
        found[f"{name}#{count + 1}" if count else name] = modifier
    return found


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
