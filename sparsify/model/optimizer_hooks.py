"""Hooks on what belongs to the user: called around every step of any optimizer, and at forward of a model; undone by
handle.

A copy of the user's object (deepcopy, pickle) works without us: hooks that were copied along are inert.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ParamSpec, Protocol

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sparsify.errors import ArgumentError
from sparsify.model.optimizer_parts import held_optimizers, is_hookable, wrapped_optimizer, wrappers_around
from sparsify.model.sharding import local

__all__: list[str] = []

P = ParamSpec("P")

CARRIED = "sparsify"
"""The key in an optimizer's state_dict under which the state of a run travels along."""


class SteppableOptimizer(Protocol):
    """The least that a training loop's optimizer has; a torch Optimizer has it, and wrappers of one."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    @property
    def step(self) -> Callable[..., Any]: ...


class Callback:
    """A hook that calls a function; a copy of it (deepcopy, pickle) calls nothing."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any] | None = None) -> None:
        self._function = function

    def __call__(self, *args: object, **kwargs: object) -> Any:
        return None if self._function is None else self._function(*args, **kwargs)

    # Asked by copy, deepcopy and pickle alike.
    def __reduce__(self) -> tuple[type[Callback], tuple[()]]:
        return (type(self), ())


class ModelCallback(Callback):
    """A hook of a model, to a bound method whose owner it does not keep alive: the model outlives the run.

    Not called in compiled code, which keeps the hooks of its first call and may ignore later ones: "Limitations" of
    https://docs.pytorch.org/docs/stable/torch.compiler_nn_module.html, seen in torch 2.13.0.
    """

    __slots__ = ()

    def __init__(self, method: Callable[..., Any] | None = None) -> None:
        super().__init__(None if method is None else weakref.WeakMethod(method))

    def __call__(self, *args: object, **kwargs: object) -> Any:
        if self._function is None or torch.compiler.is_compiling():
            return None
        method = self._function()
        return None if method is None else method(*args, **kwargs)


class NestedState(Protocol):
    """State that travels inside the state_dict of an optimizer."""

    def save(self) -> dict[str, Any]:
        """The state to be put in, when the optimizer gives its own."""

    def load_nested(self, state: Mapping[str, Any] | None) -> None:
        """Called before the optimizer loads a state_dict, with what was put in; None: there was nothing in it."""


class StepHooks:
    """`before(closure)` and `after()` around every step of `optimizer`, and `loaded()` when its state was loaded.

    `closure` is True if the step was given a function: forward and backward are then inside the step (LBFGS; Lightning
    steps every optimizer so), and what gradients stand there before it are old.

    An optimizer that calls `super().step()` calls them twice, inner ones inside the outer; after a step that raised,
    `after` is missing: torch wraps the `step` of each class (`Optimizer.profile_hook_step`), seen in torch 2.13.0.
    `torch.compile(optimizer.step)` calls them outside the compiled code.

    Args:
        optimizer: the user's optimizer, torch's or another that steps.
        before: called before each step.
        after: called after each step.
        loaded: called when the optimizer has loaded a state_dict.
        nested: the state inside the optimizer's state_dict, under `CARRIED`; None: nothing.
        computed: called when a closure that the step was given has computed gradients, once or more in a step.

    Attributes:
        optimizer: the object whose `param_groups` are real: the torch Optimizer inside a wrapper, or what was given.
        given: what the user goes on with: the very object that was given, or a `SteppedOptimizer` around one that is no
            torch Optimizer.

    Raises:
        ArgumentError: `optimizer` is nothing that steps.
    """

    def __init__(
        self,
        optimizer: object,
        before: Callable[[bool], None],
        after: Callable[[], None],
        loaded: Callable[[], None],
        nested: NestedState | None = None,
        computed: Callable[[], None] = lambda: None,
    ) -> None:
        self.optimizer = innermost_optimizer(optimizer)
        self.given: Any = optimizer
        self._handles: list[RemovableHandle] = []
        self._hook: Callback | None = None
        self._methods: list[WatchedMethod] = []
        # True while `optimizer` steps, as far as is known: after a step that raised it stays so until the next one.
        self._running = False
        # A compiled step would trace our Python: disabled, it is called between the compiled parts (0.2 microseconds).
        self._before, self._after = _uncompiled(before), _uncompiled(after)
        self._loaded, self._nested = loaded, nested
        self._computed = computed
        if not is_hookable(self.optimizer):
            self.given = SteppedOptimizer(optimizer, self._begins, self._ends, loaded, nested, computed)
            return
        self._hook = Callback(self._pre_hook)

    def _begins(self, closure: bool) -> None:
        self._running = True
        self._before(closure)

    def _ends(self) -> None:
        self._after()
        self._running = False

    def _pre_hook(self, _: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # The first argument is the optimizer itself.
        closure = _has_closure(args[1:], kwargs)
        self._begins(closure)
        if not closure:
            return None
        watched, named = _watched(args[1:], kwargs, self._computed)
        return (*args[:1], *watched), named

    def _held_pre_hook(self, _: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._running:
            self._before(_has_closure(args[1:], kwargs))

    def _held_post_hook(self, *_: object) -> None:
        # Inside of a step of `optimizer` its own end comes later.
        if not self._running:
            self._after()

    def _attach_around(self) -> None:
        """Hooks for what steps under another name: SAM's `second_step` steps the optimizer that it holds, and Lookahead
        moves weights when the one inside has stepped."""
        for held in held_optimizers(self.optimizer):
            if is_hookable(held):
                self._handles.append(held.register_step_pre_hook(Callback(self._held_pre_hook)))
                self._handles.append(held.register_step_post_hook(Callback(self._held_post_hook)))
        for wrapper in wrappers_around(self.given) if self._hook is not None else ():
            # Not due any more, so that masks are applied and nothing else.
            self._methods.append(WatchedMethod(wrapper, "step", after=self._after))
        if callable(getattr(self.optimizer, "first_step", None)):
            # Along gradients that are zero there, masked weights are not perturbed.
            self._methods.append(WatchedMethod(self.optimizer, "first_step", before=self._computed))

    def attach(self) -> None:
        """Hooks in; until then nothing of the optimizer is touched."""
        self._attach_around()
        if self._hook is None:
            return
        # One by one: what Ctrl-C leaves behind can be removed.
        real = self.optimizer
        self._handles.append(real.register_step_pre_hook(self._hook))
        self._handles.append(real.register_step_post_hook(Callback(lambda *_: self._after())))
        self._handles.append(real.register_load_state_dict_post_hook(Callback(lambda _: self._loaded())))
        nested = self._nested
        if nested is not None:
            key = _free_key(real)
            put_in = NestedStateCallback(lambda _, state: with_nested_state(state, nested, key))
            self._handles.append(real.register_state_dict_post_hook(put_in))
            take_out = Callback(lambda _, state: without_nested_state(state, nested, key))
            self._handles.append(real.register_load_state_dict_pre_hook(take_out))

    @property
    def attached(self) -> bool:
        """True if the hooks are still there.

        deepcopy and pickle of an optimizer drop them without a word: `Optimizer.__getstate__` of torch 2.13.0 keeps
        state and groups alone.
        """
        if isinstance(self.given, SteppedOptimizer):
            return self.given.watched
        return any(hook is self._hook for hook in self.optimizer._optimizer_step_pre_hooks.values())

    def remove(self) -> None:
        """Takes the hooks off again; may be called twice."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for method in self._methods:
            method.remove()
        self._methods = []
        if isinstance(self.given, SteppedOptimizer):
            self.given.release()


class WatchedMethod:
    """A method of one object, called with `before` and `after` around it, until it is removed.

    It stays a method: LR schedulers of torch wrap `step`, and ask for the function behind it.

    Args:
        owner: the object; others of its class are left alone.
        name: the method's name.
        before: called before it.
        after: called after it.
    """

    def __init__(
        self,
        owner: Any,
        name: str,
        *,
        before: Callable[[], None] | None = None,
        after: Callable[[], None] | None = None,
    ) -> None:
        self._owner, self._name = owner, name
        # A scheduler may have put its own there already.
        self._own = vars(owner).get(name)
        method = getattr(owner, name)
        self._before, self._after = before, after

        @functools.wraps(method)
        def watched(_: object, *args: object, **kwargs: object) -> Any:
            if self._before is not None:
                self._before()
            result = method(*args, **kwargs)
            if self._after is not None:
                self._after()
            return result

        self._watched = types.MethodType(watched, owner)
        setattr(owner, name, self._watched)

    def remove(self) -> None:
        """The object has its method again; where another one was put around it since, ours only passes on."""
        self._before = self._after = None
        if vars(self._owner).get(self._name) is self._watched:
            if self._own is None:
                delattr(self._owner, self._name)
            else:
                setattr(self._owner, self._name, self._own)


class NestedStateCallback(Callback):
    """A hook that puts nested state into an optimizer's state_dict."""

    __slots__ = ()


def _free_key(optimizer: Optimizer) -> str:
    """The key of one more nested state; two managers may share an optimizer, each with a model of its own."""
    there = sum(isinstance(hook, NestedStateCallback) for hook in optimizer._optimizer_state_dict_post_hooks.values())
    return f"{CARRIED}#{there + 1}" if there else CARRIED


def with_nested_state(state: Any, nested: NestedState, key: str = CARRIED) -> Any:
    """A state_dict with the nested state under `key`; `state` itself where it is no dict."""
    return {**state, key: nested.save()} if isinstance(state, dict) else state


def without_nested_state(state: Any, nested: NestedState, key: str = CARRIED) -> Any:
    """The optimizer's own state_dict: what `with_nested_state` put in is loaded where it belongs, and left out."""
    if not isinstance(state, Mapping) or key not in state:
        nested.load_nested(None)
        return state
    nested.load_nested(state[key])
    return {name: value for name, value in state.items() if name != key}


class SteppedOptimizer:
    """Stands before an optimizer that is no torch Optimizer and tells of its steps; all else is the optimizer's.

    Where the optimizer has a state_dict, a dict, and load_state_dict, nested state travels inside.
    """

    def __init__(
        self,
        optimizer: object,
        before: Callable[[bool], None] | None = None,
        after: Callable[[], None] | None = None,
        loaded: Callable[[], None] | None = None,
        nested: NestedState | None = None,
        computed: Callable[[], None] | None = None,
    ) -> None:
        self.__dict__.update(
            _optimizer=optimizer,
            _before=before,
            _after=after,
            _loaded=loaded,
            _nested=nested,
            _computed=computed,
        )

    def step(self, *args: object, **kwargs: object) -> Any:
        """The optimizer's step with `args` and `kwargs`; what it returns."""
        before, after, computed = (self.__dict__[key] for key in ("_before", "_after", "_computed"))
        if before is not None:
            closure = _has_closure(args, kwargs)
            before(closure)
            if closure and computed is not None:
                args, kwargs = _watched(args, kwargs, computed)
        result = self.__dict__["_optimizer"].step(*args, **kwargs)
        if after is not None:
            after()
        return result

    @property
    def watched(self) -> bool:
        """True if steps are told to somebody."""
        return self.__dict__["_after"] is not None

    def release(self) -> None:
        """From now on it only passes on."""
        self.__dict__.update(_before=None, _after=None, _loaded=None, _nested=None, _computed=None)

    def __getattr__(self, name: str) -> Any:
        # Unpickling asks for attributes before there are any.
        if "_optimizer" not in self.__dict__:
            raise AttributeError(name)
        found = getattr(self.__dict__["_optimizer"], name)
        # Here and not as methods: not every optimizer has them, and callers ask.
        if self.__dict__["_nested"] is not None and name in ("state_dict", "load_state_dict"):
            return partial(self._saved if name == "state_dict" else self._load, found)
        return found

    def _saved(self, state_dict: Callable[..., Any], *args: object, **kwargs: object) -> Any:
        return with_nested_state(state_dict(*args, **kwargs), self.__dict__["_nested"])

    def _load(self, load_state_dict: Callable[..., Any], state_dict: Any, *args: object, **kwargs: object) -> Any:
        result = load_state_dict(without_nested_state(state_dict, self.__dict__["_nested"]), *args, **kwargs)
        self.__dict__["_loaded"]()
        return result

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.__dict__["_optimizer"], name, value)

    def __reduce__(self) -> tuple[type[SteppedOptimizer], tuple[Any]]:
        return (SteppedOptimizer, (self.__dict__["_optimizer"],))


def innermost_optimizer(optimizer: object, where: str = "optimizer") -> Any:
    """The object inside `optimizer` that really steps: the torch Optimizer that a wrapper holds, or `optimizer` itself.

    Some wrappers subclass Optimizer without initializing it (AcceleratedOptimizer of accelerate 1.15), and registering
    a hook on them fails for want of `_optimizer_step_pre_hooks`, as in
    https://github.com/kozistr/pytorch_optimizer/issues/122; they hold the real one, as `.optimizer` or otherwise.
    Others are no Optimizer, but share the `param_groups` of one.

    Args:
        optimizer: the user's optimizer.
        where: what the user calls it, for messages.

    Raises:
        ArgumentError: it has no `step` and `param_groups`.
    """
    inner: Any = optimizer
    seen = set()
    while inner is not None and not is_hookable(inner) and id(inner) not in seen:
        seen.add(id(inner))
        inner = wrapped_optimizer(inner)
    if is_hookable(inner):
        return inner
    if isinstance(optimizer, type) or not (
        callable(getattr(optimizer, "step", None)) and isinstance(getattr(optimizer, "param_groups", None), list)
    ):
        raise ArgumentError(
            f"{where}: {_kind_of(optimizer)} is no optimizer; it needs a step() and a list of param_groups. Give a "
            "torch.optim.Optimizer, or use initialize(model) where there is none."
        )
    return optimizer


def _uncompiled(function: Callable[P, None]) -> Callable[P, None]:
    disabled: Callable[P, None] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


def _has_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """True if a step is called with a function that computes loss and gradients."""
    return any(callable(argument) for argument in (*args, *kwargs.values()))


def _watched(
    args: tuple[Any, ...], kwargs: dict[str, Any], computed: Callable[[], None]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a step, each function among them one that calls `computed` when it is done."""

    def watched(argument: Any) -> Any:
        if not callable(argument):
            return argument

        def closure(*given: object, **named: object) -> Any:
            result = argument(*given, **named)
            computed()
            return result

        return closure

    return tuple(map(watched, args)), {key: watched(argument) for key, argument in kwargs.items()}


def _kind_of(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"an object of type {type(value).__name__}"


def only_sets_up_state(optimizer: object) -> bool:
    """True if the step at hand is none of training, but has the optimizer set up its state.

    `torch.distributed.checkpoint.state_dict` steps an optimizer without state so, with gradients and learning rates of
    zero (`_init_optim_state`, seen in torch 2.13.0), before it saves or loads one.
    """
    if getattr(optimizer, "state", True):
        return False
    groups: list[dict[str, Any]] = getattr(optimizer, "param_groups", [])
    for group in groups:
        rate = group.get("lr")
        # A learning rate on a device is none that was just set to zero; asking would wait for it.
        if rate is None or (isinstance(rate, torch.Tensor) and rate.device.type != "cpu") or rate != 0.0:
            return False
    grads = [parameter.grad for group in groups for parameter in group["params"]]
    return not any(grad is None or local(grad).any() for grad in grads) and bool(grads)


def skips_step(optimizer: object) -> bool:
    """True if the step at hand changes nothing because gradients overflowed.

    A fused optimizer under GradScaler runs its hooks on such steps too; the flag is then on the optimizer (the table in
    https://github.com/pytorch/pytorch/pull/97415#issuecomment-1502039859, seen in torch 2.13.0). Reading it waits for
    the device: the one flag a step that nothing else can tell.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    return isinstance(found_inf, torch.Tensor) and bool(found_inf.item())
