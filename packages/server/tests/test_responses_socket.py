# SPDX-License-Identifier: MIT
"""Responses over a WebSocket, asked for by a client of the `websockets` package and judged by the specification."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from socket import create_connection
from typing import Any

import openresponses_types.types as spec
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from candle_vllm.server.http.body import BIG_BODY
from candle_vllm.server.http.routing import NOBODY
from candle_vllm.server.routes import responses_socket
from packages.server.tests.running_server import Running
from packages.server.tests.server_fakes import PacedEngine
from tests.response_judges import judge_events
from tests.waiting import PATIENCE, wait_for

ENDS = ("response.completed", "response.failed", "response.incomplete")
SLOW = {"pause": 0.02}


@contextmanager
def opened(server: Running, *, key: str = "", **options: Any) -> Iterator[ClientConnection]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url = f"ws://127.0.0.1:{server.port}/v1/responses"
    with connect(url, additional_headers=headers, proxy=None, open_timeout=60, close_timeout=2, **options) as socket:
        yield socket


def send(socket: ClientConnection, text: str | list[Any] = "Hi", **fields: Any) -> None:
    socket.send(json.dumps({"type": "response.create", "model": "scripted", "input": text, "store": False, **fields}))


def exchange(socket: ClientConnection, message: str | bytes) -> None:
    """Send a message and wait for another; the server may reset the connection while the client is still sending."""
    socket.send(message)
    socket.recv(timeout=60)


def answer(socket: ClientConnection) -> list[dict[str, Any]]:
    """The events up to the last of one response."""
    events: list[dict[str, Any]] = []
    while True:
        event = json.loads(socket.recv(timeout=60))
        events.append(event)
        if event["type"] in ENDS or (event["type"] == "error" and "status" in event):
            return events


def ask(socket: ClientConnection, text: str | list[Any] = "Hi", **fields: Any) -> dict[str, Any]:
    """The response, judged."""
    send(socket, text, **fields)
    events = answer(socket)
    assert events[-1]["type"] == "response.completed", events[-1]
    return judge_events(events)


def refused(socket: ClientConnection, text: str | list[Any] = "Hi", **fields: Any) -> dict[str, Any]:
    """The error of a request that was not taken, judged."""
    send(socket, text, **fields)
    return error_of(socket)


def error_of(socket: ClientConnection) -> dict[str, Any]:
    [event] = answer(socket)
    spec.WebSocketErrorEvent.model_validate(event)
    return {"status": event["status"], **event["error"]}


def said(server: Running) -> str:
    return server.engine.tokenizer.decode(server.engine.requests[-1].prompt_token_ids)


@pytest.fixture
def server(start: Callable[..., Running]) -> Running:
    return start(PacedEngine("OK."))


def test_responses_follow_each_other_and_are_those_of_http(server: Running) -> None:
    with opened(server) as socket:
        first, second = ask(socket, "first"), ask(socket, "second", stream=True)
        with server.http() as http:
            whole = http.post("/v1/responses", json={"model": "scripted", "input": "x", "store": False}).json()
    assert first["id"] != second["id"]
    assert first["output"][0]["content"] == whole["output"][0]["content"]
    assert first.keys() == whole.keys()


def test_what_is_not_kept_is_continued_from_the_connection_s_memory(server: Running) -> None:
    with opened(server) as socket:
        first = ask(socket, "The word is cobalt.")
        second = ask(socket, "And now?", previous_response_id=first["id"])
        ask(socket, "Still?", previous_response_id=second["id"])
        assert ["cobalt" in said(server), "And now?" in said(server), said(server).count("OK.")] == [True, True, 2]
        kept = ask(socket, "Keep this.", previous_response_id=second["id"], store=True)
        ask(socket, "More.", previous_response_id=kept["id"])
        assert ["cobalt" in said(server), "Keep this." in said(server)] == [True, True]


@pytest.mark.usefixtures("movable_clock")
def test_silence_is_broken_by_events_as_over_http(start: Callable[..., Running]) -> None:
    """Codex counts the messages of a WebSocket alone, and not its pings."""
    running = start(PacedEngine("abc", first_pause=60))
    running.server.config.ws_ping_interval = None  # a pong may come later than the clock that is moved
    with opened(running) as socket:
        send(socket)
        running.wait_for(lambda: running.engine.pausing)
        for _ in range(3):
            running.skip(20.5)
        events = answer(socket)
    silent = [place for place, event in enumerate(events) if event["type"] == "keepalive"]
    assert len(silent) >= 2
    assert all(events[place]["sequence_number"] == events[place - 1]["sequence_number"] for place in silent)
    judge_events([event for event in events if event["type"] != "keepalive"])


def test_another_connection_knows_what_was_kept_and_nothing_else(server: Running) -> None:
    with opened(server) as socket:
        lost, kept = ask(socket, "copper"), ask(socket, "zinc", store=True)
    with opened(server) as socket:
        error = refused(socket, previous_response_id=lost["id"])
        assert (error["status"], error["code"], error["param"]) == (
            400,
            "previous_response_not_found",
            "previous_response_id",
        )
        ask(socket, "a fresh start")
        ask(socket, "Go on.", previous_response_id=kept["id"])
        assert "zinc" in said(server)


def test_a_compacted_conversation_begins_a_new_chain(server: Running) -> None:
    with opened(server) as socket, server.http() as http:
        made = http.post("/v1/responses/compact", json={"model": "scripted", "input": "The word is slate."}).json()
        ask(socket, [*made["output"], {"type": "message", "role": "user", "content": "Go on."}], tools=[])
        assert "slate" in said(server)


def test_a_continuation_that_fails_is_forgotten(server: Running) -> None:
    output = [{"type": "function_call_output", "call_id": "call_missing", "output": "x"}]
    with opened(server) as socket:
        first = ask(socket, "ember")
        second = ask(socket, "on", previous_response_id=first["id"])
        assert refused(socket, output, previous_response_id=first["id"])["status"] == 400
        for lost in (first, second):  # what follows it cannot be continued either
            error = refused(socket, previous_response_id=lost["id"])
            assert error["code"] == "previous_response_not_found"


def test_a_server_without_a_store_has_the_connection_s_memory(start: Callable[..., Running]) -> None:
    server = start(PacedEngine("OK."), responses_store="off")
    with opened(server) as socket:
        first = ask(socket, "cobalt", store=None)
        ask(socket, previous_response_id=first["id"], store=None)
        assert "cobalt" in said(server)
        assert refused(socket, previous_response_id="resp_1")["code"] == "previous_response_not_found"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("{", None),
        ("[1]", None),
        ({"type": "response.steer"}, "type"),
        ({"input": "Hi"}, "type"),
        ({"type": "response.create", "stream": False}, "stream"),
        ({"type": "response.create", "background": True}, "background"),
        ({"type": "response.create", "input": "Hi", "temprature": 1}, "temprature"),
        ({"type": "response.create", "input": "Hi", "stream_id": "a"}, "stream_id"),
        ({"type": "response.create", "input": "Hi", "top_p": 7}, "top_p"),
    ],
)
def test_wrong_messages_are_refused_by_name_and_the_connection_goes_on(
    server: Running, message: Any, param: str | None
) -> None:
    with opened(server) as socket:
        socket.send(message if isinstance(message, str) else json.dumps(message))
        error = error_of(socket)
        assert error["status"] == 400
        assert error["param"] == param
        ask(socket)


def test_a_message_that_is_no_text_or_too_large_ends_the_connection(start: Callable[..., Running]) -> None:
    server = start(PacedEngine("OK."), max_body_mb=1)
    for message, code in ((b"{}", None), ("x" * (2 << 20), 1009)):
        with opened(server) as socket:
            with pytest.raises((ConnectionClosed, ConnectionError)) as closed:
                exchange(socket, message)
            received = closed.value.rcvd if isinstance(closed.value, ConnectionClosed) else None
            assert code is None or received is None or received.code == code
    with opened(server) as socket:
        ask(socket)


def test_keys_are_asked_for_as_everywhere(start: Callable[..., Running]) -> None:
    server = start(PacedEngine("OK."), api_key=("secret",))
    for key in ("", "wrong"):
        with pytest.raises(InvalidStatus) as caught, opened(server, key=key):
            pass
        assert caught.value.response.status_code == 401
        assert b"invalid_api_key" in (caught.value.response.body or b"")
    with opened(server, key="secret") as socket:
        ask(socket)


def test_a_page_from_elsewhere_may_not_connect(start: Callable[..., Running]) -> None:
    server = start(PacedEngine("OK."), cors_origin=("https://mine.example",))
    for origin in ("https://evil.example", "null"):
        with pytest.raises(InvalidStatus) as caught, opened(server, origin=origin):  # type: ignore[arg-type]
            pass
        assert caught.value.response.status_code == 403
        assert b"origin_not_allowed" in (caught.value.response.body or b"")
    for origin in ("https://mine.example", server.url):
        with opened(server, origin=origin) as socket:  # type: ignore[arg-type]
            ask(socket)


def test_a_failure_of_the_server_is_logged_and_one_of_the_client_is_not(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(server) as socket:
        assert refused(socket, temperature="hot")["status"] == 400
        assert not caplog.messages
        monkeypatch.setattr(responses_socket, "responder_of", lambda *_: 1 // 0)
        assert refused(socket)["status"] == 500
    [record] = caplog.records
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError


def test_other_paths_have_no_sockets(server: Running) -> None:
    with pytest.raises(InvalidStatus), connect(f"ws://127.0.0.1:{server.port}/v1/models", proxy=None):
        pass


def test_a_client_that_leaves_ends_its_response(start: Callable[..., Running]) -> None:
    server = start(PacedEngine("x" * 2000, **SLOW))
    with opened(server) as socket:
        send(socket)
        socket.recv(timeout=60)
    wait_for(lambda: server.engine.aborted)
    assert server.engine.stats().num_running == 0


def test_too_many_messages_at_once_end_the_connection(start: Callable[..., Running]) -> None:
    server = start(PacedEngine("x" * 2000, **SLOW))
    with opened(server) as socket:
        send(socket)
        socket.recv(timeout=60)
        with contextlib.suppress(ConnectionClosed):  # it may be ended before the last of them is sent
            for _ in range(20):
                send(socket)
        assert answer(socket)[-1]["error"]["code"] == "too_many_messages"
        with pytest.raises(ConnectionClosed, match="1008"):
            socket.recv(timeout=60)
    wait_for(lambda: server.engine.aborted)


def test_bytes_of_waiting_messages_end_the_connection(start: Callable[..., Running]) -> None:
    """However few the messages are; one is counted by its bytes, though a str of it has four for a character."""
    server = start(PacedEngine("x" * 2000, **SLOW))
    held = server.server.config.app.state.held  # type: ignore[union-attr]
    with opened(server) as socket:
        send(socket)
        socket.recv(timeout=60)
        socket.send(json.dumps({"type": "response.create", "input": "😀" + "a" * (7 << 20)}, ensure_ascii=False))
        send(socket, "b" * (7 << 20))
        wait_for(lambda: sum(held._by_key.values()) > 13 << 20)
        assert sum(held._by_key.values()) < 15 << 20
        with contextlib.suppress(ConnectionClosed):
            send(socket, "c" * (7 << 20))
        assert answer(socket)[-1]["error"]["code"] == "too_many_messages"
        with pytest.raises(ConnectionClosed, match="1008"):
            socket.recv(timeout=60)
    wait_for(lambda: not held._by_key)


def test_a_message_for_which_there_is_no_memory_is_refused_in_its_turn(start: Callable[..., Running]) -> None:
    server = start(PacedEngine("x" * 20, **SLOW), max_held_mb=1, max_body_mb=1)
    held = server.server.config.app.state.held  # type: ignore[union-attr]
    held.add(NOBODY, (2 << 20) - 10)
    with opened(server) as socket:
        send(socket)
        socket.recv(timeout=60)
        send(socket, " " * (BIG_BODY + 100))
        send(socket)
        assert answer(socket)[-1]["type"] == "response.completed"
        ends = [answer(socket)[-1] for _ in range(2)]
    assert [end.get("status") for end in ends] == [503, None]
    assert ends[0]["error"]["code"] == "overloaded"
    assert ends[1]["type"] == "response.completed"
    held.add(NOBODY, 10 - (2 << 20))
    wait_for(lambda: not held._by_key)


def test_a_message_counts_until_it_is_parsed_and_is_let_go_of_then(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start(PacedEngine("x" * 2000, pause=0.5))
    held = server.server.config.app.state.held  # type: ignore[union-attr]
    parse, may_end, messages = responses_socket._request_of, threading.Event(), list[bytes]()

    def waiting(message: bytes) -> Any:
        messages.append(message)
        assert may_end.wait(PATIENCE)
        return parse(message)

    monkeypatch.setattr(responses_socket, "_request_of", waiting)
    request = {"type": "response.create", "model": "scripted", "input": "Hi", "store": False}
    text = json.dumps(request) + " " * (1 << 20)
    alone = [bytes(1000)]
    with opened(server) as stays:
        with opened(server) as leaves:
            leaves.send(text)
            wait_for(lambda: messages)
            stays.send(text)  # which waits for its turn to be parsed
            wait_for(lambda: sum(held._by_key.values()) > 15 << 17)
        wait_for(lambda: len(server.server.server_state.tasks) == 1)
        assert sum(held._by_key.values()) > 15 << 17  # the thread of the one that left has its message
        may_end.set()
        assert json.loads(stays.recv(timeout=60))["type"] == "response.created"
        wait_for(lambda: not held._by_key)
        for _ in range(2):
            message = [messages.pop(0)]
            wait_for(lambda message=message: sys.getrefcount(message[0]) == sys.getrefcount(alone[0]))


def test_a_drain_finishes_the_response_and_closes_idle_connections(start: Callable[..., Running]) -> None:
    server = start(PacedEngine("x" * 25, **SLOW), shutdown_timeout=30)
    with opened(server) as idle, opened(server) as busy:
        send(busy)
        busy.recv(timeout=60)
        server.server.should_exit = True
        with pytest.raises(ConnectionClosed) as closed:
            idle.recv(timeout=60)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1012
        assert answer(busy)[-1]["type"] == "response.completed"


def test_the_end_of_a_drain_tells_of_the_cut(start: Callable[..., Running]) -> None:
    server = start(PacedEngine("x" * 4000, **SLOW))
    with opened(server) as socket:
        send(socket)
        socket.recv(timeout=60)
        server.server.should_exit = True
        last = answer(socket)[-1]
        assert last["type"] == "response.failed"


def test_a_client_that_does_not_answer_the_close_is_cut_off(start: Callable[..., Running]) -> None:
    server = start(PacedEngine("OK."))
    head = "Host: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    with create_connection(("127.0.0.1", server.port), timeout=60) as client, client.makefile("rb") as read:
        client.sendall(f"GET /v1/responses HTTP/1.1\r\n{head}Sec-WebSocket-Key: {'A' * 22}==\r\n\r\n".encode())
        assert read.readline() == b"HTTP/1.1 101 Switching Protocols\r\n"
        server.stop()  # a thread that fails fails the test
        assert b"\x03\xf4" in read.read()  # 1012, and then the end
