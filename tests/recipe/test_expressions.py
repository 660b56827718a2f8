from __future__ import annotations

import time
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sparsify.errors import RecipeError
from sparsify.recipe.expressions import inside_eval, parse

VARIABLES = {"a": 3, "b": 0.5, "epochs": 10, "names": ["conv1", "conv2"], "task": "squad", "flag": True}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("1e-3", 0.001),
        (".5", 0.5),
        ("a", 3),
        ("names", ["conv1", "conv2"]),
        ("task", "squad"),
        ("1 + 2 * 3", 7),
        ("(1 + 2) * 3", 9),
        ("2 - 3 - 4", -5),
        ("2 / 4 / 2", 0.25),
        ("7 // 2", 3),
        ("-7 // 2", -4),
        ("-7 % 3", 2),
        ("2 ** 3 ** 2", 512),
        ("-2 ** 2", -4),
        ("2 ** -1", 0.5),
        ("--a", 3),
        ("+a", 3),
        ("a * -b", -1.5),
        ("abs(-a)", 3),
        ("float(a)", 3.0),
        ("int(3.9)", 3),
        ("min(a, b, 7)", 0.5),
        ("max(a, b)", 3),
        ("round(2.567, 1)", 2.6),
        ("round(2.5)", 2),
        ("a < 4", True),
        ("1 < a <= 3 < 4", True),
        ("1 < a < 2", False),
        ("a == 3.0", True),
        ("task == 'squad'", True),
        ('task != "squad"', False),
        ("not a == 3", False),
        ("not not a", True),
        ("a == 3 and b == 1 or flag", True),
        ("1 if flag else 2", 1),
        ("1 if a > 5 else 2 if a > 2 else 3", 2),
        ("epochs if True else 1 / 0", 10),
        ("(1 if False else 2) + 1", 3),
    ],
)
def test_values_are_those_of_python(text: str, value: object) -> None:
    result = parse(text).evaluate(VARIABLES)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("9 ** 99999", "an exponent of 99999; at most 64"),
        ("9 ** 64 ** 64", "an exponent"),
        ("1e308 * 10", "beyond 1e[+]308"),
        ("1e300 ** 2", "beyond 1e[+]308"),
        ("10 ** 64 * 10 ** 64 * 10 ** 64 * 10 ** 64 * 10 ** 64", "beyond 1e[+]308"),
        ("1e999", "beyond 1e[+]308"),
        ("1 / 0", "divides by zero"),
        ("1 // 0", "divides by zero"),
        ("0 ** -1", "divides by zero"),
        ("(-8) ** 0.5", "root of a negative number"),
        ("round(5, -1000000000)", "round[(][)] to -1000000000 digits"),
        ("names + 1", "needs numbers, not"),
        ("task * 2", "needs numbers, not 'squad'"),
        ("flag + 1", "needs numbers, not True"),
        ("__import__('os')", "'__import__' is no function here"),
        ("mni(1)", "Did you mean 'min'"),
        ("a.b", "'.' cannot stand in it"),
        ("a[0]", "cannot stand in it"),
        ("lambda: 1", "cannot stand in it"),
        ("a b", "'b' is out of place"),
        ("1 +", "ends too early"),
        ("", "ends too early"),
        ("(1", "'[)]' is missing"),
        ("1 if 2", "'else' is missing"),
        ("min()", "min[(][)] takes at least 1"),
        ("abs(1, 2)", "abs[(][)] takes 1"),
        ("(" * 100 + "1" + ")" * 100, "nested deeper than 32"),
        ("2 ** " * 100 + "1", "nested deeper than 32"),
        ("1 if 0 else " * 50 + "1", "nested deeper than 32"),
        ("1 + " * 400 + "1", "of 1601 characters; at most 1000"),
    ],
)
def test_what_is_no_bounded_arithmetic_is_refused(text: str, message: str) -> None:
    start = time.perf_counter()
    with pytest.raises(RecipeError, match=message):
        parse(text).evaluate(VARIABLES)
    assert time.perf_counter() - start < 0.5


def test_exponents_reach_from_minus_64_to_64() -> None:
    assert parse("1.5 ** 64").evaluate({}) == 1.5**64
    assert parse("1.5 ** -64").evaluate({}) == 1.5**-64
    for text in ("1.5 ** 65", "1.5 ** -65"):
        with pytest.raises(RecipeError, match=r"an exponent of -?65; at most 64 is read"):
            parse(text).evaluate({})


def test_names_are_those_of_variables_only() -> None:
    assert parse("min(a, 'text') if b else not c and True").names == {"a", "b", "c"}


def test_eval_must_be_the_whole_text() -> None:
    assert inside_eval(" eval( a + 1 ) ") == "a + 1"
    assert inside_eval("eval(a") is None
    assert inside_eval("1 + eval(a)") is None


@given(st.text(alphabet="0123456789.eE+-*/%()<>=! abif,lsmnxrodu'\"", max_size=60))
def test_any_text_gives_a_value_or_a_recipe_error(text: str) -> None:
    with suppress(RecipeError):
        parse(text).evaluate({name: 2.5 for name in parse(text).names} | {"a": 1, "b": [1]})


@st.composite
def arithmetic(draw: st.DrawFn, depth: int = 0) -> str:
    if depth > 4 or draw(st.booleans()):
        return str(draw(st.integers(0, 9)))
    left, right = draw(arithmetic(depth=depth + 1)), draw(arithmetic(depth=depth + 1))
    sign = draw(st.sampled_from(["+", "-", "*", "/", "//", "%", "<", "<=", "==", "and", "or"]))
    return draw(st.sampled_from([f"({left} {sign} {right})", f"{left} {sign} {right}", f"-{left}", f"abs({left})"]))


@given(arithmetic())
@example("1 / (0 < 0)")
def test_any_arithmetic_agrees_with_python(text: str) -> None:
    # The reference is Python itself, on text that this test made.
    try:
        expected = eval(text, {"__builtins__": {}}, {"abs": abs})
    except ZeroDivisionError:
        # A comparison's result is no number here, and may be refused before the division is reached.
        with pytest.raises(RecipeError, match=r"divides by zero|needs numbers, not (True|False)"):
            parse(text).evaluate({})
        return
    try:
        result = parse(text).evaluate({})
    except RecipeError as error:
        # A comparison's result is no number here: that is stricter than Python.
        assert "needs numbers, not" in str(error)
        return
    assert result == expected
