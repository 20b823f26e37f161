"""Token counts of an answer."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """Where the prompt's tokens came from: `cached_tokens` were found in the prefix cache."""

    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    """What the output's tokens were: `reasoning_tokens` are thoughts, with the marks around them.

    The other two are there where the request predicted its answer; both are 0, for predictions are not tried.
    """

    reasoning_tokens: int
    accepted_prediction_tokens: int | UnsetType = UNSET
    rejected_prediction_tokens: int | UnsetType = UNSET


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of the whole request: each prompt counted once, the output of every choice.

    Attributes:
        completion_tokens_details: there where the model may have reasoned.
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
