# SPDX-License-Identifier: MIT
"""Declarations of routes, and wire types as JSON schemas for the OpenAPI document (no step of a request's life).

The schemas describe what the types check field by field; rules between several fields are stated only in the error
messages of the routes.
"""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_args

import msgspec
from fastapi import APIRouter
from fastapi.routing import APIRoute
from msgspec import UNSET
from pydantic.json_schema import models_json_schema
from starlette.routing import compile_path

from candle_vllm.openai import ErrorEnvelope
from candle_vllm.openai.protocol.fields import WireModel

_REF = "#/components/schemas/"
_ENTRY = re.compile(r"^([\w, ]+): (.+(?:\n {4}.+)*)", re.MULTILINE)

Schema = dict[str, Any]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Naming:
    """Names of one API's types in the document.

    `prefix` begins every type's name if another API has classes with the same names; `out` ends the names of answers if
    requests have classes with the same names.
    """

    prefix: str = ""
    out: str = ""

    def name(self, kind: type) -> str:
        """Return the name of a wire type."""
        return self.prefix + kind.__name__ + (self.out if issubclass(kind, msgspec.Struct) else "")

    def ref(self, kind: type) -> Schema:
        """Return a reference to the schema of a wire type."""
        return {"$ref": _REF + self.name(kind)}

    def one_of(self, kinds: Sequence[type]) -> Schema:
        """Return the schema of a value of one of these types."""
        return self.ref(kinds[0]) if len(kinds) == 1 else {"anyOf": [self.ref(kind) for kind in kinds]}

    def components(
        self, requests: Sequence[type[WireModel]], answers: Sequence[type[msgspec.Struct]]
    ) -> dict[str, Schema]:
        """Return the schemas of these types and of all types in their fields, by name."""
        made: dict[str, Schema] = {}
        if requests:
            template = f"{_REF}{self.prefix}{{model}}"
            _, given = models_json_schema([(kind, "validation") for kind in requests], ref_template=template)
            kinds = {kind.__name__: kind for kind in _reached(requests, WireModel)}
            for short, schema in given["$defs"].items():
                made[self.name(kinds[short])] = _request_schema(kinds[short], schema)
        structs = {kind.__name__: kind for kind in _reached(answers, msgspec.Struct)}
        template = f"{_REF}{self.prefix}{{name}}{self.out}"
        _, found = msgspec.json.schema_components([*structs.values()], ref_template=template)
        for short, schema in found.items():
            name = self.prefix + short + self.out
            assert name not in made, f"{name} is a request and an answer"
            made[name] = _answer_schema(structs[short], schema) if short in structs else schema  # else an enumeration
        return made


def _request_schema(kind: type[WireModel], schema: Schema) -> Schema:
    """Add to a schema the fields that are not supported, with the accepted values, and those without effect."""
    properties = schema.setdefault("properties", {})
    for each in properties.values():
        each.pop("title", None)
        if each.get("default", "") is None:  # null means absent
            del each["default"]
    for name, refusal in sorted(kind.refused_fields.items()):
        allowed = {} if refusal.idle else {"enum": [None, *refusal.neutral]}
        what = "No effect" if refusal.idle else "Not served"
        properties[name] = {**allowed, "deprecated": True, "description": f"{what}: {refusal.reason}."}
    return _described(schema, kind.__doc__)


def _answer_schema(kind: type[msgspec.Struct], schema: Schema) -> Schema:
    """Adapt a schema to answers: fields are always present, unless the default is UNSET or the type omits defaults."""
    if not kind.__struct_config__.omit_defaults:
        always = [field.encode_name for field in msgspec.structs.fields(kind) if field.default is not UNSET]
        schema["required"] = [*dict.fromkeys([*schema.get("required", ()), *always])]
    for each in schema.get("properties", {}).values():
        each.pop("default", None)
    return _described(schema, kind.__doc__)


def _reached(kinds: Sequence[Any], base: type[_T]) -> Iterator[type[_T]]:
    """Yield the subclasses of `base` among these types and the types of their fields."""
    waiting, seen = list(kinds), list[Any]()
    while waiting:
        kind = waiting.pop()
        if any(kind is each for each in seen):
            continue
        seen.append(kind)
        waiting += [each for each in get_args(kind) if each is not Ellipsis]
        if isinstance(kind, type) and issubclass(kind, base):
            yield kind
            if issubclass(kind, WireModel):
                waiting += [field.annotation for field in kind.model_fields.values()]
            else:
                struct: Any = kind  # of a generic type, too
                waiting += [field.type for field in msgspec.structs.fields(struct)]


def _described(schema: Schema, text: str | None) -> Schema:
    """Add the descriptions of the type and of each field from the docstring."""
    whole, _, attributes = (text or "").partition("Attributes:\n")
    paragraphs = [" ".join(part.split()) for part in whole.split("\n\n")]
    schema["description"] = "\n\n".join(filter(None, paragraphs)).replace("`", "")
    properties = schema.get("properties", {})
    for match in _ENTRY.finditer(textwrap.dedent(attributes)):
        for name in match[1].split(", "):
            if name in properties:
                properties[name].setdefault("description", " ".join(match[2].split()).replace("`", ""))
    return schema


def as_list(items: Schema) -> Schema:
    """Return the schema of OpenAI's list of objects; `items` is the schema of an object."""
    return {
        "type": "object",
        "required": ["object", "data"],
        "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": items}},
    }


Key = tuple[str, str]  # method and path, as in the router
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
        answer: type of a successful answer's body; several mean one of them, none a text, bytes or no body.
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


def routing(**shared: Any) -> tuple[APIRouter, Callable[..., Callable[[_Endpoint], _Endpoint]]]:
    """Return a router, and a decorator that adds a route to it with its declaration for the OpenAPI document.

    The decorator's arguments are the method and the paths, such as `"POST /v1/score /score"`, and arguments of
    `Operation`; `shared` are those that the module's routes share.
    """
    router = APIRouter()

    def route(at: str, **own: Any) -> Callable[[_Endpoint], _Endpoint]:
        operation = Operation(**{**shared, **own})
        method, *paths = at.split()

        def add(function: _Endpoint) -> _Endpoint:
            name = operation.id or function.__name__
            summary = operation.summary or (function.__doc__ or "").partition("\n")[0].rstrip(".")
            for path in reversed(paths):  # the order of stacked decorators
                of_path = name if path == paths[0] else name + "_" + path.strip("/").replace("/", "_")
                said = {"operation": dataclasses.replace(operation, id=of_path, summary=summary)}
                router.add_api_route(path, function, methods=[method], openapi_extra=said)
            return function

        return add

    return router, route


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
    """Who may call a route, decided by its method and path: everybody, operators, or clients.

    `public` are paths without an operation that need no key.
    """

    def __init__(self, operations: Mapping[Key, Operation], public: frozenset[str] = frozenset()) -> None:
        self.public = public | {path for (_, path), each in operations.items() if each.public}
        self.managed = {path for (_, path), each in operations.items() if each.manages}
        clients = [key for key, each in operations.items() if not each.manages]
        self._open = {key for key in clients if key[1] in self.managed}
        self._clients = [(method, compile_path(path)[0]) for method, path in clients]
        self._patterns = [
            (method, compile_path(path)[0])
            for (method, path), each in operations.items()
            if each.manages and "{" in path
        ]

    def manages(self, method: str | None, path: str) -> bool:
        """Whether only operators may send a request to a path as the router matches it (`routed_path`).

        A WebSocket has no method. Every method at the path of an operators' route is for operators, except methods of
        clients' routes at the same path or, if the operators' route has path parameters, of any clients' route that
        matches. If both kinds of route match path and method, only operators may send the request.
        """
        methods = {own for own, pattern in self._patterns if pattern.match(path)}
        plain = path.removesuffix("\n")  # `$` in the router's expressions also matches before a newline
        if method in methods:
            return True
        if plain in self.managed:
            return (method, plain) not in self._open
        return bool(methods) and not any(own == method and pattern.match(path) for own, pattern in self._clients)
