"""Units of compression: the weight of a layer, or all weights that lose the channels of a channel group."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sparsify.analysis.layers import ModelAnalysis
from sparsify.analysis.trials import Batch
from sparsify.errors import TargetError
from sparsify.model.targets import is_prunable_layer, owners, refuse_unusable, resolve_parameters
from sparsify.oneshot import rounding
from sparsify.pruning import group_scores
from sparsify.pruning.dry_run import find_groups
from sparsify.pruning.group_masks import deletion_masks
from sparsify.pruning.masks import compute_masks
from sparsify.quantization.weight_grid import channel_axis

__all__: list[str] = []

Of = Literal["pruning", "quantization"]
Layers = ModelAnalysis | str | Iterable[str] | None
"""Names as in a recipe, an analysis, or None for all that can be pruned."""


@dataclass(frozen=True)
class Unit:
    """A unit of compression: the weight of a layer, or all weights that lose the channels of a channel group.

    `compressed` gives at a level the weights that change, by the parameter's name.
    """

    name: str
    parameters: Mapping[str, nn.Parameter]
    compressed: Callable[[float], dict[str, Tensor]]


def layer_weights(model: nn.Module, layers: Layers, of: Of = "pruning", *, where: str) -> list[Unit]:
    """The units of `layers`, in the model's order, under the names that they have in an analysis.

    Raises:
        TargetError: a name matches nothing, or no layer's weight; nothing is left.
    """
    held = {name: (module, own) for name, module, own in owners(model)}
    if isinstance(layers, ModelAnalysis):
        usable = [i for i in layers.layers if (i.prunable if of == "pruning" else i.quantizable)]
        titles = {i.weight: i.name for i in usable if i.weight is not None and i.shared_with is None}
        missing = titles.keys() - held.keys()
        if missing:
            raise TargetError(f"{where}.layers: {min(missing)!r} of the analysis is not in {type(model).__name__}.")
    else:
        named = {layer_name(name, own): name for name, (_, own) in held.items()}
        if layers is None:
            chosen = [name for name, (module, own) in held.items() if _is_weight(module, own)]
        else:
            given = [layers] if isinstance(layers, str) else layers
            chosen = list(resolve_parameters(model, [named.get(n, n) for n in given], where=f"{where}.layers"))
        titles = {name: layer_name(name, held[name][1]) for name in chosen}
    found = []
    for name, (module, own) in held.items():
        parameter = module._parameters[own]
        if name not in titles or parameter is None:
            continue
        if parameter.dim() < 2:
            raise TargetError(
                f"{where}.layers: {name!r} has {parameter.dim()} dimension; a layer's weight has 2 or more."
            )
        if hasattr(parameter, "placements"):
            raise TargetError(f"{where}.layers: {name!r} is sharded (DTensor), which is not supported.")
        found.append(_layer(titles[name], name, module, parameter, of))
    if not found:
        raise TargetError(f"{where}: {type(model).__name__} has no layer that can be compressed.")
    refuse_unusable({name: p for unit in found for name, p in unit.parameters.items()}, where=where)
    return found


def _is_weight(module: nn.Module, own: str) -> bool:
    """True if this parameter is compressed where no layers are named."""
    return (own == "weight" and is_prunable_layer(module)) or (
        isinstance(module, nn.MultiheadAttention) and "_proj_w" in own
    )


def _layer(title: str, name: str, module: nn.Module, parameter: nn.Parameter, of: Of) -> Unit:
    def pruned(level: float) -> dict[str, Tensor]:
        weight = parameter.detach()
        return {name: weight.masked_fill(~compute_masks({name: weight}, level)[name], 0.0)}

    def rounded(bits: float) -> dict[str, Tensor]:
        return {name: rounded_weight(parameter.detach(), channel_axis(module), int(bits))}

    return Unit(title, {name: parameter}, pruned if of == "pruning" else rounded)


def rounded_weight(weight: Tensor, axis: int, bits: int) -> Tensor:
    """`weight` rounded to symmetric integers of `bits` bits: the scale of least squared error for each index of `axis`.

    >>> rounded_weight(torch.tensor([[1.0, -0.3, 0.4, 0.1]]), axis=0, bits=3)
    tensor([[ 1.0000, -0.3333,  0.3333,  0.0000]])
    """
    rows = weight.movedim(axis, 0)
    matrix = rows.reshape(1, len(rows), -1).to(torch.promote_types(weight.dtype, torch.float32))
    largest = 2 ** (bits - 1) - 1
    # Not from the largest weight: with few bits that leaves most weights at zero, which is never deployed.
    scale = rounding.clipped_scale(matrix, matrix.new_ones(1, matrix.shape[2]), q_max=largest)
    return rounding.nearest(matrix, scale, largest).reshape(rows.shape).movedim(0, axis).to(weight.dtype)


def layer_name(parameter: str, own: str) -> str:
    """The layer's name in an analysis, from the parameter's full name and its name in the module.

    >>> layer_name("layer1.conv.weight", "weight"), layer_name("attention.in_proj_weight", "in_proj_weight")
    ('layer1.conv', 'attention.in_proj')
    """
    return parameter.removesuffix(own).removesuffix(".") if own == "weight" else parameter.removesuffix("_weight")


def weights_of_channel_groups(
    model: nn.Module, sample: Batch, layers: Layers, *, where: str
) -> tuple[list[Unit], dict[str, tuple[str, ...]]]:
    """Channel groups that can be pruned, and the layers of each; with `layers` those that have a row among them."""
    found = find_groups(model, sample.args, sample.kwargs)
    chosen = (
        None
        if layers is None
        else {name for unit in layer_weights(model, layers, where=where) for name in unit.parameters}
    )
    names = {name: layer_name(name, own) for name, _, own in owners(model)}
    parameters = {name: module._parameters[own] for name, module, own in owners(model)}
    kept = {n: f for n, f in found.groups.items() if f.rows and (chosen is None or chosen & set(f.rows))}
    if not kept:
        raise TargetError(
            f"{where}: {type(model).__name__} has no channels that can be removed; see `shrink` for the reasons."
        )
    scores = group_scores.norms(model, kept)
    units = []
    for name, group in kept.items():
        held = {p.tensor: value for p in group.members if (value := parameters.get(p.tensor)) is not None}

        def masked(
            level: float, name: str = name, size: int = group.size, held: dict[str, nn.Parameter] = held
        ) -> dict[str, Tensor]:
            pruned = group_scores.lowest({name: scores[name]}, {name: min(round(size * level), size - 1)}, {})
            masks = deletion_masks(model, found, pruned)
            return {tensor: held[tensor].detach() * mask for tensor, mask in masks.items()}

        row, _, number = name.partition("#")
        units.append(Unit(names[row] + (f"#{number}" if number else ""), held, masked))
    members = {unit.name: tuple(names[row] for row in f.rows) for unit, f in zip(units, kept.values(), strict=True)}
    return units, members
