"""Any bytes give a recipe or a RecipeError, within 2 seconds and bounded memory; nothing runs code."""

from __future__ import annotations

import random
import subprocess
import sys
import time
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsify import RecipeError
from sparsify.recipe import Recipe, grammar

FILES = sorted((Path(__file__).parents[1] / "recipes").iterdir())
RANGE = "modifiers: [!EpochRangeModifier {end_epoch: 5}]\n"
MIB = 1 << 20
SECONDS = 2.0


def bomb(first: str, inner: str) -> str:
    names = "abcdefghijklmnop"
    lines = [f"a: &a {first}"]
    lines += [f"{new}: &{new} {inner.replace('_', ','.join([f'*{old}'] * 9))}" for old, new in pairwise(names)]
    return "\n".join(lines) + "\n" + RANGE


def eval_bomb(items: int, levels: int) -> str:
    lines = ["v0: [x, x]"]
    lines += [f"v{i + 1}: [{','.join([f'eval(v{i})'] * items)}]" for i in range(levels)]
    return "\n".join(lines) + "\n" + RANGE


HOSTILE = {
    "aliases": bomb("[x,x,x,x,x,x,x,x,x]", "[_]"),
    "merge keys": bomb("{x: 1}", "{<<: [_]}"),
    "aliases of mappings": bomb("{x: 1}", "{k: [_]}"),
    "evals": eval_bomb(9, 20),
    "deep evals": eval_bomb(1, 40),
    "long text behind aliases": "a: &a " + "x" * 500_000 + "\nb: [" + "*a," * 30 + "]\n" + RANGE,
    "long text through eval": "a: " + "x" * 500_000 + "\nb: [" + "eval(a)," * 30 + "]\n" + RANGE,
    "deep lists": "[" * 100_000,
    "deep mappings": "{a: " * 100_000,
    "deep items": "- " * 100_000,
    "deep keys": "? " * 100_000,
    "deep blocks": "\n".join(" " * i + "a:" for i in range(1_400)),
    "many nodes": "x: [" + "1," * 500_000 + "]",
    "many keys": "".join(f"k{i}: v\n" for i in range(80_000)),
    "many modifiers": "modifiers:\n" + "- !EpochRangeModifier {end_epoch: 1}\n" * 28_000,
    "modifiers at the limit": "modifiers:\n" + "- !SetLearningRateModifier {learning_rate: 0.1}\n" * 6_000,
    "one name pruned often": "modifiers:\n" + "- !ConstantPruningModifier {params: a}\n" * 6_000,
    "many variables and a near miss": "".join(f"variable_{i}: 1\n" for i in range(9_000))
    + "x: eval(variable_)\n"
    + RANGE,
    "long name and a near miss": "modifiers: [!EpochRangeModifier {" + "end_epoch" * 50_000 + ": 1}]",
    "long modifier": f"modifiers: [!{'EpochRange' * 50_000} {{}}]",
    "one variable needs all": "x: ["
    + ",".join(f"eval(v{i})" for i in range(4_000))
    + "]\n"
    + "".join(f"v{i}: {i}\n" for i in range(4_000))
    + RANGE,
    "a chain of variables": "".join(f"v{i}: eval(v{i + 1})\n" for i in range(9_000)) + "v9000: 1\n" + RANGE,
    "a circle of variables": "".join(f"v{i}: eval(v{(i + 1) % 9_000})\n" for i in range(9_000)) + RANGE,
    "costly expressions": "x: &x eval(" + "+".join(["1"] * 490) + ")\ny: [" + ",".join(["*x"] * 1_200) + "]\n" + RANGE,
    "different costly expressions": "".join(f"x{i}: eval({i}+{'+'.join(['(1)'] * 240)})\n" for i in range(1_000))
    + RANGE,
    "stages": "".join(f"s{i}: {{modifiers: []}}\n" for i in range(6_000)),
    "stages and variables": "".join(f"v{i}: 1\n" for i in range(4_000))
    + "".join(f"s{i}: {{modifiers: []}}\n" for i in range(2_500)),
    "documents": "---\n" * 200_000,
    "fences": "+++\n---\n" * 100_000,
    "fences with modifiers": "---\nmodifiers:\n" * 60_000,
    "comments": "<!---->" * 140_000,
    "unclosed comments": "<!--" * 250_000,
    "comment": "#" + "x" * (MIB - 1),
    "blank lines": "\n" * (MIB - 1),
    "spaces": " " * (MIB - 10) + "a: 1",
    "carriage returns": "\r" * (MIB - 1),
    "a long line": "x" * (MIB - 1),
    "a long quoted text": "a: '" + "x\n" * 500_000,
    "escapes": '"' + "\\x41" * 250_000,
    "anchors": "&a " * 300_000,
    "tags": "!a " * 300_000,
    "directives": "%a b\n" * 200_000,
    "a version": "%YAML 99999999999999999999.1\n---\na: 1\n",
    "a number": "a: " + "9" * (MIB - 10),
    "a hexadecimal number": "a: 0x" + "f" * (MIB - 10),
    "underscores": "a: 1" + "_" * (MIB - 10),
    "digits and a dot": "a: " + "1" * 400_000 + "." + "1" * 400_000 + "e",
    "not quite modifiers": "modifiers" * 100_000,
    "words": ("a" * 100 + "\n") * 10_000,
    "too large": "x" * (MIB + 1),
    "a cast": "a: !!int 1e5\n",
    "an object": "a: !!python/object/apply:os.system ['true']\n",
    "a binary": "a: !!binary aGVsbG8=\n",
    "a set": "a: !!set {x, y}\n",
    "sexagesimals": "a: " + "1:" * 400_000 + "1",
}


def read(data: str | bytes) -> Recipe | None:
    try:
        return Recipe.from_yaml(data)
    except RecipeError as error:
        assert len(str(error)) < 3_000
        return None


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_takes_bounded_time(name: str) -> None:
    start = time.process_time()
    recipe = read(HOSTILE[name])
    assert time.process_time() - start < SECONDS
    if recipe is not None:
        assert len(recipe.to_yaml()) < 8 * MIB


@pytest.mark.parametrize(
    "name", ["aliases", "merge keys", "evals", "long text through eval", "deep lists", "a long line"]
)
def test_hostile_text_takes_bounded_memory(name: str) -> None:
    tracemalloc.start()
    try:
        read(HOSTILE[name])
        assert tracemalloc.get_traced_memory()[1] < 64 * MIB
    finally:
        tracemalloc.stop()


def test_bombs_are_refused_for_their_size() -> None:
    for name in ("aliases", "merge keys", "aliases of mappings", "many nodes", "long text behind aliases"):
        with pytest.raises(RecipeError, match="more than 20000 values, aliases counted as what they stand for"):
            Recipe.from_yaml(HOSTILE[name])
    for name in ("evals", "long text through eval"):
        with pytest.raises(RecipeError, match=r"more than 20000 values through eval"):
            Recipe.from_yaml(HOSTILE[name])
    for name in ("deep lists", "deep mappings", "deep items", "deep keys", "deep blocks", "deep evals"):
        with pytest.raises(RecipeError, match="nested deeper than 32"):
            Recipe.from_yaml(HOSTILE[name])


def test_aliases_do_not_add_depth_unseen() -> None:
    text = "a: &a " + "[" * 20 + "]" * 20 + "\nb: " + "[" * 20 + "*a" + "]" * 20 + "\n" + RANGE
    with pytest.raises(RecipeError, match="recipe:2: nested deeper than 32"):
        Recipe.from_yaml(text)


def test_without_libyaml_the_same_texts_are_read_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [Recipe.load(path) for path in FILES]
    monkeypatch.setattr(yaml, "CSafeLoader", yaml.SafeLoader, raising=False)
    assert [Recipe.load(path) for path in FILES] == expected
    for name in ("aliases", "merge keys", "deep lists", "deep blocks", "documents", "a version", "an object"):
        assert read(HOSTILE[name]) is None or name == "a version"


def test_a_file_is_read_no_further_than_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(RecipeError, match=r"large.yaml: the recipe is larger than 1 MiB"):
        Recipe.load(path)


def test_reading_runs_no_code_and_touches_no_network() -> None:
    program = """
import sys
from sparsify.recipe import Recipe, read_recipe
from sparsify import RecipeError
seen = []
sys.addaudithook(lambda name, args: seen.append(name))
for text in (
    "a: !!python/object/apply:os.system ['true']\\nmodifiers: []",
    "a: eval(__import__('os').system('true'))\\nmodifiers: [!EpochRangeModifier {end_epoch: 1}]",
    "a: eval(().__class__)\\nmodifiers: [!EpochRangeModifier {end_epoch: 1}]",
    "modifiers: [!EpochRangeModifier {end_epoch: 1}]",
):
    try:
        Recipe.from_yaml(text)
    except RecipeError:
        pass
refused = ('exec', 'compile', 'import', 'os', 'subprocess', 'socket', 'open', 'pickle')
print(sorted({n for n in seen if n.split('.')[0] in refused}))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


# Fuzzing

PIECES = [
    "modifiers:",
    "- !EpochRangeModifier",
    "- !GMPruningModifier",
    "{",
    "}",
    "[",
    "]",
    ":",
    ",",
    "&a ",
    "*a",
    "<<: *a",
    "eval(",
    ")",
    "x",
    "1e-3",
    "-1",
    ".nan",
    "'",
    '"',
    "|",
    ">",
    "---",
    "+++",
    "...",
    "#",
    "!",
    "!!python/object:x",
    "? ",
    "\t",
    "\n",
    "\r",
    "\0",
    "\x85",
    "\u2028",
    "\ufeff",
    "é",
    "%",
    "@",
    "`",
    "end_epoch: 5",
    "type: EpochRangeModifier",
    "final_sparsity: {0.5: [a]}",
    "scheme: {weights: null}",
    "lr_kwargs: {milestones: [x]}",
    "  ",
    "self: 1",
    "9" * 400,
]


def mutated(source: random.Random, data: bytearray) -> bytes:
    for _ in range(source.randint(1, 3)):
        at = source.randint(0, len(data))
        match source.randint(0, 5):
            case 0:
                data[at:at] = source.choice(PIECES).encode()
            case 1:
                del data[at : at + source.randint(1, 20)]
            case 2 if at < len(data):
                data[at] = source.randint(0, 255)
            case 3:
                start = source.randint(0, len(data))
                data[at:at] = data[start : start + source.randint(1, 200)]
            case 4:
                numbers = [i for i, byte in enumerate(data) if 48 <= byte <= 57]
                if numbers:
                    data[source.choice(numbers)] = ord(source.choice("-.e0:_9tx"))
            case _:
                lines = bytes(data).split(b"\n")
                line = source.randrange(len(lines))
                lines[line] = b" " * source.randint(0, 4) + lines[line].lstrip()
                data = bytearray(b"\n".join(lines))
    return bytes(data)


def survives(data: bytes) -> bool:
    start = time.process_time()
    recipe = read(data)
    assert time.process_time() - start < SECONDS, data
    if recipe is not None:
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe, data
    return recipe is not None


def fuzz(rounds: int, seed: int) -> tuple[int, int]:
    source = random.Random(seed)
    texts = [path.read_bytes() for path in FILES]
    results = [survives(mutated(source, bytearray(source.choice(texts)))) for _ in range(rounds)]
    return sum(results), rounds


def test_mutated_files_give_a_recipe_or_a_recipe_error() -> None:
    good, rounds = fuzz(600, seed=0)
    # A fuzzer all of whose inputs are refused at the door tests the door only.
    assert 0.05 < good / rounds < 0.95


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_many_mutated_files_give_a_recipe_or_a_recipe_error(seed: int) -> None:
    fuzz(5_000, seed)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.one_of(
        st.binary(max_size=200), st.lists(st.sampled_from(PIECES), max_size=30).map(lambda p: "".join(p).encode())
    )
)
def test_any_bytes_give_a_recipe_or_a_recipe_error(data: bytes) -> None:
    survives(data)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**300), 10**300)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cs", "Cc", "Cn")), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text("abc'<:# é1.e-", max_size=6), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(values)
def test_any_value_survives_saving(value: Any) -> None:
    recipe = Recipe.from_yaml(RANGE).model_copy(update={"metadata": {"x": value}})
    assert Recipe.from_yaml(recipe.to_yaml()).metadata == {"x": value}


def test_measure_counts_as_the_reader_does() -> None:
    node = grammar.value("[1, {a: [x, y]}, z]")
    assert grammar.measure([1, {"a": ["x", "y"]}, "z"]) == (node.size, node.depth)
