"""Sees what goes wrong in a run while it goes on, where it costs nothing, and says it once, with numbers."""

from __future__ import annotations

import logging
import math
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsify.errors import SparsifyError, SparsifyWarning
from sparsify.model import sharding
from sparsify.model.foreign_steps import ForeignSteps
from sparsify.model.targets import named_parameters
from sparsify.modifiers.base import Modifier
from sparsify.modifiers.schedule import Clock
from sparsify.pruning.masker import Masker
from sparsify.training.averages import Averages
from sparsify.training.timer import Timer

__all__: list[str] = []

log = logging.getLogger("sparsify")

WATCHED = 8
"""Parameters of which the first values are kept, to see if they moved."""
LOSSES = 100
"""Losses without a step that are told of at the least: with accumulation there are many for each step."""
SOFT = frozenset({"range", "learning_rate", "distillation", "logging", "regularization"})
"""Kinds of modifiers whose last epoch may be cut short without a word: what they leave is not the model's structure."""


class Watch:
    """Sees weights under masks that are not zero, steps that are not seen, other optimizers, recipes that end half-way.

    In a step it counts, and nothing else; values are looked at where a user looks: at a checkpoint, `sparsity`, export,
    the end of an epoch, and `finalize`.

    Args:
        model: the user's module.
        masker: its masks.
        averages: those of its weights.
        timer: the clock.
        modifiers: those of the recipe.
        optimizers: the objects whose steps are seen; none: nothing is trained.
        paused: tells whether steps are left out now.
    """

    def __init__(
        self,
        model: nn.Module,
        masker: Masker,
        averages: Averages,
        timer: Timer,
        modifiers: Sequence[Modifier],
        optimizers: Sequence[Any],
        paused: Callable[[], bool],
    ) -> None:
        self._model, self._masker, self._timer, self._modifiers = model, masker, timer, list(modifiers)
        self._optimizers, self._paused, self._averages = list(optimizers), paused, averages
        self._steps = self._losses = self._most_losses = 0
        self._inside = self._had_gradients = self._loaded = False
        self._said: set[str] = set()
        self._values: list[tuple[Tensor, Tensor]] = []
        self._values_step = 0
        self._foreign = ForeignSteps(self._optimizers, self._ours, self._stepping, self._other)

    def start(self) -> None:
        """Begins to watch."""
        if self._optimizers:
            self._foreign.watch()
        self._had_gradients = self._has_gradients()
        self.note_values()

    def close(self) -> None:
        """Ends it; may be called twice."""
        self._foreign.close()

    # ------------------------------------------------------------------ while it runs

    @property
    def inside(self) -> bool:
        """True while a step is under way, or was broken off."""
        return self._inside

    def step_begins(self) -> None:
        """A step of one of the optimizers begins; may be called twice."""
        self._steps += 1
        self._inside, self._loaded = True, False
        self._most_losses, self._losses = max(self._most_losses, self._losses), 0

    def weights_loaded(self) -> None:
        """The model loaded weights. The manager's state may come after: until then masks may be of another time."""
        self._loaded = True

    def step_ends(self) -> None:
        """It is over."""
        self._inside = False

    def loss_asked(self) -> None:
        """A loss is computed for training."""
        self._losses += 1
        if self._losses == 10 * max(LOSSES, self._most_losses):
            self._say_losses()

    def note_values(self) -> None:
        """Takes the weights as they are for those of the last step: something else than a step has moved them."""
        if self._optimizers:
            # Whole parameters, which a module under fully_shard may hold after a forward, lose their memory again.
            sharding.reshard(self._model)
            parameters = [p for p in named_parameters(self._model).values() if p.requires_grad and p.numel()]
            self._values = [(p, _first_values(p)) for p in parameters[:WATCHED]]
            self._values_step = self._steps

    # ------------------------------------------------------------------ where a user looks

    def look(self, where: str) -> None:
        """Warns of weights under masks that are not zero, and of weights that moved though no step was seen.

        Args:
            where: who asks.
        """
        # Ctrl-C in the middle of a step leaves weights that no mask was applied to yet.
        if not self._inside and not (self._loaded and where == "state_dict()"):
            self._foreign.tell()
            if not self._say_revived(where):
                self._say_moved()

    def epoch_ends(self, epoch: int, steps: int) -> None:
        """Warns where an epoch that is over had no step, or another number than was given.

        Args:
            epoch: its number.
            steps: the number of steps that were seen in it.
        """
        if not self._optimizers:
            return
        given = self._timer.given
        if not steps:
            self._say(
                "no step",
                f"no step of the optimizer was seen in epoch {epoch}. A copy of the optimizer (deepcopy, pickle) has "
                "no hooks: use the one that modify() returned.",
            )
            self.told()
        elif given is not None and not 2 * given <= 3 * steps <= 4.5 * given:
            self._say(
                "pace",
                f"steps_per_epoch is {given}, but epoch {epoch} had {steps} optimizer steps, so that the recipe's "
                "moments within an epoch are not where they were meant. Give the number of optimizer steps (batches "
                "divided by accumulation, rounded up).",
            )

    def ends(self) -> None:
        """Warns, before the end, of all of this and of a recipe that is not through."""
        self.look("finalize()")
        if self._optimizers and not self._steps:
            gradients = self._has_gradients() and not self._had_gradients
            if self._losses > 1 or gradients:
                what = f"update_loss() was called {self._losses} times" if self._losses else "there are gradients"
                self._say(
                    "no step",
                    f"no step of the optimizer was seen since modify(), though {what}: nothing was counted, and masks "
                    "were not updated. Train with what modify() returned; an optimizer that steps by a method of "
                    "another name has to be called by step().",
                )
        elif self._optimizers and self._losses >= max(LOSSES, 10 * self._most_losses):
            self._say_losses()

    def ended(self, early: bool) -> None:
        """Warns, after the end, of a recipe that was not through; not where it is meant to end `early`."""
        # In the middle of an exception its user knows that training did not come to its end.
        if not early and sys.exc_info()[0] is None and (self._steps or self._timer.marked):
            self._say_unfinished()

    def told(self, *kinds: str) -> None:
        """Says no more that steps are not seen, nor these `kinds`: it was said already, and why."""
        self._said |= {"no step", "moved", "other", *kinds}

    # ------------------------------------------------------------------ in words

    def _say(self, kind: str, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(text, SparsifyWarning, stacklevel=_levels_to_user())

    def _say_revived(self, where: str) -> bool:
        found = self._masker.revived()
        if not found or "revived" in self._said:
            return bool(found)
        total = sum(one.count for one in found.values())
        masked = sum(one.masked for one in found.values())
        worst = max(found, key=lambda name: found[name].count)
        self._say(
            "revived",
            f"{where}: {total:,} of {masked:,} masked weights are not zero, in {len(found)} "
            f"parameter{'s' * (len(found) > 1)}; most of them in {worst!r}, {found[worst].count:,} of "
            f"{found[worst].masked:,}, the largest {found[worst].largest:.3g}. {self._so_far()} They moved after the "
            "last step that was seen, or were loaded: the next step, and finalize(), set them to zero. Was the "
            "optimizer rebuilt, or does something else write to the weights? Train with what modify() returned, and "
            "give every optimizer that moves these weights to modify().",
        )
        return True

    def _say_moved(self) -> None:
        values, step = self._values, self._values_step
        if step == self._steps and not self._loaded and any(self._moved(p, before) for p, before in values):
            self._say(
                "moved",
                f"the weights moved, but no step of the optimizer was seen meanwhile. {self._so_far()} Was it rebuilt, "
                "or does it step by a method of another name? Call finalize(), then modify() with the optimizer that "
                "steps, and train with what modify() returns.",
            )
        self.note_values()

    def _moved(self, parameter: Tensor, before: Tensor) -> bool:
        """True if a parameter has moved, and not because it and its average were swapped, or it became its average."""
        if not _values_moved(parameter, before):
            return False
        ends = [before, _first_values(parameter)]
        return not any(torch.equal(_first_values(a).to(end), end) for a in self._averages.of(parameter) for end in ends)

    def _say_losses(self) -> None:
        self._say(
            "no step",
            f"update_loss() was called {self._losses:,} times since the last step of the optimizer that was seen. "
            f"{self._so_far()} Was the optimizer rebuilt, or does it step by a method of another name? Call "
            "finalize(), then modify() with the optimizer that steps.",
        )

    def _has_gradients(self) -> bool:
        return any(p.grad is not None for p in self._model.parameters())

    def _stepping(self) -> tuple[int, bool]:
        return self._steps, self._inside or self._paused()

    def _other(self, optimizer: Optimizer, shared: int) -> None:
        own = ", ".join(type(one).__name__ for one in self._optimizers)
        self._say(
            "other",
            f"{'an' if type(optimizer).__name__[0] in 'AEIOU' else 'a'} {type(optimizer).__name__} stepped {shared} "
            f"parameters of this model, which is not the optimizer that modify() was given ({own}): its steps are not "
            f"counted, and masks are not applied after them. {self._so_far()} Was it rebuilt for a next phase? Call "
            "finalize(), then modify() with the one that steps; or give all of them, modify(model, [a, b]).",
        )

    def _say_unfinished(self) -> None:
        clock, through = self._timer.clock(), max((_end(m) for m in self._modifiers), default=0.0)
        late = [m for m in self._modifiers if not clock.reached(_end(m))]
        if clock.epoch > through - 1.0:
            late = [m for m in late if m.kind not in SOFT]
        if late:
            self._say(
                "unfinished",
                f"the recipe was not through at finalize(): epoch {clock.epoch:.4g} of {through:g}. "
                f"{self._so_far(through)} Not at their end: {'; '.join(self._words(m, clock) for m in late[:6])}"
                f"{f'; and {len(late) - 6} more' if len(late) > 6 else ''}.{self._pace_hint()}",
            )
        elif not self._timer.marked and through > 0 and clock.epoch > 2.0 * through:
            # Many recipes are shorter than the training, and rightly so.
            log.info(
                "the clock is at epoch %.4g, beyond the recipe's end at %g. %s%s",
                *(clock.epoch, through, self._so_far(through), self._pace_hint()),
            )

    def _words(self, modifier: Modifier, clock: Clock) -> str:
        """Where a modifier would have ended, and the sparsity that it reached."""
        who = f"{type(modifier).__name__} (epoch {_end(modifier):g}"
        asked = self._share(modifier, Clock(clock.step, _end(modifier), clock.steps_per_epoch), foreseen=True)
        if asked is None:
            return f"{who})"
        reached = self._share(modifier, clock, foreseen=modifier.whole_channels)
        what = "of the channels" if modifier.whole_channels else "zeros"
        return f"{who}: {0.0 if reached is None else reached:.1%} {what}, {asked:.1%} asked)"

    def _share(self, modifier: Modifier, clock: Clock, *, foreseen: bool) -> float | None:
        """The share of zeros over all that a modifier prunes: as its fields say, or as it is."""
        if modifier.kind != "pruning" or modifier.holds:
            return None
        parameters = named_parameters(self._model)
        try:
            shares = modifier.foreseen_zeros(clock, self._model)
            if not foreseen:
                there = {name: parameters[name] for name in modifier.targets(self._model) if name in parameters}
                shares = {name: count / there[name].numel() for name, count in sharding.zeros(there).items()}
        except SparsifyError:
            # Its names mean nothing any more: the structure has changed.
            return None
        known = {name: share for name, share in shares.items() if share is not None and name in parameters}
        weights = sum(parameters[name].numel() for name in known)
        return sum(share * parameters[name].numel() for name, share in known.items()) / weights if weights else None

    def _so_far(self, through: float | None = None) -> str:
        """Steps that were seen and, with the recipe's end, those that were expected."""
        step, per_epoch = self._timer.step, self._timer.steps_per_epoch
        text = f"{step:,} step{'s were' if step != 1 else ' was'} seen"
        if through is None or per_epoch is None:
            return f"{text}."
        return f"{text}, {math.ceil(through * per_epoch):,} expected at {per_epoch:,} an epoch."

    def _pace_hint(self) -> str:
        if self._timer.given is None or self._timer.marked:
            return ""
        return " Is steps_per_epoch the number of optimizer steps in an epoch (batches divided by accumulation)?"

    def _ours(self) -> Iterator[Tensor]:
        parameters = named_parameters(self._model)
        yield from (parameters[name] for name in self._masker.names if name in parameters)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                yield from group["params"]


class Ended:
    """A run that is over, or as it is now: its clock, and the zeros of what it masked.

    Args:
        clock: the moment of its end.
        model: not kept alive.
        names: the parameters that were masked.
    """

    def __init__(self, clock: Clock, model: nn.Module, names: Iterable[str]) -> None:
        self.clock = clock
        self._model = weakref.ref(model)
        self._zeros = dict.fromkeys(names, 0.0)

    def note(self) -> dict[str, float]:
        """The fraction of zeros, 0 to 1, in each of the parameters now, or as last noted where the model is gone.

        Collective where they are sharded.
        """
        model = self._model()
        if model is not None:
            parameters = named_parameters(model)
            there = {n: parameters[n] for n in self._zeros if n in parameters and not parameters[n].is_meta}
            self._zeros = {n: count / max(there[n].numel(), 1) for n, count in sharding.zeros(there).items()}
        return dict(self._zeros)


def _end(modifier: Modifier) -> float:
    """The epoch from which a modifier changes nothing more: its end, or its start where it never ends."""
    window = modifier.window
    return max(window.end if math.isfinite(window.end) else window.start, *modifier.cuts(), 0.0)


def _levels_to_user() -> int:
    """The `stacklevel` at which a caller outside of this package stands."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("sparsify.", "torch.")):
        level, frame = level + 1, frame.f_back
    return level


def _values_moved(parameter: Tensor, before: Tensor) -> bool:
    """True if a first value is another one now; zeros are none, since masks may be set in the first forward. A
    parameter that went to another device, dtype or shape is not compared."""
    now = _first_values(parameter)
    if now.device != before.device or now.dtype != before.dtype or now.shape != before.shape:
        return False
    return bool(((now != before) & (now != 0)).any())


def _first_values(parameter: Tensor) -> Tensor:
    """A copy of the first values of a parameter, or of its part on this rank."""
    values = sharding.local(parameter)
    while values.dim() > 1 and values.numel():
        values = values[0]
    return values.reshape(-1)[:16].clone()
