# SPDX-License-Identifier: MIT
"""Check requests against the model's tasks, vocabulary and context (before step 4 of a request's life); no torch."""

from __future__ import annotations

from collections.abc import Sequence

from candle_vllm.core.engine.requests import GenerationRequest, PoolingRequest
from candle_vllm.core.errors import InvalidParameterError, PromptTooLongError
from candle_vllm.core.pooling import BY_TOKEN


def check_request(request: GenerationRequest, vocab_size: int, max_model_len: int) -> int:
    """Check a request; return the maximum length of its sequences, in tokens.

    Raises:
        InvalidParameterError, PromptTooLongError: the request cannot be served; the message has the limit.
    """
    prompt, params, most = request.prompt_token_ids, request.params, max_model_len
    if not prompt:
        raise InvalidParameterError("the prompt is empty: it needs at least one token", "prompt")
    _check_ids(prompt, vocab_size)
    if not all(token < vocab_size for token in params.logprob_token_ids or ()):
        raise InvalidParameterError(f"logprob_token_ids has ids above {vocab_size - 1}", "logprob_token_ids")
    if len(prompt) >= most:
        raise PromptTooLongError(
            f"the prompt has {len(prompt)} tokens and this model's maximum context length is {most} tokens: shorten "
            "the prompt, or load the model with a larger `max_model_len` where the model and the memory allow it",
            "prompt",
        )
    if len(prompt) + params.min_tokens > most:
        raise InvalidParameterError(
            f"min_tokens is {params.min_tokens}, but the context of {most} leaves {most - len(prompt)} after the "
            f"prompt: ask for at most {most - len(prompt)}",
            "min_tokens",
        )
    if params.max_tokens is None:
        return most
    if len(prompt) + params.max_tokens > most:
        raise PromptTooLongError(
            f"the prompt has {len(prompt)} tokens and max_tokens is {params.max_tokens}: together they are more, "
            f"and this model's maximum context length is {most} tokens; ask for at most {most - len(prompt)}",
            "max_tokens",
        )
    return len(prompt) + params.max_tokens


def check_pooling_request(request: PoolingRequest, vocab_size: int, max_model_len: int) -> None:
    """Check a pooling request; its text may fill the whole context, because no token is generated.

    Raises:
        InvalidParameterError, PromptTooLongError: the request cannot be served; the message has the limit.
    """
    prompt = request.prompt_token_ids
    if not prompt:
        raise InvalidParameterError("the text is empty: it needs at least one token", "prompt")
    _check_ids(prompt, vocab_size)
    if len(prompt) > max_model_len:
        raise PromptTooLongError(
            f"the text has {len(prompt)} tokens and the model takes at most {max_model_len}: shorten it or split it, "
            "or load the model with a larger `max_model_len` where the model allows it",
            "prompt",
        )
    types = request.token_type_ids
    if types is not None and len(types) != len(prompt):
        raise InvalidParameterError(f"give {len(prompt)} token_type_ids, one for each token", "token_type_ids")


def pooling_tasks(labels: Sequence[str], pooling: str | None = None) -> tuple[str, ...]:
    """Return `ModelInfo.tasks` of a model that generates no text.

    Args:
        labels: the labels of its head; empty without a head.
        pooling: the pooling before that head; None if the model computes the head.
    """
    if not labels:
        return ("embed", "score")
    return ("score", "classify") if len(labels) == 1 and pooling not in BY_TOKEN else ("classify",)


def check_encoder_task(name: str, wanted: str, tasks: Sequence[str]) -> None:
    """Check that an encoder can do a task.

    Args:
        name: the model's name.
        wanted: the task of a request.
        tasks: `ModelInfo.tasks` of the model. A cross-encoder also classifies, with its score as the only class.

    Raises:
        InvalidParameterError: the model cannot do `wanted`; the message has the model's tasks.
    """
    if "embed" in tasks:
        way = "request vectors or scores (/v1/embeddings, /v1/score, /v1/rerank)"
        kind, does = "an embedding model", ("embed",)
    elif "score" in tasks:
        kind, does = "a cross-encoder", ("score", "classify")
        way = "request scores of pairs of texts (/v1/score, /v1/rerank)"
    else:
        kind, does, way = "a classifier", ("classify",), "request classes"
    if wanted not in does:
        lacks = {"generate": "generates no text", "embed": "gives no vectors"}
        lacks |= {"score": "has no head for scores", "classify": "has no head for classes"}
        raise InvalidParameterError(f"{name} is {kind} and {lacks[wanted]}: {way}", "model")


def _check_ids(prompt: Sequence[int], vocab_size: int) -> None:
    wrong = next((token for token in prompt if not 0 <= token < vocab_size), None)
    if wrong is not None:
        named = f"token id {wrong:d}" if abs(wrong) < 1 << 63 else "a token id"
        raise InvalidParameterError(
            f"{named} is out of vocabulary: the model's ids are 0 to {vocab_size - 1}", "prompt"
        )
