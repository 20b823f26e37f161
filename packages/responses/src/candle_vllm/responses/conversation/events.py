# SPDX-License-Identifier: MIT
"""What happens in a conversation, one typed event at a time.

A turn: `TurnStarted`, then deltas of thoughts, text and calls as they are generated, then `TurnFinished` with the whole
message. For its calls: `ApprovalRequested` where somebody is asked, `ToolStarted`, `ToolProgressed`, `ToolFinished`;
those of calls that run at the same time interleave. The last event is `ConversationFinished`. A failure of the model
is an exception from the iterator.
"""

from __future__ import annotations

from typing import Any

import msgspec

from candle_vllm.openai.events import Reason
from candle_vllm.openai.task import Part
from candle_vllm.responses.conversation.options import ConversationResult, ConversationUsage
from candle_vllm.responses.tools.tool import ToolCall, ToolDefinition, ToolProgress, ToolResult


class TurnStarted(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The model begins a turn; `number` counts from 1."""

    number: int


class ReasoningDelta(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """More of the model's thoughts."""

    text: str


class TextDelta(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """More of its answer; `logprobs` are OpenAI's entries for its tokens where the request asked for them."""

    text: str
    logprobs: tuple[Any, ...] = ()


class CallStarted(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The model begins a call; `index` counts the calls of the turn from 0."""

    index: int
    call_id: str
    name: str


class CallArgumentsDelta(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """More of a call's arguments, as JSON text."""

    index: int
    call_id: str
    delta: str


class TurnFinished(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The model has ended its turn.

    Attributes:
        number: of the turn.
        message: the whole message in OpenAI's form, as it stands in the transcript.
        finish_reason: why it ended.
        usage: of this turn.
    """

    number: int
    message: dict[str, Any]
    finish_reason: Reason
    usage: ConversationUsage


class ApprovalRequested(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Somebody is asked whether a call may run, or nobody could be: then it is among the result's `pending`."""

    call: ToolCall
    definition: ToolDefinition


class ToolStarted(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A call runs."""

    call: ToolCall
    definition: ToolDefinition


class ToolProgressed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A running call says how far it is."""

    call_id: str
    progress: ToolProgress


class ToolFinished(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A call has its result; also one that did not run (no such tool, wrong arguments, denied).

    Attributes:
        result: what came of it.
        shown: what the model sees of it in place of the text, where images are among that.
    """

    result: ToolResult
    shown: tuple[Part, ...] = ()


class ConversationFinished(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The last event.

    Attributes:
        result: what the conversation came to.
        messages: what it added to the transcript: assistant and tool messages in OpenAI's form.
    """

    result: ConversationResult
    messages: tuple[dict[str, Any], ...]


Event = (
    TurnStarted | ReasoningDelta | TextDelta | CallStarted | CallArgumentsDelta | TurnFinished
    | ApprovalRequested | ToolStarted | ToolProgressed | ToolFinished | ConversationFinished
)  # fmt: skip
