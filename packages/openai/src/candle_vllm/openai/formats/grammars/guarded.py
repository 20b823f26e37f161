"""JSON whose strings hold no closing tag, for formats that write JSON between tags and look for the tag alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from candle_vllm.openai.formats.grammars.schemas import Root, Schema

_TEXT, _ANY = "guarded-text", "guarded-value"
_KEYS = "^[A-Za-z_][A-Za-z0-9_.-]{0,63}$"
_SEVERAL = ("anyOf", "oneOf", "allOf")


class Guard:
    """Changes schemas so that no string in a value holds one of some marks.

    Keys that a schema leaves open are plain names; an object that names properties has no others.

    Args:
        root: what the schemas are part of, for errors.
        marks: what no string may hold.
    """

    def __init__(self, root: Root, marks: Sequence[str]) -> None:
        self._root = root
        self._marks = [mark[: end if (end := mark.find(mark[0], 1)) > 0 else None] for mark in marks]
        self._patterns = [f"^{avoiding(mark)}$" for mark in self._marks]

    def apply(self, schema: Schema) -> dict[str, Any]:
        """The same schema with fewer strings; it stands for itself, and its references are to its `$defs`."""
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
                raise self._root.refused("enum", f"{value!r:.60} has a mark of the format in it")
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
            asked = {key: schema[key] for key in ("minLength", "maxLength", "pattern", "format") if key in schema}
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
        return {"type": kind, **{key: value for key, value in schema.items() if key in _NUMBERS and kind in _NUMERIC}}

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


_NUMERIC = ("integer", "number")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")


def avoiding(mark: str) -> str:
    """A regular expression of the texts without `mark`, whose first character stands in it but once."""
    first = re.escape(mark[0])
    within = [re.escape(mark[1:end]) for end in range(1, len(mark))]
    again = "|".join(f"{begun}{first}" for begun in within)
    away = "|".join(f"{begun}[^{_in_class(mark[end])}{_in_class(mark[0])}]" for end, begun in enumerate(within, 1))
    return f"(?:[^{_in_class(mark[0])}]|{first}(?:{again})*(?:{away}))*(?:{first}(?:{again})*(?:{'|'.join(within)}))?"


def _in_class(character: str) -> str:
    return "\\" + character if character in "\\]^-[" else character


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [*value, *(text for one in value.values() for text in _strings(one))]
    return [text for one in value for text in _strings(one)] if isinstance(value, list) else []
