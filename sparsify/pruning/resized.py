"""Sizes that a removal of channels has changed, kept with their modules, so that a saved model can be rebuilt.

Each module remembers of its own tensors and numbers, and so a part of a model that is taken out, wrapped or copied is
still known for what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sparsify.model.targets import named_modules

__all__: list[str] = []

_RECORD = "_resized"
"""The attribute of a module that was changed: {"shapes": ..., "attributes": ..., "config": ...}."""

OwnShape = tuple[int, ...]


@dataclass(frozen=True)
class Resized:
    """All that removals have changed in a model. Plain data.

    Attributes:
        shapes: {parameter or buffer: the shapes that it had, the first one first}; without the present one.
        attributes: {module: {attribute: value now}}, "" being the model itself.
        config: {module: {key: value now}} of Hugging Face configs.
    """

    shapes: Mapping[str, tuple[OwnShape, ...]] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


OwnShapes = dict[int, dict[str, OwnShape]]


def own_shapes(model: nn.Module) -> OwnShapes:
    """{id of a module: {name in it: shape}} of all parameters and buffers."""
    return {
        id(module): {
            key: tuple(value.shape)
            for key, value in [*module._parameters.items(), *module._buffers.items()]
            if value is not None
        }
        for module in model.modules()
    }


def note_resized(
    model: nn.Module,
    before: OwnShapes,
    attributes: Mapping[str, Mapping[str, Any]],
    config: Mapping[str, Any],
    undo: list[Callable[[], None]],
) -> None:
    """Notes what a removal has just done.

    Args:
        model: from which channels were removed.
        before: its `own_shapes` before that.
        attributes: {module: {attribute: new value}}.
        config: {key: new value} of the model's config.
        undo: gets what takes the notes back.
    """
    modules = {"": model, **named_modules(model)}
    after = own_shapes(model)
    for module in model.modules():
        for key, shape in before[id(module)].items():
            if after[id(module)].get(key, shape) != shape:
                record = _opened(module, undo)
                record["shapes"] = {**record["shapes"], key: (*record["shapes"].get(key, ()), shape)}
    for path, values in attributes.items():
        record = _opened(modules[path], undo)
        record["attributes"] = {**record["attributes"], **values}
    if config:
        record = _opened(model, undo)
        record["config"] = {**record["config"], **config}


def resized_of(model: nn.Module) -> Resized:
    """All that removals have changed in `model` since it was built."""
    shapes: dict[str, tuple[OwnShape, ...]] = {}
    attributes: dict[str, Mapping[str, Any]] = {}
    config: dict[str, Mapping[str, Any]] = {}
    for path, module in {"": model, **named_modules(model)}.items():
        record = module.__dict__.get(_RECORD)
        if record is None:
            continue
        shapes.update({f"{path}.{key}" if path else key: before for key, before in record["shapes"].items()})
        # The values now: a user may have changed them since.
        if record["attributes"]:
            attributes[path] = {key: getattr(module, key, value) for key, value in record["attributes"].items()}
        if record["config"]:
            now = getattr(module, "config", None)
            config[path] = {key: getattr(now, key, value) for key, value in record["config"].items()}
    return Resized(shapes, attributes, config)


def _opened(module: nn.Module, undo: list[Callable[[], None]]) -> MutableMapping[str, Any]:
    """The record of a module: a new object, so that one that a copy of the module shares stays what it is."""
    values = module.__dict__
    old = values.get(_RECORD)
    record: dict[str, Any] = {"shapes": {}, "attributes": {}, "config": {}} if old is None else dict(old)
    values[_RECORD] = record

    def back() -> None:
        if old is None:
            values.pop(_RECORD, None)
        else:
            values[_RECORD] = old

    undo.append(back)
    return record
