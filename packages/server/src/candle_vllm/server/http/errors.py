# SPDX-License-Identifier: MIT
"""Errors of the server itself, not of `OpenAIAdapter` or the engine, in OpenAI's error format (step 1).

Failures in `OpenAIAdapter` and the engine are converted by `candle_vllm.openai.to_error`.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from starlette.responses import Response


class HttpError(Exception):
    """A request that the server itself refuses or ends.

    Attributes:
        status: HTTP status.
        code: OpenAI's error code, for programs.
        headers: further response headers.
        param: field or header at fault.
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
        """The error in OpenAI's format."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    @property
    def response(self) -> Response:
        """The error as an ASGI response."""
        return Response(self.body, self.status, self.headers, media_type="application/json")


def took_too_long() -> HttpError:
    """Return the error of a request whose time is over, which clients should not retry automatically."""
    message = "The request took longer than this server allows (--request-timeout)."
    return HttpError(504, message, "timeout", {"x-should-retry": "false"})


class ClientGone(Exception):
    """The client closed the connection before its answer was complete."""
