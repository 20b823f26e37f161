# SPDX-License-Identifier: MIT
"""`/v1/embeddings`, `/v1/moderations`, `/v2/embed`, `/v1/score`, `/v1/rerank`: steps 1 and 10 of a request's life.

`/score`, `/rerank` and `/v2/rerank` are the same routes under the names in vLLM, Jina and Cohere.
"""

from __future__ import annotations

import functools

from fastapi import APIRouter, Request
from starlette.responses import Response

from candle_vllm.openai import EmbeddingList, EmbeddingRequest, Ranking, RerankRequest, ScoreList, ScoreRequest
from candle_vllm.openai.embedding import parse_embedding_request, parse_rerank_request, parse_score_request
from candle_vllm.openai.protocol.cohere import CohereEmbeddings, CohereEmbedRequest
from candle_vllm.openai.protocol.embeddings import EmbeddingChatRequest, Moderation, ModerationRequest
from candle_vllm.openai.validation import parse_body
from candle_vllm.server.answering import answer_with
from candle_vllm.server.openapi.operation import QUEUED, Operation, routing

router = APIRouter()
route = routing(router, functools.partial(Operation, tag="vectors and scores", errors=QUEUED))

_TEXT = {"input": "The sky is blue."}
_TEXTS_OR_CHAT = (EmbeddingRequest, EmbeddingChatRequest)


@route("POST /v1/embeddings", body=_TEXTS_OR_CHAT, example=_TEXT, answer=EmbeddingList, octets=True)
async def create_embedding(request: Request) -> Response:
    """Embeddings of texts."""
    return await answer_with(request, parse_embedding_request, lambda model, wire: model.adapter.embed(wire))


@route("POST /v1/moderations", body=ModerationRequest, example=_TEXT, answer=Moderation)
async def create_moderation(request: Request) -> Response:
    """Harm categories of texts, from a classifier model."""
    parse = functools.partial(parse_body, ModerationRequest)
    return await answer_with(request, parse, lambda model, wire: model.adapter.moderate(wire))


@route(
    "POST /v2/embed /v1/embed",
    body=CohereEmbedRequest,
    example={"texts": ["The sky is blue."]},
    answer=CohereEmbeddings,
)
async def cohere_embed(request: Request) -> Response:
    """Embeddings of texts, in Cohere's form."""
    parse, first = functools.partial(parse_body, CohereEmbedRequest), "/v1/" in request.url.path
    return await answer_with(
        request, parse, lambda model, wire: model.adapter.embed_cohere(wire, "1" if first else "2")
    )


@route(
    "POST /v1/score /score",
    body=ScoreRequest,
    example={"text_1": "The sky is blue.", "text_2": ["What colour is the sky?", "Who are you?"]},
    answer=ScoreList,
)
async def create_score(request: Request) -> Response:
    """Similarity or relevance scores of text pairs."""
    return await answer_with(request, parse_score_request, lambda model, wire: model.adapter.score(wire))


@route(
    "POST /v1/rerank /rerank /v2/rerank",
    body=RerankRequest,
    example={"query": "What colour is the sky?", "documents": ["I am a cat.", "The sky is blue."]},
    answer=Ranking,
)
async def create_ranking(request: Request) -> Response:
    """Documents ranked by their relevance to a query."""
    return await answer_with(request, parse_rerank_request, lambda model, wire: model.adapter.rerank(wire))
