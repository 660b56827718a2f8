"""Recipe text -> a tree of plain values in which every key and value knows its line.

The reader is private and small: YAML *events* go in (scanned without recursion), and while the tree grows its size,
depth and number of nodes are bounded, aliases counted as what they stand for. No tag constructs anything. What differs
from YAML 1.1 is what users mean: `1e-3` is a number, `12:30:45`, `2:4` and dates are text, a duplicate key is an error,
unless it says the same again.
"""

from __future__ import annotations

import codecs
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import yaml

__all__: list[str] = []

LONGEST_DOCUMENT = 1 << 20
"""Bytes in a recipe."""
DEEPEST_DOCUMENT = 32
MOST_NODES = 20_000
CHARACTERS_IN_A_NODE = 64
"""A long text counts as several nodes, so that aliases cannot blow it up."""

LONGEST_NUMBER = 400
"""Characters; what is longer is text."""

INTEGER_PATTERN = re.compile(r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+")
FLOAT_PATTERN = re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?")
NO_NUMBER = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
BOOLEANS = {
    spelling: value
    for value, words in ((True, ("true", "yes", "on")), (False, ("false", "no", "off")))
    for word in words
    for spelling in (word, word.capitalize(), word.upper())
}
NULLS = frozenset({"", "~", "null", "Null", "NULL"})

_YAML = "tag:yaml.org,2002:"
_UNREADABLE = re.compile("[^\t\n\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_FENCES = ("---", "+++")
_COMMENT = re.compile(r"\s*<!--.*?(?:-->|\Z)", re.DOTALL)
_HOLDS_MODIFIERS = re.compile(r"^\s*['\"]?\w*modifiers\w*['\"]?\s*:", re.MULTILINE)
_KEY_FIRST = re.compile(r"\s*(?:[{\"']|[\w-]+\s*:(?:\s|$))")


class Problem(Exception):
    """Something wrong at a line; becomes a RecipeError once the name of the file is known."""

    def __init__(self, line: int | None, message: str) -> None:
        super().__init__(message)
        self.line = line
        self.message = message


@dataclass(eq=False)
class YamlNode:
    """A value as it stands in the text: a scalar, a list of nodes, or a mapping from keys to nodes.

    `tag` is what stands behind `!`; `key_lines` are the lines of a mapping's keys; `size` and `depth` count what hangs
    below, aliases as what they stand for. An alias is the node that it stands for: the object is shared.
    """

    line: int
    tag: str | None
    value: Any
    key_lines: dict[Any, int] = field(default_factory=dict)
    size: int = 1
    depth: int = 0
    quoted: bool = False

    def line_of(self, path: str | None) -> int:
        """The line of the field `path`, "scheme.weights.num_bits", or of the part of it that there is."""
        node, line = self, self.line
        for key in (path or "").split("."):
            if isinstance(node.value, dict):
                found = next((k for k in node.value if str(k) == key), None)
                if found is None:
                    break
                node, line = node.value[found], node.key_lines[found]
            elif isinstance(node.value, list) and key.isdigit() and int(key) < len(node.value):
                node = node.value[int(key)]
                line = node.line
            else:
                break
        return line


def read(data: str | bytes, *, markdown: bool = False) -> YamlNode:
    """The mapping at the top of a recipe, as text, as bytes in UTF-8 or UTF-16, or in a Markdown file's front matter.

    Raises:
        Problem: anything that is wrong with the text, with its line.
    """
    text = _decoded(data)
    block, line = _block(text, markdown)
    top = _tree(block, line)
    if top is None:
        raise Problem(None, "the recipe is empty; it needs at least one list of modifiers.")
    if not isinstance(top.value, dict):
        raise Problem(top.line, f"a recipe is a mapping of names to values, not {kind_of(top)}.")
    return top


def value(text: str) -> YamlNode:
    """A single value, "1e-3" or "[conv1, conv2]", as it would be read behind a key."""
    return _tree(_decoded(text), 0) or YamlNode(1, None, None)


def measure(value: object) -> tuple[int, int]:
    """The size and depth of a plain value, as `YamlNode` counts them."""
    if isinstance(value, str):
        return 1 + len(value) // CHARACTERS_IN_A_NODE, 0
    if not isinstance(value, list | dict):
        return 1, 0
    inner = [measure(v) for v in (value if isinstance(value, list) else [*value, *value.values()])]
    return 1 + sum(size for size, _ in inner), 1 + max((depth for _, depth in inner), default=0)


def _decoded(data: str | bytes) -> str:
    if len(data) > LONGEST_DOCUMENT:
        raise Problem(None, f"the recipe is larger than {LONGEST_DOCUMENT >> 20} MiB.")
    if isinstance(data, bytes):
        encoding = "utf-8-sig"
        if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
            encoding = "utf-32"
        elif data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            encoding = "utf-16"
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise Problem(line, "is not UTF-8 (or UTF-16 with its mark); save the file as UTF-8.") from None
    else:
        text = data.removeprefix("\ufeff")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if wrong := _UNREADABLE.search(text):
        name = "NUL" if wrong.group() == "\0" else f"U+{ord(wrong.group()):04X}"
        raise Problem(text.count("\n", 0, wrong.start()) + 1, f"the character {name} cannot stand in a recipe.")
    return text


def _block(text: str, markdown: bool) -> tuple[str, int]:
    """The YAML in `text`, and the number of the line before it: all of it, or the front matter that holds modifiers."""
    # Comments are blanked out, not cut out: the lines keep their numbers. Only those that stand before anything else:
    # "<!--" may stand in a quoted text.
    end = 0
    while comment := _COMMENT.match(text, end):
        end = comment.end()
    text = "\n" * text.count("\n", 0, end) + text[end:]
    lines = text.split("\n")
    fences = [number for number, line in enumerate(lines) if line.rstrip() in _FENCES]
    if not fences:
        return text, 0
    before = [line for line in lines[: fences[0]] if line.strip() and not line.lstrip().startswith("#")]
    if before and not markdown and _KEY_FIRST.match(before[0]):
        return text, 0
    # Two fences of a kind enclose a block. A rule between paragraphs is a fence too: every neighbouring pair is asked.
    pairs = [(a, b) for a, b in pairwise(fences) if lines[a].rstrip() == lines[b].rstrip()]
    holding = [(a, b) for a, b in pairs if _HOLDS_MODIFIERS.search("\n".join(lines[a + 1 : b]))]
    if not holding:
        # A mark of a document's start, or nothing to be found: what is wrong is said about the text as a whole.
        return ("\n".join(lines[fences[0] + 1 :]), fences[0] + 1) if len(fences) == 1 else (text, 0)
    first, second = holding[0]
    rest = lines[second + 1 :]
    if not markdown and first == fences[0] and _is_document(rest):
        raise Problem(second + 1, "a second YAML document begins here; a recipe is one.")
    return "\n".join(lines[first + 1 : second]), first + 1


def _is_document(lines: list[str]) -> bool:
    """True if the lines that follow front matter are YAML of their own, not the text of a page."""
    text = "\n".join(lines)
    if not text.strip() or text.lstrip().startswith("<!--"):
        return False
    try:
        top = _tree(text.split("\n---")[0], 0)
    except Problem:
        return False
    return top is not None and isinstance(top.value, dict) and all(str(key).isidentifier() for key in top.value)


@dataclass
class _Open:
    """A collection whose end has not come yet."""

    node: YamlNode
    anchor: str | None
    key: YamlNode | None = None
    merges: list[tuple[int, YamlNode]] = field(default_factory=list)


class _Tree:
    """Grows the tree from events, one at a time, and refuses what grows too large."""

    def __init__(self, offset: int) -> None:
        self.offset = offset
        self.open: list[_Open] = []
        self.anchors: dict[str, YamlNode | None] = {}
        self.nodes = 0
        self.documents = 0
        self.top: YamlNode | None = None

    def feed(self, event: yaml.Event) -> None:
        line = (event.start_mark.line if event.start_mark else 0) + 1 + self.offset
        if isinstance(event, yaml.DocumentStartEvent):
            self.documents += 1
            if self.documents > 1:
                raise Problem(line, "a second YAML document begins here; a recipe is one.")
        elif isinstance(event, yaml.AliasEvent):
            name = event.anchor or ""
            if name not in self.anchors:
                raise Problem(line, f"*{name[:60]} is not defined; &{name[:60]} must stand before it.")
            node = self.anchors[name]
            if node is None:
                raise Problem(line, f"*{name[:60]} stands inside of what it means.")
            self.count(node.size, line)
            self.add(node, line)
        elif isinstance(event, yaml.ScalarEvent):
            node = _scalar(event, line)
            self.count(node.size, line)
            if event.anchor is not None:
                self.anchors[event.anchor] = node
            self.add(node, line)
        elif isinstance(event, yaml.CollectionStartEvent):
            if len(self.open) >= DEEPEST_DOCUMENT:
                raise Problem(line, f"nested deeper than {DEEPEST_DOCUMENT}.")
            self.count(1, line)
            kind = "seq" if isinstance(event, yaml.SequenceStartEvent) else "map"
            node = YamlNode(line, _tag(event.tag, line, kind), [] if kind == "seq" else {})
            if event.anchor is not None:
                self.anchors[event.anchor] = None
            self.open.append(_Open(node, event.anchor))
        elif isinstance(event, yaml.CollectionEndEvent):
            closed = self.open.pop()
            self.merge(closed)
            if closed.anchor is not None:
                self.anchors[closed.anchor] = closed.node
            self.add(closed.node, closed.node.line)

    def count(self, nodes: int, line: int) -> None:
        self.nodes += nodes
        if self.nodes > MOST_NODES:
            raise Problem(line, f"more than {MOST_NODES} values, aliases counted as what they stand for.")

    def add(self, node: YamlNode, line: int) -> None:
        """Puts a finished node into the collection around it."""
        if not self.open:
            self.top = node
            return
        if len(self.open) + node.depth > DEEPEST_DOCUMENT:
            raise Problem(line, f"nested deeper than {DEEPEST_DOCUMENT}.")
        around = self.open[-1]
        parent = around.node
        parent.size += node.size
        parent.depth = max(parent.depth, node.depth + 1)
        if isinstance(parent.value, list):
            parent.value.append(node)
        elif around.key is None:
            # For messages the line of the key is better than the line of the anchor.
            around.key = YamlNode(line, node.tag, node.value, quoted=node.quoted)
        else:
            key, around.key = around.key, None
            self.enter(around, key, node)

    def enter(self, around: _Open, key: YamlNode, node: YamlNode) -> None:
        if isinstance(key.value, list | dict) or key.tag is not None:
            raise Problem(key.line, "a key must be a name or a number.")
        if key.value == "<<" and not key.quoted:
            around.merges.append((key.line, node))
            return
        mapping = around.node
        if key.value in mapping.value:
            # Public recipes say `num_epochs: 10` twice. What says the same again harms nobody.
            if _is_same_scalar(mapping.value[key.value], node):
                return
            first = mapping.key_lines[key.value]
            raise Problem(key.line, f"the key {shown(key.value)} stands here a second time; first in line {first}.")
        mapping.value[key.value] = node
        mapping.key_lines[key.value] = key.line

    def merge(self, closed: _Open) -> None:
        """`<<: *base` or `<<: [*base, *other]`: keys that are not there come from base, then from other."""
        mapping = closed.node
        for line, node in closed.merges:
            for source in node.value if isinstance(node.value, list) else [node]:
                if not isinstance(source.value, dict):
                    raise Problem(line, "<< takes a mapping, or a list of mappings.")
                for key, value in source.value.items():
                    if key not in mapping.value:
                        mapping.value[key] = value
                        mapping.key_lines[key] = source.key_lines[key]


def _is_same_scalar(one: YamlNode, two: YamlNode) -> bool:
    plain = not isinstance(one.value, list | dict) and one.tag == two.tag and one.quoted == two.quoted
    return plain and type(one.value) is type(two.value) and bool(one.value == two.value)


def _tree(text: str, offset: int) -> YamlNode | None:
    tree = _Tree(offset)
    for number, line in enumerate(text.split("\n")):
        if "\t" in line and line[: len(line) - len(line.lstrip())].count("\t") and line.strip():
            raise Problem(number + 1 + offset, "a tab in the indentation; YAML takes spaces.")
    try:
        for event in _events(text):
            tree.feed(event)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = None if mark is None else mark.line + 1 + offset
        raise Problem(
            place, f"this is no YAML: {_plainly(error.problem or error.context or 'it cannot be read')}."
        ) from None
    except yaml.YAMLError:
        raise Problem(None, "this is no YAML: a character that cannot be read.") from None
    return tree.top


def _events(text: str) -> Iterator[yaml.Event]:
    # libyaml where PyYAML was built with it: 20 times faster, the same events.
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
    try:
        while loader.check_event():
            yield loader.get_event()
    except (ValueError, OverflowError, RecursionError):
        # "%YAML 9999999999.1", "\UFFFFFFFF": numbers that the parser takes for granted.
        raise Problem(None, "this is no YAML: a number in it is too large.") from None
    finally:
        loader.dispose()


def _plainly(problem: str) -> str:
    if "\\t" in problem or "'\t'" in problem:
        return "a tab; YAML takes spaces"
    return problem.replace("\n", " ")[:200]


def _tag(tag: str | None, line: int, kind: str) -> str | None:
    """The name behind `!`; None for what YAML itself means by a value of this kind."""
    if tag is None or tag in ("!", _YAML + kind):
        return None
    if tag.startswith("!") and tag[1:].isidentifier():
        return tag[1:]
    spelling = tag.replace(_YAML, "!!", 1)[:80]
    raise Problem(
        line, f"the tag {spelling} cannot stand in a recipe; tags are names of modifiers, like !GMPruningModifier."
    )


def _scalar(event: yaml.ScalarEvent, line: int) -> YamlNode:
    text = event.value
    size = 1 + len(text) // CHARACTERS_IN_A_NODE
    if event.tag in (None, "!"):
        # implicit[0]: written without quotes, so that it may be a number.
        quoted = not event.implicit[0] or event.tag is not None
        return YamlNode(line, None, text if quoted else plain_value(text, line), size=size, quoted=quoted)
    if event.tag == _YAML + "str":
        return YamlNode(line, None, text, size=size)
    if event.tag in (_YAML + "int", _YAML + "float", _YAML + "bool", _YAML + "null"):
        value = plain_value(text, line)
        wanted = {"int": int, "float": float, "bool": bool, "null": type(None)}[event.tag.removeprefix(_YAML)]
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:
            raise Problem(line, f"{shown(text)} is not what its tag says.")
        return YamlNode(line, None, value, size=size)
    tag = _tag(event.tag, line, "scalar")
    return YamlNode(line, tag, plain_value(text, line), size=size)


def plain_value(text: str, line: int | None = None) -> Any:
    """The value of a text without quotes: null, true, a number, or itself.

    >>> [plain_value(text) for text in ("1e-3", "2:4", "010", "yes", "~", "1_000", "0x10")]
    [0.001, '2:4', 10, True, None, 1000, 16]
    """
    if text in NULLS:
        return None
    if text in BOOLEANS:
        return BOOLEANS[text]
    # The patterns take quadratic time, and no number is as long.
    if not (text[0].isdigit() or text[0] in "+-.") or len(text) > LONGEST_NUMBER:
        return text
    if NO_NUMBER.fullmatch(text):
        raise Problem(line, f"{text} cannot stand in a recipe: numbers are finite.")
    integer = INTEGER_PATTERN.fullmatch(text)
    if integer is None and FLOAT_PATTERN.fullmatch(text) is None:
        return text
    digits = text.replace("_", "")
    base = {"0x": 16, "0o": 8}.get(digits[:2], 10)
    number = float(digits) if integer is None else int(digits, base)
    if abs(number) > sys.float_info.max:
        raise Problem(line, f"{shown(text)} is beyond 1e308.")
    return number


def kind_of(node: YamlNode) -> str:
    """Name of a node's kind, for a message."""
    return "a list" if isinstance(node.value, list) else shown(node.value)


def shown(value: object) -> str:
    """A value in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
