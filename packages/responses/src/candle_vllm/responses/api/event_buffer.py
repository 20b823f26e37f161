"""The events of a background response: a bounded number of bytes, for readers that come, go and come back."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import NamedTuple

from candle_vllm.core.errors import InvalidParameterError

MAX_BYTES = 8 << 20


class EncodedEvent(NamedTuple):
    """An event as it is sent: its name, its number from 0, and its data as JSON."""

    name: str
    number: int
    data: bytes


class EventBuffer:
    """Events in the order of their numbers; where there are too many bytes, the oldest go.

    Attributes:
        size: bytes of those that are here.
        finished: no more will come.
        next_number: that the next one has.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._events: deque[EncodedEvent] = deque()
        self._news = asyncio.Event()
        self.size = 0
        self.finished = False
        self.next_number = 0

    def add(self, event: EncodedEvent, *, last: bool = False) -> None:
        """Lets readers see one more event."""
        assert event.number == self.next_number, "events have gap-free numbers"
        self.next_number += 1
        self._events.append(event)
        self.size += len(event.data)
        while self.size > self._max_bytes and len(self._events) > 1:
            self.size -= len(self._events.popleft().data)
        self.finished = self.finished or last
        self._wake()

    def finish(self) -> None:
        """No more will come."""
        self.finished = True
        self._wake()

    def check(self, after: int) -> None:
        """Refuses to read behind an event that has not been there, or from one that is not there any more.

        Raises:
            InvalidParameterError: with param starting_after.
        """
        if after >= self.next_number:
            raise InvalidParameterError(
                f"starting_after must be the number of an event that there was, not {after}; the last one so far is "
                f"{self.next_number - 1}",
                "starting_after",
            )
        first = self.next_number - len(self._events)
        if after + 1 < first:
            raise InvalidParameterError(
                f"starting_after must be at least {first - 1}, not {after}: earlier events are not kept any more",
                "starting_after",
            )

    async def read(self, after: int = -1) -> AsyncIterator[EncodedEvent]:
        """The events behind number `after`, those that are still to come included."""
        wanted = after + 1
        while True:
            news = self._news
            if wanted < self.next_number:
                self.check(wanted - 1)
                yield self._events[wanted - self.next_number]
                wanted += 1
            elif self.finished:
                return
            else:
                await news.wait()

    def _wake(self) -> None:
        """Wakes all readers; each waits for news of its own time."""
        self._news.set()
        self._news = asyncio.Event()
