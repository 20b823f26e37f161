"""ResponseStore: responses and conversations by the hash of their key and their id.

Nothing is told of another key's: it does not exist. Calls are bounded in number and time, and every failure of the
backend is a `StoreUnavailableError`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence

import msgspec

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.responses.store.backend import Held, Order
from candle_vllm.responses.store.entries import (
    ACTIVE,
    CONVERSATION,
    RESPONSE,
    STOPPED,
    Entry,
    EntryItem,
    Item,
    NotStoredError,
    StoreLimitError,
    is_id,
    items_of,
    parts_of,
    settled,
)
from candle_vllm.responses.store.options import MEMORY, StoreOptions, backend_at

LEASE_MS = 60_000  # of a response that is worked on
TURN_MS = 20_000  # of who answers in a conversation: others wait for so long for a server that has died
_PREVIOUS = "previous_response_id"

logger = logging.getLogger(__name__)


class ResponseStore:
    """A store; opened, used and closed in one event loop.

    Args:
        options: where it is and how much it holds.
        clock: seconds since 1970.
    """

    def __init__(self, options: StoreOptions, clock: Callable[[], float] = time.time) -> None:
        self.options = options
        self.backend = backend_at(options.place, options.bounds, clock)
        self.open, self.close, self.owner = self.backend.open, self.backend.close, self.backend.owner

    @property
    def now(self) -> int:
        """The store's clock, in milliseconds since 1970."""
        return self.backend.now

    # ---- responses ---------------------------------------------------------------------------------------------------

    async def put(self, entry: Entry) -> None:
        """Keeps a response; the oldest of the key that has most makes room.

        Raises:
            StoreLimitError: it is larger than one may be, or than the store.
        """
        expires = entry.expires
        if expires is None:
            expires = entry.created + self.options.retention_days * 86_400_000
        lease = {"lease": self.now + LEASE_MS, "holder": entry.id} if entry.active else {}
        names = await asyncio.to_thread(_names, entry.body, entry.given)
        self._note(await self.backend.put(msgspec.structs.replace(entry, expires=expires, **lease), names))

    async def get(self, owner: str, response_id: str) -> Entry:
        """A response.

        Raises:
            NotStoredError: this owner has none.
        """
        found = await self.backend.get(RESPONSE, owner, response_id) if is_id(response_id) else None
        if found is not None and self._has_lapsed(found):
            await self._fail(found, STOPPED)
            found = await self.backend.get(RESPONSE, owner, response_id)
        if found is None:
            raise NotStoredError("Response", response_id, "response_id")
        return found

    async def delete(self, owner: str, response_id: str) -> None:
        """Deletes a response; NotStoredError where there is none. What works on it is not told."""
        if not is_id(response_id) or not await self.backend.delete(RESPONSE, owner, response_id):
            raise NotStoredError("Response", response_id, "response_id")

    async def change(self, owner: str, response_id: str, status: str, response: bytes) -> bool:
        """Writes how far a response is, or how it ended; False when somebody else has ended or deleted it.

        Args:
            owner: whose it is.
            response_id: of one that is queued or in progress.
            status: as in the response object.
            response: the response object as JSON.
        """
        if status in ACTIVE:
            lease = self.now + LEASE_MS
            return await self.backend.change(RESPONSE, owner, response_id, response, status=status, lease=lease)
        names = await asyncio.to_thread(_names, response)
        return await self.backend.change(RESPONSE, owner, response_id, response, status=status, names=names)

    async def cancel(self, owner: str, response_id: str) -> Entry:
        """Ends a response that is queued or in progress as cancelled, and returns what is kept of it."""
        found = await self.get(owner, response_id)
        if found.active:
            await self.change(owner, response_id, "cancelled", settled(found.body, "cancelled"))
            found = await self.get(owner, response_id)
        return found

    async def renew(self, names: Sequence[tuple[str, str]]) -> set[tuple[str, str]]:
        """Says that responses (owner, id) are still worked on, within `LEASE_MS`; those that were ended elsewhere."""
        held = [Held(owner, name, name) for owner, name in names]
        return {(each.owner, each.id) for each in await self.backend.move(held, self.now + LEASE_MS)}

    async def history(self, owner: str, response_id: str) -> list[Item]:
        """What was said up to the end of a response: input and output items of all before it and of itself.

        Raises:
            NotStoredError: it, or one before it, is not there; `param` is previous_response_id.
            StoreLimitError: it is still running, or there is too much of it.
        """
        if not is_id(response_id):
            raise NotStoredError("Previous response", response_id, _PREVIOUS)
        most, most_size = self.options.max_chain, self.options.max_chain_bytes
        chain = await self.backend.chain(RESPONSE, owner, response_id, most, most_size)
        while chain and self._has_lapsed(chain[-1]):
            await self._fail(chain[-1], STOPPED)
            chain = await self.backend.chain(RESPONSE, owner, response_id, most, most_size)
        missing = chain[-1].follows if chain else response_id
        if chain and chain[-1].active:
            name, status = chain[-1].id, chain[-1].status
            raise StoreLimitError(f"The response {name!r} is still {status}: wait until it has ended.", _PREVIOUS)
        if len(chain) > most or sum(each.size for each in chain) > most_size:
            raise StoreLimitError(
                f"The responses before this one are too long: at most {most} of them and {most_size} bytes may follow "
                "each other. Begin anew with a summary.",
                _PREVIOUS,
            )
        if missing:
            broken = f"Response {response_id!r:.80} cannot be continued: the earlier response"
            raise NotStoredError("Previous response" if missing == response_id else broken, missing, _PREVIOUS)
        return await asyncio.to_thread(
            lambda: [item for entry in reversed(chain) for item in items_of(entry.body, entry.given)]
        )

    async def find_items(self, owner: str, names: Sequence[str]) -> dict[str, Item]:
        """Items of this owner's responses and conversations by their ids; those that are nowhere are left out."""
        known = [name for name in dict.fromkeys(names) if is_id(name)]
        parts, entries = await self.backend.find(owner, known)
        return await asyncio.to_thread(_found, set(known), parts, entries)

    async def purge(self) -> int:
        """Deletes what has expired and ends what nobody works on; how many were deleted."""
        for entry in await self.backend.lapsed():
            await self._fail(entry, STOPPED)
        return await self.backend.expire()

    # ---- conversations -----------------------------------------------------------------------------------------------

    async def create_conversation(
        self, owner: str, name: str, metadata: bytes = b"{}", items: Iterable[Item] = ()
    ) -> Entry:
        """Keeps a new conversation with its metadata, a JSON object, and its first items."""
        made = Entry(kind=CONVERSATION, owner=owner, id=name, created=self.now, body=metadata)
        self._note(await self.backend.put(made, parts=parts_of(items, self.options.max_item_bytes)))
        return made

    async def conversation(self, owner: str, name: str) -> Entry:
        """A conversation; NotStoredError where there is none, here and in the methods below."""
        found = await self.backend.get(CONVERSATION, owner, _known("Conversation", name))
        if found is None:
            raise NotStoredError("Conversation", name, "conversation_id")
        return found

    async def describe_conversation(self, owner: str, name: str, metadata: bytes) -> Entry:
        """Gives a conversation other metadata, a JSON object."""
        await self.backend.change(CONVERSATION, owner, _known("Conversation", name), metadata)
        return await self.conversation(owner, name)

    async def delete_conversation(self, owner: str, name: str) -> None:
        """Deletes a conversation and its items; responses that belonged to it stay."""
        if not await self.backend.delete(CONVERSATION, owner, _known("Conversation", name)):
            raise NotStoredError("Conversation", name, "conversation_id")

    async def append(
        self, owner: str, name: str, items: Iterable[Item], *, skip_known: bool = False
    ) -> list[EntryItem]:
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
        more = parts_of(items, self.options.max_item_bytes)
        if more:
            name = _known("Conversation", name)
            self._note(await self.backend.append(CONVERSATION, owner, name, more, skip_known=skip_known))
        return more

    async def page(
        self, owner: str, name: str, *, limit: int, order: Order, after: str | None = None
    ) -> tuple[list[EntryItem], bool]:
        """Some items, and whether there are more behind them; InvalidParameterError where `after` is none of them."""
        if after is not None and not is_id(after):
            raise InvalidParameterError(f"after must be the id of an item, not {after!r:.80}", "after")
        name = _known("Conversation", name)
        found = await self.backend.parts(CONVERSATION, owner, name, limit + 1, order, after)
        if found is None:
            raise InvalidParameterError(
                f"after must be the id of an item of this conversation, not {after!r:.80}", "after"
            )
        return found[:limit], len(found) > limit

    async def items(self, owner: str, name: str) -> list[Item]:
        """All items of a conversation in their order."""
        found = await self.backend.parts(CONVERSATION, owner, _known("Conversation", name)) or []
        return await asyncio.to_thread(lambda: [msgspec.json.decode(item.body) for item in found])

    async def item(self, owner: str, name: str, item_id: str) -> EntryItem:
        """One item."""
        name, item_id = _known("Conversation", name), _known("Conversation item", item_id)
        found = await self.backend.part(CONVERSATION, owner, name, item_id)
        if found is None:
            raise NotStoredError("Conversation item", item_id, "item_id")
        return found

    async def delete_item(self, owner: str, name: str, item_id: str) -> Entry:
        """Deletes one item; the conversation that it was in."""
        name, item_id = _known("Conversation", name), _known("Conversation item", item_id)
        if not await self.backend.delete_part(CONVERSATION, owner, name, item_id):
            raise NotStoredError("Conversation item", item_id, "item_id")
        return await self.conversation(owner, name)

    # ---- turns -------------------------------------------------------------------------------------------------------

    @property
    def shared(self) -> bool:
        """Whether other processes can use it, too."""
        return self.options.url != MEMORY

    async def take_turn(self, turn: Held) -> bool:
        """Gives a conversation to whoever answers in it, for 20 seconds; False while another holder has it."""
        _known("Conversation", turn.id)
        return await self.backend.claim(CONVERSATION, turn, self.now + TURN_MS)

    async def keep_turn(self, turn: Held) -> None:
        """Says that the holder still answers."""
        await self.backend.move([turn], self.now + TURN_MS)

    async def leave_turn(self, turn: Held) -> None:
        """Lets the next one in."""
        await self.backend.move([turn], None)

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _has_lapsed(self, entry: Entry) -> bool:
        """Whether the server that worked on it has died."""
        return entry.active and entry.lease is not None and entry.lease <= self.now

    async def _fail(self, entry: Entry, message: str) -> None:
        body = settled(entry.body, "failed", ("server_error", message))
        where = RESPONSE, entry.owner, entry.id
        await self.backend.change(*where, body, status="failed", lease_was=entry.lease)  # or it was renewed meanwhile

    def _note(self, dropped: int) -> None:
        if dropped:
            logger.warning("the store of responses was full: %d of its oldest records made room", dropped)


def _known(what: str, name: str) -> str:
    """A name that a conversation or an item can have; NotStoredError for another."""
    if not is_id(name):
        raise NotStoredError(what, name, "conversation_id" if what == "Conversation" else "item_id")
    return name


def _names(response: bytes, given: bytes = b"[]") -> set[str]:
    """The ids of a response's items."""
    return {item["id"] for item in items_of(response, given) if isinstance(item.get("id"), str)}


def _found(wanted: set[str], parts: Sequence[EntryItem], entries: Sequence[Entry]) -> dict[str, Item]:
    found: dict[str, Item] = {part.id: msgspec.json.decode(part.body) for part in parts}
    for entry in entries:
        found |= {item["id"]: item for item in items_of(entry.body, entry.given) if item.get("id") in wanted}
    return found
