# SPDX-License-Identifier: MIT
"""Anthropic's answers and the events of its streams (step 10)."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from candle_vllm.openai.events import Usage as Counts

# Thinking blocks carry a signature, by which Anthropic knows its own. Here it is always this one, and never looked at.
SIGNATURE = "Y2FuZGxlLXZsbG0gdGhvdWdodHMsIHVuc2lnbmVk"


class _Tagged(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """An object with a `type`."""


class TextBlock(_Tagged, frozen=True, kw_only=True, tag="text"):
    """Text of the answer; never only white space."""

    text: str


class ThinkingBlock(_Tagged, frozen=True, kw_only=True, tag="thinking"):
    """What the model thought; empty where the request asked to leave it out."""

    thinking: str
    signature: str


class ToolUseBlock(_Tagged, frozen=True, kw_only=True, tag="tool_use"):
    """A call that the client is asked to make; the result refers to its `id`.

    `input` is what had come of it where the answer was cut. Text of the model that is no JSON object stands as it is
    in a member `INVALID_JSON`, so that no tool takes a part of it for the whole.
    """

    id: str
    name: str
    input: dict[str, Any]


ContentBlock = TextBlock | ThinkingBlock | ToolUseBlock


class OutputTokensDetails(msgspec.Struct, frozen=True):
    """What the output's tokens were: `thinking_tokens` are thoughts, with the marks around them."""

    thinking_tokens: int


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of the request. The prompt is `input_tokens` and `cache_read_input_tokens` together.

    Attributes:
        cache_creation_input_tokens: 0: nothing is charged for what is put into the cache.
        output_tokens_details: there where the model may have thought.
    """

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: OutputTokensDetails | UnsetType = UNSET

    @classmethod
    def of(cls, counts: Counts) -> Usage:
        """The counts of an answer."""
        reasoning = counts.reasoning_tokens
        return cls(
            input_tokens=counts.prompt_tokens - counts.cached_tokens,
            cache_read_input_tokens=counts.cached_tokens,
            output_tokens=counts.completion_tokens,
            output_tokens_details=UNSET if reasoning is None else OutputTokensDetails(reasoning),
        )


class Message(_Tagged, frozen=True, kw_only=True, tag="message"):
    """The whole answer.

    Attributes:
        stop_reason: `end_turn`, `max_tokens`, `stop_sequence`, `tool_use`, or `model_context_window_exceeded` where
            the context ended before `max_tokens` did; null in `message_start`.
        stop_sequence: the one that ended it.
    """

    id: str
    role: str = "assistant"
    model: str
    content: tuple[ContentBlock, ...]
    stop_reason: str | None = None
    stop_sequence: str | None = None
    usage: Usage


class TokenCount(msgspec.Struct, frozen=True):
    """How many tokens a prompt has."""

    input_tokens: int


class _Event(_Tagged, frozen=True, kw_only=True):
    @property
    def event_name(self) -> str:
        """What stands behind `event:`."""
        return str(self.__struct_config__.tag)


class MessageStart(_Event, frozen=True, kw_only=True, tag="message_start"):
    """The first event: the message without content."""

    message: Message


class Ping(_Event, frozen=True, kw_only=True, tag="ping"):
    """Says nothing."""


class ContentBlockStart(_Event, frozen=True, kw_only=True, tag="content_block_start"):
    """A block begins, empty."""

    index: int
    content_block: ContentBlock


class TextDelta(_Tagged, frozen=True, kw_only=True, tag="text_delta"):
    """More text."""

    text: str


class ThinkingDelta(_Tagged, frozen=True, kw_only=True, tag="thinking_delta"):
    """More thoughts."""

    thinking: str


class SignatureDelta(_Tagged, frozen=True, kw_only=True, tag="signature_delta"):
    """The signature, at the end of a thinking block."""

    signature: str


class InputJsonDelta(_Tagged, frozen=True, kw_only=True, tag="input_json_delta"):
    """More of the JSON text of a call's input."""

    partial_json: str


class ContentBlockDelta(_Event, frozen=True, kw_only=True, tag="content_block_delta"):
    """More of the open block."""

    index: int
    delta: TextDelta | ThinkingDelta | SignatureDelta | InputJsonDelta


class ContentBlockStop(_Event, frozen=True, kw_only=True, tag="content_block_stop"):
    """The open block is complete."""

    index: int


class StopDelta(msgspec.Struct, frozen=True, kw_only=True):
    """Why the answer ended."""

    stop_reason: str
    stop_sequence: str | None = None


class MessageDelta(_Event, frozen=True, kw_only=True, tag="message_delta"):
    """The end of the message, and its counts; they replace those of `message_start`."""

    delta: StopDelta
    usage: Usage


class MessageStop(_Event, frozen=True, kw_only=True, tag="message_stop"):
    """The last event."""


MessageEvent = (
    MessageStart | Ping | ContentBlockStart | ContentBlockDelta | ContentBlockStop | MessageDelta | MessageStop
)
