"""Writes docs/reference.md from the fields of the modifiers, and the picture of docs/design.md from the imports.

    python docs/generate.py

Tests fail while the pages are not what this writes.
"""

from __future__ import annotations

import inspect
import re
import sys
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sparsify import Modifier
from sparsify.modifiers.base import ModifierKind
from sparsify.output.files import replacing
from sparsify.output.tables import Column, Table

PAGE = Path(__file__).with_name("reference.md")
DESIGN = Path(__file__).with_name("design.md")
HEAD = """# Recipe reference

Every modifier with its fields, written from the code by `make docs`. How a recipe is put together is told in
[recipes.md](recipes.md).

Epochs are numbers and may have a fraction: 2.5 is the middle of the third epoch. A field without a default must be
given.
"""
KINDS = {
    "range": "The range of training",
    "learning_rate": "Learning rates",
    "pruning": "Pruning",
    "quantization": "Quantization",
    "palettization": "Palettes",
    "distillation": "Distillation",
    "parameters": "Parameters and weight decay",
    "structure": "Structure",
    "regularization": "Regularization",
    "logging": "Logging",
}
WORDS = {float: "number", int: "whole number", bool: "true or false", str: "text", type(None): "null", Any: "anything"}
COLUMNS = (
    Column("name", "Field"),
    Column("type", "Takes"),
    Column("default", "Default"),
    Column("description", "Meaning"),
)


def in_words(annotation: Any) -> str:
    """The values that a field takes, for somebody who writes YAML."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in WORDS:
        return WORDS[annotation]
    if origin is Annotated:
        return in_words(arguments[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(in_words(argument) for argument in arguments))
    if origin in (list, tuple, set):
        return f"list of {in_words(arguments[0])}"
    if origin is dict:
        return f"mapping of {in_words(arguments[0])} to {in_words(arguments[1])}"
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    raise TypeError(f"no words for {annotation!r}; add them to docs/generate.py")


def nested(annotation: Any) -> list[type[BaseModel]]:
    """The models that a field's value is made of, outermost first."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        hints = get_type_hints(annotation, include_extras=True)
        return [annotation, *(model for name in annotation.model_fields for model in nested(hints[name]))]
    return [model for argument in get_args(annotation) for model in nested(argument)]


def default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return f"{type(value).__name__}()"
    text = {None: "null", True: "true", False: "false"}.get(value) if isinstance(value, bool | None) else str(value)
    return f"`{text}`"


def fields(model: type[BaseModel]) -> str:
    rows = [
        {
            "name": f"`{name}`",
            "type": in_words(get_type_hints(model, include_extras=True)[name]),
            "default": default_of(field),
            "description": field.description or "",
        }
        for name, field in model.model_fields.items()
    ]
    return Table.of("", rows, COLUMNS).markdown().split("\n", 2)[2].replace("---:", "---")


def section(model: type[BaseModel], level: int) -> str:
    parts = [f"{'#' * level} {model.__name__}", inspect.cleandoc(text_of(model)), fields(model)]
    if issubclass(model, Modifier) and model.without_effect:
        dropped = ", ".join(f"`{name}`" for name in sorted(model.without_effect))
        parts.append(f"Read from older files, and without effect: {dropped}.")
    return "\n\n".join(parts)


def text_of(model: type[BaseModel]) -> str:
    """The docstring without its doctests."""
    text = inspect.cleandoc(model.__doc__ or "")
    return text.split(">>>")[0].rstrip()


def reference() -> str:
    """The whole page."""
    parts = [HEAD]
    modifiers = [cls for cls in Modifier.registry.values() if cls.__module__.startswith("sparsify.")]
    assert set(get_args(ModifierKind)) == set(KINDS), "a kind of modifier has no title here"
    models: dict[str, type[BaseModel]] = {}
    for kind, title in KINDS.items():
        of_kind = sorted((cls for cls in modifiers if cls.kind == kind), key=lambda cls: cls.__name__)
        if not of_kind:
            continue
        parts.append(f"## {title}")
        for cls in of_kind:
            parts.append(section(cls, 3))
            for hint in get_type_hints(cls, include_extras=True).values():
                models |= {model.__name__: model for model in nested(hint) if not issubclass(model, Modifier)}
    if models:
        parts.append("## What fields are made of")
        parts += [section(model, 3) for model in models.values()]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def design() -> str:
    """The page with the picture of today's imports; the floors stand in tests/test_layers.py alone."""
    root = PAGE.parents[1]
    sys.path.insert(0, str(root))
    from tests.test_layers import house

    picture = f"```mermaid\n{house(root / 'sparsify')}\n```"
    return re.sub(r"```mermaid\n.*?\n```", lambda _: picture, DESIGN.read_text(encoding="utf-8"), flags=re.DOTALL)


def main() -> None:
    for page, text in ((PAGE, reference()), (DESIGN, design())):
        with replacing(page) as temporary:
            temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
