"""Problems with fields that a user wrote, in plain words: the first of them, where it stands, and the way out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from sparsify.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


__all__: list[str] = []


class FieldProblem(ValueError):
    """Raised in a validator that sees several fields: names the one that is wrong."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def recipe_error(
    cls: type[BaseModel], error: ValidationError, fields: Mapping[str, Any], *, where: str | None = None
) -> RecipeError:
    """The first problem of a pydantic error in plain words, with the field's name and a way out.

    Args:
        cls: the model whose fields they are.
        error: as pydantic raised it.
        fields: as the user wrote them.
        where: what the fields belong to, for the message; None: the name of `cls`.
    """
    # A misspelled field is missing under its right name as well: the misspelling is what its writer looks for. And of a
    # union's problems, the member that has the right type says what is wrong with the value.
    problem = min(error.errors(include_url=False), key=_rank)
    path = _path_in(fields, problem["loc"], absent=problem["type"] == "missing")
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, FieldProblem):
        path = [cause.field]
    name = ".".join(path)
    value = problem["input"]
    shown = repr(value) if len(repr(value)) <= _SHOWN else repr(value)[:_SHOWN] + "..."
    if problem["type"] == "extra_forbidden":
        known = cls.model_fields if len(path) == 1 else ()
        text = f"no such field.{did_you_mean(path[-1], known)}"
        text += f" It has: {', '.join(known)}." if known else ""
    elif problem["type"] == "missing":
        text = "is required and was not given."
    elif cause is not None:
        text = str(cause)
    elif problem["type"] in ("less_than_equal", "greater_than_equal") and _is_fraction(cls, path):
        hint = f"; did you mean {value / 100:g}?" if 1 < value <= 100 else "."
        text = f"{shown} is not a fraction in [0, 1]{hint}"
    elif isinstance(value, str) and problem["type"] in ("float_type", "int_type"):
        text = f"{shown} is text where a number belongs; write it without quotes, or as eval(...) if it is computed."
    elif isinstance(value, bool) and problem["type"] in ("float_type", "int_type"):
        text = f"{str(value).lower()} is not a number."
    else:
        text = f"{shown}: {problem['msg'][0].lower()}{problem['msg'][1:]}."
    return RecipeError(f"{where or cls.__name__}{'.' if name else ''}{name}: {text}", field=name or None)


_SHOWN = 120
"""Characters of a wrong value that a message shows."""


def _rank(problem: ErrorDetails) -> int:
    if problem["type"] == "extra_forbidden":
        return 0
    other_kind = problem["type"].endswith("_type") or (
        problem["type"] == "literal_error" and not isinstance(problem["input"], str)
    )
    return 2 if other_kind else 1


def _path_in(fields: Mapping[str, Any], loc: tuple[int | str, ...], *, absent: bool) -> list[str]:
    """The keys and positions of `loc` that stand in what was written; pydantic adds the names of a union's members.

    `absent`: the last key is the one that was not written.
    """
    path: list[str] = []
    value: Any = fields
    for number, part in enumerate(loc):
        inside = range(len(value)) if isinstance(value, list) else value if isinstance(value, Mapping) else ()
        if part in inside:
            value = value[part]
        elif not (absent and number == len(loc) - 1):
            continue
        path.append(str(part))
    return path


def _is_fraction(cls: type[BaseModel], path: list[str]) -> bool:
    """True if a field's limits are 0 and 1, both allowed."""
    field = cls.model_fields.get(path[0]) if len(path) == 1 else None
    limits = {type(limit).__name__: limit for limit in field.metadata} if field else {}
    low, high = limits.get("Ge"), limits.get("Le")
    return getattr(low, "ge", None) == 0 and getattr(high, "le", None) == 1
