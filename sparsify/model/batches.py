"""The tensors in whatever a user puts a batch in: mappings of any class, dataclasses, named tuples, tuples and lists.

Tokenizers give a UserDict (transformers' BatchEncoding), models and collate functions dataclasses, some of which are
mappings too (ModelOutput). torch's pytree knows classes that were registered, and takes all others for leaves.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__: list[str] = []


def named_fields(value: object) -> dict[str, Any] | None:
    """The parts of a mapping, named tuple or dataclass by their names; None: it is none of these."""
    if isinstance(value, Mapping):
        return {str(key): item for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    if dataclasses.is_dataclass(value) and not isinstance(value, type | nn.Module):
        return {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    return None


def tensors_in(value: object) -> Iterator[Tensor]:
    """Every tensor in `value`, in order."""
    if isinstance(value, Tensor):
        yield value
        return
    named = named_fields(value)
    items = value if named is None and isinstance(value, tuple | list) else (named or {}).values()
    if named is None and not isinstance(value, tuple | list):
        items = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    for item in items:
        yield from tensors_in(item)


def sample_count(batch: object) -> int:
    """Number of samples in a batch: the length of its first tensor that holds a value; 0: no tensor does."""
    sizes = [len(tensor) if tensor.numel() else 0 for tensor in tensors_in(batch) if tensor.dim()]
    return next(filter(None, sizes), 0) if sizes else 1


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `change` of each tensor in its place, in containers of the same classes; the same where none
    changed.

    A mapping that cannot be written to becomes a dict.
    """
    if isinstance(value, Tensor):
        return change(value)
    named = named_fields(value)
    if named is None and not isinstance(value, tuple | list):
        return pytree.tree_map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, value)
    items = list(value) if named is None else list(value.values() if isinstance(value, Mapping) else named.values())
    changed = [mapped(item, change) for item in items]
    if all(new is old for new, old in zip(changed, items, strict=True)):
        return value
    if isinstance(value, Mapping):
        pairs = dict(zip(value, changed, strict=True))
        if not isinstance(value, MutableMapping):
            return pairs
        made = copy.copy(value)
        for key, item in pairs.items():
            made[key] = item
        return made
    if isinstance(value, tuple | list):
        return type(value)(changed) if named is None else type(value)(*changed)
    made = copy.copy(value)
    for name, item in zip(named or (), changed, strict=True):
        # Frozen ones too: it is a copy that nobody has seen.
        object.__setattr__(made, name, item)
    return made


def with_known_mappings(value: Any) -> Any:
    """`value` with a dict in the place of every mapping of a class that torch's pytree, and so torch.export, cannot
    look into.
    """
    if isinstance(value, Mapping) and type(value) not in pytree.SUPPORTED_NODES:
        return {key: with_known_mappings(item) for key, item in value.items()}
    if type(value) is dict:
        return {key: with_known_mappings(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(with_known_mappings(item) for item in value)
    return value
