"""What a store keeps: responses, conversations and their items."""

from __future__ import annotations

import secrets
from typing import Any

import msgspec

MAX_ID = 256  # characters of an id
ACTIVE = ("queued", "in_progress")  # statuses of a response that somebody still works on
STOPPED = "The server was stopped before the response was complete."

Item = dict[str, Any]

_PREFIXES = {
    "message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs",
    "custom_tool_call": "ctc", "custom_tool_call_output": "ctco", "mcp_list_tools": "mcpl", "mcp_call": "mcp",
    "mcp_approval_request": "mcpr", "mcp_approval_response": "mcpa",
}  # fmt: skip


class StoredResponse(msgspec.Struct, frozen=True, kw_only=True):
    """One response.

    Attributes:
        id: `resp_...`.
        owner: hash of the API key that it was made with.
        created_at: seconds since 1970.
        response: the response object as JSON.
        input_items: what its request gave, as a JSON list of items that have their ids.
        previous_response_id: the response that it follows.
        conversation_id: the conversation that it belongs to.
        status: as in the response object.
        background: it runs without its client.
        expires_at: seconds since 1970; None leaves it to the store.
    """

    id: str
    owner: str
    created_at: int
    response: bytes
    input_items: bytes = b"[]"
    previous_response_id: str | None = None
    conversation_id: str | None = None
    status: str = "completed"
    background: bool = False
    expires_at: int | None = None

    @property
    def active(self) -> bool:
        """Whether somebody still works on it."""
        return self.status in ACTIVE


class StoredConversation(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation without its items; `created_at` in seconds since 1970, `metadata` as a JSON object."""

    id: str
    created_at: int
    metadata: bytes


class StoredItem(msgspec.Struct, frozen=True, kw_only=True):
    """An item of a conversation, as JSON with its id."""

    id: str
    body: bytes


class ItemPage(msgspec.Struct, frozen=True, kw_only=True):
    """Some items of a list, and whether there are more behind them."""

    items: tuple[StoredItem, ...]
    has_more: bool


def new_id(prefix: str) -> str:
    """An id that nobody can guess."""
    return f"{prefix}_{secrets.token_hex(24)}"


def new_item_id(kind: str) -> str:
    """An id for an item of a type."""
    return new_id(_PREFIXES.get(kind, "item"))


def is_id(text: str) -> bool:
    """Whether a text can be an id; others are not looked for (PostgreSQL takes no NUL)."""
    return 0 < len(text) <= MAX_ID and text.isascii() and text.isprintable()


def settled(response: bytes, status: str, error: tuple[str, str] | None = None) -> bytes:
    """A response object whose work has ended in a way that nobody generated.

    Args:
        response: as JSON.
        status: "failed" or "cancelled".
        error: code and message, for people.
    """
    made: dict[str, Any] = msgspec.json.decode(response)
    made["status"] = status
    if error is not None:
        made["error"] = {"code": error[0], "message": error[1]}
    return msgspec.json.encode(made)


def items_of(response: bytes, input_items: bytes) -> list[Item]:
    """What a response was given and what it gave, both as JSON, in their order."""
    return msgspec.json.decode(input_items, type=list[Item]) + msgspec.json.decode(response, type=_Output).output


class _Output(msgspec.Struct):
    output: list[Item] = msgspec.field(default_factory=list)
