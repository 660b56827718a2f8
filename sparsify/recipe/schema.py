"""The JSON schema of the whole dialect, from the modifiers' fields, for editors that complete and check recipes."""

from __future__ import annotations

import json
from typing import Any

from sparsify.modifiers.base import Modifier
from sparsify.output.booleans import BOOLEAN_SCHEMA
from sparsify.recipe.reader import METADATA

__all__: list[str] = []


def json_schema() -> dict[str, Any]:
    """A recipe, its stages and every modifier with its fields; each field may be `eval(...)` as well."""
    definitions: dict[str, Any] = {
        "eval": {
            "type": "string",
            "pattern": r"^\s*eval\(.*\)\s*$",
            "description": "Arithmetic over the recipe's variables.",
        }
    }
    for name, cls in sorted(Modifier.registry.items()):
        definitions[name] = _modifier(name, cls, definitions)
    definitions["modifiers"] = {
        "type": ["array", "null"],
        "description": "`- !Name` with its fields, or `- {type: Name, ...}`.",
        "items": {"anyOf": [{"$ref": f"#/$defs/{name}"} for name in sorted(Modifier.registry)]},
    }
    groups = {"patternProperties": {"modifiers": {"$ref": "#/$defs/modifiers"}}}
    definitions["stage"] = {
        "type": "object",
        "description": "Modifiers under a name of their own; its other keys are variables.",
        **groups,
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Recipe",
        "description": "Keys whose name contains `modifiers` hold lists of modifiers, keys that hold a mapping with "
        "such a key are stages, every other key is a variable.",
        "type": "object",
        "properties": {
            "version": {"description": "Ignored."},
            METADATA: {"description": "Kept and saved."},
        },
        "patternProperties": {"modifiers": {"anyOf": [{"$ref": "#/$defs/modifiers"}, {"$ref": "#/$defs/stage"}]}},
        "additionalProperties": {"anyOf": [{"$ref": "#/$defs/stage"}, {"not": {"type": "object"}}, {"type": "object"}]},
        "$defs": definitions,
    }


def _modifier(name: str, cls: type[Modifier], definitions: dict[str, Any]) -> dict[str, Any]:
    # Two modifiers may hold models of one name: a definition carries the modifier's name in front.
    own: dict[str, Any] = cls.model_json_schema(ref_template=f"#/$defs/{name}.{{model}}")
    for inner, definition in own.pop("$defs", {}).items():
        definitions[f"{name}.{inner}"] = _with_whole_number_booleans(definition)
    own = _with_whole_number_booleans(own)
    properties = {
        field: {key: value for key, value in schema.items() if key in ("description", "default")}
        | {"anyOf": [{k: v for k, v in schema.items() if k not in ("description", "default", "title")}, _EVAL]}
        for field, schema in own.get("properties", {}).items()
    }
    properties |= {field: {"description": "Without effect."} for field in sorted(cls.without_effect - set(properties))}
    # A tag is not part of the value that a schema sees, so `type` is optional.
    properties["type"] = {"const": name, "description": "The name of the modifier, where it is not written as a tag."}
    result = {
        "type": "object",
        "title": name,
        "description": (cls.__doc__ or "").strip(),
        "properties": properties,
        "additionalProperties": False,
    }
    if own.get("required"):
        result["required"] = own["required"]
    # Through JSON: numbers as keys become text, tuples lists, and nothing that is no JSON gets through.
    return dict(json.loads(json.dumps(result)))


def _with_whole_number_booleans(definition: dict[str, Any]) -> dict[str, Any]:
    """The schema of an object whose boolean properties may be 0 and 1 too, as in older files."""
    properties = {
        field: {key: value for key, value in schema.items() if key != "type"} | BOOLEAN_SCHEMA
        if schema.get("type") == "boolean"
        else schema
        for field, schema in definition.get("properties", {}).items()
    }
    return {**definition, "properties": properties} if properties else definition


_EVAL = {"$ref": "#/$defs/eval"}
