# SPDX-License-Identifier: MIT
"""Items as they are stored and shown, with id, type and status; pages of items; the stored entry of a response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.openai import to_json_bytes
from candle_vllm.openai.protocol.fields import WireModel
from candle_vllm.responses.protocol.items import ItemReference, MessageItem
from candle_vllm.responses.protocol.response import Response
from candle_vllm.responses.store.backend import Order
from candle_vllm.responses.store.entries import RESPONSE, Entry, Item, new_item_id

_WITHOUT_STATUS = frozenset(
    {"reasoning", "compaction", "mcp_list_tools", "mcp_approval_request", "mcp_approval_response"}
)


def stored_items(given: Sequence[WireModel], path: str = "input") -> list[Item]:
    """Return the checked items at `path` of a request, without references, as stored items, each with an id."""
    return [stored_item(item, f"{path}.{index}") for index, item in enumerate(given)]


def stored_item(item: WireModel | Item, param: str) -> Item:
    """Return one checked item of a request as it is stored; an item that was stored before does not change.

    Raises InvalidParameterError, which names `param`, if the item only refers to another item.
    """
    if isinstance(item, dict):
        return item
    if isinstance(item, ItemReference):
        raise InvalidParameterError(f"{param} refers to an item; put the item itself here", param)
    made = item.model_dump(mode="json", by_alias=True, exclude_none=True)
    kind = made.setdefault("type", "message")
    made["id"] = made.get("id") or new_item_id(kind)
    if kind not in _WITHOUT_STATUS:
        made.setdefault("status", "completed")
    if isinstance(item, MessageItem):
        made["content"] = _parts(made["content"], item.role)
    return made


def _parts(content: str | list[Item], role: str) -> list[Item]:
    """Return a content as a list of parts, with the type for its role."""
    kind = "output_text" if role == "assistant" else "input_text"
    parts = [{"type": kind, "text": content}] if isinstance(content, str) else content
    made: list[Item] = [{**part, "type": kind} if part["type"] == "text" else part for part in parts]
    for part in made:
        if part["type"] == "output_text":
            part.setdefault("annotations", [])
    return made


MAX_LIMIT = 100
DEFAULT_LIMIT = 20


class PageRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Which items to return: at most `limit`, newest ("desc") or oldest ("asc") first, after the item `after`."""

    limit: int = DEFAULT_LIMIT
    order: Order = "desc"
    after: str | None = None


class AnyItem(msgspec.Struct, frozen=True, kw_only=True):
    """An item, such as a message, a call, a call's result or reasoning; its further fields depend on its type."""

    id: str
    type: str


class ItemList(msgspec.Struct, frozen=True, kw_only=True):
    """One page of items; the ids are null if it is empty."""

    object: str = "list"
    data: tuple[msgspec.Raw, ...]
    first_id: str | None
    last_id: str | None
    has_more: bool


def item_list(items: Sequence[tuple[str, bytes]], has_more: bool) -> ItemList:
    """Return a page of items, which are pairs of id and JSON."""
    return ItemList(
        data=tuple(msgspec.Raw(body) for _, body in items),
        first_id=items[0][0] if items else None,
        last_id=items[-1][0] if items else None,
        has_more=has_more,
    )


def page_of(items: Sequence[dict[str, Any]], wanted: PageRequest) -> ItemList:
    """Return one page of a list of items; InvalidParameterError if `after` is not the id of one of them."""
    ordered = list(items) if wanted.order == "asc" else list(items)[::-1]
    if wanted.after is not None:
        places = [index for index, item in enumerate(ordered) if item.get("id") == wanted.after]
        if not places:
            raise InvalidParameterError(f"after must be the id of an item, not {wanted.after!r:.80}", "after")
        ordered = ordered[places[0] + 1 :]
    shown = [(item.get("id", ""), msgspec.json.encode(item)) for item in ordered[: wanted.limit]]
    return item_list(shown, has_more=len(ordered) > wanted.limit)


def entry_of(owner: str, response: Response, given: Sequence[Mapping[str, Any]]) -> Entry:
    """Return a response as an entry of the store; `given` are the items of its request without the history."""
    return Entry(
        kind=RESPONSE,
        owner=owner,
        id=response.id,
        created=response.created_at * 1000,
        status=response.status,
        follows=response.previous_response_id,
        about={
            "background": bool(response.background),
            "conversation": response.conversation.id if response.conversation is not None else None,
        },
        body=to_json_bytes(response),
        given=msgspec.json.encode(given),
    )
