# SPDX-License-Identifier: MIT
"""Text of an argument -> its JSON value, by the tool's schema: for formats that write values without quotes."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from candle_vllm.core.sampling.json_rules import TYPE_ALIASES
from candle_vllm.openai.formats.json_text import is_json, mended
from candle_vllm.openai.formats.json_value import number

_MOST_STEPS = 64  # of a schema looked at for one argument
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
JSON_TYPES = frozenset({"null", *_TYPES.values()})
_NUMBERS = frozenset({"integer", "number"})
_NOTHING = ("null", "none", "nil")
_YES, _NO = ("true", "yes"), ("false", "no")
_MOST_LITERAL = 1 << 16  # characters of a Python literal: its tree takes hundreds of bytes for each
_MOST_STRING = 1 << 24  # of one that is a string, which is a single leaf
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)


def argument_types(schema: Mapping[str, Any], key: str) -> frozenset[str]:
    """JSON types that the schema of a tool's arguments allows for the argument `key`; empty where it does not say."""
    properties = schema.get("properties")
    own = properties.get(key) if isinstance(properties, Mapping) else None
    return frozenset(_types(own, schema)) if isinstance(own, Mapping) else frozenset()


def sub_schema(schema: Mapping[str, Any], key: str | None) -> Mapping[str, Any]:
    """The schema of an object's entry `key`, or of a list's entries; empty where there is none."""
    properties = schema.get("properties")
    if key is None:
        own = schema.get("items")
    elif isinstance(properties, Mapping) and key in properties:
        own = properties[key]
    else:
        own = schema.get("additionalProperties")
    return own if isinstance(own, Mapping) else {}


def escaped(text: str) -> str:
    """A text as the inside of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def to_json(text: str, types: frozenset[str]) -> str:
    """The JSON text of an argument.

    Args:
        text: as the model wrote it.
        types: what it may be; where none is known, whatever it looks like.

    Returns:
        The first of these that `types` has and `text` can be read as: null, boolean, integer, number, array or
        object, string. A string where nothing else fits. Quotes around a whole value are JSON's, unless it may be a
        string, whose quotes would be its own; where no types are known, what stands in them is a string.
    """
    bare = text.strip()
    quoted = _quoted(bare) if "string" not in types else None
    if quoted is not None and not types:
        return bare
    bare, plain = (bare, text) if quoted is None else (quoted.strip(), quoted)
    if types & _NUMBERS and "string" not in types:
        bare = number(bare) or bare
    for kind, read in _READERS:
        if types and kind not in types:
            continue
        value = read(bare, bool(types))
        if value is not None:
            return value
    return json.dumps(plain, ensure_ascii=False)


def _quoted(text: str) -> str | None:
    """What stands in a string of JSON; None where the text is none."""
    if not (len(text) > 1 and text[0] == text[-1] == '"'):
        return None
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def python_value(text: str) -> str | None:
    """A Python literal as JSON; None where it is none."""
    string = text[:1] in ("'", '"')
    if len(text) > (_MOST_STRING if string else _MOST_LITERAL) or (not string and _depth(text) > 64):
        return None
    try:
        value = ast.literal_eval(_ESCAPE.sub(_valid_escape, text))
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _valid_escape(match: re.Match[str]) -> str:
    """A backslash before a character that it does not escape stands for itself."""
    return match[0] if match[1] in "\\'\"abfnrtvxuUN01234567\n" else "\\" + match[0]


def _types(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Iterator[str]:
    todo, steps = [schema], 0
    while todo and steps < _MOST_STEPS:
        steps += 1
        part = todo.pop()
        kind = part.get("type")
        if isinstance(kind, str):
            yield TYPE_ALIASES.get(kind, kind)
        elif isinstance(kind, list):
            yield from (TYPE_ALIASES.get(one, one) for one in kind if isinstance(one, str))
        elif "const" in part or isinstance(part.get("enum"), list):
            values = [part["const"]] if "const" in part else part["enum"][:_MOST_STEPS]
            yield from ("null" if value is None else _TYPES.get(type(value), "string") for value in values)
        for name in ("anyOf", "oneOf", "allOf"):
            todo += [one for one in part.get(name) or () if isinstance(one, Mapping)][:_MOST_STEPS]
        reference = part.get("$ref")
        if isinstance(reference, str) and (target := _resolve(reference, root)) is not None:
            todo.append(target)


def _resolve(reference: str, root: Mapping[str, Any]) -> Mapping[str, Any] | None:
    if not reference.startswith("#/"):
        return None
    found: Any = root
    for step in reference[2:].split("/")[:_MOST_STEPS]:
        found = found.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else None


def _null(text: str, _: bool) -> str | None:
    return "null" if text.lower() in _NOTHING else None


def _boolean(text: str, told: bool) -> str | None:
    """Yes and no are words like others where the schema does not ask for a boolean."""
    lower = text.lower()
    if lower in (_YES if told else _YES[:1]):
        return "true"
    return "false" if lower in (_NO if told else _NO[:1]) else None


def _number(text: str, whole: bool) -> str | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    if isinstance(value, int):
        return text
    if whole:
        return str(int(value)) if value.is_integer() and abs(value) < 1 << 53 else None
    return text


def _integer(text: str, told: bool) -> str | None:
    return _number(text, True) if told or "." not in text else None


def _any_number(text: str, _: bool) -> str | None:
    return _number(text, False)


def _container(opening: str) -> Callable[[str, bool], str | None]:
    def read(text: str, _: bool) -> str | None:
        if not text.startswith(opening):
            return None
        return text if is_json(text) else python_value(text) or mended(text)

    return read


_READERS: tuple[tuple[str, Callable[[str, bool], str | None]], ...] = (
    ("null", _null),
    ("boolean", _boolean),
    ("integer", _integer),
    ("number", _any_number),
    ("array", _container("[")),
    ("object", _container("{")),
)


def _depth(text: str) -> int:
    """At least how deep brackets are inside each other."""
    depth = most = 0
    for character in text:
        if character in "([{":
            depth += 1
            most = max(most, depth)
        elif character in ")]}":
            depth -= 1
    return most
