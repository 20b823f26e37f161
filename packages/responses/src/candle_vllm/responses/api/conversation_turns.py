"""One response at a time in each conversation: the next one sees what the one before it added."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from candle_vllm.responses.store.errors import ConversationBusyError

MAX_WAITING = 8  # responses that wait for one conversation


class _Queue:
    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.waiting = 0


class ConversationTurns:
    """Who may add to which conversation now, within this process."""

    def __init__(self) -> None:
        self._queues: dict[tuple[str, str], _Queue] = {}

    @contextlib.asynccontextmanager
    async def turn(self, owner: str, conversation_id: str) -> AsyncIterator[None]:
        """Waits until nobody else is answering in the conversation, and lets nobody in until it is left.

        Raises:
            ConversationBusyError: too many wait already.
        """
        name = owner, conversation_id
        queue = self._queues.setdefault(name, _Queue())
        if queue.waiting > MAX_WAITING:
            raise ConversationBusyError(
                f"{queue.waiting} responses are running or waiting in the conversation {conversation_id!r:.80}: try "
                "again when they have ended.",
                "conversation",
            )
        queue.waiting += 1
        try:
            async with queue.lock:
                yield
        finally:
            queue.waiting -= 1
            if not queue.waiting:
                self._queues.pop(name, None)
