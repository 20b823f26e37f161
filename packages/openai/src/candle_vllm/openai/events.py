# SPDX-License-Identifier: MIT
"""What happens while an answer is made, one neutral event at a time (step 10): the contract between those who answer
and the edges that write an API's words.

A request has one choice or several, whose events interleave; each says which it belongs to. A choice begins (`Begun`),
has thoughts, text and calls, and ends (`Ended`). `Usage` tells the counts so far before the first choice begins, where
they are asked for before every further piece, and at the end, when it is `final`. A failure is an exception from the
stream. A whole answer is what the events add up to: an edge writes the same pieces for both.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple, Self

import msgspec

from candle_vllm.core.engine.outputs import PositionLogprobs


class Reason(enum.StrEnum):
    """Why an answer ended; the value is OpenAI's word.

    Attributes:
        anthropic, ollama, llama_server: the words of these APIs. They have others for a stop string, and Anthropic's
            for a full context.
        responses: what the Responses API calls an answer that is incomplete.
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
        """Whether more would have come: the text or its last call may be unfinished."""
        return self is Reason.LENGTH


class Head(NamedTuple):
    """What is known of an answer before it begins; `created` is in Unix seconds."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class _OfChoice(msgspec.Struct, frozen=True):
    choice: int


class Begun(_OfChoice, frozen=True):
    """A choice begins.

    Attributes:
        head: of the whole answer.
        prompt: number of the prompt that it continues.
        prompt_logprobs: of that prompt's tokens, where they were asked for; with its first choice.
    """

    head: Head
    prompt: int = 0
    prompt_logprobs: Sequence[PositionLogprobs | None] | None = None


class Thought(_OfChoice, frozen=True):
    """More thoughts.

    Attributes:
        ids: tokens of the engine's piece that this is the first event of, where they are asked for.
        logprobs: of those tokens, likewise.
    """

    text: str
    ids: tuple[int, ...] | None = None
    logprobs: Sequence[PositionLogprobs] | None = None


class Text(_OfChoice, frozen=True):
    """More text of the answer; tokens as in `Thought`. The text is empty where there are only tokens to tell of."""

    text: str
    ids: tuple[int, ...] | None = None
    logprobs: Sequence[PositionLogprobs] | None = None


class CallBegun(_OfChoice, frozen=True):
    """A tool call begins: number `call` of its choice, counted from 0; tokens as in `Thought`."""

    call: int
    id: str
    name: str
    ids: tuple[int, ...] | None = None
    logprobs: Sequence[PositionLogprobs] | None = None


class CallText(_OfChoice, frozen=True):
    """More of the JSON text of a call's arguments; tokens as in `Thought`."""

    call: int
    text: str
    ids: tuple[int, ...] | None = None
    logprobs: Sequence[PositionLogprobs] | None = None


class Ended(_OfChoice, frozen=True):
    """A choice is over.

    Attributes:
        reason: `length` for a text that was cut, also within a call; `tool_calls` for one that ends with calls.
        stop: the stop string or token id that ended it; None for the model's own end.
    """

    reason: Reason
    stop: str | int | None = None


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of the whole request: each prompt counted once, the output of every choice.

    Attributes:
        cached_tokens: of the prompts, found in the prefix cache.
        reasoning_tokens: of the output, thoughts with the marks around them; None where there cannot be any.
        prompt_ms: from first work on the prompt to the first token; in final counts, where they are known.
        completion_ms: from the first token to the last, likewise.
        draft_tokens, accepted_draft_tokens: draft tokens that were tried, and those that became output;
            in final counts, as the next two.
        predicted_tokens, accepted_predicted_tokens: of the text that the request predicted, and those that stand in the
            output, for each choice.
        final: nothing follows.
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
