"""One response at a time in each conversation: the next one sees what the one before it added.

Within a process a lock sees to that, among the servers of one store a lease in it, which is renewed while it is held.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from functools import partial

from candle_vllm.core.errors import CandleVllmError
from candle_vllm.responses.store.backend import Held
from candle_vllm.responses.store.entries import ConversationBusyError, new_id
from candle_vllm.responses.store.response_store import ResponseStore
from candle_vllm.responses.store.upkeep import Upkeep

logger = logging.getLogger(__name__)

RENEW_SECONDS = 5.0
POLL_SECONDS = 0.25  # between looks at whether another server has ended
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


@contextlib.asynccontextmanager
async def turn_in_store(store: ResponseStore, owner: str, conversation_id: str) -> AsyncIterator[None]:
    """Waits until no other server of this store is answering in the conversation.

    Raises:
        NotStoredError: there is no such conversation.
    """
    turn = Held(owner, conversation_id, new_id("turn"))
    while not await store.take_turn(turn):
        await asyncio.sleep(POLL_SECONDS)
    upkeep = Upkeep(RENEW_SECONDS, partial(store.keep_turn, turn), "a conversation's turn was not renewed")
    try:
        yield
    finally:
        await upkeep.close()
        try:
            await store.leave_turn(turn)
        except CandleVllmError as error:  # the lease ends by itself
            logger.warning("a conversation's turn could not be given back: %s", error.__cause__ or error)
