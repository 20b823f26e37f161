"""`/v1/conversations` without HTTP: conversations, their metadata and their items."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from pydantic import Field

from candle_vllm.openai.protocol.fields import WireModel
from candle_vllm.responses.api.kept import KeptResponses
from candle_vllm.responses.api.stored_items import ItemList, PageRequest, item_list, stored_item
from candle_vllm.responses.protocol.fields import Metadata
from candle_vllm.responses.protocol.items import InputItem
from candle_vllm.responses.store.entries import Entry, Item, new_id

MAX_ITEMS_AT_ONCE = 20

_Items = Annotated[list[InputItem], Field(max_length=MAX_ITEMS_AT_ONCE, fail_fast=True)]


class ConversationCreateRequest(WireModel):
    """A new conversation: `POST /v1/conversations`.

    Attributes:
        items: the first ones, at most 20.
        metadata: up to 16 labels.
    """

    items: _Items | None = None
    metadata: Metadata | None = None


class ConversationUpdateRequest(WireModel):
    """Other labels of a conversation: `POST /v1/conversations/{conversation_id}`; null takes all away.

    Attributes:
        metadata: those that it has from now on.
    """

    metadata: Metadata | None


class ItemsCreateRequest(WireModel):
    """Further items of a conversation: `POST /v1/conversations/{conversation_id}/items`.

    Attributes:
        items: up to 20, added at its end.
    """

    items: Annotated[_Items, Field(min_length=1)]


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation without its items; `created_at` in Unix seconds."""

    id: str
    object: str = "conversation"
    created_at: int
    metadata: dict[str, str]


class ConversationDeleted(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation that is gone."""

    id: str
    object: str = "conversation.deleted"
    deleted: bool = True


class Conversations:
    """Conversations of a store; NotStoredError where an owner has no such one."""

    def __init__(self, kept: KeptResponses) -> None:
        self._kept = kept

    async def create(self, owner: str, request: ConversationCreateRequest) -> Conversation:
        """A new one."""
        store = await self._kept.store()
        metadata = msgspec.json.encode(request.metadata or {})
        return _shown(await store.create_conversation(owner, new_id("conv"), metadata, _stored(request.items or ())))

    async def retrieve(self, owner: str, name: str) -> Conversation:
        """One of them."""
        return _shown(await (await self._kept.store()).conversation(owner, name))

    async def update(self, owner: str, name: str, request: ConversationUpdateRequest) -> Conversation:
        """One of them, with other metadata."""
        metadata = msgspec.json.encode(request.metadata or {})
        return _shown(await (await self._kept.store()).describe_conversation(owner, name, metadata))

    async def delete(self, owner: str, name: str) -> ConversationDeleted:
        """Deletes it and its items; responses that were made in it stay."""
        await (await self._kept.store()).delete_conversation(owner, name)
        return ConversationDeleted(id=name)

    async def items(self, owner: str, name: str, wanted: PageRequest) -> ItemList:
        """Some of its items."""
        store = await self._kept.store()
        items, more = await store.page(owner, name, limit=wanted.limit, order=wanted.order, after=wanted.after)
        return item_list([(item.id, item.body) for item in items], more)

    async def add_items(self, owner: str, name: str, request: ItemsCreateRequest) -> ItemList:
        """Adds items behind those of a response that is being answered in it, and shows them."""
        store = await self._kept.store()
        async with self._kept.turn(owner, name, "conversation_id"):
            added = await store.append(owner, name, _stored(request.items))
        return item_list([(item.id, item.body) for item in added], has_more=False)

    async def item(self, owner: str, name: str, item_id: str) -> bytes:
        """One item, as JSON."""
        return (await (await self._kept.store()).item(owner, name, item_id)).body

    async def delete_item(self, owner: str, name: str, item_id: str) -> Conversation:
        """Deletes an item; the conversation that it was in."""
        return _shown(await (await self._kept.store()).delete_item(owner, name, item_id))


def _stored(items: Any) -> list[Item]:
    return [stored_item(item, f"items.{index}") for index, item in enumerate(items)]


def _shown(made: Entry) -> Conversation:
    return Conversation(id=made.id, created_at=made.created // 1000, metadata=msgspec.json.decode(made.body))
