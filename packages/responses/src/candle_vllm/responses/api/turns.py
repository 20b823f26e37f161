# SPDX-License-Identifier: MIT
"""ConversationTurns: one response at a time in a conversation; the next one sees what the one before it added.

Within a process a lock sees to that, among the servers of one store a lease in it, which is renewed while it is held.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

from candle_vllm.core.errors import CandleVllmError
from candle_vllm.responses.store.backend import Backend, Held
from candle_vllm.responses.store.entries import (
    CONVERSATION,
    ConversationBusyError,
    NotStoredError,
    checked_id,
    new_id,
)
from candle_vllm.responses.store.upkeep import Upkeep

TURN_MS = 20_000  # others wait for so long for a server that has died
RENEW_SECONDS = 5.0
POLL_SECONDS = 0.25  # between looks at whether another server has ended
MAX_WAITING = 8  # responses that wait for one conversation

logger = logging.getLogger(__name__)


class _Queue:
    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.waiting = 0


class ConversationTurns:
    """Who may add to which conversation now.

    Args:
        store: where conversations are; None where no other process can use it.
    """

    def __init__(self, store: Callable[[], Awaitable[Backend]] | None = None) -> None:
        self._store = store
        self._queues: dict[tuple[str, str], _Queue] = {}

    @contextlib.asynccontextmanager
    async def turn(self, owner: str, conversation_id: str, param: str = "conversation") -> AsyncIterator[None]:
        """Waits until nobody else is answering in the conversation, and lets nobody in until it is left.

        Args:
            owner: whose it is.
            conversation_id: of a conversation that need not be there.
            param: what is blamed where it is not.

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
                if self._store is None:
                    yield
                else:
                    async with _turn_in_store(await self._store(), owner, conversation_id, param):
                        yield
        finally:
            queue.waiting -= 1
            if not queue.waiting:
                self._queues.pop(name, None)


@contextlib.asynccontextmanager
async def _turn_in_store(store: Backend, owner: str, conversation_id: str, param: str) -> AsyncIterator[None]:
    turn = Held(owner, conversation_id, new_id("turn"))
    with blaming(param):
        checked_id("Conversation", conversation_id, param)
        while not await store.claim(CONVERSATION, turn, store.now + TURN_MS):
            await asyncio.sleep(POLL_SECONDS)
    failure = "a conversation's turn was not renewed"
    upkeep = Upkeep(RENEW_SECONDS, lambda: store.move([turn], store.now + TURN_MS), failure)
    try:
        yield
    finally:
        await upkeep.close()
        try:
            await store.move([turn], None)
        except CandleVllmError as error:  # the lease ends by itself
            logger.warning("a conversation's turn could not be given back: %s", error.__cause__ or error)


@contextlib.contextmanager
def blaming(param: str) -> Iterator[None]:
    """What is not there is blamed on the field that named it."""
    try:
        yield
    except NotStoredError as error:
        error.param = param
        raise
