"""`/v1/chat/completions` and `/v1/completions`: steps 1 and 10 of a request's life.

The route reads the body, hands it to the adapter, and sends what comes back; everything between is the adapter's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from candle_vllm.core.errors import RequestAbortedError
from candle_vllm.openai import (
    parse_chat_request,
    parse_completion_request,
    to_error,
    to_json_bytes,
)
from candle_vllm.server.body import read_body, unless_disconnected
from candle_vllm.server.settings import Settings
from candle_vllm.server.sse import EventStream

router = APIRouter()
logger = logging.getLogger(__name__)

BIG_BODY = 64 << 10  # bytes; a larger one is parsed in a thread, so that other streams do not wait for it


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """OpenAI's chat completions, whole or streamed."""
    adapter = request.app.state.adapter
    return await _answer(request, parse_chat_request, adapter.chat, adapter.chat_stream)


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    """OpenAI's text completions, whole or streamed."""
    adapter = request.app.state.adapter
    return await _answer(request, parse_completion_request, adapter.complete, adapter.complete_stream)


async def _answer(
    request: Request,
    parse: Callable[[bytes], Any],
    whole: Callable[[Any], Awaitable[Any]],
    streamed: Callable[[Any], Awaitable[AsyncIterator[Any]]],
) -> Response:
    settings: Settings = request.app.state.settings
    body = await read_body(request.scope, request.receive, settings.max_body_mb << 20)
    wire = await asyncio.to_thread(parse, body) if len(body) > BIG_BODY else parse(body)
    absent = {name: value for name, value in settings.default_sampling.items() if getattr(wire, name) is None}
    wire = wire.model_copy(update=absent) if absent else wire
    if wire.stream:
        return EventStream(await streamed(wire), to_json_bytes, error_event)
    answer = await unless_disconnected(whole(wire), request.receive)
    return Response(to_json_bytes(answer), media_type="application/json")


def error_event(failure: Exception) -> bytes:
    """The data of an error event in a stream that has begun."""
    error = to_error(failure)
    if error.status >= 500 and not isinstance(failure, RequestAbortedError):
        logger.error("a stream failed", exc_info=failure)
    return to_json_bytes(error.body)
