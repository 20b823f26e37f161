# SPDX-License-Identifier: MIT
"""The table of errors in Anthropic's words: exception -> status, error body and headers.

It is made from OpenAI's table, so that the two routes agree on what is whose fault and on what may be told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from candle_vllm.openai.errors import to_error

OVERLOADED = 529  # Anthropic's status for it, which its clients know and retry
_FINAL = (401, 403)  # Claude Code would try a wrong key again for minutes, because Anthropic's tokens are renewed
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
    """What a client's program acts on.

    Attributes:
        error_code: `thread_unsupported_request`: the client shall send the whole conversation without a thread.
        unsupported: the fields that made it so.
    """

    error_code: str
    unsupported: Sequence[str]


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong.

    Attributes:
        type: a word of Anthropic's.
        message: for people; begins with the field at fault, where one is.
        param: the field to blame as a dotted path (`messages.0.content`), or None; Anthropic has no such field.
        details: where a client has a way round.
    """

    type: str
    message: str
    param: str | None = None
    details: ErrorCode | msgspec.UnsetType = msgspec.UNSET


_NO_THREADS = ErrorCode(error_code="thread_unsupported_request", unsupported=("thread",))


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="error"):
    """The whole body of a failed request, and the data of an error inside a stream."""

    error: ErrorDetail
    request_id: str | None = None

    @property
    def event_name(self) -> str:
        """What stands behind `event:` in a stream."""
        return "error"


class ErrorResponse(NamedTuple):
    """What to answer to a failed request."""

    status: int
    body: ErrorBody
    headers: Mapping[str, str]


def to_anthropic_error(exception: Exception, *, request_id: str | None = None) -> ErrorResponse:
    """The answer to a request that ended in `exception`; what may be told of it is as in `to_error`."""
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
    """The answer with this status, for what a server refuses itself: a missing key, a body that is too large."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    details = _NO_THREADS if param == "thread" else msgspec.UNSET
    detail = ErrorDetail(type=kind, message=_with_field(message, param), param=param, details=details)
    final = {"x-should-retry": "false"} if status in _FINAL else {}
    return ErrorResponse(status, ErrorBody(error=detail, request_id=request_id), {**(headers or {}), **final})


def _with_field(message: str, param: str | None) -> str:
    """Anthropic's form: the field, a colon, and what is wrong with it."""
    if param is None:
        return message
    named = message.startswith((f"{param} ", f"{param}:"))
    rest = message.removeprefix(param).removeprefix(":").lstrip() if named else message
    return f"{param}: {rest}"
