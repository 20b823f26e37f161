# SPDX-License-Identifier: MIT
"""What is known of the HTTP request that a generation belongs to, for those who observe the engine.

Step 1 of a request's life leaves it in a context variable, and step 4 finds it there: the layers between, which know
no HTTP, need not pass it on. Everything is read from the ASGI scope when it is asked for, because keys and routes are
found after the outermost layers have begun.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from starlette.types import Scope

from candle_vllm.server.http.limits import Meter
from candle_vllm.server.http.routing import caller_of

NO_KEY = "none"
NO_ROUTE = "none"
_TRACE_HEADERS = (b"traceparent", b"tracestate")
_MAX_TRACE_HEADER = 512  # characters, as the W3C recommends for tracestate

current_request: ContextVar[RequestContext | None] = ContextVar("current_request", default=None)


@dataclass(frozen=True)
class RequestContext:
    """One HTTP request, seen through its ASGI scope."""

    scope: Scope

    @property
    def state(self) -> dict[str, Any]:
        """What layers and routes have noted of the request; `Request.state` writes there."""
        return self.scope.setdefault("state", {})

    @property
    def http_request_id(self) -> str:
        """The `x-request-id` of the answer; empty outside a request."""
        return str(self.state.get("request_id", ""))

    @property
    def key_label(self) -> str:
        """Which API key, in a form that may be shown; never the key."""
        return caller_of(self.scope).label or NO_KEY

    @property
    def route(self) -> str:
        """The template of the route, never the raw path."""
        return str(getattr(self.scope.get("route"), "path", "") or NO_ROUTE)

    @property
    def arrived(self) -> float | None:
        """When the body had been read, `time.monotonic()`; None where the route has not said it."""
        return self.state.get("arrived")

    @property
    def prompt_only(self) -> bool:
        """Whether the token that the engine makes is no part of the answer (`max_tokens` 0 of a completion)."""
        return bool(self.state.get("prompt_only", False))

    @property
    def meter(self) -> Meter | None:
        """Where the request's tokens are taken from; None where its key has no limits."""
        return self.state.get("meter")

    def first_of_request(self) -> bool:
        """True once: a request with several prompts is several to the engine and one to its client."""
        first = not self.state.get("observed", False)
        self.state["observed"] = True
        return first

    def trace_headers(self) -> Mapping[str, str]:
        """W3C trace context as the client sent it; nothing where a header is repeated or too long."""
        found: dict[str, list[bytes]] = {}
        for name, value in self.scope.get("headers", ()):
            if name in _TRACE_HEADERS:
                found.setdefault(name.decode("ascii"), []).append(value)
        return {
            name: values[0].decode("latin-1")
            for name, values in found.items()
            if len(values) == 1 and len(values[0]) <= _MAX_TRACE_HEADER
        }


def owned_salt(salt: str) -> str:
    """Return a `cache_salt` that belongs to the API key of the request that is being answered.

    Who sends another key's salt finds none of its blocks. The engine, its process and the blocks that are kept on disk
    and in Redis know the hash alone. It is the same after a restart, and for every key of a name. Where the server asks
    for no key, the salt stays as it is.
    """
    context = current_request.get()
    key = "" if context is None else caller_of(context.scope).key
    return hmac.new(key.encode(), salt.encode(), hashlib.sha256).hexdigest() if key else salt


def begin_generation(scope: Scope, *, prompt_only: bool = False) -> None:
    """Notes that a request's body has been read: its time to the first token counts from here.

    Args:
        scope: of the request.
        prompt_only: the request wants nothing generated, only its prompt scored.
    """
    state: dict[str, Any] = scope.setdefault("state", {})
    state["arrived"] = time.monotonic()
    state["prompt_only"] = prompt_only
