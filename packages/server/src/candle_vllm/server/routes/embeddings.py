# SPDX-License-Identifier: MIT
"""Embeddings, moderations, scores and rankings, in the forms of several APIs: steps 1 and 10 of a request's life.

`/score`, `/rerank`, `/v2/rerank` and `/reranking` are the paths of vLLM, Cohere and llama.cpp for the same routes.
"""

from __future__ import annotations

import functools

from fastapi import Request
from starlette.responses import Response

from candle_vllm.openai import EmbeddingList, EmbeddingRequest, Ranking, RerankRequest, ScoreList, ScoreRequest
from candle_vllm.openai.embedding import parse_embedding_request, parse_rerank_request, parse_score_request
from candle_vllm.openai.json_body import parse_body
from candle_vllm.openai.protocol import embeddings as wires
from candle_vllm.openai.protocol.cohere import CohereEmbeddings, CohereEmbedRequest
from candle_vllm.server.answering import answer_with
from candle_vllm.server.models.slot import ServedModel
from candle_vllm.server.openapi.operation import QUEUED, routing

router, route = routing(tag="vectors and scores", errors=QUEUED)

_TEXT, _CONTENT = {"input": "The sky is blue."}, {"content": "The sky is blue."}
_TEXTS_OR_CHAT = (EmbeddingRequest, wires.EmbeddingChatRequest)


@route("POST /v1/embeddings", body=_TEXTS_OR_CHAT, example=_TEXT, answer=EmbeddingList, octets=True)
async def create_embedding(request: Request) -> Response:
    """Embeddings of texts or a conversation; if the body has `content` instead of `input`, in llama.cpp's form."""
    return await answer_with(request, parse_embedding_request, _embedded)


@route("POST /embedding", body=wires.ContentRequest, example=_CONTENT, answer=wires.LlamaEmbedding, bare=True,
       untyped=True)  # fmt: skip
async def llama_embedding(request: Request) -> Response:
    """Embeddings of texts, in llama.cpp's form."""
    return await answer_with(request, functools.partial(parse_body, wires.ContentRequest), _embedded)


async def _embedded(model: ServedModel, wire: EmbeddingRequest) -> EmbeddingList | list[wires.LlamaEmbedding]:
    made = await model.adapter.embed(wire)
    return list(map(wires.LlamaEmbedding.of, made.data)) if isinstance(wire, wires.ContentRequest) else made


@route("POST /v1/moderations", body=wires.ModerationRequest, example=_TEXT, answer=wires.Moderation)
async def create_moderation(request: Request) -> Response:
    """Harm categories of texts, from a classifier model."""
    parse = functools.partial(parse_body, wires.ModerationRequest)
    return await answer_with(request, parse, lambda model, wire: model.adapter.embedding.moderate(wire))


@route(
    "POST /v2/embed /v1/embed",
    body=CohereEmbedRequest,
    example={"texts": ["The sky is blue."]},
    answer=CohereEmbeddings,
)
async def cohere_embed(request: Request) -> Response:
    """Embeddings of texts, in Cohere's form."""
    parse, first = functools.partial(parse_body, CohereEmbedRequest), request.scope["route"].path == "/v1/embed"
    return await answer_with(
        request, parse, lambda model, wire: model.adapter.embedding.embed_cohere(wire, "1" if first else "2")
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
    "POST /v1/rerank /rerank /v2/rerank /v1/reranking /reranking",
    body=RerankRequest,
    example={"query": "What colour is the sky?", "documents": ["I am a cat.", "The sky is blue."]},
    answer=Ranking,
)
async def create_ranking(request: Request) -> Response:
    """Documents ranked by their relevance to a query."""
    return await answer_with(request, parse_rerank_request, lambda model, wire: model.adapter.rerank(wire))
