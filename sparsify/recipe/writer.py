"""Writes recipes as text that reads well and is read back as an equal recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml
from yaml.representer import RepresenterError

from sparsify.errors import RecipeError
from sparsify.modifiers.base import Modifier
from sparsify.recipe.evidence import Evidence, head, woven
from sparsify.recipe.grammar import Problem, plain_value
from sparsify.recipe.reader import METADATA
from sparsify.recipe.stage import Stage

__all__: list[str] = []


def to_yaml(stages: Sequence[Stage], variables: dict[str, Any], metadata: Any, *, everything: bool = False) -> str:
    """The text of a recipe.

    Args:
        stages: its stages; one without a name where it has none.
        variables: those of the recipe as a whole.
        metadata: that of the recipe as a whole.
        everything: True: also the fields of modifiers that were not given.

    Raises:
        RecipeError: metadata holds what YAML has no form for.
    """
    evidence = None if everything or stages[0].name is not None else Evidence.of(metadata)
    kept = [] if metadata is None else [_scalar_text({METADATA: metadata})]
    sections = [_scalar_text(variables)] if variables else []
    for stage in stages:
        body = _stage(stage, everything)
        if stage.name is not None:
            sections.append(_scalar_text({stage.name: body}))
        else:
            sections += [
                _scalar_text({key: value})
                if evidence is None or key not in stage.groups
                else _commented(key, stage.groups[key], evidence)
                for key, value in body.items()
            ]
    # A reader of a recipe that was made from measurements looks for its summary first.
    if evidence is not None:
        return "\n".join([head(evidence, [m for stage in stages for m in stage.modifiers]), *sections, *kept])
    return "\n".join([*kept, *sections])


def _commented(key: str, modifiers: tuple[Modifier, ...], evidence: Evidence) -> str:
    """One list of modifiers, a line for every name, with what stands behind the numbers."""
    tagged = []
    for modifier in modifiers:
        given = fields(modifier)
        if isinstance(given.get("params"), list):
            given["params"] = _Lines(given["params"])
        tagged.append(_Tagged(type(modifier).__name__, given))
    return woven(_scalar_text({key: tagged}), modifiers, evidence)


def _stage(stage: Stage, everything: bool) -> dict[str, Any]:
    body: dict[str, Any] = {} if stage.metadata is None else {METADATA: stage.metadata}
    body |= stage.variables
    for key, group in stage.groups.items():
        body[key] = [_Tagged(type(modifier).__name__, fields(modifier, everything=everything)) for modifier in group]
    return body


def fields(modifier: Modifier, *, everything: bool = False) -> dict[str, Any]:
    """The fields of `modifier` in the order of declaration; `everything`: also those that were not given."""
    return modifier.model_dump(exclude_unset=not everything)


class _Tagged:
    def __init__(self, tag: str, fields: dict[str, Any]) -> None:
        self.tag = tag
        self.fields = fields


class _Lines(list[Any]):
    """A list that is written one item a line, however short it is."""


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        # Items of a list stand indented under their key. PyYAML 6.0 has no option for it:
        # https://github.com/yaml/pyyaml/issues/234
        super().increase_indent(flow, False)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    try:
        quoted = not isinstance(plain_value(text), str)
    except Problem:
        quoted = True
    # A text of several lines, whatever YAML takes for a line's end, is kept as it is only with its breaks escaped.
    style = '"' if len(text.splitlines()) > 1 or text[-1:].isspace() else "'" if quoted else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _represent_tagged(dumper: yaml.SafeDumper, tagged: _Tagged) -> yaml.Node:
    return dumper.represent_mapping(f"!{tagged.tag}", tagged.fields.items(), flow_style=not tagged.fields)


def _represent_list(dumper: yaml.SafeDumper, values: list[Any] | tuple[Any, ...]) -> yaml.Node:
    # Numbers and short lists in one line, names one under the other.
    inline = all(not isinstance(v, str | list | dict | _Tagged) for v in values) or (
        all(isinstance(v, str) for v in values) and sum(map(len, values)) < 60
    )
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=inline)


def _represent_mapping(dumper: yaml.SafeDumper, values: dict[Any, Any]) -> yaml.Node:
    return dumper.represent_mapping("tag:yaml.org,2002:map", values.items(), flow_style=not values)


def _represent_lines(dumper: yaml.SafeDumper, values: _Lines) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=not values)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(_Lines, _represent_lines)
_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(tuple, _represent_list)
_Dumper.add_representer(dict, _represent_mapping)
_Dumper.add_representer(_Tagged, _represent_tagged)


def _scalar_text(section: dict[str, Any]) -> str:
    try:
        text: str = yaml.dump(section, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    except RepresenterError as error:
        raise RecipeError(
            f"{next(iter(section))}: something of type {type(error.args[-1]).__name__} cannot be written to a recipe; "
            "give text, numbers, lists and dicts."
        ) from None
    return text
