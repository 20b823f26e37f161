# SPDX-License-Identifier: MIT
"""Frames of a WebSocket, byte by byte: what a client may send, and how a connection ends that sends more."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from candle_vllm.server.http import protocol
from packages.server.tests.running_server import Running
from packages.server.tests.server_fakes import PacedEngine
from tests.waiting import PATIENCE

TEXT, BINARY, CONTINUATION, CLOSE, PING = 1, 2, 0, 8, 9
HEAD = b"GET /v1/responses HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
HANDSHAKE = HEAD + b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + b"A" * 22 + b"==\r\n\r\n"
CREATE = json.dumps({"type": "response.create", "model": "scripted", "input": "Hi", "store": False}).encode()


def frame(opcode: int, data: bytes = b"", *, last: bool = True) -> bytes:
    """A client's frame, masked with zeros."""
    size = len(data)
    if size < 126:
        length = bytes([128 | size])
    else:
        length = b"\xfe" + struct.pack("!H", size) if size < 1 << 16 else b"\xff" + struct.pack("!Q", size)
    return bytes([128 * last | opcode]) + length + bytes(4) + data


@contextlib.contextmanager
def opened(running: Running, key: str = "none", status: int = 101) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE) as connection:
        connection.sendall(HANDSHAKE[:-2] + f"Authorization: Bearer {key}\r\n\r\n".encode())
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):
            answer += connection.recv(1)
        assert answer.startswith(b"HTTP/1.1 %d" % status)
        yield connection


def received(connection: socket.socket) -> Iterator[tuple[int, bytes]]:
    """The frames that the server sends, to the end of the connection."""
    with connection.makefile("rb") as read, contextlib.suppress(ConnectionError):
        while head := read.read(2):
            size = head[1]
            if size > 125:
                size = int.from_bytes(read.read(2 if size == 126 else 8), "big")
            yield head[0] & 15, read.read(size)


def close_code(connection: socket.socket) -> int:
    """The code with which the server ends the connection."""
    for opcode, data in received(connection):
        if opcode == CLOSE:
            return int.from_bytes(data[:2], "big")
    raise AssertionError("the connection ended without a word")


def events(connection: socket.socket) -> Iterator[dict[str, Any]]:
    return (json.loads(data) for opcode, data in received(connection) if opcode == TEXT)


@contextlib.contextmanager
def counted_frames() -> Iterator[list[Any]]:
    """The frames that servers receive meanwhile."""
    frames: list[Any] = []
    count = protocol.WebSocketProtocol._count

    def counted(self: Any, each: Any) -> None:
        frames.append(each)
        count(self, each)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol.WebSocketProtocol, "_count", counted)
        yield frames


@pytest.fixture
def running(start: Callable[..., Running]) -> Running:
    return start(PacedEngine("OK."))


def split(message: bytes, count: int) -> bytes:
    """A message in so many frames, the last of which has the most of it."""
    first = [frame(CONTINUATION if at else TEXT, message[at : at + 1], last=False) for at in range(count - 1)]
    return b"".join(first) + frame(CONTINUATION, message[count - 1 :])


FLOODS = {
    "empty fragments": frame(TEXT, b"{", last=False) + frame(CONTINUATION, last=False) * 20_000,
    "fragments of 2 KB": frame(TEXT, b"{", last=False) + frame(CONTINUATION, b" " * 2048, last=False) * 1100,
    "pings": frame(PING, b"p" * 125) * 1000,
    "empty pings": frame(PING) * 20_000,
    "pongs": frame(10) * 20_000,
    "messages": frame(TEXT) * 20_000,
    "pings in a message": frame(TEXT, b"{", last=False) + frame(PING) * 20_000,
}


@pytest.mark.parametrize("flood", FLOODS)
def test_floods_of_frames_end_their_connection(running: Running, caplog: pytest.LogCaptureFixture, flood: str) -> None:
    with counted_frames() as frames:
        with opened(running) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(FLOODS[flood])
            with contextlib.suppress(AssertionError):  # the reset may overtake the close
                assert close_code(connection) == 1008
        running.wait_for(lambda: not running.server.server_state.connections)
    assert len(frames) <= 2 * protocol.MAX_FRAMES  # what is behind them is not parsed
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_no_message_is_compressed(running: Running) -> None:
    """8 KB of a compressed message may be 8 MB, which nothing counts before they are there."""
    asked = HANDSHAKE[:-2] + b"Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n"
    with socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE) as connection:
        connection.sendall(asked)
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):
            answer += connection.recv(1)
    assert answer.startswith(b"HTTP/1.1 101")
    assert b"extensions" not in answer.lower()


def test_close_of_a_flood_says_why(running: Running) -> None:
    with opened(running) as connection:
        connection.sendall(frame(TEXT, b"{", last=False) + frame(CONTINUATION, last=False) * protocol.MAX_FRAGMENTS)
        [(opcode, data)] = received(connection)
    assert (opcode, data[:2]) == (CLOSE, struct.pack("!H", 1008))
    assert b"1024 frames" in data


def test_a_message_in_many_frames_and_many_messages_are_answered(running: Running) -> None:
    message = CREATE.ljust(2 * protocol.MAX_FRAGMENTS)
    with opened(running) as connection:
        read = events(connection)
        for _ in range(3):
            connection.sendall(split(message, 200) + frame(PING) * 4)
            while (event := next(read))["type"] != "response.completed":
                assert event["type"] != "error"
        connection.sendall(frame(TEXT, CREATE[:10], last=False) + frame(PING) + frame(CONTINUATION, CREATE[10:]))
        while next(read)["type"] != "response.completed":
            pass


def test_a_full_measure_of_frames_of_a_message(start: Callable[..., Running]) -> None:
    """8 KB each, as a client that sends the largest message in pieces may."""
    running = start(PacedEngine("OK."))
    piece = b" " * 8192
    frames = frame(TEXT, CREATE, last=False) + frame(CONTINUATION, piece, last=False) * (protocol.MAX_FRAGMENTS - 3)
    with opened(running) as connection:
        connection.sendall(frames + frame(CONTINUATION, piece))
        read = events(connection)
        while (event := next(read))["type"] != "response.completed":
            assert event["type"] != "error"


WRONG_TEXTS = [
    frame(TEXT, b"\xff"),
    frame(TEXT, b"\xe2\x82"),
    frame(TEXT, b"\xed\xa0\x80"),
    frame(TEXT, b"\xe2", last=False) + frame(CONTINUATION, b"\x28"),
    frame(TEXT, b"\xff") * 5,
    frame(TEXT, b"\xff") + frame(CLOSE, struct.pack("!H", 1000)),
]


@pytest.mark.parametrize("sent", WRONG_TEXTS)
def test_a_text_that_is_no_utf8_is_one_warning(running: Running, caplog: pytest.LogCaptureFixture, sent: bytes) -> None:
    with opened(running) as connection:
        connection.sendall(sent)
        assert close_code(connection) == (1000 if b"\x03\xe8" in sent else 1007)  # an echo of the client's own close
    running.wait_for(lambda: not running.server.server_state.connections)
    records = [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert [record.levelname for record in records] == ["WARNING"]
    assert "not valid UTF-8" in records[0].message
    assert records[0].exc_info is None


def test_a_text_whose_character_is_divided_among_frames_is_right(running: Running) -> None:
    message = CREATE.replace(b"Hi", "😀".encode())
    at = message.index(b"\xf0") + 2
    with opened(running) as connection:
        connection.sendall(frame(TEXT, message[:at], last=False) + frame(CONTINUATION, message[at:]))
        assert next(events(connection))["type"] == "response.created"


@pytest.fixture
def choked(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Running, Any, socket.socket, int]]:
    """A server, its end of a connection on which pongs wait to be read, the other end, and how many pongs."""
    monkeypatch.setattr(protocol, "MAX_FRAMES", 1 << 40)
    running = start(PacedEngine("OK."))
    running.server.config.ws_ping_interval = None  # which would end it sooner
    sent = 0
    with opened(running) as connection:
        [served] = running.server.server_state.connections
        rounds = 0  # of the event loop since the pongs began to wait; the system's buffers may grow meanwhile
        with running.http() as client:
            while rounds < 20:
                rounds += 1
                if served.writable.is_set():  # type: ignore[union-attr]
                    connection.sendall(frame(PING, b"p" * 125) * 500)
                    sent += 500
                    rounds = 0
                assert client.get("/health").status_code == 200
        yield running, served, connection, sent


@pytest.mark.usefixtures("movable_clock")
def test_unread_pongs_end_the_connection(choked: tuple[Running, Any, socket.socket, int]) -> None:
    running, *_ = choked
    running.skip(protocol.STALL_SECONDS)
    running.wait_for(lambda: not running.server.server_state.connections)


def test_nothing_is_read_while_pongs_wait_and_all_of_it_later(
    choked: tuple[Running, Any, socket.socket, int],
) -> None:
    running, served, connection, sent = choked
    connection.sendall(frame(TEXT, CREATE))
    with running.http() as client:
        assert client.get("/health").status_code == 200  # the event loop has come round
    assert not served.transport.is_reading()
    pongs = 0
    for opcode, data in received(connection):
        pongs += opcode == 10
        if opcode == TEXT and json.loads(data)["type"] == "response.completed":
            break
    assert pongs == sent


def test_a_message_that_does_not_come_whole_is_counted(start: Callable[..., Running]) -> None:
    running = start(PacedEngine("OK."), max_held_mb=2, max_body_mb=1)
    held = running.server.config.app.state.held  # type: ignore[union-attr]
    part = frame(TEXT, b" " * (900 << 10), last=False)

    def total() -> int:
        return sum(held._by_key.values())

    with contextlib.ExitStack() as stack:
        first, second, third = (stack.enter_context(opened(running)) for _ in range(3))
        first.sendall(part)
        second.sendall(part[:-1])  # within a frame
        running.wait_for(lambda: total() > 1600 << 10)
        third.sendall(part)
        assert close_code(third) == 1013
        first.sendall(frame(CONTINUATION, CREATE))
        assert next(events(first))["type"] == "response.created"
    running.wait_for(lambda: not running.server.server_state.connections)
    assert total() == 0


def test_one_of_several_keys_may_have_half_of_the_connections(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For WebSockets, bodies that come slowly, and answers that are written."""
    monkeypatch.setattr(protocol, "MAX_CONNECTIONS", 4)
    running = start(PacedEngine("OK."), api_key=("alice", "bob"))
    body = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    body += b"Authorization: Bearer alice\r\nContent-Length: 100\r\n\r\n{"
    with contextlib.ExitStack() as stack:
        slow = stack.enter_context(socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE))
        slow.sendall(body)
        with opened(running, "alice"):
            with opened(running, "alice", status=429):
                pass
            with running.http() as client:
                alice, bob = ({"authorization": f"Bearer {key}"} for key in ("alice", "bob"))
                refused = client.get("/v1/models", headers=alice)
                assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
                assert refused.json()["error"]["code"] == "rate_limit_exceeded"
                assert client.get("/v1/models", headers=bob).status_code == 200
            stack.enter_context(opened(running, "bob"))
        with running.http() as client:
            running.wait_for(lambda: client.get("/v1/models", headers=alice).status_code == 200)
        stack.enter_context(opened(running, "alice"))


def test_the_only_key_may_have_all_connections(start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_CONNECTIONS", 4)
    running = start(PacedEngine("OK."), api_key=("alice",))
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(opened(running, "alice"))


def test_a_big_message_that_is_no_utf8_ends_the_connection_as_well(running: Running) -> None:
    """It is decoded where it is parsed, and not in the event loop."""
    with opened(running) as connection:
        connection.sendall(frame(TEXT, CREATE.replace(b"Hi", b"a" * (1 << 20) + b"\xff")))
        assert close_code(connection) == 1007


def test_an_idle_connection_keeps_nothing_of_its_last_message(running: Running) -> None:
    """The parser of websockets refers to its last frame, of up to 8 MB, until the next one comes."""
    with counted_frames() as frames, opened(running) as connection:
        connection.sendall(frame(TEXT, CREATE.ljust(1 << 20)))
        read = events(connection)
        while next(read)["type"] != "response.completed":
            pass
        assert [each.data for each in frames] == [b""]


def test_big_messages_are_read_in_pieces_that_take_turns(start: Callable[..., Running]) -> None:
    """A socket that is always ready would be read 32 times in a round of the loop, and the next one likewise."""
    running = start(PacedEngine("OK."), max_body_mb=4)
    held = running.server.config.app.state.held  # type: ignore[union-attr]
    pieces = held.pieces
    message = frame(TEXT, CREATE.ljust(3 << 20))
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(opened(running)) for _ in range(2)]
        read_next, pieces._read_next = pieces._read_next, lambda: None
        senders = [threading.Thread(target=each.sendall, args=(message,)) for each in connections]
        for sender in senders:
            sender.start()
        running.wait_for(lambda: len(pieces._waiting) == 2)
        with running.http() as client:
            assert client.get("/health").status_code == 200  # the event loop has come round
        assert sum(held._by_key.values()) <= 2 * (512 << 10)
        pieces._read_next = read_next
        running.server.servers[0].get_loop().call_soon_threadsafe(read_next)
        for sender, connection in zip(senders, connections, strict=True):
            sender.join()
            read = events(connection)
            while next(read)["type"] != "response.completed":
                pass


@pytest.mark.parametrize("sent", [b"", CREATE, CREATE + b" " * (2 << 20)], ids=["empty", "small", "big"])
def test_a_binary_message_ends_the_connection_with_a_reason(running: Running, sent: bytes) -> None:
    with opened(running) as connection:
        for at in range(0, len(sent), 1 << 15):
            connection.sendall(frame(CONTINUATION if at else BINARY, sent[at : at + (1 << 15)], last=False))
        connection.sendall(frame(CONTINUATION if sent else BINARY))
        assert close_code(connection) == 1003


@pytest.mark.parametrize("path", ["/v1/realtime?model=x", "/v1/chat/completions", "/", "/v1/responses/"])
def test_another_path_is_not_found(start: Callable[..., Running], path: str) -> None:
    running = start(PacedEngine("OK."), api_key=("secret",))
    for key, status in (("wrong", 401), ("secret", 404)):
        with socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE) as connection:
            named = HANDSHAKE.replace(b"/v1/responses", path.encode())
            connection.sendall(named[:-2] + f"Authorization: Bearer {key}\r\n\r\n".encode())
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 %d" % status)
        assert status == 401 or b"at /v1/responses" in answer


def test_a_path_without_v1_is_a_path_as_well(running: Running) -> None:
    with socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE) as connection:
        connection.sendall(HANDSHAKE.replace(b"/v1/", b"/"))
        assert connection.recv(65536).startswith(b"HTTP/1.1 101")


@pytest.mark.parametrize(
    "sent",
    [
        HEAD + b"X: " + b"a" * 20_000 + b"\r\n\r\n",
        HEAD + b"".join(b"X-%d: a\r\n" % number for number in range(200)) + b"\r\n",
        HEAD.replace(b"/v1/", b"/" + b"v" * 20_000) + b"\r\n",
    ],
    ids=["line", "lines", "path"],
)
def test_a_handshake_that_is_refused_ends_the_connection(running: Running, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE) as connection:
        connection.sendall(sent)
        assert b"".join(iter(lambda: connection.recv(65536), b"")).startswith(b"HTTP/1.1 4")
