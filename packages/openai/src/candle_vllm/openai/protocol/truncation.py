# SPDX-License-Identifier: MIT
"""Truncation of prompts that are too long: the fields of a request, and what they do to a prompt's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.openai.protocol.fields import WireModel


class Cut(NamedTuple):
    """How prompts that are too long are truncated.

    Attributes:
        tokens: maximum number of tokens that remain; -1 for the maximum that leaves room for one output token.
        side: side from which tokens are removed.
    """

    tokens: int
    side: Literal["left", "right"] = "left"

    def of(self, prompt: Sequence[int], context: int, around: Sequence[int] = ()) -> Sequence[int]:
        """Return the truncated prompt; InvalidParameterError if `tokens` exceeds `context`, the longest prompt.

        `around` are the special tokens that the tokenizer puts around a text, which remain: those of an empty text.
        """
        if self.tokens > context:
            raise InvalidParameterError(
                "truncate_prompt_tokens value is greater than max_model_len. Please request a smaller truncation size.",
                "truncate_prompt_tokens",
            )
        most = context if self.tokens < 0 else self.tokens
        if len(prompt) <= most:
            return prompt
        count = len(around) if len(around) <= most else 0
        fronts = (n for n in range(count + 1) if [*prompt[:n], *prompt[len(prompt) - count + n :]] == [*around])
        if (front := next(fronts, None)) is None:
            front = count = 0
        first = len(prompt) - most + front if self.side == "left" else front
        return [*prompt[:front], *prompt[first : first + most - count], *prompt[len(prompt) - count + front :]]

    def written(self) -> dict[str, Any]:
        """Return the `CutFields` of a request that truncates in this way."""
        return {"truncate_prompt_tokens": self.tokens, "truncation_side": self.side}


class CutFields(WireModel):
    """vLLM's fields that truncate prompts that are too long; without them such prompts are refused.

    Attributes:
        truncate_prompt_tokens: maximum number of prompt tokens; -1 for the model's maximum.
        truncation_side: the side from which tokens are removed.
    """

    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=(1 << 31) - 1)] | None = None
    truncation_side: Literal["left", "right"] | None = None

    def cut(self, otherwise: Literal["left", "right"]) -> Cut | None:
        """Return how prompts are truncated, by default from the side `otherwise`; None without truncation."""
        given = self.truncate_prompt_tokens
        return None if given is None else Cut(given, self.truncation_side or otherwise)
