# SPDX-License-Identifier: MIT
"""The error table: exception -> HTTP status, OpenAI error body and headers. No HTTP library is involved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from candle_vllm.core.errors import (
    CandleVllmError,
    EngineDeadError,
    EngineOverloadedError,
    EngineSleepingError,
    InvalidParameterError,
    PromptTooLongError,
    RequestAbortedError,
    RequestError,
    UnsupportedParameterError,
)


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """Description of an error.

    Attributes:
        message: text for people: the value, the allowed values, and what to do.
        type: `invalid_request_error` (the request is at fault) or `server_error`.
        param: dotted path of the field at fault (`messages.0.content`), or None.
        code: identifier for programs, such as `invalid_value`.
    """

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorEnvelope(msgspec.Struct, frozen=True, kw_only=True):
    """Body of the response to a failed request, and data of an error inside a stream."""

    error: ErrorBody


class InvalidBodyError(RequestError):
    """The request body is not a JSON object in UTF-8, breaks a rule of `json_body`, or is no valid form."""


class UnknownParameterError(InvalidParameterError):
    """The request has an unknown field, usually a misspelt one."""


def no_priority() -> UnsupportedParameterError:
    """Return the error for a `priority` below 0 on a server that does not let requests overtake others."""
    return UnsupportedParameterError(
        "priority below 0 is not supported: start the server with --enable-request-priority",
        "priority",
    )


class ModelNotServedError(RequestError):
    """The request names a model that this server does not serve."""


class GenerationFailedError(CandleVllmError):
    """The engine failed on this request; the error's message is for the log, not for the client."""


class ErrorResponse(NamedTuple):
    """Response to a failed request."""

    status: int
    body: ErrorEnvelope
    headers: Mapping[str, str]


class _Row(NamedTuple):
    exception: type[Exception]
    status: int
    type: str
    code: str
    headers: Mapping[str, str] = {}
    public_message: str | None = None  # None uses the exception's own message, which is written for the client


_DEAD = "The engine has stopped. Try again; if that does not help, the server must be restarted."

# The first row whose class matches is used, so subclasses precede their bases.
_TABLE = (
    _Row(InvalidBodyError, 400, "invalid_request_error", "invalid_body"),
    _Row(UnknownParameterError, 400, "invalid_request_error", "unknown_parameter"),
    _Row(UnsupportedParameterError, 400, "invalid_request_error", "unsupported_parameter"),
    _Row(InvalidParameterError, 400, "invalid_request_error", "invalid_value"),
    _Row(PromptTooLongError, 400, "invalid_request_error", "context_length_exceeded"),
    _Row(ModelNotServedError, 404, "invalid_request_error", "model_not_found"),
    _Row(RequestError, 400, "invalid_request_error", "invalid_request"),
    _Row(EngineOverloadedError, 503, "server_error", "overloaded", {"retry-after": "1"}),
    _Row(EngineSleepingError, 503, "server_error", "model_sleeping", {"retry-after": "5"}),
    _Row(EngineDeadError, 503, "server_error", "engine_dead", {"retry-after": "5"}, _DEAD),
    # Sent if the engine aborts the request, as at a shutdown; after a disconnect nobody reads it.
    _Row(RequestAbortedError, 503, "server_error", "request_aborted", {"retry-after": "5"}),
    _Row(GenerationFailedError, 500, "server_error", "generation_failed", {}, "The engine failed on this request."),
    _Row(Exception, 500, "server_error", "internal_error", {}, "The server failed on this request."),
)


def to_error(exception: Exception) -> ErrorResponse:
    """Convert the exception that ended a request to a response.

    A row's `public_message` replaces the exception's message, which may contain paths, addresses or data of other
    users. Log the exception before it is converted.
    """
    row = next(row for row in _TABLE if isinstance(exception, row.exception))
    param = exception.param if isinstance(exception, RequestError) else None
    body = ErrorBody(
        message=row.public_message or str(exception) or "The request failed.",
        type=row.type,
        param="model" if param == "lora_request" else param,  # the engine's name: requests name adapters as models
        code=row.code,
    )
    return ErrorResponse(row.status, ErrorEnvelope(error=body), row.headers)
