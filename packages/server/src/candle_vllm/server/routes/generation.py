# SPDX-License-Identifier: MIT
"""`/v1/chat/completions`, `/v1/completions` and Mistral's `/v1/fim/completions`: steps 1 and 10 of a request's life."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import Request
from starlette.responses import Response

from candle_vllm.openai import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    Completion,
    CompletionRequest,
    ErrorEnvelope,
    parse_chat_request,
    parse_completion_request,
)
from candle_vllm.openai.chat_answers import join_chat
from candle_vllm.openai.completion_answers import join_completion
from candle_vllm.openai.fim import FimRequest, fim_answer, fim_stream
from candle_vllm.openai.json_body import parse_body
from candle_vllm.server.answering import GenerationApi, answer
from candle_vllm.server.mcp.chat_tools import answer_with_tools
from candle_vllm.server.openapi.operation import QUESTION, QUEUED, routing
from candle_vllm.server.outliving import StoredForm

if TYPE_CHECKING:
    from candle_vllm.server.mcp.service import McpService

router, route = routing(tag="generation", errors=QUEUED)


@route(
    "POST /v1/chat/completions",
    body=ChatCompletionRequest,
    example={"messages": QUESTION, "max_tokens": 64},
    answer=ChatCompletion,
    events=(ChatCompletionChunk, ErrorEnvelope),
)
async def create_chat_completion(request: Request) -> Response:
    """Continue a conversation."""
    service: McpService | None = request.app.state.mcp
    return await (answer(request, CHAT) if service is None else answer_with_tools(request, service, CHAT))


@route(
    "POST /v1/completions",
    body=CompletionRequest,
    example={"prompt": "Once upon a time", "max_tokens": 32},
    answer=Completion,
    events=(Completion, ErrorEnvelope),
)
async def create_completion(request: Request) -> Response:
    """Continue a text."""
    return await answer(request, COMPLETIONS)


@route(
    "POST /v1/fim/completions",
    body=FimRequest,
    example={"prompt": "def add(a, b):\n    ", "suffix": "", "max_tokens": 32},
    answer=ChatCompletion,
    events=(ChatCompletionChunk, ErrorEnvelope),
)
async def create_fim_completion(request: Request) -> Response:
    """Fill a gap in a text, in Mistral's form."""
    return await answer(request, FIM)


CHAT = GenerationApi(
    parse=parse_chat_request,
    whole=lambda model, wire: model.adapter.chat(wire),
    streamed=lambda model, wire: model.adapter.chat_stream(wire),
    stored=StoredForm("chatcmpl-", join_chat),
)
COMPLETIONS = GenerationApi(
    parse=parse_completion_request,
    whole=lambda model, wire: model.adapter.complete(wire),
    streamed=lambda model, wire: model.adapter.complete_stream(wire),
    stored=StoredForm("cmpl-", join_completion),
)
FIM = GenerationApi(
    parse=lambda body: parse_body(FimRequest, body),
    whole=lambda model, wire: fim_answer(model.adapter, wire, model.entry.settings.default_sampling),
    streamed=lambda model, wire: fim_stream(model.adapter, wire, model.entry.settings.default_sampling),
    defaults=False,  # `whole` and `streamed` pass the operator's sampling values themselves
)
