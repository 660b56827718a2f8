"""Removal of channels from parameters, buffers, gradients, the optimizer's state and the layers' own numbers.

`plan_removal` gives the new form of every tensor and number, and touches nothing; `remove` acts, all or nothing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS

from sparsify.errors import ArgumentError, StateError, did_you_mean
from sparsify.model.optimizer_parts import parts_with_state
from sparsify.model.optimizer_state import is_packed
from sparsify.model.targets import named_modules
from sparsify.model.wrappers import by_clean_name, is_distributed
from sparsify.pruning.groups import ChannelGroups
from sparsify.pruning.resized import note_resized, own_shapes

__all__: list[str] = []

PrunedChannels = Mapping[str, Collection[int]]
"""{channel group: its channels that go}."""


@dataclass(frozen=True)
class Removal:
    """The new form of a model without some channels. Plain data: it can be saved, and applied to a copy.

    Attributes:
        keep: {parameter or buffer: {dimension: int64 indices that stay}}.
        attributes: {module: {attribute: value}}, "" being the model itself: in_channels, num_heads, ...
        config: values of the model's Hugging Face config, which is replaced by a changed copy.
        before, after: the shapes of the tensors in `keep`.
    """

    keep: Mapping[str, Mapping[int, Tensor]]
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    before: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    after: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors."""
        return {
            "keep": {name: {str(d): index for d, index in dims.items()} for name, dims in self.keep.items()},
            "attributes": {
                path: {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
                for path, values in self.attributes.items()
            },
            "config": dict(self.config),
            "before": {name: list(shape) for name, shape in self.before.items()},
            "after": {name: list(shape) for name, shape in self.after.items()},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Removal:
        """The removal that `state_dict` was called on."""
        return cls(
            keep={name: {int(d): index for d, index in dims.items()} for name, dims in state["keep"].items()},
            attributes={
                path: {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
                for path, values in state["attributes"].items()
            },
            config=dict(state["config"]),
            before={name: tuple(shape) for name, shape in state["before"].items()},
            after={name: tuple(shape) for name, shape in state["after"].items()},
        )


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by clean name; a tied one under each of its names."""
    pairs = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return by_clean_name(pairs)


def plan_removal(model: nn.Module, channel_groups: ChannelGroups, pruned: PrunedChannels) -> Removal:
    """The new form of `model` without the channels in `pruned`. Touches nothing.

    Raises:
        ArgumentError: no such channel group or channel, or no channel of a channel group would be left.
        StateError: the channel groups are of a model with other shapes.
    """
    here = tensors(model)
    cut: dict[str, dict[int, set[int]]] = {}
    for name, channels in pruned.items():
        group = channel_groups.groups.get(name)
        if group is None:
            raise ArgumentError(f"{name!r} is no channel group.{did_you_mean(name, channel_groups.groups)}")
        wrong = [c for c in channels if not 0 <= c < group.size]
        if wrong:
            raise ArgumentError(f"{name!r} has channels 0 to {group.size - 1}, not {wrong[0]}.")
        lost = set(channels)
        if len(lost) == group.size:
            raise ArgumentError(f"all {group.size} channels of {name!r} would be removed; keep at least one.")
        for member in group.members if lost else ():
            size = tuple(here[member.tensor].shape) if member.tensor in here else ()
            if len(size) <= member.dim or size[member.dim] != len(member.channels):
                raise StateError(
                    f"{member.tensor!r} has shape {size}, but {len(member.channels)} slices were found along "
                    f"dimension {member.dim}: the model was changed since. Find channel groups anew."
                )
            slices = cut.setdefault(member.tensor, {}).setdefault(member.dim, set())
            slices.update(i for i, channel in enumerate(member.channels) if channel in lost)
    keep: dict[str, dict[int, Tensor]] = {}
    before: dict[str, tuple[int, ...]] = {}
    after: dict[str, tuple[int, ...]] = {}
    for name, dims in cut.items():
        shape = list(here[name].shape)
        before[name] = tuple(shape)
        keep[name] = {}
        for dim, slices in sorted(dims.items()):
            keep[name][dim] = torch.tensor([i for i in range(shape[dim]) if i not in slices], dtype=torch.int64)
            shape[dim] = len(keep[name][dim])
        if not all(shape[dim] for dim in dims):
            raise ArgumentError(f"nothing of {name!r} would be left: {before[name]} becomes {tuple(shape)}.")
        after[name] = tuple(shape)
    attributes = _layer_attributes(model, keep, after)
    attributes |= numbers_in_code(model, channel_groups, pruned)
    return Removal(keep, attributes, _config(model, channel_groups, pruned), before, after)


# ---------------------------------------------------------------------- numbers that follow shapes


def _conv_attributes(layer: nn.modules.conv._ConvNd, weight: tuple[int, ...], groups: int) -> dict[str, Any]:
    if layer.transposed:
        return {"in_channels": weight[0], "out_channels": weight[1] * groups, "groups": groups}
    return {"in_channels": weight[1] * groups, "out_channels": weight[0], "groups": groups}


def _layer_attributes(
    model: nn.Module, keep: Mapping[str, Mapping[int, Tensor]], after: Mapping[str, tuple[int, ...]]
) -> dict[str, dict[str, Any]]:
    """The new in_channels and the like of layers whose weights shrink."""
    changed = {id(t): name for name, t in tensors(model).items() if name in keep}
    found: dict[str, dict[str, Any]] = {}
    for path, layer in {"": model, **named_modules(model)}.items():
        own = {
            key: changed[id(value)]
            for key, value in [*layer._parameters.items(), *layer._buffers.items()]
            if value is not None and id(value) in changed
        }
        if not own:
            continue
        shape = after[own["weight"]] if "weight" in own else ()
        first = next(iter(own.values()))
        values: dict[str, Any] = {}
        if isinstance(layer, nn.modules.conv._ConvNd) and shape:
            old = layer.weight.shape[0]
            # Of group convolutions whole groups go: the first dimension of the weight tells how many are left.
            groups = layer.groups * shape[0] // old if layer.groups > 1 else 1
            values = _conv_attributes(layer, shape, groups)
        elif isinstance(layer, nn.Linear) and shape:
            values = {"in_features": shape[1], "out_features": shape[0]}
        elif isinstance(layer, nn.modules.batchnorm._NormBase):
            values = {"num_features": after[first][0]}
        elif isinstance(layer, nn.GroupNorm):
            channels = after[first][0]
            values = {"num_groups": layer.num_groups * channels // layer.num_channels, "num_channels": channels}
        elif isinstance(layer, nn.LayerNorm | nn.RMSNorm):
            values = {"normalized_shape": tuple(after[first])}
        elif isinstance(layer, nn.PReLU):
            values = {"num_parameters": after[first][0]}
        elif isinstance(layer, nn.Embedding | nn.EmbeddingBag) and shape:
            values = {"num_embeddings": shape[0], "embedding_dim": shape[1]}
        elif shape and hasattr(layer, "nx") and hasattr(layer, "nf"):
            values = {"nx": shape[0], "nf": shape[1]}
        values = {key: value for key, value in values.items() if getattr(layer, key, value) != value}
        if values:
            found[path] = values
    return found


_FIXED = ("head_dim", "head_size", "per_head", "window", "d_kv", "kernel", "stride", "padding", "dilation", "patch")
"""Parts of names of numbers that do not follow a count of channels: the size of one head, geometry."""


def numbers_in_code(
    model: nn.Module, channel_groups: ChannelGroups, pruned: PrunedChannels
) -> dict[str, dict[str, Any]]:
    """The integers that a user's modules hold, equal to a size in their own forward that changes, with the new size.

    A number that several sizes explain, with different results, is left alone: the dry run decides.
    """
    lost = {(name, channel) for name, channels in pruned.items() for channel in channels}
    sizes: dict[str, dict[int, set[int]]] = {}
    for size in channel_groups.traced_sizes:
        left = sum(channel not in lost for channel in size.channels)
        sizes.setdefault(size.module, {}).setdefault(len(size.channels), set()).add(left)
    modules = {"": model, **named_modules(model)}
    found: dict[str, dict[str, Any]] = {}
    for path, by_size in sizes.items():
        module = modules.get(path)
        # Layers of torch, and those made from them, have their numbers from their weights.
        if module is None or any(cls.__module__.startswith("torch.nn.modules.") for cls in type(module).__mro__[:-2]):
            continue
        if hasattr(module, "nx") and hasattr(module, "nf"):
            continue
        for name, value in vars(module).items():
            # all_head_size, in the manner of BERT, is the size of all heads together.
            fixed = any(part in name.replace("all_head_size", "") for part in _FIXED)
            if type(value) is not int or name in channel_groups.constants or fixed:
                continue
            left_over = by_size.get(value, set())
            if len(left_over) == 1 and value not in left_over:
                found.setdefault(path, {})[name] = next(iter(left_over))
    return found


_COLUMNS = ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim")
_HEADS = ("num_attention_heads", "num_key_value_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads")


def _config(model: nn.Module, channel_groups: ChannelGroups, pruned: PrunedChannels) -> dict[str, Any]:
    """The new values of a Hugging Face config.

    Only where one value is true for all layers. The number of heads only where the config tells the size of a head as
    well: elsewhere that size is computed as hidden size / heads, and another number would build another model.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return {}
    found: dict[str, Any] = {}
    for kind, names in (("linear", _COLUMNS), ("heads", _HEADS)):
        left: dict[int, set[int]] = {}
        for name, group in channel_groups.groups.items():
            if group.kind == kind:
                left.setdefault(group.size, set()).add(group.size - len(set(pruned.get(name, ()))))
        told = any(isinstance(vars(config).get(size), int) for size in ("head_dim", "d_kv"))
        for name in names:
            value = vars(config).get(name)
            if name == "n_inner" and value is None and name in vars(config):
                value = 4 * getattr(config, "hidden_size", 0)
            if type(value) is not int or (kind == "heads" and not told):
                continue
            if kind == "heads" and name == "num_attention_heads" and "num_key_value_heads" in vars(config):
                # A channel group is a head of keys with its heads of queries.
                shared = vars(config)["num_key_value_heads"]
                if shared and len(left.get(shared, ())) == 1:
                    found[name] = value // shared * next(iter(left[shared]))
                continue
            if len(left.get(value, ())) == 1 and value not in left[value]:
                found[name] = next(iter(left[value]))
    return {name: value for name, value in found.items() if vars(config).get(name) != value}


# ---------------------------------------------------------------------- in place


def remove(model: nn.Module, removal: Removal, optimizer: Any = None) -> None:
    """Removes channels in place, all or nothing. Parameters stay the objects that they are; tied ones stay tied.

    Call it between steps: after `optimizer.step()` and before the next forward. A loss that is still held can no
    longer be back-propagated. The state of the optimizer, or of several in a list, is cut along: every tensor of it
    that has the parameter's dimensions; the history of LBFGS, in the space of all weights, is cleared. Adafactor
    divides by the number of weights, and goes on along another path than masked training would.

    Raises:
        StateError: the model has other shapes, or is wrapped by DistributedDataParallel or FSDP.
    """
    _check_removable(model, removal)
    here = tensors(model)
    modules = {"": model, **named_modules(model)}
    several = optimizer if isinstance(optimizer, list | tuple) else () if optimizer is None else (optimizer,)
    parts = [part for one in several for part in parts_with_state(one)]
    optimizers = list({id(part.state): part for part in parts}.values())
    sizes = own_shapes(model)
    with torch.no_grad():
        # All that can fail comes first: from here on objects are only put in their places.
        parameters: list[tuple[Tensor, Tensor, Tensor | None]] = []
        buffers: dict[int, Tensor] = {}
        for name, dims in removal.keep.items():
            old, new = here[name], _cut(here[name], dims)
            if isinstance(old, nn.Parameter):
                parameters.append((old, new, None if old.grad is None else _cut(old.grad, dims)))
            else:
                buffers[id(old)] = new
        states = [cut for one in optimizers for cut in _cut_states(one, here, removal)]
    undo: list[Callable[[], None]] = []
    try:
        for old, new, grad in parameters:
            _replace_parameter(old, new, grad, undo)
        _replace_buffers(model, buffers, undo)
        for state, key, cut in states:
            undo.append(_setter(state, key, state[key]))
            if cut is None:
                del state[key]
            else:
                state[key] = cut
        for path, values in removal.attributes.items():
            for key, value in values.items():
                undo.append(_setter(modules[path].__dict__, key, getattr(modules[path], key)))
                setattr(modules[path], key, value)
        if removal.config:
            _replace_config(model, removal.config, undo)
        note_resized(model, sizes, removal.attributes, removal.config, undo)
    except BaseException:
        for back in reversed(undo):
            back()
        raise
    for inner in optimizers:
        if isinstance(inner, LBFGS):
            # After the rest: it cannot fail, and is not undone.
            for state in inner.state.values():
                state.clear()
            # The number of all weights, which LBFGS counts once (torch 2.13.0); needless once it counts at every step.
            inner._numel_cache = None


def _check_removable(model: nn.Module, removal: Removal) -> None:
    """Refuses a model that channels cannot be removed from, or that has other shapes."""
    if is_distributed(model) or any(hasattr(p, "placements") for p in model.parameters()):
        raise StateError(
            "channels cannot be removed under a live DistributedDataParallel or FSDP wrapper, which holds buffers of "
            "the old shapes: unwrap, shrink, wrap again."
        )
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise StateError("channels cannot be removed from a scripted module; shrink the model it was made from.")
    here = tensors(model)
    for name, shape in removal.before.items():
        if name not in here:
            raise StateError(f"{type(model).__name__} has no {name!r} to remove channels from.")
        if tuple(here[name].shape) != tuple(shape):
            raise StateError(
                f"{name!r} has shape {tuple(here[name].shape)}, but channels are to be removed from {tuple(shape)}."
            )
    modules = {"", *named_modules(model)}
    absent = [path for path in removal.attributes if path not in modules]
    if absent:
        raise StateError(f"{type(model).__name__} has no module {absent[0]!r}.")


def _cut_states(
    optimizer: Any, here: Mapping[str, Tensor], removal: Removal
) -> list[tuple[MutableMapping[Any, object], Any, object]]:
    """(state of a parameter, key, its cut value) for all that an optimizer keeps in a parameter's dimensions; (all
    states, parameter, None) where the state of a parameter is to be forgotten."""
    states = getattr(optimizer, "state", None)
    if not isinstance(states, MutableMapping):
        return []
    found: list[tuple[MutableMapping[Any, object], Any, object]] = []
    for name, dims in removal.keep.items():
        # Not `states[...]`: it is a defaultdict, and an optimizer takes an empty entry for one that was set up.
        state = states.get(here[name]) or {}
        if any(is_packed(value) for value in state.values() if isinstance(value, Tensor)):
            # Numbers in other forms (8-bit codes with scales of blocks) cannot be cut: the optimizer begins anew.
            found.append((states, here[name], None))
            continue
        for key, value in state.items():
            cut = _cut_state(value, here[name], dims)
            if cut is not value:
                found.append((states[here[name]], key, cut))
    return found


def _replace_parameter(parameter: Tensor, value: Tensor, grad: Tensor | None, undo: list[Callable[[], None]]) -> None:
    old, old_grad = parameter.data, parameter.grad
    undo.append(lambda: _set_data(parameter, old, old_grad))
    _set_data(parameter, value, grad)


def _replace_buffers(model: nn.Module, buffers: Mapping[int, Tensor], undo: list[Callable[[], None]]) -> None:
    """Replaces every buffer whose id is in `buffers`, under all names that it has."""
    for module in model.modules():
        for key, value in module._buffers.items():
            if value is not None and id(value) in buffers:
                undo.append(_setter(module._buffers, key, value))
                module._buffers[key] = buffers[id(value)]


def _replace_config(model: nn.Module, values: Mapping[str, Any], undo: list[Callable[[], None]]) -> None:
    """Gives all modules that share the model's config a changed copy; the user's own object stays as it is."""
    config = getattr(model, "config", None)
    changed = copy.deepcopy(config)
    for key, value in values.items():
        setattr(changed, key, value)
    for module in model.modules():
        if module.__dict__.get("config") is config:
            undo.append(_setter(module.__dict__, "config", config))
            module.__dict__["config"] = changed


def _cut(tensor: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    """The slices that stay, in memory of their own and laid out as before."""
    strides = tensor.stride()
    last = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
    channels_last = (
        tensor.dim() in (4, 5)
        and tensor.is_contiguous(memory_format=last)
        and strides[1] == 1
        and not tensor.is_contiguous()
    )
    cut = tensor.detach()
    for dim, index in dims.items():
        cut = cut.index_select(dim, index.to(tensor.device))
    return cut.contiguous(memory_format=last) if channels_last else cut


def _cut_state(value: object, parameter: Tensor, dims: Mapping[int, Tensor]) -> object:
    """A value of an optimizer's state, cut where it has the parameter's dimension at its size."""
    if not isinstance(value, Tensor) or value.dim() != parameter.dim() or value.dim() == 0:
        return value
    fits = {d: index for d, index in dims.items() if value.shape[d] == parameter.shape[d]}
    return _cut(value, fits) if fits else value


def _set_data(parameter: Tensor, value: Tensor, grad: Tensor | None) -> None:
    """Gives a parameter another shape without making another object of it.

    A loss that is still held keeps the node that accumulates this parameter's gradient, with its old shape, and the
    next backward would fail on it. A change of type in between makes torch forget that node
    (https://github.com/pytorch/pytorch/issues/33941, seen in torch 2.13.0; needless once a new shape of `.data` does).
    """
    parameter.grad = None
    other = torch.float16 if value.dtype != torch.float16 else torch.float32
    parameter.data = torch.empty(0, dtype=other, device=value.device)
    parameter.data = value
    parameter.grad = grad


def _setter(where: MutableMapping[Any, Any], key: Any, value: object) -> Callable[[], None]:
    def back() -> None:
        where[key] = value

    return back


def parameter_count(model: nn.Module) -> int:
    """The number of weights of a model; tied ones once."""
    return sum(math.prod(p.shape) for p in model.parameters())
