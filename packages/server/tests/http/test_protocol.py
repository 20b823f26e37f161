# SPDX-License-Identifier: MIT
"""Requests that are sent one behind the other on a connection, and what is no request behind one that is."""

from __future__ import annotations

import json
import re
import socket
from typing import Any

import pytest

from candle_vllm.server.http import protocol
from packages.server.tests.server_fakes import PacedEngine
from tests.waiting import PATIENCE

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
    passed: list[int] = []
    write = protocol._ChunkedBody.write  # pyright: ignore[reportPrivateUsage]

    def noted(self: Any, data: bytes) -> None:
        passed.append(len(data))
        write(self, data)

    monkeypatch.setattr(protocol._ChunkedBody, "write", noted)  # pyright: ignore[reportPrivateUsage]
    request = _request(stream=True, max_tokens=200, stream_options={"include_usage": True}).replace(
        b"Host", b"Connection: close\r\nHost"
    )
    direct = _events(_answers(start(PacedEngine(words, pause=0.005)).port, request))
    assert len(passed) >= len(words) - 1
    monkeypatch.setattr(protocol._ChunkedBody, "is_free", lambda _: False)  # pyright: ignore[reportPrivateUsage]
    assert direct == _events(_answers(start(PacedEngine(words, pause=0.005)).port, request))
