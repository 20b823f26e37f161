"""Courier: how the pieces of a step come into an event loop without holding it up.

A step of a thousand sequences wakes a thousand readers. Woken at once, they keep the loop from its sockets until the
last one has run; woken some at a time, a request that arrives meanwhile is read between two batches. First pieces go
before all others, for somebody waits for them.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from candle_vllm.core.engine.thread import Delivery, Sink

BATCH = 8  # readers that are woken before the loop may look at its sockets

logger = logging.getLogger(__name__)


class Courier:
    """Hands items to the sinks of one event loop; those of one sink arrive in the order of their sending.

    Args:
        loop: where the sinks want to be called.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._first: deque[tuple[Sink, Delivery]] = deque()
        self._others: deque[tuple[Sink, Delivery]] = deque()
        self._under_way = False

    def send(self, first: Sequence[tuple[Sink, Delivery]], others: Sequence[tuple[Sink, Delivery]]) -> None:
        """Takes items from any thread; one wake-up of the loop, however many there are.

        Args:
            first: items of sinks that got none before.
            others: all other items.
        """
        try:
            self._loop.call_soon_threadsafe(self._take, first, others)
        except RuntimeError:
            logger.debug("an event loop was closed before its requests ended")

    def _take(self, first: Sequence[tuple[Sink, Delivery]], others: Sequence[tuple[Sink, Delivery]]) -> None:
        self._first.extend(first)
        self._others.extend(others)
        if not self._under_way:
            self._hand_out()

    def _hand_out(self) -> None:
        for _ in range(BATCH):
            queue = self._first or self._others
            if not queue:
                break
            sink, item = queue.popleft()
            sink.put(item)
        self._under_way = bool(self._first or self._others)
        if self._under_way:
            self._loop.call_soon(self._hand_out)
