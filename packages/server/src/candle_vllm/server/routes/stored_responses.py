# SPDX-License-Identifier: MIT
"""`/v1/responses/{response_id}`: stored responses (steps 1 and 10). A caller sees only its own responses."""

from __future__ import annotations

import functools
from typing import get_args

from fastapi import APIRouter, Request
from starlette.responses import Response

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.responses.api.background import Background
from candle_vllm.responses.api.stored_items import ItemList
from candle_vllm.responses.protocol.events import ResponseEvent
from candle_vllm.responses.protocol.response import Response as AnyResponse
from candle_vllm.responses.protocol.response import ResponseDeleted
from candle_vllm.server import store_access
from candle_vllm.server.answering import json_answer
from candle_vllm.server.openapi.operation import KEPT, RESPONSES, Operation, routing

router = APIRouter()
route = routing(router, functools.partial(Operation, tag="responses", naming=RESPONSES, errors=KEPT))

JSON = "application/json"
_MAX_EVENT = 999_999_999


@route(
    "GET /v1/responses/{response_id}",
    answer=AnyResponse,
    events=get_args(ResponseEvent),
    query={
        **store_access.INCLUDE,
        "stream": {"enum": ["true", "false"], "default": "false", "description": "Send the events."},
        "starting_after": {
            "type": "integer",
            "minimum": 0,
            "maximum": _MAX_EVENT,
            "description": "With stream=true: the number of the last event that is known already.",
        },
        "include_obfuscation": {"enum": ["false"], "default": "false"},
    },
)
async def get_response(request: Request, response_id: str) -> Response:
    """A response, or the events of one that runs in the background."""
    store, owner = await store_access.store_and_owner(request)
    query = store_access.query_of(request, "stream", "starting_after", "include", "include_obfuscation")
    if store_access.switch_of(query, "include_obfuscation"):
        raise InvalidParameterError(
            "include_obfuscation must be false: events are never padded with random characters", "include_obfuscation"
        )
    after = query.get("starting_after")
    number = -1 if after is None else store_access.number_of("starting_after", after, 0, _MAX_EVENT)
    if not store_access.switch_of(query, "stream"):
        if after is not None:
            raise InvalidParameterError("starting_after needs stream=true", "starting_after")
        return Response((await store.get(owner, response_id)).body, media_type=JSON)
    return store_access.event_stream(await _background(request).stream(owner, response_id, number))


@route("DELETE /v1/responses/{response_id}", answer=ResponseDeleted)
async def delete_response(request: Request, response_id: str) -> Response:
    """Delete a response; a running response is ended."""
    _, owner = await store_access.store_and_owner(request)
    store_access.query_of(request)
    return json_answer(await _background(request).delete(owner, response_id))


@route("POST /v1/responses/{response_id}/cancel", answer=AnyResponse)
async def cancel_response(request: Request, response_id: str) -> Response:
    """End a response that runs in the background."""
    _, owner = await store_access.store_and_owner(request)
    store_access.query_of(request)
    return Response(await _background(request).cancel(owner, response_id), media_type=JSON)


@route("GET /v1/responses/{response_id}/input_items", answer=ItemList, query=store_access.ITEM_PAGE)
async def list_input_items(request: Request, response_id: str) -> Response:
    """The items in the request of a response."""
    store, owner = await store_access.store_and_owner(request)
    page = await store.input_items(owner, response_id, store_access.page_request(request))
    return json_answer(page)


def _background(request: Request) -> Background:
    """Return the service of background responses, which exists if responses are stored."""
    return request.app.state.background
