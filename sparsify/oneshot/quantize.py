"""Quantization without training: a trained model and some samples in, an int8 model or a verified ONNX file out."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from sparsify.errors import ArgumentError, DataError, ExportError, SparsifyWarning, StateError, TargetError
from sparsify.model.batches import sample_count
from sparsify.model.copies import deep_copied
from sparsify.model.precisions import half_tensors, in_float32, to_dtypes_, to_float32_
from sparsify.model.preserved import preserved_rng
from sparsify.model.signature import batch_arguments, check_module
from sparsify.model.targets import is_finite, named_modules
from sparsify.model.trace import trace
from sparsify.model.wrappers import unwrapped
from sparsify.oneshot.data_free import simulated_norms
from sparsify.oneshot.equalization import LARGEST_FACTOR, LARGEST_FACTOR_IN_FLOAT16, neighbours
from sparsify.oneshot.equalization import equalize as equalize_channels
from sparsify.oneshot.ranges import WAYS, best_way
from sparsify.oneshot.weights import QuantizedWeights, Rounding, WeightRounding
from sparsify.onnx.export import export_onnx
from sparsify.onnx.exported import ExportedModel
from sparsify.onnx.verify import Verification, verify_onnx
from sparsify.output.files import replacing
from sparsify.output.tables import Column, Displayed, DisplayedText, Table, track
from sparsify.quantization.calibration import EMPTY, SAMPLES, calibrate, materialized, samples_in
from sparsify.quantization.conversion import quantizers
from sparsify.quantization.forward_ops import operation_places, switch_off_all, switched_off
from sparsify.quantization.layers import QuantizedEmbedding
from sparsify.quantization.placement import make_plan
from sparsify.quantization.plan import QuantizationPlan, apply_plan, check_traced_ops, is_quantized
from sparsify.quantization.scheme import QuantizationSettings, Scheme
from sparsify.quantization.wiring import wiring_of

__all__ = ["quantize_model", "quantize_onnx"]

Ranges = Literal["auto", "mse", "min_max", "percentile", "entropy"]


@dataclass(frozen=True)
class QuantizedModel(Displayed):
    """A quantized model in eval mode, ready for `export_onnx`, and what was done to it. str() is a table."""

    model: nn.Module
    plan: QuantizationPlan
    layers: tuple[QuantizedWeights, ...]
    equalized: Mapping[str, float]
    """Layer -> the largest factor between its channels and those of the layer behind it."""
    samples: int
    ranges: str = "mse"
    """The way in which ranges of activations followed from their values."""

    @property
    def floating(self) -> dict[str, str]:
        """{what stays in float: why}."""
        return {left.what: left.why for left in self.plan.left}

    def _parts(self) -> list[Table | str]:
        columns = (
            Column("layer", "Layer"),
            Column("bits", "Bits"),
            Column("rounding", "Rounding"),
            Column("error", "Error", ".2e"),
            Column("error_nearest", "Nearest", ".2e"),
            Column("shift", "Bias", ".2e"),
        )
        return [
            Table.of(str(self.plan), self.layers, columns),
            f"{self.samples} samples, ranges by {self.ranges}",
        ]


@dataclass(frozen=True)
class QuantizedFile(DisplayedText, os.PathLike[str]):
    """A written file, what was done to the model, and the proof that both compute the same. Usable as a path."""

    exported: ExportedModel
    quantized: QuantizedModel
    verification: Verification

    def __fspath__(self) -> str:
        return str(self.exported.path)

    def __str__(self) -> str:
        return f"{self.quantized}\n{self.exported}\n{self.verification}"


def quantize_model(
    model: nn.Module,
    calibration_data: Iterable[Any] | None = None,
    *,
    sample_inputs: Any = None,
    scheme: Scheme | Mapping[str, Any] | str | None = None,
    scheme_overrides: Mapping[str, Any] | None = None,
    ignore: Sequence[str] | str = (),
    ranges: Ranges = "auto",
    rounding: Rounding = "auto",
    equalize: bool = True,
    correct_bias: bool = True,
    sequential: bool | None = None,
    batches: int | None = None,
    least_samples: int = SAMPLES,
    inplace: bool = False,
    progress: bool | None = None,
) -> QuantizedModel:
    """Quantizes a trained model without training it: where and how QuantizationModifier would.

    In this order: channels are equalized between neighbouring layers, ranges of activations are taken from the samples
    with the model in float, weights are rounded, and biases take back the shift of means that this leaves. All of it
    is computed in float32; parameters in float16 or bfloat16 are so again in what comes back.

    Args:
        model: a trained model in float.
        calibration_data: batches of inputs as the model takes them: tensors, tuples (of which as many are used as the
            model takes, so that a loader of (inputs, labels) will do), or mappings, dataclasses or named tuples of
            arguments by name. Empty ones are passed over. Kept in memory while this works. None: ranges come from the
            statistics of BatchNorm, with a warning; needs `sample_inputs`.
        sample_inputs: inputs to trace the model on; None: the first batch.
        scheme: as the field of QuantizationModifier.
        scheme_overrides: likewise.
        ignore: likewise.
        ranges: how the range of an activation follows from its values, where the scheme does not say it: least squared
            error, all values, 99.99 % of them, or least loss of information. "auto": least squared error, unless
            another way leaves a fifth less of error at the model's outputs, on up to 256 of the samples.
        rounding: of weights. "auto": "nearest" with 8 bits; with fewer "adaround" for convolutions, "gptq" for Linear.
            Blocks and affine weights are rounded to the nearest.
        equalize: whether channels are scaled between layers; the model's function in float stays as it is.
        correct_bias: whether biases take back the shift in the mean of each layer's output.
        sequential: whether each layer is rounded on what the quantized layers before it give, and makes good their
            errors: one run through the data per layer. False: all layers on what the float model gives, in one run.
            None: sequential where some layer has fewer than 8 bits.
        batches: how many of `calibration_data` at most; None: all.
        least_samples: fewer samples are refused.
        inplace: whether `model` itself is quantized, once all has gone well, and keeps its training mode. Otherwise a
            copy is.
        progress: whether a bar is shown; None: on a terminal.

    Raises:
        ArgumentError: an argument that cannot be meant, or a model that cannot be copied or traced.
        DataError: no batch, too few samples, NaN or infinity in a batch, a weight or an activation.
        StateError: the model is quantized already.
        TargetError: a name matches nothing, or nothing can be quantized.
    """
    _check_choice("ranges", ranges, ("mse", "min_max", "percentile", "entropy", "auto"))
    _check_choice("rounding", rounding, ("auto", "nearest", "adaround", "gptq"))
    check_module(model, other="; an ONNX file is made from one")
    user_model, model = model, unwrapped(model)
    if is_quantized(model):
        raise StateError(f"{type(model).__name__} holds quantized layers already; give the model that was trained.")
    settings = QuantizationSettings.of(scheme, scheme_overrides, ignore, where="QuantizationModifier")
    _check_weights(model)
    data, samples = _batches(calibration_data, batches, least_samples)
    if not data and sample_inputs is None:
        raise ArgumentError("neither calibration_data nor sample_inputs: give at least inputs to trace the model on.")
    sample = data[0] if sample_inputs is None else sample_inputs
    if not sample_count(sample):
        raise ArgumentError("sample_inputs are an empty batch; give at least one item.")
    half = half_tensors(model)
    if half:
        data, sample = in_float32(data), in_float32(sample)
    with preserved_rng(model):
        reference = _deep_copied(model)
        to_float32_(reference)
        args, kwargs = batch_arguments(reference, sample)
        traced = trace(reference, args, kwargs)
        plan = make_plan(reference, traced, settings)
        if not plan.layers and not plan.sites:
            raise TargetError(f"nothing in {type(model).__name__} can be quantized. {plan}")
        affine = next((layer.name for layer in plan.layers if layer.affine), None)
        if affine is not None and rounding in ("adaround", "gptq"):
            raise ArgumentError(
                f"rounding={rounding!r}: the weights of {affine} are affine (symmetric: false), and these are "
                "rounded to the nearest only. Pass rounding='auto', or write symmetric: true."
            )
        free = frozenset(site.name for site in plan.sites if site.observer == "moving_average")
        plan = dataclasses.replace(
            plan,
            sites=tuple(
                dataclasses.replace(site, observer="mse" if ranges == "auto" else ranges) if site.name in free else site
                for site in plan.sites
            ),
        )
        equalized: dict[str, float] = {}
        if equalize:
            equalized = equalize_channels(
                reference,
                neighbours(reference, traced, plan.folds),
                plan,
                data or [kwargs or args],
                corrected=correct_bias and bool(data),
                few=not data,
                largest=LARGEST_FACTOR_IN_FLOAT16 if torch.float16 in half.values() else LARGEST_FACTOR,
            )
        work = deep_copied(reference)
        apply_plan(work, plan)
        check_traced_ops(work, args, kwargs)
        plan = dataclasses.replace(plan, places=operation_places(work))
        judged = (reference, free) if ranges == "auto" and data else None
        way = _take_ranges(work, plan, data, (args, kwargs), type(model).__name__, progress, judged) or ranges
        if judged is not None:
            observer, percentile = WAYS[way]
            plan = dataclasses.replace(
                plan,
                sites=tuple(
                    dataclasses.replace(site, observer=observer, percentile=percentile) if site.name in free else site
                    for site in plan.sites
                ),
            )
        job = WeightRounding(reference, work, plan, traced, rounding, correct_bias, bool(data))
        layers = job.run(data, sequential, progress)
        for name, tensor in work.state_dict().items():
            rounded = tensor.to(half.get(name, tensor.dtype))
            if tensor.is_floating_point() and not is_finite(rounded):
                raise DataError(f"{name} is not finite after quantization; look at the calibration data.")
    to_dtypes_(work, half)
    if inplace:
        apply_plan(model, plan)
        model.load_state_dict(work.state_dict())
        switch_off_all(model, switched_off(work))
        for quantizer in quantizers(model):
            quantizer.observing = False
    return QuantizedModel(
        user_model if inplace else work, plan, layers, equalized, samples, "mse" if way == "auto" else way
    )


def quantize_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    calibration_data: Iterable[Any] | None = None,
    *,
    sample_inputs: Any = None,
    opset: int | None = None,
    dynamic_batch: bool = True,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    **options: Any,
) -> QuantizedFile:
    """`quantize_model`, `export_onnx` and `verify_onnx` in one: the file is there once it computes what the model does.

    Of a model in float16 or bfloat16 the file is in float32, inputs and outputs too; the quantized model that comes
    back is as it was given, and a copy of it in float32 computes what the file does.

    Args:
        model: a trained model in float.
        path: where the file is written, once it is verified.
        calibration_data: as in `quantize_model`.
        sample_inputs: inputs to trace, export and verify with; None: the first batch.
        opset: as in `export_onnx`.
        dynamic_batch: likewise.
        input_names: likewise.
        output_names: likewise.
        options: the other arguments of `quantize_model`.

    Raises:
        ExportError: the file does not compute what the model computes; nothing is written then. Otherwise as the three.
    """
    least = options.get("least_samples", SAMPLES)
    data, _ = _batches(calibration_data, options.get("batches"), least)
    quantized = quantize_model(model, data or None, sample_inputs=sample_inputs, **options)
    args, kwargs = batch_arguments(quantized.model, data[0] if sample_inputs is None else sample_inputs)
    sample = kwargs or args
    exact = quantized.model
    if half_tensors(exact):
        # Integers are written beside float32 alone.
        exact, sample = deep_copied(exact), in_float32(sample)
        to_float32_(exact)
    with replacing(path) as temporary:
        exported = export_onnx(
            exact,
            sample,
            temporary,
            opset=opset,
            dynamic_batch=dynamic_batch,
            input_names=input_names,
            output_names=output_names,
        )
        verification = verify_onnx(exact, temporary, sample)
        if not verification.ok:
            raise ExportError(f"{path} was not written: onnxruntime computes something else.\n{verification}")
    there = type(exported.path)(path)
    return QuantizedFile(
        dataclasses.replace(exported, path=there), quantized, dataclasses.replace(verification, path=there)
    )


def _take_ranges(
    work: nn.Module,
    plan: QuantizationPlan,
    data: Sequence[Any],
    sample: tuple[tuple[Any, ...], dict[str, Any]],
    name: str,
    progress: bool | None,
    judged: tuple[nn.Module, frozenset[str]] | None,
) -> str | None:
    """Ranges of activations, by the values of the float model; the weights are not rounded meanwhile.

    `judged`: the float model and the quantizers whose way to a range is chosen by the outputs. Gives that way.
    """
    way = None
    modules: dict[str, Any] = named_modules(work)
    layers = [modules[layer.name] for layer in plan.layers]
    # Not those that compute in float anyway.
    wirings = [wiring_of(layer) for layer in layers if not isinstance(layer, QuantizedEmbedding)]
    wirings = [wiring for wiring in wirings if wiring.enabled]
    try:
        for wiring in wirings:
            wiring.enabled = False
        if data:
            calibrate(work, track(data, "calibrating", progress=progress))
            if judged is not None:
                reference, free = judged
                way = best_way(reference, work, free, data)
        else:
            warnings.warn(
                f"no calibration_data: ranges of {name} come from the statistics of its BatchNorms, and "
                "that of its input from sample_inputs. A few hundred samples would give better ones.",
                SparsifyWarning,
                stacklevel=3,
            )
            args, kwargs = sample
            with simulated_norms(work):
                calibrate(work, [kwargs or args])
    finally:
        for wiring in wirings:
            wiring.enabled = True
    for quantizer in quantizers(work):
        quantizer.observing = False
        if quantizer.enabled and not quantizer.batches:
            raise DataError(
                f"{quantizer.name}: no batch of calibration_data came there, so it has no range. Add samples that take "
                "this way through the model, or leave the layer out with `ignore`."
            )
    return way


def _batches(data: Iterable[Any] | None, most: int | None, least: int) -> tuple[list[Any], int]:
    """The batches, looked through: (batches, samples)."""
    if data is None:
        return [], 0
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise ArgumentError(f"batches={most!r}: give a whole number above 0, or None for all.")
    found: list[Any] = []
    samples = 0
    for at, batch in enumerate(materialized(data, most)):
        # Empty ones say nothing, and forwards need not be written for them.
        if count := samples_in(batch, at):
            found.append(batch)
            samples += count
        if len(found) == most:
            break
    if samples < least:
        raise DataError(
            f"calibration_data holds {samples} samples, and ranges from fewer than {least} are chance. Give more, "
            f"or least_samples={samples} to take them all the same."
            if samples
            else EMPTY
        )
    return found, samples


def _check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ArgumentError(f"{name}={value!r}: give one of {', '.join(map(repr, known))}.")


def _check_weights(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not is_finite(parameter):
            raise DataError(f"{name} holds NaN or infinity, of which no integers can be made.")


def _deep_copied(model: nn.Module) -> nn.Module:
    try:
        return deep_copied(model).eval()
    except Exception as error:
        # A user's __deepcopy__, or what hangs on the model, can raise anything.
        raise ArgumentError(
            f"{type(model).__name__} cannot be copied: {error}. Take off what holds it back (a graph, a lock, a file)."
        ) from error
