"""Links of a converted module to others, and what has to be undone when it becomes again what it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparsify.quantization.fake_quantize import FakeQuantize

__all__: list[str] = []


@dataclass
class Wiring:
    """Links of a converted module: its original class, its BatchNorm, its quantizers, the grid of its weights.

    A plain object, so that what it points to is no child of the module.

    Attributes:
        original: the class that the module had.
        axis: the dimension of the weight with a scale for each index; None: one scale.
        q_max: the largest integer of a weight, 2^(bits-1) - 1; 0: the scheme leaves the weights in float.
        enabled: whether weights are rounded; off, the layer computes with them in float for as long.
        block: number of weights along the inputs, of each channel, that share a scale; 0: all of them.
        affine: whether a scale of weights has a zero point beside it.
        rank: of a BatchNorm that is a layer of its own, the number of dimensions of what it reads.
        channels: likewise, how many it has; 0: as many as it has numbers.
        source: the quantizer of the tensor that it reads; None: that is float.
        shared: a quantizer for its input that another layer holds; None: it has its own, or none.
        norm: of a layer, the BatchNorm that is folded into it.
        layer: of a BatchNorm, the layer that it is folded into.
        frozen: of a BatchNorm, whether it uses its running statistics in training.
        projections: of an attention, the names of the layers in front of it.
        read: whether another module's forward reads its parameters, which a deployed copy keeps then.
        lent: whether nobody calls it: all its products are computed by who reads its weight.
        children: names of the children that were added, to be removed by an undo.
        overwritten: attribute -> (the value that it had,), or () where it did not exist, to be put back by an undo.
    """

    original: type[nn.Module]
    axis: int | None = None
    q_max: int = 0
    enabled: bool = True
    block: int = 0
    affine: bool = False
    rank: int = 0
    channels: int = 0
    source: FakeQuantize | None = None
    shared: FakeQuantize | None = None
    norm: _BatchNorm | None = None
    layer: nn.Module | None = None
    frozen: bool = False
    projections: tuple[str, ...] = ()
    read: bool = False
    lent: bool = False
    children: list[str] = field(default_factory=list)
    overwritten: dict[str, tuple[()] | tuple[Any]] = field(default_factory=dict)

    @property
    def rounds(self) -> bool:
        """True if weights are rounded now."""
        return self.enabled and self.q_max > 0

    @property
    def bits(self) -> int:
        """Bits of a weight; 0: the scheme leaves the weights in float.

        >>> Wiring(nn.Linear, q_max=127).bits, Wiring(nn.Linear, q_max=1).bits, Wiring(nn.Linear).bits
        (8, 2, 0)
        """
        return bits_of(self.q_max)


def bits_of(q_max: int) -> int:
    """Bits of the symmetric integers up to `q_max` = 2^(bits-1) - 1; 0 for 0.

    >>> bits_of(127), bits_of(63), bits_of(1), bits_of(0)
    (8, 7, 2, 0)
    """
    return q_max.bit_length() + 1 if q_max else 0


class DeployedIntegers(NamedTuple):
    """The integers of one layer as they are deployed, BatchNorm folded.

    Attributes:
        weight: int8; int16 where there are zero points, from which on these integers count.
        scale: float32 of rank 0, or (C,) along `axis`; with blocks one entry for each block along `axis`.
        axis: the dimension of `weight` that `scale` lies along, with blocks that of the inputs; None: rank 0.
        bias: int32 (C,), or None.
        bias_scale: of the shape of `scale`.
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
    """A module that was converted in place: reads and gives what its quantizers make of tensors."""

    _wiring: Wiring

    def _input(self, x: Tensor) -> Tensor:
        quantizer = input_quantizer(self)
        y: Tensor = x if quantizer is None else quantizer(x)
        return y

    def _output(self, y: Tensor) -> Tensor:
        quantizer = self._modules.get("output_quantizer")
        return y if quantizer is None else quantizer(y)

    def called(self, x: Tensor, function: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Tensor:
        """The result of a layer for `x` where another forward computes `function` of input, weight and bias."""
        raise NotImplementedError

    def rounded_weight(self) -> Tensor:
        """The weight of a layer as it stands, rounded to its own grid: no BatchNorm is folded into it."""
        raise NotImplementedError

    def deployed_integers(self) -> DeployedIntegers:
        """The integers that are deployed of a layer, BatchNorm folded."""
        raise NotImplementedError


def input_quantizer(module: Converted) -> FakeQuantize | None:
    """The quantizer of what a layer reads: its own, or the one that it shares; None: it reads floats."""
    shared = module._wiring.shared
    return shared if shared is not None else cast("FakeQuantize | None", module._modules.get("input_quantizer"))


def wiring_of(module: nn.Module) -> Wiring:
    """The links of a converted module.

    Raises:
        KeyError: it was not converted.
    """
    found: Wiring = module.__dict__["_wiring"]
    return found


def add_child(module: nn.Module, name: str, child: nn.Module) -> None:
    """Adds a child to a converted module, which an undo of the conversion removes."""
    module.add_module(name, child)
    wiring_of(module).children.append(name)


def overwrite(module: nn.Module, name: str, value: object) -> None:
    """Sets an attribute of a converted module; an undo of the conversion gives it the value that it had, or none."""
    values = module.__dict__
    wiring_of(module).overwritten.setdefault(name, (values[name],) if name in values else ())
    values[name] = value


def revert_(module: Converted) -> None:
    """Gives a converted module its class back, and removes what was added to it."""
    wiring: Wiring = module.__dict__.pop("_wiring")
    for name in wiring.children:
        module._modules.pop(name, None)
    for name, before in wiring.overwritten.items():
        if before:
            module.__dict__[name] = before[0]
        else:
            module.__dict__.pop(name, None)
    plain: nn.Module = module
    plain.__class__ = wiring.original
