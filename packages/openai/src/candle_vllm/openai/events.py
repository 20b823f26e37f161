# SPDX-License-Identifier: MIT
"""Events of an answer, independent of any API (step 10 of a request's life).

The code of each API converts the events to chunks. A request has one choice or several, whose events interleave; each
event but `Usage` has the index of its choice. A choice begins (`Begun`), has reasoning, text and calls, and ends
(`Ended`). A `Usage` has the token counts so far: it precedes the first choice and, if requested, the events of every
further output; the last one is `final`. A failure is an exception from the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from candle_vllm.core.engine.outputs import FinishReason, PositionLogprobs


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
        prompt: index of the prompt that the choice continues.
        prompt_logprobs: log-probabilities of that prompt's tokens, if requested; only with its first choice.
    """

    head: Head
    prompt: int = 0
    prompt_logprobs: Sequence[PositionLogprobs | None] | None = None


class Thought(_OfChoice, frozen=True):
    """Delta of the reasoning.

    Attributes:
        ids: token ids of one engine output, if requested; only the first event of each output has them.
        logprobs: log-probabilities of these tokens, likewise.
    """

    text: str
    ids: tuple[int, ...] | None = None
    logprobs: Sequence[PositionLogprobs] | None = None


class Text(_OfChoice, frozen=True):
    """Delta of the answer's text; `ids` and `logprobs` as in `Thought`. The text may be empty if they are set."""

    text: str
    ids: tuple[int, ...] | None = None
    logprobs: Sequence[PositionLogprobs] | None = None


class CallBegun(_OfChoice, frozen=True):
    """A tool call begins, call number `call` of its choice, counted from 0; `ids` and `logprobs` as in `Thought`."""

    call: int
    id: str
    name: str
    ids: tuple[int, ...] | None = None
    logprobs: Sequence[PositionLogprobs] | None = None


class CallText(_OfChoice, frozen=True):
    """Delta of the JSON text of a call's arguments; `ids` and `logprobs` as in `Thought`."""

    call: int
    text: str
    ids: tuple[int, ...] | None = None
    logprobs: Sequence[PositionLogprobs] | None = None


class Ended(_OfChoice, frozen=True):
    """A choice ends.

    Attributes:
        reason: LENGTH if the output was truncated, even within a call; TOOL_CALLS if it ended with calls.
        stop: the stop string or stop token id that ended the choice; None for any other end.
    """

    reason: FinishReason
    stop: str | int | None = None


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts of the whole request: each prompt counts once, and so does the output of every choice.

    Attributes:
        cached_tokens: prompt tokens that were found in the prefix cache.
        reasoning_tokens: output tokens of the reasoning and its markers; None if the model has no reasoning.
        prompt_ms, completion_ms: milliseconds from the first step to the first token, and from the first to the last
            token, the longest of all sequences, if known; these and the counts below are in the final `Usage`.
        draft_tokens, accepted_draft_tokens: draft tokens that were verified and accepted.
        predicted_tokens, accepted_predicted_tokens: tokens of the client's `prediction`, once per choice, and how many
            of them occur in the answers.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int | None = None
    prompt_ms: float | None = None
    completion_ms: float | None = None
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0
    predicted_tokens: int = 0
    accepted_predicted_tokens: int = 0
    final: bool = False


class Progress(_OfChoice, frozen=True):
    """A part of the prompt has been computed; sent, if requested, before the choice begins.

    Attributes:
        head: fields of the whole answer.
        total: tokens of the prompt.
        usage: counts so far, and `prompt_ms` since the first step; `prompt_tokens` are those computed or cached.
    """

    head: Head
    total: int
    usage: Usage


Event = Begun | Thought | Text | CallBegun | CallText | Ended | Usage | Progress
