"""Before step 4: whether a request can be served at all, by the model's vocabulary and the engine's context."""

from __future__ import annotations

from candle_vllm.core.engine.request import GenerationRequest
from candle_vllm.core.errors import InvalidParameterError, PromptTooLongError


def check_request(request: GenerationRequest, vocab_size: int, max_model_len: int) -> int:
    """Refuses what cannot be served; returns the length at which the request's sequences end.

    Raises:
        InvalidParameterError, PromptTooLongError: with what would be allowed.
    """
    prompt, params, most = request.prompt_token_ids, request.params, max_model_len
    if not prompt:
        raise InvalidParameterError("the prompt is empty: it needs at least one token", "prompt")
    if not all(0 <= token < vocab_size for token in prompt):
        raise InvalidParameterError(f"the prompt has token ids outside 0..{vocab_size - 1}", "prompt")
    if len(prompt) >= most:
        raise PromptTooLongError(
            f"the prompt has {len(prompt)} tokens and the context is {most}: shorten the prompt, or start with a "
            "larger --max-model-len where the model and the memory allow it",
            "prompt",
        )
    if len(prompt) + params.min_tokens > most:
        raise InvalidParameterError(
            f"min_tokens is {params.min_tokens}, and behind {len(prompt)} prompt tokens the context of {most} has "
            f"room for {most - len(prompt)}",
            "min_tokens",
        )
    if params.max_tokens is None:
        return most
    if len(prompt) + params.max_tokens > most:
        raise PromptTooLongError(
            f"the prompt has {len(prompt)} tokens and max_tokens is {params.max_tokens}: together they exceed the "
            f"context of {most}; ask for at most {most - len(prompt)}",
            "max_tokens",
        )
    return len(prompt) + params.max_tokens
