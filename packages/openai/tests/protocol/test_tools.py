# SPDX-License-Identifier: MIT
"""Tools: what is accepted, what a request says about them in one piece, and how each refusal names its field."""

from __future__ import annotations

import json
import time
from typing import Any

import openai
import pydantic
import pytest

from candle_vllm.core.errors import InvalidParameterError, RequestError
from candle_vllm.openai import ChatCompletionRequest, InvalidBodyError, UnsupportedParameterError, parse_chat_request
from candle_vllm.openai.anthropic import parse_count_tokens_request, parse_messages_request
from candle_vllm.openai.ollama.request import ChatRequest as OllamaRequest
from candle_vllm.openai.ollama.request import ollama_parser
from candle_vllm.openai.protocol.fields import MAX_SCHEMA_DEPTH, MAX_TOOLS, MAX_TOOLS_SIZE
from candle_vllm.openai.protocol.tools import FunctionDefinition, Tool
from candle_vllm.openai.task import ToolUse

HI = [{"role": "user", "content": "hi"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


def tool(name: str = "weather", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


def choice(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [choice(name) for name in names]}}


def custom(name: str = "c", form: Any = None) -> dict[str, Any]:
    return {"type": "custom", "custom": {"name": name, **({} if form is None else {"format": form})}}


CHOSEN = {"type": "custom", "custom": {"name": "c"}}


def chat(**fields: Any) -> ChatCompletionRequest:
    return parse_chat_request(json.dumps({"messages": HI, **fields}).encode())


def refusal(**fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    assert str(caught.value).startswith(caught.value.param or "?")
    return caught.value


def names(use: ToolUse) -> list[str]:
    return [function.name for function in use.tools]


def test_no_tools_are_no_tools_however_they_are_not_given() -> None:
    for fields in ({}, {"tools": []}, {"tools": None, "tool_choice": None}, {"tool_choice": "none"}):
        assert chat(**fields).tool_use() == ToolUse()
        assert chat(**fields).tool_use().as_template() is None


def test_the_model_chooses_unless_told_otherwise() -> None:
    for fields in ({}, {"tool_choice": None}, {"tool_choice": "auto"}, {"parallel_tool_calls": True}):
        use = chat(tools=[tool("a"), tool("b")], **fields).tool_use()
        assert (use.mode, use.parallel, use.named, names(use)) == ("auto", True, None, ["a", "b"])


def test_choices() -> None:
    tools = [tool("a"), tool("b"), tool("c")]
    required = chat(tools=tools, tool_choice="required", parallel_tool_calls=False).tool_use()
    assert (required.mode, required.parallel, names(required)) == ("required", False, ["a", "b", "c"])
    named = chat(tools=tools, tool_choice=choice("b")).tool_use()
    assert (named.mode, named.named, named.parallel, names(named)) == ("required", "b", False, ["b"])
    some = chat(tools=tools, tool_choice=allowed("auto", "c", "a")).tool_use()
    assert (some.mode, some.named, some.parallel, names(some)) == ("auto", None, True, ["a", "c"])
    assert chat(tools=tools, tool_choice=allowed("required", "c")).tool_use().mode == "required"
    for use in (required, named, some):
        assert [shown["function"]["name"] for shown in use.as_template() or ()] == ["a", "b", "c"]


def test_a_choice_of_none_hides_the_tools() -> None:
    assert chat(tools=[tool()], tool_choice="none").tool_use() == ToolUse()


def test_functions_have_their_defaults() -> None:
    given = [tool("a"), tool("b", parameters={}, strict=None), tool("c", description="x", parameters=CITY, strict=True)]
    a, b, c = chat(tools=given).tool_use().tools
    assert (a.description, a.parameters, a.strict) == (None, NO_ARGUMENTS, False)
    assert (b.parameters, b.strict) == (NO_ARGUMENTS, False)
    assert (c.description, c.parameters, c.strict) == ("x", CITY, True)
    untyped = chat(tools=[tool(parameters={"$ref": "#/$defs/x", "$defs": {"x": CITY}})]).tool_use().tools[0]
    assert untyped.parameters == {"type": "object", "$ref": "#/$defs/x", "$defs": {"x": CITY}}


def test_templates_see_the_callers_names_in_the_callers_order_and_no_others() -> None:
    given = {
        "function": {"parameters": {"required": [], "type": "object"}, "strict": None, "name": "f", "description": ""},
        "cache_control": {"type": "ephemeral"},
        "type": "function",
    }
    shown = chat(tools=[given]).tool_use().as_template()
    expected = {
        "function": {"parameters": {"required": [], "type": "object"}, "name": "f", "description": ""},
        "type": "function",
    }
    assert json.dumps(shown) == json.dumps([expected])
    assert chat(tools=[tool("f")]).tool_use().as_template() == [tool("f")]


def test_tools_can_be_made_in_process() -> None:
    made = Tool(function=FunctionDefinition(name="f", parameters=CITY))
    use = ChatCompletionRequest.model_validate({"messages": HI, "tools": [made], "tool_choice": choice("f")}).tool_use()
    assert use.as_template() == [tool("f", parameters=CITY)]
    with pytest.raises(InvalidParameterError, match="must be JSON") as caught:
        parse_chat_request({"messages": HI, "tools": [tool(parameters={"x": {1, 2}})]})
    assert caught.value.param == "tools.0.function.parameters"


def test_what_the_official_client_makes_of_a_pydantic_model_is_accepted() -> None:
    class Weather(pydantic.BaseModel):
        """The weather of a city."""

        city: str

    function = chat(tools=[openai.pydantic_function_tool(Weather)], tool_choice="required").tool_use().tools[0]
    assert (function.name, function.strict, function.parameters["required"]) == ("Weather", True, ["city"])


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels - 1):
        schema = {"not": schema}
    return schema


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tools": [1]}, "tools.0", "must be an object"),
        ({"tools": {}}, "tools", "must be a list"),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "is required"),
        ({"tools": [{"type": "function", "name": "f", "parameters": {}}]}, "tools.0.function", "put name"),
        ({"tools": [{**tool(), "x": 1}]}, "tools.0.x", "not a known field"),
        ({"tools": [tool(parameter={})]}, "tools.0.function.parameter", "did you mean 'parameters'"),
        ({"tools": [{"type": 3, "function": {"name": "f"}}]}, "tools.0.type", "'function'"),
        ({"tools": [tool("a.b")]}, "tools.0.function.name", "OpenAI's rule for names; 'a.b' is not"),
        ({"tools": [tool("")]}, "tools.0.function.name", "must be 1 to 64"),
        ({"tools": [tool("a" * 65)]}, "tools.0.function.name", "must be 1 to 64"),
        ({"tools": [tool("a\n")]}, "tools.0.function.name", "must be 1 to 64"),
        ({"tools": [tool("größe")]}, "tools.0.function.name", "must be 1 to 64"),
        ({"tools": [tool(3)]}, "tools.0.function.name", "must be a string"),  # type: ignore[arg-type]
        ({"tools": [tool("a"), tool("b"), tool("a")]}, "tools.2.function.name", "tools.0 is called 'a' too"),
        ({"tools": [tool(parameters={"type": "array"})]}, "tools.0.function.parameters.type", "it is 'array'"),
        ({"tools": [tool(parameters={"type": ["object", "null"]})]}, "tools.0.function.parameters.type", "'object'"),
        ({"tools": [tool(parameters={"type": None})]}, "tools.0.function.parameters.type", "it is None"),
        ({"tools": [tool(parameters=[])]}, "tools.0.function.parameters", "must be an object"),
        ({"tools": [tool(parameters={"properties": [1]})]}, "tools.0.function.parameters.properties", "maps names"),
        ({"tools": [tool(parameters={"properties": {"a": "string"}})]}, "tools.0.function.parameters.properties.a",
         "must be a JSON schema"),
        ({"tools": [tool(parameters={"required": "a"})]}, "tools.0.function.parameters.required", "list of property"),
        ({"tools": [tool(parameters=nested(MAX_SCHEMA_DEPTH + 1))]}, "tools.0.function.parameters", "too deeply"),
        ({"tools": [tool(strict="yes")]}, "tools.0.function.strict", "must be true or false"),
        ({"tools": [tool(description=3)]}, "tools.0.function.description", "must be a string"),
        ({"tools": [tool(f"f{n}") for n in range(MAX_TOOLS + 1)]}, "tools", f"at most {MAX_TOOLS} entries"),
        ({"tools": [tool(description="x" * MAX_TOOLS_SIZE)]}, "tools", f"more than {MAX_TOOLS_SIZE} characters"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tool_choice": choice("f")}, "tool_choice", "needs tools"),
        ({"tool_choice": allowed("auto", "f")}, "tool_choice", "needs tools"),
        ({"tools": [tool()], "tool_choice": "any"}, "tool_choice", "must be one of 'none', 'auto' or 'required'"),
        ({"tools": [tool()], "tool_choice": 3}, "tool_choice", "must be one of"),
        ({"tools": [tool()], "tool_choice": ["auto"]}, "tool_choice", "must be one of"),
        ({"tools": [tool()], "tool_choice": {}}, "tool_choice.function", "is required"),
        ({"tools": [tool()], "tool_choice": {"type": "auto"}}, "tool_choice.type", "'auto' and 'required' are plain"),
        ({"tools": [tool()], "tool_choice": {"type": "function", "name": "weather"}}, "tool_choice.name", "not a kno"),
        ({"tools": [tool()], "tool_choice": choice("wether")}, "tool_choice.function.name", "did you mean 'weather'"),
        ({"tools": [tool()], "tool_choice": choice("x y")}, "tool_choice.function.name", "OpenAI's rule"),
        ({"tools": [tool()], "tool_choice": allowed("auto", "weather", "zzz")},
         "tool_choice.allowed_tools.tools.1.function.name", "one of the 1 tools, not 'zzz'; the first of them"),
        ({"tools": [tool()], "tool_choice": allowed("none", "weather")}, "tool_choice.allowed_tools.mode", "'auto'"),
        ({"tools": [tool()], "tool_choice": allowed("auto")}, "tool_choice.allowed_tools.tools", "must not be empty"),
        ({"tools": [tool()], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools", "is required"),
        ({"tools": [tool()], "parallel_tool_calls": "no"}, "parallel_tool_calls", "must be true or false"),
        ({"tools": [{"type": "custom"}]}, "tools.0.custom", "is required"),
        ({"tools": [{"type": "custom", "name": "c"}]}, "tools.0.custom", "put name, description and format into it"),
        ({"tools": [{"type": "custom", "function": {"name": "c"}}]}, "tools.0.custom", "is required"),
        ({"tools": [custom("a b")]}, "tools.0.custom.name", "OpenAI's rule"),
        ({"tools": [tool("c"), custom("c")]}, "tools.1.custom.name", "tools.0 is called 'c' too"),
        ({"tools": [custom("c", {"type": "xml"})]}, "tools.0.custom.format.type", "'text'"),
        ({"tools": [custom("c", {"type": "grammar"})]}, "tools.0.custom.format.grammar", "is required"),
        ({"tools": [custom("c", {"type": "grammar", "syntax": "lark", "definition": "start: /a/"})]},
         "tools.0.custom.format.grammar", "is required"),
        ({"tools": [custom("c", {"type": "grammar", "grammar": {"syntax": "ebnf", "definition": "a"}})]},
         "tools.0.custom.format.grammar.syntax", "'lark' or 'regex'"),
        ({"tools": [custom("c", {"type": "grammar", "grammar": {"syntax": "regex", "definition": ""}})]},
         "tools.0.custom.format.grammar.definition", "must not be empty"),
        ({"tools": [custom("c")], "tool_choice": choice("c")}, "tool_choice.function.name", "no such tool"),
        ({"tools": [tool(), custom("c")], "tool_choice": choice("c")}, "tool_choice.function.name", "not 'c'"),
        ({"tools": [tool()], "tool_choice": CHOSEN}, "tool_choice.custom.name", "no such tool"),
        ({"tools": [custom("d")], "tool_choice": CHOSEN}, "tool_choice.custom.name", "not 'c'"),
        ({"tools": [custom("d")], "tool_choice": {"type": "allowed_tools", "allowed_tools": {
            "mode": "auto", "tools": [CHOSEN]}}}, "tool_choice.allowed_tools.tools.0.custom.name", "not 'c'"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(fields: dict[str, Any], param: str, message: str) -> None:
    error = refusal(**fields)
    assert error.param == param
    assert message in str(error)
    assert len(str(error)) < 500


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "'web_search' tools"),
        ({"functions": [{"name": "f"}]}, "functions", "replaced it by tools"),
        ({"function_call": {"name": "f"}}, "function_call", "replaced it by tools"),
    ],
)
def test_what_others_define_is_unsupported(fields: dict[str, Any], param: str, message: str) -> None:
    error = refusal(**fields)
    assert isinstance(error, UnsupportedParameterError)
    assert error.param == param
    assert message in str(error)


def of(schema: Any, **beside: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": schema}, **beside}


@pytest.mark.parametrize("choice", [None, "auto", "required", "none", {"type": "function", "function": {"name": "f"}}])
@pytest.mark.parametrize(
    ("schema", "path", "message"),
    [
        (of({"type": "any"}), "properties.a.type", "has the unknown JSON type 'any'; known: null, boolean"),
        (of({"items": {"type": ["string", 5]}}), "properties.a.items.type", "unknown JSON type 5"),
        (of({"$ref": "#/$defs/b"}, **{"$defs": {}}), "properties.a.$ref", "'#/$defs/b' points to nothing"),
        (of({"$ref": "https://example.com/b"}), "properties.a.$ref", "refer to a place of the same schema"),
        (of({"$ref": "#/properties/a"}), "properties.a.$ref", "'#/properties/a' refers to nothing but itself"),
        ({"$ref": "#"}, "$ref", "'#' refers to nothing but itself"),
        (
            of({"$ref": "#/$defs/b"}, **{"$defs": {"b": {"$ref": "#/$defs/c"}, "c": {"$ref": "#/$defs/b"}}}),
            "$defs.c.$ref",
            "refers to nothing but itself",
        ),
    ],
)
def test_schemas_of_which_nobody_can_make_sense(choice: Any, schema: Any, path: str, message: str) -> None:
    error = refusal(tools=[tool("f", parameters=schema)], tool_choice=choice)
    assert error.param == f"tools.0.function.parameters.{path}"
    assert message in str(error)


def test_types_of_python_are_those_of_json() -> None:
    parameters = of({"type": "float"}, required=["a"]) | {"type": "dict"}
    parameters["properties"] |= {"b": {"items": {"type": ["int", "null"]}, "default": {"type": "float"}}}
    (made,) = chat(tools=[tool(parameters=parameters)]).tool_use().tools
    assert made.parameters["type"] == "object"
    assert made.parameters["properties"]["a"] == {"type": "number"}
    assert made.parameters["properties"]["b"] == {"items": {"type": ["integer", "null"]}, "default": {"type": "float"}}


def test_a_choice_needs_tools() -> None:
    for choice in ("auto", "required"):
        assert refusal(tool_choice=choice).param == "tool_choice"
    assert chat(tool_choice="none").tool_use() == chat(tools=[], tool_choice="auto").tool_use() == ToolUse()


def test_as_many_and_as_deep_as_allowed() -> None:
    full = chat(tools=[tool(f"f{n}") for n in range(MAX_TOOLS)], tool_choice=allowed("auto", "f1023"))
    assert names(full.tool_use()) == ["f1023"]
    assert chat(tools=[tool(parameters=nested(MAX_SCHEMA_DEPTH))]).tool_use().tools


def test_hostile_tools_are_refused_in_bounded_time() -> None:
    bodies = [
        {"tools": [tool(f"f{number}", parameters=CITY) for number in range(10_000)]},
        {"tools": [tool("f")] * 10_000},
        {"tools": [tool(f"f{number}", description="x" * 10_000) for number in range(MAX_TOOLS)]},
        {"tools": [tool("f" * 100_000)]},
        {"tools": [tool(f"f{n}") for n in range(MAX_TOOLS)], "tool_choice": allowed("auto", *["fx"] * 10_000)},
        {"tools": [tool(parameters={"properties": {f"p{number}": 1 for number in range(20_000)}})]},
    ]
    began = time.process_time()
    for fields in bodies:
        assert (refusal(**fields).param or "").startswith("tool")
    assert time.process_time() - began < 10  # 0.6 s


def test_a_schema_a_thousand_deep_is_refused_before_and_behind_the_wire() -> None:
    body = '{"tools": [{"function": {"name": "f", "parameters": ' + '{"not": ' * 1000 + "{}" + "}" * 1000 + "}}]}"
    with pytest.raises(InvalidBodyError, match="nested too deeply"):
        parse_chat_request(body.encode())
    with pytest.raises(InvalidParameterError, match="nested too deeply") as caught:
        parse_chat_request({"messages": HI, "tools": [tool(parameters=nested(1000))]})
    assert caught.value.param == "tools.0.function.parameters"


def _anthropic(name: str) -> dict[str, Any]:
    use = {"type": "tool_use", "id": "t", "name": name, "input": {}}
    turns = [{"role": "assistant", "content": [use]}, {"role": "user", "content": [_result("t")]}]
    tools = [{"name": name, "input_schema": {"type": "object"}}]
    return {"model": "m", "messages": [*HI, *turns], "tools": tools, "tool_choice": {"type": "tool", "name": name}}


def _result(call: str) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call, "content": "x"}


def _ollama(name: str) -> dict[str, Any]:
    calls = [{"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": {}}}]}]
    answered = [*HI, *calls, {"role": "tool", "tool_name": name, "content": "x"}]
    return {"model": "m", "messages": answered, "tools": [tool(name)]}


PLUGIN = "mcp__plugin_chrome-devtools-mcp_chrome-devtools__get_console_message"  # 68 characters
NAMES = [  # of each API: its reader, a request with a tool of some name wherever one may stand, and names for it
    (parse_chat_request, lambda name: {"messages": HI, "tools": [tool(name)], "tool_choice": choice(name)},
     ["a" * 64, "9-a_B"], [PLUGIN, "a.b", "a b", ""]),
    (lambda body: parse_messages_request({"max_tokens": 5, **body}), _anthropic,
     ["a" * 128, PLUGIN, "9-a_B"], ["a" * 129, "a.b", "a b", ""]),
    (parse_count_tokens_request, _anthropic, ["a" * 128, PLUGIN], ["a" * 129, "a.b"]),
    (ollama_parser(OllamaRequest), _ollama, ["a" * 256, PLUGIN, "a.b/c:d", "é"], ["a" * 257, "a b", "a\n", ""]),
]  # fmt: skip


@pytest.mark.parametrize(("read", "body", "accepted", "refused"), NAMES, ids=["openai", "anthropic", "count", "ollama"])
def test_each_api_has_its_own_rule_for_names(read: Any, body: Any, accepted: list[str], refused: list[str]) -> None:
    for name in accepted:
        read(body(name))
    for name in refused:
        with pytest.raises(RequestError, match=r"^(tools|messages)\.\S*name "):
            read(body(name))
