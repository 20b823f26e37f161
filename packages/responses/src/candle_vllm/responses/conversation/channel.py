"""A bounded way for events from many senders to one reader that always learns of the end."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class EventChannel(Generic[T]):
    """Holds at most `size` events; who sends more waits until the reader has taken some.
    Unlike a queue it can be closed at any time, also by a callback that cannot wait, and its reader then gets what is
    left and after that the end or the error.
    """

    def __init__(self, size: int = 64) -> None:
        self._size = size
        self._events: deque[T] = deque()
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._closed = False
        self._error: BaseException | None = None

    async def send(self, event: T) -> None:
        """Adds an event, and waits while there are too many; an event is never lost, also if the wait is cancelled."""
        self._events.append(event)
        self._news.set()
        while len(self._events) > self._size:
            self._room.clear()
            await self._room.wait()

    def offer(self, event: T) -> None:
        """Adds an event if there is room; otherwise nobody gets it."""
        if len(self._events) < self._size:
            self._events.append(event)
            self._news.set()

    def close(self, error: BaseException | None = None) -> None:
        """Says that no more comes, and why."""
        self._closed, self._error = True, error
        self._news.set()

    async def receive(self) -> T | None:
        """The next event, or None when there are no more; raises what the channel was closed with."""
        while not self._events:
            if self._closed:
                if self._error is not None:
                    raise self._error
                return None
            self._news.clear()
            await self._news.wait()
        event = self._events.popleft()
        self._room.set()
        return event
