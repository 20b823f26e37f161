"""Streaming clients on bare sockets, cheap enough to run a thousand of them beside the server that they measure.

A client sends one request, takes the chunks of the answer apart, and notes when each token came. What it notes goes
into histograms, so that its memory does not grow with the run.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Mapping
from typing import Any, cast

from figures import Histogram

_TOKEN = re.compile(rb'"delta":\{"content":" ?(?:(\d+):)?(\d+)"')
_CONTENT = b'"delta":{"content":'
STALL = 0.25  # seconds between two tokens of a stream
BUFFER = 1 << 20


class Notes:
    """What a group of clients sees.

    Attributes:
        open: whether what comes is to be counted.
        begun: streams that had their first token.
        tokens: pieces with content.
        gaps: seconds between two tokens of a stream.
        delays: seconds from a token's time in the engine to its arrival, where the engine writes it down.
        first: seconds to the first token, less what the engine took for it where that is known.
        stalls: gaps above `STALL`.
        failures: answers that were no stream.
    """

    def __init__(self) -> None:
        self.gaps, self.delays, self.first = Histogram(), Histogram(), Histogram()
        self.tokens = self.stalls = self.begun = 0
        self.failures: list[str] = []
        self.open = False


class StreamClient(asyncio.Protocol):
    """One streamed answer.

    Args:
        request: the bytes to send.
        notes: where what is seen goes; the time to the first token also while they are not open.
    """

    def __init__(self, request: bytes, notes: Notes) -> None:
        self._request = request
        self._notes = notes
        self._buffer = b""
        self._in_body = False
        self._sent = self._last = 0.0
        self.transport: asyncio.Transport | None = None
        self.done: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is none by its class
        self._sent = time.monotonic()
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        data = self._buffer + data
        if not self._in_body:
            head, mark, data = data.partition(b"\r\n\r\n")
            if not mark:
                self._buffer = head
                return
            if not head.startswith(b"HTTP/1.1 200"):
                self._fail(f"{head[:40]!r} {data[:200]!r}")
                return
            self._in_body = True
        self._buffer = self._chunks(data, now)
        if len(self._buffer) > BUFFER:
            self._fail("a chunk without end")

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"the connection was closed: {exc}")

    def _chunks(self, data: bytes, now: float) -> bytes:
        """Reads whole chunks; the rest that is not whole."""
        at = 0
        while True:
            line = data.find(b"\r\n", at)
            if line < 0:
                return data[at:]
            size = int(data[at:line], 16)
            start, end = line + 2, line + 2 + size
            if len(data) < end + 2:
                return data[at:]
            if size == 0:
                self._finish(now)
                return b""
            self._events(data[start:end], now)
            at = end + 2

    def _events(self, body: bytes, now: float) -> None:
        notes = self._notes
        stamps = _TOKEN.findall(body)
        count = len(stamps) or body.count(_CONTENT)
        if not count:
            if b'"error"' in body:
                self._fail(f"{body[:200]!r}")
            return
        if not self._last:
            notes.begun += 1
            own = (int(stamps[0][1]) - int(stamps[0][0])) / 1e6 if stamps and stamps[0][0] else 0.0
            notes.first.add(now - self._sent - own)
        elif notes.open:
            gap = now - self._last
            notes.gaps.add(gap)
            notes.gaps.add(0.0, count - 1)
            notes.stalls += gap > STALL
        if notes.open:
            notes.tokens += count
            for _, made in stamps:
                notes.delays.add(now - int(made) / 1e6)
        self._last = now

    def _finish(self, now: float) -> None:
        if not self.done.done():
            self.done.set_result(now - self._sent)
        self._close()

    def _fail(self, why: str) -> None:
        if not self.done.done():
            self._notes.failures.append(why)
            self.done.set_result(float("nan"))
        self._close()

    def _close(self) -> None:
        if self.transport is not None:
            self.transport.close()

    def leave(self) -> None:
        """Goes away in the middle of the answer."""
        if not self.done.done():
            self.done.set_result(float("nan"))
        self._close()


def chat_request(text: str, max_tokens: int, **fields: Any) -> bytes:
    """A request for a streamed answer of so many tokens, as bytes."""
    body = {
        "model": "bench",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": max_tokens,
        "stream": True,
        "temperature": 0,
        "ignore_eos": True,
    }
    return _post("/v1/chat/completions", body | fields)


def _post(path: str, body: Mapping[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n"
    return head.encode() + b"\r\n" + data


async def connect(address: tuple[str, int], request: bytes, notes: Notes) -> StreamClient:
    """A client whose request is under way."""
    loop = asyncio.get_running_loop()
    _, client = await loop.create_connection(lambda: StreamClient(request, notes), *address)
    return client
