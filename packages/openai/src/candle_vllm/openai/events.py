# SPDX-License-Identifier: MIT
"""Events of an answer in the form of no API (step 10): read by the code that writes an API's chunks.

A request has one choice or several, whose events interleave; each event has the index of its choice. A choice begins
(`Begun`), has reasoning, text and calls, and ends (`Ended`). `Usage` has the counts so far: before the first choice
begins, before every further output if requested, and at the end, when it is `final`. A failure is an exception from
the stream. The same events make the chunks of a stream and the whole answer.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple, Self

import msgspec

from candle_vllm.core.engine.outputs import PositionLogprobs


class Reason(enum.StrEnum):
    """Why an answer ended; the value is OpenAI's finish reason.

    Attributes:
        anthropic, ollama, llama_server: these APIs' reasons; stop strings, and Anthropic's full context, have others.
        responses: the Responses API's reason of an incomplete answer.
    """

    STOP = "stop", "end_turn", "stop", "eos"
    LENGTH = "length", "max_tokens", "length", "limit", "max_output_tokens"
    TOOL_CALLS = "tool_calls", "tool_use", "stop", "eos"

    anthropic: str
    ollama: str
    llama_server: str
    responses: str

    def __new__(cls, value: str, anthropic: str, ollama: str, llama_server: str, responses: str = "") -> Self:
        reason = str.__new__(cls, value)
        reason._value_ = value
        reason.anthropic, reason.ollama = anthropic, ollama
        reason.llama_server, reason.responses = llama_server, responses
        return reason

    @property
    def cut(self) -> bool:
        """Whether the answer was truncated: its text or its last call may be incomplete."""
        return self is Reason.LENGTH


class Head(NamedTuple):
    """Fields of an answer that are known before it begins; `created` is in Unix seconds."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class _OfChoice(msgspec.Struct, frozen=True):
    choice: int


class Begun(_OfChoice, frozen=True):
    """A choice begins.

    Attributes:
        head: fields of the whole answer.
        prompt: number of the prompt that the choice continues.
        prompt_logprobs: log-probabilities of that prompt's tokens, if requested; only with its first choice.
    """

    head: Head
    prompt: int = 0
    prompt_logprobs: Sequence[PositionLogprobs | None] | None = None


class Thought(_OfChoice, frozen=True):
    """Delta of reasoning.

    Attributes:
        ids: tokens of the engine's output, if requested; only in the first event of an output.
        logprobs: log-probabilities of those tokens, likewise.
    """

    text: str
    ids: tuple[int, ...] | None = None
    logprobs: Sequence[PositionLogprobs] | None = None


class Text(_OfChoice, frozen=True):
    """Delta of the answer's text; tokens as in `Thought`. The text is empty if there are only tokens to report."""

    text: str
    ids: tuple[int, ...] | None = None
    logprobs: Sequence[PositionLogprobs] | None = None


class CallBegun(_OfChoice, frozen=True):
    """A tool call begins, call number `call` of its choice, counted from 0; tokens as in `Thought`."""

    call: int
    id: str
    name: str
    ids: tuple[int, ...] | None = None
    logprobs: Sequence[PositionLogprobs] | None = None


class CallText(_OfChoice, frozen=True):
    """Delta of the JSON text of a call's arguments; tokens as in `Thought`."""

    call: int
    text: str
    ids: tuple[int, ...] | None = None
    logprobs: Sequence[PositionLogprobs] | None = None


class Ended(_OfChoice, frozen=True):
    """A choice ends.

    Attributes:
        reason: `length` for a truncated text, also within a call; `tool_calls` for a choice that ends with calls.
        stop: the stop string or token id that ended the choice; None for the model's end-of-sequence token.
    """

    reason: Reason
    stop: str | int | None = None


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of the whole request: each prompt is counted once, the output of every choice is counted.

    Attributes:
        cached_tokens: prompt tokens that were found in the prefix cache.
        reasoning_tokens: output tokens of the reasoning and its marks; None if there cannot be any.
        prompt_ms: from the first work on the prompt to the first token; in final counts, if known.
        completion_ms: from the first token to the last, likewise.
        draft_tokens, accepted_draft_tokens: draft tokens that were tried, and those in the output; in final counts.
        predicted_tokens, accepted_predicted_tokens: predicted tokens, and those in the output, of all choices.
        final: whether this is the last event.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int | None = None
    prompt_ms: int | None = None
    completion_ms: int | None = None
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0
    predicted_tokens: int = 0
    accepted_predicted_tokens: int = 0
    final: bool = False


Event = Begun | Thought | Text | CallBegun | CallText | Ended | Usage
