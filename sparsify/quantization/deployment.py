"""The model as it is deployed: a copy with integer weights, BatchNorm folded, that exports to ONNX.

Computes bit for bit what the trained model computes in eval mode.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify.errors import DataError, StateError
from sparsify.model.copies import deep_copied
from sparsify.model.made_weights import keep_made_weights
from sparsify.model.targets import is_finite
from sparsify.model.wrappers import unwrapped
from sparsify.quantization.attention import QuantizedMultiheadAttention, QuantizedProjection
from sparsify.quantization.conversion import original_type, quantized_layers, quantizers
from sparsify.quantization.fake_quantize import FakeQuantize
from sparsify.quantization.folding import own_integers
from sparsify.quantization.forward_ops import WatchedAffine, WatchedLayer, WatchedNorm, watching_class
from sparsify.quantization.layers import (
    NORMS,
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedConvTranspose1d,
    QuantizedConvTranspose2d,
    QuantizedConvTranspose3d,
    QuantizedEmbedding,
    QuantizedLayer,
    QuantizedLinear,
    QuantizedNorm,
)
from sparsify.quantization.qdq_ops import dequantize, quantize_dequantize
from sparsify.quantization.recurrent import (
    QuantizedGRU,
    QuantizedLSTM,
    QuantizedRecurrent,
    flat_names,
    recurrent_integers,
)
from sparsify.quantization.straight_through import GATES, gate_of
from sparsify.quantization.weight_grid import WEIGHT_STEP, widened
from sparsify.quantization.wiring import Converted, DeployedIntegers, wiring_of

__all__: list[str] = []


class DeployedLayer(QuantizedLayer):
    """A layer whose weights are the int8 buffer `weight_int8` and whose bias is the int32 buffer `bias_int32`.

    Scales are the float32 buffers `weight_scale` and `bias_scale`, of rank 0 or (C,). `float_bias` instead of the two
    of the bias where what the layer reads is not quantized. Affine weights are `weight_uint8`, with the uint8 buffer
    `weight_zero_point` beside the scales.
    """

    def __getattr__(self, name: str) -> Any:
        # `weight` and `bias` are the integers in float. Also for models that look at a layer's weight in forward:
        # transformers' ViT and T5 ask for its dtype. Where a forward computes with them they are the parameters.
        if name not in ("weight", "bias"):
            return super().__getattr__(name)
        if self._wiring.read:
            return self.__dict__["_parameters"].get(name)
        return self._weights()[name == "bias"]

    def _weights(self) -> tuple[Tensor, Tensor | None]:
        buffers = cast(Any, self.__dict__["_buffers"])
        bias = buffers.get("float_bias")
        if "bias_int32" in buffers:
            scale = buffers["bias_scale"]
            bias = dequantize(buffers["bias_int32"], scale, None if scale.dim() == 0 else 0)
        return _weight(buffers, self._wiring.axis, self._wiring.block), bias

    def rounded_weight(self) -> Tensor:
        return _own_weight(self)


class DeployedLinear(DeployedLayer, QuantizedLinear):
    pass


class DeployedConv1d(DeployedLayer, QuantizedConv1d):
    pass


class DeployedConv2d(DeployedLayer, QuantizedConv2d):
    pass


class DeployedConv3d(DeployedLayer, QuantizedConv3d):
    pass


class DeployedConvTranspose1d(DeployedLayer, QuantizedConvTranspose1d):
    pass


class DeployedConvTranspose2d(DeployedLayer, QuantizedConvTranspose2d):
    pass


class DeployedConvTranspose3d(DeployedLayer, QuantizedConvTranspose3d):
    pass


class DeployedWatchedLayer(DeployedLayer, WatchedLayer):
    """A layer of a user's class, whose forward goes on looking at its `weight`."""

    def _is_own(self, weight: object) -> bool:
        return True


class DeployedEmbedding(QuantizedEmbedding):
    """Looks up rows of integers, and the scale of each: a table in float is made only for who asks for `weight`."""

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            return self.__dict__["_parameters"]["weight"] if self._wiring.read else self.rounded_weight()
        return super().__getattr__(name)

    def rounded_weight(self) -> Tensor:
        return _own_weight(self)

    def forward(self, input: Tensor) -> Tensor:
        buffers = cast(Any, self._buffers)
        # A watched module above asks about every product; this one is none of its own.
        with torch._C.DisableTorchFunction():
            scale, zero = buffers["weight_scale"], buffers.get("weight_zero_point")
            stored = buffers["weight_int8"] if zero is None else buffers["weight_uint8"]

            def of_rows(each: Tensor) -> Tensor:
                return each if scale.dim() == 0 else F.embedding(input, each.unsqueeze(1))

            rows = F.embedding(input, stored).to(torch.float32)
            if zero is not None:
                rows = rows - of_rows(zero).to(torch.float32)
            rows = rows * of_rows(scale)
        return self._output(rows)


class DeployedRecurrent(QuantizedRecurrent):
    """A recurrent layer with the integers of its weights in buffers, as "weight_ih_l0_int8"."""

    def __getattr__(self, name: str) -> Any:
        if f"{name}_scale" in self.__dict__["_buffers"]:
            return _weight(self.__dict__["_buffers"], self._wiring.axis, prefix=name)
        return super().__getattr__(name)

    def _operands(self) -> list[Tensor]:
        return [getattr(self, name) for name in flat_names(self)]


class DeployedLSTM(DeployedRecurrent, QuantizedLSTM):
    pass


class DeployedGRU(DeployedRecurrent, QuantizedGRU):
    pass


class DeployedNorm(QuantizedNorm):
    """A BatchNorm as a depthwise convolution; integers as of a `DeployedLayer`."""

    def _weights(self) -> tuple[Tensor, Tensor | None]:
        buffers: Any = self._buffers
        weight = dequantize(buffers["weight_int8"], buffers["weight_scale"], 0)
        return weight, dequantize(buffers["bias_int32"], buffers["bias_scale"], 0)


class DeployedWatchedNorm(DeployedNorm, WatchedNorm):
    pass


class DeployedQuantize(FakeQuantize):
    """A quantizer whose grid is fixed: QuantizeLinear and DequantizeLinear in the file."""

    gate_scale: Tensor
    gate_zero_point: Tensor

    def _compute(self, x: Tensor) -> Tensor:
        gate = None if self.gate is None else (self.gate_scale, self.gate_zero_point)
        return rounded_as_deployed(self, x, gate)


def rounded_as_deployed(quantizer: FakeQuantize, x: Tensor, gate: tuple[Tensor, Tensor] | None) -> Tensor:
    """`x` through a quantizer as it stands in a file: the operators that are exported, one by one.

    Args:
        quantizer: its grid is that of its buffers.
        x: any shape.
        gate: `gate_grid` of the quantizer.
    """
    with torch._C.DisableTorchFunction():
        if quantizer.gate is not None:
            factor = gate_of(x, quantizer.gate)
            if quantizer.enabled and gate is not None:
                factor = quantize_dequantize(factor.float(), *gate).to(x.dtype)
            x = x * factor
        x = quantizer.rectified(x)
        if not quantizer.enabled:
            return x
        limits = torch.iinfo(quantizer.zero_point.dtype)
        if (quantizer.first, quantizer.last) != (limits.min, limits.max):
            # Fewer integers than the type holds: the operator would not clip to them.
            low, high = (
                (edge - quantizer.zero_point.float()) * quantizer.scale for edge in (quantizer.first, quantizer.last)
            )
            x = x.clamp(low, high)
        return quantize_dequantize(x.float(), quantizer.scale, quantizer.zero_point).to(x.dtype)


def gate_grid(quantizer: FakeQuantize) -> tuple[Tensor, Tensor] | None:
    """(scale, zero point) of the gate of a quantizer that does an activation; None without one."""
    if quantizer.gate is None:
        return None
    scale = torch.tensor(GATES[quantizer.gate], dtype=torch.float32, device=quantizer.scale.device)
    return scale, torch.zeros_like(quantizer.zero_point)


_DEPLOYED: dict[type[nn.Module], type[nn.Module]] = {
    QuantizedLinear: DeployedLinear,
    QuantizedConv1d: DeployedConv1d,
    QuantizedConv2d: DeployedConv2d,
    QuantizedConv3d: DeployedConv3d,
    QuantizedConvTranspose1d: DeployedConvTranspose1d,
    QuantizedConvTranspose2d: DeployedConvTranspose2d,
    QuantizedConvTranspose3d: DeployedConvTranspose3d,
    QuantizedEmbedding: DeployedEmbedding,
    QuantizedProjection: DeployedLinear,
    FakeQuantize: DeployedQuantize,
    QuantizedLSTM: DeployedLSTM,
    QuantizedGRU: DeployedGRU,
    **dict.fromkeys(NORMS.values(), DeployedNorm),
}


def deployment_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode in which quantized layers hold integers; of a model without any, a plain copy.

    Raises:
        StateError: a quantizer never observed anything, or `integer_exact` is entered.
        DataError: a range, a weight, or a statistic of a BatchNorm is not finite.
    """
    if any("_compute" in quantizer.__dict__ for quantizer in quantizers(model)):
        raise StateError("integer_exact is entered for this model; leave it before the model is exported or verified.")
    require_deployable(model)
    deployed = deep_copied(unwrapped(model)).eval()
    keep_made_weights(deployed)
    # First all integers: a layer is made of its BatchNorm and of the quantizer before it.
    integers = {layer: layer.deployed_integers() for layer in deployed.modules() if holds_integers(layer)}
    own = {layer: own_integers(layer) for layer in integers if wiring_of(layer).read and wiring_of(layer).norm}
    for layer, found in integers.items():
        _store_integers(layer, found)
        if layer in own:
            _store_weight(layer, own[layer], OWN)
        _deploy_class(layer)
    for module in list(deployed.modules()):
        if isinstance(module, QuantizedRecurrent) and wiring_of(module).rounds:
            for name, found in recurrent_integers(module).items():
                module._parameters.pop(name)
                _store_weight(module, found, name)
            _deploy_class(module)
        elif isinstance(module, FakeQuantize):
            _fix_grid(module)
        elif isinstance(module, QuantizedMultiheadAttention) and module.holds_integers(integers):
            module._parameters.update(dict.fromkeys(module._parameters))
        elif isinstance(module, (*NORMS.values(), WatchedAffine)) and _is_taken_in(module):
            _clear(module)
    return deployed


def require_deployable(model: nn.Module) -> None:
    """Refuses ranges that were never observed, and values of which no integers can be made."""
    for quantizer in quantizers(model):
        if quantizer.enabled:
            quantizer.require_range()
    with_numbers = (QuantizedLayer, QuantizedEmbedding, QuantizedRecurrent, QuantizedNorm, QuantizedMultiheadAttention)
    for name, module in model.named_modules():
        if not isinstance(module, with_numbers):
            continue
        for key, value in [*module._parameters.items(), *module._buffers.items()]:
            if value is not None and not is_finite(value):
                raise DataError(
                    f"{name}.{key} holds NaN or infinity, of which no integers can be made. Load weights that are "
                    "finite, or find the step at which training diverged."
                )


def holds_integers(module: nn.Module) -> TypeGuard[Converted]:
    """True if the weights of a module are deployed as integers."""
    if isinstance(module, QuantizedNorm):
        return module.is_layer()
    return isinstance(module, (QuantizedLayer, QuantizedEmbedding)) and wiring_of(module).rounds


def _store_integers(layer: Converted, found: DeployedIntegers) -> None:
    """Puts integers and scales into buffers, in place of the parameters."""
    wiring, axis = wiring_of(layer), found.axis
    if isinstance(layer, QuantizedNorm):
        _clear(layer)
    elif not wiring.read:
        for name in ("weight", "bias"):
            layer._parameters.pop(name, None)
    layer._modules.pop(WEIGHT_STEP, None)
    _store_weight(layer, found)
    buffers: dict[str, Tensor | None] = {}
    if not isinstance(layer, QuantizedEmbedding):
        wiring.axis = axis
        if found.bias is not None:
            buffers.update(bias_int32=found.bias, bias_scale=found.bias_scale)
        elif found.float_bias is not None:
            buffers.update(float_bias=found.float_bias)
    for name, value in buffers.items():
        layer.register_buffer(name, value)


def _store_weight(layer: Converted, found: DeployedIntegers, prefix: str = "weight") -> None:
    """The integers and scales of a weight, in buffers of the layer."""
    if found.zero_point is None:
        layer.register_buffer(f"{prefix}_int8", found.weight)
    else:
        zero = widened(found.zero_point, found.weight, found.axis, wiring_of(layer).block)
        layer.register_buffer(f"{prefix}_uint8", (found.weight + zero).to(torch.uint8))
        layer.register_buffer(f"{prefix}_zero_point", found.zero_point)
    layer.register_buffer(f"{prefix}_scale", found.scale)


def _deploy_class(layer: Converted) -> None:
    """Gives a layer that holds integers the class that computes with them."""
    converted: nn.Module = layer
    if isinstance(layer, WatchedLayer):
        converted.__class__ = watching_class(original_type(layer), DeployedWatchedLayer)
    elif isinstance(layer, WatchedAffine):
        converted.__class__ = DeployedNorm
    elif isinstance(layer, WatchedNorm):
        converted.__class__ = watching_class(original_type(layer), DeployedWatchedNorm)
    else:
        converted.__class__ = _DEPLOYED[type(layer)]


def _fix_grid(quantizer: FakeQuantize) -> None:
    """Makes a quantizer one whose grid is fixed."""
    for name in ("step", "offset"):
        quantizer._parameters.pop(name, None)
    quantizer._buffers.pop("least", None)
    quantizer.__class__ = DeployedQuantize
    if (grid := gate_grid(quantizer)) is not None:
        quantizer.register_buffer("gate_scale", grid[0])
        quantizer.register_buffer("gate_zero_point", grid[1])


def _is_taken_in(norm: nn.Module) -> bool:
    """True if a BatchNorm is folded, and nobody else reads its numbers."""
    if isinstance(norm, WatchedNorm):
        return False
    return wiring_of(norm).layer is not None and not wiring_of(norm).read


def _clear(norm: nn.Module) -> None:
    """A BatchNorm keeps the names, which forwards of users read, and holds nothing."""
    for values in (norm._parameters, norm._buffers):
        values.update(dict.fromkeys(values))


OWN = "own_weight"
"""Buffers beside those of the weight: the weight without the BatchNorm that is folded, for others who read it."""


def _weight(buffers: Mapping[str, Tensor], axis: int | None, block: int = 0, prefix: str = "weight") -> Tensor:
    zero = buffers.get(f"{prefix}_zero_point")
    stored = buffers[f"{prefix}_int8"] if zero is None else buffers[f"{prefix}_uint8"]
    return dequantize(stored, buffers[f"{prefix}_scale"], axis, block, zero)


def _own_weight(layer: Converted) -> Tensor:
    """The weight of a deployed layer on its own grid."""
    buffers: Any = layer.__dict__["_buffers"]
    prefix = OWN if f"{OWN}_scale" in buffers else "weight"
    wiring = wiring_of(layer)
    axis = 0 if isinstance(layer, QuantizedEmbedding) else wiring.axis
    return _weight(buffers, None if buffers[f"{prefix}_scale"].dim() == 0 else axis, wiring.block, prefix)


def opsets(model: nn.Module) -> tuple[int, int]:
    """(the ONNX opset that the integers of `model` need at least, the one with which they take the least room).

    Scales of blocks need 21; weights alone of four bits and fewer fill half a byte from there on.
    """
    least = best = 0
    for _, layer in quantized_layers(model):
        wiring = wiring_of(layer)
        if wiring.block:
            least = best = 21
        elif wiring.bits <= 4 and wiring.source is None:
            best = 21
    return least, best
