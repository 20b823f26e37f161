# SPDX-License-Identifier: MIT
"""Bytes -> JSON value, strictly by RFC 8259 -> validated request (step 2 of a request's life), and answers -> bytes.

In JSON, besides invalid syntax, these are refused: duplicate names, NaN and Infinity, lone surrogates, integers of
thousands of digits, nesting beyond `MAX_DEPTH`, and more values, arrays, objects and names than the limits below.
Errors of pydantic are converted to one `InvalidParameterError` in plain words, with the field as a dotted path.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

import msgspec
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.openai.errors import InvalidBodyError, UnknownParameterError, UnsupportedParameterError


class Tagged(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """An object of an answer whose field `type` names its kind."""


MAX_DEPTH = 64  # nested arrays and objects
MAX_ELEMENTS = 1_000_000  # commas and opening brackets outside of strings
MAX_CONTAINERS = 100_000  # arrays and objects
MAX_NAMES = 100_000  # names in all objects together


_STEPS, _RUN = 1 << 13, 64  # escapes or runs of a string that one match consumes; characters of a run
_INSIDE = rf'(?:[^"\\]{{1,{_RUN}}}+|\\(?:.|\Z)){{0,{_STEPS}}}+(?:"|\Z|())'
_REST = re.compile(_INSIDE, re.DOTALL)  # the next part of a string; group 1 matches if the string continues after it


def _next(structural: str) -> re.Pattern[str]:
    """Return a pattern that matches up to the end of the next string, or up to the next `structural` character.

    Group 1 is that character; group 2 is set if the match ends inside its string. The pattern matches anywhere, also in
    invalid JSON, and never backtracks, so a scan is linear. Matches are short, because `re` blocks other threads.
    """
    return re.compile(rf'[^"{structural}]{{0,{_RUN * _STEPS}}}+(?:([{structural}])|"{_INSIDE}|)', re.DOTALL)


def _outside(pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
    """Find matches of `pattern`, made by `_next`, that end with a structural character outside of strings."""
    pieces = pattern.finditer(text)
    while (piece := next(pieces, None)) is not None:
        if piece.lastindex == 1:
            yield piece
        elif piece.lastindex == 2:
            while piece.lastindex:
                piece = _REST.match(text, piece.end())
                assert piece is not None
            pieces = pattern.finditer(text, piece.end())


_LIMITS = (
    (",[{", _next(r",\[\{"), MAX_ELEMENTS, "values"),
    ("[{", _next(r"\[\{"), MAX_CONTAINERS, "arrays and objects"),
    (":", _next(":"), MAX_NAMES, "names"),
)


_LINE_ENDS = {end.encode(): f"\\u{ord(end):04x}".encode() for end in "\u2028\u2029\x85"}


def to_json_bytes(value: msgspec.Struct | str, other: Callable[[Any], Any] | None = None) -> bytes:
    """Encode an answer, chunk, error or text as JSON in UTF-8 that is one line for every reader.

    U+2028, U+2029 and U+0085 end a line for some readers of streams and of JSON lines, such as Python's
    `str.splitlines`, so they are escaped; JSON escapes all other line ends. `other` converts values of other types.
    """
    data = msgspec.json.encode(value, enc_hook=other)
    for end, escape in () if data.isascii() else _LINE_ENDS.items():
        if end in data:
            data = data.replace(end, escape)
    return data


def to_dict(value: msgspec.Struct) -> dict[str, Any]:
    """Convert an answer, chunk or error to dicts and lists, as in its JSON: without fields that are UNSET."""
    return msgspec.to_builtins(value)


def decode_json(body: bytes | str, name: str = "The body") -> Any:
    """Decode the JSON value in `body`; raises `InvalidBodyError`; most of its messages begin with `name`."""
    try:
        text = body.decode("utf-8") if isinstance(body, bytes) else body
        _check_size(text, name)
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except UnicodeDecodeError as error:
        raise InvalidBodyError(f"{name} is not valid UTF-8: byte {error.start} ({error.reason}).") from None
    except json.JSONDecodeError as error:
        raise InvalidBodyError(
            f"{name} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from None
    except RecursionError:
        raise _too_deep(name) from None
    except ValueError:  # Python's limit for the digits of an integer
        raise InvalidBodyError(f"{name} holds a number with thousands of digits.") from None
    if sum(map(text.count, "[{")) > MAX_DEPTH and is_deeper(value, MAX_DEPTH):
        raise _too_deep(name)
    if "\\ud" in text or "\\uD" in text:
        _check_surrogates(value, name)
    return value


def _check_size(text: str, name: str) -> None:
    """Check limits before the text is parsed; if a plain count exceeds a limit, count again without strings."""
    for characters, pattern, most, what in _LIMITS:
        if sum(map(text.count, characters)) <= most:
            continue
        if sum(1 for _ in islice(_outside(pattern, text), most + 1)) > most:
            raise InvalidBodyError(f"{name} has more than {most} {what}; send less at once.")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise InvalidBodyError(f"The name {twice!r:.80} appears twice in one JSON object.")
    return value


def _constant(name: str) -> NoReturn:
    raise InvalidBodyError(f"{name} is not a JSON number.")


def _too_deep(name: str) -> InvalidBodyError:
    return InvalidBodyError(f"{name} is nested too deeply: at most {MAX_DEPTH} levels are allowed.")


def is_deeper(value: Any, levels: int) -> bool:
    """Whether arrays and objects of a JSON value are nested more than `levels` deep."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(levels):
        inner: list[Any] = []
        for item in level:
            members = item.values() if isinstance(item, dict) else item
            inner.extend(member for member in members if isinstance(member, (dict, list)))
        level = inner
        if not level:
            return False
    return bool(level)


def _check_surrogates(value: Any, name: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidBodyError(f"{name} has half of a surrogate pair (\\ud800 to \\udfff) without its twin.") from None


# --- validation -------------------------------------------------------------------------------------------------------

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


def parse_body(kind: type[_Request], body: bytes | Mapping[str, Any] | _Request) -> _Request:
    """Parse and validate a request, unless it is one already; raises `RequestError`, which names the field at fault."""
    if isinstance(body, kind):
        return body
    value = decode_json(body) if isinstance(body, bytes) else body
    if not isinstance(value, Mapping):
        given = "" if isinstance(body, bytes) else f", as {{'messages': [...]}} is, not {type(body).__name__}"
        raise InvalidBodyError(f"The body must be one JSON object{given}.")
    try:
        return kind.model_validate(dict(value))
    except ValidationError as error:
        others = {**getattr(kind, "other_names", {}), "n_predict": "max_tokens"}.items()
        given = {name: other for other, name in others if None is value.get(name) is not value.get(other)}
        raise to_request_error(error, given) from None


@contextmanager
def rules_below(path: str) -> Iterator[None]:
    """Context manager that converts errors of `fields.rule_error` to request errors whose paths begin with `path`."""
    try:
        yield
    except PydanticCustomError as refusal:
        context = refusal.context or {}
        field = ".".join(filter(None, (path, context["field"])))
        raise _CLASSES.get(refusal.type, InvalidParameterError)(f"{field} {context['text']}", field) from None


def to_request_error(error: ValidationError, given: Mapping[str, str] = MappingProxyType({})) -> InvalidParameterError:
    """Convert pydantic's first error, with its field; `given` are other names of fields that the request has.

    pydantic lists at most one error for each field, because lists and objects end at their first error. Errors of
    `fields.rule_error` have the rest of their path, and their text, in the error's context.
    """
    first = error.errors(include_url=False)[0]
    context = first.get("ctx", {})
    steps = [str(step) for step in first["loc"] if not (isinstance(step, str) and step.startswith("<"))]
    steps[:1] = [given.get(name, name) for name in steps[:1]]
    below = context.get("field", "")
    path = ".".join([*steps, below] if below else steps)[:_PARAM]
    kind = first["type"]
    text = context.get("text") or _sentence(kind, context, first)
    place = path or "the request body"
    return _CLASSES.get(kind, InvalidParameterError)(f"{place} {text}", path or None)


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
