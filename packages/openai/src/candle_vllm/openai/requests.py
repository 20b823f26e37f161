"""Wire -> engine request: bytes to a checked request, and its fields to sampling parameters (step 2).

Precedence of sampling values: the request's, then the model's own defaults, then ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.openai.parsing import parse_body
from candle_vllm.openai.protocol.chat import ChatCompletionRequest
from candle_vllm.openai.protocol.completions import CompletionRequest

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions

# Fields that mean the same in a request and in SamplingParams.
_SAME_NAMES = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "allowed_token_ids",
    "bad_words",
    "cache_salt",
)


def parse_chat_request(body: bytes | Mapping[str, Any]) -> ChatCompletionRequest:
    """A checked chat request from the body's bytes or from an object; raises `RequestError`."""
    return parse_body(ChatCompletionRequest, body)


def parse_completion_request(body: bytes | Mapping[str, Any]) -> CompletionRequest:
    """A checked completion request from the body's bytes or from an object; raises `RequestError`."""
    return parse_body(CompletionRequest, body)


def to_sampling_params(
    request: ChatCompletionRequest | CompletionRequest, defaults: Mapping[str, Any]
) -> SamplingParams:
    """How the tokens of `request` are chosen.

    `defaults` are the model's own values by field name. Raises `InvalidParameterError`.
    """
    given = {name: getattr(request, name) for name in _SAME_NAMES if getattr(request, name) is not None}
    if request.logit_bias:
        given["logit_bias"] = {int(token): value for token, value in request.logit_bias.items()}
    if isinstance(request, ChatCompletionRequest):
        ours = {"max_tokens": None}
        limit = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
        given["logprobs"] = (request.top_logprobs or 0) if request.logprobs else None
        given["prompt_logprobs"] = request.prompt_logprobs
    else:
        ours = {"max_tokens": COMPLETION_MAX_TOKENS}
        limit = None if request.max_tokens is None else max(request.max_tokens, 1)
        given["logprobs"] = request.logprobs
        given["prompt_logprobs"] = _prompt_logprobs(request)
    if (structured := request.structured()) is not None:
        given["structured_outputs"] = structured
    if limit is not None:
        given["max_tokens"] = limit
    return SamplingParams(**{**ours, **defaults, **given})


def _prompt_logprobs(request: CompletionRequest) -> int | None:
    """How many to ask for: an echo with logprobs shows those of the prompt too."""
    asked = [request.prompt_logprobs, request.logprobs if request.echo else None]
    return max((count for count in asked if count is not None), default=None)
