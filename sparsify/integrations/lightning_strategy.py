"""Things that stand between Lightning's Trainer and its strategy, loggers and checkpoints; it can be pickled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__: list[str] = []


class Between:
    """Stands in for a method of a strategy, and calls `around(trainer, inner, ...)` with the method behind it.

    The strategy is what every batch, backward and checkpoint passes, in automatic and manual optimization and under
    every plugin; its methods are public (https://lightning.ai/docs/pytorch/stable/extensions/strategy.html). The user's
    module is not touched.
    """

    def __init__(self, trainer: Any, owner: object, around: Callable[..., Any], inner: Callable[..., Any]) -> None:
        self.trainer, self.owner, self.around, self.inner = trainer, owner, around, inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.around(self.trainer, self.inner, *args, **kwargs)


def stand_before(trainer: Any, name: str, owner: object, around: Callable[..., Any]) -> None:
    """Puts `around` of `owner` before the method `name` of the Trainer's strategy; once, also where it is called
    again."""
    first = link = getattr(trainer.strategy, name)
    while isinstance(link, Between):
        if link.owner is owner:
            link.trainer = trainer
            return
        link = link.inner
    setattr(trainer.strategy, name, Between(trainer, owner, around, first))


def stand_aside(trainer: Any, name: str, owner: object) -> None:
    """Undoes `stand_before`; may be called twice."""
    before, link = None, vars(trainer.strategy).get(name)
    while isinstance(link, Between) and link.owner is not owner:
        before, link = link, link.inner
    if not isinstance(link, Between):
        return
    if before is not None:
        before.inner = link.inner
    elif getattr(link.inner, "__self__", None) is trainer.strategy:
        # The class's own method shows again.
        delattr(trainer.strategy, name)
    else:
        setattr(trainer.strategy, name, link.inner)


class LoggerWriter:
    """A writer that hands numbers on to the Trainer's loggers.

    Attributes:
        trainer: the Trainer; None: numbers are dropped.
        muted: True while numbers are dropped.
        offset: the Trainer's step at which the recipe began.
    """

    def __init__(self) -> None:
        self.trainer: Any = None
        self.muted = False
        self.offset = 0

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Logs `value` under `tag` at the Trainer's step that belongs to `step` of the recipe."""
        if self.muted or self.trainer is None:
            return
        for logger in self.trainer.loggers:
            logger.log_metrics({tag: float(value)}, step=step + self.offset)


class KeepFinished:
    """Stands in for `check_monitor_top_k` of a ModelCheckpoint: no checkpoint is the best before `finished()`."""

    def __init__(self, checkpoint: Any, finished: Callable[[], bool]) -> None:
        self._checkpoint, self._finished = checkpoint, finished

    def __call__(self, trainer: Any, current: Any = None) -> bool:
        return self._finished() and bool(type(self._checkpoint).check_monitor_top_k(self._checkpoint, trainer, current))
