# SPDX-License-Identifier: MIT
"""ResponseStore: stored responses, and conversations; in a conversation, one response at a time is generated.

Entries are found by the hash of an API key and their id; for any other key they do not exist. Methods raise
`StoreUnavailableError` if the store cannot be used now.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec

from candle_vllm.core.errors import CandleVllmError, InvalidParameterError, RequestError
from candle_vllm.openai.fair_threads import apart, this_request
from candle_vllm.responses.api.stored_items import ItemList, PageRequest, page_of
from candle_vllm.responses.store import entries as stored
from candle_vllm.responses.store.backend import MEMORY, Held, StoreOptions, Upkeep, open_backend
from candle_vllm.responses.store.entries import CONVERSATION, ConversationBusyError, NotStoredError, checked_id, new_id

if TYPE_CHECKING:
    from candle_vllm.responses.store.sql import SqlBackend

LEASE_MS = 60_000  # lease of a running response
PURGE_SECONDS = 60.0
TURN_MS = 20_000  # lease of a conversation's turn; if a server dies, other servers wait this long
RENEW_SECONDS = 5.0  # seconds between renewals of a turn
POLL_SECONDS = 0.25  # seconds between checks whether another server has finished
MAX_WAITING = 8  # responses that wait for one conversation
_PREVIOUS = "previous_response_id"

logger = logging.getLogger(__name__)


class LazyStore:
    """Base of stores that open their backend on first use (`_open`), because importing SQLAlchemy takes time."""

    def __init__(self) -> None:
        self._opening = asyncio.Lock()
        self._backend: SqlBackend | None = None
        self._purging: Upkeep | None = None
        self._closed = False

    async def close(self) -> None:
        self._closed = True
        async with self._opening:  # `_open` may be running
            for each in (self._purging, self._backend):
                if each is not None:
                    await each.close()

    async def backend(self) -> SqlBackend:
        """Return the backend, opened."""
        if self._backend is None:
            async with self._opening:
                if self._backend is None:
                    self._backend = await self._open()
        return self._backend

    async def owner(self, key: str) -> str:
        """Return the owner of an API key's data; without keys (""), all requests share one owner."""
        return (await self.backend()).owner(key)

    async def _open(self) -> SqlBackend:
        raise NotImplementedError


class ResponseStore(LazyStore):
    """A store of responses and conversations; opened, used and closed in one event loop.

    A store in memory is opened on first use, because importing SQLAlchemy takes time. `clock` returns seconds since
    1970.
    """

    def __init__(self, options: StoreOptions, clock: Callable[[], float] = time.time) -> None:
        super().__init__()
        self.options = options
        self._queues: dict[tuple[str, str], _Queue] = {}  # of the conversations in which responses run or wait
        self._clock = clock

    async def start(self) -> None:
        """Open a store that is not in memory; ConfigError if it cannot be opened."""
        if self.options.url != MEMORY:
            await self.backend()

    # ---- responses ---------------------------------------------------------------------------------------------------

    async def put(self, entry: stored.Entry) -> None:
        """Store a response; if the store is full, drop the least recently used entries of the fullest owner.

        Raises StoreLimitError if the response exceeds the limit of one response, or of the store.
        """
        store = await self.backend()
        expires = entry.expires or entry.created + self.options.retention_days * 86_400_000
        lease = {"lease": store.now + LEASE_MS, "holder": entry.id} if entry.active else {}
        names = await apart(_names, entry.body, entry.given, size=entry.size)
        note_dropped(await store.put(msgspec.structs.replace(entry, expires=expires, **lease), names))

    async def get(self, owner: str, response_id: str) -> stored.Entry:
        """Return a response. Like `input_items`, `delete` and `cancel`, raise NotStoredError for an unknown id."""
        store, found = await self.backend(), None
        if stored.is_id(response_id):
            found = await store.get(stored.RESPONSE, owner, response_id)
            if found is not None and await self._fail_lapsed(found):
                found = await store.get(stored.RESPONSE, owner, response_id)
        if found is None:
            raise stored.NotStoredError("Response", response_id, "response_id")
        return found

    async def input_items(self, owner: str, response_id: str, wanted: PageRequest) -> ItemList:
        """Return a page of the items in the response's own request, without the history that the request continued."""
        entry = await self.get(owner, response_id)
        return await apart(lambda: page_of(msgspec.json.decode(entry.given), wanted), size=entry.size)

    async def delete(self, owner: str, response_id: str) -> None:
        """Delete a response; the task that generates it is not notified."""
        store = await self.backend()
        if not stored.is_id(response_id) or not await store.delete(stored.RESPONSE, owner, response_id):
            raise stored.NotStoredError("Response", response_id, "response_id")

    async def change(self, owner: str, response_id: str, status: str, response: bytes) -> bool:
        """Write the progress or the end of a queued or running response; False if another task ended or deleted it."""
        store, what = await self.backend(), (stored.RESPONSE, owner, response_id, response)
        if status in stored.ACTIVE:
            return await store.change(*what, status=status, lease=store.now + LEASE_MS)
        return await store.change(*what, status=status, names=await apart(_names, response, size=len(response)))

    async def cancel(self, owner: str, response_id: str) -> stored.Entry:
        """End a queued or running response as cancelled, and return it."""
        found = await self.get(owner, response_id)
        if found.active:
            await self.change(owner, response_id, "cancelled", stored.settled(found.body, "cancelled"))
            found = await self.get(owner, response_id)
        return found

    async def renew(self, names: Sequence[tuple[str, str]]) -> set[tuple[str, str]]:
        """Renew the leases of running responses (owner, id); return those that were ended or deleted meanwhile."""
        store, held = await self.backend(), [Held(owner, name, name) for owner, name in names]
        return {(each.owner, each.id) for each in await store.move(held, store.now + LEASE_MS)}

    async def history(self, owner: str, response_id: str) -> list[stored.Item]:
        """Return the input and output items of a response and of all responses before it.

        Raises NotStoredError if one of them is not stored, InvalidParameterError if the response is still running, and
        StoreLimitError if the history is too large.
        """
        store, what = await self.backend(), stored.checked_id("Previous response", response_id, _PREVIOUS)
        most, most_size = self.options.max_chain, self.options.max_chain_bytes
        chain = await store.chain(stored.RESPONSE, owner, what, most, most_size)
        while chain and await self._fail_lapsed(chain[-1]):
            chain = await store.chain(stored.RESPONSE, owner, what, most, most_size)
        missing = chain[-1].follows if chain else response_id
        if chain and chain[-1].active:
            name, status = chain[-1].id, chain[-1].status
            raise InvalidParameterError(f"The response {name!r} is still {status}: wait until it has ended.", _PREVIOUS)
        if len(chain) > most or sum(each.size for each in chain) > most_size:
            raise stored.StoreLimitError(
                f"The chain of previous responses is too long: at most {most} responses and {most_size} bytes are "
                "allowed. Start a new chain with a summary.",
                _PREVIOUS,
            )
        if missing:
            broken = f"Response {response_id!r:.80} cannot be continued: the earlier response"
            raise stored.NotStoredError("Previous response" if missing == response_id else broken, missing, _PREVIOUS)
        this_request().add(sum(each.size for each in chain))
        return await apart(
            lambda: [item for entry in reversed(chain) for item in stored.items_of(entry.body, entry.given)]
        )

    async def find_items(self, owner: str, names: Sequence[str]) -> dict[str, stored.Item]:
        """Return the items with these ids in the owner's responses and conversations; missing items are left out."""
        known = [name for name in dict.fromkeys(names) if stored.is_id(name)]
        parts, entries = await (await self.backend()).find(owner, known)
        this_request().add(sum(each.size for each in (*parts, *entries)))
        return await apart(_found, set(known), parts, entries)

    # ---- conversations of responses ----------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def turn(self, owner: str, conversation_id: str, param: str = "conversation") -> AsyncIterator[None]:
        """Wait until no other response is in progress in the conversation, and let none begin until the context exits.

        Raises NotStoredError, or ConversationBusyError if too many responses wait already; both name `param`.
        """
        name = owner, conversation_id
        queue = self._queues.setdefault(name, _Queue())
        if queue.waiting > MAX_WAITING:
            raise ConversationBusyError(
                f"{queue.waiting} responses are running or waiting in the conversation {conversation_id!r:.80}: try "
                "again when they have ended.",
                param,
            )
        queue.waiting += 1
        try:
            async with queue.lock, _turn_in_store(await self.backend(), owner, conversation_id, param):
                yield
        finally:
            queue.waiting -= 1
            if not queue.waiting:
                self._queues.pop(name, None)

    async def conversation_items(self, owner: str, conversation_id: str, more: int = 0) -> list[stored.Item]:
        """Return the items of a conversation, the oldest first.

        Raises NotStoredError if this owner has no such conversation, and StoreLimitError if it is too full for `more`
        items of a request and an answer.
        """
        store = await self.backend()
        with blaming("conversation"):
            name = stored.checked_id("Conversation", conversation_id)
            parts = await store.parts(stored.CONVERSATION, owner, name) or []
        if len(parts) + more >= self.options.max_items:
            message = f"The conversation {conversation_id!r:.80} is full: delete items of it, or begin another."
            raise stored.StoreLimitError(message, "conversation")
        this_request().add(sum(part.size for part in parts))
        return await apart(lambda: [msgspec.json.decode(part.body) for part in parts])

    async def append(
        self, owner: str, name: str, items: Iterable[stored.Item], *, skip_known: bool = False
    ) -> list[stored.EntryItem]:
        """Add checked items at the end of a conversation, all or none; return them; items without an id get one.

        With `skip_known`, items whose id exists already are not added; otherwise they raise InvalidParameterError.
        Raises NotStoredError if there is no such conversation, StoreLimitError if it is full or an item is too large.
        """
        more = stored.parts_of(items, self.options.max_item_bytes)
        if more:
            store, name = await self.backend(), stored.checked_id("Conversation", name)
            note_dropped(await store.append(stored.CONVERSATION, owner, name, more, skip_known=skip_known))
        return more

    async def add_to_conversation(self, entry: stored.Entry) -> None:
        """Add the items of a response to its conversation, if it has one; a `RequestError` is logged, not raised."""
        conversation = entry.about["conversation"]
        if conversation is None:
            return
        try:
            await self.append(entry.owner, conversation, stored.items_of(entry.body, entry.given), skip_known=True)
        except RequestError as error:  # the conversation was deleted, or is full
            logger.warning("a response could not be added to its conversation: %s", error)

    # ---- upkeep ------------------------------------------------------------------------------------------------------

    async def purge(self) -> int:
        """Delete expired entries, and end responses whose server has died; return the number of deleted entries."""
        store = await self.backend()
        for entry in await store.lapsed():
            await self._fail_lapsed(entry)
        return len(await store.expire())

    async def _fail_lapsed(self, entry: stored.Entry) -> bool:
        """End a response if its server has died; return whether it had died."""
        store = await self.backend()
        if not entry.active or entry.lease is None or entry.lease > store.now:
            return False
        body = stored.settled(entry.body, "failed", ("server_error", stored.STOPPED))
        where = stored.RESPONSE, entry.owner, entry.id
        await store.change(*where, body, status="failed", lease_was=entry.lease)  # unless it was renewed meanwhile
        return True

    async def _open(self) -> SqlBackend:
        if self._closed:
            raise stored.StoreUnavailableError("The store of responses is closed: the server is stopping.")
        place, bounds = self.options.place, self.options.bounds
        store = await open_backend(place, bounds, self._clock)
        self._purging = Upkeep(PURGE_SECONDS, self.purge, "the store of responses could not be purged", at_once=True)
        return store


def note_dropped(dropped: int) -> None:
    if dropped:
        logger.warning("the store of responses was full: %d least recently used entries were dropped", dropped)


def _names(response: bytes, given: bytes = b"[]") -> set[str]:
    return {item["id"] for item in stored.items_of(response, given) if isinstance(item.get("id"), str)}


def _found(
    wanted: set[str], parts: Sequence[stored.EntryItem], entries: Sequence[stored.Entry]
) -> dict[str, stored.Item]:
    found: dict[str, stored.Item] = {part.id: msgspec.json.decode(part.body) for part in parts}
    for entry in entries:
        found |= {item["id"]: item for item in stored.items_of(entry.body, entry.given) if item.get("id") in wanted}
    return found


class _Queue:
    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.waiting = 0


@contextlib.asynccontextmanager
async def _turn_in_store(store: SqlBackend, owner: str, conversation_id: str, param: str) -> AsyncIterator[None]:
    turn = Held(owner, checked_id("Conversation", conversation_id, param), new_id("turn"))
    failure = "a conversation's turn was not renewed"
    try:
        with blaming(param):
            while not await store.claim(CONVERSATION, turn, store.now + TURN_MS):
                await asyncio.sleep(POLL_SECONDS)
        upkeep = Upkeep(RENEW_SECONDS, lambda: store.move([turn], store.now + TURN_MS), failure)
        try:
            yield
        finally:
            await upkeep.close()
    finally:  # also after a cancellation during `claim`, which may succeed all the same
        try:
            await store.move([turn], None)
        except CandleVllmError as error:  # the lease expires by itself
            logger.warning("a conversation's turn could not be released: %s", error.__cause__ or error)


@contextlib.contextmanager
def blaming(param: str) -> Iterator[None]:
    """Set `param` of a `NotStoredError` to the field that named the missing object."""
    try:
        yield
    except NotStoredError as error:
        error.param = param
        raise
