# SPDX-License-Identifier: MIT
"""`/v1/embeddings`, `/v1/score` and `/v1/rerank`: steps 1 and 10 of a request's life.

`/score`, `/rerank` and `/v2/rerank` are the same routes under the names that clients of vLLM, Jina and Cohere use.
"""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from candle_vllm.openai.embedding import parse_embedding_request, parse_rerank_request, parse_score_request
from candle_vllm.server.answering import answer_with

router = APIRouter()


@router.post("/v1/embeddings")
async def embeddings(request: Request) -> Response:
    """The vectors of texts."""
    return await answer_with(request, parse_embedding_request, lambda model, wire: model.adapter.embed(wire))


@router.post("/v1/score")
@router.post("/score")
async def score(request: Request) -> Response:
    """How well the texts of pairs belong together."""
    return await answer_with(request, parse_score_request, lambda model, wire: model.adapter.score(wire))


@router.post("/v1/rerank")
@router.post("/rerank")
@router.post("/v2/rerank")
async def rerank(request: Request) -> Response:
    """Documents in order of how well they fit a query."""
    return await answer_with(request, parse_rerank_request, lambda model, wire: model.adapter.rerank(wire))
