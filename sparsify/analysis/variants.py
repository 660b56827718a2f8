"""Exports the variants of a model whose speed is compared: in float and in int8, at every width of its channels."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sparsify.errors import ExportError, SparsifyError, SparsifyWarning
from sparsify.model.copies import deep_copied
from sparsify.model.signature import InputsLike, SampleInputs
from sparsify.oneshot import quantize_model
from sparsify.onnx.export import export_onnx
from sparsify.onnx.exported import ExportedModel
from sparsify.output.tables import track
from sparsify.pruning.dry_run import find_groups
from sparsify.pruning.group_scores import Bounds, multiple_of
from sparsify.pruning.groups import ChannelGroups
from sparsify.pruning.removal import plan_removal, remove

__all__: list[str] = []


@dataclass(frozen=True)
class Form:
    """A file, and the layers that stay in float in it, though it is int8."""

    path: Path
    floating: frozenset[str] = frozenset()


def exported_forms(
    model: nn.Module,
    sample_inputs: InputsLike,
    channel_groups: ChannelGroups | None,
    quantized: bool,
    widths: Sequence[float],
    folder: Path,
    dense: Path,
    notes: dict[str, str],
    progress: bool | None,
) -> dict[tuple[str, float], Form]:
    """Float and int8 files at every width, by (kind, width); why one could not be made goes into `notes`.

    All are written before any is measured: what a machine is busy with changes over the minutes that this takes.
    """
    forms = {("float", 1.0): Form(dense)}
    kinds = ("float", "int8") if quantized else ("float",)
    narrow = widths[1:] if channel_groups is not None else ()
    smaller = model
    for kind, width in track([(k, w) for w in (1.0, *narrow) for k in kinds], "exporting", progress=progress):
        if (kind, width) in forms or ("widths" in notes and width < 1) or ("int8" in notes and kind == "int8"):
            continue
        path = folder / f"{kind}-{width}.onnx"
        try:
            if kind == "float" and channel_groups is not None:
                smaller = narrowed(model, channel_groups, width)
            if kind == "float":
                export(smaller, sample_inputs, path)
                forms[kind, width] = Form(path)
            else:
                exported = export(as_int8(smaller, sample_inputs), sample_inputs, path)
                forms[kind, width] = Form(path, frozenset(name.split("/")[0] for name in exported.floating))
        except SparsifyError as error:
            notes["widths" if width < 1 else "int8"] = str(error)
    return forms


def export(model: nn.Module, sample_inputs: InputsLike, path: Path) -> ExportedModel:
    """Exports with a free batch size, or with that of the inputs where the model's forward fixes it."""
    try:
        return export_onnx(model, sample_inputs, path)
    except ExportError as error:
        if "dynamic_batch=False" not in str(error):
            raise
        return export_onnx(model, sample_inputs, path, dynamic_batch=False)


def as_int8(model: nn.Module, sample_inputs: InputsLike, ignore: Sequence[str] = ()) -> nn.Module:
    """A quantized copy to time: ranges from one batch, weights rounded to nearest.

    What `ignore` names stays in float.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SparsifyWarning)
        return quantize_model(
            model,
            [sample_inputs if isinstance(sample_inputs, Mapping | tuple) else _as_tuple(sample_inputs)],
            ignore=ignore,
            least_samples=1,
            ranges="min_max",
            rounding="nearest",
            equalize=False,
            correct_bias=False,
            progress=False,
        ).model


def cuttable(model: nn.Module, call: SampleInputs) -> tuple[ChannelGroups | None, str]:
    """The channel groups that can be removed; or None and why there are none."""
    args, kwargs = call.arguments(list(call.inputs.values()))
    try:
        channel_groups = find_groups(model, args, kwargs)
    except SparsifyError as error:
        return None, str(error)
    if not any(group.size > 1 for group in channel_groups.groups.values()):
        reasons = "; ".join(dict.fromkeys(channel_groups.whole.values())) or "it has no layers with channels"
        return None, f"no channels can be removed: {reasons}"
    return channel_groups, ""


def narrowed(model: nn.Module, channel_groups: ChannelGroups, width: float | Mapping[str, float]) -> nn.Module:
    """A copy in which `width` of the channels of every channel group, or of those that are named, are left.

    Speed does not depend on which channels go: the last ones do.
    """
    smaller = deep_copied(model)
    pruned = {}
    for name, group in channel_groups.groups.items():
        share = width if isinstance(width, int | float) else width.get(name, 1.0)
        pruned[name] = tuple(range(kept_channels(channel_groups, name, share), group.size))
    remove(smaller, plan_removal(smaller, channel_groups, {name: lost for name, lost in pruned.items() if lost}))
    return smaller


def kept_channels(channel_groups: ChannelGroups, name: str, share: float) -> int:
    """Number of channels of a channel group that stay, rounded as StructuredPruningModifier does."""
    group = channel_groups.groups[name]
    # Exactly what it masks before it rounds: round(n * sparsity) of n.
    wanted = group.size - round(group.size * (1 - share))
    return Bounds.of(group.size, multiple_of(group, None)).nearest(wanted)


def _as_tuple(sample_inputs: InputsLike) -> Any:
    return tuple(sample_inputs) if isinstance(sample_inputs, list) else sample_inputs
