"""The tree of a recipe's text -> variables, stages and modifiers, with every problem at its line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sparsify.errors import RecipeError, did_you_mean
from sparsify.modifiers.base import Modifier
from sparsify.recipe import grammar
from sparsify.recipe.expressions import Expression, inside_eval, parse
from sparsify.recipe.grammar import Problem, YamlNode, shown

__all__: list[str] = []

METADATA = "__metadata__"
MOST_CHARACTERS = 200_000
"""Length of all `eval(...)` of a recipe together."""

# What llm-compressor calls our fields; read in its own spelling only, and where it means the same.
_ELSEWHERE = {
    "apply_globally": ("global_sparsity",),
    "end": ("end_epoch",),
    "mask_structure": ("mask_type",),
    "start": ("start_epoch",),
    "targets": ("params", "layers"),
    "update": ("update_frequency",),
    "update_scheduler": ("inter_func",),
}


@dataclass
class RecipePart:
    """A stage as it was read, or with `name` None the recipe that has none; `lines` are those of its modifiers."""

    name: str | None
    variables: dict[str, Any]
    groups: dict[str, list[Modifier]] = field(default_factory=dict)
    lines: list[int] = field(default_factory=list)
    metadata: Any = None


def read_parts(top: YamlNode, overrides: Mapping[str, Any]) -> tuple[dict[str, Any], Any, list[RecipePart]]:
    """The global variables, the metadata and the stages of a recipe; `overrides` are variables given at load.

    Raises:
        Problem: anything that cannot be meant, with its line.
    """
    for key, line in top.key_lines.items():
        if not isinstance(key, str):
            raise Problem(line, f"the key {shown(key)} is no name; put it into quotes.")
    stages = {key: node for key, node in top.value.items() if _is_stage(key, node)}
    groups = {key: node for key, node in top.value.items() if key not in stages and "modifiers" in key}
    if stages and groups:
        line = top.key_lines[next(iter(groups))]
        raise Problem(line, f"{next(iter(groups))!r} stands outside of the stages {', '.join(map(repr, stages))}.")
    outside = {*stages, *groups, "version", METADATA}
    variables = {key: node for key, node in top.value.items() if key not in outside}
    inner = {
        name: {
            key: node
            for key, node in stage.value.items()
            if not (isinstance(key, str) and "modifiers" in key) and key != METADATA
        }
        for name, stage in stages.items()
    }
    for name, stage in stages.items():
        for key, line in stage.key_lines.items():
            if not isinstance(key, str):
                raise Problem(line, f"{name}: the key {shown(key)} is no name; put it into quotes.")
    _override([variables, *inner.values()], overrides)

    scope = _Scope(_Budget())
    values = scope.resolve(variables)
    metadata = scope.build(top.value[METADATA], evaluate=False) if METADATA in top.value else None
    if not stages:
        part = RecipePart(None, {})
        _read_groups(part, groups, scope)
        parts = [part]
    else:
        parts = []
        for name, stage in stages.items():
            inside = _Scope(scope.budget, outer=scope)
            part = RecipePart(name, inside.resolve(inner[name]))
            if METADATA in stage.value:
                part.metadata = inside.build(stage.value[METADATA], evaluate=False)
            _read_groups(part, {k: n for k, n in stage.value.items() if "modifiers" in k}, inside)
            parts.append(part)
    if not any(part.lines for part in parts):
        example = "modifiers:\n  - !EpochRangeModifier\n    end_epoch: 10.0"
        raise Problem(None, f"there is no modifier in it; a recipe needs a list of them, like\n{example}")
    return values, metadata, parts


def overrides_of(given: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """`recipe_variables` as a mapping: given as one, as JSON, or as "name=value,other=value".

    >>> overrides_of("num_epochs=10,params=[conv1, conv2],rate=1e-3")
    {'num_epochs': 10, 'params': ['conv1', 'conv2'], 'rate': 0.001}
    """
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return dict(given)
    if not isinstance(given, str):
        raise Problem(None, f"recipe_variables are a mapping, JSON or 'name=value,...', not {shown(given)}.")
    text = given.strip()
    if not text:
        return {}
    if text.startswith("{"):
        try:
            return dict(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise Problem(None, f"recipe_variables {shown(given)} is no JSON: {error}.") from None
    result: dict[str, Any] = {}
    for pair in _split_stages(text):
        name, sign, value = pair.partition("=")
        if not sign or not name.strip():
            raise Problem(None, f"recipe_variables: {shown(pair)} is not 'name=value'.")
        result[name.strip()] = _Scope(_Budget()).build(grammar.value(value.strip()), evaluate=False)
    return result


def _split_stages(text: str) -> list[str]:
    """At the commas that stand in no bracket and no quotes."""
    pairs, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in "]})":
            depth -= 1
        elif character == "," and depth == 0:
            pairs.append("")
            continue
        pairs[-1] += character
    return pairs


def _is_stage(key: str, node: YamlNode) -> bool:
    return (
        isinstance(node.value, dict)
        and key != METADATA
        and any(isinstance(inner, str) and "modifiers" in inner for inner in node.value)
    )


def _override(scopes: list[dict[str, YamlNode]], overrides: Mapping[str, Any]) -> None:
    """Puts given values in the place of variables, wherever they are defined.

    The node changes in place, so that aliases of a variable (`num_epochs: &epochs 10`) follow; but a variable that is
    itself an alias of an earlier one changes alone.
    """
    for name, given in overrides.items():
        holders = [scope for scope in scopes if name in scope]
        if not holders:
            known = list(dict.fromkeys(known for scope in scopes for known in scope))
            has = f" It has: {', '.join(known[:20])}." if known else " It has no variables."
            near = did_you_mean(str(name), known)
            raise Problem(None, f"recipe_variables: there is no variable {shown(name)} in the recipe.{near}{has}")
        value = _plain_value(given, f"recipe_variables[{name!r}]", 0)
        if grammar.measure(value)[0] > grammar.MOST_NODES:
            raise Problem(None, f"recipe_variables[{name!r}] holds more than {grammar.MOST_NODES} values.")
        for scope in holders:
            node = scope[name]
            first = next(other for s in scopes for other, n in s.items() if n is node)
            if first != name:
                node = scope[name] = YamlNode(node.line, None, None)
            fresh = _as_node(value, node.line)
            node.value, node.tag, node.key_lines = fresh.value, None, fresh.key_lines
            node.size, node.depth = fresh.size, fresh.depth


def _plain_value(value: object, where: str, depth: int) -> Any:
    if depth > grammar.DEEPEST_DOCUMENT:
        raise Problem(None, f"{where} is nested deeper than {grammar.DEEPEST_DOCUMENT}.")
    if isinstance(value, Mapping):
        return {_plain_value(k, where, depth + 1): _plain_value(v, where, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_value(v, where, depth + 1) for v in value]
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float) and abs(value) <= 1e308:
        return int(value) if isinstance(value, int) else float(value)
    raise Problem(None, f"{where}: {shown(value)} is neither a finite number, text, a list nor a mapping.")


def _as_node(value: object, line: int) -> YamlNode:
    size, depth = grammar.measure(value)
    if isinstance(value, dict):
        inner = {key: _as_node(v, line) for key, v in value.items()}
        return YamlNode(line, None, inner, dict.fromkeys(inner, line), size, depth)
    if isinstance(value, list):
        return YamlNode(line, None, [_as_node(v, line) for v in value], {}, size, depth)
    return YamlNode(line, None, value, {}, size, depth)


@dataclass
class _Budget:
    """Remaining size that expressions may add: a list through `eval(name)` counts as often as it is used."""

    left: int = grammar.MOST_NODES
    characters: int = MOST_CHARACTERS

    def spend(self, size: int, line: int) -> None:
        self.left -= size
        if self.left < 0:
            raise Problem(line, f"more than {grammar.MOST_NODES} values through eval(...).")


class _Scope:
    """The variables of a recipe or of a stage, resolved; those of a stage stand before those of the recipe."""

    def __init__(self, budget: _Budget, outer: _Scope | None = None) -> None:
        self.budget = budget
        self.values: dict[str, Any] = dict(outer.values) if outer else {}
        self.measures: dict[str, tuple[int, int]] = dict(outer.measures) if outer else {}

    def resolve(self, nodes: Mapping[str, YamlNode]) -> dict[str, Any]:
        """The values of `nodes`, those that others need first, in the order of the text."""
        for name in nodes:
            # A stage's own variable hides the recipe's, also from the variables beside it.
            self.values.pop(name, None)
            self.measures.pop(name, None)
        for name in nodes:
            # Without recursion: variables may refer to each other in a chain of thousands.
            path = {name: iter(self._needs(nodes[name]))} if name not in self.values else {}
            while path:
                last = next(reversed(path))
                waiting = next((n for n in path[last] if n in nodes and n not in self.values), None)
                if waiting is None:
                    del path[last]
                    self._define(last, nodes[last])
                elif waiting in path:
                    names = list(path)
                    cycle = " -> ".join([*names[names.index(waiting) :], waiting][:20])
                    raise Problem(nodes[waiting].line, f"variables refer to each other in a circle: {cycle}.")
                else:
                    path[waiting] = iter(self._needs(nodes[waiting]))
        return {name: self.values[name] for name in nodes}

    def _define(self, name: str, node: YamlNode) -> None:
        value = self.build(node)
        self.values[name] = value
        self.measures[name] = grammar.measure(value)

    def _needs(self, node: YamlNode) -> list[str]:
        """The names in every `eval(...)` of a variable's value."""
        names: dict[str, None] = {}

        def visit(text: object, line: int) -> None:
            if isinstance(text, str) and (expression := self._expression(text, line)):
                names.update(dict.fromkeys(sorted(expression.names)))

        def visit_all(node: YamlNode) -> None:
            if isinstance(node.value, dict):
                for key, inner in node.value.items():
                    visit(key, node.key_lines[key])
                    visit_all(inner)
            elif isinstance(node.value, list):
                for inner in node.value:
                    visit_all(inner)
            else:
                visit(node.value, node.line)

        visit_all(node)
        return list(names)

    def _expression(self, text: str, line: int) -> Expression | None:
        inner = inside_eval(text)
        if inner is None:
            return None
        self.budget.characters -= len(inner)
        if self.budget.characters < 0:
            raise Problem(line, f"more than {MOST_CHARACTERS} characters in eval(...).")
        try:
            return parse(inner)
        except RecipeError as error:
            raise Problem(line, str(error)) from None

    def evaluate(self, text: str, line: int) -> tuple[Any, int, int]:
        """The value of a text, with its size and depth: of `eval(...)` the result, otherwise the text."""
        expression = self._expression(text, line)
        if expression is None:
            return text, 0, 0
        for name in sorted(expression.names):
            if name not in self.values:
                near = did_you_mean(name, self.values)
                known = f" Variables: {', '.join(list(self.values)[:20])}." if self.values else ""
                raise Problem(
                    line, f"eval({shown(expression.text)[1:-1]}): there is no variable {name!r}.{near}{known}"
                )
        try:
            value = expression.evaluate(self.values)
        except RecipeError as error:
            raise Problem(line, str(error)) from None
        if isinstance(value, list | dict):
            # An expression cannot make a list: it is the value of one of the variables, measured before.
            size, depth = next(self.measures[n] for n in expression.names if self.values[n] is value)
        else:
            size, depth = grammar.measure(value)
        return value, size, depth

    def build(self, node: YamlNode, *, evaluate: bool = True, depth: int = 0) -> Any:
        """The plain value of `node`, `eval(...)` as what it gives."""
        if node.tag is not None:
            raise Problem(node.line, f"!{node.tag[:60]} can only stand before a modifier in a list of modifiers.")
        if isinstance(node.value, list):
            return [self.build(inner, evaluate=evaluate, depth=depth + 1) for inner in node.value]
        if isinstance(node.value, dict):
            result: dict[Any, Any] = {}
            for key, inner in node.value.items():
                line = node.key_lines[key]
                if evaluate and isinstance(key, str):
                    key, size, _ = self.evaluate(key, line)
                    self.budget.spend(size, line)
                    if isinstance(key, list | dict):
                        raise Problem(line, "a key must be a name or a number.")
                if key in result:
                    raise Problem(line, f"the key {shown(key)} stands here a second time.")
                result[key] = self.build(inner, evaluate=evaluate, depth=depth + 1)
            return result
        if evaluate and isinstance(node.value, str):
            value, size, deeper = self.evaluate(node.value, node.line)
            self.budget.spend(size, node.line)
            if depth + deeper > grammar.DEEPEST_DOCUMENT:
                raise Problem(node.line, f"nested deeper than {grammar.DEEPEST_DOCUMENT}.")
            return value
        return node.value


def _read_groups(part: RecipePart, groups: Mapping[str, YamlNode], scope: _Scope) -> None:
    for key, node in groups.items():
        if node.value is None and node.tag is None:
            part.groups[key] = []
            continue
        if node.tag is not None or not isinstance(node.value, list | dict):
            what = f"!{node.tag}" if node.tag else shown(node.value)
            raise Problem(node.line, f"{key!r} must be a list of modifiers, `- !Name`, not {what}.")
        found: list[tuple[int, Modifier]] = []
        if isinstance(node.value, list):
            for item in node.value:
                found.append((item.line, _read_item(item, key, scope)))
        else:
            for name, inner in node.value.items():
                line = node.key_lines[name]
                found.append((line, _read_modifier(name, inner, line, scope, elsewhere=True)))
        part.groups[key] = [modifier for _, modifier in found]
        part.lines += [line for line, _ in found]


def _read_item(item: YamlNode, key: str, scope: _Scope) -> Modifier:
    """One of `- !Name {fields}`, `- {type: Name, fields}` or `- Name: {fields}`."""
    if item.tag is not None:
        return _read_modifier(item.tag, item, item.line, scope)
    if isinstance(item.value, dict) and "type" in item.value:
        rest = {k: n for k, n in item.value.items() if k != "type"}
        name = scope.build(item.value["type"])
        fields = YamlNode(item.line, None, rest, item.key_lines)
        return _read_modifier(name, fields, item.key_lines["type"], scope)
    if isinstance(item.value, dict) and len(item.value) == 1:
        ((name, inner),) = item.value.items()
        if isinstance(inner.value, dict) or name in Modifier.registry:
            return _read_modifier(name, inner, item.line, scope, elsewhere=True)
    what = "a mapping without a name" if isinstance(item.value, dict) else grammar.kind_of(item)
    raise Problem(item.line, f"an item of {key!r} is a modifier, `- !GMPruningModifier` with its fields, not {what}.")


def _read_modifier(name: object, node: YamlNode, line: int, scope: _Scope, *, elsewhere: bool = False) -> Modifier:
    cls = Modifier.registry.get(name) if isinstance(name, str) else None
    if cls is None:
        near = did_you_mean(str(name), Modifier.registry)
        known = "" if near else f" There are: {', '.join(sorted(Modifier.registry))}."
        raise Problem(line, f"there is no modifier {shown(name)}.{near}{known}")
    if (elsewhere and node.tag is not None) or not isinstance(node.value, dict | None):
        raise Problem(line, f"{name} takes a mapping of fields, not {grammar.kind_of(node)}.")
    fields: dict[str, Any] = {}
    written: dict[str, str] = {}
    for key, inner in (node.value or {}).items():
        if not isinstance(key, str):
            raise Problem(node.key_lines[key], f"{name}: the key {shown(key)} is no name of a field.")
        ours = _our_name(cls, key) if elsewhere else key
        if ours in fields:
            raise Problem(node.key_lines[key], f"{name}.{ours} is given twice, as {written[ours]!r} and {key!r}.")
        written[ours] = key
        try:
            fields[ours] = scope.build(inner, depth=1)
        except Problem as problem:
            raise Problem(problem.line, f"{name}.{key}: {problem.message}") from None
    if elsewhere and fields.get("mask_type") == "0:0":
        fields["mask_type"] = "unstructured"
    return _make(
        cls,
        fields,
        lambda path: YamlNode(line, None, node.value, node.key_lines).line_of(_text_as_written(path, written)),
    )


def _make(cls: type[Modifier], fields: dict[str, Any], line_of: Callable[[str | None], int]) -> Modifier:
    try:
        return cls(**fields)
    except RecipeError as error:
        raise Problem(line_of(error.field), str(error)) from None
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        # A validator met a value that it was not made for.
        raise Problem(line_of(None), f"{cls.__name__}: its fields cannot be read: {shown(str(error))[1:-1]}.") from None


def _our_name(cls: type[Modifier], key: str) -> str:
    if key in cls.model_fields:
        return key
    return next((ours for ours in _ELSEWHERE.get(key, ()) if ours in cls.model_fields), key)


def _text_as_written(path: str | None, written: Mapping[str, str]) -> str | None:
    if path is None:
        return None
    first, dot, rest = path.partition(".")
    return written.get(first, first) + dot + rest
