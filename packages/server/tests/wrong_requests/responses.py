# SPDX-License-Identifier: MIT
"""Rows of responses."""

from __future__ import annotations

from typing import Any

from candle_vllm.responses.protocol.fields import REFUSED_COUNT_FIELDS, REFUSED_RESPONSES_FIELDS
from packages.server.tests.wrong_requests.rows import (
    BIG,
    GONE,
    LONG,
    MODEL,
    Route,
    Row,
    deep,
    not_served,
    numbers,
    switches,
    texts,
)

_SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
FUNCTION = {"type": "function", "name": "f", "parameters": _SCHEMA}
CUSTOM = {"type": "custom", "name": "c"}
NAMESPACE = {"type": "namespace", "name": "n", "description": "d", "tools": [{"type": "function", "name": "g"}]}
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "1"}
REQUEST = {"type": "mcp_approval_request", "id": "r1", "server_label": "s", "name": "t", "arguments": "{}"}

RIGHT: dict[str, Any] = {
    "input": [
        {"role": "user", "content": "Hi"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        CALL,
        RESULT,
    ],
    "tools": [FUNCTION, CUSTOM, NAMESPACE],
}


def item(value: Any, below: str = "", code: str | None = None) -> Row:
    """Another item at the end."""
    return Row("input.4", value, f"input.4{below}", code=code)


def tool(value: Any, below: str = "", code: str | None = None) -> Row:
    """Another tool at the end."""
    return Row("tools.3", value, f"tools.3{below}", code=code)


def choice(value: Any, below: str = "") -> Row:
    """A choice among the tools."""
    return Row("tool_choice", value, f"tool_choice{below}")


PROMPT = [
    *MODEL,
    *switches("parallel_tool_calls"),
    *texts("instructions", "previous_response_id"),
    Row("input", GONE),
    Row("input", []),
    Row("input", ""),
    Row("input", 1),
    Row("input", {"role": "user"}),
    Row("input.0", "Hi"),
    Row("input.0.role", "tool"),
    Row("input.0.role", GONE),
    Row("input.0.content", GONE),
    Row("input.0.content", 1),
    Row("input.0.content", [1], "input.0.content.0"),
    Row("input.0.name", "x", code="unsupported_parameter"),
    Row("input.0.text", "x", code="unknown_parameter"),
    Row("input.1.content.0.type", "input_image", "input.1.content.0.text"),
    Row(
        "input.1.content.0",
        {"type": "input_image", "image_url": "x"},
        "input.1.content.0.image_url",
        code="unsupported_parameter",
    ),
    Row("input.1.content.0.type", "input_file", code="unsupported_parameter"),
    Row("input.1.content.0.type", "input_audio", code="unsupported_parameter"),
    Row("input.1.content.0.type", "words"),
    Row("input.1.content.0.text", 1),
    Row("input.1.content.0.text", GONE),
    Row("input.2.arguments", {}),
    Row("input.2.arguments", GONE),
    Row("input.2.call_id", ""),
    Row("input.2.name", GONE),
    Row("input.3.call_id", "other"),
    Row("input.3.output", GONE),
    Row("input.3.output", 1),
    Row("input.1.content", [{"type": "input_image", "image_url": "x"}], "input.1.content.0.image_url"),
    Row("input.1.content", [{"type": "input_image", "file_id": "f"}], "input.1.content.0.file_id"),
    Row("input.3.output", [{"type": "input_image"}], "input.3.output.0.image_url"),
    Row("input.3", CALL, "input.3.call_id"),  # the same call again
    item(RESULT, ".call_id"),  # the same result again
    item({**CALL, "call_id": "c2"}, ".call_id"),  # a call without its result
    item({"type": "program", "id": "w"}, ".type", "unsupported_parameter"),
    item({"type": "web_search_call", "id": 1}, ".id"),
    item({"type": "acme:thing", "id": "w"}, ".type"),
    item({"type": "item_reference", "id": "nothing"}, ".id"),
    item({"type": "reasoning", "summary": "x"}, ".summary"),
    item({"type": "reasoning", "content": [{"type": "reasoning_text"}]}, ".content.0.text"),
    item({"type": "mcp_call", "id": "m", "server_label": "s", "name": "t"}, ".arguments"),
    item({"type": "mcp_approval_response", "approval_request_id": "r1", "approve": True}, ".approval_request_id"),
    item({"type": "mcp_approval_response", "approval_request_id": "r1"}, ".approve"),
    item({**REQUEST, "id": 1}, ".id"),
    Row("tools", 1),
    Row("tools", [1], "tools.0"),
    Row("tools", [{}], "tools.0.type"),
    tool({"type": {}}, ".type"),
    tool({"type": "namespace", "name": "x", "tools": [{"type": {}, "name": "y"}]}, ".tools.0.type"),
    tool({"type": "custom", "name": "x", "format": {"type": {}}}, ".format.type"),
    item({"type": {}}, ".type"),
    tool({"type": "function"}, ".name"),
    tool({"type": "function", "function": {"name": "x"}}, ".name"),
    tool({"type": "function", "name": "a b"}, ".name"),
    tool({"type": "function", "name": "a" * 65}, ".name"),
    tool({"type": "function", "name": "x", "parameters": {"type": "string"}}, ".parameters.type"),
    tool({"type": "function", "name": "x", "parameters": 1}, ".parameters"),
    tool({"type": "function", "name": "x", "parameters": deep(25)}, ".parameters"),
    tool({"type": "function", "name": "x", "strict": 1}, ".strict"),
    tool({"type": "function", "name": "x", "paramters": {}}, ".paramters", "unknown_parameter"),
    tool({"type": "function", "name": "x", "allowed_callers": ["programmatic"]}, ".allowed_callers"),
    tool(
        {"type": "function", "name": "x", "strict": True, "parameters": {"type": "object", "$ref": "http://a/b"}},
        ".parameters.$ref",
    ),
    tool(FUNCTION, ".name"),
    tool({"type": "function", "name": "n__g"}, ".name"),  # what the model calls the tool of the namespace
    tool({"type": "custom"}, ".name"),
    tool({"type": "custom", "name": "x", "format": {"type": "xml"}}, ".format.type"),
    tool(
        {"type": "custom", "name": "x", "format": {"type": "grammar", "syntax": "ebnf", "definition": "a"}},
        ".format.syntax",
    ),
    tool(
        {"type": "custom", "name": "x", "format": {"type": "grammar", "syntax": "regex", "definition": ""}},
        ".format.definition",
    ),
    tool({"type": "namespace", "name": "x"}, ".tools"),
    tool({"type": "namespace", "name": "x", "tools": [{"type": "function"}]}, ".tools.0.name"),
    tool({"type": "mcp"}, ".server_label"),
    tool({"type": "mcp", "server_label": "x", "authorization": "t"}, ".authorization"),
    tool({"type": "mcp", "server_label": "x", "headers": {"a": "b"}}, ".headers"),
    tool({"type": "mcp", "server_label": "x", "connector_id": "connector_gmail"}, ".connector_id"),
    tool({"type": "mcp", "server_label": "x", "require_approval": "sometimes"}, ".require_approval"),
    tool({"type": "mcp", "server_label": "x", "allowed_tools": 1}, ".allowed_tools"),
    tool({"type": "mcp", "server_label": "x"}, ".server_label"),  # there are none here
    choice("any"),
    choice(1),
    choice({"type": {}}, ".type"),
    choice({"type": "allowed_tools", "tools": [{"type": []}]}, ".tools.0.type"),
    choice({"type": "function"}, ".name"),
    choice({"type": "function", "name": "nothing"}, ".name"),
    choice({"type": "custom", "name": "f"}, ".name"),
    choice({"type": "mcp", "server_label": "x"}, ".server_label"),
    choice({"type": "web_search"}, ".type"),
    choice({"type": "allowed_tools", "mode": "auto", "tools": []}, ".tools"),
    choice({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "x"}]}, ".tools.0.name"),
    Row("text", 1),
    Row("text", {"form": {}}, "text.form"),
    Row("text", {"format": {"type": "xml"}}, "text.format.type"),
    Row("text", {"format": {"type": {}}}, "text.format.type"),
    Row("input.1.content.0.type", {}),
    Row("text", {"format": {"type": "json_schema", "name": "a"}}, "text.format.schema"),
    Row("text", {"format": {"type": "json_schema", "schema": {}}}, "text.format.name"),
    Row("text", {"format": {"type": "json_schema", "name": "a", "schema": deep(25)}}, "text.format.schema"),
    Row("text", {"format": {"type": "json_schema", "name": "a", "schema": {"$ref": "#"}}}, "text.format.schema"),
    Row("text", {"format": {"type": "json_schema", "name": "a", "schema": {"type": "nothing"}}}, "text.format.schema"),
    Row("text", {"verbosity": "loud"}, "text.verbosity"),
    Row("reasoning", "high"),
    Row("reasoning", {"effort": "most"}, "reasoning.effort"),
    Row("reasoning", {"summary": "long"}, "reasoning.summary"),
    Row("truncation", "middle"),
    Row("conversation", 1),
    Row("conversation", {}, "conversation.id"),
    Row("conversation", "nothing", status=404),
    Row("previous_response_id", "nothing", code="previous_response_not_found"),
    Row("previous_response_id", LONG),
    Row("chat_template_kwargs", {"messages": 1}, "chat_template_kwargs.messages"),
]

ROUTES = [
    Route(
        "/v1/responses",
        RIGHT,
        [
            *PROMPT,
            *numbers(
                ("max_output_tokens", 1, 1 << 24),
                ("max_tool_calls", 1, 10_000),
                ("top_logprobs", 0, 20),
                ("top_k", -1, 1 << 24),
                ("seed", -(1 << 63), (1 << 64) - 1),
            ),
            *numbers(
                ("temperature", 0, 2),
                ("top_p", 0.001, 1),
                ("presence_penalty", -2, 2),
                ("frequency_penalty", -2, 2),
                whole=False,
            ),
            *switches("stream", "store", "background"),
            *texts("user", "safety_identifier", "prompt_cache_key"),
            *not_served(REFUSED_RESPONSES_FIELDS),
            Row("include", "message.output_text.logprobs"),
            Row("include", ["everything"], "include.0"),
            Row("metadata", "a"),
            Row("metadata", {"a": 1}, "metadata.a"),
            Row("metadata", {"a": "x" * 513}, "metadata.a"),
            Row("metadata", {"x" * 65: "a"}),
            Row("metadata", {str(number): "a" for number in range(17)}),
            Row("service_tier", "cheap"),
            Row("prompt_cache_retention", "1h"),
            Row("stream_options", {}),  # without stream
            Row("priority", -1, code="unsupported_parameter"),
            Row("max_output_tokens", BIG),
            Row("stop", [""], "stop.0"),
        ],
    ),
    Route("/v1/responses/input_tokens", RIGHT, [*PROMPT, *not_served(REFUSED_COUNT_FIELDS)]),
]
