"""Items and names before they go to the database: with ids, as JSON, within the limits of one."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.responses.store.errors import NotStoredError, StoreLimitError
from candle_vllm.responses.store.records import Item, StoredItem, is_id, new_item_id


def item_bodies(items: Iterable[Item], max_bytes: int) -> list[StoredItem]:
    """Checked items as they are kept; those without an id get one.

    Raises:
        InvalidParameterError: an id that can be none.
        StoreLimitError: an item has more than `max_bytes` as JSON.
    """
    made = []
    for index, item in enumerate(items):
        name = item.get("id") or new_item_id(item.get("type", "message"))
        if not isinstance(name, str) or not is_id(name):
            raise InvalidParameterError(f"items.{index}.id is not an id of an item", f"items.{index}.id")
        body = msgspec.json.encode({**item, "id": name})
        if len(body) > max_bytes:
            raise StoreLimitError(
                f"items.{index} has {len(body)} bytes as JSON; at most {max_bytes} are kept of one item.",
                f"items.{index}",
            )
        made.append(StoredItem(id=name, body=body))
    return made


def known_conversation(name: str) -> str:
    """A name that a conversation can have; NotStoredError for another."""
    if not is_id(name):
        raise NotStoredError("Conversation", name, "conversation_id")
    return name


def known_item(name: str) -> str:
    """A name that an item can have; NotStoredError for another."""
    if not is_id(name):
        raise NotStoredError("Conversation item", name, "item_id")
    return name
