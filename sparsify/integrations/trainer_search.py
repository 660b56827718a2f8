"""The Trainer that a callback was given to: the Trainer of transformers tells its callbacks everything but itself."""

from __future__ import annotations

import functools
import gc
import sys
from types import FrameType
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import CallbackHandler

__all__: list[str] = []


def trainer_with(callback: TrainerCallback) -> Any:
    """The Trainer that `callback` was given to: one that is calling us just now, or else any that there is."""

    def has(candidate: object) -> bool:
        handler = getattr(candidate, "callback_handler", None) if isinstance(candidate, Trainer) else None
        return any(one is callback for one in getattr(handler, "callbacks", ()))

    # Callbacks are told everything but the Trainer; transformers' own are given it by hand (`set_trainer`), seen in
    # transformers 5.23.0.
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if has(candidate):
            return candidate
        frame = frame.f_back
    return next((one for one in gc.get_objects() if issubclass(type(one), Trainer) and has(one)), None)


def tell_of_additions(kind: type[TrainerCallback]) -> None:
    """Lets `trainer.add_callback(...)` call `on_init_end` of a callback of this `kind`: it is told nothing before
    training."""
    original = CallbackHandler.add_callback
    if getattr(original, "tells", None) is kind:
        return

    @functools.wraps(original)
    def add_callback(self: Any, callback: Any) -> Any:
        found = original(self, callback)
        if isinstance(callback, kind):
            callback.on_init_end(None, None, None)
        return found

    add_callback.tells = kind  # type: ignore[attr-defined]
    CallbackHandler.add_callback = add_callback
