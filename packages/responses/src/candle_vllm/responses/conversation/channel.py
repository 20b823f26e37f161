# SPDX-License-Identifier: MIT
"""A bounded channel for the events that a task produces for a reader, and the reliable cancellation of tasks."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class EventChannel(Generic[T]):
    """Channel of `size` events; the sender of a further event adds it, and waits until the reader has taken some.

    Unlike a queue, it can be closed at any time, also by a synchronous callback; the reader then gets the remaining
    events, and the end or the error.
    """

    def __init__(self, size: int = 64) -> None:
        self._size = size
        self._events: deque[T] = deque()
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._closed = False
        self._errors: list[BaseException] = []

    async def send(self, event: T) -> None:
        """Add an event, and wait while the channel is full; the event stays in it even if the wait is cancelled."""
        self._events.append(event)
        self._news.set()
        while len(self._events) > self._size:
            self._room.clear()
            await self._room.wait()

    def offer(self, event: T) -> None:
        """Add an event if the channel is not full; otherwise drop it."""
        if len(self._events) < self._size:
            self._events.append(event)
            self._news.set()

    def close(self, error: BaseException | None = None) -> None:
        self._closed = True
        self._errors += [] if error is None else [error]
        self._news.set()

    async def receive(self) -> T | None:
        """Return the next event, or None after the last one; the error of `close` is raised once."""
        while not self._events:
            if self._closed:
                if self._errors:
                    raise self._errors.pop()  # popped, because its traceback refers to this channel
                return None
            self._news.clear()
            await self._news.wait()
        event = self._events.popleft()
        self._room.set()
        return event


logger = logging.getLogger(__name__)

PATIENCE = 10.0  # seconds after which a task that does not end is abandoned
AGAIN = 2.0  # seconds after which a cancelled task that has not ended is cancelled again


async def end_task(task: asyncio.Task[object], patience: float = PATIENCE, again: float = AGAIN) -> None:
    """Cancel a task, and wait for its end; its error is not raised, a cancellation of the caller is, at the end.

    It is cancelled again every `again` seconds; after `patience` seconds it is abandoned, and that is logged.
    """
    now = asyncio.get_running_loop().time
    deadline = now() + patience
    next_time = now()
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        if now() >= deadline:
            logger.error("%s did not end within %g seconds after it was cancelled", task.get_name(), patience)
            break
        if now() >= next_time:
            task.cancel()
            next_time = now() + again
        try:
            await asyncio.wait([task], timeout=min(deadline, next_time) - now())
        except asyncio.CancelledError as error:
            cancelled = error
    try:
        if cancelled is not None:
            raise cancelled
    finally:
        del cancelled  # it refers to this frame
