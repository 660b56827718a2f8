"""The optimizer steps that Lightning takes in an epoch, and where its epochs lie in the recipe."""

from __future__ import annotations

import logging
import math
import warnings
from typing import Any

from sparsify.errors import SparsifyWarning
from sparsify.training.manager import ScheduledModifierManager

__all__: list[str] = []

log = logging.getLogger("sparsify")

UNSET_EPOCHS = 1000
"""What Lightning takes where a Trainer is given neither epochs nor steps (_parse_loop_limits, lightning 2.4 to 2.6)."""


class EpochLength:
    """Keeps the clock of `manager` in step with the Trainer's epochs.

    Args:
        manager: the recipe's.
        given: optimizer steps in an epoch, as the user says; None: as the data says.

    Attributes:
        pace: optimizer steps in the epoch at hand; None: not known before it is over.
        marks: True where the recipe's epochs are the Trainer's; False where they are counts of steps alone.
        offset: the Trainer's epoch at which the recipe began.
    """

    def __init__(self, manager: ScheduledModifierManager, given: int | None) -> None:
        self._manager, self._given = manager, given
        self.reset()

    def reset(self) -> None:
        """To be called where a run begins."""
        self.pace: int | None = self._given
        self.marks = self._given is None
        self.offset = 0
        self._said = False

    def state_dict(self) -> dict[str, Any]:
        return {"pace": self.pace, "marks": self.marks, "offset": self.offset}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As a saved run had it; `pace` is looked at again when training starts."""
        self.pace = self._given or state["pace"]
        self.marks = self._given is None and state["marks"]
        self.offset = state["offset"]

    def choose_max_epochs(self, trainer: Any, wanted: bool | None) -> None:
        """Gives the Trainer the recipe's number of epochs: always (True), where it has none (None), or never."""
        epochs, loop = self._manager.max_epochs, trainer.fit_loop
        unset = loop.max_epochs == UNSET_EPOCHS and trainer.max_steps == -1 and loop.epoch_progress.current.ready == 0
        if wanted is False or not epochs or trainer.fast_dev_run or not (wanted or unset):
            return
        if loop.max_epochs != epochs:
            log.info("the recipe has %d epochs, and so has this fit.", epochs)
        loop.max_epochs = epochs

    def count(self, trainer: Any) -> int | None:
        """The optimizer steps in the Trainer's epoch; None where that is not known."""
        if self._given is not None:
            return self._given
        batches: float = trainer.num_training_batches
        if not math.isinf(batches):
            accumulation: int = (
                trainer.accumulate_grad_batches if trainer.lightning_module.automatic_optimization else 1
            )
            # The last, smaller group steps too: _should_accumulate of lightning 2.4 to 2.6.
            return max(1, math.ceil(batches / accumulation))
        if trainer.max_steps > 0 and self._manager.max_epochs:
            self.marks = False
            steps: int = max(1, trainer.max_steps // self._manager.max_epochs)
            self._say(
                f"{steps} optimizer steps are taken for one, so that the recipe's {self._manager.max_epochs} epochs "
                f"fill max_steps={trainer.max_steps}"
            )
            return steps
        self._say("the first has the resolution of a whole epoch, later ones use the number of steps of the one before")
        return None

    def resumed(self, trainer: Any) -> None:
        """A run that was resumed starts to train: its epochs may be longer or shorter now."""
        steps = self.count(trainer)
        if steps is None or steps == self.pace:
            return
        if self.pace is not None:
            warnings.warn(
                f"the run that is resumed had {self.pace} optimizer steps in an epoch, this one has {steps}: the "
                f"recipe goes on from epoch {self._manager.epoch:.4g}, and is no longer that run bit for bit.",
                SparsifyWarning,
                stacklevel=3,
            )
        self._manager.begin_epoch(int(self._manager.epoch), steps_per_epoch=steps)
        self.pace = steps

    def begin(self, trainer: Any) -> None:
        """The Trainer begins an epoch."""
        if self.marks:
            self._manager.begin_epoch(trainer.current_epoch - self.offset)

    def first_batch(self, trainer: Any) -> None:
        """An epoch's first batch: loaders may be new ones, and the accumulation may change from epoch to epoch."""
        # How often manual optimization steps is found out at the end of an epoch.
        if not self.marks or self._given is not None or not trainer.lightning_module.automatic_optimization:
            return
        steps = self.count(trainer)
        if steps is not None and steps != self.pace:
            self._manager.begin_epoch(trainer.current_epoch - self.offset, steps_per_epoch=steps)
            self.pace = steps

    def end(self, trainer: Any) -> None:
        """The Trainer ends an epoch, or stops in one."""
        whole = trainer.is_last_batch or trainer.fit_loop.batch_idx + 1 >= trainer.num_training_batches
        if not self.marks or not whole:
            return
        epoch = trainer.current_epoch - self.offset
        done = self._manager.end_epoch(epoch)
        if trainer.lightning_module.automatic_optimization or not done or done == self.pace:
            return
        if self.pace is not None:
            warnings.warn(
                f"manual optimization took {done} optimizer steps in epoch {epoch}, and one in each of its {self.pace} "
                f"batches was expected; from now on {done} are. Give SparsifyCallback(steps_per_epoch={done}).",
                SparsifyWarning,
                stacklevel=3,
            )
        self._manager.begin_epoch(epoch + 1, steps_per_epoch=done)
        self.pace = done

    def say_how_long(self, trainer: Any) -> None:
        """Warns where the Trainer stops before the recipe is through."""
        wanted, lasts = self._manager.max_epochs, math.inf
        if self.marks and trainer.max_epochs is not None and trainer.max_epochs >= 0:
            lasts = trainer.max_epochs - self.offset
        elif self.pace is not None and trainer.max_epochs is not None and trainer.max_epochs >= 0:
            lasts = (trainer.max_epochs - trainer.current_epoch) * trainer.num_training_batches / self.pace
            lasts = self._manager.epoch + lasts / trainer.accumulate_grad_batches
        if self.pace is not None and trainer.max_steps > 0:
            lasts = min(lasts, self._manager.epoch + (trainer.max_steps - trainer.global_step) / self.pace)
        if trainer.fast_dev_run or math.isinf(lasts):
            return
        if lasts < wanted - 1e-6:
            warnings.warn(
                f"the Trainer ends at epoch {lasts:.4g} of the recipe's {wanted}: it will not be through. Give "
                f"Trainer(max_epochs={wanted}), or SparsifyCallback(set_max_epochs=True).",
                SparsifyWarning,
                stacklevel=3,
            )
        elif lasts > wanted:
            log.info("the Trainer goes on to epoch %g after the recipe's %d: zeros stay zero.", lasts, wanted)

    def _say(self, what: str) -> None:
        if self._said:
            return
        self._said = True
        warnings.warn(
            f"the data does not say how many batches make an epoch: {what}. Give SparsifyCallback(steps_per_epoch="
            "...).",
            SparsifyWarning,
            stacklevel=4,
        )
