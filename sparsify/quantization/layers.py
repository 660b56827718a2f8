"""Quantized layers: a user's own layer, retyped in place. Parameters, hooks, aliases stay; the state_dict gains keys.

In training the weights are fake-quantized and BatchNorm is left alone. In eval mode a layer computes exactly what is
deployed: BatchNorm folded into integer weights, the bias on the grid of 32-bit sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from sparsify.quantization import weight_grid
from sparsify.quantization.fake_quantize import FakeQuantize
from sparsify.quantization.fixed_and_shared import SameGrid
from sparsify.quantization.learned_step import LearnedStep
from sparsify.quantization.straight_through import replaced
from sparsify.quantization.weight_grid import WEIGHT_STEP, on_own_grid, widened

__all__: list[str] = []


@dataclass
class Wiring:
    """What a retyped module knows of others. A plain object, so that what it points to is no child of the module.

    Attributes:
        original: the class that it had.
        axis: the dimension of the weight with a scale for each index; None: one scale.
        largest: the largest integer of a weight; 0: weights stay in float.
        block: how many weights along the inputs have a scale, of each channel; 0: all of them.
        affine: whether a scale of weights has a zero point beside it.
        rank: of a BatchNorm that is a layer of its own, the number of dimensions of what it reads.
        source: the quantizer of the tensor that it reads; None: that is float.
        shared: a quantizer for its input that another layer holds; None: it has its own, or none.
        norm: of a layer, the BatchNorm that is folded into it.
        layer: of a BatchNorm, the layer that it is folded into.
        frozen: of a BatchNorm, whether it uses its running statistics in training.
        made: of an attention, the names of the layers that it was given.
        kept: attributes that were overwritten, to be put back.
    """

    original: type[nn.Module]
    axis: int | None = None
    largest: int = 0
    block: int = 0
    affine: bool = False
    rank: int = 0
    source: FakeQuantize | None = None
    shared: FakeQuantize | None = None
    norm: Any = None
    layer: nn.Module | None = None
    frozen: bool = False
    made: tuple[str, ...] = ()
    kept: dict[str, Any] = field(default_factory=dict)


class DeployedIntegers(NamedTuple):
    """What is deployed of one layer, BatchNorm folded.

    Attributes:
        weight: int8; int16 where there are zero points, from which on these integers count.
        scale: float32 of rank 0, or (C,) along `axis`. axis: None with rank 0. With blocks an
            entry of scale for each along `axis`, which is then the dimension of the inputs.
        bias: int32 (C,), or None. bias_scale: of the shape of `scale`.
        float_bias: (C,), where what the layer reads is not quantized, so that there is no grid for a bias.
        zero_point: uint8, of the shape of `scale`; None: the integers are symmetric.
    """

    weight: Tensor
    scale: Tensor
    axis: int | None
    bias: Tensor | None
    bias_scale: Tensor
    float_bias: Tensor | None
    zero_point: Tensor | None = None


class Converted(nn.Module):
    """What every retyped module has in common."""

    _wiring: Wiring

    def _input(self, x: Tensor) -> Tensor:
        quantizer = self._wiring.shared if self._wiring.shared is not None else self._modules.get("input_quantizer")
        return x if quantizer is None else quantizer(x)

    def _output(self, y: Tensor) -> Tensor:
        quantizer = self._modules.get("output_quantizer")
        return y if quantizer is None else quantizer(y)


class QuantizedLayer(Converted):
    """A layer with weights: `_compute` is the operation, everything around it is here."""

    def _compute(self, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: list[int] | None = None) -> Tensor:
        raise NotImplementedError

    def _weights(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as they are computed with: fake-quantized; in eval mode, what is deployed."""
        # Not under autocast: half of the bits of a scale would be gone. The operation casts what comes out.
        with torch._C.DisableTorchFunction():
            if not self.training:
                return folded(self)
            wiring = self._wiring
            weight = cast(Tensor, self.weight)
            if wiring.largest:
                weight = weight_grid.fake(self)
            return weight, cast("Tensor | None", self.bias)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        input = self._input(input)
        weight, bias = self._weights()
        # A watched module above asks about every function; this one is no operation of its own.
        with torch._C.DisableTorchFunction():
            y = self._compute(input, weight, bias, output_size)
        return self._output(y)


class QuantizedLinear(QuantizedLayer, nn.Linear):
    def _compute(self, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: list[int] | None = None) -> Tensor:
        return F.linear(x, weight, bias)


class QuantizedConv1d(QuantizedLayer, nn.Conv1d):
    def _compute(self, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: list[int] | None = None) -> Tensor:
        y: Tensor = self._conv_forward(x, weight, bias)
        return y


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    def _compute(self, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: list[int] | None = None) -> Tensor:
        y: Tensor = self._conv_forward(x, weight, bias)
        return y


class QuantizedConv3d(QuantizedLayer, nn.Conv3d):
    def _compute(self, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: list[int] | None = None) -> Tensor:
        y: Tensor = self._conv_forward(x, weight, bias)
        return y


class QuantizedConvTranspose(QuantizedLayer):
    def _compute(self, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: list[int] | None = None) -> Tensor:
        layer: Any = self
        rank = len(layer.kernel_size)
        geometry = (layer.stride, layer.padding, layer.kernel_size, rank, layer.dilation)
        added = layer._output_padding(x, output_size, *geometry)
        function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
        return function(x, weight, bias, layer.stride, layer.padding, added, layer.groups, layer.dilation)


class QuantizedConvTranspose1d(QuantizedConvTranspose, nn.ConvTranspose1d):
    pass


class QuantizedConvTranspose2d(QuantizedConvTranspose, nn.ConvTranspose2d):
    pass


class QuantizedConvTranspose3d(QuantizedConvTranspose, nn.ConvTranspose3d):
    pass


class QuantizedEmbedding(Converted, nn.Embedding):
    """Rows are looked up and then quantized, each by its scale: the same as the other way round, without the table."""

    def forward(self, input: Tensor) -> Tensor:
        wiring = self._wiring
        if wiring.axis is None or WEIGHT_STEP in self._modules:
            with torch._C.DisableTorchFunction():
                table = weight_grid.fake(self)
            return self._output(self._rows(input, table))
        rows = self._rows(input, self.weight)
        with torch._C.DisableTorchFunction():
            flat = rows.reshape(-1, rows.shape[-1])
            return self._output(weight_grid.rounded(flat, 0, wiring).view(rows.shape))

    def _rows(self, ids: Tensor, table: Tensor) -> Tensor:
        return F.embedding(
            ids, table, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
        )


class QuantizedNorm(Converted):
    """A BatchNorm: passes through in eval mode where it is folded into a layer.

    Where it stands alone between integers, as before a convolution, it is in eval mode a depthwise convolution of
    kernel 1. Its integers are exact: of one weight a channel, each is the largest there is.
    """

    def _normed(self, x: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
        """What it gives for `x`; `norm` computes it with the statistics of the batch, or as nobody folded it."""
        wiring = self._wiring
        x = self._input(x)
        # The layer's mode counts, not ours: a user who trains with bn.eval() has a layer that is not folded.
        if wiring.layer is not None and not wiring.layer.training:
            return self._output(x)
        if wiring.frozen and self.training:
            return self._output(frozen_norm(self, x))
        if self.is_layer() and not self.training:
            weight, bias = self._weights()
            return self._output(DEPTHWISE[wiring.rank](x, weight, bias, groups=weight.shape[0]))
        return self._output(norm(x))

    def is_layer(self) -> bool:
        """Whether it computes in integers by itself."""
        source = self._wiring.source
        return bool(self._wiring.rank and self._wiring.largest and source is not None and source.enabled)

    def _weights(self) -> tuple[Tensor, Tensor | None]:
        return folded(self)

    def forward(self, input: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return self._normed(input, super().forward)


DEPTHWISE: dict[int, Callable[..., Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
"""The convolution for tensors of so many dimensions."""


class QuantizedBatchNorm1d(QuantizedNorm, nn.BatchNorm1d):
    pass


class QuantizedBatchNorm2d(QuantizedNorm, nn.BatchNorm2d):
    pass


class QuantizedBatchNorm3d(QuantizedNorm, nn.BatchNorm3d):
    pass


class QuantizedSyncBatchNorm(QuantizedNorm, nn.SyncBatchNorm):
    pass


class QuantizedReLU(Converted, nn.ReLU):
    """The quantizer does the ReLU: the two are one function in training."""

    def forward(self, input: Tensor) -> Tensor:
        return self._output(input)


class QuantizedReLU6(Converted, nn.ReLU6):
    def forward(self, input: Tensor) -> Tensor:
        return self._output(input)


class QuantizedFunction(Converted):
    """A pool or an activation whose output is quantized; by a quantizer that does the activation, or behind it."""

    def forward(self, input: Tensor) -> Tensor:
        quantizer: Any = self._modules.get("output_quantizer")
        if quantizer is not None and quantizer.gate is not None:
            return self._output(input)
        with torch._C.DisableTorchFunction():
            y = super().forward(input)
        return self._output(y)


class QuantizedAvgPool1d(QuantizedFunction, nn.AvgPool1d):
    pass


class QuantizedAvgPool2d(QuantizedFunction, nn.AvgPool2d):
    pass


class QuantizedAdaptiveAvgPool1d(QuantizedFunction, nn.AdaptiveAvgPool1d):
    pass


class QuantizedAdaptiveAvgPool2d(QuantizedFunction, nn.AdaptiveAvgPool2d):
    pass


class QuantizedSiLU(QuantizedFunction, nn.SiLU):
    pass


class QuantizedSigmoid(QuantizedFunction, nn.Sigmoid):
    pass


class QuantizedHardswish(QuantizedFunction, nn.Hardswish):
    pass


class QuantizedTanh(QuantizedFunction, nn.Tanh):
    pass


class QuantizedHardsigmoid(QuantizedFunction, nn.Hardsigmoid):
    pass


WEIGHTED: dict[type[nn.Module], type[Converted]] = {
    nn.Linear: QuantizedLinear,
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
    nn.ConvTranspose1d: QuantizedConvTranspose1d,
    nn.ConvTranspose2d: QuantizedConvTranspose2d,
    nn.ConvTranspose3d: QuantizedConvTranspose3d,
    nn.Embedding: QuantizedEmbedding,
}
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS: dict[type[nn.Module], type[Converted]] = {
    nn.BatchNorm1d: QuantizedBatchNorm1d,
    nn.BatchNorm2d: QuantizedBatchNorm2d,
    nn.BatchNorm3d: QuantizedBatchNorm3d,
    nn.SyncBatchNorm: QuantizedSyncBatchNorm,
}
POINTWISE: dict[type[nn.Module], type[Converted]] = {
    nn.ReLU: QuantizedReLU,
    nn.ReLU6: QuantizedReLU6,
    nn.AvgPool1d: QuantizedAvgPool1d,
    nn.AvgPool2d: QuantizedAvgPool2d,
    nn.AdaptiveAvgPool1d: QuantizedAdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d: QuantizedAdaptiveAvgPool2d,
    nn.SiLU: QuantizedSiLU,
    nn.Sigmoid: QuantizedSigmoid,
    nn.Tanh: QuantizedTanh,
    nn.Hardswish: QuantizedHardswish,
    nn.Hardsigmoid: QuantizedHardsigmoid,
}
CONVERTED: dict[type[nn.Module], type[Converted]] = {**WEIGHTED, **NORMS, **POINTWISE}


PROJECTION = "NonDynamicallyQuantizableLinear"
"""The class of MultiheadAttention's out_proj: a Linear by another name."""


def convert_(module: nn.Module, quantized: type[Converted] | None = None) -> Wiring:
    """Makes `module` its quantized form, in place; a module that is one already stays as it is. Gives its wiring."""
    if isinstance(module, Converted):
        return module._wiring
    wiring = Wiring(original=type(module))
    projection = isinstance(module, nn.Linear) and type(module).__name__ == PROJECTION
    module.__class__ = quantized or CONVERTED[nn.Linear if projection else type(module)]
    module.__dict__["_wiring"] = wiring
    return wiring


def restore_layers(model: nn.Module) -> None:
    """Undoes every `convert_` below `model`: classes, children and attributes are as they were before."""
    for module in list(model.modules()):
        if isinstance(module, Converted):
            wiring: Wiring = module.__dict__.pop("_wiring")
            for name in ("_counts", "_off"):
                module.__dict__.pop(name, None)
            for name, child in list(module._modules.items()):
                if isinstance(child, (FakeQuantize, SameGrid, LearnedStep)):
                    del module._modules[name]
            for name in wiring.made:
                del module._modules[name]
            for name, value in wiring.kept.items():
                setattr(module, name, value)
            cast(Any, module).__class__ = wiring.original
    # What `plan.apply_plan` noted.
    model.__dict__.pop("_left_in_float", None)


def quantizers(model: nn.Module) -> Iterator[FakeQuantize]:
    """Every quantizer of activations below `model`, once."""
    for module in model.modules():
        if isinstance(module, FakeQuantize):
            yield module


def freeze_norms(model: nn.Module, frozen: bool) -> None:
    """Whether BatchNorms below `model` use their running statistics in training and leave them as they are."""
    for module in model.modules():
        if isinstance(module, QuantizedNorm):
            module._wiring.frozen = frozen


def frozen_norm(norm: Any, x: Tensor) -> Tensor:
    """BatchNorm by its running statistics, which stay as they are; its weight and bias learn."""
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)


def is_norm_and_more(module: nn.Module) -> bool:
    """Whether it is of a user's subclass of BatchNorm, as timm's BatchNormAct2d, whose forward may compute more.

    Not of SyncBatchNorm, which in training is another function.
    """
    return isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm) and type(module) not in NORMS


def is_weighted(module: nn.Module) -> bool:
    """Whether it is a layer whose weights can be quantized: torch's own, a subclass, or transformers' Conv1D."""
    cls = type(module)
    if isinstance(module, Converted) or cls.__name__ == PROJECTION:
        return False
    return cls in WEIGHTED or (isinstance(module, tuple(set(WEIGHTED) - {nn.Embedding})) or stores_transposed(module))


def stores_transposed(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D (GPT-2), a Linear whose weight is (in, out). Known by its name alone."""
    weight = module._parameters.get("weight")
    return any(cls.__name__ == "Conv1D" for cls in type(module).__mro__) and (weight is None or weight.dim() == 2)


def norm_factor(norm: Any) -> tuple[Tensor, Tensor]:
    """BatchNorm in eval mode as x * c + d, both (C,): c = gamma / sqrt(var + eps), d = beta - mean c."""
    factor = torch.rsqrt(norm.running_var.float() + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight.float()
    offset = -norm.running_mean.float() * factor
    return factor, offset if norm.bias is None else offset + norm.bias.float()


@torch.no_grad()
def deployed_integers(layer: Any) -> DeployedIntegers:
    """What is deployed of a quantized layer with its BatchNorm folded.

    With c = gamma / sqrt(var + eps) per channel: integers Q(w) sign(c), scale s |c|, bias (beta - mean c + c b) rounded
    to the grid of scale_x s |c|. Exact, since rounding to a grid per channel commutes with a factor per channel.
    """
    wiring: Wiring = layer._wiring
    if isinstance(layer, QuantizedNorm):
        # The one weight of a channel is c: the largest integer times a scale of its own.
        factor, offset = norm_factor(layer)
        q = (torch.sign(factor) * wiring.largest).reshape(-1, *[1] * (wiring.rank - 1))
        return _with_bias(q, factor.abs() / wiring.largest, 0, offset, wiring.source)
    q, spread, zero = on_own_grid(layer)
    if zero is not None:
        return _affine_integers(layer, q, spread, zero)
    if wiring.block:
        return _integers_in_blocks(layer, q, spread)
    axis, scale = wiring.axis, spread.reshape(-1) if wiring.axis is not None else spread.reshape(())
    bias = None if layer.bias is None else layer.bias.detach().float()
    if wiring.norm is not None:
        factor, offset = norm_factor(wiring.norm)
        bias = offset if bias is None else offset + factor * bias
        axis = channel_axis(layer)
        q = q * widened(torch.sign(factor), q, axis, 0)
        scale = scale * factor.abs()
    return _with_bias(q, scale, axis, bias, wiring.source)


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


def _integers_in_blocks(layer: Any, q: Tensor, scale: Tensor) -> DeployedIntegers:
    """No runtime sums blocks in integers: the bias stays in float."""
    bias = None if layer.bias is None else layer.bias.detach().float()
    axis = channel_axis(layer)
    if layer._wiring.norm is not None:
        factor, offset = norm_factor(layer._wiring.norm)
        bias = offset if bias is None else offset + factor * bias
        q = q * widened(torch.sign(factor), q, axis, 0)
        scale = (scale * widened(factor.abs(), scale, axis, 0)).clamp(min=1e-20)
    return DeployedIntegers(q.to(torch.int8), scale.contiguous(), 1 - axis, None, scale, bias)


def _affine_integers(layer: Any, q: Tensor, scale: Tensor, zero: Tensor) -> DeployedIntegers:
    """Of weights whose input is in float; `q` is counted from `zero` on, so that a factor of -1 turns both round."""
    wiring: Wiring = layer._wiring
    levels, channels = 2 * wiring.largest + 1, channel_axis(layer)
    bias = None if layer.bias is None else layer.bias.detach().float()
    axis = 1 - channels if wiring.block else wiring.axis
    if not wiring.block:
        scale, zero = (each.reshape(() if axis is None else -1) for each in (scale, zero))
    if wiring.norm is not None:
        factor, offset = norm_factor(wiring.norm)
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


def channel_axis(layer: nn.Module) -> int:
    """The dimension of the weight along which the output channels lie."""
    return 1 if isinstance(layer, TRANSPOSED) or stores_transposed(layer) else 0


def folded(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer in eval mode: what `deployed_integers` says, in float; with gradients where they are
    wanted."""
    wiring: Wiring = layer._wiring
    if not wiring.largest:
        return _folded_float(layer)
    whole = deployed_integers(layer)
    scale = widened(whole.scale, whole.weight, whole.axis, wiring.block)
    dtype = (layer.running_mean if layer.weight is None else layer.weight).dtype
    weight = (whole.weight.float() * scale).to(dtype)
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


def _folded_float(layer: Any) -> tuple[Tensor, Tensor | None]:
    wiring: Wiring = layer._wiring
    if wiring.rank:
        factor, offset = norm_factor(layer)
        return factor.reshape(-1, *[1] * (wiring.rank - 1)), offset
    if wiring.norm is None:
        return layer.weight, layer.bias
    factor, offset = norm_factor(wiring.norm)
    weight = layer.weight * widened(factor, layer.weight, channel_axis(layer), 0).to(layer.weight.dtype)
    bias = offset if layer.bias is None else offset + factor * layer.bias
    return weight, bias.to(layer.weight.dtype)
