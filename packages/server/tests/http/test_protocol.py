# SPDX-License-Identifier: MIT
"""Requests that are sent one behind the other on a connection, and what is no request behind one that is."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from candle_vllm.server.http import protocol
from packages.server.tests.server_fakes import PacedEngine
from tests.waiting import PATIENCE, skip, until

COMPLETION = {"model": "scripted", "prompt": "x"}


def _request(**changes: Any) -> bytes:
    body = json.dumps({**COMPLETION, **changes}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _answers(port: int, *pieces: bytes) -> bytes:
    """What comes back until the server hangs up; each further piece is sent when something has come."""
    first, *later = pieces
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        connection.sendall(first)
        got = b""
        for piece in later:
            got += connection.recv(65536)
            connection.sendall(piece)
        return got + b"".join(iter(lambda: connection.recv(65536), b""))


BROKEN = (
    b"BREW /pot HTTP/1.1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET /" + b"a" * 200_000,
)


@pytest.mark.parametrize("broken", BROKEN, ids=["method", "chunk", "long"])
@pytest.mark.parametrize("before", [1, 2])
def test_what_is_no_request_is_not_answered_in_the_place_of_those_before_it(start, broken: bytes, before: int) -> None:
    running = start(PacedEngine(["a", "b"], first_pause=0.1))
    got = _answers(running.port, _request() * before + broken)
    assert got.count(b"HTTP/1.1 200") == got.count(b'"text":"ab"') == before
    assert got.count(b"HTTP/1.1 ") == before


@pytest.mark.parametrize("broken", BROKEN, ids=["method", "chunk", "long"])
def test_what_is_no_request_is_not_answered_in_the_middle_of_a_stream(start, broken: bytes) -> None:
    running = start(PacedEngine(["a"] * 5, pause=0.05))
    got = _answers(running.port, _request(stream=True), broken)
    assert got.count(b"HTTP/1.1 ") == 1
    assert got.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


@pytest.mark.parametrize("broken", BROKEN[:2], ids=["method", "chunk"])
def test_what_is_no_request_is_refused_where_nothing_is_before_it(start, broken: bytes) -> None:
    assert _answers(start().port, broken).startswith(b"HTTP/1.1 400")
    got = _answers(start().port, _request(), broken)
    assert got.startswith(b"HTTP/1.1 200")
    assert got.count(b"HTTP/1.1 400") == 1


def test_a_client_that_leaves_is_gone_for_each_of_its_requests(start, caplog: pytest.LogCaptureFixture) -> None:
    running = start(PacedEngine(["a"] * 10_000, pause=0.01))
    with socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE) as connection:
        connection.sendall(_request(stream=True) * 3)
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        assert not running.engine.aborted
    running.wait_for(lambda: len(running.engine.aborted) == 1)
    running.stop()
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


def _events(answer: bytes) -> tuple[int, bytes]:
    """How many chunks an answer's body came in, and the body without what differs between two answers."""
    _, _, body = answer.partition(b"\r\n\r\n")
    chunks: list[bytes] = []
    while body:
        size, _, body = body.partition(b"\r\n")
        chunks.append(body[: int(size, 16)])
        assert body[int(size, 16) :].startswith(b"\r\n")
        body = body[int(size, 16) + 2 :]
    assert chunks.pop() == b""
    return len(chunks), re.sub(rb'"(id|created)":[^,]+,', b"", b"".join(chunks))


def test_tokens_that_pass_the_layers_are_those_that_go_through_them(start, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"w{number} " for number in range(30)]
    passed: list[bool] = []
    writer = protocol._part_writer

    def noted(cycle: Any) -> Callable[[bytes], bool]:
        write = writer(cycle)

        def note(data: bytes) -> bool:
            passed.append(write(data))
            return passed[-1]

        return note

    monkeypatch.setattr(protocol, "_part_writer", noted)
    request = _request(stream=True, max_tokens=200, stream_options={"include_usage": True}).replace(
        b"Host", b"Connection: close\r\nHost"
    )
    _, direct = _events(_answers(start(PacedEngine(words, pause=0.005)).port, request))
    assert sum(passed) >= len(words) - 1
    monkeypatch.setattr(protocol, "_part_writer", lambda _: lambda _: False)
    _, through = _events(_answers(start(PacedEngine(words, pause=0.005)).port, request))
    assert direct == through  # the layers have more at a time


def test_a_stream_to_an_old_client_has_no_chunks(start) -> None:
    """RFC 9112, 6.1: HTTP/1.0 knows no transfer encoding; the end of the connection ends the answer."""
    body = json.dumps({"messages": [{"role": "user", "content": "x"}], "stream": True}).encode()
    head = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: keep-alive\r\n\r\n"
    port = start(PacedEngine(["one ", "two"])).port
    answered = _answers(port, f"POST /v1/chat/completions HTTP/1.0\r\n{head}".encode() + body)
    top, _, events = answered.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in top.lower()
    assert [line[:5] for line in events.split(b"\n\n")[:-1]] == [b"data:"] * events.count(b"\n\n")
    assert events.endswith(b"data: [DONE]\n\n")
    whole = _answers(port, b"GET /version HTTP/1.0\r\n\r\n")
    assert whole.partition(b"\r\n\r\n")[2].startswith(b"{")


WRONG_FRAMING = [
    b"GET /version\r\n\r\n",
    b"GET /version HTTP/0.9\r\nHost: x\r\n\r\n",
    b"GET /version HTTP/2.0\r\nHost: x\r\n\r\n",
    b"GET /version HTTP/1.1\r\n\r\n",
    b"GET /version HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n",
    b"GET /version HTTP/1.0\r\nHost: x\r\nHost: y\r\n\r\n",
    b"GET /version HTTP/1.1\r\nHost: x/health\r\n\r\n",
    b"GET /version HTTP/1.1\r\nHost: a b\r\n\r\n",
    b"GET /version HTTP/1.1\r\nHost: user@x\r\n\r\n",
    b"GET /version HTTP/1.1\r\nHost: x, y\r\n\r\n",
    b"GET /version HTTP/1.1\r\nHost: x:80:80\r\n\r\n",
    b"GET /version HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"GET /version HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: identity\r\n\r\n",
    b"GET /v1/responses HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    b"GET /v1/responses HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 38\r\n\r\n",
    b"GET /v1/responses HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n",
    b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\nContent-Length: 38\r\n\r\n",
    b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 38\r\n\r\n",
    b"POST /version HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 38\r\n\r\n",
    b"POST /version HTTP/1.0\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"POST /version HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 38\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n",
    b"POST /version HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n"
    b"Transfer-Encoding: chu\r\n nked\r\n\r\n",
]
RIGHT_FRAMING = [
    b"GET /version HTTP/1.0\r\n\r\n",
    b"GET /version HTTP/1.0\r\nHost: x\r\n\r\n",
    b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close, Upgrade\r\nUpgrade: h2c\r\nContent-Length: 0\r\n\r\n",
    *(
        b"GET /health HTTP/1.1\r\nConnection: close\r\nHost: %b\r\n\r\n" % host
        for host in (
            b"",
            b"x",
            b"x:",
            b"x:80",
            b"127.0.0.1:80",
            b"[::1]",
            b"[::1]:80",
            b"a_b-c.example.",
            b"%C3%A4",
            b"x \t",
        )
    ),
]


def test_framing_that_rfc_9112_refuses(start) -> None:
    running = start()
    for request in WRONG_FRAMING:
        answer = _answers(running.port, request + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 400"), (request, answer)
        assert b"HTTP/1.1 200" not in answer, request
    for request in RIGHT_FRAMING:
        assert _answers(running.port, request).startswith(b"HTTP/1.1 200"), request


def test_blanks_behind_values_are_no_part_of_them(start) -> None:
    running = start(PacedEngine("ok"), api_key=("k",))
    head, _, body = _request().partition(b"\r\n\r\n")
    more = b"\r\nAuthorization: Bearer k\r\nConnection: close"
    answer = _answers(
        running.port, (head + more).replace(b"\r\n", b" \t \r\n").replace(b"1.1 \t ", b"1.1") + b"\r\n\r\n" + body
    )
    assert answer.startswith(b"HTTP/1.1 200"), answer


H2C = b"\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAEAAEAAAAIAAAAA\r\nUpgrade: h2c\r\nHost: "
NEXT = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def test_an_upgrade_to_what_is_not_spoken_is_ignored(start) -> None:
    """Java's HttpClient asks for h2c with its first request. Its body is read as its head says."""
    running = start(PacedEngine("ok"))
    asked = _request().replace(b"\r\nHost: ", H2C)
    chunked = re.sub(rb"Content-Length: (\d+)\r\n\r\n(.*)", b"Transfer-Encoding: chunked\r\n\r\n%x\r\n\\2\r\n0\r\n\r\n"
                     % len(_request().partition(b"\r\n\r\n")[2]), asked)  # fmt: skip
    head = _request().partition(b"Content-Length")[0].replace(b"\r\nHost: ", H2C)
    hidden = head + b"Content-Length: %d\r\n\r\n" % len(NEXT) + NEXT
    for request, statuses in [(asked, [200]), (chunked, [200]), (asked * 2 + chunked, [200] * 3), (hidden, [400])]:
        got = _answers(running.port, request + NEXT)
        assert [int(line[:3]) for line in got.split(b"HTTP/1.1 ")[1:]] == [*statuses, 200], request
        with socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE) as connection:
            for at in range(0, len(request + NEXT), 7):
                connection.sendall((request + NEXT)[at : at + 7])
            got = b"".join(iter(lambda: connection.recv(65536), b""))
        assert [int(line[:3]) for line in got.split(b"HTTP/1.1 ")[1:]] == [*statuses, 200], request
    closing = b"GET /health HTTP/1.1" + H2C.replace(b"Upgrade,", b"close, Upgrade,") + b"x\r\n\r\n"
    assert _answers(running.port, closing + NEXT).count(b"HTTP/1.1 ") == 1
    connect = b"CONNECT x:80 HTTP/1.1" + H2C + b"x\r\nConnection: close\r\n\r\n"
    assert b"HTTP/1.1 200" not in _answers(running.port, connect)
    many = b"GET /health HTTP/1.1" + H2C + b"x\r\n\r\n"
    got = _answers(running.port, _request() + many * 1000)
    assert got.count(b"HTTP/1.1 200") == 1 + protocol.MAX_PIPELINED


def test_heads_of_ignored_upgrades_are_counted(start) -> None:
    running = start()
    asked = b"POST /health HTTP/1.1" + H2C + b"x\r\nTransfer-Encoding: chunked\r\n\r\n"
    for request in (asked[:-2] + b"X: " + b"a" * 200_000, asked + b"1;" + b"x" * 200_000):
        assert b"HTTP/1.1 400" in (got := _answers(running.port, request)) or b"HTTP/1.1 405" in got
        assert got.count(b"HTTP/1.1 ") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such limit")
def test_the_process_may_open_as_many_files_as_the_system_lets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    most = protocol.most_connections
    limits: list[tuple[int, int]] = []
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, wanted: given.append(wanted))
    endless = resource.RLIM_INFINITY
    for now, wanted, connections in [
        ((1024, 1 << 20), [(1 << 16, 1 << 20)], 4096),
        ((256, endless), [(1 << 16, endless)], 4096),
        ((1024, 2048), [(2048, 2048)], 1792),
        ((1024, 1024), [], 896),
        ((1 << 20, 1 << 20), [], 4096),
        ((endless, endless), [], 4096),
    ]:
        limits.append(now)
        given.clear()
        assert (most(), given) == (connections, wanted)

    def refuses(*_: object) -> None:
        raise ValueError

    monkeypatch.setattr(resource, "setrlimit", refuses)
    limits.append((256, endless))
    assert most() == 224


KEY = b"Authorization: Bearer k\r\n"
JSON = b"Content-Type: application/json\r\n"
EARLY = [  # requests that are answered before their body has come, and with what
    (b"POST /v1/chat/completions", JSON, 401),
    (b"POST /health", b"", 405),
    (b"GET /health", b"", 200),
    (b"GET /v1/models", KEY, 200),
    (b"POST /v1/nothing", KEY, 404),
    (b"PUT /v1/models", KEY, 405),
    (b"POST /v1/completions", KEY + JSON + b"Origin: https://evil.example\r\n", 403),
    (b"POST /v1/completions", KEY + b"Content-Type: text/plain\r\n", 415),
    (b"POST /v1/completions", KEY + JSON + b"Content-Encoding: gzip\r\n", 415),
    (b"POST /v1/files", KEY + JSON, 415),
]
FRAMES = [b"Content-Length: 99999999\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"]


def test_an_answer_before_the_end_of_the_body_ends_the_connection(start) -> None:
    """And nothing of what comes after it is parsed."""
    port = start(api_key=("k",)).port
    cases = [(line, more, status, framed) for line, more, status in EARLY for framed in FRAMES]
    cases.append((b"POST /v1/completions", KEY + JSON, 413, FRAMES[0]))
    for line, more, status, framed in cases:
        answer = _answers(port, line + b" HTTP/1.1\r\nHost: x\r\n" + more + framed)
        assert answer.startswith(b"HTTP/1.1 %d" % status), (line, answer)
        assert b"\r\nconnection: close\r\n" in answer.lower(), line


@pytest.mark.parametrize("framed", FRAMES)
def test_a_client_that_still_sends_gets_its_answer_and_no_more_time(
    start, monkeypatch: pytest.MonkeyPatch, framed: bytes
) -> None:
    monkeypatch.setattr(protocol, "LINGER_BYTES", 1 << 20)
    running = start(api_key=("k",))
    parsed: list[int] = []
    made: Any = running.server.config.http_protocol_class
    on_body = made.on_body
    monkeypatch.setattr(made, "on_body", lambda self, body: parsed.append(len(body)) or on_body(self, body))
    _answers(running.port, b"POST /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 1\r\n\r\n ")
    assert parsed == [1]
    with socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + JSON + framed)
        assert b"401 Unauthorized" in b"".join(iter(lambda: connection.recv(65536), b""))
        connection.sendall(b"1\r\n \r\n" * 1000)  # is taken
        with contextlib.suppress(ConnectionError):
            while True:
                connection.sendall(b"1\r\n \r\n" * 10_000)
    assert parsed == [1]


@pytest.mark.usefixtures("movable_clock")
def test_a_client_that_goes_on_reading_is_cut_off_in_time(start) -> None:
    running = start(api_key=("k",))
    with socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + JSON + FRAMES[0])
        while connection.recv(65536):
            pass
        assert running.server.server_state.connections
        running.skip(protocol.LINGER_SECONDS)
        running.wait_for(lambda: not running.server.server_state.connections)


def test_a_body_that_has_come_keeps_the_connection(start) -> None:
    running = start()
    with running.http() as client:
        for _ in range(3):
            assert client.post("/v1/completions", json=COMPLETION).status_code == 200
            assert client.request("GET", "/health", content=b"x").status_code == 200
    whole = b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"
    last = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    got = _answers(running.port, whole * 2 + last)
    assert [line[:3] for line in got.split(b"HTTP/1.1 ")[1:]] == [b"405", b"405", b"200"]


def _chunks(size: int, count: int) -> bytes:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + KEY + JSON + FRAMES[1]
    return head + (b"%x\r\n" % size + b" " * size + b"\r\n") * count


def test_chunks_are_counted_and_not_their_bytes_alone(start, caplog: pytest.LogCaptureFixture) -> None:
    running = start(PacedEngine("ok", max_model_len=1 << 20), api_key=("k",))
    body = json.dumps(COMPLETION).encode()
    last = b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"
    few, small = protocol.MAX_PIECES - 1, protocol.PIECE_BYTES
    for size, count in ((1, few), (small, 20_000), (1000, 2000)):
        with socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE) as connection:
            connection.sendall(_chunks(size, count) + last)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200"), (size, count)
    for size, count in ((1, few + 100), (1, 100_000), (small // 2, 10_000)):
        answer = _answers(running.port, _chunks(size, count))
        assert answer.startswith(b"HTTP/1.1 400"), (size, count)
        assert b"too many small chunks" in answer
    extended = _chunks(1, 0) + (b"1;" + b"x" * 1000 + b"\r\n \r\n") * 300  # what is no body
    assert _answers(running.port, extended).startswith(b"HTTP/1.1 400")
    stranger = _chunks(1, few + 100).replace(KEY, b"")  # whose 401 is ready when its body has been refused
    assert _answers(running.port, stranger).startswith(b"HTTP/1.1 400")
    running.stop()
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_requests_that_wait_for_the_one_before_are_counted(start) -> None:
    running = start(PacedEngine(["a"] * 10, first_pause=0.2))
    got = _answers(running.port, _request() + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 5000)
    assert got.count(b"HTTP/1.1 200") == 1 + protocol.MAX_PIPELINED


async def test_a_client_that_reads_a_large_answer_slowly_stays_connected() -> None:
    loop, size = asyncio.get_running_loop(), 64 << 20
    lost: asyncio.Future[Exception | None] = loop.create_future()

    class Writer(protocol._ReadInTime):
        def connection_made(self, transport: Any) -> None:
            self.loop, self.transport = loop, transport
            transport.write(bytes(size))

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            lost.set_result(exc)

    server = await loop.create_server(Writer, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2], limit=1 << 10)
    for _ in range(3):  # the answer waits longer than `STALL_SECONDS`, but some of it is read in this time
        await reader.readexactly(size // 32)
        await asyncio.sleep(0.05)  # the system's buffers are filled again
        await skip(protocol.STALL_SECONDS)
        assert not lost.done()
    for _ in range(2):
        await asyncio.sleep(0.05)
        await skip(protocol.STALL_SECONDS)
    await until(lost.done)
    writer.close()
    with suppress(ConnectionError):  # the server has reset the connection
        await writer.wait_closed()
    server.close()
