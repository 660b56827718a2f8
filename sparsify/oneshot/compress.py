"""Compresses the weights of a model or an ONNX file without data and without training."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
from torch import nn

from sparsify.errors import ArgumentError, ExportError
from sparsify.model.copies import deep_copied
from sparsify.oneshot.compression_config import (
    LinearQuantizerConfig,
    MagnitudePrunerConfig,
    OptimizationConfig,
    ThresholdPrunerConfig,
)
from sparsify.oneshot.module_weights import CandidateWeight, module_weights, parameter_values, put_weight
from sparsify.oneshot.weight_forms import LaidOutWeight, compressed
from sparsify.output.tables import Column, Displayed, Table
from sparsify.palettization.config import PalettizerConfig, WeightConfig

__all__ = [
    "CompressedWeight",
    "CompressedWeightsFile",
    "compression_report",
    "decompress_weights",
    "linear_quantize_weights",
    "palettize_weights",
    "prune_weights",
]

CompressedModule = TypeVar("CompressedModule", bound=nn.Module)
_REPORT = "_compression_report"


@dataclass(frozen=True)
class CompressedWeight:
    """The outcome for one weight.

    Attributes:
        name: the parameter; in a file that sparsify did not write, the initializer.
        type: of the layer or operator that reads it.
        form: "float32", "int8", "int4 in blocks of 32", "palette of 4 bits" and so on.
        bits: of an element; of floats their own.
        sparsity: fraction of zeros. unique_values: how many differ.
        rms_error: root of the mean squared difference from before.
        bytes_before: of the weight as it was. bytes_after: of its elements in `bits`, with scales and palettes; zeros
            save nothing here, but do in a packed file.
        skipped: why it stayed as it was; None: it did not.
    """

    name: str
    type: str
    form: str
    bits: int
    sparsity: float
    unique_values: int
    rms_error: float
    bytes_before: int
    bytes_after: int
    skipped: str | None


@dataclass(frozen=True)
class CompressedWeightsFile(Displayed, os.PathLike[str]):
    """A file with compressed weights. Usable wherever a path is.

    Attributes:
        path: the file. size_bytes: its size, packed.
        report: one line a weight.
        unproven: why outputs of the packed and the plain form were not compared; None: they are equal to the bit.
    """

    path: Path
    size_bytes: int
    report: Table
    unproven: str | None

    def __fspath__(self) -> str:
        return str(self.path)

    def _parts(self) -> list[Table | str]:
        return [self.report]


def linear_quantize_weights(model: Any, config: Any, path: Any = None) -> Any:
    """Rounds weights to integers of 4 or 8 bits: w = scale x (q - zero point). Zeros stay zero.

    Of a palettized weight the palettes' values are rounded, with one scale a palette.

    Args:
        model: a module: a new one comes back, whose parameters have the values of the integers, and the given one
            stays; or an ONNX file or ModelProto: a packed file is written to `path`.
        config: `OptimizationConfig` of `LinearQuantizerConfig`s, or one for all weights.
        path: where the file goes; for a file alone. May be the given one.

    Raises:
        ArgumentError: a wrong `config` or `path`.
        TargetError: a name in `config` that matches nothing.
        DataError: NaN weights, or a broken file.
        ExportError: onnxruntime cannot run the file.
    """
    return _compress("linear_quantize_weights", (LinearQuantizerConfig,), model, config, path)


def palettize_weights(model: Any, config: Any, path: Any = None) -> Any:
    """Gives weights few different values: indices of 1 to 8 bits into palettes. Zeros stay zero.

    Of a quantized weight the palette's values are integers of 8 bits.

    Args:
        model: as in `linear_quantize_weights`.
        config: `OptimizationConfig` of `PalettizerConfig`s, or one for all weights.
        path: as in `linear_quantize_weights`.

    Raises:
        ArgumentError: a wrong `config` or `path`.
        TargetError: a name in `config` that matches nothing.
        DataError: NaN weights, or a broken file.
        ExportError: onnxruntime cannot run the file.
    """
    return _compress("palettize_weights", (PalettizerConfig,), model, config, path)


def prune_weights(model: Any, config: Any, path: Any = None) -> Any:
    """Sets the smallest weights to zero.

    Integers stay on their grid, and palettes keep their bits: one of their values is 0 then.

    Args:
        model: as in `linear_quantize_weights`.
        config: `OptimizationConfig` of `MagnitudePrunerConfig`s and `ThresholdPrunerConfig`s, or one for all weights.
        path: as in `linear_quantize_weights`.

    Raises:
        ArgumentError: a wrong `config` or `path`.
        TargetError: a name in `config` that matches nothing.
        DataError: NaN weights, or a broken file.
        ExportError: onnxruntime cannot run the file.
    """
    return _compress("prune_weights", (MagnitudePrunerConfig, ThresholdPrunerConfig), model, config, path)


def decompress_weights(model: Any, path: Any = None) -> Any:
    """Stores compressed weights as plain floats of the same values; the outputs are equal to the bit.

    Args:
        model: as in `linear_quantize_weights`.
        path: where the plain file goes; for a file alone.

    Raises:
        ArgumentError: a wrong `path`.
        DataError: a broken file.
        ExportError: onnxruntime cannot run the file.
    """
    return _compress("decompress_weights", (), model, OptimizationConfig(), path)


def compression_report(model: nn.Module | CompressedWeightsFile) -> Table:
    """The report of the call that made a module or a file: a line for each weight, and one for all.

    Args:
        model: what `linear_quantize_weights`, `palettize_weights`, `prune_weights` or `decompress_weights` returned.

    Raises:
        ArgumentError: it is something else.
    """
    if isinstance(model, CompressedWeightsFile):
        return model.report
    report = model.__dict__.get(_REPORT) if isinstance(model, nn.Module) else None
    if not isinstance(report, Table):
        raise ArgumentError(f"compression_report: this {type(model).__name__} comes from no compressing function.")
    return report


# ---------------------------------------------------------------------- the work


def _compress(where: str, kinds: tuple[type[WeightConfig], ...], model: Any, config: Any, path: Any) -> Any:
    if isinstance(config, WeightConfig):
        config = OptimizationConfig(config)
    if not isinstance(config, OptimizationConfig):
        raise ArgumentError(f"{where}: config is a {type(config).__name__}: give an OptimizationConfig.")
    for each in config.configs():
        if kinds and not isinstance(each, kinds):
            named = " or ".join(kind.__name__ for kind in kinds)
            raise ArgumentError(f"{where}: config holds a {type(each).__name__}; it takes {named}.")
    if isinstance(model, nn.Module):
        if path is not None:
            raise ArgumentError(f"{where}: path={path!r} is for files; of a module a new module comes back.")
        return _compress_module(where, model, config)
    if not isinstance(model, (str, os.PathLike)) and type(model).__name__ != "ModelProto":
        raise ArgumentError(
            f"{where}: model is a {type(model).__name__}: give a torch.nn.Module, the path of an ONNX file, or a "
            "ModelProto."
        )
    if path is None:
        raise ArgumentError(f"{where}: give path=, where the compressed file goes.")
    return _compress_file(where, model, config, path)


def _settled(
    where: str, weights: list[CandidateWeight], config: OptimizationConfig, known: set[str]
) -> Iterator[tuple[CandidateWeight, WeightConfig | None]]:
    """Each weight with its settings, and the reason why it stays in `reason`."""
    if where != "decompress_weights":
        names = list(dict.fromkeys(name for weight in weights for name in weight.names if name))
        config.check(names, {kind for weight in weights for kind in weight.kinds}, known, where)
    for weight in weights:
        settings = config.of(weight.names, weight.kinds)
        if settings is None:
            weight.reason = weight.reason or "config leaves it out"
        elif weight.elements <= settings.weight_threshold:
            weight.reason = weight.reason or (
                f"it has {weight.elements:,} elements, not more than weight_threshold={settings.weight_threshold:,}"
            )
        yield weight, settings


def _outcome(
    where: str, weight: CandidateWeight, before: LaidOutWeight, settings: WeightConfig | None
) -> tuple[LaidOutWeight, CompressedWeight]:
    """(the weight as it becomes, its line of the report)."""
    after = before
    if where == "decompress_weights":
        after = LaidOutWeight(before.values, before.axis, before.inputs)
    elif weight.reason is None and settings is not None:
        made = compressed(before, settings)
        if isinstance(made, str):
            weight.reason = made
        else:
            after = made
    difference = after.values.astype(np.float64) - before.values
    own_bits = 16 if "16" in weight.dtype else 32
    form = after.form
    line = CompressedWeight(
        name=weight.name,
        type=weight.kinds[0] if weight.kinds else "",
        form=form_text(after, weight.dtype),
        bits=after.bits or own_bits,
        sparsity=float(np.mean(after.values == 0)),
        unique_values=int(np.unique(after.values).size),
        rms_error=float(np.sqrt(np.mean(difference**2))),
        bytes_before=weight.stored_bytes if before.form is None else before.form.size_bytes,
        bytes_after=weight.stored_bytes if form is None else form.size_bytes,
        skipped=None if where == "decompress_weights" else weight.reason,
    )
    return after, line


def form_text(weight: LaidOutWeight, dtype: str) -> str:
    """The form of a weight in a few words."""
    from sparsify.oneshot.weight_forms import IntegerWeight

    form = weight.form
    if form is None:
        return dtype
    if isinstance(form, IntegerWeight):
        return f"{form.dtype} in blocks of {form.block}" if form.block else form.dtype
    table = "" if form.table_scale is None else f", {form.table.dtype} values"
    count = f"{len(form.table)} palettes" if len(form.table) > 1 else "palette"
    return f"{count} of {form.nbits} bit{'s' * (form.nbits != 1)}{table}"


def _compress_module(where: str, model: CompressedModule, config: OptimizationConfig) -> CompressedModule:
    copy = deep_copied(model)
    found = list(module_weights(copy))
    lines = []
    by_name = {weight.name: parameter for weight, parameter in found}
    kinds = {type(module).__name__ for module in model.modules()}
    kinds |= {name for name in dir(nn) if isinstance(getattr(nn, name), type)}
    for weight, settings in list(_settled(where, [weight for weight, _ in found], config, kinds)):
        before = parameter_values(weight, by_name[weight.name])
        after, line = _outcome(where, weight, before, settings)
        if after is not before:
            put_weight(weight, by_name[weight.name], after)
        lines.append(line)
    copy.__dict__[_REPORT] = report_table(lines)
    return copy


def _compress_file(where: str, model: Any, config: OptimizationConfig, path: Any) -> CompressedWeightsFile:
    import onnx
    from onnx import defs

    from sparsify.oneshot.file_weights import FileWeights
    from sparsify.onnx.model_files import replacing_model
    from sparsify.onnx.packed_proof import prove_packed
    from sparsify.onnx.packing import packed_model
    from sparsify.onnx.rebuilt_weights import rebuild_weights
    from sparsify.onnx.runtime import read_model

    folder = Path.cwd()
    if isinstance(model, (str, os.PathLike)):
        plain = read_model(model)
        folder = Path(model).resolve().parent
    else:
        plain = onnx.ModelProto()
        plain.CopyFrom(model)
        rebuild_weights(plain, folder)
    opset = max((entry.version for entry in plain.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if opset < 11:
        raise ExportError(
            f"{where}: the file is of opset {opset}; 11 is needed. Convert it first: "
            "onnx.version_converter.convert_version(onnx.load(path), 11)."
        )
    weights = FileWeights(plain, folder)
    lines = []
    kinds = {schema.name for schema in defs.get_all_schemas()}
    kinds |= {node.op_type for node in plain.graph.node}
    for weight, settings in list(_settled(where, list(weights.candidates()), config, kinds)):
        if weight.dtype in ("integers", "float64"):
            continue
        before = weights.laid_out(weight)
        after, line = _outcome(where, weight, before, settings)
        if after is not before and not (after.form is None and before.form is None and where == "decompress_weights"):
            weights.put(weight, after)
        lines.append(line)
    weights.write_note()
    if where == "decompress_weights":
        with replacing_model(plain, folder, path) as (_, size):
            pass
        return CompressedWeightsFile(Path(path), size, report_table(lines), None)
    packed, tensors, _ = packed_model(plain, folder, exact_unoptimized=False)
    # What it is compared with: the same values as floats.
    floats = onnx.ModelProto()
    floats.CopyFrom(plain)
    FileWeights(floats, folder).decompress()
    with (
        replacing_model(packed, folder, path) as (temporary, size),
        TemporaryDirectory() as scratch,
        replacing_model(floats, folder, Path(scratch) / "floats.onnx") as (reference, _),
    ):
        names = {tensor.name for tensor in tensors}
        unproven = prove_packed(floats, reference, packed, temporary, names, None, exact_unoptimized=False)
    return CompressedWeightsFile(Path(path), size, report_table(lines), unproven)


def report_table(lines: list[CompressedWeight]) -> Table:
    """One line for each weight; the title has the sums."""
    before, after = sum(line.bytes_before for line in lines), sum(line.bytes_after for line in lines)
    done = sum(line.skipped is None for line in lines)
    columns = [
        Column("name", "Weight"),
        Column("type", "Type"),
        Column("form", "Form"),
        Column("bits", "Bits"),
        Column("sparsity", "Zeros", ".1%"),
        Column("unique_values", "Distinct", ","),
        Column("rms_error", "RMS error", ".3g"),
        Column("bytes_before", "Bytes before", ","),
        Column("bytes_after", "after", ","),
        Column("skipped", "Skipped because", left=True),
    ]
    title = f"{done} of {len(lines)} weights compressed, {before:,} to {after:,} bytes"
    return Table.of(title, [{**vars(line)} for line in lines], columns)
