"""TokenStream: the pieces of one request as an async iterator."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Self

from candle_vllm.core.engine.request import GenerationRequest, TokenOutput
from candle_vllm.core.engine.thread import Delivery
from candle_vllm.core.errors import CandleVllmError


class Inbox:
    """Where the engine puts the pieces of one request; it does not keep the stream alive."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._items: deque[Delivery] = deque()
        self._arrival: asyncio.Future[None] | None = None

    def put(self, item: Delivery) -> None:
        """Takes one piece, or the error that ends the request; called in `loop`."""
        self._items.append(item)
        arrival, self._arrival = self._arrival, None
        if arrival is not None and not arrival.done():
            arrival.set_result(None)

    async def take(self) -> Delivery:
        """The next item; for one reader."""
        while not self._items:  # no asyncio.Queue: it asks for the running loop each time, a system call in 3.11
            self._arrival = self.loop.create_future()
            await self._arrival
        return self._items.popleft()


class TokenStream(AsyncIterator[TokenOutput]):
    """Iterates over the pieces of a request's sequences in the order of the steps that made them.

    Ends when every sequence has finished. Closing it, cancelling the task that waits for it, or dropping it aborts the
    request. A class rather than a generator, so that a stream that is never iterated aborts as well.

    Args:
        request: the request it belongs to.
        abort: called when the consumer goes away early.
        inbox: where the engine puts its pieces.
    """

    def __init__(self, request: GenerationRequest, abort: Callable[[], None], inbox: Inbox) -> None:
        self.request = request
        self._inbox = inbox
        self._abort = abort
        self._unfinished = request.params.n
        self._closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TokenOutput:
        if self._unfinished == 0 or self._closed:
            raise StopAsyncIteration
        try:
            item = await self._inbox.take()
        except asyncio.CancelledError:
            self._close()
            raise
        if isinstance(item, CandleVllmError):
            self._unfinished = 0
            raise item
        self._unfinished -= item.finished
        return item

    async def aclose(self) -> None:
        """Aborts the request unless it has finished."""
        self._close()

    def _close(self) -> None:
        if self._unfinished and not self._closed:
            self._closed = True
            self._abort()

    def __del__(self) -> None:
        self._close()
