"""Quantization as a recipe asks for it: bits, observers, scales, and which layers have others or none."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import nn

from sparsify.errors import RecipeError, SparsifyWarning
from sparsify.model.targets import resolve_layers
from sparsify.output.booleans import read_booleans
from sparsify.output.field_errors import recipe_error
from sparsify.quantization.observers import Observer

__all__: list[str] = []

Bits = Annotated[int, Field(ge=2, le=8)]
Named = Literal["default", "onnxruntime", "deepsparse", "tensorrt", "weight_only"]


class ActivationScheme(BaseModel):
    """Quantization of the values that flow between layers: one scale per tensor."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    num_bits: Bits = Field(default=8, description="Bits of a value, 2 to 8; exported in 8-bit storage.")
    symmetric: bool = Field(
        default=False,
        description="True: signed, zero point 0 (int8). False: affine, unsigned (uint8); zero is exact, and the zero "
        "point 0 after a ReLU.",
    )
    strategy: Literal["tensor"] = Field(default="tensor", description="One scale per tensor.")
    observer: Observer = Field(
        default="moving_average",
        description="How the range follows from the values seen: moving_average of each batch's least and largest; "
        "min_max of all; or from a histogram: percentile, mse (least squared error), entropy. The last three see "
        "through outliers and are made for calibration data; in training they cost more. lsq: the scale is a parameter "
        "that the optimizer trains (learned step size), and with it the offset where there is no ReLU.",
    )
    kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="`averaging_constant` (0.01): the share of a batch in the moving range or histogram; `percentile` "
        "(99.99). Other keys, of torch's observers, are without effect.",
    )

    @model_validator(mode="before")
    @classmethod
    def _booleans(cls, fields: object) -> object:
        return read_booleans(cls, fields)

    @model_validator(mode="after")
    def _usable(self) -> ActivationScheme:
        for name, low, high in (("averaging_constant", 0.0, 1.0), ("percentile", 50.0, 100.0)):
            value = self.kwargs.get(name)
            if value is not None and not (
                isinstance(value, (int, float)) and not isinstance(value, bool) and low < value <= high
            ):
                raise ValueError(f"kwargs.{name}: {value!r} is not a number above {low:g}, at most {high:g}.")
        return self


class WeightScheme(BaseModel):
    """Quantization of weights; a zero stays exactly zero in every way."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    num_bits: Bits = Field(
        default=8,
        description="Bits of a weight, 2 to 8. In a file weights of 4 bits and fewer take half a byte where what they "
        "meet stays in float (opset 21), all others a byte: integer kernels read int8.",
    )
    symmetric: bool = Field(
        default=True,
        description="True: signed integers, zero point 0. False: affine, unsigned, with a zero point beside each scale "
        "(uint8, uint4), which with few bits is nearer to weights in blocks; zero is exact. For weights alone, with "
        "input_activations: null and observer: min_max.",
    )
    strategy: Literal["tensor", "channel", "block"] = Field(
        default="channel",
        description="One scale per output channel, or one for the whole tensor. With a folded BatchNorm the exported "
        "scales are per channel either way. block: one for each `block_size` inputs of each output channel of a Linear "
        "(other layers have one per channel); for weights alone, with input_activations: null.",
    )
    block_size: Literal[16, 32, 64, 128, 256] | None = Field(
        default=None, description="How many weights share a scale, with strategy: block; 32 and 128 are usual."
    )
    observer: Literal["min_max", "lsq"] = Field(
        default="min_max",
        description="Where a scale comes from: min_max, the largest weight; lsq, a parameter that the optimizer trains "
        "(learned step size), which helps with 2 and 3 bits.",
    )
    kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="`reduce_range`: one bit less, for CPUs without VNNI. Other keys, of torch's observers, are "
        "without effect.",
    )

    @model_validator(mode="before")
    @classmethod
    def _booleans(cls, fields: object) -> object:
        return read_booleans(cls, fields)

    @model_validator(mode="after")
    def _usable(self) -> WeightScheme:
        if (self.strategy == "block") != (self.block_size is not None):
            raise ValueError(
                f"strategy: {self.strategy} with block_size: {self.block_size}; strategy: block and a block_size go "
                "together, as in {strategy: block, block_size: 32}."
            )
        if not self.symmetric and self.observer == "lsq":
            raise ValueError(
                "symmetric: false with observer: lsq; a learned step has no zero point to go with it. Write observer: "
                "min_max, or symmetric: true."
            )
        return self


class Scheme(BaseModel):
    """Quantization around a layer: its input, its weights, its output; null leaves each in float.

    >>> Scheme(weights={"num_bits": 4}).weights.strategy
    'channel'
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    input_activations: ActivationScheme | None = Field(
        default=ActivationScheme(), description="The tensor that a layer reads; quantized once where it is made."
    )
    weights: WeightScheme | None = Field(default=WeightScheme(), description="The weights of layers.")
    output_activations: ActivationScheme | None = Field(
        default=None,
        description="The output of a layer, quantized even where no quantized layer reads it. Residual adds, ReLUs and "
        "pools of convolutional blocks are quantized without it.",
    )

    matmul_activations: ActivationScheme | None = Field(
        default=None,
        description="What products of two activations read: both operands of a matmul, and of attention the query, the "
        "key, the probabilities and the value. null: they stay in float, which in onnxruntime on CPUs is as fast, and "
        "nearer to the model; some accelerators want them quantized.",
    )


NAMED: dict[str, Scheme] = {
    "default": Scheme(),
    "onnxruntime": Scheme(),
    "deepsparse": Scheme(),
    "tensorrt": Scheme(input_activations=ActivationScheme(symmetric=True)),
    "weight_only": Scheme(input_activations=None),
}
"""default, onnxruntime and deepsparse: uint8 activations, int8 weights per channel, which onnxruntime runs in integers
on the CPU. tensorrt: int8, symmetric activations. weight_only: int8 weights, computed with in float: a quarter of the
size. A Linear of 4 bits, or of blocks, is faster as well: see `onnx_weight_only`."""


def named(scheme: Scheme | str | None) -> Scheme:
    """The scheme of a name of `NAMED`, a scheme itself, or for None the default."""
    return scheme if isinstance(scheme, Scheme) else NAMED[scheme or "default"]


class _Fields(BaseModel):
    """Fields of a recipe or arguments of a function, as a user writes them."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    scheme: Scheme | Named | None = None
    scheme_overrides: dict[str, Scheme | Named | None] = Field(default_factory=dict)
    ignore: str | list[str] = Field(default_factory=list)


@dataclass(frozen=True)
class QuantizationSettings:
    """All that a plan is made from besides the trace: the scheme, its exceptions, and where to look.

    Attributes:
        scheme: of every layer for which nothing else is said.
        overrides: name or type of a layer -> the scheme there, whose missing fields are those of `scheme`; None: float.
        ignore: names or types left in float, with all that is below them.
        ignore_types: more of them, which may match nothing.
        within: only layers at or below these; None: everywhere.
        reduce_range: whether weights of 8 bits have 7.
        strict: whether a name in `overrides`, `ignore` or `within` that matches nothing is an error.
        where: what the settings belong to, for messages.
    """

    scheme: Scheme = NAMED["default"]
    overrides: Mapping[str, Scheme | None] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    ignore_types: tuple[str, ...] = ()
    within: tuple[str, ...] | None = None
    reduce_range: bool = False
    strict: bool = True
    where: str = "quantize"

    @classmethod
    def of(
        cls,
        scheme: Scheme | Mapping[str, Any] | str | None = None,
        overrides: Mapping[str, Scheme | Mapping[str, Any] | str | None] | None = None,
        ignore: Sequence[str] | str = (),
        *,
        where: str = "quantize",
    ) -> QuantizationSettings:
        """The settings that a user wrote, checked.

        Args:
            scheme: a scheme, its fields, or a name of `NAMED`; None: the default.
            overrides: name or type of a layer -> its scheme; None: float.
            ignore: names or types of layers left in float.
            where: what the settings belong to, for messages.

        Raises:
            RecipeError: a field that does not exist, or a value that it cannot have.
        """
        written = {
            "scheme": scheme,
            "scheme_overrides": dict(overrides or {}),
            "ignore": ignore if isinstance(ignore, str) else list(ignore),
        }
        try:
            fields = _Fields.model_validate(written)
        except ValidationError as error:
            raise recipe_error(_Fields, error, written, where=where) from None
        return cls(
            scheme=named(fields.scheme),
            overrides={name: None if one is None else named(one) for name, one in fields.scheme_overrides.items()},
            ignore=(fields.ignore,) if isinstance(fields.ignore, str) else tuple(fields.ignore),
            where=where,
        )

    def left_out(self, model: nn.Module) -> Callable[[str], bool]:
        """A predicate: True for the clean name of a module that stays in float, ignored or outside of `within`.

        Args:
            model: whose modules they are.

        Raises:
            TargetError: `strict`, and a name matches nothing.
        """
        ignored = resolve_layers(model, self.ignore, where=f"{self.where}.ignore", strict=self.strict)
        for name in self.ignore_types:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SparsifyWarning)
                ignored |= resolve_layers(model, [name], where=self.where, strict=False)
        if self.within is None:
            return lambda name: below(name, ignored)
        within = resolve_layers(model, self.within, where=f"{self.where}.submodules", strict=self.strict)
        return lambda name: below(name, ignored) or not below(name, within)

    def per_layer(self, model: nn.Module, layers: Iterable[str]) -> dict[str, Scheme | None]:
        """The scheme of each of `layers` (clean names of modules of `model`); None where it is ignored.

        Exact names beat types and patterns, the longer name beats the shorter, the later of two patterns wins.

        Args:
            model: whose modules they are.
            layers: clean names.

        Raises:
            TargetError: `strict`, and a name matches nothing.
            RecipeError: blocks of weights, or affine ones, beside quantized activations.
        """
        layers = list(layers)
        out = self.left_out(model)
        chosen: dict[str, Scheme | None] = {name: None if out(name) else self.scheme for name in layers}
        won: dict[str, tuple[bool, int]] = {}
        for key, override in self.overrides.items():
            found = resolve_layers(model, [key], where=f"{self.where}.scheme_overrides", strict=self.strict)
            for name in layers:
                parents = [parent for parent in found if below(name, [parent])]
                if not parents or (chosen[name] is None and name not in won):
                    continue
                rank = (key in found, max(map(len, parents)))
                if rank >= won.get(name, (False, 0)):
                    won[name] = rank
                    chosen[name] = None if override is None else self._filled(override)
        for name, scheme in chosen.items():
            weights = None if scheme is None else scheme.weights
            if scheme is not None and weights is not None and weights.block_size and scheme.input_activations:
                raise RecipeError(
                    f"{self.where}: {name} would have weights with a scale for each block of {weights.block_size} and "
                    "quantized activations, which no runtime sums in integers. Add input_activations: null, or give "
                    "its weights strategy: channel.",
                    field="scheme",
                )
            if scheme is not None and weights is not None and not weights.symmetric and scheme.input_activations:
                raise RecipeError(
                    f"{self.where}: {name} would have affine weights (symmetric: false) and quantized activations, "
                    "whose products take onnxruntime twice as long as those of symmetric weights. Write symmetric: "
                    "true for its weights, or add input_activations: null to quantize weights alone.",
                    field="scheme",
                )
        return chosen

    def _filled(self, override: Scheme) -> Scheme:
        given = {name: getattr(override, name) for name in override.model_fields_set}
        return self.scheme.model_copy(update=given)


def below(name: str, parents: Iterable[str]) -> bool:
    """True if `name` is one of `parents` or lies below one.

    >>> below("layer1.0.conv1", ["layer1.0"]), below("layer10", ["layer1"])
    (True, False)
    """
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)
