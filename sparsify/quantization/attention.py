"""MultiheadAttention in integers: its projections are quantized Linear layers on rows of its own parameters.

Query, key and value are each read by a layer that has a quantizer for that tensor, so that a bias lies on the grid of
what its layer reads. Where they are one tensor on the example inputs, they share a layer.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify.errors import ArgumentError
from sparsify.quantization.attention_products import probabilities, quantize_of
from sparsify.quantization.conversion import convert_, original_type
from sparsify.quantization.layers import QuantizedLinear
from sparsify.quantization.wiring import Converted, add_child, overwrite

__all__: list[str] = []

FORMS = (("in_proj",), ("q_proj", "kv_proj"), ("q_proj", "k_proj", "v_proj"))
"""The layers in front: where query, key and value are one tensor; where key and value are; where all may differ.

Torch computes as many products."""
_THIRDS = {"in_proj": (0, 3), "q_proj": (0, 1), "kv_proj": (1, 3), "k_proj": (1, 2), "v_proj": (2, 3)}
"""Which thirds of the packed weight and bias each has: those of query, key and value."""


class SlowTransformerEncoder(Converted, nn.TransformerEncoder):
    """Without nested tensors, which its layers cannot read once they are quantized."""


class SlowTransformerEncoderLayer(Converted, nn.TransformerEncoderLayer):
    """Without the fused path of eval mode, which reads the weights of its layers and does not call them.

    https://github.com/pytorch/pytorch/issues/128413, seen in torch 2.13.0. torch.backends.mha.set_fastpath_enabled is
    for the whole process, other models included; a switch of the module would make this class needless.
    """


SLOW: dict[type[nn.Module], tuple[type[Converted], str, Any]] = {
    nn.TransformerEncoder: (SlowTransformerEncoder, "use_nested_tensor", False),
    # The fused path asks for this first; nothing else reads it.
    nn.TransformerEncoderLayer: (SlowTransformerEncoderLayer, "activation_relu_or_gelu", 0),
}
"""{a module with a path of its own in eval mode: (its class without, the attribute that opens the path, shut)}."""


class Projection(nn.Linear):
    """A Linear that holds no parameters: its weight and bias are rows of those of an attention."""

    def __init__(self, attention: nn.MultiheadAttention, name: str) -> None:
        nn.Module.__init__(self)
        # In a tuple so that it is no child.
        self._attention = (attention,)
        self._packed = attention.in_proj_weight is not None
        self._thirds = _THIRDS[name]
        self.parameter_name = "in_proj_weight" if self._packed else f"{name}_weight"
        self.out_features, self.in_features = self.weight.shape
        self.train(attention.training)

    @property
    def parameter(self) -> nn.Parameter:
        """The attention's parameter that the weight lies in."""
        found: nn.Parameter = getattr(self._attention[0], self.parameter_name)
        return found

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self._rows(self.parameter) if self._packed else self.parameter

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        packed = self._attention[0].in_proj_bias
        return None if packed is None else self._rows(packed)

    def _rows(self, packed: Tensor) -> Tensor:
        first, last = (third * (packed.shape[0] // 3) for third in self._thirds)
        return packed if last - first == packed.shape[0] else packed[first:last]


class QuantizedProjection(QuantizedLinear, Projection):
    pass


class QuantizedMultiheadAttention(Converted, nn.MultiheadAttention):
    """Attention through quantized layers: those of one of `FORMS`, and `out_proj`.

    A call with other tensors than were traced computes the same function: where two that were one differ, the layer
    that they share reads each of them.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch's; `is_causal` is a hint there, `attn_mask` what counts.

        Raises:
            ArgumentError: shapes that do not fit together; a hint without a mask.
        """
        self._check(query, key, value, key_padding_mask, attn_mask, is_causal)
        # A watched module above asks about every function; what is computed here is no operation of its own.
        with torch._C.DisableTorchFunction():
            return self._attend(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        alone = query.dim() == 2
        if alone and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        q, k, v = (self._heads(part, alone) for part in self._projected(query, key, value))
        mask = _joined_mask(attn_mask, key_padding_mask, q, self.num_heads)
        dropout = self.dropout if self.training else 0.0
        weights = None
        quantize = quantize_of(self, 0)
        if need_weights or quantize is not None:
            if quantize is None:
                scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
                weights = (scores if mask is None else scores + mask).softmax(-1)
            else:
                weights, v = probabilities(quantize, q, k, mask), quantize("value", v)
            weights = F.dropout(weights, dropout)
            mixed = weights @ v
            if not need_weights:
                weights = None
            elif average_attn_weights:
                weights = weights.mean(1)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        # (batch, heads, length, size)
        order = (0, 2, 1, 3) if self.batch_first or alone else (2, 0, 1, 3)
        y: Tensor = self.out_proj(mixed.permute(order).flatten(2))
        if alone:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return y, weights

    def holds_integers(self, layers: Container[nn.Module]) -> bool:
        """True if the layers in front are among `layers`, which have its weights as integers."""
        return all(self._modules[name] in layers for name in self._wiring.projections)

    def _projected(self, *given: Tensor) -> list[Tensor]:
        """The results of the layers in front for query, key and value."""
        found: list[Tensor] = []
        for name in self._wiring.projections:
            first, last = _THIRDS[name]
            parts: tuple[Tensor, ...] = ()
            for third in range(first, last):
                if third == first or given[third] is not given[third - 1]:
                    parts = self._modules[name](given[third]).chunk(last - first, -1)  # type: ignore[misc]
                found.append(parts[third - first])
        return found

    def _heads(self, x: Tensor, alone: bool) -> Tensor:
        """The output of a projection as (batch, heads, length, size of a head)."""
        x = x.view(*x.shape[:-1], self.num_heads, -1)
        if alone:
            return x.transpose(0, 1).unsqueeze(0)
        return x.permute((0, 2, 1, 3) if self.batch_first else (1, 2, 0, 3))

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding: Tensor | None,
        attention: Tensor | None,
        is_causal: bool,
    ) -> None:
        """Refuses what torch refuses, some of which would be broadcast here."""
        shapes = [tuple(x.shape) for x in (query, key, value)]
        along = query.dim() - 2 if self.batch_first else 0
        batched = query.dim() == 3
        wrong = None
        if query.dim() not in (2, 3) or {key.dim(), value.dim()} != {query.dim()}:
            wrong = f"query, key and value of the shapes {shapes} are to have three dimensions each, or two"
        elif key.shape[:-1] != value.shape[:-1] or (batched and key.shape[1 - along] != query.shape[1 - along]):
            wrong = f"query, key and value of the shapes {shapes} do not fit together"
        elif [shape[-1] for shape in shapes] != [self.embed_dim, self.kdim, self.vdim]:
            wrong = f"query, key and value of the shapes {shapes} are to have {self.embed_dim}, {self.kdim} and "
            wrong += f"{self.vdim} channels"
        elif is_causal and attention is None:
            wrong = "is_causal is a hint about attn_mask, and there is none; give both"
        else:
            whole = (query.shape[along], key.shape[along])
            batch = query.shape[1 - along] if batched else 1
            if attention is not None and attention.shape not in (whole, (batch * self.num_heads, *whole)):
                wrong = f"attn_mask has the shape {tuple(attention.shape)}; it is to be {whole}, or "
                wrong += f"{(batch * self.num_heads, *whole)} for a mask of each head"
            elif padding is not None and padding.shape != ((batch, whole[1]) if batched else whole[1:]):
                wrong = f"key_padding_mask has the shape {tuple(padding.shape)}, the keys {shapes[1]}"
        if wrong is not None:
            raise ArgumentError(f"MultiheadAttention: {wrong}.")


def _joined_mask(attention: Tensor | None, padding: Tensor | None, like: Tensor, heads: int) -> Tensor | None:
    """Both masks of an attention, True or -inf where nothing is read, as one to be added; None without any."""
    if attention is not None and attention.dim() == 3:
        attention = attention.view(-1, heads, *attention.shape[1:])
    padding = None if padding is None else padding[:, None, None, :]
    joined: Tensor | None = None
    for mask in (attention, padding):
        if mask is not None:
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))
            joined = mask if joined is None else joined + mask
    return joined


def quantize_attention(attention: nn.MultiheadAttention, names: tuple[str, ...]) -> None:
    """Converts `attention`, in place, and gives it the layers called `names`: one of `FORMS`."""
    wiring = convert_(attention, QuantizedMultiheadAttention)
    for name in names:
        projection = Projection(attention, name)
        convert_(projection, QuantizedProjection)
        add_child(attention, name, projection)
    wiring.projections = names


def disable_fast_path(module: nn.Module) -> None:
    """Keeps `module`, whose type is in `SLOW`, from its path of eval mode."""
    quantized, name, value = SLOW[original_type(module)]
    convert_(module, quantized)
    overwrite(module, name, value)
