# SPDX-License-Identifier: MIT
"""Terminals of unquoted strings, numbers and words, and JSON whose strings contain none of a format's tags."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from llguidance import regex_to_lark

from candle_vllm.core.sampling.json_cases import brackets
from candle_vllm.core.sampling.json_opposites import lacking
from candle_vllm.openai.formats.grammars.schemas import OWN, Branch, Root, Schema, patterns
from candle_vllm.openai.formats.grammars.writer import Writer, quoted
from candle_vllm.openai.formats.values import SPELLINGS

_TEXT, _ANY = "guarded-text", "guarded-value"
_KEYS = "^[A-Za-z_][A-Za-z0-9_.-]{0,63}$"
_SEVERAL = ("anyOf", "oneOf", "allOf")


class Guard:
    """Changes schemas so that no string in a value contains one of the given marks.

    Keys that a schema does not name must match `_KEYS`; an object with named properties has no other keys.

    Args:
        root: the schema of the tool's arguments, for errors.
        marks: texts that no string may contain.
    """

    def __init__(self, root: Root, marks: Sequence[str]) -> None:
        self._root = root
        self._marks = marks
        self._patterns = [lacking(mark) for mark in marks]

    def apply(self, schema: Schema) -> dict[str, Any]:
        """Return `schema` with restricted strings, and with the `$defs` that its references need."""
        if not self._marks:
            return dict(schema)
        changed = self._node(schema)
        definitions = {name: self._node(part) for name, part in schema.get("$defs", {}).items()}
        text = {"type": "string", "allOf": [{"type": "string", "pattern": pattern} for pattern in self._patterns]}
        anything = [
            *({"type": kind} for kind in ("null", "boolean", "number")),
            {"$ref": f"#/$defs/{_TEXT}"},
            {"type": "array", "items": {"$ref": f"#/$defs/{_ANY}"}},
            self._map({"$ref": f"#/$defs/{_ANY}"}),
        ]
        return {**changed, "$defs": {**definitions, _TEXT: text, _ANY: {"anyOf": anything}}}

    def _node(self, schema: Any) -> Any:
        if schema is False:
            return False
        if schema is True or not schema:
            return {"$ref": f"#/$defs/{_ANY}"}
        if "$ref" in schema:
            return schema
        for value in [*schema.get("enum", []), *([schema["const"]] if "const" in schema else [])]:
            if any(mark in text for text in _strings(value) for mark in self._marks):
                raise self._root.refused(
                    "enum" if "enum" in schema else "const", f"{value!r:.60} has a mark of the format in it"
                )
        if "enum" in schema or "const" in schema:
            return schema
        found = {name: [self._node(part) for part in schema[name]] for name in _SEVERAL if name in schema}
        rest = {name: value for name, value in schema.items() if name not in _SEVERAL and name != "$defs"}
        if "type" not in rest and found:
            return {**rest, **found}
        kinds = rest.get("type", ["null", "boolean", "number", "array", "object", "string"])
        kinds = [kinds] if isinstance(kinds, str) else kinds
        parts = [self._typed(kind, rest) for kind in kinds]
        if found:
            return {"allOf": [parts[0] if len(parts) == 1 else {"anyOf": parts}, found]}
        return parts[0] if len(parts) == 1 else {"anyOf": parts}

    def _typed(self, kind: str, schema: Schema) -> dict[str, Any]:
        if kind == "string":
            asked = {key: schema[key] for key in OWN["string"] if key in schema}
            text = {"$ref": f"#/$defs/{_TEXT}"}
            own = [{"type": "string", "pattern": pattern} for pattern in self._patterns]
            return {"allOf": [{"type": "string", **asked}, *own]} if asked else text
        if kind == "array":
            found = {key: schema[key] for key in ("minItems", "maxItems") if key in schema}
            if "prefixItems" in schema:
                found["prefixItems"] = [self._node(part) for part in schema["prefixItems"]]
            return {"type": "array", "items": self._node(schema.get("items", True)), **found}
        if kind == "object":
            return self._object(schema)
        return {"type": kind, **{key: value for key, value in schema.items() if key in OWN.get(kind, ())}}

    def _object(self, schema: Schema) -> dict[str, Any]:
        if "patternProperties" in schema:
            raise self._root.refused("patternProperties", "name the properties")
        found = {key: schema[key] for key in ("required", "minProperties", "maxProperties") if key in schema}
        properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        missing = {key: others for key in schema.get("required", []) if key not in properties}
        properties = {key: self._node(part) for key, part in {**properties, **missing}.items()}
        if properties or others is False:
            return {"type": "object", "properties": properties, "additionalProperties": False, **found}
        return {**self._map(self._node(others)), **found}

    @staticmethod
    def _map(schema: Any) -> dict[str, Any]:
        return {"type": "object", "patternProperties": {_KEYS: schema}, "additionalProperties": False}


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [*value, *(text for one in value.values() for text in _strings(one))]
    return [text for one in value for text in _strings(one)] if isinstance(value, list) else []


INTEGER = "/-?(0|[1-9][0-9]{0,17})/"
NUMBER = r"/-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,17})?([eE][+\-]?[0-9]{1,2})?/"
_MOST_LENGTH = 1 << 16
_LABEL, _HEX, _N = r"[A-Za-z0-9]([A-Za-z0-9\-]{0,30}[A-Za-z0-9])?", "[0-9a-fA-F]{1,4}", "[0-9]{1,6}"
_CLOCK = f"T({_N}H({_N}M({_N}S)?)?|{_N}M({_N}S)?|{_N}S)"
_URI = r"([A-Za-z0-9._~!$&'()*+,;=:@\/?\-]|%[0-9A-Fa-f]{2})*"
_FORMATS = {  # core writes patterns of date, time and date-time, and removes formats that it does not know
    "uuid": r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}",
    "ipv4": r"((25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])\.){3}(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])",
    "ipv6": f"({_HEX}:){{7}}{_HEX}|({_HEX}:){{1,7}}:|:(:{_HEX}){{1,7}}|::|"
    + "|".join(f"({_HEX}:){{1,{before}}}(:{_HEX}){{1,{7 - before}}}" for before in range(1, 7)),
    "email": rf"[A-Za-z0-9_+\-]{{1,32}}(\.[A-Za-z0-9_+\-]{{1,31}}){{0,3}}@{_LABEL}(\.{_LABEL}){{1,3}}",
    "hostname": rf"{_LABEL}(\.{_LABEL}){{0,5}}",
    "duration": f"P(({_N}Y({_N}M({_N}D)?)?|{_N}M({_N}D)?|{_N}D)({_CLOCK})?|{_CLOCK}|{_N}W)",
    "uri": r"[A-Za-z][A-Za-z0-9+.\-]{0,15}:(\/\/[A-Za-z0-9.\-]{1,99}(:[0-9]{1,5})?"
    rf"([\/?]{_URI})?|[A-Za-z0-9]{_URI})(#{_URI})?",
}
_WORDS: Mapping[str, tuple[Any, ...]] = {"null": (None,), "boolean": (True, False)}
_AROUND = r"[\s\x1c-\x1f]*"
_LOOKS = re.compile(r"\\.|\(\?<?[=!]")  # escapes, and the beginnings of look-arounds
_EMPTY = ("array", "object")  # types whose empty value `Nested` writes as an empty text


def string_body(writer: Writer, root: Root, branch: Branch, unlike: Collection[str] = ()) -> str:
    """Return a terminal of the unquoted strings that `branch` of `root` allows; of several values, callers add "".

    The terminal of free text excludes texts that the parser would read as a value of one of the JSON types `unlike`.
    """
    if branch.values is not None:
        return writer.terminal(" | ".join(quoted(value) for value in branch.values if value) or quoted(""))
    if root.grammar is not None:
        return writer.custom(root.grammar)
    parts = _lengths(root, branch.schema)
    parts += [f"/{_anchored(root, pattern)}/" for pattern in patterns(branch.schema)]
    parts += [f"/{_FORMATS[branch.schema['format']]}/"] if "format" in branch.schema else []
    spelt = {kind: f"({SPELLINGS[kind]})" + "?" * (kind in _EMPTY) for kind in sorted(unlike) if kind in SPELLINGS}
    parts += [f"~/{_AROUND}{one}{_AROUND}/" for one in spelt.values()]
    if not parts or parts[0].startswith("~"):  # a complement alone would include texts that are not UTF-8
        parts = ["TEXT", *parts]
    return writer.terminal(" & ".join(dict.fromkeys(parts)))


def scalar(writer: Writer, branch: Branch, *, python: bool = False) -> str | None:
    """Return the terminal of a number, boolean or null without further constraints; None for other branches.

    With `python`, booleans and null may also be written as in Python.
    """
    if branch.type in _WORDS:
        values = _WORDS[branch.type] if branch.values is None else branch.values
        words = [json.dumps(value) for value in values] + [str(value) for value in values if python]
        return writer.terminal(" | ".join(map(quoted, words)))
    if branch.values is not None or branch.schema:
        return None
    numbers = {"integer": INTEGER, "number": NUMBER}
    return writer.terminal(numbers[branch.type]) if branch.type in numbers else None


def json_value(writer: Writer, root: Root, branch: Branch, guard: Guard | None = None) -> str:
    """Return an expression of a branch's value as JSON; `guard` restricts strings in lists and objects."""
    plain = scalar(writer, branch)
    if plain is not None:
        return plain
    whole: Schema = {"type": branch.type, **branch.schema} if branch.values is None else {"enum": [*branch.values]}
    schema = root.self_contained(whole)
    return writer.json(guard.apply(schema) if guard and branch.type in ("array", "object") else schema)


def edged(writer: Writer, body: str) -> str:
    """Return a terminal of `body` alone, after a line break, or between two line breaks; the parser removes these."""
    if body == "TEXT":
        return body
    bare = writer.terminal(rf"{body} & ~/\n(?s:.*)/")
    last = writer.terminal(rf"{body} & ~/(?s:.*)\n/")
    return writer.terminal(rf'{bare} | "\n" {last} | "\n" {body} "\n"')


def _lengths(root: Root, schema: Schema) -> list[str]:
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    for keyword in ("minLength", "maxLength"):
        if schema.get(keyword, 0) > _MOST_LENGTH:
            raise root.refused(keyword, f"at most {_MOST_LENGTH} is supported")
    if most is not None and least > most:
        raise root.refused("minLength", f"{least} is above maxLength {most}")
    if most is None and not least:
        return []
    return [f"/(?s:.){{{least},{'' if most is None else most}}}/"]


def _anchored(root: Root, pattern: str) -> str:
    """Convert a pattern, which may match anywhere in a text, to a pattern of the whole text."""
    marks = [(match.group(), depth) for match, depth in brackets(pattern)]
    inner = pattern.removeprefix("^")
    begins, ends = inner != pattern, bool(marks) and marks[-1] == ("$", 0) and pattern.endswith("$")
    inner = inner[:-1] if ends else inner
    anchors = sum(mark in "^$" for mark, _ in marks)
    if anchors != begins + ends or any(found[1] in "bB?" for found in _LOOKS.findall(pattern)):
        raise root.refused("pattern", "only ^ at its start and $ at its end are supported, no \\b and no look-around")
    if (begins or ends) and ("|", 0) in marks:
        raise root.refused("pattern", "put the alternatives between ^ and $ in brackets: ^(?:a|b)$")
    try:
        inner = regex_to_lark(inner, "dw")
    except ValueError as error:
        raise root.refused("pattern", str(error)) from None
    return f"{'' if begins else '(?s:.*)'}(?:{inner}){'' if ends else '(?s:.*)'}"
