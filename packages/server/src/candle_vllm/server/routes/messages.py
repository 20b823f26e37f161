# SPDX-License-Identifier: MIT
"""`/v1/messages` and `/v1/messages/count_tokens`: Anthropic's API (steps 1 and 10 of a request's life)."""

from __future__ import annotations

from typing import get_args

from fastapi import Request
from starlette.responses import Response

from candle_vllm.openai import anthropic, to_json_bytes
from candle_vllm.openai.anthropic.answers import Ping
from candle_vllm.server.answering import GenerationApi, answer, answer_with
from candle_vllm.server.http.failures import anthropic_error_event
from candle_vllm.server.http.sse import StreamForm, named_event
from candle_vllm.server.openapi.operation import COUNTED, QUESTION, QUEUED, Naming, routing

router, route = routing(error=anthropic.ErrorBody, naming=Naming("Anthropic", "Out"))


@route(
    "POST /v1/messages",
    tag="generation",
    body=anthropic.MessagesRequest,
    example={"model": "default", "messages": QUESTION, "max_tokens": 64},
    answer=anthropic.Message,
    events=(*get_args(anthropic.MessageEvent), anthropic.ErrorBody),
    errors=(*QUEUED, 529),
)
async def create_message(request: Request) -> Response:
    """Continue a conversation, in Anthropic's form."""
    return await answer(request, MESSAGES)


@route(
    "POST /v1/messages/count_tokens",
    tag="tokens",
    body=anthropic.CountTokensRequest,
    example={"model": "default", "messages": QUESTION},
    answer=anthropic.TokenCount,
    errors=(*COUNTED, 529),
)
async def count_message_tokens(request: Request) -> Response:
    """Count the tokens of a message's prompt."""
    return await answer_with(
        request,
        anthropic.parse_count_tokens_request,
        lambda model, wire: model.messages.count_tokens(wire),
        queued=False,
    )


MESSAGES = GenerationApi(
    parse=anthropic.parse_messages_request,
    whole=lambda model, wire: model.messages.create(wire),
    streamed=lambda model, wire: model.messages.create_stream(wire),
    form=StreamForm(
        lambda event: named_event(event.event_name, to_json_bytes(event)),
        anthropic_error_event,
        done=b"",
        silence=lambda: named_event("ping", to_json_bytes(Ping())),
    ),
    defaults=False,  # `MessagesAdapter` fills them in
)
