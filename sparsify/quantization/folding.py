"""Integer weights of layers with their BatchNorm folded into them: as they are deployed, and in float for eval mode."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from sparsify.quantization.fake_quantize import FakeQuantize
from sparsify.quantization.straight_through import replaced
from sparsify.quantization.weight_grid import bias_of, channel_axis, fake_layer_weight, on_own_grid, weight_of, widened
from sparsify.quantization.wiring import Converted, DeployedIntegers, wiring_of

__all__: list[str] = []


class AffineNorm:
    """A module that is no BatchNorm and computes x * c + d as one in eval mode does, with numbers of each channel."""

    def factor_and_offset(self) -> tuple[Tensor, Tensor]:
        """c and d, both (C,) or (1,)."""
        raise NotImplementedError


def norm_factor(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """BatchNorm in eval mode as x * c + d, both (C,): c = gamma / sqrt(var + eps), d = beta - mean c."""
    if isinstance(norm, AffineNorm):
        return norm.factor_and_offset()
    mean, variance = norm.running_mean, norm.running_var
    weight, bias = norm._parameters.get("weight"), norm._parameters.get("bias")
    assert mean is not None and variance is not None  # A BatchNorm without statistics is not folded.
    factor = torch.rsqrt(variance.float() + norm.eps)
    if weight is not None:
        factor = factor * weight.float()
    offset = -mean.float() * factor
    return factor, offset if bias is None else offset + bias.float()


@torch.no_grad()
def layer_integers(layer: Converted) -> DeployedIntegers:
    """The deployed integers of a layer with weights, its BatchNorm folded.

    With c = gamma / sqrt(var + eps) per channel: integers Q(w) sign(c), scale s |c|, bias (beta - mean c + c b) rounded
    to the grid of scale_x s |c|. Exact, since rounding to a grid per channel commutes with a factor per channel.
    """
    wiring = wiring_of(layer)
    q, spread, zero = on_own_grid(layer)
    if zero is not None:
        return _affine_integers(layer, q, spread, zero)
    if wiring.block:
        return _integers_in_blocks(layer, q, spread)
    axis, scale = wiring.axis, spread.reshape(-1) if wiring.axis is not None else spread.reshape(())
    bias = _own_bias(layer)
    if wiring.norm is not None:
        axis = channel_axis(layer)
        factor, offset = (each.expand(q.shape[axis]) for each in norm_factor(wiring.norm))
        bias = offset if bias is None else offset + factor * bias
        q = q * widened(torch.sign(factor), q, axis, 0)
        scale = scale * factor.abs()
    return _with_bias(q, scale, axis, bias, wiring.source)


@torch.no_grad()
def norm_integers(norm: Converted) -> DeployedIntegers:
    """The deployed integers of a BatchNorm that is a layer of its own.

    The one weight of a channel is c of `norm_factor`: the largest integer times a scale of its own.
    """
    wiring = wiring_of(norm)
    factor, offset = norm_factor(_as_norm(norm))
    if wiring.channels:
        factor, offset = factor.expand(wiring.channels), offset.expand(wiring.channels)
    q = (torch.sign(factor) * wiring.q_max).reshape(-1, *[1] * (wiring.rank - 1))
    return _with_bias(q, factor.abs() / wiring.q_max, 0, offset, wiring.source)


@torch.no_grad()
def table_integers(embedding: Converted) -> DeployedIntegers:
    """The deployed integers of an Embedding, each row by its scale."""
    q, scale, zero = on_own_grid(embedding)
    axis = None if scale.dim() == 0 else 0
    scale = scale.reshape(() if axis is None else -1)
    if zero is not None:
        zero = zero.reshape(scale.shape).to(torch.uint8)
    return DeployedIntegers(q.to(torch.int8 if zero is None else torch.int16), scale, axis, None, scale, None, zero)


def own_integers(layer: Converted) -> DeployedIntegers:
    """As `deployed_integers` of the layer, without its BatchNorm: for others who read its weight."""
    wiring = wiring_of(layer)
    norm, wiring.norm = wiring.norm, None
    try:
        return layer.deployed_integers()
    finally:
        wiring.norm = norm


def own_weight(layer: Converted) -> Tensor:
    """The weight of a layer on its own grid: fake-quantized; in eval mode the integers that are deployed, in float."""
    wiring, own = wiring_of(layer), weight_of(layer)
    if not wiring.rounds:
        return own
    if layer.training:
        return fake_layer_weight(layer)
    weight = _rounded_values(own_integers(layer), wiring.block).to(own.dtype)
    return replaced(own, weight) if torch.is_grad_enabled() and own.requires_grad else weight


def _rounded_values(whole: DeployedIntegers, block: int) -> Tensor:
    """The integers of a weight, each times its scale."""
    return whole.weight.float() * widened(whole.scale, whole.weight, whole.axis, block)


def _own_bias(layer: Converted) -> Tensor | None:
    bias = bias_of(layer)
    return None if bias is None else bias.detach().float()


def _as_norm(norm: Converted) -> _BatchNorm:
    assert isinstance(norm, _BatchNorm)
    return norm


def _with_bias(
    q: Tensor, scale: Tensor, axis: int | None, bias: Tensor | None, source: FakeQuantize | None
) -> DeployedIntegers:
    """The integers `q` with a bias on the grid of their products with those of `source`."""
    if source is None or not source.enabled:
        low = torch.full_like(scale, 1e-20)
    else:
        # A channel whose BatchNorm factor is (nearly) 0 gets a coarser grid, on which its bias still fits in 32 bits.
        reach = torch.zeros_like(scale) if bias is None else bias.abs().max() if scale.dim() == 0 else bias.abs()
        low = (reach / (source.scale * 2.0**30)).clamp(min=1e-20)
    coarse = torch.maximum(scale, low)
    shrunk = scale / coarse
    q = (q * widened(shrunk, q, axis, 0)).round()
    scale = coarse
    if bias is None or source is None or not source.enabled:
        return DeployedIntegers(q.to(torch.int8), scale, axis, None, scale, bias)
    bias_scale = source.scale * scale
    grid = (bias / bias_scale).round().clamp(-(2.0**31), 2.0**31 - 128).to(torch.int32)
    return DeployedIntegers(q.to(torch.int8), scale, axis, grid, bias_scale, None)


def _integers_in_blocks(layer: Converted, q: Tensor, scale: Tensor) -> DeployedIntegers:
    """No runtime sums blocks in integers: the bias stays in float."""
    bias = _own_bias(layer)
    axis = channel_axis(layer)
    norm = wiring_of(layer).norm
    if norm is not None:
        factor, offset = (each.expand(q.shape[axis]) for each in norm_factor(norm))
        bias = offset if bias is None else offset + factor * bias
        q = q * widened(torch.sign(factor), q, axis, 0)
        scale = (scale * widened(factor.abs(), scale, axis, 0)).clamp(min=1e-20)
    return DeployedIntegers(q.to(torch.int8), scale.contiguous(), 1 - axis, None, scale, bias)


def _affine_integers(layer: Converted, q: Tensor, scale: Tensor, zero: Tensor) -> DeployedIntegers:
    """Integers with zero points, of weights whose input is in float.

    `q` is counted from `zero` on, so that a factor of -1 turns both round.
    """
    wiring = wiring_of(layer)
    levels, channels = 2 * wiring.q_max + 1, channel_axis(layer)
    bias = _own_bias(layer)
    axis = 1 - channels if wiring.block else wiring.axis
    if not wiring.block:
        scale, zero = (each.reshape(() if axis is None else -1) for each in (scale, zero))
    if wiring.norm is not None:
        factor, offset = (each.expand(q.shape[channels]) for each in norm_factor(wiring.norm))
        bias = offset if bias is None else offset + factor * bias
        axis = axis if wiring.block else channels
        size = widened(factor.abs(), scale, channels, 0) if wiring.block else factor.abs()
        sign = torch.sign(widened(factor, q, channels, 0))
        turned = torch.sign(widened(factor, scale, channels, 0) if wiring.block else factor) < 0
        q, scale = q * sign, (scale * size).clamp(min=1e-20)
        zero = torch.where(turned, levels - zero, zero)
    return DeployedIntegers(
        q.to(torch.int16), scale.contiguous(), axis, None, scale, bias, zero.to(torch.uint8).contiguous()
    )


def folded(layer: Converted) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer in eval mode: its deployed integers in float, with gradients where they are wanted."""
    wiring = wiring_of(layer)
    if not wiring.rounds:
        return _folded_float(layer)
    whole = layer.deployed_integers()
    dtype = _dtype(layer)
    weight = _rounded_values(whole, wiring.block).to(dtype)
    bias = whole.float_bias
    if whole.bias is not None:
        bias = whole.bias.float() * whole.bias_scale
    bias = None if bias is None else bias.to(dtype)
    if torch.is_grad_enabled():
        exact_weight, exact_bias = _folded_float(layer)
        weight = replaced(exact_weight, weight) if exact_weight.requires_grad else weight
        if bias is not None and exact_bias is not None and exact_bias.requires_grad:
            bias = replaced(exact_bias, bias)
    return weight, bias


def _dtype(layer: Converted) -> torch.dtype:
    """The type of the weight; of a BatchNorm without one, that of its statistics."""
    if isinstance(layer, AffineNorm):
        own = (*layer.parameters(recurse=False), *layer.buffers(recurse=False))
        return next(each.dtype for each in own if each.is_floating_point())
    if isinstance(layer, _BatchNorm) and layer._parameters.get("weight") is None:
        assert layer.running_mean is not None
        return layer.running_mean.dtype
    return weight_of(layer).dtype


def _folded_float(layer: Converted) -> tuple[Tensor, Tensor | None]:
    wiring = wiring_of(layer)
    if wiring.rank:
        factor, offset = norm_factor(_as_norm(layer))
        if wiring.channels:
            factor, offset = factor.expand(wiring.channels), offset.expand(wiring.channels)
        return factor.reshape(-1, *[1] * (wiring.rank - 1)), offset
    own, bias = weight_of(layer), bias_of(layer)
    if wiring.norm is None:
        return own, bias
    channels = own.shape[channel_axis(layer)]
    factor, offset = (each.expand(channels) for each in norm_factor(wiring.norm))
    weight = own * widened(factor, own, channel_axis(layer), 0).to(own.dtype)
    bias = offset if bias is None else offset + factor * bias
    return weight, bias.to(own.dtype)
