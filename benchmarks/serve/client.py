# SPDX-License-Identifier: MIT
"""Streaming clients on bare sockets, cheap enough to run a thousand of them beside the server that they measure.

A client sends one request, takes the chunks of the answer apart, and notes when each token came. What it notes goes
into histograms, so that its memory does not grow with the run.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from figures import Histogram

from candle_vllm.server.bench.client import AnswerClient

_TOKEN = re.compile(rb'"delta":\{"content":" ?(?:(\d+):)?(\d+)"')
_CONTENT = b'"delta":{"content":'
STALL = 0.25  # seconds between two tokens of a stream


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


class StreamClient(AnswerClient):
    """One streamed answer.

    Args:
        request: the bytes to send.
        notes: where what is seen goes; the time to the first token also while they are not open.
    """

    def __init__(self, request: bytes, notes: Notes) -> None:
        super().__init__(request)
        self._notes = notes
        self._last = 0.0

    def failed(self, why: str) -> None:
        self._notes.failures.append(why)

    def received(self, data: bytes, now: float) -> None:
        notes = self._notes
        stamps = _TOKEN.findall(data)
        count = len(stamps) or data.count(_CONTENT)
        if not count:
            if b'"error"' in data:
                self.fail(f"{data[:200]!r}")
            return
        if not self._last:
            notes.begun += 1
            own = (int(stamps[0][1]) - int(stamps[0][0])) / 1e6 if stamps and stamps[0][0] else 0.0
            notes.first.add(now - self.sent - own)
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


def chat_request(text: str, max_tokens: int, *, close: bool = False, **fields: Any) -> bytes:
    """Return the bytes of a request for a streamed answer of `max_tokens` tokens.

    With `close`, the server closes the connection behind the answer.
    """
    body = {
        "model": "bench",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": max_tokens,
        "stream": True,
        "temperature": 0,
        "ignore_eos": True,
    }
    return _post("/v1/chat/completions", body | fields, ("connection: close",) if close else ())


def _post(path: str, body: Mapping[str, Any], headers: Sequence[str]) -> bytes:
    data = json.dumps(body).encode()
    first = (f"POST {path} HTTP/1.1", "host: bench", "content-type: application/json", f"content-length: {len(data)}")
    return "\r\n".join((*first, *headers, "", "")).encode() + data


async def connect(address: tuple[str, int], request: bytes, notes: Notes, *, read_bytes: int = 1) -> StreamClient:
    """Return a client that has sent its request.

    Args:
        read_bytes: the bytes that the client lets arrive before it reads, or fewer where the server closes the
            connection: so the clients take less of the cores that they share with the server.
    """
    loop = asyncio.get_running_loop()
    connection = socket.create_connection(address)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, read_bytes)
    connection.setblocking(False)
    _, client = await loop.create_connection(lambda: StreamClient(request, notes), sock=connection)
    return client
