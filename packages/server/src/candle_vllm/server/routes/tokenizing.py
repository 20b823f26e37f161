# SPDX-License-Identifier: MIT
"""`/tokenize` and `/detokenize`: steps 1 to 3 of a request's life, and no further.

They use a model's tokenizer and wait in no queue: the engine has nothing to do for them.
"""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from candle_vllm.openai.tokenizing import parse_detokenize_request, parse_tokenize_request
from candle_vllm.server.answering import answer_with

router = APIRouter()


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    """The tokens of a text or of a conversation."""
    return await answer_with(
        request, parse_tokenize_request, lambda model, wire: model.adapter.tokenize(wire), queued=False
    )


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    """The text of tokens."""
    return await answer_with(
        request, parse_detokenize_request, lambda model, wire: model.adapter.detokenize(wire), queued=False
    )
