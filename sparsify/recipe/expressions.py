"""The expressions of `eval(...)`: bounded arithmetic over a recipe's variables. Nothing in it runs code.

A parser of its own, not `ast`: its errors name the word that is out of place, and its bounds on parentheses hold before
anything nests, where Python's parser keeps no parentheses, words its errors otherwise in every version, and reads more
(strings with escapes, 0x10, comments) and less (010) than a recipe may hold.

::

    expression  = either ["if" either "else" expression]
    either      = both {"or" both}              both    = inverse {"and" inverse}
    inverse     = ["not"] comparison            comparison = sum {("<" | "<=" | ">" | ">=" | "==" | "!=") sum}
    sum, term   = numbers with + - and * / // %
    power       = atom ["**" power], binding tighter than a minus before it
    atom        = number | "text" | True | False | name | function(expression, ...) | (expression)
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sparsify.errors import RecipeError, did_you_mean

__all__: list[str] = []

LONGEST = 1_000
DEEPEST_EXPRESSION = 32
LONGEST_EXPRESSION = 1e308
LARGEST_EXPONENT = 64
_HINT = "It may hold numbers, variables, + - * / // % **, comparisons, `a if b else c` and "

# Evaluating waits until every variable is known, and only the branch of an if that is taken is evaluated.
_Thunk = Callable[[Mapping[str, Any]], Any]
_Number = int | float

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)
    | (?P<name>[^\W\d]\w*)
    | (?P<text>'[^']*'|"[^"]*")
    | (?P<sign>\*\*|//|<=|>=|==|!=|[-+*/%()<>,])
    )""",
    re.VERBOSE,
)
_BINDING: dict[str, tuple[int, Callable[[Any, Any], Any]]] = {
    "+": (1, operator.add),
    "-": (1, operator.sub),
    "*": (2, operator.mul),
    "/": (2, operator.truediv),
    "//": (2, operator.floordiv),
    "%": (2, operator.mod),
}
_ORDER: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_FUNCTIONS: dict[str, tuple[Callable[..., Any], int, int]] = {
    "abs": (abs, 1, 1),
    "float": (float, 1, 1),
    "int": (int, 1, 1),
    "max": (max, 1, LONGEST),
    "min": (min, 1, LONGEST),
    "round": (round, 1, 2),
}
_OPERATORS = frozenset({"and", "else", "if", "not", "or", "True", "False", *_FUNCTIONS})


@dataclass(frozen=True)
class Expression:
    """A parsed expression: the `names` of variables that it needs, and what it gives once they are known."""

    text: str
    names: frozenset[str]
    thunk: _Thunk

    def evaluate(self, variables: Mapping[str, Any]) -> Any:
        """Its value; a name alone gives the variable's value, whatever its type.

        Raises:
            RecipeError: a result beyond 1e308, an exponent beyond 64, a division by zero, or arithmetic on text.
        """
        try:
            return self.thunk(variables)
        except RecipeError as error:
            raise RecipeError(f"eval({self.text}): {error}") from None


@lru_cache(maxsize=1024)
def parse(text: str) -> Expression:
    """The expression that stands between the parentheses of `eval(...)`.

    >>> half = parse("round(num_epochs / 2) if num_epochs > 4 else num_epochs")
    >>> sorted(half.names), half.evaluate({"num_epochs": 10}), half.evaluate({"num_epochs": 3})
    (['num_epochs'], 5, 3)
    >>> parse("2 ** 3 - -1").evaluate({}), parse("params").evaluate({"params": ["conv1"]})
    (9, ['conv1'])

    Raises:
        RecipeError: it is no such expression, is longer than 1,000 characters, or is nested deeper than 32.
    """
    if len(text) > LONGEST:
        raise RecipeError(f"eval(...) of {len(text)} characters; at most {LONGEST} are read. Split it into variables.")
    try:
        parser = _Parser(text)
        thunk = parser.expression(0)
        parser.end()
    except RecipeError as error:
        raise RecipeError(f"eval({text}): {error}") from None
    return Expression(text, frozenset(parser.names), thunk)


def inside_eval(value: str) -> str | None:
    """The text between the parentheses where `value` as a whole is `eval(...)`, otherwise None.

    >>> inside_eval("eval(a * 2)"), inside_eval("evaluate"), inside_eval("eval(a) + 1")
    ('a * 2', None, None)
    """
    value = value.strip()
    return value[5:-1].strip() if value.startswith("eval(") and value.endswith(")") else None


class _Parser:
    def __init__(self, text: str) -> None:
        self.names: set[str] = set()
        self.tokens: list[tuple[str, str]] = []
        position, text = 0, text.rstrip()
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None or match.lastgroup is None:
                raise RecipeError(
                    f"{text[position:].lstrip()[:1]!r} cannot stand in it. {_HINT}{', '.join(_FUNCTIONS)}."
                )
            self.tokens.append((match.lastgroup, match.group(match.lastgroup)))
            position = match.end()
        self.position = 0

    def sees(self, *words: str) -> str | None:
        """The next token if it is a sign or a word among `words`."""
        if self.position < len(self.tokens):
            kind, token = self.tokens[self.position]
            if kind != "text" and token in words:
                return token
        return None

    def takes(self, *words: str) -> str | None:
        token = self.sees(*words)
        self.position += token is not None
        return token

    def needs(self, word: str) -> None:
        if not self.takes(word):
            raise self.unexpected(f"{word!r} is missing")

    def end(self) -> None:
        if self.position < len(self.tokens):
            raise self.unexpected("it should end there")

    def unexpected(self, why: str) -> RecipeError:
        if self.position >= len(self.tokens):
            return RecipeError(f"it ends too early{': ' + why if why.endswith('missing') else ''}.")
        return RecipeError(f"{self.tokens[self.position][1]!r} is out of place: {why}.")

    def expression(self, depth: int) -> _Thunk:
        if depth > DEEPEST_EXPRESSION:
            raise RecipeError(f"nested deeper than {DEEPEST_EXPRESSION}. Split it into variables.")
        value = self.logic(depth, "or")
        if not self.takes("if"):
            return value
        condition = self.logic(depth, "or")
        self.needs("else")
        otherwise = self.expression(depth + 1)
        return lambda variables: value(variables) if condition(variables) else otherwise(variables)

    def logic(self, depth: int, word: str) -> _Thunk:
        parts = [self.logic(depth, "and") if word == "or" else self.inverse(depth)]
        while self.takes(word):
            parts.append(self.logic(depth, "and") if word == "or" else self.inverse(depth))
        if len(parts) == 1:
            return parts[0]

        def combined(variables: Mapping[str, Any]) -> Any:
            result = None
            for part in parts:
                result = part(variables)
                if bool(result) is (word == "or"):
                    break
            return result

        return combined

    def inverse(self, depth: int) -> _Thunk:
        count = 0
        while self.takes("not"):
            count += 1
        value = self.comparison(depth)
        return value if not count else lambda variables: bool(value(variables)) is (count % 2 == 0)

    def comparison(self, depth: int) -> _Thunk:
        first = self.sum(depth, 1)
        rest: list[tuple[str, _Thunk]] = []
        while sign := self.takes("<", "<=", ">", ">=", "==", "!="):
            rest.append((sign, self.sum(depth, 1)))
        if not rest:
            return first

        def compared(variables: Mapping[str, Any]) -> bool:
            left = first(variables)
            for sign, thunk in rest:
                right = thunk(variables)
                if sign in ("==", "!="):
                    holds = (left == right) is (sign == "==")
                else:
                    holds = _ORDER[sign](_finite_number(left, sign), _finite_number(right, sign))
                if not holds:
                    return False
                left = right
            return True

        return compared

    def sum(self, depth: int, binding: int) -> _Thunk:
        """Operators from the left; `binding` 1: + and -, 2: the others."""
        signs = [sign for sign, (strength, _) in _BINDING.items() if strength == binding]
        operand = self.signed if binding == 2 else lambda d: self.sum(d, 2)
        first = operand(depth)
        rest: list[tuple[str, _Thunk]] = []
        while sign := self.takes(*signs):
            rest.append((sign, operand(depth)))
        if not rest:
            return first

        def folded(variables: Mapping[str, Any]) -> Any:
            value = first(variables)
            for sign, thunk in rest:
                value = _evaluate(sign, _BINDING[sign][1], value, thunk(variables))
            return value

        return folded

    def signed(self, depth: int) -> _Thunk:
        negative = any_sign = False
        while sign := self.takes("-", "+"):
            any_sign = True
            negative ^= sign == "-"
        value = self.power(depth)
        if not any_sign:
            return value
        factor = -1 if negative else 1
        return lambda variables: factor * _finite_number(value(variables), "-")

    def power(self, depth: int) -> _Thunk:
        base = self.atom(depth)
        if not self.takes("**"):
            return base
        if depth >= DEEPEST_EXPRESSION:
            raise RecipeError(f"nested deeper than {DEEPEST_EXPRESSION}. Split it into variables.")
        exponent = self.signed(depth + 1)
        return lambda variables: _evaluate("**", _bounded_power, base(variables), exponent(variables))

    def atom(self, depth: int) -> _Thunk:
        if self.position >= len(self.tokens):
            raise self.unexpected("")
        kind, token = self.tokens[self.position]
        if kind == "number":
            self.position += 1
            number = int(token) if token.isdigit() else float(token)
            return lambda _: _bounded(number, token)
        if kind == "text":
            self.position += 1
            return lambda _: token[1:-1]
        if self.takes("("):
            value = self.expression(depth + 1)
            self.needs(")")
            return value
        if kind == "name" and token in ("True", "False"):
            self.position += 1
            return lambda _: token == "True"
        if kind == "name" and self.tokens[self.position + 1 : self.position + 2] == [("sign", "(")]:
            return self.call(token, depth)
        if kind == "name" and token not in _OPERATORS:
            self.position += 1
            self.names.add(token)
            return lambda variables: variables[token]
        raise self.unexpected("a number, a variable or '(' should stand there")

    def call(self, name: str, depth: int) -> _Thunk:
        if name not in _FUNCTIONS:
            near = did_you_mean(name, _FUNCTIONS)
            raise RecipeError(f"{name!r} is no function here; there are {', '.join(_FUNCTIONS)}.{near}")
        self.position += 2
        arguments = [] if self.sees(")") else [self.expression(depth + 1)]
        while self.takes(","):
            arguments.append(self.expression(depth + 1))
        self.needs(")")
        function, least, most = _FUNCTIONS[name]
        if not least <= len(arguments) <= most:
            raise RecipeError(f"{name}() takes {least if least == most else 'at least ' + str(least)} argument(s).")

        def called(variables: Mapping[str, Any]) -> Any:
            values = [_finite_number(argument(variables), name) for argument in arguments]
            # round(5, -10 ** 9) would build a number of a billion digits.
            if name == "round" and len(values) == 2 and not (isinstance(values[1], int) and abs(values[1]) <= 308):
                raise RecipeError(f"round() to {values[1]} digits; give a whole number from -308 to 308.")
            return _bounded(function(*values), name)

        return called


def _finite_number(value: object, where: str) -> _Number:
    if isinstance(value, bool) or not isinstance(value, int | float):
        shown = repr(value) if len(repr(value)) < 60 else f"{repr(value)[:60]}..."
        raise RecipeError(f"{where!r} needs numbers, not {shown}.")
    return value


def _bounded(value: _Number | complex, where: str) -> _Number:
    if isinstance(value, complex):
        raise RecipeError("the root of a negative number is no number here.")
    if not (math.isfinite(value) if isinstance(value, float) else True) or abs(value) > LONGEST_EXPRESSION:
        raise RecipeError(f"{where!r} gives a number beyond {LONGEST_EXPRESSION:g}.")
    return value


def _bounded_power(base: _Number, exponent: _Number) -> Any:
    if abs(exponent) > LARGEST_EXPONENT:
        raise RecipeError(f"an exponent of {exponent:g}; at most {LARGEST_EXPONENT} is read.")
    return base**exponent


def _evaluate(sign: str, function: Callable[[Any, Any], Any], left: object, right: object) -> _Number:
    try:
        return _bounded(function(_finite_number(left, sign), _finite_number(right, sign)), sign)
    except ZeroDivisionError:
        raise RecipeError(f"{sign!r} divides by zero.") from None
    except OverflowError:
        raise RecipeError(f"{sign!r} gives a number beyond {LONGEST_EXPRESSION:g}.") from None
