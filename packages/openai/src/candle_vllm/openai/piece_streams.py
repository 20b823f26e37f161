"""Streams of pieces and chunks that abort their requests when they are closed, begun or not."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from candle_vllm.core.engine.request import TokenOutput
from candle_vllm.openai.engine import TokenStream

ChunkT = TypeVar("ChunkT")
_ChunkT_co = TypeVar("_ChunkT_co", covariant=True)
_Event = tuple[int, TokenOutput] | BaseException | None  # None: one stream has ended


class Chunker(Protocol[_ChunkT_co]):
    """Makes chunks of pieces, each with the number of its prompt."""

    def add(self, prompt: int, piece: TokenOutput) -> Sequence[_ChunkT_co]: ...

    def end(self) -> Sequence[_ChunkT_co]: ...


class PieceStream:
    """The pieces of one or more engine streams, each with its stream's number, as they come."""

    def __init__(self, sources: Sequence[TokenStream]) -> None:
        self._sources = sources
        self._events: asyncio.Queue[_Event] = asyncio.Queue()
        self._open = len(sources)
        # One stream, the usual case, is read directly and costs no task.
        pumped = enumerate(sources) if len(sources) > 1 else ()
        self._tasks = [asyncio.create_task(self._pump(number, source)) for number, source in pumped]

    def __aiter__(self) -> PieceStream:
        return self

    async def __anext__(self) -> tuple[int, TokenOutput]:
        if not self._tasks:
            return 0, await anext(self._sources[0])
        while self._open:
            event = await self._events.get()
            if isinstance(event, BaseException):
                raise event
            if event is not None:
                return event
            self._open -= 1
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Aborts what has not finished."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for source in self._sources:
            await source.aclose()

    async def _pump(self, number: int, source: TokenStream) -> None:
        try:
            async for piece in source:
                self._events.put_nowait((number, piece))
        except Exception as error:  # handed to the reader, who raises it
            self._events.put_nowait(error)
        else:
            self._events.put_nowait(None)


class ChunkStream(Generic[ChunkT]):
    """The chunks of one answer. Close it (`aclose`) when the reader goes away: that aborts the request.

    It closes itself when it ends or fails.
    """

    def __init__(self, pieces: PieceStream, chunker: Chunker[ChunkT]) -> None:
        self._pieces = pieces
        self._chunker = chunker
        self._ready: deque[ChunkT] = deque()
        self._closed = False

    def __aiter__(self) -> ChunkStream[ChunkT]:
        return self

    async def __anext__(self) -> ChunkT:
        while not self._ready:
            if self._closed:
                raise StopAsyncIteration
            await self._read()
        return self._ready.popleft()

    async def aclose(self) -> None:
        """Ends the stream and aborts the request if it is still running."""
        self._ready.clear()
        if not self._closed:
            self._closed = True
            await self._pieces.aclose()

    async def _read(self) -> None:
        try:
            number, piece = await anext(self._pieces)
            self._ready.extend(self._chunker.add(number, piece))
        except StopAsyncIteration:
            await self.aclose()
            self._ready.extend(self._chunker.end())
        except BaseException:
            await self.aclose()
            raise
