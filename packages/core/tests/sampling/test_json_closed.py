# SPDX-License-Identifier: MIT
"""Which objects of a schema may have keys that it does not mention."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from candle_vllm.core.sampling.llguidance_backend import LlguidanceBackend
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.core.testing import ByteTokenizer

from .schema_texts import accepts

A = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
REFERRED = {"$defs": {"a": A}, "$ref": "#/$defs/a"}
TREE = {"type": "object", "properties": {"a": {"type": "integer"}, "next": {"$ref": "#"}}}
MIXED = {"$defs": {"a": A}, "allOf": [{"$ref": "#/$defs/a"}, {"properties": {"b": {"type": "integer"}}}]}


@pytest.fixture(scope="module")
def backends() -> Iterator[tuple[LlguidanceBackend, LlguidanceBackend]]:
    tokens = ByteTokenizer()
    closed, opened = (
        LlguidanceBackend(tokens, tokens.vocab_size, (tokens.eos_token_id,), open_objects=value)
        for value in (False, True)
    )
    yield closed, opened
    closed.close()
    opened.close()


@pytest.mark.parametrize(
    ("schema", "good", "invented"),
    [
        (A, {"a": 1}, {"a": 1, "b": 2}),
        ({"type": "object", "properties": {}}, {}, {"b": 2}),
        ({"properties": {"o": A}}, {"o": {"a": 1}}, {"o": {"a": 1, "b": 2}}),
        ({"type": "array", "items": A}, [{"a": 1}], [{"a": 1, "b": 2}]),
        ({"anyOf": [A, {"type": "null"}]}, {"a": 1}, {"a": 1, "b": 2}),
        ({"$defs": {"a": A}, "allOf": [{"$ref": "#/$defs/a"}]}, {"a": 1}, {"a": 1, "b": 2}),
        (REFERRED, {"a": 1}, {"a": 1, "b": 2}),
        (TREE, {"a": 1, "next": {"a": 2}}, {"a": 1, "next": {"b": 2}}),
    ],
    ids=str,
)
def test_objects_are_closed_where_nothing_is_said(backends: Any, schema: Any, good: Any, invented: Any) -> None:
    form = StructuredOutputsParams(json=schema)
    for backend, may_invent in zip(backends, (False, True), strict=True):
        assert accepts(backend, form, json.dumps(good))
        assert accepts(backend, form, json.dumps(invented)) is may_invent


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "object"}, {"b": 2}),
        ({**A, "additionalProperties": True}, {"a": 1, "b": 2}),
        ({**A, "additionalProperties": {"type": "integer"}}, {"a": 1, "b": 2}),
        (MIXED, {"a": 1, "b": 2}),
        ({"properties": {"o": MIXED}, "$defs": MIXED["$defs"]}, {"o": {"a": 1, "b": 2}}),
        ({**A, "anyOf": [{"required": ["b"]}, {"required": ["c"]}]}, {"a": 1, "b": 2}),
        ({"properties": {"a": {}}, "required": ["b"]}, {"a": 1, "b": 2}),
    ],
    ids=str,
)
def test_objects_that_say_so_or_have_several_schemas_stay_open(backends: Any, schema: Any, value: Any) -> None:
    for backend in backends:
        assert accepts(backend, StructuredOutputsParams(json=schema), json.dumps(value))
