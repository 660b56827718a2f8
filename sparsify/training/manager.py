"""The life cycle of a recipe: attached to a model and an optimizer, stepped, saved, resumed, finalized."""

from __future__ import annotations

import math
import os
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, Literal, SupportsIndex

from torch import Tensor, nn

from sparsify.errors import ArgumentError, SparsifyWarning, StateError
from sparsify.model.gradients import GradSampler
from sparsify.model.signature import InputsLike, check_module
from sparsify.model.wrappers import unwrapped
from sparsify.modifiers.base import Modifier
from sparsify.modifiers.run_log import ScalarWriter
from sparsify.modifiers.schedule import Clock
from sparsify.output.tables import DisplayedText
from sparsify.recipe import Recipe, read_recipe
from sparsify.recipe.recipe import Modifiers, Source, Variables
from sparsify.training.applied_recipes import note_recipe
from sparsify.training.checkpoint import Seal
from sparsify.training.given_optimizers import GivenOptimizers, OneOrMoreOptimizers, given_optimizers
from sparsify.training.phases import Phase, is_quantizing, phase_at
from sparsify.training.session import Session
from sparsify.training.takeover import check_recipe, runs_to_end
from sparsify.training.timer import Timer, starting_epoch, steps_in_epoch
from sparsify.training.watch import Ended

__all__ = ["ScheduledModifierManager"]

Teacher = nn.Module | Literal["self"] | None


class ScheduledModifierManager(DisplayedText):
    """Applies a recipe to a model while it trains.

    ::

        manager = ScheduledModifierManager.from_yaml("recipe.yaml")
        optimizer = manager.modify(model, optimizer, steps_per_epoch=len(loader))
        for epoch in range(manager.max_epochs):
            for x, y in loader:
                optimizer.zero_grad()
                manager.update_loss(criterion(model(x), y)).backward()
                optimizer.step()
        manager.finalize(model)

    Checkpoint: `state_dict` holds the number of real optimizer steps, the masks, and what modifiers cannot recompute.
    It is inside the optimizer's state_dict too, so a checkpoint of model and optimizer is whole. To resume: `modify` a
    fresh model and optimizer, then load both states, in any order. A copy of a manager (deepcopy, pickle) is a new one
    with the same recipe, at work on nothing.

    Args:
        recipe: a Recipe, or modifiers built in Python.

    Raises:
        RecipeError: the modifiers contradict each other.
    """

    def __init__(self, recipe: Recipe | Sequence[Modifier]) -> None:
        self._recipe: Recipe = read_recipe(recipe)
        self._session: Session | None = None
        self._seal = Seal(self._recipe)
        self._ended: Ended | None = None
        self._last_state: dict[str, Any] | None = None

    @classmethod
    def from_yaml(
        cls,
        source: Source,
        recipe_variables: Variables = None,
        add_modifiers: Modifiers = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> ScheduledModifierManager:
        """A manager of the recipe in a file or text.

        Args:
            source: a path, YAML or Markdown text, a file object, or a Recipe.
            recipe_variables: values for the recipe's variables: a dict, JSON, or "k=v,k2=v2".
            add_modifiers: modifiers, or recipe text, that are added to it.
            metadata: what is kept with the recipe and saved with it.

        Raises:
            RecipeError: the recipe says something that cannot be meant; with file and line.
            ArgumentError: `metadata` is no mapping.
        """
        return cls(read_recipe(source, recipe_variables).extended(add_modifiers, metadata))

    @classmethod
    def compose_staged(
        cls, base: Source, additional: Source, keep_original_epochs: bool = False
    ) -> ScheduledModifierManager:
        """A manager of two recipes, one after the other.

        Args:
            base: a manager, a recipe, a path or text.
            additional: the same, for what comes after.
            keep_original_epochs: False: epochs of `additional` are shifted by the end of `base`; True: they are not.

        Raises:
            RecipeError: the stages do not fit together.
        """
        return cls(Recipe.compose(base, additional, keep_original_epochs=keep_original_epochs))

    # ------------------------------------------------------------------ what the recipe says

    @property
    def recipe(self) -> Recipe:
        """The recipe."""
        return self._recipe

    @property
    def modifiers(self) -> list[Modifier]:
        """The recipe's modifiers in the order in which they are updated."""
        return self._recipe.modifiers

    @property
    def max_epochs(self) -> int:
        """The epoch at which the recipe is through: the latest start or end, rounded up."""
        return self._recipe.max_epochs

    @property
    def min_epochs(self) -> int:
        """The epoch of the earliest start, rounded down; 0 where none is given."""
        return self._recipe.min_epochs

    def qat_active(self, epoch: float) -> bool:
        """True if quantization has started by the end of the first step of `epoch`."""
        steps_per_epoch = None if self._session is None else self._session.timer.steps_per_epoch
        return is_quantizing(self._recipe.modifiers, epoch, steps_per_epoch)

    def phase(self, epoch: float) -> Phase | None:
        """The phase of the model at `epoch`; None while it changes.

        A pruning window changes it from its start to its end, both included; quantization at its very start. A modifier
        that only holds zeros changes nothing after its start.
        """
        return phase_at(self._recipe.modifiers, epoch)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the recipe to `path` as YAML; the file is the old one or the new one, never half of either.

        Raises:
            DataFileError: the folder does not exist or cannot be written.
        """
        self._recipe.save(path)

    def __str__(self) -> str:
        return self._recipe.to_yaml()

    def __reduce__(self) -> tuple[type[ScheduledModifierManager], tuple[Recipe]]:
        return (type(self), (self._recipe,))

    # ------------------------------------------------------------------ at work

    def modify(
        self,
        model: nn.Module,
        optimizer: OneOrMoreOptimizers,
        steps_per_epoch: SupportsIndex | Sized | None = None,
        epoch: float = 0.0,
        *,
        counting_optimizer: int | str | None = None,
        distillation_teacher: Teacher = None,
        grad_sampler: GradSampler | None = None,
        calibration_data: Iterable[Any] | None = None,
        sample_inputs: InputsLike | None = None,
        writer: ScalarWriter | None = None,
        state: Mapping[str, Any] | None = None,
        replace: bool = False,
    ) -> Any:
        """Puts the recipe to work: what is due at `epoch` is in force at once, the rest follows the optimizer's steps.

        Args:
            model: the model that is trained; wrappers of DDP and torch.compile are looked through.
            optimizer: its optimizer, or several in a list or a dict: masks hold after the steps of each, and modifiers
                act on all. Parameter groups in a recipe are counted through, those of the first optimizer first.
            steps_per_epoch: optimizer steps in an epoch, a positive int or a sized container such as a loader; None:
                train with `for epoch in manager.epochs():`.
            epoch: where training starts, 0 or more.
            counting_optimizer: index or key of the one of several whose steps are counted, and after which is put in
                force what is due: best the last to step in every round. None: the first.
            distillation_teacher: a module, or "self" for a frozen copy of the model as it is now.
            grad_sampler: a callable yielding losses to back-propagate, or (data loader, loss function).
            calibration_data: an iterable of inputs, at least 16 samples. A generator is read at once, and held.
            sample_inputs: inputs of one call of the model: a tensor, a tuple, a dict of names, or (args, kwargs); None:
                those of the first forward.
            writer: a TensorBoard-like writer, with `add_scalar(tag, value, step)`.
            state: a manager's state from which the run goes on at once, where the model is as it was then: its weights
                stay, and so do quantized layers and removed channels that are there already (training that goes on in
                the same process with another optimizer). None: a state is loaded afterwards, or there is none.
            replace: True: another manager that does the same to this model is finalized first; False: that is an error.

        Returns:
            The same optimizer, or several as they were given; one that is no torch Optimizer in a thin wrapper.

        Raises:
            ArgumentError, TargetError, DataError, StateError: something does not fit; nothing was changed.
        """
        # A wrong argument is found before names are looked up, and names before anything is changed.
        timer = Timer(steps_in_epoch(steps_per_epoch), starting_epoch(epoch, finite=True))
        given = given_optimizers(optimizer, counting_optimizer)
        if state is not None:
            self._seal.check(state)
        return self._attach(
            model,
            given,
            timer,
            state=state,
            teacher=distillation_teacher,
            grad_sampler=grad_sampler,
            calibration_data=calibration_data,
            sample_inputs=sample_inputs,
            writer=writer,
            replace=replace,
        )

    def initialize(
        self,
        model: nn.Module,
        epoch: float = 0.0,
        *,
        distillation_teacher: Teacher = None,
        grad_sampler: GradSampler | None = None,
        calibration_data: Iterable[Any] | None = None,
        sample_inputs: InputsLike | None = None,
        writer: ScalarWriter | None = None,
        replace: bool = False,
    ) -> None:
        """Puts in force what is due at `epoch`, without an optimizer; `epochs()` moves on by whole epochs.

        Arguments and errors are those of `modify`.
        """
        self._attach(
            model,
            None,
            Timer(None, starting_epoch(epoch)),
            teacher=distillation_teacher,
            grad_sampler=grad_sampler,
            calibration_data=calibration_data,
            sample_inputs=sample_inputs,
            writer=writer,
            replace=replace,
        )

    def apply(
        self,
        model: nn.Module,
        epoch: float = math.inf,
        *,
        distillation_teacher: Teacher = None,
        grad_sampler: GradSampler | None = None,
        calibration_data: Iterable[Any] | None = None,
        sample_inputs: InputsLike | None = None,
        writer: ScalarWriter | None = None,
        replace: bool = False,
    ) -> nn.Module:
        """Everything that the recipe does up to `epoch`, at once and without training, then `finalize`.

        Arguments and errors are those of `modify`. Where the model has to be traced and there are no `sample_inputs`,
        the first batch of `calibration_data` is used. `epoch` is the last one that is reached; infinity: all.

        Returns:
            The same model.
        """
        last = starting_epoch(epoch)
        self._attach(
            model,
            None,
            Timer(None),
            teacher=distillation_teacher,
            grad_sampler=grad_sampler,
            calibration_data=calibration_data,
            sample_inputs=sample_inputs,
            writer=writer,
            replace=replace,
            forward_comes=False,
        )
        session = self._at_work()
        try:
            # In epoch order, since quantization must see the pruned weights.
            moments = {e for m in self.modifiers for e in (m.window.start, m.window.end, *m.cuts()) if e < last}
            for moment in [*sorted(moments), last]:
                session.timer.jump(moment)
                session.update()
        finally:
            self.finalize()
        return model

    def apply_structure(
        self,
        model: nn.Module,
        epoch: float = math.inf,
        *,
        state: Mapping[str, Any] | None = None,
        sample_inputs: InputsLike | None = None,
    ) -> nn.Module:
        """Gives a fresh model the structure that it had, so that a checkpoint loads; changes no value of a weight, and
        the manager is free afterwards. While it is at work on one model, another can get its structure: an average of
        the weights that was made before layers were quantized.

        Args:
            model: a model as it was before `modify`.
            epoch: the epoch whose structure is meant, where `state` is None.
            state: a manager's state: the structure at the time it was saved. Removed channels need it.
            sample_inputs: as for `modify`; quantized layers need these or `state`.

        Returns:
            The same model.

        Raises:
            StateError: the recipe needs inputs or a state that were not given, or the state does not fit.
        """
        # A copy (an average of the weights) may get the structure that the model has by now.
        if self._session is not None and self._session.model is unwrapped(check_module(model)):
            self._refuse_second("apply_structure")
        check_module(model)
        epoch = starting_epoch(epoch)
        if state is not None:
            self._seal.check(state)
            epoch = float(state["epoch"])
        session = Session(
            self._recipe.written,
            self.modifiers,
            model,
            None,
            Timer(None),
            seal=self._seal,
            sample_inputs=sample_inputs,
            forward_comes=False,
        )
        session.structure(epoch, state)
        return model

    def epochs(self) -> Iterator[int]:
        """The epochs from where the run is to `max_epochs`; marks for the clock where each begins and ends.

        With `steps_per_epoch` the clock is put on the whole epoch; without, it moves by whole epochs first, then by the
        count of steps in the epoch before.

        Raises:
            StateError: `modify` was not called.
        """
        session = self._at_work()
        for epoch in range(int(session.timer.clock().epoch), self.max_epochs):
            if session.trains and session.timer.steps_per_epoch is None:
                warnings.warn(
                    "steps_per_epoch was not given: the first epoch has the resolution of a whole epoch, later ones "
                    "use its number of steps. Pass steps_per_epoch to modify() for more.",
                    SparsifyWarning,
                    stacklevel=2,
                )
            session.timer.begin(epoch)
            session.update()
            yield epoch
            if self._session is not session:
                return
            session.epoch_ends(epoch)
            session.update()

    def begin_epoch(self, epoch: int, *, steps_per_epoch: SupportsIndex | Sized | None = None) -> None:
        """Marks for the clock that an epoch begins, where the loop is not `epochs()`; in the middle of it (a resumed
        run) the clock goes on from where it is.

        Args:
            epoch: its number, 0 or more.
            steps_per_epoch: optimizer steps in it, where that changes or was not known; None: as before.

        Raises:
            StateError: `modify` was not called.
            ArgumentError: `steps_per_epoch` is no positive int.
        """
        session = self._at_work()
        steps = steps_in_epoch(steps_per_epoch)
        session.timer.begin(epoch)
        if steps is not None:
            session.timer.pace(steps)
        session.update()

    def end_epoch(self, epoch: int) -> int:
        """Marks for the clock that an epoch is over.

        Args:
            epoch: its number.

        Returns:
            The number of optimizer steps since the last mark.

        Raises:
            StateError: `modify` was not called.
        """
        session = self._at_work()
        done = session.timer.end(epoch)
        session.update()
        return done

    def pause(self, paused: bool = True) -> None:
        """Leaves out the steps that come, a search for a learning rate before training goes on: they are not counted,
        and masked weights stay zero.

        Args:
            paused: False: from now on steps count again.

        Raises:
            StateError: `modify` was not called.
        """
        self._at_work().paused = paused

    def update_loss(self, loss: Tensor, *, outputs: Any = None, inputs: Any = None, labels: Any = None) -> Tensor:
        """`loss` with distillation and regularizers added; `loss` itself where none is due.

        Args:
            loss: the loss of the task.
            outputs: the model's outputs for this batch; None: those of the last forward, which a compiled model does
                not show.
            inputs: the model's inputs, for the teacher; None: those of the last forward.
            labels: the targets, for modifiers that ask for them.

        Raises:
            StateError: `modify` was not called, or outputs are needed and could not be captured.
        """
        if self._session is None:
            if self._ended is not None:
                return loss
            raise self._not_at_work()
        self._session.warn_if_detached()
        return self._session.update_loss(loss, outputs, inputs, labels)

    def finalize(self, model: nn.Module | None = None, *, early: bool = False) -> None:
        """Ends the run: removes hooks and leaves masked weights at zero. Quantized layers stay, ready for export, and
        removed channels stay removed. May be called at any moment, and twice.

        Args:
            model: the model of `modify`, for the reader; None: the same.
            early: True: no warning where the recipe is not through, since that is meant or was said.

        Raises:
            ArgumentError: `model` is another one.
        """
        if self._session is None:
            return
        if model is not None and unwrapped(check_module(model)) is not self._session.model:
            what = "this is not the model that modify() was given"
            raise ArgumentError(f"finalize(model): {what}. Leave it out, or use apply_masks(model) for a copy.")
        session = self._session
        try:
            session.warn_if_detached()
            if session.carried.warn_of_weights():
                session.watch.told("revived")
            session.watch.ends()
            self._ended = Ended(session.timer.clock(), session.model, session.masker.names)
            # Not sealed: that would copy it.
            self._last_state = session.state_dict()
        finally:
            session.finish()
        note_recipe(session.model, self._recipe.to_yaml())
        self._ended.note()
        self._session = None
        session.watch.ended(early)

    # ------------------------------------------------------------------ how far it is

    @property
    def attached(self) -> bool:
        """True while the recipe is at work and sees the optimizer's steps.

        False before `modify`, after `finalize`, on a copy of a manager, and where the optimizer has lost its hooks, as
        a deepcopied or unpickled one has.
        """
        return self._session is not None and self._session.attached

    @property
    def step(self) -> int:
        """The number of real optimizer steps: not those that mixed precision skipped."""
        return self._now().step

    @property
    def epoch(self) -> float:
        """The epoch: step / steps_per_epoch."""
        return self._now().epoch

    def sparsity(self) -> dict[str, float]:
        """The fraction of zeros, 0 to 1, in every masked parameter as its weights are, by name; after `finalize` too.
        Warns where a weight under a mask is not zero. On all ranks where they are sharded."""
        over = self._ended if self._session is None else None
        return self._at_work().sparsity() if over is None else over.note()

    def apply_masks(self, model: nn.Module) -> None:
        """Sets to zero in another model, such as an EMA copy, what is masked in this one, once. See `follow`.

        Args:
            model: a model with parameters of the same names and shapes; a TargetError where it has others.
        """
        self._at_work().masker.apply_to(unwrapped(check_module(model)))

    def follow(self, average: nn.Module) -> None:
        """Masks an average of the model (EMA, SWA) from now on; torch's, timm's and Lightning's are found without it.

        Args:
            average: a model with the same parameter names; a TargetError where it has others.
        """
        self._at_work().averages.follow(unwrapped(check_module(average)))

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs besides the model's and the optimizer's state.

        Plain types and tensors, so that `torch.load(weights_only=True)` reads it; with a version, the recipe and a
        checksum. After `finalize`, the state at its end.

        While the manager is at work, the optimizer's state_dict holds the same under "sparsify", and its
        load_state_dict loads it: a checkpoint that has the optimizer's state needs no more.
        """
        if self._session is None and self._last_state is not None:
            return self._seal.put_on(self._last_state)
        session = self._at_work()
        session.warn_if_detached()
        return session.carried.save()

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Goes on from `state`: puts the structure in place first, then masks, counts, and what was due.

        Call it after `modify`, before or after the model and the optimizer load theirs; before the model's where that
        is read from safetensors, which does not tell a structure. The optimizer's load_state_dict calls it with the
        state that travels inside.

        Args:
            state: what `state_dict` returned.
            strict: False: takes over what fits of the state of another recipe or model, and warns.

        Raises:
            StateError: `modify` was not called, or the state does not fit; nothing was changed.
        """
        self._at_work().carried.load(state, strict)

    # ------------------------------------------------------------------ checks

    def _attach(
        self,
        model: nn.Module,
        optimizers: GivenOptimizers | None,
        timer: Timer,
        *,
        teacher: Teacher,
        replace: bool,
        state: Mapping[str, Any] | None = None,
        **given: Any,
    ) -> Any:
        self._refuse_second("modify" if optimizers is not None else "initialize")
        check_module(model)
        others = runs_to_end(unwrapped(model), self.modifiers, replace)
        if teacher is not None and teacher != "self" and not isinstance(teacher, nn.Module):
            raise ArgumentError(f'distillation_teacher: {teacher!r} is neither a module nor "self".')
        check_recipe(self._recipe, unwrapped(model))
        for other in others:
            other.end()
        session = Session(
            self._recipe.written,
            self.modifiers,
            model,
            optimizers,
            timer,
            seal=self._seal,
            teacher=teacher,
            goes_on=state is not None,
            **given,
        )
        # From here on finalize() can undo it, also where Ctrl-C comes while it starts or while that is undone.
        self._session, self._ended, self._last_state = session, None, None
        session.owner = weakref.ref(self)
        try:
            return session.start(state)
        except BaseException:
            session.finish()
            self._session = None
            raise

    def _refuse_second(self, call: str) -> None:
        if self._session is not None:
            raise StateError(
                f"{call}() was called on a manager that is at work already; call finalize() first or make a second "
                "manager."
            )

    def _now(self) -> Clock:
        if self._session is None and self._ended is not None:
            return self._ended.clock
        return self._at_work().timer.clock()

    def _at_work(self) -> Session:
        if self._session is None:
            raise self._not_at_work()
        return self._session

    def _not_at_work(self) -> StateError:
        fresh = "call modify() first; a copy of a manager starts anew."
        return StateError(f"the manager is not at work: {fresh if self._ended is None else 'finalize() ended it.'}")
