"""The error that rounding makes in a pair of layers on samples, for any factors between their channels.

Of the output of the second layer, whose input and weights are on their grids as the plan says, against its output in
float. Nothing else of the model is quantized for it, so that pairs can be judged one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.model.targets import named_modules
from sparsify.oneshot.bias_correction import can_correct
from sparsify.oneshot.layer_inputs import as_matrix, columns
from sparsify.quantization import observers
from sparsify.quantization.calibration import run_batch
from sparsify.quantization.plan import QuantizationPlan
from sparsify.quantization.straight_through import on_grid
from sparsify.quantization.weight_grid import in_blocks, out_of_blocks, rounded, weight_of
from sparsify.quantization.wiring import Wiring

__all__: list[str] = []

POSITIONS = 256
"""Output positions of a second layer that are kept of all batches."""
LayerPair = tuple[str, str | None, str]
"""(layer, the BatchNorm behind it, the layer that reads what they give)."""


@dataclass
class SeenBetween:
    """Values between two layers of the float model.

    Attributes:
        reach: (C,), the largest absolute value of each channel where it is made, behind a ReLU if there is one.
        read: (G, K, n), columns that the matrix of the second layer is multiplied with.
        power: the mean square of what the first layer reads, times the number of weights that make one output.
        averaged: whether an average pool stands between, before which there is a grid as well.
    """

    reach: Tensor
    read: Tensor
    power: float = 0.0
    averaged: bool = False

    def by_column(self, scale: Tensor) -> Tensor:
        """Factors (C,) of channels as (G, K, 1), one a column of weights."""
        groups, width, _ = self.read.shape
        by_group = scale.reshape(groups, -1, 1)
        return by_group.expand(-1, -1, width // by_group.shape[1]).reshape(groups, width, 1)

    def divide(self, scale: Tensor) -> None:
        """Divides the channels by `scale` (C,)."""
        self.reach = self.reach / scale
        self.read = self.read / self.by_column(scale)


def watch_between(
    model: nn.Module, pairs: Mapping[LayerPair, frozenset[str]], batches: Iterable[Any]
) -> dict[LayerPair, SeenBetween]:
    """Runs `batches` through a float model in eval mode and gives what is seen between `pairs`.

    Args:
        model: the model.
        pairs: with the names of the operations between them.
        batches: inputs of the model.

    Raises:
        DataError: a batch does not run through the model.
    """
    modules: dict[str, Any] = named_modules(model)
    generator = torch.Generator().manual_seed(0)
    kept: dict[LayerPair, list[Tensor]] = {pair: [] for pair in pairs}
    reach: dict[LayerPair, Tensor] = {}
    power: dict[LayerPair, list[float]] = {pair: [] for pair in pairs}

    def makes(pair: LayerPair) -> Callable[..., None]:
        first = modules[pair[0]]
        # From the end: a batch may be a single sample without a dimension for it.
        axis = -1 if isinstance(first, nn.Linear) else -1 - len(first.kernel_size)

        def after(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            with torch._C.DisableTorchFunction():
                if not output.numel():
                    return
                found = output.detach().float().movedim(axis, 0).flatten(1)
                found = found.amax(1).clamp(min=0) if "relu" in pairs[pair] else found.abs().amax(1)
                reach[pair] = torch.maximum(reach[pair], found) if pair in reach else found

        return after

    def reads(pair: LayerPair, first: bool) -> Callable[..., None]:
        def before(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            with torch._C.DisableTorchFunction():
                x = (inputs[0] if inputs else next(iter(named.values()))).detach().float()
                if not x.numel():
                    return
                if first:
                    power[pair].append(float(x.square().mean()) * weight_of(module)[0].numel())
                    return
                found = columns(module, x)
                at = torch.randperm(found.shape[-1], generator=generator)[:POSITIONS]
                kept[pair].append(found[..., at.to(found.device)])

        return before

    with ExitStack() as stack, torch.no_grad():
        for pair in pairs:
            first, norm, second = pair
            maker = modules[first if norm is None else norm]
            stack.callback(maker.register_forward_hook(makes(pair)).remove)
            for name, is_first in ((first, True), (second, False)):
                handle = modules[name].register_forward_pre_hook(reads(pair, is_first), with_kwargs=True)
                stack.callback(handle.remove)
        for at, batch in enumerate(batches):
            run_batch(model, batch, at)
    found: dict[LayerPair, SeenBetween] = {}
    for pair, way in pairs.items():
        if not kept[pair] or pair not in reach:
            continue
        share = -(-POSITIONS // len(kept[pair]))
        read = torch.cat([one[..., :share] for one in kept[pair]], -1)
        averaged = any("avg_pool" in op for op in way)
        found[pair] = SeenBetween(reach[pair], read, sum(power[pair]) / len(power[pair]), averaged)
    return found


class PairErrors:
    """The error of one pair for any factors.

    Attributes:
        between: what was seen between the two, as they are now.
        shares_scale: whether all weights of the first layer have one scale.
    """

    def __init__(
        self,
        layer: nn.Module,
        first: str,
        second: str,
        plan: QuantizationPlan,
        between: SeenBetween,
        corrected: bool,
    ) -> None:
        layers = {one.name: one for one in plan.layers}
        sites = {site.name: site for site in plan.sites}
        self.between = between
        self._layer = layer
        self._first, self._plan = layers.get(first), layers.get(second)
        self._site = None if self._plan is None or self._plan.source is None else sites.get(self._plan.source)
        self.shares_scale = self._first is not None and self._first.axis is None and self._first.q_max > 0
        norm = None if self._plan is None or self._plan.norm is None else layer
        self._corrected = corrected and can_correct(layer, norm)

    def of(self, scale: Tensor, given: Tensor) -> Tensor:
        """(2,): the mean square of the error of all outputs; the same with each channel by its own mean square.

        Args:
            scale: (C,), divides the channels between the two.
            given: (C,), the largest weight that makes each channel.
        """
        weight = as_matrix(self._layer).detach().float()
        by_column = self.between.by_column(scale)
        read = self.between.read
        wanted = weight @ read
        error = self._rounded_weight(weight * by_column.mT) @ self._rounded_input(read / by_column, scale) - wanted
        if self._corrected:
            error = error - error.mean(-1, keepdim=True)
        each = error.square().mean(-1)
        if self.shares_scale:
            assert self._first is not None
            # Rounding errors of the first layer's weights are even over a step, and independent.
            step = (given / scale).max() / self._first.q_max * scale
            each = each + (weight.square() @ self.between.by_column(step.square() / 12 * self.between.power))[..., 0]
        own = wanted.square().mean(-1).clamp(min=1e-30)
        return torch.stack([each.sum(), (each / own).mean()])

    def _rounded_weight(self, weight: Tensor) -> Tensor:
        plan = self._plan
        if plan is None or not plan.q_max:
            return weight
        rows = weight.flatten(0, 1)
        wiring = Wiring(nn.Linear, axis=plan.axis, q_max=plan.q_max, block=plan.block, affine=plan.affine)
        values = in_blocks(rows, plan.block, 1) if plan.block else rows
        values = rounded(values, 0 if plan.block else plan.axis, wiring)
        return (out_of_blocks(values, rows, 1) if plan.block else values).reshape(weight.shape)

    def _rounded_input(self, read: Tensor, scale: Tensor) -> Tensor:
        site = self._site
        if site is None:
            return read
        low, high = read.min().clamp(max=0), read.max().clamp(min=0)
        if self.between.averaged:
            high = torch.maximum(high, (self.between.reach / scale).max())
        elif site.observer in observers.HISTOGRAMS:
            reach = torch.maximum(-low, high).clamp(min=2.0**-100)
            extent = torch.exp2(torch.ceil(torch.log2(reach)))
            low, high = observers.range_of(
                site.observer,
                observers.counted(read, extent),
                extent,
                bits=site.bits,
                symmetric=site.symmetric,
                percentile=site.percentile,
            )
        last = 2 ** (site.bits - 1) - 1 if site.symmetric else 2**site.bits - 1
        step = (torch.maximum(-low, high) if site.symmetric else high - low).clamp(min=1e-30) / last
        if site.symmetric:
            return on_grid(read, step, torch.zeros((), dtype=torch.int8), -last - 1, last)
        zero = (-low / step).round().clamp(0, last).to(torch.uint8)
        return on_grid(read, step, zero, 0, last)
