# SPDX-License-Identifier: MIT
"""The OpenAI API over a candle-vllm engine, without HTTP: requests, answers, streams and errors."""

from typing import TYPE_CHECKING, Any

from candle_vllm.core.arguments import missing_name
from candle_vllm.openai.adapter import OpenAIAdapter
from candle_vllm.openai.answers import ChunkStream
from candle_vllm.openai.embedding import parse_embedding_request, parse_rerank_request, parse_score_request
from candle_vllm.openai.engine import EngineLike, TokenStream
from candle_vllm.openai.errors import (
    ErrorBody,
    ErrorEnvelope,
    ErrorResponse,
    GenerationFailedError,
    InvalidBodyError,
    ModelNotServedError,
    UnknownParameterError,
    UnsupportedParameterError,
    to_error,
)
from candle_vllm.openai.json_body import to_dict, to_json_bytes
from candle_vllm.openai.protocol.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionRequest
from candle_vllm.openai.protocol.completions import Completion, CompletionRequest
from candle_vllm.openai.protocol.embeddings import EmbeddingList, EmbeddingRequest
from candle_vllm.openai.protocol.fields import ADVISORY_FIELDS, REFUSED_FIELDS
from candle_vllm.openai.protocol.models import ModelCard, ModelList
from candle_vllm.openai.protocol.score import Ranking, RerankRequest, ScoreList, ScoreRequest
from candle_vllm.openai.protocol.usage import Usage
from candle_vllm.openai.requests import parse_chat_request, parse_completion_request, to_sampling_params
from candle_vllm.openai.sync_adapter import SyncOpenAIAdapter

__all__ = [
    "ADVISORY_FIELDS",
    "REFUSED_FIELDS",
    "ChatCompletion",
    "ChatCompletionChunk",
    "ChatCompletionRequest",
    "ChunkStream",
    "Completion",
    "CompletionRequest",
    "EmbeddingList",
    "EmbeddingRequest",
    "EngineLike",
    "ErrorBody",
    "ErrorEnvelope",
    "ErrorResponse",
    "GenerationFailedError",
    "InvalidBodyError",
    "ModelCard",
    "ModelList",
    "ModelNotServedError",
    "OpenAIAdapter",
    "Ranking",
    "RerankRequest",
    "ScoreList",
    "ScoreRequest",
    "SyncOpenAIAdapter",
    "TokenStream",
    "UnknownParameterError",
    "UnsupportedParameterError",
    "Usage",
    "parse_chat_request",
    "parse_completion_request",
    "parse_embedding_request",
    "parse_rerank_request",
    "parse_score_request",
    "to_dict",
    "to_error",
    "to_json_bytes",
    "to_sampling_params",
]

if not TYPE_CHECKING:  # a type checker would accept every name of a module with `__getattr__`

    def __getattr__(name: str) -> Any:
        raise missing_name(__name__, name, __all__)


def __dir__() -> list[str]:
    return [*__all__]
