# SPDX-License-Identifier: MIT
"""The path, the method and the caller of a request, before the router sees it; its context for observers (step 1).

The metrics of a generation need its HTTP request. Step 1 stores the request in a context variable, and later steps read
it there, so that the layers between, which know no HTTP, need not pass it on.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send


def routed_path(scope: Scope) -> str:
    """Return the path of a request as the router matches it: without the prefix (`root_path`)."""
    path, root = scope["path"], scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root + "/") else path


def route_path(scope: Scope) -> str:
    """Return the path of a request, for layers that decide before the router does.

    It has no newline at its end: the router's expressions end with `$`, which also matches before such a newline.
    """
    return routed_path(scope).removesuffix("\n")


def may_manage(scope: Scope) -> bool:
    """Whether the request's key is valid for operators' routes; on a server without any keys, True."""
    return scope.get("state", {}).get("manages", True)


class HeadMiddleware:
    """Answers HEAD wherever there is a route for GET, for load balancers and uptime checks.

    The routes see a GET; the HTTP protocol, which knows that it was a HEAD, sends no body.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})["head"] = True  # a GET with an effect checks this
        asked = {**scope, "method": "GET"}
        try:
            await self._app(asked, receive, send)
        finally:
            scope["route"] = asked.get("route")  # for the layers with metrics


class PrefixMiddleware:
    """Accepts paths with and without the prefix of a reverse proxy; every inner layer sees them without it."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app = app
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        prefix = self._prefix
        if scope["type"] != "lifespan" and scope["path"].startswith(prefix + "/"):
            raw: bytes = scope.get("raw_path") or b""
            begun = raw.startswith(prefix.encode() + b"/")
            scope = {**scope, "path": scope["path"][len(prefix) :], "raw_path": raw[len(prefix) :] if begun else b""}
        await self._app(scope, receive, send)


class UnversionedMiddleware:
    """Accepts some of OpenAI's routes without `/v1`, as llama-server does; every inner layer sees them with `/v1`."""

    PATHS = frozenset({"/chat/completions", "/embeddings", "/models", "/responses"})

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan" and scope["path"] in self.PATHS:
            scope = {**scope, "path": "/v1" + scope["path"], "raw_path": b"/v1" + (scope.get("raw_path") or b"")}
        await self._app(scope, receive, send)


class GreetingMiddleware:
    """Answers `/` on one port as Ollama does, because Ollama's clients check there whether the server runs."""

    def __init__(self, app: ASGIApp, port: int) -> None:
        self._app = app
        self._port = port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and route_path(scope) == "/"
        if asked and (scope.get("server") or ("", None))[1] == self._port:
            await PlainTextResponse("Ollama is running")(scope, receive, send)
        else:
            await self._app(scope, receive, send)


Limits = Mapping[str, int]
"""The limits of one key, by setting name (`RATES` in `settings/table.py`)."""


class Caller(NamedTuple):
    """The sender of a request; `label` and `key` are empty if the server needs no key.

    Attributes:
        label: its key's name, or "1" for the first unnamed key, "m1" for the first management key; not secret.
        key: the key itself, or for a named key a text with its name; stores use the hash of this as the owner.
        limits: limits on what it uses in a window of time.
        models: patterns of the names of models and adapters that it may use; None means all.
    """

    label: str = ""
    key: str = ""
    limits: Limits = MappingProxyType({})
    models: tuple[str, ...] | None = None

    def may_use(self, *names: str) -> bool:
        """Whether the caller may use a model or an adapter with these names."""
        return self.models is None or any(fnmatchcase(name, pattern) for name in names for pattern in self.models)

    def __repr__(self) -> str:
        return f"Caller({self.label!r})"  # the key is secret


NOBODY = Caller()


acting_for: ContextVar[Caller | None] = ContextVar("acting_for", default=None)
"""The caller for whom this process sends itself a request; the sending task sets it, no outside request can."""


def caller_of(scope: Scope) -> Caller:
    """Return the caller of a request, once its key has been checked; `NOBODY` if no key was needed."""
    return scope.get("state", {}).get("caller", NOBODY)


def is_stranger(scope: Scope) -> bool:
    """Whether a request to `/ready` had no valid key, on a server that has keys."""
    return scope.get("state", {}).get("stranger", False)


# --- for observers ----------------------------------------------------------------------------------------------------

NO_KEY = "none"
NO_ROUTE = "none"
_TRACE_HEADERS = (b"traceparent", b"tracestate")
_MAX_TRACE_HEADER = 512  # characters, as the W3C recommends for tracestate

current_request: ContextVar[RequestContext | None] = ContextVar("current_request", default=None)


class Spender(Protocol):
    """Counts what the requests of a key use (`Meter`)."""

    def spend(self, unit: str, count: int) -> None:
        """Count an amount of a unit."""


@dataclass(frozen=True)
class RequestContext:
    """One HTTP request, seen through its ASGI scope on each access, because key and route are found late."""

    scope: Scope

    @property
    def state(self) -> dict[str, Any]:
        """Values that layers and routes store for the request, as `Request.state`."""
        return self.scope.setdefault("state", {})

    @property
    def http_request_id(self) -> str:
        """The `x-request-id` of the answer; empty for a WebSocket."""
        return str(self.state.get("request_id", ""))

    @property
    def key_label(self) -> str:
        """The label of the API key, which is not secret; `NO_KEY` without a key."""
        return caller_of(self.scope).label or NO_KEY

    @property
    def route(self) -> str:
        """The template of the route, never the raw path; `NO_ROUTE` without a route."""
        return str(getattr(self.scope.get("route"), "path", "") or NO_ROUTE)

    @property
    def prompt_only(self) -> bool:
        """Whether the token that the engine generates is no part of the answer (`max_tokens` 0 of a completion)."""
        return bool(self.state.get("prompt_only", False))

    @property
    def meter(self) -> Spender | None:
        """The rate-limit meter that counts what the request uses; None if its caller has no limits."""
        return self.state.get("meter")

    def first_of_request(self) -> bool:
        """Return True on the first call only, because the engine gets a request for each prompt of the HTTP request."""
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
    on disk and in Redis have only the result, a hash. It is the same after a restart, and for all keys of the same
    name. If the server needs no key, the salt is returned unchanged.
    """
    context = current_request.get()
    key = "" if context is None else caller_of(context.scope).key
    return hmac.new(key.encode(), salt.encode(), hashlib.sha256).hexdigest() if key else salt
