# SPDX-License-Identifier: MIT
"""Random tokens of the masks, for many schemas: whatever is said, the whole text is an instance of the schema."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest

from candle_vllm.core.sampling.llguidance_backend import LlguidanceBackend
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from packages.core.tests.sampling.schema_texts import walk

SEEDS = 12
SHORT = {"type": "string", "maxLength": 4}
SCHEMAS: list[Any] = [
    {"type": "integer"},
    {"type": "integer", "minimum": -17, "maximum": 4321},
    {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 5},
    {"type": "integer", "multipleOf": 7, "minimum": 100, "maximum": 999},
    {"type": "number", "minimum": -0.5, "maximum": 12.25, "multipleOf": 0.25},
    {"type": "number", "exclusiveMinimum": 0.1, "maximum": 0.35},
    {"type": ["string", "null"], "minLength": 3, "maxLength": 5},
    {"type": "string", "pattern": "^[A-Z][a-z]{1,3}( [a-z]+){0,2}$", "maxLength": 12},
    {"type": "string", "pattern": "b", "maxLength": 6},
    *({"type": "string", "format": name} for name in ("date", "time", "date-time", "uuid", "ipv4", "duration")),
    {"enum": ["a", 'b"\n', 1, 2.5, True, None, ["x"], {"k": 1}]},
    {"const": {"a": [1, {"b": "é"}], "c": -0.125}},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"type": "array", "prefixItems": [{"type": "null"}, SHORT], "items": {"enum": [1]}, "minItems": 1, "maxItems": 5},
    {"type": "array", "items": [{"type": "null"}], "additionalItems": False},
    {"type": "object", "properties": {"a": SHORT, "b": {"type": "integer"}}, "required": ["b"]},
    {"type": "object", "required": ["a"], "additionalProperties": SHORT, "maxProperties": 3},
    {"type": "object", "properties": {"a": SHORT, "b": SHORT}, "additionalProperties": False, "minProperties": 1},
    {"type": "object", "additionalProperties": {"type": "boolean"}, "minProperties": 1, "maxProperties": 4},
    {"type": "object", "required": ["x", "y"], "additionalProperties": {"type": "null"}, "minProperties": 3},
    {"type": "object", "patternProperties": {"^n_": {"type": "integer"}}, "additionalProperties": False},
    {
        "type": "object",
        "properties": {"n_x": {"maximum": 9}},
        "patternProperties": {"^n_": {"type": "integer"}, "^s_": SHORT},
        "additionalProperties": {"type": "null"},
        "required": ["n_x"],
    },
    {"anyOf": [SHORT, {"type": "object", "properties": {"k": {"const": 1}}, "required": ["k"]}]},
    {
        "oneOf": [
            {"type": "object", "properties": {"t": {"const": "a"}, "v": SHORT}, "required": ["t", "v"]},
            {"type": "object", "properties": {"t": {"const": "b"}, "v": {"type": "null"}}, "required": ["t", "v"]},
        ],
        "unknown-to-all": 1,
    },
    {"allOf": [{"type": "integer", "minimum": 5}, {"maximum": 8}, {"multipleOf": 2}]},
    {
        "$defs": {"tree": {
            "type": "object",
            "properties": {"v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]}},
            "required": ["v", "next"],
            "additionalProperties": False,
        }},
        "$ref": "#/$defs/tree",
    },
    {"type": "object", "properties": {"é\"\n": {"const": "ü"}}, "required": ['é"\n'], "additionalProperties": False},
    {},
    True,
]  # fmt: skip


def plain(schema: Any) -> Any:
    """The schema in draft 2020-12, for the judge."""
    if isinstance(schema, dict) and isinstance(schema.get("items"), list):
        return {k: v for k, v in schema.items() if k not in ("items", "additionalItems")} | {
            "prefixItems": schema["items"], "items": schema["additionalItems"]
        }  # fmt: skip
    return schema


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:60])
def test_whatever_is_said_is_an_instance(backend: LlguidanceBackend, vocabulary: Any, schema: Any) -> None:
    judge = jsonschema.Draft202012Validator(
        plain(schema), format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    ended = 0
    for seed in range(SEEDS):
        spec = StructuredOutputsParams(json=schema, disable_any_whitespace=seed % 2 == 1)
        text = walk(backend, vocabulary, spec, seed)
        if text is not None:
            ended += 1
            judge.validate(json.loads(text))
    assert ended >= SEEDS // 2


@pytest.mark.parametrize(
    "regex", [r"[a-c]{2,5}", r"(foo|ba+r)(-\d{1,3})?", r"\d{1,4}@[^@]{1,4}\.(com|org)", r"é{0,3}."]
)
def test_whatever_is_said_matches(backend: LlguidanceBackend, vocabulary: Any, regex: str) -> None:
    for seed in range(SEEDS):
        text = walk(backend, vocabulary, StructuredOutputsParams(regex=regex), seed)
        assert text is not None
        assert re.fullmatch(regex, text), text
