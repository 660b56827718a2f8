from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from sparsify import RecipeError
from sparsify.modifiers.epochs import EpochRangeModifier
from sparsify.modifiers.magnitude_pruning import ConstantPruningModifier
from sparsify.recipe import Recipe, read_recipe

GM = """\
# a comment
modifiers:
  - !EpochRangeModifier
    end_epoch: 10.0
  - !GMPruningModifier
    start_epoch: 1.0
    end_epoch: 9.0
    update_frequency: 1.0
    init_sparsity: 0.05
    final_sparsity: 0.8
    params: [conv1.weight]
"""
RANGE = "modifiers:\n  - !EpochRangeModifier {end_epoch: 5.0}\n"


def message(text: str | bytes, variables: Any = None) -> str:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(text, variables)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    return str(caught.value)


def test_the_example_of_the_style_guide(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("\n\n\n\n" + GM.replace("0.8", "80.0"))
    expected = "recipe.yaml:14: GMPruningModifier.final_sparsity: 80.0 is not a fraction in [0, 1]; did you mean 0.8?"
    with pytest.raises(RecipeError, match=f"^{re.escape(expected)}$"):
        Recipe.load(path)


@pytest.mark.parametrize(
    ("old", "new", "line", "text"),
    [
        (
            "!GMPruningModifier",
            "!GMPruningModifer",
            5,
            "there is no modifier 'GMPruningModifer'. Did you mean 'GMPruningModifier'",
        ),
        ("!GMPruningModifier", "!Xyz", 5, "there is no modifier 'Xyz'. There are: ACDCPruningModifier, "),
        ("final_sparsity", "final_sparcity", 10, "final_sparcity: no such field. Did you mean 'final_sparsity'"),
        ("    final_sparsity: 0.8\n", "", 5, "GMPruningModifier.final_sparsity: is required and was not given"),
        ("final_sparsity: 0.8", "final_sparsity: -0.1", 10, "-0.1 is not a fraction in [0, 1]"),
        ("final_sparsity: 0.8", "final_sparsity: yes", 10, "GMPruningModifier.final_sparsity: True is neither"),
        ("final_sparsity: 0.8", "final_sparsity: [0.8]", 10, "GMPruningModifier.final_sparsity"),
        ("update_frequency: 1.0", "update_frequency: 0", 8, "0.0 is no frequency; give epochs above 0, or -1"),
        ("update_frequency: 1.0", "update_frequency: true", 8, "true is not a number"),
        (
            "update_frequency: 1.0",
            "update_frequency: '1'",
            8,
            "'1' is text where a number belongs; write it without quotes",
        ),
        ("update_frequency: 1.0", "update_frequency: .nan", 8, ".nan cannot stand in a recipe"),
        ("update_frequency: 1.0", "update_frequency: .inf", 8, ".inf cannot stand in a recipe"),
        ("update_frequency: 1.0", "update_frequency: nan", 8, "'nan' is text where a number belongs"),
        ("start_epoch: 1.0", "start_epoch: 9.5", 6, "start_epoch: 9.5 lies after end_epoch 9.0"),
        (
            "start_epoch: 1.0",
            "start_epoch: -2",
            6,
            "start_epoch: -2.0 is not an epoch; give 0 or more, or -1 for at once",
        ),
        ("    end_epoch: 9.0", "    end_epoch: -1", 7, "end_epoch: -1 (never) cannot end a ramp"),
        (
            "    end_epoch: 9.0",
            "    end_epoch: 9.0\n    end_epoch: 8.0",
            8,
            "the key 'end_epoch' stands here a second time; first in line 7",
        ),
        ("[conv1.weight]", "[conv1.weight, 3]", 11, "GMPruningModifier.params"),
        ("[conv1.weight]", "*convs", 11, "*convs is not defined; &convs must stand before it"),
        ("[conv1.weight]", "eval(convs)", 11, "GMPruningModifier.params: eval(convs): there is no variable 'convs'"),
        ("[conv1.weight]", "!GMPruningModifier {}", 11, "!GMPruningModifier can only stand before a modifier"),
        (
            "[conv1.weight]",
            "!!python/object:os.system []",
            11,
            "the tag !!python/object:os.system cannot stand in a recipe",
        ),
        ("  end_epoch: 9.0", "\tend_epoch: 9.0", 7, "a tab in the indentation; YAML takes spaces"),
        (
            "- !EpochRangeModifier\n    end_epoch: 10.0",
            "- end_epoch: 10.0\n    x: 1",
            3,
            "an item of 'modifiers' is a modifier",
        ),
        (
            "!EpochRangeModifier\n    end_epoch: 10.0",
            "!EpochRangeModifier [1]",
            3,
            "EpochRangeModifier takes a mapping of fields, not a list",
        ),
        ("!EpochRangeModifier\n", "!EpochRangeModifier\n    3: 4\n", 4, "the key 3 is no name of a field"),
        ("!EpochRangeModifier\n", "!EpochRangeModifier\n    self: 4\n", 4, "EpochRangeModifier.self: no such field"),
    ],
)
def test_a_wrong_field_is_said_with_its_line(old: str, new: str, line: int, text: str) -> None:
    assert old in GM
    said = message(GM.replace(old, new))
    assert said.startswith(f"recipe:{line}: ")
    assert text in said
    assert len(said) < 800


def test_a_nested_field_is_said_with_its_own_line() -> None:
    said = message(
        "modifiers:\n  - !QuantizationModifier\n    start_epoch: 1\n    scheme:\n      input_activations: null\n"
        "      weights:\n        num_bits: '8'\n"
    )
    assert said.startswith("recipe:7: QuantizationModifier.scheme.weights.num_bits: '8' is text where a number belongs")


def test_lines_of_front_matter_and_of_other_spellings_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("<!-- one\ntwo -->\n\n---\ntitle: x\n---\n\n---\n" + GM.replace("0.8", "8") + "---\n# page\n")
    with pytest.raises(RecipeError, match=r"^page.md:18: .*final_sparsity: 8.0 is not .*; did you mean 0.08"):
        Recipe.load(path)
    said = message("s:\n  pruning_modifiers:\n    ConstantPruningModifier:\n      start: 0\n      targets: [1]\n")
    assert said.startswith("recipe:5: ConstantPruningModifier.params")
    said = message("m_modifiers:\n  - type: EpochRangeModifier\n    end_epoch: x\n")
    assert said.startswith("recipe:3: EpochRangeModifier.end_epoch: 'x' is text")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "recipe: the recipe is empty"),
        ("# only a comment\n", "recipe: the recipe is empty"),
        ("- 1\n", "recipe:1: a recipe is a mapping of names to values, not a list"),
        ("just text\n", "recipe:1: a recipe is a mapping of names to values, not 'just text'"),
        ("a: 1\n", "recipe: there is no modifier in it"),
        ("modifiers: []\n", "recipe: there is no modifier in it"),
        ("modifiers:\n", "recipe: there is no modifier in it"),
        ("modifiers: 3\n", "recipe:1: 'modifiers' must be a list of modifiers"),
        ("modifiers: !EpochRangeModifier {end_epoch: 1}\n", "recipe:1: 'modifiers' must be a list of modifiers"),
        (RANGE + "---\n" + RANGE, "recipe:3: a second YAML document begins here"),
        ("---\n" + RANGE + "---\n" + RANGE, "recipe:4: a second YAML document begins here"),
        ("---\n" + RANGE + "---\nx: 1\n", "recipe:4: a second YAML document begins here"),
        ("x: 1\nx: 2\n" + RANGE, "recipe:2: the key 'x' stands here a second time; first in line 1"),
        ("x: {a: 1, a: 2}\n" + RANGE, "recipe:1: the key 'a' stands here a second time"),
        ("1: 2\n" + RANGE, "recipe:1: the key 1 is no name; put it into quotes"),
        ("on: 2\n" + RANGE, "recipe:1: the key True is no name; put it into quotes"),
        ("[1]: 2\n" + RANGE, "recipe:1: a key must be a name or a number"),
        ("x: [1, 2\n" + RANGE, "recipe:2: this is no YAML"),
        ("x: 'a\n", "this is no YAML: found unexpected end of stream"),
        ("x: a: b\n", "recipe:1: this is no YAML: mapping values are not allowed"),
        ("x: &a [*a]\n" + RANGE, "recipe:1: *a stands inside of what it means"),
        ("x: {<<: 3}\n" + RANGE, "recipe:1: << takes a mapping"),
        ("x: 1e999\n" + RANGE, "recipe:1: '1e999' is beyond 1e308"),
        ("x: " + "9" * 400 + "\n" + RANGE, "beyond 1e308"),
        ("\nx: \0\n" + RANGE, "recipe:2: the character NUL cannot stand in a recipe"),
        ("\nx: \ud800\n" + RANGE, "recipe:2: the character U+D800 cannot stand in a recipe"),
        ("x: 1\ny: caf\xe9\n".encode("latin-1"), "recipe:2: is not UTF-8"),
        (
            "a: eval(b)\nb: eval(c + 1)\nc: eval(a)\n" + RANGE,
            "variables refer to each other in a circle: a -> b -> c -> a",
        ),
        ("a: eval(a)\n" + RANGE, "recipe:1: variables refer to each other in a circle: a -> a"),
        ("a: 1\nb: eval(aa)\n" + RANGE, "recipe:2: eval(aa): there is no variable 'aa'"),
        (
            "epochs: 1\nb: [1,\n eval(epoch)]\n" + RANGE,
            "recipe:3: eval(epoch): there is no variable 'epoch'. Did you mean 'epochs'",
        ),
        ("b: eval(9 ** 99999)\n" + RANGE, "recipe:1: eval(9 ** 99999): an exponent of 99999"),
        ("b: eval(1 +)\n" + RANGE, "recipe:1: eval(1 +): it ends too early"),
        ("a: [1]\nb: {eval(a): 1}\n" + RANGE, "recipe:2: a key must be a name or a number"),
        (
            RANGE + "stage:\n  x_modifiers:\n    - !EpochRangeModifier {end_epoch: 1}\n",
            "recipe:1: 'modifiers' stands outside of the stages 'stage'",
        ),
        ("stage:\n  3: 4\n  x_modifiers: []\n", "recipe:2: stage: the key 3 is no name"),
        ("__metadata__: !X {}\n" + RANGE, "recipe:1: !X can only stand before a modifier"),
    ],
)
def test_a_wrong_text_is_said_with_its_line(text: str | bytes, said: str) -> None:
    assert said in message(text)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (
            {"epoch": 1},
            "recipe_variables: there is no variable 'epoch' in the recipe. Did you mean 'epochs'? It has: epochs",
        ),
        ({"epochs": object()}, "recipe_variables['epochs']: <object"),
        ({"epochs": float("nan")}, "recipe_variables['epochs']: nan is neither a finite number"),
        ({"epochs": float("inf")}, "recipe_variables['epochs']: inf is neither"),
        ("epochs", "recipe_variables: 'epochs' is not 'name=value'"),
        ("{epochs: 1", "is no JSON"),
        (3, "recipe_variables are a mapping, JSON or 'name=value,...', not 3"),
        ({"epochs": "eval(no)"}, "there is no variable 'no'"),
    ],
)
def test_wrong_given_variables(variables: Any, said: str) -> None:
    assert said in message("epochs: 5\n" + RANGE, variables)


def pruning(names: str, start: float, end: float) -> str:
    return f"  - !ConstantPruningModifier {{params: {names}, start_epoch: {start}, end_epoch: {end}}}\n"


@pytest.mark.parametrize(
    ("first", "second", "overlap"),
    [
        (("[a]", 0, 5), ("[b, a]", 4, 9), True),
        (("[a.weight]", 0, 5), ("a", 0, 5), True),
        (("[a]", -1, -1), ("[a]", 100, 101), True),
        (("[a]", 4, 9), ("[a]", 0, 5), True),
        (("[a]", 0, 5), ("[a]", 5, 9), False),
        (("[a]", 0, 5), ("[a]", 5, -1), False),
        (("[a]", 0, 5), ("[b]", 0, 5), False),
    ],
)
def test_pruning_twice_at_a_time_is_refused_and_a_handover_is_not(first: Any, second: Any, overlap: bool) -> None:
    text = "modifiers:\n" + pruning(*first) + pruning(*second)
    if overlap:
        said = message(text)
        assert re.match(r"recipe:3: ConstantPruningModifier prunes 'a' from epoch .* to .*, but ", said)
        with pytest.raises(RecipeError, match="prunes 'a'"):
            Recipe.from_modifiers(
                ConstantPruningModifier(params=["a"], start_epoch=float(s), end_epoch=float(e))
                for _, s, e in (first, second)
            )
    else:
        assert len(Recipe.from_yaml(text).modifiers) == 2


def test_an_overlap_hidden_behind_a_shorter_one_is_found() -> None:
    text = "modifiers:\n" + pruning("[a]", 0, 9) + pruning("[b]", 1, 2) + pruning("[b]", 2, 3) + pruning("[a]", 8, 10)
    assert message(text).startswith("recipe:5: ")


def test_modifiers_built_in_python() -> None:
    with pytest.raises(RecipeError, match="needs at least one modifier"):
        Recipe.from_modifiers([])
    with pytest.raises(RecipeError, match="'x' is none"):
        Recipe.from_modifiers(["x"])  # type: ignore[list-item]
    with pytest.raises(RecipeError, match=r"^EpochRangeModifier.end_epoch: is required") as caught:
        EpochRangeModifier()
    assert caught.value.field == "end_epoch"


@pytest.mark.parametrize("source", ["no/such/recipe.yaml", "recipe.md", Path("nothing"), "nothing at all", "x" * 5000])
def test_a_missing_file_is_a_recipe_error_and_an_os_error(source: Any) -> None:
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*: .*Give the path of a recipe, or its text"):
        read_recipe(source)
    with pytest.raises(OSError, match="cannot read"):
        read_recipe(source)


def test_what_is_no_file_is_refused_without_being_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is no file"):
        Recipe.load(tmp_path)
    with pytest.raises(OSError, match="is no file"):
        Recipe.load("/dev/zero")
    with pytest.raises(RecipeError, match="not downloaded"):
        read_recipe("zoo:some/stub")
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        read_recipe("nul\0byte")
