"""Input items as they are kept and shown: with their id, type and status, contents as parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.openai.protocol.fields import WireModel
from candle_vllm.responses.protocol.items import ItemReference, MessageItem
from candle_vllm.responses.store.entries import Item, new_item_id

_WITHOUT_STATUS = frozenset({"reasoning", "mcp_list_tools", "mcp_approval_request", "mcp_approval_response"})


def stored_items(given: str | Sequence[Any] | None) -> list[Item]:
    """The `input` of a checked request, each item with an id.

    Args:
        given: a text, or checked input items; references among them must have been replaced by what they refer to.
    """
    if given is None:
        return []
    if isinstance(given, str):
        given = [MessageItem(role="user", content=given)]
    return [stored_item(item, f"input.{index}") for index, item in enumerate(given)]


def stored_item(item: WireModel | Item, param: str) -> Item:
    """One checked item as it is kept.

    Args:
        item: as the request has it, or an item that was kept before.
        param: what to blame.

    Raises:
        InvalidParameterError: it only refers to another item.
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
    """A content as parts of the type that its role has."""
    kind = "output_text" if role == "assistant" else "input_text"
    parts = [{"type": kind, "text": content}] if isinstance(content, str) else content
    made: list[Item] = [{**part, "type": kind} if part["type"] == "text" else part for part in parts]
    for part in made:
        if part["type"] == "output_text":
            part.setdefault("annotations", [])
    return made
