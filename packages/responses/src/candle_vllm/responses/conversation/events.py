# SPDX-License-Identifier: MIT
"""Typed events of a conversation.

A turn gives `TurnStarted`, deltas of reasoning, text and calls as they are generated, with `TurnMeasured` between them
if the request asks for token counts or progress, and `TurnFinished` with the whole message; `ResultsShortened` follows
`TurnStarted` each time that the prompt is too long. Then each call gives `ApprovalRequested` if an approval is needed,
`ToolStarted` and `ToolProgressed` if it runs, and `ToolFinished` unless it stays open; the events of concurrent calls
interleave. The last event is `ConversationFinished`. Errors of the model are exceptions of the iterator.
"""

from __future__ import annotations

from typing import Any

import msgspec

from candle_vllm.core.engine.outputs import FinishReason
from candle_vllm.openai import events as answer
from candle_vllm.openai.task import Part
from candle_vllm.responses.conversation.options import ConversationResult, ConversationUsage
from candle_vllm.responses.tools.tool import ToolCall, ToolDefinition, ToolProgress, ToolResult


class TurnStarted(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The model begins a turn; `number` counts from 1."""

    number: int


class ReasoningDelta(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A delta of the model's reasoning."""

    text: str


class TextDelta(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A delta of the answer, with OpenAI's `logprobs` if requested; for reasoning and calls `text` is empty."""

    text: str
    logprobs: tuple[Any, ...] = ()


class CallStarted(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The model begins a call; `index` counts the calls of the turn from 0."""

    index: int
    call_id: str
    name: str


class CallArgumentsDelta(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A delta of a call's arguments, as JSON text."""

    index: int
    call_id: str
    delta: str


class TurnMeasured(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Token counts of the running turn, or the progress of its prompt; only if the turn's request asks for them."""

    counts: answer.Usage | answer.Progress


class TurnFinished(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The model has ended its turn; `message` is the whole message in OpenAI's format, as in the transcript."""

    number: int
    message: dict[str, Any]
    finish_reason: FinishReason
    usage: ConversationUsage


class ApprovalRequested(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An approval of a call is requested. If nobody can decide, the call is in the result's `pending`."""

    call: ToolCall
    definition: ToolDefinition


class ToolStarted(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A call has started."""

    call: ToolCall
    definition: ToolDefinition


class ToolProgressed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A running call reports its progress."""

    call_id: str
    progress: ToolProgress


class ToolFinished(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A call has a result, also if it did not run (unknown tool, invalid arguments, denied).

    `shown` are the parts that the model sees in place of the result's text, if it sees an image; otherwise empty.
    """

    result: ToolResult
    shown: tuple[Part, ...] = ()


class ResultsShortened(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The prompt was too long, so results of calls were cut; the model sees at most `characters` of each."""

    characters: int


class ConversationFinished(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The last event; `messages` are the messages in OpenAI's format that were added to the transcript."""

    result: ConversationResult
    messages: tuple[dict[str, Any], ...]


Event = (
    TurnStarted | ReasoningDelta | TextDelta | CallStarted | CallArgumentsDelta | TurnMeasured | TurnFinished
    | ApprovalRequested | ToolStarted | ToolProgressed | ToolFinished | ResultsShortened
    | ConversationFinished
)  # fmt: skip
