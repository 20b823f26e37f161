# SPDX-License-Identifier: MIT
"""Anthropic's answers, stream events and errors (step 10 of a request's life).

`to_error` maps errors of both APIs, so they agree on whose fault an error is, and on what a client may know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET, UnsetType

from candle_vllm.openai.errors import to_error
from candle_vllm.openai.events import Usage as Counts
from candle_vllm.openai.json_body import Tagged

# Thinking blocks have a signature that Anthropic verifies. Here it is a constant, and requests may have any other.
SIGNATURE = "Y2FuZGxlLXZsbG0gdGhvdWdodHMsIHVuc2lnbmVk"


class TextBlock(Tagged, frozen=True, kw_only=True, tag="text"):
    """Text of the answer; never only white space."""

    text: str


class ThinkingBlock(Tagged, frozen=True, kw_only=True, tag="thinking"):
    """The model's reasoning; empty if the request's `display` is `omitted`."""

    thinking: str
    signature: str


class ToolUseBlock(Tagged, frozen=True, kw_only=True, tag="tool_use"):
    """A call that the client has to execute; the client's result refers to its `id`.

    If the answer was truncated, `input` has the values that were complete. Output that is no JSON object is the value
    of a member `INVALID_JSON`, so that no tool mistakes a part for the whole.
    """

    id: str
    name: str
    input: dict[str, Any]


ContentBlock = TextBlock | ThinkingBlock | ToolUseBlock


class OutputTokensDetails(msgspec.Struct, frozen=True):
    """Kinds of output tokens: `thinking_tokens` counts the reasoning with its markers."""

    thinking_tokens: int


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts. The prompt's tokens are `input_tokens` plus `cache_read_input_tokens`.

    Attributes:
        cache_creation_input_tokens: 0, because writing to the cache is not charged.
        output_tokens_details: present if the answer could have reasoning.
    """

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: OutputTokensDetails | UnsetType = UNSET

    @classmethod
    def of(cls, counts: Counts) -> Usage:
        """Convert the token counts of an answer."""
        reasoning = counts.reasoning_tokens
        return cls(
            input_tokens=counts.prompt_tokens - counts.cached_tokens,
            cache_read_input_tokens=counts.cached_tokens,
            output_tokens=counts.completion_tokens,
            output_tokens_details=UNSET if reasoning is None else OutputTokensDetails(reasoning),
        )


class Message(Tagged, frozen=True, kw_only=True, tag="message"):
    """The whole answer.

    Attributes:
        stop_reason: `end_turn`, `max_tokens`, `stop_sequence`, `tool_use`, or `model_context_window_exceeded` if the
            context ended before `max_tokens` was reached; null in `message_start`.
        stop_sequence: the stop sequence that ended the answer.
    """

    id: str
    role: str = "assistant"
    model: str
    content: tuple[ContentBlock, ...]
    stop_reason: str | None = None
    stop_sequence: str | None = None
    usage: Usage


class TokenCount(msgspec.Struct, frozen=True):
    """Number of tokens of a prompt."""

    input_tokens: int


class _Event(Tagged, frozen=True, kw_only=True):
    @property
    def event_name(self) -> str:
        return str(self.__struct_config__.tag)


class MessageStart(_Event, frozen=True, kw_only=True, tag="message_start"):
    """The first event: the message without content."""

    message: Message


class Ping(_Event, frozen=True, kw_only=True, tag="ping"):
    """An event without content."""


class ContentBlockStart(_Event, frozen=True, kw_only=True, tag="content_block_start"):
    """Start of a block, which is still empty."""

    index: int
    content_block: ContentBlock


class TextDelta(Tagged, frozen=True, kw_only=True, tag="text_delta"):
    """Delta of text."""

    text: str


class ThinkingDelta(Tagged, frozen=True, kw_only=True, tag="thinking_delta"):
    """Delta of reasoning."""

    thinking: str


class SignatureDelta(Tagged, frozen=True, kw_only=True, tag="signature_delta"):
    """The signature, at the end of a thinking block."""

    signature: str


class InputJsonDelta(Tagged, frozen=True, kw_only=True, tag="input_json_delta"):
    """Delta of the JSON text of a call's input."""

    partial_json: str


class ContentBlockDelta(_Event, frozen=True, kw_only=True, tag="content_block_delta"):
    """Delta of the open block."""

    index: int
    delta: TextDelta | ThinkingDelta | SignatureDelta | InputJsonDelta


class ContentBlockStop(_Event, frozen=True, kw_only=True, tag="content_block_stop"):
    """End of the open block."""

    index: int


class StopDelta(msgspec.Struct, frozen=True, kw_only=True):
    """Reason why the answer ended."""

    stop_reason: str
    stop_sequence: str | None = None


class MessageDelta(_Event, frozen=True, kw_only=True, tag="message_delta"):
    """End of the message, with its token counts, which replace the ones of `message_start`."""

    delta: StopDelta
    usage: Usage


class MessageStop(_Event, frozen=True, kw_only=True, tag="message_stop"):
    """The last event."""


MessageEvent = (
    MessageStart | Ping | ContentBlockStart | ContentBlockDelta | ContentBlockStop | MessageDelta | MessageStop
)


# ---- errors ----------------------------------------------------------------------------------------------------------


OVERLOADED = 529  # Anthropic's status for overload, which its clients know and retry
_FINAL = (401, 403)  # clients must not retry these: Claude Code would retry a wrong key for minutes
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    OVERLOADED: "overloaded_error",
}


class ErrorCode(msgspec.Struct, frozen=True, kw_only=True):
    """Machine-readable details of an error.

    Attributes:
        error_code: `thread_unsupported_request`: the client must send the whole conversation without a thread.
        unsupported: the fields that caused the error.
    """

    error_code: str
    unsupported: Sequence[str]


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    """Description of an error.

    Attributes:
        type: Anthropic's type of the error.
        message: text for people; begins with the field that caused the error, if there is one.
        param: dotted path of that field (`messages.0.content`), or null; Anthropic's errors have no `param`.
        details: present if the client can work around the error.
    """

    type: str
    message: str
    param: str | None = None
    details: ErrorCode | UnsetType = UNSET


_NO_THREADS = ErrorCode(error_code="thread_unsupported_request", unsupported=("thread",))


class ErrorBody(_Event, frozen=True, kw_only=True, tag="error"):
    """Body of a failed request, and data of an error inside a stream."""

    error: ErrorDetail
    request_id: str | None = None


class ErrorResponse(NamedTuple):
    """Response to a failed request."""

    status: int
    body: ErrorBody
    headers: Mapping[str, str]


def to_anthropic_error(exception: Exception, *, request_id: str | None = None) -> ErrorResponse:
    """Convert the exception that ended a request to a response; `to_error` decides what the client may know."""
    known = to_error(exception)
    error = known.body.error
    status = OVERLOADED if error.code == "overloaded" else known.status
    return anthropic_error(status, error.message, param=error.param, headers=known.headers, request_id=request_id)


def anthropic_error(
    status: int,
    message: str,
    *,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
    request_id: str | None = None,
) -> ErrorResponse:
    """Return a response with this status; a server calls it for errors that it finds itself, such as a missing key."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    details = _NO_THREADS if param == "thread" else UNSET
    if param is not None:  # as at Anthropic: the field, a colon, and what is wrong with it
        named = message.startswith((f"{param} ", f"{param}:"))
        rest = message.removeprefix(param).removeprefix(":").lstrip() if named else message
        message = f"{param}: {rest}"
    detail = ErrorDetail(type=kind, message=message, param=param, details=details)
    final = {"x-should-retry": "false"} if status in _FINAL else {}
    return ErrorResponse(status, ErrorBody(error=detail, request_id=request_id), {**(headers or {}), **final})
