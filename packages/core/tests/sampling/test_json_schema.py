# SPDX-License-Identifier: MIT
"""Schemas that are refused before they are compiled, by name, and what older drafts become."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import jsonschema
import pytest

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.sampling import json_dialect
from candle_vllm.core.sampling.json_dialect import FORMATS
from candle_vllm.core.sampling.json_schema import compilable_schema
from packages.core.tests.sampling.schema_texts import checked_schema


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"not": {"pattern": "a+"}}, "keyword 'not' is not supported here .at #.: values that 'pattern'"),
        (
            {"properties": {"a": {"if": {"multipleOf": 2}, "then": {}}}},
            "'if' is not supported here .at #/properties/a.",
        ),
        ({"not": {"properties": {"a": {"type": "integer"}}}}, "keyword 'not' .*.at #.: values that 'type'"),
        ({"oneOf": [{"pattern": "a+b"}, {"pattern": "b"}]}, "keyword 'oneOf' is not supported here .at #."),
        (
            {"items": {"uniqueItems": True}},
            "'uniqueItems' .*.at #/items.: .*elements of few values",
        ),
        ({"uniqueItems": True, "items": {"enum": [*range(7)]}}, "'uniqueItems' .* more than 2000 arrays"),
        ({"contains": {"pattern": "a+"}, "maxContains": 1}, "'contains' is not supported here .at #."),
        ({"contains": {}, "minContains": 1 << 31}, "minContains must be a whole number"),
        ({"contains": {}, "minContains": 40}, "minContains 40 is not supported"),
        ({"contains": {"const": 1}, "minContains": 3, "maxContains": 2}, "at most 2 elements can match"),
        ({"propertyNames": {"not": {"const": "a"}}}, "'propertyNames' is not supported here"),
        ({"dependentRequired": {f"a{i}": ["b"] for i in range(9)}}, "'dependentRequired' names 9 properties"),
        (
            {"allOf": [{}], "unevaluatedProperties": False},
            "'unevaluatedProperties' is not supported beside 'allOf' .at #.",
        ),
        ({"type": "float"}, "JSON type 'float' is unknown .at #.; known: null, boolean, integer, number"),
        ({"$dynamicRef": "#a"}, "dynamicRef"),
        ({"x-guidance": {"lenient": True}}, "'x-guidance' is not supported"),
        ({"$schema": "http://example.com/mine"}, "follows 'http://example.com/mine'"),
        ({"$ref": "b#/a", "properties": {"a": {"$id": "b"}}}, "points to nothing"),
        ({"prefixItems": [{}], "items": [{}]}, "only one can be meant"),
        ({"$ref": "http://example.com/x.json"}, "refer to a place of the same schema"),
        ({"$ref": "file:///etc/passwd"}, "refer to a place of the same schema"),
        ({"$ref": "#/$defs/none"}, "points to nothing"),
        ({"$ref": 5}, "ref 5 is not supported"),
        ({"$ref": "//[#/$defs/a"}, "refer to a place of the same schema"),
        ({"$id": "http://[#x", "properties": {"a": {"$ref": "#y"}}}, "points to nothing"),
        ({"minLength": -1}, "minLength must be a whole number"),
        ({"maxLength": 1 << 40}, "maxLength must be a whole number"),
        ({"minItems": True}, "minItems must be a whole number"),
        ({"multipleOf": 0}, "multipleOf must be a number above 0"),
        ({"multipleOf": 1234567}, "multipleOf is supported up to 50000"),
        ({"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}, "least common multiple"),
        ({"minimum": 1 << 58}, "number that is too large .at #/minimum."),
        ({"minimum": 10**400}, "number that is too large .at #/minimum."),
        (
            {"uniqueItems": True, "items": {"type": "integer", "minimum": 10**400, "maximum": 0}},
            "too large .at #/items",
        ),
        (
            {"uniqueItems": True, "items": {"type": "integer", "minimum": 0, "maximum": -(10**400)}},
            "too large .at #/items",
        ),
        ({"uniqueItems": True, "items": {"type": "integer", "minimum": 1e999, "maximum": 0}}, "'uniqueItems' is not"),
        ({"type": "integer", "not": {"maximum": (1 << 53) + 1}}, "number that is too large"),
        ({"maximum": 1e999}, "number that is too large .at #/maximum."),
        ({"not": {"enum": [10**400]}}, "number that is too large"),
        ({"const": (1 << 53) + 1}, "number that is too large"),
        ({"enum": [{"a": [1e999]}]}, "number that is too large"),
        ({"minimum": "1"}, "a bound must be a number"),
        ({"minimum": True}, "a bound must be a number"),
        (
            {"properties": {"a": {"const": "a\x00"}}, "additionalProperties": True},
            r"control character U\+0000 .at #/properties/a. beside",
        ),
        ({"enum": "abc"}, "enum must be a list"),
        ({"required": "a"}, "required must be a list of names"),
        ({"dependentRequired": {"a": 5}}, "each value of dependentRequired must be a list of names"),
        ({"properties": []}, "properties must be an object"),
        ({"anyOf": {}}, "anyOf must be a list"),
        ({"properties": {"a": 5}}, "must be an object or a boolean .at #/properties/a."),
        ({"minProperties": 2}, "a key could occur twice"),
        ({"minProperties": 1, "properties": {f"p{i}": {} for i in range(65)}}, "more than 64 optional"),
        (5, "must be an object or true"),
        (False, "must be an object or true"),
    ],
)
def test_refused_by_name(schema: Any, message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message) as caught:
        checked_schema(schema)
    assert caught.value.param == "structured_outputs"
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"allOf": [{"$ref": "#"}]},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
        {"type": "array", "prefixItems": [{"$ref": "#"}], "minItems": 1},
        {"type": "object", "additionalProperties": {"$ref": "#"}, "required": ["a"]},
        {"anyOf": [{"$ref": "#/$defs/endless"}, {}], "$defs": {"endless": {"anyOf": [{"$ref": "#/$defs/endless"}]}}},
    ],
)
def test_recursion_without_an_end_is_refused(schema: Any) -> None:
    with pytest.raises(InvalidParameterError, match="no finite instance"):
        checked_schema(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"$ref": "#"}}},
        {"type": "array", "items": {"$ref": "#"}},
        {"anyOf": [{"type": "array", "items": {"$ref": "#"}, "minItems": 1}, {"type": "string"}]},
        {"type": ["object", "null"], "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    ],
)
def test_recursion_with_an_end_is_not(schema: Any) -> None:
    checked_schema(schema)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: {"enum": list(range(50_001))}, "more than 50000 enum values"),
        (lambda: {"enum": [[i] for i in range(2_001)]}, "objects and arrays as values"),
        (lambda: {"properties": {f"p{i}": True for i in range(4_001)}}, "more than 4000 properties"),
        (lambda: {"patternProperties": {f"^{i}$": {} for i in range(65)}}, "more than 64 patternProperties"),
        (lambda: {"anyOf": [{"type": "string"}] * 10_001}, "more than 10000 subschemas"),
        (lambda: {"anyOf": [{"pattern": "a"}] * 1_001}, "more than 1000 patterns"),
        (lambda: {"allOf": [{"not": {"enum": [*"abc"]}}] * 20_000}, "more than 12000 subschemas"),
        (lambda: {"not": {"const": [1] * 9_000}}, "values that 'const' excludes"),
        (lambda: {"not": {"prefixItems": [{"type": "null"}] * 5_000}}, "values that 'prefixItems' excludes"),
        (lambda: {"not": {"enum": ["a" * 900_000]}}, "values that 'enum' excludes"),
        (lambda: {"$defs": {f"d{i}": {} for i in range(50_001)}}, "more than 50000 schemas in it"),
        (lambda: {"anyOf": [{"multipleOf": 49_999}] * 5}, "added up"),
        (
            lambda: {"$ref": "#/$defs/d0", "$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(3000)}},
            "nested 6.. deep, added up|points to nothing",
        ),
    ],
)
def test_what_would_explode_is_refused_at_once(make: Any, message: str) -> None:
    schema = make()
    start = time.thread_time()
    with pytest.raises(InvalidParameterError, match=message):
        checked_schema(schema)
    assert time.thread_time() - start < 5


def test_nesting_is_bounded() -> None:
    schema: dict[str, Any] = {}
    for _ in range(120):
        schema = {"items": schema}
    with pytest.raises(InvalidParameterError, match="nested more than 100 deep"):
        checked_schema(schema)


def test_endless_chains_are_found_in_linear_time() -> None:
    """A chain in the worst order, and ten thousand that wait for its end."""
    chain = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(250)} | {"d250": {"type": "null"}}
    schema = {"$defs": chain, "anyOf": [{"$ref": "#/$defs/d0"}] * 4_000}
    start = time.thread_time()
    checked_schema(schema)
    assert time.thread_time() - start < 3


def test_annotations_are_left_alone() -> None:
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "T",
        "description": "not",
        "default": {"not": 1},
        "x-order": 3,
        "markdownDescription": "m",
        "$comment": "c",
        "uniqueItems": False,
        "properties": {"not": {"type": "string"}, "minLenght": {"example": 1}},
    }
    assert checked_schema(json.loads(json.dumps(schema)))["properties"] == schema["properties"]


def test_older_drafts_are_brought_forward() -> None:
    schema = {"items": [{"type": "string"}], "additionalItems": {"type": "null"}}
    assert checked_schema(schema) == {"prefixItems": [{"type": "string"}], "items": {"type": "null"}}
    assert checked_schema({"items": {"type": "string"}, "additionalItems": False}) == {"items": {"type": "string"}}
    root = {"$id": "http://example.com/r", "$ref": "http://example.com/r#/definitions/a", "definitions": {"a": {}}}
    assert checked_schema(root)["$ref"] == "#/definitions/a"
    assert checked_schema({"minLength": 2.0}) == {"minLength": 2}
    assert checked_schema({"$schema": "http://json-schema.org/schema#", "type": "null"}) == {"type": "null"}


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("date", ["2024-02-29", "2000-02-29", "1963-06-19"], ["2023-02-29", "1900-02-29", "2020-04-31", "2020-1-01"]),
        (
            "time",
            ["08:30:06Z", "23:59:59.123+01:30", "23:59:60Z", "01:29:60.5+01:30", "15:59:60-08:00", "23:29:60+23:30"],
            ["24:00:00Z", "22:59:60Z", "23:59:60+01:00", "23:58:60Z", "08:30:06", "08:30Z"],
        ),
        (
            "time",
            ["08:30:06.123456789Z", "23:59:60.000000000Z"],
            [f"08:30:06.{'0' * 10}Z", "08:30:06.Z"],  # a model that repeats its last token would write zeros for ever
        ),
        (
            "date-time",
            ["2024-02-29T08:30:06Z", "1998-12-31T23:59:60Z"],
            ["2023-02-29T08:30:06Z", "2024-02-29 08:30:06Z"],
        ),
    ],
)
def test_time_formats(name: str, right: list[str], wrong: list[str]) -> None:
    for text in right:
        assert re.search(FORMATS[name], text), text
    for text in wrong:
        assert not re.search(FORMATS[name], text), text
    both = checked_schema({"type": "string", "format": name, "pattern": "^2"})
    for text in right:
        assert jsonschema.Draft202012Validator(both).is_valid(text) == text.startswith("2")


@pytest.mark.parametrize("more", [{}, {"additionalProperties": False}, {"patternProperties": {"^x": {}}}])
def test_an_object_has_no_more_optional_properties_than_the_parser_takes(more: dict[str, Any]) -> None:
    schema = {"type": "object", "properties": {f"p{i}": {} for i in range(481)}, **more}
    with pytest.raises(InvalidParameterError, match=r"481 optional properties .at #.; at most 480 are supported"):
        checked_schema(json.loads(json.dumps(schema)))
    checked_schema(schema | {"required": ["p7"]})


def test_only_the_first_unknown_keywords_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes a millisecond in which no other thread runs."""
    compared: list[str] = []

    def counting(name: str, *_: Any) -> list[str]:
        compared.append(name)
        return []

    monkeypatch.setattr(json_dialect.difflib, "get_close_matches", counting)
    checked_schema({f"word{i}": 1 for i in range(900)})
    assert compared == [f"word{i}" for i in range(8)]


def test_what_nobody_holds_is_an_annotation_and_a_near_miss_is_remarked_on() -> None:
    schema = {
        "type": "string",
        "minLenght": 3,
        "colour": "red",
        "format": "date-tme",
        "anyOf": [{"propertys": {}}, {"format": "color"}],
    }
    found = compilable_schema(schema)
    assert found.schema["type"] == "string"
    assert "format" not in found.schema
    assert found.remarks == [
        "the JSON schema's format 'date-tme' (at #) is not enforced: did you mean 'date-time'?",
        "the JSON schema has 'minLenght' (at #), which is unknown and has no effect: did you mean 'minLength'?",
        "the JSON schema has 'propertys' (at #/anyOf/0), which is unknown and has no effect: did you mean "
        "'properties'?",
        "the JSON schema's format 'color' (at #/anyOf/1) is not enforced",
    ]


@pytest.mark.parametrize(
    ("schema", "bounds"),
    [
        ({"type": "integer", "minimum": -(1 << 63), "maximum": (1 << 63) - 1}, (1024 - (1 << 63), (1 << 63) - 1)),
        ({"type": "integer", "maximum": (1 << 64) - 1}, (None, (1 << 63) - 1024)),
        ({"type": "integer", "exclusiveMaximum": 1 << 60}, (None, (1 << 60) - 128)),
        ({"type": "number", "maximum": 10**18, "minimum": -1.7e308}, (-(10**18), 10**18)),
        ({"maximum": (1 << 53) + 3}, (None, (1 << 53) + 2)),
        ({"type": "integer", "maximum": 10**400}, (None, (1 << 63) - 1024)),
    ],
)
def test_large_bounds_are_held_within_what_is_exact(schema: Any, bounds: tuple[int | None, int]) -> None:
    found = checked_schema(schema)
    assert (found.get("minimum"), found["maximum"]) == bounds
    assert "exclusiveMaximum" not in found
