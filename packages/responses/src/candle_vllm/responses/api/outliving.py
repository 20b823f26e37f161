# SPDX-License-Identifier: MIT
"""Answers that outlive their clients: a task reads one to its end, and whoever wants reads along.

So run the responses in the background, and the answers that the server's mailbox keeps.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from typing import Generic, NamedTuple, TypeVar

from candle_vllm.core.errors import InvalidParameterError

T = TypeVar("T")
Failure = Exception | asyncio.CancelledError | None


class EncodedEvent(NamedTuple):
    """An event as it is sent: its name, its number from 0, and its data as JSON."""

    name: str
    number: int
    data: bytes


class Pieces(Generic[T]):
    """What there has been of an answer, for readers that come, go and come back.

    Args:
        max_bytes: where there are more, the oldest go; None: all stay.

    Attributes:
        size: bytes of those that are here.
        finished: no more will come.
        next_number: that the next one has; they are counted from 0.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        self._max_bytes = max_bytes
        self._pieces: deque[T] = deque()
        self._sizes: deque[int] = deque()
        self._news = asyncio.Event()
        self._failure: Exception | None = None
        self.size = 0
        self.finished = False
        self.next_number = 0

    def add(self, piece: T, size: int = 0, *, last: bool = False) -> None:
        """Lets readers see one more."""
        self.next_number += 1
        self._pieces.append(piece)
        self._sizes.append(size)
        self.size += size
        while self._max_bytes is not None and self.size > self._max_bytes and len(self._pieces) > 1:
            self._pieces.popleft()
            self.size -= self._sizes.popleft()
        self.finished = self.finished or last
        self._wake()

    def finish(self, failure: Exception | None = None) -> None:
        """No more will come; readers get the failure at their end."""
        self.finished, self._failure = True, failure
        self._wake()

    def check(self, after: int) -> None:
        """Refuses to read behind one that has not been there, or from one that is not there any more.

        Raises:
            InvalidParameterError: with param starting_after.
        """
        if after >= self.next_number:
            raise InvalidParameterError(
                f"starting_after must be the number of an event that there was, not {after}; the last one so far is "
                f"{self.next_number - 1}",
                "starting_after",
            )
        first = self.next_number - len(self._pieces)
        if after + 1 < first:
            raise InvalidParameterError(
                f"starting_after must be at least {first - 1}, not {after}: earlier events are not kept any more",
                "starting_after",
            )

    def __iter__(self) -> Iterator[T]:
        """Those that are here."""
        return iter(self._pieces)

    async def read(self, after: int = -1) -> AsyncGenerator[T, None]:
        """Those behind number `after`, those that are still to come included."""
        wanted = after + 1
        while True:
            news = self._news
            if wanted < self.next_number:
                self.check(wanted - 1)
                yield self._pieces[wanted - self.next_number]
                wanted += 1
            elif not self.finished:
                await news.wait()
            elif self._failure is not None:
                raise self._failure
            else:
                return

    def _wake(self) -> None:
        """Wakes all readers; each waits for news of its own time."""
        self._news.set()
        self._news = asyncio.Event()


class Work(Generic[T]):
    """The task that reads an answer to its end; it begins at once, and nobody's disconnect cancels it.

    Args:
        pieces: of the answer; closed at the end.
        seconds: after which it ends.
        take: told of each piece.
        end: told of the end, after the pieces were closed: None, or what ended them; TimeoutError where it took too
            long, CancelledError where it was cancelled, or where `take` raised that.
    """

    def __init__(
        self,
        pieces: AsyncIterator[T],
        seconds: float,
        take: Callable[[T], Awaitable[None]],
        end: Callable[[Failure], Awaitable[None]],
    ) -> None:
        self._started = asyncio.Event()  # a task that is cancelled before it has begun would clean nothing up
        self.task = asyncio.create_task(self._run(pieces, seconds, take, end))  # which alone holds them

    async def cancel(self) -> None:
        """Ends the work; returns when it has ended."""
        await self._started.wait()
        self.task.cancel()
        await asyncio.wait({self.task})

    async def _run(
        self,
        pieces: AsyncIterator[T],
        seconds: float,
        take: Callable[[T], Awaitable[None]],
        end: Callable[[Failure], Awaitable[None]],
    ) -> None:
        self._started.set()
        failure: Failure = None
        try:
            async with asyncio.timeout(seconds):
                async for piece in pieces:
                    await take(piece)
        except (Exception, asyncio.CancelledError) as ended:
            failure = ended
        await close(pieces)
        await end(failure)


async def close(pieces: AsyncIterator[object]) -> None:
    """Closes what can be closed."""
    closing = getattr(pieces, "aclose", None)
    if closing is not None:
        with contextlib.suppress(Exception):
            await closing()
