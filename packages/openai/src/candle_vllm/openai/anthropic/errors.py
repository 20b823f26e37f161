# SPDX-License-Identifier: MIT
"""Table of errors in Anthropic's form: exception -> status, error body and headers.

The table is built from OpenAI's table, so both APIs agree on whose fault an error is, and on what a client may know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from candle_vllm.openai.errors import to_error

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
    details: ErrorCode | msgspec.UnsetType = msgspec.UNSET


_NO_THREADS = ErrorCode(error_code="thread_unsupported_request", unsupported=("thread",))


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="error"):
    """Body of a failed request, and data of an error inside a stream."""

    error: ErrorDetail
    request_id: str | None = None

    @property
    def event_name(self) -> str:
        return "error"


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
    """Return a response with this status, for errors that the server itself finds: a missing key, a body too large."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    details = _NO_THREADS if param == "thread" else msgspec.UNSET
    detail = ErrorDetail(type=kind, message=_with_field(message, param), param=param, details=details)
    final = {"x-should-retry": "false"} if status in _FINAL else {}
    return ErrorResponse(status, ErrorBody(error=detail, request_id=request_id), {**(headers or {}), **final})


def _with_field(message: str, param: str | None) -> str:
    """Format the message as Anthropic does: the field, a colon, and what is wrong with it."""
    if param is None:
        return message
    named = message.startswith((f"{param} ", f"{param}:"))
    rest = message.removeprefix(param).removeprefix(":").lstrip() if named else message
    return f"{param}: {rest}"
