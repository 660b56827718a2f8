"""Rounding the weights of a model that has its ranges, and taking back the shift of means that this leaves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from sparsify.model.targets import named_modules
from sparsify.model.trace import Trace
from sparsify.oneshot import bias_correction, layer_inputs, rounding
from sparsify.output.tables import track
from sparsify.quantization.plan import QuantizationPlan
from sparsify.quantization.wiring import bits_of

__all__: list[str] = []


Rounding = Literal["auto", "nearest", "adaround", "gptq"]

MEMORY = 1 << 30
"""Bytes of second moments that are gathered in one run through the data."""


@dataclass(frozen=True)
class QuantizedWeights:
    """The rounding of the weights of one layer, and its error.

    Attributes:
        layer: its name.
        bits: of a weight.
        rounding: "nearest", "adaround" or "gptq".
        error: the mean square of the error that rounding makes in the layer's output, as a share of the output's own
            mean square, both without their means where the bias takes care of these; None where it was not measured.
        error_nearest: the same for plain rounding from the largest weight.
        shift: the largest shift of an output's mean that the bias took back; None: not corrected.
    """

    layer: str
    bits: int
    rounding: str
    error: float | None = None
    error_nearest: float | None = None
    shift: float | None = None


class WeightRounding:
    """Rounds the weights of a model that has its ranges, layer by layer, and corrects its biases."""

    def __init__(
        self,
        reference: nn.Module,
        work: nn.Module,
        plan: QuantizationPlan,
        traced: Trace,
        rounding: Rounding,
        correct_bias: bool,
        has_data: bool,
    ) -> None:
        self.reference = reference
        self.work = work
        self.plan = {layer.name: layer for layer in plan.layers}
        self.trace = traced
        self.rounding = rounding
        self.correct_bias = correct_bias
        self.modules: dict[str, Any] = named_modules(work)
        owners = Counter(id(p) for module in work.modules() for p in module._parameters.values() if p is not None)

        def can_round(name: str) -> bool:
            # Another layer's weights (an embedding tied to the head) must not move with this one's.
            own = [p for p in self.modules[name]._parameters.values() if p is not None]
            return layer_inputs.has_matrix(self.modules[name]) and all(owners[id(p)] == 1 for p in own)

        # What follows rounds to the grid of the largest weight of a channel; blocks, learned and affine grids are
        # others.
        special = [layer.name for layer in plan.layers if layer.block or layer.learned or layer.affine]
        usual = [layer.name for layer in plan.layers if layer.q_max and layer.name not in special]
        # Others read the weight as it is, or compute in the place of the layer, where nobody sees what it reads.
        read = {each.layer for each in plan.reads}
        found = [name for name in usual if has_data and name not in read and can_round(name)]
        order = {node.owner: at for at, node in reversed(list(enumerate(traced.nodes)))}
        self.names = sorted(found, key=lambda name: order.get(name, 0))

    def run(self, data: Sequence[Any], sequential: bool | None, progress: bool | None) -> tuple[QuantizedWeights, ...]:
        if sequential is None:
            sequential = any(self.plan[name].q_max < 63 for name in self.names)
        done: dict[str, QuantizedWeights] = {}
        steps = self._one_by_one() if sequential else self._together()
        for names in track(steps, "rounding weights", progress=progress):
            moments = layer_inputs.gather(
                self.work if sequential else self.reference,
                names,
                data,
                reference=self.reference if sequential else None,
                calls=self.trace.calls if sequential else None,
            )
            for name in names:
                done[name] = self._round(name, moments.pop(name))
        return tuple(
            done.get(name, QuantizedWeights(name, bits_of(layer.q_max), "nearest"))
            for name, layer in self.plan.items()
            if layer.q_max
        )

    def _one_by_one(self) -> list[list[str]]:
        """Layers in the order of computation; those that read one tensor together."""
        groups: dict[str, list[str]] = {}
        for name in self.names:
            node = next(n for n in self.trace.of_module(name) if n.kind in ("conv", "linear", "matmul"))
            read = node.inputs[0] if self.trace.calls[name] == 1 and node.inputs else name
            groups.setdefault(read, []).append(name)
        return list(groups.values())

    def _together(self) -> list[list[str]]:
        """As many layers at once as there is memory for their moments."""
        groups: list[list[str]] = []
        size = MEMORY
        for name in self.names:
            matrix = layer_inputs.as_matrix(self.modules[name])
            need = 4 * matrix.shape[0] * matrix.shape[2] ** 2
            if size + need > MEMORY:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += need
        return groups

    def _round(self, name: str, moments: layer_inputs.Moments) -> QuantizedWeights:
        layer, module = self.plan[name], self.modules[name]
        norm = None if layer.norm is None else self.modules[layer.norm]
        corrected = self.correct_bias and bias_correction.can_correct(module, norm)
        # A copy: it is compared with what takes its place.
        weight = layer_inputs.as_matrix(module).detach().float().clone()
        bits, kind = bits_of(layer.q_max), self._kind(name)
        if not moments.columns:
            return QuantizedWeights(name, bits, "nearest")
        second, cross = moments.second, moments.cross
        power = second
        if corrected:
            # Means are the bias's business. Where nothing but a mean is there, float32 leaves noise of either sign.
            noise = 1e-6 * second.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
            second = second - moments.mean[:, :, None] * moments.mean[:, None, :]
            second = second + noise * torch.eye(second.shape[-1], device=second.device)
            power = second
            if cross is not None:
                cross = cross - moments.mean[:, :, None] * moments.mean_float[:, None, :]
        target = weight if cross is None else rounding.made_good(weight, second, cross)
        importance = second.diagonal(dim1=1, dim2=2)
        shared = layer.axis is None
        scale = rounding.clipped_scale(target, importance, q_max=layer.q_max, shared=shared)
        rounded = rounding.nearest(target, scale, layer.q_max)
        if kind == "gptq":
            rounded = rounding.gptq(target, second, scale, layer.q_max)
        elif kind == "adaround":
            rounded = rounding.adaround(target, second, scale, layer.q_max)
        whole = rounding.clipped_scale(target, torch.zeros_like(importance), q_max=layer.q_max, shared=shared)
        plain = rounding.nearest(target, whole, layer.q_max)
        output = float(rounding.output_error(target, power).sum()) or 1.0
        errors = [float(rounding.output_error(found - target, second).sum()) / output for found in (rounded, plain)]
        if errors[1] < errors[0]:
            # What clipping or compensation cost was more than it gave.
            rounded, errors[0], kind = plain, errors[1], "nearest"
        layer_inputs.set_matrix(module, rounded)
        shift = None
        if corrected:
            by = bias_correction.mean_shift(weight, moments.mean_float, rounded, moments.mean)
            bias_correction.correct(module, norm, by)
            shift = float(by.abs().max())
        return QuantizedWeights(name, bits, kind, errors[0], errors[1], shift)

    def _kind(self, name: str) -> str:
        if self.rounding != "auto":
            return self.rounding
        if self.plan[name].q_max >= 63:
            return "nearest"
        return "adaround" if isinstance(self.modules[name], (nn.Conv1d, nn.Conv2d)) else "gptq"
