# SPDX-License-Identifier: MIT
"""Reading a request's body with a limit, and waiting for an answer while watching the connection.

Step 1 of a request's life, and the client-gone edge of the picture: a disconnect cancels the waiting, which aborts
the request in the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from starlette.types import Receive, Scope

from candle_vllm.server.http.errors import ClientGone, HttpError

SILENCE_SECONDS = 60.0  # between two pieces of a body
READING_SECONDS = 600.0  # for a whole body

T = TypeVar("T")


async def read_body(scope: Scope, receive: Receive, limit: int, *, typed: bool = True) -> bytes:
    """The JSON body of a request, at most `limit` bytes; more is refused before it is held in memory.

    `typed` wants its content type, which pages from elsewhere cannot send without being asked first.

    Raises:
        HttpError: 415 for another content type, 400 for a broken length, 413 when too large, 408 when too slow.
        ClientGone: the client left while sending.
    """
    headers = dict(scope["headers"])
    media_type = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if typed and media_type != b"application/json":
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
    try:
        async with asyncio.timeout(READING_SECONDS):
            return await _read_parts(receive, limit)
    except TimeoutError:
        raise HttpError(
            408, "The body did not arrive in time; send it without long pauses.", "request_timeout",
            {"connection": "close"},
        ) from None  # fmt: skip


async def _read_parts(receive: Receive, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        async with asyncio.timeout(SILENCE_SECONDS):
            message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


async def disconnected(receive: Receive) -> None:
    """Returns when the client has gone; the body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_disconnected(
    answer: Awaitable[T], receive: Receive, dropped: Callable[[T], Awaitable[object] | None] | None = None
) -> T:
    """The answer; a disconnect cancels it and raises ClientGone.

    Args:
        answer: what is waited for.
        receive: of the ASGI connection; the body must have been read.
        dropped: given an answer that came while the waiting was cancelled, so that nobody takes it.
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


def _too_large(limit: int) -> HttpError:
    return HttpError(
        413,
        f"The body is larger than {limit >> 20} MB. Send less, or raise --max-body-mb.",
        "request_too_large",
        {"connection": "close"},  # what is left of the body is not read
    )
