# SPDX-License-Identifier: MIT
"""The rows of Ollama's routes in the table of `operations.py`. Outside the ten steps."""

from __future__ import annotations

from collections.abc import Mapping

from candle_vllm.openai.ollama import (
    ChatLine,
    ChatRequest,
    EmbeddingsRequest,
    EmbedRequest,
    Failure,
    GenerateLine,
    GenerateRequest,
    Vector,
    Vectors,
)
from candle_vllm.server.openapi.components import Naming
from candle_vllm.server.openapi.operation import BODY_ERRORS, Key, Operation
from candle_vllm.server.routes.ollama_library import CopyRequest, DeleteRequest, PullLine, PullRequest, StopRequest
from candle_vllm.server.routes.ollama_models import ApiVersion, Residents, Shown, ShowRequest, Tags

_OLLAMA = Naming("Ollama", "Out")
_ERRORS = (*BODY_ERRORS, 404, 429, 503, 504)
_ASKED = {"model": "default", "stream": False}

OLLAMA_OPERATIONS: Mapping[Key, Operation] = {
    ("POST", "/api/chat"): Operation(
        id="ollama_chat",
        tag="ollama",
        summary="Continue a conversation, in Ollama's words",
        body=(ChatRequest,),
        example={**_ASKED, "messages": [{"role": "user", "content": "What is the capital of France?"}]},
        answers={200: (ChatLine,)},
        lines=(ChatLine, Failure),
        errors=_ERRORS,
        error=Failure,
        naming=_OLLAMA,
    ),
    ("POST", "/api/generate"): Operation(
        id="ollama_generate",
        tag="ollama",
        summary="Answer a prompt, in Ollama's words",
        body=(GenerateRequest,),
        example={**_ASKED, "prompt": "Why is the sky blue?"},
        answers={200: (GenerateLine,)},
        lines=(GenerateLine, Failure),
        errors=_ERRORS,
        error=Failure,
        naming=_OLLAMA,
    ),
    ("POST", "/api/embed"): Operation(
        id="ollama_embed",
        tag="ollama",
        summary="The vectors of texts, in Ollama's words",
        body=(EmbedRequest,),
        example={"model": "default", "input": "The sky is blue."},
        answers={200: (Vectors,)},
        errors=_ERRORS,
        error=Failure,
        naming=_OLLAMA,
    ),
    ("POST", "/api/embeddings"): Operation(
        id="ollama_embeddings",
        tag="ollama",
        summary="The vector of one text, in Ollama's older words",
        body=(EmbeddingsRequest,),
        example={"model": "default", "prompt": "The sky is blue."},
        answers={200: (Vector,)},
        errors=_ERRORS,
        error=Failure,
        naming=_OLLAMA,
    ),
    ("GET", "/api/tags"): Operation(
        id="ollama_tags",
        tag="ollama",
        summary="All models",
        answers={200: (Tags,)},
        error=Failure,
        naming=_OLLAMA,
    ),
    ("GET", "/api/ps"): Operation(
        id="ollama_ps",
        tag="ollama",
        summary="The models that are loaded",
        answers={200: (Residents,)},
        error=Failure,
        naming=_OLLAMA,
    ),
    ("POST", "/api/show"): Operation(
        id="ollama_show",
        tag="ollama",
        summary="What is known of a model",
        body=(ShowRequest,),
        example={"model": "default"},
        answers={200: (Shown,)},
        errors=(*_ERRORS, 409),
        error=Failure,
        naming=_OLLAMA,
    ),
    ("POST", "/api/pull"): Operation(
        id="ollama_pull",
        tag="ollama",
        summary="Fetch a model of Hugging Face, where the operator allows that",
        body=(PullRequest,),
        example={"model": "qwen3:0.6b", "stream": False},
        answers={200: (PullLine,)},
        lines=(PullLine, Failure),
        errors=(*BODY_ERRORS, 404, 502, 503),
        error=Failure,
        naming=_OLLAMA,
        manages=True,
    ),
    ("DELETE", "/api/pull"): Operation(
        id="ollama_stop_pull",
        tag="ollama",
        summary="Stop fetching a model; what has arrived is kept or removed",
        body=(StopRequest,),
        example={"model": "qwen3:0.6b"},
        answers={200: ()},
        errors=(*BODY_ERRORS, 403, 404),
        error=Failure,
        naming=_OLLAMA,
        manages=True,
    ),
    ("POST", "/api/copy"): Operation(
        id="ollama_copy",
        tag="ollama",
        summary="Give a model another name, where the operator allows that",
        body=(CopyRequest,),
        example={"source": "default", "destination": "mine"},
        answers={200: ()},
        errors=(*BODY_ERRORS, 404, 409),
        error=Failure,
        naming=_OLLAMA,
        manages=True,
    ),
    ("DELETE", "/api/delete"): Operation(
        id="ollama_delete",
        tag="ollama",
        summary="Remove a fetched model, where the operator allows that",
        body=(DeleteRequest,),
        example={"model": "qwen3:0.6b"},
        answers={200: ()},
        errors=(*BODY_ERRORS, 404, 409),
        error=Failure,
        naming=_OLLAMA,
        manages=True,
    ),
    ("GET", "/api/version"): Operation(
        id="ollama_version",
        tag="ollama",
        summary="The version of Ollama whose API this is",
        answers={200: (ApiVersion,)},
        error=Failure,
        naming=_OLLAMA,
    ),
}
