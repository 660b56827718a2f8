"""The numbers of a recipe as entries of a Trainer's own log."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sparsify.model.targets import named_parameters
from sparsify.modifiers.run_log import ScalarWriter
from sparsify.training.manager import ScheduledModifierManager

__all__: list[str] = []


class TrainerLog:
    """Takes the run's numbers and keeps those that wait for the Trainer's next entry.

    Args:
        writer: the user's, to which all of them are passed; None: none.
        layers: True: keeps the sparsity of each layer too.

    Attributes:
        waiting: numbers by tag.
        rates: the last two learning rates that the recipe set, by the index of the parameter group: (steps taken
            before, rate).
    """

    def __init__(self, writer: ScalarWriter | None, layers: bool) -> None:
        self.waiting: dict[str, float] = {}
        self.rates: dict[int, list[tuple[int, float]]] = {}
        self._writer, self._layers = writer, layers

    def begin(self) -> None:
        """Forgets an earlier run."""
        self.waiting, self.rates = {}, {}

    def rate_of_step(self, step: int) -> float | None:
        """The recipe's learning rate of the first group in step number `step`; None: the recipe said none."""
        return next((rate for at, rate in reversed(self.rates.get(0, [])) if at < step), None)

    def hold_rates(self, groups: list[dict[str, Any]]) -> None:
        """Sets the recipe's learning rates in the parameter `groups` that it governs."""
        for index, rates in self.rates.items():
            if index < len(groups):
                rate, wanted = groups[index]["lr"], rates[-1][1]
                if isinstance(rate, Tensor):
                    rate.fill_(wanted)
                else:
                    groups[index]["lr"] = wanted

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Keeps `value` under `tag`, and passes it with `step` to the user's writer."""
        if tag.startswith("learning_rate/group_"):
            index = int(tag.rpartition("_")[2])
            # Two: the rate of the step that was taken is logged after that of the next one is known.
            self.rates[index] = [*self.rates.get(index, [])[-1:], (step, float(value))]
        # The Trainer logs learning rates itself, and the sparsity of the whole is computed for each entry.
        if self._layers or not tag.startswith(("sparsity/", "learning_rate/")):
            self.waiting[tag] = float(value)
        if self._writer is not None:
            self._writer.add_scalar(tag, value, step)


def overall_sparsity(manager: ScheduledModifierManager, model: nn.Module) -> float:
    """The fraction of zeros among all weights of the parameters that have a mask; 0 where none has."""
    found, parameters = manager.sparsity(), named_parameters(model)
    sizes = {name: parameters[name].numel() for name in found if name in parameters}
    return sum(found[name] * size for name, size in sizes.items()) / max(1, sum(sizes.values()))
