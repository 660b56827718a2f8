"""Curves of channel groups for a pruning profile, and the layers of a model without inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from sparsify.analysis.layers import LayerInfo, ModelAnalysis
from sparsify.analysis.units import layer_name
from sparsify.errors import ArgumentError, SparsifyError, TargetError
from sparsify.model.signature import SampleInputs
from sparsify.model.targets import is_prunable_layer, owners, refuse_unusable
from sparsify.optimize.layer_curves import LayerCurve
from sparsify.optimize.pruning_profiles import PruningSettings
from sparsify.pruning import group_scores
from sparsify.pruning.dry_run import find_groups
from sparsify.pruning.groups import ChannelGroups

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparsify.analysis.loss import LossProfile
    from sparsify.analysis.performance import PerformanceProfile
    from sparsify.model.signature import InputsLike

__all__: list[str] = []

SHARES = tuple(share / 20 for share in range(20))
"""Shares of a channel group's channels: 0, 0.05, ... 0.95."""


def channel_groups_of(model: nn.Module, sample_inputs: InputsLike | None) -> ChannelGroups:
    """The channel groups whose channels can be removed.

    Raises:
        ArgumentError: without inputs they cannot be found.
        TargetError: there are none.
    """
    if sample_inputs is None:
        raise ArgumentError("sample_inputs: which channels go together is found on inputs of the model; give some.")
    call = SampleInputs.of(model, sample_inputs)
    args, kwargs = call.arguments(list(call.inputs.values()))
    found = find_groups(model, args, kwargs)
    if not any(group.rows and group.size > 1 for group in found.groups.values()):
        reasons = "; ".join(dict.fromkeys(found.whole.values())) or "it has no layers with channels"
        raise TargetError(f"structured: no channels of {type(model).__name__} can go: {reasons}.")
    return found


def channel_group_curves(
    model: nn.Module,
    channel_groups: ChannelGroups,
    analysis: ModelAnalysis,
    performance: PerformanceProfile | None,
    loss: LossProfile | None,
) -> tuple[tuple[LayerCurve, ...], dict[str, tuple[str, ...]]]:
    """One curve a channel group, whose levels are shares of its channels, and {its name: the weights whose rows they
    are}.

    The average is one of channels: what a curve calls weights are its channels. Counted by weights, the few channel
    groups that hold most of them would lose nearly all of their channels, and the others none. A loss profile of
    channels gives the losses; one of single weights the sum over the layers whose rows go together. Without data a
    channel costs its squared norm in units of its channel group's mean. Time falls with the share of rows that stay.
    """
    kept = {n: f for n, f in channel_groups.groups.items() if f.rows and f.size > 1}
    names = {name: layer_name(name, own) for name, _, own in owners(model)}
    infos = {info.weight: info for info in analysis.layers if info.weight is not None}
    times = {} if performance is None else {layer.name: layer.ms for layer in performance.layers}
    total = sum(analysis.macs for _ in kept) or 1
    scores = group_scores.norms(model, kept)
    found, rows = [], {}
    for name, group in kept.items():
        row, _, number = name.partition("#")
        title = names[row] + (f"#{number}" if number else "")
        own = [infos[weight] for weight in group.rows if weight in infos]
        profiled = _profiled_layers(title, own, loss)
        if loss is not None and profiled and all(layer in loss.losses for layer in profiled):
            levels = loss.levels
            losses = tuple(sum(values) for values in zip(*map(loss.increase, profiled), strict=True))
        else:
            levels, losses = SHARES, _norm_losses(scores[name])
        macs = sum(info.macs for info in own)
        ms = sum(times.get(info.name, 0.0) for info in own) if times else macs / total
        rows[title] = group.rows
        found.append(
            LayerCurve(
                name=title,
                weights=group.size if own else 0,
                parameters=sum(info.parameters for info in own),
                macs=macs,
                ms=ms,
                first=False,
                grouped=False,
                why_not=_why_not(own, loss, profiled),
                levels=levels,
                losses=losses,
                times=tuple(ms * (1 - share) for share in levels),
            )
        )
    return tuple(found), rows


def _profiled_layers(title: str, own: list[LayerInfo], loss: LossProfile | None) -> list[str]:
    """The names in the loss profile whose losses make up that of the group `title`; empty for one without data."""
    if loss is None or loss.method in ("magnitude", "shape"):
        return []
    return [title] if loss.families else [info.name for info in own if info.name in loss.losses]


def _norm_losses(norms: Tensor) -> tuple[float, ...]:
    """Loss of pruning each of `SHARES` of the channels, lowest norms first: squared norms in units of their mean."""
    squares = norms.square().sort().values
    size = len(squares)
    energy = (squares.cumsum(0) / squares.sum().clamp(min=1e-300)).tolist()
    pruned = [min(round(size * share), size - 1) for share in SHARES]
    return tuple(size * energy[count - 1] if count else 0.0 for count in pruned)


def _why_not(own: list[LayerInfo], loss: LossProfile | None, profiled: list[str]) -> str:
    if not own:
        return "it is not computed on these inputs"
    if loss is not None and loss.method in ("data", "fisher") and not (profiled and set(profiled) <= set(loss.losses)):
        return "the loss profile does not know it"
    return ""


def of_channels(settings: PruningSettings) -> PruningSettings:
    """The same goal as shares of channels: without c of the channels in and out, (1 - c)^2 of the weights are left.

    >>> round(of_channels(PruningSettings(sparsity=0.75)).sparsity, 6)
    0.5
    """
    return replace(
        settings,
        sparsity=_removed_share(settings.sparsity),
        min_sparsity=_removed_share(settings.min_sparsity),
        max_sparsity=_removed_share(settings.max_sparsity),
    )


def _removed_share(sparsity: float) -> float:
    return 1.0 - math.sqrt(max(0.0, 1.0 - sparsity))


def without_inputs(model: nn.Module) -> ModelAnalysis:
    """The layers of a model of which no inputs are known: names, weights, and what cannot be pruned; no MACs."""
    layers = []
    first: dict[int, str] = {}
    for name, module, own in owners(model):
        if own != "weight" or not is_prunable_layer(module):
            continue
        weight = module._parameters[own]
        assert weight is not None
        title = layer_name(name, own)
        shared = first.setdefault(id(weight), title)
        why = ""
        try:
            refuse_unusable({name: weight}, where="pruning")
        except SparsifyError as error:
            why = str(error).removeprefix("pruning: ")
        elements = weight.numel() if shared == title else 0
        bias = module._parameters.get("bias")
        layers.append(
            LayerInfo(
                name=title,
                type=type(module).__name__,
                weight=name,
                shared_with=None if shared == title else shared,
                input_shapes=(),
                output_shape=(),
                parameters=elements + (0 if bias is None else bias.numel()),
                weights=elements,
                macs=0,
                calls=1,
                groups=getattr(module, "groups", 1),
                sparsity=0.0,
                bits=8 * weight.element_size(),
                why_not_prunable=why,
                why_not_quantizable="",
            )
        )
    return ModelAnalysis(type(model).__name__, tuple(layers), (), sum(p.numel() for p in model.parameters()), 0)


def weights_by_layer(analysis: ModelAnalysis) -> Mapping[str, str]:
    """{layer: the name of its parameter}; of shared weights under the first layer alone."""
    return {i.name: i.weight for i in analysis.layers if i.weight is not None and i.shared_with is None}
