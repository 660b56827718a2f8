"""Gradients for importance scores: those of the training loop's own steps, or of losses that a sampler yields.

In training they are all there: the gradient of a masked weight is computed like any other. Under DDP they are the mean
over all processes, so that scores and masks agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS

from sparsify.errors import ArgumentError, DataError, StateError
from sparsify.model import distributed
from sparsify.model.batches import named_fields, sample_count, tensors_in
from sparsify.model.preserved import preserved
from sparsify.model.signature import batch_arguments, inputs_and_target

__all__: list[str] = []

Parameters = Mapping[str, nn.Parameter]
GradSampler = Callable[..., Iterable[Any]] | Sequence[Any]
"""A callable that yields losses, or (data loader, loss function)."""


class StepGradients:
    """The gradients of the optimizer's step at hand, in their true scale.

    They are read before the weights move, and before those of masked weights are set to zero. LBFGS, and any optimizer
    that is given a closure, computes them inside of its step; then they belong to the weights before it, and are kept
    when the closure is done, or read after the step.

    Args:
        optimizer: the one that steps; several, in a list or tuple, of which each call tells the one at hand.
    """

    def __init__(self, optimizer: object) -> None:
        self._several: tuple[object, ...] = tuple(optimizer) if isinstance(optimizer, list | tuple) else (optimizer,)
        self._seen: dict[str, Tensor | None] = {}
        self._kept: dict[str, Tensor] = {}
        self._inside = False
        # Those that were seen to compute gradients in their step without a closure.
        self._known: set[int] = set()
        self._stepping: object = None

    def before(self, parameters: Parameters, *, closure: bool = False, optimizer: object = None) -> dict[str, Tensor]:
        """Those of this step, not to be written to; none where the step computes them. May be called twice.

        Args:
            parameters: those whose gradients are wanted, by name.
            closure: True if the step was given a closure. It may write into the tensors that are there already.
            optimizer: the one that steps; None: the only one.
        """
        stepping = self._several[0] if optimizer is None and self._several else optimizer
        self._stepping = stepping
        self._inside = closure or isinstance(stepping, LBFGS) or id(stepping) in self._known
        self._seen = {name: parameter.grad for name, parameter in parameters.items()}
        self._kept = {}
        if self._inside:
            return {}
        scale = grad_scale(stepping)
        return {name: _true(grad, scale) for name, grad in self._seen.items() if grad is not None}

    def keep(self, parameters: Parameters) -> None:
        """Copies those that a closure has just computed inside of the step."""
        grads = {name: parameter.grad for name, parameter in parameters.items()}
        self._kept = {name: _true(grad, None).clone() for name, grad in grads.items() if grad is not None}

    def after(self, parameters: Parameters) -> dict[str, Tensor] | None:
        """Those that the step computed itself; None where it did not, and `before` gave them."""
        seen, self._seen = self._seen, {}
        kept, self._kept = self._kept, {}
        now = {name: parameter.grad for name, parameter in parameters.items()}
        if not self._inside:
            if all(grad is None or grad is seen.get(name) for name, grad in now.items()):
                return None
            self._known.add(id(self._stepping))
        return {
            name: kept[name] if name in kept else _true(grad, None) for name, grad in now.items() if grad is not None
        }


class RoundGradients:
    """Copies of the gradients of one round of several optimizers, each taken at the step that it belongs to.

    A round ends when the optimizer whose steps count has stepped. What other optimizers do after it belongs to the next
    one; of several steps of one optimizer in a round the last is meant.

    Args:
        optimizer: the one that steps, or several.
    """

    def __init__(self, optimizer: object) -> None:
        self._steps = StepGradients(optimizer)
        self._found: dict[str, Tensor] = {}

    def before(self, parameters: Parameters, *, closure: bool, optimizer: object) -> None:
        """To be called before a step, also twice, with the parameters that it moves."""
        for name in parameters:
            self._found.pop(name, None)
        self._found |= _copied(self._steps.before(parameters, closure=closure, optimizer=optimizer))

    def keep(self, parameters: Parameters) -> None:
        """To be called when a closure has computed gradients inside of the step."""
        self._steps.keep(parameters)

    def after(self, parameters: Parameters) -> None:
        """To be called after the step, with the same parameters."""
        self._found |= _copied(self._steps.after(parameters) or {})

    def take(self) -> dict[str, Tensor]:
        """Those of the round, in float32 or better, and the caller's own; the next round begins."""
        found, self._found = self._found, {}
        return found


def _copied(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Before the step: some optimizers write into the gradients (foreach SGD with Nesterov's momentum), and those of
    # masked weights are set to zero.
    return {
        name: gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
        for name, gradient in found.items()
    }


def grad_scale(optimizer: object) -> Tensor | None:
    """The factor of all gradients while a fused optimizer steps under GradScaler; None: they are true."""
    scale = getattr(optimizer, "grad_scale", None)
    return scale if isinstance(scale, Tensor) else None


def _true(grad: Tensor, scale: Tensor | None) -> Tensor:
    grad = grad.detach()
    if grad.layout != torch.strided:
        grad = grad.to_dense()
    return grad if scale is None else grad / scale.to(grad.device, grad.dtype)


def refuse_closures(optimizer: object, who: str) -> None:
    """For work that changes the weights around a step, in which no forward may be computed.

    Raises:
        StateError: the optimizer computes its gradients in its step.
    """
    for one in optimizer if isinstance(optimizer, list | tuple) else (optimizer,):
        if isinstance(one, LBFGS):
            raise closures(who, "LBFGS")


def closures(who: str, what: str) -> StateError:
    """The error for gradients that were computed inside of a step."""
    return StateError(
        f"{who}: {what} computes the loss inside of the optimizer's step, where the weights are not those of the "
        "forward pass. Call backward() before step() without a closure, with another optimizer than LBFGS."
    )


# ---------------------------------------------------------------------------------------------- sampled


_SAMPLING: ContextVar[bool] = ContextVar("sampling", default=False)


def sampling() -> bool:
    """True if the forward at hand is one of a gradient sampler, and none of training."""
    return _SAMPLING.get()


def check_sampler(sampler: object) -> None:
    """Refuses what is no `grad_sampler`.

    Raises:
        ArgumentError: it is neither a callable nor (data loader, loss function).
    """
    if sampler is None or callable(sampler):
        return
    if isinstance(sampler, tuple | list) and len(sampler) == 2 and callable(sampler[1]):
        data = sampler[0]
        if callable(data) or (isinstance(data, Iterable) and not isinstance(data, str)):
            return
    raise ArgumentError(
        f"grad_sampler: {type(sampler).__name__} is neither a callable that yields losses nor (data loader, loss "
        "function). Give one of them, or None to use the gradients of training."
    )


def sampled(
    model: nn.Module, parameters: Parameters, sampler: GradSampler, count: int, options: Mapping[str, Any] | None = None
) -> Iterator[dict[str, Tensor]]:
    """The gradients of `count` losses, one after the other; those of parameters that a loss does not reach are missing.

    Nothing of training changes: gradients, buffers (the statistics of batches) and the RNG are as before at the end.

    Args:
        model: the model that the losses are of; it is left as it was.
        parameters: those whose gradients are wanted, by name.
        sampler: a callable that gives an iterable of losses, or (data loader, loss function): the loader, or a callable
            that gives one, yields (inputs, ..., target), and the loss is loss function(model(inputs, ...), target).
            What ends too early is begun again.
        count: number of losses.
        options: arguments of the callable.

    Raises:
        DataError: it yields nothing, or no loss.
    """
    losses: Iterator[Any] | None = None
    with _sampling_from(model):
        for _ in range(count):
            loss = None if losses is None else next(losses, None)
            if loss is None:
                losses = _sampled_losses(model, sampler, options or {})
                loss = next(losses, None)
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                what = "nothing" if loss is None else f"a {type(loss).__name__} that cannot be back-propagated"
                raise DataError(f"grad_sampler gave {what}; it must give losses: tensors of one element with a graph.")
            for parameter in model.parameters():
                parameter.grad = None
            loss.backward()  # type: ignore[no-untyped-call]
            found = {name: p.grad.detach() for name, p in parameters.items() if p.grad is not None}
            distributed.average(found)
            yield found


def mean_squares(model: nn.Module, parameters: Parameters, sampler: GradSampler, count: int) -> dict[str, Tensor]:
    """The mean of the squared gradients of each weight over `count` losses, in float32 or better: the diagonal of the
    empirical Fisher matrix. Arguments and errors as of `sampled`."""
    found = {
        name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for name, p in parameters.items()
    }
    for grads in sampled(model, parameters, sampler, count):
        for name, grad in grads.items():
            found[name] += grad.to(found[name].dtype).square() / count
    return found


def _sampled_losses(model: nn.Module, sampler: GradSampler, options: Mapping[str, Any]) -> Iterator[Any]:
    if callable(sampler):
        yield from sampler(**options)
        return
    data, loss_function = sampler
    for batch in data(**options) if callable(data) else data:
        if not sample_count(batch):
            continue
        yield _loss(model, batch, loss_function)


def _loss(model: nn.Module, batch: object, loss_function: Callable[..., Any]) -> Any:
    single = len(batch) < 2 if isinstance(batch, tuple | list) else named_fields(batch) is None
    if single:
        raise DataError(
            f"grad_sampler: the loader gave a {type(batch).__name__} where (inputs, target) was expected. Give a "
            "loader of pairs, or a callable that yields losses."
        )
    inputs, target = inputs_and_target(model, batch)
    args, kwargs = batch_arguments(model, inputs)
    device = next((tensor.device for tensor in tensors_in((args, kwargs))), None)
    if isinstance(target, Tensor) and device is not None:
        target = target.to(device)
    return loss_function(model(*args, **kwargs), target)


@contextmanager
def _sampling_from(model: nn.Module) -> Iterator[None]:
    """The forwards in the block are told to be of a sampler, and leave the model as it was."""
    token = _SAMPLING.set(True)
    try:
        with preserved(model), torch.enable_grad():
            yield
    finally:
        _SAMPLING.reset(token)
