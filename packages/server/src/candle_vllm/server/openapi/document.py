# SPDX-License-Identifier: MIT
"""The OpenAPI document of one application, generated from the declarations of its routes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from typing import Any

import msgspec
from fastapi import APIRouter
from fastapi.routing import APIRoute

from candle_vllm.server.openapi.operation import Operation, Schema, as_list, operations_of
from candle_vllm.server.settings.table import RATES

_MEANINGS: Mapping[int, str] = {
    200: "Success",
    202: "Accepted",
    204: "Success, without a body",
    400: "The request is invalid; `param` names the field",
    401: "The API key is missing or wrong",
    403: "The API key, the Origin, the Host or a setting of the server does not allow it",
    404: "Not found",
    408: "The body did not arrive in time",
    409: "The state of the model, the batch or the conversation does not allow it",
    413: "The body is too large",
    415: "The content type or the encoding of the body is not supported",
    429: "Too many requests of this API key or tool calls run or wait, or the key reached a limit",
    500: "The server failed on this request",
    502: "The webhook or the Hugging Face hub failed",
    503: "Overloaded, shutting down, or the model or the store is not available now",
    529: "Overloaded",
    504: "The answer took longer than the operator allows",
}
_IN_PATHS: Mapping[str, str] = {
    "batch_id": "The id of a batch.",
    "conversation_id": "The id of a conversation.",
    "file_id": "The id of a file.",
    "item_id": "The id of an item.",
    "model_id": "A served name; its slashes may be percent-encoded.",
    "request_id": "The id of the answer.",
    "response_id": "The id of a response.",
}
_DESCRIPTION = (
    "LLM inference with OpenAI's API. Errors have OpenAI's envelope, except on Anthropic's and Ollama's routes. They "
    "name a field that is unknown or not supported."
)
_ID = {"$ref": "#/components/headers/RequestId"}
_SECONDS = {"$ref": "#/components/headers/RetryAfter"}
RATE_LIMIT_HEADERS = tuple(
    f"x-ratelimit-{what}-{rate.label}" for rate in RATES.values() for what in ("limit", "remaining", "reset")
)
_LIMITS: Mapping[str, Any] = {name: {"$ref": "#/components/headers/RateLimit"} for name in RATE_LIMIT_HEADERS}


class ApiDocument:
    """The OpenAPI 3.1 document of an application, generated at its first use.

    `keys` is whether clients need an API key, `management_keys` whether operators have separate keys; `prefix` begins
    the paths that clients use, empty for none.
    """

    def __init__(self, routers: Sequence[APIRouter], *, keys: bool, management_keys: bool, prefix: str = "") -> None:
        self._routers = routers
        self._prefix = prefix
        self._keys = keys
        self._management_keys = management_keys

    @cached_property
    def value(self) -> dict[str, Any]:
        """The document as an object."""
        operations = operations_of(self._routers)
        paths: dict[str, Any] = {}
        for (method, path), operation in operations.items():
            guarded = not operation.public and (self._keys or (operation.manages and self._management_keys))
            entry = _operation(path, operation, [{"bearer": []}, {"x-api-key": []}] if guarded else [])
            paths.setdefault(re.sub(r":\w+}", "}", path), {})[method.lower()] = entry
        return {
            "openapi": "3.1.0",
            "info": {"title": "candle-vllm", "version": version("candle-vllm-server"), "description": _DESCRIPTION},
            "servers": [{"url": self._prefix or "/"}],
            "tags": [{"name": tag} for tag in dict.fromkeys(each.tag for each in operations.values())],
            "paths": paths,
            "components": _components(list(operations.values()), self._keys or self._management_keys),
        }

    @cached_property
    def encoded(self) -> bytes:
        """The document as JSON."""
        return msgspec.json.encode(self.value)

    def methods(self, path: str) -> list[str]:
        """Return the HTTP methods of the routes at a path, by the first template that matches it; empty for none."""
        routes = [route for router in self._routers for route in router.routes if isinstance(route, APIRoute)]
        first = next((route.path for route in routes if route.path_regex.match(path)), None)
        return sorted({method for route in routes if route.path == first for method in route.methods or ()})


def _components(operations: Sequence[Operation], guarded: bool) -> dict[str, Any]:
    made: dict[str, Any] = {
        "schemas": _schemas(operations),
        "headers": {
            "RequestId": {
                "description": "The request's own x-request-id if it matches the pattern, else a new one.",
                "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,128}$"},
            },
            "RetryAfter": {"description": "Seconds to wait.", "schema": {"type": "string", "pattern": "^[0-9]+$"}},
            "RateLimit": {"description": "Limits per minute of the API key.", "schema": {"type": "string"}},
        },
    }
    if guarded:
        made["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer", "description": "An API key of this server."},
            "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "The same."},
        }
    return made


def _schemas(operations: Sequence[Operation]) -> dict[str, Schema]:
    made: dict[str, Schema] = {}
    for naming in dict.fromkeys(each.naming for each in operations):
        own = [each for each in operations if each.naming == naming]
        requests = dict.fromkeys(kind for each in own for kind in each.bodies)
        answers = dict.fromkeys(kind for each in own for kind in each.answers)
        others = dict.fromkeys(kind for each in own for kind in (*each.events, *each.lines, each.error))
        made |= naming.components([*requests], [*(answers | others)])
    return made


def _operation(path: str, operation: Operation, security: list[dict[str, list[str]]]) -> dict[str, Any]:
    errors = operation.refusals | ({401} if security else set())
    entry: dict[str, Any] = {
        "operationId": operation.id,
        "tags": [operation.tag],
        "summary": operation.summary,
        "security": security,
        "parameters": _parameters(path, operation),
        "responses": {
            **{str(status): _answer(operation, status) for status in operation.statuses},
            **{str(status): _error(operation, status) for status in sorted(errors)},
        },
    }
    if operation.body:
        body = operation.naming.one_of(operation.bodies)
        body = {"type": "array", "items": body} if operation.bare_body else body
        content = {"schema": body, "example": operation.example}
        entry["requestBody"] = {"required": True, "content": {"application/json": content}}
    if operation.form:
        needed = [name for name, schema in operation.form.items() if "default" not in schema]
        schema = {"type": "object", "properties": {**operation.form}, "required": needed, "additionalProperties": False}
        entry["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": schema}}}
    return entry


def _parameters(path: str, operation: Operation) -> list[dict[str, Any]]:
    text = {"in": "path", "required": True, "schema": {"type": "string"}}
    inside = [{"name": name, "description": _IN_PATHS[name], **text} for name in re.findall(r"{(\w+)", path)]
    return inside + [{"name": name, "in": "query", "schema": schema} for name, schema in operation.query.items()]


def _answer(operation: Operation, status: int) -> dict[str, Any]:
    limits = _LIMITS if 429 in operation.errors else {}
    described: dict[str, Any] = {"description": _MEANINGS[status], "headers": {"x-request-id": _ID, **limits}}
    if status == 204 or not operation.media:
        return described
    schema: Schema = {"type": "string"}
    if operation.answers:
        schema = operation.naming.one_of(operation.answers)
    if operation.bare:
        schema = {"type": "array", "items": schema}
    if operation.one_or_more:
        schema = {"anyOf": [schema, {"type": "array", "items": schema}]}
    content: dict[str, Any] = {operation.media: {"schema": as_list(schema) if operation.listed else schema}}
    if operation.events:
        # Without a type: for some tools this schema describes the stream, for others one event.
        content["text/event-stream"] = {"schema": {
            "description": "With stream: true, server-sent events whose data is JSON. OpenAI's streams end with the "
            "data [DONE]; in a failed stream, an error precedes or replaces it.",
            "x-event-data": operation.naming.one_of(operation.events),
        }}  # fmt: skip
    if operation.lines:
        content["application/x-ndjson"] = {"schema": {
            "description": "Unless stream is false, lines of JSON. A failed stream ends with an error.",
            "x-line": operation.naming.one_of(operation.lines),
        }}  # fmt: skip
    if operation.octets:
        content["application/octet-stream"] = {"schema": {"type": "string", "format": "binary"}}
        what = "With encoding_format: bytes, the offsets and shapes of the vectors and the usage, as JSON."
        described["headers"]["metadata"] = {"description": what, "schema": {"type": "string"}}
    return described | {"content": content}


def _error(operation: Operation, status: int) -> dict[str, Any]:
    headers: dict[str, Any] = {"x-request-id": _ID}
    if status == 429:
        headers |= _LIMITS
    if status in (429, 503, 529):
        headers["retry-after"] = _SECONDS
    if status == 401:
        headers["www-authenticate"] = {"schema": {"type": "string"}, "required": True}
    content = {"application/json": {"schema": operation.naming.ref(operation.error)}}
    return {"description": _MEANINGS[status], "headers": headers, "content": content}
