"""Server-sent events: an adapter's chunks -> bytes on the connection.

Step 10 of a request's life. Pure ASGI: chunks that are ready in the same tick leave in one write, silence is
broken by a comment, a failure in mid-stream is an event of its own, and a disconnect closes the chunks, which
aborts the request in the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from candle_vllm.core.errors import RequestAbortedError
from candle_vllm.server.body import disconnected

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE_SECONDS = 15.0
MAX_BUFFERED = 1 << 20  # bytes waiting for a slow client before its chunks are no longer taken

_HEADERS = {
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # a buffering proxy would hold the tokens back
}

logger = logging.getLogger(__name__)


class EventStream(Response):
    """A response that sends each chunk as one `data:` event, then `data: [DONE]`.

    Args:
        chunks: what to send; its `aclose` is called however the stream ends.
        encode: a chunk as JSON bytes, without line ends.
        error: an exception of `chunks` as the JSON bytes of an error event; the stream ends after it.
        keep_alive: seconds of silence before a comment is sent.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncIterator[Any],
        encode: Callable[[Any], bytes],
        error: Callable[[Exception], bytes],
        keep_alive: float = KEEP_ALIVE_SECONDS,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers(_HEADERS)
        self._chunks = chunks
        self._encode = encode
        self._error = error
        self._keep_alive = keep_alive
        self._pending: list[bytes] = []
        self._buffered = 0
        self._filled = asyncio.Event()  # something to write, or the end
        self._drained = asyncio.Event()  # the producer may go on
        self._ended = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        producer = asyncio.create_task(self._produce())
        watcher = asyncio.create_task(disconnected(receive))
        watcher.add_done_callback(lambda _: self._end())
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await self._write(send, watcher)
        except asyncio.CancelledError:
            await self._last_words(send)
            raise
        finally:
            await asyncio.shield(self._close(producer, watcher))

    async def _write(self, send: Send, watcher: asyncio.Task[None]) -> None:
        while not watcher.done():
            try:
                async with asyncio.timeout(self._keep_alive):
                    await self._filled.wait()
            except TimeoutError:
                if not self._pending:  # a chunk may have come in the same tick as the time
                    self._pending.append(KEEP_ALIVE)
            if watcher.done():
                return
            self._filled.clear()
            ended, data = self._ended, b"".join(self._pending)
            self._pending.clear()
            self._buffered = 0
            self._drained.set()
            await send({"type": "http.response.body", "body": data, "more_body": not ended})
            if ended:
                return

    async def _last_words(self, send: Send) -> None:
        """Tells the client of a stream that is cut off by the server's end."""
        data = self._error(RequestAbortedError("The server was stopped before the answer was complete."))
        await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": False})

    async def _produce(self) -> None:
        try:
            async for chunk in self._chunks:
                self._push(b"data: " + self._encode(chunk) + b"\n\n")
                while self._buffered > MAX_BUFFERED:
                    self._drained.clear()
                    await self._drained.wait()
            self._push(DONE)
        except Exception as failure:
            logger.debug("stream ended by %r", failure)
            self._push(b"data: " + self._error(failure) + b"\n\n")
        finally:
            self._end()

    def _push(self, data: bytes) -> None:
        self._pending.append(data)
        self._buffered += len(data)
        self._filled.set()

    def _end(self) -> None:
        self._ended = True
        self._filled.set()

    async def _close(self, producer: asyncio.Task[None], watcher: asyncio.Task[None]) -> None:
        """Stops both tasks, then closes the chunks: also when they were never asked for the first one."""
        for task in (producer, watcher):
            task.cancel()
        await asyncio.gather(producer, watcher, return_exceptions=True)
        close = getattr(self._chunks, "aclose", None)
        if close is not None:
            with contextlib.suppress(RuntimeError):  # a generator that is being closed already
                await close()
