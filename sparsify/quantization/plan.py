"""The plan of what is quantized where, as plain data, and putting it in force on a model.

A plan is made once, from a trace and a scheme (`placement.make_plan`). It goes into a checkpoint and gives a fresh
model its quantized layers without a trace.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Container, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn

from sparsify.errors import StateError
from sparsify.model.preserved import eval_mode_, preserved
from sparsify.model.sharding import call_within, class_before_sharding
from sparsify.model.targets import named_modules
from sparsify.model.written_activations import WRITTEN, activation_of
from sparsify.output.json_values import EXACT, from_json_object
from sparsify.quantization import read_weights
from sparsify.quantization.attention import FORMS, disable_fast_path, quantize_attention
from sparsify.quantization.conversion import convert_, is_channel_affine, is_norm_and_more, is_weighted, restore_layers
from sparsify.quantization.fake_quantize import FakeQuantize
from sparsify.quantization.fixed_and_shared import FIXED, FixedQuantize, SameGrid
from sparsify.quantization.forward_ops import (
    Watched,
    WatchedAffine,
    asleep,
    note_reads,
    reads_of,
    switch_off,
    switched_off,
    watch,
    watch_activation,
)
from sparsify.quantization.layers import WEIGHTED, QuantizedLayer, QuantizedNorm
from sparsify.quantization.learned_step import LearnedQuantize
from sparsify.quantization.observers import Observer
from sparsify.quantization.recurrent import RECURRENT_FORMS, QuantizedRecurrent, is_recurrent
from sparsify.quantization.straight_through import GATES
from sparsify.quantization.weight_grid import WEIGHT_STEP, learned_step, weight_of
from sparsify.quantization.wiring import Converted, add_child, wiring_of

__all__: list[str] = []

PLAN_FORMAT = 1
"""The version of a plan's state."""
UNQUANTIZED = "_unquantized"
"""The attribute of a quantized model with what stays in float: {what: why}."""
_SAVED_NAMES = {"q_max": "largest", "fused_relu": "relu", "shared_with": "like"}
"""Field -> its name in a saved state, where the two differ."""


@dataclass(frozen=True)
class QuantizerSite:
    """One quantized tensor, and the quantizer that stands there.

    Attributes:
        module: the module that holds the quantizer.
        child: the name of the quantizer in `module`.
        bits: of the integers.
        symmetric: whether the integers are signed, with zero point 0.
        averaging_constant: the share of a batch in the moving range.
        readers: layers that call the quantizer on their input, besides `module`.
        fused_relu: whether the quantizer clamps at 0 in place of the ReLU behind it.
        ceiling: where the ReLU is cut off (ReLU6); None: nowhere.
        in_place: whether the quantizer alone reads the tensor.
        producer: the module whose hooks could have kept the tensor.
        gate: the activation that the quantizer does, "silu" or "hardswish".
        shared_with: the name of the site whose quantizer is used here too; None: it has its own.
        observer: how the range follows from the values.
        percentile: of the observer of that name.
        fixed: the function before it, where the grid is that function's: "tanh".
    """

    __pydantic_config__ = EXACT

    module: str
    child: str
    bits: int
    symmetric: bool
    averaging_constant: float
    readers: tuple[str, ...] = ()
    fused_relu: bool = False
    ceiling: float | None = None
    in_place: bool = False
    producer: str | None = None
    gate: str | None = None
    shared_with: str | None = None
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
        name: its path.
        axis: the dimension of the weight that has a scale for each index; None: one scale.
        q_max: the largest integer of a weight, 2^(bits-1) - 1; 0: the weights stay in float.
        source: the name of the quantizer site that it reads; None: it reads floats.
        norm: the BatchNorm that is folded into it.
        learned: whether its scales are parameters.
        block: number of weights along the inputs that share a scale; 0: all of them.
        affine: whether a zero point stands beside each scale, and the integers are 0..2 q_max + 1.
    """

    __pydantic_config__ = EXACT

    name: str
    axis: int | None
    q_max: int
    source: str | None
    norm: str | None
    learned: bool = False
    block: int = 0
    affine: bool = False


@dataclass(frozen=True)
class NormPlan:
    """A BatchNorm that no layer takes in: between integers it is a layer of its own, one weight for each channel.

    Attributes:
        name: its path.
        source: the name of the quantizer site that it reads.
        rank: number of dimensions of that tensor, 3 to 5.
        q_max: the largest integer, which every channel has for a weight.
        channels: number of channels; 0: as many as it has numbers.
    """

    __pydantic_config__ = EXACT

    name: str
    source: str
    rank: int
    q_max: int
    channels: int = 0


@dataclass(frozen=True)
class WeightRead:
    """A layer's parameters that another module reads in its forward.

    Attributes:
        layer: whose they are: a layer of the plan, or a BatchNorm that is folded.
        module: who multiplies with its weight or moves it, and is watched for that; None: it is read in float alone.
        lent: whether nobody calls the layer, so that it is computed there only.
    """

    __pydantic_config__ = EXACT

    layer: str
    module: str | None
    lent: bool = False


@dataclass(frozen=True)
class Unquantized:
    """A part of the model that stays in float, and why.

    Attributes:
        what: its path, or an operation and where it stands.
        why: the reason, for the user.
        unasked: whether it has weights and the recipe does not leave it out.
    """

    __pydantic_config__ = EXACT

    what: str
    why: str
    unasked: bool = False


@dataclass(frozen=True)
class QuantizationPlan:
    """All that was decided.

    Attributes:
        layers: those with quantized weights or inputs.
        sites: the quantized tensors.
        watched: the modules whose own operations are counted -> how many of each kind the trace has.
        norms: every BatchNorm, so that its statistics can be frozen, folded or not.
        slow: TransformerEncoderLayers that must not take their fused path.
        left: what stays in float, and why.
        attentions: MultiheadAttentions whose projections are layers: "<name>.in_proj", or others of `attention.FORMS`,
            and "<name>.out_proj".
        alone: the BatchNorms that compute in integers by themselves.
        places: of the watched modules, {kind: {place in the code: which operation}}, once a call showed them.
        reads: parameters that others than their layer read.
    """

    __pydantic_config__ = EXACT

    layers: tuple[LayerPlan, ...] = ()
    sites: tuple[QuantizerSite, ...] = ()
    watched: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    norms: tuple[str, ...] = ()
    slow: tuple[str, ...] = ()
    left: tuple[Unquantized, ...] = ()
    attentions: tuple[str, ...] = ()
    alone: tuple[NormPlan, ...] = ()
    # No decision: another version of the user's code has others, and the same plan.
    places: Mapping[str, Mapping[str, Mapping[str, int]]] = field(default_factory=dict, compare=False)
    reads: tuple[WeightRead, ...] = ()

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
        for parts in ("layers", "sites", "alone"):
            state[parts] = [
                {_SAVED_NAMES.get(name, name): value for name, value in part.items()} for part in state[parts]
            ]
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
            parts = {name: value for name, value in state.items() if name != "format"}
            for name in ("layers", "sites", "alone"):
                parts[name] = [_field_names(part) for part in parts.get(name, ())]
            plan = from_json_object(cls, parts)
            _refuse_impossible(plan)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise StateError(
                f"the state holds no plan of quantized layers: {error!r}. Load a manager's state."
            ) from error
        return plan

    def __str__(self) -> str:
        line = f"{len(self.layers)} layers and {len(self.sites)} tensors quantized, {len(self.folds)} BatchNorms folded"
        if self.alone:
            line += f", {len(self.alone)} layers of their own"
        return "\n".join([line, *(f"  in float: {left.what}: {left.why}" for left in self.left)])


def _plain_state(value: object) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain_state(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_state(one) for one in value]
    return value


def _field_names(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a saved state by the names of the fields."""
    names = {old: new for new, old in _SAVED_NAMES.items()}
    return {names.get(name, name): value for name, value in saved.items()}


def _refuse_impossible(plan: QuantizationPlan) -> None:
    """Refuses numbers and names that no plan has, with a ValueError: a state may come from anywhere."""
    for site in plan.sites:
        fits = 2 <= site.bits <= 8 and site.observer in get_args(Observer) and site.gate in (None, *GATES)
        if not (fits and site.fixed in (None, *FIXED) and site.child.endswith("_quantizer") and "." not in site.child):
            raise ValueError(f"{site} is no quantizer")
    for layer in plan.layers:
        if not (0 <= layer.q_max <= 127 and layer.block >= 0 and layer.axis in (None, 0, 1)):
            raise ValueError(f"{layer} is no layer")
    for norm in plan.alone:
        if not (1 <= norm.q_max <= 127 and 3 <= norm.rank <= 5 and norm.channels >= 0):
            raise ValueError(f"{norm} is no layer")


def check_plan(model: nn.Module, plan: QuantizationPlan, *, again: bool = False) -> None:
    """Refuses a plan that was made for another model.

    Args:
        model: which the plan is to fit.
        plan: as a state holds it.
        again: whether the model may be quantized already, by a plan that this one is to take the place of.

    Raises:
        StateError: a layer of the plan is missing or of another type.
    """
    modules: dict[str, Any] = {"": model, **named_modules(model)}
    wanted = {layer.name for layer in plan.layers} | {site.module for site in plan.sites} | set(plan.watched)
    made = {f"{name}.{one}" for name in plan.attentions for one in plan.projections(name)}
    wanted |= set(plan.norms) | set(plan.slow) | set(plan.attentions) | {norm.name for norm in plan.alone}
    wanted |= {one for site in plan.sites for one in (*site.readers, site.producer) if one is not None}
    wanted |= set(plan.folds.values()) | {one for read in plan.reads for one in (read.layer, read.module) if one}
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
        weighted = is_weighted(modules[layer.name]) or is_recurrent(modules[layer.name])
        if not weighted and not (again and isinstance(modules[layer.name], Converted)):
            raise StateError(
                f"{layer.name} is a {type(modules[layer.name]).__name__}, not one of "
                f"{', '.join(cls.__name__ for cls in (*WEIGHTED, *RECURRENT_FORMS))}: it is quantized already, or the "
                "plan is of another model."
            )
    watched = {*plan.watched, *plan.norms}
    for site in plan.sites:
        module = modules.get(site.module)
        if (
            module is not None
            and site.module not in watched
            and _is_own_class(module)
            and activation_of(module.forward) is None
        ):
            raise StateError(
                f"{site.module or 'the model'} is a {type(module).__name__}, which computes none of "
                f"{', '.join(WRITTEN)}: the plan is of another model."
            )
        if site.module in modules and site.child in modules[site.module]._modules and not again:
            raise StateError(
                f"{site.name} is there already: {type(model).__name__} is quantized, or the plan is of another model."
            )


def apply_plan(model: nn.Module, plan: QuantizationPlan) -> None:
    """Converts the layers of `model` in place as `plan` says. Parameters stay the same objects.

    Raises:
        StateError: a layer of the plan is missing or of another type; nothing is changed then.
    """
    check_plan(model, plan)
    for name in plan.attentions:
        attention: Any = named_modules(model)[name]
        quantize_attention(attention, plan.projections(name))
    modules: dict[str, Any] = {"": model, **named_modules(model)}
    for path, counts in plan.watched.items():
        watch(modules[path], counts, plan.places.get(path, {}))
    for name in plan.norms:
        if is_channel_affine(modules[name]):
            watch(modules[name], {}, form=WatchedAffine)
        elif not is_norm_and_more(modules[name]):
            convert_(modules[name])
        elif name not in plan.watched:
            watch(modules[name], {})
    for name in plan.slow:
        disable_fast_path(modules[name])
    for layer in plan.layers:
        _wire_layer(layer, modules)
    # All of them first: one that leaves the work to another may stand before it.
    quantizers = {site.name: _made_quantizer(site, modules) for site in plan.sites if site.shared_with is None}
    for site in plan.sites:
        if site.shared_with is not None:
            quantizers[site.name] = quantizers[site.shared_with]
        _place_quantizer(site, modules, quantizers[site.name])
    for layer in plan.layers:
        if layer.source is not None:
            wiring_of(modules[layer.name]).source = quantizers[layer.source]
    _note_reads(plan, modules)
    for norm in plan.alone:
        wiring = wiring_of(modules[norm.name])
        wiring.source, wiring.rank, wiring.q_max = quantizers[norm.source], norm.rank, norm.q_max
        wiring.channels = norm.channels
    setattr(model, UNQUANTIZED, {left.what: left.why for left in plan.left})
    if added_keys_last not in model._state_dict_hooks.values():
        model._register_state_dict_hook(added_keys_last)  # type: ignore[no-untyped-call]


def added_keys_last(module: nn.Module, state: MutableMapping[str, Any], prefix: str, metadata: object) -> None:
    """A hook of a quantized model's state_dict: what quantization has added stands behind the model's own keys.

    Averages of weights pair two state_dicts by position (ModelEmaV2 and V3 of timm). A function of the model alone, so
    that a copy of the model, which has its hooks, gives the same order.
    """
    added = {
        f"{prefix}{path}.{child}" if path else f"{prefix}{child}"
        for path, layer in module.named_modules()
        if isinstance(layer, Converted)
        for child in wiring_of(layer).children
    }
    for key in [key for key in state if _lies_in(key.rpartition(".")[0], added)]:
        state[key] = state.pop(key)


def _lies_in(path: str, paths: Container[str]) -> bool:
    while path:
        if path in paths:
            return True
        path = path.rpartition(".")[0]
    return False


def undo_plan(model: nn.Module) -> None:
    """The inverse of `apply_plan`: classes, children and attributes below `model` are as they were before."""
    restore_layers(model)
    model.__dict__.pop(UNQUANTIZED, None)
    for number, hook in list(model._state_dict_hooks.items()):
        if hook is added_keys_last:
            del model._state_dict_hooks[number]


def _note_reads(plan: QuantizationPlan, modules: Mapping[str, nn.Module]) -> None:
    """Tells layers that their parameters are read by others, and those who multiply with them whose they are."""
    readers: dict[str, list[Converted]] = {}
    for read in plan.reads:
        layer = modules[read.layer]
        assert isinstance(layer, Converted)
        wiring_of(layer).read, wiring_of(layer).lent = True, read.lent
        if read.module is not None:
            readers.setdefault(read.module, []).append(layer)
    for name, layers in readers.items():
        module = modules[name]
        assert isinstance(module, Watched)
        note_reads(module, tuple(layers))


def _wire_layer(layer: LayerPlan, modules: Mapping[str, nn.Module]) -> None:
    """Converts one layer, and links it to the grid of its weights and to its BatchNorm."""
    module = modules[layer.name]
    wiring = convert_(module)
    wiring.axis, wiring.q_max, wiring.block = layer.axis, layer.q_max, layer.block
    wiring.affine = layer.affine
    if layer.learned:
        add_child(module, WEIGHT_STEP, learned_step(weight_of(module), wiring))
    if layer.norm is not None:
        norm = modules[layer.norm]
        assert isinstance(norm, QuantizedNorm)
        wiring.norm = norm
        wiring_of(norm).layer = module


def _made_quantizer(site: QuantizerSite, modules: Mapping[str, nn.Module]) -> FakeQuantize:
    """The quantizer of one site that has its own."""
    module = modules[site.module]
    made: Callable[..., FakeQuantize] = LearnedQuantize if site.observer == "lsq" else FakeQuantize
    if site.fixed is not None:
        made = partial(FixedQuantize, function=site.fixed)
    quantizer = made(
        site.name,
        bits=site.bits,
        symmetric=site.symmetric,
        averaging_constant=site.averaging_constant,
        relu=site.fused_relu,
        ceiling=math.inf if site.ceiling is None else site.ceiling,
        in_place=site.in_place,
        gate=site.gate,
        observer=site.observer,
        percentile=site.percentile,
        producer=None if site.producer is None else modules[site.producer],
    )
    return quantizer.to(_device(module, modules[""])).train(module.training)


def _place_quantizer(site: QuantizerSite, modules: Mapping[str, nn.Module], quantizer: FakeQuantize) -> None:
    """Puts the quantizer of one site in its place; where it is that of another site, what leaves the work to it."""
    module = modules[site.module]
    if _is_own_class(module):
        watch_activation(module)
    convert_(module)
    if site.shared_with is not None:
        add_child(module, site.child, SameGrid(quantizer))
        return
    add_child(module, site.child, quantizer)
    for reader in site.readers:
        wiring_of(modules[reader]).shared = quantizer
    if site.readers:
        quantizer.readers = 1 + len(site.readers)


def _is_own_class(module: nn.Module) -> bool:
    """True for a module of a user's class that is no layer, and not watched."""
    torchs = class_before_sharding(module).__module__.startswith("torch.nn.")
    return not (torchs or isinstance(module, Converted) or is_weighted(module))


def unquantized(model: nn.Module) -> dict[str, str]:
    """{what stays in float in a quantized model: why}; empty for a model that is not quantized."""
    came_otherwise = "its operations came otherwise in training than in the trace"
    off = {name or "the model": came_otherwise for name in switched_off(model)}
    sleeping = dict.fromkeys(asleep(model), "training has not come to this operation so far")
    return {**getattr(model, UNQUANTIZED, {}), **off, **sleeping}


def check_traced_ops(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Runs a freshly quantized model once, without rounding, to see that watched operations come as traced.

    Scripted functions and direct calls of operators are seen by the trace and not in training. Gives the paths of
    modules whose operations now stay in float. Training modes, random states and buffers are as before.
    """
    if not any(isinstance(m, Watched) and (m.counts_operations or reads_of(m)) for m in model.modules()):
        return []
    with preserved(model), torch.no_grad():
        eval_mode_(model)
        # Not through __call__: this may run inside a hook of that very call.
        with read_weights.seen_calls() as seen:
            call_within(model)(*args, **kwargs)
    for module in model.modules():
        # A function of torch may compute with a weight in its insides, where nobody sees it.
        if isinstance(module, Watched) and any(wiring_of(m).lent and id(m) not in seen for m in reads_of(module)):
            switch_off(module)
    return switched_off(model)


def _device(module: nn.Module, model: nn.Module) -> torch.device:
    tensors: list[Tensor] = [*module.parameters(), *module.buffers(), *model.parameters()]
    return tensors[0].device if tensors else torch.device("cpu")


def is_quantized(model: nn.Module) -> bool:
    """True if some layer of `model` computes with quantized weights or activations."""
    return any(isinstance(module, (QuantizedLayer, QuantizedRecurrent, FakeQuantize)) for module in model.modules())
