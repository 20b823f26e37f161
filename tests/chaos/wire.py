# SPDX-License-Identifier: MIT
"""A client that misbehaves on purpose: requests as bytes, answers read at any pace or not at all."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

MAX_ANSWER = 64 << 20  # bytes
_PIECE = 64 << 10


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        status: None where the connection ended before a whole head.
        headers: by lower-case name.
        body: as far as it was read, without the framing of chunks.
        complete: the answer was read to its end.
    """

    status: int | None = None
    headers: dict[str, str] | None = None
    body: bytes = b""
    complete: bool = False

    def header(self, name: str) -> str:
        """A header's value; "" where it is missing."""
        return (self.headers or {}).get(name, "")


@dataclass(frozen=True)
class Pace:
    """How a client reads: pieces of so many bytes, with a pause after each, up to so many bytes in all."""

    piece: int = _PIECE
    pause: float = 0.0
    enough: int = MAX_ANSWER


class Connection:
    """One connection to the server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        """Writes; that the server has hung up is seen when the answer is read."""
        with contextlib.suppress(ConnectionError):
            self._writer.write(data)
            await self._writer.drain()

    async def send_slowly(self, data: bytes, pieces: int, pause: float) -> None:
        """Writes in so many pieces, with a pause after each."""
        size = -(-len(data) // pieces)
        for start in range(0, len(data), size):
            await self.send(data[start : start + size])
            await asyncio.sleep(pause)

    async def answer(self, pace: Pace | None = None) -> Answer:
        """Reads one answer, or as much of it as `pace` wants or the server sends."""
        pace = pace or Pace()
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            return Answer()
        first, *lines = head.decode("latin-1").split("\r\n")[:-2]
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        status = int(first.split()[1])
        body = bytearray()
        try:
            complete = await self._read_body(headers, body, pace)
        except (asyncio.IncompleteReadError, ConnectionError):
            complete = False
        return Answer(status, headers, bytes(body), complete)

    async def everything(self, seconds: float) -> bytes:
        """What comes until the server hangs up, or for so long."""
        data = bytearray()
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(seconds):
                while (piece := await self._reader.read(_PIECE)) and len(data) < MAX_ANSWER:
                    data += piece
        return bytes(data)

    async def _read_body(self, headers: dict[str, str], body: bytearray, pace: Pace) -> bool:
        if headers.get("transfer-encoding") != "chunked":
            return await self._read_part(int(headers.get("content-length", "0")), body, pace)
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            if not await self._read_part(size, body, pace):
                return False
            await self._reader.readexactly(2)
        await self._reader.readexactly(2)
        return True

    async def _read_part(self, size: int, body: bytearray, pace: Pace) -> bool:
        while size:
            part = await self._reader.readexactly(min(size, pace.piece))
            body += part
            size -= len(part)
            if len(body) >= pace.enough:
                return False
            if pace.pause:
                await asyncio.sleep(pace.pause)
        return True


@contextlib.asynccontextmanager
async def connect(port: int) -> AsyncIterator[Connection]:
    """A connection that is cut, not closed politely, when the block is left early."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Connection(reader, writer)
    finally:
        writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def request_bytes(method: str, path: str, body: bytes, headers: dict[str, str]) -> bytes:
    """One HTTP/1.1 request."""
    lines = [f"{method} {path} HTTP/1.1", "host: localhost", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body
