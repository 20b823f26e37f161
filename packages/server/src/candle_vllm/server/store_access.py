# SPDX-License-Identifier: MIT
"""Code that the routes of stored responses, conversations, files and batches share: owners, query parameters, events.

Step 1 of a request's life; nothing is generated here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import Request

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.openai import to_error, to_json_bytes
from candle_vllm.responses.api.outliving import EncodedEvent
from candle_vllm.responses.api.response_store import ResponseStore
from candle_vllm.responses.api.stored_items import DEFAULT_LIMIT, MAX_LIMIT, PageRequest
from candle_vllm.responses.protocol.events import ErrorOccurred, StreamEvent
from candle_vllm.responses.protocol.request import INCLUDABLE
from candle_vllm.responses.store import entries
from candle_vllm.responses.store.backend import Order
from candle_vllm.server.http.errors import HttpError
from candle_vllm.server.http.routing import caller_of
from candle_vllm.server.http.sse import EventStream, StreamForm, named_event

# query parameters in the OpenAPI document
INCLUDE: Mapping[str, Any] = {
    "include": {
        "enum": [*INCLUDABLE],
        "description": "Without effect: items have the parts that their request asked for. It may be repeated.",
    }
}
AFTER: Mapping[str, Any] = {
    "after": {"type": "string", "maxLength": entries.MAX_ID, "description": "The last id of the page before."}
}
ITEM_PAGE: Mapping[str, Any] = {
    **INCLUDE,
    "limit": {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT},
    "order": {"enum": ["asc", "desc"], "default": "desc", "description": "Oldest or newest first."},
    **AFTER,
}

_INCLUDES = ("include", "include[]")  # the second is how OpenAI's clients write a list
_MAX_NUMBER = 9  # digits


async def store_and_owner(request: Request) -> tuple[ResponseStore, str]:
    """Return the store of responses, and the caller's owner id in it; HttpError 404 if the store is off."""
    store: ResponseStore | None = request.app.state.response_store
    if store is None:
        raise HttpError(404, "This server stores no responses: it was started with --responses-store off.", "store_off")
    return store, await store.owner(caller_of(request.scope).key)


def query_of(request: Request, *known: str) -> dict[str, str]:
    """Return the query parameters, each known and given once; `include` may be repeated, but has no effect.

    The parts that `include` can name are in the items if the request that made the items asked for these parts.
    """
    given: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name in _INCLUDES and "include" in known:
            if value not in INCLUDABLE:
                raise InvalidParameterError(
                    f"include must be one of {', '.join(INCLUDABLE)}, not {value!r:.80}", "include"
                )
        elif name not in known:
            raise InvalidParameterError(f"{name!r:.80} is not a query parameter of this route", name[:64])
        elif name in given:
            raise InvalidParameterError(f"{name} appears twice in the query", name)
        else:
            given[name] = value
    return given


def page_request(request: Request) -> PageRequest:
    """Read which items of a list to return."""
    query = query_of(request, "limit", "order", "after", "include")
    limit, after = limit_and_after(query, DEFAULT_LIMIT, MAX_LIMIT)
    return PageRequest(limit=limit, order=order_of(query), after=after)


def order_of(query: Mapping[str, str]) -> Order:
    """Read whether a list begins with the oldest entry (asc) or with the newest (desc, the default)."""
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidParameterError(f"order must be asc or desc, not {order!r:.60}", "order")
    return "asc" if order == "asc" else "desc"


def limit_and_after(query: Mapping[str, str], default: int, most: int) -> tuple[int, str | None]:
    """Read how many entries of a list to return, and after which entry."""
    limit, after = number_of("limit", query.get("limit", str(default)), 1, most), query.get("after")
    if after is not None and not entries.is_id(after):
        raise InvalidParameterError(f"after must be an id, not {after!r:.80}", "after")
    return limit, after


def number_of(name: str, text: str, low: int, high: int) -> int:
    """Read a query parameter that is a whole number."""
    if not (text.isascii() and text.isdigit() and len(text) <= _MAX_NUMBER and low <= int(text) <= high):
        raise InvalidParameterError(f"{name} must be a whole number between {low} and {high}, not {text!r:.60}", name)
    return int(text)


def switch_of(query: dict[str, str], name: str) -> bool:
    """Read a query parameter that is true or false, by default false."""
    text = query.get(name, "false")
    if text not in ("true", "false"):
        raise InvalidParameterError(f"{name} must be true or false, not {text!r:.60}", name)
    return text == "true"


class ResponseEvents:
    """Encodes the events of one response for one reader.

    OpenAI's event `keepalive` fills a silence, because SSE comments do not reset clients' idle timeouts. It repeats the
    number of the event before it, so that the numbers have no gap and a reader can resume after any of them.
    """

    def __init__(self) -> None:
        self._number = 0

    def write(self, event: StreamEvent | EncodedEvent) -> bytes:
        if isinstance(event, EncodedEvent):
            self._number = event.number
            return named_event(event.name, event.data)
        self._number = event.sequence_number
        return named_event(event.event_name, to_json_bytes(event))

    def silence(self) -> bytes:
        """Return the event that fills a silence."""
        return named_event("keepalive", silent_event(self._number))


def silent_event(number: int) -> bytes:
    """Return the JSON of the event that fills a silence after the event `number`."""
    return b'{"type":"keepalive","sequence_number":%d}' % number


def event_stream(events: AsyncIterator[EncodedEvent]) -> EventStream:
    """Return the stream of a background response's events for one reader, which may disconnect."""
    written = ResponseEvents()
    return EventStream(events, StreamForm(written.write, _error_event, silence=written.silence))


def _error_event(failure: Exception) -> bytes:
    """Return the last event of a stream that failed; its number is 0, because it is no event of the response."""
    error = to_error(failure).body.error
    told = ErrorOccurred(sequence_number=0, error=error, code=error.code, message=error.message, param=error.param)
    return named_event(told.event_name, to_json_bytes(told))
