"""Parameters that a modifier adds to the user's optimizer: in a group of their own, which can be taken out again."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.hooks import RemovableHandle

from sparsify.errors import StateError
from sparsify.model import distributed
from sparsify.model.optimizer_hooks import Callback

__all__: list[str] = []

# What LR schedulers keep for each parameter group; they refuse to step where there are more groups than entries.
_PER_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums")


class AddedParameters:
    """Parameters by name, in one group of `optimizer` with the settings (learning rate, ...) of its first group.

    LR schedulers that drive the optimizer get an entry for the group, that of the first one. Under DDP gradients are
    averaged over all processes in backward, as the model's are.

    Checkpoint: the values. What the optimizer remembers of them is in its own state, whose groups have to be as many as
    they were: values are loaded first, which makes the group, then the optimizer's state.

    Args:
        optimizer: the one that steps, or several: then the first that already trains a parameter of fewer than two
            dimensions, since some (Muon) take matrices alone. None, or an empty tuple: nothing can be added.
        who: the modifier, for messages.
        why: what needs parameters that learn, for messages.
        way_out: what to do without them, for messages.
    """

    def __init__(
        self,
        optimizer: object | None,
        who: str,
        *,
        why: str = "features of another width need a projection that learns",
        way_out: str = "choose layers of equal width",
    ) -> None:
        self._optimizer: Any = _taker(optimizer) if isinstance(optimizer, list | tuple) else optimizer
        self._who, self._why, self._way_out = who, why, way_out
        self._handles: list[RemovableHandle] = []
        self.parameters: dict[str, nn.Parameter] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Parameters with these values, which learn from now on.

        Raises:
            StateError: there is no optimizer, or it has room for one group only.
        """
        if not values:
            return
        self._refuse()
        made = {name: nn.Parameter(value.detach().clone()) for name, value in values.items()}
        for parameter in made.values():
            parameter.register_hook(Callback(_averaged))  # type: ignore[no-untyped-call]
        self.parameters |= made
        index = self._index()
        if index is None:
            self._add_group(made)
            return
        group = self._optimizer.param_groups[index]
        group["params"] += made.values()
        if "param_names" in group:
            group["param_names"] += made

    def adopt(self, parameters: Mapping[str, nn.Parameter], **settings: object) -> None:
        """Takes parameters of the model itself, which its checkpoint holds, into the group; `settings` are the group's.

        Those that the optimizer has already stay where they are. Without an optimizer nothing is done: they are the
        model's, and whoever steps has them.

        Raises:
            StateError: the optimizer has room for one group only.
        """
        if self._optimizer is None:
            return
        known = {id(parameter) for group in self._optimizer.param_groups for parameter in group["params"]}
        new = {name: parameter for name, parameter in parameters.items() if id(parameter) not in known}
        if not new:
            return
        self._refuse()
        for parameter in new.values():
            self._handles.append(parameter.register_hook(Callback(_averaged)))  # type: ignore[no-untyped-call]
        self.parameters |= new
        self._add_group(new, **settings)

    def remove(self) -> None:
        """The optimizer has its own groups again and remembers nothing of these; may be called twice."""
        index = None if self._optimizer is None or not self.parameters else self._index()
        if index is not None:
            groups = self._optimizer.param_groups
            for scheduler in _schedulers(self._optimizer):
                _for_each_list(scheduler, len(groups), lambda values: values.pop(index))
            del groups[index]
        for parameter in self.parameters.values():
            if isinstance(getattr(self._optimizer, "state", None), Mapping):
                self._optimizer.state.pop(parameter, None)
        for handle in self._handles:
            handle.remove()
        self.parameters, self._handles = {}, []

    def forget_gradients(self, stepped: object = None) -> None:
        """After a step: not every loop clears the gradients of the optimizer, some those of the model.

        Args:
            stepped: the optimizer that stepped; another one's step changes nothing. None: the only one.
        """
        if stepped is not None and stepped is not self._optimizer:
            return
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Exactly the parameters of `state`; those that are there keep what the optimizer remembers of them."""
        here = self.parameters
        if list(here) != list(state) or any(here[name].shape != value.shape for name, value in state.items()):
            self.remove()
            self.add({name: value.to(device) for name, value in state.items()})
        with torch.no_grad():
            for name, value in state.items():
                self.parameters[name].copy_(value)
                self.parameters[name].grad = None

    def _refuse(self) -> None:
        why = None
        if self._optimizer is None:
            why = "there is no optimizer to train it: call modify() with one"
        elif isinstance(self._optimizer, LBFGS) or not hasattr(self._optimizer, "add_param_group"):
            why = f"{type(self._optimizer).__name__} takes no further parameter groups: train with another optimizer"
        if why is not None:
            raise StateError(f"{self._who}: {self._why}, and {why}, or {self._way_out}.")

    def _index(self) -> int | None:
        """Where the group is: after loading it is another dict, with the same parameters."""
        mine = {id(parameter) for parameter in self.parameters.values()}
        for index, group in enumerate(self._optimizer.param_groups):
            if any(id(parameter) in mine for parameter in group["params"]):
                return index
        return None

    def _add_group(self, made: Mapping[str, nn.Parameter], **settings: object) -> None:
        groups = self._optimizer.param_groups
        first = {key: value for key, value in groups[0].items() if key not in ("params", "param_names")}
        # A tensor (a capturable learning rate) belongs to one group: schedulers multiply it in place.
        group: dict[str, Any] = {
            key: value.clone() if isinstance(value, Tensor) else value for key, value in first.items()
        }
        group.update({key: value for key, value in settings.items() if key in group})
        group["params"] = list(made.items()) if "param_names" in groups[0] else list(made.values())
        before = len(groups)
        self._optimizer.add_param_group(group)
        for scheduler in _schedulers(self._optimizer):
            _for_each_list(scheduler, before, lambda values: values.append(_copied_group(values[0])))


def _taker(optimizers: Sequence[Any]) -> Any:
    """The optimizer that takes parameters of any shape; None where there is none."""
    able = [one for one in optimizers if hasattr(one, "add_param_group") and not isinstance(one, LBFGS)]
    for one in able:
        if any(parameter.dim() < 2 for group in one.param_groups for parameter in group["params"]):
            return one
    return next(iter([*able, *optimizers]), None)


def _copied_group(value: object) -> object:
    return value.clone() if isinstance(value, Tensor) else value


def _for_each_list(scheduler: LRScheduler, length: int, change: Callable[[list[Any]], Any]) -> None:
    for name in _PER_GROUP:
        values = vars(scheduler).get(name)
        if isinstance(values, list) and len(values) == length:
            change(values)


def _schedulers(optimizer: object) -> list[LRScheduler]:
    """The live schedulers that drive `optimizer`, those inside of others too; an optimizer does not know them."""
    return [
        thing
        for thing in gc.get_objects()
        # type(), not isinstance: asking lazy proxies for their __class__ would import what they stand for.
        if issubclass(type(thing), LRScheduler) and getattr(thing, "optimizer", None) is optimizer
    ]


def _averaged(gradient: Tensor) -> Tensor:
    if distributed.world_size() == 1:
        return gradient
    mean = gradient.clone()
    distributed.average({"gradient": mean})
    return mean
