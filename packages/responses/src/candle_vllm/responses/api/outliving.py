# SPDX-License-Identifier: MIT
"""Answers that outlive their clients: a task reads an answer to its end, and clients read from its buffer.

Background responses use this module, and so do answers for the server's mailbox.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from typing import Generic, NamedTuple, TypeVar

from candle_vllm.core.errors import InvalidParameterError

T = TypeVar("T")
Failure = Exception | asyncio.CancelledError


class EncodedEvent(NamedTuple):
    """An event as it is sent: its name, its number from 0, and its data as JSON."""

    name: str
    number: int
    data: bytes


class Chunks(Generic[T]):
    """Buffer of an answer's chunks, for readers that disconnect and come back.

    Beyond `max_bytes`, the oldest chunks are dropped, except the last one; None means no limit.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        self._max_bytes = max_bytes
        self._chunks: deque[T] = deque()
        self._sizes: deque[int] = deque()
        self._news = asyncio.Event()
        self._failure: Exception | None = None
        self.size = 0  # bytes of the buffered chunks
        self.finished = False
        self.next_number = 0  # number of the next chunk; chunks are counted from 0

    def add(self, chunk: T, size: int = 0, *, last: bool = False) -> None:
        self.next_number += 1
        self._chunks.append(chunk)
        self._sizes.append(size)
        self.size += size
        while self._max_bytes is not None and self.size > self._max_bytes and len(self._chunks) > 1:
            self._chunks.popleft()
            self.size -= self._sizes.popleft()
        self.finished = self.finished or last
        self._wake()

    def finish(self, failure: Exception | None = None) -> None:
        """End the answer; readers get the failure after the last chunk."""
        self.finished, self._failure = True, failure
        self._wake()

    def check(self, after: int) -> None:
        """Refuse to read after a chunk that has not come yet, or one whose successor was dropped."""
        if after >= self.next_number:
            last = f"the last one so far is {self.next_number - 1}" if self.next_number else "no event was sent yet"
            raise InvalidParameterError(
                f"starting_after must be the number of an event, not {after}; {last}", "starting_after"
            )
        first = self.next_number - len(self._chunks)
        if after + 1 < first:
            raise InvalidParameterError(
                f"starting_after must be at least {first - 1}: earlier events are no longer stored",
                "starting_after",
            )

    def __iter__(self) -> Iterator[T]:
        return iter(self._chunks)

    async def read(self, after: int = -1) -> AsyncGenerator[T, None]:
        """Yield the chunks after number `after`, also future ones; raise as `check` if the next one was dropped."""
        wanted = after + 1
        while True:
            news = self._news
            if wanted < self.next_number:
                self.check(wanted - 1)
                yield self._chunks[wanted - self.next_number]
                wanted += 1
            elif not self.finished:
                await news.wait()
            elif self._failure is not None:
                raise self._failure
            else:
                return

    def _wake(self) -> None:
        """Wake all readers; each waits for the `asyncio.Event` that was current when it looked for chunks."""
        self._news.set()
        self._news = asyncio.Event()


class Work(Generic[T]):
    """A task that reads an answer to its end; it is scheduled at once, and a client's disconnect does not cancel it.

    Args:
        chunks: chunks of the answer; closed at the end.
        end: called after the chunks were closed, with None or the exception that ended them: TimeoutError after the
            time limit, CancelledError if the task was cancelled or `take` raised it.
    """

    def __init__(
        self,
        chunks: AsyncIterator[T],
        seconds: float,
        take: Callable[[T], Awaitable[None]],
        end: Callable[[Failure | None], Awaitable[None]],
    ) -> None:
        self._ending = False  # whether `end` runs
        self._started = asyncio.Event()  # a task that is cancelled before it begins would not close `chunks`

        async def run() -> None:
            self._started.set()
            failure: Failure | None = None
            try:
                try:
                    async with asyncio.timeout(seconds):
                        async for chunk in chunks:
                            await take(chunk)
                finally:
                    await close(chunks)
            except (Exception, asyncio.CancelledError) as ended:
                failure = ended
            self._ending = True
            await end(failure)

        # The arguments are not attributes, so that they are freed when the task ends.
        self.task = asyncio.create_task(run())

    async def cancel(self) -> None:
        """Cancel the task unless it calls `end` already, and wait until it has ended."""
        await self._started.wait()
        if not self._ending and not self.task.cancelling():  # a cancellation would interrupt the cleanup
            self.task.cancel()
        await asyncio.wait({self.task})


async def close(chunks: AsyncIterator[object]) -> None:
    """Close an iterator, if it can be closed; its errors are ignored."""
    closing = getattr(chunks, "aclose", None)
    if closing is not None:
        with contextlib.suppress(Exception):
            await closing()
