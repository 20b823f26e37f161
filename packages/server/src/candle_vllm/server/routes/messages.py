# SPDX-License-Identifier: MIT
"""`/v1/messages` and `/v1/messages/count_tokens`: Anthropic's API (steps 1 and 10 of a request's life)."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from candle_vllm.openai import to_json_bytes
from candle_vllm.openai.anthropic import parse_count_tokens_request, parse_messages_request
from candle_vllm.openai.anthropic.answers import Ping
from candle_vllm.server.answering import GenerationApi, answer, answer_with
from candle_vllm.server.http.failures import anthropic_error_event
from candle_vllm.server.http.sse import named_event

router = APIRouter()


@router.post("/v1/messages")
async def messages(request: Request) -> Response:
    """Anthropic's messages, whole or streamed."""
    return await answer(request, MESSAGES)


@router.post("/v1/messages/count_tokens")
async def count_tokens(request: Request) -> Response:
    """How many tokens a message's prompt has; nothing is generated."""
    return await answer_with(
        request, parse_count_tokens_request, lambda model, wire: model.messages.count_tokens(wire), queued=False
    )


MESSAGES = GenerationApi(
    parse=parse_messages_request,
    whole=lambda model, wire: model.messages.create(wire),
    streamed=lambda model, wire: model.messages.create_stream(wire),
    event=lambda event: named_event(event.event_name, to_json_bytes(event)),
    error_event=anthropic_error_event,
    done=b"",
    defaults=lambda wire, settings: wire,  # its adapter has them  # noqa: ARG005
    silence=lambda: named_event("ping", to_json_bytes(Ping())),
)
