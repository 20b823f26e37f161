# SPDX-License-Identifier: MIT
"""Declarations of routes: requests, answers, errors, and who may call them (no step of a request's life)."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, TypeVar

import msgspec
from fastapi import APIRouter
from fastapi.routing import APIRoute

from candle_vllm.openai import ErrorEnvelope
from candle_vllm.openai.protocol.fields import WireModel
from candle_vllm.server.openapi.components import Naming

Key = tuple[str, str]  # method and path, as in the router
_P = ParamSpec("_P")
_Endpoint = TypeVar("_Endpoint", bound=Callable[..., Awaitable[Any]])

_BODY_ERRORS = (400, 408, 413, 415)

# Declarations that several modules of routes share: statuses of errors, names of types, parameters, examples
MODEL_ERRORS = (404, 503)
QUEUED = (*MODEL_ERRORS, 429, 504)
COUNTED = (*MODEL_ERRORS, 504)
KEPT = (400, 404, 503)
RESPONSES, OLLAMA = Naming("Responses", "Out"), Naming("Ollama", "Out")
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WHICH = {"model": {"type": "string", "description": "A served name; without it the default model."}}


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One route.

    Attributes:
        tag: heading in the documentation pages.
        answer: type of a successful answer's body; several mean one of them.
        statuses: statuses of successful answers.
        id: name of the operation in generated clients; by default the function's name.
        summary: one line; by default the first line of the function's docstring.
        errors: statuses of errors, besides 401, 403, 500 and the statuses of `_BODY_ERRORS` for a route with a body.
        body: type of the request's body; several mean one of them.
        example: a body that works with any model of its kind.
        form: schemas of the fields of a body that is a form, by name.
        media: media type of a successful answer's body; empty if there is no body.
        events: types of an event's data, if the answer can be a stream.
        lines: types of a line, if the answer can be lines of JSON.
        octets: whether the answer can be bytes, which the header `metadata` describes.
        error: type of an error's body.
        naming: names of these types in the document.
        listed: whether the body of the answer is OpenAI's list object, with entries of the type `answer`.
        bare: whether the body of the answer is an array with entries of the type `answer`.
        one_or_more: whether the body of the answer is one `answer` or an array.
        bare_body: whether the request's body is an array with entries of the type `body`.
        manages: whether the route is for operators.
        public: whether the route needs no key.
        untyped: whether a JSON body needs no content type, as in llama.cpp's server and Ollama; `OriginMiddleware`
            refuses pages of other origins.
        query: the query parameters: a schema by name.
    """

    tag: str
    answer: type[msgspec.Struct] | tuple[type[msgspec.Struct], ...] = ()
    statuses: tuple[int, ...] = (200,)
    id: str = ""
    summary: str = ""
    errors: tuple[int, ...] = ()
    body: type[WireModel] | tuple[type[WireModel], ...] = ()
    example: Mapping[str, Any] | Sequence[Any] | None = None
    form: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    media: str = "application/json"
    events: tuple[type[msgspec.Struct], ...] = ()
    lines: tuple[type[msgspec.Struct], ...] = ()
    octets: bool = False
    error: type[msgspec.Struct] = ErrorEnvelope
    naming: Naming = field(default_factory=Naming)
    listed: bool = False
    bare: bool = False
    one_or_more: bool = False
    bare_body: bool = False
    manages: bool = False
    public: bool = False
    untyped: bool = False
    query: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def bodies(self) -> tuple[type[WireModel], ...]:
        return self.body if isinstance(self.body, tuple) else (self.body,)

    @property
    def answers(self) -> tuple[type[msgspec.Struct], ...]:
        return self.answer if isinstance(self.answer, tuple) else (self.answer,)

    @property
    def refusals(self) -> set[int]:
        """The statuses of errors, except 401, which depends on the server's keys."""
        return {*self.errors, 403, 500, *(_BODY_ERRORS if self.body or self.form else ())} - {*self.statuses}


def routing(
    router: APIRouter, make: Callable[_P, Operation]
) -> Callable[Concatenate[str, _P], Callable[[_Endpoint], _Endpoint]]:
    """Return a decorator that adds a route to a router, with its declaration for the OpenAPI document.

    `make` is `Operation`, perhaps with arguments that the module's routes share. The decorator's arguments are the
    method and the paths, such as `"POST /v1/score /score"`, and the arguments of `make`.
    """

    def route(at: str, *args: _P.args, **told: _P.kwargs) -> Callable[[_Endpoint], _Endpoint]:
        operation = make(*args, **told)
        method, *paths = at.split()

        def add(function: _Endpoint) -> _Endpoint:
            name = operation.id or function.__name__
            summary = operation.summary or (function.__doc__ or "").partition("\n")[0].rstrip(".")
            for path in reversed(paths):  # the order of stacked decorators
                own = name if path == paths[0] else name + "_" + path.strip("/").replace("/", "_")
                said = {"operation": dataclasses.replace(operation, id=own, summary=summary)}
                router.add_api_route(path, function, methods=[method], openapi_extra=said)
            return function

        return add

    return route


def operations_of(routers: Iterable[APIRouter]) -> dict[Key, Operation]:
    """Return the operations of these routers that the document describes, in the order of the routes."""
    return {
        (method, route.path): route.openapi_extra["operation"]
        for router in routers
        for route in router.routes
        if isinstance(route, APIRoute) and route.openapi_extra is not None
        for method in sorted(route.methods or ())
    }


class Access:
    """Who may call a route, decided by its path: everybody, operators, or clients.

    `public` are paths without an operation that need no key.
    """

    def __init__(self, operations: Mapping[Key, Operation], public: frozenset[str] = frozenset()) -> None:
        self.public = public | {path for (_, path), each in operations.items() if each.public}
        self.managed = {path for (_, path), each in operations.items() if each.manages}
        self._open = {key for key, each in operations.items() if key[1] in self.managed and not each.manages}
        self._below = tuple(path.partition("{")[0] for path in self.managed if "{" in path)

    def manages(self, method: str | None, path: str) -> bool:
        """Whether only operators may send a request; a WebSocket has no method."""
        return (path in self.managed or path.startswith(self._below)) and (method, path) not in self._open
