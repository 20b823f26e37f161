"""API keys: pure ASGI middleware before every route but /health.

Step 1 of a request's life. The decision rests on the ASGI path and the Authorization header alone, never on the
Host header or the raw URL, and takes the same time whichever key is right.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from candle_vllm.server.errors import HttpError

PUBLIC_PATHS = frozenset({"/health"})


class ApiKeyMiddleware:
    """Lets a request pass when it carries one of `keys` as `Authorization: Bearer KEY`.

    Attributes:
        keys: at least one key.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        assert keys
        self._app = app
        self._keys = tuple(key.encode("ascii") for key in keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] in PUBLIC_PATHS):
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif self._allowed(scope):
            await self._app(scope, receive, send)
        else:
            error = HttpError(
                401,
                "Missing or wrong API key: send the header `Authorization: Bearer <key>` with a key of this server.",
                "invalid_api_key",
                {"WWW-Authenticate": "Bearer"},
            )
            await error.response(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(values) != 1:
            return False
        scheme, _, key = values[0].partition(b" ")
        matches = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        return scheme.lower() == b"bearer" and any(matches)
