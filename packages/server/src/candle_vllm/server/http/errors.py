# SPDX-License-Identifier: MIT
"""Errors of the server itself, not of `OpenAIAdapter` or the engine (steps 1 and 10 of a request's life).

Failures in `OpenAIAdapter` and the engine are converted by `candle_vllm.openai.to_error`.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class HttpError(Exception):
    """A request that the server itself refuses or ends.

    Attributes:
        status: HTTP status.
        code: value of `code` in the body, for programs.
        headers: further response headers.
        param: field, header or other parameter at fault, or None.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        headers: Mapping[str, str] | None = None,
        *,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = dict(headers or {})
        self.param = param

    @property
    def body(self) -> bytes:
        """The error in OpenAI's format, as JSON."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})


def took_too_long() -> HttpError:
    """Return the error of a request whose time is over, which clients should not retry automatically."""
    message = "The request took longer than this server allows (--request-timeout)."
    return HttpError(504, message, "timeout", {"x-should-retry": "false"})


class ClientGone(Exception):
    """The client closed the connection before its answer was complete."""
