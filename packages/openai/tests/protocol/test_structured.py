# SPDX-License-Identifier: MIT
"""response_format and structured_outputs: what the engine is told, and how each refusal names its field."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any, TypedDict

import msgspec
import pydantic
import pytest
from openai.lib._parsing import type_to_response_format_param

from candle_vllm.core.errors import RequestError
from candle_vllm.core.sampling.structured import (
    MAX_CHOICE_CHARACTERS,
    MAX_CHOICES,
    MAX_REGEX,
    StructuredOutputsParams,
)
from candle_vllm.openai import UnsupportedParameterError, parse_chat_request, parse_completion_request
from candle_vllm.openai.protocol.fields import MAX_SCHEMA_DEPTH
from candle_vllm.openai.protocol.generation import GenerationFields
from candle_vllm.openai.requests import to_sampling_params

HI = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
STRUCTURE = {"begin": "<a>", "schema": SCHEMA, "end": "</a>"}


def requests(**fields: Any) -> list[GenerationFields]:
    """The same fields in both kinds of request."""
    chat = parse_chat_request(json.dumps({"messages": HI, **fields}).encode())
    return [chat, parse_completion_request(json.dumps({"prompt": "hi", **fields}).encode())]


def schema_format(schema: object = SCHEMA, **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "city", "schema": schema, **fields}}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        ({"response_format": schema_format()}, {"json": SCHEMA}),
        ({"response_format": schema_format(strict=True, description="x")}, {"json": SCHEMA}),
        ({"response_format": schema_format(strict=False)}, {"json": SCHEMA}),
        ({"response_format": {"type": "structural_tag", "format": {"type": "any_text"}}},
         {"structural_tag": {"type": "structural_tag", "format": {"type": "any_text"}}}),
        ({"response_format": {"type": "structural_tag", "structures": [STRUCTURE], "triggers": ["<a"]}},
         {"structural_tag": {"structures": [STRUCTURE], "triggers": ["<a"]}}),
        ({"structured_outputs": {"json": SCHEMA}}, {"json": SCHEMA}),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, {"json": SCHEMA}),
        ({"structured_outputs": {"json": SCHEMA, "regex": None, "json_object": False}}, {"json": SCHEMA}),
        ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
        ({"guided_json": json.dumps(SCHEMA), "guided_whitespace_pattern": " ?"},
         {"json": SCHEMA, "whitespace_pattern": " ?"}),
        ({"guided_regex": "a+", "guided_json": None, "guided_json_object": False}, {"regex": "a+"}),
        ({"guided_choice": ["a", "b"], "guided_decoding_backend": "outlines"}, {"choice": ["a", "b"]}),
        ({"guided_grammar": 'start: "a"', "structured_outputs": None}, {"grammar": 'start: "a"'}),
        ({"guided_json_object": True}, {"json_object": True}),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ["a", "b"]}),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, {"grammar": 'start: "a"'}),
        ({"grammar": 'root ::= "a"'}, {"grammar": 'root ::= "a"'}),
        ({"json_schema": {"type": "object"}}, {"json": {"type": "object"}}),
        ({"response_format": {"type": "json_object", "schema": {"const": 1}}}, {"json": {"const": 1}}),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"const": 1}}}}, {"json": {"const": 1}}),
        ({"structured_outputs": {"json_object": True, "disable_any_whitespace": True, "disable_fallback": True}},
         {"json_object": True, "disable_any_whitespace": True}),
        ({"structured_outputs": {"json": SCHEMA, "whitespace_pattern": " ?", "disable_additional_properties": False}},
         {"json": SCHEMA, "whitespace_pattern": " ?"}),
        ({"structured_outputs": {"structural_tag": json.dumps({"structures": [STRUCTURE], "triggers": ["<a"]})}},
         {"structural_tag": {"structures": [STRUCTURE], "triggers": ["<a"]}}),
        ({"response_format": {"type": "text"}, "structured_outputs": {"regex": "a"}}, {"regex": "a"}),
    ],
)  # fmt: skip
def test_both_kinds_of_request_say_the_same_to_the_engine(fields: Any, expected: dict[str, Any] | None) -> None:
    for request in requests(**fields):
        wanted = None if expected is None else StructuredOutputsParams(**expected)
        assert request.structured() == wanted
        assert to_sampling_params(request, {}).structured_outputs == wanted  # type: ignore[arg-type]


def test_nulls_inside_a_schema_are_values() -> None:
    schema = {"enum": [None, "a"], "default": None}
    tag = {"type": "structural_tag", "structures": [{**STRUCTURE, "schema": schema}], "triggers": ["<a"]}
    for request in requests(response_format=tag):
        structured = request.structured()
        assert structured is not None
        assert isinstance(structured.structural_tag, dict)
        assert structured.structural_tag["structures"][0]["schema"] == schema


def test_what_the_official_client_makes_of_a_pydantic_model_is_accepted() -> None:
    class City(pydantic.BaseModel):
        name: str
        size: int

    (chat, _) = requests(response_format=type_to_response_format_param(City))
    structured = chat.structured()
    assert structured is not None
    assert isinstance(structured.json, dict)
    assert list(structured.json["properties"]) == ["name", "size"]


class Town(pydantic.BaseModel):
    name: str
    size: int | None = None


class Route(TypedDict):
    towns: list[str]


@dataclasses.dataclass
class Stop:
    route: Route
    minutes: int


@pytest.mark.parametrize("model", [Town, Route, Stop])
def test_a_class_is_the_form_of_its_schema(model: Any) -> None:
    schema = model.model_json_schema() if model is Town else msgspec.json.schema(model)
    whole: Any = {"type": "json_schema", "json_schema": {"name": model.__name__, "schema": schema}}
    for form in ({"response_format": model}, {"structured_outputs": {"json": model}}):
        for parse, rest in ((parse_chat_request, {"messages": HI}), (parse_completion_request, {"prompt": "hi"})):
            told = parse({**rest, **form})
            assert told.structured() == StructuredOutputsParams(json=schema)
            assert told.structured() == parse({**rest, "response_format": whole}).structured()
    whole["json_schema"]["schema"] = model
    assert parse_chat_request({"messages": HI, "response_format": whole}).structured() == told.structured()


def test_a_class_without_a_schema_is_refused_by_its_field() -> None:
    class Odd(pydantic.BaseModel):
        call: Callable[[int], int]

    for field, form in (
        ("response_format", {"response_format": int}),
        ("response_format", {"response_format": Odd}),
        ("structured_outputs.json", {"structured_outputs": {"json": Odd}}),
    ):
        with pytest.raises(RequestError, match=f"^{field} cannot be used: json") as caught:
            parse_chat_request({"messages": HI, **form})
        assert caught.value.param == field


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels - 1):
        schema = {"not": schema}
    return schema


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"response_format": "json"}, "response_format", "must be an object"),
        ({"response_format": {}}, "response_format.type", "one of text, json_object, json_schema, structural_tag"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "one of text"),
        ({"response_format": {"type": ["text"]}}, "response_format.type", "one of text"),
        ({"response_format": {"type": "text", "x": 1}}, "response_format.x", "not a known field"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is required"),
        ({"response_format": {"type": "json_schema", "schema": {}}}, "response_format.schema", "not a known field"),
        ({"grammar": 'root ::= "a"', "json_schema": {"type": "object"}}, "grammar", "exclude each other"),
        ({"grammar": 'root ::= "a"', "response_format": {"type": "json_object"}}, "grammar",
         "and response_format exclude each other"),
        ({"json_schema": "{}"}, "json_schema", "must be an object"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
         "response_format.json_schema.schema", "is required"),
        ({"response_format": schema_format(name="a b")}, "response_format.json_schema.name", "OpenAI's rule"),
        ({"response_format": schema_format("{}")}, "response_format.json_schema.schema", "must be an object"),
        ({"response_format": schema_format(nested(MAX_SCHEMA_DEPTH + 1))},
         "response_format.json_schema.schema", "nested too deeply"),
        ({"json_schema": nested(MAX_SCHEMA_DEPTH + 1)}, "json_schema", "nested too deeply"),
        ({"response_format": {"type": "structural_tag", "triggers": ["a"], "structures": [
            {"begin": "a", "schema": nested(MAX_SCHEMA_DEPTH + 1), "end": "b"}]}},
         "response_format.structures.0.schema", "nested too deeply"),
        ({"response_format": schema_format(strikt=True)}, "response_format.json_schema.strikt", "'strict'"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.format", "must be given"),
        ({"response_format": {"type": "structural_tag", "format": {}, "triggers": []}},
         "response_format.format", "instead of it"),
        ({"response_format": {"type": "structural_tag", "structures": []}}, "response_format.triggers", "is required"),
        ({"response_format": {"type": "structural_tag", "structures": [{"begin": "a"}], "triggers": ["a"]}},
         "response_format.structures.0.end", "is required"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one of json, regex, choice"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs", "none is given"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs", "json, regex are given"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "not valid JSON"),
        ({"structured_outputs": {"json": [1]}}, "structured_outputs.json", "must be an object"),
        ({"structured_outputs": {"json": "3"}}, "structured_outputs.json", "must be an object"),
        ({"structured_outputs": {"json": nested(MAX_SCHEMA_DEPTH + 1)}}, "structured_outputs.json", "too deeply"),
        ({"structured_outputs": {"json": '{"not":' * 1000 + "{}" + "}" * 1000}}, "structured_outputs.json", "nested"),
        ({"structured_outputs": {"structural_tag": True}}, "structured_outputs.structural_tag", "must be an object"),
        ({"structured_outputs": {"regex": 3}}, "structured_outputs.regex", "must be a string"),
        ({"structured_outputs": {"choice": "a"}}, "structured_outputs.choice", "must be a list"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "must not be empty"),
        ({"structured_outputs": {"choice": ["a", 1]}}, "structured_outputs.choice.1", "must be a string"),
        ({"structured_outputs": {"jsn": {}}}, "structured_outputs.jsn", "did you mean 'json'"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
         "structured_outputs", "exclude each other"),
        ({"guided_regex": "a", "structured_outputs": {"regex": "a"}}, "guided_regex", "and structured_outputs exclude"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "structured_outputs", "exclude each other"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "structured_outputs", "regex, choice are given"),
        ({"guided_json": 3}, "structured_outputs.json", "must be an object"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(fields: dict[str, Any], param: str, message: str) -> None:
    for parse, given in ((parse_chat_request, {"messages": HI}), (parse_completion_request, {"prompt": "hi"})):
        with pytest.raises(RequestError) as caught:
            parse(json.dumps({**given, **fields}).encode())
        assert caught.value.param == param
        assert message in str(caught.value)
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"response_format": {"type": "grammar", "grammar": "x"}}, "response_format.type", "use structured_outputs"),
        ({"structured_outputs": {"json": {}, "disable_additional_properties": True}},
         "structured_outputs.disable_additional_properties", '"additionalProperties": false'),
    ],
)  # fmt: skip
def test_what_others_define_is_unsupported(fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(UnsupportedParameterError) as caught:
        requests(**fields)
    assert caught.value.param == param
    assert message in str(caught.value)


def test_what_the_engine_refuses_is_blamed_on_the_field_that_the_caller_wrote() -> None:
    huge = "a" * (MAX_CHOICE_CHARACTERS + 1)
    for fields, param, message in (
        ({"regex": huge}, "structured_outputs.regex", f"at most {MAX_REGEX} characters"),
        ({"grammar": huge}, "structured_outputs.grammar", "characters"),
        ({"choice": [huge]}, "structured_outputs.choice", "cannot be used: the choices have more than"),
        ({"choice": [""]}, "structured_outputs.choice.0", "must not be empty"),
        ({"choice": ["a"] * (MAX_CHOICES + 1)}, "structured_outputs.choice", f"at most {MAX_CHOICES} entries"),
        ({"json": {}, "whitespace_pattern": huge}, "structured_outputs.whitespace_pattern", "characters"),
        ({"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True},
         "structured_outputs.whitespace_pattern", "exclude each other"),
    ):  # fmt: skip
        with pytest.raises(RequestError) as caught:
            parse_chat_request({"messages": HI, "structured_outputs": fields})
        assert caught.value.param == param
        assert message in str(caught.value)


def test_the_field_to_blame_later() -> None:
    for fields, param in (
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": schema_format()}, "response_format.json_schema.schema"),
        ({"structured_outputs": {"grammar": "start: 'a'"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"json": SCHEMA}}, "structured_outputs.json"),
    ):
        assert requests(**fields)[0].structured_field == param
