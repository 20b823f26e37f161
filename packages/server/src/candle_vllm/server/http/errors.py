# SPDX-License-Identifier: MIT
"""Errors that the server itself raises before the adapter sees a request, in the OpenAI error envelope.

Step 1 of a request's life. Failures inside the adapter and the engine are mapped by `candle_vllm.openai.to_error`.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from starlette.responses import Response


class HttpError(Exception):
    """A request that the server refuses itself.

    Attributes:
        status: HTTP status.
        code: OpenAI error code, for programs.
        headers: further response headers.
        param: the field or header at fault.
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
        """The OpenAI error envelope."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    @property
    def response(self) -> Response:
        """The refusal as an ASGI response."""
        return Response(self.body, self.status, self.headers, media_type="application/json")


class ClientGone(Exception):
    """The client closed the connection before its answer was complete."""
