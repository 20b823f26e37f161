# SPDX-License-Identifier: MIT
"""ConversationTurns: only one response at a time runs in a conversation; the next one sees the items that it added.

Within a process, a lock ensures this; among servers that share a store, a lease that the holder renews.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

from candle_vllm.core.errors import CandleVllmError
from candle_vllm.responses.store.backend import Backend, Held
from candle_vllm.responses.store.entries import CONVERSATION, ConversationBusyError, NotStoredError, checked_id, new_id
from candle_vllm.responses.store.upkeep import Upkeep

TURN_MS = 20_000  # length of the lease; if a server dies, other servers wait this long
RENEW_SECONDS = 5.0  # seconds between renewals of the lease
POLL_SECONDS = 0.25  # seconds between checks whether another server has finished
MAX_WAITING = 8  # responses that wait for one conversation

logger = logging.getLogger(__name__)


class _Queue:
    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.waiting = 0


class ConversationTurns:
    """Grants one response at a time the right to add items to a conversation.

    `store` opens the store of the conversations; None means that no other process can use it.
    """

    def __init__(self, store: Callable[[], Awaitable[Backend]] | None = None) -> None:
        self._store = store
        self._queues: dict[tuple[str, str], _Queue] = {}

    @contextlib.asynccontextmanager
    async def turn(self, owner: str, conversation_id: str, param: str = "conversation") -> AsyncIterator[None]:
        """Wait until no other response is in progress in the conversation, and hold it until the context exits.

        Args:
            conversation_id: id of the conversation; only a shared store requires that it exists.
            param: parameter that the error names if the conversation does not exist.

        Raises:
            ConversationBusyError: too many responses wait for this conversation.
            NotStoredError: a shared store has no such conversation.
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
        except CandleVllmError as error:  # the lease expires by itself
            logger.warning("a conversation's turn could not be given back: %s", error.__cause__ or error)


@contextlib.contextmanager
def blaming(param: str) -> Iterator[None]:
    """Set `param` of a `NotStoredError` to the field that named the missing object."""
    try:
        yield
    except NotStoredError as error:
        error.param = param
        raise
