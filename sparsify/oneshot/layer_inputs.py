"""Means and second moments of what layers read, for rounding and bias correction."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify.model.signature import batch_arguments
from sparsify.model.targets import named_modules
from sparsify.quantization.conversion import original_type
from sparsify.quantization.weight_grid import TRANSPOSED, stores_transposed, weight_of
from sparsify.quantization.wiring import Converted, input_quantizer

__all__: list[str] = []

ROWS_AT_ONCE = 1 << 14
"""Of one batch, at most so many positions go into a second moment, evenly spread; all go into the mean."""


def as_matrix(layer: nn.Module) -> Tensor:
    """The weight as (G, R, K): groups, outputs of a group, what each sums over."""
    weight = weight_of(layer)
    if stores_transposed(layer):
        weight = weight.T
    return weight.reshape(_group_inputs(layer), -1, weight[0].numel())


def set_matrix(layer: nn.Module, matrix: Tensor) -> None:
    """The inverse of `as_matrix`: writes the weight of `layer` in place."""
    weight = weight_of(layer)
    with torch.no_grad():
        if stores_transposed(layer):
            weight.copy_(matrix[0].T)
        else:
            weight.copy_(matrix.reshape(weight.shape))


def has_matrix(layer: nn.Module) -> bool:
    """True if it gives the product of its weight as a matrix and its input: Linear, convolutions, GPT-2's Conv1D.

    Not of a user's subclass: its forward may pad or scale first, as timm's Conv2dSame does.
    """
    return original_type(layer) in (nn.Linear, nn.Conv1d, nn.Conv2d) or (
        not isinstance(layer, (*TRANSPOSED, nn.Embedding)) and stores_transposed(layer)
    )


def columns(layer: nn.Module, x: Tensor) -> Tensor:
    """The matrix that the rows of `as_matrix` are multiplied with: (G, K, n), a column for each output position."""
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        return x.reshape(1, -1, x.shape[-1]).mT
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    if x.dim() == len(layer.kernel_size) + 1:
        x = x.unsqueeze(0)
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    one = isinstance(layer, nn.Conv1d)
    spread = (1,) if one else ()
    unfolded = F.unfold(
        x.unsqueeze(2) if one else x,
        (*spread, *layer.kernel_size),
        dilation=(*spread, *layer.dilation),
        stride=(*spread, *layer.stride),
    )
    batch, _, positions = unfolded.shape
    by_group = unfolded.reshape(batch, layer.groups, -1, positions)
    return by_group.permute(1, 2, 0, 3).reshape(layer.groups, by_group.shape[2], -1)


class Moments:
    """Moments of the inputs x of one layer in the quantized model, and beside those in the float model.

    Attributes:
        mean: (G, K), of x in the quantized model, once something was added; so the others.
        mean_float: (G, K), of x in the float model.
        power: (G, K), the mean of x^2 in the quantized model.
        second: (G, K, K), the mean of x x^T in the quantized model.
        cross: (G, K, K), the mean of x in the quantized model times x^T in the float model; None: not taken.
    """

    def __init__(self, layer: nn.Module, with_second: bool = True) -> None:
        self.layer = layer
        self.with_second = with_second
        self.columns = 0
        self.rows = 0
        self.mean: Tensor = torch.zeros(())
        self.mean_float: Tensor = torch.zeros(())
        self.power: Tensor = torch.zeros(())
        self.second: Tensor = torch.zeros(())
        self.cross: Tensor | None = None

    def add(self, x: Tensor, x_float: Tensor | None = None) -> None:
        """One call of the layer; `x_float`: None where the two are the same."""
        found = columns(self.layer, x.detach().float())
        other = None if x_float is None else columns(self.layer, x_float.detach().float())
        count = found.shape[-1]
        if not count:
            return
        self.columns += count
        share = count / self.columns
        self.mean = torch.lerp(self.mean.to(found), found.mean(-1), share)
        self.mean_float = self.mean if other is None else torch.lerp(self.mean_float.to(found), other.mean(-1), share)
        self.power = torch.lerp(self.power.to(found), found.square().mean(-1), share)
        if not self.with_second:
            return
        step = -(-count // ROWS_AT_ONCE)
        found = found[..., ::step]
        self.rows += found.shape[-1]
        share = found.shape[-1] / self.rows
        self.second = torch.lerp(self.second.to(found), found @ found.mT / found.shape[-1], share)
        if other is not None:
            other = other[..., ::step]
            before = torch.zeros(()) if self.cross is None else self.cross
            self.cross = torch.lerp(before.to(found), found @ other.mT / found.shape[-1], share)


class _Reached(Exception):
    """The rest of a forward is not needed."""


def gather(
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[Any],
    *,
    reference: nn.Module | None = None,
    calls: Mapping[str, int] | None = None,
    with_second: bool = True,
) -> dict[str, Moments]:
    """Runs `batches` through `model` in the mode that it is in, and takes the moments of what layers read.

    Args:
        model: the model whose layers are looked at.
        names: of these layers.
        batches: inputs of the model.
        reference: the same model in float, whose layers read what these should read; None: `model` is that.
        calls: how often each layer is called in one forward, so that the rest of it can be left out; None: all is run.
        with_second: whether second moments are taken.
    """
    modules = named_modules(model)
    moments = {name: Moments(modules[name], with_second) for name in names}
    for batch in batches:
        exact: dict[str, list[Tensor]] = defaultdict(list)
        if reference is not None:

            def keep(name: str, x: Tensor, exact: dict[str, list[Tensor]] = exact) -> None:
                exact[name].append(x.detach().clone())

            _until(reference, batch, names, calls, keep)

        def take(name: str, x: Tensor, exact: dict[str, list[Tensor]] = exact) -> None:
            moments[name].add(x, exact[name].pop(0) if exact[name] else None)

        _until(model, batch, names, calls, take)
    return moments


def _until(
    model: nn.Module,
    batch: Any,
    names: Sequence[str],
    calls: Mapping[str, int] | None,
    see: Callable[[str, Tensor], None],
) -> None:
    """`watch_inputs`, ended once every layer was called as often as `calls` says."""
    taken: dict[str, int] = defaultdict(int)

    def count(name: str, x: Tensor) -> None:
        see(name, x)
        taken[name] += 1
        if calls is not None and all(taken[other] >= calls.get(other, 1) for other in names):
            raise _Reached

    watch_inputs(model, names, batch, count)


def watch_inputs(model: nn.Module, names: Sequence[str], batch: Any, see: Callable[[str, Tensor], None]) -> None:
    """One forward without gradients; calls `see` with what each layer reads, quantized where it is."""
    modules: dict[str, Any] = named_modules(model)
    args, kwargs = batch_arguments(model, batch)

    def hook(name: str) -> Callable[..., None]:
        def before(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            # Not the user's operations: hidden from a `TorchFunctionMode` that counts those.
            with torch._C.DisableTorchFunction():
                x = inputs[0] if inputs else next(iter(named.values()))
                if isinstance(module, Converted):
                    quantizer = input_quantizer(module)
                    # Not by calling it: it counts its readers.
                    x = x if quantizer is None else quantizer.evaluate(x)
                see(name, x)

        return before

    with ExitStack() as stack:
        for name in names:
            handle = modules[name].register_forward_pre_hook(hook(name), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(torch.no_grad())
        with suppress(_Reached):
            model(*args, **kwargs)


def _group_inputs(layer: nn.Module) -> int:
    return int(getattr(layer, "groups", 1))
