# SPDX-License-Identifier: MIT
"""The path, the method and the caller of a request, before the router sees it (step 1)."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import NamedTuple

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send


def route_path(scope: Scope) -> str:
    """Return the path of a request, for layers that decide before the router does.

    It has no prefix (`root_path`), and no newline at its end: the router's expressions end with `$`, which also matches
    before such a newline.
    """
    path, root = scope["path"], scope.get("root_path", "")
    path = path[len(root) :] if root and path.startswith(root + "/") else path
    return path.removesuffix("\n")


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
        if scope["type"] == "http" and scope["path"] in self.PATHS:
            scope = {**scope, "path": "/v1" + scope["path"], "raw_path": b"/v1" + (scope.get("raw_path") or b"")}
        await self._app(scope, receive, send)


class GreetingMiddleware:
    """Answers `/` on one port as Ollama does, because its clients check there whether the server runs."""

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
"""The limits of one key, by their settings in `RATES`."""


class Caller(NamedTuple):
    """The sender of a request; `label` and `key` are empty if the server needs no key.

    Attributes:
        label: its key's name, or "1" for the first unnamed key, "m1" for the first management key; not secret.
        key: the key itself, or a value that stands for its name; stores use its hash as the owner.
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
    """Return the caller of a request, once its key has been checked."""
    return scope.get("state", {}).get("caller", NOBODY)


def is_stranger(scope: Scope) -> bool:
    """Whether a request to `/ready` had no valid key, on a server that has keys."""
    return scope.get("state", {}).get("stranger", False)
