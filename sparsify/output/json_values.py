"""Frozen dataclasses as JSON, and back: each value is checked against its field's type, and errors name it.

A class that is read names `__pydantic_config__ = EXACT` (or `EXACT_AND_FINITE`), and the classes of its fields do: a
key that is no field is then refused, and no text becomes a number.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__: list[str] = []

Value = TypeVar("Value", bound="DataclassInstance")

EXACT = ConfigDict(extra="forbid", strict=True)
EXACT_AND_FINITE = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def plain(value: object, *, finite: bool = True) -> Any:
    """Dataclasses, mappings, sequences and numbers as JSON knows them.

    Args:
        value: one of them, of any depth; another object becomes its `str`.
        finite: nan and inf become None.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name), finite=finite) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item, finite=finite) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item, finite=finite) for item in value]
    if finite and isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def json_text(value: DataclassInstance, head: Mapping[str, str | int], *, indent: int, allow_nan: bool = True) -> str:
    """One JSON object: the keys of `head`, which tell the format, then the fields.

    Args:
        value: what is written.
        head: keys that are no fields of it.
        indent: spaces at each level.
        allow_nan: nan and inf are written as JavaScript does; otherwise they are a ValueError.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Point:
    ...     at: tuple[float, ...]
    >>> json_text(Point((1.0, 2.5)), {"format": 1}, indent=0).split()
    ['{', '"format":', '1,', '"at":', '[', '1.0,', '2.5', ']', '}']
    """
    return json.dumps({**head, **plain(value, finite=False)}, indent=indent, allow_nan=allow_nan)


def json_object(text: str) -> dict[str, Any]:
    """The JSON object in `text`.

    Raises:
        ValueError: the text is no JSON, or no object.
    """
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(found, dict):
        raise ValueError(f"it is a {type(found).__name__} where an object was expected")
    return found


def from_json_object(kind: type[Value], state: Mapping[str, Any]) -> Value:
    """The value of class `kind` with the fields in `state`: lists become tuples again, objects dataclasses.

    Raises:
        ValueError: a key is missing, unknown, or its value is of another type; the message names key and value.
    """
    try:
        return _adapter(kind).validate_json(json.dumps(state))  # type: ignore[no-any-return]
    except ValidationError as error:
        raise ValueError(_first_fault(error)) from None


@cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _first_fault(error: ValidationError) -> str:
    fault = error.errors(include_url=False)[0]
    key = ".".join(map(str, fault["loc"]))
    if fault["type"] == "missing":
        return f"{key} is missing"
    if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{key} is unknown"
    value = repr(fault["input"])
    shown = value if len(value) <= 60 else f"{value[:57]}..."
    return f"{key} is {shown}: {fault['msg'][:1].lower()}{fault['msg'][1:]}"
