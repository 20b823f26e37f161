# SPDX-License-Identifier: MIT
"""Requests: every field of the official client's is taken, without effect, or refused by name."""

from __future__ import annotations

import typing
from typing import Any

import pytest
from openai.types.responses import ResponseCustomToolCall, ResponseFunctionToolCall
from openai.types.responses.input_token_count_params import InputTokenCountParams
from openai.types.responses.response_create_params import ResponseCreateParamsStreaming
from openresponses_types.types import CreateResponseBody

from candle_vllm.core.errors import InvalidParameterError, RequestError
from candle_vllm.core.sampling.params import BOUNDS
from candle_vllm.openai.anthropic.request import MessagesRequest
from candle_vllm.openai.errors import UnknownParameterError, UnsupportedParameterError
from candle_vllm.openai.fim import FimRequest
from candle_vllm.openai.json_body import parse_body
from candle_vllm.openai.llama_server import LlamaCompletionRequest
from candle_vllm.openai.ollama import Options
from candle_vllm.openai.protocol.chat import ChatCompletionRequest
from candle_vllm.openai.protocol.completions import CompletionRequest
from candle_vllm.responses.api.responder import summary_request
from candle_vllm.responses.protocol.fields import ADVISORY_RESPONSES_FIELDS, MAX_ITEMS
from candle_vllm.responses.protocol.request import (
    CompactRequest,
    InputTokensRequest,
    ResponsesRequest,
    parse_responses_request,
)
from candle_vllm.responses.protocol.tools import HostedTool, McpTool

HI = {"input": "Hi"}


def test_every_official_field_is_known() -> None:
    official = {*ResponseCreateParamsStreaming.__mro__[0].__annotations__}
    for base in getattr(ResponseCreateParamsStreaming, "__orig_bases__", ()):
        official |= {*getattr(base, "__annotations__", ())}
    assert len(official) > 25
    known = {*ResponsesRequest.wire_names(), *ResponsesRequest.refused_fields}
    assert not official - known
    assert not {*CreateResponseBody.model_fields} - known
    counted = {*InputTokensRequest.wire_names(), *InputTokensRequest.refused_fields}
    assert not {*InputTokenCountParams.__annotations__} - counted


OWN = {  # bounds that an API defines itself, and names under which it has a field of `SamplingParams`
    (ResponsesRequest, "temperature"): {"le": 2}, (MessagesRequest, "temperature"): {"le": 1},
    (MessagesRequest, "top_k"): {"ge": 0}, (CompletionRequest, "max_tokens"): {"ge": 0},
}  # fmt: skip
RENAMED = {
    "best_of": "n", "repeat_penalty": "repetition_penalty", "max_completion_tokens": "max_tokens",
    "max_output_tokens": "max_tokens", "top_logprobs": "logprobs", "n_probs": "logprobs",
}  # fmt: skip


@pytest.mark.parametrize("request_type", [
    ChatCompletionRequest, CompletionRequest, MessagesRequest, Options, LlamaCompletionRequest, FimRequest,
    ResponsesRequest,
])  # fmt: skip
def test_every_number_has_the_bounds_of_the_table(request_type: Any) -> None:
    seen = 0
    for name, field in request_type.model_fields.items():
        kind = BOUNDS.get(RENAMED.get(name, name))
        given = {key: value for key in ("gt", "ge", "lt", "le") for value in _bounds(field, key)}
        if kind is None or not given:  # another field, such as the switch `logprobs` of a chat
            continue
        low = "gt" if getattr(kind, "open_low", False) else "ge"
        assert given == {low: kind.low, "le": kind.high, **OWN.get((request_type, name), {})}, name
        seen += 1
    assert seen > 2


def _bounds(field: Any, key: str) -> list[Any]:
    arguments = [each for each in typing.get_args(field.annotation) if each is not type(None)]
    marks = [*field.metadata, *(mark for each in arguments for mark in getattr(each, "__metadata__", ()))]
    marks = [inner for mark in marks for inner in getattr(mark, "metadata", [mark])]
    return [value for mark in marks if (value := getattr(mark, key, None)) is not None]


def test_fields_without_effect_exist() -> None:
    for path in ADVISORY_RESPONSES_FIELDS:
        name, _, below = path.partition(".")
        assert name in ResponsesRequest.wire_names()
        parse_responses_request({**HI, name: {below: None} if below else None})


def test_what_codex_sends() -> None:
    wire = parse_responses_request({
        "model": "m", "stream": True, "store": False, "tool_choice": "auto", "parallel_tool_calls": True,
        "reasoning": {"summary": "auto"}, "include": ["reasoning.encrypted_content"], "prompt_cache_key": "k",
        "client_metadata": {"session_id": "s"},
        "input": [{"type": "message", "id": "m", "role": "user", "content": [{"type": "input_text", "text": "a"}]}],
        "tools": [{"type": "web_search", "external_web_access": False}],
    })  # fmt: skip
    assert wire.wants_encrypted
    assert not wire.wants_logprobs
    assert wire.tools == [HostedTool(type="web_search")]


@pytest.mark.parametrize(
    ("change", "error", "param"),
    [
        ({"inputt": "x"}, UnknownParameterError, "inputt"),
        ({"messages": []}, UnsupportedParameterError, "messages"),
        ({"prompt": {"id": "p"}}, UnsupportedParameterError, "prompt"),
        ({"background": True, "store": False}, InvalidParameterError, "store"),
        ({"previous_response_id": "a", "conversation": "b"}, InvalidParameterError, "previous_response_id"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, UnsupportedParameterError,
         "stream_options.include_obfuscation"),
    ],
)  # fmt: skip
def test_refused(change: dict[str, Any], error: type[RequestError], param: str) -> None:
    with pytest.raises(error) as refusal:
        parse_responses_request({**HI, **change})
    assert refusal.value.param == param


@pytest.mark.parametrize("kind", ["image_url", "video", "input_video", "thinking", "encrypted_content"])
def test_a_part_of_another_api_is_refused_with_the_parts_here(kind: str) -> None:
    part = {"type": kind, kind: {"url": "data:image/png;base64,"}}
    with pytest.raises(UnsupportedParameterError, match=f"'{kind}' parts are not supported: send input_text or"):
        parse_responses_request({"input": [{"role": "user", "content": [part]}]})


def test_a_compaction_takes_as_many_items_as_a_request() -> None:
    asked = parse_body(CompactRequest, {"model": "m", "input": [{"role": "user", "content": "x"}] * MAX_ITEMS})
    assert len(summary_request(asked).input or ()) == MAX_ITEMS + 1


def test_fields_of_newer_clients_have_no_effect() -> None:
    given = {"completion_window": "soonest"}
    assert parse_responses_request({**HI, "background_options": given}).background_options == given


def test_calls_as_the_clients_model_dump_writes_them() -> None:
    call = ResponseFunctionToolCall(type="function_call", call_id="c1", name="f", arguments="{}")
    custom = ResponseCustomToolCall(type="custom_tool_call", call_id="c2", name="g", input="x", async_=True)
    given = [call.model_dump(), custom.model_dump()]
    assert [one["async_"] for one in given] == [None, True]
    assert [one.call_id for one in parse_responses_request({"input": given}).input] == ["c1", "c2"]  # type: ignore[union-attr]


def test_counting_takes_no_sampling_fields() -> None:
    with pytest.raises(UnsupportedParameterError, match="counting generates nothing"):
        parse_body(InputTokensRequest, {**HI, "temperature": 1.0})


def test_secrets_do_not_show() -> None:
    tool = {
        "type": "mcp",
        "server_label": "s",
        "server_url": "https://h/",
        "authorization": "hush",
        "headers": {"k": "hush"},
    }
    wire = parse_responses_request({**HI, "tools": [tool]})
    assert wire.tools
    assert isinstance(wire.tools[0], McpTool)
    assert "hush" not in repr(wire)


@pytest.mark.parametrize(
    ("schema", "field"),
    [({"type": "array"}, "type"), ({"properties": []}, "properties"), ({"required": 1}, "required")],
)
def test_the_schema_of_a_tools_arguments_is_one(schema: dict[str, Any], field: str) -> None:
    tool = {"type": "function", "name": "f", "parameters": schema}
    with pytest.raises(RequestError) as refusal:
        parse_responses_request({**HI, "tools": [tool]})
    assert refusal.value.param == f"tools.0.parameters.{field}"
