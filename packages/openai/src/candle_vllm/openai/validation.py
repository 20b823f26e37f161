# SPDX-License-Identifier: MIT
"""Parse a body's bytes or an object to a validated request of its class (step 2 of a request's life).

The errors of pydantic are converted to one `InvalidParameterError` in plain words, with the field as a dotted path.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.openai.errors import InvalidBodyError, UnknownParameterError, UnsupportedParameterError
from candle_vllm.openai.json_body import decode_json

_Request = TypeVar("_Request", bound=BaseModel)

_CLASSES = {"unknown_field": UnknownParameterError, "unsupported_field": UnsupportedParameterError}
_SHOWN = 60  # characters of an invalid value that an error message repeats
_PARAM = 256  # characters of a field's path

_SENTENCES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "greater_than_equal": lambda ctx: f"must be at least {ctx['ge']}",
    "greater_than": lambda ctx: f"must be above {ctx['gt']}",
    "less_than_equal": lambda ctx: f"must be at most {ctx['le']}",
    "finite_number": lambda _: "must be a finite number",
    "int_type": lambda _: "must be an integer",
    "int_parsing_size": lambda _: "must be a smaller integer",
    "float_type": lambda _: "must be a number",
    "bool_type": lambda _: "must be true or false",
    "string_type": lambda _: "must be a string",
    "list_type": lambda _: "must be a list",
    "dict_type": lambda _: "must be an object",
    "model_type": lambda _: "must be an object",
    "model_attributes_type": lambda _: "must be an object",
    "literal_error": lambda ctx: f"must be one of {ctx['expected']}",
    "string_too_long": lambda ctx: f"must have at most {ctx['max_length']} characters",
    "too_long": lambda ctx: f"must have at most {ctx['max_length']} entries",
}


def parse_body(kind: type[_Request], body: bytes | Mapping[str, Any]) -> _Request:
    """Parse and validate a request; raises `RequestError`, which names the field at fault."""
    value = decode_json(body) if isinstance(body, bytes) else body
    if not isinstance(value, Mapping):
        given = "" if isinstance(body, bytes) else f", as {{'messages': [...]}} is, not {type(body).__name__}"
        raise InvalidBodyError(f"The body must be one JSON object{given}.")
    value = dict(value)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise to_request_error(error) from None


@contextmanager
def rules_below(path: str) -> Iterator[None]:
    """Context manager that converts errors of wire types' rules; their paths begin with `path`, "" for a request."""
    try:
        yield
    except PydanticCustomError as refusal:
        context = refusal.context or {}
        field = ".".join(filter(None, (path, context["field"])))
        raise _CLASSES.get(refusal.type, InvalidParameterError)(f"{field} {context['text']}", field) from None


def to_request_error(error: ValidationError) -> InvalidParameterError:
    """Convert pydantic's first error, with its field.

    pydantic lists at most one error for each field, because lists and objects end at their first error. Errors of
    `rule_error` have the rest of their path, and their text, in the error's context.
    """
    first = error.errors(include_url=False)[0]
    context = first.get("ctx", {})
    path = _path(first["loc"], context.get("field", ""))
    kind = first["type"]
    text = context.get("text") or _sentence(kind, context, first)
    place = path or "the request body"
    return _CLASSES.get(kind, InvalidParameterError)(f"{place} {text}", path or None)


def _path(location: tuple[int | str, ...], below: str) -> str:
    steps = [str(step) for step in location if not (isinstance(step, str) and step.startswith("<"))]
    return ".".join([*steps, below] if below else steps)[:_PARAM]


def _sentence(kind: str, context: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    if kind == "missing":
        return "is required"
    if kind == "string_type" and first["loc"] and first["loc"][-1] == "<string>":
        return f"must be a string or a list, not {_shown(first['input'])}"
    if kind in ("too_short", "string_too_short"):
        return "must not be empty"
    make = _SENTENCES.get(kind)
    text = make(context) if make else f"is wrong: {first['msg']}"
    return f"{text}, not {_shown(first['input'])}"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, str):
        return f"a string of {len(value)} characters" if len(value) > _SHOWN else json.dumps(value, ensure_ascii=False)
    return (
        json.dumps(value)[:_SHOWN] if value is None or isinstance(value, (bool, int, float)) else type(value).__name__
    )
