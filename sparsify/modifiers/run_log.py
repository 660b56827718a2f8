"""The log of a run: the `logging` module and, where the user gives one, a TensorBoard-like writer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

from sparsify.errors import ArgumentError

__all__: list[str] = []

logger = logging.getLogger("sparsify")


class ScalarWriter(Protocol):
    """The one method that TensorBoard-like writers share: torch's `SummaryWriter`, or a ten-line class of one's own."""

    @property
    def add_scalar(self) -> Callable[..., Any]:
        """Called with (tag, value, step)."""


class RunLog:
    """Numbers and notes of one run. Numbers are logged at level DEBUG, notes at INFO, both under the name "sparsify".

    Args:
        writer: an object with `add_scalar(tag, value, step)`, and `add_text(tag, text, step)` where it has that; None:
            no writer. It is asked for nothing else.

    Raises:
        ArgumentError: `writer` has no `add_scalar`.
    """

    def __init__(self, writer: ScalarWriter | None = None) -> None:
        if writer is not None and not callable(getattr(writer, "add_scalar", None)):
            raise ArgumentError(
                f"writer: {type(writer).__name__} has no add_scalar(tag, value, step). Give a TensorBoard-like writer, "
                'or None: everything is also logged through logging.getLogger("sparsify").'
            )
        self.writer = writer

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Logs one number, `value`, under the name `tag` at one optimizer step."""
        logger.debug("step %d: %s = %.6g", step, tag, value)
        if self.writer is not None:
            self.writer.add_scalar(tag, value, step)

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Logs one note under the name `tag` at one optimizer step."""
        logger.info("%s: %s", tag, text)
        add_text = getattr(self.writer, "add_text", None)
        if callable(add_text):
            add_text(tag, text, step)
