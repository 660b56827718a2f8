"""Quantized layers: a user's own layer, converted in place. Parameters, hooks, aliases stay; the state_dict gains keys.

In training the weights are fake-quantized and BatchNorm is left alone. In eval mode a layer computes exactly what is
deployed: BatchNorm folded into integer weights, the bias on the grid of 32-bit sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from sparsify.quantization.folding import folded, layer_integers, norm_integers, own_weight, table_integers
from sparsify.quantization.weight_grid import WEIGHT_STEP, bias_of, fake_layer_weight, rounded, weight_of
from sparsify.quantization.wiring import Converted, DeployedIntegers

__all__: list[str] = []


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
            return fake_layer_weight(self) if self._wiring.rounds else weight_of(self), bias_of(self)

    def deployed_integers(self) -> DeployedIntegers:
        return layer_integers(self)

    def called(self, x: Tensor, function: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Tensor:
        return self._output(function(self._input(x), *self._weights()))

    def rounded_weight(self) -> Tensor:
        with torch._C.DisableTorchFunction():
            return own_weight(self)

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
                table = fake_layer_weight(self)
            return self._output(self._rows(input, table))
        rows = self._rows(input, self.weight)
        with torch._C.DisableTorchFunction():
            flat = rows.reshape(-1, rows.shape[-1])
            return self._output(rounded(flat, 0, wiring).view(rows.shape))

    def called(self, x: Tensor, function: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Tensor:
        return self._output(function(self._input(x), self.rounded_weight(), None))

    def rounded_weight(self) -> Tensor:
        with torch._C.DisableTorchFunction():
            return own_weight(self)

    def deployed_integers(self) -> DeployedIntegers:
        return table_integers(self)

    def _rows(self, ids: Tensor, table: Tensor) -> Tensor:
        return F.embedding(
            ids, table, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
        )


class QuantizedNorm(Converted, _BatchNorm):
    """A BatchNorm: passes through in eval mode where it is folded into a layer.

    Where it stands alone between integers, as before a convolution, it is in eval mode a depthwise convolution of
    kernel 1. Its integers are exact: of one weight a channel, each is the largest there is.
    """

    def _normed(self, x: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
        """The result for `x`; `norm` computes it as torch does, with the statistics of the batch in training."""
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
        """True if it computes in integers by itself."""
        wiring = self._wiring
        return bool(wiring.rank and wiring.rounds and wiring.source is not None and wiring.source.enabled)

    def deployed_integers(self) -> DeployedIntegers:
        return norm_integers(self)

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


def frozen_norm(norm: _BatchNorm, x: Tensor) -> Tensor:
    """BatchNorm by its running statistics, which stay as they are; its weight and bias learn."""
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
