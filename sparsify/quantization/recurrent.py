"""LSTM and GRU with weights on a grid of integers: they compute their steps in float, with rounded weights.

Each of their weights (of the input and of the state, of every level and direction) has scales of its own, one for each
row of a gate. Biases and what they read stay in float: the steps of one call are one operator of torch. Not nn.RNN: the
exporter writes its steps one by one, each with products of its own (seen in torch 2.13.0).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsify.quantization.weight_grid import grid_integers, rounded
from sparsify.quantization.wiring import Converted, DeployedIntegers, wiring_of

__all__: list[str] = []


class QuantizedRecurrent(Converted):
    """A recurrent layer. Its parameters stay what they are; its operator is given their rounded values."""

    def _operands(self) -> list[Tensor]:
        """Weights and biases in the order in which torch's operator takes them, the weights rounded."""
        wiring = self._wiring
        found: list[Tensor] = []
        for name in flat_names(self):
            value = getattr(self, name)
            found.append(rounded(value, wiring.axis, wiring) if name in weight_names(self) and wiring.rounds else value)
        return found

    def forward(self, input: Any, hx: Any = None) -> Any:
        own = self.__dict__["_flat_weights"]
        # A watched module above asks about every function; this one is no operation of its own.
        with torch._C.DisableTorchFunction():
            self.__dict__["_flat_weights"] = self._operands()
        try:
            return super().forward(input, hx)
        finally:
            self.__dict__["_flat_weights"] = own


class QuantizedLSTM(QuantizedRecurrent, nn.LSTM):
    pass


class QuantizedGRU(QuantizedRecurrent, nn.GRU):
    pass


RECURRENT_FORMS: dict[type[nn.Module], type[Converted]] = {
    nn.LSTM: QuantizedLSTM,
    nn.GRU: QuantizedGRU,
}


def flat_names(layer: nn.Module) -> list[str]:
    """The names of weights and biases in the order in which torch's operator takes them."""
    names: list[str] = layer.__dict__["_flat_weights_names"]
    return names


def weight_names(layer: nn.Module) -> list[str]:
    """Those of the weights alone: "weight_ih_l0", "weight_hh_l0", ..."""
    return [name for name in flat_names(layer) if name.startswith("weight")]


def is_recurrent(module: nn.Module) -> bool:
    """True for a recurrent layer of torch whose weights can be quantized; not for a user's subclass."""
    return type(module) in RECURRENT_FORMS


@torch.no_grad()
def recurrent_integers(layer: QuantizedRecurrent) -> dict[str, DeployedIntegers]:
    """{weight: the integers that are deployed of it}."""
    wiring = wiring_of(layer)
    found: dict[str, DeployedIntegers] = {}
    for name in weight_names(layer):
        q, scale, zero = grid_integers(getattr(layer, name).detach().float(), wiring.axis, wiring)
        scale = scale.reshape(() if wiring.axis is None else -1)
        if zero is not None:
            zero = zero.reshape(scale.shape).to(torch.uint8)
        kept = q.to(torch.int8 if zero is None else torch.int16)
        found[name] = DeployedIntegers(kept, scale, wiring.axis, None, scale, None, zero)
    return found
