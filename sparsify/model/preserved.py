"""A model that is run for our own purposes, and left as the user gave it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

__all__: list[str] = []


@contextmanager
def preserved(
    model: nn.Module,
    *,
    modes: bool = True,
    buffers: bool = True,
    grads: bool = True,
    requires_grad: bool = True,
    rng: bool = True,
) -> Iterator[None]:
    """The model as it was, after the block: also where the block raises, or Ctrl-C ends it.

    Weights are not among what is kept, and no module that the block adds to the model is touched.

    Args:
        model: what the block runs; wrappers and all.
        modes: `training` of each module by itself, past any `train` that a user has overridden.
        buffers: which tensor stands under each name that was there (None, where none stood), and its values. They are
            written without a new version: a graph that the user holds finds the values that it saved. Buffers on the
            meta device, and those without a shape yet, have no values to be kept.
        grads: in the block no parameter has a `.grad`, so that nothing is added to those of the user; afterwards each
            has the very tensor that it had.
        requires_grad: `requires_grad` of each parameter.
        rng: the random state of the CPU and of the CUDA devices that the model is on.
    """
    with ExitStack() as undo:
        for wanted, keep in (
            (modes, _keep_modes),
            (buffers, _keep_buffers),
            (grads, _keep_grads),
            (requires_grad, _keep_requires_grad),
            (rng, _keep_rng),
        ):
            if wanted:
                keep(model, undo)
        yield


@contextmanager
def preserved_rng(model: nn.Module) -> Iterator[None]:
    """The random state as it was, after the block: that of the CPU and of the CUDA devices that `model` is on."""
    with preserved(model, modes=False, buffers=False, grads=False, requires_grad=False):
        yield


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Where the block raises, Ctrl-C included, `model` is what it was: the class, attributes, children, parameters and
    buffers of every module, and what tensor each parameter holds.

    For changes of structure. Values that are written into a tensor stay written.
    """
    modules = list(model.modules())
    kept = [(module, type(module), dict(module.__dict__), _registries(module)) for module in modules]
    tensors = [(p, p.data, p.grad, p.requires_grad) for p in model.parameters()]
    try:
        yield
    except BaseException:
        for module, cls, attributes, registries in kept:
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for name, content in registries.items():
                held: Any = module.__dict__[name]
                held.clear()
                held.update(content)
        for parameter, data, grad, trained in tensors:
            parameter.grad = None
            parameter.data = data
            parameter.requires_grad = trained
            parameter.grad = grad
        raise


def _registries(module: nn.Module) -> dict[str, Any]:
    """Copies of where torch keeps what belongs to a module."""
    names = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    # A scripted module keeps them elsewhere.
    return {name: module.__dict__[name].copy() for name in names if name in module.__dict__}


def eval_mode_(model: nn.Module) -> None:
    """Puts each module of `model` into eval mode, past any `train` that a user has overridden."""
    for module in model.modules():
        module.training = False


def _keep_modes(model: nn.Module, undo: ExitStack) -> None:
    modes = [(module, module.training) for module in model.modules()]

    def put_back() -> None:
        for module, training in modes:
            module.training = training

    _call_at_exit(undo, put_back)


def _keep_buffers(model: nn.Module, undo: ExitStack) -> None:
    places = [(module, name, held) for module in model.modules() for name, held in module._buffers.items()]
    tensors = {id(held): held for _, _, held in places if held is not None}
    values = [(t, t.detach().clone()) for t in tensors.values() if not (t.is_meta or is_lazy(t))]

    def put_back() -> None:
        for module, name, held in places:
            module._buffers[name] = held
        for tensor, value in values:
            tensor.data.copy_(value)

    _call_at_exit(undo, put_back)


def _keep_grads(model: nn.Module, undo: ExitStack) -> None:
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]

    def put_back() -> None:
        for parameter, grad in grads:
            parameter.grad = grad

    _call_at_exit(undo, put_back)
    for parameter, _ in grads:
        parameter.grad = None


def _keep_requires_grad(model: nn.Module, undo: ExitStack) -> None:
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def put_back() -> None:
        for parameter, wanted in flags:
            parameter.requires_grad = wanted

    _call_at_exit(undo, put_back)


def _keep_rng(model: nn.Module, undo: ExitStack) -> None:
    tensors = [*model.parameters(), *model.buffers()]
    cpu = torch.get_rng_state()
    cuda = {device: torch.cuda.get_rng_state(device) for device in {t.device for t in tensors if t.is_cuda}}

    def put_back() -> None:
        torch.set_rng_state(cpu)
        for device, state in cuda.items():
            torch.cuda.set_rng_state(state, device)

    _call_at_exit(undo, put_back)


def _call_at_exit(undo: ExitStack, put_back: Callable[[], None]) -> None:
    """Registers `put_back`; Ctrl-C inside it begins it again, then ends the program as the user wants."""

    def whole() -> None:
        try:
            put_back()
        except KeyboardInterrupt:
            put_back()
            raise

    undo.callback(whole)
