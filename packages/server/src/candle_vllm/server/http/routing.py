# SPDX-License-Identifier: MIT
"""The path and the method of a request as the router takes them, and who it comes from (step 1)."""

from __future__ import annotations

from contextvars import ContextVar
from fnmatch import fnmatchcase
from typing import NamedTuple

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send


def route_path(scope: Scope) -> str:
    """The path, for layers that decide before the router does.

    That is behind the prefix, where it is a folder of the path, and without a last newline.

    The router's expressions end with `$`, which matches before such a newline as well.
    """
    path, root = scope["path"], scope.get("root_path", "")
    path = path[len(root) :] if root and path.startswith(root + "/") else path
    return path.removesuffix("\n")


class HeadMiddleware:
    """HEAD wherever there is GET, for load balancers and uptime checks.

    The routes are asked for GET; the HTTP protocol below, which knows that it was HEAD, sends no body.
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
            scope["route"] = asked.get("route")  # for the layers that count


class PrefixMiddleware:
    """Takes paths with the prefix of a proxy in front as well as without it; every layer within sees them without."""

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
    """Takes OpenAI's routes without `/v1` too, as llama-server does; every layer within sees them with it."""

    PATHS = frozenset({"/chat/completions", "/embeddings", "/models", "/responses"})

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] in self.PATHS:
            scope = {**scope, "path": "/v1" + scope["path"], "raw_path": b"/v1" + (scope.get("raw_path") or b"")}
        await self._app(scope, receive, send)


class GreetingMiddleware:
    """Answers at `/` of one port as Ollama does, where its clients look whether it runs."""

    def __init__(self, app: ASGIApp, port: int) -> None:
        self._app = app
        self._port = port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and route_path(scope) == "/"
        if asked and (scope.get("server") or ("", None))[1] == self._port:
            await PlainTextResponse("Ollama is running")(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class Limits(NamedTuple):
    """What one key may ask for in a minute; None is as much as it likes.

    Attributes:
        requests_per_minute: that ask a model for something.
        tokens_per_minute: of prompts and answers together.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


UNLIMITED = Limits()


class Caller(NamedTuple):
    """Who a request comes from; both texts are empty where no key is asked for.

    Attributes:
        label: of the API key, which may be shown: its name, or "1" for the first, "m1" for the first of the operators'.
        key: by whose hash stores know whose something is: the key itself, or what stands for its name.
        limits: what it may ask for.
        models: patterns of the names of models and adapters that it may use; None is all.
    """

    label: str = ""
    key: str = ""
    limits: Limits = UNLIMITED
    models: tuple[str, ...] | None = None

    def may_use(self, *names: str) -> bool:
        """Whether it may use what has these names."""
        return self.models is None or any(fnmatchcase(name, pattern) for name in names for pattern in self.models)

    def __repr__(self) -> str:
        return f"Caller({self.label!r})"  # the key is secret


NOBODY = Caller()


acting_for: ContextVar[Caller | None] = ContextVar("acting_for", default=None)
"""Whom this process asks itself for, in the task that asks; no request from outside can set it."""


def caller_of(scope: Scope) -> Caller:
    """Who a request comes from, once it has passed."""
    return scope.get("state", {}).get("caller", NOBODY)


def is_stranger(scope: Scope) -> bool:
    """Whether a request to an open route brought no key to a server that has some."""
    return scope.get("state", {}).get("stranger", False)
