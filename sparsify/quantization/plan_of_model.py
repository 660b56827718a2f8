"""The plan of a quantized model, read from the model itself: its layers, quantizers and the links between them.

Nothing else has to be kept beside a model for it to be saved and built again, whoever quantized it (a recipe, a call
without training, a checkpoint) and whatever was done to it since: layers taken out, wrapped, copied.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeGuard

from torch import nn

from sparsify.errors import StateError
from sparsify.model.targets import named_modules
from sparsify.quantization.attention import SLOW, QuantizedMultiheadAttention
from sparsify.quantization.conversion import original_type
from sparsify.quantization.fake_quantize import FakeQuantize
from sparsify.quantization.fixed_and_shared import FixedQuantize, SameGrid
from sparsify.quantization.forward_ops import Watched, WatchedActivation, WatchedAffine, operation_places, reads_of
from sparsify.quantization.layers import QuantizedEmbedding, QuantizedLayer, QuantizedNorm
from sparsify.quantization.plan import (
    LayerPlan,
    NormPlan,
    QuantizationPlan,
    QuantizerSite,
    Unquantized,
    WeightRead,
    unquantized,
)
from sparsify.quantization.recurrent import QuantizedRecurrent
from sparsify.quantization.weight_grid import WEIGHT_STEP
from sparsify.quantization.wiring import Converted, wiring_of

__all__: list[str] = []


def quantization_of(model: nn.Module) -> QuantizationPlan:
    """The plan that makes the quantized layers of `model` out of those of a model in float; empty where it has none.

    `apply_plan` of it gives the same modules under the same names, with the same links. Ranges and learned steps are
    tensors of the model and no part of it; nor is what training has switched (`observing`, `frozen`).

    Raises:
        StateError: a layer reads a quantizer or has a BatchNorm that is not in `model`: it is a part of what was
            quantized.
    """
    modules = {"": model, **named_modules(model)}
    converted = {name: module for name, module in modules.items() if isinstance(module, Converted)}
    named = _Names(model, modules)
    sites = [
        _site_of(name, child, quantizer, named)
        for name, module in converted.items()
        for child, quantizer in module._modules.items()
        if isinstance(quantizer, FakeQuantize | SameGrid)
    ]
    slow = [name for name, module in converted.items() if _is_slowed(module)]
    attentions = [name for name, module in converted.items() if isinstance(module, QuantizedMultiheadAttention)]
    norms = {name: module for name, module in converted.items() if isinstance(module, QuantizedNorm)}
    layers = {n: module for n, module in converted.items() if isinstance(module, _WITH_WEIGHTS)}
    return QuantizationPlan(
        layers=tuple(_layer_plan(name, module, named) for name, module in layers.items()),
        sites=tuple(sites),
        watched={name: module.operation_counts for name, module in converted.items() if _is_watched(module)},
        norms=tuple(norms),
        slow=tuple(slow),
        left=tuple(Unquantized(what, why) for what, why in unquantized(model).items()),
        attentions=tuple(attentions),
        alone=tuple(_norm_plan(name, module, named) for name, module in norms.items() if wiring_of(module).rank),
        places=operation_places(model),
        reads=tuple(_weight_reads(converted, named)),
    )


_WITH_WEIGHTS = (QuantizedLayer, QuantizedEmbedding, QuantizedRecurrent)


class _Names:
    """The names of the modules of a model, for the links between them."""

    def __init__(self, model: nn.Module, modules: dict[str, nn.Module]) -> None:
        self.model = type(model).__name__
        self.by_id = {id(module): name for name, module in modules.items()}
        # A layer whose input quantizer is another's: {id of the quantizer: names of such layers}.
        self.readers: dict[int, list[str]] = {}
        for name, module in modules.items():
            shared = wiring_of(module).shared if isinstance(module, Converted) else None
            if shared is not None:
                self.readers.setdefault(id(shared), []).append(name)

    def of(self, module: nn.Module | None, whose: str) -> str | None:
        """The name of `module`, to which `whose` is linked; None for None."""
        if module is None:
            return None
        name = self.by_id.get(id(module))
        if name is None:
            raise StateError(
                f"{whose!r} of this {self.model} works together with a {type(module).__name__} that is not in it: it "
                "is a part of the model that was quantized. Give that model as a whole."
            )
        return name


def _site_of(module: str, child: str, quantizer: Any, named: _Names) -> QuantizerSite:
    whose = f"{module}.{child}" if module else child
    own = quantizer
    shared_with = None
    if isinstance(quantizer, SameGrid):
        own = quantizer.quantizer
        shared_with = named.of(own, whose)
    return QuantizerSite(
        module,
        child,
        bits=own.bits,
        symmetric=own.symmetric,
        averaging_constant=own.averaging_constant,
        readers=() if shared_with else tuple(named.readers.get(id(own), ())),
        fused_relu=own.relu,
        ceiling=own.ceiling if math.isfinite(own.ceiling) else None,
        in_place=own.in_place and not shared_with,
        producer=None if shared_with else named.of(own.producer, whose),
        gate=own.gate,
        shared_with=shared_with,
        observer=own.observer,
        percentile=own.percentile,
        fixed=own.function if isinstance(own, FixedQuantize) else None,
    )


def _layer_plan(name: str, module: nn.Module, named: _Names) -> LayerPlan:
    wiring = wiring_of(module)
    return LayerPlan(
        name,
        wiring.axis,
        wiring.q_max,
        named.of(wiring.source, name),
        named.of(wiring.norm, name),
        learned=WEIGHT_STEP in module._modules,
        block=wiring.block,
        affine=wiring.affine,
    )


def _norm_plan(name: str, module: nn.Module, named: _Names) -> NormPlan:
    wiring = wiring_of(module)
    return NormPlan(name, named.of(wiring.source, name) or "", wiring.rank, wiring.q_max, wiring.channels)


def _weight_reads(converted: dict[str, Converted], named: _Names) -> Iterator[WeightRead]:
    seen: set[str] = set()
    for name, module in converted.items():
        for layer in reads_of(module):
            found = named.of(layer, name) or ""
            seen.add(found)
            yield WeightRead(found, name, wiring_of(layer).lent)
    yield from (WeightRead(name, None) for name, one in converted.items() if wiring_of(one).read and name not in seen)


def _is_slowed(module: Converted) -> bool:
    original = original_type(module)
    return original in SLOW and SLOW[original][1] in wiring_of(module).overwritten


def _is_watched(module: Converted) -> TypeGuard[Watched]:
    return isinstance(module, Watched) and not isinstance(module, WatchedAffine | WatchedActivation)
