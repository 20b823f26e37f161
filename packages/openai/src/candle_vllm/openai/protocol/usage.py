# SPDX-License-Identifier: MIT
"""Token counts and timings of an answer, the progress of its prompt, and the rendered prompt."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """`cached_tokens`: prompt tokens that were found in the prefix cache."""

    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    """Kinds of output tokens; counts in the middle of a stream have only `reasoning_tokens`.

    Attributes:
        reasoning_tokens: tokens of the reasoning, with its marks.
        accepted_prediction_tokens, rejected_prediction_tokens: predicted tokens in the answer, and all other predicted
            tokens; present if the request has a prediction. Sums over all choices.
        draft_tokens, accepted_draft_tokens: draft tokens that were verified, and draft tokens that were accepted;
            present if `return_draft_counts` requested them.
    """

    reasoning_tokens: int
    accepted_prediction_tokens: int | UnsetType = UNSET
    rejected_prediction_tokens: int | UnsetType = UNSET
    draft_tokens: int | UnsetType = UNSET
    accepted_draft_tokens: int | UnsetType = UNSET


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of the whole request: each prompt is counted once, the output of every choice is counted.

    Attributes:
        completion_tokens_details: present if at least one of its counts is known.
        prompt_time_costs: milliseconds from first work on a prompt to its first token, the longest; only at the end.
        completion_time_costs: milliseconds from a choice's first token to its last, the longest; only at the end.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET
    prompt_time_costs: int | UnsetType = UNSET
    completion_time_costs: int | UnsetType = UNSET


class PromptProgress(msgspec.Struct, frozen=True, kw_only=True):
    """llama.cpp's report while a prompt is computed; `processed` counts its cached and its computed tokens."""

    total: int
    cache: int
    processed: int
    time_ms: int


class ShownPrompt(msgspec.Struct, frozen=True):
    """The prompt as the chat template rendered it."""

    prompt: str


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """llama.cpp's token counts and milliseconds of the prompt and of the answer; cached tokens took no time.

    Attributes:
        draft_n, draft_n_accepted: draft tokens that were verified and accepted; absent without draft tokens.
    """

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float
    draft_n: int | UnsetType = UNSET
    draft_n_accepted: int | UnsetType = UNSET
