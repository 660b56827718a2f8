"""Pruning without training: zeros where they change the outputs of layers least, and the other weights make it good.

How many zeros each layer gets follows from the same errors: of all weights of the model those go first whose absence
adds least to the error of their layer's output, as a share of that output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from sparsify.errors import ArgumentError, DataError, TargetError
from sparsify.model.precisions import half_tensors, in_float32, to_dtypes_, to_float32_
from sparsify.model.preserved import preserved_rng
from sparsify.model.signature import batch_arguments
from sparsify.model.targets import is_finite, is_prunable_layer, named_modules
from sparsify.model.trace import Trace, trace
from sparsify.oneshot import bias_correction, layer_inputs, reconstruction, rounding
from sparsify.oneshot.weights import MEMORY
from sparsify.output.tables import track

__all__: list[str] = []

WORK = 4e12
"""Multiplications of all runs through the samples together, above which several layers are pruned in one run."""
WIDEST = 6000
"""Inputs of an output up to which others make up for a weight: the matrix of their products has the square of it."""
MOST_ABOVE = 0.3
"""A layer gets at most so much more than the average, and never more than `MOST_OF_ALL`."""
MOST_OF_ALL = 0.95
FEW_DAMPING = 0.1
"""Added to the diagonal of a moment, as a share of its mean, where there are as many inputs as positions."""


@dataclass(frozen=True)
class PrunedWeights:
    """The zeros of one layer, and what they cost.

    Attributes:
        layer: its name.
        weights: number of them.
        zeros: of these.
        method: "reconstruction"; "magnitude times inputs" where a layer reads too many for it; "magnitude" where what
            the layer reads is not known.
        error: the mean square of the change of the layer's output on the samples, as a share of the output's own mean
            square, both without their means where the bias takes care of these; None where it was not measured.
        error_magnitude: the same for plain magnitude pruning with as many zeros.
    """

    layer: str
    weights: int
    zeros: int
    method: str
    error: float | None = None
    error_magnitude: float | None = None

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return self.zeros / self.weights


def prunable_layers(model: nn.Module, ignored: Sequence[str] = ()) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """({layer: module} of a model's prunable weights, {layer that stays dense: why}).

    Args:
        model: in float.
        ignored: names of layers that stay dense.
    """
    found: dict[str, nn.Module] = {}
    dense: dict[str, str] = {}
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    for name, module in named_modules(model).items():
        weight = module._parameters.get("weight")
        if not is_prunable_layer(module) or weight is None or weight.dim() < 2:
            continue
        if name in ignored:
            dense[name] = "left out"
        elif isinstance(module, nn.Embedding):
            dense[name] = "a table of embeddings: each row is read by itself, and nothing makes up for it"
        elif holders[id(weight)] > 1:
            dense[name] = "its weight is shared with another layer"
        elif not weight.numel():
            dense[name] = "it has no elements"
        else:
            found[name] = module
    return found, dense


def prune_model_(
    model: nn.Module,
    data: Sequence[Any],
    sparsity: float,
    *,
    sample_inputs: Any = None,
    ignored: Sequence[str] = (),
    progress: bool | None = None,
) -> tuple[PrunedWeights, ...]:
    """Prunes a trained model in eval mode, in place: round(`sparsity` x prunable weights) zeros in all layers together.

    Without data nothing is known of what layers read: weights go by the square of their size, as a share of the
    layer's, and nothing makes up for them.

    Args:
        model: its weights are changed.
        data: batches of inputs.
        sparsity: 0 to 1.
        sample_inputs: needed where there are no data.
        ignored: names of layers that stay dense.
        progress: as in `quantize_model`.

    Raises:
        TargetError: no layer can be pruned.
        DataError: weights that are not finite.
        ArgumentError: the model cannot be traced.
    """
    if not 0.0 <= sparsity < 1.0:
        raise ArgumentError(f"sparsity={sparsity!r}: give a fraction of 0 or more and below 1.")
    layers, dense = prunable_layers(model, ignored)
    if not layers:
        raise TargetError(f"nothing in {type(model).__name__} can be pruned{_because(dense)}.")
    for name, module in layers.items():
        if not is_finite(_prunable_weight(module)):
            raise DataError(f"{name}: its weights are not finite.")
    half = half_tensors(model)
    if half:
        data = in_float32(data)
        to_float32_(model)
    sample = data[0] if sample_inputs is None else in_float32(sample_inputs) if half else sample_inputs
    try:
        with preserved_rng(model), torch.no_grad():
            return LayerPruning(model, layers, data, sample).run(sparsity, progress)
    finally:
        to_dtypes_(model, half)


class LayerPruning:
    """Prunes layers in the order in which they are computed, each on what the pruned ones before it give."""

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], data: Sequence[Any], sample: Any) -> None:
        from sparsify.model.copies import deep_copied

        self.model, self.data, self.sample = model, data, sample
        self.reference = deep_copied(model)
        self.trace: Trace = trace(self.reference, *batch_arguments(self.reference, sample))
        order = {node.owner: at for at, node in reversed(list(enumerate(self.trace.nodes)))}
        self.layers = {name: layers[name] for name in sorted(layers, key=lambda name: order.get(name, len(order)))}
        self.matrices = [name for name, module in self.layers.items() if layer_inputs.has_matrix(module)]
        modules = named_modules(model)
        self.norms = {pair.layer: modules.get(pair.norm) for pair in self.trace.pairs if pair.why_not is None}
        self.work = 0.0
        """Multiplications of the layers on all samples."""

    def run(self, sparsity: float, progress: bool | None) -> tuple[PrunedWeights, ...]:
        scores = self._scores(progress)
        counts = zeros_by_layer(scores, sparsity)
        del scores
        done: dict[str, PrunedWeights] = {}
        for names in track(self._groups(counts), "pruning", progress=progress):
            moments = self._moments(names, full=True)
            for name in names:
                done[name] = self._prune(name, counts[name], moments.pop(name, None))
        return tuple(done[name] for name in self.layers)

    # ------------------------------------------------------------------ what is known of what layers read

    def _moments(self, names: Sequence[str], *, full: bool) -> dict[str, layer_inputs.Moments]:
        """Moments of what the layers read; `full`: beside what they read in the model that is not pruned."""
        names = [name for name in names if name in self.matrices]
        # What BatchNorms remember is not enough: where branches meet, values made up from it mislead. ResNet-20 on
        # digits keeps 81 % right answers with it and 94 % by magnitudes alone, of 98 %.
        if not names or not self.data:
            return {}
        found = {}
        for wide in (False, True):
            part = [name for name in names if (_width(self.layers[name]) > WIDEST) is wide]
            found.update(
                layer_inputs.gather(
                    self.model,
                    part,
                    self.data if part else [],
                    reference=self.reference if full and not wide else None,
                    calls=self.trace.calls,
                    with_second=not wide,
                )
            )
        return found

    def _scores(self, progress: bool | None) -> dict[str, Tensor]:
        """The growth of each layer's error without each of its weights, as a share of its output."""
        found: dict[str, Tensor] = {}
        for names in track(self._in_memory(list(self.layers)), "looking at layers", progress=progress):
            moments = self._moments(names, full=False)
            for name in names:
                found[name] = self._score(name, moments.pop(name, None))
        return found

    def _score(self, name: str, moments: layer_inputs.Moments | None) -> Tensor:
        module = self.layers[name]
        if not _is_known(moments):
            weight = _prunable_weight(module).detach().float()
            return (weight.square() / weight.square().sum().clamp(min=1e-30)).reshape(-1)
        weight = layer_inputs.as_matrix(module).detach().float()
        self.work += weight.numel() * moments.columns
        known = self._known(name, moments)
        if known.dim() == 2:
            scores = weight.square() * known[:, None, :]
            return (scores / scores.sum().clamp(min=1e-30)).reshape(-1)
        scores = reconstruction.removal_scores(weight, known)
        return (scores / rounding.output_error(weight, known).sum().clamp(min=1e-30)).reshape(-1)

    def _known(self, name: str, moments: layer_inputs.Moments) -> Tensor:
        """The products of what a layer reads (G, K, K), damped, or their diagonal (G, K) where these are too
        many; without their means where the bias takes back the shift of the output's.
        """
        corrected = bias_correction.can_correct(self.layers[name], self.norms.get(name))
        if not moments.second.dim():
            power = moments.power - (moments.mean.square() if corrected else 0)
            return power.clamp(min=1e-12 + 1e-6 * float(moments.power.mean()))
        second = moments.second
        if corrected:
            second = second - moments.mean[:, :, None] * moments.mean[:, None, :]
        width = second.shape[-1]
        mean = second.diagonal(dim1=1, dim2=2).mean(-1).clamp(min=1e-12)
        share = rounding.DAMPING + FEW_DAMPING * width / max(moments.rows, 1)
        return second + torch.eye(width, device=second.device) * (share * mean)[:, None, None]

    # ------------------------------------------------------------------ in which order, and how much at once

    def _in_memory(self, names: Sequence[str]) -> list[list[str]]:
        """As many layers at once as there is memory for their moments."""
        groups: list[list[str]] = []
        size = MEMORY
        for name in names:
            need = 0
            if name in self.matrices:
                groups_of, _, width = layer_inputs.as_matrix(self.layers[name]).shape
                need = 2 * 4 * groups_of * min(width, WIDEST) ** 2
            if not groups or size + need > MEMORY:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += need
        return groups

    def _groups(self, counts: Mapping[str, int]) -> list[list[str]]:
        """Neighbours that are pruned in one run: single layers where the samples take little time."""
        names = list(self.layers)
        # On average half a model, twice: as it is and as it becomes.
        runs = max(1, min(len(names), int(WORK / max(self.work, 1.0))))
        if not self.data:
            runs = 1
        size = -(-len(names) // runs)
        return [part for at in range(0, len(names), size) for part in self._in_memory(names[at : at + size])]

    # ------------------------------------------------------------------ one layer

    def _prune(self, name: str, zeros: int, moments: layer_inputs.Moments | None) -> PrunedWeights:
        module = self.layers[name]
        count = _prunable_weight(module).numel()
        if not _is_known(moments):
            weight = _prunable_weight(module)
            weight.masked_fill_(reconstruction.lowest_scores(weight.abs(), zeros), 0)
            return PrunedWeights(name, count, int((weight == 0).sum()), "magnitude")
        weight = layer_inputs.as_matrix(module).detach().float().clone()
        known, norm = self._known(name, moments), self.norms.get(name)
        corrected = bias_correction.can_correct(module, norm)
        plain = weight.masked_fill(reconstruction.lowest_scores(weight.abs(), zeros), 0)
        if known.dim() == 2:
            found = weight.masked_fill(reconstruction.lowest_scores(weight.square() * known[:, None, :], zeros), 0)
            error, error_plain, power = (
                float((each.square() * known[:, None, :]).sum()) for each in (found - weight, plain - weight, weight)
            )
            _shrink_variance(norm, weight, found, known)
        else:
            target = weight
            if moments.cross is not None:
                cross = moments.cross
                if corrected:
                    cross = cross - moments.mean[:, :, None] * moments.mean_float[:, None, :]
                # Damped alike, so that it is `weight` where the inputs are the same.
                exact = moments.second - _outer(moments.mean) if corrected else moments.second
                ridge = known - exact
                target = rounding.made_good(weight, known, cross + ridge)
            found = reconstruction.with_zeros(target, known, zeros)
            error, error_plain, power = (
                float(rounding.output_error(each, known).sum()) for each in (found - target, plain - target, target)
            )
        layer_inputs.set_matrix(module, found)
        if corrected:
            shift = bias_correction.mean_shift(weight, moments.mean_float, found, moments.mean)
            bias_correction.correct(module, norm, shift)  # type: ignore[arg-type]
        power = power or 1.0
        method = "reconstruction" if known.dim() == 3 else "magnitude times inputs"
        return PrunedWeights(name, count, int((found == 0).sum()), method, error / power, error_plain / power)


def zeros_by_layer(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
    """{layer: number of zeros}, of which the sum is round(`sparsity` x all weights).

    The weights of lowest score go, of all layers together; but no layer gets more than its bound. Weights that are zero
    already score 0.

    Args:
        scores: (weights,) of each layer.
        sparsity: 0 to 1.
    """
    total = sum(score.numel() for score in scores.values())
    wanted = round(sparsity * total)
    bound = min(max(MOST_OF_ALL, sparsity), sparsity + MOST_ABOVE)
    caps = {name: int(bound * score.numel()) for name, score in scores.items()}
    spare = wanted - sum(caps.values())
    for name in sorted(caps, key=lambda name: -scores[name].numel()):
        # Rounding down may leave too little where the bound is the average itself.
        more = min(max(spare, 0), scores[name].numel() - caps[name])
        caps[name] += more
        spare -= more
    names = list(scores)
    # Of each layer the lowest that it may lose.
    lowest = [scores[name].sort().values[: caps[name]] for name in names]
    values = torch.cat(lowest)
    owners = torch.cat([torch.full((len(part),), at) for at, part in enumerate(lowest)])
    chosen = owners[values.argsort(stable=True)[:wanted]]
    counts = torch.bincount(chosen, minlength=len(names))
    return {name: int(count) for name, count in zip(names, counts, strict=True)}


def _prunable_weight(module: nn.Module) -> Tensor:
    weight = module._parameters["weight"]
    assert weight is not None  # See `prunable_layers`.
    return weight.data


def _is_known(moments: layer_inputs.Moments | None) -> TypeGuard[layer_inputs.Moments]:
    """A layer was called, and what it read was finite: a mask of infinities in its input leaves nothing to go by."""
    return moments is not None and bool(moments.columns) and is_finite(moments.power) and is_finite(moments.second)


def _shrink_variance(norm: nn.Module | None, weight: Tensor, found: Tensor, power: Tensor) -> None:
    """The variance that a BatchNorm remembers, by how much less of it the weights that are left make."""
    variance = getattr(norm, "running_var", None)
    if variance is not None:
        after, before = ((each.square() * power[:, None, :]).sum(-1).reshape(-1) for each in (found, weight))
        variance.mul_((after / before.clamp(min=1e-30)).clamp(min=1e-3).to(variance.dtype))


def _width(module: nn.Module) -> int:
    return int(layer_inputs.as_matrix(module).shape[2])


def _outer(mean: Tensor) -> Tensor:
    return mean[:, :, None] * mean[:, None, :]


def _because(dense: Mapping[str, str]) -> str:
    return f": {'; '.join(f'{name}: {why}' for name, why in list(dense.items())[:4])}" if dense else ""
