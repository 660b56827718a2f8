"""Families of channels: what must be removed together so that a smaller model computes the same. Plain data.

A channel is one index along one dimension of one or more weights; the channels of a family are alike: each takes the
same share of the same tensors. Found by `find` on the traced view of a model; `shrink` masks and removes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__: list[str] = []

Kind = Literal["conv", "linear", "heads", "embedding"]


@dataclass(frozen=True)
class Place:
    """One dimension of one parameter or buffer, and which channel of the family each slice along it belongs to.

    Attributes:
        tensor: the clean name; of tied parameters the first.
        role: "row", what a layer's weight gives; "column", what it reads; "other", biases, norms, tables and buffers.
        channels: a channel, or -1 for none of this family, for every index of the dimension.
    """

    tensor: str
    dim: int
    role: Literal["row", "column", "other"]
    channels: tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """Channels that are alike, `size` of them, 0 to size - 1; each dies in all `places` at once or not at all.

    Attributes:
        name: the weight whose rows they are, the first in the model's order; "#2" and so on behind it where several
            families share that weight's rows.
        kind: "heads" where a channel is a whole head of attention, otherwise by the layers whose rows they are; "conv"
            where any is a convolution.
    """

    name: str
    kind: Kind
    size: int
    places: tuple[Place, ...]

    @property
    def rows(self) -> tuple[str, ...]:
        """The weights that give these channels."""
        return tuple(dict.fromkeys(place.tensor for place in self.places if place.role == "row"))

    @property
    def columns(self) -> tuple[str, ...]:
        """The weights that read these channels."""
        return tuple(dict.fromkeys(place.tensor for place in self.places if place.role == "column"))


@dataclass(frozen=True)
class Extent:
    """A size that is seen inside a module's own forward and changes with families: code there may have it as a number.

    Attributes:
        module: the path of the module in whose forward the tensor is made.
        channels: (family's name, channel) for every index of that dimension; None for what always stays.
    """

    module: str
    channels: tuple[tuple[str, int] | None, ...]


@dataclass(frozen=True)
class Families:
    """All families of a model, and why other weights keep their size.

    Attributes:
        families: in the model's order, by name.
        whole: {weight: why its rows cannot be cut}, for the weights of layers that have no family of rows.
    """

    families: Mapping[str, Family]
    whole: Mapping[str, str] = field(default_factory=dict)
    extents: tuple[Extent, ...] = ()
