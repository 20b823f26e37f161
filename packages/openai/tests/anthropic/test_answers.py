# SPDX-License-Identifier: MIT
"""Whole messages and streams of events over a scripted engine, judged by the official client's types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from anthropic.types import Message as OfficialMessage
from anthropic.types import MessageTokensCount, RawMessageStreamEvent
from anthropic.types.beta import BetaMessage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from candle_vllm.core.errors import EngineDeadError, EngineOverloadedError, RequestError
from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.openai import GenerationFailedError, OpenAIAdapter, to_json_bytes
from candle_vllm.openai.anthropic import (
    ADVISORY_MESSAGES_FIELDS,
    REFUSED_COUNT_FIELDS,
    REFUSED_MESSAGES_FIELDS,
    MessagesAdapter,
    anthropic_error,
    parse_messages_request,
    to_anthropic_error,
)

EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "array"}}}
BODY: dict[str, Any] = {
    "model": "default",
    "max_tokens": 2000,
    "messages": [{"role": "user", "content": "hi"}],
    "tools": [{"name": "f", "input_schema": SCHEMA}],
}
CALL = '<tool_call>{"name": "f", "arguments": {"city": "Köln \\"x\\"", "days": [1, {"a": null}]}}</tool_call>'
TALK = f"<think>Hm, é.</think>\n\nLet me see.\n{CALL}\n{CALL}"


def made(script: Any, **options: Any) -> MessagesAdapter:
    engine = script if isinstance(script, ScriptedEngine) else ScriptedEngine(script, **options)
    return MessagesAdapter(OpenAIAdapter(engine, tool_parser="hermes", reasoning_parser="think"))


async def whole(script: Any, **fields: Any) -> dict[str, Any]:
    body = to_json_bytes(await made(script).create({**BODY, **fields}))
    OfficialMessage.model_validate_json(body, strict=True)
    BetaMessage.model_validate_json(body, strict=True)
    return json.loads(body)


async def events(script: Any, **fields: Any) -> list[dict[str, Any]]:
    stream = await made(script).create_stream({**BODY, "stream": True, **fields})
    found = []
    async for event in stream:
        body = to_json_bytes(event)
        data = json.loads(body)
        assert data["type"] == event.event_name
        if event.event_name != "ping":
            EVENT.validate_json(body, strict=True)
        found.append(data)
    return found


def added_up(stream: list[dict[str, Any]]) -> dict[str, Any]:
    """The message of a stream, and that the stream has the right order."""
    assert [event["type"] for event in stream[:2]] == ["message_start", "ping"]
    assert [event["type"] for event in stream[-2:]] == ["message_delta", "message_stop"]
    message, texts = stream[0]["message"], []
    assert message["content"] == []
    open_index = None
    for event in stream[2:-2]:
        kind = event["type"]
        if kind == "content_block_start":
            assert open_index is None
            open_index = event["index"]
            assert open_index == len(message["content"])
            message["content"].append(event["content_block"])
            texts.append("")
            continue
        assert event["index"] == open_index
        block = message["content"][open_index]
        if kind == "content_block_stop":
            open_index = None
            if block["type"] == "tool_use" and texts[-1]:
                block["input"] = json.loads(texts[-1])
            continue
        assert kind == "content_block_delta"
        delta = event["delta"]
        if delta["type"] == "input_json_delta":
            texts[-1] += delta["partial_json"]
        else:
            name = delta["type"].removesuffix("_delta")
            block[name] += delta[name]
    assert open_index is None
    return {**message, **stream[-2]["delta"], "usage": {**message["usage"], **stream[-2]["usage"]}}


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    content = [{name: value for name, value in block.items() if name != "id"} for block in message["content"]]
    usage = {name: value for name, value in message["usage"].items() if name != "output_tokens_details"}
    return {**message, "id": "", "content": content, "usage": usage}  # a piece is thoughts or not as a whole


async def test_a_plain_answer() -> None:
    message = await whole(ScriptedEngine("hello", num_cached_tokens=2), tools=None)
    prompt = (await made("x").count_tokens({"model": "default", "messages": BODY["messages"]})).input_tokens
    assert message["id"].startswith("msg_")
    assert len(message["id"]) == len("msg_") + 32
    assert {name: value for name, value in message.items() if name != "id"} == {
        "type": "message",
        "role": "assistant",
        "model": "scripted",
        "content": [{"type": "text", "text": "hello"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": prompt - 2,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 2,
            "output_tokens": 6,
            "output_tokens_details": {"thinking_tokens": 0},
        },
    }


async def test_thoughts_text_and_calls() -> None:
    message = await whole(TALK)
    kinds = [block["type"] for block in message["content"]]
    assert kinds == ["thinking", "text", "tool_use", "tool_use"]
    thought, text, call, _ = message["content"]
    assert thought["thinking"] == "Hm, é."
    assert thought["signature"]
    assert text["text"] == "Let me see."
    assert (call["name"], call["input"]) == ("f", {"city": 'Köln "x"', "days": [1, {"a": None}]})
    assert message["stop_reason"] == "tool_use"
    assert message["usage"]["output_tokens_details"]["thinking_tokens"] > 0


async def test_text_behind_a_call_opens_a_block() -> None:
    message = await whole([f"a{CALL}b{CALL}"])
    assert [block.get("text", block["type"]) for block in message["content"]] == ["a", "tool_use", "b", "tool_use"]


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize(
    ("text", "fields"),
    [
        (TALK, {}),
        (TALK, {"thinking": {"type": "adaptive", "display": "omitted"}}),
        (TALK, {"thinking": {"type": "disabled"}}),
        (f"a{CALL}b{CALL}c", {}),
        (f"a{CALL}b{CALL}c", {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}),
        ("  \n ", {}),
        ("", {}),
        ("one STOP two", {"stop_sequences": ["STOP"]}),
        ("Grüße 🙂 und mehr", {"max_tokens": 12}),
    ],
)
async def test_a_stream_adds_up_to_the_whole_however_it_is_cut(text: str, fields: dict[str, Any]) -> None:
    expected = without_ids(await whole([text], **fields))
    for size in (1, 2, 3, 5, 7, 11, 50):
        data = text.encode()
        pieces = [data[place : place + size] for place in range(0, len(data), size)]
        assert without_ids(await whole(pieces, **fields)) == expected
        assert without_ids(added_up(await events(pieces, **fields))) == expected
    for place in range(len(text)):
        stream = await events([text[:place], text[place:]], **fields)
        final = without_ids(added_up(stream))
        assert {**final, "usage": None} == {**expected, "usage": None}


_PART = st.one_of(
    st.just("<think>"),
    st.just("</think>"),
    st.just(CALL),
    st.just('<tool_call>{"name": "f", "arguments": '),
    st.just("</tool_call>"),
    st.text(st.characters(exclude_categories=("Cs",)), max_size=8),
    st.text('{}[]":, \\nu0dex\n', max_size=12),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(_PART, max_size=8), st.data())
async def test_any_text_streams_what_it_gives_whole(parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]
    limit = data.draw(st.integers(1, 300))
    message, stream = await whole([text], max_tokens=limit), await events(pieces, max_tokens=limit)
    for block in message["content"]:
        assert block["type"] == "tool_use" or block.get("text", block.get("thinking")).strip()
    if message["stop_reason"] == "tool_use":  # else the last call may be open
        assert without_ids(added_up(stream))["content"] == without_ids(message)["content"]
    assert stream[-2]["delta"]["stop_reason"] == message["stop_reason"]


async def test_display_omitted_and_disabled() -> None:
    omitted = await whole([TALK], thinking={"type": "adaptive", "display": "omitted"})
    assert omitted["content"][0]["thinking"] == ""
    assert omitted["content"][0]["signature"]
    disabled = await whole([TALK], thinking={"type": "disabled"})
    assert "thinking" not in {block["type"] for block in disabled["content"]}


@pytest.mark.parametrize(
    ("script", "fields", "expected"),
    [
        ("abc", {}, ("end_turn", None)),
        ("abcdef", {"max_tokens": 3}, ("max_tokens", None)),
        ("abc STOP def", {"stop_sequences": ["x", " STOP"]}, ("stop_sequence", " STOP")),
        (CALL, {}, ("tool_use", None)),
        (CALL, {"max_tokens": 60}, ("max_tokens", None)),
    ],
)
async def test_stop_reasons(script: str, fields: dict[str, Any], expected: tuple[str, str | None]) -> None:
    message = await whole(script, **fields)
    assert (message["stop_reason"], message["stop_sequence"]) == expected
    assert (await events(script, **fields))[-2]["delta"] == {"stop_reason": expected[0], "stop_sequence": expected[1]}


async def test_the_contexts_end() -> None:
    engine = ScriptedEngine("x" * 500, max_model_len=100)
    message = await whole(engine, max_tokens=1000, tools=None)
    assert message["stop_reason"] == "model_context_window_exceeded"
    usage = message["usage"]
    assert usage["input_tokens"] + usage["output_tokens"] == 100
    for default in (5, 500):  # the request's limit replaces the model's, also where the context is shorter
        engine = ScriptedEngine("x" * 500, max_model_len=100, default_sampling={"max_tokens": default})
        usage = (await whole(engine, max_tokens=1000, tools=None))["usage"]
        assert usage["input_tokens"] + usage["output_tokens"] == 100
    short = await whole(ScriptedEngine("x", max_model_len=100), max_tokens=1000)
    assert short["stop_reason"] == "end_turn"


async def test_a_cut_call_has_what_had_come() -> None:
    cut = CALL.index("[1, {")
    message = await whole([CALL], max_tokens=len(CALL[:cut].encode()))
    assert message["content"][0]["input"] == {"city": 'Köln "x"'}


async def test_broken_arguments_cannot_be_taken_for_whole_ones() -> None:
    script = ['<tool_call>{"name": "f", "arguments": {"city": "a", "days": [1 2]}}</tool_call>']
    message = await whole(script)
    assert message["content"][0]["input"] == {"city": "a", "INVALID_JSON": '{"city": "a", "days": [1 2]}'}
    assert added_up(await events(script))["content"][0]["input"] == message["content"][0]["input"]


async def test_counting_is_what_create_reports() -> None:
    fields = {name: value for name, value in BODY.items() if name != "max_tokens"}
    fields["system"] = "Be kind."
    engine = ScriptedEngine("hello", num_cached_tokens=5)
    adapter = made(engine)
    count = await adapter.count_tokens(fields)
    MessageTokensCount.model_validate_json(to_json_bytes(count), strict=True)
    assert not engine.requests
    usage = (await adapter.create({**fields, "max_tokens": 5})).usage
    assert count.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    long = {"model": "default", "messages": [{"role": "user", "content": "x" * 10_000}]}
    assert (await adapter.count_tokens(long)).input_tokens > 10_000


async def test_a_round_of_tools() -> None:
    def script(prompt: str) -> list[str]:
        return ["It is warm."] if "22 C" in prompt else [TALK]

    adapter = made(script)
    first = json.loads(to_json_bytes(await adapter.create(BODY)))
    calls = [block["id"] for block in first["content"] if block["type"] == "tool_use"]
    assert len(set(calls)) == 2
    results = [{"type": "tool_result", "tool_use_id": call, "content": "22 C"} for call in calls]
    turn = [{"role": "assistant", "content": first["content"]}, {"role": "user", "content": results}]
    answer = await adapter.create({**BODY, "messages": [*BODY["messages"], *turn]})
    assert [block.text for block in answer.content] == ["It is warm."]


async def test_a_stream_begins_before_its_first_token() -> None:
    """Clients' watchdogs count events: a long prompt must not look like a dead server."""
    stream = await made(ScriptedEngine("hello", fail_after=0, failure="x")).create_stream(BODY)
    start, ping = await anext(stream), await anext(stream)
    assert (start.event_name, ping.event_name) == ("message_start", "ping")
    counted = await made("x").count_tokens(without_limit(BODY))
    assert json.loads(to_json_bytes(start))["message"]["usage"]["input_tokens"] == counted.input_tokens
    with pytest.raises(GenerationFailedError):
        await anext(stream)


def without_limit(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name in ("model", "messages", "tools", "thinking")}


async def test_closing_aborts() -> None:
    engine = ScriptedEngine("hello")
    stream = await made(engine).create_stream(BODY)
    await stream.aclose()
    other = await made(engine).create_stream(BODY)
    assert (await anext(other)).event_name == "message_start"
    await other.aclose()
    assert len(engine.aborted) == 2
    assert [event async for event in other] == []


async def test_failures_in_mid_stream() -> None:
    engine = ScriptedEngine("hello", fail_after=2, failure="no token may be chosen: x", failure_kind="request")
    with pytest.raises(RequestError):
        await events(engine)
    with pytest.raises(GenerationFailedError) as caught:
        await events(ScriptedEngine("hello", fail_after=2, failure="/secret"))
    answer = to_anthropic_error(caught.value)
    assert answer.body.event_name == "error"
    assert json.loads(to_json_bytes(answer.body)) == {
        "type": "error",
        "error": {"type": "api_error", "message": "The engine failed on this request.", "param": None},
        "request_id": None,
    }


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (EngineOverloadedError("full"), 529, "overloaded_error"),
        (EngineDeadError("x"), 503, "api_error"),
        (OSError("/secret"), 500, "api_error"),
    ],
)
async def test_failures_of_the_engine(error: Exception, status: int, kind: str) -> None:
    with pytest.raises(type(error)) as caught:
        await whole(ScriptedEngine(submit_error=error))
    answer = to_anthropic_error(caught.value, request_id="req_1")
    assert (answer.status, answer.body.error.type, answer.body.request_id) == (status, kind, "req_1")
    assert "secret" not in answer.body.error.message
    assert ("retry-after" in answer.headers) == (status in (503, 529))


async def test_an_empty_answer_alone_is_no_conversation() -> None:
    with pytest.raises(RequestError, match="messages must not be empty"):
        await made("x").create({**BODY, "messages": [{"role": "assistant", "content": ""}]})


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (504, "timeout_error"),
        (529, "overloaded_error"),
    ],
)
def test_what_a_server_refuses_itself(status: int, kind: str) -> None:
    answer = anthropic_error(status, "no", headers={"a": "b"}, request_id="r")
    final = {"x-should-retry": "false"} if status in (401, 403) else {}
    assert (answer.status, answer.headers) == (status, {"a": "b", **final})
    assert json.loads(to_json_bytes(answer.body)) == {
        "type": "error",
        "error": {"type": kind, "message": "no", "param": None},
        "request_id": "r",
    }


def test_a_thread_is_refused_so_that_clients_go_on_without_one() -> None:
    with pytest.raises(RequestError) as caught:
        parse_messages_request({**BODY, "thread": {"type": "create"}})
    error = json.loads(to_json_bytes(to_anthropic_error(caught.value).body))["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", "thread")
    assert error["details"] == {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}


def test_the_readme_lists_what_has_no_effect_and_what_is_refused() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    section = readme[readme.index("## Anthropic's Messages") :]
    for name, reason in ADVISORY_MESSAGES_FIELDS.items():
        assert f"| `{name}` | {reason} |" in section
    for name, refusal in {**REFUSED_COUNT_FIELDS, **REFUSED_MESSAGES_FIELDS}.items():
        assert f"| `{name}` | {refusal.reason} |" in section
