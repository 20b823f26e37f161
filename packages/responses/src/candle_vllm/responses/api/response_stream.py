# SPDX-License-Identifier: MIT
"""ResponseStream: the events of one response, made by a task of its own until its reader has them or leaves."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any

from candle_vllm.core.errors import (
    EngineDeadError,
    EngineOverloadedError,
    PromptTooLongError,
    RequestError,
)
from candle_vllm.openai import to_error
from candle_vllm.responses.api.event_writer import EventWriter
from candle_vllm.responses.conversation.channel import end_task
from candle_vllm.responses.protocol import events as wire
from candle_vllm.responses.protocol.response import Response

logger = logging.getLogger(__name__)

MAX_WAITING = 64  # events that a slow reader has not taken, before nothing more is generated

Work = Callable[["ResponseStream"], Awaitable[None]]


class ResponseStream:
    """An iterator of events. Close it (`aclose`) when the reader goes away: that ends the response.

    Args:
        writer: writes the events.
        work: puts events (`put`) until the response has ended.
        input_items: of the request, each with an id, as they are kept.
        opened: what the response uses: closed behind the last event, or with the stream.

    Attributes:
        input_items, opened: as given.
        failure: what the response failed with, or None.
    """

    def __init__(
        self,
        writer: EventWriter,
        work: Work,
        input_items: Sequence[Mapping[str, Any]] = (),
        *,
        opened: AsyncExitStack | None = None,
    ) -> None:
        self.opened = opened or AsyncExitStack()
        self.input_items = input_items
        self.failure: Exception | None = None
        self._writer = writer
        self._work = work
        self._waiting: deque[wire.StreamEvent] = deque(writer.start())
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._taken = False  # the request has been
        self._decided = asyncio.Event()  # it has been, or it never will
        self._last: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def response(self) -> Response:
        """The response as it stands; complete after the last event."""
        return self._writer.response

    def opening(self) -> list[wire.StreamEvent]:
        """The events that there are before it is started; they do not come again."""
        opening = list(self._waiting)
        self._waiting.clear()
        return opening

    async def start(self) -> None:
        """Begins; returns when the request has been taken, so that what is wrong with it is raised here.

        Raises:
            CandleVllmError: what the first turn of the model was refused with.
        """
        self._last = asyncio.create_task(self._run(), name="response")
        try:
            await self._decided.wait()
        except BaseException:
            await self.aclose()
            raise
        if not self._taken and self.failure is not None:
            await self.aclose()
            self.raise_failure()

    def raise_failure(self) -> None:
        """Raises what the response failed with, if it did, and keeps it no longer: its traceback has the request."""
        failure, self.failure = self.failure, None
        try:
            if failure is not None:
                raise failure
        finally:
            del failure

    def begun(self) -> None:
        """The request has been taken: from here on failures are told in events."""
        self._taken = True
        self._decided.set()

    async def put(self, events: list[wire.StreamEvent]) -> None:
        """Adds events; waits where the reader is slow."""
        self._waiting += events
        self._news.set()
        while len(self._waiting) > MAX_WAITING and self._taken:
            self._room.clear()
            await self._room.wait()

    def __aiter__(self) -> ResponseStream:
        return self

    async def __anext__(self) -> wire.StreamEvent:
        while not self._waiting:
            if self._closed or self._last is None or self._last.done():
                await self.opened.aclose()
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        event = self._waiting.popleft()
        self._room.set()
        return event

    async def aclose(self) -> None:
        """Ends the response if it is still running. Idempotent."""
        self._closed = True
        self._waiting.clear()
        self._news.set()
        if self._last is not None:
            await end_task(self._last)
        await self.opened.aclose()

    def stop(self, error: wire.ErrorDetail) -> list[wire.StreamEvent]:
        """The last events of a response that its caller ends for a reason of its own; then close it."""
        self._closed = True
        if self._last is not None:
            self._last.cancel()
        left = list(self._waiting)
        self._waiting.clear()
        return left if self._writer.concluded else [*left, *self._writer.fail(error, "server_error")]

    async def _run(self) -> None:
        try:
            await self._work(self)
        except Exception as failure:
            self.failure = failure
            if self._taken:
                if to_error(failure).status >= 500 and not isinstance(failure, EngineDeadError):
                    logger.error("a response failed", exc_info=failure)
                failure.__traceback__ = None  # it holds this stream
                await self.put(self._writer.fail(error_detail(failure), response_code(failure)))
        finally:
            self._closed = True
            self._decided.set()
            self._news.set()


def error_detail(failure: Exception) -> wire.ErrorDetail:
    """What may be told of a failure, as in the envelope of a failed request."""
    body = to_error(failure).body.error
    return wire.ErrorDetail(type=body.type, code=body.code, message=body.message, param=body.param)


def response_code(failure: Exception) -> str:
    """The word for a failure in a response, as OpenAI has it."""
    if isinstance(failure, PromptTooLongError):
        return "context_length_exceeded"
    if isinstance(failure, RequestError):
        return "invalid_prompt"
    return "rate_limit_exceeded" if isinstance(failure, EngineOverloadedError) else "server_error"
