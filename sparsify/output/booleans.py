"""Booleans that older recipe files write as whole numbers: `quantize_embeddings: 1`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

__all__: list[str] = []

BOOLEAN_SCHEMA: dict[str, Any] = {"anyOf": [{"type": "boolean"}, {"enum": [0, 1]}]}
"""The JSON schema of a field that is read so."""


def read_booleans(cls: type[BaseModel], fields: object) -> object:
    """The fields of `cls` as they were written, with 0 and 1 in place of booleans made into booleans.

    Other numbers stay, and are refused as what they are.
    """
    if not isinstance(fields, Mapping):
        return fields
    found = dict(fields)
    for name, field in cls.model_fields.items():
        value = found.get(name)
        # Not a union with bool in it: there a number may mean itself.
        if field.annotation is bool and type(value) in (int, float) and value in (0, 1):
            found[name] = bool(value)
    return found
