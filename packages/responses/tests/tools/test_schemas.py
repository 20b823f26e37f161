# SPDX-License-Identifier: MIT
"""Arguments are checked against schemas that nobody trusts: without the network, and within a limit."""

from __future__ import annotations

import gc
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest

from candle_vllm.responses.tools.schemas import CPU_SECONDS, MAX_FAULTS, ArgumentsChecker, schema_fault


def faults(schema: dict[str, Any], arguments: dict[str, Any]) -> list[str]:
    return ArgumentsChecker(schema, "t").faults(arguments)


def of(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


@pytest.mark.parametrize(
    ("schema", "arguments", "told"),
    [
        (of(a={"type": "string"}), {"a": 5}, "a: 5 is not of type 'string'"),
        ({**of(), "required": ["a"]}, {}, "'a' is a required property"),
        ({**of(), "additionalProperties": False}, {"b": 1}, "Additional properties are not allowed"),
        (of(a={"enum": ["x", "y"]}), {"a": "z"}, "a: 'z' is not one of ['x', 'y']"),
        (of(a={"type": "array", "items": {"type": "integer"}}), {"a": [1, "2"]}, "a[1]: '2' is not of type"),
        (of(a=of(b={"minimum": 3})), {"a": {"b": 2}}, "a.b: 2 is less than the minimum of 3"),
        (of(a={"pattern": "^[a-z]+$"}), {"a": "A"}, "a: 'A' does not match"),
        (of(a={"uniqueItems": True}), {"a": [1, 1]}, "a: [1, 1] has non-unique"),
        ({**of(a={"$ref": "#/$defs/n"}), "$defs": {"n": {"type": "null"}}}, {"a": 1}, "a: 1 is not of type 'null'"),
        (of(a={"anyOf": [{"type": "string"}, {"type": "null"}]}), {"a": 1}, "a: 1 is not valid under any"),
        (of(a={"oneOf": [{"type": "string"}, {"enum": ["x"]}]}), {"a": "x"}, "a: 'x' is valid under each of"),
        (of(a={"oneOf": [{"format": "date", "type": "string"}]}), {"a": 1}, "a: 1 is not valid under any"),
        (of(a={"not": {"properties": {"format": {"type": "null"}}}}), {"a": {"format": None}}, "a: {'format': None} "),
        (
            {"$schema": "http://json-schema.org/draft-07/schema#", **of(a={"items": [{"type": "string"}]})},
            {"a": [1]},
            "a[0]: 1 is not of type 'string'",
        ),
    ],
)
def test_what_does_not_fit_is_told(schema: dict[str, Any], arguments: dict[str, Any], told: str) -> None:
    (fault,) = faults(schema, arguments)
    assert fault.startswith(told)


@pytest.mark.parametrize(
    ("schema", "arguments"),
    [
        (of(a={"type": "integer"}), {"a": 5.0}),
        (of(), {"anything": 1}),
        ({}, {"anything": 1}),
        (of(pattern={"type": "string"}, properties={"type": "string"}), {"pattern": "x", "properties": "y"}),
        (of(a={"const": {"$ref": "http://x", "pattern": "("}}), {"a": {"$ref": "http://x", "pattern": "("}}),
        ({**of(), "patternProperties": {"^x": {}}, "additionalProperties": False}, {"x1": 1}),
        ({**of(a={}), "unevaluatedProperties": False}, {"b": 1}),
        (of(a={"oneOf": [{"format": "date"}, {"format": "uuid"}]}), {"a": "2026-01-01"}),
        (of(a={"not": {"pattern": r"^\s*$"}}), {"a": "word " * 1000}),
        (of(a={"not": {"$ref": "#/$defs/x"}}, b={"not": {"$ref": "https://example.org/x"}}), {"a": 1, "b": 1}),
        (of(a={"if": {"pattern": "^(?!x)"}, "then": {"maxLength": 1}}), {"a": "xab"}),
    ],
)
def test_what_fits_or_is_not_checked(schema: dict[str, Any], arguments: dict[str, Any]) -> None:
    assert faults(schema, arguments) == []


def test_names_that_are_keywords_are_names() -> None:
    assert faults(of(**{"$ref": {"type": "string"}, "patternProperties": {"type": "string"}}), {"$ref": 1}) == [
        "$ref: 1 is not of type 'string'"
    ]


def test_few_and_short_faults() -> None:
    schema = of(a={"type": "array", "items": {"type": "string"}}, b={"type": "integer"})
    assert len(faults(schema, {"a": list(range(100))})) == MAX_FAULTS
    (fault,) = faults(schema, {"b": "x" * 100_000})
    assert len(fault) < 400


@pytest.mark.parametrize(
    "reference", ["http://127.0.0.1:{port}/schema", "https://json-schema.org/x", "file:///etc/hosts", "x"]
)
@pytest.mark.parametrize("keyword", ["$ref", "$dynamicRef"])
def test_nothing_is_fetched(reference: str, keyword: str) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.setblocking(False)
        schema = of(a={keyword: reference.format(port=server.getsockname()[1])}, b={"type": "string"})
        assert faults(schema, {"a": 1, "b": 1}) == ["b: 1 is not of type 'string'"]
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize(
    "schema",
    [
        of(a={"type": "strng"}),
        of(a={"type": 5}),
        {"type": "object", "required": "a"},
        {"type": "object", "properties": []},
        {"type": "object", "minProperties": "many"},
        {"$ref": "#"},
        {"allOf": [{"$ref": "#"}]},
        {"$ref": "#/nowhere"},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        of(a={"multipleOf": 0}),
    ],
)
def test_schemas_that_cannot_be_used_stop_nothing(schema: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert faults(schema, {"a": 1}) == []
    assert "the tool 't'" in caplog.text or "of the tool 't'" in caplog.text


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("(a+)+$", "a" * 1500 + "!"),
        ("(x+x+)+y", "x" * 1500),
        ("(?:.{0,99}b){0,40}c", "ab" * 700),
        ("^(([a-z])+.)+[A-Z]([a-z])+$", "a" * 1500),
    ],
)
def test_exploding_patterns(pattern: str, text: str) -> None:
    started = time.process_time()
    assert len(faults(of(a={"pattern": pattern}), {"a": text})) == 1
    assert time.process_time() - started < 5


@pytest.mark.parametrize("pattern", ["(?=a)b", r"(a)\1", "[", "a{1000}{1000}{1000}", "x" * 1001, "(?P<n>a)(?P=n)"])
def test_patterns_that_cannot_be_checked(pattern: str) -> None:
    assert faults(of(a={"pattern": pattern}, b={"type": "null"}), {"a": "zz", "b": 1}) == ["b: 1 is not of type 'null'"]


def test_elements_that_were_not_checked_are_not_counted() -> None:
    counted = {"contains": {"type": "string", "pattern": "^(?=a)"}, "maxContains": 1}
    assert faults(of(a=counted), {"a": ["b", "c"]}) == []
    assert faults(of(a={"contains": {"const": "b"}, "maxContains": 1}), {"a": ["b", "b"]}) != []


@contextmanager
def quickly() -> Iterator[None]:
    """Within the time for a check; what other tests have left in memory is not walked through by collections here."""
    gc.disable()
    started = time.thread_time()
    try:
        yield
        assert time.thread_time() - started < CPU_SECONDS + 1
    finally:
        gc.enable()


def test_schemas_that_explode(caplog: pytest.LogCaptureFixture) -> None:
    names = [f"d{number}" for number in range(40)]
    doubling = {name: {"anyOf": [{"$ref": f"#/$defs/{after}"}] * 2} for name, after in pairwise(names)}
    schema = {"$ref": "#/$defs/d0", "$defs": {**doubling, "d39": {"required": ["z"]}}}
    with caplog.at_level(logging.WARNING), quickly():
        assert faults(schema, {"a": 1}) == []
    assert "cannot be checked with its schema: it takes too long" in caplog.text


def test_large_arguments_are_checked_quickly() -> None:
    schema = of(a={"type": "array", "uniqueItems": True, "items": {"enum": [{"v": number} for number in range(100)]}})
    with quickly():
        faults(schema, {"a": [{"v": 99} for _ in range(50_000)]})


def test_a_checker_goes_on_after_a_failure() -> None:
    checker = ArgumentsChecker({"$ref": "#/nowhere"}, "t")
    assert [checker.faults({}) for _ in range(3)] == [[], [], []]


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        (of(a={"description": "x" * 10_000_000}), "bytes of JSON, and 262144 are allowed"),
        ({"type": "array"}, 'must have "type": "object"'),
        ([], "must be the JSON schema of an object"),
        (of(a=object()), "is no JSON"),
        (of(a={"$ref": "//[#/$defs/a"}), "'//[#/$defs/a' is not supported"),
        (of(), None),
        ({}, None),
    ],
)
def test_which_schemas_are_taken(schema: Any, told: str | None) -> None:
    fault = schema_fault(schema)
    assert fault is None if told is None else told in (fault or "")


def test_deep_and_circular_schemas() -> None:
    deep: dict[str, Any] = {}
    for _ in range(100):
        deep = of(a=deep)
    assert "nested more than 64 levels" in (schema_fault(deep) or "")
    circular: dict[str, Any] = {}
    circular["a"] = circular
    assert schema_fault(circular) == "its schema is no JSON"
