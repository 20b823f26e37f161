"""What a server sends, on its way to the SDK: its end is noticed, its pace and its rubbish are bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import anyio
from mcp.shared.message import SessionMessage

CLOSED = "the server closed the connection"
MAX_PER_SECOND = 2000  # messages; a server that sends more waits, and with it nobody else
MAX_RUBBISH = 1000  # things that are no messages, one after the other


class WatchedStream:
    """A transport's read stream that tells when it ends.

    The SDK closes what waits on a connection and says nothing to the one who opened it: an owner that does not look
    here would hold a dead connection until the next call.

    Args:
        inner: the transport's read stream.
        ended: called with a sentence when the stream ends; more than once is possible.
        log: gets a line for each thing that is no message.
    """

    def __init__(self, inner: Any, ended: Callable[[str], None], log: Callable[[str], None]) -> None:
        self._inner = inner
        self._ended = ended
        self._log = log
        self._rubbish = 0
        self._count = 0
        self._since = 0.0

    @property
    def last_context(self) -> Any:
        """The context of the sender, which the SDK takes over where its own streams have one."""
        return getattr(self._inner, "last_context", None)

    async def receive(self) -> SessionMessage | Exception:
        """The next message; `anyio.EndOfStream` at the end."""
        try:
            item = await self._inner.receive()
        except (anyio.EndOfStream, anyio.ClosedResourceError, anyio.BrokenResourceError):
            self._ended(CLOSED)
            raise
        await self._pace()
        self._rubbish = self._rubbish + 1 if isinstance(item, Exception) else 0
        if isinstance(item, Exception):
            self._log(f"not a message of the protocol: {str(item)[:300]}")
        if self._rubbish >= MAX_RUBBISH:
            self._ended(f"the server sent {MAX_RUBBISH} things in a row that are no messages of the protocol")
            raise anyio.EndOfStream
        return item

    async def _pace(self) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._since >= 1.0:
            self._since, self._count = now, 0
        self._count += 1
        if self._count > MAX_PER_SECOND:
            await asyncio.sleep(max(0.0, self._since + 1.0 - now))

    async def aclose(self) -> None:
        """Closes the inner stream."""
        await self._inner.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> SessionMessage | Exception:
        try:
            return await self.receive()
        except anyio.EndOfStream:
            raise StopAsyncIteration from None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()
