"""ResponseStore: responses and conversations by the hash of their key and their id, in SQLite or PostgreSQL.

Nothing is told of another key's: it does not exist. Calls are bounded in number and time, and every failure of the
database is a `StoreUnavailableError`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.responses.store import conversation_queries, references, response_queries, turn_queries
from candle_vllm.responses.store.conversation_queries import Order
from candle_vllm.responses.store.database import Database, connect_to, connect_to_memory
from candle_vllm.responses.store.errors import NotStoredError
from candle_vllm.responses.store.item_bodies import item_bodies, known_conversation, known_item
from candle_vllm.responses.store.options import MEMORY, StoreOptions
from candle_vllm.responses.store.records import (
    STOPPED,
    Item,
    ItemPage,
    StoredConversation,
    StoredItem,
    StoredResponse,
    is_id,
    items_of,
    settled,
)
from candle_vllm.responses.store.schema import LAYOUT

logger = logging.getLogger(__name__)


class ResponseStore:
    """A store; opened, used and closed in one event loop.

    Args:
        options: where it is and how much it holds.
        clock: seconds since 1970.
    """

    def __init__(self, options: StoreOptions, clock: Callable[[], float] = time.time) -> None:
        self.options = options
        self._clock = clock
        self._database = Database(LAYOUT, self._connect)

    async def open(self) -> None:
        """Connects and makes the tables; ConfigError when that cannot be."""
        await self._database.open()

    async def close(self) -> None:
        """Waits for what is running; what still waits is dropped."""
        await self._database.close()

    def owner(self, key: str) -> str:
        """Whom what is made with an API key belongs to; "" without keys: then all share one owner."""
        return self._database.owner(key)

    @property
    def now(self) -> int:
        """The store's clock, in seconds since 1970."""
        return int(self._clock())

    # ---- responses ---------------------------------------------------------------------------------------------------

    async def put(self, record: StoredResponse) -> None:
        """Keeps a response; the oldest of the key that has most makes room.

        Raises:
            StoreLimitError: it is larger than one may be, or than the store.
        """
        self._note(await self._database.run(response_queries.put, record, self._ms, self.options))

    async def get(self, owner: str, response_id: str) -> StoredResponse:
        """A response.

        Raises:
            NotStoredError: this owner has none.
        """
        found = None
        if is_id(response_id):
            found = await self._database.run(response_queries.get, owner, response_id, self._ms)
        if found is None:
            raise NotStoredError("Response", response_id, "response_id")
        return found

    async def delete(self, owner: str, response_id: str) -> None:
        """Deletes a response; NotStoredError where there is none. What works on it is not told."""
        if not is_id(response_id) or not await self._database.run(
            response_queries.remove, owner, response_id, self._ms
        ):
            raise NotStoredError("Response", response_id, "response_id")

    async def change(self, owner: str, response_id: str, status: str, response: bytes) -> bool:
        """Writes how far a response is, or how it ended; False when somebody else has ended or deleted it.

        Args:
            owner: whose it is.
            response_id: of one that is queued or in progress.
            status: as in the response object.
            response: the response object as JSON.
        """
        return await self._database.run(
            response_queries.change, owner, response_id, status, response, self._ms, self.options
        )

    async def cancel(self, owner: str, response_id: str) -> StoredResponse:
        """Ends a response that is queued or in progress as cancelled, and returns what is kept of it."""
        found = await self.get(owner, response_id)
        if found.active:
            await self.change(owner, response_id, "cancelled", settled(found.response, "cancelled"))
            found = await self.get(owner, response_id)
        return found

    async def give_up(self, owner: str, response_id: str, message: str = STOPPED) -> None:
        """Ends a response that is queued or in progress as failed."""
        found = await self.get(owner, response_id)
        if found.active:
            body = settled(found.response, "failed", ("server_error", message))
            await self.change(owner, response_id, "failed", body)

    async def renew(self, names: Sequence[tuple[str, str]]) -> set[tuple[str, str]]:
        """Says that responses (owner, id) are still worked on, within `LEASE_MS`; those that were ended elsewhere."""
        return await self._database.run(response_queries.renew, names, self._ms)

    async def history(self, owner: str, response_id: str) -> list[Item]:
        """What was said up to the end of a response: input and output items of all before it and of itself.

        Raises:
            NotStoredError: it, or one before it, is not there; `param` is previous_response_id.
            StoreLimitError: it is still running, or there is too much of it.
        """
        if not is_id(response_id):
            raise NotStoredError("Previous response", response_id, "previous_response_id")
        chain = await self._database.run(response_queries.chain, owner, response_id, self._ms, self.options)
        return await asyncio.to_thread(_items, chain)

    async def find_items(self, owner: str, names: Sequence[str]) -> dict[str, Item]:
        """Items of this owner's responses and conversations by their ids; those that are nowhere are left out."""
        known = [name for name in dict.fromkeys(names) if is_id(name)]
        return await self._database.run(references.find, owner, known, self._ms)

    async def purge(self) -> int:
        """Deletes what has expired and ends what nobody works on; how many were deleted."""
        await self._database.run(turn_queries.forget, self._ms)
        return await self._database.run(response_queries.purge, self._ms)

    # ---- conversations -----------------------------------------------------------------------------------------------

    async def create_conversation(self, owner: str, made: StoredConversation, items: Iterable[Item] = ()) -> None:
        """Keeps a new conversation with its first items."""
        first = item_bodies(items, self.options.max_item_bytes)
        arguments = (owner, made, first, self._ms, self.options)
        self._note(await self._database.run(conversation_queries.create, *arguments))

    async def conversation(self, owner: str, name: str) -> StoredConversation:
        """A conversation; NotStoredError where there is none, here and in the methods below."""
        return await self._database.run(conversation_queries.get, owner, known_conversation(name))

    async def describe_conversation(self, owner: str, name: str, metadata: bytes) -> StoredConversation:
        """Gives a conversation other metadata, a JSON object."""
        arguments = (owner, known_conversation(name), metadata, self._ms, self.options)
        return await self._database.run(conversation_queries.describe, *arguments)

    async def delete_conversation(self, owner: str, name: str) -> None:
        """Deletes a conversation and its items; responses that belonged to it stay."""
        await self._database.run(conversation_queries.remove, owner, known_conversation(name))

    async def append(
        self, owner: str, name: str, items: Iterable[Item], *, skip_known: bool = False
    ) -> list[StoredItem]:
        """Adds items at the end of a conversation, all or none; those without an id get one.

        Args:
            owner: whose it is.
            name: of the conversation.
            items: checked ones.
            skip_known: items whose id is there already are left out, and not refused.

        Raises:
            StoreLimitError: an item, or all together, are too much.
            InvalidParameterError: an id is there already.
        """
        more = item_bodies(items, self.options.max_item_bytes)
        if more:
            arguments = (owner, known_conversation(name), more, self._ms, self.options)
            work = conversation_queries.append
            self._note(await self._database.run(work, *arguments, skip_known=skip_known))
        return more

    async def page(self, owner: str, name: str, *, limit: int, order: Order, after: str | None = None) -> ItemPage:
        """Some items; InvalidParameterError where `after` is none of them."""
        if after is not None and not is_id(after):
            raise InvalidParameterError(f"after must be the id of an item, not {after!r:.80}", "after")
        return await self._database.run(conversation_queries.page, owner, known_conversation(name), limit, order, after)

    async def items(self, owner: str, name: str) -> list[Item]:
        """All items of a conversation in their order."""
        found = await self._database.run(conversation_queries.everything, owner, known_conversation(name), self._ms)
        return await asyncio.to_thread(lambda: [msgspec.json.decode(item.body) for item in found])

    async def item(self, owner: str, name: str, item_id: str) -> StoredItem:
        """One item."""
        return await self._database.run(conversation_queries.item, owner, known_conversation(name), known_item(item_id))

    async def delete_item(self, owner: str, name: str, item_id: str) -> StoredConversation:
        """Deletes one item; the conversation that it was in."""
        return await self._database.run(
            conversation_queries.remove_item, owner, known_conversation(name), known_item(item_id)
        )

    # ---- turns -------------------------------------------------------------------------------------------------------

    @property
    def shared(self) -> bool:
        """Whether other processes can use it, too."""
        return self.options.url != MEMORY

    async def take_turn(self, owner: str, name: str, holder: str) -> bool:
        """Gives a conversation to whoever answers in it, for 20 seconds; False while another holder has it."""
        return await self._database.run(turn_queries.take, owner, known_conversation(name), holder, self._ms)

    async def keep_turn(self, holder: str) -> None:
        """Says that the holder still answers."""
        await self._database.run(turn_queries.keep, holder, self._ms)

    async def leave_turn(self, holder: str) -> None:
        """Lets the next one in."""
        await self._database.run(turn_queries.leave, holder)

    # ---- inside ------------------------------------------------------------------------------------------------------

    @property
    def _ms(self) -> int:
        return int(self._clock() * 1000)

    def _connect(self) -> Any:
        return connect_to_memory() if self.options.url == MEMORY else connect_to(self.options.url, LAYOUT)

    def _note(self, dropped: int) -> None:
        if dropped:
            logger.warning("the store of responses was full: %d of its oldest records made room", dropped)


def _items(chain: Sequence[StoredResponse]) -> list[Item]:
    return [item for record in chain for item in items_of(record.response, record.input_items)]
