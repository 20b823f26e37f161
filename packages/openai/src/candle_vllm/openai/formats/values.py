# SPDX-License-Identifier: MIT
"""Text of an argument -> its JSON value, by the tool's schema: for formats that write values without quotes."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote

from candle_vllm.core.sampling.json_rules import TYPE_ALIASES
from candle_vllm.openai.formats.json_text import is_json, mended
from candle_vllm.openai.formats.json_value import number

_MOST_STEPS = 64  # parts of a schema that are examined for one argument
_MOST_LISTED = 1 << 16  # strings of one enumeration
JSON_NAMES = {
    bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object", type(None): "null",
}  # fmt: skip
_TYPING = frozenset({"type", "enum", "const", "$ref", "anyOf", "oneOf", "allOf"})  # keywords that restrict the type
_INTEGER = r"-?(?:0|[1-9][0-9]*)"
SPELLINGS: Mapping[str, str] = {
    "null": "null|None",
    "boolean": "true|false|True|False",
    "integer": _INTEGER,
    "number": rf"{_INTEGER}(?:\.[0-9]+)?(?:[eE][+\-]?[0-9]+)?",
    "array": r"\[(?s:.*)",
    "object": r"\{(?s:.*)",
}
"""Regular expressions of texts that are not strings even if a string is allowed; grammars exclude them from strings.
Null and booleans are spelt as in JSON or, by chat templates, as in Python; other spellings are not included."""
_WORDS = {"None": "null", "True": "true", "False": "false"}
_SCALARS = {kind: re.compile(SPELLINGS[kind]) for kind in ("null", "boolean", "integer", "number")}
JSON_TYPES = frozenset({"string", *SPELLINGS})
_NUMBERS = frozenset({"integer", "number"})
_NOTHING = ("null", "none", "nil")
_YES, _NO = ("true", "yes"), ("false", "no")
_MOST_LITERAL = 1 << 16  # characters of a Python literal, whose syntax tree takes hundreds of bytes for each
_MOST_STRING = 1 << 24  # characters of a string literal, whose syntax tree is a single leaf
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)


class Kinds(NamedTuple):
    """The values that an argument may have, as far as they decide how its text is read.

    Attributes:
        types: JSON types other than string.
        text: whether any string is allowed.
        listed: strings that the schema enumerates.
        marked: whether the format marks strings, and this value has no such mark.
    """

    types: frozenset[str]
    text: bool = False
    listed: frozenset[str] = frozenset()
    marked: bool = False

    @property
    def is_string(self) -> bool:
        """Whether the text is a string, even if it looks like another type."""
        return not self.types and not self.marked and (self.text or bool(self.listed))

    @property
    def is_anything(self) -> bool:
        return self.text and self.types == ANYTHING.types


ANYTHING = Kinds(frozenset(SPELLINGS), text=True)
"""Kinds of an argument whose schema does not restrict its type."""


def kinds_of(kind: str) -> Kinds:
    return Kinds(frozenset(), text=True) if kind == "string" else Kinds(frozenset({kind}))


def argument_kinds(schema: Mapping[str, Any], key: str) -> Kinds:
    """Return the values that the schema of a tool's arguments allows for the argument `key`."""
    return schema_kinds(sub_schema(schema, key, schema), schema)


def sub_schema(schema: Mapping[str, Any], key: str | None, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the schema of an object's entry `key`, or of a list's items if `key` is None.

    References in `schema` are relative to `root`.
    """
    own, others = list[Any](), list[Any]()
    for part in _parts(schema, root):
        properties = part.get("properties")
        if key is None:
            own.append(part.get("items"))
        elif isinstance(properties, Mapping) and key in properties:
            own.append(properties[key])
        elif not part.get("patternProperties"):
            others.append(part.get("additionalProperties"))
    return {"allOf": [one for one in own or others if isinstance(one, Mapping)]}


def escaped(text: str) -> str:
    """Escape a text for the inside of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def to_json(text: str, kinds: Kinds) -> str:
    """Return the JSON of an argument that the model wrote as `text`; `kinds` are the values that the schema allows.

    A text that the schema enumerates is a string. If any string is allowed, only texts that match `SPELLINGS` have
    another type; if no string is allowed, further words and spellings of numbers are converted too. If nothing matches,
    the value is a string. Quotes around a whole value are JSON's, unless any string is allowed: then they are part of
    the value; if every value is allowed, quotes mean a string. In a format that marks strings, a value without the mark
    is a string only if it can be nothing else.
    """
    bare, plain = text.strip(), text
    quoted = _quoted(bare) if kinds.is_anything or kinds.marked or not kinds.text else None
    if quoted is not None:
        if kinds.is_anything:
            return bare
        bare, plain = quoted.strip(), quoted
    value = _spelt(bare, kinds.types)
    listed = next((one for one in ((text,) if kinds.text else (text, plain, bare)) if one in kinds.listed), None)
    if listed is not None and (value is None or not kinds.marked):
        return json.dumps(listed, ensure_ascii=False)
    if value is None and (kinds.marked or not kinds.text) and not kinds.is_anything:
        value = _meant(bare, kinds)
    return json.dumps(plain, ensure_ascii=False) if value is None else value


def _quoted(text: str) -> str | None:
    """Return the content of a JSON string; None for any other text."""
    try:
        return json.loads(text) if text[:1] == '"' else None
    except ValueError:
        return None


def python_value(text: str) -> str | None:
    """Convert a Python literal to JSON; None for any other text."""
    string = text[:1] in ("'", '"')
    if len(text) > (_MOST_STRING if string else _MOST_LITERAL) or (not string and _depth(text) > 64):
        return None
    try:
        text = json.dumps(ast.literal_eval(_ESCAPE.sub(_valid_escape, text)), ensure_ascii=False, allow_nan=False)
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")  # joins surrogate pairs
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _valid_escape(match: re.Match[str]) -> str:
    """Double a backslash that does not begin a valid escape."""
    return match[0] if match[1] in "\\'\"abfnrtvxuUN01234567\n" else "\\" + match[0]


def schema_kinds(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Kinds:
    """Return the values that a schema allows; its references are relative to `root`."""
    types, listed = set[str](), set[str]()
    whole = [schema, *(one for one in _listed(schema.get("allOf")) if isinstance(one, Mapping))]
    typed = any({"type", "enum", "const"} & one.keys() for one in whole)
    for part in _parts(schema, root):
        if not typed and any(_is_untyped(one, root) for name in ("anyOf", "oneOf") for one in _listed(part.get(name))):
            return ANYTHING
        named = {TYPE_ALIASES.get(kind, kind) for kind in _listed(part.get("type")) if isinstance(kind, str)}
        if "const" in part or isinstance(part.get("enum"), list):
            values = [part["const"]] if "const" in part else part["enum"][:_MOST_LISTED]
            listed.update(value for value in values if isinstance(value, str))
            named = (named or {JSON_NAMES.get(type(value), "string") for value in values}) - {"string"}
        types |= named
    if not types and not listed:
        return ANYTHING
    return Kinds(frozenset(types - {"string"}), "string" in types, frozenset(listed))


def _is_untyped(option: Any, root: Mapping[str, Any]) -> bool:
    if isinstance(option, Mapping) and isinstance(reference := option.get("$ref"), str):
        option = _resolve(reference, root)
    return option is True or (isinstance(option, Mapping) and not _TYPING & option.keys())


def _parts(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a schema, its alternatives and the targets of its references."""
    todo = [schema]
    for _ in range(_MOST_STEPS):
        if not todo:
            return
        part = todo.pop()
        yield part
        for name in ("anyOf", "oneOf", "allOf"):
            todo += [one for one in _listed(part.get(name)) if isinstance(one, Mapping)][:_MOST_STEPS]
        reference = part.get("$ref")
        if isinstance(reference, str) and (target := _resolve(reference, root)) is not None:
            todo.append(target)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _resolve(reference: str, root: Mapping[str, Any]) -> Mapping[str, Any] | None:
    start, *steps = reference.split("/")
    found: Any = root if start == "#" else None
    for step in steps[:_MOST_STEPS]:
        found = {str(index): one for index, one in enumerate(found)} if isinstance(found, list) else found
        name = unquote(step).replace("~1", "/").replace("~0", "~")
        found = found.get(name) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else None


def _spelt(text: str, types: frozenset[str]) -> str | None:
    """Return the JSON of a text in the spelling of one of the types; None if it has none of them."""
    for kind, spelling in _SCALARS.items():
        if kind in types and spelling.fullmatch(text):
            return _number(text, kind == "integer") if kind in _NUMBERS else _WORDS.get(text, text)
    if ("array" if text[:1] == "[" else "object" if text[:1] == "{" else "") in types:
        return text if is_json(text) else python_value(text) or mended(text)
    return None


def _meant(text: str, kinds: Kinds) -> str | None:
    """Convert other spellings of null, booleans and numbers; None for an enumerated string in another letter case."""
    lower, types = text.lower(), kinds.types
    if any(lower == one.lower() for one in kinds.listed):
        return None
    if "null" in types and lower in _NOTHING:
        return "null"
    if "boolean" in types and lower in _YES + _NO:
        return "true" if lower in _YES else "false"
    text = number(text) or text
    whole = _number(text, True) if "integer" in types else None
    return _number(text, False) if whole is None and "number" in types else whole


def _number(text: str, whole: bool) -> str | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    if isinstance(value, int) or not whole:
        return text
    return str(int(value)) if value.is_integer() and abs(value) < 1 << 53 else None


def _depth(text: str) -> int:
    """Return the nesting depth of brackets, including brackets in strings."""
    depth = most = 0
    for character in text:
        if character in "([{":
            depth += 1
            most = max(most, depth)
        elif character in ")]}":
            depth -= 1
    return most
