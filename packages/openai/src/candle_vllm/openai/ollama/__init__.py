# SPDX-License-Identifier: MIT
"""Ollama's API over an `OpenAIAdapter`, without HTTP: requests, answers and streams."""

from candle_vllm.openai.ollama.adapter import LineStream, OllamaAdapter
from candle_vllm.openai.ollama.answers import (
    ChatLine,
    Failure,
    GenerateLine,
    Line,
    Times,
    Vector,
    Vectors,
    loaded_line,
    rfc3339,
)
from candle_vllm.openai.ollama.request import (
    ADVISORY_OPTIONS,
    REFUSED_OPTIONS,
    ChatRequest,
    EmbeddingsRequest,
    EmbedRequest,
    GenerateRequest,
    Options,
    ollama_parser,
)

__all__ = [
    "ADVISORY_OPTIONS",
    "REFUSED_OPTIONS",
    "ChatLine",
    "ChatRequest",
    "EmbedRequest",
    "EmbeddingsRequest",
    "Failure",
    "GenerateLine",
    "GenerateRequest",
    "Line",
    "LineStream",
    "OllamaAdapter",
    "Options",
    "Times",
    "Vector",
    "Vectors",
    "loaded_line",
    "ollama_parser",
    "rfc3339",
]
