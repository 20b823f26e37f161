# SPDX-License-Identifier: MIT
"""Read a request's body with a limit, and wait for an answer while watching the connection.

Step 1 of a request's life. If the client disconnects, the wait for the answer is cancelled, which aborts the request in
the engine, unless the answer is for the mailbox.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from starlette.types import Receive, Scope

from candle_vllm.core.errors import CandleVllmError
from candle_vllm.openai.fair_threads import BIG, FairQueue, RequestBytes, apart, request_bytes, this_request
from candle_vllm.server.http.errors import ClientGone, HttpError
from candle_vllm.server.http.routing import Caller, caller_of

SILENCE_SECONDS = 60.0  # longest pause between two parts of a body
READING_SECONDS = 600.0  # time limit for a whole body
BIG_BODY = BIG  # bytes; a larger one is parsed in a thread, so that other streams do not wait for it

T = TypeVar("T")


class Held:
    """Counts the bytes of requests until they are tokenized: bodies, WebSocket messages, stored responses to continue.

    Also counts the part of a stored file that is being sent. The first 64 KiB of a body or message do not count, so
    that large requests never block one of usual size. One key may use half of `most`, the maximum number of bytes.
    `pieces` has the connections that wait to read the next part of a large body or message.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._by_key: dict[str, int] = {}
        self.pieces = Pieces()

    def add(self, caller: Caller, size: int) -> None:
        """Count `size` bytes, or release bytes if `size` is negative; HttpError 503 if there are too many."""
        mine = self._by_key.get(caller.label, 0) + size
        if size > 0:
            total = sum(self._by_key.values()) + size
            if total > self._most or (caller.label and mine > self._most // 2):
                who = "The server" if total > self._most else "Your key"
                message = f"{who} has no memory left for waiting bodies (--max-held-mb). Try again soon."
                raise HttpError(503, message, "overloaded", {"retry-after": "1"})
        self._by_key[caller.label] = mine
        if not mine:
            del self._by_key[caller.label]

    @contextmanager
    def waiting(self, scope: Scope) -> Iterator[RequestBytes]:
        """Count the current request's bytes until its prompt is tokenized, because its parsed body is still in memory.

        Raises HttpError 503 if there are too many bytes, also later when the request adds bytes.
        """
        mine = this_request()
        try:
            mine.hold(partial(self.add, caller_of(scope)))
            yield mine
        finally:
            mine.release()

    async def parse(self, caller: Caller, body: bytes, parse: Callable[[bytes], T]) -> T:
        """Parse a body, in a thread if it is large; its bytes, counted before, stay counted until the parser has ended.

        The thread continues even if nobody waits for it any more. Its CandleVllmError is raised without traceback and
        context, which would keep the body in memory. `this_request` then has the size of the body.
        """
        size = len(body)
        request_bytes.set(RequestBytes(size))
        if size <= BIG_BODY:
            return parse(body)
        ended = partial(self.add, caller, BIG_BODY - size)
        try:
            parsing = apart(parse, body, size=size, who=caller.label, ended=ended)
            del body
            return await parsing
        except CandleVllmError as failure:
            failure.__context__ = None
            raise failure.with_traceback(None)  # noqa: B904


class Pieces:
    """Connections that wait to read the next part of a large body or message: one per iteration of the event loop.

    In one iteration, libuv reads a socket repeatedly, up to 8 MB, so that 60 connections would block the event loop for
    seconds. Keys take turns.
    """

    def __init__(self) -> None:
        self._waiting = FairQueue[Callable[[], object]]()

    def add(self, key: str, read: Callable[[], object]) -> None:
        """Call `read` in an iteration of the event loop that no other connection uses."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._read_next)
        self._waiting.add(key, read)

    async def turn(self, key: str) -> None:
        """Wait for an iteration of the event loop in which no other connection reads."""
        mine = asyncio.get_running_loop().create_future()
        self.add(key, lambda: mine.done() or mine.set_result(None))
        await mine

    def _read_next(self) -> None:
        read = self._waiting.take()
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._read_next)
        if read is not None:
            read()


async def parse_request(
    scope: Scope, receive: Receive, limit: int, parse: Callable[[bytes], T], *, typed: bool = True
) -> T:
    """Return the parsed JSON body of a request; of a body of more than `limit` bytes, the rest is not read.

    `typed` requires the JSON content type, which web pages of other origins cannot send without a CORS preflight.

    Raises:
        HttpError: 415 other content type, or compressed; 400 invalid length; 413 too large; 408 too slow; 503 `Held`.
        ClientGone: the client disconnected before the end of the body.
    """
    headers = dict(scope["headers"])
    if typed and headers.get(b"content-type", b"").split(b";")[0].strip().lower() != b"application/json":
        raise HttpError(415, "The body must be JSON: send the header `Content-Type: application/json`.",
                        "unsupported_media_type")  # fmt: skip
    if headers.get(b"content-encoding", b"identity").strip().lower() not in (b"identity", b""):
        raise HttpError(415, "The body must not be compressed: leave the header Content-Encoding out.",
                        "unsupported_media_type", param="Content-Encoding")  # fmt: skip
    length = headers.get(b"content-length", b"0")
    if not length.isdigit():
        raise HttpError(400, "The Content-Length header is not a number.", "invalid_content_length")
    if len(length) > 15 or int(length) > limit:
        raise _too_large(limit)
    held = 0
    try:
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(READING_SECONDS):
                size, more = 0, True
                while more:
                    if held:
                        await scope["app"].state.held.pieces.turn(caller_of(scope).label)
                    async with asyncio.timeout(SILENCE_SECONDS):
                        message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    part, more = message.get("body", b""), message.get("more_body", False)
                    size += len(part)
                    if size > limit:
                        raise _too_large(limit)
                    if size > BIG_BODY:
                        scope["app"].state.held.add(caller_of(scope), size - BIG_BODY - held)
                        held = size - BIG_BODY
                    parts.append(part)
        except TimeoutError:
            raise HttpError(
                408, "The body did not arrive in time; send it without long pauses.", "request_timeout",
                {"connection": "close"},
            ) from None  # fmt: skip
        parts[:] = [b"".join(parts)]
        held = 0  # `Held.parse` releases the bytes once the body is parsed
        return await scope["app"].state.held.parse(caller_of(scope), parts.pop(), parse)
    finally:
        if held:
            scope["app"].state.held.add(caller_of(scope), -held)


async def disconnected(receive: Receive) -> None:
    """Return when the client has disconnected; the body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_disconnected(
    answer: Awaitable[T], receive: Receive, dropped: Callable[[T], Awaitable[object] | None] | None = None
) -> T:
    """Return the answer; a disconnect cancels it and raises ClientGone. The request's body must have been read.

    `dropped` is called with an answer that is completed after a disconnect or a cancellation, and that nobody will use.
    """
    working = asyncio.ensure_future(answer)
    watching = asyncio.ensure_future(disconnected(receive))
    taken = False
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        taken = working.done()
        if taken:
            return working.result()
        raise ClientGone
    finally:
        watching.cancel()
        if not taken:
            working.cancel()
            await asyncio.wait({working})
            if not working.cancelled() and working.exception() is None and dropped is not None:
                closing = dropped(working.result())
                if closing is not None:
                    await closing
        del working  # its exception refers to this frame


def _too_large(limit: int) -> HttpError:
    large = limit >= 1 << 20  # smaller limits are no setting
    size, advice = (f"{limit >> 20} MB", ", or raise --max-body-mb") if large else (f"{limit >> 10} KB", "")
    return HttpError(
        413,
        f"The body is larger than {size}. Send less{advice}.",
        "request_too_large",
        {"connection": "close"},  # the rest of the body is not read
    )
