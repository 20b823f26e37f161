"""KeptResponses: responses after they were made: fetched, continued, cancelled; one at a time in a conversation.

Within a process a lock sees to that, among the servers of one store a lease in it, which is renewed while it is held:
the next response sees what the one before it added.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec

from candle_vllm.core.errors import CandleVllmError, InvalidParameterError, RequestError
from candle_vllm.responses.api.background import Background
from candle_vllm.responses.api.memory import Answered, entry_of
from candle_vllm.responses.api.outliving import EncodedEvent
from candle_vllm.responses.api.stored_items import ItemList, PageRequest, page_of
from candle_vllm.responses.protocol.events import StreamEvent
from candle_vllm.responses.protocol.response import ResponseDeleted
from candle_vllm.responses.store.backend import Held
from candle_vllm.responses.store.entries import (
    ConversationBusyError,
    Entry,
    NotStoredError,
    StoreLimitError,
    StoreUnavailableError,
    items_of,
    new_id,
)
from candle_vllm.responses.store.options import MEMORY, StoreOptions
from candle_vllm.responses.store.response_store import ResponseStore
from candle_vllm.responses.store.upkeep import Upkeep

PURGE_SECONDS = 60.0
RENEW_SECONDS = 5.0
POLL_SECONDS = 0.25  # between looks at whether another server has ended
MAX_WAITING = 8  # responses that wait for one conversation

logger = logging.getLogger(__name__)


class KeptResponses:
    """A store of responses with those that still run; started, used and closed in one event loop.

    A store in memory is opened when it is first used, because SQLAlchemy takes a while to import.

    Args:
        options: of the store.
        clock: seconds since 1970.
    """

    def __init__(self, options: StoreOptions, clock: Callable[[], float] = time.time) -> None:
        self.options = options
        self.background = Background(self.store, self._add_to_conversation)
        self.turns = ConversationTurns()
        self._clock = clock
        self._opening = asyncio.Lock()
        self._store: ResponseStore | None = None
        self._purging: Upkeep | None = None
        self._closed = False

    async def start(self) -> None:
        """Opens a store that is not in memory; ConfigError when it cannot be opened."""
        if self.options.url != MEMORY:
            await self.store()

    async def close(self) -> None:
        """Ends what runs in the background, and closes the store."""
        await self.background.close()
        self._closed = True
        if self._purging is not None:
            await self._purging.close()
        if self._store is not None:
            await self._store.close()

    async def store(self) -> ResponseStore:
        """The store, opened."""
        if self._store is None:
            async with self._opening:
                if self._store is None:
                    self._store = await self._open()
        return self._store

    async def owner(self, key: str) -> str:
        """Whom what is made with an API key belongs to; "" without keys: then all share one owner."""
        return (await self.store()).owner(key)

    # ---- for whoever answers requests (`Memory`) ---------------------------------------------------------------------

    async def response_items(self, response_id: str, owner: str) -> Sequence[Mapping[str, Any]]:
        """Input and output items of the whole chain that ends with a response, the oldest first.

        Raises:
            RequestError: it, or one before it, is not there, has not ended, or there is too much of it.
        """
        return await (await self.store()).history(owner, response_id)

    async def conversation_items(self, conversation_id: str, owner: str) -> Sequence[Mapping[str, Any]]:
        """The items of a conversation, the oldest first.

        Raises:
            NotStoredError: there is none.
            StoreLimitError: it is full, and could not take an answer.
        """
        store = await self.store()
        with _blaming("conversation"):
            items = await store.items(owner, conversation_id)
        if len(items) >= self.options.max_items:
            message = f"The conversation {conversation_id!r:.80} is full: delete items of it, or begin another."
            raise StoreLimitError(message, "conversation")
        return items

    async def find_items(self, item_ids: Sequence[str], owner: str) -> Mapping[str, Mapping[str, Any]]:
        """Those of these items that are kept, by id."""
        return await (await self.store()).find_items(owner, item_ids)

    async def keep(self, answered: Answered) -> None:
        """Keeps a response, and adds its items to the conversation that it names.

        One that ran in the background and was cancelled or deleted meanwhile stays so.
        """
        store, entry = await self.store(), entry_of(answered)
        if not entry.about["background"]:
            await store.put(entry)
        elif not await store.change(entry.owner, entry.id, entry.status, entry.body):
            return
        await self._add_to_conversation(entry)

    async def begin(
        self, queued: Answered, events: AsyncIterator[StreamEvent], seconds: float
    ) -> AsyncIterator[EncodedEvent]:
        """Works on a response in the background; arguments and errors as `Background.begin`."""
        return await self.background.begin(entry_of(queued), events, seconds)

    @contextlib.asynccontextmanager
    async def turn(self, owner: str, conversation_id: str, param: str = "conversation") -> AsyncIterator[None]:
        """The right to answer in a conversation; whoever comes meanwhile waits, also at other servers of the store.

        Args:
            owner: whose it is.
            conversation_id: of a conversation that need not be there.
            param: what is blamed where it is not.
        """
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self.turns.turn(owner, conversation_id))
            store = await self.store()
            if store.shared:
                with _blaming(param):
                    await stack.enter_async_context(turn_in_store(store, owner, conversation_id))
            yield

    # ---- for whoever made them ---------------------------------------------------------------------------------------

    async def retrieve(self, owner: str, response_id: str) -> bytes:
        """The response object as JSON; NotStoredError where there is none, here and below."""
        return (await (await self.store()).get(owner, response_id)).body

    async def stream(self, owner: str, response_id: str, after: int = -1) -> AsyncIterator[EncodedEvent]:
        """The events of a background response behind number `after`, those to come included.

        Raises:
            InvalidParameterError: it does not run in the background, or its events are not here any more.
        """
        entry = await (await self.store()).get(owner, response_id)
        if not entry.about["background"]:
            raise InvalidParameterError("stream is for responses that were made with background: true", "stream")
        events = self.background.events(owner, response_id)
        if events is None:
            raise InvalidParameterError(
                f"stream: the events of this response are not kept any more; it is {entry.status}, ask without stream",
                "stream",
            )
        events.check(after)
        return events.read(after)

    async def delete(self, owner: str, response_id: str) -> ResponseDeleted:
        """Deletes a response, and ends the work on it."""
        await (await self.store()).delete(owner, response_id)
        await self.background.stop(owner, response_id, forget=True)
        return ResponseDeleted(id=response_id)

    async def cancel(self, owner: str, response_id: str) -> bytes:
        """Ends a background response; one that has ended stays as it is. The response object as JSON.

        Raises:
            InvalidParameterError: it does not run in the background.
        """
        store = await self.store()
        if not (await store.get(owner, response_id)).about["background"]:
            raise InvalidParameterError(
                "Only responses that were made with background: true can be cancelled; close the connection to end "
                "another.",
                "response_id",
            )
        cancelled = await store.cancel(owner, response_id)
        if cancelled.status == "cancelled":
            await self.background.stop(owner, response_id)
        return cancelled.body

    async def input_items(self, owner: str, response_id: str, wanted: PageRequest) -> ItemList:
        """What the request of a response gave, without what it only referred to."""
        entry = await (await self.store()).get(owner, response_id)
        return await asyncio.to_thread(lambda: page_of(msgspec.json.decode(entry.given), wanted))

    # ---- inside ------------------------------------------------------------------------------------------------------

    async def _open(self) -> ResponseStore:
        if self._closed:
            raise StoreUnavailableError("The store of responses is closed: the server is stopping.")
        store = await asyncio.to_thread(ResponseStore, self.options, self._clock)  # it imports SQLAlchemy
        try:
            await store.open()
        except BaseException:
            await store.close()
            raise
        self._purging = Upkeep(PURGE_SECONDS, store.purge, "the store of responses could not be purged", at_once=True)
        return store

    async def _add_to_conversation(self, entry: Entry) -> None:
        conversation = entry.about["conversation"]
        if conversation is None:
            return
        store = await self.store()
        try:
            await store.append(entry.owner, conversation, items_of(entry.body, entry.given), skip_known=True)
        except RequestError as error:  # it was deleted meanwhile, or is full
            logger.warning("a response could not be added to its conversation: %s", error)


@contextlib.contextmanager
def _blaming(param: str) -> Iterator[None]:
    """What is not there is blamed on the field that named it."""
    try:
        yield
    except NotStoredError as error:
        error.param = param
        raise


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
