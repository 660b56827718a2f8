"""Networks in the form that export gives a quantized model, written by hand: int8 weights, int32 biases, Q and DQ.

Kept apart from the quantizer, so that what export needs is tested without it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify.quantization.qdq_ops import dequantize, quantize_dequantize


class Quantizer(nn.Module):
    def __init__(self, scale: float = 0.05, zero_point: int = 0) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale))
        self.register_buffer("zero_point", torch.tensor(zero_point, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        return quantize_dequantize(x, self.scale, self.zero_point)


class IntegerWeights(nn.Module):
    """A convolution (with `stride`) or, without a kernel size, a Linear; its bias lies on the grid of input_scale."""

    def __init__(self, inner: int, outer: int, size: int | None, input_scale: Tensor, stride: int = 1) -> None:
        super().__init__()
        self.size, self.stride = size, stride
        shape = (outer, inner) if size is None else (outer, inner, size, size)
        fan_in = inner * (1 if size is None else size * size)
        weight = torch.randn(shape) / fan_in**0.5
        weight[torch.rand(shape) < 0.5] = 0.0
        scale = weight.flatten(1).abs().amax(1) / 127
        view = (-1, *[1] * (len(shape) - 1))
        self.register_buffer("weight_int8", (weight / scale.view(view)).round().to(torch.int8))
        self.register_buffer("weight_scale", scale)
        bias_scale = scale * input_scale
        self.register_buffer("bias_int32", (torch.randn(outer) * 0.1 / bias_scale).round().to(torch.int32))
        self.register_buffer("bias_scale", bias_scale)

    def forward(self, x: Tensor) -> Tensor:
        weight = dequantize(self.weight_int8, self.weight_scale, 0)
        bias = dequantize(self.bias_int32, self.bias_scale, 0)
        if self.size is None:
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, self.stride, self.size // 2)


class IntegerBlock(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int, input_scale: Tensor) -> None:
        super().__init__()
        self.first = Quantizer(0.03)
        self.second = Quantizer(0.05, 120)
        self.last = Quantizer(0.04)
        self.conv1 = IntegerWeights(inner, outer, 3, input_scale, stride)
        self.conv2 = IntegerWeights(outer, outer, 3, self.first.scale)
        self.shortcut = None
        if stride != 1 or inner != outer:
            self.shortcut = IntegerWeights(inner, outer, 1, input_scale, stride)
            self.side = Quantizer(0.045, 128)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(torch.relu(self.conv1(x)))
        y = self.second(self.conv2(y))
        side = x if self.shortcut is None else self.side(self.shortcut(x))
        return self.last(torch.relu(y + side))


class IntegerResNet(nn.Module):
    """As the CIFAR ResNets: `blocks` residual blocks at each of three widths; ResNet-20 has blocks=3, width=16."""

    def __init__(self, blocks: int = 3, width: int = 16, max_pool: bool = False) -> None:
        super().__init__()
        self.input = Quantizer(0.05, 128)
        self.stem = IntegerWeights(3, width, 3, self.input.scale)
        self.after_stem = Quantizer(0.04)
        self.max_pool = max_pool
        layers, scale = [], self.after_stem.scale
        for i, outer in enumerate((width, 2 * width, 4 * width)):
            for j in range(blocks):
                inner = outer if j or not i else outer // 2
                layers.append(IntegerBlock(inner, outer, 2 if i and not j else 1, scale))
                scale = layers[-1].last.scale
        self.layers = nn.Sequential(*layers)
        self.pooled = Quantizer(0.02)
        self.head = IntegerWeights(4 * width, 10, None, self.pooled.scale)

    def forward(self, x: Tensor) -> Tensor:
        x = self.after_stem(torch.relu(self.stem(self.input(x))))
        if self.max_pool:
            x = F.max_pool2d(x, 3, 2, 1)
        x = self.layers(x)
        x = self.pooled(F.adaptive_avg_pool2d(x, 1))
        return self.head(torch.flatten(x, 1))


class IntegerEncoderLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention_input = Quantizer(0.04, 128)
        self.query, self.key, self.value = (
            IntegerWeights(width, width, None, self.attention_input.scale) for _ in range(3)
        )
        self.context = Quantizer(0.03, 128)
        self.out = IntegerWeights(width, width, None, self.context.scale)
        self.hidden_input = Quantizer(0.04, 128)
        self.up = IntegerWeights(width, 4 * width, None, self.hidden_input.scale)
        self.hidden = Quantizer(0.03, 20)
        self.down = IntegerWeights(4 * width, width, None, self.hidden.scale)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        y = self.attention_input(x)
        q, k, v = (
            layer(y).view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        x = self.norm1(x + self.out(self.context(y)))
        y = self.down(self.hidden(F.gelu(self.up(self.hidden_input(x)))))
        return self.norm2(x + y)


class IntegerEncoder(nn.Module):
    """Linear layers quantized at their inputs, the rest in float."""

    def __init__(self, layers: int = 2, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[IntegerEncoderLayer(width, heads) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
