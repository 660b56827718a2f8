"""Steps of optimizers that nobody gave us, seen where they move parameters that are ours."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from sparsify.model.optimizer_hooks import ModelCallback

__all__: list[str] = []


MANY = 10
"""Steps after which it is told unasked: one may be a trial."""
_WATCHING: list[tuple[weakref.ref[ForeignSteps], list[RemovableHandle]]] = []


class ForeignSteps:
    """Tells of a torch Optimizer that is not among `own` and moves some of `parameters`: at its tenth step, or asked.

    By torch's hooks for all optimizers of the process, which cost 0.2 microseconds a step; they go with this object. A
    step inside of one that is seen, or around one (wrappers that are optimizers themselves), is none.

    Args:
        own: the optimizers whose steps are seen.
        parameters: gives those that nobody else should move.
        seen: gives the number of steps of `own` so far, and whether one is under way.
        tell: called once, with the optimizer and the number of parameters that it shares.
    """

    def __init__(
        self,
        own: Sequence[object],
        parameters: Callable[[], Iterable[Tensor]],
        seen: Callable[[], tuple[int, bool]],
        tell: Callable[[Optimizer, int], None],
    ) -> None:
        self._own = [id(one) for one in own]
        self._parameters, self._seen, self._tell = parameters, seen, tell
        self._begun: dict[int, int] = {}
        self._innocent: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._suspects: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._handles: list[RemovableHandle] = []
        self._told = False

    def watch(self) -> None:
        """Begins; `close` ends it."""
        # Those that were dropped are inert. Not removed when they are collected: that may be in the middle of a step,
        # while torch walks over the hooks.
        for watcher, handles in list(_WATCHING):
            if watcher() is None:
                _remove(handles)
                _WATCHING.remove((watcher, handles))
        _WATCHING.append((weakref.ref(self), self._handles))
        self._handles.append(register_optimizer_step_pre_hook(ModelCallback(self._before)))
        self._handles.append(register_optimizer_step_post_hook(ModelCallback(self._after)))

    def close(self) -> None:
        """Removes the hooks; may be called twice."""
        _remove(self._handles)
        _WATCHING[:] = [(watcher, handles) for watcher, handles in _WATCHING if handles is not self._handles]

    def tell(self, shared: int | None = None) -> None:
        """Tells of an optimizer that stepped, where one did; `shared` is the number of parameters that it moves."""
        for optimizer in list(self._suspects)[:1]:
            if not self._told:
                self._told = True
                self._tell(optimizer, self._shared(optimizer) if shared is None else shared)

    def _shared(self, optimizer: Optimizer) -> int:
        ours = {id(parameter) for parameter in self._parameters()}
        return sum(id(p) in ours for group in optimizer.param_groups for p in group["params"])

    def _before(self, optimizer: Optimizer, *_: Any) -> None:
        if id(optimizer) not in self._own and not self._told:
            self._begun[id(optimizer)] = self._seen()[0]

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        if self._told or id(optimizer) in self._own or self._innocent.get(optimizer) == len(optimizer.param_groups):
            return
        count, inside = self._seen()
        if self._begun.pop(id(optimizer), -1) != count or inside:
            return
        shared = self._shared(optimizer)
        if shared:
            self._suspects[optimizer] = self._suspects.get(optimizer, 0) + 1
            if self._suspects[optimizer] >= MANY:
                self.tell(shared)
        else:
            self._innocent[optimizer] = len(optimizer.param_groups)


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()
