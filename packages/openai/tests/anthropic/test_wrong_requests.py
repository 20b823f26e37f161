# SPDX-License-Identifier: MIT
"""Requests with exactly one thing wrong are refused with Anthropic's path of the field."""

from __future__ import annotations

import copy
import json
from typing import Any, get_type_hints

import pytest
from anthropic import types as official_types
from anthropic.types import message_count_tokens_params, message_create_params
from anthropic.types.beta import message_count_tokens_params as beta_count_params
from anthropic.types.beta import message_create_params as beta_create_params

from candle_vllm.core.errors import RequestError
from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.openai import OpenAIAdapter, to_json_bytes
from candle_vllm.openai.anthropic import (
    CountTokensRequest,
    MessagesAdapter,
    MessagesRequest,
    blocks,
    parse_count_tokens_request,
    parse_messages_request,
    to_anthropic_error,
)
from candle_vllm.openai.anthropic.request import OutputConfig, ThinkingOn, Tool
from candle_vllm.openai.protocol.fields import WireModel

TOOL = {"name": "f", "description": "d", "input_schema": {"type": "object", "properties": {"a": {"type": "string"}}}}
USE = {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": "b"}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": "c"}
RIGHT: dict[str, Any] = {
    "model": "default",
    "max_tokens": 10,
    "messages": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": [{"type": "text", "text": "x"}, USE]},
        {"role": "user", "content": [RESULT, {"type": "text", "text": "y"}]},
    ],
    "system": [{"type": "text", "text": "s"}],
    "tools": [TOOL],
}
GONE = Ellipsis  # the key is taken out
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
DEEP: Any = "x"
for _ in range(60):
    DEEP = {"properties": DEEP}


def changed(path: str, value: Any) -> dict[str, Any]:
    body = copy.deepcopy(RIGHT)
    *way, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    place: Any = body
    for step in way:
        place = place[step]
    if value is GONE:
        del place[last]
    elif isinstance(place, list) and last == len(place):
        place.append(value)
    else:
        place[last] = value
    return body


WRONG: list[tuple[str, Any, str]] = [  # where, what, the field to blame
    ("model", GONE, "model"),
    ("model", "", "model"),
    ("model", 1, "model"),
    ("max_tokens", GONE, "max_tokens"),
    ("max_tokens", None, "max_tokens"),
    ("max_tokens", 0, "max_tokens"),
    ("max_tokens", -1, "max_tokens"),
    ("max_tokens", 1.5, "max_tokens"),
    ("max_tokens", "10", "max_tokens"),
    ("max_tokens", True, "max_tokens"),
    ("max_tokens", 1 << 40, "max_tokens"),
    ("messages", GONE, "messages"),
    ("messages", [], "messages"),
    ("messages", "hi", "messages"),
    ("messages", [{"role": "user", "content": "x"}] * 3000, "messages"),
    ("messages.0", "hi", "messages.0.role"),
    ("messages.0.role", GONE, "messages.0.role"),
    ("messages.0.role", "tool", "messages.0.role"),
    ("messages.0.role", ["user"], "messages.0.role"),
    ("messages.0.content", GONE, "messages.0.content"),
    ("messages.0.content", "", "messages.0.content"),
    ("messages.0.content", [], "messages.0.content"),
    ("messages.0.content", 3, "messages.0.content"),
    ("messages.0.name", "x", "messages.0.name"),
    ("messages.0.content", ["x"], "messages.0.content.0"),
    ("messages.0.content", [{"text": "x"}], "messages.0.content.0.type"),
    ("messages.0.content", [{"type": 3, "text": "x"}], "messages.0.content.0.type"),
    ("messages.0.content", [{"type": "txt", "text": "x"}], "messages.0.content.0.type"),
    ("messages.0.content", [{"type": "text", "text": ""}], "messages.0.content.0.text"),
    ("messages.0.content", [{"type": "text"}], "messages.0.content.0.text"),
    ("messages.0.content", [{"type": "text", "text": "x", "txt": 1}], "messages.0.content.0.txt"),
    ("messages.0.content", [{"type": "text", "text": "x", "citations": [{}]}], "messages.0.content.0.citations"),
    ("messages.0.content", [{"type": "text", "text": "x", "cache_control": 1}], "messages.0.content.0.cache_control"),
    ("messages.0.content", [{"type": "text", "text": "x"}, IMAGE], "messages.0.content.1.source.data"),
    (
        "messages.0.content",
        [{**IMAGE, "transformations": {"oversized_image": "error"}}],
        "messages.0.content.0.transformations",
    ),
    ("messages.0.content", [{"type": "document", "source": {}}], "messages.0.content.0.source.type"),
    (
        "messages.0.content",
        [{"type": "document", "source": {"type": "base64", "data": "x"}}],
        "messages.0.content.0.source.type",
    ),
    (
        "messages.0.content",
        [{"type": "document", "source": {"type": "content", "content": [{"type": "image", "source": {}}]}}],
        "messages.0.content.0.source.content.0.type",
    ),
    ("messages.0.content", [{"type": "search_result"}], "messages.0.content.0.type"),
    ("messages.0.content", [{"type": "server_tool_use", "id": "x"}], "messages.0.content.0.type"),
    ("messages.0.content", [{"type": "thinking", "thinking": "x", "signature": ""}], "messages.0.content.0.type"),
    ("messages.0.content", [USE], "messages.0.content.0.type"),
    ("messages.1.content.2", RESULT, "messages.1.content.2.type"),
    ("messages.1.content.0", {"type": "thinking", "thinking": "x"}, "messages.1.content.0.signature"),
    ("messages.1.content.0", {"type": "thinking", "signature": "x"}, "messages.1.content.0.thinking"),
    ("messages.1.content.0", {"type": "redacted_thinking"}, "messages.1.content.0.data"),
    ("messages.1.content.1.id", GONE, "messages.1.content.1.id"),
    ("messages.1.content.1.name", GONE, "messages.1.content.1.name"),
    ("messages.1.content.1.input", GONE, "messages.1.content.1.input"),
    ("messages.1.content.1.input", "{}", "messages.1.content.1.input"),
    ("messages.1.content.1.caller", {"type": "code_execution_20250825"}, "messages.1.content.1.caller.type"),
    ("messages.1.content.2", USE, "messages.1.content.2.id"),
    ("messages.1.content.2", {**USE, "id": "t2"}, "messages.2.content"),
    ("messages.2.content.0.tool_use_id", "t9", "messages.2.content.0.tool_use_id"),
    ("messages.2.content.0.tool_use_id", GONE, "messages.2.content.0.tool_use_id"),
    ("messages.2.content.0.is_error", "yes", "messages.2.content.0.is_error"),
    ("messages.2.content.0.content", 3, "messages.2.content.0.content"),
    (
        "messages.2.content.0.content",
        [{"type": "image", "source": {"type": "base64", "media_type": "image/png"}}],
        "messages.2.content.0.content.0.source.data",
    ),
    ("messages.2.content.2", RESULT, "messages.2.content.2.type"),
    ("messages.2.content.0", {"type": "text", "text": "no result"}, "messages.2.content"),
    ("messages.2", GONE, "messages.1.content"),
    ("messages.3", {"role": "assistant", "content": "The answer is "}, "messages.3.content"),
    ("messages.3", {"role": "system"}, "messages.3.content"),
    ("messages.3", {"role": "system", "content": [IMAGE]}, "messages.3.content.0.type"),
    ("messages.3", {"role": "system", "content": "x", "clear_at": "soon"}, "messages.3.clear_at"),
    ("system", 3, "system"),
    ("system", [{"type": "text", "text": ""}], "system.0.text"),
    ("system", [IMAGE], "system.0.type"),
    ("system", [USE], "system.0.type"),
    ("temperature", 1.1, "temperature"),
    ("temperature", -0.1, "temperature"),
    ("temperature", "0", "temperature"),
    ("temperature", float("nan"), "temperature"),
    ("top_p", 0, "top_p"),
    ("top_p", 1.5, "top_p"),
    ("top_k", -1, "top_k"),
    ("top_k", 1.5, "top_k"),
    ("stop_sequences", "x", "stop_sequences"),
    ("stop_sequences", [""], "stop_sequences.0"),
    ("stop_sequences", ["x"] * 65, "stop_sequences"),
    ("stop_sequences", [1], "stop_sequences.0"),
    ("stream", "true", "stream"),
    ("metadata", {"user": "x"}, "metadata.user"),
    ("metadata", "x", "metadata"),
    ("service_tier", "fast", "service_tier"),
    ("speed", "slow", "speed"),
    ("context_management", [], "context_management"),
    ("cache_control", "ephemeral", "cache_control"),
    ("container", "c1", "container"),
    ("mcp_servers", [{"type": "url"}], "mcp_servers"),
    ("max_token", 10, "max_token"),
    ("temprature", 1, "temprature"),
    ("stop", ["x"], "stop"),
    ("n", 2, "n"),
    ("output_format", {"type": "json_schema"}, "output_format"),
    ("thinking", "enabled", "thinking"),
    ("thinking", {}, "thinking.type"),
    ("thinking", {"type": "on"}, "thinking.type"),
    ("thinking", {"type": "between_tools"}, "thinking.type"),
    ("thinking", {"type": "enabled"}, "thinking.budget_tokens"),
    ("thinking", {"type": "enabled", "budget_tokens": 100}, "thinking.budget_tokens"),
    ("thinking", {"type": "enabled", "budget_tokens": 2000}, "thinking.budget_tokens"),
    ("thinking", {"type": "adaptive", "budget_tokens": 2000}, "thinking.budget_tokens"),
    ("thinking", {"type": "adaptive", "display": "all"}, "thinking.display"),
    ("thinking", {"type": "disabled", "budget_tokens": 2000}, "thinking.budget_tokens"),
    ("output_config", {"effort": "most"}, "output_config.effort"),
    ("output_config", {"format": {"type": "json"}}, "output_config.format.type"),
    ("output_config", {"format": {"type": "json_schema"}}, "output_config.format.schema"),
    ("output_config", {"format": {"type": "json_schema", "schema": DEEP}}, "output_config.format.schema"),
    (
        "output_config",
        {"format": {"type": "json_schema", "schema": {"type": "nonsense"}}},
        "output_config.format.schema",
    ),
    ("tools", {}, "tools"),
    ("tools.0", "f", "tools.0"),
    ("tools.0.name", GONE, "tools.0.name"),
    ("tools.0.name", "a b", "tools.0.name"),
    ("tools.0.name", "a" * 129, "tools.0.name"),
    ("tools.0.input_schema", GONE, "tools.0.input_schema"),
    ("tools.0.input_schema", [], "tools.0.input_schema"),
    ("tools.0.input_schema.type", "array", "tools.0.input_schema.type"),
    ("tools.0.input_schema.properties", [], "tools.0.input_schema.properties"),
    ("tools.0.input_schema.required", "a", "tools.0.input_schema.required"),
    ("tools.0.input_schema", DEEP, "tools.0.input_schema"),
    ("tools.0.parameters", {}, "tools.0.parameters"),
    ("tools.0.strict", "yes", "tools.0.strict"),
    ("tools.0.descripton", "x", "tools.0.descripton"),
    ("tools.0.type", "function", "tools.0.type"),
    ("tools.0.type", "web_search_20250305", "tools.0.type"),
    ("tools.0.type", "bash_20250124", "tools.0.type"),
    ("tools.0.input_examples", [{"a": "b"}], "tools.0.input_examples"),
    ("tools.0.allowed_callers", ["code_execution_20250825"], "tools.0.allowed_callers"),
    ("tools.1", TOOL, "tools.1.name"),
    ("tool_choice", "auto", "tool_choice"),
    ("tool_choice", {}, "tool_choice.type"),
    ("tool_choice", {"type": "required"}, "tool_choice.type"),
    ("tool_choice", {"type": "tool"}, "tool_choice.name"),
    ("tool_choice", {"type": "tool", "name": "g"}, "tool_choice.name"),
    ("tool_choice", {"type": "auto", "disable_parallel_tool_use": 1}, "tool_choice.disable_parallel_tool_use"),
    ("tool_choice", {"type": "none", "disable_parallel_tool_use": True}, "tool_choice.disable_parallel_tool_use"),
]


async def failure(body: dict[str, Any] | bytes, **options: Any) -> tuple[int, dict[str, Any]]:
    engine = ScriptedEngine("hello", **options)
    adapter = MessagesAdapter(OpenAIAdapter(engine, tool_parser="hermes", strict_model_names=True))
    try:
        await adapter.create(parse_messages_request(body))
    except Exception as error:
        answer = to_anthropic_error(error)
        return answer.status, json.loads(to_json_bytes(answer.body))
    pytest.fail("the request was accepted")


async def test_the_right_request_is_right() -> None:
    message = await MessagesAdapter(OpenAIAdapter(ScriptedEngine("hello"))).create(RIGHT)
    assert message.stop_reason == "end_turn"


@pytest.mark.parametrize(("path", "value", "field"), WRONG, ids=lambda value: str(value)[:40])
async def test_one_wrong_thing_is_refused_with_its_field(path: str, value: Any, field: str) -> None:
    status, body = await failure(changed(path, value))
    assert status == 400
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["param"] == field
    assert body["error"]["message"].startswith(f"{field}: ")
    assert "function.parameters" not in body["error"]["message"]


async def test_counting_refuses_the_same() -> None:
    adapter = MessagesAdapter(OpenAIAdapter(ScriptedEngine("hello"), tool_parser="hermes"))
    generation = ("max_tokens", "stream", "temperature", "top_p", "top_k", "stop_sequences", "metadata", "service_tier")
    shared = [one for one in WRONG if not one[0].startswith((*generation, "container"))]
    shared = [one for one in shared if one[1] != {"type": "enabled", "budget_tokens": 2000}]  # of max_tokens
    assert len(shared) > 80
    for path, value, field in shared:
        body = changed(path, value)
        del body["max_tokens"]
        with pytest.raises(RequestError) as caught:
            await adapter.count_tokens(body)
        assert to_anthropic_error(caught.value).body.error.param == field


@pytest.mark.parametrize(
    "name", ["max_tokens", "stream", "temperature", "top_p", "top_k", "stop_sequences", "metadata", "service_tier"]
)
def test_counting_takes_no_fields_of_generation(name: str) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    parse_count_tokens_request({**body, name: None})
    with pytest.raises(Exception, match=f"{name} is not supported: counting generates nothing"):
        parse_count_tokens_request({**body, name: 1})


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'"x"', b"\xff", b'{"a": 1, "a": 2}'])
async def test_bodies_that_are_no_object(body: bytes) -> None:
    status, answer = await failure(body)
    assert (status, answer["error"]["type"], answer["error"]["param"]) == (400, "invalid_request_error", None)


async def test_a_misspelt_field_is_told_the_nearest_one() -> None:
    _, body = await failure(changed("stop_sequence", ["x"]))
    assert body["error"]["message"] == "stop_sequence: is not a known field; did you mean 'stop_sequences'?"


async def test_unknown_model_and_prompt_that_is_too_long() -> None:
    status, body = await failure(changed("model", "claude"))
    assert (status, body["error"]["type"], body["error"]["param"]) == (404, "not_found_error", "model")
    status, body = await failure(RIGHT, max_model_len=20)
    assert (status, body["error"]["param"]) == (400, "messages")
    assert body["error"]["message"].startswith("messages: prompt is too long: ")


async def test_a_schema_that_cannot_be_followed_is_blamed() -> None:
    tool = {**TOOL, "strict": True, "input_schema": {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}}
    search = {"type": "tool_search_tool_regex_20251119", "name": "search"}
    body = {**RIGHT, "tools": [search, tool], "tool_choice": {"type": "any"}}
    _, answer = await failure(body)
    assert answer["error"]["param"].startswith("tools.1.input_schema")
    schema = {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}
    _, answer = await failure({**RIGHT, "output_config": {"format": {"type": "json_schema", "schema": schema}}})
    assert answer["error"]["param"] == "output_config.format.schema"


@pytest.mark.parametrize(
    ("kind", "official"),
    [
        (MessagesRequest, message_create_params.MessageCreateParamsStreaming),
        (MessagesRequest, beta_create_params.MessageCreateParamsNonStreaming),
        (CountTokensRequest, message_count_tokens_params.MessageCountTokensParams),
        (CountTokensRequest, beta_count_params.MessageCountTokensParams),
        (blocks.TextBlock, official_types.TextBlockParam),
        (blocks.ImageBlock, official_types.ImageBlockParam),
        (blocks.DocumentBlock, official_types.DocumentBlockParam),
        (blocks.ThinkingBlock, official_types.ThinkingBlockParam),
        (blocks.ToolUseBlock, official_types.ToolUseBlockParam),
        (blocks.ToolResultBlock, official_types.ToolResultBlockParam),
        (Tool, official_types.ToolParam),
        (ThinkingOn, official_types.ThinkingConfigEnabledParam),
        (OutputConfig, official_types.OutputConfigParam),
    ],
)
def test_the_official_clients_fields_are_known(kind: type[WireModel], official: type) -> None:
    fields = {*get_type_hints(official)} - {"betas"}  # a header
    assert fields
    assert not fields - kind.wire_names() - set(kind.refused_fields)
    assert not kind.wire_names() & set(kind.refused_fields)
