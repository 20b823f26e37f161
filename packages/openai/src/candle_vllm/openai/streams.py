# SPDX-License-Identifier: MIT
"""Streams of events and chunks that abort their requests when they are closed, begun or not."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from candle_vllm.core.engine.outputs import TokenOutput
from candle_vllm.core.engine.step.stream import MAX_UNREAD
from candle_vllm.openai.answers import AnswerReader
from candle_vllm.openai.engine import TokenStream
from candle_vllm.openai.events import Event

ChunkT = TypeVar("ChunkT")
_ChunkT_co = TypeVar("_ChunkT_co", covariant=True)
_Piece = tuple[int, TokenOutput] | BaseException | None  # None: one stream has ended


class Writer(Protocol[_ChunkT_co]):
    """Writes events in the words of an API."""

    def write(self, events: Sequence[Event]) -> Sequence[_ChunkT_co]: ...


class AnswerStream:
    """The events of one answer, as pieces of one or more engine streams come. Close it (`aclose`) when the reader goes
    away: that aborts the request.

    It closes itself when it ends or fails.

    Attributes:
        prompt: tokens of the first prompt.
    """

    def __init__(self, sources: Sequence[TokenStream], reader: AnswerReader, prompt: Sequence[int] = ()) -> None:
        self.prompt = prompt
        self._sources = sources
        self._reader = reader
        self._ready: deque[Event] = deque()
        self._closed = False
        self._failures: list[Exception] = []  # of the shortcut, for the reader
        self._pieces: asyncio.Queue[_Piece] = asyncio.Queue(MAX_UNREAD)  # then those of a source are its own
        self._open = len(sources)
        # One stream, the usual case, is read directly and costs no task.
        pumped = enumerate(sources) if len(sources) > 1 else ()
        self._tasks = [asyncio.create_task(self._pump(number, source)) for number, source in pumped]

    def __aiter__(self) -> AnswerStream:
        return self

    async def __anext__(self) -> Event:
        while not self._ready:
            events = await self.read()
            if events is None:
                raise StopAsyncIteration
            self._ready.extend(events)
        return self._ready.popleft()

    async def read(self) -> Sequence[Event] | None:
        """The events of the next piece, which may be none; None behind the last ones."""
        if self._closed:
            return None
        try:
            number, piece = await self._next()
            if self._failures:
                raise self._failures.pop()  # it holds this stream
            return self._reader.add(number, piece)
        except StopAsyncIteration:
            await self.aclose()
            return self._reader.end()
        except BaseException:
            await self.aclose()
            raise

    def shortcut(self, ready: Callable[[], bool], take: Callable[[Sequence[Event]], None]) -> None:
        """Hands the events of a piece that the reader waits for to `take` in its stead, where it is `ready` for them.

        Beginnings, ends and failures are the reader's, which sleeps meanwhile; so are all events of several streams.
        """
        shortcut = getattr(self._sources[0], "shortcut", None)
        if shortcut is None or self._tasks:
            return

        def pass_by(piece: TokenOutput) -> bool:
            if not ready():
                return False
            try:
                take(self._reader.add(0, piece))
            except Exception as failure:
                self._failures.append(failure)
                return False
            return True

        shortcut(pass_by)

    async def aclose(self) -> None:
        """Ends the stream and aborts what has not finished."""
        self._ready.clear()
        if self._closed:
            return
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for source in self._sources:
            await source.aclose()

    async def _next(self) -> tuple[int, TokenOutput]:
        """A piece, and the number of its stream."""
        if not self._tasks:
            return 0, await anext(self._sources[0])
        while self._open:
            piece = await self._pieces.get()
            if isinstance(piece, BaseException):
                raise piece
            if piece is not None:
                return piece
            self._open -= 1
        raise StopAsyncIteration

    async def _pump(self, number: int, source: TokenStream) -> None:
        try:
            async for piece in source:
                await self._pieces.put((number, piece))
        except Exception as error:  # handed to the reader, who raises it
            await self._pieces.put(error)
        else:
            await self._pieces.put(None)


class ChunkStream(Generic[ChunkT]):
    """An answer in the words of an API. Close it (`aclose`) when the reader goes away: that aborts the request.

    It closes itself when it ends or fails.
    """

    def __init__(self, events: AnswerStream, writer: Writer[ChunkT]) -> None:
        self._events = events
        self._writer = writer
        self._ready: deque[ChunkT] = deque()

    def __aiter__(self) -> ChunkStream[ChunkT]:
        return self

    async def __anext__(self) -> ChunkT:
        while not self._ready:
            events = await self._events.read()
            if events is None:
                raise StopAsyncIteration
            self._ready.extend(self._writer.write(events))
        return self._ready.popleft()

    def shortcut(self, ready: Callable[[], bool], take: Callable[[Sequence[ChunkT]], None]) -> None:
        """As the events' own, with chunks."""
        self._events.shortcut(ready, lambda events: take(self._writer.write(events)))

    async def aclose(self) -> None:
        """Ends the stream and aborts the request if it is still running."""
        self._ready.clear()
        await self._events.aclose()
