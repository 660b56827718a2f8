"""Docstrings keep what they promise: every parameter of a public callable is described, once and in order.

An `Args:` section is a list of entries, `name: text`, one indentation deeper than its head; the lines of a long text go
one deeper again. It names the parameters of the signature, each once, in their order. A public callable without the
section says each parameter's name in its text, or inherits its description from the method that it overrides, or
says "Arguments are those of `other`" of a function whose section has them.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "sparsify"
ROOMS = sorted({path.relative_to(ROOT).parts[0].removesuffix(".py") for path in ROOT.rglob("*.py")})

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Source:
    """The classes of all files, to find what a method overrides."""

    def __init__(self, texts: dict[str, str]) -> None:
        self.trees = {name: ast.parse(text) for name, text in texts.items()}
        found = (node for tree in self.trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
        self.classes = {node.name: node for node in found}
        every = (node for tree in self.trees.values() for node in ast.walk(tree) if isinstance(node, Function))
        self.sections = {(node.name, name) for node in every for name in names_described(ast.get_docstring(node) or "")}

    def bases(self, cls: ast.ClassDef) -> Iterator[ast.ClassDef]:
        for name in (ast.unparse(base).split("[")[0].split(".")[-1] for base in cls.bases):
            if name in self.classes:
                yield self.classes[name]
                yield from self.bases(self.classes[name])

    def described_above(self, cls: ast.ClassDef, method: str) -> bool:
        return any(ast.get_docstring(node) for base in self.bases(cls) for node in functions(base, method))

    def faults(self) -> Iterator[str]:
        for file, tree in self.trees.items():
            public = public_names(tree)
            for node in tree.body:
                if isinstance(node, Function):
                    yield from self.faults_of(file, node.name, ast.get_docstring(node), node, node.name in public)
                elif isinstance(node, ast.ClassDef):
                    yield from self.faults_of_class(file, node, node.name in public)

    def faults_of_class(self, file: str, cls: ast.ClassDef, public: bool) -> Iterator[str]:
        text = ast.get_docstring(cls)
        for made in functions(cls, "__init__"):
            own = ast.get_docstring(made)
            yield from self.faults_of(file, cls.name, own if own and "Args:" in own else text, made, public)
        if not functions(cls, "__init__") and text and described(text):
            named = names_described(text)
            fields = [node.target.id for node in cls.body if isinstance(node, ast.AnnAssign) and is_name(node.target)]
            if named != fields[: len(named)]:
                yield f"{file}: {cls.name}: Args describes {named}, the fields are {fields}"
        for method in (node for node in cls.body if isinstance(node, Function) and node.name != "__init__"):
            doc = ast.get_docstring(method)
            asked = public and not method.name.startswith("_") and not self.described_above(cls, method.name)
            yield from self.faults_of(file, f"{cls.name}.{method.name}", doc, method, asked)

    def faults_of(self, file: str, name: str, text: str | None, function: Function, public: bool) -> Iterator[str]:
        where, known = f"{file}:{function.lineno}: {name}", parameters(function)
        entries = described(text or "")
        for names, words in entries:
            if names == [""]:
                yield f"{where}: {words!r} begins no entry of Args; indent a line that goes on"
            for other in known:
                if other not in names and re.search(rf"(?:^|[.;]\s){re.escape(other)}: ", words, re.MULTILINE):
                    yield f"{where}: the text of {names[0]!r} swallows {other!r}"
        named = names_described(text or "")
        if entries and named != known:
            yield f"{where}: Args describes {named}, the signature has {known}"
        if not entries and public:
            elsewhere = re.findall(r"Arguments[^.]* are those of `(\w+)`", text or "")
            missing = [
                one
                for one in known
                if not re.search(rf"\b{re.escape(one)}\b", text or "")
                and not any((other, one) in self.sections for other in elsewhere)
            ]
            if missing:
                yield f"{where}: nothing is said of {missing}"


def is_name(node: ast.expr) -> bool:
    return isinstance(node, ast.Name)


def functions(cls: ast.ClassDef, name: str) -> list[Function]:
    return [node for node in cls.body if isinstance(node, Function) and node.name == name]


def public_names(tree: ast.Module) -> set[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def names_described(text: str) -> list[str]:
    return [name for names, _ in described(text) for name in names if name]


def parameters(function: Function) -> list[str]:
    """As they stand in the signature, without the object or class of a method, and without those that are ignored."""
    a = function.args
    every = [*a.posonlyargs, *a.args, *filter(None, [a.vararg]), *a.kwonlyargs, *filter(None, [a.kwarg])]
    # A function may have a parameter called cls; a method has it where it says so.
    of_class = {"classmethod"} & {ast.unparse(one).split("(")[0] for one in function.decorator_list}
    bound = {"self", "cls"} if of_class or function.name in ("__new__", "__init_subclass__") else {"self"}
    return [one.arg for one in every if one.arg not in bound and not one.arg.startswith("_")]


def described(text: str) -> list[tuple[list[str], str]]:
    """The entries of the Args section: (names, all of the text); a name of "" where a line begins no entry."""
    lines = inspect.cleandoc(text).splitlines()
    if "Args:" not in [line.strip() for line in lines]:
        return []
    start = [line.strip() for line in lines].index("Args:")
    indent = len(lines[start]) - len(lines[start].lstrip())
    entries: list[tuple[list[str], str]] = []
    for line in lines[start + 1 :]:
        depth = len(line) - len(line.lstrip())
        if not line.strip() or depth <= indent:
            break
        head = re.match(r"\s*((?:\*{0,2}\w+)(?:, \*{0,2}\w+)*): (?=\S)", line)
        if depth > indent + 4 and entries:
            entries[-1] = (entries[-1][0], f"{entries[-1][1]}\n{line.strip()}")
        elif head is None:
            entries.append(([""], line.strip()))
        else:
            entries.append(([name.lstrip("*") for name in head[1].split(", ")], line[head.end() :]))
    return entries


@pytest.fixture(scope="module")
def source() -> Source:
    return Source({str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in ROOT.rglob("*.py")})


@pytest.mark.parametrize("room", ROOMS)
def test_every_parameter_is_described_once_in_order_and_none_swallowed(source: Source, room: str) -> None:
    assert not [fault for fault in source.faults() if re.match(rf"{room}(/|\.py)", fault)]


def test_public_callables_are_looked_at(source: Source) -> None:
    """The check above reads files: it would pass where it found nothing to read."""
    import sparsify

    written = {name for tree in source.trees.values() for name in public_names(tree)}
    assert set(sparsify.__all__) - {"__version__"} <= written
    assert sum(len(described(text)) for text in docstrings(source).values()) > 150


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        (["one: of", "    two lines.", "two: more."], None),
        (["one, two: both."], None),
        (["one: text."], "Args describes ['one'], the signature has ['one', 'two']"),
        (["two: text.", "one: text."], "Args describes ['two', 'one']"),
        (["one: text.", "one: again.", "two: text."], "Args describes ['one', 'one', 'two']"),
        (["one: text.", "two: text.", "three: text."], "Args describes ['one', 'two', 'three']"),
        (["one: text", "that goes on.", "two: text."], "'that goes on.' begins no entry"),
        (["one: text. two: swallowed.", "two: text."], "the text of 'one' swallows 'two'"),
        (["one: text", "    two: swallowed."], "the text of 'one' swallows 'two'"),
    ],
)
def test_a_broken_section_is_found(lines: list[str], fault: str | None) -> None:
    text = "\n".join(
        ["def f(one, *, two):", '    """Text.', "", "    Args:", *(f"        {x}" for x in lines), '    """']
    )
    found = list(Source({"f.py": text}).faults())
    assert (not found) if fault is None else any(fault in one for one in found), found


def test_a_public_callable_says_all_names_or_inherits_them() -> None:
    text = '''
__all__ = ["f", "A", "B"]
def f(one, two):
    """Text of `one`."""
def hidden(one):
    """Text."""
class A:
    @classmethod
    def of(cls, one):
        """Text of `one`."""
    def work(self, one):
        """Text of `one`."""
class B(A):
    def work(self, one): ...
    def rest(self, two):
        """Text."""
    def more(self, one, two):
        """Arguments are those of `full`."""
    def full(self, one):
        """Text.

        Args:
            one: text.
        """
'''
    assert list(Source({"f.py": text}).faults()) == [
        "f.py:3: f: nothing is said of ['two']",
        "f.py:15: B.rest: nothing is said of ['two']",
        "f.py:17: B.more: nothing is said of ['two']",
    ]


def docstrings(source: Source) -> dict[str, str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return {
        f"{file}:{getattr(node, 'lineno', 1)}": text
        for file, tree in source.trees.items()
        for node in ast.walk(tree)
        if isinstance(node, kinds) and (text := ast.get_docstring(node))
    }


def test_first_sentences_begin_with_a_verb_or_a_noun_of_the_field(source: Source) -> None:
    assert not {
        place: text.splitlines()[0]
        for place, text in docstrings(source).items()
        if text.split()[0] in ("What", "Whether", "How", "Of")
    }
