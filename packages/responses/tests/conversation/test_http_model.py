# SPDX-License-Identifier: MIT
"""A model behind a URL: what servers send, what they refuse, and what is never shown."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest

from candle_vllm.core.errors import (
    CandleVllmError,
    ConfigError,
    EngineOverloadedError,
    InvalidParameterError,
    PromptTooLongError,
    RequestError,
)
from candle_vllm.openai import UnsupportedParameterError, parse_chat_request
from candle_vllm.openai.requests import read_chat
from candle_vllm.openai.task import Message, Paths, Task, TextPart
from candle_vllm.responses import HttpModel, Responder
from candle_vllm.responses.conversation import http_model
from candle_vllm.responses.conversation.chat_form import chat_request
from candle_vllm.responses.conversation.events import ReasoningDelta, TextDelta
from candle_vllm.responses.conversation.http_model import (
    ModelServerBusyError,
    ModelServerError,
    ModelServerRequestError,
)
from packages.responses.tests.conversation.conversation_fakes import Bench, user
from tests.waiting import until

KEY = "sk-very-secret"


def sse(*events: Any, end: str = "\n\n", done: bool = True) -> bytes:
    texts = [event if isinstance(event, str) else "data: " + json.dumps(event) for event in events]
    return "".join(text + end for text in [*texts, *(["data: [DONE]"] if done else [])]).encode()


def delta(finish: str | None = None, **news: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": news, "finish_reason": finish}]}


def answering(content: bytes, status: int = 200, seen: list[httpx2.Request] | None = None, **options: Any) -> HttpModel:
    async def route(request: httpx2.Request) -> httpx2.Response:
        if seen is not None:
            seen.append(request)
        kind = "text/event-stream" if status == 200 else "application/json"
        return httpx2.Response(status, content=content, headers={"content-type": kind})

    options = {"api_key": KEY, "model": "m", **options}
    return HttpModel("http://server.test/v1/", transport=httpx2.MockTransport(route), **options)


async def said(model: HttpModel, **options: Any) -> tuple[Any, Bench]:
    bench = Bench(model=model, **options)
    try:
        return await bench.run("hi"), bench
    finally:
        await model.aclose()


async def test_the_request_that_is_sent() -> None:
    seen: list[httpx2.Request] = []

    def add(a: int) -> int:
        """Adds."""
        return a

    model = answering(sse(delta("stop", content="Hi")), seen=seen)
    result, _ = await said(model, tools=[add], request={"temperature": 0})
    assert result.final_message == "Hi"
    (request,) = seen
    body = json.loads(request.content)
    assert str(request.url) == "http://server.test/v1/chat/completions"
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert (body["model"], body["stream"], body["stream_options"]) == ("m", True, {"include_usage": True})
    assert (body["messages"], body["temperature"]) == ([user("hi")], 0)
    assert body["tools"][0]["function"]["name"] == "add"


async def test_without_tools_an_empty_list_is_sent_where_the_server_takes_one() -> None:
    seen: list[dict[str, Any]] = []

    async def route(request: httpx2.Request) -> httpx2.Response:
        seen.append(json.loads(request.content))
        if seen[-1].get("tools") == []:  # as OpenAI's API
            return httpx2.Response(400, json={"error": {"message": "[] is too short - 'tools'", "param": "tools"}})
        content = sse(delta("stop", content="Hi"))
        return httpx2.Response(200, content=content, headers={"content-type": "text/event-stream"})

    taken: list[httpx2.Request] = []
    await said(answering(sse(delta("stop", content="Hi")), seen=taken))
    assert json.loads(taken[0].content)["tools"] == []
    model = HttpModel("http://server.test/v1", model="m", transport=httpx2.MockTransport(route))
    for _ in range(2):
        async with model.stream({"messages": [user("hi")]}) as events:
            assert [event async for event in events]
    await model.aclose()
    assert ["tools" in body for body in seen] == [True, False, False]


FORMS = {
    "plain": sse(delta(role="assistant"), delta(content="Hel"), delta(content="lo"), delta("stop")),
    "crlf": sse(delta(content="Hello"), delta("stop"), end="\r\n\r\n"),
    "comments": sse(": keep-alive", delta(content="Hello"), ":", delta("stop")),
    "no space": sse("data:" + json.dumps(delta(content="Hello")), delta("stop")),
    "named events": sse("event: chunk\ndata: " + json.dumps(delta(content="Hello")), delta("stop")),
    "no done": sse(delta(content="Hello"), delta("stop"), done=False),
    "no reason": sse(delta(content="Hello")),
    "parts": sse(delta(content=[{"type": "text", "text": "Hello"}]), delta("stop")),
    "nulls": sse({"choices": None, "usage": None}, {}, delta(content="Hello", tool_calls=None), delta("stop")),
    "odd types": sse({"id": 3, "created": "x", "choices": [5, {"delta": 7}]}, delta(content="Hello")),
    "bom": b"\xef\xbb\xbf: x\n\n" + sse(delta(content="Hello"), delta("stop")),
}


@pytest.mark.parametrize("form", FORMS)
async def test_streams_of_all_kinds(form: str) -> None:
    result, _ = await said(answering(FORMS[form]))
    assert (result.final_message, result.completed) == ("Hello", True)


async def test_usage_where_it_is_given() -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
    result, _ = await said(answering(sse(delta("stop", content="x"), {"choices": [], "usage": usage})))
    assert (result.usage.prompt_tokens, result.usage.cached_tokens, result.usage.reasoning_tokens) == (5, 4, 0)
    usage = {"prompt_tokens": -1, "completion_tokens_details": {"reasoning_tokens": 3}, "prompt_tokens_details": None}
    result, _ = await said(answering(sse(delta("stop"), {"choices": [], "usage": usage})))
    assert (result.usage.prompt_tokens, result.usage.reasoning_tokens) == (0, 3)


async def test_a_refusal_is_text() -> None:
    chunks = [delta(content=None, refusal="I can"), delta(refusal="not."), delta("stop")]
    assert (await said(answering(sse(*chunks))))[0].final_message == "I cannot."


async def test_thoughts_under_either_name() -> None:
    stream = sse(delta(reasoning="a"), delta(reasoning_content="b"), delta("stop", content="c"))
    _, bench = await said(answering(stream))
    assert [one.text for one in bench.of(ReasoningDelta)] == ["a", "b"]
    assert bench.added[0]["reasoning_content"] == "ab"


async def test_logprobs_are_kept() -> None:
    entry = {"token": "x", "logprob": -0.1, "bytes": None, "top_logprobs": []}
    chunk = delta("stop", content="x")
    chunk["choices"][0]["logprobs"] = {"content": [entry]}
    _, bench = await said(answering(sse(chunk)))
    assert bench.of(TextDelta)[0].logprobs[0].logprob == -0.1


@pytest.mark.parametrize(
    "deltas",
    [
        [[{"index": 0, "id": "a", "function": {"name": "add", "arguments": '{"a": 1}'}},
          {"index": 1, "id": "b", "function": {"name": "add", "arguments": '{"a": 2}'}}]],
        [[{"function": {"name": "add", "arguments": {"a": 1}}}, {"function": {"name": "add", "arguments": {"a": 2}}}]],
        [[{"function": {"name": "add", "arguments": '{"a": 1}'}}], [{"function": {"name": "add", "arguments": ""}}],
         [{"function": {"arguments": '{"a": 2}'}}]],
        [[{"index": 0, "id": "a", "function": {"name": "add", "arguments": '{"a": 1}'}}],
         [{"index": 0, "id": "b", "function": {"name": "add", "arguments": '{"a": 2}'}}]],
        [[{"id": "a", "function": {"name": "add", "arguments": '{"a": '}}],
         [{"id": "a", "function": {"name": "add", "arguments": "1}"}}],
         [{"id": "b", "function": {"name": "add", "arguments": '{"a": 2}'}}]],
        [[{"id": "a", "function": {"name": "add"}}, {"id": "b", "function": {"name": "add"}}],
         [{"id": "a", "function": {"arguments": '{"a": 1}'}}, {"id": "b", "function": {"arguments": '{"a": 2}'}}]],
        [[{"id": "a", "function": {"name": "add", "arguments": '{"a": 1}'}},
          {"id": "a", "function": {"name": "plus", "arguments": '{"a": 2}'}}]],
        [[{"id": "a", "function": {"name": "add", "arguments": '{"a": 1}'}}],
         [{"id": "a", "function": {"name": "plus", "arguments": '{"a": '}}],
         [{"id": "a", "function": {"arguments": "2}"}}]],
    ],
    ids=["whole", "objects without index and id", "pieces without index and id", "all under index 0", "only ids",
         "only ids, by turns", "one id for two tools", "one id for two tools, in pieces"],
)  # fmt: skip
async def test_calls_of_all_kinds(deltas: list[Any]) -> None:
    def add(a: int) -> int:
        """Adds."""
        return a + 1

    def plus(a: int) -> int:
        """Adds."""
        return a + 1

    first = sse(*(delta(tool_calls=calls) for calls in deltas), delta("tool_calls"))
    answers = [first, sse(delta("stop", content="ok"))]

    async def route(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, content=answers.pop(0), headers={"content-type": "text/event-stream"})

    model = HttpModel("http://server.test/v1", model="m", transport=httpx2.MockTransport(route))
    result, _ = await said(model, tools=[add, plus])
    assert [one.text for one in result.tool_calls] == ["2", "3"]
    assert result.final_message == "ok"


def envelope(**fields: Any) -> bytes:
    return json.dumps({"error": fields}).encode()


@pytest.mark.parametrize(
    ("status", "body", "kind", "words"),
    [
        (400, envelope(message="bad", param="top_p", code="invalid_value"), ModelServerRequestError, "400: bad"),
        (422, b'{"detail": [{"msg": "no"}]}', ModelServerRequestError, '[{"msg": "no"}]'),
        (413, envelope(message="no", code="context_length_exceeded"), PromptTooLongError, "413: no"),
        (413, envelope(message="no", type="exceed_context_size_error"), PromptTooLongError, "413: no"),
        (413, b'{"message": "the maximum context length is 9"}', PromptTooLongError, "length is 9"),
        (
            413,
            envelope(message="20 tokens are longer than the model's context length", code=400),
            PromptTooLongError,
            "",
        ),
        (413, envelope(message="it exceeds the available context size"), PromptTooLongError, "context size"),
        (413, envelope(message="the prompt is longer than the maximum model length of 9"), PromptTooLongError, "of 9"),
        (401, envelope(message=f"wrong key {KEY}"), ModelServerError, "wrong key *** (check the API key: --api-key)"),
        (404, b"<html>nothing", ModelServerError, "check the model's name"),
        (429, envelope(message="slow down"), ModelServerBusyError, "slow down"),
        (503, b"", ModelServerBusyError, "503: no reason given"),
        (500, envelope(message="x" * 5000), ModelServerError, "x" * 500 + " ..."),
        (302, b"", ModelServerError, "302"),
    ],
)
async def test_refusals(
    status: int, body: bytes, kind: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_model, "_WAITS", ())
    with pytest.raises(kind) as caught:
        await said(answering(body, status))
    assert words in str(caught.value)
    assert KEY not in str(caught.value)
    assert "server.test" in str(caught.value)
    assert caught.value.status == status
    if status == 400:
        assert isinstance(caught.value, RequestError)
        assert (caught.value.param, caught.value.code) == ("top_p", "invalid_value")
    assert isinstance(caught.value, EngineOverloadedError) == (status in (429, 503))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that a model would wait; none of them pass."""
    found: list[float] = []

    async def wait(seconds: float) -> None:
        found.append(seconds)

    monkeypatch.setattr(http_model, "asyncio", SimpleNamespace(sleep=wait, timeout=asyncio.timeout))
    return found


def in_turn(answers: list[Any], seen: list[str]) -> HttpModel:
    """A server that gives these answers, one a request: status and headers, an exception, or a stream."""

    async def route(request: httpx2.Request) -> httpx2.Response:
        seen.append(request.url.path)
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, bytes):
            return httpx2.Response(200, content=answer, headers={"content-type": "text/event-stream"})
        return httpx2.Response(answer[0], headers=answer[1], content=envelope(message="busy"))

    return HttpModel("http://server.test/v1", model="m", transport=httpx2.MockTransport(route))


async def test_a_busy_server_is_asked_again(waits: list[float], caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str] = []
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    answers = [
        (429, {"retry-after": "30"}), (503, {}), (529, {"retry-after": date}), httpx2.ReadError("gone"),
        sse(delta("stop", content="Hi")),
    ]  # fmt: skip
    (answer, _) = await said(in_turn(answers, seen))
    assert answer.final_message == "Hi"
    assert waits[:2] == [30, 2]
    assert 90 < waits[2] <= 100
    assert waits[3:] == [8]
    assert len(seen) == 5
    assert "answered 429: busy: trying again in 30 s" in caplog.text


@pytest.mark.parametrize(
    ("answers", "asked"),
    [
        ([(503, {"retry-after": "nan"})] * 5, 5),
        ([(503, {"retry-after": "Mon, 01 Jan 99999999999 00:00:00 GMT"})] * 5, 5),
        ([(429, {"retry-after": "3600"})], 1),
        ([(400, {"retry-after": "1"})], 1),
        ([httpx2.ConnectError("refused")], 1),
        ([sse(delta(content="x"), {"error": {"message": "busy", "code": 429}})], 1),
    ],
)
async def test_a_server_is_not_asked_for_ever(answers: list[Any], asked: int, waits: list[float]) -> None:
    seen: list[str] = []
    with pytest.raises(CandleVllmError):
        await said(in_turn(list(answers), seen))
    assert len(seen) == asked
    assert len(waits) == asked - 1


@pytest.mark.parametrize("reason", ["STOP", "eos_token", "end_turn", ""])
async def test_other_words_for_an_end_are_no_cut(reason: str) -> None:
    answer, _ = await said(answering(sse(delta(reason, content="x"))))
    assert answer.stop_reason == "stop"
    cut, _ = await said(answering(sse(delta("length", content="x"))))
    assert cut.stop_reason == "length"


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        (sse(delta(content="x"), done=False), "closed the connection before its answer was complete"),
        (sse(delta(content="x"), "data: {"), "not a JSON object"),
        (sse("data: [1]"), "not a JSON object"),
        (sse(delta(content="x"), {"error": {"message": f"boom {KEY}", "code": 500}}), "answered 500: boom ***"),
        (sse("data: " + "[" * 100_000), "not a JSON object"),
        (sse(delta("", content="x"), done=False), "closed the connection before its answer was complete"),
        (sse(delta("error", content="x")), "ended its answer before it was complete (finish_reason 'error')"),
        (sse(delta("abort", content="x")), "ended its answer before it was complete (finish_reason 'abort')"),
        (sse(delta("content_filter")), "ended its answer before it was complete (finish_reason 'content_filter')"),
    ],
)
async def test_broken_streams(stream: bytes, words: str) -> None:
    with pytest.raises(ModelServerError) as caught:
        await said(answering(stream))
    assert words in str(caught.value)
    assert KEY not in str(caught.value)


async def test_an_event_that_is_nested_deeply() -> None:
    value = "[" * 700 + "]" * 700
    entry = f'{{"choices": [{{"delta": {{"content": "x"}}, "logprobs": {{"content": {value}}}}}]}}'
    with pytest.raises(ModelServerError, match="nested too deeply"):
        await said(answering(sse(f"data: {entry}")))


async def test_halves_of_surrogate_pairs_are_replaced() -> None:
    call = {"index": 0, "id": "\ud800", "function": {"name": "f\udc00", "arguments": '{"a": "\ud800"}'}}
    result, bench = await said(
        answering(sse(delta(content="x\ud83d"), delta("tool_calls", tool_calls=[call]))), max_turns=1
    )
    json.dumps(bench.added, ensure_ascii=False).encode()
    assert bench.added[0]["content"] == "x?"
    assert [one.status for one in result.tool_calls] == ["unknown"]


async def test_an_endless_event_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_model, "MAX_EVENT", 1000)
    with pytest.raises(ModelServerError, match="1000 byte limit"):
        await said(answering(b"data: " + b"x" * 5000))


async def test_an_answer_that_is_no_stream() -> None:
    async def route(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, json={"choices": []})

    model = HttpModel("http://server.test/v1", model="m", transport=httpx2.MockTransport(route))
    with pytest.raises(ModelServerError, match="text/event-stream"):
        await said(model)


class TestModelName:
    async def test_the_first_of_the_servers(self) -> None:
        seen: list[str] = []

        async def route(request: httpx2.Request) -> httpx2.Response:
            seen.append(request.url.path)
            if request.method == "GET":
                return httpx2.Response(200, json={"data": [{"id": "first"}, {"id": "second"}]})
            assert json.loads(request.content)["model"] == "first"
            events = sse(delta("stop", content="x"))
            return httpx2.Response(200, content=events, headers={"content-type": "text/event-stream"})

        model = HttpModel("http://server.test/v1", transport=httpx2.MockTransport(route))
        bench = Bench(model=model)
        await bench.run("a")
        await bench.run("b")
        await model.aclose()
        assert seen == ["/v1/models", "/v1/chat/completions", "/v1/chat/completions"]

    @pytest.mark.parametrize("body", [b"{}", b'{"data": []}', b"no", b'{"data": [{"id": 3}]}'])
    async def test_a_server_without_names(self, body: bytes) -> None:
        async def route(_: httpx2.Request) -> httpx2.Response:
            return httpx2.Response(200, content=body)

        model = HttpModel("http://server.test/v1", transport=httpx2.MockTransport(route))
        with pytest.raises(ModelServerError, match="give the model's name"):
            await said(model)


@pytest.mark.parametrize(
    "url",
    ["", "server/v1", "ftp://server/v1", "http:///v1", "http://a:b@server/v1", "http://s/v1?key=1", "http://s:port/v1"],
)
def test_urls_that_cannot_be(url: str) -> None:
    with pytest.raises(ConfigError):
        HttpModel(url)


@pytest.mark.parametrize("key", ["", "a b", "ü", "x\r\ny", "x" * 5000])
def test_keys_that_cannot_be(key: str) -> None:
    with pytest.raises(ConfigError, match="api_key must be"):
        HttpModel("http://s/v1", api_key=key)


def test_the_key_is_not_shown() -> None:
    assert KEY not in repr(HttpModel("http://s/v1", api_key=KEY))


async def test_a_request_that_is_no_json() -> None:
    with pytest.raises(InvalidParameterError, match="cannot be written as JSON"):
        await said(answering(sse()), request={"seed": object()})


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]


@asynccontextmanager
async def raw_server(handle: Handler) -> AsyncIterator[str]:
    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"


class TestConnections:
    async def test_leaving_early_closes_the_connection(self) -> None:
        closed = asyncio.Event()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(HEAD + sse(delta(content="x"), done=False))
            await writer.drain()
            while await reader.read(1000):  # the rest of the request, then the end
                pass
            closed.set()
            writer.close()

        async with raw_server(handle) as url:
            bench = Bench(model=HttpModel(url, model="m"))
            task = asyncio.create_task(bench.run("hi"))
            await until(lambda: bench.of(TextDelta))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            async with asyncio.timeout(60):
                await closed.wait()
            await bench.model.aclose()

    async def test_turns_share_a_connection(self) -> None:
        connections = 0

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal connections
            connections += 1
            while head := await reader.read(1 << 16):
                if b"}" not in head:
                    continue  # the body comes in a piece of its own
                body = sse(delta("stop", content="x"))
                chunked = HEAD.replace(b"\r\n\r\n", b"\r\ntransfer-encoding: chunked\r\n\r\n")
                writer.write(chunked + f"{len(body):x}\r\n".encode() + body + b"\r\n")
                await writer.drain()
                writer.write(b"0\r\n\r\n")
                await writer.drain()
            writer.close()

        async with raw_server(handle) as url:
            bench = Bench(model=HttpModel(url, model="m"))
            for _ in range(3):
                assert (await bench.run("hi")).completed
            assert connections == 1
            await bench.model.aclose()

    async def test_a_server_that_says_nothing_after_the_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(http_model, "_DRAIN_SECONDS", 0.02)

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(HEAD + sse(delta("stop", content="x")))
            await writer.drain()
            await reader.read()  # it never ends its answer by itself
            writer.close()

        async with raw_server(handle) as url:
            result, _ = await said(HttpModel(url, model="m"))
            assert result.final_message == "x"

    async def test_a_server_that_dies_in_the_middle(self) -> None:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            head = HEAD.replace(b"\r\n\r\n", b"\r\ntransfer-encoding: chunked\r\n\r\n")
            writer.write(head + b"5\r\ndata:\r\n")
            await writer.drain()
            writer.close()

        async with raw_server(handle) as url:
            with pytest.raises(ModelServerError, match="broke off"):
                await said(HttpModel(url, model="m"))

    async def test_a_server_that_is_silent(self) -> None:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        async with raw_server(handle) as url:
            with pytest.raises(ModelServerError, match="did not answer in time"):
                await said(HttpModel(url, model="m", read_timeout=0.1))

    @pytest.mark.parametrize("name", [None, "m"])
    async def test_a_model_that_is_closed(self, name: str | None) -> None:
        model = answering(sse(delta("stop")), model=name)
        await model.aclose()
        with pytest.raises(ModelServerError, match="closed by this program"):
            await said(model)

    async def test_a_server_that_is_not_there(self) -> None:
        async with raw_server(lambda *_: None) as url:
            pass
        with pytest.raises(CandleVllmError, match="cannot be reached"):
            await said(HttpModel(url, model="m"))


async def test_a_task_as_a_chat_request() -> None:
    """Who asks by tasks asks other servers, too; what a task leaves open is not sent."""
    seen: list[httpx2.Request] = []
    model = answering(sse(delta(content="Hello"), delta("stop")), seen=seen)
    function = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False}
    schema = {"type": "json_schema", "name": "a", "schema": {"type": "string"}}
    called = [
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "ok"},
    ]
    try:
        answering_items = Responder(model)
        made = await answering_items.create({
            "input": [{"role": "user", "content": "Hi"}, *called], "instructions": "Be brief.", "tools": [function],
            "max_output_tokens": 9, "top_logprobs": 1, "reasoning": {"effort": "none"}, "text": {"format": schema},
            "tool_choice": {"type": "function", "name": "f"}, "temperature": 0.5, "priority": 2,
        })  # fmt: skip
        await answering_items.create({"input": "Hi", "tools": [function], "parallel_tool_calls": False})
    finally:
        await model.aclose()
    assert made.status == "completed"
    full, plain = (json.loads(request.content) for request in seen)
    streamed = {"model": "m", "stream": True, "stream_options": {"include_usage": True}}
    shown = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "strict": False}}]
    assert full == {
        **streamed,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "ok"},
        ],
        "tools": shown,
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "max_completion_tokens": 9,
        "temperature": 0.5,
        "logprobs": True,
        "top_logprobs": 1,
        "reasoning_effort": "none",
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "string"}}},
        "priority": 2,
    }
    assert plain == {
        **streamed,
        "messages": [{"role": "user", "content": "Hi"}],
        "tools": shown,
        "parallel_tool_calls": False,
    }


def test_whatever_a_chat_request_asks_for_can_be_asked_of_another_server() -> None:
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hel"}]
    asked = {
        "messages": said, "n": 3, "documents": [{"text": "d"}], "chat_template": "{{ messages }}", "echo": True,
        "continue_final_message": True, "add_generation_prompt": False, "add_special_tokens": True,
        "include_reasoning": False, "request_id": "r", "chat_template_kwargs": {"a": 1}, "priority": 1,
        "max_completion_tokens": 9, "logprobs": True, "top_logprobs": 2, "logit_bias": {"5": 1.0}, "stop": ["x"],
        "structured_outputs": {"regex": "a+"}, "model": "m", "thinking_token_budget": 7,
        "reasoning_budget_message": "Stop.", "num_speculative_tokens": 4,
        "prediction": {"type": "content", "content": "aaa"}, "lora": [{"id": 1, "scale": 0.5}],
        "lora_path": "tone", "truncate_prompt_tokens": 9, "truncation_side": "right",
        "use_beam_search": True, "length_penalty": 0.5,
    }  # fmt: skip
    for fields in (asked, {"messages": said[:1]}):
        task = read_chat(parse_chat_request(fields))
        assert read_chat(parse_chat_request(json.dumps(chat_request(task)).encode())) == task
    left_out = set(Task.__struct_fields__) - {
        "paths",
        "prompts",
        "images",  # of a prompt: a chat's stand in its messages
        "suffix",
        "echo_prompts",
        "scored_only",
        "reserve",  # 0 for a conversation to embed
        "tell_ids",
        "tell_counts",
        "before",
    }
    given = read_chat(parse_chat_request(asked))
    plain = {name for name in left_out if getattr(given, name) == getattr(Task(paths=Paths({})), name)}
    assert plain == {"tools"}, "every field but the tools, which have a test of their own, is tried above"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompts": ("Once",)}, "prompt"),
        ({"tell_ids": True}, "return_token_ids"),
        ({"tell_counts": True}, "stream_options"),
        ({"echo": "another text"}, "echo"),
    ],
)
async def test_what_has_no_words_is_refused(fields: dict[str, Any], param: str) -> None:
    seen: list[httpx2.Request] = []
    model = answering(sse(delta("stop")), seen=seen)
    task = Task(paths=Paths({}), **{"messages": (Message(role="user", parts=(TextPart("Hi"),)),), **fields})
    with pytest.raises(UnsupportedParameterError, match=f"{param} is not supported with another server") as refusal:
        async with model.stream(task):
            pass
    assert (refusal.value.param, seen) == (param, [])
    await model.aclose()
