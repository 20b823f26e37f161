# SPDX-License-Identifier: MIT
"""`/v1/responses/{response_id}`: responses after they were made. Every one is of the caller's own API key."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.openai import to_json_bytes
from candle_vllm.responses.api.background import Background
from candle_vllm.server.kept_access import event_stream, kept_and_owner, number_of, page_request, query_of, switch_of

router = APIRouter()

JSON = "application/json"
_MAX_EVENT = 999_999_999


@router.get("/v1/responses/{response_id}")
async def get_response(request: Request, response_id: str) -> Response:
    """A response; with `stream=true` the events of one that runs in the background."""
    kept, owner = await kept_and_owner(request)
    query = query_of(request, "stream", "starting_after", "include", "include_obfuscation")
    if switch_of(query, "include_obfuscation"):
        raise InvalidParameterError(
            "include_obfuscation must be false: events are never padded with random characters", "include_obfuscation"
        )
    after = query.get("starting_after")
    number = -1 if after is None else number_of("starting_after", after, 0, _MAX_EVENT)
    if not switch_of(query, "stream"):
        if after is not None:
            raise InvalidParameterError("starting_after needs stream=true", "starting_after")
        return Response((await kept.get(owner, response_id)).body, media_type=JSON)
    return event_stream(await _background(request).stream(owner, response_id, number))


@router.delete("/v1/responses/{response_id}")
async def delete_response(request: Request, response_id: str) -> Response:
    """Deletes a response; one that is running is ended."""
    _, owner = await kept_and_owner(request)
    query_of(request)
    return Response(to_json_bytes(await _background(request).delete(owner, response_id)), media_type=JSON)


@router.post("/v1/responses/{response_id}/cancel")
async def cancel_response(request: Request, response_id: str) -> Response:
    """Ends a response that runs in the background."""
    _, owner = await kept_and_owner(request)
    query_of(request)
    return Response(await _background(request).cancel(owner, response_id), media_type=JSON)


@router.get("/v1/responses/{response_id}/input_items")
async def list_input_items(request: Request, response_id: str) -> Response:
    """What the request of a response gave."""
    kept, owner = await kept_and_owner(request)
    page = await kept.input_items(owner, response_id, page_request(request))
    return Response(to_json_bytes(page), media_type=JSON)


def _background(request: Request) -> Background:
    """Who works on responses without their client: there where responses are kept."""
    return request.app.state.background
