# SPDX-License-Identifier: MIT
"""The application over real connections: answers, streams, errors in the OpenAI envelope, limits, disconnects."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import httpx
import msgspec
import openai
import pytest

from candle_vllm.core.errors import ConfigError, EngineOverloadedError
from candle_vllm.core.shown import LogFormatter
from candle_vllm.server import Settings, create_app
from candle_vllm.server.http import body as body_module
from candle_vllm.server.http import protocol
from candle_vllm.server.http.routing import NOBODY
from candle_vllm.server.mailbox.options import MailboxOptions
from candle_vllm.server.mailbox.service import Mailbox
from candle_vllm.server.serve import bind, make_server
from packages.server.tests.running_server import Running
from packages.server.tests.server_fakes import PacedEngine
from tests.waiting import PATIENCE, wait_for

MESSAGES = [{"role": "user", "content": "Hi"}]
CHAT = {"model": "scripted", "messages": MESSAGES}
ENDLESS = {**CHAT, "max_tokens": 1_000_000, "ignore_eos": True}
ENDLESS_TEXT = {"prompt": "Hi", "max_tokens": 1_000_000, "ignore_eos": True, "stream": True}
PIECES = ["Hel", "lo ", "wörld", "!"]


def _events(text: str) -> list[str]:
    return [part.removeprefix("data: ") for part in text.split("\n\n") if part]


def test_chat_whole_and_streamed_say_the_same(start) -> None:
    client = start(PacedEngine(PIECES)).openai()
    whole = client.chat.completions.create(model="scripted", messages=MESSAGES)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == ("Hello wörld!", "stop")
    chunks = list(
        client.chat.completions.create(
            model="scripted", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "Hello wörld!"
    assert chunks[-1].usage == whole.usage.model_copy(
        update={
            name: getattr(chunks[-1].usage, name)
            for name in ("prompt_time_costs", "completion_time_costs")
            if hasattr(chunks[-1].usage, name)
        }
    )


def test_completions_whole_and_streamed_say_the_same(start) -> None:
    client = start(PacedEngine(PIECES)).openai()
    whole = client.completions.create(model="scripted", prompt="Hi", max_tokens=50)
    chunks = client.completions.create(model="scripted", prompt="Hi", max_tokens=50, stream=True)
    assert whole.choices[0].text == "".join(chunk.choices[0].text for chunk in chunks) == "Hello wörld!"


@pytest.mark.parametrize(
    ("path", "asked"), [("chat/completions", {"messages": MESSAGES}), ("completions", {"prompt": "Hi"})]
)
def test_streams_end_with_their_counts_where_the_operator_says_so(start, path: str, asked: dict[str, Any]) -> None:
    def counted(client: httpx.Client, **more: object) -> list[bool]:
        """Which chunks of a stream have counts."""
        text = client.post(f"/v1/{path}", json={"model": "scripted", **asked, "stream": True, **more}).text
        return [bool(json.loads(event).get("usage")) for event in _events(text)[:-1]]

    with start(PacedEngine(PIECES), enable_force_include_usage=True).http() as client:
        plain = counted(client)
        assert plain == [*[False] * (len(plain) - 1), True]
        for options in ({}, {"include_usage": False}, None):
            assert counted(client, stream_options=options)[-1]
        assert all(counted(client, stream_options={"include_usage": True, "continuous_usage_stats": True}))
        whole = client.post(f"/v1/{path}", json={"model": "scripted", **asked})
        assert whole.json()["usage"]["completion_tokens"]
    with start(PacedEngine(PIECES)).http() as client:
        assert not any(counted(client))


def test_tokens_are_named_by_their_ids_where_the_operator_says_so(start) -> None:
    def names(client: httpx.Client, **more: object) -> list[str]:
        asked = {"model": "scripted", "prompt": "x", "logprobs": 1, "max_tokens": 2, **more}
        return client.post("/v1/completions", json=asked).json()["choices"][0]["logprobs"]["tokens"]

    with start(PacedEngine(PIECES), return_tokens_as_token_ids=True).http() as client:
        assert all(name.startswith("token_id:") for name in names(client))
        plain = names(client, return_tokens_as_token_ids=False)
    with start(PacedEngine(PIECES)).http() as client:
        assert names(client) == plain
    assert not any(name.startswith("token_id:") for name in plain)


def test_a_stream_on_the_wire(start) -> None:
    with start(PacedEngine(PIECES)).http() as client:
        response = client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = _events(response.text)
    assert events[-1] == "[DONE]"
    assert {json.loads(event)["object"] for event in events[:-1]} == {"chat.completion.chunk"}


def test_models(start) -> None:
    running = start(served_model_name=("org/name", "second"))
    client = running.openai()
    assert [model.id for model in client.models.list()] == ["org/name", "second"]
    assert client.models.retrieve("org/name").id == "org/name"
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("third")
    assert missing.value.code == "model_not_found"
    with running.http() as plain:  # there is but one that can be meant
        answer = plain.post("/v1/chat/completions", json={"model": "third", "messages": MESSAGES})
        assert answer.json()["model"] == "org/name"
        assert answer.headers["x-warning"] == "the model 'third' is not served here: 'org/name' answers instead"
        shown = {name: plain.post("/api/show", json={"model": name}) for name in ("third", "third:latest", "org/name")}
        assert [each.status_code for each in shown.values()] == [404, 404, 200]
        assert "x-warning" not in shown["org/name"].headers
    assert client.chat.completions.create(model="", messages=MESSAGES).model == "org/name"  # as candle-vllm's chat.py
    strict = start(served_model_name=("org/name",), strict_model_names=True).openai()
    with pytest.raises(openai.NotFoundError):
        strict.chat.completions.create(model="third", messages=MESSAGES)


def test_fields_that_nobody_knows_are_refused_or_warned_of(start) -> None:
    body = {"messages": MESSAGES, "made_up": 1, "samplers": ["top_k"]}
    with start().http() as client:
        refused = client.post("/v1/chat/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "made_up")
    with start(unknown_fields="warn").http() as client:
        answer = client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200
        assert answer.headers.get_list("x-warning") == [
            "the field 'made_up' is unknown and has no effect",
            "the field 'samplers' has no effect: samplers have a fixed order",
        ]


def test_root_and_version(start) -> None:
    with start().http() as client:
        assert client.get("/").json()["models"] == ["scripted"]
        assert set(client.get("/version").json()) == {"version"}


def test_health_follows_the_engine(start) -> None:
    running = start()
    with running.http() as client:
        assert [client.get(path).status_code for path in ("/health", "/v1/health", "/ping")] == [200] * 3
        running.engine.alive = False
        assert [client.get(path).status_code for path in ("/health", "/v1/health", "/ping")] == [503] * 3


def test_default_sampling_of_the_server_applies_where_the_request_says_nothing(start) -> None:
    running = start(PacedEngine("x", default_sampling={"temperature": 0.9, "min_p": 0.3}), temperature=0.5, top_k=7)
    client = running.openai()
    client.chat.completions.create(model="scripted", messages=MESSAGES)
    client.chat.completions.create(model="scripted", messages=MESSAGES, temperature=0.1)
    silent, spoken = (request.params for request in running.engine.requests)
    assert (silent.temperature, silent.top_k, silent.min_p) == (0.5, 7, 0.3)
    assert (spoken.temperature, spoken.top_k) == (0.1, 7)
    beams: dict[str, Any] = {"use_beam_search": True}  # which draw nothing
    assert client.chat.completions.create(model="scripted", messages=MESSAGES, max_tokens=1, extra_body=beams).choices
    assert client.completions.create(model="scripted", prompt="x", max_tokens=1, extra_body=beams).choices


BAD_BODIES: list[tuple[bytes, dict[str, str], int, str | None]] = [
    (b"{", {}, 400, "invalid_body"),
    (b"[]", {}, 400, "invalid_body"),
    (b"", {}, 400, "invalid_body"),
    (b'{"model": "\xff"}', {}, 400, "invalid_body"),
    (b'{"messages": [], "temprature": 1}', {}, 400, None),
    (b"{}", {"content-type": "text/plain"}, 415, "unsupported_media_type"),
    (b"x" * ((1 << 20) + 1), {}, 413, "request_too_large"),
]


def test_bad_bodies(start) -> None:
    with start(max_body_mb=1).http(headers={"content-type": "application/json"}) as client:
        for (content, headers, status, code), kind in itertools.product(
            BAD_BODIES, ("chat/completions", "completions")
        ):
            response = client.post(f"/v1/{kind}", content=content, headers=headers)
            error = response.json()["error"]
            assert response.status_code == status, content[:50]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["type"] == "invalid_request_error"
            assert code is None or error["code"] == code, content[:50]


def test_a_missing_content_type_is_refused(start) -> None:
    with start().http() as client:
        assert client.post("/v1/completions", content=b"{}").status_code == 415


def test_a_big_body_is_parsed(start) -> None:
    running = start(PacedEngine("ok", max_model_len=1 << 20))
    with running.http() as client:
        response = client.post("/v1/completions", json={"prompt": "x" * 200_000, "max_tokens": 2})
    assert response.status_code == 200
    assert len(running.engine.requests[0].prompt_token_ids) > 200_000


def test_a_chunked_body_is_cut_off_at_the_limit(start) -> None:
    """The server answers after a little more than the limit, though the client would go on for ever."""
    running = start(max_body_mb=1)
    with socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        piece = b"10000\r\n" + b" " * 65536 + b"\r\n"
        connection.sendall(piece * 16)
        connection.settimeout(0.05)
        with pytest.raises(TimeoutError):
            connection.recv(4096)
        connection.settimeout(PATIENCE)
        connection.sendall(piece)
        answer = connection.recv(4096)
    assert b" 413 " in answer.split(b"\r\n")[0]


def test_an_endless_head_is_cut_off(start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 3600.0)  # not by time
    running = start()
    with socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        with contextlib.suppress(ConnectionError):
            for number in range(2000):
                connection.sendall(b"X-%d: " % number + b"a" * 1000 + b"\r\n")
            while connection.recv(65536):  # and then the connection is closed
                pass
    with running.http() as client:
        assert client.get("/health").status_code == 200


def test_a_long_body_on_a_kept_connection_is_no_head(start) -> None:
    running = start(PacedEngine("ok", max_model_len=1 << 21))
    with running.http() as client:
        for _ in range(3):
            response = client.post("/v1/completions", json={"prompt": "x" * 300_000, "max_tokens": 2})
            assert response.status_code == 200


def _until_closed(running: Running, earlier: bytes, data: bytes, *, apart: bool = False, seconds: float) -> bytes:
    """What the server answers to an earlier request and data behind it, before it closes the connection in time."""
    answer = b""
    with (
        socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE) as connection,
        contextlib.suppress(ConnectionError),
    ):
        connection.sendall(earlier if apart else earlier + data)
        while earlier and b'"}' not in answer:
            answer += connection.recv(65536)
        if apart:
            connection.sendall(data)
        connection.settimeout(0.05)
        while True:
            try:
                if not (data := connection.recv(65536)):
                    break
                answer += data
            except TimeoutError:  # the server may not have read it yet
                if seconds:
                    running.skip(seconds)
    return answer


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"


@pytest.mark.usefixtures("movable_clock")
@pytest.mark.parametrize("data", [b"", b"\r\n", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: x\r\n"])
@pytest.mark.parametrize("earlier", [b"", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_a_head_that_does_not_end_ends_the_connection(start, data: bytes, earlier: bytes) -> None:
    running = start()
    running.server.config.timeout_keep_alive = 30  # where nothing follows the earlier request
    for apart in (True, False):
        answer = _until_closed(running, earlier, data, apart=apart, seconds=protocol.HEAD_SECONDS)
        assert answer.count(b"HTTP/1.1 200") == (1 if earlier else 0)


@pytest.mark.usefixtures("movable_clock")
def test_the_deadline_of_heads_cuts_no_stream_and_no_body(start) -> None:
    running = start(PacedEngine(["a"] * 20, pause=0.03))
    with running.http() as client:
        for _ in range(2):
            with client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as response:
                chunks = response.iter_text()
                first = next(chunks)
                running.skip(protocol.HEAD_SECONDS)
                assert (first + "".join(chunks)).endswith("[DONE]\n\n")
    body = json.dumps({"prompt": "x", "max_tokens": 1}).encode().ljust(100)
    with socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE) as connection:
        connection.sendall(HEAD.replace(b"Host: x", b"Host: x\r\nExpect: 100-continue"))
        assert connection.recv(100).startswith(b"HTTP/1.1 100")  # the body is waited for
        connection.sendall(body[:50])
        running.skip(protocol.HEAD_SECONDS)
        connection.sendall(body[50:])
        assert connection.recv(100).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("limit", ["SILENCE_SECONDS", "READING_SECONDS"])
def test_a_body_that_does_not_come_is_a_408(start, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(body_module, limit, 0.2)
    head, _, body = _until_closed(start(), b"", HEAD + b'{"prompt"', seconds=0).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408")
    assert json.loads(body)["error"]["code"] == "request_timeout"


def test_connections_are_counted(start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new one takes the place of one that says nothing, else of an idle one; those at work keep theirs."""
    monkeypatch.setattr(protocol, "MAX_CONNECTIONS", 2)
    running = start(PacedEngine("abc", pause=0.01, max_model_len=1 << 21))
    with running.http() as client, client.stream("POST", "/v1/chat/completions", json={**ENDLESS, "stream": True}) as r:
        chunks = r.iter_bytes()
        next(chunks)
        with socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE) as silent, running.http() as other:
            running.wait_for(lambda: len(running.server.server_state.connections) == 2)
            assert other.get("/health").status_code == 200
            assert silent.recv(1) == b""
            with running.http() as third, third.stream("POST", "/v1/completions", json={**ENDLESS_TEXT}) as answer:
                assert answer.status_code == 200  # in the place of `other`, which is idle
                with running.http() as fourth, pytest.raises(httpx.TransportError):
                    fourth.get("/health")
                next(chunks)
                next(answer.iter_bytes())


def test_who_begins_a_second_head_holds_no_place(start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that has had an answer and sends one byte of its next head gives its place as a silent one does."""
    monkeypatch.setattr(protocol, "MAX_CONNECTIONS", 4)
    running = start()
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            one = stack.enter_context(socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE))
            one.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert one.recv(1 << 16).startswith(b"HTTP/1.1 200")
            one.sendall(b"G")
        time.sleep(0.1)  # for the bytes to arrive
        for _ in range(3):
            with running.http() as client:
                assert client.get("/health").status_code == 200


def test_strangers_who_say_nothing_hold_no_place(start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some heads are not whole within a second, while more than half of the connections are taken."""
    monkeypatch.setattr(protocol, "MAX_CONNECTIONS", 8)
    monkeypatch.setattr(protocol, "CROWDED_SECONDS", 0.0)
    running = start()
    with contextlib.ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE))
            for _ in range(12)
        ]
        for connection in silent:
            with contextlib.suppress(ConnectionError):
                connection.sendall(b"GET /health HTTP/1.1\r\nX: ")
        with running.http() as client:
            assert client.get("/health").status_code == 200
        running.wait_for(lambda: len(running.server.server_state.connections) <= 5)
        for connection in silent[:7]:
            with contextlib.suppress(ConnectionError):
                assert connection.recv(1) == b""


def test_priority_needs_a_flag(start) -> None:
    body = {**CHAT, "priority": -5}
    with start().http() as client:
        answer = client.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "priority")
    assert "--enable-request-priority" in answer.json()["error"]["message"]
    running = start(enable_request_priority=True)
    with running.http() as client:
        assert client.post("/v1/chat/completions", json=body).status_code == 200
    assert running.engine.requests[0].priority == -5


def test_a_request_that_leaves_no_token_is_its_own_fault(start) -> None:
    text = "no token may be chosen: bad_words forbids them all"
    running = start(PacedEngine(fail_after=0, failure=text, failure_kind="request"))
    with running.http() as client:
        whole = client.post("/v1/chat/completions", json=CHAT)
        events = _events(client.post("/v1/chat/completions", json={**CHAT, "stream": True}).text)
    assert (whole.status_code, whole.json()["error"]["code"]) == (400, "invalid_request")
    assert json.loads(events[-1])["error"] == whole.json()["error"]


def test_wrong_routes_and_methods(start) -> None:
    cases = [
        ("GET", "/v1/nothing", 404, "not_found"),
        ("GET", "/v1/models/", 404, "model_not_found"),
        ("POST", "/health/", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
    ]
    with start().http() as client:
        for method, path, status, code in cases:
            response = client.request(method, path)
            assert (response.status_code, response.json()["error"]["code"]) == (status, code), path
            assert status != 405 or response.headers["allow"]


def test_unknown_query_parameters_are_ignored(start) -> None:
    with start().http() as client:
        assert client.get("/v1/models?api-version=1").status_code == 200


def test_overload_says_when_to_come_back(start) -> None:
    running = start(PacedEngine(submit_error=EngineOverloadedError("the queue is full")))
    with running.http() as client:
        response = client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert response.json()["error"]["code"] == "overloaded"


def test_bodies_whose_requests_wait_for_their_turn_are_bounded(start) -> None:
    engine = PacedEngine(PIECES, pause=0.05, max_model_len=1 << 24)
    engine._info = msgspec.structs.replace(engine.model_info, max_num_seqs=1)  # one more waits in the engine
    running = start(engine, max_held_mb=16)
    held, size = running.server.config.app.state.held, 7 << 20
    body = {**CHAT, "messages": [{"role": "user", "content": "x" * size}]}
    with running.http() as client, contextlib.ExitStack() as streams:
        for _ in range(2):
            stream = client.stream("POST", "/v1/chat/completions", json={**ENDLESS, "stream": True})
            assert streams.enter_context(stream).status_code == 200
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(client.post, "/v1/chat/completions", json=body) for _ in range(2)]
            running.wait_for(lambda: sum(held._by_key.values()) > 2 * (size - body_module.BIG_BODY))
            refused = client.post("/v1/chat/completions", json=body)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert "--max-held-mb" in refused.json()["error"]["message"]
            streams.close()
            assert [each.result().status_code for each in waiting] == [200, 200]
    running.wait_for(lambda: not held._by_key)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", {"prompt": "Hi"}),
        ("/v1/responses", {"input": "Hi"}),
        ("/v1/responses", {"input": "Hi", "background": True}),
    ],
)
def test_a_request_arrives_when_its_body_has_been_read(start, path: str, body: dict[str, Any]) -> None:
    """The engine gets this time, however long the request waited for its turn."""
    engine = PacedEngine(PIECES, pause=0.05, max_model_len=1 << 24)
    engine._info = msgspec.structs.replace(engine.model_info, max_num_seqs=1)  # one more waits in the engine
    running = start(engine)
    with running.http() as client, ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as streams:
        for _ in range(2):
            stream = client.stream("POST", "/v1/chat/completions", json={**ENDLESS, "stream": True})
            assert streams.enter_context(stream).status_code == 200
        began = time.monotonic()
        asked = pool.submit(client.post, path, json=body)
        running.wait_for(lambda: client.get("/v1/queues").json()["data"])
        (queued,) = client.get("/v1/queues").json()["data"]
        waits = time.monotonic()
        streams.close()
        assert asked.result().status_code == 200
        running.wait_for(lambda: len(engine.requests) == 3)
    arrival = engine.requests[2].arrival_time
    assert began < arrival < waits
    assert queued["queued_at"] - time.time() == pytest.approx(arrival - time.monotonic(), abs=1)


class SlowTokens(PacedEngine):
    """Does not tokenize a long text before it may."""

    def __init__(self, **options: Any) -> None:
        super().__init__(PIECES, max_model_len=1 << 24, **options)
        self.may_go = threading.Event()
        self.begun = 0

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if len(text) > 1 << 18:
            self.begun += 1
            assert self.may_go.wait(PATIENCE)
        return super().tokenize(text, add_special_tokens)


LONG = "x" * 1_000_000


@pytest.mark.one_of_each(5)
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": LONG}),
        ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": LONG}]}),
        ("/v1/completions", {"prompt": LONG, "max_tokens": 1}),
        ("/v1/embeddings", {"input": LONG}),
        ("/v1/messages/count_tokens", {"model": "x", "messages": [{"role": "user", "content": LONG}]}),
        ("/v1/responses", {"input": LONG, "max_output_tokens": 16}),
        ("/v1/responses", {"input": LONG, "max_output_tokens": 16, "background": True}),
    ],
)
def test_bodies_count_until_their_prompts_are_made(start, path: str, body: Any) -> None:
    engine = SlowTokens()
    running = start(engine, max_held_mb=16)
    held = running.server.config.app.state.held
    with running.http() as client, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.post, path, json=body)
        running.wait_for(lambda: engine.begun)
        try:
            assert sum(held._by_key.values()) > len(LONG) - body_module.BIG_BODY
        finally:
            engine.may_go.set()
        assert asked.result().status_code == 200
    running.wait_for(lambda: not held._by_key)


def test_a_body_does_not_count_while_it_is_answered(start) -> None:
    running = start(PacedEngine(PIECES, pause=0.05, max_model_len=1 << 24))
    held = running.server.config.app.state.held
    body = {**ENDLESS, "messages": [{"role": "user", "content": LONG}]}
    with running.http() as client, client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as got:
        assert got.status_code == 200
        assert not held._by_key


@pytest.mark.parametrize("given", ["previous_response_id", "conversation", "reference"])
def test_what_a_request_continues_counts_as_its_body_does(start, given: str) -> None:
    engine = SlowTokens()
    engine.may_go.set()
    running = start(engine, max_held_mb=16)
    held = running.server.config.app.state.held
    with running.http() as client, ThreadPoolExecutor(1) as pool:
        name = client.post("/v1/conversations", json={}).json()["id"]
        kept = client.post("/v1/responses", json={"input": LONG, "max_output_tokens": 16, "conversation": name}).json()
        items = client.get(f"/v1/responses/{kept['id']}/input_items").json()["data"]
        body = {
            "previous_response_id": {"input": "x", "previous_response_id": kept["id"]},
            "conversation": {"input": "x", "conversation": name},
            "reference": {"input": [{"type": "item_reference", "id": items[0]["id"]}]},
        }[given]
        running.wait_for(lambda: not held._by_key)
        engine.may_go.clear()
        engine.begun = 0
        asked = pool.submit(client.post, "/v1/responses/input_tokens", json=body)
        running.wait_for(lambda: engine.begun)
        try:
            assert sum(held._by_key.values()) > len(LONG) - body_module.BIG_BODY
            held.add(NOBODY, rest := (16 << 20) - sum(held._by_key.values()))
            refused = client.post("/v1/responses/input_tokens", json=body)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            held.add(NOBODY, -rest)
        finally:
            engine.may_go.set()
        assert asked.result().status_code == 200
    running.wait_for(lambda: not held._by_key)


@pytest.mark.parametrize("failure", [RuntimeError("secret path /root"), "secret path /root"])
def test_a_failure_in_mid_stream_is_an_event(start, failure: Exception | str) -> None:
    running = start(PacedEngine(PIECES, fail_after=2, failure=failure))
    with running.http() as client:
        events = _events(client.post("/v1/chat/completions", json={**CHAT, "stream": True}).text)
        whole = client.post("/v1/chat/completions", json=CHAT)
    assert json.loads(events[-1])["error"]["type"] == "server_error"
    assert "[DONE]" not in events
    assert whole.status_code == 500
    assert "secret" not in events[-1] + whole.text
    with pytest.raises(openai.APIError):
        list(running.openai().chat.completions.create(model="scripted", messages=MESSAGES, stream=True))


@pytest.mark.parametrize("pause", [0.0, 0.01])
def test_leaving_a_stream_aborts_it(start, pause: float) -> None:
    running = start(PacedEngine("abc", pause=pause, max_model_len=1 << 21))
    with running.http() as client, client.stream("POST", "/v1/chat/completions", json={**ENDLESS, "stream": True}) as r:
        chunks = r.iter_bytes()
        next(chunks)
        assert not running.engine.aborted
    running.wait_for(lambda: running.engine.aborted)
    assert running.engine.stats().num_running == 0


def test_a_slow_reader_stops_its_own_stream(start) -> None:
    """A client that stops reading fills the sockets and 1 MB here; then no more pieces are taken for it."""
    running = start(PacedEngine("abc" * 50, max_model_len=1 << 24))
    body = {**ENDLESS, "max_tokens": 10_000_000, "stream": True}
    with running.http() as client, client.stream("POST", "/v1/chat/completions", json=body) as r:
        chunks = r.iter_bytes()
        next(chunks)
        counts = [0]

        def stands_still() -> bool:
            time.sleep(0.2)
            counts.append(running.engine.stats().generation_tokens)
            return 0 < counts[-1] == counts[-2]

        wait_for(stands_still)
        assert not running.engine.aborted
        while running.engine.stats().generation_tokens == counts[-1]:
            assert next(chunks)
    running.wait_for(lambda: running.engine.aborted)


def test_leaving_before_a_whole_answer_aborts_it(start) -> None:
    running = start(PacedEngine("abc", pause=0.001, max_model_len=1 << 21))
    running.leave("/v1/chat/completions", ENDLESS, lambda: running.engine.stats().generation_tokens)
    running.wait_for(lambda: running.engine.aborted)
    assert running.engine.stats().num_running == 0


@pytest.mark.usefixtures("movable_clock")
def test_streams_run_side_by_side(start) -> None:
    running = start(PacedEngine(["a"] * 20, first_pause=3600.0))
    texts: list[str] = []

    def read() -> None:
        stream = running.openai().chat.completions.create(model="scripted", messages=MESSAGES, stream=True)
        texts.append("".join(chunk.choices[0].delta.content or "" for chunk in stream))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    running.wait_for(lambda: running.engine.pausing == 8)
    running.skip(3600)
    for thread in threads:
        thread.join()
    assert texts == ["a" * 20] * 8


def test_request_ids(start) -> None:
    with start().http() as client:
        assert client.get("/health", headers={"x-request-id": "mine-1.2_3"}).headers["x-request-id"] == "mine-1.2_3"
        made = [client.get(path, headers={"x-request-id": "a b"}).headers["x-request-id"] for path in ("/health", "/x")]
    assert all(len(each) == 32 for each in made)
    assert made[0] != made[1]


def test_the_log_of_requests_says_who_asked_and_never_the_key(start, caplog: pytest.LogCaptureFixture) -> None:
    running = start(api_key=("first-secret", "second-secret"), log_requests=True)
    with caplog.at_level("INFO", "candle_vllm.server.requests"), running.http() as client:
        client.get("/v1/models", headers={"authorization": "Bearer second-secret", "x-request-id": "mine"})
        client.get("/v1/models%0Ax", headers={"x-request-id": "other"})
        for probe in ("/ready", "/health"):  # two a second would hide the others
            assert client.get(probe).status_code == 200

        def lines() -> list[logging.LogRecord]:
            return [record for record in caplog.records if record.name == "candle_vllm.server.requests"]

        running.wait_for(lambda: len(lines()) == 2)  # they are written behind the answers
    known, stranger = lines()
    assert re.fullmatch(r"GET '/v1/models' 200 \d\.\d{3} s mine from 127\.0\.0\.1 with key 2", known.getMessage())
    assert "from 127.0.0.1" in stranger.getMessage()
    assert "key" not in stranger.getMessage()
    line = json.loads(LogFormatter("json").format(known))
    assert {name: line[name] for name in ("method", "path", "status", "http_request_id", "client", "key")} == {
        "method": "GET", "path": "/v1/models", "status": 200, "http_request_id": "mine",
        "client": "127.0.0.1", "key": "2",
    }  # fmt: skip
    assert 0 <= line["seconds"] < 30
    assert "secret" not in caplog.text + str(line)
    assert len(LogFormatter("text").format(stranger).splitlines()) == 1


def test_what_other_servers_have_is_answered_with_what_it_is_called_here(start) -> None:
    with start().http() as client:
        message = client.post("/generate", json={}).json()["error"]["message"]
        assert "; the route for this is /v1/completions." in message
        assert client.get("/nothing").json()["error"]["message"].endswith("the API is under /v1.")
        message = client.post("/v1/audio/transcriptions").json()["error"]["message"]
        assert message == "There is no route '/v1/audio/transcriptions' here."
        message = client.post("/v1/v1/messages").json()["error"]["message"]
        assert message == "There is no route '/v1/v1/messages' here; leave /v1 out of the base URL."
        assert (
            client.get("/v1/chat/completions")
            .json()["error"]["message"]
            .endswith("does not support GET; it supports POST.")
        )
        for field, said in (
            ("num_predict", "'max_tokens'"), ("options", "as max_tokens"),
            ("num_ctx", "--max-model-len"),
        ):  # fmt: skip
            response = client.post("/v1/chat/completions", json={**CHAT, field: {} if field == "options" else 5})
            assert response.status_code == 400
            assert said in response.json()["error"]["message"]


class Broken(PacedEngine):
    def stream(self, *_: object, **__: object) -> NoReturn:
        raise ZeroDivisionError("secret path /root")


@pytest.mark.parametrize(("path", "anthropic"), [("/v1/chat/completions", False), ("/v1/messages", True)])
def test_what_nobody_foresaw_is_answered_as_any_other_failure(start, caplog, path: str, anthropic: bool) -> None:
    running = start(Broken(), cors_origin=("https://page.example",), served_model_name=("m",))
    headers = {"x-request-id": "mine", "origin": "https://page.example"}
    with running.http(headers=headers) as client:
        response = client.post(path, json={**CHAT, "model": "m", "max_tokens": 5})
        samples = client.get("/metrics").text
        assert client.get("/health").status_code == 200
    assert response.status_code == 500
    assert response.headers["x-request-id"] == "mine"
    assert response.headers["access-control-allow-origin"] == "https://page.example"
    assert (response.json().get("type") == "error") is anthropic
    assert "secret" not in response.text
    assert [line for line in samples.splitlines() if line.startswith("http_requests_total{") and '"5xx"' in line]
    assert 'status="none"' not in samples
    assert caplog.text.count("ZeroDivisionError: secret path /root") == 1


@pytest.mark.parametrize(("path", "anthropic"), [("/v1/chat/completions", False), ("/v1/messages", True)])
def test_what_a_drain_cuts_off_is_answered_as_any_other_failure(start, path: str, anthropic: bool) -> None:
    running = start(PacedEngine(["a"] * 5000, pause=0.02, max_model_len=1 << 21), served_model_name=("m",))
    body = {"model": "m", "messages": MESSAGES, "max_tokens": 1_000_000}
    with running.http(headers={"x-request-id": "mine"}) as client, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, path, json=body)
        running.wait_for(lambda: running.engine.stats().num_running)
        running.stop()
        response = answer.result(60)
    assert (response.status_code, response.headers["x-request-id"]) == (503, "mine")
    assert (response.json().get("type") == "error") is anthropic
    assert anthropic is ("request_id" in response.json())


def test_a_mailbox_that_cannot_be_opened_ends_the_start_in_one_line(tmp_path: Path, caplog) -> None:
    (tmp_path / "m.sqlite").write_bytes(b"garbage" * 500)
    app = create_app(PacedEngine(), mailbox=Mailbox(MailboxOptions(url=f"sqlite:///{tmp_path / 'm.sqlite'}")))
    assert app.state.failure is None
    settings = Settings(port=0)
    with bind(settings.address) as listener:
        make_server(app, settings).run(sockets=[listener])
    assert isinstance(app.state.failure, ConfigError)
    assert "cannot open the mailbox: file is not a database" in str(app.state.failure)  # which the command says, once
    assert "Traceback" not in caplog.text


def test_a_drain_lets_streams_finish_and_then_aborts(start) -> None:
    running = start(PacedEngine(["a"] * 30, pause=0.01), shutdown_timeout=round(PATIENCE))
    with running.http() as client, client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as r:
        lines = r.iter_lines()
        next(lines)
        running.server.should_exit = True
        rest = "".join(lines)
    assert rest.endswith("data: [DONE]")
    running.stop()
    assert not running.engine.aborted


def test_a_drain_ends_after_its_time(start) -> None:
    running = start(PacedEngine("a", pause=0.01, max_model_len=1 << 21))
    with running.http() as client, client.stream("POST", "/v1/chat/completions", json={**ENDLESS, "stream": True}) as r:
        chunks = r.iter_bytes()
        next(chunks)
        running.stop()
        assert len(running.engine.aborted) == 1


def test_head_is_get_without_its_body(start) -> None:
    with start().http() as client:
        for path in ("/health", "/version", "/v1/models", "/metrics"):
            head, get = client.head(path), client.get(path)
            assert (head.status_code, head.content) == (200, b"")
            assert head.headers["content-type"] == get.headers["content-type"]
        assert client.head("/v1/chat/completions").status_code == 405
        assert 'handler="/health",method="HEAD"' in client.get("/metrics").text


def test_compressed_bodies_are_refused_by_name(start) -> None:
    with start().http() as client:
        response = client.post(
            "/v1/chat/completions",
            content=b"{}",
            headers={"content-type": "application/json", "content-encoding": "gzip"},
        )
        assert (response.status_code, response.json()["error"]["param"]) == (415, "Content-Encoding")
