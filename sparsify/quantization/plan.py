"""What is quantized where, and why not, as plain data; and putting it in force on a model.

A plan is made once, from a trace and a scheme (`placement.make_plan`). It goes into a checkpoint and gives a fresh
model its quantized layers without a trace.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.errors import StateError
from sparsify.model.preserved import eval_mode_, preserved
from sparsify.model.targets import named_modules
from sparsify.quantization.attention import FORMS, disable_fast_path, quantize_attention
from sparsify.quantization.fake_quantize import FakeQuantize
from sparsify.quantization.fixed_and_shared import FixedQuantize, SameGrid
from sparsify.quantization.forward_ops import Watched, switched_off, watch
from sparsify.quantization.layers import (
    WEIGHTED,
    Converted,
    QuantizedLayer,
    convert_,
    is_norm_and_more,
    is_weighted,
)
from sparsify.quantization.learned_step import LearnedQuantize
from sparsify.quantization.weight_grid import WEIGHT_STEP, learned_step

__all__: list[str] = []

PLAN_FORMAT = 1
"""The version of a plan's state."""
LEFT = "_left_in_float"
"""The attribute of a quantized model with what stays in float: {what: why}."""


@dataclass(frozen=True)
class QuantizerSite:
    """One quantized tensor.

    Attributes:
        module: the module that holds the quantizer. child: its name there.
        readers: layers that call the quantizer on their input, besides `module`.
        relu: the quantizer does the ReLU. ceiling: where that is cut off (ReLU6); None: nowhere.
        gate: the activation that the quantizer does, "silu" or "hardswish".
        fixed: the function before it, where the grid is that function's: "tanh".
        like: the name of the site whose quantizer does it; None: its own.
        observer: how the range follows from the values. percentile: of the observer of that name.
        in_place: whether the quantizer alone reads the tensor. producer: the module whose hooks could have kept it.
    """

    module: str
    child: str
    bits: int
    symmetric: bool
    averaging_constant: float
    readers: tuple[str, ...] = ()
    relu: bool = False
    ceiling: float | None = None
    in_place: bool = False
    producer: str | None = None
    gate: str | None = None
    like: str | None = None
    observer: str = "moving_average"
    percentile: float = 99.99
    fixed: str | None = None

    @property
    def name(self) -> str:
        """The path of the quantizer."""
        return f"{self.module}.{self.child}" if self.module else self.child


@dataclass(frozen=True)
class LayerPlan:
    """One layer with quantized weights.

    Attributes:
        axis: the dimension of the weight that has a scale for each index; None: one scale.
        largest: the largest integer of a weight, 2^(bits-1) - 1; 0: the weights stay in float.
        source: the name of the site that it reads; None: it reads floats.
        norm: the BatchNorm that is folded into it.
        learned: whether its scales are parameters. block: how many weights along the inputs have one; 0: all.
        affine: whether a zero point stands beside each scale, and the integers are 0..2 largest + 1.
    """

    name: str
    axis: int | None
    largest: int
    source: str | None
    norm: str | None
    learned: bool = False
    block: int = 0
    affine: bool = False


@dataclass(frozen=True)
class NormPlan:
    """A BatchNorm that no layer takes in: between integers it is a layer of its own, one weight for each channel.

    Attributes:
        source: the name of the site that it reads. rank: how many dimensions that tensor has, 3 to 5.
        largest: the largest integer, which every channel has for a weight.
    """

    name: str
    source: str
    rank: int
    largest: int


@dataclass(frozen=True)
class Unquantized:
    """What stays in float, and why.

    Attributes:
        unasked: it has weights, and the recipe does not leave it out.
    """

    what: str
    why: str
    unasked: bool = False


@dataclass(frozen=True)
class QuantizationPlan:
    """All that was decided.

    Attributes:
        watched: the modules whose own operations are counted -> how many of each kind the trace has.
        norms: every BatchNorm, so that its statistics can be frozen, folded or not.
        alone: those of them that compute in integers by themselves.
        slow: TransformerEncoderLayers that must not take their fused path.
        left: what stays in float, and why.
        attentions: MultiheadAttentions whose projections are layers: "<name>.in_proj", or others of `attention.FORMS`,
            and "<name>.out_proj".
    """

    layers: tuple[LayerPlan, ...] = ()
    sites: tuple[QuantizerSite, ...] = ()
    watched: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    norms: tuple[str, ...] = ()
    slow: tuple[str, ...] = ()
    left: tuple[Unquantized, ...] = ()
    attentions: tuple[str, ...] = ()
    alone: tuple[NormPlan, ...] = ()

    def projections(self, attention: str) -> tuple[str, ...]:
        """The names, within it, of the layers in front of an attention."""
        names = {layer.name for layer in self.layers}
        return next((form for form in FORMS if {f"{attention}.{name}" for name in form} <= names), ())

    @property
    def folds(self) -> dict[str, str]:
        """Layer -> the BatchNorm that is folded into it."""
        return {layer.name: layer.norm for layer in self.layers if layer.norm is not None}

    def to_state(self) -> dict[str, Any]:
        """As dicts, lists, strings and numbers."""
        state: dict[str, Any] = _plain_state(dataclasses.asdict(self))
        return {"format": PLAN_FORMAT, **state}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> QuantizationPlan:
        """The plan that `to_state` described.

        Raises:
            StateError: it is none, or one of another version.
        """
        try:
            if state["format"] != PLAN_FORMAT:
                raise StateError(f"the plan has format {state['format']!r}; this sparsify reads {PLAN_FORMAT}.")
            return cls(
                layers=tuple(LayerPlan(**layer) for layer in state["layers"]),
                sites=tuple(QuantizerSite(**{**site, "readers": tuple(site["readers"])}) for site in state["sites"]),
                watched={path: dict(counts) for path, counts in state["watched"].items()},
                norms=tuple(state["norms"]),
                slow=tuple(state["slow"]),
                left=tuple(Unquantized(**left) for left in state["left"]),
                attentions=tuple(state.get("attentions", ())),
                alone=tuple(NormPlan(**norm) for norm in state.get("alone", ())),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise StateError(
                f"the state holds no plan of quantized layers: {error!r}. Load a manager's state."
            ) from error

    def __str__(self) -> str:
        line = f"{len(self.layers)} layers and {len(self.sites)} tensors quantized, {len(self.folds)} BatchNorms folded"
        if self.alone:
            line += f", {len(self.alone)} layers of their own"
        return "\n".join([line, *(f"  in float: {left.what}: {left.why}" for left in self.left)])


def _plain_state(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain_state(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_state(one) for one in value]
    return value


def check_plan(model: nn.Module, plan: QuantizationPlan, *, again: bool = False) -> None:
    """Refuses a plan that was made for another model.

    Args:
        again: whether the model may be quantized already, by a plan that this one is to take the place of.

    Raises:
        StateError: a layer of the plan is missing or of another type.
    """
    modules: dict[str, Any] = {"": model, **named_modules(model)}
    wanted = {layer.name for layer in plan.layers} | {site.module for site in plan.sites} | set(plan.watched)
    made = {f"{name}.{one}" for name in plan.attentions for one in plan.projections(name)}
    wanted |= set(plan.norms) | set(plan.slow) | set(plan.attentions)
    missing = sorted(name for name in wanted - made if name not in modules)
    if missing:
        raise StateError(
            f"the plan of quantized layers names {missing[0]!r}, which {type(model).__name__} does not have. It was "
            "made for another model."
        )
    for name in plan.attentions:
        if type(modules[name]) is not nn.MultiheadAttention and not (again and isinstance(modules[name], Converted)):
            raise StateError(
                f"{name} is a {type(modules[name]).__name__}, not a MultiheadAttention: it is quantized already, or "
                "the plan is of another model."
            )
    projections = made | {f"{name}.out_proj" for name in plan.attentions}
    for layer in plan.layers:
        if layer.name in projections:
            continue
        if not is_weighted(modules[layer.name]) and not (again and isinstance(modules[layer.name], Converted)):
            raise StateError(
                f"{layer.name} is a {type(modules[layer.name]).__name__}, not one of "
                f"{', '.join(cls.__name__ for cls in WEIGHTED)}: it is quantized already, or the plan is of another "
                "model."
            )


def apply_plan(model: nn.Module, plan: QuantizationPlan) -> None:
    """Retypes the layers of `model` in place as `plan` says. Parameters stay the same objects.

    Raises:
        StateError: a layer of the plan is missing or of another type; nothing is changed then.
    """
    check_plan(model, plan)
    for name in plan.attentions:
        attention: Any = named_modules(model)[name]
        quantize_attention(attention, plan.projections(name))
    modules: dict[str, Any] = {"": model, **named_modules(model)}
    for path, counts in plan.watched.items():
        watch(modules[path], dict(counts))
    for name in plan.norms:
        if not is_norm_and_more(modules[name]):
            convert_(modules[name])
        elif name not in plan.watched:
            watch(modules[name], {})
    for name in plan.slow:
        disable_fast_path(modules[name])
    for layer in plan.layers:
        wiring = convert_(modules[layer.name])
        wiring.axis, wiring.largest, wiring.block = layer.axis, layer.largest, layer.block
        wiring.affine = layer.affine
        if layer.learned:
            modules[layer.name].add_module(WEIGHT_STEP, learned_step(modules[layer.name].weight, wiring))
        if layer.norm is not None:
            wiring.norm = modules[layer.norm]
            modules[layer.norm]._wiring.layer = modules[layer.name]
    quantizers: dict[str, FakeQuantize] = {}
    for site in plan.sites:
        module = modules[site.module]
        convert_(module)
        if site.like is not None:
            module.add_module(site.child, SameGrid(quantizers[site.like]))
            quantizers[site.name] = quantizers[site.like]
            continue
        made: Callable[..., FakeQuantize] = LearnedQuantize if site.observer == "lsq" else FakeQuantize
        if site.fixed is not None:
            made = partial(FixedQuantize, function=site.fixed)
        quantizer = made(
            site.name,
            bits=site.bits,
            symmetric=site.symmetric,
            averaging_constant=site.averaging_constant,
            relu=site.relu,
            ceiling=math.inf if site.ceiling is None else site.ceiling,
            in_place=site.in_place,
            gate=site.gate,
            observer=site.observer,
            percentile=site.percentile,
        )
        if site.producer is not None:
            quantizer._producer = (modules[site.producer],)
        quantizer.to(_device(module, model)).train(module.training)
        module.add_module(site.child, quantizer)
        quantizers[site.name] = quantizer
        for reader in site.readers:
            modules[reader]._wiring.shared = quantizer
        if site.readers:
            quantizer.readers = 1 + len(site.readers)
    for layer in plan.layers:
        if layer.source is not None:
            modules[layer.name]._wiring.source = quantizers[layer.source]
    for norm in plan.alone:
        wiring = modules[norm.name]._wiring
        wiring.source, wiring.rank, wiring.largest = quantizers[norm.source], norm.rank, norm.largest
    setattr(model, LEFT, {left.what: left.why for left in plan.left})


def left_in_float(model: nn.Module) -> dict[str, str]:
    """What stays in float in a quantized model -> why; empty for a model that is not quantized."""
    came_otherwise = "its operations came otherwise in training than in the trace"
    off = {name or "the model": came_otherwise for name in switched_off(model)}
    return {**getattr(model, LEFT, {}), **off}


def check_traced_ops(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Runs a freshly quantized model once, without rounding, to see that watched operations come as traced.

    Scripted functions and direct calls of operators are seen by the trace and not in training. Gives the paths of
    modules whose operations now stay in float. Training modes, random states and buffers are as before.
    """
    watched = {
        name: module for name, module in {"": model, **named_modules(model)}.items() if isinstance(module, Watched)
    }
    if not any(module._counts for module in watched.values()):
        return []
    with preserved(model), torch.no_grad():
        eval_mode_(model)
        # Not through __call__: this may run inside a hook of that very call.
        model.forward(*args, **kwargs)
    return [name for name, module in watched.items() if module._off]


def _device(module: nn.Module, model: nn.Module) -> torch.device:
    tensors: list[Tensor] = [*module.parameters(), *module.buffers(), *model.parameters()]
    return tensors[0].device if tensors else torch.device("cpu")


def is_quantized(model: nn.Module) -> bool:
    """Whether some layer of `model` computes with quantized weights or activations."""
    return any(isinstance(module, (QuantizedLayer, FakeQuantize)) for module in model.modules())
