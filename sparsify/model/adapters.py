"""Adapters that peft puts around layers of a model: the names that the layers had before, and models with adapters
merged into them. peft itself is not imported: its classes are known by their names.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from sparsify.errors import ExportError, first_line

__all__: list[str] = []

_BASE = "base_layer"
_SAVED = "modules_to_save"
# What layers have that are not merged as others are: MultiheadAttention, copies in modules_to_save, trained tokens.
_UNLOAD = "unload_and_optionally_merge_module"


def is_peft_model(model: nn.Module) -> bool:
    """True for the model that `get_peft_model` gives, which holds the user's as `base_model.model`."""
    return _of_class(model, "PeftModel") or _of_class(model, "PeftMixedModel")


def is_adapted(layer: nn.Module) -> bool:
    """True for what peft puts in the place of a layer: the layer, as `base_layer`, and adapters beside it."""
    return _of_class(layer, "BaseTunerLayer") and _BASE in layer._modules


def has_adapters(model: nn.Module) -> bool:
    """True if a layer of `model` has adapters beside it."""
    return any(is_adapted(module) for module in model.modules())


def names_without_adapters(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Other names of `names`, each with the name that it stands for: those from before peft came.

    In a model of `get_peft_model` "model.fc" is "base_model.model.model.fc"; "fc.weight" of a layer with adapters is
    "fc.base_layer.weight", and that of a layer in `modules_to_save` its trained copy.
    """
    prefix = ""
    if is_peft_model(model):
        inner = model._modules.get("base_model")
        prefix = "base_model.model." if inner is not None and "model" in inner._modules else "base_model."
    elif not has_adapters(model):
        return
    active = {name: _active(module) for name, module in model.named_modules() if _SAVED in module._modules}
    for name in names:
        found = name.replace(f".{_BASE}.", ".").removesuffix(f".{_BASE}")
        owner, saved, rest = found.partition(f".{_SAVED}.")
        if saved:
            adapter, _, own = rest.partition(".")
            if adapter not in active.get(owner, ()):
                continue
            found = f"{owner}.{own}" if own else owner
        for other in dict.fromkeys((found, found.removeprefix(prefix), name.removeprefix(prefix))):
            if other and other != name:
                yield other, name


def merged_copy(model: nn.Module) -> tuple[nn.Module, dict[str, tuple[int, int]]]:
    """A copy of `model` with its adapters merged into their layers, as it was before peft came; and the number of zeros
    of each weight that lost some in that, before and after, by its name in the copy.

    Raises:
        ExportError: peft cannot merge these adapters.
    """
    merged = copy.deepcopy(model)
    before = {id(layer.get_base_layer()): layer for layer in merged.modules() if is_adapted(layer)}  # type: ignore[operator]
    zeros = {key: _zero_counts(layer.get_base_layer()) for key, layer in before.items()}  # type: ignore[operator]
    try:
        with torch.no_grad():
            merged = merge_adapters_(merged)
    except Exception as error:
        raise ExportError(
            f"the adapters of {type(model).__name__} cannot be merged: {first_line(error)} Merge or unload them "
            "yourself (merge_and_unload(), unload()), and give the model that comes back."
        ) from error
    filled: dict[str, tuple[int, int]] = {}
    for path, layer in merged.named_modules():
        if id(layer) in zeros:
            now = _zero_counts(layer)
            filled |= {
                f"{path}.{own}": (count, now[own])
                for own, count in zeros[id(layer)].items()
                if count > now.get(own, count)
            }
    return merged, filled


def _zero_counts(layer: nn.Module) -> dict[str, int]:
    """The number of zeros in each parameter of two dimensions or more that a layer holds itself."""
    held = {own: p for own, p in layer._parameters.items() if p is not None and p.dim() > 1 and not p.is_meta}
    return {own: p.numel() - int(p.detach().count_nonzero()) for own, p in held.items()}


def merge_adapters_(model: nn.Module) -> nn.Module:
    """`model` with its adapters merged into their layers and without them: changed in place, the layers are put back
    where they were. Gives the model inside the wrapper of `get_peft_model`, where that only holds it.

    Adapters that are switched off are left out. Prompts and prefixes, which no layer can take in, stay.

    Raises:
        whatever peft raises where it cannot merge.
    """
    for parent in [module for module in model.modules() if not is_adapted(module)]:
        for own, layer in list(parent._modules.items()):
            if layer is not None and (is_adapted(layer) or hasattr(layer, _UNLOAD)):
                parent._modules[own] = _merged(layer)
    if is_peft_model(model) and _of_class(model.base_model, "BaseTuner"):
        inner = model.base_model.model  # type: ignore[union-attr]
        assert isinstance(inner, nn.Module)
        return inner
    return model


def _merged(layer: Any) -> nn.Module:
    """The layer that was there before peft, its adapters in it; as `BaseTuner.merge_and_unload` does (peft 0.21.2)."""
    on = not getattr(layer, "disable_adapters", False)
    if hasattr(layer, _UNLOAD):
        whole: nn.Module = layer.unload_and_optionally_merge_module(merge=on, safe_merge=False, adapter_names=None)
        return whole
    if on:
        layer.merge(safe_merge=False, adapter_names=None)
    elif layer.merged:
        layer.unmerge()
    base: nn.Module = layer.get_base_layer()
    return base


def _active(module: nn.Module) -> list[str]:
    """The adapters of a module of peft that are in use."""
    active = getattr(module, "active_adapters", None) or getattr(module, "active_adapter", None) or []
    return [active] if isinstance(active, str) else list(active)


def _of_class(module: object, name: str) -> bool:
    return any(cls.__name__ == name for cls in type(module).__mro__)
