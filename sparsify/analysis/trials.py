"""Measures a model's loss on the same batches with some of its weights changed, and restores the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.errors import ArgumentError, DataError
from sparsify.model.batches import mapped, named_fields, sample_count, tensors_in
from sparsify.model.preserved import eval_mode_, preserved, preserved_rng
from sparsify.model.signature import batch_arguments, inputs_and_target, named_outputs
from sparsify.model.targets import is_finite

__all__: list[str] = []

Loss = Callable[[Any, Any], Any]
DRAWS = 4
"""Number of labels drawn from the model's outputs for each batch: more add little, fewer leave a noisy estimate."""


@dataclass(frozen=True)
class Batch:
    """One batch as the model is called with it, and the target of the loss; None where there is none."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any
    samples: int


def collected_batches(
    model: nn.Module, data: Iterable[Any], *, with_target: bool, most: int | None, where: str
) -> list[Batch]:
    """The batches of `data`, at most `most`, read once so that every trial sees the same.

    Args:
        model: the model that the batches are for; they are moved to its device.
        data: an iterable of batches, read once.
        with_target: whether the last of a tuple goes to the loss, not to the model. Of a dict all goes to the loss
            too, of one tensor the tensor itself. False: the model gets as many as it takes, and the last is a target
            where it is left over.
        most: number of batches at most; None: all.
        where: the name of the caller, before messages.

    Raises:
        ArgumentError: `data` is no iterable of batches. DataError: it is empty, or a batch holds no tensor.
    """
    if isinstance(data, Tensor):
        raise ArgumentError(f"{where}: data is one tensor: give an iterable of batches; [x] for a single one.")
    if isinstance(data, str | bytes) or named_fields(data) is not None or not isinstance(data, Iterable):
        raise ArgumentError(f"{where}: data is a {type(data).__name__}: give an iterable of batches, as a loader.")
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise ArgumentError(f"{where}: batches={most!r}: give a whole number above 0, or None for all.")
    with preserved_rng(model):  # a loader draws its order from torch's generator
        read = (_batch(model, one, at, with_target, where) for at, one in enumerate(data))
        # Those without a sample have no loss.
        batches = list(islice((batch for batch in read if batch.samples), most))
    if not batches:
        raise DataError(f"{where}: data holds no batch. Give an iterable that can be gone through once more.")
    return batches


def _batch(model: nn.Module, batch: object, at: int, with_target: bool, where: str) -> Batch:
    tensors = list(tensors_in(batch))
    if not tensors:
        raise DataError(f"{where}: batch {at} of data is a {type(batch).__name__} without a tensor.")
    samples = sample_count(tensors)
    inputs, target = inputs_and_target(model, batch) if with_target else (batch, None)
    args, kwargs = batch_arguments(model, inputs)
    if not with_target and isinstance(batch, tuple | list) and len(args) + len(kwargs) < len(batch):
        target = batch[-1]
    device = next((tensor.device for tensor in tensors_in((args, kwargs))), None)
    target = mapped(target, lambda tensor: tensor if device is None else tensor.to(device))
    return Batch(args, kwargs, target, samples)


class Trials:
    """The mean loss of a model over `batches`, as it is (`base`) or with other weights.

    In eval mode; between calls the model is what it was: weights, buffers, modes, random state, gradients.

    Args:
        model: it is run in eval mode.
        batches: as `collected_batches` gives them.
        loss: of the model's outputs and a batch's target. None: the outputs' own `loss` where they have one; else their
            distance from those of the model as it is now: the Kullback-Leibler divergence of outputs that are named
            "logits" or stand beside whole-number targets, or of others the mean square over that of the outputs.
        where: the name of the caller, before messages.

    Raises:
        DataError: the loss is not finite, or no number.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], loss: Loss | None, *, where: str) -> None:
        self.model = model
        self.batches = batches
        self.where = where
        self.samples = sum(batch.samples for batch in batches)
        self._loss = loss
        self._dense: list[dict[str, Tensor]] = []
        self._classes: list[dict[str, int]] = []
        self.base = self._measured("as it is")

    def with_weights(self, parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor], what: str) -> float:
        """The loss with `values` in the place of those parameters; `what` names them in errors."""
        with replaced_weights(parameters, values):
            return self._measured(what)

    def curvature(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """The diagonal of the Fisher matrix: for each weight an estimate of the loss's second derivative, >= 0.

        With a loss: mean squares of the gradients of batches, times their samples (the gradient itself is near zero in
        a trained model). Without one, of answers that are drawn from the model's own outputs: then its mean is the
        exact curvature of the distance, whatever the labels (Martens 2020, https://arxiv.org/abs/1412.1193).

        Raises:
            DataError: a loss cannot be differentiated, or a gradient is not finite.
        """
        found = {
            name: torch.zeros(p.shape, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
            for name, p in parameters.items()
        }
        for at, batch in enumerate(self.batches):
            with preserved(self.model), torch.enable_grad():
                eval_mode_(self.model)
                for parameter in parameters.values():
                    parameter.requires_grad_(True)
                self._add_squares(found, parameters, at, batch)
        for name, value in found.items():
            if not is_finite(value):
                raise DataError(f"{self.where}: the gradient of {name!r} is not finite on this data.")
        return found

    def _add_squares(
        self, found: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], at: int, batch: Batch
    ) -> None:
        outputs = self.model(*batch.args, **batch.kwargs)
        scalars = self._draws(outputs, at) if self._dense else [self._number(outputs, batch) * batch.samples**0.5]
        for scalar in scalars:
            if not isinstance(scalar, Tensor) or not scalar.requires_grad:
                raise DataError(f"{self.where}: the loss cannot be differentiated; method='data' needs no gradients.")
            gradients = torch.autograd.grad(
                scalar, list(parameters.values()), retain_graph=len(scalars) > 1, allow_unused=True
            )
            share = batch.samples / self.samples / len(scalars)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    dense = gradient.to_dense() if gradient.layout != torch.strided else gradient
                    found[name] += dense.to(found[name].dtype).square_() * share

    def _measured(self, what: str) -> float:
        first = not hasattr(self, "base")
        total = 0.0
        for at, batch in enumerate(self.batches):
            with preserved(self.model), torch.no_grad():
                eval_mode_(self.model)
                outputs = self.model(*batch.args, **batch.kwargs)
                if first and self._loss is None and _own_loss(outputs) is None:
                    self._keep(outputs, batch)
                value = self._distance(outputs, at) if self._dense else self._number(outputs, batch)
            number = float(value.detach() if isinstance(value, Tensor) else value)
            if not math.isfinite(number):
                raise DataError(
                    f"{self.where}: the loss of batch {at} is {number} with the model {what}. Look for NaN in the data "
                    "and the weights, and for what overflows in the loss."
                )
            total += number * batch.samples
        return total / self.samples

    def _number(self, outputs: object, batch: Batch) -> Tensor | float:
        value = _own_loss(outputs) if self._loss is None else self._loss(outputs, batch.target)
        if isinstance(value, Tensor) and value.numel() == 1:
            return value.reshape(())
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        raise DataError(f"{self.where}: the loss is a {type(value).__name__}{shape}; it must give one number, a mean.")

    # -- distances from the model as it was

    def _keep(self, outputs: object, batch: Batch) -> None:
        given = {name: value for name, value in named_outputs(outputs)[0].items() if value.is_floating_point()}
        classes = {name: dim for name, value in given.items() if (dim := _class_dim(name, value, batch.target)) >= 0}
        if not given:
            raise DataError(f"{self.where}: the model gives no floating-point tensor to compare; give a loss.")
        # Beside logits other outputs (hidden states, caches) add nothing.
        self._dense.append({name: value.clone() for name, value in given.items() if not classes or name in classes})
        self._classes.append(classes)

    def _distance(self, outputs: object, at: int) -> Tensor:
        now = named_outputs(outputs)[0]
        found = []
        for name, dense in self._dense[at].items():
            if name in self._classes[at]:
                dim = self._classes[at][name]
                wanted = dense.float().log_softmax(dim)
                difference = wanted - now[name].float().log_softmax(dim)
                # A class that is masked by -inf has no share, and inf - inf no value.
                each = torch.where(wanted.isneginf(), 0.0, wanted.exp() * difference)
                # Rounding alone can give a negative value.
                found.append(each.sum(dim).mean().clamp(min=0.0))
            else:
                power = dense.float().square().mean().clamp(min=1e-30)
                found.append((now[name].float() - dense.float()).square().mean() / power)
        return torch.stack(found).mean()

    def _draws(self, outputs: object, at: int) -> list[Tensor]:
        """Numbers whose squared gradients are, in the mean, the curvature of `_distance`."""
        now = named_outputs(outputs)[0]
        scalars = []
        for draw in range(DRAWS):
            found = []
            for name, dense in self._dense[at].items():
                generator = torch.Generator(dense.device).manual_seed(DRAWS * at + draw)
                if name in self._classes[at]:
                    logs = now[name].float().movedim(self._classes[at][name], -1).flatten(0, -2).log_softmax(-1)
                    labels = torch.multinomial(logs.detach().exp(), 1, generator=generator)
                    found.append(logs.gather(1, labels).sum() / len(logs) ** 0.5)
                else:
                    power = dense.float().square().mean().clamp(min=1e-30)
                    noise = torch.randn(dense.shape, generator=generator, device=dense.device)
                    found.append((now[name].float() * noise).sum() * (2 / (power * dense.numel())).sqrt())
            scalars.append(torch.stack(found).sum() / len(found) ** 0.5)
        return scalars


def _own_loss(outputs: object) -> Tensor | None:
    value = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    return value if isinstance(value, Tensor) and value.numel() == 1 else None


def _class_dim(name: str, output: Tensor, target: object) -> int:
    """The dimension of the classes; -1 where the output is no distribution over classes."""
    if output.dim() < 2:
        return -1
    if isinstance(target, Tensor) and not target.is_floating_point() and not target.is_complex():
        for dim in (1, output.dim() - 1):
            if target.shape == output.shape[:dim] + output.shape[dim + 1 :]:
                return dim
    if name == "logits":
        return 1 if output.dim() >= 4 else output.dim() - 1
    return -1


@contextmanager
def replaced_weights(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Puts `values` into parameters for a block. After it, also if interrupted, the old ones are back, bit for bit."""
    kept = {name: parameters[name].detach().clone() for name in values}

    def put_back() -> None:
        while kept:
            name = next(iter(kept))
            parameters[name].data.copy_(kept[name])
            del kept[name]

    try:
        for name, value in values.items():
            # Not through the parameter: a graph that the user still holds would find its weights changed.
            parameters[name].data.copy_(value)
        yield
    finally:
        try:
            put_back()
        except KeyboardInterrupt:
            put_back()
            raise
