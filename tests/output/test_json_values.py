"""JSON of frozen dataclasses: the same values come back, and what is wrong is named by key and value."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import pytest

from sparsify.output.json_values import (
    EXACT,
    EXACT_AND_FINITE,
    from_json_object,
    json_object,
    json_text,
    plain,
)


@dataclass(frozen=True)
class Part:
    __pydantic_config__ = EXACT

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Whole:
    __pydantic_config__ = EXACT

    kind: Literal["one", "two"]
    parts: tuple[Part, ...]
    times: Mapping[str, tuple[float, ...]]
    most: float | None
    count: int
    levels: tuple[int | float, ...] = ()
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Finite:
    __pydantic_config__ = EXACT_AND_FINITE

    values: tuple[float, ...]


WHOLE = Whole("two", (Part("a", (1, 2)), Part("ü", ())), {"x": (0.1, 1e-300), "y": ()}, None, 3, (8, 0.5))


def test_the_same_value_comes_back() -> None:
    text = json_text(WHOLE, {"format": 1}, indent=2)
    state = json_object(text)
    assert state.pop("format") == 1
    back = from_json_object(Whole, state)
    assert back == WHOLE
    assert [type(level) for level in back.levels] == [int, float]
    assert isinstance(back.parts, tuple) and isinstance(back.parts[0].shape, tuple)
    assert json_text(back, {"format": 1}, indent=2) == text


def test_a_whole_number_is_a_float_and_a_missing_default_is_the_default() -> None:
    state = {**json_object(json_text(WHOLE, {}, indent=0)), "most": 2, "levels": [1]}
    del state["notes"]
    back = from_json_object(Whole, state)
    assert (back.most, back.notes) == (2.0, {})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kind": "three"}, "kind is 'three': input should be 'one' or 'two'"),
        ({"count": "3"}, "count is '3': input should be a valid integer"),
        ({"count": True}, "count is True"),
        ({"count": 3.5}, r"count is 3\.5"),
        ({"most": "fast"}, "most is 'fast'|most.float is 'fast'"),
        ({"parts": 3}, "parts is 3"),
        ({"parts": [{"name": "x"}]}, r"parts\.0\.shape is missing"),
        ({"parts": [{"name": "x", "shape": [], "more": 1}]}, r"parts\.0\.more is unknown"),
        ({"parts": [{"name": 1, "shape": []}]}, r"parts\.0\.name is 1"),
        ({"times": {"x": ["a"]}}, r"times\.x\.0 is 'a'"),
        ({"times": [["x", 1]]}, "times is"),
        ({"more": 1}, "more is unknown"),
        ({"notes": {"x": "y" * 200, "z": ["v" * 300]}}, r"notes\.z is \['v{50,56}\.\.\."),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], text: str) -> None:
    state = json_object(json_text(WHOLE, {}, indent=0)) | change
    with pytest.raises(ValueError, match=text):
        from_json_object(Whole, state)


@pytest.mark.parametrize("text", ["", "[1", "[]", "3", "null", '"x"'])
def test_what_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        json_object(text)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ValueError, match="kind is missing"):
        from_json_object(Whole, {})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite(value: float) -> None:
    state = json_object(json_text(Finite((value,)), {}, indent=0))
    with pytest.raises(ValueError, match=r"values\.0 is -?(nan|inf): input should be a finite number"):
        from_json_object(Finite, state)
    with pytest.raises(ValueError):
        json_text(Finite((value,)), {}, indent=0, allow_nan=False)
    assert plain(Finite((value, 1.0))) == {"values": [None, 1.0]}
    one = from_json_object(Whole, {**json_object(json_text(WHOLE, {}, indent=0)), "most": value})
    assert str(one.most) == str(value)


def test_plain_takes_any_mapping_and_set() -> None:
    value = {"a": MappingProxyType({1: (2, None)}), "b": {3}, "c": True, "d": 1j}
    assert plain(value) == {"a": {"1": [2, None]}, "b": [3], "c": True, "d": "1j"}
    assert json.loads(json_text(Finite((1.0,)), {"format": "x", "version": 2}, indent=1)) == {
        "format": "x",
        "version": 2,
        "values": [1.0],
    }
