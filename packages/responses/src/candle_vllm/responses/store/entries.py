# SPDX-License-Identifier: MIT
"""What a store keeps: entries and their parts, and what responses make of them; what it refuses."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Any

import msgspec

from candle_vllm.core.errors import CandleVllmError, InvalidParameterError, RequestError


class NotStoredError(RequestError):
    """The caller has no such response, conversation or item, whether or not somebody else has one."""

    def __init__(self, what: str, name: str, param: str) -> None:
        super().__init__(f"{what} with id {name!r:.80} was not found.", param)


class StoreLimitError(RequestError):
    """What is to be kept is more than the store may hold."""


class StoreFullError(StoreLimitError):
    """Nothing of a store can make room now; later something may.

    Attributes:
        own: it is the owner's share that is full, and not the store.
    """

    def __init__(self, message: str, *, own: bool) -> None:
        super().__init__(message)
        self.own = own


class ConversationBusyError(RequestError):
    """Too many responses wait for their turn in one conversation."""


class StoreUnavailableError(CandleVllmError):
    """A store does not answer in time, or too many calls wait for it; the cause has the details.

    Attributes:
        setting: the setting that says where the store is.
    """

    def __init__(self, message: str, setting: str | None = None) -> None:
        super().__init__(message)
        self.setting = setting


MAX_ID = 256  # characters of an id
OVERHEAD = 512  # bytes that an entry or a part takes beside its contents, about
ACTIVE = ("queued", "in_progress", "streaming")  # statuses of what somebody still works on
STOPPED = "The server was stopped before the response was complete."
RESPONSE, CONVERSATION = "response", "conversation"  # kinds of entry

Item = dict[str, Any]

_PREFIXES = {
    "message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs", "compaction": "cmp",
    "custom_tool_call": "ctc", "custom_tool_call_output": "ctco", "mcp_list_tools": "mcpl", "mcp_call": "mcp",
    "mcp_approval_request": "mcpr", "mcp_approval_response": "mcpa",
}  # fmt: skip


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is kept. Times are milliseconds since 1970.

    Attributes:
        kind: what it is.
        owner: hash of the API key that it was made with.
        id: the owner has one with it.
        created: when it was made.
        status: how far it is; of a response as in the response object.
        expires: when it goes; None: never.
        lease: until then its holder has it; None: nobody has it.
        holder: who has it.
        follows: the entry before it, of a response.
        about: what is said of it in short, shown in lists; of a response whether it runs in the `background`, and its
            `conversation`.
        body: what it is, as JSON: the response object, a conversation's metadata, an answer; empty while an answer
            streams, and in lists.
        given: its input: of a response its request's items, a JSON list whose items have their ids.
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
        return f"Entry({self.kind} {self.id!r}, {self.status})"  # its contents are private, and some of it secret

    @property
    def active(self) -> bool:
        """Whether somebody still works on it."""
        return self.status in ACTIVE

    @property
    def size(self) -> int:
        """The bytes that it takes without its parts, about."""
        return len(self.body) + len(self.given) + OVERHEAD


class EntryItem(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of an entry: an item of a conversation, as JSON with its id."""

    id: str
    body: bytes

    @property
    def size(self) -> int:
        """The bytes that it takes, about."""
        return len(self.body) + OVERHEAD


def new_id(prefix: str) -> str:
    """An id of enough random characters that it is a secret."""
    return f"{prefix}_{secrets.token_hex(24)}"


def new_item_id(kind: str) -> str:
    """An id for an item of a type."""
    return new_id(_PREFIXES.get(kind, "item"))


def is_id(text: str) -> bool:
    """Whether a text can be an id; others are not looked for (PostgreSQL takes no NUL)."""
    return 0 < len(text) <= MAX_ID and text.isascii() and text.isprintable()


def checked_id(what: str, text: str, param: str | None = None) -> str:
    """A text that can be an id of something; NotStoredError, which blames `param`, for another."""
    if not is_id(text):
        raise NotStoredError(what, text, param or ("conversation_id" if what == "Conversation" else "item_id"))
    return text


def parts_of(items: Iterable[Item], max_size: int) -> list[EntryItem]:
    """Checked items as parts; those without an id get one.

    Raises:
        InvalidParameterError: an invalid id.
        StoreLimitError: an item has more than `max_size` bytes as JSON.
    """
    made = []
    for index, item in enumerate(items):
        name = item.get("id") or new_item_id(item.get("type", "message"))
        if not isinstance(name, str) or not is_id(name):
            raise InvalidParameterError(f"items.{index}.id is not an id of an item", f"items.{index}.id")
        body = msgspec.json.encode({**item, "id": name})
        if len(body) > max_size:
            raise StoreLimitError(
                f"items.{index} has {len(body)} bytes as JSON; at most {max_size} are kept of one item.",
                f"items.{index}",
            )
        made.append(EntryItem(id=name, body=body))
    return made


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


def items_of(response: bytes, given: bytes = b"[]") -> list[Item]:
    """What a response was given and what it gave, both as JSON, in their order."""
    return msgspec.json.decode(given, type=list[Item]) + msgspec.json.decode(response, type=_Output).output


class _Output(msgspec.Struct):
    output: list[Item] = msgspec.field(default_factory=list)
