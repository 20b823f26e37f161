# SPDX-License-Identifier: MIT
"""The HTTP request to which a generation belongs, for the code that observes the engine.

Step 1 of a request's life stores it in a context variable, and step 4 reads it there, so that the layers between, which
know no HTTP, need not pass it on. Every property is read from the ASGI scope on access, because key and route are found
only after the outermost layers have begun.
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
        """Values that layers and routes store for the request, as `Request.state`."""
        return self.scope.setdefault("state", {})

    @property
    def http_request_id(self) -> str:
        """The `x-request-id` of the answer; empty outside a request."""
        return str(self.state.get("request_id", ""))

    @property
    def key_label(self) -> str:
        """The label of the API key, which is not secret; never the key."""
        return caller_of(self.scope).label or NO_KEY

    @property
    def route(self) -> str:
        """The template of the route, never the raw path."""
        return str(getattr(self.scope.get("route"), "path", "") or NO_ROUTE)

    @property
    def arrived(self) -> float | None:
        """The `time.monotonic()` at which the body had been read; None if the route has not set it."""
        return self.state.get("arrived")

    @property
    def prompt_only(self) -> bool:
        """Whether the token that the engine generates is no part of the answer (`max_tokens` 0 of a completion)."""
        return bool(self.state.get("prompt_only", False))

    @property
    def meter(self) -> Meter | None:
        """The rate-limit meter that counts what the request uses; None if its key has no limits."""
        return self.state.get("meter")

    def first_of_request(self) -> bool:
        """Return True on the first call only: a client's request with several prompts is several to the engine."""
        first = not self.state.get("observed", False)
        self.state["observed"] = True
        return first

    def trace_headers(self) -> Mapping[str, str]:
        """Return the client's W3C trace context, without headers that are repeated or too long."""
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
    """Return a `cache_salt` that belongs to the API key of the current request.

    A client that sends the salt of another key does not find that key's blocks. The engine, its process and the blocks
    on disk and in Redis have only the hash. The hash is the same after a restart, and for all keys of the same name. If
    the server needs no key, the salt is returned unchanged.
    """
    context = current_request.get()
    key = "" if context is None else caller_of(context.scope).key
    return hmac.new(key.encode(), salt.encode(), hashlib.sha256).hexdigest() if key else salt


def begin_generation(scope: Scope, *, prompt_only: bool = False) -> None:
    """Record that a request's body has been read: its time to the first token counts from here.

    `prompt_only` means that the request only scores its prompt.
    """
    state: dict[str, Any] = scope.setdefault("state", {})
    state["arrived"] = time.monotonic()
    state["prompt_only"] = prompt_only
