"""The structure of a compressed model, all but the values of its tensors: as plain data, and put onto a fresh model.

Everything is read from the model itself, so that it does not matter who made it: a recipe in training or at once,
`shrink`, `quantize_model`, a checkpoint, and whatever was done by hand in between.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sparsify.errors import StateError
from sparsify.model.made_weights import makers
from sparsify.model.targets import named_modules
from sparsify.model.wrappers import by_clean_name, clean_name
from sparsify.output.json_values import EXACT_AND_FINITE
from sparsify.output.tensor_files import DTYPES, dtype_name
from sparsify.pruning.removal import Removal, remove
from sparsify.pruning.resized import resized_of
from sparsify.pruning.skipped_layers import Skipped, known_entries, skip
from sparsify.quantization.fake_quantize import FakeQuantize
from sparsify.quantization.forward_ops import asleep, put_to_sleep, switch_off_all, switched_off
from sparsify.quantization.learned_step import LearnedStep
from sparsify.quantization.observers import HISTOGRAMS
from sparsify.quantization.plan import UNQUANTIZED, QuantizationPlan, apply_plan, check_plan, is_quantized
from sparsify.quantization.plan_of_model import quantization_of
from sparsify.quantization.weight_grid import WEIGHT_STEP
from sparsify.quantization.wiring import Converted, wiring_of

__all__: list[str] = []

Number = int | tuple[int, ...]


@dataclass(frozen=True)
class SavedTensor:
    """One parameter or buffer.

    Attributes:
        kind: "cache" is a buffer that a state_dict leaves out.
        dtype: as in `DTYPES`.
        shape: of the tensor.
        trained: whether it has gradients.
        strides: where its values do not lie in the order of its dimensions, as in channels_last.
        same_as: the name under which the very same object stands too, and its values are saved.
        memory_of: the name of another object in the same memory, whose values are saved.
    """

    __pydantic_config__ = EXACT_AND_FINITE

    kind: Literal["parameter", "buffer", "cache"]
    dtype: str
    shape: tuple[int, ...]
    trained: bool = False
    strides: tuple[int, ...] | None = None
    same_as: str | None = None
    memory_of: str | None = None


@dataclass(frozen=True)
class SavedSizes:
    """The sizes that removals have changed: see `sparsify.pruning.resized.Resized`."""

    __pydantic_config__ = EXACT_AND_FINITE

    shapes: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, Number]] = field(default_factory=dict)
    config: Mapping[str, Mapping[str, Number]] = field(default_factory=dict)


@dataclass(frozen=True)
class SavedQuantization:
    """Quantized layers, and what training has switched in them.

    Attributes:
        plan: a `QuantizationPlan`, as its `to_state` gives it.
        operations_off: the modules whose own operations stay in float, since they came otherwise than traced.
        asleep: the quantizers of operations that training did not come to so far.
        settled: the quantizers of activations and of weights whose ranges do not move.
        idle: the quantizers that round nothing.
        unrounded: the layers whose weights are not rounded.
        frozen_norms: the BatchNorms that train on their running statistics.
        floating: {a part that was quantized by itself: {what stays in float in it: why}}.
    """

    __pydantic_config__ = EXACT_AND_FINITE

    plan: Mapping[str, Any]
    operations_off: tuple[str, ...] = ()
    asleep: tuple[str, ...] = ()
    settled: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    unrounded: tuple[str, ...] = ()
    frozen_norms: tuple[str, ...] = ()
    floating: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class SavedStructure:
    """A model without its values.

    Attributes:
        tensors: every parameter and buffer, under each of its names.
        sizes: what was removed.
        identities: {a layer that was replaced by the identity: form of its output, see `skipped_layers.Skip`}.
        quantized: the quantized layers; None: there are none.
        training: whether the model is in training mode.
        other_mode: the modules that are in the other mode.
        extra: {module: what its `get_extra_state` gave}.
    """

    __pydantic_config__ = EXACT_AND_FINITE

    tensors: Mapping[str, SavedTensor]
    sizes: SavedSizes
    identities: Mapping[str, int | None]
    quantized: SavedQuantization | None
    training: bool
    other_mode: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------------- read


def structure_of(model: nn.Module) -> SavedStructure:
    """The structure of a model, wrappers looked through.

    Raises:
        StateError: something of it cannot be saved, by name.
    """
    modules = {"": model, **named_modules(model)}
    if trained := next(iter(makers(model)), None):
        raise StateError(
            f"save_model: {trained!r} is on a palette that still trains. Call finalize() of the manager first: weights "
            "hold the values of their palettes then."
        )
    sizes = resized_of(model)
    return SavedStructure(
        tensors=_tensors_of(model),
        sizes=SavedSizes(sizes.shapes, sizes.attributes, sizes.config),
        identities={name: known_entries(module) for name, module in modules.items() if isinstance(module, Skipped)},
        quantized=_quantization(model, modules) if any(isinstance(m, Converted) for m in modules.values()) else None,
        training=model.training,
        other_mode=tuple(name for name, module in modules.items() if module.training != model.training),
        extra={name: _extra(module, name) for name, module in modules.items() if _has_extra(module)},
    )


def saved_values(model: nn.Module, structure: SavedStructure) -> dict[str, Tensor]:
    """The tensors whose values are saved, by name: of several that are one, the first."""
    here = {name: tensor for name, tensor, _ in _places(model)}
    return {name: here[name] for name in stored_names(structure)}


def stored_names(structure: SavedStructure) -> list[str]:
    """The names of the tensors whose values are saved."""
    return [n for n, t in structure.tensors.items() if t.same_as is None and t.memory_of is None]


def _places(model: nn.Module) -> Iterator[tuple[str, Tensor, str]]:
    """(clean name, tensor, kind) of every parameter and buffer, under each of its names."""
    hidden = {
        f"{path}.{key}" if path else key
        for path, module in model.named_modules(remove_duplicate=False)
        for key in getattr(module, "_non_persistent_buffers_set", ())
    }
    parameters = by_clean_name(model.named_parameters(remove_duplicate=False))
    yield from ((name, parameter, "parameter") for name, parameter in parameters.items())
    raw = dict(model.named_buffers(remove_duplicate=False))
    hidden_ids = {clean_name(name) for name in hidden}
    for name, buffer in by_clean_name(raw.items()).items():
        yield name, buffer, "cache" if name in hidden_ids else "buffer"


def _tensors_of(model: nn.Module) -> dict[str, SavedTensor]:
    found: dict[str, SavedTensor] = {}
    objects: dict[int, str] = {}
    memory: dict[tuple[Any, ...], str] = {}
    for name, tensor, kind in _places(model):
        _refuse_unsavable(name, tensor)
        first = objects.setdefault(id(tensor), name)
        lies = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device)
        owner = memory.setdefault(lies, first) if tensor.numel() else first
        found[name] = SavedTensor(
            kind,  # type: ignore[arg-type]
            dtype_name(tensor),
            tuple(tensor.shape),
            trained=tensor.requires_grad and kind == "parameter",
            strides=_own_strides(tensor),
            same_as=None if first == name else first,
            memory_of=None if owner == first or first != name else owner,
        )
    return found


def _refuse_unsavable(name: str, tensor: Tensor) -> None:
    why = None
    if is_lazy(tensor):
        why = "has no shape yet (a lazy module): run one batch through the model first"
    elif hasattr(tensor, "placements"):
        why = "is sharded over ranks: gather the model on one rank first (torch.distributed.checkpoint.state_dict)"
    elif tensor.is_meta:
        why = "is on the meta device and has no values"
    elif type(tensor.data) is not Tensor or tensor.layout != torch.strided or dtype_name(tensor) not in DTYPES:
        kind = type(tensor.data).__name__ if type(tensor.data) is not Tensor else f"{tensor.layout} {tensor.dtype}"
        why = f"is a {kind}, which safetensors has no form for: give the model with plain tensors"
    if why is not None:
        raise StateError(f"save_model: {name!r} {why}.")


def _own_strides(tensor: Tensor) -> tuple[int, ...] | None:
    """The strides of a tensor that fills its memory in another order than that of its dimensions."""
    if tensor.is_contiguous() or not fills_memory(tuple(tensor.shape), tensor.stride()):
        return None
    return tuple(tensor.stride())


def fills_memory(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """True if a tensor of this form has every place of its memory once.

    >>> fills_memory((2, 3), (1, 2)), fills_memory((2, 3), (6, 1)), fills_memory((2, 3), (0, 1))
    (True, False, False)
    """
    if len(shape) != len(strides):
        return False
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _quantization(model: nn.Module, modules: Mapping[str, nn.Module]) -> SavedQuantization:
    plan = quantization_of(model).to_state()
    converted = {name: wiring_of(module) for name, module in modules.items() if isinstance(module, Converted)}
    return SavedQuantization(
        plan={**plan, "left": []},
        operations_off=tuple(switched_off(model)),
        asleep=tuple(asleep(model)),
        settled=tuple(n for n, m in modules.items() if isinstance(m, FakeQuantize | LearnedStep) and not m.observing),
        idle=tuple(n for n, m in modules.items() if isinstance(m, FakeQuantize) and not m.enabled),
        unrounded=tuple(name for name, wiring in converted.items() if not wiring.enabled),
        frozen_norms=tuple(name for name, wiring in converted.items() if wiring.frozen),
        floating={name: dict(m.__dict__[UNQUANTIZED]) for name, m in modules.items() if UNQUANTIZED in m.__dict__},
    )


def _has_extra(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state


def _extra(module: nn.Module, name: str) -> Any:
    state = module.get_extra_state()
    try:
        if json.loads(json.dumps(state, allow_nan=False)) == state:
            return state
    except (TypeError, ValueError):
        pass
    raise StateError(
        f"save_model: {name or 'the model'} is a {type(module).__name__} with an extra state of its own, a "
        f"{type(state).__name__} that JSON cannot hold as it is. Give plain values from get_extra_state, or keep it "
        "in buffers."
    )


# ---------------------------------------------------------------------- put onto a fresh model


def check_structure(model: nn.Module, structure: SavedStructure, hint: str) -> None:
    """Checks that a structure fits a model that was just built; changes nothing.

    Args:
        model: without wrappers.
        structure: as it was saved.
        hint: how the right model is built, for messages.

    Raises:
        StateError: it does not, by name.
        ValueError: it contradicts itself.
    """
    modules = {"": model, **named_modules(model)}
    _refuse_compressed(model, structure, modules)
    _check_tensors(structure)
    made: tuple[str, ...] = ()
    if structure.quantized is not None:
        plan = QuantizationPlan.from_state(structure.quantized.plan)
        check_plan(model, plan)
        made = _made_by(plan, structure)
    mine = type(model).__name__
    here = {name: (tensor, kind) for name, tensor, kind in _places(model)}
    for name, saved in structure.tensors.items():
        if name.startswith(made):
            continue
        if name not in here:
            if saved.kind == "parameter" or not _has_room(modules, name):
                raise StateError(f"the saved model has {name!r}, which this {mine} does not have. {hint}")
            continue
        tensor, kind = here[name]
        if is_lazy(tensor):
            raise StateError(f"{name!r} has no shape yet (a lazy module). Run one batch through the model first.")
        if (kind == "parameter") != (saved.kind == "parameter"):
            raise StateError(f"{name!r} is a {saved.kind} in the saved model, and a {kind} in this {mine}. {hint}")
        shapes = (*structure.sizes.shapes.get(name, ()), saved.shape)
        if tuple(tensor.shape) not in shapes and kind != "cache":
            then = " or ".join(map(str, dict.fromkeys(shapes)))
            raise StateError(f"{name!r} has shape {tuple(tensor.shape)} in this {mine}, and should have {then}. {hint}")
    for name, (_, kind) in here.items():
        if name not in structure.tensors and kind != "cache":
            raise StateError(f"this {mine} has {name!r}, which the saved model does not have. {hint}")
    _check_modules(modules, structure, hint)


def put_structure(model: nn.Module, structure: SavedStructure) -> None:
    """Gives a model that `check_structure` accepted the structure that was saved; values are not among it."""
    _shrink(model, structure.sizes, structure)
    modules = {"": model, **named_modules(model)}
    for name, entries in structure.identities.items():
        skip(modules[name], name, entries)
    if structure.quantized is not None:
        _quantize(model, structure.quantized)
    modules = {"": model, **named_modules(model)}
    others = set(structure.other_mode)
    for name, module in modules.items():
        module.training = structure.training != (name in others)


def load_values(model: nn.Module, structure: SavedStructure, values: Callable[[str], Tensor]) -> None:
    """Gives every parameter and buffer its value, type, layout and ties. Parameters stay the objects that they are,
    where they are not tied otherwise or on the meta device.

    Args:
        model: with the structure in place.
        structure: as it was saved.
        values: gives the value of a name, on the CPU.
    """
    modules = dict(by_clean_name(model.named_modules(remove_duplicate=False)))
    groups: dict[str, list[str]] = {name: [] for name, saved in structure.tensors.items() if saved.same_as is None}
    for name, saved in structure.tensors.items():
        groups[saved.same_as or name].append(name)
    home = next((t.device for t in (*model.parameters(), *model.buffers()) if not t.is_meta), torch.device("cpu"))
    used: set[int] = set()
    for name, names in groups.items():
        saved = structure.tensors[name]
        owner, key = _holder_of(modules, name)
        old = (owner._parameters if saved.kind == "parameter" else owner._buffers).get(key)
        device = home if old is None or old.is_meta else old.device
        if saved.memory_of is not None:
            first, first_key = _holder_of(modules, saved.memory_of)
            data = getattr(first, first_key).detach()
        else:
            data = _laid_out(values(name), saved, device)
        if saved.kind != "parameter":
            tensor: Tensor = data
        elif old is None or old.is_meta or id(old) in used:
            tensor = nn.Parameter(data, requires_grad=saved.trained)
        else:
            tensor = _refilled(old, data, saved.trained)
        used.add(id(tensor))
        for alias in names:
            owner, key = _holder_of(modules, alias)
            if saved.kind == "parameter":
                owner._parameters[key] = tensor  # type: ignore[assignment]
            elif key in owner._buffers:
                owner._buffers[key] = tensor
            else:
                owner.register_buffer(key, tensor, persistent=structure.tensors[alias].kind != "cache")
    for path, state in structure.extra.items():
        modules[path].set_extra_state(state)
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()


def check_loaded(model: nn.Module, structure: SavedStructure) -> None:
    """Checks that the names and shapes of a model are those that were saved.

    Raises:
        ValueError: something is left over or missing; the structure contradicts itself.
    """
    modules = {"": model, **named_modules(model)}
    here = {name: (tensor, kind) for name, tensor, kind in _places(model)}
    for name, saved in structure.tensors.items():
        if name not in here:
            if saved.kind == "parameter" or not _has_room(modules, name):
                raise ValueError(f"{name!r} belongs to no layer")
            continue
        tensor, kind = here[name]
        if tuple(tensor.shape) != saved.shape and kind != "cache":
            raise ValueError(f"{name!r} has shape {saved.shape}, and its layer one of {tuple(tensor.shape)}")
        owner = modules.get(name.rpartition(".")[0])
        if isinstance(owner, FakeQuantize | LearnedStep) and dtype_name(tensor) != saved.dtype:
            raise ValueError(f"{name!r} is {saved.dtype}, and not {dtype_name(tensor)}")
    for name, (_, kind) in here.items():
        if name not in structure.tensors and kind != "cache":
            raise ValueError(f"{name!r} has no values")


def _refuse_compressed(model: nn.Module, structure: SavedStructure, modules: Mapping[str, nn.Module]) -> None:
    skipped = [name for name, m in modules.items() if isinstance(m, Skipped) and name not in structure.identities]
    if is_quantized(model) or skipped:
        what = f"{skipped[0]!r} is replaced by the identity" if skipped else "it holds quantized layers"
        raise StateError(
            f"this {type(model).__name__} is no fresh model: {what} already. Build the model anew, as it was before "
            "it was trained, and load into that."
        )
    for name, module in modules.items():
        if any(hasattr(p, "placements") for p in module._parameters.values()):
            raise StateError(f"{name or 'the model'} is sharded over ranks. Load into the model, then shard it.")


def _check_tensors(structure: SavedStructure) -> None:
    for name, saved in structure.tensors.items():
        if saved.dtype not in DTYPES:
            raise ValueError(f"tensors.{name}: {saved.dtype!r} is no type of tensors")
        if saved.strides is not None and not fills_memory(saved.shape, saved.strides):
            raise ValueError(f"tensors.{name}: no tensor of shape {saved.shape} has the strides {saved.strides}")
        if min(saved.shape, default=0) < 0:
            raise ValueError(f"tensors.{name}: {saved.shape} is no shape")
        floats = DTYPES[saved.dtype].is_floating_point or DTYPES[saved.dtype].is_complex
        if saved.trained and not (floats and saved.kind == "parameter"):
            raise ValueError(f"tensors.{name}: a {saved.kind} of {saved.dtype} has no gradients")
        for other in (saved.same_as, saved.memory_of):
            first = None if other is None else structure.tensors.get(other)
            if other is not None and (
                first is None
                or (first.same_as, first.memory_of) != (None, None)
                or (first.kind == "parameter", first.dtype, first.shape)
                != (saved.kind == "parameter", saved.dtype, saved.shape)
            ):
                raise ValueError(f"tensors.{name}: it cannot be the same as {other!r}")


def _made_by(plan: QuantizationPlan, structure: SavedStructure) -> tuple[str, ...]:
    """The beginnings of the names of those tensors that quantization makes; each must have been saved."""
    for site in plan.sites:
        if site.shared_with is None:
            wanted = ["low", *(["histogram"] if site.observer in HISTOGRAMS else [])]
            missing = [key for key in wanted if f"{site.name}.{key}" not in structure.tensors]
            if missing:
                raise ValueError(f"tensors.{site.name}.{missing[0]} is missing")
    learned = [f"{layer.name}.{WEIGHT_STEP}." for layer in plan.layers if layer.learned]
    return (*(f"{site.name}." for site in plan.sites), *learned)


def _has_room(modules: Mapping[str, nn.Module], name: str) -> bool:
    """True if a buffer of this name can be added."""
    path, _, key = name.rpartition(".")
    return bool(key) and path in modules and (key in modules[path]._buffers or not hasattr(modules[path], key))


def _check_modules(modules: Mapping[str, nn.Module], structure: SavedStructure, hint: str) -> None:
    sizes, quantized = structure.sizes, structure.quantized
    named: list[Iterable[str]] = [structure.identities, sizes.attributes, sizes.config, structure.extra]
    if quantized is not None:
        named.append(quantized.floating)
    for names in named:
        missing = [name for name in names if name not in modules]
        if missing:
            raise StateError(
                f"the saved model has a layer {missing[0]!r}, which this {type(modules['']).__name__} does not have. "
                f"{hint}"
            )
    for path, values in sizes.attributes.items():
        for key, value in values.items():
            # Numbers only, and where there is one: nothing else of a module is changed by a file.
            if type(vars(modules[path]).get(key)) not in (int, tuple) or type(value) is not type(
                vars(modules[path])[key]
            ):
                raise StateError(f"{path or 'the model'} has no number {key!r} that could become {value}. {hint}")
    for path, values in sizes.config.items():
        config = getattr(modules[path], "config", None)
        absent = [key for key in values if key not in vars(config or object)]
        if absent:
            raise StateError(f"the config of {path or 'the model'} has no {absent[0]!r}. {hint}")


def _shrink(model: nn.Module, sizes: SavedSizes, structure: SavedStructure) -> None:
    """Gives tensors and numbers the sizes that they had, through the same door as a removal."""
    here = {name: tuple(tensor.shape) for name, tensor, _ in _places(model)}
    after = {
        name: structure.tensors[name].shape
        for name in sizes.shapes
        if name in here and name in structure.tensors and here[name] != structure.tensors[name].shape
    }
    keep = {
        name: {d: torch.arange(size) for d, size in enumerate(shape) if size != here[name][d]}
        for name, shape in after.items()
    }
    modules = {"": model, **named_modules(model)}
    attributes = {
        path: {key: value for key, value in values.items() if getattr(modules[path], key) != value}
        for path, values in sizes.attributes.items()
    }
    remove(model, Removal(keep, attributes, {}, {name: here[name] for name in after}, after))
    for path, values in sizes.config.items():
        module: Any = modules[path]
        changed = {key: value for key, value in values.items() if getattr(module.config, key) != value}
        if changed:
            remove(module, Removal({}, config=changed))


def _quantize(model: nn.Module, quantized: SavedQuantization) -> None:
    apply_plan(model, QuantizationPlan.from_state(quantized.plan))
    model.__dict__.pop(UNQUANTIZED, None)
    switch_off_all(model, quantized.operations_off)
    put_to_sleep(model, quantized.asleep)
    modules = {"": model, **named_modules(model)}
    for path, why in quantized.floating.items():
        modules[path].__dict__[UNQUANTIZED] = dict(why)
    settled, idle = set(quantized.settled), set(quantized.idle)
    for name, module in modules.items():
        if isinstance(module, FakeQuantize | LearnedStep):
            module.observing = name not in settled
        if isinstance(module, FakeQuantize):
            module.enabled = name not in idle
        if isinstance(module, Converted):
            wiring = wiring_of(module)
            wiring.enabled, wiring.frozen = name not in quantized.unrounded, name in quantized.frozen_norms


def _holder_of(modules: Mapping[str, nn.Module], name: str) -> tuple[nn.Module, str]:
    path, _, key = name.rpartition(".")
    return modules[path], key


def _laid_out(value: Tensor, saved: SavedTensor, device: torch.device) -> Tensor:
    if saved.strides is not None:
        laid = torch.empty_strided(saved.shape, saved.strides, dtype=value.dtype)
        value = laid.copy_(value)
    return value.to(device)


def _refilled(parameter: Tensor, data: Tensor, trained: bool) -> Tensor:
    parameter.grad = None
    parameter.requires_grad_(False)
    if parameter.shape != data.shape or parameter.dtype != data.dtype:
        # As in a removal: torch forgets what it knows of the old shape.
        other = torch.float16 if data.dtype != torch.float16 else torch.float32
        parameter.data = torch.empty(0, dtype=other, device=data.device)
    parameter.data = data
    parameter.requires_grad_(trained)
    return parameter
