"""Requests for numbers rather than tokens: whether they can be served, and their one piece (before step 4; step 8)."""

from __future__ import annotations

from array import array

import msgspec

from candle_vllm.core.engine.request import PoolingRequest, TokenOutput
from candle_vllm.core.errors import InvalidParameterError, PromptTooLongError


def check_pooling_request(request: PoolingRequest, vocab_size: int, max_model_len: int) -> None:
    """Refuses what cannot be served. A text that fills the whole context can be: nothing comes behind it.

    Raises:
        InvalidParameterError, PromptTooLongError: with what would be allowed.
    """
    prompt = request.prompt_token_ids
    if not prompt:
        raise InvalidParameterError("the text is empty: it needs at least one token", "prompt")
    wrong = next((token for token in prompt if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise InvalidParameterError(
            f"there is no token {wrong:d}; the model's token ids are 0 to {vocab_size - 1}"
            if abs(wrong) < 1 << 63
            else f"token ids are 0 to {vocab_size - 1}",
            "prompt",
        )
    if len(prompt) > max_model_len:
        raise PromptTooLongError(
            f"the text has {len(prompt)} tokens and the model takes {max_model_len}: shorten it or cut it into parts, "
            "or start with a larger --max-model-len where the model allows it",
            "prompt",
        )
    types = request.token_type_ids
    if types is not None and len(types) != len(prompt):
        raise InvalidParameterError(f"{len(prompt)} tokens and {len(types)} token_type_ids", "token_type_ids")


def finished_piece(ended: TokenOutput, pooled: array[float]) -> TokenOutput:
    """The only piece of a request: the one with which it ends, and its numbers."""
    return msgspec.structs.replace(ended, pooled=pooled)


def check_encoder_task(name: str, wanted: str, *, scores: bool) -> None:
    """Refuses what an encoder does not do, and names what it does.

    Raises:
        InvalidParameterError: `wanted` is not its task.
    """
    kind, task, way = (
        ("a cross-encoder", "score", "score pairs of texts with it (/v1/score, /v1/rerank)")
        if scores
        else ("an embedding model", "embed", "ask it for vectors or scores (/v1/embeddings, /v1/score, /v1/rerank)")
    )
    if wanted != task:
        lacks = {
            "generate": "generates no text",
            "embed": "gives no vectors",
            "score": "it has no head for scores",
        }
        raise InvalidParameterError(f"{name} is {kind} and {lacks[wanted]}: {way}", "model")
