# SPDX-License-Identifier: MIT
"""Wire types of `/v1/completions`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from candle_vllm.openai.protocol import fields
from candle_vllm.openai.protocol.chat import PromptLogprobs
from candle_vllm.openai.protocol.generation import GenerationFields, Logprobs
from candle_vllm.openai.protocol.usage import PromptProgress, Usage

Prompt = Annotated[
    Annotated[str, Tag("<string>")]
    | Annotated[list[str], Field(min_length=1, max_length=fields.MAX_PROMPTS, fail_fast=True), Tag("<strings>")]
    | Annotated[fields.TokenIds, Tag("<tokens>")]
    | Annotated[
        list[fields.TokenIds], Field(min_length=1, max_length=fields.MAX_PROMPTS, fail_fast=True), Tag("<token lists>")
    ],
    Discriminator(fields.prompt_form),
]


class CompletionRequest(GenerationFields):
    """Prompts to continue: a text, token ids, or a list of either.

    With a `suffix`, the model writes the text between prompt and suffix; it must be trained for fill-in-the-middle.
    Choice `i * n + j` is sequence `j` of prompt `i`. `max_tokens: 0` with `echo` scores a prompt and generates nothing.
    """

    refused_fields: ClassVar[Mapping[str, fields.Refusal]] = fields.COMPLETION_REFUSED_FIELDS

    prompt: Prompt
    suffix: str | None = None
    max_tokens: Annotated[int, fields.bounded("max_tokens", ge=0)] | None = None
    logprobs: Logprobs | None = None

    @field_validator("logprobs", mode="before")
    @classmethod
    def _number_not_switch(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise fields.invalid("", "must be a number from 0 to 20: how many likely tokens to report")
        return value

    @model_validator(mode="after")
    def _completion_rules(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise fields.invalid("max_tokens", "must be at least 1, or 0 together with echo: true")
        for name in ("echo", "truncate_prompt_tokens") if self.suffix else ():
            if (value := getattr(self, name)) is not None and value is not False:
                raise fields.invalid(name, "cannot be combined with suffix: leave one of them out")
        if len(self.prompts) * self.sequences > fields.MAX_CHOICES:
            raise fields.invalid("n", f"times the number of prompts must be at most {fields.MAX_CHOICES}")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list."""
        return fields.entries(self.prompt)


class CompletionLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Log-probabilities in OpenAI's older form: four lists with one entry per token.

    Attributes:
        tokens: text of each token; `bytes:\\xe2\\x82` for parts of characters, `token_id:5` where ids are requested.
        token_logprobs: log-probability of each token; null for the first token of an echoed prompt.
        top_logprobs: for each token, log-probabilities by text of the likeliest tokens and itself; null as above.
        text_offset: offset of each token in the choice's text, in characters.
    """

    tokens: tuple[str, ...]
    token_logprobs: tuple[float | None, ...]
    top_logprobs: tuple[dict[str, float] | None, ...]
    text_offset: tuple[int, ...]


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One completion, or one chunk of it in a stream; `finish_reason` is null before the last chunk.

    In a whole answer, tokens and log-probabilities of the prompt are null unless requested, as in vLLM.
    """

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: tuple[int, ...] | UnsetType = UNSET
    prompt_token_ids: tuple[int, ...] | UnsetType | None = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType | None = UNSET


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a completion request: the whole answer, or one event of a stream."""

    id: str
    created: int
    model: str
    choices: tuple[CompletionChoice, ...]
    system_fingerprint: str
    object: str = "text_completion"
    usage: Usage | UnsetType | None = UNSET
    prompt_progress: PromptProgress | UnsetType = UNSET
