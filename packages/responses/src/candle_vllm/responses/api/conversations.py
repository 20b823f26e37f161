# SPDX-License-Identifier: MIT
"""`/v1/conversations` without HTTP: conversations, their metadata and their items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import msgspec
from pydantic import Field

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.openai.protocol.fields import WireModel
from candle_vllm.responses.api.response_store import ResponseStore, note_dropped
from candle_vllm.responses.api.stored_items import ItemList, PageRequest, item_list, stored_items
from candle_vllm.responses.protocol.fields import Metadata
from candle_vllm.responses.protocol.items import InputItem
from candle_vllm.responses.store import entries

if TYPE_CHECKING:
    from candle_vllm.responses.store.sql import SqlBackend

MAX_ITEMS_AT_ONCE = 20

_Items = Annotated[list[InputItem], Field(max_length=MAX_ITEMS_AT_ONCE, fail_fast=True)]


class ConversationCreateRequest(WireModel):
    """A new conversation: `POST /v1/conversations`.

    Attributes:
        items: the first items, at most 20.
        metadata: up to 16 key-value pairs.
    """

    items: _Items | None = None
    metadata: Metadata | None = None


class ConversationUpdateRequest(WireModel):
    """New metadata of a conversation: `POST /v1/conversations/{conversation_id}`.

    Attributes:
        metadata: key-value pairs that replace the earlier ones; null removes all.
    """

    metadata: Metadata | None


class ItemsCreateRequest(WireModel):
    """Further items of a conversation: `POST /v1/conversations/{conversation_id}/items`.

    Attributes:
        items: up to 20 items, which are added at the end of the conversation.
    """

    items: Annotated[_Items, Field(min_length=1)]


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation without its items; `created_at` is in Unix seconds."""

    id: str
    object: str = "conversation"
    created_at: int
    metadata: dict[str, str]


class ConversationDeleted(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation that has been deleted."""

    id: str
    object: str = "conversation.deleted"
    deleted: bool = True


class Conversations:
    """Conversations of a store; methods raise NotStoredError if the owner has no such conversation."""

    def __init__(self, store: ResponseStore) -> None:
        self._store = store

    async def create(self, owner: str, request: ConversationCreateRequest) -> Conversation:
        store, metadata = await self._store.backend(), msgspec.json.encode(request.metadata or {})
        made = entries.Entry(
            kind=entries.CONVERSATION, owner=owner, id=entries.new_id("conv"), created=store.now, body=metadata
        )
        parts = entries.parts_of(stored_items(request.items or (), "items"), self._store.options.max_item_bytes)
        note_dropped(await store.put(made, parts=parts))
        return _shown(made)

    async def retrieve(self, owner: str, name: str) -> Conversation:
        store, name = await self._find(name)
        found = await store.get(entries.CONVERSATION, owner, name)
        if found is None:
            raise entries.NotStoredError("Conversation", name, "conversation_id")
        return _shown(found)

    async def update(self, owner: str, name: str, request: ConversationUpdateRequest) -> Conversation:
        """Replace the metadata of a conversation, and return it."""
        store, name = await self._find(name)
        await store.change(entries.CONVERSATION, owner, name, msgspec.json.encode(request.metadata or {}))
        return await self.retrieve(owner, name)

    async def delete(self, owner: str, name: str) -> ConversationDeleted:
        """Delete a conversation and its items; responses that were generated in it remain stored."""
        store, name = await self._find(name)
        if not await store.delete(entries.CONVERSATION, owner, name):
            raise entries.NotStoredError("Conversation", name, "conversation_id")
        return ConversationDeleted(id=name)

    async def items(self, owner: str, name: str, wanted: PageRequest) -> ItemList:
        """Return a page of a conversation's items; InvalidParameterError if `after` is not the id of one."""
        if wanted.after is not None and not entries.is_id(wanted.after):
            raise InvalidParameterError(f"after must be the id of an item, not {wanted.after!r:.80}", "after")
        store, name = await self._find(name)
        found = await store.parts(entries.CONVERSATION, owner, name, wanted.limit + 1, wanted.order, wanted.after)
        if found is None:
            raise InvalidParameterError(
                f"after must be the id of an item of this conversation, not {wanted.after!r:.80}", "after"
            )
        return _page(found[: wanted.limit], has_more=len(found) > wanted.limit)

    async def add_items(self, owner: str, name: str, request: ItemsCreateRequest) -> ItemList:
        """Add items once no response is being generated in the conversation, and return them."""
        async with self._store.turn(owner, name, "conversation_id"):
            return _page(await self._store.append(owner, name, stored_items(request.items, "items")), has_more=False)

    async def item(self, owner: str, name: str, item_id: str) -> bytes:
        """Return one item as JSON."""
        store, name = await self._find(name)
        found = await store.part(entries.CONVERSATION, owner, name, entries.checked_id("Conversation item", item_id))
        if found is None:
            raise entries.NotStoredError("Conversation item", item_id, "item_id")
        return found.body

    async def delete_item(self, owner: str, name: str, item_id: str) -> Conversation:
        """Delete an item, and return its conversation."""
        store, name = await self._find(name)
        part = entries.checked_id("Conversation item", item_id)
        if not await store.delete_part(entries.CONVERSATION, owner, name, part):
            raise entries.NotStoredError("Conversation item", item_id, "item_id")
        return await self.retrieve(owner, name)

    async def _find(self, name: str) -> tuple[SqlBackend, str]:
        """Return the store and the checked id of a conversation."""
        return await self._store.backend(), entries.checked_id("Conversation", name)


def _page(parts: Sequence[entries.EntryItem], *, has_more: bool) -> ItemList:
    return item_list([(part.id, part.body) for part in parts], has_more)


def _shown(made: entries.Entry) -> Conversation:
    return Conversation(id=made.id, created_at=made.created // 1000, metadata=msgspec.json.decode(made.body))
