"""Logs the sparsity and the bits of the model while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator

from sparsify.model.targets import named_modules, resolve_parameters
from sparsify.modifiers.base import Active, Epoch, Modifier, ModifierKind, Run, check_frequency
from sparsify.modifiers.schedule import Clock, UpdateGrid
from sparsify.quantization.conversion import weight_bits

__all__ = ["SparsificationLoggingModifier"]


class SparsificationLoggingModifier(Modifier):
    """Logs the sparsity of every prunable parameter and of the model, and the bits of quantized weights."""

    kind: ClassVar[ModifierKind] = "logging"
    without_effect: ClassVar[frozenset[str]] = frozenset({"log_types", "constant_logging"})
    start_epoch: Epoch = Field(default=0.0, description="The epoch of the first entry; -1: at once.")
    update_frequency: Epoch = Field(default=1.0, description="Epochs between two entries; -1: every step.")

    @model_validator(mode="after")
    def _moves(self) -> SparsificationLoggingModifier:
        check_frequency(self.update_frequency)
        return self

    def attach(self, run: Run) -> Active:
        """Logs at its own points of time."""
        return _Logging(self, run)


class _Logging(Active):
    """Counts zeros at the points of its grid; the only moments at which it waits for the device.

    Checkpoint: the last point, so that a resumed run does not log it twice.
    """

    def __init__(self, modifier: SparsificationLoggingModifier, run: Run) -> None:
        self._grid = UpdateGrid(modifier.window, modifier.update_frequency)
        self._model, self._log = run.model, run.log
        self._last: float | None = None

    def update(self, clock: Clock) -> None:
        point = self._grid.latest(clock)
        if point is None or point == self._last:
            return
        self._last = point
        zeros = weights = 0
        for name, parameter in resolve_parameters(
            self._model, "__ALL_PRUNABLE__", where="SparsificationLoggingModifier", strict=False
        ).items():
            count = parameter.numel() - int(torch.count_nonzero(parameter.detach()))
            zeros, weights = zeros + count, weights + parameter.numel()
            self._log.scalar(f"zeros/{name}", count / max(1, parameter.numel()), clock.step)
        self._log.scalar("zeros/model", zeros / max(1, weights), clock.step)
        for name, module in named_modules(self._model).items():
            if bits := weight_bits(module):
                self._log.scalar(f"bits/{name}", bits, clock.step)

    def state_dict(self) -> dict[str, Any]:
        return {"last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._last = state["last"]
