# SPDX-License-Identifier: MIT
"""Token counts of an answer."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """Where the prompt's tokens came from: `cached_tokens` were found in the prefix cache."""

    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    """What the output's tokens were; final counts alone have more than the first.

    Attributes:
        reasoning_tokens: thoughts, with the marks around them.
        accepted_prediction_tokens, rejected_prediction_tokens: tokens of the predicted text that stand in the answer,
            and the others, whether they were tried or not; there where the request predicted its answer, and of every
            choice.
        draft_tokens, accepted_draft_tokens: draft tokens that were tried, and those that became part of the answer;
            there where `return_draft_counts` asked for them.
    """

    reasoning_tokens: int
    accepted_prediction_tokens: int | UnsetType = UNSET
    rejected_prediction_tokens: int | UnsetType = UNSET
    draft_tokens: int | UnsetType = UNSET
    accepted_draft_tokens: int | UnsetType = UNSET


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of the whole request: each prompt counted once, the output of every choice.

    Attributes:
        completion_tokens_details: there where there is something to be told of.
        prompt_time_costs: milliseconds from first work on the prompt to the first token; in final counts only.
        completion_time_costs: milliseconds from the first token to the last; in final counts only.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET
    prompt_time_costs: int | UnsetType = UNSET
    completion_time_costs: int | UnsetType = UNSET


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """llama.cpp's tokens and milliseconds of the prompt and of the answer; cached tokens took no time.

    Attributes:
        draft_n, draft_n_accepted: draft tokens that were tried, and tokens of the answer that came of them; absent
            without any draft token.
    """

    cache_n: int
    prompt_n: int
    prompt_ms: int
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: int
    predicted_per_token_ms: float
    predicted_per_second: float
    draft_n: int | UnsetType = UNSET
    draft_n_accepted: int | UnsetType = UNSET
