# SPDX-License-Identifier: MIT
"""StructuredOutputsParams: what is refused before any grammar is compiled."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NotRequired, TypedDict

import msgspec
import pydantic
import pytest

from candle_vllm.core import SamplingParams, StructuredOutputsParams
from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.sampling.structured import KINDS, parsed_json
from packages.core.tests.sampling.schema_texts import checked_schema

ONE_OF_EACH: dict[str, Any] = {
    "json": {"type": "object"},
    "regex": "a+",
    "choice": ["a", "b"],
    "grammar": 'start: "a"',
    "json_object": True,
    "structural_tag": {"structures": [], "triggers": []},
}


@pytest.mark.parametrize("kind", KINDS)
def test_exactly_one_kind(kind: str) -> None:
    assert StructuredOutputsParams(**{kind: ONE_OF_EACH[kind]}).kind == kind
    other = "regex" if kind != "regex" else "choice"
    with pytest.raises(InvalidParameterError, match=r"exactly one of json, regex, .*; it has \w+ and \w+") as caught:
        StructuredOutputsParams(**{kind: ONE_OF_EACH[kind], other: ONE_OF_EACH[other]})
    assert caught.value.param == "structured_outputs"


def test_none_is_refused_and_false_is_none() -> None:
    for nothing in ({}, {"json_object": False}, {"whitespace_pattern": " ?"}):
        with pytest.raises(InvalidParameterError, match="it has none"):
            StructuredOutputsParams(**nothing)
    assert StructuredOutputsParams(regex="a", json_object=False).kind == "regex"
    assert StructuredOutputsParams(json=False).kind == "json"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"regex": ""}, "regex must have 1 to 65536 characters, not 0"),
        ({"regex": "a" * 65537}, "regex must have 1 to 65536 characters, not 65537"),
        ({"regex": 5}, "regex must be a text, not int"),
        ({"regex": "\ud800"}, "half a surrogate"),
        ({"grammar": "a" * (1 << 21)}, "grammar must have"),
        ({"json": "x" * (1 << 21)}, "json must have"),
        ({"json": 5}, "json must be a JSON schema"),
        ({"structural_tag": 5}, "structural_tag must be an object"),
        ({"choice": "abc"}, "choice must be a list"),
        ({"choice": []}, "choice must have 1 to 50000 texts, not 0"),
        ({"choice": ["a"] * 50001}, "choice must have 1 to 50000 texts, not 50001"),
        ({"choice": ["a", ""]}, "at least one character"),
        ({"choice": ["a", 1]}, "must be a text"),
        ({"choice": ["a" * (1 << 20), "b"]}, "1048576 characters together"),
        ({"json_object": "yes"}, "json_object must be true or false"),
        ({"json_object": True, "disable_any_whitespace": 1.5}, "disable_any_whitespace must be true or false"),
        ({"json_object": True, "reasoning_start": "<a>"}, "needs reasoning_end"),
        ({"json_object": True, "reasoning_end": ""}, "reasoning_end must have 1 to 256"),
        ({"json_object": True, "around": 'start: "x"'}, "around must have @form"),
        ({"json_object": True, "around": "@form" * (1 << 19)}, "around must have 1 to"),
        ({"json_object": True, "around": 5}, "around must be a text, not int"),
        ({"json_object": True, "whitespace_pattern": " ", "disable_any_whitespace": True}, "not both"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message) as caught:
        StructuredOutputsParams(**fields)
    assert caught.value.param == "structured_outputs"


def test_unknown_fields_are_refused_when_they_come_as_json() -> None:
    with pytest.raises(msgspec.ValidationError, match="jsn"):
        msgspec.json.decode(b'{"jsn": {}}', type=StructuredOutputsParams)
    read = msgspec.convert({"structured_outputs": {"json": {"type": "object"}}}, SamplingParams)
    assert read.structured_outputs == StructuredOutputsParams(json={"type": "object"})


def test_sampling_params_take_nothing_else() -> None:
    wrong: Any = {"json": {}}
    with pytest.raises(InvalidParameterError, match="must be StructuredOutputsParams") as caught:
        SamplingParams(structured_outputs=wrong)
    assert caught.value.param == "structured_outputs"


class Size(enum.StrEnum):
    SMALL = "small"
    LARGE = "large"


class Part(pydantic.BaseModel):
    name: str
    size: Size


class Thing(pydantic.BaseModel):
    parts: list[Part]
    price: float | None = None


def test_a_class_of_pydantics_stands_for_its_schema() -> None:
    form = StructuredOutputsParams(json=Thing)
    assert form == StructuredOutputsParams(json=Thing.model_json_schema())
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(form), type=StructuredOutputsParams) == form


class Point(TypedDict):
    x: float
    label: NotRequired[str]


@dataclasses.dataclass
class Line:
    points: list[Point]


class Drawing(msgspec.Struct):
    lines: list[Line]


@pytest.mark.parametrize("model", [Point, Line, Drawing])
def test_so_do_other_classes_with_fields(model: Any) -> None:
    form = StructuredOutputsParams(json=model)
    assert form == StructuredOutputsParams(json=msgspec.json.schema(model))
    assert "properties" in checked_schema(parsed_json("json", msgspec.json.schema(model)))["$defs"][model.__name__]


def test_other_classes_are_refused() -> None:
    class Odd(pydantic.BaseModel):
        call: Callable[[int], int]

    for wrong, message in ((int, "class int, which has no model_json_schema"), (Odd, "Odd has no JSON schema")):
        with pytest.raises(InvalidParameterError, match=message):
            StructuredOutputsParams(json=wrong)  # type: ignore[arg-type]


def deep(levels: int) -> Mapping[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(levels):
        found = {"items": found}
    return found


def test_mappings_become_fresh_json() -> None:
    given = MappingProxyType({"enum": ("a", "b"), "properties": MappingProxyType({"x": {}})})
    found = parsed_json("json", given)
    assert found == {"enum": ["a", "b"], "properties": {"x": {}}}
    assert parsed_json("json", '{"a": 1}') == {"a": 1}


@pytest.mark.parametrize(
    "make",
    [
        lambda: '{"a": ',
        lambda: "[1, NaN]",
        lambda: {"a": float("nan")},
        lambda: {"a": {1, 2}},
        lambda: deep(100_000),
        lambda: "[" * 100_000,
        lambda: "9" * 5000,
        lambda: {"a": "x" * (1 << 20)},
    ],
)
def test_what_is_no_json_is_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(InvalidParameterError, match=r"json (is|has)"):
        parsed_json("json", make())
