# SPDX-License-Identifier: MIT
"""Anthropic's Messages API over an `OpenAIAdapter`, without HTTP: requests, answers, streams and errors."""

from candle_vllm.openai.anthropic.adapter import MessagesAdapter, MessageStream
from candle_vllm.openai.anthropic.answers import (
    ErrorBody,
    ErrorResponse,
    Message,
    MessageEvent,
    TokenCount,
    anthropic_error,
    to_anthropic_error,
)
from candle_vllm.openai.anthropic.request import (
    ADVISORY_MESSAGES_FIELDS,
    REFUSED_COUNT_FIELDS,
    REFUSED_MESSAGES_FIELDS,
    CountTokensRequest,
    MessagesRequest,
    parse_count_tokens_request,
    parse_messages_request,
)

__all__ = [
    "ADVISORY_MESSAGES_FIELDS",
    "REFUSED_COUNT_FIELDS",
    "REFUSED_MESSAGES_FIELDS",
    "CountTokensRequest",
    "ErrorBody",
    "ErrorResponse",
    "Message",
    "MessageEvent",
    "MessageStream",
    "MessagesAdapter",
    "MessagesRequest",
    "TokenCount",
    "anthropic_error",
    "parse_count_tokens_request",
    "parse_messages_request",
    "to_anthropic_error",
]
