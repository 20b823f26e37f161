"""OpenAI's error envelope."""

from __future__ import annotations

import msgspec


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong.

    Attributes:
        message: for people: what was given, what is allowed, what to do.
        type: `invalid_request_error` (the request is at fault) or `server_error`.
        param: the field to blame as a dotted path (`messages.0.content`), or None.
        code: for programs, one word per row of the error table.
    """

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorEnvelope(msgspec.Struct, frozen=True, kw_only=True):
    """The whole body of a failed request, and the data of an error inside a stream."""

    error: ErrorBody
