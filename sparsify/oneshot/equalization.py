"""Equalization of channels between two layers: divided where they are made, multiplied where they are read.

Nagel 2019, https://arxiv.org/abs/1906.04721. Between two layers with nothing but a ReLU, a pool or a dropout between
them, a channel can be divided by any s > 0 where it is made and multiplied where it is read. There
s_i = sqrt(a_i / b_i), a_i the largest weight that makes channel i (BatchNorm folded) and b_i the largest that reads it.
Different here:

- a_i is what the channel reaches on the samples, bias included, since that is what shares a grid with other channels;
  weights are in it where they share one scale too. With weights alone a channel that died, whose weights are near 0 and
  whose bias is not, becomes so large that nothing is left of the others.
- A pair of layers is scaled only where its error on the samples falls by a fifth: see `pair_errors`.
- s is a power of two. Floats then change in their exponents alone, and the network's function not by a bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparsify.model.targets import named_modules
from sparsify.model.trace import Trace, TracedNode
from sparsify.oneshot.pair_errors import PairErrors, SeenBetween, watch_between
from sparsify.quantization.folding import norm_factor
from sparsify.quantization.plan import QuantizationPlan
from sparsify.quantization.weight_grid import bias_of, weight_of
from sparsify.quantization.weight_readers import WeightReaders

__all__: list[str] = []

EQUALIZATION_ROUNDS = 3
"""Over all pairs in turn. One is enough unless one scale holds for all weights of a layer."""
LARGEST_FACTOR = 2.0**24
LARGEST_FACTOR_IN_FLOAT16 = 2.0**5
"""Weights that are made much smaller than they are would be 0 there."""
WORTH = 0.64
"""Pairs whose mean square error stays above this share of what it was are left alone: a fifth of the error itself."""
UNSEEN = 0.25
"""Of what weights would let a channel reach, so much counts even if no sample does: other samples may."""
_WEIGHTED_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d)
_ELEMENTWISE = frozenset(
    {"relu", "leaky_relu", "dropout", "feature_dropout", "contiguous", "clone", "alias", "detach", "identity"}
)
_POOLS = frozenset(
    {
        *("max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d"),
        *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool2d"),
    }
)


@dataclass(frozen=True)
class Neighbours:
    """Two layers between which channels can be scaled, the BatchNorm between them, and the other operations there."""

    first: str
    norm: str | None
    second: str
    way: frozenset[str] = field(default=frozenset(), compare=False)


def neighbours(model: nn.Module, trace: Trace, folds: Mapping[str, str]) -> tuple[Neighbours, ...]:
    """Every pair in the order of computation. `folds`: layer -> the BatchNorm behind it that can be folded into it."""
    modules: dict[str, Any] = {"": model, **named_modules(model)}
    owners = {id(p): 0 for p in model.parameters()}
    for module in modules.values():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] += 1
    read = WeightReaders(modules, trace).read
    found = []

    def is_free(name: str) -> bool:
        """True for a plain layer, called once, that shares no parameter, and of which nobody else reads one."""
        module = modules.get(name)
        own = [] if module is None else [p for p in module._parameters.values() if p is not None]
        plain = type(module) in _WEIGHTED_KINDS or name in folds.values()
        if not plain or name in read or trace.calls.get(name) != 1:
            return False
        return bool(own) and all(owners[id(p)] == 1 for p in own)

    for node in trace.nodes:
        if node.kind not in ("conv", "linear") or not node.inputs or not is_free(node.owner):
            continue
        maker, way = _maker(trace, node)
        if maker is None or not is_free(maker.owner):
            continue
        norm = None
        if maker.kind == "batch_norm":
            norm = maker.owner
            known = isinstance(modules[norm], _BatchNorm) and norm in folds.values()
            if not known or modules[norm].weight is None or modules[norm].bias is None:
                continue
            maker = trace.by_name[maker.inputs[0]]
            if folds.get(maker.owner) != norm or not is_free(maker.owner):
                continue
        first, second = modules[maker.owner], modules[node.owner]
        if (
            maker.kind == "batch_norm"
            or type(first) not in _WEIGHTED_KINDS
            or len(_given(first, None)) != len(_read(second))
        ):
            continue
        # Channels are axis 1 of what a convolution gives and the last of what a Linear gives.
        if (maker.kind == "conv" and (node.kind == "linear") == ("flatten" in way)) or (
            maker.kind == node.kind == "linear"
            and way <= _ELEMENTWISE
            and (norm is None or len(maker.shape or ()) == 2)
        ):
            found.append(Neighbours(maker.owner, norm, node.owner, frozenset(way)))
    return tuple(found)


def equalize(
    model: nn.Module,
    pairs: tuple[Neighbours, ...],
    plan: QuantizationPlan,
    batches: Iterable[Any],
    *,
    corrected: bool = True,
    few: bool = False,
    largest: float = LARGEST_FACTOR,
) -> dict[str, float]:
    """Scales weights, biases and BatchNorms of `model` in place. Gives {first layer: the largest factor it took}.

    Args:
        model: in float and eval mode.
        pairs: as `neighbours` gives them.
        plan: what will be quantized, and how.
        batches: inputs of the model; gone through once.
        corrected: whether shifts of an output's mean will be taken back, and so are no errors.
        few: whether `batches` say little, so that the statistics of BatchNorms count too.
        largest: no factor is larger, or smaller than its reciprocal.

    Raises:
        DataError: a batch does not run through the model.
    """
    if not pairs:
        return {}
    modules: dict[str, Any] = named_modules(model)
    factors: dict[str, Tensor] = {}
    between = watch_between(model, {(pair.first, pair.norm, pair.second): pair.way for pair in pairs}, batches)
    with torch.no_grad():
        judges: dict[Neighbours, PairErrors] = {}
        for pair in pairs:
            seen = between.get((pair.first, pair.norm, pair.second))
            if seen is None:
                continue
            if few and pair.norm is not None:
                seen.reach = torch.maximum(seen.reach, _by_statistics(modules[pair.norm], pair.way).to(seen.reach))
            judges[pair] = PairErrors(modules[pair.second], pair.first, pair.second, plan, seen, corrected)
        for _ in range(EQUALIZATION_ROUNDS):
            moved = False
            for pair, errors in judges.items():
                first, second = modules[pair.first], modules[pair.second]
                norm = None if pair.norm is None else modules[pair.norm]
                given, read = _given(first, norm).float(), _read(second).float()
                before = factors.get(pair.first, torch.ones_like(given))
                scale = _best(errors, given, read, before, largest)
                if scale is None:
                    continue
                moved = True
                factors[pair.first] = before * scale
                _scale(first, norm, second, scale)
                errors.between.divide(scale)
            if not moved:
                break
    return {name: float(torch.maximum(scale, 1 / scale).max()) for name, scale in factors.items()}


def _best(errors: PairErrors, given: Tensor, read: Tensor, before: Tensor, largest: float) -> Tensor | None:
    """The factors (C,) of least error, beyond those `before`; None: none is worth it."""
    best, least = None, WORTH
    one = torch.ones_like(given)
    now = errors.of(one, given)
    if not now.any():
        return None
    for wanted in _wanted_factors(errors.between, given, read, shared=errors.shares_scale):
        scale = (wanted * before).clamp(1 / largest, largest) / before
        if torch.equal(scale, one):
            continue
        # Both the error of the whole output and that of its channels by their own sizes have to fall.
        share = float((errors.of(scale, given) / now.clamp(min=1e-30)).max())
        if share < least:
            best, least = scale, share
    return best


def _wanted_factors(between: SeenBetween, given: Tensor, read: Tensor, *, shared: bool) -> list[Tensor]:
    """Powers of two (C,), by which the largest channel stays as large as it is."""
    reach, top = between.reach.float(), between.reach.max()
    alive = (reach > 0) & (given > 0) & given.isfinite()
    if not top > 0 or not top.isfinite() or not read.isfinite().all():
        return []
    reach = reach / top
    if shared and alive.any():
        reach = torch.maximum(reach, given / given[alive].max())
    elif alive.any():
        reach = torch.maximum(reach, given * ((reach / given)[alive].median() * UNSEEN))
    usable = (reach > 0) & (read > 0) & reach.isfinite()
    if not usable.any():
        return []
    found = []
    for wanted in ((reach / read).sqrt(), reach, 1 / read):
        # A channel that makes or is read as zeros needs no factor, but must not be the largest of all.
        tensor, weights = (reach / wanted)[usable].max(), (read * wanted)[usable].max()
        wanted = torch.where(usable, wanted, torch.where(read > 0, weights / read, reach / tensor))
        scale = torch.exp2(torch.where(wanted > 0, torch.log2(wanted), 0.0).round())
        whole = torch.where(between.reach > 0, reach / scale, 0.0).max()
        found.append(scale * torch.exp2(torch.log2(whole).round()))
    return found


def _by_statistics(norm: _BatchNorm, way: frozenset[str]) -> Tensor:
    """The reach of the channels of a BatchNorm, three deviations from their means: (C,)."""
    assert norm.weight is not None and norm.bias is not None  # See `neighbours`.
    reach: Tensor = norm.bias + 3 * norm.weight.abs()
    return reach.clamp(min=0) if "relu" in way else torch.maximum(reach, 3 * norm.weight.abs() - norm.bias)


def _maker(trace: Trace, node: TracedNode) -> tuple[TracedNode | None, set[str]]:
    """(the node that makes what `node` reads, operations between); None where a factor does not pass them."""
    name, way = node.inputs[0], set[str]()
    while True:
        made = trace.by_name[name]
        if len(trace.readers[name]) != 1 or name in trace.outputs:
            return None, way
        if made.kind in ("conv", "linear", "batch_norm"):
            return made, way
        op = made.op.rstrip("_")
        if op in ("flatten", "view", "reshape") and made.inputs:
            # A channel must become one column.
            before = trace.by_name[made.inputs[0]].shape or ()
            op = "flatten" if len(before) > 2 and made.shape == before[:2] else op
        if op not in _ELEMENTWISE | _POOLS | {"flatten"} or not made.inputs:
            return None, way
        way.add(op)
        name = made.inputs[0]


def _given(layer: nn.Module, norm: _BatchNorm | None) -> Tensor:
    """The largest weight that makes each channel, BatchNorm folded: (C,)."""
    reach: Tensor = weight_of(layer).flatten(1).abs().amax(1)
    return reach if norm is None else reach * norm_factor(norm)[0].abs().to(reach.dtype)


def _read(layer: nn.Module) -> Tensor:
    """The largest weight that reads each channel: (C,)."""
    groups = getattr(layer, "groups", 1)
    weight = weight_of(layer)
    by_group = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    reach: Tensor = by_group.abs().amax((1, 3)).reshape(-1)
    return reach


def _scale(first: nn.Module, norm: nn.Module | None, second: nn.Module, scale: Tensor) -> None:
    """Divides what `first` gives by `scale` (C,), and multiplies where `second` reads it."""
    maker = first if norm is None else norm
    for tensor in (weight_of(maker), bias_of(maker)):
        if tensor is not None:
            tensor.div_(scale.to(tensor.dtype).view(-1, *[1] * (tensor.dim() - 1)))
    groups = getattr(second, "groups", 1)
    weight = weight_of(second)
    by_group = weight.view(groups, weight.shape[0] // groups, weight.shape[1], -1)
    by_group.mul_(scale.to(weight.dtype).view(groups, 1, weight.shape[1], 1))
