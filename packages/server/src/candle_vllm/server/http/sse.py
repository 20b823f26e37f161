# SPDX-License-Identifier: MIT
"""Streamed answers: an adapter's chunks -> server-sent events or JSON lines on the connection.

Step 10 of a request's life. Pure ASGI: keep-alives fill a silence, a failure in mid-stream is sent as an event, and a
disconnect closes the chunks, which aborts the request in the engine, unless its answer is for the mailbox. Slow
clients, deadlines and the server's shutdown are handled here, for every API.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from candle_vllm.core.engine.step.stream import PushStream, Receiver
from candle_vllm.core.errors import RequestAbortedError
from candle_vllm.openai.answers import ChunkStream
from candle_vllm.openai.json_body import to_json_bytes
from candle_vllm.server.http.body import disconnected
from candle_vllm.server.http.errors import took_too_long

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE_SECONDS = 15.0
MAX_BUFFERED = 1 << 20  # bytes that wait for a slow client before no more chunks are read

_HEADERS = {
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # otherwise a proxy would buffer the tokens
}

logger = logging.getLogger(__name__)


def data_event(data: bytes | msgspec.Struct) -> bytes:
    """Encode one event without a name; `data` has no line breaks if it is bytes."""
    return b"data: " + (data if isinstance(data, bytes) else to_json_bytes(data)) + b"\n\n"


def named_event(name: str, data: bytes) -> bytes:
    """Encode one event with a name; `data` has no line breaks."""
    return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"


WRITE_PART = "candle_vllm.write_part"
"""The ASGI extension by which the HTTP protocol of this server provides a `WritePart`."""

WritePart = Callable[[bytes], bool]
"""Writes a part of a response body, neither empty nor the last, at once; False if that is not possible now.

The layers around a route see only ASGI messages: the beginning and the end of a response, and parts for a slow client.
Passing each part through the layers would take longer than all other work between the engine and the connection.
"""


@dataclass(frozen=True)
class StreamForm:
    """How one API encodes a stream.

    Attributes:
        event: encodes a chunk as an event.
        error: encodes an exception as an event, the last one.
        done: the last event of a stream that does not fail.
        silence: makes the event that fills a silence; the default is a comment, which clients ignore.
        media_type: the content type.
    """

    event: Callable[[Any], bytes]
    error: Callable[[Exception], bytes]
    done: bytes = DONE
    silence: Callable[[], bytes] = lambda: KEEP_ALIVE
    media_type: str = "text/event-stream"


def lines_form(error: Callable[[Exception], bytes]) -> StreamForm:
    """Return the form of JSON lines. A space fills a silence, which readers of the next line skip."""
    return StreamForm(lambda line: to_json_bytes(line) + b"\n", error, b"", lambda: b" ", "application/x-ndjson")


class EventStream(Response):
    """A response that sends each chunk as one event: the last stage of a chain (`Receiver` in core's `step/stream.py`).

    Chunks of a `PushStream` are written in the loop iteration in which they arrive. If the client does not keep up,
    the chunks wait; beyond `MAX_BUFFERED` bytes, the request's sink in core queues the outputs, up to `MAX_UNREAD`.

    Args:
        chunks: a `PushStream` or an iterator. Its `aclose` is called at the end of the stream. Its `delivered`, if it
            has one, is called before that, if everything was sent to the client.
        form: encodes the chunks, or the exception that ends them.
        deadline: `time.monotonic()` at which the stream ends with an error.
        released: called when nothing more is read from `chunks`, and again at the end of the stream.
        keep_alive: seconds of silence before `form.silence` is sent.
    """

    status_code = 200
    background = None
    _buffered = 0
    _held = False  # the sink of the request queues further outputs
    _idle: asyncio.Future[None] | None = None  # done once `_write` has something to write, or at the end
    _idle_since = 0.0  # time of the loop's clock
    _timer: asyncio.TimerHandle | None = None
    _ended = False
    _complete = False  # the last message has been sent
    _write_part: WritePart | None = None

    def __init__(
        self,
        chunks: AsyncIterator[Any],
        form: StreamForm,
        *,
        deadline: float | None = None,
        released: Callable[[], object] = lambda: None,
        keep_alive: float = KEEP_ALIVE_SECONDS,
    ) -> None:
        self.media_type = form.media_type
        self.init_headers(_HEADERS)
        source = chunks.encoded(form.event) if isinstance(chunks, ChunkStream) else chunks
        self._event = form.event if source is chunks else bytes
        self._chunks = source if isinstance(source, PushStream) else _Iterated(source)
        self._form = form
        self._deadline = deadline
        self._released = released
        self._keep_alive = keep_alive
        self._pending: list[bytes] = []
        self._delivered: Callable[[], object] | None = getattr(chunks, "delivered", None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._loop = asyncio.get_running_loop()
        watcher = asyncio.create_task(disconnected(receive))
        watcher.add_done_callback(lambda _: self._end())
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            self._write_part = scope.get("extensions", {}).get(WRITE_PART)
            self._chunks.push(self)
            self._watch_time()
            await self._write(send, watcher)
        except asyncio.CancelledError:
            self._end()
            if not self._complete:
                stopped = RequestAbortedError("The server was stopped before the answer was complete.")
                await send({"type": "http.response.body", "body": self._form.error(stopped), "more_body": False})
            raise
        finally:
            await asyncio.shield(self._close(watcher))

    def put(self, items: Sequence[Any]) -> None:
        """Write chunks, at once if nothing waits before them and the client keeps up."""
        try:
            data = self._event(items[0]) if len(items) == 1 else b"".join(map(self._event, items))
            if self._idle is not None and data and self._write_part is not None and self._write_part(data):
                self._idle_since = self._loop.time()
                return
            self._push(data)
        except Exception as failure:
            self.end(failure)
        if self._buffered > MAX_BUFFERED:
            self._held = True
            self._chunks.hold(True)

    def end(self, error: Exception | None = None) -> None:
        self._finish(error)
        self._released()

    def _finish(self, error: Exception | None) -> None:
        if not self._ended:
            if error is not None:
                logger.debug("stream ended by %r", error)
            self._pending.append(self._form.done if error is None else self._form.error(error))
            self._end()

    async def _write(self, send: Send, watcher: asyncio.Task[None]) -> None:
        """Send what could not be written at once, and the last message."""
        while True:
            if not self._pending and not self._ended:
                self._idle_since = self._loop.time()
                self._idle = self._loop.create_future()
                await self._idle
            if watcher.done():
                return
            ended, data = self._ended, b"".join(self._pending)
            self._pending.clear()
            self._buffered = 0
            if self._held:
                self._held = False
                self._chunks.hold(False)
            # `delivered` is called after an empty last message of its own; sending this waits for a slow client.
            last = ended and not (data and self._delivered)
            if last or self._write_part is None or not self._write_part(data):
                await send({"type": "http.response.body", "body": data, "more_body": not last})
            self._complete = last
            if last:
                if self._delivered is not None and not watcher.done():
                    self._delivered()
                return

    def _push(self, data: bytes) -> None:
        if data and not self._ended:
            self._pending.append(data)
            self._buffered += len(data)
            self._wake()

    def _watch_time(self) -> None:
        """Fill a silence, and end a stream that is too late, with one timer for the stream, not one for each event."""
        if self._ended:
            return
        left = float("inf") if self._deadline is None else self._deadline - time.monotonic()
        if left <= 0:
            self._delivered = None
            self._finish(took_too_long())
            return
        silence = self._loop.time() - self._idle_since if self._idle is not None else 0.0
        if silence >= self._keep_alive:
            self._push(self._form.silence())
            silence = 0.0
        self._timer = self._loop.call_later(min(left, self._keep_alive - silence), self._watch_time)

    def _end(self) -> None:
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        idle, self._idle = self._idle, None
        if idle is not None and not idle.done():
            idle.set_result(None)

    async def _close(self, watcher: asyncio.Task[None]) -> None:
        """Stop all tasks, then close the chunks, even if the first chunk was never read."""
        self._end()
        if self._timer is not None:
            self._timer.cancel()
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
        await self._chunks.aclose()
        self._released()


class _Iterated(PushStream[Any]):
    """Pushes the items of an iterator."""

    _task: asyncio.Task[None] | None = None

    def __init__(self, items: AsyncIterator[Any]) -> None:
        self._items = items
        self._free = asyncio.Event()  # set while the receiver takes items
        self._free.set()

    def push(self, receiver: Receiver[Any]) -> None:
        self._task = asyncio.create_task(self._iterate(receiver))

    async def _iterate(self, receiver: Receiver[Any]) -> None:
        try:
            async for item in self._items:
                receiver.put((item,))
                await self._free.wait()
        except Exception as failure:
            receiver.end(failure)
        else:
            receiver.end()

    def hold(self, held: bool) -> None:
        if held:
            self._free.clear()
        else:
            self._free.set()

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def aclose(self) -> None:
        """Stop reading and close the iterator."""
        self.close()
        if self._task is not None:
            await asyncio.wait({self._task})
        close = getattr(self._items, "aclose", None)
        if close is not None:
            with contextlib.suppress(RuntimeError):  # a generator that is being closed already
                await close()
