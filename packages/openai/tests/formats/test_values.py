# SPDX-License-Identifier: MIT
"""Values in calls whose format has no quotes: what a grammar accepts is read back as the value that was meant."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest

from candle_vllm.openai.formats.gemma import Gemma
from candle_vllm.openai.formats.grammar import tool_grammar
from candle_vllm.openai.formats.layout import Layout
from candle_vllm.openai.formats.nested import Nested
from candle_vllm.openai.formats.parser import OutputParser
from candle_vllm.openai.formats.tagged import Tagged
from candle_vllm.openai.formats.values import argument_kinds, python_value, to_json
from packages.openai.tests.formats.messages import parse
from packages.openai.tests.formats.test_grammar import ROWS, THINK, Tool, vocabulary
from packages.openai.tests.formats.walks import accepts
from tests.common_run import few

LISTED = ["none", "nil", "Null", "yes", "no", "12", "1e3", "true", "None", "low"]
KINDS: dict[str, dict[str, Any]] = {
    "string": {"type": "string"},
    "integer": {"type": "integer"},
    "number": {"type": "number"},
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "enum": {"enum": LISTED},
    "array": {"type": "array", "items": {"type": "integer"}},
    "object": {"type": "object", "properties": {"k": {"type": "integer"}}, "required": ["k"]},
}
EVERY = [*KINDS, *("-".join(pair) for pair in itertools.combinations(KINDS, 2)), "any", "boolean-enum-null"]
COMMON = ["null-enum", "boolean-enum", "string-null", "string-integer", "integer-enum", "any"]
OFTEN = ("qwen3_coder", "glm45", "minimax_m2", "seed_oss", "minimax_m3", "deepseek_v32")
TEXTS = [*LISTED, "null", "NULL", "False", "TRUE", "false", "1", "-7", "007", "+5", "12.0", "1.5", "2E5", "a b",
         "Paris", "[1]", "[1, 2]", '{"k": 1}', '"1"', '"a"', "nan", "1 2", "- 1", "none.", ""]  # fmt: skip
FORMATS = [row for row in ROWS.values() if row.bodies and isinstance(row.bodies[0], (Tagged, Nested, Gemma))]
PYTHON = {"None": None, "True": True, "False": False}


def schema_of(union: str) -> dict[str, Any]:
    parts = [KINDS[kind] for kind in union.split("-") if kind != "any"]
    return parts[0] if len(parts) == 1 else {"anyOf": parts} if parts else {}


def fits(value: Any, kind: str) -> bool:
    """Whether a value of JSON has a kind, as it was written: 12.0 is no integer."""
    return {
        "string": isinstance(value, str),
        "integer": type(value) is int,
        "number": type(value) in (int, float),
        "boolean": isinstance(value, bool),
        "null": value is None,
        "enum": value in LISTED if isinstance(value, str) else False,
        "array": isinstance(value, list) and all(type(one) is int for one in value),
        "object": isinstance(value, dict) and type(value.get("k")) is int,
        "any": True,
    }[kind]


def literal(text: str) -> Any:
    """A text as JSON or as one of Python's words; the text itself where it is neither."""
    try:
        return PYTHON[text] if text in PYTHON else json.loads(text, parse_constant=lambda _: text)
    except ValueError:
        return text


def meant(text: str, union: str) -> Any:
    """The value of a text without quotes."""
    kinds = union.split("-")
    if "enum" in kinds and text in LISTED:
        return text
    value = literal(text)
    is_value = not isinstance(value, str) or union == "any"
    return value if is_value and any(fits(value, kind) for kind in kinds) else text


def written(form: Any, text: str, union: str) -> Iterator[tuple[str, Any]]:
    """Calls of `f` with a text as its argument, and the value that is meant."""
    body = form.bodies[0]
    end = body.closers[0] if body.closers else ""
    opening = next(iter(form.opens), "")
    if isinstance(body, Gemma):
        yield f"{opening}{body.prefix}f{{a:{body.quote}{text}{body.quote}}}{end}", text
        if not isinstance(literal(text), str):
            yield f"{opening}{body.prefix}f{{a:{text}}}{end}", literal(text)
    elif isinstance(body, Nested):
        call = f'{body.tag}<{body.call} name="f">{body.tag}<a>{text}{body.tag}</a>{body.tag}</{body.call}>'
        empty = next((value for kind, value in (("object", {}), ("array", [])) if kind in union.split("-")), text)
        yield f"{opening}{call}{end}", meant(text, union) if text else empty
    else:
        before = body.head.partition("(?P<key>")[0]
        number = '" index="1"' if body.name_head else ""
        attributes: list[tuple[str, Any]] = [("", meant(text, union))]
        if body.head:
            kind = {str: "string", bool: "boolean", list: "array", dict: "object", type(None): "null"}
            told = kind.get(type(literal(text)), "number")
            typed = "?P<type>" in body.head
            attributes = [('" type="string"' if typed else '" string="true"', text)]
            if told != "string":
                attributes.append((f'" type="{told}"' if typed else '" string="false"', literal(text)))
        for attribute, value in attributes:
            key = f"{body.key_open}{before}a{attribute}{body.key_end}{body.value_open}"
            call = f"{body.name_open}f{number}{body.name_end}{key}{text}{body.value_end}{body.call_end}"
            yield f"{opening}{call}{end}", value


@pytest.mark.parametrize(
    "union", [pytest.param(one, marks=() if one in COMMON else pytest.mark.every_case) for one in EVERY]
)
@pytest.mark.parametrize("name", few([form.name for form in FORMATS], *OFTEN))
def test_what_a_grammar_accepts_is_read_as_what_was_meant(name: str, union: str) -> None:
    form = ROWS[name]
    parameters = {"type": "object", "properties": {"a": schema_of(union)}, "required": ["a"]}
    parameters["additionalProperties"] = False
    vocab = vocabulary(form, THINK, bound=False)
    lark = tool_grammar(
        form, [Tool("f", parameters)], mode="required", parallel=False, reasoning=None, in_reasoning=False, special={}
    )  # fmt: skip
    assert lark is not None
    begin, read = vocab.compiler(lark), 0
    for text in TEXTS:
        for call, value in written(form, text, union):
            ids = vocab.encode(call)
            taken, may_end = accepts(begin(), ids)
            if taken < len(ids) or not may_end:
                expressible = any(fits(value, kind) for kind in union.split("-")) and value == text and text
                doubtful = text[:1] in ("[", "{") or isinstance(form.bodies[0], Nested)
                assert doubtful or not expressible, f"the grammar refuses {call!r}"
                continue
            parsed = parse(OutputParser(Layout(THINK, form), tools={"f": parameters}), call)
            assert parsed.values == [("f", {"a": value})], call
            assert type(parsed.values[0][1]["a"]) is type(value), call
            read += 1
    assert read or isinstance(form.bodies[0], (Nested, Gemma))  # whose lists and objects are no JSON


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        # Every spelling in which a schema can enumerate.
        ({"type": "string", "enum": ["none"], "nullable": True}, "none", "none"),
        ({"type": ["string", "null"], "enum": ["none", None]}, "none", "none"),
        ({"type": ["string", "null"], "enum": ["none", None]}, "null", None),
        ({"type": ["string", "null"], "enum": ["none", None]}, "None", None),
        ({"anyOf": [{"const": "none"}, {"type": "null"}]}, "none", "none"),
        ({"oneOf": [{"$ref": "#/$defs/level"}, {"type": "null"}]}, "nil", "nil"),
        ({"enum": [True, False, "yes", "no"]}, "no", "no"),
        ({"enum": [True, False, "yes", "no"]}, "true", True),
        ({"enum": [1, "2"]}, "2", "2"),
        ({"enum": [1, "2"]}, " 1 ", 1),
        ({"enum": ["low", None]}, " low ", "low"),
        ({"enum": ["low", None]}, '"low"', "low"),
        # A text that is nearly an enumerated string is no other value.
        ({"anyOf": [{"enum": ["none"]}, {"type": "null"}]}, "NONE", "NONE"),
        ({"anyOf": [{"enum": ["Yes"]}, {"type": "boolean"}]}, "yes", "yes"),
        # Where any string is allowed, a word is one; where none is, there is nothing else that it can mean.
        ({"type": ["string", "null"]}, "none", "none"),
        ({"type": ["integer", "null"]}, "none", None),
        ({"type": ["string", "boolean"]}, "yes", "yes"),
        ({"type": ["integer", "boolean"]}, "yes", True),
        ({"type": ["string", "integer"]}, "1e3", "1e3"),
        ({"type": ["string", "integer"]}, "12.0", "12.0"),
        ({"type": ["string", "number"]}, "1e3", 1000.0),
        ({"type": "integer"}, "12.0", 12),
        ({}, "none", "none"),
        ({}, "yes", "yes"),
        ({}, "null", None),
        ({"minLength": 1}, "nil", "nil"),
        # An alternative without a type allows everything, as in pydantic's `Any | None` and `JsonValue | None`.
        ({"anyOf": [{"$ref": "#/$defs/JsonValue"}, {"type": "null"}]}, "[1]", [1]),
        ({"anyOf": [{}, {"type": "null"}]}, '{"b": [1]}', {"b": [1]}),
        ({"anyOf": [{}, {"type": "null"}]}, "</b> 5", "</b> 5"),
        ({"oneOf": [{"type": "integer"}, {"description": "anything"}]}, "true", True),
        ({"anyOf": [{"type": "null"}, {"properties": {}}]}, "{}", {}),
        ({"anyOf": [True, {"type": "null"}]}, "5", 5),
        ({"anyOf": [{"$ref": "#/$defs/told"}, {"type": "null"}]}, "5", 5),
        ({"type": "string", "anyOf": [{"pattern": "^a"}, {"maxLength": 3}]}, "5", "5"),
        ({"type": "string", "allOf": [{}]}, "5", "5"),
        ({"type": "string", "$ref": "#/$defs/JsonValue"}, "5", "5"),
        ({"type": "string", "allOf": [{"anyOf": [{"pattern": "a"}, {"pattern": "5"}]}]}, "5", "5"),
        ({"enum": ["4", "5"], "anyOf": [{"title": "a"}]}, "5", "5"),
    ],
)  # fmt: skip
def test_a_value_by_its_schema(schema: dict[str, Any], text: str, value: object) -> None:
    whole = {
        "properties": {"a": schema},
        "$defs": {"level": {"enum": ["nil", "low"]}, "JsonValue": {}, "told": {"title": "any"}},
    }
    read = json.loads(to_json(text, argument_kinds(whole, "a")))
    assert (read, type(read)) == (value, type(value))


def test_parts_of_an_object_that_repeat_an_argument_do_not_widen_its_type() -> None:
    own = {"type": "object", "properties": {"a": {"type": "string"}}}
    for more in (
        {"anyOf": [{"properties": {"a": {"pattern": "5"}}, "required": ["a"]}, {"required": ["b"]}]},
        {"allOf": [{"properties": {"a": {"description": "a text"}}}]},
        {"oneOf": [{"properties": {"a": {"minLength": 1}}}]},
    ):
        assert to_json("5", argument_kinds(own | more, "a")) == '"5"'


TEXTUAL: dict[str, Any] = {"type": "object", "properties": {"zip": {"type": "string"}}}


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"$ref": "#/$defs/node", "$defs": {"node": TEXTUAL}}, "12345"),
        ({"$ref": "#/$defs/a%20b%2525", "$defs": {"a b%25": TEXTUAL}}, "12345"),
        ({"$ref": "#/$defs/1/anyOf/1", "$defs": {"1": {"anyOf": [{}, TEXTUAL]}}}, "12345"),
        ({"$ref": "#/$defs/1/anyOf/2", "$defs": {"1": {"anyOf": [{}, TEXTUAL]}}}, 12345),
        ({"allOf": [{"properties": {"x": {}}}, TEXTUAL]}, "12345"),
        ({"anyOf": [TEXTUAL, {"type": "null"}]}, "12345"),
        ({"additionalProperties": {"type": "string"}}, "12345"),
        ({"properties": {"zip": True}, "additionalProperties": {"type": "string"}}, 12345),
        ({"patternProperties": {"z": {"type": "integer"}}, "additionalProperties": {"type": "string"}}, 12345),
        ({"anyOf": [TEXTUAL, {"properties": {"zip": {"type": "integer"}}}]}, 12345),
        ({"anyOf": 5, "$ref": "other"}, 12345),
    ],
)
def test_where_the_schema_of_an_argument_stands(schema: dict[str, Any], value: object) -> None:
    assert json.loads(to_json("12345", argument_kinds(schema, "zip"))) == value


def test_nested_values_have_the_schemas_that_references_name() -> None:
    schema: dict[str, Any] = {
        "properties": {
            "zips": {"$ref": "#/$defs/zips"},
            "zip": {"type": "string"},
            "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
        },
        "$defs": {"zips": {"type": "array", "items": {"$ref": "#/properties/zip"}}},
    }
    inner = "<next><zips><item>1</item><item>2</item></zips><next><zip>3</zip></next></next>"
    text = f'<tool_call><invoke name="f">{inner}</invoke></tool_call>'.replace("<", "]<]minimax[>[<")
    parsed = parse(OutputParser(Layout(THINK, ROWS["minimax_m3"]), tools={"f": schema}), text)
    assert parsed.values == [("f", {"next": {"zips": ["1", "2"], "next": {"zip": "3"}}})]


def test_a_grammar_of_a_map_accepts_the_texts_that_are_read_as_texts() -> None:
    form, parameters = ROWS["qwen3_coder"], {"type": "object", "additionalProperties": {"type": "string"}}
    vocab = vocabulary(form, THINK, bound=False)
    lark = tool_grammar(
        form, [Tool("f", parameters)], mode="required", parallel=False, reasoning=None, in_reasoning=False, special={}
    )  # fmt: skip
    assert lark is not None
    [(call, _)] = written(form, "12345", "string")
    ids = vocab.encode(call)
    assert accepts(vocab.compiler(lark)(), ids) == (len(ids), True)
    assert parse(OutputParser(Layout(THINK, form), tools={"f": parameters}), call).values == [("f", {"a": "12345"})]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"'\ud83d\ude00 hi'", "\U0001f600 hi"),
        (r"['\ud83d\ude00', {'\ud83d\ude00': '\ud800'}]", ["\U0001f600", {"\U0001f600": "\ufffd"}]),
    ],
)
def test_surrogate_pairs_are_characters(text: str, value: object) -> None:
    """No surrogate remains: those in arguments are special tokens."""
    found = python_value(text)
    assert found is not None
    found.encode()
    assert json.loads(found) == value
