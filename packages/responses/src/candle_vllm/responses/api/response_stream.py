# SPDX-License-Identifier: MIT
"""ResponseStream: events of one response, made by a separate task until the response ends or its reader leaves."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any

from candle_vllm.core.errors import EngineDeadError, EngineOverloadedError, PromptTooLongError, RequestError
from candle_vllm.openai.errors import ErrorBody, to_error
from candle_vllm.responses.api.event_writer import EventWriter
from candle_vllm.responses.conversation.channel import end_task
from candle_vllm.responses.protocol import events as wire
from candle_vllm.responses.protocol.response import Response
from candle_vllm.responses.store.entries import traced

logger = logging.getLogger(__name__)

MAX_WAITING = 64  # unread events, beyond which the task waits for a slow reader

Work = Callable[["ResponseStream"], Awaitable[None]]


class ResponseStream:
    """An iterator of events. Closing it (`aclose`) ends the response.

    Args:
        work: puts events (`put`) until the response has ended.
        input_items: items of the request, each with an id, as they are stored.
        opened: resources of the response, closed after the last event or with the stream.
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
        self.failure: Exception | None = None  # what ended the response
        self._writer = writer
        self._work = work
        self._waiting: deque[wire.StreamEvent] = deque(writer.start())
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._taken = False  # whether the model has accepted the request
        self._decided = asyncio.Event()  # set when the request is accepted, or the task has ended
        self._last: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def response(self) -> Response:
        """The response so far; complete after the last event."""
        return self._writer.response

    def opening(self) -> list[wire.StreamEvent]:
        """Return the events that exist before the start; the iterator does not repeat them."""
        opening = list(self._waiting)
        self._waiting.clear()
        return opening

    async def start(self) -> None:
        """Start the response, and return when the model has accepted the request; an earlier error is raised here."""
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
        """Raise the response's failure, if any, and drop it, because its traceback refers to the request."""
        failure, self.failure = self.failure, None
        try:
            if failure is not None:
                raise failure
        finally:
            del failure

    def begun(self) -> None:
        """Record that the request has been accepted: from now on, events report failures."""
        self._taken = True
        self._decided.set()

    async def put(self, events: list[wire.StreamEvent]) -> None:
        """Add events; once the request has been accepted, wait for a slow reader."""
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
        """End the response if it is still running. Further calls have no effect."""
        self._closed = True
        self._waiting.clear()
        self._news.set()
        try:
            if self._last is not None:
                await end_task(self._last)
        finally:
            await self.opened.aclose()

    def stop(self, error: ErrorBody) -> list[wire.StreamEvent]:
        """End a response with an error, and return its last events; the caller must then close the stream."""
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
                    logger.error("a response failed: %s", failure, exc_info=traced(failure))
                failure.__traceback__ = None  # it refers to this stream
                await self.put(self._writer.fail(to_error(failure).body.error, response_code(failure)))
        finally:
            self._closed = True
            self._decided.set()
            self._news.set()


def response_code(failure: Exception) -> str:
    """Return OpenAI's error code for the failure of a response."""
    if isinstance(failure, PromptTooLongError):
        return "context_length_exceeded"
    if isinstance(failure, RequestError):
        return "invalid_prompt"
    return "rate_limit_exceeded" if isinstance(failure, EngineOverloadedError) else "server_error"
