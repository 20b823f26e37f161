"""Pages of items: what a list is asked for, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from candle_vllm.core.errors import InvalidParameterError

MAX_LIMIT = 100
DEFAULT_LIMIT = 20

Order = Literal["asc", "desc"]


class PageRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Which items: at most `limit`, newest ("desc") or oldest ("asc") first, behind the item `after`."""

    limit: int = DEFAULT_LIMIT
    order: Order = "desc"
    after: str | None = None


class AnyItem(msgspec.Struct, frozen=True, kw_only=True):
    """An item: a message, a call, what came of one, or thoughts. What else it has depends on its type."""

    id: str
    type: str


class ItemList(msgspec.Struct, frozen=True, kw_only=True):
    """One page of items; the ids are null where it is empty."""

    object: str = "list"
    data: tuple[msgspec.Raw, ...]
    first_id: str | None
    last_id: str | None
    has_more: bool


def item_list(items: Sequence[tuple[str, bytes]], has_more: bool) -> ItemList:
    """A page of items, each with its id and itself as JSON."""
    return ItemList(
        data=tuple(msgspec.Raw(body) for _, body in items),
        first_id=items[0][0] if items else None,
        last_id=items[-1][0] if items else None,
        has_more=has_more,
    )


def page_of(items: Sequence[dict[str, Any]], wanted: PageRequest) -> ItemList:
    """A page of all items of something, given in their order.

    Raises:
        InvalidParameterError: `after` is none of them.
    """
    ordered = list(items) if wanted.order == "asc" else list(items)[::-1]
    if wanted.after is not None:
        places = [index for index, item in enumerate(ordered) if item.get("id") == wanted.after]
        if not places:
            raise InvalidParameterError(f"after must be the id of an item, not {wanted.after!r:.80}", "after")
        ordered = ordered[places[0] + 1 :]
    shown = [(item.get("id", ""), msgspec.json.encode(item)) for item in ordered[: wanted.limit]]
    return item_list(shown, has_more=len(ordered) > wanted.limit)
