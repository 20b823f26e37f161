# SPDX-License-Identifier: MIT
"""`/tokenize`, `/detokenize` and the count of a chat request's tokens (steps 1 to 3 of a request's life).

They use a model's tokenizer and wait in no queue, because they do not run the model.
"""

from __future__ import annotations

from functools import partial

from fastapi import Request
from starlette.responses import Response

from candle_vllm.openai.protocol import tokenizing
from candle_vllm.openai.protocol.chat import ChatCompletionRequest
from candle_vllm.openai.requests import parse_chat_request, read_chat
from candle_vllm.openai.tokenizing import parse_detokenize_request, parse_tokenize_request
from candle_vllm.responses.protocol.response import InputTokens
from candle_vllm.server.answering import answer_with
from candle_vllm.server.models.slot import ServedModel
from candle_vllm.server.openapi.operation import COUNTED, QUESTION, routing

router, route = routing(tag="tokens", errors=COUNTED)


@route(
    "POST /tokenize",
    body=(tokenizing.TokenizeTextRequest, tokenizing.TokenizeChatRequest, tokenizing.TokenizeContentRequest),
    example={"prompt": "Once upon a time", "return_token_strs": True},
    answer=(tokenizing.Tokenized, tokenizing.TokenizedContent),
    untyped=True,
)
async def tokenize(request: Request) -> Response:
    """Return the tokens of a text or of a conversation."""
    return await answer_with(
        request, parse_tokenize_request, lambda model, wire: model.adapter.tokenize(wire), queued=False
    )


@route(
    "POST /detokenize",
    body=tokenizing.DetokenizeRequest,
    example={"tokens": [1, 2, 3]},
    answer=tokenizing.Detokenized,
    untyped=True,
)
async def detokenize(request: Request) -> Response:
    """Return the text of tokens."""
    return await answer_with(
        request, parse_detokenize_request, lambda model, wire: model.adapter.detokenize(wire), queued=False
    )


@route(
    "POST /v1/chat/completions/input_tokens",
    body=ChatCompletionRequest,
    example={"messages": QUESTION},
    answer=InputTokens,
)
async def count_chat_tokens(request: Request) -> Response:
    """Count the tokens of a chat request's prompt, images included."""

    async def count(model: ServedModel, wire: ChatCompletionRequest) -> InputTokens:
        return InputTokens(input_tokens=await model.adapter.count_tokens(partial(read_chat, wire)))

    return await answer_with(request, parse_chat_request, count, queued=False)
