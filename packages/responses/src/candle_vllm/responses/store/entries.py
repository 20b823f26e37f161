# SPDX-License-Identifier: MIT
"""The contents of a store: entries, their parts, and the errors of a store."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Any

import msgspec

from candle_vllm.core.errors import CandleVllmError, InvalidParameterError, RequestError


class NotStoredError(RequestError):
    """The caller owns no such response, conversation, item, file or batch; another owner may have one."""

    def __init__(self, what: str, name: str, param: str) -> None:
        super().__init__(f"{what} with id {name!r:.80} was not found.", param)


class StoreLimitError(RequestError):
    """The data exceeds a limit of the store."""


class StoreFullError(StoreLimitError):
    """The store is full, and too few entries can be dropped now; this may change later.

    `own` tells whether the owner's share is full, and not the store.
    """

    def __init__(self, message: str, *, own: bool) -> None:
        super().__init__(message)
        self.own = own


class ConversationBusyError(RequestError):
    """Too many responses wait for their turn in one conversation."""


class StoreUnavailableError(CandleVllmError):
    """A store is closed, fails or is too slow, or too many calls wait for it; the cause, if any, has the details.

    `setting` is the name of the setting with the location of the store.
    """

    def __init__(self, message: str, setting: str | None = None) -> None:
        super().__init__(message)
        self.setting = setting


def traced(failure: BaseException) -> BaseException | None:
    """Return the failure as `exc_info` of a log record; None for an unavailable store, whose message is enough."""
    return None if isinstance(failure, StoreUnavailableError) else failure


MAX_ID = 256  # characters of an id
OVERHEAD = 512  # approximate bytes that an entry or a part takes besides its contents
ACTIVE = ("queued", "in_progress", "streaming")  # statuses of entries in progress
STOPPED = "The server was stopped before the response was complete."
RESPONSE, CONVERSATION = "response", "conversation"  # kinds of entry

Item = dict[str, Any]

_PREFIXES = {
    "message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs", "compaction": "cmp",
    "custom_tool_call": "ctc", "custom_tool_call_output": "ctco", "mcp_list_tools": "mcpl", "mcp_call": "mcp",
    "mcp_approval_request": "mcpr", "mcp_approval_response": "mcpa",
}  # fmt: skip


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One record of a store. Times are milliseconds since 1970.

    Attributes:
        kind: kind of entry.
        owner: hash of the API key that made it.
        id: unique for its owner.
        status: status; for a response, the status of the response object.
        expires: time of its expiry; None means never.
        lease, holder: end of the lease, None without one; who has it, or had it last.
        follows: id of the response that this response continues.
        about: summary, also in lists; for a response, whether it runs in the `background`, and its `conversation`.
        body: JSON of the response object, metadata, answer or batch; empty while an answer streams, and in lists.
        given: input; for a response, its request's items as a JSON list of items with ids.
    """

    kind: str
    owner: str
    id: str
    created: int
    status: str = ""
    expires: int | None = None
    lease: int | None = None
    holder: str | None = None
    follows: str | None = None
    about: dict[str, Any] = {}
    body: bytes = b""
    given: bytes = b""

    def __repr__(self) -> str:
        return f"Entry({self.kind} {self.id!r}, {self.status})"  # its contents are private, and partly secret

    @property
    def active(self) -> bool:
        """Whether the entry is in progress."""
        return self.status in ACTIVE

    @property
    def size(self) -> int:
        """Approximate bytes of the entry without its parts."""
        return len(self.body) + len(self.given) + OVERHEAD


class EntryItem(msgspec.Struct, frozen=True, kw_only=True):
    """A part of an entry: for example, an item of a conversation, as JSON with its id."""

    id: str
    body: bytes

    @property
    def size(self) -> int:
        """Approximate bytes of the part."""
        return len(self.body) + OVERHEAD


def new_id(prefix: str) -> str:
    """Return a random id that nobody can find by trial."""
    return f"{prefix}_{secrets.token_hex(24)}"


def new_item_id(kind: str) -> str:
    """Return a new id for an item of a type."""
    return new_id(_PREFIXES.get(kind, "item"))


def is_id(text: str) -> bool:
    """Whether a text can be an id; any other text is not looked up, because PostgreSQL refuses NUL."""
    return 0 < len(text) <= MAX_ID and text.isascii() and text.isprintable()


def checked_id(what: str, text: str, param: str | None = None) -> str:
    """Return a text if it can be an id; else raise NotStoredError with `param` (None: conversation_id or item_id)."""
    if not is_id(text):
        raise NotStoredError(what, text, param or ("conversation_id" if what == "Conversation" else "item_id"))
    return text


def parts_of(items: Iterable[Item], max_size: int, path: str = "items") -> list[EntryItem]:
    """Convert checked items to parts; an item without an id gets one.

    Raises InvalidParameterError for an invalid id, and StoreLimitError for an item of more than `max_size` bytes as
    JSON; `path` is the path of the items in the request.
    """
    made = []
    for index, item in enumerate(items):
        name = item.get("id") or new_item_id(item.get("type", "message"))
        if not isinstance(name, str) or not is_id(name):
            raise InvalidParameterError(f"{path}.{index}.id is not an id of an item", f"{path}.{index}.id")
        body = msgspec.json.encode({**item, "id": name})
        if len(body) > max_size:
            raise StoreLimitError(
                f"{path}.{index} has {len(body)} bytes as JSON; at most {max_size} are stored of one item.",
                f"{path}.{index}",
            )
        made.append(EntryItem(id=name, body=body))
    return made


def settled(response: bytes, status: str, error: tuple[str, str] | None = None) -> bytes:
    """Return the JSON of a response that another task than its own has ended as "failed" or "cancelled".

    `error` is its code and message.
    """
    made: dict[str, Any] = msgspec.json.decode(response)
    made["status"] = status
    if error is not None:
        made["error"] = {"code": error[0], "message": error[1]}
    return msgspec.json.encode(made)


def items_of(response: bytes, given: bytes = b"[]") -> list[Item]:
    """Return the input items (`given`) and output items of a response, both from JSON."""
    return msgspec.json.decode(given, type=list[Item]) + msgspec.json.decode(response, type=_Output).output


class _Output(msgspec.Struct):
    output: list[Item] = msgspec.field(default_factory=list)
