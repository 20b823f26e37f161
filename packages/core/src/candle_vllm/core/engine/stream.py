"""TokenStream: the pieces of one request as an async iterator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Self

from candle_vllm.core.engine.request import GenerationRequest, TokenOutput
from candle_vllm.core.errors import EngineDeadError


class Inbox:
    """Where the engine puts the pieces of one request; it does not keep the stream alive."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.items: asyncio.Queue[TokenOutput | EngineDeadError] = asyncio.Queue()

    def put(self, item: TokenOutput | EngineDeadError) -> None:
        """Takes one piece, or the error that ends everything; called in `loop`."""
        self.items.put_nowait(item)


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
            item = await self._inbox.items.get()
        except asyncio.CancelledError:
            self._close()
            raise
        if isinstance(item, EngineDeadError):
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
