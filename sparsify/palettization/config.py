"""Settings of a weight's palette, and the base of all settings that a user builds for compression without training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparsify.errors import ArgumentError
from sparsify.output.field_errors import FieldProblem, recipe_error

__all__ = ["PalettizerConfig"]


class WeightConfig(BaseModel):
    """Settings for one weight. Fields that are misspelled or cannot be meant are ArgumentErrors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    does: ClassVar[str]
    """What it does to a weight, for messages."""

    weight_threshold: int = Field(
        default=2048, ge=0, description="Weights with as many elements or fewer stay as they are."
    )

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ArgumentError(str(recipe_error(type(self), error, fields))) from None


class PalettizerConfig(WeightConfig):
    """Gives a weight few different values: each element is an index of `nbits` bits into a palette of 2^nbits values.

    Zeros stay exactly zero: where a weight has any, 0 is one of the values of its palette.
    """

    does: ClassVar[str] = "palettize"

    mode: Literal["kmeans", "uniform", "unique", "custom"] = Field(
        default="kmeans",
        description="Where the values come from. kmeans: those with the least squared error, up to 2^20 distinct "
        "values x palette entries exactly, beyond that nearly so. uniform: evenly spaced from the least to the largest "
        "weight. unique: the values that the weight has, in the fewest bits that hold them; a weight with more than "
        "256 is left as it is, and said. custom: `lut_function`.",
    )
    nbits: Literal[1, 2, 3, 4, 6, 8] | None = Field(
        default=None, description="Bits of an index. Given with kmeans and uniform, and with them alone."
    )
    granularity: Literal["per_tensor", "per_grouped_channel"] = Field(
        default="per_tensor", description="One palette for a weight, or one for every `group_size` channels of it."
    )
    group_size: int = Field(
        default=32,
        ge=1,
        description="Channels that share a palette, with per_grouped_channel. A weight whose channels it does not "
        "divide is left as it is, and said.",
    )
    channel_axis: int | None = Field(
        default=None,
        ge=0,
        description="Dimension along which channels lie; None: that of the output channels, or of an embedding's rows.",
    )
    cluster_dim: int = Field(
        default=1,
        ge=1,
        description="Elements of a palette's entries: with 2, an index stands for two neighbors along the channel "
        "axis. A weight whose channels it does not divide is left as it is, and said.",
    )
    enable_per_channel_scale: bool = Field(
        default=False,
        description="True: each channel is divided by its largest absolute weight first, and one float a channel is "
        "stored. Not with cluster_dim > 1.",
    )
    lut_dtype: Literal["int8", "uint8"] | None = Field(
        default=None,
        description="Type of the palette's values: int8 and uint8 have one scale a palette, and zero is exact.",
    )
    lut_function: Callable[[np.ndarray], Any] | None = Field(
        default=None,
        description="With custom: takes the float32 weights that share a palette and returns its values, at most 256 "
        "finite numbers; each weight becomes the nearest of them.",
    )

    def model_post_init(self, _context: Any) -> None:
        """Checks fields against each other."""
        counted = self.mode in ("kmeans", "uniform")
        if counted and self.nbits is None:
            raise FieldProblem("nbits", f"is required with mode={self.mode!r}: 1, 2, 3, 4, 6 or 8.")
        if not counted and self.nbits is not None:
            raise FieldProblem("nbits", f"mode={self.mode!r} finds the bits itself: leave nbits out.")
        if (self.mode == "custom") != (self.lut_function is not None):
            raise FieldProblem("lut_function", "give one with mode='custom', and only then.")
        if self.cluster_dim > 1 and self.enable_per_channel_scale:
            raise FieldProblem("enable_per_channel_scale", "not with cluster_dim > 1: choose one of them.")
        if self.cluster_dim > 1 and self.mode not in ("kmeans",):
            raise FieldProblem("cluster_dim", f"{self.cluster_dim} needs mode='kmeans'.")
