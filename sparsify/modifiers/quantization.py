"""Quantization-aware training: when it starts, when ranges and batch statistics are frozen, and what is quantized."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from sparsify.modifiers.base import Active, Epoch, FieldProblem, Kind, Modifier, Names, Run
from sparsify.quantize.scheme import Bits, Named, Scheme

__all__ = ["QuantizationModifier"]


class QuantizationModifier(Modifier):
    """Trains the model as it will run in integers: from `start_epoch` on layers are quantized, ranges observed.

    Quantized are Linear, Conv1d, Conv2d, ConvTranspose2d (weights and what they read), Embedding (weights), and in
    convolutional blocks what ReLUs, residual adds, concatenations and average pools give. BatchNorm behind a
    convolution is folded in eval mode and at export. At its end quantized layers stay, ready for export.
    """

    kind: ClassVar[Kind] = "quantization"
    without_effect: ClassVar[frozenset[str]] = frozenset({"log_types", "phased", "available_devices", "available_gpus"})

    scheme: Scheme | Named | None = Field(
        default=None,
        description="default, deepsparse, tensorrt, or {input_activations, weights, output_activations}, each of "
        "{num_bits, symmetric, strategy, kwargs} or null for float. null: default.",
    )
    scheme_overrides: dict[str, Scheme | Named | None] = Field(
        default_factory=dict,
        description="Name or type of a layer -> its scheme; what it does not say is as in `scheme`. null: the layer "
        "stays in float.",
    )
    ignore: Names = Field(
        default_factory=list, description="Names or types of layers that stay in float, with all that is below them."
    )
    disable_quantization_observer_epoch: Epoch | None = Field(
        default=None, description="The epoch from which ranges of activations no longer move; null: they always do."
    )
    freeze_bn_stats_epoch: Epoch | None = Field(
        default=None,
        description="The epoch from which BatchNorm uses its running statistics in training and no longer updates "
        "them; null: never. Safe only where the learning rate is already small.",
    )
    model_fuse_fn_name: str | None = Field(
        default=None, description="Without effect: what is folded is found in the traced model."
    )
    model_fuse_fn_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Without effect, as model_fuse_fn_name."
    )
    num_calibration_steps: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="How many batches of the run's calibration data set the ranges at the start; null: all of them, "
        "where calibration data is given.",
    )
    strict: bool = Field(
        default=True,
        description="Whether a name in ignore, scheme_overrides or submodules that matches nothing is an error.",
    )
    submodules: list[str] | None = Field(
        default=None, description="Legacy: only layers at or below these are quantized; null: everywhere."
    )
    quantize_embeddings: bool = Field(
        default=True, description="Legacy: false leaves the weights of Embedding in float."
    )
    reduce_range: bool = Field(
        default=False, description="Weights of one bit less, for CPUs without VNNI, where int8 sums saturate."
    )
    quantize_linear_activations: bool = Field(
        default=True, description="Legacy: false leaves what Linear reads in float; its weights are quantized."
    )
    quantize_conv_activations: bool = Field(
        default=True, description="Legacy: false leaves what convolutions read in float; their weights are quantized."
    )
    quantize_embedding_activations: bool = Field(
        default=True,
        description="Legacy, without effect: what an Embedding gives is quantized where a quantized layer reads it.",
    )
    activation_bits: Bits = Field(default=8, description="Legacy: num_bits of activations.")
    weight_bits: Bits = Field(default=8, description="Legacy: num_bits of weights.")
    exclude_batchnorm: bool = Field(
        default=True,
        description="Legacy, without effect: BatchNorm is folded where it can be, else it stays in float.",
    )
    exclude_module_types: list[str] | None = Field(
        default=None, description="Legacy: types of layers added to `ignore`."
    )
    custom_quantizable_module_types: list[str] | None = Field(
        default=None, description="Legacy, without effect: the types that can be quantized are fixed."
    )
    tensorrt: bool = Field(default=False, description="Legacy: true is scheme: tensorrt.")
    activation_qconfig_kwargs: dict[str, Any] | None = Field(
        default=None,
        description="Legacy: averaging_constant is used for activations; other keys are without effect.",
    )
    weight_qconfig_kwargs: dict[str, Any] | None = Field(
        default=None, description="Legacy: reduce_range is used for weights; other keys are without effect."
    )

    @model_validator(mode="after")
    def _usable(self) -> QuantizationModifier:
        for name in ("disable_quantization_observer_epoch", "freeze_bn_stats_epoch"):
            value = getattr(self, name)
            if value is not None and value < 0 and value != -1:
                raise FieldProblem(name, f"{value} is not an epoch; give 0 or more, -1 for the start, null for never.")
        if self.tensorrt and self.scheme not in (None, "tensorrt"):
            raise FieldProblem("tensorrt", "true contradicts the scheme that is given; leave one of the two out.")
        return self

    def attach(self, run: Run) -> Active:
        """Checks names; the model is traced and quantized at the start."""
        raise NotImplementedError
