# SPDX-License-Identifier: MIT
"""The official client, unchanged, over a transport that does what a route would do; and what Claude Code sends."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import httpx2
import pytest

from candle_vllm.core.errors import EngineOverloadedError
from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.openai import OpenAIAdapter, to_json_bytes
from candle_vllm.openai.anthropic import (
    MessagesAdapter,
    parse_count_tokens_request,
    parse_messages_request,
    to_anthropic_error,
)

TOOL = {"name": "weather", "description": "d", "input_schema": {"type": "object", "properties": {"city": {}}}}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Köln"}}</tool_call>'


def event_bytes(event: Any) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (event.event_name.encode(), to_json_bytes(event))


async def sent(stream: Any) -> AsyncIterator[bytes]:
    try:
        async for event in stream:
            yield event_bytes(event)
    except Exception as error:
        yield event_bytes(to_anthropic_error(error).body)
    finally:
        await stream.aclose()


def client(engine: ScriptedEngine, **options: Any) -> anthropic.AsyncAnthropic:
    adapter = MessagesAdapter(
        OpenAIAdapter(engine, tool_parser="hermes", reasoning_parser="think", strict_model_names=True)
    )

    async def route(request: httpx2.Request) -> httpx2.Response:
        body = await request.aread()
        try:
            if request.url.path == "/v1/messages/count_tokens":
                count = await adapter.count_tokens(parse_count_tokens_request(body))
                return httpx2.Response(200, content=to_json_bytes(count), headers={"content-type": "application/json"})
            assert request.url.path == "/v1/messages"
            wire = parse_messages_request(body)
            if wire.stream:
                stream = await adapter.create_stream(wire)
                return httpx2.Response(200, content=sent(stream), headers={"content-type": "text/event-stream"})
            message = await adapter.create(wire)
            return httpx2.Response(200, content=to_json_bytes(message), headers={"content-type": "application/json"})
        except Exception as error:
            answer = to_anthropic_error(error)
            headers = {**answer.headers, "content-type": "application/json"}
            return httpx2.Response(answer.status, content=to_json_bytes(answer.body), headers=headers)

    transport = httpx2.AsyncClient(transport=httpx2.MockTransport(route))
    options = {"max_retries": 0, **options}
    return anthropic.AsyncAnthropic(api_key="x", base_url="http://test", http_client=transport, **options)


def said(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


async def test_a_message_and_its_continuation() -> None:
    engine = ScriptedEngine(lambda prompt: "Warm." if "22 C" in prompt else f"<think>Hm.</think>\nI look.{CALL}")
    async with client(engine) as made:
        fields: dict[str, Any] = {"model": "scripted", "max_tokens": 500, "tools": [TOOL]}
        first = await made.messages.create(messages=[said("Köln?")], **fields)
        assert [block.type for block in first.content] == ["thinking", "text", "tool_use"]
        assert first.stop_reason == "tool_use"
        call = first.content[-1]
        assert call.type == "tool_use"
        result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "22 C"}]}
        turns = [said("Köln?"), {"role": "assistant", "content": first.content}, said([result])]
        second = await made.messages.create(messages=turns, **fields)
        assert second.content[0].model_dump(exclude_none=True) == {"type": "text", "text": "Warm."}
        third = await made.messages.create(messages=[*turns, second.to_param(), said("Sure?")], **fields)
        assert third.usage.input_tokens > second.usage.input_tokens


@pytest.mark.parametrize("script", ["Hello!", f"<think>Hm.</think>\nI look.{CALL}", f"a{CALL}b{CALL}", CALL * 3])
async def test_a_stream_is_the_whole(script: str) -> None:
    async with client(ScriptedEngine(script)) as made:
        fields: dict[str, Any] = {"model": "default", "max_tokens": 500, "tools": [TOOL], "messages": [said("x")]}
        whole = await made.messages.create(**fields)
        async with made.messages.stream(**fields) as stream:
            texts = [text async for text in stream.text_stream]
            final = await stream.get_final_message()
        assert "".join(texts) == "".join(block.text for block in whole.content if block.type == "text")
        assert [shown(block) for block in final.content] == [shown(block) for block in whole.content]
        assert (final.stop_reason, final.usage) == (whole.stop_reason, whole.usage)
        async with made.beta.messages.stream(betas=["context-management-2025-06-27"], **fields) as beta:
            assert (await beta.get_final_message()).stop_reason == whole.stop_reason


def shown(block: Any) -> dict[str, Any]:
    return block.model_dump(exclude={"id", "parsed_output", "__json_buf"}, exclude_none=True)


async def test_structured_output_and_counting() -> None:
    async with client(ScriptedEngine('{"a": 1}')) as made:
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False}
        fields: dict[str, Any] = {"model": "default", "messages": [said("x")], "system": "s"}
        config: Any = {"format": {"type": "json_schema", "schema": schema}}
        message = await made.messages.create(max_tokens=50, output_config=config, **fields)
        assert message.content[0].type == "text"
        assert json.loads(message.content[0].text) == {"a": 1}
        count = await made.messages.count_tokens(**fields)
        assert count.input_tokens == message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0)


async def test_errors_are_the_clients_own_classes() -> None:
    fields: dict[str, Any] = {"model": "default", "max_tokens": 5, "messages": [said("x")]}
    async with client(ScriptedEngine("x")) as made:
        with pytest.raises(anthropic.BadRequestError, match=r"documents are read as plain text"):
            await made.messages.create(
                **{**fields, "messages": [said([{"type": "document", "source": {"type": "file"}}])]}
            )
        with pytest.raises(anthropic.NotFoundError) as missing:
            await made.messages.create(**{**fields, "model": "claude"})
        assert missing.value.type == "not_found_error"
    async with client(ScriptedEngine(submit_error=EngineOverloadedError("full"))) as made:
        with pytest.raises(anthropic.InternalServerError) as busy:
            await made.messages.create(**fields)
        assert (type(busy.value).__name__, busy.value.type) == ("OverloadedError", "overloaded_error")


async def test_overload_is_tried_again() -> None:
    engine = ScriptedEngine("x", submit_error=EngineOverloadedError("full"))
    async with client(engine, max_retries=1) as made:
        slept: list[dict[str, Any]] = []

        async def free_engine(**options: Any) -> None:
            engine.submit_error = None
            slept.append(options)

        made._sleep_for_retry = free_engine  # type: ignore[method-assign]
        message = await made.messages.create(model="default", max_tokens=5, messages=[said("x")])
        assert (len(slept), message.stop_reason) == (1, "end_turn")


async def test_an_error_in_mid_stream() -> None:
    async with client(ScriptedEngine("hello", fail_after=2, failure="broken")) as made:
        seen: list[str] = []

        async def read() -> None:
            fields: dict[str, Any] = {"model": "default", "max_tokens": 5, "messages": [said("x")]}
            async for event in await made.messages.create(stream=True, **fields):
                seen.append(event.type)

        with pytest.raises(anthropic.APIStatusError) as caught:
            await read()
        assert seen[0] == "message_start"
        assert caught.value.type == "api_error"


CLAUDE_CODE: dict[str, Any] = {
    "model": "default",
    "max_tokens": 32000,
    "stream": True,
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.328; cc_entrypoint=cli; cch=00000;"},
        {"type": "text", "text": "You are Claude Code.", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "Be concise.", "cache_control": {"type": "ephemeral", "ttl": "1h", "scope": "global"}},
    ],
    "tools": [
        {"name": "Bash", "description": "d", "input_schema": {"$schema": "x", "type": "object", "properties": {}}},
        {**TOOL, "defer_loading": True},
    ],
    "metadata": {"user_id": "user_1"},
    "thinking": {"type": "adaptive", "display": "summarized"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "output_config": {"effort": "high"},
    "messages": [
        said([{"type": "text", "text": "<system-reminder>x</system-reminder>"}, {"type": "text", "text": "ls"}]),
        {"role": "system", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "tool_use", "id": "toolu_1", "name": "Bash", "input": {"command": "ls"}},
            ],
        },
        said(
            [
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_1",
                    "content": "README.md",
                    "is_error": False,
                    "cache_control": {"type": "ephemeral"},
                }
            ]
        ),
        {"role": "system", "content": "b"},
    ],
}


async def test_what_claude_code_sends() -> None:
    engine = ScriptedEngine("There is README.md.", max_model_len=40_000)
    async with client(engine) as made:
        response = await made.post("/v1/messages?beta=true", cast_to=httpx2.Response, body=CLAUDE_CODE)
    lines = response.text.splitlines()
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    assert names[:3] == ["message_start", "ping", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    messages = engine.template_calls[-1].messages
    assert [message["role"] for message in messages] == ["system", "user", "system", "assistant", "tool", "system"]
    assert messages[0]["content"] == "You are Claude Code.\nBe concise."
    other = {**CLAUDE_CODE, "system": [{"type": "text", "text": "x-anthropic-billing-header: other"}]}
    again = {**CLAUDE_CODE, "system": [*other["system"], *CLAUDE_CODE["system"][1:]]}
    adapter = MessagesAdapter(OpenAIAdapter(engine))
    await adapter.create(again)
    assert engine.requests[-1].prompt_token_ids == engine.requests[0].prompt_token_ids


async def test_claude_code_with_a_small_context() -> None:
    engine = ScriptedEngine("x" * 3000, max_model_len=2000)
    message = await MessagesAdapter(OpenAIAdapter(engine)).create(CLAUDE_CODE)
    assert message.stop_reason == "model_context_window_exceeded"
