"""What the Responses API needs of a store, what it gives it, and the history that a request refers to."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import msgspec
from pydantic import TypeAdapter, ValidationError

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.openai import to_json_bytes
from candle_vllm.openai.errors import UnsupportedParameterError
from candle_vllm.openai.validation import to_request_error
from candle_vllm.responses.api.call_results import Placed
from candle_vllm.responses.protocol.items import InputItem, ItemReference
from candle_vllm.responses.protocol.request import PromptFields
from candle_vllm.responses.protocol.response import Response
from candle_vllm.responses.store.entries import RESPONSE, Entry


class Memory(Protocol):
    """Keeps responses and conversations; what another owner has does not exist."""

    async def history(self, owner: str, response_id: str) -> Sequence[Mapping[str, Any]]:
        """Input and output items of the whole chain that ends with this response, the oldest first.

        Raises:
            RequestError: there is no such response, or it has not ended.
        """
        ...

    async def conversation_items(self, owner: str, conversation_id: str) -> Sequence[Mapping[str, Any]]:
        """The items of a conversation, the oldest first; raises `RequestError` where there is none."""
        ...

    async def find_items(self, owner: str, names: Sequence[str]) -> Mapping[str, Mapping[str, Any]]:
        """Those of these items that are kept, by id."""
        ...

    async def keep(self, entry: Entry) -> None:
        """Keeps a response, and adds its items to the conversation that it names."""
        ...

    def turn(self, owner: str, conversation_id: str) -> AbstractAsyncContextManager[None]:
        """The right to answer in a conversation; whoever comes meanwhile waits."""
        ...


_ITEM = TypeAdapter[InputItem](InputItem)


async def gather_items(request: PromptFields, memory: Memory | None, owner: str) -> list[Placed]:
    """History and input of a request. A reference to an item of the history stands for nothing more than that item.

    Raises:
        RequestError: there is no store, or it does not have what the request refers to.
    """
    given = request.input or []
    if isinstance(given, str):
        given = [_ITEM.validate_python({"type": "message", "role": "user", "content": given})]
    history = await _history(request, memory, owner)
    known = {item.id for item, _ in history}  # a reference to one of these says nothing new
    wanted = {
        item.id: f"input.{number}.id"
        for number, item in enumerate(given)
        if isinstance(item, ItemReference) and item.id not in known
    }
    found = await memory.find_items(owner, list(wanted)) if wanted and memory is not None else {}
    for item_id, path in wanted.items():
        if item_id not in found:
            raise InvalidParameterError(f"{path}: there is no item {item_id!r:.80} here; send the item itself", path)
    items: list[Placed] = []
    for number, item in enumerate(given):
        if not isinstance(item, ItemReference):
            items.append(Placed(item, f"input.{number}"))
        elif item.id in wanted:
            items.append(Placed(_checked(found[item.id], wanted[item.id]), f"input.{number}"))
    return [*history, *items]


async def _history(request: PromptFields, memory: Memory | None, owner: str) -> list[Placed]:
    field = "previous_response_id" if request.previous_response_id is not None else "conversation"
    if getattr(request, field) is None:
        return []
    if memory is None:
        raise UnsupportedParameterError(
            f"{field} is not supported: this server keeps no responses; send the whole conversation as input", field
        )
    if request.previous_response_id is not None:
        kept = await memory.history(owner, request.previous_response_id)
    else:
        kept = await memory.conversation_items(owner, request.conversation_id or "")
    return await asyncio.to_thread(lambda: [Placed(_checked(item, field), field) for item in kept])


def _checked(item: Mapping[str, Any], field: str) -> InputItem:
    """A kept item as an input item."""
    try:
        return _ITEM.validate_python({name: value for name, value in item.items() if value is not None})
    except ValidationError as error:
        wrong = to_request_error(error)
        raise InvalidParameterError(f"{field} has an item that cannot be read: {wrong}", field) from None


def entry_of(owner: str, response: Response, given: Sequence[Mapping[str, Any]]) -> Entry:
    """A response as it is kept.

    Args:
        owner: whose it is; "" where there are no API keys.
        response: as the client gets it.
        given: the items of the request alone, without its history, each with an id.
    """
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
